"""The entries of `loss_functions` in a training configuration. Nothing here imports torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from distillkit.configuration.section import Section, refuse_flag
from distillkit.errors import ConfigError
from distillkit.types import Draws

__all__ = ["HARMLESS", "HIDDEN_LOSSES", "LINEAR_LOSSES", "LOSS_NAMES", "LossConfig", "named_losses", "refuse_draws"]

Function = Literal[
    "cross_entropy",
    "kl",
    "reverse_kl",
    "jsd",
    "tvd",
    "skewed_kl",
    "skewed_reverse_kl",
    "adaptive_kl",
    "hinge",
    "logistic_ranking",
    "hs_mse",
    "hs_cosine",
]

LOSS_NAMES: tuple[str, ...] = get_args(Function)
HIDDEN_LOSSES = ("hs_mse", "hs_cosine")
LINEAR_LOSSES = ("cross_entropy", "kl")
"""Losses whose gradient is linear in the teacher's probabilities: only of these, draws give an unbiased gradient."""

_SKEWED = ("skewed_kl", "skewed_reverse_kl")
_RANKING = ("hinge", "logistic_ranking")
_OF_DISTRIBUTIONS = tuple(name for name in LOSS_NAMES if name not in ("cross_entropy", *HIDDEN_LOSSES))
# Settings that apply only to certain losses; `weight` and `sparse_chunk_length` apply to all.
_TAKES: dict[str, tuple[str, ...]] = {
    "temperature": _OF_DISTRIBUTIONS,
    "missing_probability_handling": _OF_DISTRIBUTIONS,
    "published_temperature": _OF_DISTRIBUTIONS,
    "margin": ("hinge",),
    "alpha": _SKEWED,
    "top_k": _RANKING,
}
# Published configurations set a temperature and a handling for every loss; these values are accepted everywhere, since
# they have no effect.
HARMLESS = {"temperature": 1.0, "missing_probability_handling": "zero", "published_temperature": False}
"""The values that these settings have if they are not set."""

# Published configurations use two names for the handling with a bucket for missing probability.
_SYNONYMS = {"symmetric_uniform": "uniform"}
Handling = Annotated[
    Literal["zero", "uniform", "label"],
    BeforeValidator(lambda value: _SYNONYMS.get(value, value) if isinstance(value, str) else value),
    WithJsonSchema({"enum": ["zero", "uniform", "label", *_SYNONYMS], "type": "string"}),
]


class LossConfig(Section):
    """One loss in the weighted sum Σ weight·loss / Σ weight."""

    function: Function = Field(description="Name of the loss.")
    weight: float = Field(
        ge=0,
        allow_inf_nan=False,
        description="Weight in the sum; a loss with weight 0 is computed and logged, but has no effect on training.",
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="Temperature T: both distributions, over the stored tokens and all others as one outcome, are "
        "softened to p^(1/T) and renormalised, and the loss is multiplied by T²; 1 by default. Of a dataset in the "
        "format sampled, it is that of the draws, and need not be set.",
    )
    published_temperature: bool | None = Field(
        default=None,
        description="true softens the student over its whole vocabulary instead, as the published toolkit does. At "
        "temperatures other than 1 the loss then has other values, and the teacher itself does not minimise it. No "
        "effect with a live teacher that has all tokens. false, the default, is logged unless it is set.",
    )
    missing_probability_handling: Handling | None = Field(
        default=None,
        description="How to treat the teacher's probability outside the stored tokens: zero (the default; the default "
        "`loss_functions` use uniform) drops it and renormalises the rest; uniform (or symmetric_uniform) compares it "
        "as one bucket with that of the student; label assigns it to the true next token.",
    )
    sparse_chunk_length: int | None = Field(
        default=None,
        ge=1,
        description="Maximum number of positions whose logits are in memory at once; by default chosen from the sizes "
        "of the vocabulary and of the device's memory.",
    )
    margin: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Margin of hinge, as a difference of probabilities; by default that of the teacher.",
    )
    alpha: float | None = Field(
        default=None, gt=0, lt=1, description="Skew of skewed_kl and skewed_reverse_kl; 0.1 by default."
    )
    top_k: int | None = Field(
        default=None,
        ge=2,
        description="Number of the teacher's most probable tokens that a ranking loss compares, with a live teacher "
        "that returns all logits; 128 by default.",
    )

    _numbers = field_validator(
        "weight", "temperature", "sparse_chunk_length", "margin", "alpha", "top_k", mode="before"
    )(refuse_flag)

    @model_validator(mode="after")
    def _only_what_it_takes(self) -> LossConfig:
        for name, functions in _TAKES.items():
            value = getattr(self, name)
            if value in (None, HARMLESS.get(name)) or self.function in functions:
                continue
            raise ValueError(
                f"{name}: {value!r} has no effect with {self.function}; it applies to {', '.join(functions)} only"
            )
        return self

    @property
    def drops_missing(self) -> bool:
        """Whether it drops the teacher's probability outside the stored tokens."""
        return self.function in _OF_DISTRIBUTIONS and self.missing_probability_handling in (None, "zero")


def refuse_draws(configs: Sequence[LossConfig], draws: Draws, source: str) -> None:
    """Refuse losses that cannot be computed from draws of the teacher.

    Args:
        configs: the losses of a run.
        draws: how the teacher was drawn from.
        source: where the draws are, for messages.

    Raises:
        ConfigError: a loss is not linear in the teacher's probabilities, or has another temperature than the draws.
    """
    for config in configs:
        if config.function not in LINEAR_LOSSES:
            raise ConfigError(
                f"loss_functions: {config.function} is not linear in the teacher's probabilities, and {source} has "
                f"{draws.number} draws of them per row (format sampled), whose {config.function} is another one on "
                f"average: use {' or '.join(LINEAR_LOSSES)}, or a dataset of another format, such as compact-50"
            )
        if config.function == "kl" and config.temperature not in (None, draws.temperature):
            raise ConfigError(
                f"loss_functions: kl has temperature {config.temperature:g}, but {source} was drawn at temperature "
                f"{draws.temperature:g}, and draws cannot be softened: leave temperature out, or capture with "
                f"`temperature: {config.temperature:g}` under `sampled`"
            )


def named_losses(configs: Sequence[LossConfig]) -> list[tuple[str, float, LossConfig]]:
    """Name losses for logging; repeated ones are numbered (`kl`, `kl@2`).

    Returns:
        (name, fraction of the total weight, configuration) for each loss. The fractions sum to one.

    Raises:
        ConfigError: the weights sum to 0.
    """
    total, seen = sum(config.weight for config in configs), Counter[str]()
    if not total > 0:
        raise ConfigError(f"loss_functions: the weights sum to {total:g}; at least one must be positive")
    if total == math.inf:
        raise ConfigError("loss_functions: the weights sum to more than a number can be; divide them all by the same")
    named: list[tuple[str, float, LossConfig]] = []
    for config in configs:
        seen[config.function] += 1
        nth = seen[config.function]
        name = config.function if nth == 1 else f"{config.function}@{nth}"
        named.append((name, config.weight / total, config))
    return named

"""The entries of `loss_functions` in a training configuration. Nothing here imports torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from distillkit.errors import ConfigError

__all__ = ["HIDDEN_LOSSES", "LOSS_NAMES", "LossConfig", "named_losses"]

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

_SKEWED = ("skewed_kl", "skewed_reverse_kl")
_RANKING = ("hinge", "logistic_ranking")
# Which settings have a meaning for which losses; `weight` and `sparse_chunk_length` are for all.
_TAKES: dict[str, tuple[str, ...]] = {
    "temperature": tuple(name for name in LOSS_NAMES if name not in ("cross_entropy", *HIDDEN_LOSSES)),
    "missing_probability_handling": tuple(name for name in LOSS_NAMES if name not in ("cross_entropy", *HIDDEN_LOSSES)),
    "margin": ("hinge",),
    "alpha": _SKEWED,
    "top_k": _RANKING,
}
# Published configurations give every loss a temperature and a handling; these values change nothing anywhere.
_HARMLESS = {"temperature": 1.0, "missing_probability_handling": "zero"}

# Published configurations spell the bucket for missing probability in two ways.
_SYNONYMS = {"symmetric_uniform": "uniform"}


class LossConfig(BaseModel):
    """One loss of the weighted sum Σ weight·loss / Σ weight.

    Attributes:
        function: its name in the table of losses.
        weight: finite and ≥ 0; with 0 the loss is computed and logged, and trains nothing.
        temperature: T > 0: both distributions are taken at p^(1/T), and the loss is multiplied by T².
        missing_probability_handling: what becomes of the teacher's probability outside the stored ids: `zero` drops it
            and renormalises the rest, `uniform` (also spelt `symmetric_uniform`) keeps it as one bucket, for the
            student too, `label` gives it to the true next token.
        sparse_chunk_length: most positions whose logits exist at one time; chosen from the vocabulary's size and the
            memory if not given.
        margin: of `hinge`, in probability; the teacher's own difference if not given.
        alpha: of the skewed divergences, 0 < α < 1; 0.1 if not given.
        top_k: of a ranking loss with a teacher that gives all ids: how many of its first ones are ranked; 128 if not
            given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    function: Function
    weight: float = Field(ge=0, allow_inf_nan=False)
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    missing_probability_handling: Literal["zero", "uniform", "label"] | None = None
    sparse_chunk_length: int | None = Field(default=None, ge=1)
    margin: float | None = Field(default=None, allow_inf_nan=False)
    alpha: float | None = Field(default=None, gt=0, lt=1)
    top_k: int | None = Field(default=None, ge=2)

    @field_validator("missing_probability_handling", mode="before")
    @classmethod
    def _one_spelling(cls, value: object) -> object:
        return _SYNONYMS.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _only_what_it_takes(self) -> LossConfig:
        for name, functions in _TAKES.items():
            value = getattr(self, name)
            if value in (None, _HARMLESS.get(name)) or self.function in functions:
                continue
            raise ValueError(
                f"{name}: {value!r} has no meaning for {self.function}; {', '.join(functions)} take"
                f"{'s' if len(functions) == 1 else ''} one"
            )
        return self


def named_losses(configs: Sequence[LossConfig]) -> list[tuple[str, float, LossConfig]]:
    """Name losses as they are logged, a number from the second of a kind on (`kl`, `kl@2`), with their shares of the
    total, which sum to one.

    Raises:
        ConfigError: the weights sum to 0.
    """
    total, seen = sum(config.weight for config in configs), Counter[str]()
    if not total > 0:
        raise ConfigError(f"loss_functions: the weights sum to {total:g}; at least one must be positive")
    named: list[tuple[str, float, LossConfig]] = []
    for config in configs:
        seen[config.function] += 1
        nth = seen[config.function]
        name = config.function if nth == 1 else f"{config.function}@{nth}"
        named.append((name, config.weight / total, config))
    return named

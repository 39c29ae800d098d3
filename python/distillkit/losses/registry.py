"""Losses by name. To add a loss, write its function and add a line to one of the tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from distillkit.losses import divergences, hidden, ranking
from distillkit.losses.config import LossConfig, named_losses, refuse_draws
from distillkit.losses.positions import Comparison, Positions

__all__ = [
    "HIDDEN",
    "LOSSES",
    "HiddenTerm",
    "Term",
    "hidden_terms_of",
    "kl_with_rest_of",
    "loss",
    "terms_of",
]

LossFunction = Callable[[Positions], torch.Tensor]
"""A loss of each of N positions, (N,) float32, differentiable in the student's logits."""

_ALPHA = 0.1
_RANKED = 128


def _cross_entropy(positions: Positions) -> torch.Tensor:
    """Negative log-likelihood of the true next tokens: −log softmax(z_n)[label_n]."""
    return -positions.label_logprobs()


def kl_with_rest_of(positions: Positions) -> torch.Tensor:
    """(N,) KL(p ‖ q) over the stored ids and the rest, 0 for a student that is the teacher; 0 without a teacher's
    distribution."""
    between = positions.comparison_with_rest()
    return divergences.kl(between).where(between.known(), 0.0)


def _kl(config: LossConfig) -> LossFunction:
    """The KL divergence; of a teacher's draws, which have a temperature of their own, T² · KL(shares ‖ q)."""
    compared = _compared(config, divergences.kl)

    def each(positions: Positions) -> torch.Tensor:
        draws = positions.draws
        if draws is None:
            return compared(positions)
        refuse_draws([config], draws, "the teacher")
        between = positions.comparison_of_draws()
        return divergences.kl(between).where(between.known(), 0.0) * draws.temperature**2

    return each


def _compared(
    config: LossConfig, measure: Callable[[Comparison], torch.Tensor], first: int | None = None
) -> LossFunction:
    """Make a loss from a measure (N,) of a comparison: T² · measure at the configured temperature.

    It is 0 at positions for which the teacher has no distribution. If `first` is set, only the teacher's first
    ids are compared: the stored ones, or the `first` most probable ones of a teacher with all ids.
    """
    temperature, missing = config.temperature or 1.0, config.missing_probability_handling or "zero"
    published = bool(config.published_temperature)

    def each(positions: Positions) -> torch.Tensor:
        if positions.draws is not None:
            refuse_draws([config], positions.draws, "the teacher")
        between = positions.comparison(temperature, missing, published=published)
        if first is not None:
            between = positions.comparison_of_first(between, first)
        return measure(between).where(between.known(), 0.0) * temperature**2

    return each


def _ranking(config: LossConfig, measure: Callable[[Comparison], torch.Tensor]) -> LossFunction:
    return _compared(config, measure, config.top_k or _RANKED)


def _alpha(config: LossConfig) -> float:
    return _ALPHA if config.alpha is None else config.alpha


LOSSES: dict[str, Callable[[LossConfig], LossFunction]] = {
    "cross_entropy": lambda config: _cross_entropy,
    "kl": _kl,
    "reverse_kl": lambda config: _compared(config, divergences.reverse_kl),
    "jsd": lambda config: _compared(config, divergences.jsd),
    "tvd": lambda config: _compared(config, divergences.tvd),
    "skewed_kl": lambda config: _compared(config, lambda c: divergences.skewed_kl(c, _alpha(config))),
    "skewed_reverse_kl": lambda config: _compared(config, lambda c: divergences.skewed_reverse_kl(c, _alpha(config))),
    "adaptive_kl": lambda config: _compared(config, divergences.adaptive_kl),
    "hinge": lambda config: _ranking(config, lambda c: ranking.hinge(c, config.margin)),
    "logistic_ranking": lambda config: _ranking(config, ranking.logistic_ranking),
}
"""Losses of logits by name; each entry makes the loss from its configuration."""


def loss(function: str, **settings: Any) -> LossFunction:
    """Return a loss of logits by name, with settings as in `LossConfig`."""
    return LOSSES[function](LossConfig(function=function, weight=1.0, **settings))  # type: ignore[arg-type]


HIDDEN: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "hs_mse": hidden.hs_mse,
    "hs_cosine": hidden.hs_cosine,
}
"""Losses of hidden states by name: from the student's (N, H) and the teacher's (N, H) to (N,)."""


@dataclass(frozen=True)
class Term:
    """A loss of logits in a weighted sum.

    Attributes:
        name: the name under which it is logged; see `named_losses`.
        weight: its fraction of the total weight; the weights of all terms sum to one.
        function: the loss.
    """

    name: str
    weight: float
    function: LossFunction


@dataclass(frozen=True)
class HiddenTerm:
    """A loss of hidden states in a weighted sum; attributes as for `Term`."""

    name: str
    weight: float
    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def each(self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """(N,) the loss of each position, averaged over the pairs of layers."""
        return torch.stack([self.function(student, teacher) for student, teacher in pairs]).mean(0)


def terms_of(configs: Sequence[LossConfig]) -> tuple[Term, ...]:
    """Build those terms of Σ weight·loss / Σ weight that are losses of logits.

    Raises:
        ConfigError: the weights sum to 0.
    """
    return tuple(
        Term(name, weight, LOSSES[config.function](config))
        for name, weight, config in named_losses(configs)
        if config.function in LOSSES
    )


def hidden_terms_of(configs: Sequence[LossConfig]) -> tuple[HiddenTerm, ...]:
    """Build those terms of Σ weight·loss / Σ weight that are losses of hidden states.

    Raises:
        ConfigError: the weights sum to 0.
    """
    return tuple(
        HiddenTerm(name, weight, HIDDEN[config.function])
        for name, weight, config in named_losses(configs)
        if config.function in HIDDEN
    )

"""Name → loss. A new loss is a function and a line in `LOSSES`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from distillkit.errors import ConfigError
from distillkit.losses.config import LossConfig
from distillkit.losses.sparse import Missing, StudentLogits, cross_entropy, kl
from distillkit.types import SparseLogprobs

__all__ = ["LOSSES", "Targets", "Term", "terms_of"]


@dataclass(frozen=True)
class Targets:
    """What the counted positions should predict.

    Attributes:
        labels: (N,) int64, the true next token.
        teacher: (N, k) torch tensors, the teacher's distribution over it.
    """

    labels: torch.Tensor
    teacher: SparseLogprobs

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def rows(self, start: int, stop: int) -> Targets:
        """Return positions start … stop − 1."""
        teacher = SparseLogprobs(self.teacher.ids[start:stop], self.teacher.logprobs[start:stop])
        return Targets(self.labels[start:stop], teacher)


LossFunction = Callable[[StudentLogits, Targets], torch.Tensor]
"""Sum of a loss over N positions, float32, differentiable in the student's logits."""


def _cross_entropy(config: LossConfig) -> LossFunction:
    return lambda student, targets: cross_entropy(student, targets.labels)


def _kl(config: LossConfig) -> LossFunction:
    temperature = config.temperature or 1.0
    # `label` has been refused by then.
    missing: Missing = "uniform" if config.missing_probability_handling == "uniform" else "zero"
    return lambda student, targets: kl(student, targets.teacher, temperature=temperature, missing=missing)


LOSSES: dict[str, Callable[[LossConfig], LossFunction]] = {"cross_entropy": _cross_entropy, "kl": _kl}
"""From a loss's configuration to the loss."""


@dataclass(frozen=True)
class Term:
    """One loss of a weighted sum.

    Attributes:
        name: how it is logged; the function's name, with a number from the second of its kind on (`kl`, `kl@2`).
        weight: its share of the total; the weights of all terms sum to one.
        function: the loss.
    """

    name: str
    weight: float
    function: LossFunction


def terms_of(configs: Sequence[LossConfig]) -> tuple[Term, ...]:
    """Build the terms of Σ weight·loss / Σ weight.

    Raises:
        ConfigError: a loss is not implemented, or the weights sum to 0.
    """
    total = sum(config.weight for config in configs)
    if not total > 0:
        raise ConfigError(f"loss_functions: the weights sum to {total:g}; at least one must be positive")
    terms: list[Term] = []
    for config in configs:
        if config.function not in LOSSES:
            raise ConfigError(f"loss_functions: {config.function} is not supported yet; there are {', '.join(LOSSES)}")
        nth = 1 + sum(term.name.split("@")[0] == config.function for term in terms)
        name = config.function if nth == 1 else f"{config.function}@{nth}"
        terms.append(Term(name, config.weight / total, LOSSES[config.function](config)))
    return tuple(terms)

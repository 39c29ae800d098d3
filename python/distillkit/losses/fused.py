"""One pass from the student's hidden states to all losses, their gradients and the statistics, a chunk of positions at
a time.

Logits of a whole batch, [B, S, V], never exist: each chunk's logits are made from its hidden states, every loss is
taken from them, and the chunk's gradients are computed before the next chunk begins. So the pass holds one chunk of
logits, and multiplies by the head three times (forward, gradient of the hidden states, gradient of the weight) like a
plain forward and backward, not four times like a recomputing one.

Shape legend: N counted positions, H hidden size, V width of the head, k stored ids a position, M statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from distillkit.lm_head import LMHead
from distillkit.losses.config import LossConfig
from distillkit.losses.sparse import StudentLogits, cross_entropy, kl, tensors_of
from distillkit.losses.table import Targets, Term, terms_of

__all__ = ["LossResult", "Objective"]

# One chunk's logits take this many float32 at most; a few arrays of that size are alive at a time.
_CHUNK_ELEMENTS = 2**24

# What is summed over positions besides the losses, in this order.
_COMMON_STATISTICS = ("positions", "teacher_mass", "student_mass", "top1_agreement", "topk_overlap")

Weights = tuple[torch.Tensor, "torch.Tensor | None"]


@dataclass(frozen=True)
class LossResult:
    """What a pass gives.

    Attributes:
        loss: float32 scalar, Σ over positions of the weighted losses; differentiable.
        statistics: (M,) float32 sums over positions, without gradient, by `Objective.names`.
    """

    loss: torch.Tensor
    statistics: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """The losses of a run, and what is measured beside them.

    Attributes:
        terms: the losses and their weights.
        extra: measured and summed, but not part of the loss; they come first in `names`.
        chunk_length: most positions whose logits exist at a time; chosen from the head's width if None.
    """

    terms: tuple[Term, ...]
    extra: tuple[Term, ...] = ()
    chunk_length: int | None = None
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        names = (*_COMMON_STATISTICS, *(term.name for term in (*self.extra, *self.terms)))
        object.__setattr__(self, "names", names)

    @classmethod
    def training(cls, configs: Sequence[LossConfig]) -> Objective:
        """Build what a training step minimises and logs."""
        lengths = [config.sparse_chunk_length for config in configs if config.sparse_chunk_length is not None]
        return cls(terms_of(configs), chunk_length=min(lengths) if lengths else None)

    def evaluation(self) -> Objective:
        """Build the same objective with two fixed yardsticks beside it, that do not depend on the configured losses.

        `eval:cross_entropy`, and `eval:kl`, the divergence at temperature 1 from the renormalised stored probabilities.
        """
        yardsticks = (
            Term("eval:cross_entropy", 0.0, lambda student, targets: cross_entropy(student, targets.labels)),
            Term("eval:kl", 0.0, lambda student, targets: kl(student, targets.teacher)),
        )
        return Objective(self.terms, yardsticks, self.chunk_length)

    def __call__(self, head: LMHead, hidden: torch.Tensor, targets: Targets) -> LossResult:
        """Compute losses and statistics of N positions.

        Args:
            head: the student's head.
            hidden: (N, H) hidden states of the counted positions, after the final norm.
            targets: of those positions.
        """
        weight, bias = head.weights()
        if len(targets) == 0:
            # Every process must reach every parameter, or the others wait for its gradients.
            zero = sum((part.sum() * 0.0).float() for part in (hidden, weight, bias) if part is not None)
            assert isinstance(zero, torch.Tensor)
            return LossResult(zero, self._no_statistics(hidden))
        if torch.is_grad_enabled():
            loss, statistics = _ChunkedLoss.apply(self, head, targets, hidden, weight, bias)
            return LossResult(loss, statistics)
        loss = torch.zeros((), device=hidden.device)
        statistics = self._no_statistics(hidden)
        for start, stop in self._chunks(len(targets), head.size):
            part = self._chunk(head, hidden[start:stop], (weight, bias), targets.rows(start, stop))
            loss, statistics = loss + part.loss, statistics + part.statistics
        return LossResult(loss, statistics)

    def _chunks(self, positions: int, vocabulary: int) -> list[tuple[int, int]]:
        most = self.chunk_length or max(1, _CHUNK_ELEMENTS // vocabulary)
        # Chunks of one size: a small last one would cost as many passes over the weight as a full one.
        length = -(-positions // -(-positions // most))
        return [(start, min(start + length, positions)) for start in range(0, positions, length)]

    def _no_statistics(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(self.names), dtype=torch.float32, device=hidden.device)

    def _chunk(self, head: LMHead, hidden: torch.Tensor, weights: Weights, targets: Targets) -> LossResult:
        """Take every loss and statistic from one chunk's logits."""
        student = StudentLogits(head(hidden, weights))
        terms = (*self.extra, *self.terms)
        values = [term.function(student, targets) for term in terms]
        weighted = [term.weight * value for term, value in zip(terms, values, strict=True) if term.weight]
        with torch.no_grad():
            statistics = torch.stack([*_common_statistics(student, targets), *(value.detach() for value in values)])
        return LossResult(torch.stack(weighted).sum(), statistics)


def _common_statistics(student: StudentLogits, targets: Targets) -> list[torch.Tensor]:
    """Sums over positions, in the order of `_COMMON_STATISTICS`.

    The overlap is the share of the stored ids that are among the student's own k most probable ones.
    """
    ids, logprobs = tensors_of(targets.teacher)
    # An id of probability 0 may stand for one outside the student's head: it is nowhere in these counts.
    stored = torch.isfinite(logprobs)
    at_ids = student.logits.gather(-1, ids)
    student_probability = (at_ids - student.normaliser().unsqueeze(-1)).exp() * stored
    top = student.logits.topk(ids.shape[-1], dim=-1)
    overlap = torch.logical_and(at_ids >= top.values[:, -1:], stored).float().mean(-1)
    return [
        torch.full((), len(targets), dtype=torch.float32, device=at_ids.device),
        logprobs.exp().sum(),
        student_probability.sum(),
        torch.eq(top.indices[:, 0], ids[:, 0]).float().sum(),
        overlap.sum(),
    ]


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one forward; the backward only scales them.

    The head's weight and bias are arguments, so that autograd hands their gradients to whoever owns them: DDP's hooks,
    an FSDP2 gather, PEFT's copies.
    """

    @staticmethod
    def forward(
        ctx: Any,
        objective: Objective,
        head: LMHead,
        targets: Targets,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = ctx.needs_input_grad[3:]
        weights = (
            weight.detach().requires_grad_(wanted[1]),
            None if bias is None else bias.detach().requires_grad_(wanted[2]),
        )
        loss = torch.zeros((), device=hidden.device)
        statistics = objective._no_statistics(hidden)
        # Kept in float32: chunk after chunk, a bfloat16 sum would lose the small contributions, and the backward's
        # factor would be rounded.
        hidden_gradient = torch.empty_like(hidden, dtype=torch.float32) if wanted[0] else None
        sums = [
            torch.zeros_like(leaf, dtype=torch.float32) if leaf is not None and leaf.requires_grad else None
            for leaf in weights
        ]
        for start, stop in objective._chunks(len(targets), weight.shape[0]):
            with torch.enable_grad():
                rows = hidden[start:stop].detach().requires_grad_(wanted[0])
                part = objective._chunk(head, rows, weights, targets.rows(start, stop))
                inputs = [leaf for leaf in (rows, *weights) if leaf is not None and leaf.requires_grad]
                gradients = iter(torch.autograd.grad(part.loss, inputs)) if inputs else iter(())
            if hidden_gradient is not None:
                hidden_gradient[start:stop] = next(gradients)
            for total in sums:
                if total is not None:
                    total += next(gradients)
            loss += part.loss.detach()
            statistics += part.statistics
            del part
        ctx.save_for_backward(hidden_gradient, *sums)
        ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias))
        ctx.mark_non_differentiable(statistics)
        return loss, statistics

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place: a second [V, H] array would be the largest of the step. (A second backward through the same graph is
        # an error.)
        scaled = (
            None if saved is None else saved.mul_(gradients[0]).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (None, None, None, *scaled)

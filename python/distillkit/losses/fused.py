"""A single pass from the student's hidden states to all losses, gradients and statistics, one chunk of positions at a
time.

The logits of a full batch, [B, S, V], are never materialised: each chunk's logits are computed from its hidden states,
all losses from those logits, and the chunk's gradients before the next chunk starts. So the pass holds a single chunk
of logits, and multiplies by the head three times (forward, gradient of the hidden states, gradient of the weight), like
a plain forward and backward pass, rather than four times as with recomputation.

Matrix products are efficient with chunks of hundreds of positions, which amortise reading the weight; everything else
is efficient with few positions, which stay in the cache. So each chunk is processed in blocks, whose logits are
overwritten with their gradient. This needs a single [chunk, V] array, and the gradient of the weight is accumulated in
place.

Shape legend: N counted positions, H hidden size, V width of the head, k stored ids per position, S sources,
M statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from distillkit.losses.config import LossConfig
from distillkit.losses.positions import Positions, Targets, TeacherLogits
from distillkit.losses.registry import (
    HiddenTerm,
    Term,
    hidden_terms_of,
    kl_with_rest_of,
    loss,
    terms_of,
)
from distillkit.models.head import LMHead, logit_chunks
from distillkit.types import SparseLogprobs

__all__ = ["LossResult", "Objective", "PositionDetails"]

# Statistics that are summed over positions in addition to the losses, in this order.
_COMMON_STATISTICS = ("positions", "teacher_mass", "student_mass", "top1_agreement", "topk_overlap")

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""For each pair of matched layers, the hidden states (N, H) of the student (projected) and of the teacher."""


# How many of the student's and of the teacher's most probable tokens an evaluation keeps for each position.
_BEST = 5


class PositionDetails(NamedTuple):
    """What an evaluation keeps of individual positions, on the student's device. b ≤ 5 tokens each, best first.

    Attributes:
        kl: (N,) float32, KL(teacher ‖ student) over the stored ids and the rest, in nats.
        teacher_ids: (N, b) int64, the teacher's most probable tokens.
        teacher_logprobs: (N, b) float32, the teacher's log-probabilities of them; −inf where it has fewer.
        student_of_teacher: (N, b) float32, the student's log-probabilities of the teacher's tokens.
        student_ids: (N, b) int64, the student's most probable tokens.
        student_logprobs: (N, b) float32, the student's log-probabilities of them.
    """

    kl: torch.Tensor
    teacher_ids: torch.Tensor
    teacher_logprobs: torch.Tensor
    student_of_teacher: torch.Tensor
    student_ids: torch.Tensor
    student_logprobs: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[PositionDetails]) -> PositionDetails:
        """Concatenate the details of consecutive positions."""
        return cls(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@dataclass(frozen=True)
class LossResult:
    """The result of a pass.

    Attributes:
        loss: float32 scalar, Σ over positions of the weighted losses; differentiable.
        statistics: (S, M) float32 sums over the positions of each source, in the order of `Objective.names`; not
            differentiable.
        details: what an evaluation keeps of each position; None in training, and if there are no positions.
    """

    loss: torch.Tensor
    statistics: torch.Tensor
    details: PositionDetails | None = None


@dataclass(frozen=True)
class Objective:
    """The losses of a run, and additional metrics.

    Attributes:
        terms: the losses of logits and their weights.
        hidden_terms: the losses of hidden states and their weights.
        extra: losses that are only measured, not part of the objective; they come before the others in `names`.
        chunk_length: maximum positions per chunk of logits; if None, chosen from the head's width and device memory.
        detailed: also return the details of each position, which needs a pass without gradients.
        sources: number of datasets S that the positions come from, as `Targets.sources` says.
        names: names of the statistics.
    """

    terms: tuple[Term, ...]
    hidden_terms: tuple[HiddenTerm, ...] = ()
    extra: tuple[Term, ...] = ()
    chunk_length: int | None = None
    detailed: bool = False
    sources: int = 1
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        extra = (term.name for term in self.extra)
        object.__setattr__(self, "names", (*_COMMON_STATISTICS, *extra, *self.losses))

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of the losses in the objective."""
        return tuple(term.name for terms in (self.terms, self.hidden_terms) for term in terms)

    def total(self, values: Mapping[str, float]) -> float:
        """Return the weighted sum of the losses.

        Args:
            values: each loss by its name.
        """
        weights = [(term.name, term.weight) for terms in (self.terms, self.hidden_terms) for term in terms]
        return sum(weight * values[name] for name, weight in weights if weight)

    @classmethod
    def training(cls, configs: Sequence[LossConfig]) -> Objective:
        """Build the objective that a training step minimises and logs."""
        lengths = [config.sparse_chunk_length for config in configs if config.sparse_chunk_length is not None]
        return cls(terms_of(configs), hidden_terms_of(configs), chunk_length=min(lengths) if lengths else None)

    def evaluation(self) -> Objective:
        """Build the same objective plus metrics that do not depend on the configured losses.

        They are `eval:cross_entropy`, and the divergences at temperature 1 over the stored ids: `eval:kl` from their
        renormalised probabilities, and `eval:kl_with_rest` with all other ids as one more outcome. The details of each
        position come with them.
        """
        yardsticks = (
            Term("eval:cross_entropy", 0.0, loss("cross_entropy")),
            Term("eval:kl", 0.0, loss("kl")),
            Term("eval:kl_with_rest", 0.0, kl_with_rest_of),
        )
        return Objective(self.terms, self.hidden_terms, yardsticks, self.chunk_length, detailed=True)

    def __call__(self, head: LMHead, hidden: torch.Tensor, targets: Targets, layers: Layers = ()) -> LossResult:
        """Compute the losses and statistics of N positions.

        Args:
            head: the student's head.
            hidden: (N, H) hidden states of the counted positions, after the final norm.
            targets: the targets of those positions.
            layers: the matched hidden states of those positions, if there are hidden terms.
        """
        weight, bias = head.weights()
        if len(targets) == 0:
            # Every process must produce a gradient for every parameter, or the others would wait for it forever.
            parts = [hidden, weight, bias, *(student for student, _ in layers)]
            zero = torch.stack([(part.sum() * 0.0).float() for part in parts if part is not None]).sum()
            return LossResult(zero, torch.zeros(self.sources, len(self.names), device=hidden.device))
        if torch.is_grad_enabled():
            result = LossResult(*_ChunkedLoss.apply(self, head, targets, hidden, weight, bias))
        else:
            result = self._measured(head, hidden, (weight, bias), targets)
        return self._with_hidden(result, layers, targets)

    def _measured(
        self, head: LMHead, hidden: torch.Tensor, weights: tuple[torch.Tensor, torch.Tensor | None], targets: Targets
    ) -> LossResult:
        """Sum the losses and statistics of all chunks, without gradients."""
        total, statistics = self._totals(hidden)
        details = []
        for start, stop in logit_chunks(len(targets), weights[0].shape[0], hidden.device, self.chunk_length):
            raw = head.product(hidden[start:stop], weights)
            part = self._in_blocks(head, raw, targets.rows(start, stop))
            total += part.loss.to(total.device)
            statistics += part.statistics.to(total.device)
            details.append(part.details)
        return LossResult(total, statistics, _joined(details))

    def _with_hidden(self, result: LossResult, layers: Layers, targets: Targets) -> LossResult:
        """Add the losses of hidden states."""
        total, statistics = result.loss, [result.statistics]
        for term in self.hidden_terms:
            value = term.each(layers).to(total.device)
            total = total + term.weight * value.sum()
            statistics.append(self._by_source([value.detach()], targets))
        return LossResult(total, torch.cat(statistics, -1), result.details)

    def _by_source(self, values: Sequence[torch.Tensor], targets: Targets) -> torch.Tensor:
        """Sum statistics (N,) over the positions of each source, (S, M)."""
        columns = torch.stack(list(values), -1).float()
        if targets.sources is None:
            return columns.sum(0, keepdim=True)
        sums = torch.zeros(self.sources, columns.shape[-1], device=columns.device)
        return sums.index_add_(0, targets.sources.to(columns.device), columns)

    def _in_blocks(self, head: LMHead, raw: torch.Tensor, targets: Targets, *, replace: bool = False) -> LossResult:
        """Compute losses and statistics from a chunk's raw logits (n, V).

        Args:
            replace: overwrite the logits with the gradient of the loss.
        """
        total, statistics = self._totals(raw)
        details = []
        length = max(1, _block_elements(raw.device) // raw.shape[-1])
        for start in range(0, len(targets), length):
            block = raw[start : start + length]
            with torch.set_grad_enabled(replace):
                leaf = block.detach().requires_grad_(replace)
                part = self._losses(head.finish(leaf), targets.rows(start, start + length))
            if replace:
                block.copy_(torch.autograd.grad(part.loss, leaf)[0])
            total += part.loss.detach()
            statistics += part.statistics
            details.append(part.details)
        return LossResult(total, statistics, _joined(details))

    def _totals(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Float32 zeros for accumulating the loss and the statistics of logits."""
        count = len(self.names) - len(self.hidden_terms)
        return torch.zeros((), device=hidden.device), torch.zeros(self.sources, count, device=hidden.device)

    def _losses(self, logits: torch.Tensor, targets: Targets) -> LossResult:
        """Compute all losses and statistics from the logits of some positions."""
        positions = Positions(logits, targets)
        terms = (*self.extra, *self.terms)
        values = [term.function(positions) for term in terms]
        weighted = [term.weight * value.sum() for term, value in zip(terms, values, strict=True) if term.weight]
        total = torch.stack(weighted).sum() if weighted else logits.sum() * 0.0
        with torch.no_grad():
            first = positions.first()
            top = positions.student.logits.topk(first.ids.shape[-1], dim=-1)
            common = _common_statistics(positions, first, top)
            statistics = self._by_source([*common, *(value.detach() for value in values)], targets)
            details = _details(positions, first, top) if self.detailed else None
        return LossResult(total, statistics, details)


def _block_elements(device: torch.device) -> int:
    """Number of logits per block: as many as fit in a CPU's cache, or as are needed to keep a GPU busy."""
    return 2**21 if device.type == "cpu" else 2**25


def _joined(parts: Sequence[PositionDetails | None]) -> PositionDetails | None:
    kept = [part for part in parts if part is not None]
    return PositionDetails.joined(kept) if kept else None


def _details(positions: Positions, first: SparseLogprobs, top: Any) -> PositionDetails:
    """Return what is kept of each position; arguments as of `_common_statistics`."""
    ids, logprobs = (each[:, :_BEST] for each in first.tensors())
    student = positions.student
    normaliser = student.normaliser().unsqueeze(-1)
    return PositionDetails(
        kl=kl_with_rest_of(positions),
        teacher_ids=ids,
        teacher_logprobs=logprobs.float(),
        student_of_teacher=student.logits.gather(-1, ids) - normaliser,
        student_ids=top.indices[:, :_BEST],
        student_logprobs=top.values[:, :_BEST] - normaliser,
    )


def _common_statistics(positions: Positions, first: SparseLogprobs, top: Any) -> list[torch.Tensor]:
    """(N,) statistics of each position, in the order of `_COMMON_STATISTICS`.

    Args:
        positions: student and teacher.
        first: the teacher's first k ids.
        top: the student's k largest logits, as `torch.topk` returns them.

    The overlap is the fraction of the teacher's first k ids (those that are stored of this position) that are among the
    student's k most probable ones.
    """
    student = positions.student
    ids, logprobs = first.tensors()
    # An id with probability 0 may be a placeholder for one outside the student's head, so it is never counted.
    stored = torch.isfinite(logprobs)
    at_ids = student.logits.gather(-1, ids)
    count = stored.sum(-1, keepdim=True)
    least = top.values.gather(-1, (count - 1).clamp_min(0))
    overlap = torch.logical_and(at_ids >= least, stored).sum(-1) / count.squeeze(-1).clamp_min(1)
    one = torch.ones_like(overlap)
    agreement = torch.eq(top.indices[:, 0], ids[:, 0]).float()
    if isinstance(positions.targets.teacher, TeacherLogits):
        return [one, one, one, agreement, overlap]
    student_mass = ((at_ids - student.normaliser().unsqueeze(-1)).exp() * stored).sum(-1)
    return [one, logprobs.exp().sum(-1), student_mass, agreement, overlap]


class _ChunkedLoss(torch.autograd.Function):
    """Computes loss and gradients in the forward pass; the backward pass only scales the gradients.

    The head's weight and bias are arguments so that autograd passes their gradients on to DDP's hooks, an FSDP2 gather
    or PEFT's copies.
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
        sums = _Gradients(hidden, weight, bias, ctx.needs_input_grad[3:])
        total, statistics = objective._totals(hidden)
        chunks = logit_chunks(len(targets), weight.shape[0], weight.device, objective.chunk_length)
        buffer = weight.new_empty(chunks[0][1], weight.shape[0], dtype=sums.dtype)
        # `sums` has already chosen the precision, so autocast must not do so per operation.
        with torch.autocast(hidden.device.type, enabled=False):
            for start, stop in chunks:
                rows = hidden[start:stop].to(weight.device, sums.dtype)
                logits = head.product(rows, sums.weights, out=buffer[: stop - start])
                part = objective._in_blocks(head, logits, targets.rows(start, stop), replace=True)
                total += part.loss.to(total.device)
                statistics += part.statistics.to(total.device)
                sums.add(slice(start, stop), rows, logits)
        ctx.save_for_backward(sums.hidden, sums.weight, sums.bias)
        ctx.dtypes = tuple(None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias))
        ctx.mark_non_differentiable(statistics)
        return total, statistics

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # In place, since a second [V, H] array would be the largest of the step. (Autograd rejects a second backward
        # pass through the same graph.)
        scaled = (
            None if saved is None else saved.mul_(gradients[0].to(saved.device)).to(dtype)
            for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (None, None, None, *scaled)


class _Gradients:
    """Gradients of a linear head's inputs, accumulated over chunks.

    They are kept in float32: a running sum in bfloat16 would lose small contributions, and scaling it in the backward
    pass would round again.

    Args:
        hidden, weight, bias: the inputs to differentiate by.
        wanted: which of the three need a gradient.
    """

    def __init__(
        self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, wanted: Sequence[bool]
    ) -> None:
        kind = weight.device.type
        autocast = torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if autocast else weight.dtype
        """Precision of the products: that of autocast if enabled, else that of the weight."""
        self.weights = (
            weight.detach().to(self.dtype),
            None if bias is None else bias.detach().to(self.dtype),
        )
        self.hidden = torch.empty_like(hidden, dtype=torch.float32) if wanted[0] else None
        self.weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        self.bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None

    def add(self, where: slice, rows: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add a chunk's gradients, from its hidden states (n, H) and the gradient of its raw logits (n, V)."""
        if self.bias is not None:
            self.bias += gradient.sum(0, dtype=torch.float32)
        if self.hidden is not None:
            self.hidden[where] = (gradient @ self.weights[0]).to(self.hidden.device)
        if self.weight is None:
            return
        if self.dtype == torch.float32:
            self.weight.addmm_(gradient.T, rows)
        else:
            self.weight += gradient.T @ rows

"""What losses compare at a position: the student's and the teacher's distributions over the same outcomes.

A teacher provides log-probabilities of its k most probable ids (`SparseLogprobs`) or logits of all ids
(`TeacherLogits`). Either is turned into a `Comparison`: individual outcomes, plus one for all other ids together, the
rest R. Divergences (`divergences`) and ranking losses (`ranking`) are defined on comparisons.

The probability outside the stored ids is the missing mass m = max(0, 1 − Σ_K p), where K is the set of stored ids with
p > 0. Handling it gives two distributions over individual outcomes and R, each of which sums to one. Here q is
softmax(z) over the entire vocabulary, and q_R its total probability of all ids that are not individual outcomes:

    zero:     p_i / Σ_K p for i in K, and 0 for R, against (q_K, q_R)
    uniform:  p_i for i in K, and m for R, against (q_K, q_R); divided by p's sum if rounding made it exceed one
    label:    p_i + m·[i = y] for i in K ∪ {y}, and 0 for R, against (q_K∪{y}, q_R); y is the true next token

A temperature T softens these two: both are raised to 1/T and divided by their sums. They are then equal if and only if
they were before, so at every temperature a divergence is 0 where, and only where, student and teacher agree on them. If
every id is an outcome, the results are softmax(z / T) of both. (Softening the entire vocabulary would require raising
each of the V − k other probabilities to 1/T. For the teacher, the top k do not determine them, and m^(1/T) is far less
than their sum: compared with it, a student would have to give them far less probability than the teacher does.)

The published toolkit does that. With `published`, p is softened as above, but q is softmax(z / T) over the entire
vocabulary, and q_R its total probability outside.

If the teacher's ids were drawn (`SparseLogprobs.draws`), p are their shares of the draws, which sum to one and are only
compared as they are: against softmax(z / T) over the entire vocabulary, with T the temperature of the draws. The
gradient of Σ p (log p − log q) is then, on average over the draws, that of the KL divergence of the teacher's entire
distribution, softmax(z / T). Nothing is missing, and the handling of missing mass has no effect.

If the teacher's probability of y was stored separately and y is not in K, `uniform` and `label` use K ∪ {y} instead of
K, also in m: y becomes an outcome of its own, excluded from the rest. (With `label`, y is still assigned all of the
mass outside K, or its own probability if rounding of the others left less than that.) `zero` ignores it.

Shape legend: N positions, V width of the student's head, k stored ids per position, m outcomes of a comparison.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from distillkit.codec.topk import sparse_from_logits
from distillkit.errors import InputError
from distillkit.losses.logits import StudentLogits
from distillkit.models.head import LMHead
from distillkit.types import Draws, SparseLogprobs

__all__ = [
    "Comparison",
    "DenseTeacher",
    "DenseTeachers",
    "Missing",
    "Positions",
    "Targets",
    "TeacherDistribution",
    "TeacherLogits",
]

Missing = Literal["zero", "uniform", "label"]

# Stands for log 0: finite, so that multiplying it by a probability of 0 gives 0 rather than NaN.
NEVER = -1e5

# For a teacher with all ids: number of most probable ids that the statistics use as its first ids.
_FIRST = 10


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's distributions over all ids.

    Attributes:
        logits: (N, V of the teacher) float32; not differentiable.
    """

    logits: torch.Tensor


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher's distributions over all ids as hidden states, whose logits are computed a chunk at a time.

    Attributes:
        hidden: (N, H) the teacher's hidden states after the final norm, H its hidden size.
        head: the teacher's head.
        weights: the result of `head.weights()`.
    """

    hidden: torch.Tensor
    head: LMHead
    weights: tuple[torch.Tensor, torch.Tensor | None]

    @torch.no_grad()
    def logits(self, start: int, stop: int) -> TeacherLogits:
        """Compute the logits of positions start … stop − 1."""
        return TeacherLogits(self.head(self.hidden[start:stop], self.weights))


@dataclass(frozen=True)
class DenseTeachers:
    """The distributions of several teachers, each at some of the positions; averaged where several have one.

    Attributes:
        size: number of positions N.
        width: number of ids of the widest teacher.
        parts: for each teacher its positions (n,) int64, ascending, its distributions there, and its weight.
    """

    size: int
    width: int
    parts: tuple[tuple[torch.Tensor, DenseTeacher, float], ...]

    @torch.no_grad()
    def logits(self, start: int, stop: int) -> TeacherLogits:
        """Compute the log-probabilities of positions start … stop − 1: log Σ w p / Σ w over the teachers of each."""
        stop = min(stop, self.size)
        device = self.parts[0][0].device
        total = torch.full((stop - start, self.width), -torch.inf, device=device)
        weights = torch.zeros(stop - start, 1, device=device)
        for rows, teacher, weight in self.parts:
            first, last = torch.searchsorted(rows, torch.tensor([start, stop], device=rows.device)).tolist()
            if first == last:
                continue
            at = rows[first:last] - start
            own = teacher.logits(first, last).logits.float().log_softmax(-1).to(device) + math.log(weight)
            total[at, : own.shape[-1]] = torch.logaddexp(total[at, : own.shape[-1]], own)
            weights[at] += weight
        return TeacherLogits(total - weights.log())


TeacherDistribution = SparseLogprobs | TeacherLogits | DenseTeacher | DenseTeachers


@dataclass(frozen=True)
class Targets:
    """The targets of the counted positions.

    Attributes:
        labels: (N,) int64, the true next tokens.
        teacher: the teacher's distributions of the next token at the N positions, as torch tensors.
        hidden: (N, H) teacher hidden states for each layer matched with a student layer; empty if none are.
        label_logprobs: (N,) float32, the teacher's log-probability of each label, whether or not it is among a sparse
            teacher's ids; NaN where unknown; None if unknown everywhere.
        sources: (N,) int64, the number of the dataset that each position comes from; None if there is only one.
    """

    labels: torch.Tensor
    teacher: TeacherDistribution
    hidden: tuple[torch.Tensor, ...] = ()
    label_logprobs: torch.Tensor | None = None
    sources: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def rows(self, start: int, stop: int) -> Targets:
        """Return positions start … stop − 1, with a dense teacher's logits computed, and without hidden states."""
        teacher = self.teacher
        if isinstance(teacher, SparseLogprobs):
            teacher = SparseLogprobs(teacher.ids[start:stop], teacher.logprobs[start:stop], teacher.draws)
        elif isinstance(teacher, TeacherLogits):
            teacher = TeacherLogits(teacher.logits[start:stop])
        else:
            teacher = teacher.logits(start, stop)
        known, sources = (None if each is None else each[start:stop] for each in (self.label_logprobs, self.sources))
        return Targets(self.labels[start:stop], teacher, label_logprobs=known, sources=sources)


@dataclass(frozen=True)
class Comparison:
    """Teacher p and student q over the same outcomes. At entries that are not outcomes, both logarithms are `NEVER`.

    Attributes:
        log_p, log_q: (N, m) log-probabilities of the individual outcomes. log_q is differentiable in the student's
            logits.
        outcomes: (N, m) bool, which entries are outcomes.
        log_p_rest: (N,) the teacher's log-probability of all other ids together, `NEVER` where it is zero; None if it
            is zero everywhere.
        student_rest: computes the student's log-probability of the rest, (N,); None if there are no other ids.
    """

    log_p: torch.Tensor
    log_q: torch.Tensor
    outcomes: torch.Tensor
    log_p_rest: torch.Tensor | None
    student_rest: Callable[[], torch.Tensor] | None

    @cached_property
    def log_q_rest(self) -> torch.Tensor | None:
        """(N,) the student's log-probability of the rest, at least `NEVER`; None if there is no rest."""
        return None if self.student_rest is None else self.student_rest().clamp_min(NEVER)

    def known(self) -> torch.Tensor:
        """(N,) bool: the positions for which the teacher has a distribution."""
        known = self.outcomes.any(-1)
        return known if self.log_p_rest is None else known | (self.log_p_rest > NEVER)


class Positions:
    """Student and teacher at some positions. Everything that losses share is computed once.

    Args:
        logits: (N, V) student logits, any float dtype.
        targets: the targets of the same positions, as returned by `Targets.rows`.
    """

    def __init__(self, logits: torch.Tensor, targets: Targets) -> None:
        self.targets = targets
        labels = targets.labels.unsqueeze(-1)
        if isinstance(targets.teacher, SparseLogprobs):
            ids, _ = targets.teacher.tensors()
            labels = torch.cat([ids, labels], -1)
        self.student = StudentLogits(logits, labels)
        self._comparisons: dict[tuple[float, Missing, bool], Comparison] = {}
        self._of_draws: Comparison | None = None

    @property
    def draws(self) -> Draws | None:
        """How the teacher's ids were drawn, if they were."""
        teacher = self.targets.teacher
        return teacher.draws if isinstance(teacher, SparseLogprobs) else None

    @cached_property
    def teacher_logits(self) -> torch.Tensor | None:
        """(N, at most V) float32 logits of a teacher with all ids, without ids beyond the student's head; else None.

        Heads for the same tokenizer may be padded to different widths.
        """
        teacher = self.targets.teacher
        if isinstance(teacher, SparseLogprobs):
            return None
        if isinstance(teacher, (DenseTeacher, DenseTeachers)):
            raise InputError("a dense teacher's logits are not computed yet: select positions with Targets.rows first")
        return teacher.logits[:, : self.student.size].to(self.student.logits.device)

    def first(self, k: int = _FIRST) -> SparseLogprobs:
        """Return the stored ids, or the k most probable ones of a teacher with all ids."""
        logits = self.teacher_logits
        if logits is None:
            return self._stored
        return sparse_from_logits(logits, min(k, logits.shape[-1]))

    def label_logprobs(self) -> torch.Tensor:
        """(N,) the student's log-probabilities of the true next tokens."""
        return self.student.logprobs()[:, -1]

    def comparison(self, temperature: float = 1.0, missing: Missing = "zero", *, published: bool = False) -> Comparison:
        """Compare teacher and student at a temperature; `published` as in the module docstring."""
        key = (temperature, missing, published)
        if key not in self._comparisons:
            dense = self.teacher_logits
            if dense is not None:
                self._comparisons[key] = self._dense(dense, temperature)
            elif published:
                between = self._sparse(missing, self.targets.label_logprobs, temperature)
                self._comparisons[key] = _softened(between, temperature, student=False)
            else:
                between = self._sparse(missing, self.targets.label_logprobs)
                self._comparisons[key] = _softened(between, temperature)
        return self._comparisons[key]

    def comparison_of_draws(self) -> Comparison:
        """Compare the shares of a teacher's draws with the student at their temperature."""
        if self._of_draws is None:
            temperature = 1.0 if self.draws is None else self.draws.temperature
            self._of_draws = self._sparse("zero", None, temperature)
        return self._of_draws

    def comparison_with_rest(self) -> Comparison:
        """Compare over the stored ids and the rest, whether or not the teacher's probability of the label is known."""
        if self.draws is not None:
            return self.comparison_of_draws()
        if self.teacher_logits is not None or self.targets.label_logprobs is None:
            return self.comparison(missing="uniform")
        return self._sparse("uniform", None)

    def comparison_of_first(self, whole: Comparison, k: int) -> Comparison:
        """Limit a comparison to the teacher's first ids: the stored ones, or its k most probable ones if it has all."""
        if self.teacher_logits is None:
            return whole
        ids, _ = self.first(k).tensors()
        return Comparison(
            whole.log_p.gather(-1, ids), whole.log_q.gather(-1, ids), torch.ones_like(ids).bool(), None, None
        )

    @property
    def _stored(self) -> SparseLogprobs:
        """The teacher's stored ids.

        Raises:
            InputError: the teacher is not a sparse one.
        """
        if not isinstance(self.targets.teacher, SparseLogprobs):
            raise InputError(f"expected a teacher with stored ids, found {type(self.targets.teacher).__name__}")
        return self.targets.teacher

    def _sparse(
        self, missing: Missing, label_logprobs: torch.Tensor | None, student_temperature: float = 1.0
    ) -> Comparison:
        """Compare p with softmax(z / student_temperature), neither of them softened any further."""
        ids, logprobs = self._stored.tensors()
        # Not by the width alone: rows may be filled up with ids of probability 0.
        everything = ids.shape[-1] >= self.student.size and bool(torch.isfinite(logprobs).all())
        # If every id is stored, nothing is missing, and 1 − Σ p is only rounding error.
        missing = "zero" if everything else missing
        log_p, log_p_rest = _target(ids, logprobs, self.targets.labels, missing, label_logprobs)
        outcomes = torch.isfinite(log_p)
        log_p = log_p.clamp_min(NEVER)
        log_q = self.student.logprobs(student_temperature).clamp_min(NEVER).where(outcomes, NEVER)
        student = self.student  # capturing `self` would create a cycle that keeps the logits until garbage collection
        rest = None if everything else lambda: student.logprob_outside(outcomes, student_temperature)
        log_p_rest = None if log_p_rest is None else log_p_rest.clamp_min(NEVER)
        if log_p_rest is not None and ids.shape[-1] + 1 >= self.student.size:
            # With the label, every id may be an outcome; the rest is then only rounding error.
            log_p_rest = log_p_rest.masked_fill(outcomes.sum(-1) >= self.student.size, NEVER)
        return Comparison(log_p, log_q, outcomes, log_p_rest, rest)

    def _dense(self, teacher_logits: torch.Tensor, temperature: float) -> Comparison:
        width = teacher_logits.shape[-1]
        log_p = (teacher_logits / temperature).log_softmax(-1).clamp_min(NEVER)
        log_q = self.student.all_logprobs(temperature)
        # The rest is the student's probability of ids that the teacher does not have.
        beyond = log_q[:, width:]
        rest = None if width == self.student.size else lambda: beyond.logsumexp(-1)
        log_q = log_q[:, :width].clamp_min(NEVER)
        return Comparison(log_p, log_q, torch.ones_like(log_p, dtype=torch.bool), None, rest)


def _softened(between: Comparison, temperature: float, *, student: bool = True) -> Comparison:
    """Raise both distributions of a comparison, or the teacher's only, to 1/T and renormalise them."""
    if temperature == 1.0:
        return between
    log_p, log_p_rest = _raised(between.log_p, between.log_p_rest, temperature)
    if not student:
        return Comparison(log_p, between.log_q, between.outcomes, log_p_rest, between.student_rest)
    log_q, log_q_rest = _raised(between.log_q, between.log_q_rest, temperature)
    rest = None if log_q_rest is None else functools.partial(_same, log_q_rest)
    return Comparison(log_p, log_q, between.outcomes, log_p_rest, rest)


def _same(value: torch.Tensor) -> torch.Tensor:
    return value


def _raised(
    logs: torch.Tensor, rest: torch.Tensor | None, temperature: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Raise the probabilities of outcomes (N, m) and the rest (N,) to 1/T, and renormalise; `NEVER` stays `NEVER`."""
    whole = logs if rest is None else torch.cat([logs, rest.unsqueeze(-1)], -1)
    some = whole > NEVER
    scaled = torch.where(some, whole / temperature, -torch.inf)
    # At a position without any mass, subtracting −inf would give NaN.
    total = scaled.logsumexp(-1, keepdim=True).where(some.any(-1, keepdim=True), 0.0)
    whole = torch.where(some, (scaled - total).clamp_min(NEVER), NEVER)
    return (whole, None) if rest is None else (whole[..., :-1], whole[..., -1])


def _target(
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    labels: torch.Tensor,
    missing: Missing,
    label_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the training target p from stored log-probabilities; see the module docstring.

    Args:
        ids, logprobs: (N, k); a log-probability of −inf means a probability of 0.
        labels: (N,).
        label_logprobs: (N,), NaN where unknown.

    Returns:
        log p (N, k + 1), whose last column is the label, −inf unless it is an outcome of its own; and log p_R (N,) for
        `uniform`, −inf where nothing is missing, or None for the others. At a position without any mass, the target is
        all zeros, except where `uniform` or `label` assigns the missing mass.
    """
    logprobs = logprobs.float()
    extra = torch.full_like(logprobs[:, :1], -torch.inf)
    remainder = None
    if missing != "zero":
        is_label = (ids == labels.unsqueeze(-1)) & torch.isfinite(logprobs)
        if label_logprobs is not None:
            alone = ~is_label.any(-1) & torch.isfinite(label_logprobs)
            extra = torch.where(alone, label_logprobs, -torch.inf).unsqueeze(-1)
        stored = logprobs.double().exp().sum(-1, keepdim=True) + extra.double().exp()
        log_missing = (1.0 - stored).clamp_min(0.0).log().float()
        if missing == "uniform":
            remainder = log_missing.squeeze(-1)
        else:
            logprobs = torch.where(is_label, torch.logaddexp(logprobs, log_missing), logprobs)
            extra = torch.where(is_label.any(-1, keepdim=True), extra, torch.logaddexp(extra, log_missing))
    outcomes = torch.cat([logprobs, extra], -1)
    total = outcomes.logsumexp(-1)
    if remainder is not None:
        total = torch.logaddexp(total, remainder)
    # At a position without any mass, this makes the probabilities 0 rather than NaN.
    total = torch.where(torch.isinf(total), torch.zeros_like(total), total)
    return outcomes - total.unsqueeze(-1), None if remainder is None else remainder - total

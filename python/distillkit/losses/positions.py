"""What is compared at a position: the student's distribution and the teacher's, over the same outcomes.

A teacher gives log-probabilities of its k most probable ids (`SparseLogprobs`) or logits of all ids (`TeacherLogits`).
Either is turned into a `Comparison`: outcomes one by one, and one more for all other ids together, the rest R.
Divergences (`divergences`) and ranking losses (`ranking`) are written once, for comparisons.

What is not among the k ids is the missing mass m = max(0, 1 − Σ_K p), where K are the stored ids with p > 0. With
temperature T, and Z the sum that makes the target a distribution:

    zero:     p̃_i = p_i^(1/T) / Z for i in K, and p̃_R = 0
    uniform:  p̃_i = p_i^(1/T) / Z for i in K, and p̃_R = m^(1/T) / Z
    label:    p̃_i = (p_i + m·[i = y])^(1/T) / Z for i in K ∪ {y}, and p̃_R = 0; y is the true next token

Where the teacher's probability of y was stored, too, and y is not in K, `uniform` and `label` have K ∪ {y} in place of
K, also in m: y is an outcome of its own, and the rest is what is left without it. (With `label`, y then has all of m as
before, or its own probability where rounding of the others left less.) `zero` leaves it aside.

Each sums to one, and the student's q = softmax(z / T) over the whole vocabulary with q_R for the rest does too, so a
divergence between them is a proper one. At T = 1 the targets are p renormalised, (p, m), and p with m given to y.
`zero` and `uniform` are the published definitions. (Softening the full distribution would spread the remainder over
V − k ids before taking the power; that is not known from the top k.)

Shape legend: N positions, V width of the student's head, k stored ids a position, m outcomes of a comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from distillkit.codec.topk import sparse_from_logits
from distillkit.errors import InputError
from distillkit.losses.logits import StudentLogits
from distillkit.models.head import LMHead
from distillkit.types import SparseLogprobs

__all__ = ["Comparison", "DenseTeacher", "Missing", "Positions", "Targets", "TeacherDistribution", "TeacherLogits"]

Missing = Literal["zero", "uniform", "label"]

# The log-probability of what is impossible: finite, so that products with a probability of 0 are 0 and not NaN.
NEVER = -1e5

# Of a teacher that gives all ids: how many of the most probable ones are counted as its first ones in the statistics.
_FIRST = 10


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher's distributions over all ids.

    Attributes:
        logits: (N, V of the teacher) float32, without gradient.
    """

    logits: torch.Tensor


@dataclass(frozen=True)
class DenseTeacher:
    """The same as hidden states, of which logits are made a chunk at a time.

    Attributes:
        hidden: (N, H) the teacher's hidden states after the final norm, H its hidden size.
        head: the teacher's head.
        weights: what `head.weights()` returned.
    """

    hidden: torch.Tensor
    head: LMHead
    weights: tuple[torch.Tensor, torch.Tensor | None]

    @torch.no_grad()
    def logits(self, start: int, stop: int) -> TeacherLogits:
        """Make the logits of positions start … stop − 1."""
        return TeacherLogits(self.head(self.hidden[start:stop], self.weights))


TeacherDistribution = SparseLogprobs | TeacherLogits | DenseTeacher


@dataclass(frozen=True)
class Targets:
    """What the counted positions should predict.

    Attributes:
        labels: (N,) int64, the true next token.
        teacher: the teacher's distribution over it, N positions of torch tensors.
        hidden: (N, H) the teacher's hidden states of each layer that a student's layer is matched with; empty if none
            is.
        label_logprobs: (N,) float32, the teacher's log-probability of each label, whether it is among a sparse
            teacher's ids or not; NaN where it is not known. None: nowhere.
    """

    labels: torch.Tensor
    teacher: TeacherDistribution
    hidden: tuple[torch.Tensor, ...] = ()
    label_logprobs: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def rows(self, start: int, stop: int) -> Targets:
        """Return positions start … stop − 1, with a dense teacher's logits made, and without hidden states."""
        teacher = self.teacher
        if isinstance(teacher, SparseLogprobs):
            teacher = SparseLogprobs(teacher.ids[start:stop], teacher.logprobs[start:stop])
        elif isinstance(teacher, TeacherLogits):
            teacher = TeacherLogits(teacher.logits[start:stop])
        else:
            teacher = teacher.logits(start, stop)
        known = self.label_logprobs
        return Targets(self.labels[start:stop], teacher, label_logprobs=None if known is None else known[start:stop])


@dataclass(frozen=True)
class Comparison:
    """Teacher p and student q over the same outcomes. Where an entry is no outcome, both logarithms are `NEVER`.

    Attributes:
        log_p, log_q: (N, m); outcomes one by one. log_q is differentiable in the student's logits.
        outcomes: (N, m) bool.
        log_p_rest: (N,) of all other ids together, `NEVER` where the teacher gives them nothing; None if it gives them
            nothing anywhere.
        student_rest: computes log_q of the rest, (N,); None if there is no other id.
    """

    log_p: torch.Tensor
    log_q: torch.Tensor
    outcomes: torch.Tensor
    log_p_rest: torch.Tensor | None
    student_rest: Callable[[], torch.Tensor] | None

    @cached_property
    def log_q_rest(self) -> torch.Tensor | None:
        """(N,), `NEVER` where the student gives the rest nothing; None if there is no rest."""
        return None if self.student_rest is None else self.student_rest().clamp_min(NEVER)

    def known(self) -> torch.Tensor:
        """(N,) bool: the positions where the teacher says anything at all."""
        known = self.outcomes.any(-1)
        return known if self.log_p_rest is None else known | (self.log_p_rest > NEVER)


class Positions:
    """Student and teacher at some positions, with everything that several losses share computed once.

    Args:
        logits: (N, V) of the student, any float dtype.
        targets: of the same positions, as `Targets.rows` gives them.
    """

    def __init__(self, logits: torch.Tensor, targets: Targets) -> None:
        self.targets = targets
        labels = targets.labels.unsqueeze(-1)
        if isinstance(targets.teacher, SparseLogprobs):
            ids, _ = targets.teacher.tensors()
            labels = torch.cat([ids, labels], -1)
        self.student = StudentLogits(logits, labels)
        self._comparisons: dict[tuple[float, Missing], Comparison] = {}

    @cached_property
    def teacher_logits(self) -> torch.Tensor | None:
        """(N, at most V) float32 of a teacher that gives all ids, as far as the student has them too.

        Heads of one tokenizer may be padded to different widths.
        """
        teacher = self.targets.teacher
        if isinstance(teacher, SparseLogprobs):
            return None
        if isinstance(teacher, DenseTeacher):
            raise InputError("a dense teacher's logits are not made yet: take positions with Targets.rows first")
        return teacher.logits[:, : self.student.size].to(self.student.logits.device)

    def first(self, k: int = _FIRST) -> SparseLogprobs:
        """Return the stored ids; of a teacher that gives all ids, its k most probable ones."""
        logits = self.teacher_logits
        if logits is None:
            return self._stored
        return sparse_from_logits(logits, min(k, logits.shape[-1]))

    def label_logprobs(self) -> torch.Tensor:
        """(N,) the student's log-probabilities of the true next tokens."""
        return self.student.logprobs()[:, -1]

    def comparison(self, temperature: float = 1.0, missing: Missing = "zero") -> Comparison:
        """Compare teacher and student at a temperature."""
        key = (temperature, missing)
        if key not in self._comparisons:
            dense = self.teacher_logits
            self._comparisons[key] = (
                self._sparse(temperature, missing) if dense is None else self._dense(dense, temperature)
            )
        return self._comparisons[key]

    def comparison_of_first(self, temperature: float, missing: Missing, k: int) -> Comparison:
        """Compare over the teacher's first ids only: the stored ones, or its k most probable ones."""
        if self.teacher_logits is None:
            return self.comparison(temperature, missing)
        whole, (ids, _) = self.comparison(temperature, missing), self.first(k).tensors()
        return Comparison(
            whole.log_p.gather(-1, ids), whole.log_q.gather(-1, ids), torch.ones_like(ids).bool(), None, None
        )

    @property
    def _stored(self) -> SparseLogprobs:
        """The teacher's stored ids.

        Raises:
            InputError: the teacher gives all ids.
        """
        if not isinstance(self.targets.teacher, SparseLogprobs):
            raise InputError(f"expected a teacher with stored ids, found {type(self.targets.teacher).__name__}")
        return self.targets.teacher

    def _sparse(self, temperature: float, missing: Missing) -> Comparison:
        ids, logprobs = self._stored.tensors()
        everything = ids.shape[-1] >= self.student.size
        # With every id stored there is no remainder; what 1 − Σ p leaves is rounding.
        labels = self.targets.labels
        missing = "zero" if everything else missing
        target = _target(ids, logprobs, labels, temperature, missing, self.targets.label_logprobs)
        outcomes = torch.isfinite(target[0])
        log_p = target[0].clamp_min(NEVER)
        log_q = self.student.logprobs(temperature).clamp_min(NEVER).where(outcomes, NEVER)
        everything = everything and bool(outcomes[:, :-1].all())
        student = self.student  # not `self`, which would hold itself, and the logits, until the garbage is collected
        rest = None if everything else lambda: student.logprob_outside(outcomes, temperature)
        log_p_rest = None if target[1] is None else target[1].clamp_min(NEVER)
        if log_p_rest is not None and ids.shape[-1] + 1 >= self.student.size:
            # With the label every id may be an outcome; what is left then is rounding.
            log_p_rest = log_p_rest.masked_fill(outcomes.sum(-1) >= self.student.size, NEVER)
        return Comparison(log_p, log_q, outcomes, log_p_rest, rest)

    def _dense(self, teacher_logits: torch.Tensor, temperature: float) -> Comparison:
        width = teacher_logits.shape[-1]
        log_p = (teacher_logits / temperature).log_softmax(-1).clamp_min(NEVER)
        log_q = self.student.all_logprobs(temperature)
        # What the student gives to ids that the teacher does not have is its rest.
        beyond = log_q[:, width:]
        rest = None if width == self.student.size else lambda: beyond.logsumexp(-1)
        log_q = log_q[:, :width].clamp_min(NEVER)
        return Comparison(log_p, log_q, torch.ones_like(log_p, dtype=torch.bool), None, rest)


def _target(
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    missing: Missing,
    label_logprobs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Make the training target of stored log-probabilities: see the top of this module.

    Args:
        ids, logprobs: (N, k); a log-probability of −inf is a probability of 0.
        labels: (N,).
        label_logprobs: (N,), NaN where not known.

    Returns:
        log p̃ (N, k + 1), with the label at the end: −inf unless it is an outcome by itself; and log p̃_R (N,) for
        `uniform`, −inf where nothing is missing, None for the others. A position without any mass has a target of
        zeros, except where `uniform` or `label` says where it went.
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
            remainder = log_missing.squeeze(-1) / temperature
        else:
            logprobs = torch.where(is_label, torch.logaddexp(logprobs, log_missing), logprobs)
            extra = torch.where(is_label.any(-1, keepdim=True), extra, torch.logaddexp(extra, log_missing))
    scaled = torch.cat([logprobs, extra], -1) / temperature
    total = scaled.logsumexp(-1)
    if remainder is not None:
        total = torch.logaddexp(total, remainder)
    # A position without any mass: its probabilities come out as 0, and not as NaN.
    total = torch.where(torch.isinf(total), torch.zeros_like(total), total)
    return scaled - total.unsqueeze(-1), None if remainder is None else remainder - total

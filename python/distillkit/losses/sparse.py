"""Losses of a student's logits against hard labels and against a teacher's stored top-k log-probabilities.

Everything is float32 (the missing mass float64) and in log-space, whatever the student's dtype. A loss is a *sum* over
positions: who calls it divides by the number of positions of the whole optimiser step. No dense teacher is ever built:
k gathered logits and one logsumexp a position are enough.

Shape legend: N positions, V width of the student's head, k stored ids a position.
"""

from __future__ import annotations

from typing import Literal

import torch

from distillkit.types import SparseLogprobs

__all__ = ["Missing", "StudentLogits", "cross_entropy", "kl", "target_logprobs", "tensors_of"]

Missing = Literal["zero", "uniform"]


class StudentLogits:
    """The student's logits of some positions, with what several losses share computed once.

    Args:
        logits: (N, V), any float dtype; float32 from here on.
    """

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits.float()
        self._normalisers: dict[float, torch.Tensor] = {}

    def at_temperature(self, temperature: float) -> torch.Tensor:
        """(N, V) logits divided by the temperature."""
        return self.logits if temperature == 1.0 else self.logits / temperature

    def normaliser(self, temperature: float = 1.0) -> torch.Tensor:
        """(N,) log Σ_v exp(z_v / T)."""
        if temperature not in self._normalisers:
            self._normalisers[temperature] = self.at_temperature(temperature).logsumexp(-1)
        return self._normalisers[temperature]

    def logprobs_at(self, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """(N, k) log-probabilities of the given ids (N, k) under softmax(z / T) over the whole vocabulary."""
        return self.logits.gather(-1, ids) / temperature - self.normaliser(temperature).unsqueeze(-1)

    def logprob_outside(self, ids: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """(N,) log of the probability that softmax(z / T) gives to all ids but the given ones (N, k).

        It is summed over those ids, and not taken as 1 − Σ_K q: where the student is certain, that difference would be
        rounding noise, just where its logarithm and gradient are largest.
        """
        outside = self.at_temperature(temperature).scatter(-1, ids, -torch.inf)
        return outside.logsumexp(-1) - self.normaliser(temperature)


def target_logprobs(
    teacher: SparseLogprobs, temperature: float = 1.0, missing: Missing = "zero"
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The training target at a temperature, from log-probabilities of the k most probable ids only.

    With p the stored probabilities, K their ids and m = max(0, 1 − Σ_K p) the missing mass:

        zero:     p̃_i = p_i^(1/T) / Σ_K p^(1/T)
        uniform:  p̃_i = p_i^(1/T) / (Σ_K p^(1/T) + m^(1/T)),  and p̃_R = m^(1/T) / (the same) for all other ids
            together

    Either sums to one, so a divergence from it is a proper one. At T = 1 they are p renormalised, and (p, m). This is
    the published definition. (Softening the full distribution would spread the remainder over V − k ids before taking
    the power; that is not known from the top k.)

    Args:
        teacher: torch tensors (N, k); a log-probability of −inf is a probability of 0.

    Returns:
        log p̃ (N, k), and log p̃_R (N,) for `uniform` (−inf where nothing is missing), None for `zero`.
        A position without any mass has a target of zeros.
    """
    _, logprobs = tensors_of(teacher)
    scaled = logprobs.float() / temperature
    if missing == "zero":
        return scaled - _finite(scaled.logsumexp(-1, keepdim=True)), None
    mass = (1.0 - logprobs.double().exp().sum(-1)).clamp_min(0.0)
    remainder = (mass.log() / temperature).float()
    normaliser = _finite(torch.logaddexp(scaled.logsumexp(-1), remainder))
    return scaled - normaliser.unsqueeze(-1), remainder - normaliser


def kl(
    student: StudentLogits, teacher: SparseLogprobs, *, temperature: float = 1.0, missing: Missing = "zero"
) -> torch.Tensor:
    """Kullback–Leibler divergence of the student from the teacher, KL(p̃ ‖ q), summed over positions, times T².

    With p̃ and R as in `target_logprobs`, q = softmax(z / T) over the whole vocabulary, and q_R = Σ_{i∉K} q_i:

        zero:     T² · Σ_K p̃_i (log p̃_i − log q_i)
        uniform:  T² · [Σ_K p̃_i (log p̃_i − log q_i) + p̃_R (log p̃_R − log q_R)]

    Both are ≥ 0: `zero` because Σ_K q ≤ 1, `uniform` because it compares two distributions over K ∪ {R}. With k = V
    both are the dense divergence. T² keeps the gradient's size independent of T (Hinton, Vinyals and Dean, "Distilling
    the Knowledge in a Neural Network", 2015, §2).

    Args:
        student: N positions.
        teacher: torch tensors (N, k), distinct ids < V.

    Returns:
        float32 scalar, differentiable in the student's logits.
    """
    ids, _ = tensors_of(teacher)
    # With every id stored there is no remainder; what 1 − Σ p leaves is rounding.
    everything_stored = ids.shape[-1] == student.logits.shape[-1]
    log_p, log_p_rest = target_logprobs(teacher, temperature, "zero" if everything_stored else missing)
    divergence = _divergence(log_p, student.logprobs_at(ids, temperature)).sum()
    if log_p_rest is not None:
        divergence = divergence + _divergence(log_p_rest, student.logprob_outside(ids, temperature)).sum()
    return divergence * temperature**2


def cross_entropy(student: StudentLogits, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the true next tokens, −Σ_n log softmax(z_n)[label_n].

    Args:
        student: N positions.
        labels: (N,) int64 token ids < V.

    Returns:
        float32 scalar, differentiable in the student's logits.
    """
    return -student.logprobs_at(labels.unsqueeze(-1)).sum()


def tensors_of(teacher: SparseLogprobs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (…, k) and log-probabilities (…, k) that are torch tensors."""
    assert isinstance(teacher.ids, torch.Tensor)
    assert isinstance(teacher.logprobs, torch.Tensor)
    return teacher.ids, teacher.logprobs


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """p (log p − log q) elementwise, 0 where p = 0. The teacher's side is a constant, so only log q carries a
    gradient."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), torch.zeros_like(p))


def _finite(normaliser: torch.Tensor) -> torch.Tensor:
    """Replace the −inf of a position without any mass by 0, so that its probabilities come out as 0 and not as NaN."""
    return torch.where(torch.isinf(normaliser), torch.zeros_like(normaliser), normaliser)

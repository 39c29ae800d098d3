"""Divergences of the student from the teacher, per position.

p is the teacher and q the student, over the outcomes of a `Comparison`; R, the rest, is the set of all ids that are not
outcomes of their own. Sums run over the outcomes and R. Each divergence is ≥ 0 for every input and 0 if p = q, has
finite values and gradients for every finite input, and is the divergence of the full distributions if every id is an
outcome.

If p_R = 0, as with missing mass handled as `zero` or `label`, the student's probability of the rest is still wrong and
still penalised: by the definitions of `kl`, `jsd`, `tvd` and the skewed divergences, and by an extra term in
`reverse_kl`, which would otherwise be infinite.

Shape legend: N positions, m outcomes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from distillkit.losses.positions import NEVER, Comparison

__all__ = ["adaptive_kl", "jsd", "kl", "reverse_kl", "skewed_kl", "skewed_reverse_kl", "tvd"]

# Above one half by more than rounding of a sum of probabilities.
_HEAD = 0.5 + 1e-6


def kl(between: Comparison) -> torch.Tensor:
    """KL(p ‖ q) = Σ p (log p − log q).

    T² times this keeps the gradient's size independent of the temperature T (Hinton, Vinyals and Dean, "Distilling the
    Knowledge in a Neural Network", 2015, §2). If p_R = 0, the rest contributes nothing and is not computed.

    Returns:
        (N,) float32.
    """
    value = _sum(between.log_p, between.log_q)
    if between.log_p_rest is not None and between.log_q_rest is not None:
        value = value + _times(between.log_p_rest, between.log_p_rest - between.log_q_rest)
    return value


def reverse_kl(between: Comparison) -> torch.Tensor:
    """KL(q ‖ p) = Σ q (log q − log p): mode-seeking (Gu et al., "MiniLLM: Knowledge Distillation of Large Language
    Models", 2024, §2).

    This is infinite if p_R = 0. In that case, with Q the student's total probability of the outcomes, the loss is

        KL(q/Q ‖ p) − log Q

    so that the student's probability of the rest costs the same as in KL(p ‖ q) = KL(p ‖ q/Q) − log Q.

    Returns:
        (N,) float32.
    """
    log_mass = between.log_q.logsumexp(-1)
    if between.student_rest is None:
        log_mass = torch.zeros_like(log_mass)
    inside = between.log_q - log_mass.unsqueeze(-1)
    value = _sum(inside, between.log_p) - log_mass
    if between.log_p_rest is None or between.log_q_rest is None:
        return value
    whole = _sum(between.log_q, between.log_p)
    whole = whole + _times(between.log_q_rest, between.log_q_rest - between.log_p_rest)
    return torch.where(between.log_p_rest > NEVER, whole, value)


def jsd(between: Comparison) -> torch.Tensor:
    """Jensen–Shannon divergence, ½ KL(p ‖ a) + ½ KL(q ‖ a) with a = ½ (p + q): bounded by log 2.

    Returns:
        (N,) float32.
    """

    def term(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        middle = torch.logaddexp(log_p, log_q) - math.log(2.0)
        return 0.5 * (_times(log_p, log_p - middle) + _times(log_q, log_q - middle))

    return _over(between, term)


def tvd(between: Comparison) -> torch.Tensor:
    """Total variation distance, ½ Σ |p − q|: bounded by 1.

    Returns:
        (N,) float32.
    """
    return _over(between, lambda log_p, log_q: 0.5 * (log_p.exp() - log_q.exp()).abs())


def skewed_kl(between: Comparison, alpha: float) -> torch.Tensor:
    """KL(p ‖ α p + (1 − α) q) (Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", 2024,
    §3.1).

    Returns:
        (N,) float32.
    """
    return _over(between, lambda log_p, log_q: _times(log_p, log_p - _mixture(log_p, log_q, alpha)))


def skewed_reverse_kl(between: Comparison, alpha: float) -> torch.Tensor:
    """KL(q ‖ α q + (1 − α) p) (DistiLLM, §3.1).

    Returns:
        (N,) float32.
    """
    return _over(between, lambda log_p, log_q: _times(log_q, log_q - _mixture(log_q, log_p, alpha)))


def adaptive_kl(between: Comparison) -> torch.Tensor:
    """KL(p ‖ q) and KL(q ‖ p), weighted by where the student's errors are (Wu et al., "Rethinking Kullback–Leibler
    Divergence in Knowledge Distillation for Large Language Models", 2024, §4).

    The head consists of the teacher's most probable outcome and of those after it as long as their cumulative
    probability, including their own, is at most ½ (as in the authors' code); the tail of all others and R. With g the
    sum of |p − q| over each, KL(p ‖ q) has weight g_head / (g_head + g_tail), and KL(q ‖ p) has weight
    g_tail / (g_head + g_tail). No gradient flows through the weights.

    Returns:
        (N,) float32.
    """
    log_q_rest = between.log_q_rest  # computed here, where it gets its gradient
    with torch.no_grad():
        p, q = between.log_p.exp(), between.log_q.exp()
        order = p.argsort(-1, descending=True)
        ranked = p.gather(-1, order)
        in_head = ranked.cumsum(-1) <= _HEAD
        in_head[..., 0] = True
        head = torch.empty_like(between.outcomes).scatter_(-1, order, in_head)
        gap = (p - q).abs()
        head_gap, tail_gap = (gap * head).sum(-1), (gap * ~head).sum(-1)
        if log_q_rest is not None:
            p_rest = 0.0 if between.log_p_rest is None else between.log_p_rest.exp()
            tail_gap = tail_gap + (p_rest - log_q_rest.exp()).abs()
        total = head_gap + tail_gap
        share = torch.where(total > 0, head_gap / total.clamp_min(torch.finfo(total.dtype).tiny), 0.5)
    return share * kl(between) + (1.0 - share) * reverse_kl(between)


def _times(log_weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return log_weight.exp() * value


def _sum(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Σ over outcomes of p (log p − log q)."""
    return _times(log_p, log_p - log_q).sum(-1)


def _over(between: Comparison, term: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Sum a term of (log p, log q) over the outcomes and the rest."""
    value = term(between.log_p, between.log_q).sum(-1)
    if between.log_q_rest is None:
        return value
    log_p_rest = between.log_p_rest
    if log_p_rest is None:
        log_p_rest = torch.full_like(between.log_q_rest, NEVER)
    return value + term(log_p_rest, between.log_q_rest)


def _mixture(log_p: torch.Tensor, log_q: torch.Tensor, alpha: float) -> torch.Tensor:
    """log(α p + (1 − α) q)."""
    return torch.logaddexp(log_p + math.log(alpha), log_q + math.log1p(-alpha))

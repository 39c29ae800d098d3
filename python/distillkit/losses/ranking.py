"""Ranking losses: for each pair of ids of which the teacher prefers one, does the student prefer the same one?

A position has up to k (k − 1) / 2 pairs. They are processed in tiles of a few positions, and gradients are computed
along with the values, so that memory does not grow with the number of positions beyond that of one tile.

Shape legend: N positions, m outcomes of a comparison, n positions of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from distillkit.losses.positions import Comparison

__all__ = ["hinge", "logistic_ranking"]

# Pairs per tile; a few arrays of this size exist at once.
_TILE_ELEMENTS = 2**20

# (score difference x_i − x_j, p_i − p_j) → (value, its derivative with respect to the score difference), all (n, m, m).
Pairwise = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def hinge(between: Comparison, margin: float | None = None) -> torch.Tensor:
    """Mean over pairs with p_i > p_j of max(0, margin − (q_i − q_j)).

    Args:
        between: teacher and student.
        margin: a difference of probabilities; the teacher's own, p_i − p_j, if None.

    Returns:
        (N,) float32; 0 where the teacher prefers none of the ids.
    """

    def pairwise(difference: torch.Tensor, preferred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = ((preferred if margin is None else margin) - difference).clamp_min_(0.0)
        return value, -(value > 0).to(value.dtype)

    return _RankingLoss.apply(between.log_q.exp(), between, pairwise)  # type: ignore[no-any-return]


def logistic_ranking(between: Comparison) -> torch.Tensor:
    """Mean over pairs with p_i > p_j of log(1 + exp(−(z_i − z_j))) (RankNet; Burges et al., "Learning to Rank using
    Gradient Descent", 2005, §3). Log-probabilities can replace the logits z, since they have the same differences.

    Returns:
        (N,) float32; 0 where the teacher prefers none of the ids.
    """

    def pairwise(difference: torch.Tensor, preferred: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.softplus(-difference), -torch.sigmoid(-difference)

    return _RankingLoss.apply(between.log_q, between, pairwise)  # type: ignore[no-any-return]


class _RankingLoss(torch.autograd.Function):
    """Computes values and their gradients with respect to the scores in the forward pass, tile by tile."""

    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, between: Comparison, pairwise: Pairwise) -> torch.Tensor:
        values, gradients = torch.empty_like(scores[:, 0]), torch.empty_like(scores)
        p, outcomes = between.log_p.exp(), between.outcomes
        length = max(1, _TILE_ELEMENTS // scores.shape[-1] ** 2)
        for start in range(0, scores.shape[0], length):
            tile = slice(start, start + length)
            preferred = _differences(p[tile])
            counted = (preferred > 0) & outcomes[tile].unsqueeze(-1) & outcomes[tile].unsqueeze(-2)
            value, slope = pairwise(_differences(scores[tile]), preferred)
            pairs = counted.sum((-1, -2)).clamp_min(1)
            values[tile] = (value * counted).sum((-1, -2)) / pairs
            slope = slope * counted / pairs[:, None, None]
            gradients[tile] = slope.sum(-1) - slope.sum(-2)
        ctx.save_for_backward(gradients)
        return values

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (saved,) = ctx.saved_tensors
        return saved * gradients[0].unsqueeze(-1), None, None


def _differences(values: torch.Tensor) -> torch.Tensor:
    """(n, m, m) differences x_i − x_j."""
    return values.unsqueeze(-1) - values.unsqueeze(-2)

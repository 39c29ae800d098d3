"""Losses between the hidden states of matched student and teacher layers.

Shape legend: N positions, H hidden size of the teacher.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["hs_cosine", "hs_mse"]


def hs_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference over the H components.

    Args:
        student: (N, H) hidden states of a layer, projected to the teacher's size.
        teacher: (N, H).

    Returns:
        (N,) float32.
    """
    return (student.float() - teacher.float()).square().mean(-1)


def hs_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Cosine distance, 1 − cosine similarity: 0 … 2.

    Args:
        student: (N, H) hidden states of a layer, projected to the teacher's size.
        teacher: (N, H).

    Returns:
        (N,) float32.
    """
    return 1.0 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)

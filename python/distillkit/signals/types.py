"""The interface between a teacher and the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt
import torch

from distillkit.types import Document, SparseLogprobs

__all__ = ["TeacherSignal"]


class TeacherSignal(Protocol):
    """Gives the teacher's distributions for the counted positions of a batch.

    `take` and `nothing` run where documents are read, possibly in a forked DataLoader worker; `targets` runs in the
    training process, on its device.
    """

    def take(self, document: Document, positions: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Take what the targets of some positions (P,) of a document are made of: named arrays (P, …)."""
        ...

    def nothing(self) -> dict[str, npt.NDArray[Any]]:
        """Return the same arrays for no position, (0, …)."""
        ...

    def targets(self, batch: Mapping[str, torch.Tensor]) -> SparseLogprobs:
        """Make the targets (N, k) of a batch from its `teacher_<name>` tensors, the concatenated arrays of `take`, on
        their device."""
        ...

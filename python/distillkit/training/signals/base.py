"""The interface between a teacher and the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt
import torch

from distillkit.losses.positions import Targets
from distillkit.types import Document

__all__ = ["TeacherSignal"]


class TeacherSignal(Protocol):
    """Gives the teacher's distributions for the counted positions of a batch.

    `take` and `empty_targets` run where documents are read, possibly in a forked DataLoader worker; `targets` runs in
    the training process, on its device.
    """

    def take(self, document: Document, positions: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Take what the targets of some positions (P,) of a document are made of: named arrays (P, …)."""
        ...

    def empty_targets(self) -> dict[str, npt.NDArray[Any]]:
        """Return the same arrays for no position, (0, …)."""
        ...

    def targets(self, batch: Mapping[str, Any], labels: torch.Tensor) -> Targets:
        """Make the targets of a batch.

        Args:
            batch: as collated: its `teacher_<name>` tensors are the concatenated arrays of `take`.
            labels: (N,) the true next tokens, on the training device.

        Returns:
            N positions, on the same device.
        """
        ...

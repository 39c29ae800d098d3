"""The interface between a teacher and the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt
import torch

from distillkit.errors import MismatchError
from distillkit.losses.positions import Targets
from distillkit.types import Document

__all__ = ["TeacherSignal", "check_ids_fit"]


def check_ids_fit(document: Document, head_size: int) -> None:
    """Refuse a document with a token id beyond a model's head, for which it has no embedding.

    Raises:
        MismatchError: there is one; names document and id.
    """
    largest = int(document.input_ids.max(initial=0))
    if largest >= head_size:
        raise MismatchError(
            f"{document.place} contains token id {largest:,}, but the model's head has {head_size:,} rows"
        )


class TeacherSignal(Protocol):
    """Provides the teacher's distributions for the counted positions of a batch.

    `take` and `empty_targets` run where documents are read, possibly in a forked DataLoader worker; `targets` runs in
    the training process, on its device.
    """

    def take(self, document: Document, positions: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return the data that the targets of a document's positions (P,) are made from: named arrays (P, …)."""
        ...

    def empty_targets(self) -> dict[str, npt.NDArray[Any]]:
        """Return the same arrays for zero positions, (0, …)."""
        ...

    def targets(self, batch: Mapping[str, Any], labels: torch.Tensor) -> Targets:
        """Make the targets of a batch.

        Args:
            batch: the collated batch; its `teacher_<name>` tensors are the concatenated arrays of `take`.
            labels: (N,) true next tokens, on the training device.

        Returns:
            Targets of N positions, on the same device.
        """
        ...

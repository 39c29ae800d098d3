"""The interface between teachers and the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from distillkit.errors import MismatchError
from distillkit.losses.positions import Targets
from distillkit.types import Document, SparseLogprobs

if TYPE_CHECKING:
    from distillkit.training.signals.server import TeacherServer

__all__ = ["Asked", "TeacherSignal", "check_ids_fit", "together"]

Asked = Mapping[str, Sequence[tuple[Any, Future[Any]]]]
"""What servers were asked about a batch, by the teachers' keys: questions, and their answers to come."""


def check_ids_fit(document: Document, head_size: int, head: str = "the student's head") -> None:
    """Refuse a document with a token id beyond a model's head, for which it has no embedding.

    Args:
        document: the document.
        head_size: number of rows of the head.
        head: what messages call it.

    Raises:
        MismatchError: there is one; names document and id.
    """
    largest = int(document.input_ids.max(initial=0))
    if largest >= head_size:
        raise MismatchError(f"{document.place} contains token id {largest:,}, but {head} has {head_size:,} rows")


class TeacherSignal:
    """Provides the teacher's distributions for the counted positions of a batch.

    `take` and `empty_targets` run where documents are read, possibly in a forked DataLoader worker; everything else
    runs in the training process, `targets` on its device.
    """

    def take(self, document: Document, positions: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return the data that the targets of a document's positions (P,) are made from: named arrays (P, …). By
        default nothing: the batch's token ids are enough."""
        return {}

    def empty_targets(self) -> dict[str, npt.NDArray[Any]]:
        """Return the same arrays for zero positions, (0, …)."""
        return {}

    def targets(self, batch: Mapping[str, Any], labels: torch.Tensor) -> Targets:
        """Make the targets of a batch.

        Args:
            batch: the collated batch; its `teacher_<name>` tensors are the concatenated arrays of `take`.
            labels: (N,) true next tokens, on the training device.

        Returns:
            Targets of N positions, on the same device.
        """
        raise NotImplementedError

    @property
    def models(self) -> Mapping[str, Any]:
        """The models that run on the batches, by the keys of the configuration that name them."""
        return {}

    @property
    def servers(self) -> Sequence[TeacherServer]:
        """The servers that are asked about the batches."""
        return ()

    @property
    def waited(self) -> float:
        """Seconds that `targets` has waited for servers until now."""
        return 0.0

    def ask(self, batch: Mapping[str, Any]) -> Asked:
        """Ask the servers about a batch, without waiting for their answers."""
        return {}


def together(parts: Sequence[tuple[torch.Tensor, Targets]], labels: torch.Tensor) -> Targets:
    """Put the sparse targets of some positions each together. Shorter rows are filled up with ids of probability 0.

    Args:
        parts: (n,) positions, and their targets.
        labels: (N,) the labels of all.
    """
    tensors = []
    for rows, targets in parts:
        if not isinstance(targets.teacher, SparseLogprobs):
            raise TypeError(f"expected the most probable ids, found {type(targets.teacher).__name__}")
        tensors.append((rows, *targets.teacher.tensors(), targets.label_logprobs))
    k = max(ids.shape[-1] for _, ids, _, _ in tensors)
    all_ids = labels.new_zeros(len(labels), k)
    all_logprobs = torch.full((len(labels), k), -torch.inf, device=labels.device)
    known = torch.full((len(labels),), torch.nan, device=labels.device)
    for rows, ids, logprobs, label_logprobs in tensors:
        # Every id must be one of the student's.
        all_ids[rows] = torch.cat([ids, ids[:, :1].expand(-1, k - ids.shape[-1])], -1).to(all_ids.dtype)
        all_logprobs[rows, : ids.shape[-1]] = logprobs.float()
        if label_logprobs is not None:
            known[rows] = label_logprobs.float()
    stored = any(label_logprobs is not None for *_, label_logprobs in tensors)
    # All are of one kind: see `check_same_kind` in training/data/mixture.py.
    draws = next(targets.teacher.draws for _, targets in parts if isinstance(targets.teacher, SparseLogprobs))
    return Targets(labels, SparseLogprobs(all_ids, all_logprobs, draws), label_logprobs=known if stored else None)

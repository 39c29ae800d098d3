"""A teacher whose distributions are stored: decoded where documents are read, or on the GPU when training on one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distillkit.codec import Codec
from distillkit.errors import CorruptDataError
from distillkit.losses.positions import Targets
from distillkit.shards.plausibility import HIGHEST, check_values, decoded
from distillkit.training.signals.base import TeacherSignal, check_ids_fit
from distillkit.types import Document, SparseLogprobs

__all__ = ["OfflineSignal", "within"]


class OfflineSignal(TeacherSignal):
    """Stored distributions of a dataset.

    Args:
        codec: the dataset's codec.
        head_size: width of the student's head. Larger ids (padding of a wider teacher's head) count as missing mass.
        on_device: send the encoded bytes to the training device and decode there instead of on the CPU, which
            transfers a fifth of the bytes or less. Documents in the formats compact and sampled are always decoded
            where they are read: rows can only be selected from a document's bytes if they have a fixed size.
        label_logprobs: also use the teacher's log-probability of each next token, in documents that have it.
    """

    def __init__(self, codec: Codec, head_size: int, *, on_device: bool = False, label_logprobs: bool = False) -> None:
        self.codec = codec
        self.head_size = head_size
        self.on_device = on_device and codec.is_fixed
        self.label_logprobs = label_logprobs

    def take(self, document: Document, positions: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return the rows of some positions (P,): encoded bytes (P, bytes), or decoded ids and logprobs (P, k); and
        label_logprobs (P,) if enabled, NaN if the document has none.

        Raises:
            MismatchError: a token id is beyond the student's head.
            CorruptDataError: the document cannot be decoded, or has a log-probability that is too high to be one.
        """
        check_ids_fit(document, self.head_size)
        if self.on_device:
            taken = {"bytes": self.codec.document_rows(document.teacher, document.num_rows)[positions]}
        else:
            rows = decoded(document, self.codec)
            check_values(document, rows, self.codec.exact_k)
            taken = {"ids": np.asarray(rows.ids)[positions], "logprobs": np.asarray(rows.logprobs)[positions]}
        if self.label_logprobs:
            known = document.label_logprobs
            taken["label_logprobs"] = np.full(len(positions), np.nan, np.float32) if known is None else known[positions]
        return taken

    def empty_targets(self) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays of `take` for zero positions."""
        if self.on_device:
            taken: dict[str, npt.NDArray[Any]] = {"bytes": np.empty((0, self.codec.bytes_per_token), dtype=np.uint8)}
        else:
            taken = {
                "ids": np.empty((0, self.codec.k), dtype=np.int64),
                "logprobs": np.empty((0, self.codec.k), dtype=np.float32),
            }
        if self.label_logprobs:
            taken["label_logprobs"] = np.empty(0, dtype=np.float32)
        return taken

    def targets(self, batch: Mapping[str, Any], labels: torch.Tensor) -> Targets:
        """Make the targets (N, k) from `teacher_bytes`, or `teacher_ids` and `teacher_logprobs`, and from
        `teacher_label_logprobs` if present.

        Raises:
            CorruptDataError: bytes decode to values that are not log-probabilities.
        """
        if self.on_device:
            ids, logprobs = self.codec.decode_torch(batch["teacher_bytes"])
            _check_decoded(logprobs)
        else:
            ids, logprobs = batch["teacher_ids"], batch["teacher_logprobs"]
        if self.codec.vocab_size > self.head_size and ids.numel():
            ids, logprobs = within(ids, logprobs, self.head_size)
        known = batch.get("teacher_label_logprobs")
        if known is not None:
            # A label may differ from the token whose log-prob the teacher stored (eos_label_token_ids).
            tokens = batch["input_ids"].flatten()[batch["rows"] + 1].to(labels.device)
            known = known.masked_fill(tokens != labels, torch.nan)
        return Targets(labels, SparseLogprobs(ids, logprobs, self.codec.draws), label_logprobs=known)


def _check_decoded(logprobs: torch.Tensor) -> None:
    """Refuse what `take` refuses, where bytes are decoded on the device, without the documents' places."""
    lowest, highest = torch.finfo(logprobs.dtype).min, HIGHEST
    if not bool(((logprobs >= lowest) & (logprobs <= highest)).all()):
        raise CorruptDataError(
            "a teacher row of this batch contains values that are not log-probabilities; `distillkit-codec verify` and "
            "`inspect` find the document"
        )


def within(ids: torch.Tensor, logprobs: torch.Tensor, head_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give ids ≥ head_size zero probability, replacing each with the row's first id within the head (since all ids must
    be valid for the head)."""
    outside = ids >= head_size
    first = ids.gather(-1, (~outside).int().argmax(-1, keepdim=True))
    first = torch.where(first < head_size, first, 0)
    return torch.where(outside, first, ids), logprobs.masked_fill(outside, -torch.inf)

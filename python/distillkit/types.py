"""The data that passes between the parts: sparse teacher distributions and documents.

Shape legend: k stored ids a row, R rows (positions), L tokens of a document, S packed documents of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import numpy.typing as npt

from distillkit.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["Document", "SparseLogprobs", "TokenDocument"]

Array = Union[npt.NDArray[Any], "torch.Tensor"]


@dataclass(frozen=True)
class SparseLogprobs:
    """The k most probable ids of some distributions, with their log-probabilities under the *full* softmax.

    Attributes:
        ids: (..., k) int64 token ids, most probable first.
        logprobs: (..., k) float32 natural log-probabilities. They do not sum to one: see `missing_mass`.

    Both are numpy arrays, or both are torch tensors on one device.

    Raises:
        InputError: shapes differ, there is no last axis, or a dtype is not int64 / float32.

    Example:
        >>> import numpy as np
        >>> rows = SparseLogprobs(np.array([[7, 3]]), np.log(np.array([[0.5, 0.25]], np.float32)))
        >>> rows.k, rows.missing_mass().tolist()
        (2, [0.25])
    """

    ids: Array
    logprobs: Array

    def __post_init__(self) -> None:
        if isinstance(self.ids, np.ndarray) != isinstance(self.logprobs, np.ndarray):
            raise InputError(
                f"ids and logprobs must both be numpy arrays or both be torch tensors, got {type(self.ids).__name__} "
                f"and {type(self.logprobs).__name__}"
            )
        if tuple(self.ids.shape) != tuple(self.logprobs.shape) or self.ids.ndim == 0:
            raise InputError(
                f"ids and logprobs must have one shape (..., k), got {tuple(self.ids.shape)} and "
                f"{tuple(self.logprobs.shape)}"
            )
        for name, array, dtype in (("ids", self.ids, "int64"), ("logprobs", self.logprobs, "float32")):
            if str(array.dtype).removeprefix("torch.") != dtype:
                raise InputError(f"{name} must be {dtype}, got {array.dtype}; convert it first")

    @property
    def k(self) -> int:
        """Stored ids a row."""
        return int(self.ids.shape[-1])

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and the log-probabilities, both (..., k), as torch tensors.

        Raises:
            InputError: they are numpy arrays.
        """
        if isinstance(self.ids, np.ndarray) or isinstance(self.logprobs, np.ndarray):
            raise InputError("ids and logprobs must be torch tensors here, got numpy arrays")
        return self.ids, self.logprobs

    def missing_mass(self) -> Array:
        """(...,) the probability of all ids that are not stored, 1 − Σ exp(logprob), at least 0; float32."""
        if isinstance(self.logprobs, np.ndarray):
            total = np.exp(self.logprobs.astype(np.float64)).sum(-1)
            return np.asarray(np.clip(1.0 - total, 0.0, None), dtype=np.float32)
        missing: torch.Tensor = 1.0 - self.logprobs.double().exp().sum(-1)
        return missing.clamp_min(0.0).float()


@dataclass(frozen=True)
class TokenDocument:
    """The token ids of one sequence, and which of them count in a loss.

    Attributes:
        input_ids: (L,) int32.
        source: where it comes from, for messages.
        loss_mask: (L,) bool, which tokens count in a loss; None means all of them.
        columns: of the source's row, kept as they are in a captured dataset.
        segment_lengths: (S,) int32, lengths of the documents packed in this one, in order, summing to L; None means
            one document.
    """

    input_ids: npt.NDArray[np.int32]
    source: str
    loss_mask: npt.NDArray[np.bool_] | None = None
    columns: Mapping[str, Any] | None = None
    segment_lengths: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Document:
    """One stored sequence with the teacher's distributions, still encoded.

    Attributes:
        doc_id: hash of the token ids and of what else decides the document.
        input_ids: (L,) int32.
        teacher: the codec's bytes for `num_rows` rows; in a block of documents a view of them.
        num_rows: R, L − 1 or L: row t is the distribution after tokens 0…t, over token t + 1.
        loss_mask: (L,) bool, which tokens count in a loss; None means all of them.
        segment_lengths: (S,) int32, lengths of the documents packed in this one, in order, summing to L; None means
        one document.
        label_logprobs: (L − 1,) float32, the teacher's log-probability of each next token, also where that is not among
        the k of its row; None if it was not kept.
    """

    doc_id: str
    input_ids: npt.NDArray[np.int32]
    teacher: bytes | memoryview
    num_rows: int
    loss_mask: npt.NDArray[np.bool_] | None = None
    segment_lengths: npt.NDArray[np.int32] | None = None
    label_logprobs: npt.NDArray[np.float32] | None = None

    def segments(self, most: int | None = None) -> npt.NDArray[np.int64]:
        """(S,) lengths of the packed documents; of a single one, its own. Of the first `most` tokens only, if given."""
        lengths = [len(self.input_ids)] if self.segment_lengths is None else self.segment_lengths
        whole = np.asarray(lengths, dtype=np.int64)
        if most is None:
            return whole
        kept = np.diff(np.minimum(np.cumsum(whole), most), prepend=0)
        return kept[kept > 0]

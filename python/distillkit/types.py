"""The data types that packages exchange: sparse teacher distributions and documents.

Shape legend: k stored ids per row, R rows (positions), L tokens per document, S documents packed into one.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Union

import numpy as np
import numpy.typing as npt

from distillkit.errors import InputError, printable

if TYPE_CHECKING:
    import torch

__all__ = ["Document", "Draws", "Facts", "Overflow", "Shown", "SparseLogprobs", "TokenDocument"]

Array = Union[npt.NDArray[Any], "torch.Tensor"]

Overflow = Literal["cut", "split", "drop"]
"""What to do with documents that are longer than a row; see `distillkit.shards.overflow`."""


Facts = tuple[str, list[tuple[str, str]]]
"""A title, and (label, value) of each fact."""


class Shown:
    """A result that prints as a title and a table of facts, in a terminal and in a notebook."""

    def facts(self) -> Facts:
        """What is shown."""
        raise NotImplementedError

    def __repr__(self) -> str:
        title, rows = self.facts()
        width = max((len(label) for label, _ in rows), default=0)
        return printable("\n".join([title, *(f"  {label:<{width}}  {value}" for label, value in rows)]))

    def _repr_html_(self) -> str:
        title, rows = self.facts()
        cells = "".join(
            f"<tr><th style='text-align:left'>{_escaped(label)}</th><td style='text-align:left'>{_escaped(value)}</td>"
            "</tr>"
            for label, value in rows
        )
        return f"<table><caption style='text-align:left'>{_escaped(title)}</caption>{cells}</table>"


def _escaped(text: str) -> str:
    return html.escape(printable(text))


@dataclass(frozen=True)
class Draws:
    """How distributions were drawn from.

    Attributes:
        number: draws per distribution, with replacement.
        temperature: the draws are from softmax(logits / temperature).
    """

    number: int
    temperature: float = 1.0


@dataclass(frozen=True)
class SparseLogprobs:
    """The k most probable ids of one or more distributions, with their log-probabilities under the *full* softmax.

    Attributes:
        ids: (..., k) int64 token ids, most probable first.
        logprobs: (..., k) float32 natural log-probabilities. They do not sum to one: see `missing_mass`.
        draws: if set, the ids are those that were drawn, and the log-probabilities those of their shares of the draws,
            which sum to one: an unbiased estimate of the distribution, but of nothing that is not linear in it.

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
    draws: Draws | None = None

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
        """Stored ids per row."""
        return int(self.ids.shape[-1])

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids and log-probabilities as torch tensors, both (..., k).

        Raises:
            InputError: the data is held in numpy arrays.
        """
        if isinstance(self.ids, np.ndarray) or isinstance(self.logprobs, np.ndarray):
            raise InputError("ids and logprobs must be torch tensors here, got numpy arrays")
        return self.ids, self.logprobs

    def missing_mass(self) -> Array:
        """(...,) float32 total probability of the ids that are not stored: 1 − Σ exp(logprob), clipped at 0."""
        if isinstance(self.logprobs, np.ndarray):
            total = np.exp(self.logprobs.astype(np.float64)).sum(-1)
            return np.asarray(np.clip(1.0 - total, 0.0, None), dtype=np.float32)
        missing: torch.Tensor = 1.0 - self.logprobs.double().exp().sum(-1)
        return missing.clamp_min(0.0).float()


@dataclass(frozen=True)
class TokenDocument:
    """The token ids of one sequence, and which of them count towards the loss.

    Attributes:
        input_ids: (L,) int32.
        source: where the document comes from, for messages.
        loss_mask: (L,) bool, which tokens count towards the loss; None means all of them.
        columns: values from the source's row that a captured dataset keeps unchanged.
        segment_lengths: (S,) int32, lengths of the documents packed into this one, in order, summing to L; None means
            a single document.
    """

    input_ids: npt.NDArray[np.int32]
    source: str
    loss_mask: npt.NDArray[np.bool_] | None = None
    columns: Mapping[str, Any] | None = None
    segment_lengths: npt.NDArray[np.int32] | None = None


@dataclass(frozen=True, repr=False)
class Document:
    """One stored sequence with the teacher's distributions, still encoded.

    Attributes:
        doc_id: hash of the token ids, the loss mask and the segment lengths.
        input_ids: (L,) int32.
        teacher: the encoded bytes of `num_rows` rows; for documents in a block, a view into the block's bytes.
        num_rows: R = L − 1 or L. Row t is the distribution of token t + 1 given tokens 0…t.
        loss_mask: (L,) bool, which tokens count towards the loss; None means all of them.
        segment_lengths: (S,) int32, lengths of the documents packed into this one, in order, summing to L; None means
            a single document.
        label_logprobs: (L − 1,) float32, the teacher's log-probability of each next token, even if that token is not
            among the row's k ids; None if these were not stored.
        place: where it was read from, for messages: file, and number in the file.
        columns: values that the capture kept of the source's row, by column (`keep_columns`); read from the shard when
            they are first used. None if there are none.
    """

    doc_id: str
    input_ids: npt.NDArray[np.int32]
    teacher: bytes | memoryview
    num_rows: int
    loss_mask: npt.NDArray[np.bool_] | None = None
    segment_lengths: npt.NDArray[np.int32] | None = None
    label_logprobs: npt.NDArray[np.float32] | None = None
    place: str = "the document"
    columns: Mapping[str, Any] | None = None

    def __repr__(self) -> str:
        parts = [f"{len(self.input_ids):,} tokens", f"{self.num_rows:,} rows in {len(self.teacher):,} bytes"]
        if self.loss_mask is not None:
            parts.append(f"{int(np.count_nonzero(self.loss_mask)):,} tokens count")
        if self.segment_lengths is not None:
            parts.append(f"{len(self.segment_lengths):,} packed documents")
        if self.label_logprobs is not None:
            parts.append("label_logprobs")
        if self.columns is not None:
            parts.append(f"columns {', '.join(map(printable, self.columns))}")
        return f"<Document {self.doc_id}: {', '.join(parts)}>"

    def segments(self, most: int | None = None, start: int = 0) -> npt.NDArray[np.int64]:
        """(S,) int64 lengths of the packed documents (one if not packed), limited to the tokens `start` … `most` − 1 if
        set."""
        lengths = [len(self.input_ids)] if self.segment_lengths is None else self.segment_lengths
        whole = np.asarray(lengths, dtype=np.int64)
        if most is None and not start:
            return whole
        ends = np.clip(np.cumsum(whole), start, most)
        kept = ends - np.concatenate([[start], ends[:-1]])
        return np.asarray(kept[kept > 0] if kept.any() else kept[:1], dtype=np.int64)

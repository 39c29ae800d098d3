"""Teachers that score documents: one interface, one module an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Union

import numpy as np
import numpy.typing as npt

from distillkit.types import SparseLogprobs, TokenDocument

if TYPE_CHECKING:
    pass

__all__ = ["RejectedDocument", "RowRequest", "ScoredDocument", "Teacher", "keep_ids", "refusal"]


@dataclass(frozen=True)
class RowRequest:
    """What is kept of a teacher's distributions.

    Attributes:
        k: ids a row.
        keep_ids: ids that are in every row, whatever their rank; fewer than `k`.
        label_logprobs: also the log-probability of each next token, whatever its rank.
        last_row: also the distribution after a document's last token: L rows instead of L − 1.
    """

    k: int
    keep_ids: tuple[int, ...] = ()
    label_logprobs: bool = False
    last_row: bool = False


@dataclass(frozen=True)
class ScoredDocument:
    """A document's distributions.

    Attributes:
        index: which document.
        rows: numpy (L − 1, k), or (L, k) with the last row: row t is the distribution after tokens 0…t.
        label_logprobs: (L − 1,) float32, log-probability of token t + 1 after tokens 0…t; None unless requested.
    """

    index: int
    rows: SparseLogprobs
    label_logprobs: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class RejectedDocument:
    """A document that the teacher gave no distributions for that can be stored.

    Attributes:
        index: which document.
        reason: names document, position and what was found.
    """

    index: int
    reason: str


class Teacher(Protocol):
    """A running teacher."""

    @property
    def head_size(self) -> int:
        """Width of the logits; at least the tokenizer's vocabulary."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a header says of the teacher: name, revision, dtype."""

    def score(
        self, documents: Sequence[TokenDocument], request: RowRequest
    ) -> Iterator[Union[ScoredDocument, RejectedDocument]]:
        """Yield each document's distributions, in any order, as soon as they are there.

        They depend on these documents alone, so that a capture that starts again writes the same bytes.

        Raises:
            CaptureError: the teacher cannot go on, whatever the document.
        """


def refusal(document: TokenDocument, rows: SparseLogprobs) -> str | None:
    """Say why a document's rows cannot be stored, naming the first position; None if all of them are finite.

    Repeated ids, ids out of range and positive log-probabilities are refused by the codec.
    """
    bad = ~np.isfinite(rows.logprobs).all(-1)
    if not bad.any():
        return None
    row = int(bad.argmax())
    return (
        f"{document.source}: after token {row} of {len(document.input_ids)} (id {document.input_ids[row]}) the "
        f"teacher returns NaN, infinity, or fewer than {rows.k} finite logits. Is the checkpoint complete? float16 "
        "overflows easily: try bfloat16 or float32"
    )


def keep_ids(rows: SparseLogprobs, ids: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float32]) -> SparseLogprobs:
    """Put ids into every row that has them not, in the place of its least likely others.

    Args:
        rows: numpy (n, k), by falling log-probability.
        ids: (m,) distinct, m < k.
        logprobs: (n, m), theirs.

    Returns:
        (n, k) by falling log-probability; rows that had all of them as they were.
    """
    stored_nkm = np.asarray(rows.ids)[:, :, None] == ids
    missing_nm = ~stored_nkm.any(1)
    all_ids = np.concatenate([rows.ids, np.broadcast_to(ids, missing_nm.shape)], axis=1)
    all_logprobs = np.concatenate([rows.logprobs, logprobs], axis=1)
    # Kept ids come first, an id's second appearance last.
    priority = np.concatenate(
        [np.where(stored_nkm.any(2), np.inf, rows.logprobs), np.where(missing_nm, np.inf, -np.inf)], axis=1
    )
    chosen = np.argsort(-priority, axis=1, kind="stable")[:, : rows.ids.shape[1]]
    chosen_logprobs = np.take_along_axis(all_logprobs, chosen, 1)
    order = np.argsort(-chosen_logprobs, axis=1, kind="stable")
    return SparseLogprobs(
        np.take_along_axis(np.take_along_axis(all_ids, chosen, 1), order, 1),
        np.take_along_axis(chosen_logprobs, order, 1),
    )

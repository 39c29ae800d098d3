"""The interface of teachers that score documents, and what all engines share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Union

import numpy as np
import numpy.typing as npt

from distillkit.types import Draws, SparseLogprobs, TokenDocument

__all__ = ["RejectedDocument", "RowRequest", "ScoredDocument", "Teacher", "keep_ids", "refusal"]


@dataclass(frozen=True)
class RowRequest:
    """What to keep of a teacher's distributions.

    Attributes:
        k: number of ids per row.
        keep_ids: ids that every row contains whatever their rank; fewer than `k`.
        label_logprobs: also keep the log-probability of each next token, whatever its rank.
        last_row: also keep the distribution after a document's last token: L rows instead of L − 1.
        draws: draw ids instead of keeping the most probable ones; only engines that have all logits can.
        seed: which draws.
        likely: with draws, also keep so many of the most probable ids, to learn from.
    """

    k: int
    keep_ids: tuple[int, ...] = ()
    label_logprobs: bool = False
    last_row: bool = False
    draws: Draws | None = None
    seed: int = 0
    likely: int = 0


@dataclass(frozen=True)
class ScoredDocument:
    """A document's distributions.

    Attributes:
        index: index of the document.
        rows: numpy (L − 1, k), or (L, k) with the last row: row t is the distribution after tokens 0…t.
        label_logprobs: (L − 1,) float32, log-probability of token t + 1 after tokens 0…t; None unless requested.
        likely: (rows, n) int64, the most probable ids of each row; None unless requested.
    """

    index: int
    rows: SparseLogprobs
    label_logprobs: npt.NDArray[np.float32] | None = None
    likely: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True)
class RejectedDocument:
    """A document for which the teacher returned no distributions, or none that can be stored.

    Attributes:
        index: index of the document.
        reason: names the document, the position and what was found.
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
        """The teacher's entry in the header: name, revision, dtype."""

    def score(
        self, documents: Sequence[TokenDocument], request: RowRequest
    ) -> Iterator[Union[ScoredDocument, RejectedDocument]]:
        """Yield each document's distributions, in any order, as soon as they are available.

        They depend on these documents only, so that a resumed capture writes the same bytes.

        Raises:
            CaptureError: the teacher cannot continue with any document.
        """


def refusal(document: TokenDocument, rows: SparseLogprobs) -> str | None:
    """Describe why a document's rows cannot be stored, naming the first bad position; None if all values are finite.

    The codec rejects repeated ids, ids out of range and positive log-probabilities.
    """
    # Of draws, a row has at least one id.
    bad = ~np.isfinite(rows.logprobs if rows.draws is None else rows.logprobs[:, :1]).all(-1)
    if not bad.any():
        return None
    row = int(bad.argmax())
    return (
        f"{document.source}: after token {row} of {len(document.input_ids)} (id {document.input_ids[row]}) the "
        f"teacher returns NaN, infinity, or fewer than {rows.k} finite logits. Is the checkpoint complete? float16 "
        "overflows easily: try bfloat16 or float32"
    )


def keep_ids(rows: SparseLogprobs, ids: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float32]) -> SparseLogprobs:
    """Add ids to every row that lacks them, replacing its least likely other ids.

    Args:
        rows: numpy (n, k), by decreasing log-probability.
        ids: (m,) distinct, m < k.
        logprobs: (n, m) log-probabilities of `ids` in each row.

    Returns:
        (n, k) by decreasing log-probability; rows that already had all of the ids are unchanged.
    """
    stored_nkm = np.asarray(rows.ids)[:, :, None] == ids
    missing_nm = ~stored_nkm.any(1)
    all_ids = np.concatenate([rows.ids, np.broadcast_to(ids, missing_nm.shape)], axis=1)
    all_logprobs = np.concatenate([rows.logprobs, logprobs], axis=1)
    # Kept ids rank first, an id's second occurrence last.
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

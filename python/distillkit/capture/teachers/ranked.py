"""From an engine's ranked log-probabilities to rows, or to why they are none.

Inference engines answer a prompt with the k most probable ids of each of its positions and, beside them, the prompt's
own next token with its true rank. That one is no part of the k: what is stored must not hold it twice, nor in the place
of a more probable id.

Shape legend: L tokens of a document, R rows, E entries of all rows together, k ids a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument, refusal
from distillkit.types import SparseLogprobs, TokenDocument

__all__ = ["RankedEntries", "scored_document"]

# Engines that speak JSON write −9999 for −∞.
_LOWEST = -9998.0
# float32 sums and a softmax in 16 bits may exceed one by a little; garbage does by more.
_MOST_MASS = 1.01


@dataclass(frozen=True)
class RankedEntries:
    """Log-probabilities by position, flat.

    Attributes:
        ids: (E,) int64.
        logprobs: (E,) float32.
        ranks: (E,) int64, counted from 1.
        counts: (R,) int64 entries of each row, in the rows' order; they sum to E.
    """

    ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    def then(self, other: RankedEntries) -> RankedEntries:
        """These rows, and others after them."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("ids", "logprobs", "ranks", "counts"))
        return RankedEntries(*(np.concatenate(pair) for pair in pairs))


def scored_document(
    index: int,
    document: TokenDocument,
    entries: RankedEntries,
    request: RowRequest,
    head_size: int,
    *,
    generated: int | None = None,
) -> ScoredDocument | RejectedDocument:
    """Make a document's rows of what the engine gave, checked.

    Args:
        index: of the document.
        document: L tokens.
        entries: L − 1 rows, in any order within a row; with `request.last_row` L.
        request: what is kept.
        head_size: ids are below it.
        generated: the token the engine put after the last one; needed for the last row.

    Returns:
        `RejectedDocument` where there are fewer rows or ranks than asked for, ids repeat or are out of range, values
        are not finite or more than a distribution has, or the own token is missing.
    """
    own = document.input_ids[1:].astype(np.int64)
    if request.last_row:
        own = np.append(own, np.int64(-1 if generated is None else generated))
    made = _rows(entries, own, request.k)
    if isinstance(made, _Problem):
        return RejectedDocument(index, _describe(document, made))
    rows, own_logprobs = made
    reason = refusal(document, rows)
    if reason is None and (problem := _problem(rows, own_logprobs, request, head_size)) is not None:
        reason = _describe(document, problem)
    if reason is not None:
        return RejectedDocument(index, reason)
    return ScoredDocument(index, rows, own_logprobs[: len(document.input_ids) - 1] if request.label_logprobs else None)


@dataclass(frozen=True)
class _Problem:
    """What is wrong, and in which row; None: with the document as a whole."""

    text: str
    row: int | None = None


def _describe(document: TokenDocument, problem: _Problem) -> str:
    if problem.row is None:
        return f"{document.source}: the engine gave {problem.text}"
    token = f"after token {problem.row} of {len(document.input_ids)} (id {document.input_ids[problem.row]})"
    return f"{document.source}: {token} the engine returned {problem.text}"


def _rows(
    entries: RankedEntries, own: npt.NDArray[np.int64], k: int
) -> tuple[SparseLogprobs, npt.NDArray[np.float32]] | _Problem:
    """Take the own token out where it is more than one of the k: rows (R, k) by falling log-prob, own tokens' (R,)."""
    counts = entries.counts
    if len(counts) != len(own):
        return _Problem(f"log-probabilities for {len(counts)} positions, expected {len(own)}")
    row_of = np.repeat(np.arange(len(counts)), counts)
    own_at = np.flatnonzero(entries.ids == own[row_of])
    own_rows, first_at = np.unique(row_of[own_at], return_index=True)
    if len(own_rows) != len(own):
        row = int(np.setdiff1d(np.arange(len(own)), own_rows)[0])
        if not counts[row]:
            return _Problem("nothing", row)
        return _Problem(f"no log-probability for the next token itself (id {own[row]})", row)
    first = own_at[first_at]
    repeated = np.bincount(row_of[own_at], minlength=len(own)) > 1
    surplus = repeated | (entries.ranks[first] > k)
    wrong = counts - surplus != k
    if wrong.any():
        row = int(wrong.argmax())
        return _Problem(f"{counts[row] - surplus[row]} ranks, expected {k}", row)
    kept = np.ones(len(entries.ids), dtype=bool)
    kept[first[surplus]] = False
    ids, logprobs = entries.ids[kept].reshape(-1, k), entries.logprobs[kept].reshape(-1, k)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    rows = SparseLogprobs(np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1))
    return rows, entries.logprobs[first]


def _problem(
    rows: SparseLogprobs, own_logprobs: npt.NDArray[np.float32], request: RowRequest, head_size: int
) -> _Problem | None:
    """Say what keeps finite rows from being distributions, and where first."""
    ids, logprobs = np.asarray(rows.ids), np.asarray(rows.logprobs)
    sorted_ids = np.sort(ids, axis=1)
    mass = np.exp(logprobs.astype(np.float64)).sum(1)
    labels = own_logprobs if request.label_logprobs else np.zeros(len(ids), dtype=np.float32)
    checks = (
        (
            (sorted_ids[:, 0] < 0) | (sorted_ids[:, -1] >= head_size),
            f"ids beyond the {head_size} of the teacher's head",
        ),
        ((np.diff(sorted_ids, axis=1) == 0).any(1), "the same id more than once"),
        (logprobs[:, -1] < _LOWEST, f"fewer than {request.k} ids with a probability above zero"),
        (mass > _MOST_MASS, "probabilities that sum to more than one"),
        (~(labels >= _LOWEST), "no finite log-probability for the next token"),
    )
    for bad, text in checks:
        if bad.any():
            return _Problem(text, int(bad.argmax()))
    return None

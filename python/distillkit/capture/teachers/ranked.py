"""Turns an engine's ranked log-probabilities into rows, or into the reason why they cannot be stored.

For each position of a prompt, inference engines return the k most probable ids and, in addition, the prompt's own next
token with its true rank. A stored row must not contain that token twice, nor in place of a more probable id.

Shape legend: L tokens of a document, R rows, E entries of all rows together, k ids per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument, refusal
from distillkit.errors import ConfigError
from distillkit.types import SparseLogprobs, TokenDocument

__all__ = ["RankedEntries", "check_request", "scored_document"]

# Engines with a JSON API write −9999 for −∞.
_LOWEST = -9998.0
# float32 sums and a 16-bit softmax may slightly exceed one; garbage exceeds it by more.
_MOST_MASS = 1.01


def check_request(request: RowRequest, most: int, engine: str, limit: str) -> None:
    """Refuse what an engine that returns ranked log-probabilities cannot provide.

    Args:
        request: what is stored of the distributions.
        most: ids per row that the engine returns.
        engine, limit: what messages call the engine, and how it came to return that many.

    Raises:
        ConfigError: chosen ids, or too many per row, are requested.
    """
    if request.keep_ids:
        raise ConfigError(
            f"keep_ids: {engine} returns only the top k, not the log-probabilities of chosen ids; use the "
            "transformers engine (--engine hf)"
        )
    if request.k > most:
        raise ConfigError(f"k: {request.k} ids per row were requested, but {limit} {most}")


@dataclass(frozen=True)
class RankedEntries:
    """Log-probabilities of all rows, flattened.

    Attributes:
        ids: (E,) int64.
        logprobs: (E,) float32.
        ranks: (E,) int64, starting at 1.
        counts: (R,) int64, number of entries in each row, in order; they sum to E.
    """

    ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]

    def then(self, other: RankedEntries) -> RankedEntries:
        """These rows followed by others."""
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
    """Build and check a document's rows from the engine's output.

    Args:
        index: index of the document.
        document: L tokens.
        entries: L − 1 rows, or L with `request.last_row`; entries of a row may be in any order.
        request: what to keep of the distributions.
        head_size: ids must be below this.
        generated: the token that the engine generated after the last one; needed for the last row.

    Returns:
        `RejectedDocument` if the number of rows or ranks is wrong, ids repeat or are out of range, values are not
        finite, probabilities sum to more than one, or the document's own token is missing.
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
    """What is wrong, and in which row; None: in the document as a whole."""

    text: str
    row: int | None = None


def _describe(document: TokenDocument, problem: _Problem) -> str:
    if problem.row is None:
        return f"{document.source}: the engine returned {problem.text}"
    token = f"after token {problem.row} of {len(document.input_ids)} (id {document.input_ids[problem.row]})"
    return f"{document.source}: {token} the engine returned {problem.text}"


def _rows(
    entries: RankedEntries, own: npt.NDArray[np.int64], k: int
) -> tuple[SparseLogprobs, npt.NDArray[np.float32]] | _Problem:
    """Remove the own token where it comes on top of the k: rows (R, k) by decreasing log-prob, own log-probs (R,)."""
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
    """Describe why finite rows are not valid distributions, with the first such row."""
    ids, logprobs = np.asarray(rows.ids), np.asarray(rows.logprobs)
    sorted_ids = np.sort(ids, axis=1)
    # Limited, since e to the power of garbage overflows.
    mass = np.exp(np.minimum(logprobs.astype(np.float64), 1.0)).sum(1)
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
        (labels > np.log(_MOST_MASS), "a probability above one for the next token"),
    )
    for bad, text in checks:
        if bad.any():
            return _Problem(text, int(bad.argmax()))
    return None

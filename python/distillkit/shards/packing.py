"""Packing: several complete documents in one training row. Uses numpy only.

The method is best-fit decreasing: documents are placed from the longest to the shortest, each in the fullest row with
room for it (Johnson 1974, "Fast algorithms for bin packing"). It fills rows better than placing documents in random
order, and is what TRL calls `packing_strategy: bfd`. The seed decides how documents of equal length are placed. Rows
have the same contents in every epoch, but a different order.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Packing", "pack"]


@dataclass(frozen=True)
class Packing:
    """Which documents share a row.

    Attributes:
        documents: (D,) int64, indices of the documents, row by row; each occurs once, ascending within a row.
        ends: (R,) int64, the end of each row in `documents`.
        tokens: total number of tokens in the rows.
        capacity: maximum tokens per row.
    """

    documents: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    tokens: int
    capacity: int

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> npt.NDArray[np.int64]:
        """Return the documents of a row."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.documents[self.ends[row - 1] if row else 0 : self.ends[row]]

    @property
    def fill(self) -> float:
        """Return the fraction of the rows' capacity that is filled; 1 if there are no rows."""
        return self.tokens / (len(self) * self.capacity) if len(self) else 1.0


def pack(lengths: npt.NDArray[np.int64], capacity: int, *, seed: int | None = None) -> Packing:
    """Assign documents to rows.

    Takes about a second for a million documents.

    Args:
        lengths: (D,) tokens per document. A document longer than a row counts as a full row, since it will be
            truncated. Empty documents are left out.
        capacity: maximum tokens per row.
        seed: decides between documents of equal length; None takes them in order.

    Returns:
        The rows, in the order of their first documents. The result is deterministic.
    """
    lengths = np.minimum(lengths, capacity)
    order = np.arange(len(lengths)) if seed is None else np.random.default_rng(seed).permutation(len(lengths))
    order = order[lengths[order] > 0]
    order = order[np.argsort(-lengths[order], kind="stable")]
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows = _Rows(capacity)
    for first, last, length in _runs(lengths[order]):
        while first < last:
            row, fitting = rows.take(length, last - first)
            row_of[order[first : first + fitting]] = row
            first += fitting
    # By row, and by index within a row.
    documents = np.sort(order)
    documents = documents[np.argsort(row_of[documents], kind="stable")]
    sizes = np.bincount(row_of[documents], minlength=rows.count)
    return _by_first_document(documents, sizes, int(lengths.sum()), capacity)


def _runs(values: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """Return (start, stop, value) of each run of equal values."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    stops = np.append(starts, len(values))[1:]
    return list(zip(starts.tolist(), stops.tolist(), values[starts].tolist(), strict=True))


class _Rows:
    """Rows, indexed by the room they have left."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self._rooms: list[int] = []  # distinct values over all rows that are not full, ascending
        self._rows: dict[int, list[int]] = {}

    def take(self, length: int, wanted: int) -> tuple[int, int]:
        """Put up to `wanted` documents of one length into the fullest row that has room for one.

        After taking a document, that row is still the fullest as long as another one fits, so it can take as many as
        fit at once.

        Returns:
            The row, and the number of documents it took.
        """
        place = bisect.bisect_left(self._rooms, length)
        if place == len(self._rooms):
            row, room = self.count, self.capacity
            self.count += 1
        else:
            room = self._rooms[place]
            row = self._rows[room].pop()
            if not self._rows[room]:
                del self._rows[room], self._rooms[place]
        fitting = min(room // length, wanted)
        self._put(row, room - fitting * length)
        return row, fitting

    def _put(self, row: int, room: int) -> None:
        if room == 0:
            return
        if room not in self._rows:
            self._rows[room] = []
            bisect.insort(self._rooms, room)
        self._rows[room].append(row)


def _by_first_document(
    documents: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64], tokens: int, capacity: int
) -> Packing:
    """Order rows by their first documents, so that neighbours in the data stay close together."""
    starts = np.cumsum(sizes) - sizes
    order = np.argsort(documents[starts], kind="stable") if len(sizes) else np.empty(0, np.int64)
    ends = np.cumsum(sizes[order])
    # Position p of the result, in row r, comes from position p − (new start of r) + (old start of r).
    source = np.arange(len(documents)) + np.repeat(starts[order] - (ends - sizes[order]), sizes[order])
    return Packing(documents[source], ends.astype(np.int64), tokens, capacity)

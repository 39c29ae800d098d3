"""Packing: several whole documents in one training row. Numpy only.

The method is best-fit decreasing: documents from the longest to the shortest, each into the fullest row that has room
for it (Johnson 1974, "Fast algorithms for bin packing"). It fills rows better than taking documents in a random order
and is what `packing_strategy: bfd` means in TRL. Which of several equally long documents goes where is decided by the
seed. The contents of the rows are the same in every epoch, their order is not.
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
        documents: (D,) int64, indices of the documents, row after row; each document once, ascending within a row.
        ends: (R,) int64, where in `documents` each row ends.
        tokens: how many tokens the rows hold.
        capacity: how many tokens a row has room for.
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
        """Return the share of the rows' room that holds tokens; 1 without rows."""
        return self.tokens / (len(self) * self.capacity) if len(self) else 1.0


def pack(lengths: npt.NDArray[np.int64], capacity: int, *, seed: int | None = None) -> Packing:
    """Distribute documents among rows.

    Takes about a second for a million documents.

    Args:
        lengths: (D,) tokens of each document. One longer than a row counts as a whole row: it will be cut. One without
            tokens is left out.
        capacity: tokens of a row.
        seed: decides among documents of one length; None takes them in their order.

    Returns:
        The rows, in the order of their first documents. It depends on the arguments alone.
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
    """Rows by the room they have left."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self._rooms: list[int] = []  # those that some row has, ascending
        self._rows: dict[int, list[int]] = {}

    def take(self, length: int, wanted: int) -> tuple[int, int]:
        """Put documents of one length into the fullest row that has room for one.

        Having taken one, that row is again the fullest with room for the next, until there is none left in it: so it
        takes them all at once.

        Returns:
            The row, and how many of the wanted documents it took.
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
    """Order rows by their first documents: neighbours in the data stay near each other."""
    starts = np.cumsum(sizes) - sizes
    order = np.argsort(documents[starts], kind="stable") if len(sizes) else np.empty(0, np.int64)
    ends = np.cumsum(sizes[order])
    # Place p of the result, in row r, is place p − (start of r now) + (start of r before).
    source = np.arange(len(documents)) + np.repeat(starts[order] - (ends - sizes[order]), sizes[order])
    return Packing(documents[source], ends.astype(np.int64), tokens, capacity)

"""Checks that a dataset's teacher rows line up with their tokens. Uses numpy only.

A teacher's most probable id matches the true next token far more often than it matches the token of any other position.
Rows stored one position off still look like good distributions, but a student trained on them learns to predict the
wrong position; comparing these match rates reveals it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distillkit.codec import Codec
from distillkit.types import Document, SparseLogprobs

__all__ = ["SHIFTS", "ShiftRates", "counted_positions", "document_shifts", "shift_rates"]

SHIFTS = (-1, 0, 1)

# Standard deviations by which a shift must beat 0 before the data is reported as shifted: tiny or random data proves
# nothing.
_SIGNIFICANT = 4.0


@dataclass(frozen=True)
class ShiftRates:
    """How often the true next token is the teacher's most probable id, with rows in place and shifted by one position.

    Attributes:
        positions: number of positions compared, the same ones for every shift.
        hits: by shift −1, 0, +1: how often the first id of row t + shift equals token t + 1.
        only_here: by shift: how often it hits where shift 0 does not.
        only_unshifted: by shift: how often shift 0 hits where it does not.
    """

    positions: int
    hits: dict[int, int]
    only_here: dict[int, int]
    only_unshifted: dict[int, int]

    @classmethod
    def none(cls) -> ShiftRates:
        """Return rates over no documents, to add others to."""
        return cls(0, *(dict.fromkeys(SHIFTS, 0) for _ in range(3)))

    def __add__(self, other: ShiftRates) -> ShiftRates:
        def both(name: str) -> dict[int, int]:
            return {shift: getattr(self, name)[shift] + getattr(other, name)[shift] for shift in SHIFTS}

        return ShiftRates(self.positions + other.positions, both("hits"), both("only_here"), both("only_unshifted"))

    def rate(self, shift: int) -> float:
        """Return the fraction of positions that hit; 0 if there are no positions."""
        return self.hits[shift] / self.positions if self.positions else 0.0

    def shifted(self) -> int | None:
        """Return the shift at which rows fit the tokens significantly better than at 0 (McNemar's test), or None."""
        for shift in (-1, 1):
            better, worse = self.only_here[shift], self.only_unshifted[shift]
            if better > worse and (better - worse) ** 2 > _SIGNIFICANT**2 * (better + worse):
                return shift
        return None

    def __str__(self) -> str:
        rates = ", ".join(
            f"{self.rate(shift):.1%} at {shift:+d}" if shift else f"{self.rate(0):.1%} at 0" for shift in SHIFTS
        )
        return f"{rates} (over {self.positions:,} positions)"


def shift_rates(documents: Iterable[Document], codec: Codec) -> ShiftRates:
    """Measure how often the true next token is the teacher's first id, with rows in place and shifted by one position.

    Args:
        documents: a sample of the dataset.
        codec: the dataset's codec.

    Raises:
        CorruptDataError: a document does not decode.
    """
    total = ShiftRates.none()
    for document in documents:
        total += document_shifts(document, codec.decode_document(document.teacher, document.num_rows))
    return total


def document_shifts(document: Document, rows: SparseLogprobs) -> ShiftRates:
    """Measure one document, given its decoded teacher rows (numpy)."""
    first = np.asarray(rows.ids)[:, 0]
    t = _inner_positions(document)
    hit = {shift: first[t + shift] == document.input_ids[t + 1] for shift in SHIFTS}
    return ShiftRates(
        positions=len(t),
        hits={shift: int(hit[shift].sum()) for shift in SHIFTS},
        only_here={shift: int((hit[shift] & ~hit[0]).sum()) for shift in SHIFTS},
        only_unshifted={shift: int((hit[0] & ~hit[shift]).sum()) for shift in SHIFTS},
    )


def counted_positions(
    segment_lengths: npt.NDArray[np.int64], loss_mask: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.int64]:
    """Find the positions that count towards the loss.

    A position t counts if token t + 1 is in the same packed document and the loss mask, if any, includes token t + 1.
    So a document of L tokens has at most L − 1 such positions: nothing is predicted across a boundary or after the last
    token.

    Args:
        segment_lengths: (S,) lengths of the packed documents, summing to L.
        loss_mask: (L,) which tokens are to be predicted; all of them if None.

    Returns:
        (P,) int64, ascending.
    """
    counts = np.ones(int(segment_lengths.sum()), dtype=bool)
    ends = np.cumsum(segment_lengths)
    counts[ends[ends > 0] - 1] = False
    if loss_mask is not None:
        counts[:-1] &= loss_mask[1:]
    return np.flatnonzero(counts).astype(np.int64)


def _inner_positions(document: Document) -> np.ndarray:
    """Positions t for which rows t − 1, t and t + 1 and token t + 1 all belong to the same packed document."""
    starts = np.concatenate([[0], np.cumsum(document.segments())])
    last = document.num_rows - 1
    return np.concatenate([np.arange(start + 1, min(stop - 1, last)) for start, stop in itertools.pairwise(starts)])

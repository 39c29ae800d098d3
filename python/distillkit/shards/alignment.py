"""Whether a dataset's teacher rows stand beside the tokens they belong to. Needs numpy only.

A teacher's most probable id is the true next token far more often than any other position's token. Rows that were
stored one position off still look like good distributions, and a student trained on them learns to predict the wrong
position; this is how it shows.
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

# A shift must beat 0 by this many standard deviations before the data is called shifted: tiny or random data proves
# nothing.
_SIGNIFICANT = 4.0


@dataclass(frozen=True)
class ShiftRates:
    """How often the true next token is the teacher's most probable one, with the rows taken from a neighbouring
    position.

    Attributes:
        positions: how many positions were compared; the same ones for every shift.
        hits: by shift −1, 0, +1, how often the first id of row t + shift equals token t + 1.
        only_here: by shift, how often that was so while it was not so with shift 0.
        only_unshifted: by shift, the other way round.
    """

    positions: int
    hits: dict[int, int]
    only_here: dict[int, int]
    only_unshifted: dict[int, int]

    @classmethod
    def none(cls) -> ShiftRates:
        """Return the measure of no documents."""
        return cls(0, *(dict.fromkeys(SHIFTS, 0) for _ in range(3)))

    def __add__(self, other: ShiftRates) -> ShiftRates:
        def both(name: str) -> dict[int, int]:
            return {shift: getattr(self, name)[shift] + getattr(other, name)[shift] for shift in SHIFTS}

        return ShiftRates(self.positions + other.positions, both("hits"), both("only_here"), both("only_unshifted"))

    def rate(self, shift: int) -> float:
        """Return the share of positions that hit; 0 without positions."""
        return self.hits[shift] / self.positions if self.positions else 0.0

    def shifted(self) -> int | None:
        """Return the shift at which the rows fit the tokens, if that is not 0 beyond chance (McNemar's test); else
        None."""
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
    """Measure how often the true next token is the teacher's first id, with rows at their place and one off.

    Args:
        documents: a sample of the dataset.
        codec: theirs.

    Raises:
        CorruptDataError: a document does not decode.
    """
    total = ShiftRates.none()
    for document in documents:
        total += document_shifts(document, codec.decode_document(document.teacher, document.num_rows))
    return total


def document_shifts(document: Document, rows: SparseLogprobs) -> ShiftRates:
    """Measure one document, whose teacher bytes decode to `rows` (numpy)."""
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
    """Find the positions that count in a loss.

    A position t counts if token t + 1 is in the same packed document and its loss mask, if there is one, is set. So a
    document of L tokens has at most L − 1: nothing is predicted across a boundary or after the last token.

    Args:
        segment_lengths: (s,) lengths of the packed documents, summing to L.
        loss_mask: (L,) which tokens should be predicted; all if None.

    Returns:
        (P,) int64, ascending.
    """
    counts = np.ones(int(segment_lengths.sum()), dtype=bool)
    counts[np.cumsum(segment_lengths) - 1] = False
    if loss_mask is not None:
        counts[:-1] &= loss_mask[1:]
    return np.flatnonzero(counts).astype(np.int64)


def _inner_positions(document: Document) -> np.ndarray:
    """Positions t whose rows t − 1, t, t + 1 and token t + 1 all belong to one packed document."""
    starts = np.concatenate([[0], np.cumsum(document.segments())])
    last = document.num_rows - 1
    return np.concatenate([np.arange(start + 1, min(stop - 1, last)) for start, stop in itertools.pairwise(starts)])

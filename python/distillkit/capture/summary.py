"""Statistics of captured rows: how much probability mass is stored, and whether rows line up with their tokens.

Shape legend: R rows of a document, L its tokens, k ids per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import CorruptDataError
from distillkit.shards.alignment import SHIFTS, ShiftRates, document_shifts
from distillkit.types import Document, SparseLogprobs

__all__ = ["ShardSummary"]

_BINS = 1000
QUANTILES = (0.01, 0.1, 0.5)


@dataclass
class ShardSummary:
    """Sums over rows, which can be added up over documents and shards.

    Attributes:
        shifts: how often the next token is the teacher's first id, with the rows in place and shifted by one.
        mass_sum: sum over rows of the total probability of the stored ids.
        mass_bins: (1000,) number of rows with that probability in [i, i + 1) / 1000.
    """

    shifts: ShiftRates = field(default_factory=ShiftRates.none)
    mass_sum: float = 0.0
    mass_bins: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, dtype=np.int64))

    def add(self, document: Document, rows: SparseLogprobs) -> None:
        """Add a document and its rows, numpy (R, k)."""
        self.shifts += document_shifts(document, rows)
        mass_R = np.exp(np.asarray(rows.logprobs, dtype=np.float64)).sum(-1)
        self.mass_sum += float(mass_R.sum())
        self.mass_bins += np.bincount(np.clip((mass_R * _BINS).astype(np.int64), 0, _BINS - 1), minlength=_BINS)

    def merge(self, other: ShardSummary) -> None:
        """Add the rows of another summary."""
        self.shifts += other.shifts
        self.mass_sum += other.mass_sum
        self.mass_bins = self.mass_bins + other.mass_bins

    @property
    def mass_mean(self) -> float | None:
        """Mean total probability of a row's stored ids; None without rows."""
        rows = int(self.mass_bins.sum())
        return self.mass_sum / rows if rows else None

    def mass_quantile(self, share: float) -> float | None:
        """The stored probability that `share` of the rows do not exceed, to 1/1000; None without rows."""
        below = np.cumsum(self.mass_bins)
        if not below[-1]:
            return None
        return float(np.searchsorted(below, share * below[-1]) + 1) / _BINS

    def to_dict(self) -> dict[str, Any]:
        """All sums as a JSON-able mapping; empty bins are left out."""
        return {
            "positions": self.shifts.positions,
            "hits": _texts(self.shifts.hits),
            "only_here": _texts(self.shifts.only_here),
            "only_unshifted": _texts(self.shifts.only_unshifted),
            "mass_sum": self.mass_sum,
            "mass_bins": [[int(index), int(self.mass_bins[index])] for index in np.flatnonzero(self.mass_bins)],
        }

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> ShardSummary:
        """The summary that `to_dict` returned `content` for.

        Raises:
            CorruptDataError: `content` is malformed.
        """
        bins = np.zeros(_BINS, dtype=np.int64)
        try:
            counts = [{shift: int(content[name][str(shift)]) for shift in SHIFTS} for name in _COUNTS]
            for index, count in content["mass_bins"]:
                bins[index] = count
            return ShardSummary(ShiftRates(int(content["positions"]), *counts), float(content["mass_sum"]), bins)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise CorruptDataError(f"invalid statistics of rows: {error!r}") from error


_COUNTS = ("hits", "only_here", "only_unshifted")


def _texts(counts: Mapping[int, int]) -> dict[str, int]:
    return {str(key): value for key, value in counts.items()}

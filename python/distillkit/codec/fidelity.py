"""Codec fidelity: running statistics of decoded against original distributions, mergeable across shards.

Shape legend: R rows (positions), k stored ids per row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit import _native
from distillkit.errors import CorruptDataError, InputError
from distillkit.types import SparseLogprobs

__all__ = ["FidelityStats", "kl_rows", "values_of"]

_BINS_PER_OCTAVE = 16
"""Resolution of the KL histogram: a quantile read from it is at most 2^(1/16) − 1 = 4.4% too high."""
_LOWEST = 2.0**-40
"""Smaller KL values count as this one (1e-12 nats)."""


def kl_rows(original: npt.NDArray[Any], decoded: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """KL(p ‖ p̂) of each row over K ∪ {R} in nats: its stored ids, and R, all other ids together, as one more outcome.

    R has what is missing from 1, at least 1e-12; both sides are renormalised, as rounding may take a sum above 1. This
    is what the encoder minimises.

    Args:
        original, decoded: (R, k) log-probabilities of the same ids in the same order; −inf at places without an id.

    Returns:
        (R,) float64, at least 0.
    """

    kl_R, *_ = _compared(original, decoded)
    return kl_R


def values_of(rows: SparseLogprobs, stored: SparseLogprobs) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Looks up the log-probabilities that rows have for the ids of other, stored rows.

    Args:
        rows: numpy (R, n).
        stored: numpy (R, k), with a log-probability of −inf at places without an id.

    Returns:
        (R, k) float32, log-probabilities in `rows` of the stored ids, −inf at places without one and of ids that the
        row does not have; and (R,) whether each of a row's stored ids is among its n ids.
    """
    ids, wanted = (np.ascontiguousarray(each.ids, np.int64) for each in (rows, stored))
    values, logprobs = (np.ascontiguousarray(each.logprobs, np.float32) for each in (rows, stored))
    return _native.values_of(ids, values, wanted, logprobs)


def _compared(before: Any, after: Any) -> tuple[npt.NDArray[np.float64], int, float, float, npt.NDArray[np.float64]]:
    before, after = np.asarray(before), np.asarray(after)
    if before.dtype == after.dtype == np.float32:
        return _native.compare(np.ascontiguousarray(before, np.float32), np.ascontiguousarray(after, np.float32))
    return _native.compare(np.ascontiguousarray(before, np.float64), np.ascontiguousarray(after, np.float64))


class FidelityStats:
    """Sums and maxima over all rows seen so far; `merge` adds those of another instance.

    Attributes:
        rows: number of rows compared.
        kl_max: largest KL of a row over K ∪ {R} (see `kl_rows`), nats.
        worst_error: largest |log-probability error| of any stored id, nats.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.kl_max = 0.0
        self.worst_error = 0.0
        self._kl_sum = 0.0
        self._top1_sum = 0
        self._mass_error_sum = 0.0
        self._histogram: dict[int, int] = {}
        self._ranks: npt.NDArray[np.float64] | None = None

    def update(self, original: SparseLogprobs, decoded: SparseLogprobs) -> None:
        """Adds R rows: numpy (R, k), with the same ids in the same order, and −inf at places without an id.

        Raises:
            InputError: the shapes or ids differ.
        """
        same_ids = original.ids is decoded.ids or np.array_equal(original.ids, decoded.ids)
        if original.logprobs.shape != decoded.logprobs.shape or not same_ids:
            raise InputError("original and decoded rows must hold the same ids in the same order")
        if len(original.ids) == 0:
            return
        kl_R, top1, mass_error, worst_error, ranks_4k = _compared(original.logprobs, decoded.logprobs)
        self._top1_sum += top1
        self._mass_error_sum += mass_error
        self.rows += len(kl_R)
        self.kl_max = max(self.kl_max, float(kl_R.max()))
        self.worst_error = max(self.worst_error, worst_error)
        self._kl_sum += float(kl_R.sum())
        bins = np.ceil(np.log2(np.maximum(kl_R, _LOWEST)) * _BINS_PER_OCTAVE).astype(int)
        for index, count in zip(*np.unique(bins, return_counts=True), strict=True):
            self._histogram[int(index)] = self._histogram.get(int(index), 0) + int(count)
        self._add_ranks(ranks_4k)

    def _add_ranks(self, sums_4k: npt.NDArray[np.float64]) -> None:
        self._ranks = sums_4k if self._ranks is None else self._ranks + sums_4k

    def merge(self, other: FidelityStats) -> None:
        """Adds the rows that `other` has seen."""
        self.rows += other.rows
        self.kl_max = max(self.kl_max, other.kl_max)
        self.worst_error = max(self.worst_error, other.worst_error)
        self._kl_sum += other._kl_sum
        self._top1_sum += other._top1_sum
        self._mass_error_sum += other._mass_error_sum
        for index, count in other._histogram.items():
            self._histogram[index] = self._histogram.get(index, 0) + count
        if other._ranks is not None:
            self._add_ranks(other._ranks)

    @property
    def kl_mean(self) -> float:
        """Mean KL per row, nats; NaN without rows."""
        return self._kl_sum / self.rows if self.rows else float("nan")

    @property
    def kl_p99(self) -> float:
        """99th percentile of the rows' KL, nats, from a histogram (up to 4.4% too high); NaN without rows."""
        if not self.rows:
            return float("nan")
        wanted, seen = 0.99 * self.rows, 0
        for index in sorted(self._histogram):
            seen += self._histogram[index]
            if seen >= wanted:
                return float(min(2.0 ** (index / _BINS_PER_OCTAVE), self.kl_max))
        return self.kl_max

    @property
    def top1_agreement(self) -> float:
        """Fraction of rows whose most probable id is still the most probable after decoding; NaN without rows."""
        return self._top1_sum / self.rows if self.rows else float("nan")

    @property
    def mass_error(self) -> float:
        """Mean |Σ p̂ − Σ p| over the stored ids; NaN without rows."""
        return self._mass_error_sum / self.rows if self.rows else float("nan")

    def by_rank(self) -> dict[str, npt.NDArray[np.float64]]:
        """Per rank (k,), nats: `mean` and `std` of the original log-probability, `rms_error` of the decoded one, over
        the rows that have an id there; NaN where none has."""
        if self._ranks is None:
            return {}
        counts = self._ranks[3]
        mean, square, error = np.divide(
            self._ranks[:3], counts, out=np.full_like(self._ranks[:3], np.nan), where=counts > 0
        )
        return {"mean": mean, "std": np.sqrt(np.maximum(square - mean**2, 0.0)), "rms_error": np.sqrt(error)}

    def to_dict(self) -> dict[str, Any]:
        """Everything as a JSON-serialisable mapping, including the derived statistics for readers of the JSON."""
        return {
            "rows": self.rows,
            "kl_mean": self._kl_sum / self.rows if self.rows else None,
            "kl_p99": self.kl_p99 if self.rows else None,
            "kl_max": self.kl_max,
            "worst_error": self.worst_error,
            "top1_agreement": self.top1_agreement if self.rows else None,
            "mass_error": self.mass_error if self.rows else None,
            "sums": {
                "kl": self._kl_sum,
                "top1": self._top1_sum,
                "mass_error": self._mass_error_sum,
                "kl_histogram": sorted(self._histogram.items()),
                "ranks": self._rank_sums(),
            },
        }

    def _rank_sums(self) -> list[list[float]] | None:
        """Sums by rank; how many rows have an id there is left out if all have."""
        if self._ranks is None:
            return None
        return self._ranks[: 3 if (self._ranks[3] == self.rows).all() else 4].tolist()  # type: ignore[no-any-return]

    @staticmethod
    def from_dict(description: Mapping[str, Any]) -> FidelityStats:
        """Recreates the statistics from the result of `to_dict`.

        Raises:
            CorruptDataError: the mapping is not such a result.
        """
        stats = FidelityStats()
        try:
            sums = description["sums"]
            stats.rows = int(description["rows"])
            stats.kl_max = float(description["kl_max"])
            stats.worst_error = float(description["worst_error"])
            stats._kl_sum = float(sums["kl"])
            stats._top1_sum = int(sums["top1"])
            stats._mass_error_sum = float(sums["mass_error"])
            stats._histogram = {int(index): int(count) for index, count in sums["kl_histogram"]}
            if sums["ranks"] is not None:
                ranks = np.asarray(sums["ranks"], dtype=np.float64)
                stats._ranks = np.vstack([ranks, np.full((4 - len(ranks), ranks.shape[1]), float(stats.rows))])
        except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
            raise CorruptDataError(f"invalid fidelity statistics: {error!r}") from error
        return stats

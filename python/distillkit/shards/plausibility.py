"""Checks that decoded rows can be a teacher's distributions of their tokens. Uses numpy only.

A published dataset does not record its codec, and bytes decode to numbers under any codec of the same width. Settings
that differ from those of the writer show in the rows, though: values that no codec gives to a distribution
(impossible), or that real distributions do not have (doubtful). The limits are measured on real rows: those of right
codecs, by our encoder and by the published one, stay below them.

Shape legend: R rows of a document, k stored ids per row, n rows of all documents.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from distillkit.codec import Codec
from distillkit.errors import CorruptDataError, MismatchError
from distillkit.shards.alignment import ShiftRates, counted_positions, document_shifts
from distillkit.types import Document, SparseLogprobs

__all__ = [
    "HIGHEST",
    "IMPOSSIBLE_MASS",
    "WRONG_CODEC",
    "Plausibility",
    "check_plausible",
    "check_values",
    "decoded",
    "sampled",
]

logger = logging.getLogger(__name__)

_SAMPLE_DOCUMENTS, _SAMPLE_TOKENS = 64, 32_768
"""How much of a dataset is read for a check."""

IMPOSSIBLE_MASS = 1.1
"""A row's probabilities sum to 1 at most. Approximated ranks exceed this in some rows of coarse codecs: in 3.3% of real
rows if the published encoder wrote `budget`."""

_HIGHEST_EXACT, HIGHEST = 0.1, 10.0
"""No exact rank, and no rank at all, has a log-probability above these. Logarithms of probabilities are at most 0; the
published encoder's approximations reach 1.9 on real rows, and 6.8 where the teacher is nearly certain."""
_EXACT_MASS = 1.05
"""Exact ranks sum to 1 at most, up to the rounding of their values."""
_EXACT_RISE, _RISE = 0.1, 1.0
"""Nats by which a rank may exceed the one before it: exact ones only by rounding, approximated ones by their error."""
_FALL_RANKS, _FALL = 8, 0.5
"""Differences read as values, or values as differences, fall faster with every rank: over so many ranks, by so much."""

_SHARE, _EXACT_SHARE, _DOUBTFUL_SHARE = 0.25, 0.01, 0.05
_SIGNIFICANT = 3.0
"""Standard deviations by which a count must exceed its limit, since a few rows prove nothing."""

_BORDER = (0.1, 5.0)
"""How much steeper the first approximated ranks may be than the last exact ones; 0.15 to 1.6 on real rows."""
_UNCALIBRATED, _PREDICTIONS = 0.2, 500
"""Difference between the probability of first ids and how often they are the next token, over so many positions."""

_SIGNS: dict[str, tuple[float, str]] = {
    "highest": (0.0, "contain a log-probability of more than 0"),
    "exact_mass": (_EXACT_SHARE, "have exact ranks whose probabilities add up to more than 1"),
    "exact_order": (_EXACT_SHARE, "have exact ranks that are not in descending order"),
    "mass": (_SHARE, f"have probabilities that add up to more than {IMPOSSIBLE_MASS}, where at most 1 is possible"),
    "order": (_SHARE, f"have a rank that exceeds the one before it by more than {_RISE:g} nat"),
    "fall": (_SHARE, "fall faster from rank to rank, as if delta_encoding were the wrong way round"),
    "repeated": (_EXACT_SHARE, "contain an id twice"),
}
"""What a row may show, each with the share of rows above which it is impossible, and its description."""


@dataclass
class Plausibility:
    """What the rows of some documents show.

    Attributes:
        exact_k: number of exact ranks per row.
        rows: number of rows.
        signs: number of rows with each of `_SIGNS`.
        shifts: how the rows line up with the tokens.
        first: place and value of the first log-probability that is too high; empty if there is none.
    """

    exact_k: int
    rows: int = 0
    signs: Counter[str] = field(default_factory=Counter)
    shifts: ShiftRates = field(default_factory=ShiftRates.none)
    first: str = ""
    _predictions: int = 0
    _first_hits: int = 0
    _first_mass: float = 0.0
    _steps: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))

    def add(self, document: Document, rows: SparseLogprobs) -> None:
        """Count a document, given its decoded rows (numpy)."""
        ids_Rk, logprobs_Rk = np.asarray(rows.ids), np.asarray(rows.logprobs, dtype=np.float64)
        self.rows += len(ids_Rk)
        for name, found_R in _signs_of(ids_Rk, logprobs_Rk, self.exact_k):
            self.signs[name] += int(found_R.sum())
            if name == "highest" and found_R.any() and not self.first:
                self.first = _highest(logprobs_Rk, found_R, document.place)
        self._steps += _steps_of(logprobs_Rk, self.exact_k)
        self.shifts += document_shifts(document, rows)
        if rows.draws is not None:
            # The largest share of few draws is more than the probability that it estimates.
            return
        t = counted_positions(document.segments())
        self._predictions += len(t)
        self._first_hits += int((ids_Rk[t, 0] == document.input_ids[t + 1]).sum())
        self._first_mass += float(np.exp(np.minimum(logprobs_Rk[t, 0], 0.0)).sum())

    def impossible(self) -> list[str]:
        """Return what no rows have that were written with this codec."""
        found = []
        for name, (limit, description) in _SIGNS.items():
            count = self.signs[name]
            if count > limit * self.rows + _SIGNIFICANT * np.sqrt(limit * (1 - limit) * self.rows):
                first = f" ({self.first})" if name == "highest" else ""
                found.append(f"{count / self.rows:.1%} of the rows {description}{first}")
        return found

    def doubts(self) -> list[str]:
        """Return what real distributions do not have, without being impossible."""
        found = []
        for name, (limit, description) in _SIGNS.items():
            count = self.signs[name]
            if limit == _SHARE and _DOUBTFUL_SHARE * self.rows < count <= limit * self.rows:
                found.append(f"{count / self.rows:.1%} of the rows {description}")
        exact, approximated = self._steps
        if exact > 0 and not _BORDER[0] <= approximated / exact <= _BORDER[1]:
            found.append(
                f"log-probabilities fall {approximated / exact:.2g} times as fast from rank {self.exact_k} on, where "
                "they are approximated, as before it"
            )
        if self._predictions >= _PREDICTIONS:
            mass, hits = self._first_mass / self._predictions, self._first_hits / self._predictions
            if abs(mass - hits) > _UNCALIBRATED:
                found.append(
                    f"the first ids have a probability of {mass:.0%} on average, but {hits:.0%} of them are the next "
                    "token; for the teacher's own kind of text, these are about equal"
                )
        return found


def check_plausible(documents: Iterable[Document], codec: Codec, name: str) -> ShiftRates:
    """Refuse documents whose rows their codec cannot have written; log a warning of doubts.

    Args:
        documents: a sample of a dataset; see `sampled`.
        codec: the codec that decodes them.
        name: the dataset, for messages.

    Returns:
        How the rows of the sample line up with their tokens.

    Raises:
        MismatchError: rows are impossible, or shifted against the tokens; the message says how many.
        CorruptDataError: a document is damaged.
    """
    found = Plausibility(codec.exact_k)
    for document in documents:
        found.add(document, decoded(document, codec))
    impossible = found.impossible()
    if impossible:
        raise MismatchError(f"{name}: {'; '.join(impossible)}. {WRONG_CODEC}")
    shift = found.shifts.shifted()
    if shift is not None:
        raise MismatchError(
            f"{name}: the teacher's rows are shifted by {shift:+d} against the tokens. The true next token is the "
            f"teacher's most probable one with the rows moved by: {found.shifts}; that must peak at 0"
        )
    for doubt in found.doubts():
        logger.warning("%s: %s. If the dataset is published, check its codec's settings", name, doubt)
    return found.shifts


WRONG_CODEC = (
    "These are not the settings of the codec with which the dataset was written, or it does not contain "
    "log-probabilities: check its compression_config.yaml, or the configuration that was given"
)


def decoded(document: Document, codec: Codec) -> SparseLogprobs:
    """Decode a document's rows.

    Raises:
        CorruptDataError: they cannot be decoded; names the document.
    """
    try:
        return codec.decode_document(document.teacher, document.num_rows)
    except CorruptDataError as error:
        raise type(error)(f"{document.place}: {error}") from error


def check_values(document: Document, rows: SparseLogprobs, exact_k: int) -> None:
    """Refuse a row with a log-probability that is too high to be one.

    Raises:
        CorruptDataError: there is one; names document, row and rank.
    """
    logprobs_Rk = np.asarray(rows.logprobs)
    found_R = _too_high(logprobs_Rk, exact_k)
    if found_R.any():
        raise CorruptDataError(f"{_highest(logprobs_Rk, found_R, document.place)}. {WRONG_CODEC}")


class _Documents(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


def sampled(documents: _Documents) -> Iterator[Document]:
    """Read documents evenly spread over a dataset, up to a limit of documents and tokens."""
    count = min(len(documents), _SAMPLE_DOCUMENTS)
    tokens = 0
    for index in np.linspace(0, len(documents) - 1, count).round().astype(int).tolist():
        document = documents[index]
        yield document
        tokens += len(document.input_ids)
        if tokens >= _SAMPLE_TOKENS:
            return


# -- what a row shows --------------------------------------------------------------------------------------------------


def _too_high(logprobs_Rk: npt.NDArray[np.floating], exact_k: int) -> npt.NDArray[np.bool_]:
    highest_R = logprobs_Rk.max(-1, initial=-np.inf) > HIGHEST
    return np.asarray(highest_R | (logprobs_Rk[:, :exact_k].max(-1, initial=-np.inf) > _HIGHEST_EXACT))


def _highest(logprobs_Rk: npt.NDArray[np.floating], found_R: npt.NDArray[np.bool_], place: str) -> str:
    row = int(found_R.argmax())
    rank = int(logprobs_Rk[row].argmax())
    return (
        f"{place}: row {row}: the log-probability at rank {rank} is {logprobs_Rk[row, rank]:.4g}; at most 0 is possible"
    )


def _signs_of(
    ids_Rk: npt.NDArray[np.int64], logprobs_Rk: npt.NDArray[np.float64], exact_k: int
) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """Yield each sign, and which rows show it (R,)."""
    # With the wrong codec, values can be arbitrary; e^100 is clearly impossible, yet finite.
    probabilities_Rk = np.exp(np.minimum(logprobs_Rk, 100.0))
    # Places without an id, at the end of a row, repeat its first id and have a log-probability of −inf.
    absent_Rk = np.isneginf(logprobs_Rk)
    rises_Rk = np.diff(np.where(absent_Rk, -np.finfo(np.float32).max, logprobs_Rk), axis=-1)
    yield "highest", _too_high(logprobs_Rk, exact_k)
    yield "exact_mass", probabilities_Rk[:, :exact_k].sum(-1) > _EXACT_MASS
    yield "exact_order", np.asarray((rises_Rk[:, : max(exact_k - 1, 0)] > _EXACT_RISE).any(-1))
    yield "mass", probabilities_Rk.sum(-1) > IMPOSSIBLE_MASS
    yield "order", np.asarray((rises_Rk > _RISE).any(-1))
    falls_Rk = -rises_Rk[:, :_FALL_RANKS]
    if falls_Rk.shape[1] > 2:
        faster_R = (np.diff(falls_Rk, axis=-1) > -1e-3).all(-1) & ~absent_Rk[:, : falls_Rk.shape[1] + 1].any(-1)
        yield "fall", faster_R & (falls_Rk[:, -1] - falls_Rk[:, 0] > _FALL)
    apart_Rk = np.where(absent_Rk, -1 - np.arange(ids_Rk.shape[1]), ids_Rk)
    yield "repeated", np.asarray((np.diff(np.sort(apart_Rk, axis=-1), axis=-1) == 0).any(-1))


def _steps_of(logprobs_Rk: npt.NDArray[np.float64], exact_k: int) -> npt.NDArray[np.float64]:
    """(2,) nats per rank over equally many ranks, the last exact ones and the first approximated ones, summed over
    rows; 0 if there are too few of either."""
    width = min(exact_k - 1, logprobs_Rk.shape[1] - exact_k - 1, 8)
    if width < 2:
        return np.zeros(2)
    # One row of large values must not decide.
    steps_R2 = [logprobs_Rk[:, at] - logprobs_Rk[:, at + width] for at in (exact_k - 1 - width, exact_k)]
    return np.asarray([np.clip(steps_R, -50.0, 50.0).sum() / width for steps_R in steps_R2])

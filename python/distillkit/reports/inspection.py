"""What a dataset holds: its size, its fidelity, and whether it is sound. Needs no torch, except to run a teacher.

Shape legend: R rows of a document, k stored ids a row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from distillkit.codec import PRESETS, preset
from distillkit.codec.fidelity import FidelityStats
from distillkit.errors import CaptureError, ConfigError, DistillKitError, InputError, MismatchError
from distillkit.shards import Dataset
from distillkit.shards.alignment import SHIFTS, ShiftRates, counted_positions, document_shifts
from distillkit.types import Document, SparseLogprobs

if TYPE_CHECKING:
    from distillkit.capture.teachers.hf import HFTeacher

__all__ = ["Inspection", "inspect_dataset", "recompute_fidelity"]

logger = logging.getLogger(__name__)

_MASS_BINS = 10_000
"""Resolution of the mass histogram: 0.0001."""
_LOGPROB_BINS, _LOWEST_LOGPROB = 600, -30.0
"""Resolution of the log-probabilities' histograms, 0.05 nats, and what everything below counts as."""
_QUANTILES = (0.1, 0.5, 0.9)
_IMPOSSIBLE_MASS, _IMPOSSIBLE_RATE = 1.1, 0.01
"""Rows whose probabilities add up to more than this are no distributions, and how many of them prove the codec wrong:
a fit of `budget` that nothing keeps below 1 makes 0.05% of the rows of real text so."""


@dataclass(frozen=True)
class Inspection:
    """Figures of a dataset. Rates and masses are over the documents looked at.

    Attributes:
        path, kind: what was opened; "distillkit" or "published".
        documents, tokens, rows: of the whole dataset.
        documents_read, rows_read: how many documents the rates are over, and their rows.
        files, file_bytes: of the whole dataset.
        id_bytes, value_bytes: the codec's bytes a row.
        overhead_bytes: everything else in the files (token ids of the documents, checksums, Parquet), a row.
        dense_ratio: how many times larger dense bfloat16 logits are: 2 · head_size bytes a row against all bytes.
        topk_ratio: the same for plain top-k: k · (4 bytes of id + 2 of bfloat16).
        codec: format, version and config.
        codec_warnings: what is valid in that config but probably not wanted.
        preset: name of the preset that the codec is, or None.
        teacher, tokenizer, capture, temperature: as in the header, None or empty where unknown.
        rows_per_document: "L-1" or "L", the rows of a document of L tokens.
        vocab_size, head_size: ids of the tokenizer, columns of the logits.
        mass_p1, mass_p50, mass_mean: probability on the stored ids of a row.
        mass_impossible: share of rows whose stored probabilities add up to more than 1.1.
        mass_histogram: (10001,) rows by mass in steps of 0.0001; more than 1 counts as 1.
        first_rate, stored_rate: how often the true next token is the stored first, and is stored at all.
        shifts: the alignment check.
        logprob_mean: (k,) mean decoded log-probability by rank.
        logprob_quantiles: (3, k) what 10%, 50% and 90% of the decoded log-probabilities do not exceed, by rank.
        fidelity: recorded by the writer or computed again, None where neither is at hand.
        fidelity_source: "recorded by the writer", or the teacher's name, or None.
    """

    path: str
    kind: str
    documents: int
    tokens: int
    rows: int
    documents_read: int
    rows_read: int
    files: int
    file_bytes: int
    id_bytes: float
    value_bytes: float
    overhead_bytes: float
    dense_ratio: float
    topk_ratio: float
    codec: dict[str, Any]
    codec_warnings: tuple[str, ...]
    preset: str | None
    teacher: dict[str, Any] | None
    tokenizer: dict[str, Any] | None
    capture: dict[str, Any]
    temperature: float
    rows_per_document: str
    vocab_size: int
    head_size: int
    mass_p1: float
    mass_p50: float
    mass_mean: float
    mass_impossible: float
    mass_histogram: npt.NDArray[np.int64]
    first_rate: float
    stored_rate: float
    shifts: ShiftRates
    logprob_mean: npt.NDArray[np.float64]
    logprob_quantiles: npt.NDArray[np.float64]
    fidelity: FidelityStats | None
    fidelity_source: str | None

    @property
    def total_bytes(self) -> float:
        """Bytes a row, everything included."""
        return self.id_bytes + self.value_bytes + self.overhead_bytes

    @property
    def alignment(self) -> Literal["ok", "shifted", "undecided"]:
        """Whether the rows stand beside the tokens they belong to; undecided where too little data cannot tell."""
        if self.shifts.shifted() is not None:
            return "shifted"
        return "ok" if self.shifts.rate(0) > max(self.shifts.rate(-1), self.shifts.rate(1)) else "undecided"

    def _mass(self) -> dict[str, float]:
        shares = {"p1": self.mass_p1, "p50": self.mass_p50, "mean": self.mass_mean}
        return {**shares, "impossible": self.mass_impossible}

    @property
    def plausible(self) -> bool:
        """Whether what was decoded can be distributions; if not, the codec is not the one that wrote them."""
        return not self.mass_impossible > _IMPOSSIBLE_RATE

    def to_dict(self) -> dict[str, Any]:
        """Everything but the histogram and the curves, JSON-able: what `distillkit-codec inspect --json` prints.

        These keys stay as they are; later releases may add others.

        | key | |
        |---|---|
        | `path`, `kind` | what was opened; "distillkit" or "published" |
        | `documents`, `tokens`, `rows`, `files`, `file_bytes` | of the whole dataset |
        | `documents_read`, `rows_read` | what the rates, masses and the alignment are over |
        | `bytes_per_token` | `ids`, `values`, `codec` (both), `overhead`, `total`, by stored distribution |
        | `compression` | `dense_bf16`, `topk_bf16`: how many times larger these are |
        | `codec` | `format`, `version`, `config`, `preset` (or null), `warnings` |
        | `teacher`, `tokenizer` | name and what identifies it, or null |
        | `capture`, `temperature` | settings of the capture; what the logits were divided by |
        | `rows_per_document` | "L-1" or "L" for a document of L tokens |
        | `vocab_size`, `head_size` | ids of the tokenizer, width of the logits |
        | `mass` | probability on the stored ids: `p1`, `p50`, `mean`; `impossible`, share of rows above 1.1; or null |
        | `next_token` | share of positions whose true next token `is_first`, `is_stored` |
        | `alignment` | `rates` at "-1", "0", "+1", over `positions`; `verdict` "ok", "shifted", "undecided"; `ok` |
        | `fidelity` | null, or `rows`, `kl_mean`, `kl_p99`, `kl_max`, `worst_error` (nats), `top1_agreement`,
        `mass_error`, `source` |
        """
        fidelity = None
        if self.fidelity is not None:
            fidelity = {key: value for key, value in self.fidelity.to_dict().items() if key != "sums"}
            fidelity["source"] = self.fidelity_source
        return {
            "path": self.path,
            "kind": self.kind,
            "documents": self.documents,
            "tokens": self.tokens,
            "rows": self.rows,
            "files": self.files,
            "file_bytes": self.file_bytes,
            "documents_read": self.documents_read,
            "rows_read": self.rows_read,
            "bytes_per_token": {
                "ids": self.id_bytes,
                "values": self.value_bytes,
                "codec": self.id_bytes + self.value_bytes,
                "overhead": self.overhead_bytes,
                "total": self.total_bytes,
            },
            "compression": {"dense_bf16": self.dense_ratio, "topk_bf16": self.topk_ratio},
            "codec": {**self.codec, "preset": self.preset, "warnings": list(self.codec_warnings)},
            "teacher": self.teacher,
            "tokenizer": self.tokenizer,
            "capture": self.capture,
            "temperature": self.temperature,
            "rows_per_document": self.rows_per_document,
            "vocab_size": self.vocab_size,
            "head_size": self.head_size,
            "mass": self._mass() if self.rows_read else None,
            "next_token": {"is_first": self.first_rate, "is_stored": self.stored_rate},
            "alignment": {
                "rates": {f"{shift:+d}" if shift else "0": self.shifts.rate(shift) for shift in SHIFTS},
                "positions": self.shifts.positions,
                "verdict": self.alignment,
                "ok": self.alignment != "shifted",
            },
            "fidelity": fidelity,
        }


def _decoded(dataset: Dataset, document: Document) -> SparseLogprobs:
    """The rows of a document; an error says which one it is."""
    try:
        return dataset.codec.decode_document(document.teacher, document.num_rows)
    except DistillKitError as error:
        raise type(error)(f"{dataset.path}: document {document.doc_id}: {error}") from error


def inspect_dataset(
    dataset: Dataset, *, sample: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Inspection:
    """Reads a dataset once, document by document, decoding every row.

    Args:
        dataset: any dataset.
        sample: look at this many documents, evenly spread, instead of all.
        progress: called with documents done and documents to do.

    Raises:
        ConfigError: sample is not positive.
        CorruptDataError: a document is damaged.
    """
    if sample is not None and sample < 1:
        raise ConfigError(f"sample: must be at least 1 document, found {sample}")
    seen = _Seen(dataset.codec.k)
    count = min(sample or len(dataset), len(dataset))
    for number, document in enumerate(_chosen(dataset, count)):
        seen.add(document, _decoded(dataset, document))
        progress(number + 1, count)
    codec, header, rows = dataset.codec, dataset.header, dataset.num_rows
    file_bytes = sum(shard.bytes for shard in dataset.shards)
    overhead = (file_bytes - rows * codec.bytes_per_token) / max(rows, 1)
    total = codec.bytes_per_token + overhead
    recorded = header.fidelity
    return Inspection(
        path=dataset.path,
        kind=dataset.kind,
        documents=len(dataset),
        tokens=dataset.num_tokens,
        rows=rows,
        documents_read=count,
        files=len(dataset.shards),
        file_bytes=file_bytes,
        id_bytes=codec.id_bytes,
        value_bytes=codec.value_bytes,
        overhead_bytes=overhead,
        dense_ratio=2 * header.head_size / total,
        topk_ratio=6 * codec.k / total,
        codec=codec.to_dict(),
        codec_warnings=tuple(codec.warnings),
        preset=_preset_of(dataset),
        teacher=None if header.teacher is None else dict(header.teacher),
        tokenizer=None if header.tokenizer is None else dict(header.tokenizer),
        capture=dict(header.capture),
        temperature=header.temperature,
        rows_per_document=header.alignment["rows"],
        vocab_size=header.vocab_size,
        head_size=header.head_size,
        fidelity=None if recorded is None else FidelityStats.from_dict(recorded),
        fidelity_source=None if recorded is None else "recorded by the writer",
        **seen.figures(),
    )


def _chosen(dataset: Dataset, count: int) -> Iterator[Document]:
    if count == len(dataset):
        yield from dataset
    else:
        for index in np.linspace(0, len(dataset) - 1, count).round().astype(int):
            yield dataset[int(index)]


def _preset_of(dataset: Dataset) -> str | None:
    vocab_size = dataset.codec.vocab_size
    for name, fields in PRESETS.items():
        if fields["k"] <= vocab_size and preset(name, vocab_size=vocab_size) == dataset.codec.config:
            return name
    return None


class _Seen:
    """Sums over the documents looked at."""

    def __init__(self, k: int) -> None:
        self._rows = 0
        self._logprob_sum = np.zeros(k)
        self._logprobs = np.zeros((k, _LOGPROB_BINS), np.int64)
        self._mass_sum = 0.0
        self._impossible = 0
        self._masses = np.zeros(_MASS_BINS + 1, np.int64)
        self._first = self._stored = self._predictions = 0
        self._shifts = ShiftRates.none()

    def add(self, document: Document, rows: SparseLogprobs) -> None:
        ids, logprobs = np.asarray(rows.ids), np.asarray(rows.logprobs, dtype=np.float64)
        self._add_values(logprobs)
        t = counted_positions(document.segments())
        following = document.input_ids[t + 1][:, None]
        self._predictions += len(t)
        self._first += int((ids[t, :1] == following).sum())
        self._stored += int((ids[t] == following).any(-1).sum())
        self._shifts += document_shifts(document, rows)

    def _add_values(self, logprobs_Rk: npt.NDArray[np.float64]) -> None:
        k = logprobs_Rk.shape[1]
        # Read with the wrong codec a value can be anything; e^100 is impossible enough, and still a number.
        mass_R = np.exp(np.minimum(logprobs_Rk, 100.0)).sum(-1)
        self._impossible += int((mass_R > _IMPOSSIBLE_MASS).sum())
        self._rows += len(mass_R)
        self._mass_sum += float(mass_R.sum())
        bins = np.floor(np.minimum(mass_R, 1.0) * _MASS_BINS + 1e-9).astype(int)
        self._masses += np.bincount(bins, minlength=_MASS_BINS + 1)
        self._logprob_sum += logprobs_Rk.sum(0)
        bins_Rk = np.clip((1 - logprobs_Rk / _LOWEST_LOGPROB) * _LOGPROB_BINS, 0, _LOGPROB_BINS - 1).astype(int)
        bins_Rk += np.arange(k) * _LOGPROB_BINS
        self._logprobs += np.bincount(bins_Rk.ravel(), minlength=k * _LOGPROB_BINS).reshape(k, -1)

    def figures(self) -> dict[str, Any]:
        rows, predictions = self._rows or float("nan"), max(self._predictions, 1)
        return {
            "rows_read": self._rows,
            "mass_p1": self._mass_quantile(0.01),
            "mass_p50": self._mass_quantile(0.5),
            "mass_mean": self._mass_sum / rows,
            "mass_impossible": self._impossible / rows,
            "mass_histogram": self._masses,
            "first_rate": self._first / predictions,
            "stored_rate": self._stored / predictions,
            "shifts": self._shifts,
            "logprob_mean": self._logprob_sum / rows,
            "logprob_quantiles": np.stack([self._logprob_quantile(share) for share in _QUANTILES]),
        }

    def _mass_quantile(self, share: float) -> float:
        if not self._rows:
            return float("nan")
        index = int(np.searchsorted(np.cumsum(self._masses), share * self._rows))
        return index / _MASS_BINS

    def _logprob_quantile(self, share: float) -> npt.NDArray[np.float64]:
        """(k,) the middle of the bin that the quantile is in."""
        bins_k = (np.cumsum(self._logprobs, -1) < share * self._rows).sum(-1)
        return np.asarray((1 - (bins_k + 0.5) / _LOGPROB_BINS) * _LOWEST_LOGPROB)


def recompute_fidelity(
    dataset: Dataset, teacher: str, *, sample: int = 16, progress: Callable[[int, int], None] = lambda done, total: None
) -> FidelityStats:
    """Runs a teacher over some of the documents and compares its distributions with the stored ones.

    The stored ids are looked up among the teacher's 2k most probable ones, since another machine may swap ids of nearly
    equal probability at the end of the list. A row with an id that is not among them is left out; a warning says how
    many were.

    Args:
        dataset: any dataset of single documents.
        teacher: folder or hub id of the model. It runs in the dtype that the header names, if it names one.
        sample: how many documents, evenly spread.
        progress: called with documents done and documents to do.

    Raises:
        MismatchError: the teacher's head has another size, most of its first ids differ, or most rows hold ids that
            are not among its most probable: it is not this dataset's.
        InputError: documents are packed, or the logits were divided by a temperature.
        ConfigError: the model cannot be loaded.
    """
    if dataset.header.temperature != 1:
        raise InputError(
            f"{dataset.path}: holds distributions at temperature {dataset.header.temperature}; only those at "
            "temperature 1 can be recomputed"
        )
    engine = _teacher_of(dataset, teacher)
    stats, rows, agreeing = FidelityStats(), 0, 0
    count = min(sample, len(dataset))
    for number, document in enumerate(_chosen(dataset, count)):
        if len(document.input_ids) > 1:
            now = _scored(engine, dataset, document)
            stored = _decoded(dataset, document)
            first = np.asarray(now.ids)[:, 0] == np.asarray(stored.ids)[: len(now.ids), 0]
            rows, agreeing = rows + len(first), agreeing + int(first.sum())
            stats.update(*_same_ids(now, stored))
        progress(number + 1, count)
    if agreeing < 0.5 * rows:
        raise MismatchError(
            f"{teacher}: its most probable token is the stored one at only {agreeing / rows:.1%} of {rows:,} "
            "positions: this is not the dataset's teacher"
        )
    _check_left_out(teacher, stats.rows, rows)
    return stats


def _check_left_out(teacher: str, compared: int, rows: int) -> None:
    """Figures of the rows that fit say nothing about those that do not."""
    left_out = rows - compared
    said = f"{left_out:,} of {rows:,} rows hold ids that are not among its most probable"
    if left_out > 0.5 * rows:
        raise MismatchError(f"{teacher}: {said}: this is not the dataset's teacher, or the ids are wrong")
    if left_out:
        logger.warning("%s: %s; fidelity is of the others", teacher, said)


def _teacher_of(dataset: Dataset, teacher: str) -> HFTeacher:
    from distillkit.capture.engine_settings import HFSettings
    from distillkit.capture.teachers.hf import HFTeacher

    dtype = (dataset.header.teacher or {}).get("dtype") or "auto"
    engine = HFTeacher(teacher, HFSettings(dtype=dtype))
    if engine.head_size != dataset.header.head_size:
        raise MismatchError(
            f"{teacher}: its logits are {engine.head_size} wide, but the dataset's are {dataset.header.head_size}"
        )
    return engine


def _scored(engine: HFTeacher, dataset: Dataset, document: Document) -> SparseLogprobs:
    """The teacher's rows of a document, computed now, with twice as many ids as are stored."""
    from distillkit.capture.teachers.base import RejectedDocument, RowRequest
    from distillkit.types import TokenDocument

    if document.segment_lengths is not None:
        raise InputError(
            f"{dataset.path}: document {document.doc_id} is packed, and a teacher would read it as a single document"
        )
    wide = min(2 * dataset.codec.k, engine.head_size)
    [scored] = engine.score([TokenDocument(document.input_ids, dataset.path)], RowRequest(wide))
    if isinstance(scored, RejectedDocument):
        raise CaptureError(scored.reason)
    return scored.rows


def _same_ids(now: SparseLogprobs, stored: SparseLogprobs) -> tuple[SparseLogprobs, SparseLogprobs]:
    """The teacher's values of the stored ids and the stored ones, in the stored order.

    Args:
        now: (R, n) rows of the teacher.
        stored: at least R rows of k ≤ n ids; those over no next token, at the end, are left out.

    Returns:
        Both with the same ids, without the rows of which the teacher's n ids do not have all.
    """
    count = len(now.ids)
    ids, logprobs = np.asarray(stored.ids)[:count], np.asarray(stored.logprobs)[:count]
    # One key for a row and an id, so that one sorted list serves all rows.
    width = 1 + max(int(np.max(now.ids, initial=0)), int(np.max(ids, initial=0)))
    keys = (np.arange(count)[:, None] * width + np.asarray(now.ids)).ravel()
    wanted = np.arange(count)[:, None] * width + ids
    order = np.argsort(keys)
    at = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    whole = (keys[at] == wanted).all(-1)
    original = np.asarray(now.logprobs).ravel()[at]
    return SparseLogprobs(ids[whole], original[whole]), SparseLogprobs(ids[whole], logprobs[whole])

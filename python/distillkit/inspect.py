"""What a dataset holds: its size, its fidelity, and whether it is sound. Needs no torch, except to run a teacher.

Shape legend: R rows of a document, k stored ids a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.codec import PRESETS, preset
from distillkit.errors import ConfigError, InputError, MismatchError
from distillkit.fidelity import FidelityStats
from distillkit.shards import Dataset
from distillkit.signals.alignment import SHIFTS, ShiftRates, document_shifts
from distillkit.types import Document, SparseLogprobs

__all__ = ["Inspection", "inspect_dataset", "recompute_fidelity"]

_MASS_BINS = 1000
"""Resolution of the mass histogram: 0.001."""


@dataclass(frozen=True)
class Inspection:
    """Figures of a dataset. Rates and masses are over the documents looked at.

    Attributes:
        path, kind: what was opened; "distillkit" or "published".
        documents, tokens, rows: of the whole dataset.
        documents_read: how many documents the rates are over.
        id_bytes, value_bytes: the codec's bytes a row.
        overhead_bytes: everything else in the files (token ids of the documents, checksums, Parquet), a row.
        dense_ratio: how many times larger dense bfloat16 logits are: 2 · head_size bytes a row against all bytes.
        topk_ratio: the same for plain top-k: k · (4 bytes of id + 2 of bfloat16).
        codec: format, version and config.
        preset: name of the preset that the codec is, or None.
        teacher, tokenizer: as in the header, None where unknown.
        vocab_size, head_size: ids of the tokenizer, columns of the logits.
        mass_p1, mass_p50, mass_mean: probability on the stored ids of a row.
        mass_histogram: (1001,) rows by mass in steps of 0.001.
        first_rate, stored_rate: how often the true next token is the stored first, and is stored at all.
        shifts: the alignment check.
        logprob_mean: (k,) mean decoded log-probability by rank.
        fidelity: recorded by the writer or computed again, None where neither is at hand.
        fidelity_source: "recorded by the writer", or the teacher's name, or None.
    """

    path: str
    kind: str
    documents: int
    tokens: int
    rows: int
    documents_read: int
    id_bytes: float
    value_bytes: float
    overhead_bytes: float
    dense_ratio: float
    topk_ratio: float
    codec: dict[str, Any]
    preset: str | None
    teacher: dict[str, Any] | None
    tokenizer: dict[str, Any] | None
    vocab_size: int
    head_size: int
    mass_p1: float
    mass_p50: float
    mass_mean: float
    mass_histogram: npt.NDArray[np.int64]
    first_rate: float
    stored_rate: float
    shifts: ShiftRates
    logprob_mean: npt.NDArray[np.float64]
    fidelity: FidelityStats | None
    fidelity_source: str | None

    @property
    def total_bytes(self) -> float:
        """Bytes a row, everything included."""
        return self.id_bytes + self.value_bytes + self.overhead_bytes

    @property
    def aligned(self) -> bool:
        """Whether the rows stand beside the tokens they belong to, as far as the data can tell."""
        return self.shifts.shifted() is None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the histogram and the curves, JSON-able."""
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
            "documents_read": self.documents_read,
            "bytes_per_token": {
                "ids": self.id_bytes,
                "values": self.value_bytes,
                "codec": self.id_bytes + self.value_bytes,
                "overhead": self.overhead_bytes,
                "total": self.total_bytes,
            },
            "compression": {"dense_bf16": self.dense_ratio, "topk_bf16": self.topk_ratio},
            "codec": {**self.codec, "preset": self.preset},
            "teacher": self.teacher,
            "tokenizer": self.tokenizer,
            "vocab_size": self.vocab_size,
            "head_size": self.head_size,
            "mass": {"p1": self.mass_p1, "p50": self.mass_p50, "mean": self.mass_mean},
            "next_token": {"is_first": self.first_rate, "is_stored": self.stored_rate},
            "alignment": {
                "rates": {f"{shift:+d}" if shift else "0": self.shifts.rate(shift) for shift in SHIFTS},
                "positions": self.shifts.positions,
                "ok": self.aligned,
            },
            "fidelity": fidelity,
        }


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
        seen.add(document, dataset.codec.decode_document(document.teacher, document.num_rows))
        progress(number + 1, count)
    codec, rows = dataset.codec, dataset.num_rows
    overhead = sum(shard.bytes for shard in dataset.shards) / max(rows, 1) - codec.bytes_per_token
    total = codec.bytes_per_token + overhead
    recorded = dataset.header.fidelity
    return Inspection(
        path=dataset.path,
        kind=dataset.kind,
        documents=len(dataset),
        tokens=dataset.num_tokens,
        rows=rows,
        documents_read=count,
        id_bytes=codec.id_bytes,
        value_bytes=codec.value_bytes,
        overhead_bytes=overhead,
        dense_ratio=2 * dataset.header.head_size / total,
        topk_ratio=6 * codec.k / total,
        codec=codec.to_dict(),
        preset=_preset_of(dataset),
        teacher=None if dataset.header.teacher is None else dict(dataset.header.teacher),
        tokenizer=None if dataset.header.tokenizer is None else dict(dataset.header.tokenizer),
        vocab_size=dataset.header.vocab_size,
        head_size=dataset.header.head_size,
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
        self._mass_sum = 0.0
        self._masses = np.zeros(_MASS_BINS + 1, np.int64)
        self._first = self._stored = self._predictions = 0
        self._shifts = ShiftRates.none()

    def add(self, document: Document, rows: SparseLogprobs) -> None:
        ids, logprobs = np.asarray(rows.ids), np.asarray(rows.logprobs, dtype=np.float64)
        mass = np.exp(logprobs).sum(-1)
        self._rows += len(ids)
        self._logprob_sum += logprobs.sum(0)
        self._mass_sum += float(mass.sum())
        bins = np.clip(np.floor(mass * _MASS_BINS + 1e-9), 0, _MASS_BINS).astype(int)
        self._masses += np.bincount(bins, minlength=_MASS_BINS + 1)
        t = _predicting(document)
        following = document.input_ids[t + 1][:, None]
        self._predictions += len(t)
        self._first += int((ids[t, :1] == following).sum())
        self._stored += int((ids[t] == following).any(-1).sum())
        self._shifts += document_shifts(document, rows)

    def figures(self) -> dict[str, Any]:
        rows, predictions = max(self._rows, 1), max(self._predictions, 1)
        return {
            "mass_p1": self._mass_quantile(0.01),
            "mass_p50": self._mass_quantile(0.5),
            "mass_mean": self._mass_sum / rows,
            "mass_histogram": self._masses,
            "first_rate": self._first / predictions,
            "stored_rate": self._stored / predictions,
            "shifts": self._shifts,
            "logprob_mean": self._logprob_sum / rows,
        }

    def _mass_quantile(self, share: float) -> float:
        if not self._rows:
            return float("nan")
        index = int(np.searchsorted(np.cumsum(self._masses), share * self._rows))
        return index / _MASS_BINS


def _predicting(document: Document) -> npt.NDArray[np.int64]:
    """Rows whose next token is in the same packed document."""
    length = len(document.input_ids)
    lengths = [length] if document.segment_lengths is None else document.segment_lengths
    ends = np.cumsum(lengths) - 1
    return np.setdiff1d(np.arange(length), ends)


def recompute_fidelity(
    dataset: Dataset, teacher: str, *, sample: int = 16, progress: Callable[[int, int], None] = lambda done, total: None
) -> FidelityStats:
    """Runs a teacher over some of the documents and compares its distributions with the stored ones.

    Only rows whose ids are the same now as then are compared (another kernel may swap ids of nearly equal probability
    at the end of the
    list, and the distributions of different ids have no KL).

    Args:
        dataset: any dataset of single documents.
        teacher: folder or hub id of the model.
        sample: how many documents, evenly spread.

    Raises:
        MismatchError: the teacher's head has another size, or most of its first ids differ: it is not this dataset's
        teacher.
        InputError: documents are packed.
        ConfigError: the model can not be loaded.
    """
    from distillkit.capture.engines.hf import HFTeacher
    from distillkit.capture.text import TokenDocument

    engine = HFTeacher(teacher, batch_tokens=4096, head_rows=512)
    if engine.head_size != dataset.header.head_size:
        raise MismatchError(
            f"{teacher}: its logits are {engine.head_size} wide, those of the dataset {dataset.header.head_size}"
        )
    stats, rows, agreeing = FidelityStats(), 0, 0
    count = min(sample, len(dataset))
    for number, document in enumerate(_chosen(dataset, count)):
        if document.segment_lengths is not None:
            raise InputError(f"{dataset.path}: document {document.doc_id} is packed; a teacher would read it as one")
        [(_, now)] = engine.score([TokenDocument(document.input_ids, dataset.path, 0.0)], dataset.codec.k)
        then = dataset.codec.decode_document(document.teacher, document.num_rows)
        first = np.asarray(now.ids)[:, 0] == np.asarray(then.ids)[: len(now.ids), 0]
        rows, agreeing = rows + len(first), agreeing + int(first.sum())
        stats.update(*_same_ids(now, then))
        progress(number + 1, count)
    if agreeing < 0.5 * rows:
        raise MismatchError(
            f"{teacher}: its most probable token is the stored one at only {agreeing / rows:.1%} of the positions: it "
            "is not the teacher of this dataset"
        )
    return stats


def _same_ids(now: SparseLogprobs, then: SparseLogprobs) -> tuple[SparseLogprobs, SparseLogprobs]:
    """The rows of both that hold the same ids, in the stored order."""
    ids, stored = np.asarray(now.ids), np.asarray(then.ids)[: len(now.ids)]
    same = (np.sort(ids, -1) == np.sort(stored, -1)).all(-1)
    original = np.empty((int(same.sum()), ids.shape[-1]), np.float32)
    by_id = np.take_along_axis(np.asarray(now.logprobs)[same], np.argsort(ids[same], -1), -1)
    np.put_along_axis(original, np.argsort(stored[same], -1), by_id, -1)
    decoded = np.asarray(then.logprobs)[: len(ids)][same]
    return SparseLogprobs(stored[same], original), SparseLogprobs(stored[same], decoded)

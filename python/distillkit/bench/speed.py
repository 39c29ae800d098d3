"""Speed of the codec and of reading shards, against the published algorithm and the machine's limits, in one run.

Correctness is checked before timing: each decoder reads the other's bytes. Speeds are the best of several runs.

Shape legend: N rows, k stored ids per row, V vocabulary size.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distillkit.bench.child import best_of, one_core_reading, peak_memory
from distillkit.bench.fidelity import published_tolerance
from distillkit.bench.learned import LearnedPreset
from distillkit.bench.published import PublishedCodec, published_codec
from distillkit.bench.sample import Sample, bundled_sample
from distillkit.codec import Codec, preset
from distillkit.codec.presets import FIXED_PRESETS
from distillkit.errors import DistillKitError
from distillkit.shards import Dataset, Header, ShardWriter
from distillkit.types import SparseLogprobs

__all__ = ["DENSE_VOCABULARY", "SpeedRow", "measure_decoding", "measure_learned", "measure_speed"]

PACKED_ROWS = 8192
"""Rows per call: a packed sequence of the published datasets."""
DOCUMENT_ROWS = 512
"""Rows per call: a document of modest length, for which the baseline's tensors fit in the caches."""
DENSE_VOCABULARY = 151_936
"""Default width of the dense logits: Qwen's vocabulary."""
_DOCUMENTS, _COLLATED = 64, 16
_WITH_ALL = "recommended", "budget"
"""The published presets, whose encoding and decoding are timed at both sizes. For others, only decoding is timed."""
_COPYING = "copying as many bytes"
_COPYING_ALONE = "copying as many bytes on one core"


@dataclass(frozen=True)
class SpeedRow:
    """The speed of one kind of work.

    Attributes:
        work: the kind of work.
        rows: rows per call.
        tokens_per_second: our speed.
        published: the baseline's speed, tokens per second; None if it has no equivalent.
        bytes_per_token: size of an encoded row; a mean in the compact format.
        moved_bytes: bytes of a token's decoded form: ids and values (12 per stored id), or its logits.
        limit: the machine's limit for moving as many bytes, tokens per second.
        limit_is: how that was measured: by copying the bytes, or reading them once.
        extra_bytes, published_extra_bytes: peak memory beyond inputs and outputs; None if not measured.
        note: a remark; may be empty.
    """

    work: str
    rows: int
    tokens_per_second: float
    published: float | None
    bytes_per_token: float
    moved_bytes: int
    limit: float
    limit_is: str
    extra_bytes: int | None = None
    published_extra_bytes: int | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Speedup over the baseline."""
        return None if self.published is None else self.tokens_per_second / self.published

    @property
    def mb_per_second(self) -> float:
        """Throughput in terms of `moved_bytes`, MB/s."""
        return self.tokens_per_second * self.moved_bytes / 1e6

    @property
    def of_limit(self) -> float:
        """Fraction of the machine's limit."""
        return self.tokens_per_second / self.limit

    def to_dict(self) -> dict[str, Any]:
        """All fields and derived values, JSON-serialisable."""
        derived = {"ratio": self.ratio, "mb_per_second": self.mb_per_second, "of_limit": self.of_limit}
        return {**asdict(self), **derived}


def measure_speed(
    sample: Sample,
    *,
    vocab_size: int,
    dense_vocab_size: int,
    learned: Sequence[LearnedPreset] = (),
    quick: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[SpeedRow]:
    """Yields one table row per kind of work, measured on the sample's rows, which are repeated as needed.

    If the sample has fewer ids per row than a preset stores, the bundled sample is used, and the note says so.

    Args:
        vocab_size: vocabulary size of the codecs.
        dense_vocab_size: width of the dense logits, which are random.
        learned: compact presets, with documents of the sample.
        quick: use shorter runs, and only the published presets.

    Raises:
        DistillKitError: a decoder returns wrong results, which is a bug.
    """
    seconds = 0.15 if quick else 1.0
    sizes = (PACKED_ROWS,) if quick else (PACKED_ROWS, DOCUMENT_ROWS)
    codecs = [(name, rows) for name in _WITH_ALL for rows in sizes]
    others = [] if quick else [name for name in FIXED_PRESETS if name not in _WITH_ALL]
    parts = [
        *((2, partial(_codec_rows, sample, name, vocab_size, rows, seconds)) for name, rows in codecs),
        (len(others), partial(measure_decoding, sample, others, vocab_size=vocab_size, seconds=seconds)),
        (1, partial(_torch_rows, sample, vocab_size, seconds)),
        (2, partial(_dense_rows, dense_vocab_size, 32 if quick else 256, seconds)),
        (3, partial(_reading_rows, sample, vocab_size, seconds)),
        *((2, partial(measure_learned, each, seconds=seconds)) for each in learned),
    ]
    total = sum(count for count, _ in parts)
    done = 0
    progress(done, total)
    for _, part in parts:
        for row in part():
            done += 1
            progress(done, total)
            yield row


def measure_decoding(
    sample: Sample, names: Sequence[str], *, vocab_size: int, seconds: float = 1.0
) -> Iterator[SpeedRow]:
    """Measures only the decoding of packed sequences: yields one table row per preset."""
    for name in names:
        yield from _codec_rows(sample, name, vocab_size, PACKED_ROWS, seconds, works=("decode",))


def measure_learned(learned: LearnedPreset, *, seconds: float = 1.0) -> Iterator[SpeedRow]:
    """Measures encoding and decoding with a compact preset, a document at a time, which takes one core."""
    rows, moved = learned.rows, round(12 * learned.ids_mean)
    source = np.ones((rows, moved), np.uint8)
    copying = partial(np.copyto, np.empty_like(source), source)
    encode, decode, copy = best_of(
        (lambda: deque(learned.encode(), 0), lambda: deque(learned.decode(), 0), copying), seconds
    )
    for work, time in (("encode", encode), ("decode", decode)):
        yield SpeedRow(
            f"{work} {learned.name}, one core",
            round(rows / len(learned.documents)),
            rows / time,
            None,
            learned.bytes_per_token,
            moved,
            rows / copy,
            _COPYING_ALONE,
        )


# -- rows in, bytes out, and back --------------------------------------------------------------------------------------


def _rows_of(sample: Sample, k: int, vocab_size: int, count: int) -> tuple[SparseLogprobs, str]:
    """`count` rows of k ids, and a note if they are not from the sample."""
    note = ""
    if sample.k < k:
        note = f"the sample has only {sample.k} ids per row, so distillkit's bundled sample was used"
        sample = bundled_sample()
    ids, logprobs = sample.top(k, vocab_size)
    chosen = np.arange(count) % len(ids)
    return SparseLogprobs(ids[chosen], logprobs[chosen]), note


def _same(what: str, codec: Codec, found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    """Checks that ids are equal, and values equal up to the published decoder's rounding."""
    ids, logprobs, expected_ids, expected_logprobs = (np.asarray(array) for array in (*found, *expected))
    tolerance = published_tolerance(codec.fixed_config, expected_logprobs)
    if not np.array_equal(ids, expected_ids) or not (np.abs(logprobs - expected_logprobs) <= tolerance).all():
        raise DistillKitError(f"{what}: decoding returns wrong ids or values; this is a bug")


def _check_each_other(codec: Codec, baseline: PublishedCodec, rows: SparseLogprobs) -> None:
    """Checks that each decoder reads both encoders' bytes alike."""
    ids, logprobs = torch.from_numpy(rows.ids), torch.from_numpy(rows.logprobs)
    ours, theirs = codec.encode(rows.ids, rows.logprobs), baseline.encode(ids, logprobs)
    for what, data in (("our bytes", torch.from_numpy(ours)), ("the baseline's bytes", theirs)):
        read = codec.decode(data.numpy())
        _same(what, codec, baseline.decode(data), read)
        _same(what, codec, codec.decode_torch(data), read)
    if not np.array_equal(codec.decode(ours)[0], rows.ids):
        raise DistillKitError("the decoded ids are not those that were encoded; this is a bug")


def _copying(size: int) -> Callable[[], Any]:
    """A function that copies `size` bytes, on all cores."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    return partial(target.copy_, source)


def _codec_rows(
    sample: Sample,
    name: str,
    vocab_size: int,
    count: int,
    seconds: float,
    works: Sequence[str] = ("encode", "decode"),
) -> Iterator[SpeedRow]:
    codec = Codec(preset(name, vocab_size=vocab_size))
    baseline = published_codec(codec.fixed_config)
    rows, note = _rows_of(sample, codec.k, vocab_size, count)
    _check_each_other(codec, baseline, rows)
    data = codec.encode(rows.ids, rows.logprobs)
    ids, logprobs, tensor = torch.from_numpy(rows.ids), torch.from_numpy(rows.logprobs), torch.from_numpy(data)
    moved = 12 * codec.k
    copying = _copying(count * moved)
    sides: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "encode": (lambda: codec.encode(rows.ids, rows.logprobs), lambda: baseline.encode(ids, logprobs)),
        "decode": (lambda: codec.decode(data), lambda: baseline.decode(tensor)),
    }
    for work in works:
        ours, published = sides[work]
        fast, slow, limit = (count / time for time in best_of((ours, published, copying), seconds))
        what = f"{work} {name}"
        yield SpeedRow(what, count, fast, slow, codec.bytes_per_token, moved, limit, _COPYING, note=note)


def _torch_rows(sample: Sample, vocab_size: int, seconds: float) -> Iterator[SpeedRow]:
    codec = Codec(preset("recommended", vocab_size=vocab_size))
    baseline = published_codec(codec.fixed_config)
    rows, note = _rows_of(sample, codec.k, vocab_size, PACKED_ROWS)
    _check_each_other(codec, baseline, rows)
    data = codec.encode(rows.ids, rows.logprobs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.npy"
        np.save(path, data)
        extra, published_extra = (peak_memory(who, codec, path) for who in ("ours", "published"))
    tensor, moved = torch.from_numpy(data), 12 * codec.k
    copying = _copying(PACKED_ROWS * moved)
    with torch.inference_mode():
        times = best_of((lambda: codec.decode_torch(tensor), lambda: baseline.decode(tensor), copying), seconds)
    ours, published, limit = (PACKED_ROWS / time for time in times)
    yield SpeedRow(
        "decode_torch recommended, CPU tensors",
        PACKED_ROWS,
        ours,
        published,
        codec.bytes_per_token,
        moved,
        limit,
        _COPYING,
        extra,
        published_extra,
        note,
    )


# -- dense logits ------------------------------------------------------------------------------------------------------


def _dense_rows(vocab_size: int, count: int, seconds: float) -> Iterator[SpeedRow]:
    codec = Codec(preset("recommended", vocab_size=vocab_size))
    baseline = published_codec(codec.fixed_config)
    logits_NV = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    for dtype in (torch.float32, torch.bfloat16):
        logits = logits_NV.to(dtype)
        _check_dense(codec, logits)
        # Reading them once: summing them as floats or as integers, whichever is faster.
        works = (
            partial(codec.encode_logits, logits),
            partial(baseline.encode_logits, logits),
            logits.sum,
            logits.view(torch.int32).sum,
        )
        ours, published, *reading = best_of(works, seconds)
        yield SpeedRow(
            f"dense {str(dtype).removeprefix('torch.')} logits to bytes of recommended, V = {vocab_size:,}",
            count,
            count / ours,
            count / published,
            codec.bytes_per_token,
            vocab_size * dtype.itemsize,
            count / min(reading),
            "reading the logits once",
        )


def _check_dense(codec: Codec, logits_NV: torch.Tensor) -> None:
    ids, logprobs = codec.decode_torch(codec.encode_logits(logits_NV))
    exact_NV = torch.log_softmax(logits_NV.double(), -1)
    top_Nk = exact_NV.topk(codec.k).values
    # Equal bfloat16 logits may be ordered differently, so the chosen ids are compared by their values. Exact values may
    # be rounded to either neighbour in bfloat16, not always the nearest.
    found = torch.equal(exact_NV.gather(-1, ids), top_Nk)
    exact_k = codec.exact_k
    if not found or not torch.allclose(logprobs[:, :exact_k].double(), top_Nk[:, :exact_k], rtol=2**-7, atol=1e-5):
        raise DistillKitError("encode_logits: the most probable ids or their values are wrong; this is a bug")


# -- shards ------------------------------------------------------------------------------------------------------------


def _reading_rows(sample: Sample, vocab_size: int, seconds: float) -> Iterator[SpeedRow]:
    codec = Codec(preset("recommended", vocab_size=vocab_size))
    length = DOCUMENT_ROWS
    rows, note = _rows_of(sample, codec.k, vocab_size, length - 1)
    count, moved = _DOCUMENTS * (length - 1), 12 * codec.k
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(folder, Header(codec=codec.to_dict(), vocab_size=vocab_size, head_size=vocab_size)) as writer:
            for _ in range(_DOCUMENTS):
                writer.write(np.arange(length) % vocab_size, rows)
        dataset = Dataset.open(folder)
        first = codec.decode_document(dataset[0].teacher, length - 1)
        if not np.array_equal(first.ids, rows.ids):
            raise DistillKitError("the ids read from a shard are not those that were written; this is a bug")
        alone = one_core_reading(Path(folder), seconds)
        pinned = "" if alone["pinned"] else "only our own threads were limited to one core"

        copying = _copying(count * moved)
        works = (partial(_read_arrays, dataset), partial(_read_tensors, dataset), copying)
        arrays, tensors, limit = (count / time for time in best_of(works, seconds))
    both = "; ".join(part for part in (note, pinned) if part)
    for work, speed, most, notes in (
        ("shard to decoded arrays, one core", alone["tokens_per_second"], alone["copies_per_second"], both),
        ("shard to decoded arrays, all cores", arrays, limit, note),
        ("shard to bytes, decode_torch on the CPU", tensors, limit, note),
    ):
        yield SpeedRow(work, length - 1, speed, None, codec.bytes_per_token, moved, most, _COPYING, note=notes)


def _read_arrays(dataset: Dataset) -> int:
    return sum(len(dataset.codec.decode_document(document.teacher, document.num_rows).ids) for document in dataset)


def _read_tensors(dataset: Dataset) -> int:
    """Collates the bytes of several documents into one tensor and decodes that, as in training."""
    rows, waiting = 0, []
    for number, document in enumerate(dataset, 1):
        waiting.append(dataset.codec.document_rows(document.teacher, document.num_rows))
        if number % _COLLATED == 0 or number == len(dataset):
            data: npt.NDArray[np.uint8] = np.concatenate(waiting)
            rows += len(dataset.codec.decode_torch(torch.from_numpy(data))[0])
            waiting = []
    return rows

"""Datasets of single documents → shards of packed rows, the teacher's bytes as they are.

Training packs by itself when it loads a dataset; a packed dataset is for those who want the rows on disk.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit import __version__
from distillkit.errors import CorruptDataError, InputError
from distillkit.shards.header import Header
from distillkit.shards.manifest import Manifest
from distillkit.shards.packing import pack
from distillkit.shards.reader import Dataset
from distillkit.shards.writer import ShardWriter
from distillkit.types import Document

__all__ = ["PackReport", "pack_dataset"]

_WINDOW_BYTES = 1 << 28
"""Teacher bytes of the documents that are packed together, all of them in memory."""


@dataclass(frozen=True)
class PackReport:
    """What was packed.

    Attributes:
        output: the folder.
        documents: how many were packed.
        left_out: documents of one token or none, which have no next token to predict.
        cut_documents, cut_tokens: those longer than a row, and what was cut off them.
        rows: packed rows, of which `resumed_rows` were there from an interrupted run.
        tokens, fill: what the rows hold, and the share of their room.
        seconds: with the check afterwards.
    """

    output: str
    documents: int
    left_out: int
    cut_documents: int
    cut_tokens: int
    rows: int
    resumed_rows: int
    tokens: int
    fill: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able mapping."""
        return asdict(self)


def pack_dataset(
    source: Dataset,
    folder: str | Path,
    max_len: int,
    *,
    seed: int | None = None,
    window: int = 10_000,
    shard_tokens: int = 262_144,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackReport:
    """Write packed rows, then read them back and compare every document with the source.

    Documents are packed best-fit decreasing (`distillkit.packing`) within windows of some thousand neighbours, so that
    they are read once, in order, and few of them are in memory. Shards of an interrupted run are continued.

    Where a document of L tokens has L − 1 rows, its last token gets a row all the same, which keeps tokens and rows
    side by side: the row of the token that was cut, or the document's last row once more. It predicts across a boundary
    and never counts.

    Args:
        source: documents with their teacher's bytes; packed rows among them stay together.
        folder: for the shards; made if needed.
        max_len: tokens of a row; longer documents are cut, with their rows.
        seed: shuffles the documents before they are packed; None keeps them near their neighbours.
        window: documents packed together at most.
        shard_tokens: tokens of a shard.
        progress: called with documents done and in all, each counted twice: written and compared.

    Raises:
        InputError: `max_len` is too small, the codec's rows have no fixed size, nothing is there to pack, or the folder
            holds a finished dataset.
        MismatchError: the folder holds shards of something else.
        CorruptDataError: a document of the source is damaged, or what was written is not what was read.
    """
    started = time.perf_counter()
    if max_len < 2:
        raise InputError(f"max_len is {max_len}; a row must hold at least 2 tokens")
    if source.codec.bytes_per_token is None:
        raise InputError(
            f"{source.path}: rows of the format {source.codec.format} have no fixed size, so they cannot be cut"
        )
    lengths = source.lengths()
    plan = PackingPlan.of(source, lengths, max_len, seed, window)
    settings = {"max_len": max_len, "seed": seed, "window": window, "documents": len(source)}
    header = replace(
        source.header,
        fidelity=None,
        distillkit_version=__version__,
        capture={**source.header.capture, "packed": settings},
    )
    total = 2 * len(plan.order)
    with ShardWriter(folder, header, shard_tokens=shard_tokens, resume=True) as writer:
        resumed = skipped = sum(shard.documents for shard in writer.resumed)
        done = 0
        for indices, rows in plan.windows:
            if skipped >= len(rows):
                skipped -= len(rows)
            else:
                documents = [source[index] for index in indices.tolist()]
                for row in rows[skipped:]:
                    joined = join([documents[i] for i in row.tolist()], header, source, max_len)
                    writer.write(
                        joined.input_ids,
                        joined.teacher,
                        loss_mask=joined.loss_mask,
                        segment_lengths=joined.segment_lengths,
                        label_logprobs=joined.label_logprobs,
                    )
                skipped = 0
            done += len(indices)
            progress(done, total)
        manifest = writer.close()
    _compare(source, str(folder), plan, max_len, lambda count: progress(done + count, total))
    return _report(manifest, folder, lengths, plan, max_len, resumed, time.perf_counter() - started)


@dataclass(frozen=True)
class PackingPlan:
    """Which documents go where: the order they are read in, and for each window its documents and rows (indices among
    them)."""

    order: npt.NDArray[np.int64]
    windows: list[tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]]

    @staticmethod
    def of(source: Dataset, lengths: npt.NDArray[np.int64], max_len: int, seed: int | None, window: int) -> PackingPlan:
        order = np.arange(len(lengths)) if seed is None else np.random.default_rng(seed).permutation(len(lengths))
        order = order[lengths[order] > 1]
        if not len(order):
            raise InputError(
                f"{source.path}: none of its {len(lengths):,} documents has at least 2 tokens: nothing to pack"
            )
        width = source.codec.bytes_per_token or 0
        number = np.maximum(np.arange(len(order)) // window, np.cumsum(lengths[order] * width) // _WINDOW_BYTES)
        borders = np.flatnonzero(np.diff(number)) + 1
        windows = []
        for indices in np.split(order, borders):
            packing = pack(lengths[indices], max_len, seed=seed)
            windows.append((indices, [packing[row] for row in range(len(packing))]))
        return PackingPlan(order, windows)


def join(documents: Sequence[Document], header: Header, source: Dataset, max_len: int) -> Document:
    """Put documents one behind the other into one, each cut to `max_len` tokens, with a row for each token but perhaps
    the last one (as the header's alignment says)."""
    ids, rows, masks, segments, labels = [], [], [], [], []
    for document in documents:
        length = min(len(document.input_ids), max_len)
        stored = source.codec.document_rows(document.teacher, document.num_rows)[:length]
        rows.append(stored if len(stored) == length else np.concatenate([stored, stored[-1:]]))
        ids.append(document.input_ids[:length])
        masks.append(np.ones(length, bool) if document.loss_mask is None else document.loss_mask[:length])
        segments.append(document.segments(length))
        if document.label_logprobs is not None:
            # No loss is taken where one document ends and the next begins.
            labels.append(np.append(document.label_logprobs[: length - 1], np.float32(-np.inf)))
    tokens = np.concatenate(ids)
    mask = None if all(document.loss_mask is None for document in documents) else np.concatenate(masks)
    lengths = np.concatenate(segments).astype(np.int32)
    count = header.rows_of(len(tokens))
    # Without those of one document there are none.
    known = np.concatenate(labels)[:-1] if len(labels) == len(documents) else None
    return Document("", tokens, np.concatenate(rows)[:count].tobytes(), count, mask, lengths, known)


def _same_labels(written: Document, document: Document, start: int, stop: int) -> bool:
    """Whether the labels' log-probabilities in a packed row are those of its document, where both have any."""
    if written.label_logprobs is None or document.label_logprobs is None:
        return written.label_logprobs is None
    return np.array_equal(written.label_logprobs[start : stop - 1], document.label_logprobs[: stop - start - 1])


def _compare(source: Dataset, folder: str, plan: PackingPlan, max_len: int, progress: Callable[[int], None]) -> None:
    """Read the packed rows back and compare tokens, masks and teacher rows with the source's.

    Raises:
        CorruptDataError: something differs.
    """
    packed: Iterator[Document] = iter(Dataset.open(folder))
    done = 0
    for indices, rows in plan.windows:
        documents = [source[index] for index in indices.tolist()]
        for row in rows:
            written, start = next(packed), 0
            found = source.codec.document_rows(written.teacher, written.num_rows)
            for i in row.tolist():
                document = documents[i]
                stop = start + min(len(document.input_ids), max_len)
                counted = min(document.num_rows, stop - start, written.num_rows - start)
                stored = source.codec.document_rows(document.teacher, document.num_rows)[:counted]
                same = (
                    np.array_equal(written.input_ids[start:stop], document.input_ids[: stop - start])
                    and np.array_equal(found[start : start + counted], stored)
                    and np.array_equal(_mask(written)[start:stop], _mask(document)[: stop - start])
                    and counted >= stop - start - 1
                    and _same_labels(written, document, start, stop)
                )
                if not same:
                    raise CorruptDataError(
                        f"{folder}: document {indices[i]} of {source.path} differs when read back: remove the folder "
                        "and pack again"
                    )
                start = stop
        done += len(indices)
        progress(done)
    if next(packed, None) is not None:
        raise CorruptDataError(f"{folder}: there are more rows than were written: remove the folder and pack again")


def _mask(document: Document) -> npt.NDArray[np.bool_]:
    return np.ones(len(document.input_ids), bool) if document.loss_mask is None else document.loss_mask


def _report(
    manifest: Manifest,
    folder: str | Path,
    lengths: npt.NDArray[np.int64],
    plan: PackingPlan,
    max_len: int,
    resumed: int,
    seconds: float,
) -> PackReport:
    packed = lengths[plan.order]
    rows = sum(shard.documents for shard in manifest.shards)
    tokens = sum(shard.tokens for shard in manifest.shards)
    return PackReport(
        output=str(folder),
        documents=len(plan.order),
        left_out=len(lengths) - len(plan.order),
        cut_documents=int((packed > max_len).sum()),
        cut_tokens=int(np.maximum(packed - max_len, 0).sum()),
        rows=rows,
        resumed_rows=resumed,
        tokens=tokens,
        fill=tokens / (rows * max_len),
        seconds=seconds,
    )

"""Datasets of single documents → shards of packed rows, with the teacher's bytes unchanged.

Training packs documents itself when it loads a dataset; a packed dataset is only needed to have the rows on disk.
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
from distillkit.shards.overflow import LongDocuments, Pieces
from distillkit.shards.packing import pack
from distillkit.shards.plausibility import check_plausible, sampled
from distillkit.shards.reader import Dataset
from distillkit.shards.writer import ShardWriter
from distillkit.types import Document, Overflow

__all__ = ["PackReport", "pack_dataset"]

_WINDOW_BYTES = 1 << 28
"""Maximum teacher bytes of a window of documents, all of which are in memory at once."""


@dataclass(frozen=True)
class PackReport:
    """The result of packing a dataset.

    Attributes:
        output: the output folder.
        documents: number of documents packed.
        left_out: skipped documents: those of fewer than two tokens, which have no next token to predict.
        dropped, split: documents longer than a row that were left out, or split into pieces.
        cut_documents, cut_tokens: number of documents truncated to a row's length, and tokens cut from them.
        rows: packed rows, including `resumed_rows` already written by an interrupted run.
        tokens, fill: tokens in the rows, and the fraction of the rows' capacity that they fill.
        seconds: time taken, including the check at the end.
    """

    output: str
    documents: int
    left_out: int
    dropped: int
    split: int
    cut_documents: int
    cut_tokens: int
    rows: int
    resumed_rows: int
    tokens: int
    fill: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable mapping."""
        return asdict(self)


def pack_dataset(
    source: Dataset,
    folder: str | Path,
    max_len: int,
    *,
    overflow: Overflow | None = None,
    seed: int | None = None,
    window: int = 10_000,
    shard_tokens: int = 262_144,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PackReport:
    """Write packed rows, then read them back and compare every document with the source.

    Documents are packed by best-fit decreasing (`distillkit.shards.packing`) within windows of a few thousand
    neighbours, so that each is read once, in order, and few are in memory at a time. An interrupted run is resumed
    after its finished shards.

    Where a document of L tokens has L − 1 rows, its last token is given a row as well, so that tokens and rows stay
    aligned: the row at which the document was cut, or else a copy of its last row. That row predicts across a document
    boundary and never counts towards a loss.

    Args:
        source: documents with their teacher's bytes; documents that are already packed together stay together.
        folder: output folder; created if needed.
        max_len: tokens per row.
        overflow: what to do with longer documents: cut them, split them into pieces that repeat an eighth of a row as
            context, or drop them. None cuts them, unless that would take more than 5% of the tokens.
        seed: shuffles the documents before packing; None keeps them near their neighbours.
        window: maximum number of documents packed together.
        shard_tokens: tokens per shard.
        progress: called with the documents done and the total, which count each document twice: written and compared.

    Raises:
        ConfigError: more than 5% of the tokens would be cut off, and `overflow` is None.
        InputError: `max_len` is too small, there is nothing to pack, or the folder contains a finished dataset.
        MismatchError: the folder contains shards of another dataset, or the source's rows cannot have been written with
            its codec.
        CorruptDataError: a source document is damaged, or what was written differs from the source when read back.
    """
    started = time.perf_counter()
    if max_len < 2:
        raise InputError(f"max_len is {max_len}; a row must hold at least 2 tokens")
    check_plausible(sampled(source), source.codec, source.path)
    lengths = source.lengths()
    long = LongDocuments.of(lengths, max_len)
    long.check(overflow, key=source.path, row=f"--max-len {max_len:,}", setting="--overflow")
    pieces = Pieces.of(lengths, max_len, overflow)
    plan = PackingPlan.of(source, pieces, max_len, seed, window)
    settings: dict[str, Any] = {"max_len": max_len, "seed": seed, "window": window, "documents": len(source)}
    if overflow in ("split", "drop"):
        settings["overflow"] = overflow
    header = replace(
        source.header,
        fidelity=None,
        distillkit_version=__version__,
        capture={**source.header.capture, "packed": settings},
    )
    total = 2 * len(plan.order)
    prior = source.codec.prior
    with ShardWriter(folder, header, shard_tokens=shard_tokens, resume=True, prior=prior) as writer:
        resumed = sum(shard.documents for shard in writer.resumed)
        _write_rows(source, pieces, plan, header, writer, lambda count: progress(count, total))
        # Before the manifest, which would make a dataset of what an earlier run wrote of other documents.
        writer.finish_shard()
        done = len(plan.order)
        _compare(source, (str(folder), writer.finished_documents()), pieces, plan, lambda n: progress(done + n, total))
        manifest = writer.close()
    packed = np.unique(pieces.documents[plan.order])
    rows, tokens = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("documents", "tokens"))
    cut = overflow not in ("split", "drop")
    return PackReport(
        output=str(folder),
        documents=len(packed),
        left_out=int((lengths < 2).sum()),
        dropped=long.long if overflow == "drop" else 0,
        split=long.long if overflow == "split" else 0,
        cut_documents=long.long if cut else 0,
        cut_tokens=long.beyond if cut else 0,
        rows=rows,
        resumed_rows=resumed,
        tokens=tokens,
        fill=tokens / (rows * max_len),
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class PackingPlan:
    """Which pieces of documents share rows.

    Attributes:
        order: the pieces in reading order.
        windows: for each window, its pieces, and its rows as positions within those.
    """

    order: npt.NDArray[np.int64]
    windows: list[tuple[npt.NDArray[np.int64], list[npt.NDArray[np.int64]]]]

    @staticmethod
    def of(source: Dataset, pieces: Pieces, max_len: int, seed: int | None, window: int) -> PackingPlan:
        lengths = pieces.lengths
        order = np.arange(len(lengths)) if seed is None else np.random.default_rng(seed).permutation(len(lengths))
        order = order[lengths[order] > 1]
        if not len(order):
            raise InputError(
                f"{source.path}: none of its {len(source):,} documents has 2 to {max_len:,} tokens: nothing to pack"
            )
        width = source.teacher_bytes / max(source.num_rows, 1)
        number = np.maximum(np.arange(len(order)) // window, np.cumsum(lengths[order] * width) // _WINDOW_BYTES)
        borders = np.flatnonzero(np.diff(number)) + 1
        windows = []
        for indices in np.split(order, borders):
            packing = pack(lengths[indices], max_len, seed=seed)
            windows.append((indices, [packing[row] for row in range(len(packing))]))
        return PackingPlan(order, windows)


def _write_rows(
    source: Dataset,
    pieces: Pieces,
    plan: PackingPlan,
    header: Header,
    writer: ShardWriter,
    progress: Callable[[int], None],
) -> None:
    """Write the rows of a plan, after those in the shards that the writer resumes."""
    skipped = sum(shard.documents for shard in writer.resumed)
    done = 0
    for indices, rows in plan.windows:
        if skipped >= len(rows):
            skipped -= len(rows)
        else:
            documents = [_part(source, *pieces[index]) for index in indices.tolist()]
            for row in rows[skipped:]:
                writer.copy(join([documents[i] for i in row.tolist()], header, source))
            skipped = 0
        done += len(indices)
        progress(done)


def _part(source: Dataset, index: int, start: int, stop: int, first: int) -> Document:
    """Read the tokens `start` … `stop` − 1 of a document, of which those before `first` do not count, and their
    rows."""
    document = source[index]
    if stop - start == len(document.input_ids):
        return document
    rows = slice(start, min(stop, document.num_rows))
    mask = _mask(document)[start:stop].copy()
    mask[: first - start] = False
    known = document.label_logprobs
    return replace(
        document,
        input_ids=document.input_ids[start:stop],
        teacher=source.codec.join_documents([(document.teacher, document.num_rows, rows)]),
        num_rows=rows.stop - rows.start,
        loss_mask=None if mask.all() else mask,
        segment_lengths=document.segments(stop, start).astype(np.int32),
        label_logprobs=None if known is None else known[start : stop - 1],
    )


def join(documents: Sequence[Document], header: Header, source: Dataset) -> Document:
    """Concatenate documents into one, with a row for every token (except the last, if the header's alignment is
    "L-1")."""
    ids, masks, segments, labels = [], [], [], []
    for document in documents:
        ids.append(document.input_ids)
        masks.append(_mask(document))
        segments.append(document.segments())
        if document.label_logprobs is not None:
            # No loss is taken across a document boundary.
            labels.append(np.append(document.label_logprobs, np.float32(-np.inf)))
    tokens = np.concatenate(ids)
    mask = None if all(document.loss_mask is None for document in documents) else np.concatenate(masks)
    lengths = np.concatenate(segments).astype(np.int32)
    count = header.rows_of(len(tokens))
    # Kept only if every document has them.
    known = np.concatenate(labels)[:-1] if len(labels) == len(documents) else None
    teacher = source.codec.join_documents(list(_joined_rows(documents, count)))
    return Document("", tokens, teacher, count, mask, lengths, known)


def _joined_rows(documents: Sequence[Document], count: int) -> Iterator[tuple[bytes | memoryview, int, slice]]:
    """Which rows of which documents are those of the joined one, of which there are `count`: one for each token."""
    start = 0
    for document in documents:
        stop, stored = min(start + len(document.input_ids), count), document.num_rows
        yield document.teacher, stored, slice(0, min(stop - start, stored))
        if stop - start > stored:
            yield document.teacher, stored, slice(stored - 1, stored)
        start = stop


def _same_labels(written: Document, document: Document, start: int, stop: int) -> bool:
    """Whether a packed row's label log-probabilities equal those of its document, if both have them."""
    if written.label_logprobs is None or document.label_logprobs is None:
        return written.label_logprobs is None
    return np.array_equal(written.label_logprobs[start : stop - 1], document.label_logprobs[: stop - start - 1])


def _compare(
    source: Dataset,
    output: tuple[str, Iterator[Document]],
    pieces: Pieces,
    plan: PackingPlan,
    progress: Callable[[int], None],
) -> None:
    """Read the packed rows of an output folder back and compare their tokens, masks and teacher rows with the source.

    Raises:
        CorruptDataError: there is a difference.
    """
    folder, packed = output
    done = 0
    for indices, rows in plan.windows:
        documents = [_part(source, *pieces[index]) for index in indices.tolist()]
        for row in rows:
            written, start = next(packed), 0
            found = _stored_rows(source, written)
            for i in row.tolist():
                document = documents[i]
                stop = start + len(document.input_ids)
                counted = min(document.num_rows, stop - start, written.num_rows - start)
                stored = [part[:counted] for part in _stored_rows(source, document)]
                same = (
                    np.array_equal(written.input_ids[start:stop], document.input_ids)
                    and all(map(np.array_equal, (part[start : start + counted] for part in found), stored))
                    and np.array_equal(_mask(written)[start:stop], _mask(document))
                    and counted >= stop - start - 1
                    and _same_labels(written, document, start, stop)
                )
                if not same:
                    raise CorruptDataError(
                        f"{folder}: document {pieces.documents[indices[i]]} of {source.path} differs when read back; "
                        "if an earlier run packed other documents there, choose another folder, or remove it"
                    )
                start = stop
        done += len(indices)
        progress(done)
    if next(packed, None) is not None:
        raise CorruptDataError(f"{folder}: contains more rows than were written; remove the folder and pack again")


def _stored_rows(source: Dataset, document: Document) -> tuple[npt.NDArray[Any], ...]:
    """A document's rows to compare with others: their bytes or, where these depend on the whole document, the decoded
    ids and values."""
    if source.codec.is_fixed:
        return (source.codec.document_rows(document.teacher, document.num_rows),)
    rows = source.codec.decode_document(document.teacher, document.num_rows)
    return np.asarray(rows.ids), np.asarray(rows.logprobs)


def _mask(document: Document) -> npt.NDArray[np.bool_]:
    return np.ones(len(document.input_ids), bool) if document.loss_mask is None else document.loss_mask

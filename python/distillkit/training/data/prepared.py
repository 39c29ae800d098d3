"""Prepared documents of a training run: text and chat, tokenised once and cached.

Prepared data are a folder of flat, memory-mapped arrays: opening them takes no time whatever their size, and documents
are only read when they are used.

Why not the cache of `datasets.map`? On 20 MB of text (5.5 million tokens) it took 3.3 to 4.3 times the memory to
prepare and 1.9 times the disk, since it stores the rows as well, and 3 to 9 times as long to read documents at random.
Its CPU time is the same within 15%, and it opens faster (0.3 s instead of 1.1 to 1.4 s). `from_generator` needs no more
disk, but 1.4 to 1.6 times the memory, and it replaces an error that names the row by one that does not. The figures
come from benches/prepare.py; dev/LOG.md says how far to trust them.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from distillkit.console import progress_bar
from distillkit.errors import ConfigError, CorruptDataError, InputError
from distillkit.shards.json_text import canonical_json
from distillkit.shards.storage import TEMPORARY_PREFIX, Folder
from distillkit.shards.table import document_id
from distillkit.text import tokenizer as tokenizers
from distillkit.text.rows import RowReader
from distillkit.text.sources import Row, Source, chosen_rows
from distillkit.training.data.stored import Sample
from distillkit.types import Document, TokenDocument

__all__ = ["Part", "PreparedDataset", "prepare"]

logger = logging.getLogger(__name__)

Part = Literal["train", "eval"]

VERSION = 2
"""Part of the key of prepared data; must be increased when the same settings would produce other tokens."""

_DESCRIPTION = "prepared.json"
_ROWS_AT_A_TIME = 64

# File names and dtypes of the flat arrays, which concatenate the values of all documents.
_ARRAYS: dict[str, str] = {
    "offsets": "<i8",  # (D + 1,) where each document begins in input_ids and loss_mask
    "input_ids": "<i4",
    "loss_mask": "|b1",  # absent if all tokens count
    "segment_offsets": "<i8",  # (D + 1,) where each document begins in segment_lengths; absent without packed rows
    "segment_lengths": "<i4",
    "columns": "<i4",  # (D,) which of the values in columns.json a document has; absent if no columns are kept
}
_COLUMNS = "columns.json"


def prepare(
    rows: Source,
    reader: RowReader,
    cache: Path,
    *,
    key: str,
    sample: Sample | None = None,
    columns: Sequence[str] = (),
    processes: int = 1,
) -> PreparedDataset:
    """Tokenise rows into documents, or reuse those prepared earlier from the same rows with the same settings.

    Rows without content, documents of one token and documents without a token to predict are left out.

    Args:
        rows: the rows to read.
        reader: converts rows to token documents; must not split packed rows.
        cache: folder for prepared data, which get a subfolder each.
        key: dotted path of the dataset in the configuration, for messages.
        sample: how many rows to use, and which; all if None.
        columns: columns of which each document keeps the value of its row: text, a number, or true or false.
        processes: number of processes that tokenise.

    Raises:
        ConfigError: no document is left, or a setting does not fit the rows.
        InputError: a row has an unknown format.
    """
    from filelock import FileLock

    sample = sample or Sample()
    identity = _identity(rows, reader, sample) | ({"columns": list(columns)} if columns else {})
    folder = cache / f"prepared-{content_hash(identity)}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if (folder / _DESCRIPTION).is_file():
            dataset = PreparedDataset(folder)
            logger.info("%s: %s documents, already prepared in %s", key, f"{len(dataset):,}", folder)
            return dataset
        chosen = sample.choose(rows.num_rows)
        read = rows.rows() if chosen is None else chosen_rows(rows, chosen)
        with progress_bar(f"preparing {key}") as progress:
            reading = _Keeping(reader, tuple(columns)) if columns else reader
            counts = _make(folder, identity, _documents(read, reading, processes), progress, rows.num_rows)
        if not counts["documents"]:
            raise ConfigError(
                f"{key}: none of its {rows.num_rows:,} rows yields a document ({counts['empty']:,} empty, "
                f"{counts['short']:,} of one token, {counts['masked']:,} without a token to predict)"
            )
    logger.info(
        "%s: %s documents of %s tokens, prepared in %s (left out: %s empty, %s of one token, %s without a token to "
        "predict)",
        key,
        *(f"{counts[name]:,}" for name in ("documents", "tokens")),
        folder,
        *(f"{counts[name]:,}" for name in ("empty", "short", "masked")),
    )
    return PreparedDataset(folder)


def _identity(rows: Source, reader: RowReader, sample: Sample) -> dict[str, Any]:
    """Return everything that the prepared data depend on."""
    tokenizer = reader.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # Truncation and padding change with use. They come before the added tokens; parsing the JSON would take long.
    pipeline = None if backend is None else backend.to_str().partition('"added_tokens"')[2]
    policy = asdict(reader.policy)
    del policy["names"]
    return {
        "version": VERSION,
        "rows": rows.identity,
        "sample": None if sample.documents is None else [sample.documents, sample.seed],
        "tokenizer": [type(tokenizer).__name__, tokenizer.eos_token],
        "tokens": tokenizers.fingerprint(tokenizer) if pipeline is None else content_hash(pipeline),
        "template": tokenizer.chat_template,
        "policy": policy,
    }


def content_hash(identity: Any) -> str:
    return str(xxhash.xxh3_128_hexdigest(canonical_json(identity).encode()))


Batches = Iterator[list[list[TokenDocument]]]
"""Batches of rows: the documents of each row."""


def _make(folder: Path, identity: Any, batches: Batches, progress: Any, total: int) -> dict[str, int]:
    """Write the documents of rows, and count them and what was left out; without documents, no folder is left.

    The folder is only renamed to its final name once it is complete. An interrupted run's leftovers can be removed
    because the caller holds the lock.
    """
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        counts = _write(temporary, batches, progress, total)
        if counts["documents"]:
            Folder(temporary).write(_DESCRIPTION, canonical_json({"identity": identity, **counts}).encode())
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def _write(folder: Path, batches: Batches, progress: Any, total: int) -> dict[str, int]:
    folder.mkdir(parents=True)
    counts = dict.fromkeys(("rows", "documents", "tokens", "empty", "short", "masked"), 0)
    with _Writer(folder) as writer:
        for batch in batches:
            for documents in batch:
                counts["empty"] += not documents
                for document in documents:
                    _add(document, writer, counts)
            counts["rows"] += len(batch)
            progress(counts["rows"], total)
    return counts


def _add(document: TokenDocument, writer: _Writer, counts: dict[str, int]) -> None:
    """Count a document, and write it unless it has no token to predict."""
    if len(document.input_ids) < 2:
        counts["short"] += 1
    elif document.loss_mask is not None and not document.loss_mask[1:].any():
        counts["masked"] += 1
    else:
        writer.add(document)
        counts["documents"] += 1
        counts["tokens"] += len(document.input_ids)


Reading = Callable[[Sequence[Row]], list[list[TokenDocument]]]
"""From rows to the documents of each."""


@dataclass(frozen=True)
class _Keeping:
    """Reads rows, and keeps columns of them."""

    reader: RowReader
    columns: tuple[str, ...]

    def __call__(self, rows: Sequence[Row]) -> list[list[TokenDocument]]:
        found = self.reader(rows)
        return [
            [replace(document, columns=self._kept(where, row)) for document in documents] if documents else []
            for (where, row), documents in zip(rows, found, strict=True)
        ]

    def _kept(self, where: str, row: Any) -> dict[str, Any]:
        kept = {name: row[name] for name in self.columns if name in row}
        for name, value in kept.items():
            if value is not None and not isinstance(value, (str, bool, int, float)):
                raise InputError(
                    f"{where}: the column {name} has a {type(value).__name__}, but it decides who teaches the row, and "
                    "must be text, a number, or true or false"
                )
        return kept


def _documents(rows: Iterator[Row], reader: Reading, processes: int) -> Batches:
    """Yield the documents of rows, in order."""
    batches = iter(lambda: list(itertools.islice(rows, _ROWS_AT_A_TIME)), [])
    if processes == 1:
        yield from map(reader, batches)
        return
    # Forked processes inherit the tokenizer; each of them then tokenises on one thread.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(processes, context, _start_worker, (reader,)) as pool:
        pending: deque[Future[list[list[TokenDocument]]]] = deque()
        for batch in batches:
            pending.append(pool.submit(_work, batch))
            if len(pending) > 4 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_worker_reader: Reading


def _start_worker(reader: Reading) -> None:
    global _worker_reader
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_reader = reader


def _work(rows: Sequence[Row]) -> list[list[TokenDocument]]:
    return _worker_reader(rows)


class _Writer:
    """Appends documents to the arrays of a folder; keeps masks and segments only if any document has them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: (folder / name).open("wb") for name in _ARRAYS}
        self._ends = {"offsets": 0, "segment_offsets": 0}
        self._optional: dict[str, bool] = {"loss_mask": False, "segment_lengths": False}
        self._columns: dict[str, int] = {}

    def __enter__(self) -> _Writer:
        for name in self._ends:
            self._append(name, [0])
        return self

    def add(self, document: TokenDocument) -> None:
        length = len(document.input_ids)
        mask, segments = document.loss_mask, document.segment_lengths
        self._optional["loss_mask"] |= mask is not None
        self._optional["segment_lengths"] |= segments is not None
        self._append("input_ids", document.input_ids)
        self._append("loss_mask", np.ones(length, bool) if mask is None else mask)
        self._append("segment_lengths", [length] if segments is None else segments)
        if document.columns is not None:
            values = canonical_json(dict(document.columns))
            self._append("columns", [self._columns.setdefault(values, len(self._columns))])
        for name, count in (("offsets", length), ("segment_offsets", 1 if segments is None else len(segments))):
            self._ends[name] += count
            self._append(name, [self._ends[name]])

    def _append(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, dtype=_ARRAYS[name]).tobytes())

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for file in self._files.values():
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
        if self._columns:
            listed = [json.loads(values) for values in self._columns]
            (self._folder / _COLUMNS).write_text(json.dumps(listed), encoding="utf-8")
        else:
            (self._folder / "columns").unlink()
        if not self._optional["loss_mask"]:
            (self._folder / "loss_mask").unlink()
        if not self._optional["segment_lengths"]:
            (self._folder / "segment_lengths").unlink()
            (self._folder / "segment_offsets").unlink()


class PreparedDataset:
    """Map-style dataset of token documents, without a teacher's distributions.

    Safe in forked and spawned workers: pickling only keeps the folder, and the arrays are mapped again.

    Args:
        folder: a folder written by `prepare`.

    Attributes:
        columns: all different values of the columns that were kept of the rows; empty if none were.

    Raises:
        CorruptDataError: its files are inconsistent.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description: Mapping[str, Any] = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        self._map()
        documents, tokens = self.description["documents"], self.description["tokens"]
        offsets = self._arrays["offsets"]
        if len(offsets) != documents + 1 or offsets[-1] != tokens or len(self._arrays["input_ids"]) != tokens:
            raise CorruptDataError(
                f"{folder}: {documents:,} documents of {tokens:,} tokens were written, but the files hold "
                f"{len(offsets) - 1:,} and {len(self._arrays['input_ids']):,}; remove the folder to prepare them again"
            )

    def _map(self) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {
            name: np.memmap(self.folder / name, dtype=dtype, mode="r")
            for name, dtype in _ARRAYS.items()
            if (self.folder / name).exists()
        }
        kept = self.folder / _COLUMNS
        self.columns: list[dict[str, Any]] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else []

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "description": self.description}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return int(self.description["documents"])

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each document (D,)."""
        return np.diff(self._arrays["offsets"]).astype(np.int64)

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        ids = np.array(self._part("input_ids", "offsets", index), dtype=np.int32)
        mask = np.array(self._part("loss_mask", "offsets", index), bool) if "loss_mask" in self._arrays else None
        lengths = None
        if "segment_lengths" in self._arrays:
            lengths = np.array(self._part("segment_lengths", "segment_offsets", index), dtype=np.int32)
            lengths = lengths if len(lengths) > 1 else None
        place = f"{self.folder}, document {index}"
        columns = self.columns[int(self._arrays["columns"][index])] if self.columns else None
        doc_id, rows = document_id(ids, mask, lengths), max(len(ids) - 1, 0)
        return Document(doc_id, ids, b"", rows, mask, lengths, place=place, columns=columns)

    def _part(self, name: str, bounds: str, index: int) -> npt.NDArray[Any]:
        offsets = self._arrays[bounds]
        return self._arrays[name][offsets[index] : offsets[index + 1]]

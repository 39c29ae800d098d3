"""What a served teacher has answered, kept as a dataset, so that a later epoch or run asks nothing twice.

The folder of a cache has a dataset for each teacher and each of the settings that decide its answers, in the same form
as a captured one: `distillkit-codec inspect` and `verify` read it, and a student can be trained from it. Values are
stored as they are, so that training with and without the cache is the same.

Several processes and runs may share a cache. A shard appears once it is whole, and is then added to the manifest, under
a lock; a process that dies loses its answers of the last minute.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock, RLock
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from distillkit.capture.teachers.base import RowRequest, ScoredDocument
from distillkit.codec import Codec, DistributionQuantizationConfig
from distillkit.codec.fidelity import FidelityStats
from distillkit.errors import CaptureError, CorruptDataError, InputError, MismatchError
from distillkit.shards import Dataset, Header, Manifest
from distillkit.shards.json_text import canonical_json
from distillkit.shards.manifest import ShardInfo, is_shard_name, merged_fidelity, read_manifest, shard_name
from distillkit.shards.parquet import open_parquet
from distillkit.shards.reader import ShardFile
from distillkit.shards.storage import Folder, reading
from distillkit.shards.table import document_id
from distillkit.shards.writer import NewShard, encode_rows, is_dataset_file, make_document, shard_info
from distillkit.text import tokenizer as tokenizers
from distillkit.types import Document, TokenDocument

__all__ = ["AnswerCache", "cache_header"]

_MOST_BYTES = 64 << 20
"""A shard is written once it has so many bytes of rows, which until then are in memory."""
_MOST_SECONDS = 60.0
"""A shard is written at the latest so long after its first answer."""


def cache_header(identity: Mapping[str, Any], request: RowRequest, head_size: int, tokenizer: Any) -> Header:
    """Return the header of the dataset that keeps a teacher's answers.

    Args:
        identity: the teacher's entry in the header; see `Teacher.identity`.
        request: what it is asked for.
        head_size: width of its head.
        tokenizer: the tokenizer of the teacher and the student.
    """
    config = DistributionQuantizationConfig(
        d=head_size,
        k=request.k,
        exact_k=request.k,
        exact_dtype="float32",
        residual_bins=[],
        delta_encoding=False,
    )
    return Header(
        codec=Codec(config).to_dict(),
        vocab_size=tokenizers.vocab_size(tokenizer),
        head_size=head_size,
        tokenizer={"name": str(identity["name"]), "fingerprint": tokenizers.fingerprint(tokenizer)},
        teacher=dict(identity),
        capture={"engine": "openai", "label_logprobs": request.label_logprobs},
    )


class AnswerCache:
    """The answers of one teacher, by the content of the documents. Its methods may be called in several threads.

    Args:
        cache: the folder of all caches.
        header: of the shards; also decides the subfolder.
        key: the teacher's key in the configuration, for messages.

    Attributes:
        folder: where the dataset is.

    Raises:
        CorruptDataError: the dataset is damaged; the message names the file.
        MismatchError: a file in it is of another dataset.
        OSError: the folder cannot be made or read.
    """

    def __init__(self, cache: Path, header: Header, key: str = "teacher") -> None:
        from filelock import FileLock

        name = re.sub(r"[^\w.-]+", "-", str((header.teacher or {})["name"]))[:80]
        digest = xxhash.xxh3_64_hexdigest(canonical_json(header.identity()).encode())
        self.folder = cache / f"{name}-k{header.codec['config']['k']}-{digest}"
        self._header, self._codec, self._key = header, header.make_codec(), key
        self._inside = Folder(self.folder)
        self._between_processes = FileLock(self.folder.with_name(f"{self.folder.name}.lock"))
        # What is found, and what is to be written. `_writing` is held for as long as a shard takes to write.
        self._known, self._writing = RLock(), Lock()
        self._places: dict[str, int] = {}
        self._dataset = Dataset(str(self.folder), "distillkit", header, self._codec, [], ())
        self._new: dict[str, tuple[Document, FidelityStats]] = {}
        self._new_bytes, self._since = 0, 0.0
        with self._explaining():
            self.folder.mkdir(parents=True, exist_ok=True)
        with self._explaining(), self._between_processes:
            self._inside.remove_leftovers(is_dataset_file)
            self._read(self._listed())

    def __len__(self) -> int:
        """Number of documents that are answered."""
        with self._known:
            return len(self._places) + len(self._new)

    def find(self, input_ids: npt.NDArray[np.int32]) -> ScoredDocument | None:
        """Return the answer for a document's tokens, or None.

        Raises:
            CorruptDataError: it is damaged; the message names the file.
        """
        key = document_id(input_ids)
        with self._explaining():
            with self._known:
                if key in self._new:
                    document = self._new[key][0]
                elif key in self._places:
                    document = self._dataset[self._places[key]]
                else:
                    return None
            rows = self._codec.decode_document(document.teacher, document.num_rows)
        return ScoredDocument(0, rows, document.label_logprobs)

    def add(self, document: TokenDocument, answer: ScoredDocument) -> None:
        """Keep an answer, and write a shard if there are enough of them, or if it is time.

        Raises:
            CaptureError: the answer cannot be stored; names the document.
            OSError: the shard cannot be written.
        """
        try:
            data, _, stats = encode_rows(self._codec, answer.rows)
            stored = make_document(
                document.input_ids, data, self._header, self._codec, label_logprobs=answer.label_logprobs
            )
        except InputError as error:
            raise CaptureError(f"{document.source}: the teacher's output cannot be stored: {error}") from error
        with self._known:
            if stored.doc_id in self._new or stored.doc_id in self._places:
                return
            if not self._new:
                self._since = time.monotonic()
            self._new[stored.doc_id] = (stored, stats)
            self._new_bytes += len(data)
            due = self._new_bytes >= _MOST_BYTES or time.monotonic() - self._since >= _MOST_SECONDS
        # What comes while a shard is written goes into the next one.
        if due and not self._writing.locked():
            self.flush()

    def flush(self) -> None:
        """Write the answers that are only in memory, and look for those of other processes.

        Raises:
            OSError: they cannot be written.
            CorruptDataError: another process's shard is damaged.
        """
        with self._explaining(), self._writing:
            with self._known:
                writing = dict(self._new)
                self._new_bytes, self._since = 0, time.monotonic()
            with self._between_processes:
                manifest = self._listed()
                if writing:
                    manifest = self._written(manifest, writing)
            with self._known:
                self._read(manifest)
                for key in writing:
                    del self._new[key]

    @contextmanager
    def _explaining(self) -> Iterator[None]:
        """Name the setting, and say what to do about a damaged dataset, or one of another teacher."""
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise OSError(f"{self._key}.cache: {error}") from error
            raise OSError(error.errno, f"{self._key}.cache: {error.strerror}", error.filename) from error
        except (CorruptDataError, MismatchError) as error:
            raise type(error)(f"{self._key}.cache: {error}. Remove {self.folder} to ask the teacher again") from error

    def _listed(self) -> Manifest:
        """Return the shards that are there, also one that a process wrote and did not live to list."""
        manifest = read_manifest(self.folder) or Manifest(self._header, ())
        self._header.check_same(manifest.header, where=str(self.folder))
        listed = {shard.file for shard in manifest.shards}
        for name in self._inside.names():
            if is_shard_name(name) and name not in listed:
                manifest = self._with_shard(manifest, *shard_info(self._inside, name))
        return manifest

    def _written(self, manifest: Manifest, answers: Mapping[str, tuple[Document, FidelityStats]]) -> Manifest:
        """Write answers as one more shard."""
        shard = NewShard(self._inside, shard_name(len(manifest.shards)))
        try:
            for document, stats in answers.values():
                shard.add(document, stats)
            header = replace(self._header, fidelity=shard.fidelity())
            info = shard.finish(header)
        except BaseException:
            shard.abort()
            raise
        return self._with_shard(manifest, info, header)

    def _with_shard(self, manifest: Manifest, info: ShardInfo, header: Header) -> Manifest:
        """List one more shard in the manifest."""
        headers = [manifest.header, header] if manifest.shards else [header]
        longer = Manifest(replace(self._header, fidelity=merged_fidelity(headers)), (*manifest.shards, info))
        longer.write(self._inside)
        return longer

    def _read(self, manifest: Manifest) -> None:
        """Learn which documents the new shards have."""
        known, place = list(self._dataset.files), len(self._dataset)
        new = [ShardFile(self._inside.of(shard.file)) for shard in manifest.shards[len(known) :]]
        for file in new:
            self._header.check_same(file.header, where=file.path)
            for key in _document_ids(file.path):
                self._places.setdefault(key, place)
                place += 1
        if new:
            self._dataset = Dataset(
                str(self.folder), "distillkit", self._header, self._codec, [*known, *new], manifest.shards
            )


def _document_ids(path: str) -> list[str]:
    """Return the ids of a shard's documents, in order."""
    with open_parquet(path) as parquet, reading(path):
        ids: list[str] = parquet.read(columns=["doc_id"], use_threads=False).column(0).to_pylist()
    return ids

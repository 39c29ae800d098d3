"""Checking a dataset: every hash, every checksum, every row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any

import fsspec

from distillkit.codec import CodecConfig
from distillkit.errors import DistillKitError
from distillkit.shards.files import file_hash
from distillkit.shards.reader import Dataset, DocumentFile

__all__ = ["VerifyReport", "verify_dataset"]


@dataclass(frozen=True)
class VerifyReport:
    """What was checked, and what is wrong.

    Attributes:
        files, documents, tokens, rows: what was found to be sound.
        problems: one message each, naming file and document; a file is left at its first.
    """

    files: int
    documents: int
    tokens: int
    rows: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def verify_dataset(
    path: str | PathLike[str],
    *,
    config: CodecConfig | Mapping[str, Any] | str | PathLike[str] | None = None,
    split: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyReport:
    """Reads a whole dataset: the manifest against the files and their hashes, every checksum, every row decoded.

    Args:
        path, config, split: as `Dataset.open`.
        progress: called with documents done and documents in all.

    Raises:
        FileNotFoundError, DistillKitError: the dataset can not be opened at all, as `Dataset.open`.
    """
    dataset = Dataset.open(path, config=config, split=split)
    counts = _Counts()
    hashes = {shard.file: shard.xxh3_128 for shard in dataset.shards} if dataset.kind == "distillkit" else {}
    problems = []
    for file in dataset.files:
        problem = _check_file(file, hashes.get(file.path.rsplit("/", 1)[-1]), dataset, counts, progress)
        if problem is None:
            counts.files += 1
        else:
            problems.append(problem)
    return VerifyReport(counts.files, counts.documents, counts.tokens, counts.rows, tuple(problems))


@dataclass
class _Counts:
    files: int = 0
    documents: int = 0
    tokens: int = 0
    rows: int = 0


def _check_file(
    file: DocumentFile, digest: str | None, dataset: Dataset, counts: _Counts, progress: Callable[[int, int], None]
) -> str | None:
    """The first problem of a file, if it has one."""
    try:
        _check_hash(file, digest)
        for group in range(len(file.groups)):
            for document in file.load(group):
                decoded = dataset.codec.decode_document(document.teacher, document.num_rows)
                counts.documents += 1
                counts.tokens += len(document.input_ids)
                counts.rows += len(decoded.ids)
                progress(counts.documents, len(dataset))
    except DistillKitError as error:
        return _naming(file, error)
    return None


def _naming(file: DocumentFile, error: DistillKitError) -> str:
    return str(error) if file.path in str(error) else f"{file.path}: {error}"


def _check_hash(file: DocumentFile, expected: str | None) -> None:
    if not expected:
        return
    filesystem, inner = fsspec.core.url_to_fs(file.path)
    with filesystem.open(inner, "rb") as content:
        found = file_hash(content)
    if found != expected:
        raise DistillKitError(f"{file.path}: the file's hash is {found}, the manifest says {expected}")

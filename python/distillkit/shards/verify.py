"""Verifies a dataset: every hash, every checksum, every row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any, NoReturn, TypeVar

from distillkit.codec import CodecConfig
from distillkit.configuration.urls import locate
from distillkit.errors import DistillKitError, MismatchError
from distillkit.shards.manifest import ShardInfo
from distillkit.shards.reader import Dataset, DocumentFile
from distillkit.shards.storage import file_hash
from distillkit.types import Document, Facts, Shown

_T = TypeVar("_T")

__all__ = ["VerifyReport", "verify_dataset"]


@dataclass(frozen=True, repr=False)
class VerifyReport(Shown):
    """The result of verifying a dataset.

    Attributes:
        files, documents, tokens, rows: how many are valid.
        problems: one message per problem, naming the file and the document.
    """

    files: int
    documents: int
    tokens: int
    rows: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether no problems were found."""
        return not self.problems

    def facts(self) -> Facts:
        rows = [(name, f"{getattr(self, name):,}") for name in ("files", "documents", "tokens", "rows")]
        rows += [("problem", problem) for problem in self.problems]
        return "valid" if self.ok else "DAMAGED; the valid part:", rows

    def __bool__(self) -> NoReturn:
        # `assert verify_dataset(path)` would pass whatever the problems.
        raise TypeError("the truth value of a VerifyReport is ambiguous; use .ok")


def verify_dataset(
    path: str | PathLike[str],
    *,
    config: CodecConfig | Mapping[str, Any] | str | PathLike[str] | None = None,
    split: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyReport:
    """Reads an entire dataset: compares the manifest with the files and their hashes, checks every checksum, and
    decodes every row.

    Args:
        path, config, split: as for `Dataset.open`.
        progress: called with the documents done and the total.

    Raises:
        FileNotFoundError, DistillKitError: the dataset cannot be opened at all; as for `Dataset.open`.

    Example:
        >>> report = verify_dataset("captured")
        >>> report.ok, report.documents, report.rows
        (True, 3, 27)
    """
    dataset = Dataset.open(path, config=config, split=split)
    recorded = {shard.file: shard for shard in dataset.shards} if dataset.kind == "distillkit" else {}
    total = _Counts()
    problems: list[str] = []
    for file in dataset.files:
        found = len(problems)
        counts = _Counts()
        for document in _documents(file, problems):
            decoded = _problem(
                file, problems, partial(dataset.codec.decode_document, document.teacher, document.num_rows)
            )
            if decoded is not None:
                counts.add(document)
            progress(total.documents + counts.documents, len(dataset))
        info = recorded.get(file.path.rsplit("/", 1)[-1])
        if info is not None and len(problems) == found:
            _problem(file, problems, partial(_check_info, file, info, counts))
        total.files += len(problems) == found
        total.merge(counts)
    return VerifyReport(total.files, total.documents, total.tokens, total.rows, tuple(problems))


@dataclass
class _Counts:
    files: int = 0
    documents: int = 0
    tokens: int = 0
    rows: int = 0

    def add(self, document: Document) -> None:
        self.documents += 1
        self.tokens += len(document.input_ids)
        self.rows += document.num_rows

    def merge(self, other: _Counts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.rows += other.rows


def _problem(file: DocumentFile, problems: list[str], work: Callable[[], _T]) -> _T | None:
    """Returns the result of `work`; if it fails, records the problem, naming the file, and returns None."""
    try:
        return work()
    except DistillKitError as error:
        problems.append(str(error) if file.path in str(error) else f"{file.path}: {error}")
        return None


def _documents(file: DocumentFile, problems: list[str]) -> Iterator[Document]:
    """Yields a file's valid documents and records the problems of the others."""
    for group in range(len(file.groups)):
        documents = _problem(file, problems, partial(file.load, group))
        if documents is None:
            continue
        for index in range(len(documents)):
            document = _problem(file, problems, partial(documents.__getitem__, index))
            if document is not None:
                yield document


def _check_info(file: DocumentFile, info: ShardInfo, counts: _Counts) -> None:
    """Compares a file with its counts and hash in the manifest."""
    if (info.documents, info.tokens, info.rows) != (counts.documents, counts.tokens, counts.rows):
        raise MismatchError(
            f"{file.path}: {counts.documents} documents, {counts.tokens} tokens and {counts.rows} rows, but the "
            f"manifest says {info.documents}, {info.tokens} and {info.rows}"
        )
    _check_hash(file, info.xxh3_128)


def _check_hash(file: DocumentFile, expected: str | None) -> None:
    if not expected:
        return
    filesystem, inner = locate(file.path)
    with filesystem.open(inner, "rb") as content:
        found = file_hash(content)
    if found != expected:
        raise MismatchError(f"{file.path}: the file's hash is {found}, but the manifest says {expected}")

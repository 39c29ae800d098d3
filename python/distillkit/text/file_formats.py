"""File formats of text datasets: JSON Lines, JSON, CSV, TSV, text, Parquet; all but Parquet may be compressed."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import weakref
import zlib
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, cast

import pyarrow as pa

from distillkit.errors import ConfigError, CorruptDataError, InputError
from distillkit.shards.parquet import check_names, open_parquet, validated
from distillkit.text.arrow_rows import arrow_rows
from distillkit.text.file_names import SUFFIXES, format_suffix

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

__all__ = []

_PARQUET_BATCH_ROWS = 256
_SCHEMA_ROWS = 1024

# Columns of captured and published datasets that hold distributions; never read as text, and most of the bytes.
TEACHER_COLUMNS = (
    *("teacher", "compressed_logprobs", "bytepacked_indices", "packed_indices", "exact_values", "coeffs"),
    *("token_ids", "top_values"),
)


class _Rows(Protocol):
    """Random access to a file's rows: (location in the file, row) by index; see `_Format`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[str, Any]: ...


@dataclass(frozen=True)
class _Format:
    """The functions for one file format.

    Attributes:
        count: number of rows.
        read: yields (location in the file, row); instead of a row that cannot be read, an InputError without its place.
        load: random access to the rows.
        schema: all columns; their types are only guaranteed for the requested ones.
    """

    count: Callable[[Path], int]
    read: Callable[[Path], Iterator[tuple[str, Any]]]
    load: Callable[[Path], _Rows]
    schema: Callable[[Path, Sequence[str] | None], pa.Schema]


def _open_zstd(file: Path) -> Any:
    return pa.CompressedInputStream(pa.OSFile(str(file)), "zstd")


_DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
_DAMAGED = (EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, pa.ArrowInvalid)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# A compressed file may hold this much, or so many times its size, as a Parquet file may.
_ALLOWED_BYTES, _ALLOWED_RATIO = 1 << 28, 200
_BUFFER_BYTES = 1 << 18


@contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, decompressed.

    Raises:
        InputError: it is damaged, or holds far more than its size.
    """
    compressed = _DECOMPRESSORS.get(file.suffix.lower())
    if compressed is None:
        with file.open("rb") as data:
            yield data
        return
    with compressed(file) as stream:
        yield cast(BinaryIO, io.BufferedReader(_Decompressed(file, stream), _BUFFER_BYTES))


class _Decompressed(io.RawIOBase):
    """What a compressed file holds, within limits: a few kilobytes can stand for gigabytes.

    Args:
        file: the file.
        stream: reads its content.
    """

    def __init__(self, file: Path, stream: Any) -> None:
        self._file, self._stream = file, stream
        self._left = max(_ALLOWED_BYTES, _ALLOWED_RATIO * file.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        with memoryview(buffer) as view:
            try:
                data = self._stream.read(len(view))
            except OSError as error:
                # Arrow's have no number.
                if error.errno is not None and not isinstance(error, gzip.BadGzipFile):
                    raise
                raise self._damaged(error) from error
            except _DAMAGED as error:
                raise self._damaged(error) from error
            self._left -= len(data)
            if self._left < 0:
                raise InputError(
                    f"{self._file}: {self._file.stat().st_size:,} bytes that hold more than {_ALLOWED_RATIO} times as "
                    f"much, and more than {_ALLOWED_BYTES >> 20} MiB; if that is right, decompress the file first"
                )
            view[: len(data)] = data
            return len(data)

    def _damaged(self, error: Exception) -> InputError:
        return InputError(f"{self._file}: damaged, or not compressed as its name says: {error}")


def _read(file: Path) -> bytes:
    with _open(file) as data:
        return data.read().removeprefix(_BYTE_ORDER_MARK)


def _count_lines(file: Path) -> int:
    with _open(file) as lines:
        return sum(1 for line in lines if line.strip())


def _read_lines(file: Path) -> Iterator[tuple[str, Any]]:
    with _open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"line {number}", _parse_line(line)


def _load_lines(file: Path) -> _Rows:
    return list(_read_lines(file)) if file.suffix.lower() in _DECOMPRESSORS else _Lines(file)


class _Lines:
    """Random access to the lines of a JSON Lines file that is not compressed."""

    def __init__(self, file: Path) -> None:
        starts, numbers, start = array("q"), array("q"), 0
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    starts.append(start)
                    numbers.append(number)
                start += len(line)
        self._starts, self._numbers = starts, numbers
        self._file = file.open("rb")
        weakref.finalize(self, self._file.close)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        self._file.seek(self._starts[index])
        number = self._numbers[index]
        return f"line {number}", _parse_line(self._file.readline())


def _json_schema(file: Path, columns: Sequence[str] | None) -> pa.Schema:
    """Return the schema of a JSON file, unified over all its rows."""
    names: dict[str, None] = {}
    found = pa.schema([])
    rows = (row for _, row in file_format(file).read(file) if isinstance(row, Mapping))
    while batch := list(itertools.islice(rows, _SCHEMA_ROWS)):
        names |= dict.fromkeys(name for row in batch for name in row)
        for name in [name for name in names if columns is None or name in columns]:
            found = _with_values(found, name, [row.get(name) for row in batch], file)
    # Columns that were not requested are included (as null), so that error messages can list them.
    return pa.schema([found.field(name) if name in found.names else pa.field(name, pa.null()) for name in names])


def _with_values(schema: pa.Schema, name: str, values: list[Any], file: Path) -> pa.Schema:
    """Widen a schema so that column `name` can hold these values."""
    try:
        column = pa.schema([(name, pa.array(values).type)])
        return pa.unify_schemas([schema, column], promote_options="permissive")
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"keep_columns: the values of {name} in {file.name} have no common type: {error}. Name the columns to keep "
            "without it"
        ) from error


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return InputError(f"not JSON in UTF-8: {error}")


def _parse_array(file: Path) -> list[Any]:
    try:
        rows: list[Any] = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON in UTF-8: {error}") from error
    return rows


def _is_array(file: Path) -> bool:
    """Whether a `.json` file holds a single array; otherwise it is read as JSON Lines."""
    with _open(file) as data:
        return data.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")


def _count_json(file: Path) -> int:
    return len(_parse_array(file)) if _is_array(file) else _count_lines(file)


def _read_json(file: Path) -> Iterator[tuple[str, Any]]:
    if not _is_array(file):
        yield from _read_lines(file)
        return
    for index, row in enumerate(_parse_array(file)):
        yield f"row {index}", row


def _load_json(file: Path) -> _Rows:
    return list(_read_json(file)) if _is_array(file) else _load_lines(file)


# -- comma- and tab-separated values -----------------------------------------------------------------------------------

_LONGEST_CELL = 1 << 28


def _read_table(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a CSV or TSV file whose first line has the names of the columns; all values are text."""
    # The limit is one for the whole process; the default of 131,072 is less than a long document.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_CELL))
    with _open(file) as data, io.TextIOWrapper(data, "utf-8-sig", newline="") as text:
        reader = csv.reader(text, delimiter="\t" if format_suffix(file) == ".tsv" else ",", strict=True)
        try:
            names = _column_names(file, next(reader, []))
            for cells in reader:
                if cells:
                    yield f"line {reader.line_num}", _table_row(names, cells)
        except csv.Error as error:
            raise InputError(
                f"{file}, line {reader.line_num}: not valid {_TABLES[format_suffix(file)]}: {error}"
            ) from error
        except UnicodeDecodeError as error:
            raise InputError(f"{file}, after line {reader.line_num}: not UTF-8 text: {error}") from error


_TABLES = {".csv": "comma-separated values", ".tsv": "tab-separated values"}


def _column_names(file: Path, names: list[str]) -> list[str]:
    names = [name.strip() for name in names]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if not names or not all(names) or doubled:
        found = f"{doubled[0]!r} twice" if doubled else f"{', '.join(map(repr, names)) or 'nothing'}"
        raise InputError(f"{file}: the first line must have the names of the columns, found {found}")
    return names


def _table_row(names: list[str], cells: list[str]) -> dict[str, str] | InputError:
    if len(cells) != len(names):
        return InputError(f"{len(cells)} values, but {len(names)} columns: {', '.join(names)}")
    return dict(zip(names, cells, strict=True))


def _table_schema(file: Path, columns: Sequence[str] | None) -> pa.Schema:
    first = next(_read_table(file), None)
    if first is None or isinstance(first[1], InputError):
        return _json_schema(file, columns)
    return pa.schema([(name, pa.string()) for name in first[1]])


# -- text --------------------------------------------------------------------------------------------------------------


def _text_schema(file: Path, columns: Sequence[str] | None) -> pa.Schema:
    return pa.schema([("text", pa.string())])


def _read_text(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        # As in Python's text files, line ends become "\n".
        yield "", {"text": _read(file).decode().replace("\r\n", "\n").replace("\r", "\n")}
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text: {error}") from error


@contextmanager
def _open_parquet(file: Path) -> Iterator[Any]:
    try:
        with open_parquet(str(file)) as parquet:
            check_names(parquet.schema_arrow, set(parquet.schema_arrow.names), file)
            yield parquet
    except (CorruptDataError, pa.ArrowException) as error:
        raise InputError(f"{file}: not a Parquet file, or damaged: {error}") from error


def _count_parquet(file: Path) -> int:
    with _open_parquet(file) as parquet:
        return int(parquet.metadata.num_rows)


def _parquet_columns(parquet: Any) -> list[str]:
    return [name for name in parquet.schema_arrow.names if name not in TEACHER_COLUMNS]


def _parquet_schema(file: Path, columns: Sequence[str] | None) -> pa.Schema:
    with _open_parquet(file) as parquet:
        return pa.schema([parquet.schema_arrow.field(name) for name in _parquet_columns(parquet)])


class _Table:
    """Random access to the rows of a Parquet file, held in memory."""

    def __init__(self, file: Path) -> None:
        with _open_parquet(file) as parquet:
            self._table = validated(parquet.read(columns=_parquet_columns(parquet)), file)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        return f"row {index}", next(arrow_rows(self._table.slice(index, 1)))


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    with _open_parquet(file) as parquet:
        index = 0
        for batch in parquet.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=_parquet_columns(parquet)):
            for row in arrow_rows(validated(batch, f"{file}, rows from {index}")):
                yield f"row {index}", row
                index += 1


_ROWS_OF_TEXT = _Format(
    lambda file: sum(1 for _ in _read_table(file)), _read_table, lambda file: list(_read_table(file)), _table_schema
)
_LINES = _Format(_count_lines, _read_lines, _load_lines, _json_schema)
FORMATS = {
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".json": _Format(_count_json, _read_json, _load_json, _json_schema),
    ".csv": _ROWS_OF_TEXT,
    ".tsv": _ROWS_OF_TEXT,
    ".txt": _Format(lambda file: 1, _read_text, lambda file: list(_read_text(file)), _text_schema),
    ".parquet": _Format(_count_parquet, _read_parquet, _Table, _parquet_schema),
}


def file_format(file: Path) -> _Format:
    """Return the format that a file's name says.

    Raises:
        ConfigError: files of this name are not read.
    """
    suffix = format_suffix(file)
    if suffix not in FORMATS:
        raise ConfigError(f"{file}: expected a file of {SUFFIXES}, found {file.suffix or 'no suffix'!r}")
    return FORMATS[suffix]

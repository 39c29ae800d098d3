"""How much memory a Parquet file takes when it is read, from its footer alone.

Encodings of repeated values make this independent of the file's size: 3 kB can hold a billion equal numbers. pyarrow
gives the counts, too, but ends the process if a damaged footer contradicts its schema, so the footer is parsed here.
It is one structure in Thrift's compact protocol (https://parquet.apache.org/docs/file-format/metadata/).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Chunk", "read_footer"]

_ROW_GROUPS, _COLUMNS, _CHUNK = 4, 1, 3
_TYPE, _NUM_VALUES, _DECODED_BYTES, _STORED_BYTES = 1, 5, 6, 7
"""Field numbers of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData."""

_WIDTHS = {0: 1, 1: 4, 3: 12, 4: 4}
"""Bytes per value by physical type: BOOLEAN, INT32, INT96, FLOAT; 8 for the others (of text, this is its offset)."""

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_DEEPEST = 16


@dataclass(frozen=True)
class Chunk:
    """A column in a row group: its bytes in the file, and at least in memory."""

    stored: int
    decoded: int


def read_footer(data: bytes) -> list[list[Chunk]]:
    """Return the columns of each row group.

    Args:
        data: the footer, without its length and the magic number that follow it.

    Raises:
        ValueError: it is not such a structure.
    """
    content = _Reader(data).structure(0)
    try:
        return [[_chunk(column[_CHUNK]) for column in group[_COLUMNS]] for group in content[_ROW_GROUPS]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no such field in the footer: {error}") from error


def _chunk(fields: dict[int, Any]) -> Chunk:
    width = _WIDTHS.get(fields[_TYPE], 8)
    return Chunk(fields[_STORED_BYTES], max(fields[_DECODED_BYTES], fields[_NUM_VALUES] * width))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def structure(self, depth: int) -> dict[int, Any]:
        """The fields of a structure by their numbers."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            kind, step = head & 15, head >> 4
            number = number + step if step else self._integer()
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _DEEPEST:
            raise ValueError(f"structures more than {_DEEPEST} levels deep")
        if kind in _INTEGERS:
            return self._integer()
        if kind == _BINARY:
            return self._skip(self._varint())
        if kind == _STRUCT:
            return self.structure(depth + 1)
        if kind in (_LIST, _SET):
            head = self._byte()
            count = self._varint() if head >> 4 == 15 else head >> 4
            if count > len(self._data) - self._at:
                raise ValueError(f"a list of {count} entries in {len(self._data) - self._at} bytes")
            return [self._value(head & 15, depth + 1) for _ in range(count)]
        if kind == _DOUBLE:
            return self._skip(8)
        if kind in (_TRUE, _FALSE, _BYTE):
            return self._byte()
        raise ValueError(f"unknown type {kind} in the footer")

    def _skip(self, count: int) -> None:
        self._at += count

    def _byte(self) -> int:
        self._at += 1
        if self._at > len(self._data):
            raise ValueError("the footer ends within a field")
        return self._data[self._at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("an integer of more than 64 bits in the footer")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

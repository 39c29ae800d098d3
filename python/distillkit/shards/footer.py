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
_TYPE, _ENCODINGS, _NUM_VALUES, _UNCOMPRESSED, _COMPRESSED, _DICTIONARY = 1, 2, 5, 6, 7, 11
"""Field numbers of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData."""

_WIDTHS = {0: 1, 1: 4, 3: 12, 4: 4}
"""Bytes per value by physical type: BOOLEAN, INT32, INT96, FLOAT; 8 for the others (of text, this is its offset)."""
_ENCODING_NAMES = {
    **{0: "PLAIN", 2: "PLAIN_DICTIONARY", 3: "RLE", 4: "BIT_PACKED", 5: "DELTA_BINARY_PACKED"},
    **{6: "DELTA_LENGTH_BYTE_ARRAY", 7: "DELTA_BYTE_ARRAY", 8: "RLE_DICTIONARY", 9: "BYTE_STREAM_SPLIT"},
}

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
_INTEGERS = (4, 5, 6)
_DEEPEST = 16


@dataclass(frozen=True)
class Chunk:
    """A column in a row group, with the names of `pyarrow.parquet.ColumnChunkMetaData`.

    Attributes:
        width: bytes of a value in memory, at least.
    """

    total_compressed_size: int
    total_uncompressed_size: int
    num_values: int
    width: int
    encodings: tuple[str, ...]
    has_dictionary_page: bool

    @property
    def decoded(self) -> int:
        """Bytes in memory, at least."""
        return max(self.total_uncompressed_size, self.num_values * self.width)


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
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no such field in the footer: {error}") from error


def _chunk(fields: dict[int, Any]) -> Chunk:
    compressed, uncompressed, values = (fields[name] for name in (_COMPRESSED, _UNCOMPRESSED, _NUM_VALUES))
    if not all(isinstance(size, int) and size >= 0 for size in (compressed, uncompressed, values)):
        raise ValueError(f"a column of {values} values in {compressed} and {uncompressed} bytes")
    encodings = tuple(_ENCODING_NAMES.get(encoding, str(encoding)) for encoding in fields[_ENCODINGS])
    width = _WIDTHS.get(fields[_TYPE], 8)
    return Chunk(compressed, uncompressed, values, width, encodings, _DICTIONARY in fields)


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

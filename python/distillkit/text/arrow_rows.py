"""Rows of Arrow tables as they would be in JSON: without what only the tables' schema put there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from distillkit.errors import InputError

__all__ = ["arrow_rows", "stored_type", "stored_value"]

_Convert = Callable[[Any], Any]


def stored_type(kind: pa.DataType) -> pa.DataType:
    """Return a type without columns of JSON, which are stored as their text; every release of PyArrow reads that."""
    if isinstance(kind, pa.BaseExtensionType):
        return stored_type(kind.storage_type)
    if pa.types.is_struct(kind):
        fields = (kind.field(index) for index in range(kind.num_fields))
        return pa.struct([pa.field(field.name, stored_type(field.type)) for field in fields])
    if pa.types.is_map(kind):
        return pa.map_(kind.key_type, stored_type(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(stored_type(kind.value_type))
    return kind


def stored_value(value: Any, kind: pa.DataType) -> Any:
    """Return a row's value for a column of a `stored_type`: the reverse of `arrow_rows`."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        fields = (kind.field(index) for index in range(kind.num_fields))
        return {field.name: stored_value(value.get(field.name), field.type) for field in fields}
    if pa.types.is_map(kind):
        return [(name, stored_value(item, kind.item_type)) for name, item in value.items()]
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [stored_value(item, kind.value_type) for item in value]
    if pa.types.is_string(kind) and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return value


def arrow_rows(table: pa.Table | pa.RecordBatch) -> Iterator[dict[str, Any] | InputError]:
    """Yield a table's rows; instead of one in which a column of JSON has other text, an error that names the column.

    All values of a column have the same keys in a table; those that a row did not have are null, and are left out
    again, in structures of every depth. Nulls in lists, maps and JSON were given, and stay.

    Args:
        table: its values are valid.
    """
    converts = {field.name: convert for field in table.schema if (convert := _converter(field)) is not None}
    for row in table.to_pylist():
        try:
            for name, convert in converts.items():
                if row[name] is not None:
                    row[name] = convert(row[name])
        except (ValueError, RecursionError) as error:
            yield InputError(f"{name} has the type JSON, but is not JSON: {error}")
            continue
        yield row


def _converter(field: pa.Field) -> _Convert | None:
    """Return what makes the JSON value of a column's values; None if they are that already."""
    # Older releases of PyArrow do not know the type, and keep its name beside the column.
    if (field.metadata or {}).get(b"ARROW:extension:name") == b"arrow.json":
        return json.loads
    return _of_type(field.type)


def _of_type(kind: pa.DataType) -> _Convert | None:
    if isinstance(kind, pa.BaseExtensionType):
        return json.loads if kind.extension_name == "arrow.json" else _of_type(kind.storage_type)
    if pa.types.is_struct(kind):
        return _of_struct({kind.field(index).name: _converter(kind.field(index)) for index in range(kind.num_fields)})
    if pa.types.is_map(kind):
        return _of_map(_converter(kind.item_field))
    if pa.types.is_dictionary(kind):
        return _of_type(kind.value_type)
    item = getattr(kind, "value_field", None)
    return None if item is None else _of_list(_converter(item))


def _of_struct(converts: dict[str, _Convert | None]) -> _Convert:
    def convert(value: dict[str, Any]) -> dict[str, Any]:
        given = ((name, each, value[name]) for name, each in converts.items() if value[name] is not None)
        return {name: item if each is None else each(item) for name, each, item in given}

    return convert


def _of_map(convert_item: _Convert | None) -> _Convert:
    def convert(value: Any) -> dict[Any, Any]:
        return {
            name: item if convert_item is None or item is None else convert_item(item)
            for name, item in dict(value).items()
        }

    return convert


def _of_list(convert_item: _Convert | None) -> _Convert | None:
    if convert_item is None:
        return None

    def convert(value: Any) -> list[Any]:
        return [None if item is None else convert_item(item) for item in value]

    return convert

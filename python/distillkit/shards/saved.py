"""Folders that `save_to_disk` of the datasets library wrote: their splits and files, by plain names inside the folder.

`state.json` and `dataset_dict.json` come with the data, so a name in them must not lead anywhere else.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from distillkit.errors import CorruptDataError, InputError
from distillkit.shards.json_text import parse_json
from distillkit.shards.storage import locate, map_source, reading

__all__ = ["check_saved", "check_uncompressed", "saved_files", "saved_splits"]

_MESSAGE_HEADER, _DICTIONARY_DATA, _BATCH_COMPRESSION = 2, 1, 3
"""Fields of Arrow's Message, DictionaryBatch and RecordBatch."""

SPLITS, STATE = "dataset_dict.json", "state.json"


def saved_splits(folder: str) -> list[str]:
    """Return the names of the splits in a folder (a path or an fsspec URL); empty if it has none.

    Raises:
        CorruptDataError: `dataset_dict.json` cannot be read, or a name leads out of the folder.
    """
    content, where = _read(folder, SPLITS)
    return [] if content is None else [_plain(name, where) for name in _list(content, "splits", where)]


def saved_files(folder: str) -> list[str] | None:
    """Return the names of a saved dataset's files, in order; None if `save_to_disk` did not write the folder.

    Raises:
        InputError: the dataset was saved with an indices mapping.
        CorruptDataError: `state.json` cannot be read, or a name leads out of the folder.
    """
    state, where = _read(folder, STATE)
    if state is None:
        return None
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise InputError(f"{folder}: was saved with an indices mapping; call `flatten_indices()` before saving")
    names = []
    for entry in _list(state, "_data_files", where):
        name = _plain(entry.get("filename") if isinstance(entry, Mapping) else None, where)
        _check_inside(folder, name, where)
        names.append(name)
    return names


def check_saved(folder: str | os.PathLike[str]) -> None:
    """Check all names in a saved dataset's folder, or in the folders of its splits, before the datasets library opens
    them.

    Raises:
        InputError, CorruptDataError: as for `saved_files` and `saved_splits`.
    """
    path = str(os.fspath(folder))
    for folder in (path, *(f"{path}/{split}" for split in saved_splits(path))):
        for name in saved_files(folder) or ():
            check_uncompressed(f"{folder}/{name}")


def check_uncompressed(path: str) -> None:
    """Refuse an Arrow file with compressed values, of which a few bytes can take gigabytes. `save_to_disk` maps
    its files into memory as they are and never compresses them.

    Raises:
        CorruptDataError: values are compressed, or the file is damaged.
    """
    with reading(path), map_source(path) as file:
        if any(_is_compressed(message) for message in pa.ipc.MessageReader.open_stream(file)):
            raise CorruptDataError(
                f"{path}: an Arrow file with compressed values, expected one that save_to_disk wrote. Not read, since "
                "its size in memory cannot be bounded"
            )


def _is_compressed(message: pa.Message) -> bool:
    """Read from a message's metadata, a flatbuffer (https://github.com/apache/arrow/blob/main/format/Message.fbs),
    whether its record batch has a `compression`."""
    data = message.metadata.to_pybytes()
    kinds = {"record batch": (), "dictionary": (_DICTIONARY_DATA,)}
    if message.type not in kinds:
        return False
    table: int | None = int.from_bytes(data[:4], "little")
    for field in (_MESSAGE_HEADER, *kinds[message.type], _BATCH_COMPRESSION):
        table = None if table is None else _field(data, table, field)
    return table is not None


def _field(data: bytes, table: int, number: int) -> int | None:
    """The position of a table in a table of a flatbuffer; None if there is none."""
    start = table - int.from_bytes(data[table : table + 4], "little", signed=True)
    slot = 4 + 2 * number
    if start < 0 or slot + 2 > int.from_bytes(data[start : start + 2], "little"):
        return None
    offset = int.from_bytes(data[start + slot : start + slot + 2], "little")
    if offset == 0:
        return None
    return table + offset + int.from_bytes(data[table + offset : table + offset + 4], "little")


def _read(folder: str, name: str) -> tuple[dict[str, Any] | None, str]:
    """The content of a JSON file (None if there is no such file), and its place for messages."""
    where = f"{folder}/{name}"
    filesystem, inner = locate(where)
    if not filesystem.isfile(inner):
        return None, where
    content = parse_json(filesystem.cat_file(inner), where=where)
    if not isinstance(content, dict):
        raise CorruptDataError(f"{where}: must be an object, found {type(content).__name__}")
    return content, where


def _list(content: Mapping[str, Any], key: str, where: str) -> list[Any]:
    found = content.get(key)
    if not isinstance(found, list):
        raise CorruptDataError(f"{where}: {key} must be a list, found {type(found).__name__}")
    return found


def _plain(name: object, where: str) -> str:
    if not isinstance(name, str) or name in ("", ".", "..") or any(part in name for part in ("/", "\\", "::", "\0")):
        raise CorruptDataError(f"{where}: {name!r:.200} is not the name of a file or folder beside it: not opened")
    return name


def _check_inside(folder: str, name: str, where: str) -> None:
    """Refuse a symbolic link that leads out of the folder, except into the hub's cache, which consists of links."""
    filesystem, inner = locate(folder)
    if not isinstance(filesystem, LocalFileSystem):
        return
    root = Path(inner)
    target = (root / name).resolve()
    allowed = [
        root.resolve(),
        *(parent.parent / "blobs" for parent in root.resolve().parents if parent.name == "snapshots"),
    ]
    if not any(target.is_relative_to(place) for place in allowed):
        raise CorruptDataError(f"{where}: {name} is a symbolic link to {target}, outside the folder: not opened")

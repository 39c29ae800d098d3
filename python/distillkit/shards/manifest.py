"""`manifest.json`: the index of a dataset, written after all shards."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import xxhash

from distillkit.codec.fidelity import FidelityStats
from distillkit.errors import CorruptDataError, UnsupportedVersionError
from distillkit.shards.header import Header, canonical_json
from distillkit.shards.storage import Folder

__all__ = ["MANIFEST", "Manifest", "ShardInfo", "read_manifest"]

MANIFEST = "manifest.json"
FORMAT = "distillkit-dataset"
VERSION = 1


@dataclass(frozen=True)
class ShardInfo:
    """One file of a dataset.

    Attributes:
        file: its name in the folder.
        documents, tokens, rows: number of each in the file.
        bytes: file size.
        xxh3_128: hash of the file in hexadecimal; "" if it was not computed (published files).
    """

    file: str
    documents: int
    tokens: int
    rows: int
    bytes: int
    xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """The index of a dataset.

    Attributes:
        header: the dataset's header, with fidelity merged over its shards.
        shards: its shards in order.
        capture: for a captured dataset, its skipped documents and summary; otherwise None.
    """

    header: Header
    shards: tuple[ShardInfo, ...]
    capture: Mapping[str, Any] | None = None

    def write(self, folder: Folder) -> None:
        """Writes `manifest.json` atomically."""
        content: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "header": self.header.to_dict(),
            "shards": [asdict(shard) for shard in self.shards],
        }
        if self.capture is not None:
            content["capture"] = self.capture
        content["xxh3"] = _content_hash(content)
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        folder.write(MANIFEST, text.encode())


def read_manifest(folder: str | os.PathLike[str]) -> Manifest | None:
    """Reads the manifest in a dataset's folder (a path or an fsspec URL); None if there is no manifest.

    Raises:
        CorruptDataError: the manifest is damaged.
        UnsupportedVersionError: its version is newer than this release supports.

    Example:
        >>> [(shard.file, shard.documents) for shard in read_manifest("captured").shards]
        [('data-00000.parquet', 3)]
        >>> read_manifest("elsewhere") is None
        True
    """
    where = f"{os.fspath(folder).rstrip('/')}/{MANIFEST}"
    filesystem, path = fsspec.core.url_to_fs(where)
    if not filesystem.exists(path):
        return None
    try:
        content = json.loads(filesystem.cat_file(path))
    except ValueError as error:
        raise CorruptDataError(f"{where}: not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CorruptDataError(f"{where}: not a distillkit manifest")
    if not isinstance(content.get("version"), int) or content["version"] > VERSION:
        raise UnsupportedVersionError(
            f"{where}: manifest version {content.get('version')} is newer than {VERSION}, the latest that this "
            "release reads; update distillkit"
        )
    if content.get("xxh3") != _content_hash(content):
        raise CorruptDataError(f"{where}: its hash is {_content_hash(content)}, expected {content.get('xxh3')}")
    header = Header.from_dict(content.get("header"), where=where)
    try:
        shards = tuple(ShardInfo(**shard) for shard in content["shards"])
    except (KeyError, TypeError) as error:
        raise CorruptDataError(f"{where}: invalid list of shards: {error}") from error
    return Manifest(header, shards, content.get("capture"))


def _content_hash(content: Mapping[str, Any]) -> str:
    text = canonical_json({key: value for key, value in content.items() if key != "xxh3"})
    return xxhash.xxh3_128_hexdigest(text.encode())


def merged_fidelity(headers: list[Header]) -> dict[str, Any] | None:
    """Fidelity over several shards; None unless all of them recorded it."""
    total = FidelityStats()
    for header in headers:
        if header.fidelity is None:
            return None
        total.merge(FidelityStats.from_dict(header.fidelity))
    return total.to_dict()

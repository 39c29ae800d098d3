"""`manifest.json`: the index of a dataset, written after all shards."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distillkit.codec.fidelity import FidelityStats
from distillkit.errors import CorruptDataError, InputError, UnsupportedVersionError
from distillkit.shards.header import Header
from distillkit.shards.json_text import json_hash, parse_json
from distillkit.shards.storage import Folder

__all__ = ["MANIFEST", "Manifest", "ShardInfo", "is_shard_name", "read_manifest", "shard_name"]

MANIFEST = "manifest.json"
FORMAT = "distillkit-dataset"
VERSION = 2
_SHARD_NAME = re.compile(r"data-(\d{5,})\.parquet")


def shard_name(number: int) -> str:
    """The file name of a dataset's shard, by its number."""
    return f"data-{number:05}.parquet"


def is_shard_name(name: str) -> bool:
    """Whether a file name is that of a dataset's shard."""
    return _SHARD_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class ShardInfo:
    """One file of a dataset.

    Attributes:
        file: its name in the folder.
        documents, tokens, rows: number of each in the file.
        bytes: file size.
        xxh3_128: hash of the file in hexadecimal; "" if it was not computed (published files).
        groups_xxh3: hash of the digests of its row groups, which are in its footer, so that opening a dataset finds
            shards that were exchanged or doubled; "" for published files and in manifests of version 1.
    """

    file: str
    documents: int
    tokens: int
    rows: int
    bytes: int
    xxh3_128: str
    groups_xxh3: str = ""

    @staticmethod
    def from_dict(entry: Any) -> ShardInfo:
        """The info that `asdict` returned `entry` for.

        Raises:
            InputError: a field is missing, unknown or of the wrong type, or `file` is not the name of a shard.
        """
        if not isinstance(entry, Mapping):
            raise InputError(f"{entry!r:.200} is not a shard's entry")
        texts, numbers = ("file", "xxh3_128"), ("documents", "tokens", "rows", "bytes")
        odd = sorted(set(entry) - {"groups_xxh3"} ^ {*texts, *numbers})
        if odd:
            raise InputError(f"the fields {', '.join(map(str, odd))} are missing or unknown")
        for key in numbers:
            if type(entry[key]) is not int or entry[key] < 0:
                raise InputError(f"{key} is {entry[key]!r:.200}, expected a whole number")
        for key in (*texts, "groups_xxh3"):
            if not isinstance(entry.get(key, ""), str):
                raise InputError(f"{key} is {entry[key]!r:.200}, expected text")
        if not is_shard_name(entry["file"]):
            raise InputError(f"file is {entry['file']!r:.200}, expected a name such as {shard_name(0)}")
        return ShardInfo(**entry)


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
        content["xxh3"] = json_hash(content)
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
    place = Folder(folder)
    data, where = place.read(MANIFEST), place.of(MANIFEST)
    if data is None:
        return None
    content = parse_json(data, where=where)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CorruptDataError(f"{where}: not a distillkit manifest")
    version = content.get("version")
    if type(version) is not int or version < 1:
        raise CorruptDataError(f"{where}: the manifest's version is {version!r:.200}, expected 1 … {VERSION}")
    if version > VERSION:
        raise UnsupportedVersionError(
            f"{where}: manifest version {version} is newer than {VERSION}, the latest that this release reads; "
            "update distillkit"
        )
    expected = content.pop("xxh3", None)
    if expected != json_hash(content):
        raise CorruptDataError(f"{where}: its hash is {json_hash(content)}, expected {expected!r:.200}")
    header, capture = Header.from_dict(content.get("header"), where=where), content.get("capture")
    if capture is not None and not _is_capture(capture):
        raise CorruptDataError(f"{where}: capture is {capture!r:.200}, expected what FORMAT.md says")
    return Manifest(header, _shards(content.get("shards"), where, bound=version > 1), capture)


def _is_capture(value: Any) -> bool:
    """Whether a value has the shape of `capture`; `ShardSummary` checks its summary."""
    if not isinstance(value, dict):
        return False
    counts, skipped = value.get("passed_over", {}), value.get("skipped", [])
    return (
        isinstance(counts, dict)
        and all(type(count) is int for count in counts.values())
        and isinstance(skipped, list)
        and all(isinstance(entry, list) and [type(part) for part in entry] == [str, str] for entry in skipped)
        and isinstance(value.get("summary", {}), dict)
    )


def _shards(entries: Any, where: str, *, bound: bool) -> tuple[ShardInfo, ...]:
    """The shards that a manifest lists.

    Raises:
        CorruptDataError: an entry is malformed, a shard is listed twice, or one has no `groups_xxh3` if it must.
    """
    if not isinstance(entries, list):
        raise CorruptDataError(f"{where}: shards is {entries!r:.200}, expected a list")
    shards = []
    for number, entry in enumerate(entries):
        try:
            shards.append(ShardInfo.from_dict(entry))
        except InputError as error:
            raise CorruptDataError(f"{where}: shards[{number}]: {error}") from error
        if bound and not shards[-1].groups_xxh3:
            raise CorruptDataError(f"{where}: shards[{number}]: groups_xxh3 is missing")
    if len({shard.file for shard in shards}) < len(shards):
        raise CorruptDataError(f"{where}: a shard is listed twice")
    return tuple(shards)


def merged_fidelity(headers: list[Header]) -> dict[str, Any] | None:
    """Fidelity over several shards; None unless all of them recorded it."""
    total = FidelityStats()
    for header in headers:
        if header.fidelity is None:
            return None
        total.merge(FidelityStats.from_dict(header.fidelity))
    return total.to_dict()

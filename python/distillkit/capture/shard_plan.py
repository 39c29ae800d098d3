"""The plan of a capture, written before the teacher is loaded: which documents are in which shard.

It is kept in the folder `.capture` of the output until the dataset is complete:

- `plan.json`: the shards' header (without the teacher), how many documents and tokens each shard has, and what was left
  out;
- `documents-00000.parquet`, …: the tokenised documents of each shard;
- `data-00000.json`, …: a receipt for each completed shard.

Workers therefore do not need the source, and the same documents are in the same shards however the shards are
distributed and however often a run is interrupted.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from distillkit.capture.summary import ShardSummary
from distillkit.errors import CorruptDataError, InputError, MismatchError, UnsupportedVersionError
from distillkit.shards import Header, ShardInfo
from distillkit.shards.header import canonical_json
from distillkit.shards.storage import Folder, reading, writing
from distillkit.shards.writer import kept_array, shard_name
from distillkit.types import TokenDocument

__all__ = ["FOLDER", "PlannedShard", "ShardPlan", "ShardReceipt", "make_plan", "read_plan"]

FOLDER = ".capture"
_PLAN = "plan.json"
_FORMAT, _VERSION = "distillkit-capture", 1


@dataclass(frozen=True)
class PlannedShard:
    """Number of documents and tokens planned for a shard, including documents that will be skipped."""

    documents: int
    tokens: int


@dataclass(frozen=True)
class ShardReceipt:
    """Record of a completed shard.

    Attributes:
        info: the shard's file.
        header: the file's header, with its fidelity.
        summary: statistics of its rows.
        skipped: (source, reason) of each document whose distributions could not be computed or stored.
    """

    info: ShardInfo
    header: Header
    summary: ShardSummary
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class ShardPlan:
    """Which documents are in which shard.

    Attributes:
        folder: the dataset's folder.
        header: header of the shards, without the teacher.
        shards: the planned shards, in order.
        counts: number of source rows, and of rows and documents left out, by reason.
        kept: schema of the source columns copied to the documents.
        source: JSON-able value that changes if the source's content changes.
    """

    folder: Folder
    header: Header
    shards: tuple[PlannedShard, ...]
    counts: Mapping[str, int]
    kept: pa.Schema
    source: Any

    @property
    def documents(self) -> int:
        """Total number of documents."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return sum(shard.tokens for shard in self.shards)

    def read(self, number: int) -> list[TokenDocument]:
        """The documents of a shard.

        Raises:
            CorruptDataError: the file is missing or damaged.
        """
        name = f"documents-{number:05}.parquet"
        place = self._inside.of(name)
        data = self._inside.read(name)
        if data is None:
            raise CorruptDataError(f"{place} is missing: remove {self._inside} to plan the capture again")
        with reading(place):
            table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        kept = [table.column(name).to_pylist() for name in self.kept.names]
        return [
            TokenDocument(
                np.asarray(ids, dtype=np.int32),
                source,
                loss_mask=None if mask is None else np.asarray(mask, dtype=bool),
                columns=dict(zip(self.kept.names, values, strict=True)) if kept else None,
            )
            for ids, mask, source, *values in zip(
                *(table.column(name).to_pylist() for name in ("input_ids", "loss_mask", "source")), *kept, strict=True
            )
        ]

    def receipts(self) -> dict[int, ShardReceipt]:
        """The receipts of completed shards, by number.

        Raises:
            CorruptDataError: a receipt is damaged, or its shard is missing or has another size.
        """
        there = {*self._inside.names()}
        names = {number: _receipt_name(number) for number in range(len(self.shards))}
        return {number: self._receipt(number) for number, name in names.items() if name in there}

    def is_done(self, number: int) -> bool:
        """Whether a shard is complete."""
        return self._inside.size(_receipt_name(number)) is not None

    def _receipt(self, number: int) -> ShardReceipt:
        place = self._inside.of(_receipt_name(number))
        content = _read_json(self._inside, _receipt_name(number))
        try:
            receipt = ShardReceipt(
                ShardInfo(**content["info"]),
                Header.from_dict(content["header"], where=place),
                ShardSummary.from_dict(content["summary"]),
                tuple((source, reason) for source, reason in content["skipped"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CorruptDataError(f"{place} is not a shard's receipt: {error!r}") from error
        found = self.folder.size(receipt.info.file)
        if found != receipt.info.bytes:
            raise CorruptDataError(
                f"{self.folder.of(receipt.info.file)} has {found or 'no'} bytes, expected {receipt.info.bytes}: it "
                f"was modified after it was captured. Remove {place} to capture it again"
            )
        return receipt

    def write_receipt(self, number: int, receipt: ShardReceipt) -> None:
        """Record that a shard is complete."""
        content = {
            "info": asdict(receipt.info),
            "header": receipt.header.to_dict(),
            "summary": receipt.summary.to_dict(),
            "skipped": receipt.skipped,
        }
        _write_json(self._inside, _receipt_name(number), content)

    def remove(self) -> None:
        """Remove the plan and its receipts."""
        self._inside.remove_all()

    def check_same(self, header: Header, source: Any) -> None:
        """Refuse to resume with other settings or other text.

        Raises:
            MismatchError: names what differs and both values.
        """
        header.check_same(self.header, where=self._inside.of(_PLAN))
        if source != self.source:
            raise MismatchError(
                f"{self._inside.of(_PLAN)}: the dataset's content is {self.source}, expected {source}: the dataset "
                "has changed since this capture began"
            )

    @property
    def _inside(self) -> Folder:
        return self.folder.inner(FOLDER)


def make_plan(
    folder: Folder,
    header: Header,
    documents: Iterable[TokenDocument],
    shard_tokens: int,
    *,
    source: Any,
    kept: pa.Schema,
    counts: Callable[[], Mapping[str, int]],
) -> ShardPlan:
    """Write a plan.

    Args:
        folder: the dataset's folder.
        header: header of the shards, without the teacher.
        documents: all documents, in order.
        shard_tokens: a shard ends once it has this many tokens.
        source: JSON-able value that changes if the source's content changes.
        kept: schema of the source columns copied to the documents.
        counts: returns what was left out; called after `documents` are exhausted.

    Raises:
        OSError: the plan cannot be written.
    """
    inside = folder.inner(FOLDER)
    inside.make()
    inside.remove_leftovers()
    shards = []
    for number, members in enumerate(_shards(documents, shard_tokens)):
        _write_documents(inside, f"documents-{number:05}.parquet", members, kept)
        shards.append(PlannedShard(len(members), sum(len(document.input_ids) for document in members)))
    plan = ShardPlan(folder, header, tuple(shards), dict(counts()), kept, source)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "header": header.to_dict(),
        "shards": [asdict(shard) for shard in shards],
        "counts": plan.counts,
        "kept": base64.b64encode(kept.serialize().to_pybytes()).decode(),
        "source": source,
    }
    # Written last, so that a plan is only recognised once it is complete.
    _write_json(inside, _PLAN, content)
    return plan


def read_plan(folder: Folder) -> ShardPlan | None:
    """The plan in a dataset's folder, or None.

    Raises:
        CorruptDataError: the plan is damaged.
        UnsupportedVersionError: the plan has a newer version.
    """
    inside = folder.inner(FOLDER)
    if inside.size(_PLAN) is None:
        return None
    content, place = _read_json(inside, _PLAN), inside.of(_PLAN)
    if content.get("format") != _FORMAT or not isinstance(content.get("version"), int):
        raise CorruptDataError(f"{place} is not a capture's plan")
    if content["version"] > _VERSION:
        raise UnsupportedVersionError(
            f"{place}: version {content['version']}; this release reads up to {_VERSION}: update distillkit"
        )
    try:
        return ShardPlan(
            folder,
            Header.from_dict(content["header"], where=place),
            tuple(PlannedShard(**shard) for shard in content["shards"]),
            content["counts"],
            pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["kept"]))),
            content["source"],
        )
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise CorruptDataError(f"{place} is not a capture's plan: {error!r}") from error


def _shards(documents: Iterable[TokenDocument], shard_tokens: int) -> Iterator[list[TokenDocument]]:
    """Group consecutive documents: a shard ends once it has `shard_tokens`."""
    members: list[TokenDocument] = []
    tokens = 0
    for document in documents:
        members.append(document)
        tokens += len(document.input_ids)
        if tokens >= shard_tokens:
            yield members
            members, tokens = [], 0
    if members:
        yield members


def _write_documents(folder: Folder, name: str, documents: Sequence[TokenDocument], kept: pa.Schema) -> None:
    columns = {
        "input_ids": pa.array([document.input_ids for document in documents], pa.list_(pa.int32())),
        "loss_mask": pa.array([document.loss_mask for document in documents], pa.list_(pa.bool_())),
        "source": pa.array([document.source for document in documents], pa.string()),
    }
    table = pa.table(columns)
    for field in kept:
        try:
            values = kept_array([(document.columns or {}).get(field.name) for document in documents], field)
        except InputError as error:
            raise InputError(f"{documents[0].source} to {documents[-1].source}: {error}") from error
        table = table.append_column(field, values)
    with writing(folder.of(name)), folder.new_file(name) as file:
        pq.write_table(table, file.stream, compression="zstd", write_page_checksum=True, write_statistics=False)
        file.publish()


def _receipt_name(number: int) -> str:
    return shard_name(number).replace(".parquet", ".json")


def _write_json(folder: Folder, name: str, content: Mapping[str, Any]) -> None:
    text = canonical_json({**content, "xxh3": _hash(content)})
    folder.write(name, text.encode())


def _read_json(folder: Folder, name: str) -> dict[str, Any]:
    """Read what `_write_json` wrote.

    Raises:
        CorruptDataError: the file is not valid JSON, or was modified.
    """
    try:
        content = json.loads(folder.read(name) or b"")
    except ValueError as error:
        raise CorruptDataError(f"{folder.of(name)} is not JSON: {error}") from error
    found = content.pop("xxh3", None) if isinstance(content, dict) else None
    if found is None or found != _hash(content):
        raise CorruptDataError(f"{folder.of(name)} was modified: its hash differs. Remove it to repeat its work")
    return dict(content)


def _hash(content: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(canonical_json(content).encode())

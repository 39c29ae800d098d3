"""The plan of a capture, written before the teacher is loaded: which documents are in which shard.

It is kept in the folder `.capture` of the output until the dataset is complete (beside the locks of `shards/lock.py`):

- `plan.json`: the shards' header (without the teacher), how many documents and tokens each shard has, and what was left
  out;
- `documents-00000.parquet`, …: the tokenised documents of each shard;
- `data-00000.json`, …: a receipt for each completed shard;
- where the codec's prior is learned: the teacher's rows that it is learned from, and what came of it (`learning.py`).

Workers therefore do not need the source, and the same documents are in the same shards however the shards are
distributed and however often a run is interrupted.
"""

from __future__ import annotations

import base64
import logging
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from distillkit.capture.summary import ShardSummary
from distillkit.errors import (
    CorruptDataError,
    DistillKitError,
    InputError,
    MismatchError,
    UnsupportedVersionError,
)
from distillkit.shards import Header, ShardInfo
from distillkit.shards.json_text import canonical_json, json_hash, parse_json
from distillkit.shards.lock import CAPTURE_FOLDER
from distillkit.shards.manifest import shard_name
from distillkit.shards.reader import ShardFile
from distillkit.shards.storage import Folder, reading
from distillkit.shards.writer import kept_array, stored_schema, value_bytes
from distillkit.types import TokenDocument

__all__ = [
    "PRIOR_RECEIPT",
    "PlannedShard",
    "ShardPlan",
    "ShardReceipt",
    "make_plan",
    "read_json",
    "read_plan",
    "remove_plan",
    "rows_name",
    "write_json",
]

logger = logging.getLogger(__name__)

_PLAN = "plan.json"
PRIOR_RECEIPT = "prior.json"
_OURS = re.compile(r"plan\.json|prior\.json|documents-\d{5,}\.parquet|data-\d{5,}\.json|rows-\d{5,}\.(json|bin)")
_FORMAT, _VERSION = "distillkit-capture", 2

_DOCUMENT_SCHEMA = pa.schema(
    [
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("loss_mask", pa.list_(pa.bool_())),
        pa.field("source", pa.string()),
    ]
)
_GROUP_BYTES = 1 << 26
"""Kept columns' bytes per row group. Arrow cannot read 2 GB of a nested column at once."""
_SAMPLED_ROWS = 8192
"""Rows of a shard that a prior is learned from, if there are enough shards: few enough that they come from many parts
of the text, and enough to be scored at the teacher's full speed."""


@dataclass(frozen=True)
class PlannedShard:
    """What is planned for a shard.

    Attributes:
        documents, tokens: their number, including documents that will be skipped.
        xxh3_128: hash of the file with the documents; "" in plans of version 1, which are not checked.
    """

    documents: int
    tokens: int
    xxh3_128: str = ""


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
        sample: how many leading documents of which shards the codec's prior is learned from; empty if none is learned.
        sample_k: number of ids per row that it is learned from.
    """

    folder: Folder
    header: Header
    shards: tuple[PlannedShard, ...]
    counts: Mapping[str, int]
    kept: pa.Schema
    source: Any
    sample: Mapping[int, int] = field(default_factory=dict)
    sample_k: int = 0

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
            CorruptDataError: the file is missing, damaged, or that of other documents.
        """
        name = _documents_name(number)
        place, expected = self.inside.of(name), self.shards[number].xxh3_128
        data = self.inside.read(name, most=None)
        if data is None:
            raise CorruptDataError(f"{place} is missing: {_start_over(self.inside)}")
        found = xxhash.xxh3_128_hexdigest(data)
        if expected and found != expected:
            raise CorruptDataError(f"{place} has the hash {found}, expected {expected}: {_start_over(self.inside)}")
        with reading(place), pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as parquet:
            groups = [parquet.read_row_group(group) for group in range(parquet.num_row_groups)]
        return [document for group in groups for document in _token_documents(group, self.kept.names)]

    def receipts(self, trusted: Container[int] = ()) -> dict[int, ShardReceipt]:
        """The receipts of completed shards, by number.

        A shard is complete if its receipt is whole, is of these documents, and has the hash of the shard's file. One
        with any other receipt counts as not captured, with a warning.

        Args:
            trusted: shards of which only the size is compared: those that this run has compared or written itself.
        """
        there = {*self.inside.names()}
        numbers = [number for number in range(len(self.shards)) if _receipt_name(number) in there]
        with ThreadPoolExecutor() as pool:
            found = [*pool.map(lambda number: self._receipt(number, whole=number not in trusted), numbers)]
        return {number: receipt for number, receipt in zip(numbers, found, strict=True) if receipt is not None}

    def is_done(self, number: int) -> bool:
        """Whether a shard has a receipt."""
        return self.inside.size(_receipt_name(number)) is not None

    def remove_receipts(self, numbers: Iterable[int]) -> None:
        """Remove what receipts there are of shards that are captured again."""
        there = {*self.inside.names()}
        for name in there & {_receipt_name(number) for number in numbers}:
            self.inside.remove(name)

    def _receipt(self, number: int, *, whole: bool) -> ShardReceipt | None:
        """A shard's receipt; None if it does not fit."""
        try:
            receipt = self._read_receipt(number)
            self._check_shard(receipt.info, whole=whole)
            if not receipt.info.groups_xxh3:
                bound = ShardFile(self.folder.of(receipt.info.file)).groups_xxh3
                return replace(receipt, info=replace(receipt.info, groups_xxh3=bound))
        except DistillKitError as error:
            logger.warning("%s. The shard counts as not captured", error)
            return None
        return receipt

    def _read_receipt(self, number: int) -> ShardReceipt:
        """A shard's receipt, as it is.

        Raises:
            CorruptDataError: it is damaged, or of other documents.
        """
        place, planned = self.inside.of(_receipt_name(number)), self.shards[number]
        content = read_json(self.inside, _receipt_name(number))
        try:
            receipt = ShardReceipt(
                ShardInfo.from_dict(content["info"]),
                Header.from_dict(content["header"], where=place),
                ShardSummary.from_dict(content["summary"]),
                tuple((source, reason) for source, reason in content["skipped"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CorruptDataError(f"{place} is not a shard's receipt: {error!r}") from error
        info = receipt.info
        if (
            info.file != shard_name(number)
            or info.documents + len(receipt.skipped) != planned.documents
            or content.get("planned", planned.xxh3_128) != planned.xxh3_128
        ):
            raise CorruptDataError(
                f"{place} is the receipt of {info.file} with {info.documents} documents, which are not those planned "
                f"for {shard_name(number)}"
            )
        return receipt

    def _check_shard(self, info: ShardInfo, *, whole: bool) -> None:
        """Compares a shard's size, and its hash if `whole`, with its receipt.

        Raises:
            CorruptDataError: they differ.
        """
        place, size = self.folder.of(info.file), self.folder.size(info.file)
        if size != info.bytes:
            raise CorruptDataError(f"{place} has {size or 'no'} bytes, but its receipt says {info.bytes}")
        found = self.folder.file_hash(info.file) if whole else info.xxh3_128
        if found != info.xxh3_128:
            raise CorruptDataError(f"{place} has the hash {found}, but its receipt says {info.xxh3_128}")

    def write_receipt(self, number: int, receipt: ShardReceipt) -> None:
        """Record that a shard is complete, and remove the rows of it that were kept since the prior was learned."""
        content = {
            "info": asdict(receipt.info),
            "header": receipt.header.to_dict(),
            "summary": receipt.summary.to_dict(),
            "skipped": receipt.skipped,
            "planned": self.shards[number].xxh3_128,
        }
        write_json(self.inside, _receipt_name(number), content)
        for suffix in ("json", "bin") if number in self.sample else ():
            self.inside.remove(rows_name(number, suffix))

    def remove(self) -> None:
        """Remove the plan and its receipts."""
        remove_plan(self.folder)

    def check_same(self, header: Header, source: Any) -> None:
        """Refuse to resume with other settings or other text.

        Raises:
            MismatchError: names what differs and both values.
        """
        header.check_same(self.header, where=self.inside.of(_PLAN))
        if source != self.source:
            raise MismatchError(
                f"{self.inside.of(_PLAN)}: the dataset's content is {self.source}, expected {source}: the dataset "
                "has changed since this capture began"
            )

    @property
    def starting_over(self) -> str:
        """What to do where nothing else helps, for messages."""
        return _start_over(self.inside)

    @property
    def inside(self) -> Folder:
        """The folder with everything that is kept until the dataset is complete."""
        return self.folder.inner(CAPTURE_FOLDER)


def _start_over(inside: Folder) -> str:
    return f"remove {inside} to plan and capture everything again"


def remove_plan(folder: Folder) -> None:
    """Remove the plan of a capture from a dataset's folder, with its receipts, and nothing else."""
    folder.inner(CAPTURE_FOLDER).remove_files(lambda name: _OURS.fullmatch(name) is not None)


def make_plan(
    folder: Folder,
    header: Header,
    documents: Iterable[TokenDocument],
    shard_tokens: int,
    *,
    source: Any,
    kept: pa.Schema,
    counts: Callable[[], Mapping[str, int]],
    sampled_rows: int = 0,
    sample_k: int = 0,
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
        sampled_rows: from about how many rows, evenly spread over the text, the codec's prior is learned.
        sample_k: number of ids per row that it is learned from.

    Raises:
        OSError: the plan cannot be written.
    """
    inside = folder.inner(CAPTURE_FOLDER)
    inside.make()
    inside.remove_leftovers(lambda name: _OURS.fullmatch(name) is not None)
    shards, rows_of = [], []
    for number, members in enumerate(_shards(documents, shard_tokens)):
        written = _write_documents(inside, _documents_name(number), members, kept)
        shards.append(PlannedShard(len(members), sum(len(document.input_ids) for document in members), written))
        rows_of.append(np.cumsum([header.rows_of(len(document.input_ids)) for document in members]))
    kept = stored_schema(kept)
    sample = _sample(rows_of, sampled_rows)
    plan = ShardPlan(folder, header, tuple(shards), dict(counts()), kept, source, sample, sample_k)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "header": header.to_dict(),
        "shards": [asdict(shard) for shard in shards],
        "counts": plan.counts,
        "kept": base64.b64encode(kept.serialize().to_pybytes()).decode(),
        "source": source,
        **({"sample": {"k": sample_k, "documents": sorted(sample.items())}} if sample else {}),
    }
    # Written last, so that a plan is only recognised once it is complete.
    write_json(inside, _PLAN, content)
    return plan


def read_plan(folder: Folder) -> ShardPlan | None:
    """The plan in a dataset's folder, or None.

    Raises:
        CorruptDataError: the plan is damaged.
        UnsupportedVersionError: the plan has a newer version.
    """
    inside = folder.inner(CAPTURE_FOLDER)
    if inside.size(_PLAN) is None:
        return None
    place = inside.of(_PLAN)
    try:
        content = read_json(inside, _PLAN)
    except CorruptDataError as error:
        raise CorruptDataError(f"{error}: {_start_over(inside)}") from error
    if content.get("format") != _FORMAT or type(content.get("version")) is not int:
        raise CorruptDataError(f"{place} is not a capture's plan")
    if content["version"] > _VERSION:
        raise UnsupportedVersionError(
            f"{place}: version {content['version']}; this release reads up to {_VERSION}: update distillkit"
        )
    try:
        return ShardPlan(
            folder,
            Header.from_dict(content["header"], where=place),
            tuple(_planned(entry) for entry in content["shards"]),
            {str(name): int(count) for name, count in content["counts"].items()},
            pa.ipc.read_schema(pa.py_buffer(base64.b64decode(content["kept"]))),
            content["source"],
            *_sampled(content.get("sample"), content["shards"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OSError, pa.ArrowException) as error:
        raise CorruptDataError(f"{place} is not a capture's plan: {error!r}") from error


def _planned(entry: Mapping[str, Any]) -> PlannedShard:
    shard = PlannedShard(**entry)
    if [type(value) for value in asdict(shard).values()] != [int, int, str] or min(shard.documents, shard.tokens) < 0:
        raise ValueError(f"{entry!r:.200} is not a shard")
    return shard


def _sampled(entry: Any, shards: Sequence[Mapping[str, Any]]) -> tuple[dict[int, int], int]:
    if entry is None:
        return {}, 0
    sample, k = dict(entry["documents"]), entry["k"]
    if type(k) is not int or k < 1:
        raise ValueError(f"{k!r:.200} is not a number of ids")
    for number, documents in sample.items():
        known = type(number) is type(documents) is int and 0 <= number < len(shards)
        if not known or not 0 < documents <= shards[number]["documents"]:
            raise ValueError(f"{number!r:.200}, {documents!r:.200} are not documents of a shard")
    return sample, k


def _sample(rows_of: Sequence[npt.NDArray[np.int64]], rows: int) -> dict[int, int]:
    """Choose the leading documents of evenly spread shards that have about so many rows together.

    Args:
        rows_of: for each shard, the rows up to and including each of its documents.
        rows: 0 chooses none.
    """
    if not rows or not rows_of:
        return {}
    each = min(_SAMPLED_ROWS, math.ceil(sum(int(ends[-1]) for ends in rows_of) / len(rows_of)))
    count = min(len(rows_of), math.ceil(rows / each))
    quota = math.ceil(rows / count)
    numbers = [index * len(rows_of) // count for index in range(count)]
    return {number: min(int(np.searchsorted(rows_of[number], quota)) + 1, len(rows_of[number])) for number in numbers}


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


def _write_documents(folder: Folder, name: str, documents: Sequence[TokenDocument], kept: pa.Schema) -> str:
    """Write the documents of a shard; returns the file's hash."""
    schema = pa.schema([*_DOCUMENT_SCHEMA, *stored_schema(kept)])
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="zstd", write_page_checksum=True, write_statistics=False) as writer:
        for members in _in_groups(documents):
            writer.write_table(_document_table(members, kept, schema))
    data = sink.getvalue()
    folder.write(name, data)
    return xxhash.xxh3_128_hexdigest(data)


def _in_groups(documents: Sequence[TokenDocument]) -> Iterator[list[TokenDocument]]:
    """Divide the documents of a shard where their columns get too large for one row group."""
    group: list[TokenDocument] = []
    size = 0
    for document in documents:
        group.append(document)
        size += value_bytes(document.columns or {})
        if size >= _GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _document_table(documents: Sequence[TokenDocument], kept: pa.Schema, schema: pa.Schema) -> pa.Table:
    columns = [
        pa.array([document.input_ids for document in documents], pa.list_(pa.int32())),
        pa.array([document.loss_mask for document in documents], pa.list_(pa.bool_())),
        pa.array([document.source for document in documents], pa.string()),
    ]
    rows = [document.columns or {} for document in documents]
    try:
        columns += [kept_array([row.get(field.name) for row in rows], field) for field in kept]
    except InputError as error:
        raise InputError(f"{documents[0].source} to {documents[-1].source}: {error}") from error
    return pa.Table.from_arrays(columns, schema=schema)


def _token_documents(table: pa.Table, kept: Sequence[str]) -> Iterator[TokenDocument]:
    """The documents that `_write_documents` wrote."""
    columns = [table.column(name).to_pylist() for name in ("input_ids", "loss_mask", "source", *kept)]
    for ids, mask, source, *values in zip(*columns, strict=True):
        yield TokenDocument(
            np.asarray(ids, dtype=np.int32),
            source,
            loss_mask=None if mask is None else np.asarray(mask, dtype=bool),
            columns=dict(zip(kept, values, strict=True)) if kept else None,
        )


def _documents_name(number: int) -> str:
    return f"documents-{number:05}.parquet"


def _receipt_name(number: int) -> str:
    return shard_name(number).replace(".parquet", ".json")


def rows_name(number: int, suffix: str) -> str:
    """The name of a file with rows of a shard that the prior is learned from."""
    return f"rows-{number:05}.{suffix}"


def write_json(folder: Folder, name: str, content: Mapping[str, Any]) -> None:
    """Write a file of the plan, with its hash."""
    folder.write(name, canonical_json({**content, "xxh3": json_hash(content)}).encode())


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        CorruptDataError: the file is not valid JSON, or was modified.
    """
    place = folder.of(name)
    content = parse_json(folder.read(name) or b"", where=place)
    expected = content.pop("xxh3", None) if isinstance(content, dict) else None
    if expected is None or expected != json_hash(content):
        raise CorruptDataError(f"{place} was modified: its hash is {json_hash(content)}, expected {expected!r:.200}")
    return dict(content)

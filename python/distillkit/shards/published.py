"""Reads published DistillKit datasets directly: nested lists in Parquet files or in a `save_to_disk` folder.

Shape legend: R rows of a document, k stored ids per row.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distillkit.codec import (
    Codec,
    CodecConfig,
    CompactConfig,
    DistributionQuantizationConfig,
    SampledConfig,
    codec_config,
)
from distillkit.codec.config import CODEC_KEYS
from distillkit.configuration.urls import locate
from distillkit.configuration.yaml_file import read_yaml
from distillkit.errors import ConfigError, CorruptDataError, InputError
from distillkit.shards.header import Header, alignment, check_codec
from distillkit.shards.manifest import ShardInfo
from distillkit.shards.parquet import check_names, open_parquet, validated
from distillkit.shards.saved import check_uncompressed, saved_files, saved_splits
from distillkit.shards.storage import map_source, reading
from distillkit.shards.table import Block, Documents, check_document, document_id, int32_array, make_block
from distillkit.types import Document

__all__ = ["load_codec_config", "open_published"]

CONFIG_FILE = "compression_config.yaml"
_LAYOUTS: dict[str, tuple[str, ...]] = {
    "quantized": ("compressed_logprobs", "bytepacked_indices"),
    "legacy": ("packed_indices", "exact_values", "coeffs"),
    "plain": ("token_ids", "top_values"),
}
_LENGTH_COLUMNS = ("input_ids", "attention_mask")
_TOKEN_COLUMNS = (*_LENGTH_COLUMNS, "labels", "loss_mask")
_MASKS = ("attention_mask", "loss_mask")
_IGNORED = -100
"""The label of tokens that do not count towards the loss, as everywhere in PyTorch."""
_TEXT_FILE = re.compile(r".*\.(jsonl|ndjson|json|txt|csv|tsv|md)(\.(gz|bz2|xz|zst))?", re.IGNORECASE)
_TEXT_COLUMNS = {"text", "messages", "conversations", "prompt", "instruction"}
_CAPTURE_FIRST = "text, not a dataset of a teacher's distributions; capture it first, with `distillkit capture`"

_KNOWN_COLUMNS = (*_TOKEN_COLUMNS, *(name for columns in _LAYOUTS.values() for name in columns))
_ARROW_GROUP = 64
"""Documents of a memory-mapped Arrow file checked and converted at a time."""

_BLOCK_ROWS = 4096
"""Minimum rows in a block of documents."""

ConfigSource = CodecConfig | Mapping[str, Any] | str | os.PathLike[str] | None


def load_codec_config(config: ConfigSource) -> CodecConfig:
    """Loads a codec configuration from a YAML file or a mapping; a configuration is returned unchanged.

    Raises:
        ConfigError: `config` cannot be read, or is not a codec configuration; names the file.
    """
    content = _mapping(config)
    try:
        return codec_config(content)
    except ConfigError as error:
        if not isinstance(config, (str, os.PathLike)):
            raise
        raise ConfigError(f"{os.fspath(config)}: {error}") from error


def _mapping(config: ConfigSource) -> Any:
    if not isinstance(config, (str, os.PathLike)):
        return config
    content = read_yaml(config)
    # A training configuration has the codec configuration under `teacher`.
    teacher = content.get("teacher") if isinstance(content, Mapping) else None
    if isinstance(teacher, Mapping):
        return {key: teacher[key] for key in CODEC_KEYS if key in teacher}
    return content


def open_published(
    name: str, config: ConfigSource, split: str | None, vocab_size: int | None
) -> tuple[Header, list[_PublishedFile]]:
    """Opens the files of a published dataset and builds its header; arguments and errors as for `Dataset.open`."""
    folder, paths = _data_files(name, split)
    if not paths:
        raise InputError(f"{name}: {_without_data(name)}")
    tables = [_TableFile(path) for path in paths]
    layout = _layout(tables[0])
    if layout == "plain":
        codec = _plain_codec(tables[0], config, vocab_size, name)
    else:
        codec = _published_codec(layout, config, _config_beside(folder), name)
    rows = _alignment_of(tables, codec, layout)
    size = codec.vocab_size
    header = Header(
        codec=codec.to_dict(),
        vocab_size=size,
        head_size=size,
        alignment=alignment(rows),
        logprobs="as published",
        distillkit_version="",
    )
    return header, [_PublishedFile(table, header, codec, layout) for table in tables]


# -- finding files and codec -------------------------------------------------------------------------------------------


def _data_files(name: str, split: str | None) -> tuple[str, list[str]]:
    """The folder of a published dataset (where its configuration may be) and its data files, in order."""
    filesystem, inner = locate(name)
    if not filesystem.isdir(inner):
        if _TEXT_FILE.fullmatch(name):
            raise InputError(f"{name}: {_CAPTURE_FIRST}")
        return name.rsplit("/", 1)[0] if "/" in name else ".", [name]
    splits = saved_splits(name)
    folder = name
    if splits:
        if split is None and len(splits) > 1:
            raise InputError(f"{name}: has the splits {', '.join(splits)}; choose one with split")
        chosen = split or splits[0]
        if chosen not in splits:
            raise InputError(f"{name}: has no split {chosen!r}; its splits are {', '.join(splits)}")
        folder = f"{name}/{chosen}"
    paths = sorted((name for name in _names(folder) if name.endswith((".parquet", ".arrow"))), key=_natural)
    saved = saved_files(folder)
    if saved is not None:
        paths = saved
    elif split is not None and not splits:
        # Parquet files of a Hub dataset, such as data/train-00000-of-00002.parquet.
        hub, named = (
            [path for path in found if path.startswith(f"{split}-")] for found in (_names(f"{name}/data"), paths)
        )
        if hub and not paths:
            return name, [f"{name}/data/{path}" for path in hub]
        paths = named or paths
    return folder, [f"{folder}/{path}" for path in paths]


def _names(folder: str) -> list[str]:
    """Names of what is in a folder, sorted; empty if there is none. Unlike globs, takes the folder's name literally."""
    filesystem, inner = locate(folder)
    found = filesystem.ls(inner, detail=False) if filesystem.isdir(inner) else []
    return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in found)


def _without_data(folder: str) -> str:
    if any(_TEXT_FILE.fullmatch(name) for name in _names(folder)):
        return f"contains no Parquet or Arrow files; if it is {_CAPTURE_FIRST}"
    return "contains no Parquet or Arrow files; expected a captured or a published dataset"


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts data_2 before data_10."""
    parts = "".join(c if c.isdigit() else f" {c} " for c in name).split()
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _config_beside(folder: str) -> str | None:
    for place in (folder, folder.rsplit("/", 1)[0] if "/" in folder else "."):
        filesystem, inner = locate(f"{place}/{CONFIG_FILE}")
        if filesystem.isfile(inner):
            return f"{place}/{CONFIG_FILE}"
    return None


def _layout(table: _TableFile) -> str:
    layout = next((name for name, columns in _LAYOUTS.items() if set(columns) <= set(table.columns)), None)
    if layout is None and _TEXT_COLUMNS & set(table.columns):
        raise InputError(f"{table.path}: with the columns {', '.join(table.columns)}, this is {_CAPTURE_FIRST}")
    if layout is None or "input_ids" not in table.columns:
        expected = ", or ".join(" and ".join(columns) for columns in _LAYOUTS.values())
        encoded = {*itertools.chain.from_iterable(_LAYOUTS.values())} & set(table.columns)
        hint = "" if encoded else f". If it is {_CAPTURE_FIRST}"
        raise InputError(
            f"{table.path}: not a published layout: found the columns {', '.join(table.columns)}; expected input_ids "
            f"and {expected}{hint}"
        )
    for name, depth in (*((name, 1) for name in _TOKEN_COLUMNS), *((name, 2) for name in _LAYOUTS[layout])):
        found = table.columns.get(name)
        if found is not None and not _is_list_of_numbers(found, depth, boolean=name in _MASKS):
            raise InputError(f"{table.path}: column {name} is {found}, expected {'list of ' * depth}numbers")
    return layout


def _is_list_of_numbers(kind: pa.DataType, depth: int, *, boolean: bool = False) -> bool:
    if depth == 0:
        return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or (boolean and pa.types.is_boolean(kind)))
    nested = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(nested) and _is_list_of_numbers(kind.value_type, depth - 1, boolean=boolean)


def _published_codec(layout: str, config: ConfigSource, beside: str | None, name: str) -> Codec:
    if config is None and beside is None:
        raise ConfigError(
            f"{name}: a published dataset does not record how it was encoded, and there is no {CONFIG_FILE} next to "
            "it; pass its codec configuration"
        )
    parsed = load_codec_config(beside if config is None else config)
    if isinstance(parsed, (CompactConfig, SampledConfig)):
        raise ConfigError(
            f"{name}: published datasets are in a fixed format, but the configuration is for {parsed.format}"
        )
    codec = Codec.for_published(parsed)
    if config is not None and beside is not None:
        check_codec(codec.config, Codec(load_codec_config(beside)), name, f"the codec in {CONFIG_FILE}")
    if codec.format != layout:
        raise ConfigError(f"{name}: the columns are in {layout} format, but the configuration is for {codec.format}")
    return codec


def _plain_codec(table: _TableFile, config: ConfigSource, vocab_size: int | None, name: str) -> Codec:
    """The codec for plain top-k columns: quantized rows with every rank stored exactly, as float32."""
    content = _mapping(config)
    if isinstance(content, DistributionQuantizationConfig):
        content = content.model_dump()
    stated = content.get("d", content.get("vocab_size")) if isinstance(content, Mapping) else None
    size = vocab_size if stated is None else stated
    if not isinstance(size, int):
        raise ConfigError(
            f"{name}: plain top-k columns do not record the vocabulary size; pass vocab_size, or a configuration with d"
        )
    k = _plain_k(table)
    return Codec(DistributionQuantizationConfig(d=size, k=k, exact_k=k, residual_bins=[], delta_encoding=False))


def _plain_k(table: _TableFile) -> int:
    """Stored ids per row, according to the first document that has rows."""
    for group in range(len(table.groups)):
        column = table.load(group, ("token_ids",))["token_ids"]
        for index in range(len(column)):
            rows = _nested(column, index, f"{table.path}, token_ids")
            if len(rows):
                return int(rows.shape[1])
    raise InputError(f"{table.path}: contains no distributions")


def _alignment_of(tables: list[_TableFile], codec: Codec, layout: str) -> Any:
    """Whether documents of L tokens have L−1 or L rows, according to the first document."""
    for table in tables:
        columns = table.load(0, ("input_ids", _LAYOUTS[layout][0])) if table.groups else {"input_ids": []}
        for index in range(len(columns["input_ids"])):
            where = f"{table.path}, document {index}"
            tokens = len(_integers(columns["input_ids"], index, f"{where}: input_ids"))
            rows = len(_nested(columns[_LAYOUTS[layout][0]], index, where))
            if tokens == rows == 0:
                continue
            if tokens in (rows, rows + 1):
                return "L" if tokens == rows else "L-1"
            raise CorruptDataError(
                f"{table.path}, document {index}: {rows} rows for {tokens} tokens; expected as many rows as tokens, "
                "or one fewer"
            )
    raise InputError(f"{tables[0].path}: contains no documents with tokens")


# -- files -------------------------------------------------------------------------------------------------------------


class _TableFile:
    """A Parquet or Arrow file as groups of Arrow columns. Arrow files stay mapped; Parquet is reopened on each read."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._mapped: pa.Table | None = None
        self._metadata: Any = None
        filesystem, inner = locate(path)
        if not filesystem.isfile(inner):
            raise InputError(f"{path}: not a file")
        with reading(path):
            if path.endswith(".arrow"):
                schema, rows = self._map().schema, self._map().num_rows
                self.groups = [min(_ARROW_GROUP, rows - i) for i in range(0, rows, _ARROW_GROUP)]
            else:
                with open_parquet(path) as parquet:
                    schema, self._metadata = parquet.schema_arrow, parquet.metadata
                check_names(schema, _KNOWN_COLUMNS, path)
                self.groups = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
            self.columns: dict[str, pa.DataType] = {field.name: field.type for field in schema}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}

    def _map(self) -> pa.Table:
        if self._mapped is None:
            check_uncompressed(self.path)
            table = pa.ipc.open_stream(map_source(self.path)).read_all()
            check_names(table.schema, _KNOWN_COLUMNS, self.path)
            # Nothing else is read, so nothing else needs to be sound.
            known = [name for name in _KNOWN_COLUMNS if name in table.schema.names]
            self._mapped = validated(table.select(known) if "input_ids" in known else table, self.path)
        return self._mapped

    def load(self, group: int, wanted: Sequence[str]) -> dict[str, pa.Array]:
        """Reads a group: those of the `wanted` columns that exist."""
        names = [name for name in wanted if name in self.columns]
        with reading(self.path):
            if self._metadata is None:
                table = self._map().slice(group * _ARROW_GROUP, _ARROW_GROUP).select(names)
            else:
                with open_parquet(self.path, self._metadata) as parquet:
                    table = validated(parquet.read_row_group(group, columns=names), self.path)
            return {name: table.column(name).combine_chunks() for name in names}


class _PublishedFile:
    """One file of a published dataset."""

    def __init__(self, table: _TableFile, header: Header, codec: Codec, layout: str) -> None:
        self.path, self.header = table.path, header
        self._table, self._codec, self._layout = table, codec, layout

    @property
    def groups(self) -> Sequence[int]:
        return self._table.groups

    def load(self, group: int) -> Documents:
        first = sum(self.groups[:group])
        columns = self._table.load(group, (*_TOKEN_COLUMNS, *_LAYOUTS[self._layout]))
        return _PublishedRows(columns, self.header, self._codec, self._layout, self.path, first)

    def __iter__(self) -> Iterator[Document]:
        return itertools.chain.from_iterable(self.load(group) for group in range(len(self.groups)))

    def blocks(self) -> Iterator[Block]:
        documents: list[Document] = []
        first = rows = 0
        total = sum(self.groups)
        for number, document in enumerate(self, start=1):
            documents.append(document)
            rows += document.num_rows
            if rows >= _BLOCK_ROWS or number == total:
                data = bytearray().join(document.teacher for document in documents)
                yield make_block(documents, data, self._codec, self.path, first)
                documents, first, rows = [], number, 0

    def info(self) -> ShardInfo:
        """File name, counts and size. Reads the token columns only."""
        lengths = self.lengths().tolist()
        rows = sum(self.header.rows_of(length) for length in lengths)
        filesystem, inner = locate(self.path)
        return ShardInfo(self.path.rsplit("/", 1)[-1], len(lengths), sum(lengths), rows, filesystem.size(inner), "")

    def lengths(self) -> npt.NDArray[np.int64]:
        """(D,) int64 tokens per document, without padding."""
        lengths: list[int] = []
        for group in range(len(self.groups)):
            columns = self._table.load(group, _LENGTH_COLUMNS)
            for index in range(len(columns["input_ids"])):
                where = f"{self.path}, document {len(lengths)}"
                found = [_integers(columns[name], index, f"{where}: {name}") for name in columns]
                lengths.append(int((found[-1] != 0).sum()) if "attention_mask" in columns else len(found[0]))
        return np.array(lengths, dtype=np.int64)


class _PublishedRows(Documents):
    """The documents of one group of a published file."""

    def __init__(
        self, columns: dict[str, pa.Array], header: Header, codec: Codec, layout: str, path: str, first: int
    ) -> None:
        self._columns, self._header, self._codec = columns, header, codec
        self._layout, self._path, self._first = layout, path, first

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    def __getitem__(self, index: int) -> Document:
        where = f"{self._path}, document {self._first + index}"
        with reading(where):
            tokens = _tokens(self._columns, index, where)
            columns = {name: _nested(self._columns[name], index, f"{where}, {name}") for name in _LAYOUTS[self._layout]}
        counts = {name: len(column) for name, column in columns.items()}
        if set(counts.values()) != {self._header.rows_of(len(tokens.ids))}:
            found = ", ".join(f"{count} rows of {name}" for name, count in counts.items())
            expected = self._header.alignment["rows"]
            raise CorruptDataError(
                f"{where}: {found} for {len(tokens.ids)} tokens; the dataset has {expected} rows for L tokens"
            )
        try:
            input_ids = int32_array(tokens.ids, "input_ids")
            if self._layout == "plain":
                values = columns["top_values"].astype(np.float32)
                data = self._codec.encode(columns["token_ids"].astype(np.int64), values)
            else:
                data = self._codec.from_published(columns)
        except InputError as error:
            raise CorruptDataError(f"{where}: {error}") from error
        lengths = _segments(tokens.attention, len(input_ids), where)
        length = int(lengths.sum())
        input_ids, data = input_ids[:length], data[: self._header.rows_of(length)]
        mask = tokens.loss_mask(length, where)
        segments = lengths.astype(np.int32) if len(lengths) > 1 else None
        document_hash = document_id(input_ids, mask, segments)
        document = Document(document_hash, input_ids, data.tobytes(), len(data), mask, segments, place=where)
        check_document(document, self._header, self._codec, where)
        return document


@dataclass(frozen=True)
class _Tokens:
    """A document's token columns as stored, with padding; None if a column does not exist."""

    ids: npt.NDArray[Any]
    attention: npt.NDArray[Any] | None
    labels: npt.NDArray[Any] | None
    mask: npt.NDArray[Any] | None

    def loss_mask(self, length: int, where: str) -> npt.NDArray[np.bool_] | None:
        """Which of the first `length` tokens count towards the loss: those with a label, or those in `loss_mask`; None
        if all do.

        Raises:
            CorruptDataError: a label is another id than its token's, or labels and loss_mask contradict each other.
        """
        counted = None if self.labels is None else self._labelled(self.labels, where)[:length]
        if self.mask is not None:
            if not np.isin(self.mask, (0, 1)).all():
                raise CorruptDataError(f"{where}: loss_mask has values besides 0 and 1")
            masked = self.mask[:length].astype(np.bool_)
            # The first token is never predicted.
            differ = np.flatnonzero((masked if counted is None else counted)[1:] != masked[1:])
            if len(differ):
                raise CorruptDataError(
                    f"{where}: labels and loss_mask disagree about which tokens count, first at token {differ[0] + 1}; "
                    "remove one of the two columns"
                )
            counted = masked
        return None if counted is None or counted.all() else counted

    def _labelled(self, labels: npt.NDArray[Any], where: str) -> npt.NDArray[np.bool_]:
        counted = labels != _IGNORED
        differ = np.flatnonzero(counted & (labels != self.ids))
        if len(differ):
            at = differ[0]
            shifted = len(labels) > 2 and np.array_equal(labels[:-1][counted[:-1]], self.ids[1:][counted[:-1]])
            hint = "; the labels are shifted by one: store each beside its own token" if shifted else ""
            raise CorruptDataError(
                f"{where}: the label of token {at} is {labels[at]}, but the token is {self.ids[at]}; a label is its "
                f"token's id, or {_IGNORED} where it does not count{hint}. Correct the column, or remove it"
            )
        return np.asarray(counted)


def _tokens(columns: Mapping[str, pa.Array], index: int, where: str) -> _Tokens:
    found = {name: _integers(columns[name], index, f"{where}: {name}") for name in _TOKEN_COLUMNS if name in columns}
    ids = found["input_ids"]
    for name, values in found.items():
        if len(values) != len(ids):
            raise CorruptDataError(f"{where}: {name} has {len(values)} entries for {len(ids)} tokens")
    return _Tokens(ids, found.get("attention_mask"), found.get("labels"), found.get("loss_mask"))


def _integers(column: pa.Array, index: int, where: str) -> npt.NDArray[Any]:
    """Document `index` of a list column."""
    values = column[index].values
    if values is None or values.null_count:
        raise CorruptDataError(f"{where}: contains nulls")
    return np.asarray(values.to_numpy(zero_copy_only=False))


def _nested(column: pa.Array, index: int, where: str) -> npt.NDArray[Any]:
    """Document `index` of a list<list<…>> column as a (rows, width) array."""
    rows = column[index].values
    if rows is None or rows.null_count:
        raise CorruptDataError(f"{where}: nulls")
    if pa.types.is_fixed_size_list(rows.type):
        return np.asarray(rows.flatten().to_numpy(zero_copy_only=False)).reshape(len(rows), rows.type.list_size)
    offsets = rows.offsets.to_numpy()
    widths = np.unique(np.diff(offsets))
    if len(widths) > 1:
        raise CorruptDataError(
            f"{where}: rows of {widths.min()} and of {widths.max()} values; all rows must have the same width"
        )
    values = rows.values.slice(offsets[0], offsets[-1] - offsets[0]) if len(offsets) else rows.values
    if values.null_count:
        raise CorruptDataError(f"{where}: nulls")
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(len(rows), int(widths[0]) if len(widths) else 0)


def _segments(mask: npt.NDArray[Any] | None, tokens: int, where: str) -> npt.NDArray[np.int64]:
    """Lengths of the packed documents, without padding, from a mask that numbers them (1, 1, 2, 2, 2, 0, 0)."""
    if mask is None:
        return np.array([tokens])
    with np.errstate(invalid="ignore"):
        numbers = mask.astype(np.int64)
    if not np.array_equal(numbers, mask) or (numbers < 0).any():
        raise CorruptDataError(f"{where}: attention_mask has values that are not whole numbers from 0")
    mask, length = numbers, int((mask != 0).sum())
    if (mask[:length] == 0).any():
        raise CorruptDataError(f"{where}: attention_mask has padding before the end, which is not supported")
    starts = np.flatnonzero(np.diff(mask[:length], prepend=0))
    return np.diff(starts, append=length)

"""Published DistillKit datasets, read as they are: nested lists in Parquet files or a `save_to_disk` folder.

Shape legend: R rows of a document, k stored ids a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import yaml

from distillkit.codec import Codec, CodecConfig, DistributionQuantizationConfig, codec_config
from distillkit.errors import ConfigError, CorruptDataError, InputError
from distillkit.shards.header import Header, alignment
from distillkit.shards.manifest import ShardInfo
from distillkit.shards.reader import Dataset, check_codec, open_parquet
from distillkit.shards.table import Documents, check_document, document_id, reading
from distillkit.types import Document

__all__ = ["load_codec_config", "open_published"]

CONFIG_FILE = "compression_config.yaml"
_LAYOUTS: dict[str, tuple[str, ...]] = {
    "quantized": ("compressed_logprobs", "bytepacked_indices"),
    "legacy": ("packed_indices", "exact_values", "coeffs"),
    "plain": ("token_ids", "top_values"),
}
_ARROW_GROUP = 64
"""Documents of a memory-mapped Arrow file that are checked and converted at a time."""

ConfigSource = CodecConfig | Mapping[str, Any] | str | os.PathLike[str] | None


def load_codec_config(config: ConfigSource) -> CodecConfig:
    """A codec configuration from a YAML file, a mapping, or a configuration itself.

    Raises:
        ConfigError: it can not be read, or is none.
    """
    return codec_config(_mapping(config))


def _mapping(config: ConfigSource) -> Any:
    if not isinstance(config, (str, os.PathLike)):
        return config
    filesystem, inner = fsspec.core.url_to_fs(str(os.fspath(config)))
    try:
        content = yaml.safe_load(filesystem.cat_file(inner))
    except FileNotFoundError as error:
        raise ConfigError(f"{config}: there is no such codec configuration file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{config}: is not YAML: {error}") from error
    # A training configuration has its codec under `teacher`.
    teacher = content.get("teacher") if isinstance(content, Mapping) else None
    if isinstance(teacher, Mapping):
        return {key: teacher[key] for key in ("logprob_compressor", "legacy_logit_compression") if key in teacher}
    return content


def open_published(name: str, config: ConfigSource, split: str | None, vocab_size: int | None) -> Dataset:
    """Opens a published dataset; arguments and errors as `Dataset.open`."""
    folder, paths = _data_files(name, split)
    if not paths:
        raise InputError(f"{name}: no Parquet or Arrow files are there; expected a captured or a published dataset")
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
    return Dataset(name, "published", header, [_PublishedFile(table, header, codec, layout) for table in tables])


# -- finding things ----------------------------------------------------------------------------------------------------


def _data_files(name: str, split: str | None) -> tuple[str, list[str]]:
    """The folder of a published dataset (where its configuration may lie) and its data files in order."""
    filesystem, inner = fsspec.core.url_to_fs(name)
    if not filesystem.isdir(inner):
        return name.rsplit("/", 1)[0] if "/" in name else ".", [name]
    splits = _splits(filesystem, inner)
    folder = name
    if splits:
        if split is None and len(splits) > 1:
            raise InputError(f"{name}: has the splits {', '.join(splits)}; say which")
        chosen = split or splits[0]
        if chosen not in splits:
            raise InputError(f"{name}: has no split {chosen!r}, but {', '.join(splits)}")
        folder = f"{name}/{chosen}"
    paths = sorted(
        (
            Path(path).name
            for suffix in ("parquet", "arrow")
            for path in filesystem.glob(f"{_inner(folder)}/*.{suffix}")
        ),
        key=_natural,
    )
    if filesystem.exists(f"{_inner(folder)}/state.json"):
        state = json.loads(filesystem.cat_file(f"{_inner(folder)}/state.json"))
        if state.get("_indices_files") or state.get("_indices_data_files"):
            raise InputError(f"{folder}: holds a selection by indices; save it after `flatten_indices()`")
        paths = [entry["filename"] for entry in state["_data_files"]]
    elif split is not None and not splits:
        # Parquet files of a hub dataset: data/train-00000-of-00002.parquet.
        hub = sorted(Path(path).name for path in filesystem.glob(f"{inner}/data/{split}-*.parquet"))
        named = [path for path in paths if path.startswith(f"{split}-")]
        if hub and not paths:
            return name, [f"{name}/data/{path}" for path in hub]
        paths = named or paths
    return folder, [f"{folder}/{path}" for path in paths]


def _inner(name: str) -> str:
    path: str = fsspec.core.url_to_fs(name)[1]
    return path


def _splits(filesystem: Any, inner: str) -> list[str]:
    index = f"{inner}/dataset_dict.json"
    return list(json.loads(filesystem.cat_file(index))["splits"]) if filesystem.exists(index) else []


def _natural(name: str) -> list[tuple[int, str]]:
    """data_2 before data_10."""
    parts = "".join(c if c.isdigit() else f" {c} " for c in name).split()
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _config_beside(folder: str) -> str | None:
    for place in (folder, folder.rsplit("/", 1)[0] if "/" in folder else "."):
        filesystem, inner = fsspec.core.url_to_fs(f"{place}/{CONFIG_FILE}")
        if filesystem.exists(inner):
            return f"{place}/{CONFIG_FILE}"
    return None


def _layout(table: _TableFile) -> str:
    for layout, columns in _LAYOUTS.items():
        if set(columns) <= set(table.columns):
            if "input_ids" not in table.columns:
                raise InputError(f"{table.path}: has no input_ids; found {', '.join(table.columns)}")
            return layout
    expected = ", or ".join(" and ".join(columns) for columns in _LAYOUTS.values())
    raise InputError(
        f"{table.path}: no published layout: the columns are {', '.join(table.columns)}; expected input_ids and "
        f"{expected}"
    )


def _published_codec(layout: str, config: ConfigSource, beside: str | None, name: str) -> Codec:
    if config is None and beside is None:
        raise ConfigError(
            f"{name}: a published dataset does not say how it was encoded, and there is no {CONFIG_FILE} beside it: "
            "give its codec configuration"
        )
    codec = Codec(load_codec_config(beside if config is None else config))
    if config is not None and beside is not None:
        check_codec(codec, Codec(load_codec_config(beside)), name, f"the codec in {CONFIG_FILE}")
    if codec.format != layout:
        raise ConfigError(f"{name}: its columns are those of the {layout} format, the configuration is {codec.format}")
    return codec


def _plain_codec(table: _TableFile, config: ConfigSource, vocab_size: int | None, name: str) -> Codec:
    """Plain top-k values are a quantized row whose ranks are all exact float32 values."""
    content = _mapping(config)
    if isinstance(content, DistributionQuantizationConfig):
        content = content.model_dump()
    stated = content.get("d", content.get("vocab_size")) if isinstance(content, Mapping) else None
    size = vocab_size if stated is None else stated
    if not isinstance(size, int):
        raise ConfigError(
            f"{name}: plain top-k columns do not say the vocabulary size: give vocab_size, or a configuration with d"
        )
    first = table.load(0)
    rows = _nested(first["token_ids"], 0, f"{table.path}, document 0, token_ids")
    return Codec(
        DistributionQuantizationConfig(
            d=size, k=rows.shape[1], exact_k=rows.shape[1], residual_bins=[], delta_encoding=False
        )
    )


def _alignment_of(tables: list[_TableFile], codec: Codec, layout: str) -> Any:
    """L−1 or L rows, by the first document that tells."""
    for table in tables:
        columns = table.load(0)
        for index in range(len(columns["input_ids"])):
            tokens = len(columns["input_ids"][index].values)
            rows = len(columns[_LAYOUTS[layout][0]][index].values)
            if tokens in (rows, rows + 1):
                return "L" if tokens == rows else "L-1"
            raise CorruptDataError(
                f"{table.path}, document {index}: {rows} rows for {tokens} tokens; expected one fewer, or as many"
            )
    raise InputError(f"{tables[0].path}: holds no documents")


# -- files -------------------------------------------------------------------------------------------------------------


class _TableFile:
    """A Parquet or Arrow file as groups of Arrow columns; handles belong to the process that opened them."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._handle: tuple[int, Any] | None = None
        self._arrow = path.endswith(".arrow")
        with reading(path):
            source = self._source()
            if self._arrow:
                self.columns: list[str] = source.column_names
                self.groups = [min(_ARROW_GROUP, source.num_rows - i) for i in range(0, source.num_rows, _ARROW_GROUP)]
            else:
                self.columns = source.schema_arrow.names
                self.groups = [source.metadata.row_group(i).num_rows for i in range(source.metadata.num_row_groups)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def _source(self) -> Any:
        if self._handle is None or self._handle[0] != os.getpid():
            if self._arrow:
                source = pa.ipc.open_stream(pa.memory_map(_inner(self.path))).read_all()
            else:
                source = open_parquet(self.path)
            self._handle = (os.getpid(), source)
        return self._handle[1]

    def load(self, group: int) -> dict[str, pa.Array]:
        known = {"input_ids", "attention_mask", *(name for names in _LAYOUTS.values() for name in names)}
        wanted = [name for name in self.columns if name in known]
        with reading(self.path):
            if self._arrow:
                table = self._source().slice(group * _ARROW_GROUP, _ARROW_GROUP).select(wanted)
            else:
                table = self._source().read_row_group(group, columns=wanted)
            return {name: table.column(name).combine_chunks() for name in wanted}


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
        return _PublishedRows(self._table.load(group), self.header, self._codec, self._layout, self.path, first)

    def info(self) -> ShardInfo:
        documents = tokens = rows = 0
        for group in range(len(self.groups)):
            for document in self.load(group):
                documents, tokens = documents + 1, tokens + len(document.input_ids)
                rows += document.num_rows
        filesystem, inner = fsspec.core.url_to_fs(self.path)
        return ShardInfo(self.path.rsplit("/", 1)[-1], documents, tokens, rows, filesystem.size(inner), "")


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
            ids = _numbers(self._columns["input_ids"], index, where)
            mask = (
                _numbers(self._columns["attention_mask"], index, where) if "attention_mask" in self._columns else None
            )
            columns = {name: _nested(self._columns[name], index, f"{where}, {name}") for name in _LAYOUTS[self._layout]}
        try:
            if self._layout == "plain":
                values = columns["top_values"].astype(np.float32)
                data = self._codec.encode(columns["token_ids"].astype(np.int64), values)
            else:
                data = self._codec.from_published(columns)
        except InputError as error:
            raise CorruptDataError(f"{where}: {error}") from error
        ids, data, lengths = _trimmed(ids, data, mask, self._header, where)
        document = Document(
            document_id(ids, None, lengths), ids.astype(np.int32), data.tobytes(), len(data), None, lengths
        )
        check_document(document, self._header, self._codec, where)
        if len(data) != self._header.rows_of(len(ids)):
            expected = self._header.alignment["rows"]
            raise CorruptDataError(
                f"{where}: {len(data)} rows for {len(ids)} tokens, but the dataset has {expected} rows"
            )
        return document


def _numbers(column: pa.Array, index: int, where: str) -> npt.NDArray[np.int64]:
    values = column[index].values
    if values is None or values.null_count:
        raise CorruptDataError(f"{where}: nulls in input_ids or attention_mask")
    return np.asarray(values.to_numpy(zero_copy_only=False)).astype(np.int64)


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
        raise CorruptDataError(f"{where}: rows of {widths.min()} and of {widths.max()} values; they must all be alike")
    values = rows.values.slice(offsets[0], offsets[-1] - offsets[0]) if len(offsets) else rows.values
    if values.null_count:
        raise CorruptDataError(f"{where}: nulls")
    return np.asarray(values.to_numpy(zero_copy_only=False)).reshape(len(rows), int(widths[0]) if len(widths) else 0)


def _trimmed(
    ids: npt.NDArray[Any], data: npt.NDArray[Any], mask: npt.NDArray[Any] | None, header: Header, where: str
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[np.int32] | None]:
    """Cuts padding away, and reads packed documents' lengths off a mask that numbers them (1, 1, 2, 2, 2, 0, 0)."""
    if mask is None:
        return ids, data, None
    if len(mask) != len(ids):
        raise CorruptDataError(f"{where}: attention_mask has {len(mask)} entries for {len(ids)} tokens")
    length = int((mask != 0).sum())
    if (mask[:length] == 0).any():
        raise CorruptDataError(f"{where}: attention_mask has padding before its end, which is not supported")
    starts = np.flatnonzero(np.diff(mask[:length], prepend=0))
    lengths = np.diff(starts, append=length).astype(np.int32)
    return ids[:length], data[: header.rows_of(length)], lengths if len(lengths) > 1 else None

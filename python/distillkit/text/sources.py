"""Rows of text from local files, folders of files, `save_to_disk` folders, or hub datasets.

A source yields rows in a fixed order, each with a readable description of where it came from.
"""

from __future__ import annotations

import logging
import re
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from distillkit.configuration.urls import is_url, locate
from distillkit.errors import ConfigError, InputError
from distillkit.shards.parquet import validated
from distillkit.shards.saved import check_saved
from distillkit.text.arrow_rows import arrow_rows, stored_type
from distillkit.text.file_formats import TEACHER_COLUMNS, file_format
from distillkit.text.file_names import OTHER_DATA, SUFFIXES, is_read

__all__ = ["Row", "Source", "chosen_rows", "kept_schema", "open_hub", "open_local", "open_source"]

logger = logging.getLogger(__name__)

Row = tuple[str, Mapping[str, Any] | InputError]
"""(location of the row, for messages; its columns, or why it cannot be read)"""

# Words in file and folder names, and the split each stands for.
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
# Numbers and hashes in file names: train-00000-of-00002, data_train_v2, validation-0a1b2c3d.
_NO_WORD = re.compile(r"v?\d+|of|(?=[a-f]*\d)[a-f0-9]{8,}")
_ROWS_AT_A_TIME = 256
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"


class Source(Protocol):
    """Rows in a fixed order."""

    @property
    def description(self) -> dict[str, Any]:
        """JSON-able description that identifies the source, without local paths; stored in a capture's header."""

    @property
    def identity(self) -> Any:
        """JSON-able value that changes if the content changes."""

    @property
    def fingerprint(self) -> str:
        """Hash of the content; does not depend on where the files are or on their dates."""

    @property
    def num_rows(self) -> int:
        """Total number of rows."""

    def rows(self, order: npt.NDArray[np.int64] | None = None) -> Iterator[Row]:
        """Yield all rows, or those with the indices in `order`, in that order.

        With `order`, JSON Lines take 16 bytes of memory per row; JSON arrays, CSV, compressed files and the text of
        Parquet files are held in memory.
        """

    def schema(self, columns: Sequence[str] | None = None) -> pa.Schema:
        """Return the schema of these columns, or of all columns.

        For JSON this reads all rows.

        Raises:
            ConfigError: there is no such column, or its values have no common type.
        """


def open_source(dataset: str, *, configuration: str | None = None, split: str = "train") -> Source:
    """Open a dataset.

    Args:
        dataset: a `.jsonl`, `.ndjson`, `.json`, `.csv`, `.tsv`, `.txt` or `.parquet` file, a folder of them, a
            `save_to_disk` folder of the `datasets` library, an fsspec URL of one of these (copied into a temporary
            folder first), or the id of a hub dataset. A `.txt` file is one document. All but Parquet may be compressed
            (`.gz`, `.bz2`, `.xz`, `.zst`).
        configuration: name of the hub dataset's configuration.
        split: split of a hub dataset or of a `save_to_disk` folder; in a folder of files, those whose names begin or
            end with the split's name, or that are in a folder of that name.

    Raises:
        ConfigError: there is no such file, dataset or split; the message lists the available splits.
    """
    if is_url(dataset):
        return _fetched(dataset, split)
    path = Path(dataset).expanduser()
    if path.exists() or dataset.startswith(("/", ".", "~")) or is_read(path):
        return open_local(dataset, split=split)
    return open_hub(dataset, configuration=configuration, split=split)


def _fetched(url: str, split: str) -> Source:
    """Copy the data files at an fsspec URL into a temporary folder that lives as long as the source, and open them.

    Raises:
        ConfigError: the URL cannot be read or has no data files, or the package for this kind of URL is missing.
    """
    name = _without_secrets(url)
    folder = tempfile.TemporaryDirectory(prefix="distillkit-")
    try:
        filesystem, root = locate(url)
        top = Path(folder.name) / (_without_secrets(root.rstrip("/")).rsplit("/", 1)[-1] or "data")
        for file, local in _remote_files(filesystem, root.rstrip("/"), top):
            local.parent.mkdir(parents=True, exist_ok=True)
            filesystem.get_file(file, str(local))
    except Exception as error:  # each kind of storage raises its own
        folder.cleanup()
        reason = str(error).replace(url, name) or type(error).__name__
        raise ConfigError(f"dataset: {name} cannot be read: {reason}") from error
    if not top.exists():
        folder.cleanup()
        raise ConfigError(f"dataset: {name} contains no files of {SUFFIXES}, and no save_to_disk folder")
    source = open_local(str(top), split=split)
    weakref.finalize(source, folder.cleanup)
    return source


def _remote_files(filesystem: Any, root: str, top: Path) -> list[tuple[str, Path]]:
    """Return the data files at a URL, and where to copy them. A URL that names a file is not listed but read."""
    if is_read(Path(top.name)):
        return [(root, top)]
    found = [file for file in filesystem.find(root) if file.startswith(f"{root}/") and ".." not in file.split("/")]
    if not found:
        filesystem.info(root)  # some kinds of storage list nothing where they fail
    saved = any(file.endswith(("/state.json", "/dataset_dict.json")) for file in found)
    wanted = [file for file in found if saved or is_read(Path(file))]
    return [(file, top / file.removeprefix(f"{root}/")) for file in wanted]


def _without_secrets(url: str) -> str:
    """Return a URL without a password, or the query of a signed one."""
    url = re.sub(r"//[^/@]*@", "//", url)
    return re.sub(r"[?#].*", "", url) if url.startswith(("http://", "https://")) else url


def open_local(dataset: str, *, split: str | None = None) -> Source:
    """Open files as `open_source` does; `split` may only be None if there is a single split.

    Raises:
        ConfigError: as `open_source`.
    """
    path = Path(dataset).expanduser()
    if path.is_dir() and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        return _saved(path, split)
    if path.is_dir():
        return _Files(path, _files_of_split(path, split))
    if not path.is_file():
        raise ConfigError(f"dataset: there is no file or folder {dataset}")
    file_format(path)
    return _Files(path, [path])


def _the_split(wanted: str | None, there: Sequence[str], where: Path | str) -> str:
    """Return the requested split, or the only one.

    Raises:
        ConfigError: there is no such split, or none was requested and there are several.
    """
    if wanted is None and len(there) == 1:
        return there[0]
    if wanted is None:
        raise ConfigError(f"{where}: it has the splits {', '.join(there)}: choose one with split")
    if wanted not in there:
        raise ConfigError(f"{where}: it has no split {wanted!r}; its splits are {', '.join(there)}")
    return wanted


def chosen_rows(source: Source, numbers: npt.NDArray[np.int64]) -> Iterator[Row]:
    """Yield the rows with these indices, in the source's order."""
    chosen = set(numbers.tolist())
    return (row for number, row in enumerate(source.rows()) if number in chosen)


def kept_schema(source: Source, keep_columns: str | Sequence[str]) -> pa.Schema:
    """Return the schema of the source columns that are copied to the documents.

    Args:
        source: the source that has the columns.
        keep_columns: "none", "all", or names, as a list or separated by commas. "all" leaves out columns that captured
            datasets use themselves, such as input_ids.

    Raises:
        ConfigError: there is no such column, captured datasets use its name, or its values have no common type.
    """
    from distillkit.shards.table import SCHEMA

    names = keep_columns.split(",") if isinstance(keep_columns, str) else list(keep_columns)
    names = [name.strip() for name in names if name.strip()]
    if names in ([], ["none"]):
        return pa.schema([])
    if names == ["all"]:
        return pa.schema([field for field in source.schema() if field.name not in SCHEMA.names])
    taken = [name for name in names if name in SCHEMA.names]
    if taken:
        raise ConfigError(
            f"keep_columns: {', '.join(taken)} cannot be kept: captured datasets use the columns "
            f"{', '.join(SCHEMA.names)} themselves"
        )
    return source.schema(names)


def _of_columns(schema: pa.Schema, columns: Sequence[str] | None, where: str) -> pa.Schema:
    """Return the fields of some columns (None: all), without metadata."""
    wanted = schema.names if columns is None else list(dict.fromkeys(columns))
    missing = [name for name in wanted if name not in schema.names]
    if missing:
        raise ConfigError(
            f"keep_columns: {where} has no column {', '.join(missing)}; its columns are "
            f"{', '.join(schema.names) or 'none'}"
        )
    return pa.schema([pa.field(name, stored_type(schema.field(name).type)) for name in wanted])


# -- local files -------------------------------------------------------------------------------------------------------


class _Files:
    """Local files, sorted by name."""

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self._root = root
        self._files = files
        self._partitions = _partitions(root, files)
        self._num_rows: int | None = None

    @property
    def description(self) -> dict[str, Any]:
        return {
            "name": self._root.name,
            "files": len(self._files),
            "bytes": sum(file.stat().st_size for file in self._files),
        }

    @property
    def identity(self) -> Any:
        stats = [(file, file.stat()) for file in self._files]
        # A file that replaced another may have its size and time of modification, but was changed later itself.
        return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for file, stat in stats]

    @property
    def fingerprint(self) -> str:
        state = xxhash.xxh3_128()
        for file in self._files:
            state.update(f"{file.relative_to(self._root)}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as data:
                while block := data.read(1 << 20):
                    state.update(block)
        return str(state.hexdigest())

    @property
    def num_rows(self) -> int:
        if self._num_rows is None:
            self._num_rows = sum(file_format(file).count(file) for file in self._files)
        return self._num_rows

    def rows(self, order: npt.NDArray[np.int64] | None = None) -> Iterator[Row]:
        if order is None:
            for file in self._files:
                for place, row in file_format(file).read(file):
                    yield self._row(file, place, row)
            return
        loaded = [file_format(file).load(file) for file in self._files]
        ends = np.cumsum([len(rows) for rows in loaded])
        for number, which in zip(order.tolist(), np.searchsorted(ends, order, side="right").tolist(), strict=True):
            rows = loaded[which]
            yield self._row(self._files[which], *rows[number - int(ends[which]) + len(rows)])

    def _row(self, file: Path, place: str, row: Any) -> Row:
        name = file.name if file == self._root else file.relative_to(self._root).as_posix()
        where = f"{name}, {place}" if place else name
        if not isinstance(row, Mapping):
            return _unreadable(where, row)
        values = self._partitions.get(file)
        return where, {**values, **row} if values else row

    def schema(self, columns: Sequence[str] | None = None) -> pa.Schema:
        try:
            schemas = [file_format(file).schema(file, columns) for file in self._files]
            found = pa.unify_schemas(schemas, promote_options="permissive")
        except pa.ArrowException as error:
            raise ConfigError(f"{self._root}: the types of its files' columns differ: {error}") from error
        for name, value in {name: value for row in self._partitions.values() for name, value in row.items()}.items():
            if name not in found.names:
                found = found.append(pa.field(name, pa.int64() if isinstance(value, int) else pa.string()))
        return _of_columns(found, columns, str(self._root))


def _unreadable(where: str, row: Any) -> Row:
    """Return why a row cannot be read, with its place."""
    problem = (
        row if isinstance(row, InputError) else f"expected an object with named columns, found {type(row).__name__}"
    )
    return where, InputError(f"{where}: {problem}")


def _partitions(root: Path, files: Sequence[Path]) -> dict[Path, dict[str, int | str | None]]:
    """Return the columns that the names of folders give to the rows of files: lang=en/year=2024/part-0.parquet.

    As in PyArrow and Spark, a column has whole numbers if all of its values are.
    """
    texts = {}
    for file in files:
        pairs = [part.partition("=") for part in file.relative_to(root).parts[:-1]]
        values = {unquote(name): unquote(value) for name, equals, value in pairs if name and equals}
        texts[file] = {name: None if value == _NO_VALUE else value for name, value in values.items()}
    given: dict[str, set[str]] = {}
    for columns in texts.values():
        for name, value in columns.items():
            given.setdefault(name, set()).update([] if value is None else [value])
    whole = {name for name, values in given.items() if all(re.fullmatch(r"-?(0|[1-9]\d{0,17})", v) for v in values)}
    return {
        file: {name: int(value) if value and name in whole else value for name, value in columns.items()}
        for file, columns in texts.items()
    }


def _files_of_split(folder: Path, split: str | None) -> list[Path]:
    """Return the folder's data files, sorted; only those of `split` if any file name mentions a split.

    Files that mention none then belong to train.
    """
    everything = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    files = [file for file in everything if is_read(file)]
    others = [file.name for file in everything if file.suffix.lower() in OTHER_DATA and not is_read(file)]
    if not files:
        raise ConfigError(
            f"{folder}: contains no files of {SUFFIXES}, and was not written by save_to_disk"
            + (f"; it has {', '.join(others[:3])}" if others else "")
        )
    if others:
        logger.warning("%s: %d files are not read, such as %s: use %s", folder, len(others), others[0], SUFFIXES)
    named = {file: _split_of(file.relative_to(folder)) for file in files}
    found = {name for name in named.values() if name is not None}
    if not found:
        return files
    if split is None:
        split = _the_split(None, sorted({name or "train" for name in named.values()}), folder)
    wanted = _SPLIT_WORDS.get(split.lower(), split)
    chosen = [file for file, name in named.items() if (name or "train") == wanted]
    if not chosen:
        raise ConfigError(
            f"{folder}: no files of split {split!r}; by their names, its files belong to {', '.join(sorted(found))}"
        )
    if len(chosen) < len(files):
        logger.info("%s: %d of %d files are of split %s, by their names", folder, len(chosen), len(files), split)
    return chosen


def _split_of(path: Path) -> str | None:
    """Return the split that a relative path names: with the first or last word of the file, or of a folder.

    A word in between says nothing: latest_dev_notes.txt is no validation data. Numbers, as of shards, are no words.
    """
    found = None
    for part in (*path.parts[:-1], path.name.partition(".")[0]):
        words = [word for word in re.split(r"[^a-z0-9]+", part.lower()) if word and not _NO_WORD.fullmatch(word)]
        ends = [_SPLIT_WORDS[word] for word in (*words[:1], *words[-1:]) if word in _SPLIT_WORDS]
        found = ends[-1] if ends else found
    return found


# -- datasets of the datasets library ----------------------------------------------------------------------------------


class _Loaded:
    """A dataset of the `datasets` library."""

    def __init__(self, dataset: Any, description: dict[str, Any]) -> None:
        self._dataset = dataset.remove_columns([name for name in dataset.column_names if name in TEACHER_COLUMNS])
        self._description = {**description, "rows": len(dataset)}
        self._fingerprint = str(dataset._fingerprint)
        self._validated = False

    @property
    def description(self) -> dict[str, Any]:
        return self._description

    @property
    def identity(self) -> Any:
        return [self._description, self._fingerprint]

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def num_rows(self) -> int:
        return len(self._dataset)

    def rows(self, order: npt.NDArray[np.int64] | None = None) -> Iterator[Row]:
        name = self._description["name"]
        if not self._validated:
            # All at once, since rows may be anywhere in the table.
            validated(self._dataset.data.table, name)
            self._validated = True
        numbers = range(len(self._dataset)) if order is None else order.tolist()
        chosen = (self._dataset if order is None else self._dataset.select(numbers)).with_format("arrow")
        for start in range(0, len(numbers), _ROWS_AT_A_TIME):
            part = numbers[start : start + _ROWS_AT_A_TIME]
            for number, row in zip(part, arrow_rows(chosen[start : start + len(part)]), strict=True):
                where = f"{name}, row {number}"
                yield _unreadable(where, row) if isinstance(row, InputError) else (where, row)

    def schema(self, columns: Sequence[str] | None = None) -> pa.Schema:
        return _of_columns(self._dataset.features.arrow_schema, columns, self._description["name"])


def _saved(folder: Path, split: str | None) -> Source:
    import datasets

    check_saved(folder)
    if "::" in str(folder):
        raise ConfigError(
            f"dataset: {folder}: the datasets library cannot read a folder with '::' in its path: rename it"
        )
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # what it raises depends on which byte is damaged
        raise InputError(
            f"{folder}: cannot be read as a save_to_disk folder: {type(error).__name__}: {error}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        split = _the_split(split, list(loaded), folder)
        return _Loaded(loaded[split], {"name": folder.name, "split": split})
    return _Loaded(loaded, {"name": folder.name})


def open_hub(
    name: str, *, configuration: str | None = None, split: str | None = None, revision: str | None = None
) -> Source:
    """Open a hub dataset; `split` may only be None if there is a single split.

    Raises:
        ConfigError: the dataset cannot be loaded, or has no such split.
    """
    import datasets

    try:
        loaded = datasets.load_dataset(name, name=configuration, split=split, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"dataset: {name!r} is not a local file or folder, and loading it from the hub (configuration "
            f"{configuration}, split {split}) failed: {error}"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        split = _the_split(None, list(loaded), name)
        loaded = loaded[split]
    return _Loaded(loaded, {"name": name, "configuration": configuration, "split": split})

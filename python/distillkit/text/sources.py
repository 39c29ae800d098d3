"""Rows of text from local files, folders of files, `save_to_disk` folders, or hub datasets.

A source yields rows in a fixed order, each with a readable description of where it came from.
"""

from __future__ import annotations

import re
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from distillkit.errors import ConfigError, InputError
from distillkit.shards.storage import is_url, locate
from distillkit.text.file_formats import FORMATS, TEACHER_COLUMNS

__all__ = ["Row", "Source", "chosen_rows", "kept_schema", "open_hub", "open_local", "open_source"]

Row = tuple[str, Mapping[str, Any]]
"""(location of the row, for messages; its columns)"""

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

        With `order`, JSON Lines take 16 bytes of memory per row; JSON arrays and the text of Parquet files are held in
        memory.
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
        dataset: a `.jsonl`, `.json`, `.txt` or `.parquet` file, a folder of them, a `save_to_disk` folder of the
            `datasets` library, an fsspec URL of one of these (copied into a temporary folder first), or the id of a
            hub dataset. A `.txt` file is one document.
        configuration: name of the hub dataset's configuration.
        split: split of a hub dataset or of a `save_to_disk` folder; in a folder of files, those with the split's name
            in their path.

    Raises:
        ConfigError: there is no such file, dataset or split; the message lists the available splits.
    """
    if is_url(dataset):
        return _fetched(dataset, split)
    path = Path(dataset).expanduser()
    if path.exists() or dataset.startswith(("/", ".", "~")) or path.suffix in FORMATS:
        return open_local(dataset, split=split)
    return open_hub(dataset, configuration=configuration, split=split)


def _fetched(url: str, split: str) -> Source:
    """Copy the data files at an fsspec URL into a temporary folder that lives as long as the source, and open them.

    Raises:
        ConfigError: the URL has no data files, or the package for this kind of URL is missing.
    """
    try:
        filesystem, root = locate(url)
    except InputError as error:
        raise ConfigError(f"dataset: {error}") from error
    root = root.rstrip("/")
    wanted = (*FORMATS, ".arrow")
    files = [file for file in filesystem.find(root) if file.endswith(wanted)]
    if not files:
        raise ConfigError(f"dataset: {url} contains no {', '.join(wanted)} files")
    folder = tempfile.TemporaryDirectory(prefix="distillkit-")
    top = Path(folder.name) / root.rsplit("/", 1)[-1]
    for file in files:
        local = top if file == root else top / file.removeprefix(f"{root}/")
        local.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get_file(file, str(local))
    source = open_local(str(top), split=split)
    weakref.finalize(source, folder.cleanup)
    return source


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
    if path.suffix not in FORMATS:
        raise ConfigError(f"{path}: expected a file of {', '.join(FORMATS)}, found {path.suffix or 'no suffix'!r}")
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
    return pa.schema([schema.field(name).remove_metadata() for name in wanted])


# -- local files -------------------------------------------------------------------------------------------------------


class _Files:
    """Local files, sorted by name."""

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        self._root = root
        self._files = files
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
        return [[str(file.resolve()), stat.st_size, stat.st_mtime_ns] for file, stat in stats]

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
            self._num_rows = sum(FORMATS[file.suffix].count(file) for file in self._files)
        return self._num_rows

    def rows(self, order: npt.NDArray[np.int64] | None = None) -> Iterator[Row]:
        if order is None:
            for file in self._files:
                for place, row in FORMATS[file.suffix].read(file):
                    yield self._row(file, place, row)
            return
        loaded = [FORMATS[file.suffix].load(file) for file in self._files]
        ends = np.cumsum([len(rows) for rows in loaded])
        for number, which in zip(order.tolist(), np.searchsorted(ends, order, side="right").tolist(), strict=True):
            rows = loaded[which]
            yield self._row(self._files[which], *rows[number - int(ends[which]) + len(rows)])

    def _row(self, file: Path, place: str, row: Any) -> Row:
        name = file.name if file == self._root else file.relative_to(self._root).as_posix()
        where = f"{name}, {place}" if place else name
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: a row must be an object with named columns, found {type(row).__name__}")
        return where, row

    def schema(self, columns: Sequence[str] | None = None) -> pa.Schema:
        try:
            found = pa.unify_schemas(
                [FORMATS[file.suffix].schema(file, columns) for file in self._files], promote_options="permissive"
            )
        except pa.ArrowException as error:
            raise ConfigError(f"{self._root}: the types of its files' columns differ: {error}") from error
        return _of_columns(found, columns, str(self._root))


def _files_of_split(folder: Path, split: str | None) -> list[Path]:
    """Return the folder's data files, sorted; only those of `split` if any file name mentions a split.

    Files that mention none then belong to train.
    """
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in FORMATS
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]
    if not files:
        raise ConfigError(f"{folder}: contains no {', '.join(FORMATS)} files, and was not written by save_to_disk")
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
    return chosen


def _split_of(path: Path) -> str | None:
    """Return the split that a relative path mentions; the last one if there are several."""
    words = re.split(r"[^a-z0-9]+", path.as_posix().lower())
    return next((_SPLIT_WORDS[word] for word in reversed(words) if word in _SPLIT_WORDS), None)


# -- datasets of the datasets library ----------------------------------------------------------------------------------


class _Loaded:
    """A dataset of the `datasets` library."""

    def __init__(self, dataset: Any, description: dict[str, Any]) -> None:
        self._dataset = dataset.remove_columns([name for name in dataset.column_names if name in TEACHER_COLUMNS])
        self._description = {**description, "rows": len(dataset)}
        self._fingerprint = str(dataset._fingerprint)

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
        numbers = range(len(self._dataset)) if order is None else order.tolist()
        rows = self._dataset if order is None else self._dataset.select(numbers)
        for number, row in zip(numbers, rows, strict=True):
            yield f"{self._description['name']}, row {number}", row

    def schema(self, columns: Sequence[str] | None = None) -> pa.Schema:
        return _of_columns(self._dataset.features.arrow_schema, columns, self._description["name"])


def _saved(folder: Path, split: str | None) -> Source:
    import datasets

    if "::" in str(folder):
        raise ConfigError(
            f"dataset: {folder}: the datasets library cannot read a folder with '::' in its path: rename it"
        )
    loaded = datasets.load_from_disk(str(folder))
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

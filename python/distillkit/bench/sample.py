"""Rows for benchmarks: top-k log-probabilities at real positions."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.codec import CodecConfig, DistributionQuantizationConfig
from distillkit.errors import InputError
from distillkit.shards import Dataset

__all__ = ["Sample", "bundled_sample", "load_sample", "save_sample"]

_MOST_ROWS = 20_000
"""Maximum rows read from a dataset: enough for a 99th percentile, few enough for a table within minutes."""
_TOO_MUCH = 1.01
"""The encoder rejects rows whose probabilities sum to more than this."""


@dataclass(frozen=True)
class Sample:
    """N rows of the most probable ids of real distributions.

    Attributes:
        ids: (N, k) int64.
        logprobs: (N, k) float32, descending, under the full softmax.
        vocab_size: ids are less than this.
        about: description of the rows, to follow their number: "real positions of a teacher over a text".
        caution: a caveat for readers of the results; may be empty.
        documents: (N,) int64, the number of each row's document, ascending; None if it is not known.
    """

    ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    vocab_size: int
    about: str
    caution: str = ""
    documents: npt.NDArray[np.int64] | None = None

    @property
    def k(self) -> int:
        """Ids per row."""
        return int(self.ids.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def top(self, k: int, vocab_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """(N, k) first ids and log-probabilities. If any id is not below `vocab_size`, all are replaced by distinct ids
        that are.

        The encoding of the values does not depend on the ids.
        """
        ids = self.ids[:, :k]
        if ids.max(initial=0) >= vocab_size:
            # Ids stay spread out: they stride over the vocabulary from the row's first id.
            stride = max(1, vocab_size // k)
            ids = (ids[:, :1] + stride * np.arange(k)) % vocab_size
        return np.ascontiguousarray(ids), np.ascontiguousarray(self.logprobs[:, :k])

    def first(self, rows: int) -> Sample:
        """At most `rows` of the rows, evenly spaced."""
        if len(self) <= rows:
            return self
        chosen = np.linspace(0, len(self) - 1, rows).round().astype(int)
        documents = None if self.documents is None else self.documents[chosen]
        return replace(self, ids=self.ids[chosen], logprobs=self.logprobs[chosen], documents=documents)


def bundled_sample() -> Sample:
    """Loads the rows that are bundled with distillkit."""
    return _load_arrays(Path(__file__).with_name("sample.npz"))


def load_sample(path: str | os.PathLike[str]) -> Sample:
    """Loads rows from a captured or published dataset (evenly spaced documents), or from an .npz file.

    The .npz file contains `ids` and `logprobs`, both (N, k), and optionally `vocab_size`, `about` and `documents`:
    (N,) ascending integers, which rows are of one document.

    Raises:
        FileNotFoundError: the path does not exist.
        InputError: the file is not such an .npz file, or there are no usable rows.
        DistillKitError: as for `Dataset.open`.
    """
    name = str(os.fspath(path))
    return _load_arrays(Path(name)) if name.endswith(".npz") else _load_dataset(name)


def save_sample(path: str | os.PathLike[str], sample: Sample) -> None:
    """Writes an .npz file for `load_sample`."""
    documents: dict[str, Any] = {} if sample.documents is None else {"documents": sample.documents}
    np.savez_compressed(
        path,
        ids=sample.ids.astype(np.int32),
        logprobs=sample.logprobs,
        vocab_size=np.int64(sample.vocab_size),
        about=np.array(sample.about),
        **documents,
    )


def _load_arrays(path: Path) -> Sample:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError) as error:
        raise InputError(f"{path}: not an .npz file of arrays: {error}") from error
    missing = [name for name in ("ids", "logprobs") if name not in arrays]
    if missing:
        raise InputError(
            f"{path}: expected arrays ids and logprobs of shape (rows, k); {' and '.join(missing)} not found among "
            f"{', '.join(sorted(arrays)) or 'none'}"
        )
    ids, logprobs = arrays["ids"], arrays["logprobs"]
    if ids.ndim != 2 or ids.shape != logprobs.shape or ids.dtype.kind not in "iu" or logprobs.dtype.kind != "f":
        raise InputError(
            f"{path}: ids must be integers and logprobs floats of one shape (rows, k), found {ids.dtype} {ids.shape} "
            f"and {logprobs.dtype} {logprobs.shape}"
        )
    documents = arrays.get("documents")
    if documents is not None and (
        documents.shape != ids.shape[:1] or documents.dtype.kind not in "iu" or (np.diff(documents) < 0).any()
    ):
        raise InputError(
            f"{path}: documents must be {len(ids):,} ascending integers, one for each row of ids; found "
            f"{documents.dtype} {documents.shape}"
        )
    vocab_size = int(arrays["vocab_size"]) if "vocab_size" in arrays else int(ids.max(initial=0)) + 1
    about = str(arrays["about"]) if "about" in arrays else f"rows of {path.name}"
    sample = Sample(ids.astype(np.int64), logprobs.astype(np.float32), vocab_size, about, documents=documents)
    return _checked(str(path), sample)


def _load_dataset(name: str) -> Sample:
    dataset = Dataset.open(name)
    if not len(dataset) or not dataset.num_rows:
        raise InputError(f"{name}: the dataset contains no distributions")
    if dataset.codec.varies:
        raise InputError(
            f"{name}: its rows have different numbers of ids, but codecs are compared on rows with k of them: take a "
            "dataset with a fixed k"
        )
    documents = min(len(dataset), -(-_MOST_ROWS * len(dataset) // dataset.num_rows))
    parts = []
    for index in np.linspace(0, len(dataset) - 1, documents).round().astype(int):
        document = dataset[int(index)]
        parts.append(dataset.codec.decode_document(document.teacher, document.num_rows))
    ids = np.concatenate([np.asarray(part.ids) for part in parts])
    logprobs = np.concatenate([np.asarray(part.logprobs) for part in parts])
    teacher = (dataset.header.teacher or {}).get("name") or "an unnamed teacher"
    about = f"positions of {teacher}, decoded from {name}"
    numbers = np.repeat(np.arange(len(parts)), [len(part.ids) for part in parts])
    sample = Sample(ids, logprobs, dataset.codec.vocab_size, about, _caution(dataset.codec.config), numbers)
    return _checked(name, sample)


def _caution(config: CodecConfig) -> str:
    if isinstance(config, DistributionQuantizationConfig):
        exact = config.exact_k == config.k and config.exact_dtype in ("float32", "float64")
        if exact and not config.delta_encoding:
            return ""
    return (
        "The original rows come from a lossy capture. Its own losses do not show in this table, so configurations "
        "similar to its codec look better than they are. Prefer rows captured exactly (exact_k = k, float32)."
    )


def _checked(name: str, sample: Sample) -> Sample:
    """Sorts rows in descending order and drops invalid ones, which a codec's fit of the far tail may produce."""
    order = np.argsort(-sample.logprobs, axis=-1, kind="stable")
    ids, logprobs = np.take_along_axis(sample.ids, order, -1), np.take_along_axis(sample.logprobs, order, -1)
    with np.errstate(over="ignore"):
        sound = np.isfinite(logprobs).all(-1) & (np.exp(logprobs.astype(np.float64)).sum(-1) < _TOO_MUCH)
    if not sound.any():
        raise InputError(f"{name}: no row has finite log-probabilities whose probabilities sum to at most 1")
    caution = sample.caution
    if not sound.all():
        caution = f"{caution} {(~sound).sum():,} rows were skipped: their probabilities sum to more than 1.".strip()
    chosen = np.flatnonzero(sound)
    if len(chosen) > _MOST_ROWS and not name.endswith(".npz"):
        chosen = chosen[np.linspace(0, len(chosen) - 1, _MOST_ROWS).round().astype(int)]
    documents = None if sample.documents is None else sample.documents[chosen]
    return replace(sample, ids=ids[chosen], logprobs=logprobs[chosen], caution=caution, documents=documents)

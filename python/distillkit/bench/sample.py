"""Rows to measure on: top-k log-probabilities of real positions."""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distillkit.codec import CodecConfig, DistributionQuantizationConfig
from distillkit.errors import InputError
from distillkit.shards import Dataset

__all__ = ["Sample", "bundled_sample", "load_sample", "save_sample"]

_MOST_ROWS = 20_000
"""Rows taken of a dataset: enough for a 99th percentile, and a table in minutes."""
_TOO_MUCH = 1.01
"""Probabilities of a row that add up to more are refused by the encoder."""


@dataclass(frozen=True)
class Sample:
    """N rows of the most probable ids of real distributions.

    Attributes:
        ids: (N, k) int64.
        logprobs: (N, k) float32, descending, under the full softmax.
        vocab_size: ids are below this.
        about: what the rows are, to be read after their number: "real positions of a teacher over a text".
        caution: what a reader must know about them, if anything.
    """

    ids: npt.NDArray[np.int64]
    logprobs: npt.NDArray[np.float32]
    vocab_size: int
    about: str
    caution: str = ""

    @property
    def k(self) -> int:
        """Ids a row."""
        return int(self.ids.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def top(self, k: int, vocab_size: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """(N, k) ids and log-probabilities; ids that are not below `vocab_size` are made to be, distinct in a row.

        What is stored of the values does not depend on the ids.
        """
        ids = self.ids[:, :k]
        if ids.max(initial=0) >= vocab_size:
            # A row's ids keep their spread: a stride over the vocabulary from the row's own start.
            stride = max(1, vocab_size // k)
            ids = (ids[:, :1] + stride * np.arange(k)) % vocab_size
        return np.ascontiguousarray(ids), np.ascontiguousarray(self.logprobs[:, :k])

    def first(self, rows: int) -> Sample:
        """At most `rows` of the rows, evenly spread."""
        if len(self) <= rows:
            return self
        chosen = np.linspace(0, len(self) - 1, rows).round().astype(int)
        return replace(self, ids=self.ids[chosen], logprobs=self.logprobs[chosen])


def bundled_sample() -> Sample:
    """The rows that come with distillkit."""
    return _load_arrays(Path(__file__).with_name("sample.npz"))


def load_sample(path: str | os.PathLike[str]) -> Sample:
    """Rows of a captured or published dataset (evenly spread documents), or of an .npz file.

    The file holds `ids` and `logprobs`, both (N, k), and may hold `vocab_size` and `about`.

    Raises:
        FileNotFoundError: nothing is there.
        InputError: the file is no such file, or there are no rows.
        DistillKitError: as `Dataset.open`.
    """
    name = str(os.fspath(path))
    return _load_arrays(Path(name)) if name.endswith(".npz") else _load_dataset(name)


def save_sample(path: str | os.PathLike[str], sample: Sample) -> None:
    """Writes what `load_sample` reads."""
    np.savez_compressed(
        path,
        ids=sample.ids.astype(np.int32),
        logprobs=sample.logprobs,
        vocab_size=np.int64(sample.vocab_size),
        about=np.array(sample.about),
    )


def _load_arrays(path: Path) -> Sample:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (zipfile.BadZipFile, ValueError) as error:
        raise InputError(f"{path}: this is no .npz file of arrays: {error}") from error
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
    vocab_size = int(arrays["vocab_size"]) if "vocab_size" in arrays else int(ids.max(initial=0)) + 1
    about = str(arrays["about"]) if "about" in arrays else f"rows of {path.name}"
    return _checked(str(path), ids.astype(np.int64), logprobs.astype(np.float32), vocab_size, about, caution="")


def _load_dataset(name: str) -> Sample:
    dataset = Dataset.open(name)
    if not len(dataset) or not dataset.num_rows:
        raise InputError(f"{name}: there are no distributions in this dataset")
    documents = min(len(dataset), -(-_MOST_ROWS * len(dataset) // dataset.num_rows))
    parts = []
    for index in np.linspace(0, len(dataset) - 1, documents).round().astype(int):
        document = dataset[int(index)]
        parts.append(dataset.codec.decode_document(document.teacher, document.num_rows))
    ids = np.concatenate([np.asarray(part.ids) for part in parts])
    logprobs = np.concatenate([np.asarray(part.logprobs) for part in parts])
    teacher = (dataset.header.teacher or {}).get("name") or "a teacher that is not named"
    about = f"positions of {teacher}, decoded from {name}"
    return _checked(name, ids, logprobs, dataset.codec.vocab_size, about, caution=_caution(dataset.codec.config))


def _caution(config: CodecConfig) -> str:
    if isinstance(config, DistributionQuantizationConfig):
        exact = config.exact_k == config.k and config.exact_dtype in ("float32", "float64")
        if exact and not config.delta_encoding:
            return ""
    return (
        "The originals of this table were read from a lossy capture: what its codec lost does not show here, so a "
        "configuration like it looks better than it is. Rows captured exactly (exact_k = k, float32) are best."
    )


def _checked(
    name: str, ids: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float32], vocab_size: int, about: str, caution: str
) -> Sample:
    """Rows in descending order, without those that are no log-probabilities, as fits of the far tail can leave them."""
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    ids, logprobs = np.take_along_axis(ids, order, -1), np.take_along_axis(logprobs, order, -1)
    with np.errstate(over="ignore"):
        sound = np.isfinite(logprobs).all(-1) & (np.exp(logprobs.astype(np.float64)).sum(-1) < _TOO_MUCH)
    if not sound.any():
        raise InputError(f"{name}: no row holds finite log-probabilities that add up to at most 1")
    if not sound.all():
        caution = f"{caution} {(~sound).sum():,} rows were left out: their probabilities add up to more than 1.".strip()
    chosen = np.flatnonzero(sound)
    if len(chosen) > _MOST_ROWS and not name.endswith(".npz"):
        chosen = chosen[np.linspace(0, len(chosen) - 1, _MOST_ROWS).round().astype(int)]
    return Sample(ids[chosen], logprobs[chosen], vocab_size, about, caution)

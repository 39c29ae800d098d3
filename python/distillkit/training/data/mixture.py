"""Several datasets as one: how often each is used, in which order, and whose rows are which.

Shape legend: N counted positions of a batch, k ids per position.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from distillkit.errors import ConfigError
from distillkit.losses.positions import Targets
from distillkit.training.data.examples import BLANK, DistillationDataset, DocumentSource, Example
from distillkit.training.signals.base import together
from distillkit.training.signals.stored import OfflineSignal
from distillkit.types import Document

if TYPE_CHECKING:
    from distillkit.training.config.schema import DatasetEntry

__all__ = ["JoinedDocuments", "Mixture", "MixtureOrder", "check_same_kind", "rows_taken"]


class Mixture(torch.utils.data.Dataset[Example]):
    """The examples of several datasets, one dataset after the other, with the documents numbered in the same way.

    Datasets may have different codecs. A batch then has the arrays of each teacher signal under names of their own
    (`teacher_0_bytes`, …), and `targets` puts their rows together.

    Args:
        parts: the datasets, in their order; either each with a signal of its own, or all with the same.
        names: their names, for metrics.
        taken: how many examples of each an epoch uses; all of them by default.
    """

    def __init__(
        self, parts: Sequence[DistillationDataset], names: Sequence[str], taken: Sequence[int] | None = None
    ) -> None:
        self.parts = tuple(parts)
        self.names = tuple(names)
        self.taken = tuple(map(len, parts)) if taken is None else tuple(taken)
        self.source = JoinedDocuments([part.source for part in parts])
        self.signal = parts[0].signal
        self._one_signal = all(part.signal is self.signal for part in parts)
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def packed(self) -> bool:
        """Whether examples are rows of several documents."""
        return any(part.packed for part in self.parts)

    def order(self, *, seed: int | None, multiple: int = 1) -> MixtureOrder:
        """Return the order in which training reads examples; see `MixtureOrder`."""
        return MixtureOrder(list(map(len, self.parts)), self.taken, seed=seed, multiple=multiple)

    def __getitem__(self, index: int) -> Example:
        """Read an example; `BLANK` returns one without tokens.

        Raises:
            CorruptDataError: a stored document is damaged.
        """
        number = 0 if index == BLANK else int(np.searchsorted(self._starts, index, side="right")) - 1
        example = self.parts[number][index if index == BLANK else index - int(self._starts[number])]
        places = example.places + np.array([self.source.starts[number], 0])
        return replace(example, teacher=self._named(number, example.teacher), places=places)

    def _named(self, number: int, arrays: dict[str, Any]) -> dict[str, Any]:
        """Name the arrays of a dataset's signal apart from those of the others, which are empty."""
        if self._one_signal:
            return arrays
        each = [arrays if other == number else part.signal.empty_targets() for other, part in enumerate(self.parts)]
        return {f"{other}_{name}": array for other, found in enumerate(each) for name, array in found.items()}

    def targets(self, batch: Mapping[str, Any], labels: torch.Tensor) -> Targets:
        """Make the targets of a batch, with the dataset of each position; see `TeacherSignal.targets`."""
        starts = torch.tensor(self.source.starts[1:], device=labels.device)
        sources = torch.bucketize(batch["places"][:, 0].to(labels.device).contiguous(), starts, right=True)
        if self._one_signal:
            return replace(self.signal.targets(batch, labels), sources=sources)
        found: list[tuple[torch.Tensor, Targets]] = []
        for number, part in enumerate(self.parts):
            rows = torch.nonzero(sources == number).squeeze(-1)
            prefix = f"teacher_{number}_"
            own = {
                f"teacher_{name.removeprefix(prefix)}": value
                for name, value in batch.items()
                if name.startswith(prefix)
            }
            shared = {name: value for name, value in batch.items() if not name.startswith("teacher_")}
            shared["rows"] = batch["rows"][rows.to(batch["rows"].device)]
            found.append((rows, part.signal.targets({**shared, **own}, labels[rows])))
        return replace(together(found, labels), sources=sources)


class JoinedDocuments:
    """The documents of several sources, one source after the other.

    Attributes:
        starts: the number of each source's first document, and that of all documents.
    """

    def __init__(self, sources: Sequence[DocumentSource]) -> None:
        self.sources = list(sources)
        self.starts = list(itertools.accumulate(map(len, sources), initial=0))

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> Document:
        number, inside = self.place(index)
        return self.sources[number][inside]

    def place(self, index: int) -> tuple[int, int]:
        """Return the source of a document, and its number there."""
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return number, index - self.starts[number]

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each document (D,)."""
        return np.concatenate([source.lengths() for source in self.sources])


class MixtureOrder(torch.utils.data.Sampler[int]):
    """The order of the examples of several datasets: it depends only on the seed and the epoch.

    Each dataset is read in passes, in each of which every example comes once, in a new order. An epoch goes on where
    the one before has stopped, so that after any number of epochs no example was used more than once more often than
    another of its dataset. The examples of an epoch are then shuffled together.

    Args:
        sizes: number of examples of each dataset.
        taken: how many of each an epoch uses.
        seed: seed of all permutations; None keeps the stored order, one dataset after the other.
        multiple: the number of indices is filled up with `BLANK` to a multiple of this.
    """

    def __init__(self, sizes: Sequence[int], taken: Sequence[int], *, seed: int | None, multiple: int = 1) -> None:
        self.sizes, self.taken, self.seed = list(sizes), list(taken), seed
        self.size = sum(taken)
        self.length = -(-self.size // multiple) * multiple
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        starts = itertools.accumulate(self.sizes[:-1], initial=0)
        order = np.concatenate([start + self._of(number) for number, start in enumerate(starts)])
        if self.seed is not None:
            order = order[np.random.default_rng([self.seed, self.epoch]).permutation(len(order))]
        return itertools.chain(order.tolist(), itertools.repeat(BLANK, self.length - self.size))

    def _of(self, number: int) -> npt.NDArray[np.int64]:
        """Return the examples of a dataset that this epoch uses."""
        size, taken = self.sizes[number], self.taken[number]
        first, last = self.epoch * taken, (self.epoch + 1) * taken
        passes = range(first // size, -(-last // size))
        whole = [self._pass(number, each) for each in passes]
        return np.concatenate(whole)[first - passes.start * size : last - passes.start * size]

    def _pass(self, number: int, count: int) -> npt.NDArray[np.int64]:
        if self.seed is None:
            return np.arange(self.sizes[number])
        return np.random.default_rng([self.seed, count, number]).permutation(self.sizes[number])


def check_same_kind(entries: Sequence[DatasetEntry], parts: Sequence[DistillationDataset]) -> None:
    """Refuse datasets whose rows are compared with the student in different ways: probabilities, and draws at one or
    another temperature.

    Args:
        entries: their settings.
        parts: the datasets.

    Raises:
        ConfigError: names two of them.
    """
    kinds = [part.signal.codec.draws if isinstance(part.signal, OfflineSignal) else None for part in parts]
    found = ["probabilities" if kind is None else f"draws at temperature {kind.temperature:g}" for kind in kinds]
    for entry, kind in zip(entries, found, strict=True):
        if kind != found[0]:
            raise ConfigError(
                f"{entry.key}: has {kind} (its codec), but {entries[0].key} has {found[0]}; the losses compare a run's "
                "rows in one way, so train on one kind, or capture again in a codec of the other"
            )


def rows_taken(entries: Sequence[DatasetEntry], parts: Sequence[DistillationDataset]) -> list[int]:
    """Return how many examples of each dataset an epoch uses.

    With weights w, dataset n has the share w_n / Σ w of the tokens of an epoch, which has as many tokens as all
    datasets together. Otherwise, each is passed over as often as its `epochs` say.

    Args:
        entries: their settings.
        parts: the datasets.

    Raises:
        ConfigError: a share is less than half an example.
    """
    tokens = np.array([part.tokens for part in parts], np.float64)
    weights = [entry.source.weight for entry in entries]
    if any(weight is not None for weight in weights):
        shares = np.array([1.0 if weight is None else weight for weight in weights], np.float64)
        shares /= shares.max()
        passes = shares / shares.sum() * tokens.sum() / tokens
        setting = "weight"
    else:
        passes = np.array([1.0 if entry.source.epochs is None else entry.source.epochs for entry in entries])
        setting = "epochs"
    taken = [round(float(count) * len(part)) for count, part in zip(passes, parts, strict=True)]
    for entry, part, count in zip(entries, parts, taken, strict=True):
        if not count:
            raise ConfigError(
                f"{entry.key}.{setting}: {getattr(entry.source, setting)} leaves none of its {len(part):,} documents "
                "or packed rows in an epoch; raise it, or remove this dataset"
            )
    return taken

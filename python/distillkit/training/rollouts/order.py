"""Which rows of a run are the student's completions, and which prompts they continue.

Rows that will hold a completion are *slots*. They are numbered through the entire run, whatever the number of
processes: slot g has its own prompt and its own random numbers, so nothing depends on which process fills it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distillkit.training.data.examples import BLANK, DistillationDataset, DocumentOrder

__all__ = ["MixedOrder", "PromptOrder", "Slot", "WithSlots"]

# Index of slot 0; slot g has index _FIRST − g.
_FIRST = BLANK - 1
# Fractions are taken as they are written, not as the nearest binary number: of 10 rows at 0.3, exactly 3 are slots.
_DENOMINATOR = 10**6


@dataclass(frozen=True)
class Slot:
    """A training row that holds the completion of this number."""

    number: int


class WithSlots(torch.utils.data.Dataset[Any]):
    """A dataset whose rows may also be slots, by the indices that `MixedOrder` yields."""

    def __init__(self, documents: DistillationDataset) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Any:
        return Slot(_FIRST - index) if index <= _FIRST else self.documents[index]


class MixedOrder(DocumentOrder):
    """The order of documents and slots: the documents of an epoch as in `DocumentOrder`, with slots in between.

    Each optimiser step has its share of slots, at places that depend only on the seed and the epoch.

    Args:
        size: number of documents; with a share of 1, the number of slots of an epoch.
        share: fraction of all rows that are slots, above 0 and at most 1.
        seed: seed of the order; None keeps the stored order of documents, and spreads slots evenly.
        batch: rows of a batch of all processes.
        step: rows of an optimiser step of all processes, a multiple of `batch`.
        fill: fill the last batch up with `BLANK`.
        drop_last: rows that do not fill a batch are left out.

    Example:
        >>> order = MixedOrder(3, 0.5, seed=None, batch=2, step=2)
        >>> list(order), order.slots(range(2, 4))  # slot g as −2 − g
        ([0, -2, 1, -3, 2], range(2, 3))
    """

    def __init__(
        self,
        size: int,
        share: float,
        *,
        seed: int | None,
        batch: int,
        step: int,
        fill: bool = False,
        drop_last: bool = False,
    ) -> None:
        self._share = Fraction(share).limit_denominator(_DENOMINATOR)
        # The fewest rows with all documents.
        rows = size if self._share == 1 else math.floor((size - 1) / (1 - self._share)) + 1
        if drop_last:
            rows -= rows % batch
        super().__init__(rows, seed=seed, multiple=batch if fill else 1)
        self._documents = DocumentOrder(0 if self._share == 1 else size, seed=seed)
        self._step = step
        self.steps = -(-rows // step)
        """Optimiser steps in an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for the next iteration."""
        super().set_epoch(epoch)
        self._documents.set_epoch(epoch)

    def slots(self, steps: range) -> range:
        """Return the slots of some optimiser steps of the run, counted from 0."""
        return range(self._slots_before(steps.start), self._slots_before(steps.stop))

    def _slots_before(self, step: int) -> int:
        epochs, step_of_epoch = divmod(step, self.steps)
        return epochs * self._slots_in(self.size) + self._slots_in(min(step_of_epoch * self._step, self.size))

    def _slots_in(self, rows: int) -> int:
        """Count the slots among the first rows of an epoch; exact at the ends of steps."""
        return math.floor(rows * self._share)

    def __iter__(self) -> Iterator[int]:
        documents = iter(self._documents)
        slots = itertools.count(self.epoch * self._slots_in(self.size))
        for is_slot in self._places().tolist():
            yield _FIRST - next(slots) if is_slot else next(documents)
        yield from itertools.repeat(BLANK, self.length - self.size)

    def _places(self) -> npt.NDArray[np.bool_]:
        """(rows,) which rows of the epoch are slots."""
        rows = np.arange(self.size + 1, dtype=np.int64)
        places = np.diff(rows * self._share.numerator // self._share.denominator) > 0
        if self.seed is None:
            return places
        # Shuffled within each step. Evenly spread slots might otherwise all be in the batches of one process.
        keys = np.random.default_rng([self.seed, self.epoch, 1]).random(self.size)
        shuffled: npt.NDArray[np.bool_] = places[np.lexsort((keys, rows[:-1] // self._step))]
        return shuffled


class PromptOrder:
    """Which prompt a slot continues: all of them in turn, in a new order each time.

    Args:
        size: number of prompts.
        seed: seed of the order; None keeps the stored order.
    """

    def __init__(self, size: int, seed: int | None) -> None:
        self.size = size
        self.seed = seed
        self._pass = -1
        self._order: npt.NDArray[np.int64] = np.arange(size)

    def __getitem__(self, slot: int) -> int:
        number, place = divmod(slot, self.size)
        if self.seed is not None and number != self._pass:
            self._order = np.random.default_rng([self.seed, number, 2]).permutation(self.size)
            self._pass = number
        return int(self._order[place])

"""Several teachers, live and served: each teaches the rows that it matches; where several teach a row, their
probabilities are averaged.

The average of live teachers is that of their whole distributions. Of a served teacher, only the most probable ids are
known: the average with it is what `distillkit merge` stores in probabilities (`distillkit.shards.merge`). Of each id
that is what is known, Σ w p over the teachers that know it; the rest is missing mass.

Shape legend: B batch, S sequence, N counted positions, n those of a teacher, P those of a document, k ids per position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from distillkit.configuration.problems import shown
from distillkit.errors import MismatchError
from distillkit.losses.positions import DenseTeachers, Targets
from distillkit.shards.merge import average_labels, average_rows
from distillkit.shards.plausibility import sampled
from distillkit.training.data.examples import MODEL_INPUTS, DocumentSource
from distillkit.training.data.prepared import PreparedDataset
from distillkit.training.signals.base import Asked, TeacherSignal, together
from distillkit.training.signals.live import OnlineSignal, most_probable
from distillkit.training.signals.served import ASKED, ServedSignal
from distillkit.types import Document, SparseLogprobs

if TYPE_CHECKING:
    from distillkit.training.config.schema import ListedLiveTeacherConfig, ListedServedTeacherConfig
    from distillkit.training.signals.server import TeacherServer

__all__ = ["SeveralTeachers", "check_taught"]


@dataclass(frozen=True)
class _Part:
    """The sparse rows of one teacher, or of all live ones together.

    Attributes:
        teachers: which, as bits.
        taught: (n,) int64 the positions of these rows, ascending.
        targets: of these positions.
    """

    teachers: int
    taught: torch.Tensor
    targets: Targets

    def at(self, positions: torch.Tensor) -> _Rows:
        """Return the rows of some of its positions."""
        if not isinstance(self.targets.teacher, SparseLogprobs):
            raise TypeError(f"expected the most probable ids, found {type(self.targets.teacher).__name__}")
        places = torch.searchsorted(self.taught, positions)
        ids, logprobs = self.targets.teacher.tensors()
        known = self.targets.label_logprobs
        return _Rows(ids[places], logprobs[places], None if known is None else known[places])


class _Rows(NamedTuple):
    """Ids and log-probabilities (n, k), and the log-probabilities (n,) of the labels, None if unknown everywhere."""

    ids: torch.Tensor
    logprobs: torch.Tensor
    labels: torch.Tensor | None


class SeveralTeachers(TeacherSignal):
    """Distributions of several teachers. A batch says of each position which of them teach it.

    Args:
        configs: the settings of each teacher: its weight, and the rows that it teaches.
        signals: the teachers themselves.

    Attributes:
        top_k: number of ids to keep of the average of live teachers; None: all.
    """

    def __init__(
        self,
        configs: Sequence[ListedLiveTeacherConfig | ListedServedTeacherConfig],
        signals: Sequence[OnlineSignal | ServedSignal],
    ) -> None:
        self.configs = list(configs)
        self.signals = list(signals)
        self.head_size = signals[0].head_size
        self._live = [(number, each) for number, each in enumerate(signals) if isinstance(each, OnlineSignal)]
        self._served = [(number, each) for number, each in enumerate(signals) if isinstance(each, ServedSignal)]
        self.top_k = self._live[0][1].top_k if self._live else None

    @property
    def models(self) -> dict[str, Any]:
        """The models of live teachers: see `TeacherSignal.models`."""
        return {key: model for _, signal in self._live for key, model in signal.models.items()}

    @property
    def servers(self) -> list[TeacherServer]:
        """The servers: see `TeacherSignal.servers`."""
        return [signal.server for _, signal in self._served]

    @property
    def waited(self) -> float:
        """Seconds that `targets` has waited for any of the servers until now."""
        return sum(signal.waited for signal in self.signals)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that decide who teaches a row."""
        return tuple(dict.fromkeys(name for config in self.configs for name in config.where))

    def teaching(self, columns: Mapping[str, Any] | None, place: str) -> list[int]:
        """Return the numbers of the teachers of a row.

        Args:
            columns: the row's values.
            place: the row, for messages.

        Raises:
            MismatchError: there is none; names the row and its values.
        """
        values = columns or {}
        found = [number for number, config in enumerate(self.configs) if config.matches(values)]
        if found:
            return found
        own = ", ".join(
            f"{name}: {shown(values[name]) if name in values else 'no such column'}" for name in self.columns
        )
        raise MismatchError(
            f"{place}: no teacher matches this row ({own}). Add a teacher without `where`, which teaches all rows, or "
            "leave these rows out"
        )

    def take(self, document: Document, positions: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return which teachers teach the positions (P,), as bits of `by` int64 (P,).

        Raises:
            MismatchError: no teacher does, or a token id is beyond the head of the student or of a teacher.
        """
        teaching = self.teaching(document.columns, document.place)
        for number in teaching:
            self.signals[number].take(document, positions)
        return {"by": np.full(len(positions), sum(1 << number for number in teaching), np.int64)}

    def empty_targets(self) -> dict[str, npt.NDArray[Any]]:
        """Return the array of `take` for zero positions."""
        return {"by": np.empty(0, np.int64)}

    def ask(self, batch: Mapping[str, Any]) -> Asked:
        """Ask each server about the documents of a batch that it teaches."""
        by = batch["teacher_by"].cpu()
        asked = [signal.ask(_restricted(batch, _taught(by, 1 << number))) for number, signal in self._served]
        return {key: questions for each in asked for key, questions in each.items()}

    @torch.no_grad()
    def targets(self, batch: Mapping[str, Any], labels: torch.Tensor) -> Targets:
        """Let each teacher teach its rows of a batch: see `TeacherSignal.targets`."""
        batch = batch if ASKED in batch else {**batch, ASKED: self.ask(batch)}
        by = batch["teacher_by"].cpu()
        patterns = by.unique().tolist() or [1]  # a batch without positions is anyone's
        alone = [number for number in range(len(self.signals)) if patterns == [1 << number]]
        if alone:
            return self.signals[alone[0]].targets(batch, labels)
        if not self._served:
            return self._live_average(batch, by, labels)
        parts = []
        if self._live:
            mask = sum(1 << number for number, _ in self._live)
            parts.append(_Part(mask, _taught(by, mask), self._live_average(batch, by, labels)))
        for number, signal in self._served:
            taught = _taught(by, 1 << number)
            parts.append(_Part(1 << number, taught, signal.targets(_restricted(batch, taught), labels[taught])))
        # The same teachers have the same weights at all their positions.
        averages = [self._average(parts, pattern, _taught(by, pattern, exactly=True), labels) for pattern in patterns]
        return together(averages, labels)

    def _live_average(self, batch: Mapping[str, Any], by: torch.Tensor, labels: torch.Tensor) -> Targets:
        """Return the average of the live teachers, at the positions that any of them teaches."""
        at = _taught(by, sum(1 << number for number, _ in self._live))
        parts = []
        for number, signal in self._live:
            taught = _taught(by, 1 << number)
            if len(taught):
                dense, _ = signal.run(_restricted(batch, taught), labels.device)
                places = torch.searchsorted(at, taught).to(labels.device)
                parts.append((places, dense, self.configs[number].weight))
        width = max(signal.head.size for _, signal in self._live)
        average = DenseTeachers(len(at), width, tuple(parts))
        if self.top_k is None:
            return Targets(labels[at], average)
        first = most_probable(average, (len(at), width), self.top_k, self.head_size, labels.device)
        return Targets(labels[at], first)

    def _average(
        self, parts: Sequence[_Part], pattern: int, positions: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, Targets]:
        """Average the rows at positions (n,) that the same teachers teach, and return both."""
        own = [part for part in parts if part.teachers & pattern]
        rows = [part.at(positions) for part in own]
        weights = [self._weight(part.teachers & pattern) for part in own]
        ids, logprobs, known = rows[0] if len(rows) == 1 else _mean(rows, weights, self.head_size)
        at = positions.to(labels.device)
        teacher = SparseLogprobs(ids.to(labels.device), logprobs.to(labels.device))
        return at, Targets(labels[at], teacher, label_logprobs=None if known is None else known.to(labels.device))

    def _weight(self, teachers: int) -> float:
        return sum(config.weight for number, config in enumerate(self.configs) if teachers >> number & 1)


def _mean(rows: Sequence[_Rows], weights: Sequence[float], head_size: int) -> _Rows:
    """Average rows of the same positions as captures are merged, on the CPU."""
    sparse = [SparseLogprobs(each.ids.cpu().numpy(), each.logprobs.cpu().numpy()) for each in rows]
    average = average_rows(sparse, weights, "probabilities", head_size)
    known = [each.labels.cpu().numpy() for each in rows if each.labels is not None]
    labels = None
    if len(known) == len(rows):
        labels = torch.from_numpy(average_labels(np.stack(known), weights, "probabilities", average.log_z))
    ids, logprobs = (torch.from_numpy(np.asarray(array)) for array in (average.rows.ids, average.rows.logprobs))
    return _Rows(ids, logprobs, labels)


def _taught(by: torch.Tensor, teachers: int, *, exactly: bool = False) -> torch.Tensor:
    """Return the positions (n,) that any of some teachers teaches, or exactly these.

    Args:
        by: (N,) the teachers of each position, as bits.
        teachers: the teachers, as bits.
        exactly: leave out positions that others teach, too, or not all of these.
    """
    return torch.nonzero(by == teachers if exactly else by & teachers).squeeze(-1)


def _restricted(batch: Mapping[str, Any], taught: torch.Tensor) -> Mapping[str, Any]:
    """Return a batch with only some of its counted positions (n,), and without rows that have none of them."""
    found = {name: value for name, value in batch.items() if name in MODEL_INPUTS}
    rows = batch["rows"][taught]
    if "cu_seq_lens_q" not in found:  # the boundaries of packed documents are those of the whole batch
        length = found["input_ids"].shape[-1]
        used, where = torch.unique(rows // length, return_inverse=True)
        found = {name: value[used] for name, value in found.items()}
        rows = where * length + rows % length
    asked = {ASKED: batch[ASKED]} if ASKED in batch else {}
    return {**found, **asked, "rows": rows, "places": batch["places"][taught]}


def check_taught(documents: DocumentSource, signal: TeacherSignal, key: str) -> None:
    """Refuse documents that no live or served teacher can teach: of prepared text all that none matches, and of a
    sample those that have token ids beyond their teachers' heads; the others are refused when they are read.

    Args:
        documents: the documents.
        signal: the teacher, or several.
        key: dotted path of the dataset in the configuration, for messages.

    Raises:
        MismatchError: names a document, or the values of a row.
    """
    if isinstance(signal, SeveralTeachers) and isinstance(documents, PreparedDataset):
        for values in documents.columns or [{}]:
            signal.teaching(values, f"{key}: a row")
    for document in sampled(documents):
        try:
            signal.take(document, np.arange(0))
        except MismatchError as error:
            raise MismatchError(f"{key}: {error}") from error

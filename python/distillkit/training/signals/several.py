"""Several live teachers: each runs on the rows that it teaches; where several teach a row, their probabilities are
averaged.

Shape legend: B batch, S sequence, N counted positions, n those of a teacher, P those of a document, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from distillkit.configuration.problems import shown
from distillkit.errors import ConfigError, MismatchError
from distillkit.losses.positions import DenseTeacher, DenseTeachers, Targets
from distillkit.models.head import backbone_layers, check_lm_head
from distillkit.shards.plausibility import sampled
from distillkit.training.data.examples import MODEL_INPUTS, DocumentSource
from distillkit.training.data.prepared import PreparedDataset
from distillkit.training.signals.base import check_ids_fit
from distillkit.training.signals.live import as_teacher, most_probable
from distillkit.training.signals.stored import within
from distillkit.types import Document, SparseLogprobs

if TYPE_CHECKING:
    from distillkit.training.config.schema import ListedTeacherConfig

__all__ = ["SeveralTeachers", "check_routes"]


class SeveralTeachers:
    """Distributions of several live teachers. A batch says of each position which of them teach it.

    Args:
        configs: the settings of each teacher: its weight, and the rows that it teaches.
        models: their models.
        head_size: width of the student's head; ids beyond it count as missing mass.

    Attributes:
        top_k: number of ids to keep of the (averaged) distributions; None: all.

    Raises:
        DistillKitError: a teacher's head cannot be applied apart from the model.
        ConfigError: top_k is more than the narrowest head has ids.
    """

    def __init__(self, configs: Sequence[ListedTeacherConfig], models: Sequence[Any], head_size: int) -> None:
        self.configs = list(configs)
        self._models = list(models)
        self._heads = [check_lm_head(model) for model in models]
        self.head_size = head_size
        self.top_k = configs[0].top_k
        narrowest = min(head_size, *(head.size for head in self._heads))
        if self.top_k is not None and self.top_k > narrowest:
            raise ConfigError(
                f"teachers.0.top_k: {self.top_k:,} ids were requested, but the narrowest head of student and teachers "
                f"has {narrowest:,}"
            )

    @property
    def models(self) -> dict[str, Any]:
        """The models by the keys of the configuration that name them."""
        return {f"teachers.{number}.path": model for number, model in enumerate(self._models)}

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
        check_ids_fit(document, min(self.head_size, *(self._heads[number].size for number in teaching)))
        return {"by": np.full(len(positions), sum(1 << number for number in teaching), np.int64)}

    def empty_targets(self) -> dict[str, npt.NDArray[Any]]:
        """Return the array of `take` for zero positions."""
        return {"by": np.empty(0, np.int64)}

    @torch.no_grad()
    def targets(self, batch: Mapping[str, Any], labels: torch.Tensor) -> Targets:
        """Run each teacher on the rows of a batch that it teaches: see `TeacherSignal.targets`."""
        by = batch["teacher_by"].to(labels.device)
        parts = []
        for number, config in enumerate(self.configs):
            taught = torch.nonzero(by >> number & 1).squeeze(-1)
            if len(taught):
                parts.append((taught, self._run(number, batch, taught), config.weight))
        dense = DenseTeachers(len(labels), max(head.size for head in self._heads), tuple(parts))
        if self.top_k is None:
            return Targets(labels, dense)
        first = most_probable(dense, len(labels), dense.width, self.top_k, labels.device)
        if dense.width > self.head_size and len(labels):
            first = SparseLogprobs(*within(*first.tensors(), self.head_size))
        return Targets(labels, first)

    def _run(self, number: int, batch: Mapping[str, Any], taught: torch.Tensor) -> DenseTeacher:
        """Run a teacher, and return its distributions at some of a batch's positions (n,)."""
        inputs = {name: value for name, value in batch.items() if name in MODEL_INPUTS}
        length = inputs["input_ids"].shape[-1]
        rows = batch["rows"][taught.to(batch["rows"].device)]
        if "cu_seq_lens_q" not in inputs:
            # The boundaries of packed documents are those of the whole batch; without them, other rows are left out.
            used, where = torch.unique(rows // length, return_inverse=True)
            inputs = {name: value[used] for name, value in inputs.items()}
            rows = where * length + rows % length
        with as_teacher(self._models[number]) as bare:
            moved = {
                name: value.to(bare.device) if isinstance(value, torch.Tensor) else value
                for name, value in inputs.items()
            }
            hidden, _ = backbone_layers(bare, (), **moved)
            weights = self._heads[number].weights()
        counted = hidden.flatten(0, 1)[rows.to(hidden.device)]
        return DenseTeacher(counted, self._heads[number], weights)


def check_routes(documents: DocumentSource, signal: SeveralTeachers, key: str) -> None:
    """Refuse documents that no teacher matches: of prepared text all, of a stored dataset a sample; the others are
    refused when they are read.

    Args:
        documents: the documents.
        signal: the teachers.
        key: dotted path of the dataset in the configuration, for messages.

    Raises:
        MismatchError: names a document, or the values of a row.
    """
    if isinstance(documents, PreparedDataset):
        for values in documents.columns or [{}]:
            signal.teaching(values, f"{key}: a row")
        return
    for document in sampled(documents):
        signal.teaching(document.columns, f"{key}: {document.place}")

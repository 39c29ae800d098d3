"""`DistillationTrainer`: distillation as a `transformers.Trainer`, made from Python objects in place of a YAML file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import transformers

from distillkit.reports.run_summary import RunSummary
from distillkit.shards import Dataset
from distillkit.training.config.objects import configuration, evaluated_section
from distillkit.training.config.surroundings import check_surroundings
from distillkit.training.data.prepared import Part
from distillkit.training.run import Given, Run, resumed_checkpoint
from distillkit.training.trainer import SignalTrainer

if TYPE_CHECKING:
    from typing import Unpack

    from distillkit.training.config.objects import TrainerSettings

__all__ = ["DistillationTrainer"]

Data: TypeAlias = str | os.PathLike[str] | Dataset | Mapping[str, Any]


class DistillationTrainer(SignalTrainer):
    """A `transformers.Trainer` that trains a student on a teacher's distributions, captured or live.

    It makes the same run as a YAML file: the same checks before the first step, the same losses, and the same files in
    the output folder (metrics, report, model card). It is used like any other Trainer: `train()`, also with
    `resume_from_checkpoint=True`, `evaluate()`, `save_model()`, `push_to_hub()`, `add_callback()`.

    Evaluation never has the logits of a batch, so there is no `compute_metrics`; what it measures is in
    `evaluation_loop`.

    Args:
        model: the student: a model, which may have PEFT adapters, or a folder or hub id.
        args: `transformers.TrainingArguments` or `trl.SFTConfig`, all of whose values count; or a mapping as in
            `training_args` of a YAML file, with the defaults described there, and `output_dir` ("trained").
        train_dataset: what to train on: a captured or published dataset as a path, a URL (`hf://datasets/…`), a hub id
            or an opened `distillkit.Dataset`; with a live teacher also text. A mapping is a section `train_dataset`, a
            list several datasets, which are mixed.
        eval_dataset: what to evaluate on, likewise.
        processing_class: the student's tokenizer; by default the one beside the model.
        callbacks: transformers callbacks, besides those that write metrics and report.
        **settings: the other settings of a YAML file by their names (docs/settings.md): `teacher` (a live teacher's
            folder or hub id, or the section), `loss_functions`, `sequence_length` (by default `max_length` of
            SFTConfig, 1,024), `peft`, `layer_mapping`, …; those of its section `dataset`, such as `packing`,
            `overflow` or `num_samples`, without the section's name.

    Attributes:
        summary: after training, what `distillkit.train` returns; before, None.

    Raises:
        ConfigError: a setting is unknown, not allowed, or does not fit the student; reports all problems.
        MismatchError: tokenizer, vocabulary, codec or alignment of the data do not match the student.

    Example:
        >>> from distillkit import DistillationTrainer
        >>> trainer = DistillationTrainer(
        ...     model="student", train_dataset="captured", args={"output_dir": "out", "max_steps": 1}
        ... )
        >>> trainer.train().global_step
        1
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | transformers.PreTrainedModel | Any,
        args: transformers.TrainingArguments | Mapping[str, Any] | None = None,
        *,
        train_dataset: Data | Sequence[Data],
        eval_dataset: Data | Sequence[Data] | None = None,
        processing_class: Any = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
        **settings: Unpack[TrainerSettings],
    ) -> None:
        self._began = time.perf_counter()
        by_name = isinstance(model, (str, os.PathLike))
        name = os.fspath(model) if by_name else str(getattr(model, "name_or_path", "") or type(model).__name__)
        config = configuration(name, train_dataset, eval_dataset, args, settings)
        check_surroundings(config, loaded=not by_name)
        parts: tuple[tuple[Part, Any], ...] = (("train", train_dataset), ("eval", eval_dataset))
        opened = {part: _opened(dataset) for part, dataset in parts}
        self._run = Run(config, Given(None if by_name else model, processing_class, opened))
        trainer_parts = self._run.trainer_parts()
        with self._run.reaching_hub():
            super().__init__(**trainer_parts)
        self._run.trainer = self
        self.summary: RunSummary | None = None
        for callback in callbacks or ():
            self.add_callback(callback)
        self._run.complete(self)

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, *arguments: Any, **named: Any) -> Any:
        """Train, and write metrics, report and summary to the output folder. As the Trainer's own, this does not save
        the student: call `save_model` or `push_to_hub`.

        Args:
            resume_from_checkpoint: True for the last complete checkpoint in the output folder, or a checkpoint's
                folder. It must be of this run; whatever decides the student is compared.
            *arguments, **named: as for the Trainer's own method.

        Returns:
            transformers' `TrainOutput`; more figures are in `summary`.

        Raises:
            ConfigError: there is no such checkpoint, or it is incomplete.
            MismatchError: the checkpoint is of another run.
            DistillKitError: training has diverged.
        """
        run = self._run
        wanted = (
            os.fspath(resume_from_checkpoint) if isinstance(resume_from_checkpoint, Path) else resume_from_checkpoint
        )
        arguments_now = {**run.config.training_args, "resume_from_checkpoint": wanted}
        config = run.config.model_copy(update={"training_args": arguments_now})
        checkpoint = run.decided(lambda: resumed_checkpoint(run, config))

        def training(resume_from_checkpoint: str | None) -> Any:
            return super(DistillationTrainer, self).train(resume_from_checkpoint, *arguments, **named)

        result = run.fit(self, training, checkpoint)
        self.summary = RunSummary(run.finish(self, result.global_step, time.perf_counter() - self._began))
        return result

    def evaluate(self, eval_dataset: Any = None, *arguments: Any, **named: Any) -> dict[str, float]:
        """Measure the student on held-out documents. Once training has begun, the result is part of the run's record.

        Args:
            eval_dataset: other documents than the trainer's `eval_dataset`, in any way that the constructor takes; the
                result is then not recorded.
            *arguments, **named: as for the Trainer's own method.

        Returns:
            The metrics of `evaluation_loop`, by name.

        Raises:
            ConfigError, MismatchError: the documents cannot be opened, or do not fit the student.
        """
        several = isinstance(eval_dataset, Sequence) and not isinstance(eval_dataset, (str, Dataset))
        if not several and not isinstance(eval_dataset, (str, os.PathLike, Dataset, Mapping)):
            recorded: dict[str, float] = super().evaluate(eval_dataset, *arguments, **named)
            return recorded
        examples = self._run.other_examples(evaluated_section(eval_dataset), _opened(eval_dataset))
        with self._run.unrecorded():
            found: dict[str, float] = super().evaluate(examples, *arguments, **named)
        return found


def _opened(dataset: Any) -> list[Dataset | None]:
    """Return those of one or several datasets that are open."""
    if dataset is None:
        return []
    several = dataset if isinstance(dataset, Sequence) and not isinstance(dataset, (str, Dataset)) else [dataset]
    return [each if isinstance(each, Dataset) else None for each in several]

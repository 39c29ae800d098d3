"""A training run from its configuration: `Run` loads and checks the parts on demand, and `train` trains."""

from __future__ import annotations

import json
import logging
import time
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from distillkit.errors import ConfigError
from distillkit.losses.fused import Objective
from distillkit.memory import peak_memory
from distillkit.models.head import rows_of
from distillkit.models.layers import LayerMatching, match_layers
from distillkit.reports.run_report import ReportFiles
from distillkit.shards import Dataset as StoredDataset
from distillkit.text import tokenizer as tokenizers
from distillkit.training.callbacks import ConsoleProgress, MetricsFile
from distillkit.training.config.arguments import training_arguments
from distillkit.training.config.schema import LiveTeacherConfig
from distillkit.training.data.documents import open_documents, training_dataset
from distillkit.training.data.examples import DistillationDataset, DocumentSource
from distillkit.training.data.prepared import Part
from distillkit.training.data.stored import check_dataset, check_ids
from distillkit.training.description import describe
from distillkit.training.saving import save_student, whole_checkpoint
from distillkit.training.signals.live import OnlineSignal, check_teacher_tokenizer, load_teacher
from distillkit.training.signals.stored import OfflineSignal
from distillkit.training.special_tokens import check_eos_labels, configure_model, configure_tokenizer
from distillkit.training.student import check_student, load_student
from distillkit.training.trackers import TrackedDescription, tracking
from distillkit.training.trainer import DistillationTrainer, ReportWriter

if TYPE_CHECKING:
    from trl import SFTConfig

    from distillkit.training.config.schema import RunConfig

__all__ = ["Run", "checkpoint_of", "train"]

logger = logging.getLogger(__name__)


class Run:
    """The parts of a run. Each is loaded and checked on first access, after those it depends on: training accesses
    all of them, a dry run one after another.

    Args:
        config: the run's configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.folder = Path(config.output_path)
        self.progress = ConsoleProgress()

    @cached_property
    def outline(self) -> transformers.PreTrainedModel:
        """The student without weights, with its settings applied; see `check_student`."""
        return check_student(self.config)

    @cached_property
    def arguments(self) -> SFTConfig:
        """The trainer's arguments."""
        # Must come first: with these arguments, DeepSpeed's ZeRO-3 would shard the student's outline.
        self.check_student()
        return training_arguments(self.config)

    def check_student(self) -> None:
        """Check the student's settings on its outline.

        Raises:
            ConfigError: they do not fit the student.
        """
        _ = self.outline

    @cached_property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        arguments = self.arguments  # raises if they are wrong, before anything is loaded
        tokenizer = tokenizers.load_tokenizer(self.config.model, trust_remote_code=self.config.trust_remote_code)
        configure_tokenizer(tokenizer, arguments)
        return tokenizer

    @cached_property
    def eos_labels(self) -> list[int]:
        """Token ids that end a document; see `check_eos_labels`."""
        return check_eos_labels(self.config, self.tokenizer)

    @cached_property
    def sources(self) -> dict[Part, DocumentSource]:
        """The opened training and evaluation data."""
        with self.arguments.main_process_first(desc="opening the datasets"):
            return _open_sources(self.config, self.tokenizer, self.arguments)

    @cached_property
    def model(self) -> transformers.PreTrainedModel:
        """The student."""
        # Rows added to the embeddings start with random values.
        transformers.set_seed(self.arguments.seed)
        model = load_student(
            self.config,
            tokenizers.vocab_size(self.tokenizer),
            checkpointing=self.arguments.activation_checkpointing,
        )
        configure_model(model, self.tokenizer, self.arguments)
        return model

    @cached_property
    def teacher(self) -> tuple[OnlineSignal | None, LayerMatching | None]:
        """The live teacher and the layers matched with it, if the configuration has them."""
        return _live_teacher(self.config, self.model, self.arguments.device)

    @cached_property
    def datasets(self) -> dict[Part, DistillationDataset]:
        """Training and evaluation examples, checked against the student."""
        live, _ = self.teacher
        return {
            part: _dataset(self.config, part, source, self.model, self.arguments, live)
            for part, source in self.sources.items()
        }

    @cached_property
    def objective(self) -> Objective:
        """The losses."""
        _tell_temperature(self.config)
        return Objective.training(self.config.loss_functions)

    @cached_property
    def description(self) -> dict[str, Any]:
        """The description of the run; see `describe`."""
        return describe(self.config, self.arguments, self.model, self.datasets)

    @cached_property
    def metrics(self) -> MetricsFile:
        """The metrics file, which begins with the description."""
        return MetricsFile(self.folder, self.description)

    @cached_property
    def trainer(self) -> DistillationTrainer:
        """The trainer, made of all other parts."""
        # First, so that data for another student raises before anything large is loaded.
        eos_labels, _ = self.eos_labels, self.sources
        self.progress.parts = self.objective.losses
        trainer = DistillationTrainer(
            self.model,
            self.arguments,
            objective=self.objective,
            train_dataset=self.datasets["train"],
            eval_dataset=self.datasets.get("eval"),
            matching=self.teacher[1],
            processing_class=self.tokenizer,
            eos_labels=eos_labels,
            callbacks=[
                TrackedDescription(self.description),
                self.metrics,
                *([] if self.arguments.disable_tqdm else [self.progress]),
            ],
        )
        # Added last, so that the metrics file already contains the evaluation's log entry.
        trainer.add_callback(ReportWriter(trainer, ReportFiles(self.folder)))
        return trainer


def train(config: RunConfig) -> dict[str, Any]:
    """Train a student according to a configuration: load and check everything, train, evaluate, save.

    Writes the trained student with its tokenizer, checkpoints, `metrics.jsonl` (one JSON object per log entry),
    `distillkit_config.yaml`, `summary.json` and `report.md` with its plots to `config.output_path`.

    Returns:
        The summary: steps, seconds, tokens, share of the time spent waiting for data, peak memory, the first and last
        evaluation and the last training metrics.

    Raises:
        ConfigError: a setting cannot be applied.
        MismatchError: tokenizer, vocabulary, codec or alignment of the data do not match the student.
    """
    started = time.perf_counter()
    checkpoint = checkpoint_of(config)
    run = Run(config)
    trainer = run.trainer
    if trainer.is_world_process_zero():
        _write_config(config)
    with tracking(config):
        try:
            result = trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            run.progress.close()
    save_student(trainer, config)
    summary = {
        "output_path": config.output_path,
        "steps": result.global_step,
        "seconds": time.perf_counter() - started,
        "train_tokens": trainer.counts["tokens"],
        "tokens_per_second": trainer.counts["tokens"] / max(trainer.training_seconds, 1e-9),
        "data_wait": trainer.waiting_seconds / max(trainer.training_seconds, 1e-9),
        "cut_documents": trainer.counts["cut_documents"],
        "cut_tokens": trainer.counts["cut_tokens"],
        **peak_memory(),
        **run.metrics.ends(),
    }
    if trainer.is_world_process_zero():
        (run.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        ReportFiles(run.folder).finish()
    return summary


def _tell_temperature(config: RunConfig) -> None:
    """Log losses that are computed with another arithmetic than the published one, unless that was asked for."""
    if isinstance(config.teacher, LiveTeacherConfig) and config.teacher.top_k is None:
        return
    for loss in config.loss_functions:
        if loss.temperature not in (None, 1.0) and loss.published_temperature is None:
            logger.info(
                "loss_functions: %s at temperature %g softens teacher and student over the stored ids and one outcome "
                "for all others. The published toolkit softens the student over its whole vocabulary; "
                "published_temperature: true does the same (see docs/losses.md)",
                loss.function,
                loss.temperature,
            )


def _open_sources(config: RunConfig, tokenizer: Any, arguments: SFTConfig) -> dict[Part, DocumentSource]:
    """Open training and evaluation data; a mismatched tokenizer raises before any model is loaded."""
    if config.teacher.kind == "hf":
        check_teacher_tokenizer(config, tokenizer)
    parts: tuple[Part, ...] = ("train", "eval")
    opened = {part: open_documents(config, part, tokenizer, arguments) for part in parts}
    return {part: source for part, source in opened.items() if source is not None}


def _live_teacher(
    config: RunConfig, model: transformers.PreTrainedModel, device: torch.device
) -> tuple[OnlineSignal | None, LayerMatching | None]:
    """Load the live teacher, if the configuration has one, and match its layers with the student's."""
    if not isinstance(config.teacher, LiveTeacherConfig):
        return None, None
    # A student with adapters is its own teacher if the teacher is its unchanged base model.
    teacher = model if config.teaches_itself else load_teacher(config, device)
    matching = None
    if config.layer_mapping is not None:
        force = config.force_hidden_state_projection
        matching = match_layers(config.layer_mapping, model, teacher, force_projection=force)
    layers = () if matching is None else matching.teacher_layers
    return OnlineSignal(teacher, top_k=config.teacher.top_k, layers=layers), matching


def _dataset(
    config: RunConfig,
    part: Part,
    source: DocumentSource,
    model: transformers.PreTrainedModel,
    arguments: SFTConfig,
    teacher: OnlineSignal | None,
) -> DistillationDataset:
    """Check a dataset against the student, and return its training examples."""
    head_size, key = rows_of(model.get_output_embeddings().weight), f"dataset.{part}_dataset"
    if teacher is not None:
        check_ids(source, head_size, key)
        return training_dataset(config, part, source, teacher, arguments)
    if not isinstance(source, StoredDataset):
        raise TypeError(f"{key}: expected stored distributions, found {type(source).__name__}")
    check_dataset(source, head_size, key)
    signal = OfflineSignal(
        source.codec,
        head_size,
        on_device=arguments.device.type == "cuda",
        label_logprobs=bool((source.header.capture or {}).get("label_logprobs")),
    )
    return training_dataset(config, part, source, signal, arguments)


def checkpoint_of(config: RunConfig) -> str | None:
    """Return the checkpoint to resume from, or None.

    Raises:
        ConfigError: the configuration asks for a checkpoint that does not exist.
    """
    wanted = config.training_args.get("resume_from_checkpoint")
    if not wanted:
        return None
    if wanted is True:
        folder = whole_checkpoint(Path(config.output_path))
        if folder is None:
            raise ConfigError(
                f"{config.source}: training_args.resume_from_checkpoint: {config.output_path} contains no "
                "checkpoint; remove this setting"
            )
        return str(folder)
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise ConfigError(
            f"{config.source}: training_args.resume_from_checkpoint: {wanted!r} is not a checkpoint (it contains no "
            "trainer_state.json)"
        )
    return str(wanted)


def _write_config(config: RunConfig) -> None:
    import yaml

    folder = Path(config.output_path)
    folder.mkdir(parents=True, exist_ok=True)
    content = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    (folder / "distillkit_config.yaml").write_text(content, encoding="utf-8")

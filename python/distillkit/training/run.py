"""A training run from its configuration: `Run` loads and checks the parts on demand, and `train` trains.

`DistillationTrainer` makes a run from Python objects; everything else is the same.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
import transformers

from distillkit.codec import CompactConfig
from distillkit.configuration.secrets import secret_paths, without_secrets
from distillkit.errors import ConfigError, DistillKitError
from distillkit.losses.fused import Objective
from distillkit.memory import peak_memory
from distillkit.models.head import rows_of
from distillkit.models.layers import LayerMatching, match_layers
from distillkit.models.weights import damaged_file
from distillkit.reports.model_card import model_card
from distillkit.reports.run_record import SUMMARY, RunRecord, record_of
from distillkit.reports.run_report import ReportFiles
from distillkit.shards import Dataset as StoredDataset
from distillkit.text import tokenizer as tokenizers
from distillkit.training.batching import choose_packing, trained_models
from distillkit.training.callbacks import ConsoleProgress, MetricsFile
from distillkit.training.checkpoints import Checkpoint, checkpoint_of
from distillkit.training.config.arguments import recomputing, training_arguments
from distillkit.training.config.schema import PARTS, LiveTeacherConfig
from distillkit.training.config.surroundings import check_surroundings
from distillkit.training.data.documents import check_positions, check_row_lengths, open_documents, training_dataset
from distillkit.training.data.examples import DistillationDataset, DocumentSource
from distillkit.training.data.mixture import JoinedDocuments, Mixture, check_same_kind, rows_taken
from distillkit.training.data.prepared import Part
from distillkit.training.data.stored import check_dataset, check_ids
from distillkit.training.description import describe
from distillkit.training.identity import check_same_run, identity_of
from distillkit.training.rollouts.prompts import KEY, Prompts, open_prompts
from distillkit.training.rollouts.rounds import Rollouts
from distillkit.training.saving import reaching_hub, save_student
from distillkit.training.signals.base import TeacherSignal
from distillkit.training.signals.live import OnlineSignal, check_teacher_tokenizer, load_teacher
from distillkit.training.signals.served import ServedSignal
from distillkit.training.signals.server import TeacherServer, check_caches, connect, stop_all
from distillkit.training.signals.several import SeveralTeachers, check_taught
from distillkit.training.signals.stored import OfflineSignal
from distillkit.training.special_tokens import check_eos_labels, configure_model, configure_tokenizer
from distillkit.training.student import check_student, load_student, prepare_student
from distillkit.training.trackers import TrackedDescription, tracking
from distillkit.training.trainer import ReportWriter, SignalTrainer

if TYPE_CHECKING:
    from trl import SFTConfig

    from distillkit.training.config.schema import DatasetEntry, DatasetSource, RunConfig

__all__ = ["Given", "Run", "resumed_checkpoint", "train"]

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Given:
    """What the caller has loaded, in place of what the configuration names.

    Attributes:
        model: the student; it may have adapters.
        tokenizer: the student's tokenizer.
        datasets: opened datasets with stored distributions; None for one of a list that is not open.
    """

    model: Any = None
    tokenizer: Any = None
    datasets: Mapping[Part, Sequence[StoredDataset | None]] = field(default_factory=dict)


class Opened(NamedTuple):
    """A dataset of the configuration, and its documents."""

    entry: DatasetEntry
    documents: DocumentSource


class Run:
    """The parts of a run. Each is loaded and checked on first access, after those it depends on: training accesses
    all of them, a dry run one after another.

    Args:
        config: the run's configuration.
        given: parts that are already loaded.
    """

    def __init__(self, config: RunConfig, given: Given | None = None) -> None:
        self.config = config
        self.given = given or Given()
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
        """Check the student's settings on its outline, unless it is loaded already.

        Raises:
            ConfigError: they do not fit the student.
        """
        if self.given.model is None:
            _ = self.outline

    @cached_property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        arguments = self.arguments  # raises if they are wrong, before anything is loaded
        tokenizer = self.given.tokenizer
        if tokenizer is None:
            tokenizer = tokenizers.load_tokenizer(self.config.model, trust_remote_code=self.config.trust_remote_code)
        configure_tokenizer(tokenizer, arguments)
        return tokenizer

    @cached_property
    def eos_labels(self) -> list[int]:
        """Token ids that end a document; see `check_eos_labels`."""
        return check_eos_labels(self.config, self.tokenizer)

    @cached_property
    def sources(self) -> dict[Part, list[Opened]]:
        """The opened training and evaluation data."""
        with self.arguments.main_process_first(desc="opening the datasets"):
            sources = _open_sources(self.config, self.tokenizer, self.arguments, self.given.datasets)
        if self.prompts is not None and self.config.only_rollouts:
            return {"train": [Opened(self.config.dataset.entries("train")[0], self.prompts.documents)], **sources}
        return sources

    @cached_property
    def prompts(self) -> Prompts | None:
        """The prompts that the student continues, if it trains on its own completions."""
        if self.config.rollouts is None:
            return None
        with self.arguments.main_process_first(desc="opening the prompts"):
            return open_prompts(self.config, self.tokenizer, self.arguments)

    @cached_property
    def rollouts(self) -> Rollouts | None:
        """What writes completions of the prompts, if the student trains on them."""
        if self.config.rollouts is None or self.prompts is None:
            return None
        return Rollouts(self.config.rollouts, self.prompts, self.config.sequence_length, self.progress.generating)

    @cached_property
    def model(self) -> transformers.PreTrainedModel:
        """The student."""
        # Rows added to the embeddings start with random values.
        transformers.set_seed(self.arguments.seed)
        size, checkpointing = tokenizers.vocab_size(self.tokenizer), recomputing(self.arguments)[0]
        if self.given.model is None:
            model = load_student(self.config, size, checkpointing=checkpointing)
        else:
            model = prepare_student(self.given.model, self.config, size, checkpointing=checkpointing)
        configure_model(model, self.tokenizer, self.arguments)
        return model

    @cached_property
    def teacher_models(self) -> dict[str, transformers.PreTrainedModel]:
        """The models of live teachers, by the teachers' keys (`teachers.0`); see also `live_models`."""
        # A student with adapters is its own teacher if the teacher is its unchanged base model.
        own, device = self.config.own_teachers, self.arguments.device
        return {
            key: self.model if key in own else load_teacher(self.config, device, key)
            for key in self.config.live_teachers
        }

    @cached_property
    def matching(self) -> LayerMatching | None:
        """The layers of the student and of its only teacher whose hidden states are compared, if any are."""
        if self.config.layer_mapping is None:
            return None
        [teacher] = self.teacher_models.values()
        force = self.config.force_hidden_state_projection
        return match_layers(self.config.layer_mapping, self.model, teacher, force_projection=force)

    @cached_property
    def live(self) -> dict[str, OnlineSignal]:
        """The live teachers, by their keys."""
        layers = () if self.matching is None else self.matching.teacher_layers
        return {
            key: OnlineSignal(
                model,
                top_k=self.config.live_teachers[key].top_k,
                layers=layers,
                head_size=rows_of(self.model.get_output_embeddings().weight),
                key=key,
            )
            for key, model in self.teacher_models.items()
        }

    @property
    def live_models(self) -> dict[str, Any]:
        """The models of `teacher_models`, by the settings that name them (`teachers.0.path`), for messages."""
        return {key: model for signal in self.live.values() for key, model in signal.models.items()}

    @cached_property
    def servers(self) -> dict[str, TeacherServer]:
        """The served teachers, by their keys."""
        servers = {key: connect(self.config, self.tokenizer, key) for key in self.config.served_teachers}
        check_caches(self.config, servers)
        return servers

    @cached_property
    def datasets(self) -> dict[Part, DistillationDataset | Mixture]:
        """Training and evaluation examples, checked against the student."""
        models = trained_models(self.model, self.live_models)
        if self.config.dataset.packing == "auto":
            choose_packing(self.arguments, models)
        if self.prompts is not None:
            _check_prompts(self.config, self.prompts, models)
        return {part: self._examples(self.config, opened) for part, opened in self.sources.items()}

    def _examples(self, config: RunConfig, opened: Sequence[Opened]) -> DistillationDataset | Mixture:
        """Examples of one or several datasets, checked against the student."""
        entries, setting = [each.entry for each in opened], f"{opened[0].entry.part}_dataset"
        listed = isinstance(getattr(config.dataset, setting), list)
        documents = JoinedDocuments([each.documents for each in opened]) if listed else opened[0].documents
        # Completions are not among the documents that an error about a row could name.
        known = None if self.prompts is not None and opened[0].entry.part == "train" else documents
        signal = self._signal(known, f"dataset.{setting}")
        if self.prompts is not None and signal is not None and opened[0].documents is self.prompts.documents:
            return DistillationDataset(opened[0].documents, signal, config.sequence_length, self.prompts.chosen)
        parts = [_dataset(config, each, self.model, self.arguments, signal) for each in opened]
        for dataset, entry in zip(parts, entries, strict=True):
            _check_counted(dataset, entry.key)
        if not listed:
            return parts[0]
        check_same_kind(entries, parts)
        return Mixture(parts, [entry.name for entry in entries], rows_taken(entries, parts))

    def _signal(self, documents: DocumentSource | None, key: str) -> TeacherSignal | None:
        """Return what live and served teachers teach of some documents; None if distributions are stored.

        Args:
            documents: the documents, which errors name, if they are known.
            key: what errors call them.
        """
        head_size = rows_of(self.model.get_output_embeddings().weight)
        served = {name: ServedSignal(server, head_size, documents, key) for name, server in self.servers.items()}
        signals: dict[str, OnlineSignal | ServedSignal] = {**self.live, **served}
        if self.config.teachers is None:
            return next(iter(signals.values()), None)
        return SeveralTeachers(self.config.teachers, [signals[name] for name in self.config.teachers_by_key])

    def other_examples(
        self, where: DatasetSource | list[DatasetSource], given: Sequence[StoredDataset | None]
    ) -> DistillationDataset | Mixture:
        """Examples of other datasets to evaluate on, checked like the configured ones.

        Args:
            where: the dataset, or several.
            given: the same, those that are open already.
        """
        section = self.config.dataset.model_copy(update={"eval_dataset": where})
        config = self.config.model_copy(update={"dataset": section})
        opened = _opened(config, "eval", self.tokenizer, self.arguments, given)
        return self._examples(config, opened)

    @cached_property
    def objective(self) -> Objective:
        """The losses."""
        _tell_temperature(self.config, self.sources["train"])
        _tell_own_words(self.config)
        return Objective.training(self.config.loss_functions)

    @cached_property
    def description(self) -> dict[str, Any]:
        """The description of the run; see `describe`."""
        return describe(self.config, self.arguments, self.model, self.datasets)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the student that training ends with; see `identity_of`."""
        models = trained_models(self.model, self.live_models)
        prompts = None if self.prompts is None else self.prompts.documents
        found = identity_of(self.config, self.arguments, self.datasets, models, self.tokenizer, prompts)
        return found | {f"{key}: served model": server.name for key, server in self.servers.items()}

    @cached_property
    def metrics(self) -> MetricsFile:
        """The metrics file, which begins with the description."""
        return MetricsFile(self.folder, self.description)

    @cached_property
    def trainer(self) -> SignalTrainer:
        """The trainer, made of all other parts."""
        parts = self.trainer_parts()
        with self.reaching_hub():
            trainer = SignalTrainer(**parts)
        self.complete(trainer)
        return trainer

    def trainer_parts(self) -> dict[str, Any]:
        """Load everything, and return the arguments of a `SignalTrainer`."""
        # First, so that data for another student, or a server that is not there, raise before anything large is loaded.
        eos_labels, _, _ = self.eos_labels, self.sources, self.servers
        self.progress.parts = self.objective.losses
        self.progress.sources = {part: dataset.names for part, dataset in self.datasets.items()}
        identity = self.identity  # of the models as they were loaded
        callbacks = [
            TrackedDescription(self.description),
            self.metrics,
            *([] if self.arguments.disable_tqdm else [self.progress]),
        ]
        return {
            "model": self.model,
            "args": self.arguments,
            "objective": self.objective,
            "train_dataset": self.datasets["train"],
            "eval_dataset": self.datasets.get("eval"),
            "matching": self.matching,
            "processing_class": self.tokenizer,
            "eos_labels": eos_labels,
            "identity": identity,
            "rollouts": self.rollouts,
            "callbacks": callbacks,
        }

    def reaching_hub(self) -> AbstractContextManager[None]:
        """Around the trainer's constructor: it creates the repository that it will push to."""
        return reaching_hub(self.config) if self.arguments.push_to_hub else nullcontext()

    def complete(self, trainer: SignalTrainer) -> None:
        """Let a trainer, made of this run's parts, write the run's report and the student's model card."""
        trainer.card = lambda: model_card(self.record, trainer.hub_model_id)
        # Added last, so that the metrics file already contains the evaluation's log entry.
        self.report = ReportWriter(trainer, ReportFiles(self.folder))
        trainer.add_callback(self.report)

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Keep what happens in this block out of the run's record."""
        writers: tuple[MetricsFile | ReportWriter, ...] = (self.metrics, self.report)
        before = [writer.recording for writer in writers]
        for writer in writers:
            writer.recording = False
        try:
            yield
        finally:
            for writer, recording in zip(writers, before, strict=True):
                writer.recording = recording

    @property
    def record(self) -> RunRecord:
        """What has been logged until now."""
        return record_of(self.folder, self.metrics.entries or [{"step": 0, "run": self.description}])

    def fit(self, trainer: SignalTrainer, training: Callable[..., T], checkpoint: Checkpoint | None) -> T:
        """Train, with trackers open and the configuration beside the results.

        Args:
            trainer: made of this run's parts.
            training: the Trainer's own `train`.
            checkpoint: to resume from.
        """
        trainer.last_checkpoint = None if checkpoint is None else checkpoint.folder
        if trainer.is_world_process_zero():
            _write_config(self.config)
        with tracking(self.config):
            try:
                with self.asking():
                    result = training(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
            finally:
                self.progress.close()
        trainer.check_finite()
        return result

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Stop asking servers at the end. If this block fails, its error is raised, whatever else fails then."""
        try:
            yield
        except BaseException:
            try:
                self.stop_asking()
            except (DistillKitError, OSError) as error:
                logger.error("%s", error)
            raise
        self.stop_asking()

    def stop_asking(self) -> None:
        """Cancel what servers were asked ahead, if any are connected, and write what their caches hold; see
        `stop_all`."""
        stop_all(self.__dict__.get("servers", {}).values())

    def finish(self, trainer: SignalTrainer, steps: int, seconds: float) -> dict[str, Any]:
        """Write the summary and the last report, and return the summary; see `train`."""
        summary = {
            "output_path": self.config.output_path,
            "steps": steps,
            "seconds": seconds,
            "train_tokens": trainer.counts["tokens"],
            "tokens_per_second": trainer.counts["tokens"] / max(trainer.training_seconds, 1e-9),
            "data_wait": trainer.waiting_seconds / max(trainer.training_seconds, 1e-9),
            **trainer.teacher_wait(),
            "cut_documents": trainer.counts["cut_documents"],
            "cut_tokens": trainer.counts["cut_tokens"],
            **peak_memory(),
            **self.metrics.ends(),
        }
        if trainer.is_world_process_zero():
            (self.folder / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            ReportFiles(self.folder).finish()
        return summary

    def decided(self, decide: Callable[[], T]) -> T:
        """Return what the first process decides, in all processes; an error is raised in all of them."""
        if self.arguments.world_size == 1:
            return decide()
        outcome: list[Any] = [None, None]  # the result, and the error
        if self.arguments.process_index == 0:
            try:
                outcome[0] = decide()
            except (DistillKitError, OSError) as error:
                outcome[1] = error
        torch.distributed.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return cast(T, outcome[0])


def train(config: RunConfig) -> dict[str, Any]:
    """Train a student according to a configuration: load and check everything, train, evaluate, save.

    Writes the trained student with its tokenizer and model card, checkpoints, `metrics.jsonl` (one JSON object per log
    entry), `distillkit_config.yaml`, `summary.json` and `report.md` with its plots to `config.output_path`.

    Returns:
        The summary: steps, seconds, tokens, share of the time spent waiting for data, peak memory, the first and last
        evaluation and the last training metrics.

    Raises:
        ConfigError: a setting cannot be applied.
        MismatchError: tokenizer, vocabulary, codec or alignment of the data do not match the student.
    """
    started = time.perf_counter()
    check_surroundings(config)
    run = Run(config)
    trainer = run.trainer
    checkpoint, finished = run.decided(lambda: _resumed(run))
    if finished is not None:
        return finished
    result = run.fit(trainer, trainer.train, checkpoint)
    save_student(trainer, config)
    return run.finish(trainer, result.global_step, time.perf_counter() - started)


def _tell_temperature(config: RunConfig, opened: Sequence[Opened]) -> None:
    """Log losses that are computed with another arithmetic than the published one, unless that was asked for."""
    if isinstance(config.teacher, LiveTeacherConfig) and config.teacher.top_k is None:
        return
    if all(isinstance(each.documents, StoredDataset) and each.documents.codec.draws is not None for each in opened):
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


def _tell_own_words(config: RunConfig) -> None:
    """Warn of a loss that teaches the student what it has written itself."""
    if config.only_rollouts and any(loss.function == "cross_entropy" and loss.weight for loss in config.loss_functions):
        logger.warning(
            "loss_functions: cross_entropy takes the tokens of the completions for the right ones, but the student has "
            "written them itself; leave it out, or mix in other documents (rollouts.fraction)"
        )


def _tell_dropped_mass(config: RunConfig, source: StoredDataset) -> None:
    """Warn of losses that drop the missing probability of rows whose number of ids varies with it."""
    codec = source.codec.config
    losses = sorted({loss.function for loss in config.loss_functions if loss.weight and loss.drops_missing})
    if losses and isinstance(codec, CompactConfig) and codec.adaptive:
        logger.warning(
            "loss_functions: %s drop the probability outside the stored ids (missing_probability_handling: zero), but "
            "%s ends each row where it is small, so how much is dropped differs from row to row. Measured, the "
            "gradient then has a cosine of 0.85 with that of the whole distributions, against 0.92 with a fixed k: set "
            "uniform, with which it is 0.997, or label",
            ", ".join(losses),
            source.path,
        )


def _open_sources(
    config: RunConfig, tokenizer: Any, arguments: SFTConfig, given: Mapping[Part, Sequence[StoredDataset | None]]
) -> dict[Part, list[Opened]]:
    """Open training and evaluation data; a mismatched tokenizer raises before any model is loaded."""
    for key in config.teachers_by_key:
        check_teacher_tokenizer(config, tokenizer, key)
    parts = [part for part in PARTS if part == "eval" or not config.only_rollouts]
    opened = {part: _opened(config, part, tokenizer, arguments, given.get(part, ())) for part in parts}
    return {part: sources for part, sources in opened.items() if sources}


def _opened(
    config: RunConfig, part: Part, tokenizer: Any, arguments: SFTConfig, given: Sequence[StoredDataset | None]
) -> list[Opened]:
    """Open the datasets to train or evaluate on."""
    entries = config.dataset.entries(part)
    pairs = zip(entries, given or [None] * len(entries), strict=True)
    return [Opened(entry, open_documents(config, entry, tokenizer, arguments, known)) for entry, known in pairs]


def _dataset(
    config: RunConfig,
    opened: Opened,
    model: transformers.PreTrainedModel,
    arguments: SFTConfig,
    teacher: TeacherSignal | None,
) -> DistillationDataset:
    """Check a dataset against the student, and return its training examples."""
    entry, source = opened
    head_size, key = rows_of(model.get_output_embeddings().weight), entry.key
    models = trained_models(model, None if teacher is None else teacher.models)
    check_positions(config, entry, source, arguments, models)
    if teacher is not None:
        check_ids(source, head_size, key)
        check_taught(source, teacher, key)
        return training_dataset(config, entry, source, teacher, arguments)
    if not isinstance(source, StoredDataset):
        raise TypeError(f"{key}: expected stored distributions, found {type(source).__name__}")
    check_dataset(source, head_size, key)
    _tell_dropped_mass(config, source)
    stored = OfflineSignal(
        source.codec,
        head_size,
        on_device=arguments.device.type == "cuda",
        label_logprobs=bool((source.header.capture or {}).get("label_logprobs")),
    )
    return training_dataset(config, entry, source, stored, arguments)


def _check_prompts(config: RunConfig, prompts: Prompts, models: Mapping[str, Any]) -> None:
    """Refuse prompts with token ids beyond the student's head, or that lead beyond a model's table of positions."""
    check_ids(prompts.documents, rows_of(models["model"].get_output_embeddings().weight), KEY)
    new = 0 if config.rollouts is None else config.rollouts.max_new_tokens
    check_row_lengths(models, prompts.longest + new, prompts.longest + new, f"{KEY}, with completions,")


def _check_counted(dataset: DistillationDataset, key: str) -> None:
    """Refuse examples of which no token counts. Usually the first has one, and no others are read.

    Raises:
        ConfigError: there is none.
    """
    if not any(len(dataset[index].positions) for index in range(len(dataset))):
        raise ConfigError(f"{key}: no token counts: all its documents are empty, single tokens or masked")


def resumed_checkpoint(run: Run, config: RunConfig) -> Checkpoint | None:
    """Return the checkpoint to resume from, checked completely, or None.

    Args:
        run: the run's parts.
        config: its configuration, with the output folder.

    Raises:
        ConfigError: as `checkpoint_of`; or the checkpoint is from a later step than the run's last.
        MismatchError: the checkpoint is of another run.
    """
    checkpoint = checkpoint_of(config, content=True)
    if checkpoint is None:
        return None
    steps = run.trainer.last_step()
    check_same_run(checkpoint.identity, run.trainer.full_identity(steps), checkpoint.folder)
    if checkpoint.step > steps:
        raise ConfigError(
            f"{config.source}: training_args: {checkpoint.folder} was saved after step {checkpoint.step:,}, but this "
            f"run ends at step {steps:,} (max_steps or num_train_epochs); resume from an earlier checkpoint"
        )
    processes = run.arguments.world_size
    states = {"rng_state.pth"} if processes == 1 else {f"rng_state_{rank}.pth" for rank in range(processes)}
    if not states <= checkpoint.files.keys():
        logger.warning(
            "%s was saved by another number of processes: dropout, if the student has any, goes on with other random "
            "numbers",
            checkpoint.folder,
        )
    return checkpoint


def _resumed(run: Run) -> tuple[Checkpoint | None, dict[str, Any] | None]:
    """Return the checkpoint to resume from, and the summary of a run that has already ended, if it has."""
    checkpoint = resumed_checkpoint(run, run.config)
    if checkpoint is None or checkpoint.step < run.trainer.last_step():
        return checkpoint, None
    try:
        summary = json.loads((run.folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return checkpoint, None  # stopped before the student was saved
    if not isinstance(summary, dict) or summary.get("steps") != checkpoint.step:
        return checkpoint, None
    if not any(run.folder.glob("*.safetensors")) or damaged_file(str(run.folder)) is not None:
        return checkpoint, None  # the student has been lost since: it is saved again
    logger.warning(
        "nothing to train: the run in %s has all its %s steps, and its student stays as it is",
        run.folder,
        summary["steps"],
    )
    return checkpoint, summary


def _write_config(config: RunConfig) -> None:
    import yaml

    folder = Path(config.output_path)
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.model_dump(mode="json", exclude_unset=True)
    comments = [f"# Left out, since it is secret: {path}\n" for path in secret_paths(settings)]
    overrides = without_secrets(config.overrides)
    comments += [f"# Set on the command line: {path}={json.dumps(overrides[path])}\n" for path in overrides]
    content = yaml.safe_dump(without_secrets(settings), sort_keys=False, allow_unicode=True)
    (folder / "distillkit_config.yaml").write_text("".join(comments) + content, encoding="utf-8")

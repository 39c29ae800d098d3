"""`SignalTrainer` trains a student on a teacher's signal. `distillkit.training.run` makes one from a configuration,
`DistillationTrainer` is one that is made from Python objects."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, rotate_checkpoints

from distillkit.errors import ConfigError, DistillKitError
from distillkit.losses.fused import Objective
from distillkit.memory import peak_memory
from distillkit.models.layers import LayerMatching, exported, load_projections, save_projections, without_projections
from distillkit.reports.model_card import CARD, CARD_MARK
from distillkit.reports.run_report import ReportFiles
from distillkit.training import checkpoints
from distillkit.training.attach import DistillationInputs, DistillationOutput, attach_losses
from distillkit.training.batching import batch_layout, check_batches, trained_models
from distillkit.training.data.examples import MODEL_INPUTS, Collator, DistillationDataset, DocumentOrder
from distillkit.training.data.mixture import Mixture, MixtureOrder
from distillkit.training.differences import Differences
from distillkit.training.identity import LAST
from distillkit.training.rollouts.order import WithSlots
from distillkit.training.saving import saving
from distillkit.training.signals.served import asked_ahead
from distillkit.training.signals.server import flush_all

if TYPE_CHECKING:
    from trl import SFTConfig

    from distillkit.training.rollouts.rounds import Rollouts


__all__ = ["ReportWriter", "SignalTrainer"]

_COUNTS = ("tokens", "cut_documents", "cut_tokens")


class SignalTrainer(transformers.Trainer):  # type: ignore[misc]
    """A `transformers.Trainer` whose loss is computed inside the student's forward, from hidden states and a teacher's
    signal.

    The loss of an optimiser step is the mean over its counted positions in all micro-batches and processes, so that
    batch size, accumulation and number of processes do not change it. Evaluation is the same mean over the entire
    held-out set.

    Args:
        model: the student, not yet wrapped for distributed training; its forward is extended (`attach_losses`).
        args: see `training_arguments`.
        objective: the losses.
        train_dataset, eval_dataset: documents with their teacher's signal. Of a `Mixture`, metrics are also logged by
            source: `kl/<name>`, and in evaluations `<prefix>_kl/<name>`.
        matching: which of the student's hidden states are compared with the teacher's, if any.
        processing_class: the tokenizer, saved with each checkpoint.
        eos_labels: token ids that become the tokenizer's end-of-sequence id in the labels.
        identity: what decides the student, kept in the checkpoints; see `identity_of`.
        rollouts: the student's own completions, which then are some or all of the training rows.
        callbacks: transformers callbacks.

    Attributes:
        card: makes the model card that is saved with the student, if set.

    Raises:
        DistillKitError: the student's head cannot be applied apart from the model.
        ConfigError: several GPUs are visible to one process.
    """

    control: transformers.TrainerControl
    train_dataset: Any
    data_collator: Any

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        args: SFTConfig,
        *,
        objective: Objective,
        train_dataset: DistillationDataset | Mixture,
        eval_dataset: DistillationDataset | Mixture | None = None,
        matching: LayerMatching | None = None,
        processing_class: Any = None,
        eos_labels: Sequence[int] = (),
        identity: Mapping[str, Any] | None = None,
        rollouts: Rollouts | None = None,
        callbacks: list[transformers.TrainerCallback] | None = None,
    ) -> None:
        if args.n_gpu > 1:
            raise ConfigError(
                f"{args.n_gpu} GPUs are visible to one process. Start one process for each: `torchrun "
                f"--nproc_per_node {args.n_gpu} -m distillkit CONFIG.yaml` (or accelerate launch), or choose one "
                "with CUDA_VISIBLE_DEVICES"
            )
        models = trained_models(model, train_dataset.signal.models)
        pad_id = getattr(processing_class, "pad_token_id", None)
        collator = Collator(
            pad_id=0 if pad_id is None else pad_id,
            pad_to_multiple_of=args.pad_to_multiple_of,
            **batch_layout(models),
            eos_labels=eos_labels,
            eos_id=getattr(processing_class, "eos_token_id", None),
        )
        packed = any(each is not None and each.packed for each in (train_dataset, eval_dataset))
        attach_losses(model, matching, lambda: check_batches(models, collator, packed=packed))
        use_cache = getattr(model.config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        # The Trainer disables the cache in the config, which would be saved with the student and slow down its
        # generation. The losses' forward passes use_cache=False itself.
        if use_cache is None:  # a vision-language model's config only has it in its text config
            del model.config.use_cache
        else:
            model.config.use_cache = use_cache
        # Progress and metrics have their own callbacks.
        self.remove_callback(transformers.PrinterCallback)
        self.remove_callback(DEFAULT_PROGRESS_CALLBACK)  # another one in notebooks
        self.objective = _by_source(objective, train_dataset)
        # compute_loss already divides by the count of the entire step.
        self.loss_is_scaled_for_ga = True
        self.counts = dict.fromkeys(_COUNTS, 0)
        self.training_seconds = 0.0
        self.waiting_seconds = 0.0
        self.teacher_seconds = 0.0
        self._waited = 0.0  # for the teacher, until the last log entry
        self._window = _Window(self.objective, train_dataset.names, args.device)
        self._order: DocumentOrder | MixtureOrder | None = None
        # The batches of an epoch as the Trainer has them, and as they are used.
        self._batches: tuple[Iterator[Any], Iterator[Any]] | None = None
        self.identity = dict(identity or {})
        self.last_checkpoint: Path | None = None
        self.differences: dict[str, Any] | None = None
        """Where student and teacher differ most, as of the last evaluation; see `Differences.to_dict`."""
        self.card: Callable[[], str] | None = None
        self._check_batch()
        self.add_callback(_Epochs(self))
        self.rollouts = rollouts
        if rollouts is not None:
            rollouts.attach(self)

    def create_optimizer(self, *arguments: Any, **named: Any) -> Any:
        """As the Trainer's; arguments that do not fit the optimiser are named as settings."""
        with _naming("optim and optim_args"):
            return super().create_optimizer(*arguments, **named)

    def create_scheduler(self, *arguments: Any, **named: Any) -> Any:
        """As the Trainer's; arguments that do not fit the schedule are named as settings."""
        with _naming("lr_scheduler_type and lr_scheduler_kwargs"):
            return super().create_scheduler(*arguments, **named)

    # -- data: an epoch has each document once, or as often as weights say, in a new order, whatever the processes -----

    def order_seed(self) -> int | None:
        """Return the seed of the order of training; None for the stored order."""
        if self.args.train_sampling_strategy == "sequential":
            return None
        return int(self.args.seed if self.args.data_seed is None else self.args.data_seed)

    def get_train_dataloader(self) -> Any:
        """As the Trainer's; with rollouts, its batches are lists of rows, which `get_batch_samples` collates: it has
        the completions."""
        if self.rollouts is None:
            return super().get_train_dataloader()
        dataset, collator = self.train_dataset, self.data_collator
        self.train_dataset, self.data_collator = WithSlots(dataset), list
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset, self.data_collator = dataset, collator

    def _get_train_sampler(self, train_dataset: Any = None) -> DocumentOrder | MixtureOrder:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.rollouts is not None:
            self._order = self.rollouts.rows(len(dataset))
            return self._order
        seed = self.order_seed()
        # A single process may end with a smaller batch. Several must have the same number of batches, for which
        # accelerate would repeat documents.
        fill = self.args.world_size > 1 and not self.args.dataloader_drop_last
        multiple = self._train_batch_size * self.args.world_size if fill else 1
        self._order = dataset.order(seed=seed, multiple=multiple)
        return self._order

    def _get_eval_sampler(self, eval_dataset: Any) -> DocumentOrder:
        # With dataloader_drop_last, a batch that is not filled up would be left out.
        fill = self.args.world_size > 1 or self.args.dataloader_drop_last
        multiple = self.args.eval_batch_size * self.args.world_size if fill else 1
        return DocumentOrder(len(eval_dataset), seed=None, multiple=multiple)

    def _check_batch(self) -> None:
        """Refuse a training set of which `dataloader_drop_last` would leave nothing."""
        rows = len(self.train_dataset.order(seed=None))
        batch = self._train_batch_size * self.args.world_size
        if self.args.dataloader_drop_last and rows < batch:
            each = f"per_device_train_batch_size {self._train_batch_size} × processes: {self.args.world_size}"
            what = "packed rows" if self.train_dataset.packed else "documents"
            raise ConfigError(
                f"training_args.dataloader_drop_last: true leaves out incomplete batches, and the training set is one: "
                f"{rows:,} {what}, but a batch has {batch:,} ({each}). Use a smaller batch, or dataloader_drop_last: "
                "false"
            )

    def start_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch.

        The Trainer's own call does not reach the sampler when it resumes with several processes.
        """
        if self._order is not None:
            self._order.set_epoch(epoch)

    def end_epoch(self) -> None:
        """Forget the batches of an epoch."""
        self._batches = None

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the micro-batches of a step, and measure how long that takes.

        Only waiting for batches is measured: reading, decoding and collating that was not done ahead, and the copy to
        the device; not the token count, which waits for the other processes.
        """
        if self.rollouts is not None:
            self.rollouts.begin()
            batches = self.rollouts.filled(self._window.waiting(epoch_iterator))
            return super().get_batch_samples(batches, num_batches, device)
        if self._batches is None or self._batches[0] is not epoch_iterator:
            self._batches = (epoch_iterator, asked_ahead(self.train_dataset.signal, epoch_iterator))
        return super().get_batch_samples(self._window.waiting(self._batches[1]), num_batches, device)

    # -- loss ----------------------------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a micro-batch, as its share of the mean over the optimiser step.

        `num_items_in_batch` counts the labels of all micro-batches and processes. Since gradients are then averaged
        over processes, the loss is multiplied by their number.
        """
        if num_items_in_batch is None:
            raise RuntimeError("the number of counted positions is unknown: the batch has no labels")
        output = self._forward(model, inputs, self.objective, self.train_dataset)
        self._window.add(output.statistics, inputs["counts"])
        replicas = self.accelerator.num_processes // self.get_tp_size()
        loss = output.loss / torch.as_tensor(num_items_in_batch).clamp_min(1) * replicas
        return (loss, output) if return_outputs else loss

    def _prepare_input(self, data: Any) -> Any:
        """Move part of a batch to the device. Under DeepSpeed, the Trainer's own method would also round the teacher's
        log-probs to the model's precision."""
        if isinstance(data, torch.Tensor):
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def _forward(self, model: Any, inputs: Mapping[str, Any], objective: Objective, dataset: Any) -> DistillationOutput:
        rows = inputs["rows"]
        labels = inputs["labels"].flatten()[rows + 1]
        with nullcontext() if self.rollouts is None else self.rollouts.scoring(inputs):
            targets = dataset.targets(inputs, labels)
        model_inputs = {name: inputs[name] for name in MODEL_INPUTS if name in inputs}
        output = model(**model_inputs, distill=DistillationInputs(rows, targets, objective))
        return output  # type: ignore[no-any-return]

    # -- evaluation ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Measure the student against the teacher's signal on held-out documents: means over all counted positions of
        all processes.

        Returns:
            Metrics `<prefix>_loss` (as trained), `_kl` (KL(teacher ‖ student) at temperature 1, stored ids
            renormalised), `_kl_with_rest` (the same with all other ids as one more outcome), `_cross_entropy` and
            `_perplexity` (of the true tokens), `_top1_agreement`, `_topk_overlap`, `_teacher_mass`, `_student_mass` (of
            the stored ids), `_positions`, and every other loss by its name. Of a `Mixture`, also those of each source,
            such as `<prefix>_kl/<name>`.
        """
        with self._window.paused():
            model = self._evaluated_model()
            model.eval()
            if hasattr(self.optimizer, "eval"):
                # Schedule-free optimisers evaluate with other weights than they train; training_step switches back.
                self.optimizer.eval()
            dataset = dataloader.dataset
            objective = _by_source(self.objective.evaluation(), dataset)
            sums = _sums((objective.sources, len(objective.names)), self.args.device)
            differences = Differences()
            self.callback_handler.eval_dataloader = dataloader
            for inputs in asked_ahead(dataloader.dataset.signal, iter(dataloader)):
                inputs = self._prepare_inputs(inputs)
                with self.compute_loss_context_manager():
                    output = self._forward(model, inputs, objective, dataset)
                sums += output.statistics
                differences.add(inputs, output.details)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            sums = self.accelerator.reduce(sums, reduction="sum")
            differences.gather()
            if self.is_world_process_zero():
                self.differences = differences.to_dict(dataset.source, self.processing_class)
        metrics = _evaluated(objective, sums.sum(0))
        if not metrics:
            raise DistillKitError(
                "the evaluation set has no position to predict: all its documents are empty, single tokens or masked"
            )
        for name, found in zip(dataset.names, sums, strict=False):
            metrics |= {f"{metric}/{name}": value for metric, value in _evaluated(objective, found).items()}
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=prefixed, num_samples=len(dataset))

    def _evaluated_model(self) -> Any:
        """Return the model to evaluate, prepared for device and precision if training has not done so."""
        if self.is_in_train or self.accelerator._models:
            return self.model
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ConfigError(
                "under FSDP or DeepSpeed, evaluation only works during training; use training_args.eval_on_start"
            )
        return self.accelerator.prepare_model(self.model, evaluation_mode=True)

    # -- metrics -------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; entries with the training loss also get the averages since the last such entry.

        Raises:
            DistillKitError: the loss is not finite.
        """
        if "loss" in logs:
            logs |= self._finish_window() | {"peak_memory_gb": _peak_memory_gb()}
            logs |= {} if self.rollouts is None else self.rollouts.speed()
            if not math.isfinite(logs["loss"]):
                raise self._diverged(f"the training loss is {logs['loss']}")
        elif "train_loss" in logs:
            # At the end of training, count the steps since the last log entry.
            self._finish_window()
        super().log(logs, start_time)

    def _finish_window(self) -> dict[str, float]:
        averages, counts, seconds = self._window.finish(self.accelerator)
        self.training_seconds += seconds
        self.waiting_seconds += averages["data_wait"] * seconds
        signal = self.train_dataset.signal
        if signal.servers:
            waited, self._waited = signal.waited - self._waited, signal.waited
            share = torch.tensor([waited / max(seconds, 1e-9)], device=self.args.device)
            averages["teacher_wait"] = self.accelerator.reduce(share, reduction="mean").item()
            self.teacher_seconds += averages["teacher_wait"] * seconds
        for name in _COUNTS:
            self.counts[name] += counts[name]
        return averages

    def teacher_wait(self) -> dict[str, float]:
        """Return the share of the training time that was spent waiting for served teachers, `teacher_wait`; nothing
        with other teachers."""
        if not self.train_dataset.signal.servers:
            return {}
        return {"teacher_wait": self.teacher_seconds / max(self.training_seconds, 1e-9)}

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Exclude the time spent in this block from the throughput and the waiting times."""
        before = self.train_dataset.signal.waited
        with self._window.paused():
            yield
        self._waited += self.train_dataset.signal.waited - before

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def last_step(self) -> int:
        """Return the step at which training ends."""
        return int(self.set_initial_training_values(self.args, self.get_train_dataloader())[-1])

    def _diverged(self, what: str) -> DistillKitError:
        saved = "No checkpoint was saved before this"
        if self.last_checkpoint is not None:
            saved = f"The last checkpoint, {self.last_checkpoint}, was saved before this"
        return DistillKitError(
            f"{what} at step {self.state.global_step}: lower the learning rate, or train in bfloat16 or float32 "
            f"instead of float16. {saved}"
        )

    @torch.no_grad()
    def check_finite(self) -> None:
        """Refuse to save a student that has diverged. Every process must call this.

        Raises:
            DistillKitError: the losses since the last log entry or the weights are not finite.
        """
        trained = [getattr(p, "_local_tensor", p) for p in self.model.parameters() if p.requires_grad and p.numel()]
        norms = [
            torch.linalg.vector_norm(p.detach(), ord=math.inf).to(self.args.device, torch.float32) for p in trained
        ]
        losses = getattr(self, "_tr_loss", torch.zeros(()))
        values = torch.stack([losses.to(self.args.device, torch.float32), *norms])
        if int(self.accelerator.reduce((~values.isfinite()).sum(), reduction="sum")):
            raise self._diverged("the training loss or the student's weights are not finite")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint with its receipt; only then are older ones removed, and is it pushed to the hub."""
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.check_finite()
        kept, pushed = self.args.save_total_limit, self.args.push_to_hub
        with self.untimed(), saving(folder, checkpoint=True):
            if self.args.should_save:
                checkpoints.discard(folder)  # of an earlier run
            self.accelerator.wait_for_everyone()
            self.args.save_total_limit, self.args.push_to_hub = None, False
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit, self.args.push_to_hub = kept, pushed
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.rollouts is not None:
                    self.rollouts.save(folder)
                resumable = not self.args.save_only_model
                identity = self.full_identity(self.state.max_steps)
                checkpoints.write_receipt(folder, self.state.global_step, identity, resumable=resumable)
            self.accelerator.wait_for_everyone()
            self.last_checkpoint = folder
            if pushed:
                self._push_from_checkpoint(str(folder))
            if self.args.should_save:
                best = self.state.best_model_checkpoint
                rotate_checkpoints(self.args.output_dir, kept, best_model_checkpoint=best, use_mtime=True)

    def full_identity(self, last_step: int) -> dict[str, Any]:
        """Return what decides the student, with the step at which training ends where that matters."""
        return {**self.identity, LAST: last_step} if LAST in self.identity else self.identity

    def _init_training_state(self, *arguments: Any, **named: Any) -> Any:
        """As the Trainer's, but the best checkpoint is found beside the one that is resumed, also if both were moved.

        Raises:
            ConfigError: the best checkpoint is missing or damaged, so that the best student could not be saved.
        """
        result = super()._init_training_state(*arguments, **named)
        resumed, best = self.last_checkpoint, self.state.best_global_step
        if resumed is not None and self.args.load_best_model_at_end and best:
            folder = resumed.parent / f"{PREFIX_CHECKPOINT_DIR}-{best}"
            checkpoints.open_checkpoint(folder).check_sizes()
            self.state.best_model_checkpoint = str(folder)
        return result

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        if self.args.should_save:
            checkpoints.open_checkpoint(folder).check_content()
        super()._load_best_model()

    def _run_epoch(self, **arguments: Any) -> None:
        if self.state.global_step >= self.state.max_steps:  # the Trainer would train one more step
            self.control.should_training_stop = True
            return
        super()._run_epoch(**arguments)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the student without its projections of hidden states; in checkpoints, those get a file of their own."""
        with without_projections(self.model):
            super()._save(output_dir, None if state_dict is None else exported(state_dict))
        if output_dir is not None and PREFIX_CHECKPOINT_DIR in Path(output_dir).name and self.args.should_save:
            save_projections(self.model, output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; outside of checkpoints, with a model card. A card that someone else wrote is kept."""
        folder = Path(output_dir or self.args.output_dir)
        own = _own_card(folder)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and PREFIX_CHECKPOINT_DIR not in folder.name and not own:
            self._write_card(folder)

    def create_model_card(self, **kwargs: Any) -> None:
        """Write the model card that `push_to_hub` pushes; the Trainer would write one of its own.

        Args:
            kwargs: those of the Trainer's method, which go unused: the card is made from the run's record.
        """
        folder = Path(self.args.output_dir)
        if self.is_world_process_zero() and not _own_card(folder):
            self._write_card(folder)

    def _write_card(self, folder: Path) -> None:
        if self.card is not None:
            (folder / CARD).write_text(self.card(), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.rollouts is not None:
            self.rollouts.load(Path(resume_from_checkpoint))
        if self.is_fsdp_enabled:
            # Sharded checkpoints contain the projections.
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with without_projections(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_projections(self.model, resume_from_checkpoint)


def _own_card(folder: Path) -> bool:
    """Whether a folder has a model card that was not written here."""
    card = folder / CARD
    return card.is_file() and CARD_MARK not in card.read_text(encoding="utf-8", errors="replace")


class _Epochs(transformers.TrainerCallback):  # type: ignore[misc]
    """Sets the epoch of the trainer's document order."""

    def __init__(self, trainer: SignalTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # state.epoch counts finished epochs, with a fraction in the middle of one that is resumed.
        self.trainer.start_epoch(int(state.epoch or 0))
        servers = self.trainer.train_dataset.signal.servers
        # Whatever a process has asked, the others find from here on.
        flush_all(servers)
        if servers:
            self.trainer.accelerator.wait_for_everyone()
        flush_all(servers)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Reading processes end with the batches that they read.
        self.trainer.end_epoch()


class ReportWriter(transformers.TrainerCallback):  # type: ignore[misc]
    """Rewrites the report after each evaluation and checkpoint, so that a killed run has one, too.

    Attributes:
        recording: as that of `MetricsFile`.
    """

    def __init__(self, trainer: SignalTrainer, files: ReportFiles) -> None:
        self.trainer = trainer
        self.files = files
        self.recording = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.recording = True
            self.files.clear()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.recording and self.trainer.differences is not None:
            self.files.write_differences({"step": state.global_step, **self.trainer.differences})
        self._write()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._write()

    def _write(self) -> None:
        if self.recording:
            with self.trainer.untimed():
                self.files.update()


def _by_source(objective: Objective, dataset: DistillationDataset | Mixture) -> Objective:
    """Return the objective that measures each source of a dataset by itself."""
    return replace(objective, sources=max(1, len(dataset.names)))


def _evaluated(objective: Objective, sums: torch.Tensor) -> dict[str, float]:
    """Return the metrics of an evaluation from sums over positions (M,); empty if there are no positions."""
    named = dict(zip(objective.names, sums.tolist(), strict=True))
    positions = named.pop("positions")
    if not positions:
        return {}
    means = {name: value / positions for name, value in named.items()}
    loss = objective.total(means)
    # These yardsticks replace the losses of the same names.
    for name in [name for name in means if name.startswith("eval:")]:
        means[name.removeprefix("eval:")] = means.pop(name)
    perplexity = math.exp(min(means["cross_entropy"], 700.0))
    return {**means, "loss": loss, "perplexity": perplexity, "positions": int(positions)}


class _Window:
    """Sums since the last log entry, kept on the device: reading their values in every step would stall it.

    Args:
        objective: the losses.
        names: of several sources, their names.
        device: where to keep the sums.
    """

    def __init__(self, objective: Objective, names: Sequence[str], device: torch.device) -> None:
        self.objective = objective
        self.names = names
        self.device = device
        self._restart()

    def _restart(self) -> None:
        self.statistics = _sums((self.objective.sources, len(self.objective.names)), self.device)
        self.counts = torch.zeros(len(_COUNTS), dtype=torch.int64, device=self.device)
        self.began = time.perf_counter()
        self.waited = 0.0

    def waiting(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches, measuring the time spent waiting for each."""
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def add(self, statistics: torch.Tensor, counts: torch.Tensor) -> None:
        self.statistics += statistics
        self.counts += counts

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent in this block from the throughput."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.began += time.perf_counter() - start

    def finish(self, accelerator: Any) -> tuple[dict[str, float], dict[str, int], float]:
        """Average over all processes and reset. Every process must call this.

        Returns:
            averages: means over counted positions by name, tokens_per_second, and data_wait, the share of the time
                spent waiting for batches, averaged over processes. Of several sources, also `loss/<name>`, the mean of
                each loss, and the number of `positions/<name>`; nothing of a source without positions.
            counts: sums over processes, by name.
            seconds: length of the window.
        """
        statistics = accelerator.reduce(self.statistics, reduction="sum")
        counts = dict(zip(_COUNTS, accelerator.reduce(self.counts, reduction="sum").tolist(), strict=True))
        seconds = time.perf_counter() - self.began
        share = torch.tensor([self.waited / max(seconds, 1e-9)], device=self.device)
        averages = self._means(statistics.sum(0))
        averages.pop("positions")
        for name, sums in zip(self.names, statistics, strict=False):
            means = self._means(sums)
            if means["positions"]:
                shown = {"loss": self.objective.total(means), **{each: means[each] for each in self.objective.losses}}
                averages |= {f"{each}/{name}": value for each, value in shown.items()}
                averages[f"positions/{name}"] = int(means["positions"])
        averages["tokens_per_second"] = counts["tokens"] / max(seconds, 1e-9)
        averages["data_wait"] = accelerator.reduce(share, reduction="mean").item()
        self._restart()
        return averages, counts, seconds

    def _means(self, sums: torch.Tensor) -> dict[str, float]:
        """Return the means of sums over positions (M,), and the number of positions."""
        named = dict(zip(self.objective.names, sums.tolist(), strict=True))
        return {
            name: value if name == "positions" else value / max(named["positions"], 1.0)
            for name, value in named.items()
        }


@contextmanager
def _naming(settings: str) -> Iterator[None]:
    """Turn the errors that torch and transformers raise for values that do not fit into one message."""
    try:
        yield
    except (TypeError, ValueError, KeyError, AttributeError, ImportError, ZeroDivisionError) as error:
        reason = str(error) if not isinstance(error, KeyError) else f"unknown value {error}"
        raise ConfigError(f"training_args: {settings} do not fit: {reason}") from error


def _peak_memory_gb() -> float:
    """Peak memory of this process in 10⁹ bytes: on its GPU if it has one, else resident memory."""
    peak = peak_memory()
    return round((peak["peak_cuda_bytes"] or peak["peak_rss_bytes"]) / 1e9, 3)


def _sums(shape: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Zeros to sum into, float64 if the device supports it."""
    return torch.zeros(shape, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)

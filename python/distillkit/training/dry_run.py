"""Checks a run without training: loads everything as training would, step by step, runs the first batch forward and
backward, and discards the results."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distillkit.configuration.overrides import Overrides
from distillkit.configuration.secrets import without_secrets
from distillkit.console import human_bytes, number_of, quiet_libraries
from distillkit.errors import ConfigError, DistillKitError
from distillkit.reports.run_record import DIFFERENCES
from distillkit.training.config.arguments import recomputing, to_plain_value

if TYPE_CHECKING:
    from distillkit.training.config.schema import ListedLiveTeacherConfig, ListedServedTeacherConfig, RunConfig
    from distillkit.training.memory_estimate import MemoryEstimate
    from distillkit.training.run import Run

__all__ = ["Check", "DryRun", "dry_run"]

Status = Literal["passed", "warning", "failed", "not checked"]

# Fewer are hardly meant: all data fit into a few rows of packed documents.
_FEW_STEPS = 10


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: what was checked.
        status: `warning`: training would run, but something may be unexpected; `not checked`: a check that it depends
            on has failed.
        detail: what was found, in readable form.
        figures: the same as numbers.
    """

    name: str
    status: Status
    detail: str
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DryRun:
    """The result of a dry run.

    Attributes:
        checks: the checks, in order.
        would_write: (path, description) of what training would write.
    """

    checks: list[Check]
    would_write: list[tuple[str, str]]

    @property
    def ok(self) -> bool:
        """Whether no check has failed."""
        return all(check.status != "failed" for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as a JSON-able mapping."""
        checks = [
            {"name": check.name, "status": check.status, "detail": check.detail, **check.figures}
            for check in self.checks
        ]
        return {"ok": self.ok, "checks": checks, "would_write": dict(self.would_write)}


_SURROUNDINGS = "paths and packages"


def dry_run(path: str | Path, overrides: Overrides | None = None) -> DryRun:
    """Check everything that a training run would need.

    Args:
        path: the configuration file.
        overrides: values that replace those of the file, by dotted path.
    """
    from distillkit.training.config.file import load_config
    from distillkit.training.config.surroundings import check_surroundings

    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        return DryRun([Check("configuration", "failed", str(error))], [])
    known = Check("configuration", "passed", f"{path}: all settings are known and agree{_overridden(config)}")
    try:
        check_surroundings(config)
    except ConfigError as error:
        rest = [Check(step.name, "not checked", f"needs: {_SURROUNDINGS}") for step in _steps(config)]
        return DryRun([known, Check(_SURROUNDINGS, "failed", str(error)), *rest], [])
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="distillkit-dry-run-") as folder:
        state = _State(config, _harmless(config, folder))
        checks = [known, Check(_SURROUNDINGS, "passed", "all that the configuration names is there")]
        failed: set[str] = set()
        for step in _steps(config):
            lacking = [name for name in step.needs if name in failed]
            check = (
                Check(step.name, "not checked", f"needs: {', '.join(lacking)}") if lacking else _outcome(step, state)
            )
            if check.status in ("failed", "not checked"):
                failed.add(step.name)
            checks.append(check)
        state.run.stop_asking()
    return DryRun(checks, _would_write(state))


def _overridden(config: RunConfig) -> str:
    """Return what the command line set, to append."""
    values = without_secrets(config.overrides)
    listed = ", ".join(f"{path} = {json.dumps(values[path], ensure_ascii=False)}" for path in values)
    return f"; set on the command line: {listed}" if listed else ""


def _harmless(config: RunConfig, folder: str) -> RunConfig:
    """Return the same run, but writing into a separate folder, reporting to no tracker, and reading captures on the hub
    without downloading them."""
    from distillkit.training.data.documents import streamed

    arguments = {name: value for name, value in config.training_args.items() if name not in _QUIET}
    sources = {name: getattr(config.dataset, name) for name in ("train_dataset", "eval_dataset")}
    dataset = config.dataset.model_copy(
        update={
            name: [streamed(each) for each in source] if isinstance(source, list) else streamed(source)
            for name, source in sources.items()
            if source is not None
        }
    )
    harmless = {"output_path": folder, "training_args": {**arguments, "report_to": "none"}, "dataset": dataset}
    return config.model_copy(update=harmless)


# Arguments that make the trainer's constructor contact a service, or that repeat the output folder.
_QUIET = ("report_to", "push_to_hub", "output_dir")


class _State:
    """State shared by the checks.

    Attributes:
        config: the run as configured.
        run: its parts, with the harmless output folder.
        memory, steps, steps_an_epoch, checkpoints, saved: results of earlier checks.
    """

    def __init__(self, config: RunConfig, harmless: RunConfig) -> None:
        from distillkit.training.run import Run

        self.config = config
        self.run: Run = Run(harmless)
        self.memory: MemoryEstimate | None = None
        self.steps, self.steps_an_epoch = 0, 1
        self.checkpoints: tuple[int, int] | None = None
        self.saved: int | None = None

    @property
    def sharded(self) -> bool:
        """Whether FSDP or DeepSpeed will shard the student across processes."""
        return bool(self.run.trainer.is_fsdp_enabled or self.run.trainer.is_deepspeed_enabled)


@dataclass(frozen=True)
class _Step:
    name: str
    needs: tuple[str, ...]
    check: Callable[[_State], Check | tuple[str, dict[str, Any]]]


def _outcome(step: _Step, state: _State) -> Check:
    import torch

    try:
        found = step.check(state)
    except (DistillKitError, OSError) as error:
        return Check(step.name, "failed", str(error))
    except torch.OutOfMemoryError as error:
        return Check(step.name, "failed", f"not enough memory: {str(error).splitlines()[0]}")
    return found if isinstance(found, Check) else Check(step.name, "passed", *found)


# -- the checks, in order ----------------------------------------------------------------------------------------------


def _outline(state: _State) -> tuple[str, dict[str, Any]]:
    state.run.check_student()
    return f"{state.config.model}: its config, frozen parts and adapters, without weights", {}


def _arguments(state: _State) -> tuple[str, dict[str, Any]]:
    from distillkit.training.config.arguments import training_arguments

    arguments = state.run.arguments
    # The original arguments, so that missing trackers are found too.
    asked = training_arguments(state.config)
    trackers = ", ".join(asked.report_to) or "none"
    precision = "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "no"
    detail = f"{arguments.device.type}, {precision} mixed precision, processes: {arguments.world_size}"
    return f"{detail}, trackers: {trackers}", {"device": str(arguments.device), "trackers": list(asked.report_to)}


def _output(state: _State) -> Check | tuple[str, dict[str, Any]]:
    from distillkit.training.checkpoints import checkpoint_of

    folder = Path(state.config.output_path)
    existing = _existing(folder)
    if not existing.is_dir():
        raise ConfigError(f"output_path: {existing} is a file, not a folder")
    # Written to, because permissions alone are not conclusive on every file system.
    with tempfile.TemporaryFile(dir=existing):
        pass
    resumed = checkpoint_of(state.config)
    if resumed is not None:
        found = str(resumed.folder)
        return f"{folder}: writable; training resumes from {found}", {"resumes_from": found}
    if (folder / "metrics.jsonl").exists():
        detail = f"{folder}: contains an earlier run, whose metrics, report and student would be overwritten"
        return Check("output folder", "warning", detail)
    return f"{folder}: writable", {}


def _tokenizer(state: _State) -> tuple[str, dict[str, Any]]:
    from distillkit.text.tokenizer import vocab_size

    size = vocab_size(state.run.tokenizer)
    return f"{type(state.run.tokenizer).__name__}, {size:,} ids", {"ids": size}


def _data(state: _State) -> Check:
    from distillkit.training.data.documents import long_documents
    from distillkit.training.data.prepared import PreparedDataset
    from distillkit.training.description import bytes_of, tokens_of

    lines: list[str] = []
    figures: dict[str, Any] = {}
    overflow = state.config.dataset.overflow
    status: Status = "passed"
    _ = state.run.eos_labels  # raises here if they are wrong, since they belong to the data
    _ = state.run.prompts  # likewise
    for entry, source in itertools.chain.from_iterable(state.run.sources.values()):
        tokens, size = tokens_of(source), bytes_of(source)
        kept = f" (prepared, and cached for training in {source.folder})" if isinstance(source, PreparedDataset) else ""
        long = long_documents(state.config, entry, source)
        outcome = f"; {long.outcome(overflow)}" if long.long else ""
        status = "warning" if long.long and overflow != "split" else status
        listed = isinstance(getattr(state.config.dataset, f"{entry.part}_dataset"), list)
        part = "prompts" if entry.part == "train" and state.config.only_rollouts else entry.part
        what = f"{part} {entry.name}" if listed else part
        counts = f"{number_of(len(source), 'document')}, {number_of(tokens, 'token')}, {human_bytes(size)}"
        lines.append(f"{what}: {counts}{kept}{outcome}")
        found = {"documents": len(source), "tokens": tokens, "bytes": size}
        found |= {"long": long.long, "beyond_tokens": long.beyond}
        if listed:
            figures.setdefault(entry.part, {})[entry.name] = found
        else:
            figures[part] = found
    # Of one dataset to train on and one to evaluate on, a line says it all.
    return Check("data", status, ("\n" if len(lines) > 2 else "; ").join(lines), figures)


def _student(state: _State) -> tuple[str, dict[str, Any]]:
    from distillkit.training.student import describe_student

    figures = describe_student(state.config, state.run.model)
    adapters = " in LoRA adapters" if figures["adapters"] else ""
    detail = f"{figures['class']}, {figures['parameters']:,} parameters, {figures['trained']:,} trained{adapters}"
    return f"{detail}, {figures['dtype']}, {figures['attention']} attention", figures


def _teacher(state: _State) -> tuple[str, dict[str, Any]]:
    run, config = state.run, state.config
    if not config.teachers_by_key:
        return "stored distributions", {"kind": "dataset"}
    _ = run.servers, run.live  # all of them, before any is described; servers first, as in training
    lines = [_one_teacher(run, key) for key in config.teachers_by_key]
    kinds = sorted({each.kind for each in config.teachers_by_key.values()})
    figures: dict[str, Any] = {"kind": " and ".join(kinds)}
    if config.teachers is not None:
        listed = [f"{line}; {_share(each)}" for line, each in zip(lines, config.teachers, strict=True)]
        return "\n".join(listed), {**figures, "teachers": listed}
    return lines[0], figures | ({"name": run.servers["teacher"].name} if run.servers else {})


def _one_teacher(run: Run, key: str) -> str:
    """What a live or served teacher is, and how many ids its distributions have."""
    if key in run.live:
        top_k, pairs = run.live[key].top_k, run.matching
        kept = "all ids" if top_k is None else f"top {top_k:,}"
        layers = "" if pairs is None else f"; {len(pairs.teacher_layers)} pairs of layers matched"
        return f"live: {run.config.live_teachers[key].path}, {kept}{layers}"
    server = run.servers[key]
    answers = "" if server.cache is None else f"; answers are kept in {server.cache.folder}"
    found = f"served: {server.name}, top {server.request.k:,} of {server.head_size:,} ids"
    return f"{found}; the server answers with as many{answers}"


def _share(teacher: ListedLiveTeacherConfig | ListedServedTeacherConfig) -> str:
    """The weight of one of several teachers, and the rows that it teaches."""
    which = ", ".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in teacher.where.items())
    return f"weight {teacher.weight:g}, {which or 'all rows'}"


def _fits(state: _State) -> tuple[str, dict[str, Any]]:
    from distillkit.models.head import rows_of

    head = rows_of(state.run.model.get_output_embeddings().weight)
    _ = state.run.datasets  # checked against the student on creation
    return f"vocabulary, codec and alignment agree with a head of {head:,} rows", {"head_rows": head}


def _head(state: _State) -> tuple[str, dict[str, Any]]:
    _ = state.run.trainer  # checks the head on creation
    losses = state.run.description["losses"]
    terms = " + ".join(f"{loss['weight']:.3g} {loss['name']}" for loss in losses)
    return f"the head's logits are reproduced; loss = {terms}", {"losses": losses}


def _plan(state: _State) -> Check | tuple[str, dict[str, Any]]:
    from distillkit.training.data.mixture import Mixture
    from distillkit.training.description import sources_of

    trainer, arguments = state.run.trainer, state.run.arguments
    epochs, per_epoch, _, _, batch, _, steps = trainer.set_initial_training_values(
        arguments, trainer.get_train_dataloader()
    )
    if per_epoch < 1 or steps < 1:
        raise ConfigError("dataset.train_dataset: it does not contain a single full batch")
    if not state.sharded:
        trainer.create_optimizer_and_scheduler(steps)  # raises if their arguments are wrong
    state.steps, state.steps_an_epoch = steps, per_epoch
    one_pass = f"one pass over the data takes {number_of(per_epoch, 'step')}"
    detail = f"{number_of(steps, 'step')} of {number_of(batch, 'row')}; {one_pass}"
    figures: dict[str, Any] = {
        "steps": steps,
        "rows_a_step": batch,
        "steps_an_epoch": per_epoch,
        "epochs_begun": epochs,
    }
    dataset = state.run.datasets["train"]
    if isinstance(dataset, Mixture):
        figures["sources"] = sources_of(dataset)
        shares = (f"{each['name']} {each['share']:.1%} ({_times(each['passes'])})" for each in figures["sources"])
        detail = f"{detail}, of whose tokens are: {', '.join(shares)}"
    if steps < _FEW_STEPS and arguments.max_steps <= 0:
        advice = "A student learns little in so few: raise num_train_epochs, or lower gradient_accumulation_steps"
        return Check("steps", "warning", f"{detail}. {advice}", figures)
    return detail, figures


def _times(passes: float) -> str:
    return "once" if passes == 1 else f"{passes:.3g} times"


def _resume(state: _State) -> tuple[str, dict[str, Any]]:
    from distillkit.training.run import resumed_checkpoint

    checkpoint = resumed_checkpoint(state.run, state.config)
    if checkpoint is None:
        return "training starts at step 0", {"step": 0}
    return f"{checkpoint.folder} is whole and of the same run; {checkpoint.step:,} steps are done", {
        "step": checkpoint.step
    }


def _memory(state: _State) -> Check:
    from distillkit.training.batching import trained_models
    from distillkit.training.memory_estimate import cache_bytes, estimate_memory

    arguments, config = state.run.arguments, state.config
    models = trained_models(state.run.model, state.run.live_models)
    found = estimate_memory(
        state.run.trainer.model,
        arguments,
        state.run.objective,
        config.sequence_length,
        teachers=[model for key, model in models.items() if key != "model"],
        sharded=state.sharded,
    )
    rollouts = state.run.rollouts
    if rollouts is not None and rollouts.settings.engine == "vllm":
        found = replace(found, engine=rollouts.engine.held_bytes())
    elif rollouts is not None and rollouts.settings.engine == "hf":
        tokens = rollouts.prompts.longest + rollouts.settings.max_new_tokens
        found = replace(found, cache=cache_bytes(state.run.trainer.model, arguments, rollouts.batch_size, tokens))
    state.memory = found
    # On CPUs, processes share the machine's memory; each GPU belongs to one process.
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if arguments.device.type == "cpu" else 1
    at_hand = found.at_hand // sharing
    parts = {
        "weights": found.weights,
        "teacher": found.teacher,
        "gradients": found.gradients,
        f"optimiser ({to_plain_value(arguments.optim)})": found.optimizer,
        "activations of the longest batch": found.activations,
        "logits and losses": found.losses,
        "vLLM": found.engine,
        "or, while completions are written, the key-value cache": found.cache,
    }
    written = [
        f"{name} {'unknown' if size is None else human_bytes(size)}" for name, size in parts.items() if size != 0
    ]
    detail = f"about {human_bytes(found.total)} ({', '.join(written)}); available: {human_bytes(at_hand)}"
    figures = {
        "weights_bytes": found.weights,
        "teacher_bytes": found.teacher,
        "gradients_bytes": found.gradients,
        "optimizer_bytes": found.optimizer,
        "activations_bytes": found.activations,
        "losses_bytes": found.losses,
        **({"engine_bytes": found.engine, "cache_bytes": found.cache} if rollouts is not None else {}),
        "total_bytes": found.total,
        "at_hand_bytes": at_hand,
    }
    if state.sharded:
        detail = f"{detail}; weights, gradients and optimiser are sharded across processes"
        return Check("memory", "passed", detail, figures)
    if found.certain > at_hand:
        return Check("memory", "failed", f"{detail}. Weights, gradients and optimiser alone do not fit", figures)
    tight = found.total > at_hand or found.optimizer is None
    return Check("memory", "warning" if tight else "passed", detail, figures)


def _rollouts(state: _State) -> tuple[str, dict[str, Any]]:
    """Write one completion and score it."""
    rollouts, prompts = state.run.rollouts, state.run.prompts
    if rollouts is None or prompts is None:
        raise TypeError("the configuration has no rollouts")
    current, seconds = rollouts.rehearse()
    rollouts.engine.close()
    completion, divergence = current.completions[0], rollouts.divergence(current)
    tokens = len(completion.written)
    left_out = f" ({prompts.left_out:,} left out, which are too long)" if prompts.left_out else ""
    detail = (
        f"{number_of(len(prompts), 'prompt')} of up to {number_of(prompts.longest, 'token')}{left_out}; the first is "
        f"continued by {number_of(tokens, 'token')} in {seconds:.1f} s, KL(student ‖ teacher) {divergence:.4f}"
    )
    return detail, {
        "prompts": len(prompts),
        "left_out": prompts.left_out,
        "longest_prompt": prompts.longest,
        "completion_tokens": tokens,
        "completion_seconds": seconds,
        "rollout_kl": divergence,
    }


def _batch(state: _State) -> Check | tuple[str, dict[str, Any]]:
    """Fetch the batches of a step as training does, and run the first one forward and backward."""
    import torch

    from distillkit.training.memory_estimate import checkpointing

    trainer, arguments = state.run.trainer, state.run.arguments
    trainer.start_epoch(0)
    batches, count = trainer.get_batch_samples(
        iter(trainer.get_train_dataloader()), arguments.gradient_accumulation_steps, arguments.device
    )
    first = batches[0]
    rows, length = first["input_ids"].shape
    shape = f"{rows} × {length:,} tokens"
    if state.sharded:
        return f"{shape}; not run, because the student is sharded only when training begins", {
            "rows": rows,
            "length": length,
        }
    model = trainer.model
    with checkpointing(model, arguments, wanted=recomputing(arguments)[0]):
        # As accelerate does in the wrapped model's forward.
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(first), num_items_in_batch=count)
        loss.backward()
    finite = all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    averages, _, _ = trainer._window.finish(trainer.accelerator)
    if not finite or not bool(torch.isfinite(loss)):
        raise DistillKitError(f"the first batch ({shape}) gives a non-finite loss or gradient: {loss.item()}")
    names = [loss["name"] for loss in state.run.description["losses"]]
    losses = ", ".join(f"{name} {averages[name]:.4f}" for name in names)
    detail = (
        f"{shape}: forward and backward run; {losses}; top-1 agreement with the teacher "
        f"{averages['top1_agreement']:.1%}"
    )
    figures = {"rows": rows, "length": length, **{name: averages[name] for name in (*names, "top1_agreement")}}
    return detail, figures


def _disk(state: _State) -> tuple[str, dict[str, Any]]:
    from distillkit.training.memory_estimate import checkpoint_bytes

    arguments = state.run.arguments
    optimizer = None if state.memory is None else state.memory.optimizer
    peft = state.config.peft
    saved, each = checkpoint_bytes(
        state.run.model,
        optimizer,
        optimizer_too=not arguments.save_only_model,
        merged=peft is not None and peft.merge_on_save,
    )
    number = _checkpoints(state)
    if number and arguments.save_total_limit:
        # The oldest is only deleted once the newest is complete.
        number = min(number, arguments.save_total_limit + 1)
    free = shutil.disk_usage(_existing(Path(state.config.output_path))).free
    needed = saved + number * each
    state.saved, state.checkpoints = saved, (number, each)
    found = f"{human_bytes(needed)} needed (student {human_bytes(saved)}, checkpoints: {number} × {human_bytes(each)})"
    if needed > free:
        raise ConfigError(
            f"{found}, {human_bytes(free)} free at output_path; set training_args.save_total_limit or save less often"
        )
    return f"{found}, {human_bytes(free)} free", {"needed_bytes": needed, "free_bytes": free, "checkpoints": number}


def _checkpoints(state: _State) -> int:
    """Count the checkpoints that training will save in total."""
    arguments, steps, per_epoch = state.run.arguments, state.steps, state.steps_an_epoch
    strategy = str(to_plain_value(arguments.save_strategy))
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return -(-steps // per_epoch)
    if strategy == "best":
        return 2  # the best so far, and the next one while it is being written
    every = arguments.save_steps if arguments.save_steps >= 1 else arguments.save_steps * steps
    # One is always saved at the end.
    return -int(-steps // max(int(every), 1))


_STEPS = (
    _Step("student's settings", (), _outline),
    _Step("training arguments", ("student's settings",), _arguments),
    _Step("output folder", (), _output),
    _Step("tokenizer", ("training arguments",), _tokenizer),
    _Step("data", ("tokenizer",), _data),
    _Step("student", ("tokenizer",), _student),
    _Step("teacher", ("student",), _teacher),
    _Step("data fits student", ("data", "teacher"), _fits),
    _Step("head and losses", ("data fits student",), _head),
    _Step("steps", ("head and losses",), _plan),
    _Step("resume", ("output folder", "steps"), _resume),
    _Step("memory", ("head and losses",), _memory),
    _Step("rollouts", ("memory", "steps"), _rollouts),
    _Step("first batch", ("memory", "steps", "rollouts"), _batch),
    _Step("disk", ("output folder", "steps"), _disk),
)


def _steps(config: RunConfig) -> list[_Step]:
    """Return the checks of a configuration, in order."""
    return [step for step in _STEPS if step.check is not _rollouts or config.rollouts is not None]


# -- what would be written ---------------------------------------------------------------------------------------------


def _would_write(state: _State) -> list[tuple[str, str]]:
    folder = Path(state.config.output_path)
    size = "" if state.saved is None else f", {human_bytes(state.saved)}"
    lines = [(str(folder), f"the trained student, its tokenizer and its model card{size}")]
    number, each = state.checkpoints or (0, 0)
    if number:
        lines.append((str(folder / "checkpoint-*"), f"{number} at a time, {human_bytes(each)} each"))
    lines += [(str(folder / "metrics.jsonl"), "every log entry")]
    if state.config.dataset.eval_dataset is not None:
        lines.append((str(folder / DIFFERENCES), "where student and teacher differ most, with held-out texts"))
    lines += [
        (str(folder / "summary.json"), "the final figures"),
        (str(folder / "report.md"), "the report, with report-quality.png and report-speed.png"),
        (str(folder / "distillkit_config.yaml"), "the configuration"),
    ]
    return lines


def _existing(folder: Path) -> Path:
    """Return a folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder

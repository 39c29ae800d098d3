"""The `training_args` section: arguments of `trl.SFTConfig`, checked by name, type and meaning before anything is
loaded.

All arguments that the trainer acts on pass through. Those that SFTTrainer would act on and this trainer would not are
refused by name, unless their value asks for what happens anyway. Names that transformers has changed since the
published configurations were written are understood.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.util
import json
import os
import typing
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from distillkit.errors import ConfigError

if TYPE_CHECKING:
    from trl import SFTConfig

    from distillkit.config import RunConfig

__all__ = ["WITHOUT_FSDP", "argument_problems", "bitsandbytes_problem", "plain", "training_arguments"]

# Published configurations use names that transformers and TRL have replaced since; the values keep their meaning.
_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",  # a share of all steps where it is below 1
}

# Arguments that are gone, with the one value that asks for what happens anyway.
_GONE: dict[str, tuple[object, str]] = {
    "group_by_length": (False, "the order of documents depends on the seed and the epoch alone"),
    "save_safetensors": (True, "models are always saved as safetensors"),
}

_PREPARES_TEXT = "it prepares text for a live teacher, and captured documents are token ids already; leave it out"
_LOSS_MASK = "it is for a live teacher; the captured documents' loss mask decides: leave it out"
_NO_PREDICTIONS = "evaluation keeps no predictions; leave it out"
# Arguments that would be ignored here: which values are harmless, and why the others are refused.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "accelerator_config": (
        lambda value: not isinstance(value, dict) or not {"split_batches", "dispatch_batches"} & set(value),
        "each process reads its own batches; leave split_batches and dispatch_batches out",
    ),
    "activation_offloading": (lambda value: not value, "not supported yet"),
    "average_tokens_across_devices": (
        lambda value: value is True,
        "the loss is always divided by the tokens of all processes; leave it out",
    ),
    "batch_eval_metrics": (lambda value: not value, _NO_PREDICTIONS),
    "dataset_num_proc": (
        lambda value: value is None or (isinstance(value, int) and value >= 1),
        "a number of processes is expected, at least 1",
    ),
    "eval_accumulation_steps": (lambda value: value is None, _NO_PREDICTIONS),
    "eval_do_concat_batches": (lambda value: value is True, _NO_PREDICTIONS),
    "eval_use_gather_object": (lambda value: not value, _NO_PREDICTIONS),
    "include_for_metrics": (lambda value: not value, _NO_PREDICTIONS),
    "label_names": (lambda value: value is None, "the trainer makes the labels itself; leave it out"),
    "label_smoothing_factor": (lambda value: value == 0, "not supported yet"),
    "liger_kernel_config": (lambda value: value is None, "not supported yet"),
    "loss_type": (lambda value: value in ("nll", "chunked_nll"), "loss_functions decide; leave it out"),
    "model_init_kwargs": (lambda value: not value, "put these under model_kwargs"),
    "padding_free": (lambda value: not value, "not supported yet"),
    "parallelism_config": (lambda value: value is None, "not supported yet"),
    "prediction_loss_only": (lambda value: value is True, _NO_PREDICTIONS),
    "remove_unused_columns": (lambda value: value is False, "must be false: the teacher's rows are such a column"),
    "router_aux_loss_coef": (lambda value: not value, "not supported yet"),
    "shuffle_dataset": (lambda value: not value, "dataset.seed decides the order; leave it out"),
    "torch_compile": (lambda value: not value, "not supported yet"),
    "torch_compile_backend": (lambda value: value is None, "not supported yet"),
    "torch_compile_mode": (lambda value: value is None, "not supported yet"),
    "train_sampling_strategy": (
        lambda value: value in ("random", "sequential"),
        "allowed: 'random', 'sequential': the order of documents depends on the seed and the epoch alone",
    ),
    "truncation_mode": (lambda value: value == "keep_start", "not supported yet: documents are cut at their end"),
    "trust_remote_code": (lambda value: not value, "put it at the top level"),
    "use_cache": (lambda value: not value, "must be false: with a cache, packed documents would see each other"),
    "use_liger_kernel": (lambda value: not value, "not supported yet"),
}

# Arguments that make token ids of text: with stored distributions there is no text, and only harmless values pass.
_FOR_TEXT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "assistant_only_loss": (lambda value: not value, _LOSS_MASK),
    "chat_template_path": (lambda value: value is None, _PREPARES_TEXT),
    "completion_only_loss": (lambda value: not value, _LOSS_MASK),
    "dataset_text_field": (lambda value: value == "text", _PREPARES_TEXT),
}

_PACKING_STRATEGIES = {
    "bfd_split": "the pieces of a cut document would be without the text before them that the teacher read; allowed: "
    "'bfd', which cuts documents that are longer than sequence_length",
    "wrapped": "it would cut documents anywhere and let them see each other; allowed: 'bfd'",
}


def argument_problems(content: Mapping[Any, Any]) -> list[str]:
    """Describe everything that is wrong with the `training_args` of a configuration.

    Args:
        content: the whole configuration as read; some arguments must agree with other sections.

    Returns:
        One line a problem, each with its dotted path; empty if all is well.
    """
    arguments: Mapping[Any, Any] = content["training_args"]
    problems: list[str] = []
    refused = _REFUSED if _has_live_teacher(content) else {**_REFUSED, **_FOR_TEXT}
    for name, value in arguments.items():
        problem = _argument_problem(name, value, refused)
        if problem is not None:
            problems.append(f"training_args.{name}: {problem}")
    for old, new in _RENAMED.items():
        if old in arguments and new in arguments:
            problems.append(
                f"training_args.{old}: {arguments[old]!r} is an older name of {new}, which is given as well: "
                f"{arguments[new]!r}"
            )
    return problems + _disagreements(content, arguments)


def _has_live_teacher(content: Mapping[Any, Any]) -> bool:
    teacher = content.get("teacher")
    return isinstance(teacher, Mapping) and teacher.get("kind") == "hf"


def _argument_problem(name: Any, value: Any, refused: Mapping[str, tuple[Callable[[Any], bool], str]]) -> str | None:
    """Say what is wrong with one argument by itself."""
    from distillkit.config import nearest

    if name in _GONE:
        harmless, why = _GONE[name]
        return None if value == harmless else f"{value!r} is not supported ({why})"
    field = _RENAMED.get(name, name)
    if name == "resume_from_checkpoint":
        good = value is None or isinstance(value, (bool, str))
        return None if good else f"{value!r} is not allowed; a checkpoint's folder, true for the newest one, or false"
    hints = _hints()
    if field not in hints:
        return f"unknown training argument{nearest(name, [*hints, *_RENAMED])}"
    if field in refused:
        harmless_value, why = refused[field]
        if not harmless_value(value):
            return (
                f"{value!r} is not supported ({why})"
                if why != "not supported yet"
                else f"not supported yet (found {value!r})"
            )
    if field == "dataset_kwargs" and value is not None:
        return _dataset_kwargs_problem(value)
    if field == "packing_strategy" and value != "bfd":
        if value in _PACKING_STRATEGIES:
            return f"{value!r} is not supported ({_PACKING_STRATEGIES[value]})"
        return f"{value!r} is not allowed; allowed: 'bfd'"
    try:
        _converted(field, value)
    except ValueError as error:
        return str(error)
    return None


def _dataset_kwargs_problem(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return f"a mapping is expected (found {value!r})"
    unknown = [key for key in value if key != "skip_prepare_dataset"]
    if unknown:
        return f"unknown key {unknown[0]!r}; allowed: 'skip_prepare_dataset'"
    return None


def _disagreements(content: Mapping[Any, Any], arguments: Mapping[Any, Any]) -> list[str]:
    """Describe arguments that contradict other sections."""
    problems: list[str] = []
    raw = content.get("dataset")
    dataset: Mapping[Any, Any] = raw if isinstance(raw, Mapping) else {}
    for name, section in (
        ("output_dir", "output_path"),
        ("max_length", "sequence_length"),
        ("max_seq_length", "sequence_length"),
    ):
        if name in arguments and arguments[name] != content.get(section):
            problems.append(
                f"training_args.{name}: {arguments[name]!r} disagrees with {section}: {content.get(section)!r}; give "
                f"{section} alone"
            )
    if dataset.get("eval_dataset") is None:
        evaluating = ("eval_strategy", "evaluation_strategy", "eval_on_start")
        wanted = {name: arguments[name] for name in evaluating if arguments.get(name) not in (None, False, "no")}
        problems += [
            f"training_args.{name}: {value!r} needs dataset.eval_dataset, which is missing"
            for name, value in wanted.items()
        ]
    return problems


@lru_cache(maxsize=1)
def _hints() -> dict[str, Any]:
    """Types of SFTConfig's arguments by name."""
    try:
        from trl import SFTConfig
    except ImportError as error:
        raise ConfigError(
            f"training needs torch, transformers and trl: pip install 'distillkit[train]' ({error})"
        ) from error
    hints = typing.get_type_hints(SFTConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(SFTConfig) if field.init}


def _converted(name: str, value: Any) -> Any:
    """Return an argument's value as SFTConfig takes it.

    YAML reads `1e-4` as a string and an unquoted `no` as false; both are meant otherwise.

    Raises:
        ValueError: it is not of the argument's type, or not one of its values.
    """
    if name == "fsdp" and isinstance(value, bool):
        return value  # declared as a string, meant as a switch
    hint = _hints()[name]
    choices = next(
        (part for part in (hint, *typing.get_args(hint)) if isinstance(part, type) and issubclass(part, enum.Enum)),
        None,
    )
    if choices is not None:
        allowed = [choice.value for choice in choices]
        if value is False and "no" in allowed:
            value = "no"
        if value not in allowed:
            from distillkit.config import nearest

            raise ValueError(
                f"{value!r} is not allowed; allowed: {', '.join(map(repr, allowed))}{nearest(value, allowed)}"
            )
        return value
    if value is None and name == "report_to":
        return "none"
    try:
        converted = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        reason = "; ".join(dict.fromkeys(item["msg"] for item in error.errors()))
        raise ValueError(f"{reason} (found {value!r})") from None
    # Integers stay integers where floats are allowed too: SFTConfig counts some of them.
    return converted if isinstance(value, str) else value


def training_arguments(config: RunConfig) -> SFTConfig:
    """Build the trainer's arguments from a configuration.

    Where no accelerator is present, training runs on the CPU, without bf16 mixed precision unless it is asked for.

    Raises:
        ConfigError: a combination of arguments is refused by transformers, or a reporter is not installed.
    """
    import torch
    from trl import SFTConfig

    arguments: dict[str, Any] = {}
    for name, value in config.training_args.items():
        if name in _GONE or name == "resume_from_checkpoint":
            continue
        field = _RENAMED.get(name, name)
        arguments[field] = _converted(field, value)
    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    accelerated = torch.accelerator.is_available() and not arguments.get("use_cpu")
    arguments.setdefault("use_cpu", not accelerated)
    arguments.setdefault("dataloader_pin_memory", accelerated)
    arguments.setdefault("dataloader_num_workers", _reading_processes(accelerated))
    if not arguments.get("fp16"):
        arguments.setdefault("bf16", accelerated and torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    if isinstance(arguments.get("fsdp_config"), str):
        arguments["fsdp_config"] = _read_json(arguments["fsdp_config"], "training_args.fsdp_config")
    by_fsdp = _sharding_itself(arguments.get("fsdp_config"), "activation_checkpointing")
    arguments.setdefault("activation_checkpointing", defaults["gradient_checkpointing"] and not by_fsdp)
    arguments.setdefault("data_seed", config.dataset.seed)
    arguments.setdefault("project", config.project_name)
    # A loss that is not finite ends the run; the filter would put an average in its place.
    arguments.setdefault("logging_nan_inf_filter", False)
    # DDP would look for unused parameters in every step; a causal LM uses all of them.
    arguments.setdefault("ddp_find_unused_parameters", False)
    arguments |= {
        "output_dir": config.output_path,
        "max_length": config.sequence_length,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
    }
    _check_reporters(arguments.get("report_to", defaults["report_to"]))
    _check_optimiser(arguments.get("optim"))
    sharded = _launched_with("ACCELERATE_USE_FSDP") or _launched_with("ACCELERATE_USE_DEEPSPEED")
    if sharded and config.peft is not None and config.peft.merge_on_save:
        raise ConfigError(
            f"{config.source}: peft.merge_on_save: no process holds whole weights as accelerate shards them"
        )
    accelerator = torch.accelerator.current_accelerator()
    _check_sharding(arguments, "cpu" if arguments["use_cpu"] or accelerator is None else accelerator.type)
    try:
        return SFTConfig(**arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{config.source}: training_args: {error}") from error


def _reading_processes(accelerated: bool) -> int:
    """Return how many processes read documents ahead, if the configuration does not say.

    Beside an accelerator two: one reads and decodes some hundred thousand tokens a second, more than a student is
    trained on; the second keeps the queue full while the first waits for a disk. Fewer where this process has no
    processors to spare. On a CPU none: they would take their time from the step itself.
    """
    if not accelerated:
        return 0
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(2, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


# Which package an optimiser needs, by a part of its name. The first that fits counts.
_OPTIMISERS = (
    ("galore", "galore_torch", "galore-torch"),
    ("apollo", "apollo_torch", "apollo-torch"),
    ("lomo", "lomo_optim", "lomo-optim"),
    ("grokadamw", "grokadamw", "grokadamw"),
    ("schedule_free", "schedulefree", "schedulefree"),
    ("stable_adamw", "optimi", "torch-optimi"),
    ("torch_8bit", "torchao", "torchao"),
    ("torch_4bit", "torchao", "torchao"),
    ("8bit", "bitsandbytes", "bitsandbytes"),
    ("paged", "bitsandbytes", "bitsandbytes"),
    ("bnb", "bitsandbytes", "bitsandbytes"),
    ("ademamix", "bitsandbytes", "bitsandbytes"),
    ("lion_32bit", "bitsandbytes", "bitsandbytes"),
)


def _check_optimiser(name: str | None) -> None:
    """Refuse an optimiser whose package is missing, before the Trainer would: after everything is loaded."""
    for part, module, package in _OPTIMISERS:
        if name is None or part not in name:
            continue
        problem = bitsandbytes_problem() if module == "bitsandbytes" else _missing_package(module, package)
        if problem is not None:
            raise ConfigError(
                f"training_args.optim: {name!r} can't be used: {problem}. optim: adamw_torch needs nothing"
            )
        return


def _missing_package(module: str, package: str) -> str | None:
    """Say that a package is not installed, if it is not."""
    if importlib.util.find_spec(module) is not None:
        return None
    return f"the package {package} is not installed: pip install {package}"


def bitsandbytes_problem() -> str | None:
    """Say why bitsandbytes can't be used here, if it can't."""
    problem = _missing_package("bitsandbytes", "bitsandbytes")
    if problem is not None:
        return problem
    import bitsandbytes
    import torch

    accelerator = torch.accelerator.current_accelerator()
    device = "cpu" if accelerator is None else accelerator.type
    supported = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if device in supported:
        return None
    return f"the installed bitsandbytes runs on {', '.join(sorted(supported))}, not on {device}"


# On these devices accelerate trains under DDP instead, without a word.
WITHOUT_FSDP: tuple[str, ...] = ("cpu", "mps")

_FSDP_SETTINGS = (
    "activation_checkpointing",
    "auto_wrap_policy",
    "cpu_offload",
    "cpu_ram_efficient_loading",
    "min_num_params",
    "reshard_after_forward",
    "state_dict_type",
    "transformer_layer_cls_to_wrap",
    "version",
)


def _check_sharding(arguments: Mapping[str, Any], device: str) -> None:
    """Refuse DeepSpeed and FSDP settings that would end in something else than what they ask for.

    Raises:
        ConfigError: both are asked for, one can't run here, or a setting is unknown.
    """
    if _launched_with("ACCELERATE_USE_FSDP") and _launched_with("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ConfigError(
            "accelerate launch: fsdp_cpu_ram_efficient_loading loads weights in the first process alone, and the "
            "others could not check the head or run a teacher; set it to false in accelerate's configuration, or "
            "give training_args.fsdp instead"
        )
    fsdp, deepspeed = arguments.get("fsdp"), arguments.get("deepspeed")
    if fsdp and deepspeed:
        raise ConfigError("training_args.fsdp: and training_args.deepspeed are two ways to shard; give one")
    if not fsdp and arguments.get("fsdp_config"):
        raise ConfigError("training_args.fsdp_config: has no effect without training_args.fsdp: true")
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 or "LOCAL_RANK" in os.environ
    for name in ("fsdp", "deepspeed"):
        if arguments.get(name) and not launched:
            raise ConfigError(
                f"training_args.{name}: shards over processes, and this is a single one; start with `torchrun "
                "--nproc_per_node GPUS -m distillkit CONFIG.yaml`, or leave it out"
            )
    if deepspeed:
        _check_deepspeed(deepspeed)
    if fsdp:
        if device in WITHOUT_FSDP:
            raise ConfigError(
                f"training_args.fsdp: FSDP does not run on {device}; leave it out (several processes use DDP then)"
            )
        _check_fsdp_config(arguments.get("fsdp_config") or {})


def _launched_with(variable: str) -> bool:
    """Say whether `accelerate launch` has switched something on."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _check_deepspeed(settings: object) -> None:
    problem = _missing_package("deepspeed", "deepspeed")
    if problem is not None:
        raise ConfigError(f"training_args.deepspeed: {problem}; training_args.fsdp: true needs none")
    if isinstance(settings, str):
        _read_json(settings, "training_args.deepspeed")


def _check_fsdp_config(settings: object) -> None:
    """Refuse unknown settings, which transformers would ignore, and what FSDP2 does not have."""
    from distillkit.config import nearest

    if not isinstance(settings, Mapping):
        raise ConfigError(f"training_args.fsdp_config: a mapping or a JSON file of one is expected, found {settings!r}")
    for key, value in settings.items():
        name = str(key).removeprefix("fsdp_")
        if name not in _FSDP_SETTINGS:
            raise ConfigError(
                f"training_args.fsdp_config.{key}: unknown setting of FSDP2{nearest(name, _FSDP_SETTINGS)}"
            )
        if name == "version" and int(value) != 2:
            raise ConfigError(f"training_args.fsdp_config.{key}: {value!r} is not supported; 2 is")


def _sharding_itself(settings: object, name: str) -> bool:
    """Say whether FSDP's own version of a feature is switched on."""
    return isinstance(settings, Mapping) and bool(settings.get(name) or settings.get(f"fsdp_{name}"))


def _read_json(path: str, where: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {path}: the file can not be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{where}: {path}: not valid JSON: {error}") from error


def plain(setting: Any) -> Any:
    """Return an argument's value as YAML has it: transformers makes enumerations of some."""
    return getattr(setting, "value", setting)


def _check_reporters(report_to: str | list[str]) -> None:
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name not in ("all", "none", *available):
            raise ConfigError(
                f"training_args.report_to: {name!r} is not installed or not known; installed: "
                f"{', '.join(available) or 'none'} (`pip install {name}`, or report_to: none)"
            )

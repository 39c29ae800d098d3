"""The `training_args` section: arguments of `trl.SFTConfig`, checked by name, type and meaning before anything is
loaded.

Arguments that the trainer supports pass through. Those that only SFTTrainer supports are refused, unless their value
matches what this trainer does anyway. Old names from published configurations are accepted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillkit.configuration.problems import report, shown
from distillkit.configuration.secrets import redacted
from distillkit.errors import ConfigError, nearest
from distillkit.training.config.argument_rules import GONE, GREATER_IS_BETTER, RENAMED, converted
from distillkit.training.quantization import bitsandbytes_problem, missing_package

if TYPE_CHECKING:
    from trl import SFTConfig

    from distillkit.training.config.schema import RunConfig

__all__ = ["BEFORE_5_23", "WITHOUT_FSDP", "in_installed_names", "recomputing", "to_plain_value", "training_arguments"]


def training_arguments(config: RunConfig) -> SFTConfig:
    """Build the trainer's arguments from a configuration.

    Without an accelerator, training runs on the CPU, and uses bf16 mixed precision only if the configuration sets it.

    Raises:
        ConfigError: transformers rejects the arguments, or something that they need is not available here.
    """
    import torch
    from trl import SFTConfig

    arguments: dict[str, Any] = {}
    for name, value in config.training_args.items():
        if name in GONE or name == "resume_from_checkpoint":
            continue
        field = RENAMED.get(name, name)
        arguments[field] = converted(field, value)
    token = arguments.pop("hub_token", None)
    if token:
        # The Trainer would save it, with all its arguments, beside the student, and push it to the hub with that.
        os.environ["HF_TOKEN"] = token
    defaults = {field.name: field.default for field in dataclasses.fields(SFTConfig)}
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    accelerated = accelerator is not None and not arguments.get("use_cpu")
    arguments.setdefault("use_cpu", not accelerated)
    arguments.setdefault("dataloader_pin_memory", accelerated)
    arguments.setdefault("dataloader_num_workers", _reading_processes(accelerated))
    if not arguments["dataloader_num_workers"]:
        # These say how worker processes are kept and started; torch refuses them where there are none.
        arguments |= {"dataloader_persistent_workers": False, "dataloader_multiprocessing_context": None}
    if not arguments.get("fp16"):
        arguments.setdefault("bf16", accelerated and torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    if isinstance(arguments.get("fsdp_config"), str):
        arguments["fsdp_config"] = _read_json(arguments["fsdp_config"], "training_args.fsdp_config")
    by_fsdp = _sharding_itself(arguments.get("fsdp_config"), "activation_checkpointing")
    arguments.setdefault("activation_checkpointing", defaults["gradient_checkpointing"] and not by_fsdp)
    arguments.setdefault("data_seed", config.dataset.seed)
    arguments.setdefault("project", config.project_name)
    # A non-finite loss must end the run, but the filter would replace it by an average.
    arguments.setdefault("logging_nan_inf_filter", False)
    # Saves DDP a search in every step: a causal LM has no unused parameters.
    arguments.setdefault("ddp_find_unused_parameters", False)
    metric = arguments.get("metric_for_best_model")
    if metric is not None:
        # Otherwise transformers takes more to be better for everything that does not end in "loss".
        arguments.setdefault("greater_is_better", metric.removeprefix("eval_").partition("/")[0] in GREATER_IS_BETTER)
    arguments |= {
        "output_dir": config.output_path,
        "max_length": config.sequence_length,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
    }
    _check_reporters(arguments.get("report_to", defaults["report_to"]))
    _check_optimiser(arguments.get("optim"))
    _check_launch(config)
    _check_sharding(arguments, "cpu" if arguments["use_cpu"] or accelerator is None else accelerator.type)
    try:
        return SFTConfig(**in_installed_names(arguments))
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise ConfigError(f"{config.source}: training_args: {redacted(str(error))}") from error


BEFORE_5_23 = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
"""Arguments that had another name in transformers before 5.23, which vLLM 0.32 and 0.33 need."""


def in_installed_names(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments under their names in the installed transformers, which before 5.23 had others for two."""
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig)}
    return {name if name in known else BEFORE_5_23.get(name, name): value for name, value in arguments.items()}


def recomputing(arguments: Any) -> tuple[bool, dict[str, Any]]:
    """Return whether the trainer's arguments have activations recomputed in the backward pass, and how."""
    wanted, how = (getattr(arguments, name if hasattr(arguments, name) else old) for name, old in BEFORE_5_23.items())
    return bool(wanted), dict(how or {})


def _reading_processes(accelerated: bool) -> int:
    """Return the default number of processes that read documents ahead.

    With an accelerator, two: one reads and decodes several hundred thousand tokens per second, more than training
    consumes, and the second keeps the queue full while the first waits for the disk. Fewer if this process has no CPU
    cores to spare. On a CPU, none: they would slow down the training step itself.
    """
    if not accelerated:
        return 0
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(2, processors // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - 1))


# The package that an optimiser needs, by part of its name; the first match counts.
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
    """Refuse an optimiser whose package is missing; the Trainer would only notice after loading everything."""
    for part, module, package in _OPTIMISERS:
        if name is None or part not in name:
            continue
        problem = bitsandbytes_problem() if module == "bitsandbytes" else missing_package(module, package)
        if problem is not None:
            raise ConfigError(
                f"training_args.optim: {name!r} cannot be used: {problem}. optim: adamw_torch needs no extra package"
            )
        return


# On these devices, accelerate silently falls back to DDP.
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


def _check_launch(config: RunConfig) -> None:
    """Refuse what `accelerate launch` with FSDP or DeepSpeed cannot do; the same is refused of `training_args` when the
    configuration is read.

    Raises:
        ConfigError: names the setting.
    """
    if not (_launched_with("ACCELERATE_USE_FSDP") or _launched_with("ACCELERATE_USE_DEEPSPEED")):
        return
    problems = [
        f"{key}.path: is the student itself, which cannot teach when accelerate shards it; set {key}.kwargs (such as "
        "dtype) to load a separate teacher"
        for key in config.own_teachers
    ]
    if config.peft is not None and config.peft.merge_on_save:
        problems.append("peft.merge_on_save: no process holds the full weights when accelerate shards them")
    if config.rollouts is not None:
        problems.append(
            "rollouts: a student that accelerate divides among processes cannot write completions yet; launch without "
            "FSDP and DeepSpeed (several processes then use DDP)"
        )
    if problems:
        raise ConfigError(report(config.source, problems))


def _check_sharding(arguments: Mapping[str, Any], device: str) -> None:
    """Refuse DeepSpeed and FSDP settings that would be ignored or have another effect than intended.

    Raises:
        ConfigError: both are enabled, one of them cannot run here, or a setting is unknown.
    """
    if _launched_with("ACCELERATE_USE_FSDP") and _launched_with("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise ConfigError(
            "accelerate launch: fsdp_cpu_ram_efficient_loading loads weights in the first process only, so the others "
            "could not check the head or run a teacher; set it to false in accelerate's configuration, or use "
            "training_args.fsdp instead"
        )
    fsdp, deepspeed = arguments.get("fsdp"), arguments.get("deepspeed")
    if fsdp and deepspeed:
        raise ConfigError("training_args.fsdp: and training_args.deepspeed both shard the student; set only one")
    if not fsdp and arguments.get("fsdp_config"):
        raise ConfigError("training_args.fsdp_config: has no effect without training_args.fsdp: true")
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 or "LOCAL_RANK" in os.environ
    for name in ("fsdp", "deepspeed"):
        if arguments.get(name) and not launched:
            raise ConfigError(
                f"training_args.{name}: shards across processes, but this is a single process; start with `torchrun "
                "--nproc_per_node GPUS -m distillkit CONFIG.yaml`, or remove it"
            )
    if deepspeed:
        _check_deepspeed(deepspeed)
    if fsdp:
        if device in WITHOUT_FSDP:
            raise ConfigError(
                f"training_args.fsdp: FSDP does not run on {device}; remove it (several processes then use DDP)"
            )
        _check_fsdp_config(arguments.get("fsdp_config") or {})


def _launched_with(variable: str) -> bool:
    """Return whether `accelerate launch` has enabled a feature."""
    return os.environ.get(variable, "false").lower() in ("true", "1")


def _check_deepspeed(settings: object) -> None:
    problem = missing_package("deepspeed", "deepspeed")
    if problem is not None:
        raise ConfigError(f"training_args.deepspeed: {problem}; training_args.fsdp: true needs no extra package")
    if isinstance(settings, str):
        _read_json(settings, "training_args.deepspeed")


def _check_fsdp_config(settings: object) -> None:
    """Refuse unknown settings, which transformers would ignore, and other versions than FSDP2."""
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"training_args.fsdp_config: must be a mapping or the path of a JSON file, found {shown(settings)}"
        )
    for key, value in settings.items():
        name = str(key).removeprefix("fsdp_")
        if name not in _FSDP_SETTINGS:
            raise ConfigError(
                f"training_args.fsdp_config.{key}: unknown setting of FSDP2{nearest(name, _FSDP_SETTINGS)}"
            )
        if name == "version" and value not in (2, "2"):
            raise ConfigError(f"training_args.fsdp_config.{key}: {shown(value)} is not supported; only 2 is")


def _sharding_itself(settings: object, name: str) -> bool:
    """Return whether FSDP's own version of a feature is enabled."""
    return isinstance(settings, Mapping) and bool(settings.get(name) or settings.get(f"fsdp_{name}"))


def _read_json(path: str, where: str) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{where}: {path}: the file cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{where}: {path}: not valid JSON: {error}") from error


def to_plain_value(setting: Any) -> Any:
    """Return an argument's value as written in YAML: transformers turns some into enum members."""
    return getattr(setting, "value", setting)


def _check_reporters(report_to: str | list[str]) -> None:
    from transformers.integrations import get_available_reporting_integrations

    available = get_available_reporting_integrations()
    for name in [report_to] if isinstance(report_to, str) else report_to:
        if name not in ("all", "none", *available):
            raise ConfigError(
                f"training_args.report_to: {name!r} is unknown or not installed; installed: "
                f"{', '.join(available) or 'none'} (`pip install {name}`, or report_to: none)"
            )

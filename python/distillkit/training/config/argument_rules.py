"""Checks of `training_args`: renamed arguments, and values that are not supported."""

from __future__ import annotations

import dataclasses
import enum
import typing
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from distillkit.errors import ConfigError, nearest

__all__ = ["argument_problems"]

# Old names that published configurations use and transformers or TRL have since replaced; the values mean the same.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",  # values below 1 are a fraction of all steps
}

# Removed arguments, with the one value that matches the only remaining behaviour.
GONE: dict[str, tuple[object, str]] = {
    "group_by_length": (False, "the order of documents depends only on the seed and the epoch"),
    "save_safetensors": (True, "models are always saved as safetensors"),
}

_PREPARES_TEXT = "it prepares text for a live teacher, but captured documents are already token ids; remove it"
_LOSS_MASK = "it is for a live teacher, but captured documents have their own loss mask; remove it"
_NO_PREDICTIONS = "evaluation keeps no predictions; remove it"

# Arguments that the trainer would ignore: which values are harmless, and why others are refused.
_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "accelerator_config": (
        lambda value: not isinstance(value, dict) or not {"split_batches", "dispatch_batches"} & set(value),
        "each process reads its own batches; remove split_batches and dispatch_batches",
    ),
    "activation_offloading": (lambda value: not value, "not supported yet"),
    "average_tokens_across_devices": (
        lambda value: value is True,
        "the loss is always divided by the token count of all processes; remove it",
    ),
    "batch_eval_metrics": (lambda value: not value, _NO_PREDICTIONS),
    "dataset_num_proc": (
        lambda value: value is None or (isinstance(value, int) and value >= 1),
        "must be a number of processes, at least 1",
    ),
    "eval_accumulation_steps": (lambda value: value is None, _NO_PREDICTIONS),
    "eval_do_concat_batches": (lambda value: value is True, _NO_PREDICTIONS),
    "eval_use_gather_object": (lambda value: not value, _NO_PREDICTIONS),
    "include_for_metrics": (lambda value: not value, _NO_PREDICTIONS),
    "label_names": (lambda value: value is None, "the trainer makes the labels itself; remove it"),
    "label_smoothing_factor": (lambda value: value == 0, "not supported yet"),
    "liger_kernel_config": (lambda value: value is None, "not supported yet"),
    "loss_type": (lambda value: value in ("nll", "chunked_nll"), "loss_functions set the losses; remove it"),
    "model_init_kwargs": (lambda value: not value, "put these under model_kwargs"),
    "padding_free": (lambda value: not value, "not supported yet"),
    "parallelism_config": (lambda value: value is None, "not supported yet"),
    "prediction_loss_only": (lambda value: value is True, _NO_PREDICTIONS),
    "remove_unused_columns": (lambda value: value is False, "must be false: the teacher's rows are such a column"),
    "router_aux_loss_coef": (lambda value: not value, "not supported yet"),
    "shuffle_dataset": (lambda value: not value, "dataset.seed sets the order; remove it"),
    "torch_compile": (lambda value: not value, "not supported yet"),
    "torch_compile_backend": (lambda value: value is None, "not supported yet"),
    "torch_compile_mode": (lambda value: value is None, "not supported yet"),
    "train_sampling_strategy": (
        lambda value: value in ("random", "sequential"),
        "allowed: 'random', 'sequential': the order of documents depends only on the seed and the epoch",
    ),
    "truncation_mode": (lambda value: value == "keep_start", "not supported yet: documents are cut at their end"),
    "trust_remote_code": (lambda value: not value, "put it at the top level"),
    "use_cache": (lambda value: not value, "must be false: with a cache, packed documents would attend to each other"),
    "use_liger_kernel": (lambda value: not value, "not supported yet"),
}

# Arguments for tokenising text: stored distributions involve no text, so only harmless values are allowed.
_FOR_TEXT: dict[str, tuple[Callable[[Any], bool], str]] = {
    "assistant_only_loss": (lambda value: not value, _LOSS_MASK),
    "chat_template_path": (lambda value: value is None, _PREPARES_TEXT),
    "completion_only_loss": (lambda value: not value, _LOSS_MASK),
    "dataset_text_field": (lambda value: value == "text", _PREPARES_TEXT),
}

_PACKING_STRATEGIES = {
    "bfd_split": "later pieces of a split document would lack the context that the teacher saw; allowed: "
    "'bfd', which cuts documents that are longer than sequence_length",
    "wrapped": "it would cut documents anywhere and let them attend to each other; allowed: 'bfd'",
}


def argument_problems(content: Mapping[Any, Any]) -> list[str]:
    """Describe everything that is wrong with the `training_args` of a configuration.

    Args:
        content: the entire configuration as read; some arguments must agree with other sections.

    Returns:
        One line per problem, with its dotted path.
    """
    arguments: Mapping[Any, Any] = content["training_args"]
    problems: list[str] = []
    refused = _REFUSED if _has_live_teacher(content) else {**_REFUSED, **_FOR_TEXT}
    for name, value in arguments.items():
        problem = _argument_problem(name, value, refused)
        if problem is not None:
            problems.append(f"training_args.{name}: {problem}")
    for old, new in RENAMED.items():
        if old in arguments and new in arguments:
            problems.append(
                f"training_args.{old}: {arguments[old]!r} is the old name of {new}, which is also set: "
                f"{arguments[new]!r}"
            )
    return problems + _disagreements(content, arguments)


def _has_live_teacher(content: Mapping[Any, Any]) -> bool:
    teacher = content.get("teacher")
    return isinstance(teacher, Mapping) and teacher.get("kind") == "hf"


def _argument_problem(name: Any, value: Any, refused: Mapping[str, tuple[Callable[[Any], bool], str]]) -> str | None:
    """Describe what is wrong with an argument on its own, or return None."""
    if name in GONE:
        harmless, why = GONE[name]
        return None if value == harmless else f"{value!r} is not supported ({why})"
    field = RENAMED.get(name, name)
    if name == "resume_from_checkpoint":
        good = value is None or isinstance(value, (bool, str))
        return (
            None
            if good
            else f"{value!r} is not allowed; allowed: a checkpoint's folder, true for the newest one, or false"
        )
    hints = _hints()
    if field not in hints:
        return f"unknown training argument{nearest(name, [*hints, *RENAMED])}"
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
        converted(field, value)
    except ValueError as error:
        return str(error)
    return None


def _dataset_kwargs_problem(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return f"must be a mapping (found {value!r})"
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
                f"training_args.{name}: {arguments[name]!r} contradicts {section}: {content.get(section)!r}; set "
                f"only {section}"
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


def converted(name: str, value: Any) -> Any:
    """Return an argument's value as SFTConfig expects it.

    YAML reads `1e-4` as a string and an unquoted `no` as false, which is not what users mean.

    Raises:
        ValueError: the value has the wrong type, or is not one of the allowed values.
    """
    if name == "fsdp" and isinstance(value, bool):
        return value  # declared as a string, but used as a switch
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
    # Integers stay integers even where floats are allowed: SFTConfig uses some of them as counts.
    return converted if isinstance(value, str) else value

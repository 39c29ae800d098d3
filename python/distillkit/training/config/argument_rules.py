"""Checks of `training_args`: renamed arguments, and values that are not supported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import TypeAdapter, ValidationError

from distillkit.configuration.problems import shown, value_problem
from distillkit.errors import nearest
from distillkit.losses.config import LOSS_NAMES
from distillkit.training.config.argument_table import ARGUMENTS, CHECKPOINTING

__all__ = ["GREATER_IS_BETTER", "RENAMED", "argument_problems", "converted"]

# Old names that published configurations use and transformers or TRL have since replaced; the values mean the same.
RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "max_seq_length": "max_length",
    "no_cuda": "use_cpu",
    "warmup_ratio": "warmup_steps",  # values below 1 are a fraction of all steps
}

# Metrics of an evaluation, without the prefix `eval_`: those of which more is better, and the others. Every loss is
# measured, too, under its own name.
GREATER_IS_BETTER = (
    "top1_agreement",
    "topk_overlap",
    "teacher_mass",
    "student_mass",
    "positions",
    "samples_per_second",
    "steps_per_second",
)
_LESS_IS_BETTER = ("loss", "kl", "kl_with_rest", "cross_entropy", "perplexity", "runtime")

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
    "eval_accumulation_steps": (lambda value: value is None, _NO_PREDICTIONS),
    "eval_do_concat_batches": (lambda value: value is True, _NO_PREDICTIONS),
    "eval_use_gather_object": (lambda value: not value, _NO_PREDICTIONS),
    "ignore_data_skip": (
        lambda value: not value,
        "a resumed run would train on the same documents again; passing over them takes no time here",
    ),
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
    "bfd_split": "dataset.overflow: split does this, and repeats some context in each piece; allowed: 'bfd'",
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
    refused = _REFUSED if _reads_text(content) else {**_REFUSED, **_FOR_TEXT}
    for name, value in arguments.items():
        problem = _argument_problem(name, value, refused)
        if problem is not None:
            problems.append(f"training_args.{name}: {problem}")
    for old, new in RENAMED.items():
        if old in arguments and new in arguments:
            problems.append(
                f"training_args.{old}: {shown(arguments[old])} is the old name of {new}, which is also set: "
                f"{shown(arguments[new])}"
            )
    return problems + _disagreements(content, arguments)


def _reads_text(content: Mapping[Any, Any]) -> bool:
    """Whether documents may be text: with live and served teachers."""
    teacher = content.get("teacher")
    kind = teacher.get("kind") if isinstance(teacher, Mapping) else None
    return content.get("teachers") is not None or kind in ("hf", "server")


def _argument_problem(name: Any, value: Any, refused: Mapping[str, tuple[Callable[[Any], bool], str]]) -> str | None:
    """Describe what is wrong with an argument on its own, or return None."""
    if name in GONE:
        harmless, why = GONE[name]
        return None if value == harmless else f"{shown(value)} is not supported ({why})"
    field = RENAMED.get(name, name)
    if field not in ARGUMENTS:
        return f"unknown training argument{nearest(name, [*ARGUMENTS, *RENAMED])}"
    if field in refused:
        harmless_value, why = refused[field]
        if not harmless_value(value):
            return (
                f"{shown(value)} is not supported ({why})"
                if why != "not supported yet"
                else f"not supported yet (found {shown(value)})"
            )
    if field == "dataset_kwargs" and value is not None:
        return _dataset_kwargs_problem(value)
    if field == "activation_checkpointing_kwargs" and isinstance(value, Mapping):
        return next((problem for item in value.items() if (problem := _checkpointing_problem(*item))), None)
    if field == "packing_strategy" and value != "bfd":
        if value in ("bfd_split", "wrapped"):
            return f"{value!r} is not supported ({_PACKING_STRATEGIES[value]})"
        return f"{shown(value)} is not allowed; allowed: 'bfd'"
    try:
        plain = converted(field, value)
    except ValueError as error:
        return str(error)
    if name == "warmup_ratio" and plain is not None and plain >= 1:
        return f"must be less than 1, a fraction of all steps, found {shown(value)}; a number of steps is warmup_steps"
    return None


def _checkpointing_problem(key: Any, value: Any) -> str | None:
    if key not in CHECKPOINTING:
        return f"unknown key {shown(key)}{nearest(key, CHECKPOINTING)}"
    try:
        TypeAdapter(CHECKPOINTING[key]).validate_python(value, strict=True)
    except ValidationError as error:
        return f"{key} {value_problem(error)}"
    return None


def _dataset_kwargs_problem(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return f"must be a mapping, found {shown(value)}"
    unknown = [key for key in value if key != "skip_prepare_dataset"]
    if unknown:
        return f"unknown key {shown(unknown[0])}; allowed: 'skip_prepare_dataset'"
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
                f"training_args.{name}: {shown(arguments[name])} contradicts {section}: "
                f"{shown(content.get(section))}; set only {section}"
            )
    if dataset.get("eval_dataset") is None:
        wanted = {name: arguments.get(name) for name in _NEED_EVALUATION}
        problems += [
            f"training_args.{name}: {shown(value)} needs dataset.eval_dataset, which is missing"
            for name, value in wanted.items()
            if value not in (None, False, "no")
        ]
    return [*problems, *_evaluation_problems(content, arguments)]


_NEED_EVALUATION = ("eval_strategy", "evaluation_strategy", "eval_on_start", "load_best_model_at_end")
_BY_EVALUATION = (
    ("load_best_model_at_end", (True,)),
    ("save_strategy", ("best",)),
    ("lr_scheduler_type", ("reduce_lr_on_plateau", "greedy")),
)


def _evaluation_problems(content: Mapping[Any, Any], arguments: Mapping[Any, Any]) -> Iterator[str]:
    """Describe arguments that need evaluations that do not take place, and metrics that no evaluation has."""
    strategy = arguments.get("eval_strategy", arguments.get("evaluation_strategy", "no"))
    if strategy in ("no", False, None):
        for name, values in _BY_EVALUATION:
            if arguments.get(name) in values:
                yield f"training_args.{name}: {shown(arguments[name])} needs evaluations; set eval_strategy"
    metric = arguments.get("metric_for_best_model")
    if metric is None and arguments.get("save_strategy") == "best":
        yield "training_args.save_strategy: 'best' needs metric_for_best_model, which is missing"
    known = evaluation_metrics(content)
    if isinstance(metric, str) and metric.removeprefix("eval_") not in known:
        yield (
            f"training_args.metric_for_best_model: no evaluation measures {shown(metric)}"
            f"{nearest(metric.removeprefix('eval_'), known)}; allowed: {', '.join(map(repr, known))}"
        )


def evaluation_metrics(content: Mapping[Any, Any]) -> tuple[str, ...]:
    """Return the names of the metrics of an evaluation, without the prefix `eval_`.

    Args:
        content: the configuration as read, of which the losses need not be valid.
    """
    losses = content.get("loss_functions")
    usual = ("cross_entropy", "kl") if content.get("rollouts") is None else ("reverse_kl",)
    entries = losses if isinstance(losses, list) else [{"function": name} for name in usual]
    seen: dict[str, int] = {}
    for entry in entries:
        function = entry.get("function") if isinstance(entry, Mapping) else None
        if function in LOSS_NAMES:
            seen[function] = seen.get(function, 0) + 1
    repeated = [name if nth == 1 else f"{name}@{nth}" for name, count in seen.items() for nth in range(1, count + 1)]
    found = tuple(dict.fromkeys((*_LESS_IS_BETTER, *GREATER_IS_BETTER, *repeated)))
    return found + tuple(f"{metric}/{source}" for source in _sources(content) for metric in found)


def _sources(content: Mapping[Any, Any]) -> list[str]:
    """Return the names of several datasets to evaluate on."""
    from distillkit.training.config.schema import source_names

    dataset = content.get("dataset")
    found = dataset.get("eval_dataset") if isinstance(dataset, Mapping) else None
    return source_names(found) if isinstance(found, list) else []


@cache
def _checked(name: str) -> TypeAdapter[Any]:
    return TypeAdapter(ARGUMENTS[name])


def converted(name: str, value: Any) -> Any:
    """Return an argument's value as SFTConfig expects it.

    YAML reads `1e-4` as a string and an unquoted `no` as false, which is not what users mean.

    Raises:
        ValueError: the value has the wrong type, is beyond its limits, or is not one of the allowed values.
    """
    if value is None and name == "report_to":
        return "none"
    try:
        if isinstance(value, bool) and isinstance(_checked(name).validate_python(value), (int, float)):
            # pydantic would take true as 1.
            _checked(name).validate_python(value, strict=True)
        checked = _checked(name).validate_python(value)
    except ValidationError as error:
        raise ValueError(value_problem(error)) from None
    # Integers stay integers even where floats are allowed: SFTConfig uses some of them as counts.
    return value if isinstance(value, int) and isinstance(checked, float) else checked

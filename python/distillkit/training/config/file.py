"""Reads a training run's YAML file and checks it completely, reporting all problems at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from distillkit.configuration.describe import json_schema
from distillkit.configuration.overrides import Overrides, with_overrides
from distillkit.configuration.problems import Problem, find_problems, report
from distillkit.configuration.yaml_file import read_yaml
from distillkit.errors import ConfigError
from distillkit.losses.config import HIDDEN_LOSSES
from distillkit.training.config.schema import RunConfig, alone_problem

__all__ = ["load_config", "parse_config", "training_schema"]


def load_config(path: str | Path, overrides: Overrides | None = None) -> RunConfig:
    """Read and check a training configuration.

    Args:
        path: a YAML file.
        overrides: values that replace those of the file, by dotted path: {"training_args.max_steps": 100}.

    Raises:
        ConfigError: there is no such file, it is not YAML, or it is invalid; reports all problems, each with its
            dotted path.

    Example:
        >>> config = load_config("train.yaml", {"training_args.max_steps": 100})
        >>> config.teacher.kind, [loss.function for loss in config.loss_functions]
        ('dataset', ['cross_entropy', 'kl'])
        >>> config.training_args["max_steps"]
        100
    """
    return parse_config(read_yaml(path), source=str(path), overrides=overrides)


def parse_config(content: object, *, source: str = "config", overrides: Overrides | None = None) -> RunConfig:
    """Check a training configuration that has already been read.

    Args:
        content: the content of a YAML file.
        source: where it came from, for messages.
        overrides: as for `load_config`.

    Raises:
        ConfigError: as `load_config`.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{source}: must be a mapping of settings, found {'nothing' if content is None else type(content).__name__}"
        )
    settings: Mapping[Any, Any] = content
    if overrides:
        settings = with_overrides(content, overrides)
        source += " with --set"
    problems: list[Problem | str] = []
    try:
        config = RunConfig.model_validate(settings)
        problems += _disagreements(config) + _student_problems(config)
    except ValidationError as error:
        problems += find_problems(error, RunConfig)
    if isinstance(settings.get("training_args"), Mapping):
        from distillkit.training.config.argument_rules import argument_problems

        problems += argument_problems(settings)
    if problems:
        raise ConfigError(report(source, problems))
    config._source, config._overrides = source, dict(overrides or {})
    return config


def training_schema() -> dict[str, Any]:
    """Return the JSON schema of a training configuration."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **json_schema(RunConfig),
        "title": "Training with distillkit",
    }


def _disagreements(config: RunConfig) -> list[str]:
    """Describe sections that contradict each other."""
    found: list[str] = []
    if config.dataset.packing is not None:
        others = ["functionary_packing"] if config.functionary_packing else []
        others += [f"training_args.{name}" for name in ("packing",) if name in config.training_args]
        found += [f"dataset.packing: {other} says it, too; set only one of them" for other in others]
    hidden = [loss.function for loss in config.loss_functions if loss.function in HIDDEN_LOSSES]
    if hidden:
        found += _hidden_problems(config, hidden[0])
    if not hidden and config.layer_mapping is not None:
        found.append(f"layer_mapping: only {' and '.join(HIDDEN_LOSSES)} use it, and loss_functions has neither")
    if not hidden and config.force_hidden_state_projection:
        found.append(
            f"force_hidden_state_projection: only {' and '.join(HIDDEN_LOSSES)} use it, and loss_functions has neither"
        )
    return [*found, *_rollout_problems(config)]


def _hidden_problems(config: RunConfig, loss: str) -> Iterator[str]:
    """Describe what a loss of hidden states lacks."""
    if len(config.teachers or ()) > 1:
        yield (
            f"loss_functions: {loss} compares hidden states with those of one teacher, but there are several "
            "(teachers); leave it out, with layer_mapping, or use a single live teacher"
        )
    elif config.teacher.kind != "hf":
        lacking = "a server" if config.teacher.kind == "server" else "a dataset of stored distributions"
        key = "teacher" if config.teachers is None else "teachers.0"
        yield (
            f"loss_functions: {loss} compares hidden states, which {lacking} does not have; use a live teacher "
            f"({key}.kind: hf)"
        )
    elif config.layer_mapping is None:
        yield f"layer_mapping: missing, but {loss} needs it: 'all', or pairs of [student layer, teacher layer]"


def _rollout_problems(config: RunConfig) -> Iterator[str]:
    """Describe what rollouts lack, and what they leave no use for."""
    rollouts = config.rollouts
    if rollouts is None:
        return
    if config.teacher.kind == "dataset":
        yield (
            "rollouts: the teacher scores what the student writes, and a dataset of stored distributions cannot; use a "
            "live or a served teacher (teacher.kind: hf or server)"
        )
    if isinstance(config.dataset.train_dataset, list):
        yield "rollouts: are mixed with one dataset, but dataset.train_dataset is a list; train on one of them"
    alone = alone_problem(rollouts.prompts)
    if alone is not None:
        yield f"rollouts.prompts.{alone}"
    for key, teacher in config.teachers_by_key.items():
        if getattr(teacher, "where", None):
            yield f"{key}.where: what the student writes has no columns; with rollouts, leave it out"
    if rollouts.max_new_tokens >= config.sequence_length:
        yield (
            f"rollouts.max_new_tokens: {rollouts.max_new_tokens:,} leaves no room for a prompt within sequence_length: "
            f"{config.sequence_length:,}"
        )
    if rollouts.engine != "hf" and config.quantised is not None:
        yield (
            f"rollouts.engine: {rollouts.engine} gets the student's weights with the adapters merged, and merging into "
            f"quantised weights (model_kwargs.{config.quantised}) would round them away; use engine: hf"
        )
    if config.only_rollouts and config.dataset.train_dataset != rollouts.prompts:
        yield (
            "dataset.train_dataset: not trained on with rollouts.fraction: 1, where all rows are completions; lower "
            "rollouts.fraction, or remove it"
        )
    sharding = [name for name in ("fsdp", "deepspeed") if config.training_args.get(name)]
    if sharding:
        yield (
            f"rollouts: a student that training_args.{sharding[0]} divides among processes cannot write completions "
            "yet; remove it (several processes then use DDP), or train LoRA adapters"
        )


def _student_problems(config: RunConfig) -> list[str]:
    """Describe settings of the student that contradict each other."""
    found: list[str] = []
    sharding = [name for name in ("fsdp", "deepspeed") if config.training_args.get(name)]
    for key in config.own_teachers:
        own = f"{key}.path: is the student itself, which teaches with its adapters disabled"
        remedy = f"set {key}.kwargs (such as dtype) to load a separate teacher"
        if config.peft is not None and config.peft.changes_base_weights:
            found.append(f"{own}, but peft.bias or peft.init_lora_weights also change its own weights; {remedy}")
        if sharding:
            found.append(f"{own}, which is not possible under training_args.{sharding[0]}; {remedy}")
    if config.quantised is not None and config.peft is None:
        found.append(
            f"model_kwargs.{config.quantised}: quantised weights cannot be trained; add a peft section to "
            "train LoRA adapters on them (QLoRA)"
        )
    if config.peft is not None and config.peft.merge_on_save:
        if config.quantised is not None:
            found.append(
                f"peft.merge_on_save: merging into quantised weights (model_kwargs.{config.quantised}) would round "
                "the adapters away; save the adapters and merge them into the unquantised model"
            )
        if sharding:
            found.append(
                f"peft.merge_on_save: no process holds the full weights under training_args.{sharding[0]}; save the "
                "adapters and merge them afterwards"
            )
    return found

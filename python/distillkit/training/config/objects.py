"""From the arguments of a `DistillationTrainer`, which are Python objects, to a training configuration."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from pydantic import ValidationError

from distillkit.configuration.places import is_path
from distillkit.configuration.problems import find_problems, report
from distillkit.configuration.urls import is_url
from distillkit.errors import ConfigError, nearest
from distillkit.shards import Dataset
from distillkit.training.config.argument_rules import RENAMED
from distillkit.training.config.arguments import in_installed_names, recomputing, to_plain_value
from distillkit.training.config.file import parse_config
from distillkit.training.config.schema import DatasetSection, DatasetSource, RunConfig

__all__ = ["OUTPUT", "TrainerSettings", "configuration", "dataset_section", "evaluated_section"]

OUTPUT = "trained"
"""The output folder if none is given."""

SOURCE = "DistillationTrainer"

# Arguments that settings of this package stand for, that are used elsewhere, or that nobody may save.
_ELSEWHERE = ("output_dir", "max_length", "resume_from_checkpoint", "hub_token")


class TrainerSettings(TypedDict, total=False):
    """The settings that `DistillationTrainer` takes by name: those of `RunConfig` and its section `dataset`."""

    teacher: str | os.PathLike[str] | Mapping[str, Any] | None
    teachers: list[dict[str, Any]] | None
    loss_functions: list[dict[str, Any]]
    sequence_length: int
    layer_mapping: list[tuple[int, int]] | Literal["all"] | None
    force_hidden_state_projection: bool
    peft: Mapping[str, Any] | None
    rollouts: Mapping[str, Any] | None
    frozen_modules: list[str]
    frozen_res: list[str]
    resize_embeddings_to_multiple_of: int | None
    use_flash_attention: bool | None
    functionary_packing: bool
    model_kwargs: dict[str, Any]
    model_auto_class: str
    trust_remote_code: bool
    project_name: str
    seed: int | None
    num_samples: int | None
    num_eval_samples: int | None
    eos_label_token_ids: list[int] | None
    prepared_dataset_path: str | None
    packing: Literal["auto"] | bool | None
    overflow: Literal["cut", "split", "drop"] | None
    prepacked: bool


def configuration(
    model: str,
    train_dataset: object,
    eval_dataset: object,
    args: object,
    settings: Mapping[str, Any],
) -> RunConfig:
    """Return the configuration that stands for a trainer's arguments.

    Args:
        model: name of the student.
        train_dataset, eval_dataset: paths, URLs, hub ids, opened datasets, sections of the configuration, or lists of
            these; or None.
        args: `TrainingArguments`, `SFTConfig`, a mapping like `training_args`, or None.
        settings: other settings, at the top level or in the section `dataset`; `teacher` may be a model's name.

    Raises:
        ConfigError: a setting is unknown or not allowed; reports all problems.
    """
    known = TrainerSettings.__annotations__
    unknown = [f"{name}: unknown setting{nearest(name, known)}" for name in settings if name not in known]
    if unknown:
        raise ConfigError(report(SOURCE, unknown))
    top = dict(settings)
    inner = {name: top.pop(name) for name in DatasetSection.model_fields if name in top}
    arguments = _arguments(args)
    teacher = top.pop("teacher", None) or {"kind": "dataset"}
    taught = {} if top.get("teachers") is not None else {"teacher": _teacher_section(teacher)}
    content: dict[str, Any] = {
        "model": model,
        "output_path": arguments.pop("output_dir", OUTPUT),
        "sequence_length": arguments.pop("max_length", None) or 1024,
        **taught,
        "dataset": inner,
        "training_args": arguments,
        **top,
    }
    if train_dataset is not None:
        content["dataset"]["train_dataset"] = dataset_section(train_dataset, "train_dataset")
    if eval_dataset is not None:
        content["dataset"]["eval_dataset"] = dataset_section(eval_dataset, "eval_dataset")
    return parse_config(content, source=SOURCE)


def _teacher_section(teacher: Any) -> Any:
    return {"kind": "hf", "path": os.fspath(teacher)} if isinstance(teacher, (str, Path)) else teacher


def evaluated_section(dataset: object) -> DatasetSource | list[DatasetSource]:
    """Return the checked setting that stands for one or several datasets to evaluate on.

    Args:
        dataset: as for `dataset_section`.

    Raises:
        ConfigError: it is something else, or a setting in it is wrong.
    """
    section = dataset_section(dataset, "eval_dataset")
    try:
        checked = DatasetSection.model_validate({"train_dataset": {"disk_path": "."}, "eval_dataset": section})
    except ValidationError as error:
        raise ConfigError(report(SOURCE, find_problems(error, DatasetSection))) from None
    return cast("DatasetSource | list[DatasetSource]", checked.eval_dataset)


def dataset_section(dataset: object, name: str) -> dict[str, Any] | list[Any]:
    """Return the setting that stands for one or several datasets.

    Args:
        dataset: a path, a URL, a hub id, an opened dataset, the section itself, or a list of these.
        name: the argument, for messages.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(dataset, (list, tuple)):
        return [dataset_section(each, f"{name}[{number}]") for number, each in enumerate(dataset)]
    if isinstance(dataset, Mapping):
        return dict(dataset)
    if isinstance(dataset, Dataset):
        return {"disk_path": dataset.path}
    if not isinstance(dataset, (str, Path)):
        raise ConfigError(
            f"{SOURCE}: {name}: expected a path, a URL, a hub id or a distillkit.Dataset, found "
            f"{type(dataset).__name__}. Save other datasets with save_to_disk, and give the folder"
        )
    text = os.fspath(dataset)
    # Hub ids of datasets have an owner; any other name is a folder that does not exist.
    on_disk = is_url(text) or is_path(text) or "/" not in text
    return {"disk_path" if on_disk else "repo_id": text}


def _arguments(args: object) -> dict[str, Any]:
    """Return arguments as a mapping of plain values.

    All values of an object count, also its class's defaults: what differs from those of SFTConfig is set explicitly.
    """
    if args is None:
        return {}
    if isinstance(args, Mapping):
        return dict(args)
    from transformers import TrainingArguments
    from trl import SFTConfig

    if not isinstance(args, TrainingArguments):
        raise ConfigError(
            f"{SOURCE}: args: expected TrainingArguments, SFTConfig or a mapping, found {type(args).__name__}"
        )
    token = getattr(args, "hub_token", None)
    if token:
        # As `training_arguments` does with the setting of this name: what is saved must not have it.
        os.environ["HF_TOKEN"] = token
    # These depend on the machine, or have another default here, if they are not set.
    always = {"bf16": args.bf16, "fp16": args.fp16, "activation_checkpointing": recomputing(args)[0]}
    usual: Any = SFTConfig(output_dir=args.output_dir, use_cpu=args.use_cpu, **in_installed_names(always))
    names = {field.name for field in dataclasses.fields(args) if field.init}
    names -= {old for old, new in RENAMED.items() if new in names}
    unknown = sorted(name for name in names if not hasattr(usual, name))
    if unknown:
        raise ConfigError(
            f"{SOURCE}: args: {type(args).__name__} has the field {unknown[0]}, which SFTConfig does not have; give a "
            "TrainingArguments or an SFTConfig"
        )
    found = {
        name: _plain(getattr(args, name))
        for name in sorted(names)
        if name not in _ELSEWHERE and hasattr(usual, name) and getattr(args, name) != getattr(usual, name)
    }
    return {**found, **always, "output_dir": args.output_dir, "max_length": getattr(args, "max_length", None)}


def _plain(value: Any) -> Any:
    value = to_plain_value(value)
    return value.to_dict() if hasattr(value, "to_dict") else value

"""Describes a run for its report: student, teacher, data, losses, settings."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from distillkit import __version__
from distillkit.configuration.secrets import without_secrets
from distillkit.losses.config import LossConfig, named_losses
from distillkit.shards import Dataset as StoredDataset
from distillkit.training.config.arguments import to_plain_value
from distillkit.training.student import describe_student

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from trl import SFTConfig

    from distillkit.training.config.schema import DatasetSource, RunConfig
    from distillkit.training.data.examples import DistillationDataset, DocumentSource
    from distillkit.training.data.prepared import Part

__all__ = ["describe", "tokens_of"]

_PACKAGES = ("torch", "transformers", "trl", "accelerate")


def describe(
    config: RunConfig,
    arguments: SFTConfig,
    model: PreTrainedModel | PeftModel,
    datasets: Mapping[Part, DistillationDataset],
) -> dict[str, Any]:
    """Describe a run after its parts are loaded.

    Args:
        config: the run's configuration.
        arguments: the trainer's arguments.
        model: the student.
        datasets: `train`, and `eval` if there is one.

    Returns:
        JSON objects by name: `student`, `teacher`, `data`, `losses` (weights summing to 1), `rollouts` (None without),
        `overrides` (what the command line set, by dotted path), `settings`, `versions`; and `project`, `began`.
    """
    description = {
        "project": config.project_name,
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "student": describe_student(config, model),
        "teacher": _teacher(config, datasets["train"]),
        "data": {key: _data(getattr(config.dataset, f"{key}_dataset"), dataset) for key, dataset in datasets.items()},
        "losses": _losses(config.loss_functions),
        "rollouts": None if config.rollouts is None else config.rollouts.model_dump(mode="json", exclude={"prompts"}),
        "overrides": config.overrides,
        "settings": _settings(config, arguments),
        "versions": {"distillkit": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}},
    }
    # It is shown in reports and sent to trackers.
    found: dict[str, Any] = without_secrets(description)
    return found


def _teacher(config: RunConfig, dataset: DistillationDataset) -> dict[str, Any]:
    if config.teacher.kind == "hf":
        return {"kind": "hf", "name": config.teacher.path, "k": config.teacher.top_k}
    if config.teacher.kind == "server":
        return {
            "kind": "server",
            "name": config.teacher.served_model or config.teacher.model,
            "k": config.teacher.top_k,
        }
    if not isinstance(dataset.source, StoredDataset):
        raise TypeError(f"expected stored distributions, found {type(dataset.source).__name__}")
    recorded = dataset.source.header.teacher or {}
    return {"kind": "dataset", "name": recorded.get("name"), "k": dataset.source.codec.k}


def _data(where: DatasetSource, dataset: DistillationDataset) -> dict[str, Any]:
    whole = dataset.documents == len(dataset.source)
    return {
        "path": where.repo_id or where.disk_path,
        "documents": dataset.documents,
        # For a subset of the documents, the tokens would have to be counted.
        "tokens": tokens_of(dataset.source) if whole else None,
        "rows": None if dataset.packing is None else len(dataset),
    }


def tokens_of(source: DocumentSource) -> int:
    """Return the total number of tokens."""
    return source.num_tokens if isinstance(source, StoredDataset) else int(source.lengths().sum())


def _losses(configs: list[LossConfig]) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "weight": share,
            **config.model_dump(mode="json", exclude_none=True, exclude={"function", "weight"}),
        }
        for name, share, config in named_losses(configs)
    ]


def _settings(config: RunConfig, arguments: SFTConfig) -> dict[str, Any]:
    precision = "bf16 mixed precision" if arguments.bf16 else "fp16 mixed precision" if arguments.fp16 else "as loaded"
    return {
        "sequence_length": config.sequence_length,
        "batch": arguments.per_device_train_batch_size,
        "accumulation": arguments.gradient_accumulation_steps,
        "processes": arguments.world_size,
        "device": arguments.device.type,
        "precision": precision,
        "optimizer": to_plain_value(arguments.optim),
        "learning_rate": arguments.learning_rate,
        "schedule": to_plain_value(arguments.lr_scheduler_type),
        "warmup_steps": arguments.warmup_steps,
        "weight_decay": arguments.weight_decay,
        "activation_checkpointing": bool(arguments.activation_checkpointing),
        "workers": arguments.dataloader_num_workers,
        "seed": arguments.seed,
    }

"""Describes a run for its report: student, teacher, data, losses, settings."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distillkit import __version__
from distillkit.configuration.secrets import without_secrets
from distillkit.losses.config import LossConfig, named_losses
from distillkit.shards import Dataset as StoredDataset
from distillkit.training.config.arguments import recomputing, to_plain_value
from distillkit.training.data.examples import DistillationDataset
from distillkit.training.data.prepared import Part, PreparedDataset
from distillkit.training.student import describe_student

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
    from trl import SFTConfig

    from distillkit.training.config.schema import DatasetEntry, DatasetSource, RunConfig
    from distillkit.training.data.examples import DocumentSource
    from distillkit.training.data.mixture import Mixture

__all__ = ["bytes_of", "describe", "sources_of", "tokens_of"]

_PACKAGES = ("torch", "transformers", "trl", "accelerate")


def describe(
    config: RunConfig,
    arguments: SFTConfig,
    model: PreTrainedModel | PeftModel,
    datasets: Mapping[Part, DistillationDataset | Mixture],
) -> dict[str, Any]:
    """Describe a run after its parts are loaded.

    Args:
        config: the run's configuration.
        arguments: the trainer's arguments.
        model: the student.
        datasets: `train`, and `eval` if there is one.

    Returns:
        JSON objects by name: `student`, `teacher` (with `names` if they are several; `k` is None for all ids, and a
        list if numbers of ids differ; `draws`, the number of draws of a distribution, if these are stored), `data`,
        `losses` (weights summing to 1), `rollouts` (None without), `overrides` (what the command line set, by dotted
        path), `settings`, `versions`; and `project`, `began`.
    """
    description = {
        "project": config.project_name,
        "began": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "student": describe_student(config, model),
        "teacher": _teacher(config, datasets["train"]),
        "data": {part: _data(config.dataset.entries(part), dataset) for part, dataset in datasets.items()},
        "losses": _losses(config.loss_functions),
        "rollouts": None
        if config.rollouts is None
        else config.rollouts.model_dump(mode="json", exclude={"prompts", "server"}),
        "overrides": config.overrides,
        "settings": _settings(config, arguments),
        "versions": {"distillkit": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}},
    }
    # It is shown in reports and sent to trackers.
    found: dict[str, Any] = without_secrets(description)
    return found


def _teacher(config: RunConfig, dataset: DistillationDataset | Mixture) -> dict[str, Any]:
    taught = list(config.teachers_by_key.values())
    if taught:
        own = [each.path if each.kind == "hf" else each.served_model or each.model for each in taught]
        sizes = sorted({each.top_k for each in taught if each.top_k is not None})
        return {
            "kind": " and ".join(sorted({each.kind for each in taught})),
            "name": ", ".join(own),
            **({"names": own} if len(own) > 1 else {}),
            "k": sizes if len(sizes) > 1 else next(iter(sizes), None),
        }
    names, widths, draws = dict[str, None](), set[int](), set[int]()
    for part in dataset.parts:
        if not isinstance(part.source, StoredDataset):
            raise TypeError(f"expected stored distributions, found {type(part.source).__name__}")
        names |= dict.fromkeys([name] if (name := (part.source.header.teacher or {}).get("name")) else [])
        widths.add(part.source.codec.k)
        if part.source.codec.draws is not None:
            draws.add(part.source.codec.draws.number)
    k = widths.pop() if len(widths) == 1 else None
    several = {"names": list(names)} if len(names) > 1 else {}
    drawn = {"draws": k} if draws == {k} else {}
    return {"kind": "dataset", "name": ", ".join(names) or None, **several, "k": k, **drawn}


def _data(entries: Sequence[DatasetEntry], dataset: DistillationDataset | Mixture) -> dict[str, Any]:
    found = [_one(entry.source, part) for entry, part in zip(entries, dataset.parts, strict=True)]
    if isinstance(dataset, DistillationDataset):
        return found[0]
    shares = sources_of(dataset)
    return {
        "path": None,
        "documents": sum(each["documents"] for each in found),
        "tokens": None if any(each["tokens"] is None for each in found) else sum(each["tokens"] for each in found),
        "rows": len(dataset) if dataset.packed else None,
        "sources": [{**each, **share} for each, share in zip(found, shares, strict=True)],
    }


def _one(where: DatasetSource, dataset: DistillationDataset) -> dict[str, Any]:
    whole = dataset.documents == len(dataset.source)
    return {
        "path": where.repo_id or where.disk_path,
        "documents": dataset.documents,
        # For a subset of the documents, the tokens would have to be counted.
        "tokens": tokens_of(dataset.source) if whole else None,
        "rows": None if dataset.packing is None else len(dataset),
    }


def sources_of(dataset: Mixture) -> list[dict[str, Any]]:
    """Return what an epoch uses of each dataset: `name`, `passes` over it, and its `share` of all tokens."""
    passes = [taken / len(part) for taken, part in zip(dataset.taken, dataset.parts, strict=True)]
    tokens = [each * part.tokens for each, part in zip(passes, dataset.parts, strict=True)]
    return [
        {"name": name, "passes": each, "share": part / sum(tokens)}
        for name, each, part in zip(dataset.names, passes, tokens, strict=True)
    ]


def tokens_of(source: DocumentSource) -> int:
    """Return the total number of tokens."""
    return source.num_tokens if isinstance(source, StoredDataset) else int(source.lengths().sum())


def bytes_of(source: DocumentSource) -> int:
    """Return the size of a dataset's files."""
    if isinstance(source, StoredDataset):
        return sum(shard.bytes for shard in source.shards)
    if isinstance(source, PreparedDataset):
        return sum(file.stat().st_size for file in source.folder.iterdir())
    raise TypeError(f"unknown documents: {type(source).__name__}")


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
        "activation_checkpointing": recomputing(arguments)[0],
        "workers": arguments.dataloader_num_workers,
        "seed": arguments.seed,
    }

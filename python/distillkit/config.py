"""Public alias of `distillkit.training.config`: loads and validates the YAML file of a training run."""

from __future__ import annotations

from distillkit.training.config.file import load_config, parse_config
from distillkit.training.config.schema import RunConfig

__all__ = ["RunConfig", "load_config", "parse_config"]

"""Training: from a configuration and a teacher's distributions, stored or live, to a trained student."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillkit.reports.run_summary import RunSummary
    from distillkit.training.config.schema import RunConfig

__all__ = ["train"]


def train(config: RunConfig | Mapping[str, Any] | str | PathLike[str]) -> RunSummary:
    """Train a student as a YAML file says, as `distillkit config.yaml` does: check everything, train, evaluate, save.

    Args:
        config: path of the file; or its content, as a mapping or as `distillkit.config.load_config` returns it.

    Returns:
        Steps, seconds, tokens, share of the time spent waiting for data, peak memory, the first and last evaluation and
        the last training metrics, by name.

    Raises:
        ConfigError: a setting is unknown, not allowed, or does not fit the student; reports all problems.
        MismatchError: tokenizer, vocabulary, codec or alignment of the data do not match the student.
    """
    from distillkit.reports.run_summary import RunSummary
    from distillkit.training.config.file import load_config, parse_config
    from distillkit.training.config.schema import RunConfig
    from distillkit.training.config.surroundings import check_surroundings

    if isinstance(config, Mapping):
        config = parse_config(config, source="distillkit.train")
    elif not isinstance(config, RunConfig):
        config = load_config(str(config))
    # Before the slow imports below.
    check_surroundings(config)
    from distillkit.training.run import train as train_student

    return RunSummary(train_student(config))

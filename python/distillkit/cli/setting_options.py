"""Command-line options generated from capture settings: name, type, choices, default and help come from the field."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import click

from distillkit.capture.engine_settings import ENGINES, engines_with
from distillkit.capture.settings import CaptureSettings
from distillkit.cli.common import Choice
from distillkit.configuration.describe import Setting, json_schema, settings_of

__all__ = ["GroupedCommand", "setting_option", "setting_options"]

_TYPES = {"integer": click.INT, "number": click.FLOAT}
_SWITCHES = {"drop_duplicates": "--drop-duplicates/--keep-duplicates"}
# Placeholders in the help for values with a special form, or that may be lists in a file.
_METAVARS = {
    "compression_config": "FILE",
    "prior": "FILE-OR-DATASET",
    "where": "COLUMN=VALUE",
    "keep_columns": "NAMES",
    "read_columns": "NAMES",
    "keep_ids": "IDS",
    "shard_range": "FIRST:END",
    "base_url": "URL",
}
_REPEATED = {"where"}

# Sections of the help, in order. Engine settings have sections of their own; all others are at the end.
_SECTIONS = {
    "Teacher, data and output": (
        *("model", "dataset", "output", "dataset_configuration", "split", "tokenizer", "trust_remote_code"),
    ),
    "Which rows": (
        *("samples", "seed", "shuffle", "where", "min_tokens", "max_tokens", "drop_duplicates", "skip_bad_documents"),
    ),
    "How rows are read": (
        *("read_columns", "append_eos", "keep_columns", "apply_chat_template", "max_seq_len", "overflow", "overlap"),
        "loss_on",
    ),
    "What is stored": ("preset", "compression_config", "prior", "prior_rows", "keep_ids", "label_logprobs", "last_row"),
    "How it runs": ("engine", "shard_tokens", "shard_range", "workers", "num_workers", "worker_cpus"),
}

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


class SettingOption(click.Option):
    """An option for a setting, with the engines that have it; empty if all captures have it."""

    def __init__(self, *arguments: Any, engines: tuple[str, ...] = (), **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.engines = engines


class GroupedCommand(click.Command):
    """A command whose help lists its options in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in _SECTIONS}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx) if isinstance(option, click.Option) else None
            if record is not None:
                sections.setdefault(_section(option), []).append(record)
        # At the end what every command has.
        sections[_OTHER] = sections.pop(_OTHER, [])
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


_OTHER = "Other options"


def _section(option: click.Parameter) -> str:
    """Return the title of an option's section in the help."""
    engines = getattr(option, "engines", ())
    if engines:
        return f"Only for --engine {' or '.join(engines)}"
    return next((title for title, names in _SECTIONS.items() if option.name in names), _OTHER)


@lru_cache(maxsize=1)
def _settings() -> Mapping[str, Setting]:
    """All settings by name, including engine settings."""
    common = {setting.name: setting for setting in settings_of(json_schema(CaptureSettings))}
    models = (json_schema(part) for part in ENGINES.values())
    parts = {setting.name: setting for model in models for setting in settings_of(model)}
    return {name: setting for name, setting in common.items() if name not in ENGINES} | parts


def setting_option(name: str, **attributes: Any) -> Decorator:
    """Make the option for a setting; `attributes` for `click.option` override those from the field."""
    setting = _settings()[name]
    default = setting.default
    if isinstance(default, list):
        default = None if name in _REPEATED or not default else ",".join(default)
    own: dict[str, Any] = {
        "cls": SettingOption,
        "engines": engines_with(name),
        "help": _help(setting.description),
        "metavar": _METAVARS.get(name),
        "multiple": name in _REPEATED,
    }
    if default is not None:
        own |= {"default": default, "show_default": True}
    if setting.choices:
        own["type"] = Choice(setting.choices)
    elif setting.type in _TYPES:
        own["type"] = _TYPES[setting.type]
    flag = _SWITCHES.get(name, f"{_flag(name)}/--no-{_flag(name)[2:]}") if setting.type == "boolean" else _flag(name)
    return click.option(flag, **{**own, **attributes})


def setting_options(names: Iterable[str] | None = None) -> Decorator:
    """Make the options for several settings, in order; for all of them if `names` is None."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for name in reversed(list(_settings() if names is None else names)):
            command = setting_option(name)(command)
        return command

    return decorate


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _help(description: str) -> str:
    """Adapt a description to the command line: settings in backticks become options."""
    return re.sub(r"`(\w+)`", lambda match: _flag(match[1]), description)

"""Command-line options generated from capture settings: name, type, choices, default and help come from the field."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import click

from distillkit.capture.engine_settings import ENGINES, engines_with
from distillkit.capture.settings import CaptureSettings
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

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


class SettingOption(click.Option):
    """An option for a setting, with the engines that have it; empty if all captures have it."""

    def __init__(self, *arguments: Any, engines: tuple[str, ...] = (), **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.engines = engines


class GroupedCommand(click.Command):
    """A command whose help lists engine options in separate sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[tuple[str, ...], list[tuple[str, str]]] = {(): []}
        for option in self.get_params(ctx):
            record = option.get_help_record(ctx) if isinstance(option, click.Option) else None
            if record is not None:
                groups.setdefault(getattr(option, "engines", ()), []).append(record)
        for engines, records in groups.items():
            with formatter.section(f"Only for --engine {' or '.join(engines)}" if engines else "Options"):
                formatter.write_dl(records)


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
        own["type"] = click.Choice(setting.choices)
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

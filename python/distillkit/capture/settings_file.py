"""Capture settings from a YAML file: one capture, or several under `captures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distillkit.capture.settings import CaptureSettings, check_names, read_yaml, setting_names
from distillkit.errors import ConfigError

__all__ = ["load_captures"]


def load_captures(path: str | Path, overrides: Mapping[str, Any] | None = None) -> list[CaptureSettings]:
    """Read the settings of one capture or several from a YAML file.

    Its keys are settings; under `captures` there may be a list of mappings with those in which the captures differ.

    Args:
        path: of the file.
        overrides: settings that go before the file's, in every capture.

    Returns:
        The captures in the file's order, with every setting checked.

    Raises:
        ConfigError: the file can not be read, or has an unknown key or a value that is not allowed: the message has its
            path; or two captures have one output.
    """
    content = read_yaml(Path(path), "captures")
    if not isinstance(content, Mapping):
        raise ConfigError(f"{path}: must hold settings of captures (key: value), found {type(content).__name__}")
    shared = {key: value for key, value in content.items() if key != "captures"}
    entries = content.get("captures", [{}])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError(f"{path}: captures must be a list of mappings, found {entries!r:.200}")
    check_names(shared, f"{path}: ", (*setting_names(), "captures"))
    captures = []
    for index, entry in enumerate(entries):
        place = f"captures[{index}]" if "captures" in content else ""
        check_names(entry, f"{path}: {place}.", setting_names())
        options = _merged(shared, entry, overrides or {})
        missing = [name for name in ("model", "dataset", "output") if options.get(name) is None]
        if missing:
            raise ConfigError(f"{path}: {place or 'it'} has no {' and no '.join(missing)}")
        try:
            captures.append(CaptureSettings.of(**options))
        except ConfigError as error:
            raise ConfigError(f"{path}: {place}{'.' if place else ''}{error}") from error
    _check_outputs(captures, path)
    return captures


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Put settings over others. One of preset and compression_config takes the other's place."""
    merged: dict[str, Any] = {}
    for layer in layers:
        if layer.keys() & _CODEC_SETTINGS:
            merged = {name: value for name, value in merged.items() if name not in _CODEC_SETTINGS}
        merged |= layer
    return merged


_CODEC_SETTINGS = {"preset", "compression_config"}


def _check_outputs(captures: Sequence[CaptureSettings], path: str | Path) -> None:
    outputs: dict[str, int] = {}
    for index, settings in enumerate(captures):
        output = str(settings.output).rstrip("/")
        if output in outputs:
            raise ConfigError(f"{path}: captures[{outputs[output]}] and captures[{index}] have one output, {output}")
        outputs[output] = index

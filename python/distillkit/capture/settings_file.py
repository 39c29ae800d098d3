"""Capture settings from a YAML file: one capture, or several under `captures`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillkit.capture.engine_settings import ENGINES, nest_settings
from distillkit.capture.settings import CaptureSettings
from distillkit.configuration.describe import json_schema
from distillkit.configuration.overrides import Overrides, with_overrides
from distillkit.configuration.problems import InvalidSettingsError, Problem, report
from distillkit.configuration.yaml_file import read_yaml
from distillkit.errors import ConfigError

__all__ = ["captures_schema", "load_captures"]


def load_captures(
    path: str | Path, overrides: Mapping[str, Any] | None = None, changes: Overrides | None = None
) -> list[CaptureSettings]:
    """Read the settings of one capture or several from a YAML file.

    Its keys are settings; `captures` may list mappings with the settings in which several captures differ.

    Args:
        path: the YAML file.
        overrides: settings that take precedence over the file's, in every capture.
        changes: values that replace those of the file, by dotted path: {"captures.0.samples": 100}.

    Returns:
        The captures in the file's order, with every setting checked.

    Raises:
        ConfigError: the file cannot be read or is invalid; reports all problems, each with its dotted path.
    """
    content = read_yaml(path)
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{path}: must be a mapping of settings, found {'nothing' if content is None else type(content).__name__}"
        )
    if changes:
        content = with_overrides(content, changes)
    shared = {key: value for key, value in content.items() if key != "captures"}
    entries = content.get("captures", [{}])
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise ConfigError(f"{path}: captures: must be a list of mappings, found {entries!r:.200}")
    captures: list[CaptureSettings] = []
    problems: list[Problem] = []
    for index, entry in enumerate(entries):
        prefix = f"captures.{index}." if "captures" in content else ""
        try:
            captures.append(_settings([("", shared), (prefix, entry), ("", overrides or {})], prefix))
        except InvalidSettingsError as error:
            problems += error.problems
    problems = problems or _shared_outputs(captures)
    if problems:
        raise ConfigError(report(str(path), problems))
    return captures


@dataclass
class _Layers:
    """Settings merged from several layers, and how each was written."""

    settings: dict[str, Any] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)

    def put(self, layer: Mapping[str, Any], written: Mapping[str, str]) -> None:
        """Merge nested settings over earlier ones. preset and compression_config replace each other."""
        if layer.keys() & _CODEC_SETTINGS:
            self.settings = {name: value for name, value in self.settings.items() if name not in _CODEC_SETTINGS}
        for name, value in layer.items():
            before = self.settings.get(name)
            merges = name in ENGINES and isinstance(before, dict) and isinstance(value, dict)
            self.settings[name] = {**before, **value} if merges else value  # type: ignore[dict-item]
        self.written |= written


_CODEC_SETTINGS = {"preset", "compression_config"}


def _settings(layers: Sequence[tuple[str, Mapping[Any, Any]]], prefix: str) -> CaptureSettings:
    """Make a capture's settings from (path prefix, settings) layers; later layers take precedence.

    Raises:
        InvalidSettingsError: with paths as they are written in the file.
    """
    engines = [layer["engine"] for _, layer in layers if "engine" in layer]
    merged = _Layers()
    for place, layer in layers:
        merged.put(*nest_settings(layer, engines[-1] if engines else "hf", place))
    try:
        return CaptureSettings(**merged.settings)
    except InvalidSettingsError as error:
        raise InvalidSettingsError(
            [Problem(merged.written.get(each.path, prefix + each.path), each.message) for each in error.problems]
        ) from None


def _shared_outputs(captures: Sequence[CaptureSettings]) -> list[Problem]:
    first: dict[str, int] = {}
    problems = []
    for index, settings in enumerate(captures):
        before = first.setdefault(settings.output.rstrip("/"), index)
        if before != index:
            problems.append(
                Problem(f"captures.{index}.output", f"is the same as captures.{before}.output: {settings.output}")
            )
    return problems


def captures_schema() -> dict[str, Any]:
    """Return the JSON schema of a capture file: settings, flat or nested, and `captures` with more of them."""
    schema = json_schema(CaptureSettings)
    properties, required = dict(schema.pop("properties")), schema.pop("required")
    for part in ENGINES.values():
        properties |= json_schema(part)["properties"]
    entry = {"type": "object", "additionalProperties": False, "properties": properties}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Captures of distillkit",
        "description": "Settings of one capture, or those shared by several under `captures`.",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **properties,
            "captures": {
                "description": "Several captures, run one after the other: the settings in which they differ.",
                "type": "array",
                "minItems": 1,
                "items": {"$ref": "#/$defs/Capture"},
            },
        },
        "anyOf": [{"required": ["captures"]}, {"required": required}],
        "$defs": {**schema["$defs"], "Capture": entry},
    }

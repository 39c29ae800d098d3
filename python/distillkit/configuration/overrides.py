"""Overrides of a configuration on the command line: `--set training_args.learning_rate=1e-4`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distillkit.configuration.problems import shown
from distillkit.configuration.yaml_file import parse_yaml
from distillkit.errors import ConfigError, nearest

__all__ = ["Overrides", "parse_overrides", "with_overrides"]

Overrides = Mapping[str, Any]
"""Values by the dotted path of their setting."""


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """Return the values of `--set KEY=VALUE` by their dotted paths; the last of several for one path.

    Raises:
        ConfigError: one of them is not KEY=VALUE, or its value is not YAML.

    Example:
        >>> parse_overrides(["training_args.max_steps=100", "frozen_res=[embed]", "peft="])
        {'training_args.max_steps': 100, 'frozen_res': ['embed'], 'peft': None}
    """
    found = {}
    for text in texts:
        path, equals, value = text.partition("=")
        path = path.strip()
        if not equals or not all(path.split(".")):
            raise ConfigError(
                f"--set {shown(text)}: must be KEY=VALUE, such as training_args.max_steps=100 or "
                "loss_functions.1.weight=0.5"
            )
        found[path] = parse_yaml(value.encode(), f"--set {path}")
    return found


def with_overrides(content: Any, overrides: Overrides) -> Any:
    """Return a configuration's content with some values replaced or added.

    Sections on the way to a value are made where they are missing; entries of a list are given by index, and the next
    index appends one. Names are not checked: whoever checks the content finds unknown ones.

    Args:
        content: what a YAML file holds; it is not changed.
        overrides: values by dotted path.

    Raises:
        ConfigError: a path leads into a value that is no section and no list, or to an index that a list does not have.

    Example:
        >>> with_overrides({"losses": [{"weight": 1}]}, {"losses.0.weight": 0.5, "args.seed": 1})
        {'losses': [{'weight': 0.5}], 'args': {'seed': 1}}
    """
    for path, value in overrides.items():
        content = _replaced(content, path.split("."), value, ())
    return content


def _replaced(content: Any, keys: Sequence[str], value: Any, before: tuple[str, ...]) -> Any:
    """Return content with one value replaced, copying what is on the way: aliases in YAML share their sections."""
    if not keys:
        return value
    key, here = keys[0], (*before, keys[0])
    if content is None and not key.isdecimal():
        content = {}
    if isinstance(content, Mapping):
        return {**content, key: _replaced(content.get(key), keys[1:], value, here)}
    if isinstance(content, list) and key.isdecimal() and int(key) <= len(content):
        index = int(key)
        entry = _replaced(content[index] if index < len(content) else None, keys[1:], value, here)
        return [*content[:index], entry, *content[index + 1 :]]
    place = ".".join(before)
    if isinstance(content, list):
        raise ConfigError(
            f"--set {'.'.join(here)}: {place} is a list of {len(content)}, whose entries are numbered from 0"
            f"{_named_entry(content, key)}"
        )
    found = "not set" if content is None else shown(content)
    whole = f"; set all of it: --set '{place}=[…]'" if content is None else ""
    raise ConfigError(f"--set {'.'.join(here)}: {place} is {found}, and has no entry {key!r}{whole}")


def _named_entry(entries: list[Any], name: str) -> str:
    """Return a hint to append: the index of the entry that has this name, such as that of a loss."""
    values = [str(next(iter(entry.values()), "")) if isinstance(entry, Mapping) else str(entry) for entry in entries]
    hint = nearest(name, values)
    return next(
        (f"; did you mean {index} ({value})?" for index, value in enumerate(values) if f"'{value}'" in hint), ""
    )

"""Reads YAML that others may have written: within limits, and without duplicate keys, of which PyYAML would silently
keep the last."""

from __future__ import annotations

import os
from collections.abc import Hashable
from typing import Any, NoReturn

import yaml

from distillkit.configuration.urls import is_url, locate
from distillkit.errors import ConfigError, InputError

__all__ = ["parse_yaml", "read_yaml"]

_MOST_BYTES = 1 << 18
"""PyYAML takes some ten microseconds for each."""
_MOST_EXPANDED = 4 << 20
"""Characters and nodes of the content with every alias replaced by what it stands for: aliases of aliases multiply."""
_DEEPEST, _MOST_BITS, _MOST_DIGITS = 64, 128, 256
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_MOST_OF_MESSAGE = 600


def read_yaml(path: str | os.PathLike[str]) -> Any:
    """Return the contents of a YAML file.

    Args:
        path: a path, or an fsspec URL.

    Raises:
        ConfigError: there is no such file, it cannot be read, or its content is refused as by `parse_yaml`.
    """
    name = str(os.fspath(path))
    try:
        filesystem, inner = locate(name)
        # fsspec would seek in it, which a pipe does not allow.
        with filesystem.open(inner, "rb") if is_url(name) else open(inner, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except InputError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror or error}") from error
    return parse_yaml(content, name)


def parse_yaml(content: bytes, where: str) -> Any:
    """Return the contents of a YAML document.

    Args:
        content: the document.
        where: where it came from, for messages.

    Raises:
        ConfigError: it is not UTF-8 or not valid YAML, has a duplicate key or a value that cannot be represented, or is
            too large, with or without its aliases expanded.
    """
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{where}: more than {_MOST_BYTES:,} bytes: not a configuration")
    try:
        return yaml.load(content.decode("utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: not UTF-8 text: {error}") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # PyYAML itself raises the last two for escapes beyond Unicode.
        raise ConfigError(f"{where}: not valid YAML: {error!s:.{_MOST_OF_MESSAGE}}") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader with limits. It is itself linear in the content, which its result need not be for who walks it."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self._depth >= _DEEPEST:
            self._refuse(f"nested more than {_DEEPEST} levels deep", parent.start_mark)
        alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and not alias:
            self._sizes[id(node)] = self._expanded(node)
        elif id(node) not in self._sizes:
            self._refuse("an alias is inside what it stands for", parent.start_mark)
        return node

    def _expanded(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1 + len(node.value)
        inner = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        size = 1 + sum(self._sizes[id(part)] for part in inner)
        if size > _MOST_EXPANDED:
            self._refuse(f"more than {_MOST_EXPANDED:,} characters with its aliases expanded", node.start_mark)
        return size

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            if node.tag in _NUMBERS and len(node.value) > _MOST_DIGITS:
                # Base 60 (1:59:59…) takes quadratic time.
                raise OverflowError(f"{len(node.value):,} characters, of at most {_MOST_DIGITS}")
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > _MOST_BITS:
                raise OverflowError(f"more than {_MOST_BITS} bits")
            if isinstance(value, str):
                value.encode()  # not possible with half a surrogate pair
                if "\0" in value:
                    raise ValueError("contains a NUL character")
            return value
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
            # PyYAML converts scalars without a check: dates, and integers of thousands of digits.
            kind = node.tag.rpartition(":")[-1]
            self._refuse(f"cannot be read as {kind}: {node.value!a:.40}: {error!s:.80}", node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            self._refuse("expected a mapping", node.start_mark)
        seen: dict[object, yaml.Mark] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue
            if key in seen:
                self._refuse(
                    f"the key {key!r:.100} is given twice, first on line {seen[key].line + 1}", key_node.start_mark
                )
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep=deep)

    @staticmethod
    def _refuse(why: str, mark: yaml.Mark) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, why, mark)

"""Reports all problems of a configuration at once, each with its dotted path."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from distillkit.errors import ConfigError, nearest

__all__ = ["InvalidSettingsError", "Problem", "find_problems", "refusals", "report"]


@dataclass(frozen=True)
class Problem:
    """One problem: the dotted path of the setting, and what is wrong with it."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class InvalidSettingsError(ConfigError):
    """A configuration is invalid; the message lists all problems."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__(problems)
        self.problems = list(problems)

    def __str__(self) -> str:
        return report("settings", self.problems) if len(self.problems) > 1 else str(self.problems[0])


def report(source: str, problems: Iterable[Problem | str]) -> str:
    """Format problems for display: a single one on the line of its source, several as a list below it."""
    lines = list(dict.fromkeys(map(str, problems)))
    if len(lines) == 1:
        return f"{source}: {lines[0]}"
    return "\n".join([f"{source}: {len(lines)} problems", *(f"  {line}" for line in lines)])


def refusals(model: BaseModel, messages: Mapping[str, str]) -> ValidationError:
    """Make a ValidationError for a validator that rejects several fields of a model.

    Args:
        model: the model.
        messages: what is wrong, by field name.
    """
    return ValidationError.from_exception_data(
        type(model).__name__,
        [
            InitErrorDetails(type=PydanticCustomError("refused", "{why}", {"why": why}), loc=(name,), input=None)
            for name, why in messages.items()
        ],
    )


def find_problems(
    error: ValidationError, model: type[BaseModel], unknown: str = "key", known: Iterable[str] = ()
) -> list[Problem]:
    """Convert pydantic's errors to problems.

    Args:
        error: pydantic's error.
        model: the model of the entire configuration.
        unknown: the word for a setting in messages about unknown ones.
        known: names accepted at the top level in addition to the model's fields.
    """
    return [_problem(item, model, unknown, known) for item in error.errors()]


def _problem(item: ErrorDetails, model: type[BaseModel], unknown: str, known: Iterable[str]) -> Problem:
    section, location = _follow(model, item["loc"])
    path, kind, found = ".".join(map(str, location)), item["type"], item["input"]
    context = item.get("ctx", {})
    if kind == "extra_forbidden":
        names = [*section.model_fields, *(known if section is model else ())] if section else []
        return Problem(path, f"unknown {unknown}{nearest(location[-1], names)}")
    if kind == "missing":
        return Problem(path, "is required and missing")
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        # The discriminator field, which selects one of several sections.
        tag = context["discriminator"].strip("'")
        sections = _models_in(section.model_fields[str(location[-1])].annotation) if section else ()
        allowed = " or ".join(repr(value) for each in sections for value in get_args(each.model_fields[tag].annotation))
        message = _must_be(allowed, found[tag]) if tag in found else f"is required and missing: {allowed}"
        return Problem(f"{path}.{tag}", message)
    if kind == "value_error":
        # Our own messages start with the key below this path, if they concern one.
        cause = str(context["error"])
        key, separator, message = cause.partition(": ")
        within = bool(separator) and re.fullmatch(r"[\w.]+", key)
        return Problem(f"{path}.{key}", message) if within else Problem(path, cause)
    if kind == "refused":
        return Problem(path, item["msg"])
    if kind in _MUST_BE:
        return Problem(path, _must_be(_MUST_BE[kind].format(**context), found))
    return Problem(path, f"{item['msg']} (found {found!r})")


# -- where a problem is ------------------------------------------------------------------------------------------------


def _follow(
    model: type[BaseModel], location: tuple[str | int, ...]
) -> tuple[type[BaseModel] | None, tuple[str | int, ...]]:
    """Return the model to which a location's last key belongs, and the location without the union tags that pydantic
    inserts."""
    models, path = [model], list[str | int]()
    for place, part in enumerate(location):
        tagged = [candidate for candidate in models if part in _tags(candidate)]
        if len(models) > 1 and tagged:
            models = tagged
            continue
        path.append(part)
        if isinstance(part, str) and place < len(location) - 1:
            models = list(_models_in(models[0].model_fields[part].annotation)) if _has(models, part) else []
    return (models[0] if models else None), tuple(path)


def _has(models: Sequence[type[BaseModel]], name: str) -> bool:
    return bool(models) and name in models[0].model_fields


def _tags(model: type[BaseModel]) -> set[Any]:
    """Return the values of a model's literal fields, one of which distinguishes it from other members of a union."""
    return {value for field in model.model_fields.values() for value in get_args(field.annotation)}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


# -- what is wrong -----------------------------------------------------------------------------------------------------

_MUST_BE = {
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "greater than {gt:g}",
    "less_than_equal": "at most {le:g}",
    "less_than": "less than {lt:g}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "too_short": "a list of length {min_length} or more",
    "string_too_short": "text of length {min_length} or more",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    "string_type": "text",
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "a mapping"),
}


def _must_be(what: str, found: object) -> str:
    """Compose a message: what a value must be, what was found, and the closest of the choices, if any."""
    choices = re.findall(r"'(\w+)'", what)
    return f"must be {what}, found {found!r}{nearest(found, choices)}"

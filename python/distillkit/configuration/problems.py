"""Reports all problems of a configuration at once, each with its dotted path."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from distillkit.configuration.secrets import redacted
from distillkit.errors import ConfigError, nearest, printable

__all__ = ["InvalidSettingsError", "Problem", "cut", "find_problems", "refusals", "report", "shown", "value_problem"]


_MOST_SHOWN = 50


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
    rest = [f"… and {len(lines) - _MOST_SHOWN:,} more"] if len(lines) > _MOST_SHOWN else []
    return "\n".join([f"{source}: {len(lines):,} problems", *(f"  {line}" for line in lines[:_MOST_SHOWN] + rest)])


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
    return [
        problem
        for alternatives in _by_place(error, model)
        for problem in _problems(alternatives, model, unknown, known)
    ]


def value_problem(error: ValidationError) -> str:
    """Describe on one line what is wrong with a single value that is not part of a model."""
    found = [str(problem) for alternatives in _by_place(error, None) for problem in _problems(alternatives, None)]
    return "; ".join(dict.fromkeys(found))


def shown(value: object) -> str:
    """Return a value for a message: cut to a readable length however large it is, and without secrets."""
    return cut(_SHORT.repr(value))


def cut(text: str, longest: int = 120) -> str:
    """Return a text for a message: its beginning, without secrets and what no terminal can show."""
    text = printable(redacted(text[: 10 * longest]))
    return text if len(text) <= longest else f"{text[:longest]} …"


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100
        self.maxlevel = 3

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write integers of more than some thousand digits.
        return repr(value) if value.bit_length() < 300 else f"an integer of {value.bit_length():,} bits"


_SHORT = _Short()
_LONGEST_REASON = 600


@dataclass(frozen=True)
class _Item:
    """One of pydantic's errors: the models to which its last key may belong, the keys, and the part of a union, if
    any."""

    error: ErrorDetails
    sections: Sequence[type[BaseModel]]
    path: tuple[str | int, ...]
    union: tuple[str | int, ...] | None


def _by_place(error: ValidationError, model: type[BaseModel] | None) -> list[list[_Item]]:
    """Return the errors in order, those of a union's members together: pydantic reports each of them."""
    groups: dict[Any, list[_Item]] = {}
    for number, found in enumerate(error.errors()):
        sections, path, union = _follow(model, found["loc"])
        groups.setdefault(number if union is None else union, []).append(_Item(found, sections, path, union))
    return list(groups.values())


def _problems(
    items: list[_Item], model: type[BaseModel] | None, unknown: str = "key", known: Iterable[str] = ()
) -> list[Problem]:
    """Describe one of pydantic's errors, or those of a union's members as one problem."""
    within = [item for item in items if item.union is not None and len(item.path) > len(item.union)]
    if len(items) == 1 or within:
        # A member that was entered is the one that was meant.
        return [_problem(item, model, unknown, known) for item in within or items]
    first = items[0]
    wanted = dict.fromkeys(_wanted(item.error) or "" for item in items)
    if all(wanted):
        return [Problem(_dotted(first.path), _must_be(" or ".join(wanted), first.error["input"]))]
    # Our own messages, and limits of a member whose type is right, say more than the types of the others.
    own = [item for item in items if item.error["type"] not in _WRONG_TYPE]
    return [_problem(item, model, unknown, known) for item in own or items]


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(cut(str(part)) for part in path)


def _problem(item: _Item, model: type[BaseModel] | None, unknown: str, known: Iterable[str]) -> Problem:
    section, location = next(iter(item.sections), None), item.path
    path, kind, found = _dotted(location), item.error["type"], item.error["input"]
    context = item.error.get("ctx", {})
    if kind == "extra_forbidden":
        names = [*section.model_fields, *(known if section is model else ())] if section else []
        return Problem(path, f"unknown {unknown}{nearest(location[-1], names)}")
    if kind == "missing":
        return Problem(path, "is required and missing")
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        # The discriminator field, which selects one of several sections.
        tag = context["discriminator"].strip("'")
        field = section.model_fields.get(str(location[-1])) if section else None
        # The number of an entry of a list is no field: there, they are the list's.
        sections = item.sections if field is None else list(_models_in(field.annotation))
        allowed = " or ".join(repr(value) for each in sections for value in get_args(each.model_fields[tag].annotation))
        message = _must_be(allowed, found[tag]) if tag in found else f"is required and missing: {allowed}"
        return Problem(f"{path}.{tag}", message)
    if kind == "value_error":
        # Our own messages start with the key below this path, if they concern one.
        cause = cut(str(context["error"]), _LONGEST_REASON)
        key, separator, message = cause.partition(": ")
        within = bool(separator) and re.fullmatch(r"[\w.]+", key)
        if within:
            return Problem(f"{path}.{key}" if path else key, message)
        return Problem(path, f"{cause}, found {shown(found)}" if _without_value(cause) else cause)
    if kind == "refused":
        return Problem(path, item.error["msg"])
    wanted = _wanted(item.error)
    return Problem(path, f"cannot be {shown(found)}" if wanted is None else _must_be(wanted, found))


# -- where a problem is ------------------------------------------------------------------------------------------------


# How pydantic names the members of a union within a location: str, list[int], function-after[…], constrained-int.
_MEMBER = re.compile(
    r"int|str|float|bool|list|dict|none|any|constrained-\w+|(?:lax-or-strict|json-or-python|[\w-]+)\[.*\]"
)


def _follow(
    model: type[BaseModel] | None, location: tuple[str | int, ...]
) -> tuple[list[type[BaseModel]], tuple[str | int, ...], tuple[str | int, ...] | None]:
    """Return the models to which a location's last key may belong, the location without what pydantic inserts for the
    members of unions, and its part up to the first union of plain values, if there is one."""
    models, path = ([] if model is None else [model]), list[str | int]()
    union: tuple[str | int, ...] | None = None
    for place, part in enumerate(location):
        tagged = [candidate for candidate in models if part in _tags(candidate)]
        if len(models) > 1 and tagged:
            models = tagged
            continue
        if isinstance(part, str) and not _has(models, part) and _MEMBER.fullmatch(part):
            union = tuple(path) if union is None else union
            continue
        path.append(part)
        if isinstance(part, str) and place < len(location) - 1:
            models = list(_models_in(models[0].model_fields[part].annotation)) if _has(models, part) else []
    return models, tuple(path), union


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
    "greater_than_equal": "at least {ge}",
    "greater_than": "greater than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "too_short": "a list of length {min_length} or more",
    "too_long": "a list of length {max_length} or less",
    "string_too_short": "text of length {min_length} or more",
    "string_too_long": "text of length {max_length} or less",
    "string_pattern_mismatch": "text of the form {pattern}",
    "none_required": "null",
}
_WRONG_TYPE = {
    **dict.fromkeys(("int_type", "int_parsing", "int_parsing_size", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("string_type", "string_sub_type", "string_unicode"), "text"),
    **dict.fromkeys(("list_type", "tuple_type", "set_type", "iterable_type"), "a list"),
    **dict.fromkeys(
        ("dict_type", "mapping_type", "model_type", "model_attributes_type", "dataclass_type"), "a mapping"
    ),
    **dict.fromkeys(("path_type",), "a path"),
    **dict.fromkeys(("invalid_key",), "a mapping whose keys are text"),
}


def _wanted(error: ErrorDetails) -> str | None:
    """Return what a value must be according to one of pydantic's errors, or None if that is not known."""
    form = {**_MUST_BE, **_WRONG_TYPE}.get(error["type"])
    return (
        None if form is None else form.format(**{name: _plain(value) for name, value in error.get("ctx", {}).items()})
    )


def _plain(value: Any) -> Any:
    """Return a limit as it is written: 1 rather than 1.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _without_value(message: str) -> bool:
    return message.startswith("must be") and "found" not in message


def _must_be(what: str, found: object) -> str:
    """Compose a message: what a value must be, what was found, and the closest of the choices, if any."""
    choices = re.findall(r"'([^']+)'", what)
    return f"must be {what}, found {shown(found)}{nearest(cut(found), choices) if isinstance(found, str) else ''}"

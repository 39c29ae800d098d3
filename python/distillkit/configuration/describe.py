"""Descriptions of settings from a model's JSON schema, for help texts, tables and editor completion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

__all__ = ["Setting", "json_schema", "section_tables", "settings_of"]

Schema = Mapping[str, Any]


class _Untitled(GenerateJsonSchema):
    """Omits titles, which would only repeat the names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return a model's JSON schema."""
    return model.model_json_schema(schema_generator=_Untitled)


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: its key.
        schema: JSON schema of its value, without `null`.
        default: its default value; None also if the default depends on something else.
        required: whether it is required.
        description: what it does.
    """

    name: str
    schema: Schema
    default: Any
    required: bool
    description: str

    @property
    def type(self) -> str:
        """The JSON schema type; empty if there are several."""
        return str(self.schema.get("type", ""))

    @property
    def choices(self) -> tuple[Any, ...]:
        """The allowed values; empty if any value of the type is allowed."""
        return (self.schema["const"],) if "const" in self.schema else tuple(self.schema.get("enum", ()))


def settings_of(schema: Schema) -> list[Setting]:
    """Return the settings of a model's JSON schema, in order. A section counts as a setting."""
    required = schema.get("required", ())
    return [
        Setting(name, _without_null(field), field.get("default"), name in required, field.get("description", ""))
        for name, field in schema["properties"].items()
    ]


def _without_null(field: Schema) -> Schema:
    choices = [choice for choice in field.get("anyOf", ()) if choice.get("type") != "null"]
    if not choices:
        return field
    return choices[0] if len(choices) == 1 else {"anyOf": choices}


# -- tables ------------------------------------------------------------------------------------------------------------


def section_tables(schema: Schema) -> Iterator[str]:
    """Yield a Markdown table for each section of a model's JSON schema, the outermost first."""
    sections: dict[str, list[str]] = {}
    _find_sections(schema, schema, "", sections)
    yield _table(schema)
    for name, paths in sections.items():
        section = schema["$defs"][name]
        heading = " · ".join(f"`{path}`" for path in dict.fromkeys(paths))
        yield f"### {heading}{_tag(section)}\n\n{section['description']}\n\n{_table(section)}"


def _table(section: Schema) -> str:
    rows = ["| setting | value | default | meaning |", "|---|---|---|---|"]
    for setting in settings_of(section):
        default = "**required**" if setting.required else _default(setting.default)
        rows.append(f"| `{setting.name}` | {_value(setting.schema)} | {default} | {setting.description} |")
    return "\n".join(rows)


def _tag(section: Schema) -> str:
    """Return the setting whose constant value distinguishes this section from its alternatives, if there is one."""
    tags = [f", `{name}: {field['const']}`" for name, field in section["properties"].items() if "const" in field]
    return "".join(tags)


def _find_sections(schema: Schema, section: Schema, path: str, found: dict[str, list[str]]) -> None:
    """Collect the paths at which each section occurs, in order, by the section's name."""
    for name, field in section["properties"].items():
        for inner in _sections_in(field):
            found.setdefault(inner, []).append(f"{path}{name}")
            _find_sections(schema, schema["$defs"][inner], f"{path}{name}.", found)


def _sections_in(field: Schema) -> list[str]:
    """Return the names of the sections that a field may contain."""
    if "$ref" in field:
        return [field["$ref"].removeprefix("#/$defs/")]
    inner = [*field.get("anyOf", ()), *field.get("oneOf", ()), *([field["items"]] if "items" in field else ())]
    return [name for part in inner for name in _sections_in(part)]


def _default(value: Any) -> str:
    if value in (None, [], {}, ""):
        return ""
    if isinstance(value, list):
        return ", ".join(f"`{part}`" for part in value)
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


_TYPES = {
    "boolean": "true or false",
    "integer": "integer",
    "number": "number",
    "string": "text",
    "array": "list",
    "object": "mapping",
}


def _value(schema: Schema) -> str:
    """Describe the allowed values briefly."""
    if "anyOf" in schema or "oneOf" in schema:
        return " or ".join(dict.fromkeys(map(_value, schema.get("anyOf", schema.get("oneOf")))))
    if "$ref" in schema:
        return "section"
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    kind = schema.get("type", "")
    if kind == "array" and _sections_in(schema):
        return "list of sections"
    if isinstance(kind, list):
        return " or ".join(_TYPES[part] for part in kind if part != "null")
    return _TYPES.get(kind, "any") + _bounds(schema)


def _bounds(schema: Schema) -> str:
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {schema[name]:g}" for name, sign in bounds.items() if name in schema]
    return f" {', '.join(found)}" if found else ""

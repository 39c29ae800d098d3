"""Which columns rows of text, chat and token ids may have, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import InputError

__all__ = [
    "CHATS",
    "COMPLETION",
    "PROMPTS",
    "chat_messages",
    "find_layout",
    "given_ids",
    "given_mask",
    "read_messages",
    "read_text",
    "read_tools",
]

# Column sets that rows are read by: conversations, and prompts with their responses.
CHATS = (
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("inputs", "targets"),
    ("tools", "turns"),
)

COMPLETION = ("prompt", "completion")
PROMPTS = (("prompt", "response"), COMPLETION)

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    **{role: role for role in ("system", "user", "assistant", "tool", "developer")},
}


def has_value(found: Any, value: str) -> bool:
    """Whether a column's value equals `value`: text is compared as is, anything else as JSON."""
    return found == value if isinstance(found, str) else json.dumps(found, default=str) == value


def given_ids(row: Mapping[str, Any], where: str, id_limit: int) -> list[npt.NDArray[np.int32]]:
    """Return a tokenised row's sequences.

    The attention_mask, if there is one, marks padding (0), which is dropped, and numbers packed documents
    (1, 1, 2, 2, …), which are separated.

    Args:
        row: has `input_ids`, and optionally `attention_mask`.
        where: location of the row, for messages.
        id_limit: ids must be below this.

    Raises:
        InputError: the ids are invalid, or the mask does not match them.
    """
    ids = np.asarray(row["input_ids"])
    if ids.size == 0:
        return []
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InputError(f"{where}: input_ids must be a list of integers, found {ids.dtype} of shape {ids.shape}")
    if ids.min() < 0 or ids.max() >= id_limit:
        wrong = int(ids[(ids < 0) | (ids >= id_limit)][0])
        raise InputError(f"{where}: input_ids has {wrong}; the model knows ids 0…{id_limit - 1}")
    ids = ids.astype(np.int32)
    if row.get("attention_mask") is None:
        return [ids]
    mask = np.asarray(row["attention_mask"])
    if mask.shape != ids.shape:
        raise InputError(f"{where}: attention_mask has shape {mask.shape}, input_ids {ids.shape}")
    borders = np.flatnonzero(np.diff(mask)) + 1
    return [part for part, number in zip(np.split(ids, borders), mask[np.r_[0, borders]], strict=True) if number != 0]


def given_mask(row: Mapping[str, Any], where: str, columns: Sequence[str]) -> npt.NDArray[np.bool_] | None:
    """Return which tokens of a tokenised row count, (L,) bool, according to its columns; None if it has none of them.

    Args:
        row: has `input_ids`; `labels` (−100: does not count) take precedence over masks.
        where: location of the row, for messages.
        columns: mask columns of 0 and 1; a token counts if all of them are non-zero.

    Raises:
        InputError: labels or a mask do not match the ids.
    """
    ids = np.asarray(row["input_ids"])

    def values(name: str) -> npt.NDArray[Any]:
        found = np.asarray(row[name])
        if found.shape != ids.shape:
            raise InputError(f"{where}: {name} has shape {found.shape}, input_ids {ids.shape}")
        return found

    if row.get("labels") is not None:
        labels = values("labels")
        counted = labels != -100
        if (labels[counted] != ids[counted]).any():
            raise InputError(
                f"{where}: labels differ from input_ids; here they say which tokens count (the others −100)"
            )
        return np.asarray(counted)
    there = [name for name in columns if row.get(name) is not None]
    return np.all([values(name) != 0 for name in there], axis=0) if there else None


def find_layout(
    row: Mapping[str, Any],
    where: str,
    layouts: Sequence[tuple[str, ...]],
    text_column: str,
) -> tuple[str, ...] | None:
    """Return the columns to read a row by: the first of `layouts` whose columns all have values.

    None if the row matches layouts, but each of them has a column without a value.

    Args:
        row: all columns of the row.
        where: location of the row, for messages.
        layouts: see `ReadingPolicy`.
        text_column: name of the column with plain text.

    Raises:
        InputError: no layout has all its columns in the row.
    """
    known = [columns for columns in layouts if all(column in row for column in columns)]
    if not known:
        first, last = (text_column,), ("input_ids",)
        between = [columns for columns in layouts if columns not in (first, last)]
        understood = "; ".join(" + ".join(columns) for columns in (first, *between, last))
        raise InputError(
            f"{where}: found the columns {', '.join(map(str, row)) or '(none)'}; understood are {understood}"
        )
    return next((columns for columns in known if all(row[column] is not None for column in columns)), None)


def chat_messages(
    row: Mapping[str, Any], columns: tuple[str, ...], where: str
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Return a chat row's messages (role, content, …) and its tool definitions.

    Raises:
        InputError: a message or the tool definitions are malformed.
    """
    if len(columns) == 1 or columns == ("tools", "turns"):
        tools = row.get("tools")
        given = read_tools(tools, where) if tools or len(columns) > 1 else None
        return read_messages(row[columns[-1]], where, columns[-1]), given
    question, answer = (read_text(row[column], where, column) for column in columns)
    if columns == ("instruction", "output") and row.get("input"):
        question = f"{question}\n\n{read_text(row['input'], where, 'input')}"
    if not question.strip() and not answer.strip():
        return [], None
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], None


def read_messages(turns: Any, where: str, column: str) -> list[dict[str, Any]]:
    """Return the messages (role, content, …) of a column.

    Raises:
        InputError: the value is not a list of messages.
    """
    turns = _list(turns, where, column)
    return [_message(turn, f"{where}: {column}[{index}]") for index, turn in enumerate(turns)]


def _message(turn: Any, where: str) -> dict[str, Any]:
    """Return one message as {role, content, …}, translating {from, value}; keys without a value are dropped."""
    if not isinstance(turn, Mapping) or not ({"role"} <= turn.keys() or {"from", "value"} <= turn.keys()):
        raise InputError(f"{where} must have role and content, or from and value; found {turn!r:.200}")
    message = {key: value for key, value in turn.items() if value is not None}
    if "role" not in message:
        message = {"role": message.pop("from", None), "content": message.pop("value", ""), **message}
    if message["role"] not in _ROLES:
        raise InputError(f"{where}: the role {message['role']!r} is not known; known are {', '.join(_ROLES)}")
    message["role"] = _ROLES[message["role"]]
    message.setdefault("content", "")
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call, where) for call in message["tool_calls"]]
    return message


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call in the form that chat templates expect, with its arguments parsed."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise InputError(f"{where}: a tool call needs a name; found {call!r:.200}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}: the arguments of {function['name']}")
    return {
        "type": "function",
        "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
    }


def read_tools(tools: Any, where: str) -> list[Any]:
    """Return tool definitions, parsing those given as JSON text.

    Raises:
        InputError: `tools` is not a list, or not valid JSON.
    """
    if isinstance(tools, str):
        tools = _json(tools, f"{where}: tools")
    return [_json(tool, f"{where}: tools") if isinstance(tool, str) else tool for tool in _list(tools, where, "tools")]


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise InputError(f"{what} is not JSON: {error}") from error


def read_text(value: Any, where: str, column: str) -> str:
    """Return a column's text.

    Raises:
        InputError: the value is not text.
    """
    if not isinstance(value, str):
        raise InputError(f"{where}: {column} must be text, found {type(value).__name__}")
    return value


def _list(value: Any, where: str, column: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: {column} must be a list, found {type(value).__name__}")
    return list(value)

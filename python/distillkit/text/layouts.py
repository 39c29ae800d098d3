"""Which columns rows of text, chat and token ids may have, and how they are read."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import InputError

__all__ = [
    "CHATS",
    "COMPLETION",
    "PROMPTS",
    "before_messages",
    "chat_messages",
    "check_json",
    "find_layouts",
    "given_ids",
    "given_mask",
    "message_weights",
    "read_messages",
    "read_text",
    "read_tools",
    "template_options",
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
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "tool_response": "tool",
    "tool_result": "tool",
    "ipython": "tool",
    "bot": "assistant",
    "chatgpt": "assistant",
    **{role: role for role in ("system", "user", "assistant", "tool", "developer")},
}
# Roles whose content is a tool call as JSON text: {"name": …, "arguments": …}, or a list of them.
_CALLS = ("function_call", "tool_call")
# Keys that say whether an assistant's message counts in the loss.
_WEIGHTS = ("weight", "train", "training", "loss")
# What a message may have beside its content, or instead.
_BESIDE = {"role", "from", "name", "id", "tool_calls", "tool_call_id", "function_call", *_WEIGHTS}
_BESIDE |= {"reasoning_content", "reasoning", "thinking"}
_TEXT_PARTS = ("text", "input_text", "output_text")


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
    ids = _numbers(row, "input_ids", where)
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
    mask = _numbers(row, "attention_mask", where)
    if mask.shape != ids.shape:
        raise InputError(f"{where}: attention_mask has shape {mask.shape}, input_ids {ids.shape}")
    if not (mask == np.floor(mask)).all() or mask.min() < 0:
        raise InputError(f"{where}: attention_mask must be 0 for padding, and 1, 2, … for documents; found {mask}")
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
    ids = _numbers(row, "input_ids", where)

    def values(name: str) -> npt.NDArray[Any]:
        found = _numbers(row, name, where)
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
    masks = [values(name) for name in there]
    for name, mask in zip(there, masks, strict=True):
        if not np.isin(mask, (0, 1)).all():
            raise InputError(f"{where}: {name} must be 0 and 1, found {mask[~np.isin(mask, (0, 1))][0]}")
    return np.all([mask != 0 for mask in masks], axis=0) if there else None


def _numbers(row: Mapping[str, Any], name: str, where: str) -> npt.NDArray[Any]:
    """Return a column of numbers."""
    try:
        found = np.asarray(row[name])
    except ValueError as error:
        raise InputError(f"{where}: {name} must be a list of numbers: {error}") from error
    if found.size and found.dtype.kind not in "biuf":
        raise InputError(f"{where}: {name} must be a list of numbers, found {row[name]!r:.200}")
    return found


def find_layouts(row: Mapping[str, Any], where: str, layouts: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Return the column sets that a row can be read by: those of `layouts` whose columns all have values.

    Those whose columns have content come first: an empty list of messages is no reason to pass over text.

    Args:
        row: all columns of the row.
        where: location of the row, for messages.
        layouts: see `ReadingPolicy`.

    Raises:
        InputError: no layout has all its columns in the row.
    """
    known = [columns for columns in layouts if all(column in row for column in columns)]
    if not known:
        raise InputError(
            f"{where}: found the columns {', '.join(map(str, row)) or '(none)'}; understood are "
            f"{'; '.join(' + '.join(columns) for columns in layouts)}"
        )
    given = [columns for columns in known if all(row[column] is not None for column in columns)]
    return sorted(given, key=lambda columns: not all(_is_filled(row[column]) for column in columns))


def _is_filled(value: Any) -> bool:
    return not hasattr(value, "__len__") or len(value) > 0


def chat_messages(
    row: Mapping[str, Any], columns: tuple[str, ...], where: str
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Return a chat row's messages (role, content, …) and its tool definitions.

    The columns `system` and `history` (pairs of question and answer) come before the messages.

    Raises:
        InputError: a message or the tool definitions are malformed.
    """
    if len(columns) == 1 or columns == ("tools", "turns"):
        tools = read_tools(row.get("tools"), where)
        return before_messages(row, where, read_messages(row[columns[-1]], where, columns[-1])), tools
    question, answer = (read_text(row[column], where, column) for column in columns)
    if columns == ("instruction", "output") and row.get("input"):
        more = read_text(row["input"], where, "input")
        question = f"{question}\n\n{more}" if question else more
    tools = read_tools(row.get("tools"), where)
    if not question.strip() and not answer.strip():
        return [], None
    return before_messages(row, where, [_said("user", question), _said("assistant", answer)]), tools


def before_messages(row: Mapping[str, Any], where: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages after those of the row's columns `system` and `history`.

    Raises:
        InputError: the columns are malformed, or the messages begin with another system prompt.
    """
    if not messages:
        return messages
    before = []
    for index, turn in enumerate(_list(row.get("history") or [], where, "history")):
        if isinstance(turn, Mapping):
            before.append(_message(turn, f"{where}: history[{index}]"))
            continue
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise InputError(f"{where}: history[{index}] must be a question and its answer, found {turn!r:.200}")
        texts = [read_text(text, where, f"history[{index}]") for text in turn]
        before += [_said("user", texts[0]), _said("assistant", texts[1])]
    system = read_text(row.get("system") or "", where, "system")
    if not system.strip():
        return before + messages
    if messages[0]["role"] != "system":
        return [_said("system", system), *before, *messages]
    if text_of(messages[0]).strip() != system.strip():
        raise InputError(f"{where}: the column system and the first message are different system prompts: keep one")
    return [messages[0], *before, *messages[1:]]


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message."""
    content = message["content"] or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def read_messages(turns: Any, where: str, column: str) -> list[dict[str, Any]]:
    """Return the messages (role, content, …) of a column. Messages that only call tools are joined.

    Raises:
        InputError: the value is not a list of messages.
    """
    turns = _list(turns, where, column)
    messages: list[dict[str, Any]] = []
    only_calls = False
    for index, turn in enumerate(turns):
        message = _message(turn, f"{where}: {column}[{index}]")
        before, only_calls = only_calls, turn.get("role", turn.get("from")) in _CALLS
        if before and only_calls:
            messages[-1]["tool_calls"] += message["tool_calls"]
        else:
            messages.append(message)
    return messages


def _message(turn: Any, where: str) -> dict[str, Any]:
    """Return one message as {role, content, …}, translating {from, value}; keys without a value are dropped.

    A message without content has the content None.
    """
    message = {key: value for key, value in turn.items() if value is not None} if isinstance(turn, Mapping) else {}
    for key, other in (("role", "from"), ("content", "value")):
        if key not in message and other in message:
            message = {key: message.pop(other), **message}
    # Without content, text under another name would be lost.
    if "role" not in message or not ("content" in message or message.keys() <= _BESIDE):
        raise InputError(f"{where} must have role and content, or from and value; found {turn!r:.200}")
    role = message["role"]
    if not isinstance(role, str) or role not in _ROLES:
        raise InputError(f"{where}: the role {role!r} is not known; known are {', '.join(_ROLES)}")
    message["role"] = _ROLES[role]
    message.setdefault("content", None)
    if role in _CALLS and not message.get("tool_calls"):
        calls = _json(read_text(message["content"], where, "content"), f"{where}: the call of role {role}")
        message |= {"content": None, "tool_calls": calls if isinstance(calls, list) else [calls]}
    if "function_call" in message:
        message.setdefault("tool_calls", [message.pop("function_call")])
    if "tool_calls" in message:
        calls = _list(message["tool_calls"], where, "tool_calls")
        message["tool_calls"] = [_tool_call(call, where) for call in calls]
        if not calls:
            del message["tool_calls"]
    message["content"] = _content(message["content"], message["role"], where)
    return message


def _content(content: Any, role: str, where: str) -> Any:
    """Return a message's content: text, parts of text, or None; of a tool, whatever it answered."""
    if content is None or isinstance(content, str):
        return content
    if role == "tool" and not (isinstance(content, (list, tuple)) and _typed(content)):
        return content
    if not isinstance(content, (list, tuple)):
        raise InputError(f"{where}: content must be text or a list of parts, found {type(content).__name__}")
    parts = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            part = {"text": part}
        kind = part.get("type") or "text" if isinstance(part, Mapping) else type(part).__name__
        if kind not in _TEXT_PARTS:
            raise InputError(f"{where}: content[{index}] is of type {kind}; only text can be read")
        parts.append({"type": "text", "text": read_text(part.get("text"), where, f"content[{index}].text")})
    return parts


def _typed(parts: Sequence[Any]) -> bool:
    return all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in parts)


def message_weights(messages: list[dict[str, Any]], where: str) -> list[bool] | None:
    """Take `weight` and `train` out of messages; return which messages count, or None if none of them says.

    Raises:
        InputError: a weight is not 0 or 1.
    """
    weights, given = [], False
    for index, message in enumerate(messages):
        values = [message.pop(key) for key in _WEIGHTS if key in message]
        if not all(isinstance(value, (bool, int, float)) and value in (0, 1) for value in values):
            raise InputError(f"{where}: message {index}: weight and train must be 0 or 1, found {values[-1]!r}")
        given |= bool(values)
        weights.append(all(values))
    return weights if given else None


def template_options(row: Mapping[str, Any], reserved: Collection[str], where: str) -> dict[str, Any]:
    """Return a row's `chat_template_kwargs`: a mapping, or JSON text of one.

    Raises:
        InputError: it is something else, or sets what this program sets itself.
    """
    options = row.get("chat_template_kwargs") or {}
    if isinstance(options, str):
        options = _json(options, f"{where}: chat_template_kwargs")
        options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise InputError(f"{where}: chat_template_kwargs must be a mapping, found {type(options).__name__}")
    taken = sorted(set(options) & set(reserved))
    if taken:
        raise InputError(
            f"{where}: chat_template_kwargs: {', '.join(taken)} cannot be set here; it is for variables of the chat "
            "template, such as enable_thinking"
        )
    return dict(options)


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """Return a tool call in the form that chat templates expect; its arguments may be JSON text."""
    if isinstance(call, str):
        call = _json(call, f"{where}: a tool call")
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InputError(f"{where}: a tool call needs a name; found {call!r:.200}")
    # Llama's own form of a call has parameters.
    arguments = function.get("arguments", function.get("parameters"))
    if isinstance(arguments, str) and arguments.strip():
        parsed = _json(arguments, f"{where}: the arguments of {function['name']}")
        arguments = None if parsed is None else arguments
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    around = {key: value for key, value in call.items() if key != "function"} if function is not call else {}
    known = {**function, "name": function["name"], "arguments": arguments}
    if function is call:
        around = {key: known.pop(key) for key in ("id", "type") if key in known}
    return {**around, "type": "function", "function": known}


def read_tools(tools: Any, where: str) -> list[Any] | None:
    """Return tool definitions, parsing those given as JSON text; None if there are none.

    Raises:
        InputError: `tools` is not a list, or not valid JSON.
    """
    if isinstance(tools, str) and tools:
        tools = _json(tools, f"{where}: tools")
    if not tools:
        return None
    return [_json(tool, f"{where}: tools") if isinstance(tool, str) else tool for tool in _list(tools, where, "tools")]


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what} is not JSON: {error}") from error


def check_json(values: Mapping[str, Any], where: str) -> None:
    """Refuse what only tables have, such as timestamps: chat templates write something else for it.

    Raises:
        InputError: a value is not one of JSON.
    """
    for name, value in values.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: {name} has a value that is none of JSON: {error}; if it is a time, store it as text"
            ) from error


def read_text(value: Any, where: str, column: str) -> str:
    """Return a column's text.

    Raises:
        InputError: the value is not text.
    """
    if not isinstance(value, str):
        raise InputError(f"{where}: {column} must be text, found {type(value).__name__}")
    return value


def _list(value: Any, where: str, column: str) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _json(value, f"{where}: {column}")
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: {column} must be a list, found {type(value).__name__}")
    return list(value)

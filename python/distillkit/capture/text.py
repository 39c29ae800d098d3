"""Rows of text, chat or token ids → documents of token ids for the teacher."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distillkit.capture.sources import Row, Source
from distillkit.errors import ConfigError, InputError

__all__ = [
    "DocumentReader",
    "TokenDocument",
    "chat_messages",
    "chunks",
    "find_layout",
    "given_ids",
    "read_messages",
    "read_text",
    "read_tools",
]

# What rows are understood, by the columns they need; the first that fits a row is taken.
_LAYOUTS = (
    ("input_ids",),
    ("text",),
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
    ("inputs", "targets"),
    ("tools", "turns"),
)
_UNDERSTOOD = (
    "text; messages; conversations; instruction (+ input) + output; inputs + targets; tools + turns; or input_ids"
)
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    **{role: role for role in ("system", "user", "assistant", "tool", "developer")},
}

# Rows that are tokenised together: fast tokenizers use all cores for a batch.
_TOKENIZE_ROWS = 64


@dataclass(frozen=True)
class TokenDocument:
    """One sequence for the teacher.

    Attributes:
        input_ids: (L,) int32, L ≥ 2.
        source: where it comes from, for messages.
        loss_mask: (L,) bool, which tokens count in a loss; None: all.
        columns: of the source's row, kept as they are in the dataset.
    """

    input_ids: npt.NDArray[np.int32]
    source: str
    loss_mask: npt.NDArray[np.bool_] | None = None
    columns: Mapping[str, Any] | None = None


@dataclass
class DocumentReader:
    """Reads a source's rows as documents, in the source's order, again the same each time it is iterated.

    Attributes:
        source: where rows come from.
        tokenizer: a transformers tokenizer.
        max_tokens: longer documents are split in chunks of this many tokens; nothing of them is dropped.
        id_limit: ids of rows that are tokenised already must be below this.
        chat: whether chat rows may be rendered with the tokenizer's chat template; if not, they are refused.
        samples: read a random sample of this many rows, still in the source's order; None: all.
        seed: decides the sample.
        rows, empty, short: counted while iterating: rows read, rows without content, and documents of one token (no
            next token to predict).
    """

    source: Source
    tokenizer: Any
    max_tokens: int
    id_limit: int
    chat: bool = True
    samples: int | None = None
    seed: int = 42
    rows: int = field(default=0, init=False)
    empty: int = field(default=0, init=False)
    short: int = field(default=0, init=False)

    @property
    def counts(self) -> dict[str, int]:
        """Rows read so far, and what of them is in no document."""
        return {"rows": self.rows, "empty_rows": self.empty, "documents_of_one_token": self.short}

    @property
    def kept(self) -> pa.Schema:
        """Columns of the source that documents bring with them."""
        return pa.schema([])

    def __iter__(self) -> Iterator[TokenDocument]:
        """Yield the documents.

        Raises:
            InputError: a row is not understood; the message names it, the columns found and those understood.
            ConfigError: chat rows, and the tokenizer has no chat template or chat is switched off.
        """
        self.rows = self.empty = self.short = 0
        pending: list[Row] = []
        for row in self._sampled_rows():
            pending.append(row)
            if len(pending) == _TOKENIZE_ROWS:
                yield from self._documents(pending)
                pending = []
        yield from self._documents(pending)

    def _sampled_rows(self) -> Iterator[Row]:
        rows = self.source.rows()
        if self.samples is None or self.samples >= self.source.num_rows:
            return rows
        chosen = np.random.default_rng(self.seed).choice(self.source.num_rows, self.samples, replace=False)
        wanted = set(chosen.tolist())
        return (row for index, row in enumerate(rows) if index in wanted)

    def _documents(self, rows: Sequence[Row]) -> Iterator[TokenDocument]:
        """Tokenise some rows and split them."""
        for (where, _), sequences in zip(rows, self._tokenize(rows), strict=True):
            self.rows += 1
            if not any(len(sequence) for sequence in sequences):
                self.empty += 1
                continue
            for ids in sequences:
                if len(ids) < 2:
                    self.short += 1
                    continue
                for start, stop in chunks(len(ids), self.max_tokens):
                    place = where if stop - start == len(ids) else f"{where}, tokens {start}…{stop - 1}"
                    yield TokenDocument(ids[start:stop], place)

    def _tokenize(self, rows: Sequence[Row]) -> list[list[npt.NDArray[np.int32]]]:
        """Return the token sequences of each row: one, several (packed ids), or none (an empty row)."""
        result: list[list[npt.NDArray[np.int32]]] = [[] for _ in rows]
        # Text gets the tokenizer's own special tokens; a rendered chat has them in its text already.
        texts: dict[bool, list[tuple[int, str]]] = {True: [], False: []}
        for index, (where, row) in enumerate(rows):
            columns = find_layout(row, where)
            if columns is None:
                continue
            if columns == ("input_ids",):
                result[index] = given_ids(row, where, self.id_limit)
                continue
            is_text = columns == ("text",)
            text = read_text(row["text"], where, "text") if is_text else self._render_chat(row, columns, where)
            if text.strip():
                texts[is_text].append((index, text))
        for special_tokens, entries in texts.items():
            if entries:
                encoded = self.tokenizer(
                    [text for _, text in entries], add_special_tokens=special_tokens, verbose=False
                )
                for (index, _), ids in zip(entries, encoded["input_ids"], strict=True):
                    result[index] = [np.asarray(ids, dtype=np.int32)]
        return result

    def _render_chat(self, row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> str:
        """Render a chat row as text."""
        if not self.chat:
            raise ConfigError(
                f"{where}: a row of {' + '.join(columns)} needs the chat template, which is switched off "
                "(--no-apply-chat-template)"
            )
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{where}: a row of {' + '.join(columns)} needs a chat template, and the tokenizer has none; "
                "give one that has with --tokenizer, or capture text rows"
            )
        from jinja2 import TemplateError

        messages, tools = chat_messages(row, columns, where)
        if not messages:
            return ""
        try:
            return str(self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))
        except TemplateError as error:
            raise InputError(f"{where}: the tokenizer's chat template refuses this row: {error}") from error


def chunks(length: int, limit: int) -> list[tuple[int, int]]:
    """Cut `length` tokens in (start, stop) pieces of at most `limit`.

    A remainder of one token, which has no next one to predict, gets one more from the piece before it.
    """
    borders = [*range(0, length, limit), length]
    if len(borders) > 2 and borders[-1] - borders[-2] == 1:
        borders[-2] -= 1
    return list(pairwise(borders))


def given_ids(row: Mapping[str, Any], where: str, id_limit: int) -> list[npt.NDArray[np.int32]]:
    """Return a tokenised row's sequences.

    By its attention_mask, padding (0) is left out and packed documents (1, 1, 2, 2, …) are separated.

    Args:
        row: with `input_ids`, perhaps `attention_mask`.
        where: it is, for messages.
        id_limit: ids must be below this.

    Raises:
        InputError: they are no such ids, or the mask does not fit them.
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


def find_layout(
    row: Mapping[str, Any],
    where: str,
    layouts: Sequence[tuple[str, ...]] = _LAYOUTS,
    understood: str = _UNDERSTOOD,
) -> tuple[str, ...] | None:
    """Return the columns to read a row by: the first of `layouts` whose columns all have values.

    None if the row has the columns of one, but all of them without a value.

    Raises:
        InputError: it has the columns of none.
    """
    known = [columns for columns in layouts if all(column in row for column in columns)]
    if not known:
        raise InputError(
            f"{where}: found the columns {', '.join(map(str, row)) or '(none)'}; understood are {understood}"
        )
    return next((columns for columns in known if all(row[column] is not None for column in columns)), None)


def chat_messages(
    row: Mapping[str, Any], columns: tuple[str, ...], where: str
) -> tuple[list[dict[str, Any]], list[Any] | None]:
    """Return a chat row's messages (role, content, …) and its tool definitions.

    Raises:
        InputError: they are not understood.
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
        InputError: it is no list of messages.
    """
    turns = _list(turns, where, column)
    return [_message(turn, f"{where}: {column}[{index}]") for index, turn in enumerate(turns)]


def _message(turn: Any, where: str) -> dict[str, Any]:
    """Return one message: {role, content, …} as it is, {from, value} translated; without keys that have no value."""
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
    """Return a tool call in the form chat templates take, its arguments parsed."""
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
    """Return tool definitions, parsed where they are JSON text.

    Raises:
        InputError: they are no list, or not JSON.
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
        InputError: it is something else.
    """
    if not isinstance(value, str):
        raise InputError(f"{where}: {column} must be text, found {type(value).__name__}")
    return value


def _list(value: Any, where: str, column: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise InputError(f"{where}: {column} must be a list, found {type(value).__name__}")
    return list(value)

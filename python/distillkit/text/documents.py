"""Rows of text, chat or token ids → documents of token ids for the teacher."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distillkit.errors import ConfigError, InputError
from distillkit.text.layouts import (
    LAYOUTS,
    MASKS,
    PROMPTS,
    UNDERSTOOD,
    chat_messages,
    find_layout,
    given_ids,
    given_mask,
    has_value,
    read_messages,
    read_text,
    read_tools,
)
from distillkit.text.sources import Row, Source, kept_schema
from distillkit.text.turns import Span, has_marks, marked_turns, opening, overlapping, rendered_turns

__all__ = ["LOSS_ON", "OVERFLOWS", "DocumentReader", "TokenDocument", "default_overlap", "windows"]

OVERFLOWS = ("window", "truncate", "skip")
LOSS_ON = ("auto", "all", "assistant", "completion")

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


@dataclass(frozen=True)
class _Tokens:
    """A whole document: (L,) int32 ids, and which of them count, (L,) bool; None: all."""

    ids: npt.NDArray[np.int32]
    mask: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class _Text:
    """A row's text, whether the tokenizer's special tokens belong around it, and which characters count (None: all)."""

    text: str
    special_tokens: bool
    spans: list[Span] | None = None


@dataclass
class DocumentReader:
    """Reads a source's rows as documents, again the same each time it is iterated.

    Attributes:
        source: where rows come from.
        tokenizer: a transformers tokenizer.
        max_tokens: tokens of a document that is yielded, at most.
        id_limit: ids of rows that are tokenised already must be below this.
        chat: whether chat rows may be rendered with the tokenizer's chat template; if not, they are refused.
        samples: read a random sample of this many rows, in the source's order; None: all.
        seed: decides the sample and the shuffled order.
        shuffle: read rows in a random order; the sample's rows are the same ones.
        where: read only rows whose column has this value (JSON if it is not text), for all (column, value) pairs.
        shortest, longest: leave out documents of fewer or more tokens, as they are before they are cut.
        overflow: of longer documents than `max_tokens`: "window" cuts them in pieces, in which each token counts once,
            "truncate" keeps their beginning, "skip" leaves them out.
        overlap: tokens that a piece repeats of the one before it, as context; None: `default_overlap`.
        loss_on: what counts in a loss. "auto": what a row's own loss_mask, labels, … say, of prompt and response the
            response, else all; "all": all, whatever rows say; "assistant": the assistant's turns; "completion": the
            response.
        keep_columns: names of the source's columns that documents bring with them, "all", or "none".
        drop_duplicates: leave out documents whose ids and mask were there before; about 120 bytes of memory a document.
            None: not if columns are kept, so that what comes out are the rows that went in.
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
    shuffle: bool = False
    where: Sequence[tuple[str, str]] = ()
    shortest: int | None = None
    longest: int | None = None
    overflow: str = "window"
    overlap: int | None = None
    loss_on: str = "auto"
    keep_columns: str | Sequence[str] = "none"
    drop_duplicates: bool | None = None
    rows: int = field(default=0, init=False)
    empty: int = field(default=0, init=False)
    short: int = field(default=0, init=False)
    _counts: dict[str, int] = field(default_factory=dict, init=False)

    @property
    def counts(self) -> dict[str, int]:
        """Rows read so far, and what of them is in no document; what never happened is not there."""
        known = {"rows": self.rows, "empty_rows": self.empty, "documents_of_one_token": self.short}
        return {**known, **self._counts}

    @cached_property
    def kept(self) -> pa.Schema:
        """The source's columns that documents bring with them, with their types.

        Raises:
            ConfigError: the source has no such column, or it can not be kept.
        """
        return kept_schema(self.source, self.keep_columns)

    def __iter__(self) -> Iterator[TokenDocument]:
        """Yield the documents.

        Raises:
            InputError: a row is not understood; the message names it, the columns found and those understood.
            ConfigError: a setting does not fit the rows: chat rows, and the tokenizer has no chat template or chat is
                switched off; the loss is wanted on a part that they have not; no row has a column of `where`.
        """
        self.rows = self.empty = self.short = 0
        self._counts = {}
        drop = self.keep_columns in ("none", ("none",)) if self.drop_duplicates is None else self.drop_duplicates
        return self._without_duplicates(self._read()) if drop else self._read()

    def _without_duplicates(self, documents: Iterator[TokenDocument]) -> Iterator[TokenDocument]:
        from distillkit.shards.table import document_id

        seen = set()
        for document in documents:
            key = bytes.fromhex(document_id(document.input_ids, document.loss_mask))
            if key in seen:
                self._count("duplicate_documents")
                continue
            seen.add(key)
            yield document

    def _count(self, what: str) -> None:
        self._counts[what] = self._counts.get(what, 0) + 1

    def _read(self) -> Iterator[TokenDocument]:
        pending: list[Row] = []
        for row in self._matching_rows():
            pending.append(row)
            if len(pending) == _TOKENIZE_ROWS:
                yield from self._documents(pending)
                pending = []
        yield from self._documents(pending)

    def _matching_rows(self) -> Iterator[Row]:
        unseen = {column for column, _ in self.where}
        for where, row in self._chosen_rows():
            unseen -= row.keys()
            if all(has_value(row.get(column), value) for column, value in self.where):
                yield where, row
            else:
                self.rows += 1
                self._count("rows_left_out_by_where")
        if unseen:
            raise ConfigError(f"where: no row of the dataset has a column {', '.join(sorted(unseen))}")

    def _chosen_rows(self) -> Iterator[Row]:
        rows = self.source.num_rows
        everything = self.samples is None or self.samples >= rows
        if everything and not self.shuffle:
            return self.source.rows()
        random = np.random.default_rng(self.seed)
        order = random.permutation(rows) if everything else random.choice(rows, self.samples, replace=False)
        if self.shuffle:
            return self.source.rows(order)
        wanted = set(order.tolist())
        return (row for index, row in enumerate(self.source.rows()) if index in wanted)

    def _documents(self, rows: Sequence[Row]) -> Iterator[TokenDocument]:
        """Tokenise some rows and split them."""
        names = self.kept.names
        for (where, row), documents in zip(rows, self._tokenize(rows), strict=True):
            self.rows += 1
            if not any(len(document.ids) for document in documents):
                self.empty += 1
                continue
            columns = {name: row.get(name) for name in names} if names else None
            for document in documents:
                length = len(document.ids)
                for start, stop, mask in self._pieces(document):
                    place = where if stop - start == length else f"{where}, tokens {start}…{stop - 1}"
                    yield TokenDocument(document.ids[start:stop], place, mask, columns)

    def _pieces(self, document: _Tokens) -> Iterator[tuple[int, int, npt.NDArray[np.bool_] | None]]:
        """Yield first token, end and mask of what is captured of a document: nothing, all of it, or several pieces.

        A piece none of whose tokens count is left out.
        """
        length = len(document.ids)
        if length < 2:
            self.short += 1
            return
        if not (self.shortest or 0) <= length <= (self.longest or length):
            self._count("documents_left_out_by_length")
            return
        pieces = [(0, length)]
        if length > self.max_tokens:
            if self.overflow == "skip":
                self._count("long_documents_skipped")
                return
            if self.overflow == "truncate":
                self._count("long_documents_truncated")
                pieces = [(0, self.max_tokens)]
            else:
                self._count("long_documents_in_windows")
                pieces = windows(length, self.max_tokens, self.overlap or default_overlap(self.max_tokens))
        counted = np.ones(length, bool) if document.mask is None else document.mask
        done, some = 0, False
        for start, stop in pieces:
            mask = counted[start:stop].copy()
            mask[: done - start] = False
            done = stop
            # The first token is predicted by nothing, so its mask says nothing.
            if mask[1:].any():
                some = True
                yield start, stop, None if mask[1:].all() else mask
        if not some:
            self._count("documents_without_a_counted_token")

    # -- rows → tokens -------------------------------------------------------------------------------------------------

    def _tokenize(self, rows: Sequence[Row]) -> list[list[_Tokens]]:
        """Return the documents of each row: one, several (packed ids), or none (an empty row)."""
        result: list[list[_Tokens]] = [[] for _ in rows]
        texts: dict[bool, list[tuple[int, _Text]]] = {True: [], False: []}
        for index, (where, row) in enumerate(rows):
            columns = find_layout(row, where, LAYOUTS[self.loss_on], UNDERSTOOD)
            if columns is None:
                continue
            if columns == ("input_ids",):
                result[index] = self._given(row, where)
                continue
            text = self._text(row, columns, where)
            if text.text.strip():
                texts[text.special_tokens].append((index, text))
        for special_tokens, entries in texts.items():
            if not entries:
                continue
            offsets_needed = any(text.spans is not None for _, text in entries)
            encoded = self.tokenizer(
                [text.text for _, text in entries],
                add_special_tokens=special_tokens,
                verbose=False,
                **({"return_offsets_mapping": True} if offsets_needed else {}),
            )
            for number, (index, text) in enumerate(entries):
                mask = None
                if text.spans is not None:
                    offsets = np.asarray(encoded["offset_mapping"][number]).reshape(-1, 2)
                    mask = overlapping(offsets, text.spans)
                result[index] = [_Tokens(np.asarray(encoded["input_ids"][number], dtype=np.int32), mask)]
        return result

    def _given(self, row: Mapping[str, Any], where: str) -> list[_Tokens]:
        """Take a tokenised row, with the mask that it may have."""
        parts = given_ids(row, where, self.id_limit)
        if not parts:
            return []
        mask = None if self.loss_on == "all" else given_mask(row, where, MASKS[self.loss_on])
        if mask is None and self.loss_on in ("assistant", "completion"):
            raise ConfigError(
                f"loss_on: {self.loss_on} is wanted, but {where} is a row of input_ids without "
                f"{', '.join(MASKS[self.loss_on])} or labels, which would say where that is"
            )
        if mask is None:
            return [_Tokens(ids) for ids in parts]
        if row.get("attention_mask") is not None:
            mask = mask[np.asarray(row["attention_mask"]) != 0]
        ends = np.cumsum([len(ids) for ids in parts])[:-1]
        return [_Tokens(ids, part) for ids, part in zip(parts, np.split(mask, ends), strict=True)]

    def _text(self, row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> _Text:
        """Return a row's text, and which of its characters count."""
        self._check_loss_on(columns, row, where)
        if columns == ("text",):
            return _Text(read_text(row["text"], where, "text"), special_tokens=True)
        if columns not in PROMPTS:
            messages, tools = chat_messages(row, columns, where)
            return self._chat(messages, tools, row, columns, where)
        if isinstance(row["prompt"], str):
            return self._response(row, columns, where)
        prompt, response = (read_messages(row[column], where, column) for column in columns)
        tools = read_tools(row["tools"], where) if row.get("tools") else None
        if not response:
            return _Text("", special_tokens=False)
        return self._chat([*prompt, *response], tools, row, columns, where, prompt=prompt)

    def _check_loss_on(self, columns: tuple[str, ...], row: Mapping[str, Any], where: str) -> None:
        found = " + ".join(columns)
        if self.loss_on == "completion" and columns not in PROMPTS:
            raise ConfigError(f"loss_on: completion needs rows of prompt + response, {where} is a row of {found}")
        plain = columns == ("text",) or (columns in PROMPTS and isinstance(row["prompt"], str))
        if self.loss_on == "assistant" and plain:
            raise ConfigError(f"loss_on: assistant needs chat rows, {where} is a row of plain text ({found})")
        part = self.loss_on == "assistant" or (self.loss_on != "all" and columns in PROMPTS)
        if part and not getattr(self.tokenizer, "is_fast", False):
            raise ConfigError(
                f"{where}: a loss on part of a text needs a fast tokenizer, which knows the characters of its tokens; "
                f"{type(self.tokenizer).__name__} is none. Give one with --tokenizer, or capture with --loss-on all"
            )

    def _response(self, row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> _Text:
        """Put a prompt and a response, both plain text, one behind the other, as the trainer does."""
        prompt, response = (read_text(row[column], where, column) for column in columns)
        if not response.strip():
            return _Text("", special_tokens=True)
        eos = self.tokenizer.eos_token
        text = prompt + response
        if eos is not None and not text.endswith(eos):
            text += str(eos)
        return _Text(text, True, None if self.loss_on == "all" else [(len(prompt), len(text))])

    def _chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        row: Mapping[str, Any],
        columns: tuple[str, ...],
        where: str,
        *,
        prompt: list[dict[str, Any]] | None = None,
    ) -> _Text:
        """Render a chat row as text, `prompt` being its messages before the response."""
        self._check_template(columns, where)
        if not messages:
            return _Text("", special_tokens=False)
        from jinja2 import TemplateError

        options = row.get("chat_template_kwargs") or {}

        def render(some: Sequence[dict[str, Any]], **more: Any) -> str:
            rendered = self.tokenizer.apply_chat_template(list(some), tools=tools, tokenize=False, **more, **options)
            return str(rendered)

        try:
            if self.loss_on == "assistant":
                template = self.tokenizer.get_chat_template(tools=tools)
                if has_marks(template):
                    return self._marked(
                        messages, *marked_turns(self.tokenizer, template, messages, tools, options), where
                    )
                text = render(messages)
                special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
                return _Text(text, False, rendered_turns(messages, text, render, special, where))
            text = render(messages)
            if prompt is None or self.loss_on == "all":
                return _Text(text, special_tokens=False)
            return _Text(text, False, [(opening(prompt, text, render, where), len(text))])
        except TemplateError as error:
            raise InputError(f"{where}: the tokenizer's chat template refuses this row: {error}") from error

    def _marked(self, messages: Sequence[Mapping[str, Any]], text: str, spans: list[Span], where: str) -> _Text:
        if not spans and any(message["role"] == "assistant" for message in messages):
            raise InputError(
                f"{where}: the chat template marks none of this row's text as the assistant's ({{% generation %}}); "
                "give a tokenizer with another template, or capture with --loss-on all"
            )
        return _Text(text, False, spans)

    def _check_template(self, columns: tuple[str, ...], where: str) -> None:
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


def default_overlap(max_tokens: int) -> int:
    """Return how many tokens a piece of a long document repeats of the one before it: an eighth of a piece."""
    return max(1, max_tokens // 8)


def windows(length: int, limit: int, overlap: int) -> list[tuple[int, int]]:
    """Cut `length` tokens in (start, stop) pieces of at most `limit` that each begin `overlap` before the last's end.

    With an overlap of at least one every token but the first has the token before it in its piece, so none is left
    without a distribution.
    """
    pieces = [(0, min(length, limit))]
    while pieces[-1][1] < length:
        start = pieces[-1][1] - overlap
        pieces.append((start, min(length, start + limit)))
    return pieces

"""Rows of text, chat or token ids → documents of token ids with loss masks, for capture and training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import ConfigError, InputError
from distillkit.text.layouts import (
    CHATS,
    PROMPTS,
    chat_messages,
    find_layout,
    given_ids,
    given_mask,
    read_messages,
    read_text,
    read_tools,
)
from distillkit.text.policy import ReadingPolicy
from distillkit.text.sources import Row
from distillkit.text.turns import Chat, Span, opening, overlapping, rendered_turns
from distillkit.types import TokenDocument

__all__ = ["RowReader"]

_Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class _Layout:
    """A row, and the columns it is read by.

    Attributes:
        where: location of the row, for messages.
        row: all of its columns.
        columns: the names of those that are read.
    """

    where: str
    row: Mapping[str, Any]
    columns: tuple[str, ...]

    @property
    def name(self) -> str:
        return " + ".join(self.columns)


@dataclass(frozen=True)
class _Text:
    """A row's text, not tokenised yet.

    Attributes:
        where: location of the row, for messages.
        text: the complete text.
        special_tokens: whether the tokenizer adds its special tokens around it.
        counted: one list of character spans per restriction of the loss; a token counts if it overlaps a span of every
            list.
        prompt: the prompt on its own. Tokens do not count as long as they agree with the prompt's tokens.
    """

    where: str
    text: str
    special_tokens: bool
    counted: tuple[Sequence[Span], ...] = ()
    prompt: str | None = None


class RowReader:
    """Reads rows as uncut token documents; can be sent to other processes.

    Args:
        tokenizer: a transformers tokenizer, optionally with a chat template.
        policy: how rows are read.
        id_limit: ids in rows that are already tokenised must be below this.
    """

    def __init__(self, tokenizer: Any, policy: ReadingPolicy, id_limit: int) -> None:
        self.tokenizer = tokenizer
        self.policy = policy
        self.id_limit = id_limit

    def __call__(self, rows: Sequence[Row]) -> list[list[TokenDocument]]:
        """Return the documents of each row: usually one, none if the row is empty, several if its ids are packed.

        Texts are tokenised together: fast tokenizers use all cores for a batch.

        Raises:
            InputError: a row has an unknown format; the message names the row, its columns and the known formats.
            ConfigError: the policy does not fit the rows.
        """
        found: list[list[TokenDocument]] = [[] for _ in rows]
        texts: list[tuple[int, _Text]] = []
        for index, (where, row) in enumerate(rows):
            columns = find_layout(row, where, self.policy.layouts, self.policy.text_column)
            if columns is None:
                continue
            layout = _Layout(where, row, columns)
            if columns == ("input_ids",):
                found[index] = self._given(layout)
                continue
            self._check_policy(layout)
            text = self._text(layout)
            if text is not None and text.text.strip():
                texts.append((index, text))
        for special_tokens in (True, False):
            group = [(index, text) for index, text in texts if text.special_tokens is special_tokens]
            for (index, _), document in zip(group, self._tokenized([text for _, text in group]), strict=True):
                found[index] = [document]
        return found

    # -- token ids -----------------------------------------------------------------------------------------------------

    def _given(self, layout: _Layout) -> list[TokenDocument]:
        """Read a tokenised row, with its mask if it has one."""
        row, where = layout.row, layout.where
        parts = given_ids(row, where, self.id_limit)
        if not parts:
            return []
        mask = self._given_mask(row, where)
        if mask is not None and row.get("attention_mask") is not None:
            mask = mask[np.asarray(row["attention_mask"]) != 0]
        lengths = np.array([len(ids) for ids in parts], dtype=np.int32)
        if self.policy.keep_packed:
            segments = lengths if len(parts) > 1 else None
            return [TokenDocument(np.concatenate(parts), where, mask, segment_lengths=segments)]
        masks = [None for _ in parts] if mask is None else np.split(mask, np.cumsum(lengths)[:-1])
        return [TokenDocument(ids, where, part) for ids, part in zip(parts, masks, strict=True)]

    def _given_mask(self, row: Mapping[str, Any], where: str) -> npt.NDArray[np.bool_] | None:
        if self.policy.mask_columns is None:
            return None
        for setting, columns in self.policy.needed_masks:
            if all(row.get(name) is None for name in ("labels", *columns)):
                raise ConfigError(
                    f"{setting} needs to know which tokens count, but {where} is a row of input_ids without labels or "
                    f"{' or '.join(columns)}"
                )
        return given_mask(row, where, self.policy.mask_columns)

    # -- text ----------------------------------------------------------------------------------------------------------

    def _check_policy(self, layout: _Layout) -> None:
        policy, names, where = self.policy, self.policy.names, layout.where
        if policy.tokenised_only:
            raise ConfigError(
                f"training_args.dataset_kwargs: skip_prepare_dataset is true, but {where} is a row of {layout.name}, "
                "not of input_ids: remove it"
            )
        if policy.completion and layout.columns not in PROMPTS:
            pairs = " or ".join(" + ".join(columns) for columns in policy.layouts if columns in PROMPTS)
            raise ConfigError(f"{names.completion} needs rows of {pairs}, {where} is a row of {layout.name}")
        if policy.assistant and not self._is_chat(layout):
            raise ConfigError(
                f"{names.assistant} needs chat rows, {where} is a row of plain text ({layout.name}): {names.everything}"
            )
        by_characters = layout.columns in PROMPTS and policy.completion is not False and not policy.prefix_is_prompt
        if (policy.assistant or by_characters) and not getattr(self.tokenizer, "is_fast", False):
            raise ConfigError(
                f"{where}: a loss on part of a text needs a fast tokenizer, which knows the characters of its tokens; "
                f"{type(self.tokenizer).__name__} is not one. Set another with {names.template}, or {names.everything}"
            )

    def _is_chat(self, layout: _Layout) -> bool:
        if layout.columns in PROMPTS:
            return not isinstance(layout.row["prompt"], str)
        return layout.columns in CHATS and layout.columns != (self.policy.text_column,)

    def _text(self, layout: _Layout) -> _Text | None:
        """Return a row's text and which parts of it count; None if the row has no content."""
        row, columns, where = layout.row, layout.columns, layout.where
        if not self._is_chat(layout):
            return self._response(layout) if columns in PROMPTS else self._plain(layout)
        if columns not in PROMPTS:
            messages, tools = chat_messages(row, columns, where)
            return self._chat(layout, messages, tools)
        prompt, response = (read_messages(row[column], where, column) for column in columns)
        tools = read_tools(row["tools"], where) if row.get("tools") else None
        return self._chat(layout, [*prompt, *response], tools, prompt=prompt) if response else None

    def _plain(self, layout: _Layout) -> _Text | None:
        [column] = layout.columns
        text = read_text(layout.row[column], layout.where, column)
        if not text.strip():
            return None
        return _Text(layout.where, self._ended(text) if self.policy.end_text else text, special_tokens=True)

    def _response(self, layout: _Layout) -> _Text | None:
        """Concatenate a prompt and a response, both plain text."""
        prompt, response = (read_text(layout.row[column], layout.where, column) for column in layout.columns)
        if not response.strip():
            return None
        text = prompt + self._ended(response)
        if self.policy.completion is False:
            return _Text(layout.where, text, special_tokens=True)
        if self.policy.prefix_is_prompt:
            return _Text(layout.where, text, special_tokens=True, prompt=prompt)
        return _Text(layout.where, text, special_tokens=True, counted=([(len(prompt), len(text))],))

    def _ended(self, text: str) -> str:
        """Append the end-of-sequence token to a text that does not end with it."""
        eos = self.tokenizer.eos_token
        if eos is None and self.policy.end_text:
            raise ConfigError(
                "the student's tokenizer has no end-of-sequence token to end plain text with: name one of its tokens "
                "as training_args.eos_token"
            )
        return text if eos is None or text.endswith(eos) else text + str(eos)

    def _chat(
        self, layout: _Layout, messages: _Messages, tools: list[Any] | None, *, prompt: _Messages | None = None
    ) -> _Text | None:
        """Render a chat; `prompt` holds the messages before the response."""
        if not messages:
            return None
        self._check_template(layout)
        chat = Chat(self.tokenizer, self.policy.template, tools, layout.row.get("chat_template_kwargs") or {})
        from jinja2 import TemplateError

        try:
            counted = []
            if self.policy.assistant:
                text, turns = self._turns(chat, messages, layout.where)
                counted.append(turns)
            else:
                text = chat.render(messages)
            start = None
            if prompt is not None and self.policy.completion is not False:
                if self.policy.prefix_is_prompt:
                    start = chat.render(prompt, add_generation_prompt=True)
                else:
                    counted.append([(opening(prompt, text, chat.render, layout.where), len(text))])
        except TemplateError as error:
            raise InputError(f"{layout.where}: the tokenizer's chat template rejects this row: {error}") from error
        return _Text(layout.where, text, special_tokens=False, counted=tuple(counted), prompt=start)

    def _turns(self, chat: Chat, messages: _Messages, where: str) -> tuple[str, list[Span]]:
        """Render a chat, and find the assistant's turns in it."""
        marked = chat.marked_turns(messages)
        if marked is None:
            text = chat.render(messages)
            special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
            return text, rendered_turns(messages, text, chat.render, special, where)
        text, spans = marked
        written = [(start, stop) for start, stop in spans if stop > start]
        if not written and any(message["role"] == "assistant" for message in messages):
            raise InputError(
                f"{where}: the chat template marks none of this row's text as the assistant's ({{% generation %}}); "
                f"set another template with {self.policy.names.template}, or {self.policy.names.everything}"
            )
        return text, spans if self.policy.count_empty else written

    def _check_template(self, layout: _Layout) -> None:
        if not self.policy.render_chats:
            raise ConfigError(
                f"{layout.where}: a row of {layout.name} needs the chat template, which is switched off "
                "(--no-apply-chat-template)"
            )
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{layout.where}: a row of {layout.name} needs a chat template, and the tokenizer has none; set one "
                f"with {self.policy.names.template}"
            )

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _tokenized(self, texts: Sequence[_Text]) -> Iterable[TokenDocument]:
        """Tokenise texts that all have the same `special_tokens`."""
        if not texts:
            return
        offsets = any(text.counted for text in texts)
        special_tokens = texts[0].special_tokens
        encoded = self._encode([text.text for text in texts], special_tokens, offsets=offsets)
        prompts = [text.prompt for text in texts if text.prompt is not None]
        prompt_ids = iter(self._encode(prompts, special_tokens)["input_ids"] if prompts else ())
        for number, text in enumerate(texts):
            ids = np.asarray(encoded["input_ids"][number], dtype=np.int32)
            masks = []
            for spans in text.counted:
                where = np.asarray(encoded["offset_mapping"][number]).reshape(-1, 2)
                masks.append(overlapping(where, spans, empty=self.policy.count_empty))
            if text.prompt is not None:
                masks.append(np.arange(len(ids)) >= _common_prefix(next(prompt_ids), ids))
            yield TokenDocument(ids, text.where, np.all(masks, axis=0) if masks else None)

    def _encode(self, texts: list[str], special_tokens: bool, *, offsets: bool = False) -> Mapping[str, Any]:
        encoded: Mapping[str, Any] = self.tokenizer(
            texts,
            add_special_tokens=special_tokens,
            verbose=False,
            **({"return_offsets_mapping": True} if offsets else {}),
        )
        return encoded


def _common_prefix(ids: Sequence[int], others: npt.NDArray[np.int32]) -> int:
    """Return the length of the longest common prefix of two token sequences."""
    most = min(len(ids), len(others))
    differ = np.flatnonzero(np.asarray(ids[:most], dtype=np.int32) != others[:most])
    return int(differ[0]) if len(differ) else most

"""Rows of text, chat or token ids → documents of token ids with loss masks, for capture and training."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import ConfigError, InputError
from distillkit.text.chat import Chat, Messages, Span
from distillkit.text.layouts import (
    CHATS,
    PROMPTS,
    before_messages,
    chat_messages,
    check_json,
    find_layouts,
    given_ids,
    given_mask,
    message_weights,
    read_messages,
    read_text,
    read_tools,
    template_options,
)
from distillkit.text.policy import ReadingPolicy
from distillkit.text.sources import Row
from distillkit.text.turns import Turns, overlapping
from distillkit.types import TokenDocument

__all__ = ["Layout", "RowReader", "Text"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
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
class Text:
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

    shortest = 2
    """Fewest tokens of a document: in one of a single token there is nothing to predict."""

    def __init__(self, tokenizer: Any, policy: ReadingPolicy, id_limit: int) -> None:
        self.tokenizer = tokenizer
        self.policy = policy
        self.id_limit = id_limit
        self._told = False

    def __call__(self, rows: Sequence[Row]) -> list[list[TokenDocument]]:
        """Return the documents of each row: usually one, none if the row is empty, several if its ids are packed.

        Texts are tokenised together: fast tokenizers use all cores for a batch.

        Raises:
            InputError: a row cannot be read, or has an unknown format; the message names the row, its columns and the
                known formats.
            ConfigError: the policy does not fit the rows.
        """
        found: list[list[TokenDocument]] = [[] for _ in rows]
        texts: list[tuple[int, Text]] = []
        for index, (where, row) in enumerate(rows):
            if isinstance(row, InputError):
                raise row
            layouts = find_layouts(row, where, self.policy.layouts)
            if not layouts:
                continue
            columns = layouts[0]
            layout = Layout(where, row, columns)
            self._tell_choice(layout, layouts)
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

    def _given(self, layout: Layout) -> list[TokenDocument]:
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

    def _check_policy(self, layout: Layout) -> None:
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
        if policy.assistant or by_characters:
            self._check_offsets(where)

    def _check_offsets(self, where: str) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise ConfigError(
                f"{where}: a loss on part of a text needs a fast tokenizer, which knows the characters of its tokens; "
                f"{type(self.tokenizer).__name__} is not one. Set another with {self.policy.names.template}, or "
                f"{self.policy.names.everything}"
            )

    def _tell_choice(self, layout: Layout, layouts: Sequence[tuple[str, ...]]) -> None:
        """Say once how rows are read that can be read in several ways."""
        if len(layouts) > 1 and not self._told:
            self._told = True
            others = ", ".join(" + ".join(columns) for columns in layouts[1:])
            logger.warning(
                "%s: can be read as %s or %s; %s is read (%s chooses)",
                *(layout.where, layout.name, others, layout.name, self.policy.names.columns),
            )

    def _is_chat(self, layout: Layout) -> bool:
        if layout.columns in PROMPTS:
            return not isinstance(layout.row["prompt"], str)
        return layout.columns in CHATS and layout.columns != (self.policy.text_column,)

    def _text(self, layout: Layout) -> Text | None:
        """Return a row's text and which parts of it count; None if the row has no content."""
        text = self._rendered(layout)
        for part in () if text is None else (text.text, text.prompt or ""):
            _check_unicode(part, layout.where)
        return text

    def _rendered(self, layout: Layout) -> Text | None:
        row, columns, where = layout.row, layout.columns, layout.where
        if not self._is_chat(layout):
            return self._response(layout) if columns in PROMPTS else self._plain(layout)
        if columns not in PROMPTS:
            messages, tools = chat_messages(row, columns, where)
            return self._chat(layout, messages, tools)
        prompt, response = (read_messages(row[column], where, column) for column in columns)
        tools = read_tools(row.get("tools"), where)
        if not response:
            return None
        prompt = before_messages(row, where, prompt)
        return self._chat(layout, [*prompt, *response], tools, prompt=len(prompt))

    def _plain(self, layout: Layout) -> Text | None:
        [column] = layout.columns
        text = read_text(layout.row[column], layout.where, column)
        if not text.strip():
            return None
        return Text(layout.where, self._ended(text) if self.policy.end_text else text, special_tokens=True)

    def _response(self, layout: Layout) -> Text | None:
        """Concatenate a prompt and a response, both plain text."""
        row, where = layout.row, layout.where
        prompt, response = (read_text(row[column], where, column) for column in layout.columns)
        unread = [column for column in ("system", "history") if row.get(column)]
        if unread:
            raise InputError(
                f"{where}: {layout.name} are plain text, which has no place for {' and '.join(unread)}: use "
                f"instruction + output, or a list of messages as {layout.columns[0]}"
            )
        if not response.strip():
            return None
        text = prompt + self._ended(response)
        if self.policy.completion is False:
            return Text(where, text, special_tokens=True)
        if self.policy.prefix_is_prompt:
            return Text(where, text, special_tokens=True, prompt=prompt)
        return Text(where, text, special_tokens=True, counted=([(len(prompt), len(text))],))

    def _ended(self, text: str) -> str:
        """Append the end-of-sequence token to a text that does not end with it."""
        eos = self.tokenizer.eos_token
        if eos is None and self.policy.end_text:
            raise ConfigError(
                f"{self.policy.names.end}: the tokenizer has no end-of-sequence token to end plain text with"
            )
        return text if eos is None or text.endswith(eos) else text + str(eos)

    def _chat(
        self, layout: Layout, messages: Messages, tools: list[Any] | None, *, prompt: int | None = None
    ) -> Text | None:
        """Render a chat, of which `prompt` messages come before the response."""
        if not messages:
            return None
        policy, where = self.policy, layout.where
        weights = message_weights(messages, where)
        self._check_template(layout, tools)
        options = template_options(layout.row, self._reserved, where)
        check_json({"messages": messages, "tools": tools, "chat_template_kwargs": options}, where)
        chat = Chat(self.tokenizer, policy.template, tools, options, where)
        messages, text = chat.fit(messages)
        counted: list[Sequence[Span]] = []
        # As with token ids, the row's own choice counts unless every token shall.
        weights = None if policy.mask_columns is None else weights
        if policy.assistant or weights is not None:
            self._check_offsets(where)
            counted.append(self._turns(chat, messages, text, weights))
        opening = None
        if prompt is not None and policy.completion is not False:
            opening = chat.render(messages[:prompt], add_generation_prompt=True)
            if not policy.prefix_is_prompt:
                start = len(opening)
                if not text.startswith(opening):
                    start = Turns(chat, messages, text, self._special_tokens).start(prompt)
                counted.append([(start, len(text))])
                opening = None
        return Text(where, text, special_tokens=False, counted=tuple(counted), prompt=opening)

    def _turns(self, chat: Chat, messages: Messages, text: str, weights: Sequence[bool] | None) -> list[Span]:
        """Find the assistant's turns in a rendered chat; those without weight are left out."""
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not answers:
            return []
        spans = chat.marked_turns(messages)
        if spans is None:
            spans = Turns(chat, messages, text, self._special_tokens).assistants()
            return [span for index, span in zip(answers, spans, strict=True) if weights is None or weights[index]]
        if all(start >= stop for start, stop in spans):
            raise InputError(
                f"{chat.where}: the chat template marks none of this row's text as the assistant's "
                f"({{% generation %}}); set another template with {self.policy.names.template}, or "
                f"{self.policy.names.everything}"
            )
        if weights is None:
            return spans
        traced = chat.traced(messages)
        off = [traced.written(index) for index in answers if not weights[index]]
        if None in off:
            raise InputError(f"{chat.where}: the chat template does not show which text has no weight")
        return [span for span in spans if not any(part and part[0] <= span[0] < part[1] for part in off)]

    @cached_property
    def _special_tokens(self) -> list[str]:
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    @cached_property
    def _reserved(self) -> Collection[str]:
        """What a row cannot set for the chat template."""
        named = inspect.signature(self.tokenizer.apply_chat_template).parameters.values()
        fixed = {each.name for each in named if each.kind is not each.VAR_KEYWORD}
        return (fixed | {"messages"}) - {"documents"}

    def _check_template(self, layout: Layout, tools: list[Any] | None) -> None:
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
        several = self.tokenizer.chat_template
        if self.policy.template is None and isinstance(several, dict):
            if "default" in several or (tools and "tool_use" in several):
                return
            raise ConfigError(
                f"{layout.where}: the tokenizer has the chat templates {', '.join(several)}, but no default: set "
                f"another tokenizer or template with {self.policy.names.template}"
            )

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _tokenized(self, texts: Sequence[Text]) -> Iterable[TokenDocument]:
        """Tokenise texts that all have the same `special_tokens`."""
        if not texts:
            return
        offsets = any(text.counted for text in texts)
        encoded = self._encode(texts, [text.text for text in texts], offsets=offsets)
        prompted = [text for text in texts if text.prompt is not None]
        prompts = iter(self._encode(prompted, [str(text.prompt) for text in prompted])["input_ids"])
        for number, text in enumerate(texts):
            begin = self._doubled(text, encoded["input_ids"][number])
            ids = np.asarray(encoded["input_ids"][number][begin:], dtype=np.int32)
            masks = []
            for spans in text.counted:
                where = np.asarray(encoded["offset_mapping"][number][begin:]).reshape(-1, 2)
                masks.append(overlapping(where, spans))
            if text.prompt is not None:
                masks.append(np.arange(len(ids)) >= _common_prefix(next(prompts)[begin:], ids))
            yield TokenDocument(ids, text.where, np.all(masks, axis=0) if masks else None)

    def _doubled(self, text: Text, ids: Sequence[int]) -> int:
        """Return 1 if a text begins with the token for the beginning, and the tokenizer has put another before it."""
        begin = self.tokenizer.bos_token
        doubled = text.special_tokens and begin is not None and text.text.startswith(begin)
        return int(doubled and list(ids[:2]) == [self.tokenizer.bos_token_id] * 2)

    def _encode(self, texts: Sequence[Text], written: list[str], *, offsets: bool = False) -> Mapping[str, Any]:
        if not texts:
            return {"input_ids": []}
        options = {"add_special_tokens": texts[0].special_tokens, "verbose": False}
        if offsets:
            options["return_offsets_mapping"] = True
        encoded: Mapping[str, Any] = self.tokenizer(written, **options)
        return encoded


def _check_unicode(text: str, where: str) -> None:
    """Refuse halves of surrogate pairs, which JSON can contain, and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} of the text, {text[error.start]!r}, is half of a surrogate pair and no "
            "character"
        ) from error


def _common_prefix(ids: Sequence[int], others: npt.NDArray[np.int32]) -> int:
    """Return the length of the longest common prefix of two token sequences."""
    most = min(len(ids), len(others))
    differ = np.flatnonzero(np.asarray(ids[:most], dtype=np.int32) != others[:most])
    return int(differ[0]) if len(differ) else most

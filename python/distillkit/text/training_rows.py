"""Rows of text, chat or token ids → token ids and loss masks, as TRL's SFTTrainer makes them from the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import ConfigError, InputError
from distillkit.text.layouts import (
    CHATS,
    chat_messages,
    find_layout,
    given_ids,
    given_mask,
    read_messages,
    read_text,
    read_tools,
)
from distillkit.text.sources import Row
from distillkit.text.tokenizer import vocab_size

__all__ = ["RowTokenizer", "TextOptions", "Tokens"]

_COMPLETION = ("prompt", "completion")


@dataclass(frozen=True)
class TextOptions:
    """What decides how rows become token ids. Names in messages are those of `training_args`.

    Attributes:
        text_column: name of the column with plain text (dataset_text_field); if it is not "text", it goes before all
            others.
        completion_only: the loss is taken on completions alone (completion_only_loss); None: where rows have prompt and
            completion.
        assistant_only: the loss is taken on the assistant's turns alone (assistant_only_loss).
        tokenised: rows must be token ids already (dataset_kwargs: skip_prepare_dataset).
    """

    text_column: str = "text"
    completion_only: bool | None = None
    assistant_only: bool = False
    tokenised: bool = False


@dataclass(frozen=True)
class Tokens:
    """A row as token ids.

    Attributes:
        input_ids: (L,) int32.
        loss_mask: (L,) bool, which tokens are predicted; None means all.
        segment_lengths: (S,) int32, lengths of the documents packed in the row; None means one.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_] | None = None
    segment_lengths: npt.NDArray[np.int32] | None = None


class RowTokenizer:
    """Makes tokens of rows; goes to other processes.

    Args:
        tokenizer: a transformers tokenizer, perhaps with a chat template.
        options: see their class.

    Raises:
        ConfigError: the assistant's turns can not be told by the chat template.
    """

    def __init__(self, tokenizer: Any, options: TextOptions) -> None:
        self.tokenizer = tokenizer
        self.options = options
        text: tuple[str, ...] = (options.text_column,)
        first = [text] if options.text_column != "text" else []
        # Where a row has the columns of several, TRL takes chat before text.
        self._layouts = [("input_ids",), *first, _COMPLETION, *CHATS, text]
        self._understood = "; ".join(" + ".join(columns) for columns in dict.fromkeys([text, *self._layouts]))
        self.template = _marked_template(tokenizer) if options.assistant_only else None

    def __call__(self, rows: Sequence[Row]) -> list[Tokens | None]:
        """Return the tokens of each row; None for one without content.

        Raises:
            InputError: a row is not understood; the message names it, the columns found and those understood.
            ConfigError: an option does not fit the rows.
        """
        found: list[Tokens | None] = [None for _ in rows]
        texts: list[tuple[int, str]] = []
        for index, (where, row) in enumerate(rows):
            columns = find_layout(row, where, self._layouts, self._understood)
            if columns is None:
                continue
            self._check_options(columns, where)
            if columns == ("input_ids",):
                found[index] = self._given(row, where)
            elif columns == _COMPLETION:
                found[index] = self._completion(row, where)
            elif columns == (self.options.text_column,):
                text = read_text(row[columns[0]], where, columns[0])
                if text.strip():
                    texts.append((index, self._ended(text)))
            else:
                found[index] = self._chat(row, columns, where)
        if texts:
            encoded = self.tokenizer(text=[text for _, text in texts], verbose=False)["input_ids"]
            for (index, _), ids in zip(texts, encoded, strict=True):
                found[index] = Tokens(np.asarray(ids, dtype=np.int32))
        return found

    def _check_options(self, columns: tuple[str, ...], where: str) -> None:
        options, found = self.options, " + ".join(columns)
        if columns == ("input_ids",):
            return
        if options.tokenised:
            raise ConfigError(
                f"training_args.dataset_kwargs: skip_prepare_dataset is true, but {where} is a row of {found}, not of "
                "input_ids: leave it out"
            )
        if options.assistant_only and columns not in CHATS and columns != _COMPLETION:
            raise ConfigError(
                f"training_args.assistant_only_loss: needs chat rows, {where} is a row of {found}: leave it out"
            )
        if options.completion_only and columns != _COMPLETION:
            raise ConfigError(
                f"training_args.completion_only_loss: needs rows of prompt + completion, {where} is a row of {found}: "
                "leave it out"
            )

    def _ended(self, text: str) -> str:
        """Add the end of sequence to a text that does not have it."""
        eos = self.tokenizer.eos_token
        if eos is None:
            raise ConfigError(
                "the student's tokenizer has no end-of-sequence token to end plain text with: name one of its tokens "
                "as training_args.eos_token"
            )
        return text if text.endswith(eos) else text + str(eos)

    def _given(self, row: Mapping[str, Any], where: str) -> Tokens | None:
        """Take a tokenised row, with the masks or labels it may have."""
        parts = given_ids(row, where, vocab_size(self.tokenizer))
        if not parts:
            return None
        ids = np.concatenate(parts)
        kept = np.ones(len(row["input_ids"]), bool)
        if row.get("attention_mask") is not None:
            kept = np.asarray(row["attention_mask"]) != 0
        lengths = np.array([len(part) for part in parts], dtype=np.int32) if len(parts) > 1 else None
        return Tokens(ids, self._given_mask(row, kept, where), lengths)

    def _given_mask(
        self, row: Mapping[str, Any], kept: npt.NDArray[np.bool_], where: str
    ) -> npt.NDArray[np.bool_] | None:
        names = ["loss_mask"] if row.get("loss_mask") is not None else []
        if row.get("assistant_masks") is not None:
            names.append("assistant_masks")
        if self.options.completion_only is not False and row.get("completion_mask") is not None:
            names.append("completion_mask")
        for wanted, name in (
            (self.options.assistant_only, "assistant_masks"),
            (self.options.completion_only, "completion_mask"),
        ):
            if wanted and name not in names and row.get("labels") is None:
                raise ConfigError(
                    f"training_args: the loss is wanted on a part of the tokens, but {where} has neither labels nor "
                    f"{name}"
                )
        mask = given_mask(row, where, names)
        return None if mask is None else mask[kept]

    def _completion(self, row: Mapping[str, Any], where: str) -> Tokens | None:
        """Make tokens of a prompt and its completion, both text or both lists of messages."""
        from trl.data_utils import common_prefix_length

        assistant = None
        if isinstance(row["prompt"], str):
            prompt, completion = (read_text(row[name], where, name) for name in _COMPLETION)
            if not completion.strip():
                return None
            if self.options.assistant_only:
                raise ConfigError(
                    f"training_args.assistant_only_loss: needs chat rows, {where} is one of text: leave it out"
                )
            prompt_ids = self.tokenizer(text=prompt, verbose=False)["input_ids"]
            ids = self.tokenizer(text=prompt + self._ended(completion), verbose=False)["input_ids"]
        else:
            messages = [read_messages(row[name], where, name) for name in _COMPLETION]
            if not messages[1]:
                return None
            tools = read_tools(row["tools"], where) if row.get("tools") else None
            prompt_ids = self._render(messages[0], tools, row, where, add_generation_prompt=True)["input_ids"]
            rendered = self._render(messages[0] + messages[1], tools, row, where)
            ids, assistant = rendered["input_ids"], self._assistant_mask(rendered, where)
        mask = assistant
        if self.options.completion_only is not False:
            mask = np.arange(len(ids)) >= common_prefix_length(prompt_ids, ids)
            mask = mask if assistant is None else mask & assistant
        return Tokens(np.asarray(ids, dtype=np.int32), mask)

    def _chat(self, row: Mapping[str, Any], columns: tuple[str, ...], where: str) -> Tokens | None:
        messages, tools = chat_messages(row, columns, where)
        if not messages:
            return None
        rendered = self._render(messages, tools, row, where)
        ids = np.asarray(rendered["input_ids"], dtype=np.int32)
        if self.options.assistant_only and not any(message["role"] == "assistant" for message in messages):
            return Tokens(ids, np.zeros(len(ids), bool))
        return Tokens(ids, self._assistant_mask(rendered, where))

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, row: Mapping[str, Any], where: str, **more: Any
    ) -> Mapping[str, Any]:
        """Apply the chat template."""
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{where}: a chat needs a chat template, and the student's tokenizer has none; give one with "
                "training_args.chat_template_path"
            )
        try:
            rendered: Mapping[str, Any] = self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.template,
                tokenize=True,
                return_dict=True,
                return_assistant_tokens_mask=self.options.assistant_only and not more,
                **more,
                **(row.get("chat_template_kwargs") or {}),
            )
        except TemplateError as error:
            raise InputError(f"{where}: the tokenizer's chat template refuses this row: {error}") from error
        return rendered

    def _assistant_mask(self, rendered: Mapping[str, Any], where: str) -> npt.NDArray[np.bool_] | None:
        if not self.options.assistant_only:
            return None
        mask: npt.NDArray[np.bool_] = np.asarray(rendered["assistant_masks"], dtype=bool)
        if not mask.any():
            raise InputError(
                f"{where}: the chat template marks none of this row's tokens as the assistant's "
                "({% generation %}); use another template or leave training_args.assistant_only_loss out"
            )
        return mask


def _marked_template(tokenizer: Any) -> str | None:
    """Return a chat template that marks the assistant's tokens; None if the tokenizer's own does."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if not tokenizer.chat_template:
        raise ConfigError(
            "training_args.assistant_only_loss: the student's tokenizer has no chat template; give one with "
            "training_args.chat_template_path"
        )
    if has_generation_markers(tokenizer.chat_template):
        return None
    try:
        template: str | None = get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ConfigError(
            "training_args.assistant_only_loss: the tokenizer's chat template does not mark the assistant's tokens "
            f"({{% generation %}}), and TRL knows no variant of it that does; give one with "
            f"training_args.chat_template_path ({error})"
        ) from error
    return template

"""Rows of prompts → token ids to continue: what comes before the response, and nothing of the response itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from distillkit.errors import InputError
from distillkit.text.chat import Chat
from distillkit.text.layouts import (
    CHATS,
    before_messages,
    chat_messages,
    check_json,
    message_weights,
    read_messages,
    read_text,
    read_tools,
    template_options,
)
from distillkit.text.policy import ReadingPolicy, SettingNames
from distillkit.text.rows import Layout, RowReader, Text
from distillkit.text.sources import Row
from distillkit.types import TokenDocument

__all__ = ["PromptReader", "prompt_policy"]

_NAMES = SettingNames(
    assistant="",
    completion="",
    template="training_args.chat_template_path",
    everything="",
    columns="training_args.dataset_text_field",
    end="",
)


def prompt_policy(text_column: str = "text", *, text_first: bool = False) -> ReadingPolicy:
    """Return how rows of prompts are read.

    Args:
        text_column: the column with plain text, if there is no column `prompt`.
        text_first: that column comes before all others.
    """
    text = (text_column,)
    layouts = (("prompt",), *CHATS, text)
    return ReadingPolicy(_NAMES, tuple(dict.fromkeys([text, *layouts] if text_first else layouts)), text_column)


class PromptReader(RowReader):
    """Reads rows as prompts: a `prompt` (text or messages), a chat without the assistant's last turn, or plain text.

    Messages are rendered with the chat template, up to where the assistant's turn begins.

    Args:
        tokenizer, policy, id_limit: as for `RowReader`; see `prompt_policy`.
    """

    shortest = 1

    def __call__(self, rows: Sequence[Row]) -> list[list[TokenDocument]]:
        """Return the one prompt of each row, as a list of that.

        Raises:
            InputError: a row has no text, or an unknown format; the message names the row and what can be read.
            ConfigError: a chat has no template.
        """
        found = super().__call__(rows)
        for (where, row), documents in zip(rows, found, strict=True):
            if not documents or not len(documents[0].input_ids):
                filled = [name for name, value in row.items() if value] if not isinstance(row, InputError) else []
                known = "; ".join(" + ".join(columns) for columns in self.policy.layouts)
                columns = ", ".join(map(str, filled)) or "none"
                raise InputError(
                    f"{where}: this prompt has no text (columns with content: {columns}). "
                    f"Give it text or messages that end with the user's turn, in one of: {known}; or remove the row"
                )
        return found

    def _rendered(self, layout: Layout) -> Text | None:
        row, columns, where = layout.row, layout.columns, layout.where
        if columns == ("prompt",) and not isinstance(row["prompt"], str):
            tools = read_tools(row.get("tools"), where)
            messages = before_messages(row, where, read_messages(row["prompt"], where, "prompt"))
        elif columns in CHATS and columns != (self.policy.text_column,):
            messages, tools = chat_messages(row, columns, where)
        else:
            return Text(where, read_text(row[columns[0]], where, columns[0]), special_tokens=True)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            return None
        message_weights(messages, where)
        self._check_template(layout, tools)
        options = template_options(row, self._reserved, where)
        check_json({"messages": messages, "tools": tools, "chat_template_kwargs": options}, where)
        chat = Chat(self.tokenizer, self.policy.template, tools, options, where)
        messages, _ = chat.fit(messages)
        return Text(where, chat.render(messages, add_generation_prompt=True), special_tokens=False)

    def _tokenized(self, texts: Sequence[Text]) -> Iterable[TokenDocument]:
        """As in `RowReader`, without the end-of-sequence token that some tokenizers put after every text."""
        end = self.tokenizer.eos_token_id
        for text, document in zip(texts, super()._tokenized(texts), strict=True):
            added = text.special_tokens and not text.text.endswith(self.tokenizer.eos_token or "\0")
            ends = added and len(document.input_ids) and document.input_ids[-1] == end
            yield replace(document, input_ids=document.input_ids[:-1]) if ends else document

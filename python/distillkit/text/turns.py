"""Which characters of a rendered conversation an assistant wrote, and which tokens these are.

Either the chat template marks them (`{% generation %}`), or they are found by rendering the conversation up to a turn:
what is found is checked against the whole conversation's text, and a template that renders a turn in another way once
others follow is refused unless the turn's end can be told without doubt.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import InputError

__all__ = ["Chat", "Span", "opening", "overlapping", "rendered_turns"]

Span = tuple[int, int]
"""Characters from the first to before the last."""

Render = Callable[..., str]
"""Renders messages; takes `add_generation_prompt`."""

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Stands for a message's content. No template changes such a word, and no text has it.
_PLACEHOLDER = "distillkitplaceholdercontent7219"


@dataclass(frozen=True)
class Chat:
    """How a row's messages are rendered.

    Attributes:
        tokenizer: whose chat template it is.
        template: in place of the tokenizer's own; None: that.
        tools: definitions that the template is given.
        options: further variables of the template.
    """

    tokenizer: Any
    template: str | None
    tools: list[Any] | None
    options: Mapping[str, Any]

    def render(self, messages: Sequence[dict[str, Any]], **more: Any) -> str:
        """Return messages as text."""
        rendered = self.tokenizer.apply_chat_template(
            list(messages), tools=self.tools, chat_template=self.template, tokenize=False, **more, **self.options
        )
        return str(rendered)

    def marked_turns(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]] | None:
        """Return messages as text, and what the template marks in it, which may be empty; None if it marks nothing."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(self.template, self.tools)
        if _MARK.search(template) is None:
            return None
        texts, spans = render_jinja_template(
            conversations=[messages],
            tools=self.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.options},
        )
        return texts[0], list(spans[0])


def rendered_turns(
    messages: Sequence[dict[str, Any]], text: str, render: Render, special_tokens: Collection[str], where: str
) -> list[Span]:
    """Find the assistant's turns in a rendered conversation.

    A turn begins where the template would have the assistant begin (`add_generation_prompt`), and ends with all that
    the template writes after it before the next message: the token that ends a turn is part of it.

    Args:
        messages: the conversation.
        text: all of it, rendered.
        render: renders a part of it in the same way.
        special_tokens: among them the one that ends a turn.
        where: the row is, for messages.

    Raises:
        InputError: the template does not show where a turn begins or ends.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            turn = _Turn(messages, index, text, render, f"{where}, message {index}")
            start = turn.start()
            spans.append((start, turn.stop(start, special_tokens)))
    return spans


def opening(messages: Sequence[dict[str, Any]], text: str, render: Render, where: str) -> int:
    """Return where in `text` the assistant begins its answer to `messages`, with which it begins.

    Raises:
        InputError: it does not.
    """
    prompt = render(messages, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise _unclear(
            where,
            "the prompt that the chat template renders for this answer is not what the rendered conversation begins "
            "with",
        )
    return len(prompt)


@dataclass(frozen=True)
class _Turn:
    """Message `index` of a conversation, whose rendered text is `text`."""

    messages: Sequence[dict[str, Any]]
    index: int
    text: str
    render: Render
    where: str

    def start(self) -> int:
        before = self.messages[: self.index]
        prompt = self.render(before, add_generation_prompt=True)
        opens = prompt != self.render(before)  # not every template knows how an answer is opened
        if opens and self.text.startswith(prompt):
            return len(prompt)
        header = self._before_content(self.index)
        # One that does may open a new answer with more than it writes before one that is given, such as "<think>".
        if header is not None and (prompt.startswith(header) or not opens):
            return len(header)
        return opening(before, self.text, self.render, self.where)

    def stop(self, start: int, special_tokens: Collection[str]) -> int:
        closed = self.render(self.messages[: self.index + 1])
        if self.text.startswith(closed):
            return len(closed)
        ended = _without_last(closed, special_tokens)
        if self.text.startswith(ended) and len(ended) > start and ended.rstrip().endswith(tuple(special_tokens)):
            return len(ended)  # what is left out ends the whole conversation
        # A template may render a turn in another way where it is the last one, as thinking ones do. Its last special
        # token, with what follows it, must be there exactly once before the next message's content.
        endings = [closed.rindex(token) for token in special_tokens if token in closed[start:]]
        if self.index + 1 == len(self.messages) or not endings or not closed.startswith(self.text[:start]):
            raise _unclear(
                self.where, "the chat template ends this turn differently when the turn is rendered by itself"
            )
        ending = closed[max(endings) :]
        before_next = self._before_content(self.index + 1) or ""
        if before_next.count(ending, start) != 1:
            raise _unclear(
                self.where,
                f"the end of this turn ({ending!r}) does not occur exactly once before the next message in the "
                "rendered "
                "conversation",
            )
        return before_next.index(ending, start) + len(ending)

    def _before_content(self, index: int) -> str | None:
        """Return the text before a message's content; None if that can't be told."""
        replaced = {**self.messages[index], "content": _PLACEHOLDER}
        parts = self.render([*self.messages[:index], replaced, *self.messages[index + 1 :]]).split(_PLACEHOLDER)
        return parts[0] if len(parts) == 2 and self.text.startswith(parts[0]) else None


def _without_last(text: str, tokens: Collection[str]) -> str:
    """Return text without the token it ends with, if it ends with one."""
    return next((text[: -len(token)] for token in tokens if text.endswith(token)), text)


def _unclear(where: str, why: str) -> InputError:
    return InputError(
        f"{where}: {why}, so the assistant's tokens cannot be identified. Use a tokenizer (--tokenizer) whose chat "
        "template "
        "marks them with {% generation %}, or capture with --loss-on all"
    )


def overlapping(offsets: npt.NDArray[Any], spans: Sequence[Span], *, empty: bool) -> npt.NDArray[np.bool_]:
    """Return which tokens have a character in one of the spans.

    A token that reaches over a span's border is counted: some of it must be predicted.

    Args:
        offsets: (L, 2) first character of each token, and the one after its last; equal for tokens of no character.
        spans: in the same text.
        empty: whether tokens without characters count inside a span.
    """
    begin, end = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), bool)
    for start, stop in spans:
        mask |= (begin < stop) & (end > start)
    return mask if empty else mask & (end > begin)

"""Finds the assistant's characters in a rendered conversation, and the tokens they belong to.

Either the chat template marks them (`{% generation %}`), or they are found by rendering the conversation up to each
turn and checking the result against the complete text. A template that renders a turn differently once others follow
is rejected, unless the end of the turn is still unambiguous.
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
"""(start, stop) character range; stop is exclusive."""

Render = Callable[..., str]
"""Renders messages; takes `add_generation_prompt`."""

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Stands in for a message's content: no template alters such a word, and no text contains it.
_PLACEHOLDER = "distillkitplaceholdercontent7219"


@dataclass(frozen=True)
class Chat:
    """How a row's messages are rendered.

    Attributes:
        tokenizer: renders with its chat template.
        template: template to use instead of the tokenizer's own; None: the tokenizer's.
        tools: tool definitions to pass to the template.
        options: further template variables.
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
        """Return the rendered messages and the spans that the template marks; None if it has no generation markers."""
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

    A turn begins where generation would begin (`add_generation_prompt`), and includes everything that the template
    writes before the next message, such as the end-of-turn token.

    Args:
        messages: the conversation.
        text: the rendered conversation.
        render: renders part of the conversation in the same way.
        special_tokens: the tokenizer's special tokens, including the one that ends a turn.
        where: location of the row, for messages.

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
    """Return where in `text`, which begins with `messages`, the assistant's answer to them begins.

    Raises:
        InputError: `text` does not begin with the rendered messages.
    """
    prompt = render(messages, add_generation_prompt=True)
    if not text.startswith(prompt):
        raise _unclear(
            where,
            "the rendered conversation does not begin with the prompt that the chat template renders for this answer",
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
        opens = prompt != self.render(before)  # not every template has a generation prompt
        if opens and self.text.startswith(prompt):
            return len(prompt)
        header = self._before_content(self.index)
        # A generation prompt may contain more than the template writes before an existing answer, such as "<think>".
        if header is not None and (prompt.startswith(header) or not opens):
            return len(header)
        return opening(before, self.text, self.render, self.where)

    def stop(self, start: int, special_tokens: Collection[str]) -> int:
        closed = self.render(self.messages[: self.index + 1])
        if self.text.startswith(closed):
            return len(closed)
        ended = _without_last(closed, special_tokens)
        if self.text.startswith(ended) and len(ended) > start and ended.rstrip().endswith(tuple(special_tokens)):
            return len(ended)  # the dropped token ends the conversation, not the turn
        # A template may render the last turn differently, as those of thinking models do. Then the turn's last special
        # token and what follows it must occur exactly once before the next message's content.
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
                "rendered conversation",
            )
        return before_next.index(ending, start) + len(ending)

    def _before_content(self, index: int) -> str | None:
        """Return the text before a message's content; None if it cannot be determined."""
        replaced = {**self.messages[index], "content": _PLACEHOLDER}
        parts = self.render([*self.messages[:index], replaced, *self.messages[index + 1 :]]).split(_PLACEHOLDER)
        return parts[0] if len(parts) == 2 and self.text.startswith(parts[0]) else None


def _without_last(text: str, tokens: Collection[str]) -> str:
    """Return the text without its last token, if it ends with one of `tokens`."""
    return next((text[: -len(token)] for token in tokens if text.endswith(token)), text)


def _unclear(where: str, why: str) -> InputError:
    return InputError(
        f"{where}: {why}, so the assistant's tokens cannot be identified. Use a tokenizer (--tokenizer) whose chat "
        "template marks them with {% generation %}, or capture with --loss-on all"
    )


def overlapping(offsets: npt.NDArray[Any], spans: Sequence[Span], *, empty: bool) -> npt.NDArray[np.bool_]:
    """Return which tokens overlap one of the spans, (L,) bool.

    A token that crosses the border of a span counts, since part of it must be predicted.

    Args:
        offsets: (L, 2) start and stop character of each token; equal for tokens without characters.
        spans: character spans of the same text.
        empty: whether tokens without characters count inside a span.
    """
    begin, end = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), bool)
    for start, stop in spans:
        mask |= (begin < stop) & (end > start)
    return mask if empty else mask & (end > begin)

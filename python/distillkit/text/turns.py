"""Finds the assistant's characters in a rendered conversation, and the tokens they belong to.

Either the chat template marks them (`{% generation %}`), or they are found by following the template: its syntax tree
is extended so that its output records which message wrote what. What stays unclear is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import InputError
from distillkit.text.chat import Chat, Messages, Span, Traced, common_prefix

__all__ = ["Turns", "overlapping"]

# Stands in for a message's content: no template alters such a word, and no text contains it.
_PLACEHOLDER = "distillkitplaceholdercontent7219"
_REASONING = ("reasoning_content", "reasoning", "thinking")


class Turns:
    """The messages in a rendered conversation.

    An assistant's turn begins where generation would begin (`add_generation_prompt`), and includes everything that the
    template writes for the message, such as the end-of-turn token.

    Args:
        chat: renders the conversation.
        messages: the conversation, in the form that the template takes.
        text: the rendered conversation.
        special_tokens: the tokenizer's special tokens.

    Raises:
        InputError: the template does not show which message wrote what.
    """

    def __init__(self, chat: Chat, messages: Messages, text: str, special_tokens: Collection[str]) -> None:
        self._chat, self._messages, self._text = chat, messages, text
        self._special_tokens = special_tokens
        self._inside, self._traced = self._follow()
        self._other = self._with_placeholders()
        self._prompt = self._other.text[self._other.loop_end :]

    def assistants(self) -> list[Span]:
        """Return the spans of the assistant's turns.

        Raises:
            InputError: the template does not show where a turn begins or ends.
        """
        turns = [index for index, message in enumerate(self._messages) if message["role"] == "assistant"]
        return [(self.start(index), self._stop(index)) for index in turns]

    def start(self, index: int) -> int:
        """Return where a message begins: an assistant's where it would begin to generate.

        Raises:
            InputError: the template does not show it.
        """
        start, stop = self._written(index)
        if self._messages[index]["role"] != "assistant":
            return start
        return start + self._header(index, self._text[start:stop])

    def _follow(self) -> tuple[bool, Traced]:
        """Render the conversation once more, and record which message wrote what."""
        turns = [index for index, message in enumerate(self._messages) if message["role"] == "assistant"]
        found = None
        for inside in (False, True):
            traced = self._chat.traced(self._messages, inside=inside)
            if traced.text == self._text:
                found = found or (inside, traced)
                if all(traced.written(index) for index in turns):
                    return inside, traced
        if found is None:
            raise self._unclear(None, "the chat template renders the conversation differently when it is followed")
        return found

    def _written(self, index: int) -> Span:
        span = self._traced.written(index)
        if span is None:
            raise self._unclear(index, "the chat template writes nothing for this message, or not in one piece")
        return span

    def _with_placeholders(self) -> Traced:
        """Render the conversation with other answers and without reasoning, each followed by another turn."""
        other = []
        for message in self._messages:
            if message["role"] == "assistant":
                given = [{"type": "text", "text": _PLACEHOLDER}]
                content = given if isinstance(message.get("content"), list) else _PLACEHOLDER
                message = {name: value for name, value in message.items() if name not in _REASONING}
                message["content"] = content
            other.append(message)
        if other[-1]["role"] == "assistant":
            users = [message for message in other if message["role"] == "user"]
            other.append(users[-1] if users else {"role": "user", "content": _PLACEHOLDER})
        return self._chat.traced(other, inside=self._inside, add_generation_prompt=True)

    def _header(self, index: int, turn: str) -> int:
        """Return how much of a turn comes before what the assistant generates."""
        span = self._other.written(index)
        other = "" if span is None else self._other.text[slice(*span)]
        before, found, _ = other.partition(_PLACEHOLDER)
        # The first message may write what begins every conversation, such as a default system prompt.
        first = _overlap(before, self._prompt)
        if found and first > 0 and turn.startswith(before[:first]):
            return first + self._after_prompt(index, turn[first:], before[first:], found)
        return self._after_prompt(index, turn, before, found)

    def _after_prompt(self, index: int, turn: str, before: str, found: str) -> int:
        """Return how much of a turn comes before what the assistant generates, given what comes before an answer."""
        if self._prompt and turn.startswith(self._prompt):
            return len(self._prompt)
        # A generation prompt may contain more than the template writes before an answer, such as "<think>", or belong
        # to the turn before.
        known = [before, *([self._prompt] if common_prefix([self._prompt, turn]) else [])]
        header = common_prefix([turn, *known])
        if header in known and (found or header == self._prompt):
            return len(header)
        if not self._prompt and not found:
            raise self._unclear(index, "the chat template does not show where this turn begins")
        ends = [header.rfind(end) + len(end) for end in ("\n", *self._special_tokens) if end in header]
        return max(ends, default=0)

    def _stop(self, index: int) -> int:
        start, stop = self._written(index)
        if index + 1 == len(self._messages):
            return len(self._text)
        # A template may write what belongs to the next message, such as a tool's answer, while it is at this one.
        try:
            closed = self._chat.render(self._messages[: index + 1])
        except InputError:
            closed = ""
        if start < len(closed) <= stop and self._text.startswith(closed):
            return len(closed)
        if self._messages[index + 1]["role"] != "assistant" and self._traced.written(index + 1) is None:
            raise self._unclear(index, "the chat template does not show where this turn ends")
        return stop

    def _unclear(self, index: int | None, why: str) -> InputError:
        where = self._chat.where if index is None else f"{self._chat.where}, message {index}"
        return InputError(
            f"{where}: {why}, so the assistant's tokens cannot be identified. Use a tokenizer (--tokenizer) whose chat "
            "template marks them with {% generation %}, or capture with --loss-on all"
        )


def _overlap(before: str, prompt: str) -> int:
    """Return where a prompt begins in a text, of which it may only begin at the end; 0 if it does not."""
    starts = (
        start for start in range(len(before)) if prompt and prompt.startswith(before[start : start + len(prompt)])
    )
    return next(starts, 0)


def overlapping(offsets: npt.NDArray[Any], spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """Return which tokens overlap one of the spans, (L,) bool, as Transformers does.

    A token that crosses the border of a span counts, since part of it must be predicted. So does one without characters
    inside a span: some tokenizers trim white space from the offsets of their tokens.

    Args:
        offsets: (L, 2) start and stop character of each token; equal for tokens without characters.
        spans: character spans of the same text.
    """
    begin, end = offsets[:, 0], offsets[:, 1]
    mask = np.zeros(len(offsets), bool)
    for start, stop in spans:
        mask |= (begin < stop) & (end > start)
    return mask

"""Renders conversations with a tokenizer's chat template, in the form that the template takes.

The same conversation can be written in several ways: a turn without text has no content, or null, or ""; the arguments
of a tool call are a mapping or JSON text; text is a string or a list of parts. Templates differ in which of these they
accept; given another, they fail, write Python source or leave something out.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distillkit.errors import InputError

__all__ = ["Chat", "Messages", "Span", "Traced"]

Messages = list[dict[str, Any]]

Span = tuple[int, int]
"""(start, stop) character range; stop is exclusive."""

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
# Stands in for the names of tool calls: no template alters such a word, and no text contains it.
_NAME = "distillkitplaceholdername"

# Written into the text by a traced template: a loop begins or ends, a message begins. All are in Unicode's private use.
_LOOP, _LOOP_END, _MESSAGE = "\uf8f1", "\uf8f2", "\uf8f3"
_TRACE = re.compile(f"{_LOOP}|{_LOOP_END}|{_MESSAGE}(\\d+){_MESSAGE}")
_TRACER = "distillkit_trace"


class _UnfitFormError(InputError):
    """A chat template renders a form of the messages, but not all of it, or not as it should be.

    Args:
        what: what is wrong.
        place: indices of the message and of the tool call in the conversation.
        value: what is written wrongly or not at all.
    """

    def __init__(self, what: str, place: tuple[int, int], value: object) -> None:
        super().__init__(f"{what}: message {place[0]}, {value!r:.200}")
        self.place = place


@dataclass
class Traced:
    """A rendered conversation of which it is known what each message wrote.

    Attributes:
        text: the rendered conversation.
        loop_end: where the last loop over messages ends; what follows was written after all messages.
    """

    text: str
    loop_end: int = 0
    _pieces: dict[int, list[Span]] = field(default_factory=dict)

    def add(self, message: int, start: int, stop: int) -> None:
        """Record that a message wrote text[start:stop]."""
        pieces = self._pieces.setdefault(message, [])
        if pieces and pieces[-1][1] == start:
            start = pieces.pop()[0]
        if stop > start:
            pieces.append((start, stop))

    def written(self, message: int) -> Span | None:
        """Return what a message wrote; None if that is nothing, or not in one piece."""
        pieces = self._pieces.get(message, [])
        return pieces[0] if len(pieces) == 1 else None


@dataclass(frozen=True)
class Chat:
    """How a row's messages are rendered.

    Attributes:
        tokenizer: renders with its chat template.
        template: template to use instead of the tokenizer's own; None: the tokenizer's.
        tools: tool definitions to pass to the template.
        options: further template variables.
        where: location of the row, for messages.
    """

    tokenizer: Any
    template: str | None
    tools: list[Any] | None
    options: Mapping[str, Any]
    where: str

    def render(self, messages: Sequence[dict[str, Any]], **more: Any) -> str:
        """Return messages as text.

        Raises:
            InputError: the template fails.
        """
        # Before Transformers renders, it drops keys without a value. Some templates want to see that content is null.
        null = any(message.get("content", "") is None for message in messages)
        try:
            if null:
                return self._render_with(messages, **more)[0][0]
            rendered = self.tokenizer.apply_chat_template(
                list(messages), tools=self.tools, chat_template=self.template, tokenize=False, **more, **self.options
            )
        except Exception as error:  # templates are programs: they raise whatever their expressions raise
            raise self._rejected(error) from error
        return str(rendered)

    def _render_with(self, messages: Sequence[dict[str, Any]], **more: Any) -> tuple[list[str], list[list[Span]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: tuple[list[str], list[list[Span]]] = render_jinja_template(
            conversations=[list(messages)],
            tools=self.tools,
            chat_template=self.source,
            **{**self.tokenizer.special_tokens_map, **self.options, **more},
        )
        return rendered

    def _rejected(self, error: Exception) -> InputError:
        reason = f"{error}" if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {error}"
        return InputError(f"{self.where}: the tokenizer's chat template rejects this row: {reason}")

    # -- the form that the template takes ------------------------------------------------------------------------------

    def fit(self, messages: Messages) -> tuple[Messages, str]:
        """Return messages in the form that the template takes, and the rendered text.

        Raises:
            InputError: in every form the template fails, writes Python source, or leaves out a tool call.
        """
        failures: list[InputError] = []
        unfit: list[_UnfitFormError] = []
        incomplete: tuple[Messages, str] | None = None
        for form in _forms(messages):
            try:
                text = self.render(form)
                self._check_source(form, text)
                self._check_calls(form, text)
            except _UnfitFormError as error:
                unfit.append(error)
                continue
            except InputError as error:
                failures.append(error)
                continue
            if _has_all_content(form, text):
                return form, text
            # Templates may leave something out on purpose, such as what was thought in earlier turns.
            incomplete = incomplete or (form, text)
        if incomplete is None:
            # The form that came furthest says best what is wrong.
            raise InputError(str(max(unfit, key=lambda error: error.place))) if unfit else failures[0]
        return incomplete

    def _check_source(self, messages: Messages, text: str) -> None:
        """Refuse text in which the template wrote a value as Python source instead of its content."""
        for index, message in enumerate(messages):
            values = [message.get("content")]
            values += [call["function"]["arguments"] for call in message.get("tool_calls") or ()]
            for value in values:
                if isinstance(value, (list, dict)) and str(value) != json.dumps(value) and str(value) in text:
                    raise _UnfitFormError(f"{self.where}: the chat template writes Python source", (index, 0), value)
        if "None" not in text or all(message.get("content", "") is not None for message in messages):
            return
        try:
            other = self.render([_empty_text(message) for message in messages])
        except InputError:
            return
        if text.count("None") > other.count("None"):
            missing = next(n for n, message in enumerate(messages) if message.get("content", "") is None)
            raise _UnfitFormError(f"{self.where}: the chat template writes None as content", (missing, 0), None)

    def _check_calls(self, messages: Messages, text: str) -> None:
        """Refuse text that lacks a tool call."""
        names: list[tuple[int, str]] = []
        renamed = []
        for index, message in enumerate(messages):
            calls = []
            for call in message.get("tool_calls") or ():
                calls.append({**call, "function": {**call["function"], "name": f"{_NAME}{len(names)}x"}})
                names.append((index, call["function"]["name"]))
            renamed.append({**message, "tool_calls": calls} if calls else message)
        if not names:
            return
        try:
            other = self.render(renamed)
        except InputError:
            written = [name in text for _, name in names]
        else:
            written = [f"{_NAME}{number}x" in other for number in range(len(names))]
        if not all(written):
            number = written.index(False)
            index, name = names[number]
            raise _UnfitFormError(
                f"{self.where}: the chat template leaves out a tool call (it may take none, one per message, or only "
                "messages without content)",
                (index, number),
                name,
            )

    # -- which message wrote what --------------------------------------------------------------------------------------

    @property
    def source(self) -> str:
        """The template."""
        return str(self.tokenizer.get_chat_template(self.template, self.tools))

    def marked_turns(self, messages: Messages) -> list[Span] | None:
        """Return the spans that the template marks in the rendered messages; None if it has no generation markers."""
        if _GENERATION.search(self.source) is None:
            return None
        try:
            _, [spans] = self._render_with(messages, return_assistant_tokens_mask=True)
        except Exception as error:
            raise self._rejected(error) from error
        return list(spans)

    def traced(self, messages: Messages, *, inside: bool = False, **more: Any) -> Traced:
        """Render messages and record what each of them wrote: what the template writes while it loops over it.

        Args:
            messages: the conversation.
            inside: also follow loops in macros and in what is written into variables. Templates may compare or measure
                that, and then render something else.

        Raises:
            InputError: the template fails.
        """
        from transformers.utils import chat_template_utils

        # Later releases of Transformers let templates find reasoning under each of its names.
        alias = getattr(chat_template_utils, "_alias_reasoning_fields", list)
        objects = [dict(message) for message in alias(messages)]
        numbers = {id(message): number for number, message in enumerate(objects)}

        def trace(value: object, messages: object = None) -> str:
            if isinstance(messages, list) and isinstance(value, int) and 0 <= value < len(messages):
                value = messages[value]
            return f"{_MESSAGE}{numbers[id(value)]}{_MESSAGE}" if id(value) in numbers else ""

        variables = {"documents": None, "add_generation_prompt": False, **self.tokenizer.special_tokens_map}
        variables |= {**self.options, **more, "messages": objects, "tools": self.tools, _TRACER: trace}
        try:
            return _read_trace(_tracing_template(self.source, inside).render(variables))
        except Exception as error:
            raise self._rejected(error) from error


@functools.lru_cache(maxsize=32)
def _tracing_template(source: str, inside: bool) -> Any:
    """Compile a chat template so that it writes where its loops begin and end, and over which message they loop."""
    from jinja2 import Template, nodes
    from jinja2.visitor import NodeTransformer
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def lists(loop: nodes.For, number: str) -> Iterator[str]:
        """Yield the names of what a loop over numbers reads: those of lists in list[number]."""
        for item in loop.find_all(nodes.Getitem):
            if isinstance(item.node, nodes.Name) and isinstance(item.arg, nodes.Name) and item.arg.name == number:
                yield item.node.name

    class Tracing(NodeTransformer):
        def visit_For(self, node: nodes.For) -> list[nodes.Node]:  # noqa: N802 (Jinja's name)
            self.generic_visit(node)
            if isinstance(node.target, nodes.Name):
                name = node.target.name
                arguments = [nodes.Name(each, "load") for each in (name, *itertools.islice(lists(node, name), 1))]
                call = nodes.Call(nodes.Name(_TRACER, "load"), arguments, [], None, None)
                node.body.insert(0, nodes.Output([call]))
            around = [nodes.Output([nodes.TemplateData(mark)]) for mark in (_LOOP, _LOOP_END)]
            return [around[0], node, around[1]]

        def keep(self, node: nodes.Node) -> nodes.Node:
            return self.generic_visit(node) if inside else node

        visit_Macro = visit_AssignBlock = visit_FilterBlock = keep  # noqa: N815 (Jinja's names)

    environment = _compile_jinja_template(source).environment
    tree = Tracing().visit(environment.parse(source))
    for node in tree.find_all(nodes.Node):
        if node.lineno is None:
            node.lineno = 1
    tree.set_environment(environment)
    return Template.from_code(environment, environment.compile(tree), environment.make_globals(None))


def _read_trace(output: str) -> Traced:
    """Take the marks out of a traced template's output."""
    traced = Traced("")
    loops: list[int | None] = []
    texts, length, position = [], 0, 0
    for mark in itertools.chain(_TRACE.finditer(output), [None]):
        piece = output[position : mark.start() if mark else len(output)]
        texts.append(piece)
        owner = next((number for number in reversed(loops) if number is not None), None)
        if owner is not None:
            traced.add(owner, length, length + len(piece))
        length += len(piece)
        if mark is None:
            break
        position = mark.end()
        if mark.group() == _LOOP:
            loops.append(None)
        elif mark.group() == _LOOP_END:
            if loops.pop() is not None:
                traced.loop_end = length
        else:
            loops[-1] = int(mark.group(1))
    traced.text = "".join(texts)
    return traced


# -- forms -------------------------------------------------------------------------------------------------------------


def _forms(messages: Messages) -> Iterator[Messages]:
    """Yield a conversation in the forms that templates take, without repetition."""
    seen: list[Messages] = []
    # Most templates take text; those of vision models may only take parts.
    contents = (_joined, _as_given, _in_parts, _all_text)
    empties = (_without_null, _null_content, _empty_text, _without_content)
    for content, empty, arguments in itertools.product(contents, empties, (_parsed, _as_text)):
        form = [arguments(content(empty(message))) for message in messages]
        if form not in seen:
            seen.append(form)
            yield form


def _as_given(message: dict[str, Any]) -> dict[str, Any]:
    return message


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    parts = _text_parts(message)
    return message if parts is None else {**message, "content": "".join(parts)}


def _all_text(message: dict[str, Any]) -> dict[str, Any]:
    """Also write a tool's answer that is an object as JSON."""
    joined = _joined(message)
    if isinstance(joined.get("content", ""), (str, type(None))):
        return joined
    return {**joined, "content": json.dumps(joined["content"], ensure_ascii=False)}


def _text_parts(message: dict[str, Any]) -> list[str] | None:
    """Return the texts of content in parts; None for other content."""
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        return [part["text"] for part in content]
    return None


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _without_null(message: dict[str, Any]) -> dict[str, Any]:
    """Leave out content that is null, as Transformers does."""
    return message if message["content"] is not None else {k: v for k, v in message.items() if k != "content"}


def _without_content(message: dict[str, Any]) -> dict[str, Any]:
    return _without_null(_null_content(message))


def _null_content(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": None} if message.get("tool_calls") and not message["content"] else message


def _empty_text(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": ""} if message.get("content", "") is None else message


def _parsed(message: dict[str, Any]) -> dict[str, Any]:
    return _with_arguments(message, lambda value: json.loads(value) if isinstance(value, str) else value)


def _as_text(message: dict[str, Any]) -> dict[str, Any]:
    return _with_arguments(
        message, lambda value: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    )


def _with_arguments(message: dict[str, Any], convert: Any) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": convert(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


def _has_all_content(messages: Messages, text: str) -> bool:
    """Whether the text has the end of each message's content.

    Templates may leave out what comes before, such as the reasoning of earlier turns, and what only has that.
    """
    for message in messages:
        content, parts = message.get("content"), _text_parts(message)
        if parts is None:
            parts = [content] if isinstance(content, str) else []
        ends = [part.strip().rpartition("\n")[2].strip()[-50:] for part in parts]
        if not all(end in text or end.endswith(">") for end in ends):
            return False
    return True


def common_prefix(texts: Sequence[str]) -> str:
    """Return the longest common prefix of texts."""
    length = 0
    for characters in zip(*texts, strict=False):
        if len(set(characters)) > 1:
            break
        length += 1
    return texts[0][:length]

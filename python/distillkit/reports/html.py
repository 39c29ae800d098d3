"""Builds pages of HTML that need nothing but themselves. Whatever is put into an element is escaped, unless it is an
element itself."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from distillkit import __version__
from distillkit.errors import printable

__all__ = ["Html", "Section", "element", "joined", "page", "paragraph", "table", "token", "write_page"]

_VOID = ("input", "link", "meta")


class Html(str):
    """Text that is HTML already, and is not escaped again."""

    __slots__ = ()


Content = str | Iterable[str]


def element(name: str, *content: Content, **attributes: object) -> Html:
    """Make an element. Text in it and values of attributes are escaped, control characters are written as escapes.

    Args:
        name: its name.
        content: texts, elements, or lists of these.
        attributes: its attributes: `class_` is class, `data_values` is data-values. Those that are None or False are
            left out; those that are True have no value.

    Returns:
        The element.

    >>> element("p", "1 < 2, ", element("b", "really"), title='"')
    '<p title="&quot;">1 &lt; 2, <b>really</b></p>'
    """
    written = [name]
    for key, value in attributes.items():
        key = key.strip("_").replace("_", "-")
        if value is True:
            written.append(key)
        elif value is not None and value is not False:
            written.append(f"{key}={_quoted(str(value))}")
    opening = f"<{' '.join(written)}>"
    return Html(opening if name in _VOID else f"{opening}{joined(*content)}</{name}>")


def joined(*content: Content) -> Html:
    """Join texts and elements; texts are escaped."""
    parts: list[str] = []
    for each in content:
        if isinstance(each, Html):
            parts.append(each)
        elif isinstance(each, str):
            parts.append(_escaped(each))
        else:
            parts += [joined(part) for part in each]
    return Html("".join(parts))


def _escaped(text: str) -> str:
    return html.escape(printable(text), quote=False)


def _quoted(text: str) -> str:
    """Quote the value of an attribute, with the quotation mark that is not in JSON if the value is that."""
    escaped = _escaped(text)
    if text.startswith("{"):
        return "'" + escaped.replace("'", "&#39;") + "'"
    return '"' + escaped.replace('"', "&quot;") + '"'


def paragraph(*content: Content, class_: str | None = None) -> Html:
    """Make a paragraph."""
    return element("p", *content, class_=class_)


def token(text: str | None, number: int | None = None) -> Html:
    """Write a token so that its blanks and line feeds are seen.

    Args:
        text: its text, None if that is not known.
        number: its id, which is shown if it has no text, or only a part of a character.
    """
    if text is None or (number is not None and text == "\ufffd"):
        return element("code", f"#{number}", class_="token")
    shown = text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")
    return element("code", shown or "(empty)", class_="token")


def table(
    caption: str,
    header: Sequence[Content],
    rows: Iterable[Sequence[Content]],
    *,
    hidden: bool = False,
    narrow: bool = False,
) -> Html:
    """Make a table that scrolls sideways by itself where it is too wide. The first cell of a row is its header.

    Args:
        caption: what it shows.
        header: heads of the columns; none if empty.
        rows: the cells of each row.
        hidden: whether the caption is only for screen readers.
        narrow: whether it is never too wide. Others can be reached with the keyboard, to be scrolled.
    """
    head = element("thead", element("tr", [element("th", cell, scope="col") for cell in header])) if header else ""
    body = [
        element("tr", element("th", first, scope="row"), [element("td", cell) for cell in cells])
        for first, *cells in rows
    ]
    title = element("caption", caption, class_="unseen" if hidden else None)
    content = element("table", title, head, element("tbody", body))
    if narrow:
        return element("div", content, class_="scroll")
    return element("div", content, class_="scroll", tabindex=0, role="group", aria_label=caption)


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        key: its id.
        heading: its heading, and its name in the list of sections.
        content: what it contains.
        wide: whether it needs the whole width; others are beside each other where there is room.
    """

    key: str
    heading: str
    content: Html
    wide: bool = True


def page(title: str, introduction: Html, sections: Sequence[Section]) -> str:
    """Make a page, with a list of its sections. Its policy forbids all requests, and all scripts but its own.

    Args:
        title: its title.
        introduction: what follows the title.
        sections: its sections; those without content are left out.
    """
    style, script = _asset("page.css"), _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    shown = [section for section in sections if section.content]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name_="color-scheme", content="light dark"),
        element("title", title),
        # Without an icon, browsers would ask the server for one.
        element("link", rel="icon", href="data:,"),
        element("style", Html(style)),
    )
    links = [element("li", element("a", section.heading, href=f"#{section.key}")) for section in shown]
    content = [
        element(
            "section",
            element("h2", each.heading, id=f"{each.key}-heading"),
            each.content,
            id=each.key,
            class_="wide" if each.wide else None,
            aria_labelledby=f"{each.key}-heading",
        )
        for each in shown
    ]
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", element("h1", title), introduction),
        element("nav", element("ul", links), aria_label="Sections"),
        element("main", content, id="content", tabindex=-1),
        element("footer", paragraph(f"distillkit {__version__}")),
        element("script", Html(script)),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _asset(name: str) -> str:
    return (resources.files(__package__) / name).read_text(encoding="utf-8")


def write_page(path: Path, content: str) -> None:
    """Write a page, in place of an earlier one.

    Raises:
        OSError: the file cannot be written.
    """
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(content, encoding="utf-8")
    unfinished.replace(path)

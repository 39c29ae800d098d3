"""Panels: single plots, each of which is part of a picture (PNG) or a chart of a page (HTML)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Panel"]


@dataclass(frozen=True)
class Panel:
    """A plot that has something to show.

    Attributes:
        title: its title.
        draw: draws it on matplotlib axes. Lines with a label are data. If such a line is smoothed, the line before
            it has the values that were recorded, and `_` and its label as label.
        form: format string for its values.
        along: name of what is on the horizontal axis.
        along_form: format string for that.
        note: a sentence below the chart of a page.
    """

    title: str
    draw: Callable[[Any], None]
    form: str = "{:.4f}"
    along: str = "step"
    along_form: str = "{:,.0f}"
    note: str = ""

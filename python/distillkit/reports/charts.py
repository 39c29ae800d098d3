"""Charts for pages: a panel drawn by matplotlib as SVG, whose colours are the page's, with its values for hovering,
for the keyboard and as a table."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distillkit.reports.html import Html, element, paragraph, table
from distillkit.reports.inspection_plots import BLUE, GREEN, GREY, INK, ORANGE
from distillkit.reports.panels import Panel
from distillkit.reports.run_plots import step_axis

__all__ = ["chart"]

_WIDTH, _HEIGHT, _TEXT = 352, 220, 11
"""In CSS pixels: as wide as the content of a page of 400 pixels, where text is then this large."""
_POINTS, _ROWS = 200, 40
"""The most points of a chart that can be read off, and rows of its table; evenly spread, with both ends."""
_COLOURS = {
    BLUE: "blue",
    ORANGE: "orange",
    GREEN: "green",
    "#a05195": "purple",
    "#56b4e9": "sky",
    GREY: "grey",
    INK: "ink",
    "#000000": "ink",
    "#e4e7eb": "grid",
}
"""The plots' colours as variables of page.css, which differ between light and dark."""


@dataclass(frozen=True)
class _Line:
    """A line that was drawn.

    Attributes:
        label: its name.
        look: its style.
        values: its values by their place on the horizontal axis.
        heights: where they are in the picture, in pixels from the top.
    """

    label: str
    look: str
    values: dict[float, float]
    heights: dict[float, float]


def chart(panel: Panel, number: int) -> Html:
    """Draw a panel as a figure of a page.

    Args:
        panel: the panel; its lines with labels can be read off.
        number: its number on the page.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure, axes = _drawn(panel)
    picture = _svg(figure, salt=f"chart {number}")
    lines = _lines(axes, picture)
    everything = sorted({x for line in lines for x in line.values})
    points = _spread(everything, _POINTS)
    data = _readings(panel, axes, lines, points)
    content = [
        element("figcaption", element("h3", panel.title)),
        _picture(picture, panel, lines),
        _key(axes, lines, panel),
    ]
    if panel.note:
        content.append(paragraph(panel.note, class_="soft"))
    if len(points) > 1:
        last = f"{panel.along} {data['along'][-1]}"
        label = element("label", element("span", last, class_="place"), _slider(panel, len(points)))
        content.append(element("div", label, class_="reading"))
    if lines:
        content.append(_values(panel, lines, everything))
    return element("figure", content, class_="chart", data_values=json.dumps(data, separators=(",", ":")))


def _readings(panel: Panel, axes: Any, lines: Sequence[_Line], points: Sequence[float]) -> dict[str, Any]:
    """What page.js shows at each point: where it is, what it is, and the values of the lines there."""
    bottom = axes.get_ylim()[0]
    return {
        "bottom": round(float(_HEIGHT - axes.transAxes.transform((0, 0))[1]), 1),
        "along": [panel.along_form.format(x) for x in points],
        "name": panel.along,
        "x": [round(float(axes.transData.transform((x, bottom))[0]), 1) for x in points],
        "lines": [
            {
                "label": line.label,
                "y": [line.heights.get(x) for x in points],
                "values": [_written(line, x, panel.form) for x in points],
            }
            for line in lines
        ],
    }


def _drawn(panel: Panel) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(_WIDTH / 72, _HEIGHT / 72), dpi=72, layout="constrained")
    axes = figure.subplots()
    panel.draw(axes)
    if panel.along == "step":
        step_axis(axes)
    axes.set_title("", loc="left")
    axes.set_xlabel(axes.get_xlabel() or panel.along, color=INK, fontsize=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=_TEXT)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.yaxis.label.set_fontsize(_TEXT)
    for text in axes.texts:
        text.set_fontsize(_TEXT)
    legend = axes.get_legend()
    if legend is not None:
        legend.remove()  # the page has its own, with values
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    for index, line in enumerate(axes.lines):
        line.set_gid(f"line-{index}")
    return figure, axes


def _svg(figure: Any, *, salt: str) -> str:
    """Draw a figure as an SVG element, with text as text and without what concerns a file of its own."""
    import matplotlib

    file = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r"<style type=\"text/css\">.*?</style>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # A hundredth of a pixel is enough.
    return re.sub(r'\b(?:d|x|y)="[^"]*"', lambda place: re.sub(r"(\.\d\d)\d+", r"\1", place[0]), svg)


def _coloured(svg: str) -> str:
    """Replace the colours of styles by the page's variables."""

    def variable(match: re.Match[str]) -> str:
        name = _COLOURS.get(match[0])
        return match[0] if name is None else f"var(--{name})"

    return re.sub(r'style="[^"]*"', lambda style: re.sub(r"(?<=: )#[0-9a-f]{6}\b", variable, style[0]), svg)


def _lines(axes: Any, svg: str) -> list[_Line]:
    """The lines with labels. A line that is smoothed has the values that were recorded."""
    height = axes.figure.bbox.height
    lines = []
    for index, line in enumerate(axes.lines):
        label = str(line.get_label())
        if label.startswith("_"):
            continue
        before = axes.lines[index - 1]
        recorded = before if index and before.get_label() == f"_{label}" else line
        x, y = (np.asarray(data, dtype=float) for data in recorded.get_data())
        places = axes.transData.transform(np.stack([x, y], -1))[:, 1]
        heights = {
            at: round(float(height - place), 1)
            for at, place in zip(x.tolist(), places, strict=True)
            if math.isfinite(place)
        }
        look = re.search(rf'<g id="line-{index}">.*?<path d="[^"]*"[^>]*style="([^"]*)"', svg, re.DOTALL)
        values = dict(zip(x.tolist(), y.tolist(), strict=True))
        # A line of one value has no path, only a marker.
        lines.append(_Line(_unescaped(label), look[1] if look else f"stroke: {line.get_color()}", values, heights))
    return lines


def _unescaped(label: str) -> str:
    """Undo what `plot_text` does for matplotlib."""
    return label.replace(r"\$", "$").strip()


def _spread(values: list[float], most: int) -> list[float]:
    if len(values) <= most:
        return values
    return [values[index] for index in np.linspace(0, len(values) - 1, most).round().astype(int).tolist()]


def _written(line: _Line, x: float, form: str) -> str:
    return form.format(line.values[x]) if x in line.values else "–"


def _picture(svg: str, panel: Panel, lines: Sequence[_Line]) -> Html:
    """The picture with a text that says what it shows."""
    said = [f"{panel.title}."]
    for line in lines:
        first, last = min(line.values), max(line.values)
        ends = [
            f"{_written(line, x, panel.form)} at {panel.along} {panel.along_form.format(x)}"
            for x in dict.fromkeys((first, last))
        ]
        said.append(f"{line.label}: {', '.join(ends)}.")
    # Ids of groups would repeat on the page; those of markers and clips have the salt.
    svg = re.sub(r'<g id="[^"]*"', "<g", _coloured(svg))
    body = svg[svg.index(">") + 1 : svg.rindex("</svg>")]
    return element(
        "svg", Html(body), viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=" ".join(said), class_="plot"
    )


def _key(axes: Any, lines: Sequence[_Line], panel: Panel) -> Html:
    """What the lines and areas are, with the last value of each line."""
    entries = []
    for line in lines:
        value = element("b", _written(line, max(line.values), panel.form), class_="value")
        entries.append(element("li", _sample("M0 4h28", line.look), element("span", line.label), value))
    for area in axes.collections:
        label = str(area.get_label())
        if not label.startswith("_"):
            *colour, opacity = area.get_facecolor()[0].tolist()
            code = "#" + "".join(f"{round(255 * part):02x}" for part in colour)
            look = f"fill: {code}; fill-opacity: {opacity}"
            entries.append(element("li", _sample("M0 0h28v8H0z", look), element("span", label)))
    return element("ul", entries, class_="key")


def _sample(shape: str, look: str) -> Html:
    """A piece of a line or an area as it is drawn."""
    path = element("path", d=shape, style=look)
    return Html(_coloured(element("svg", path, class_="sample", viewBox="0 0 28 8", aria_hidden="true")))


def _slider(panel: Panel, count: int) -> Html:
    """Moves along the values; shown by the script."""
    return element(
        "input",
        type="range",
        min=0,
        max=count - 1,
        value=count - 1,
        step=1,
        hidden=True,
        aria_label=f"{panel.along}: values of {panel.title}",
    )


def _values(panel: Panel, lines: Sequence[_Line], everything: list[float]) -> Html:
    shown = _spread(everything, _ROWS)
    some = "" if len(shown) == len(everything) else f" ({len(shown)} of {len(everything):,})"
    rows = [[panel.along_form.format(x), *(_written(line, x, panel.form) for line in lines)] for x in shown]
    content = table(panel.title, [panel.along, *(line.label for line in lines)], rows, hidden=True)
    return element("details", element("summary", f"Values{some}"), element("div", content, class_="numbers"))

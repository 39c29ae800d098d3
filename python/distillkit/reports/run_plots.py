"""Plots of training runs, as PNG files. Importing this module does not import matplotlib; drawing does.

Lines in a plot differ in dash pattern and lightness as well as in colour.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import InputError
from distillkit.reports.inspection_plots import BLUE, GREEN, INK, ORANGE, plot_text, style_axes
from distillkit.reports.panels import Panel
from distillkit.reports.run_record import RunRecord

__all__ = [
    "comparison_panels",
    "plot_comparison",
    "plot_quality",
    "plot_speed",
    "quality_panels",
    "speed_panels",
    "step_axis",
]

_COLOURS = (BLUE, ORANGE, GREEN, "#a05195", INK, "#56b4e9")
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 2, 1, 2)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = "osD^vP"
# Values that span more than this factor are drawn on a logarithmic axis.
_WIDE = 8.0
# With at least this many values, a line shows their running mean, with the values themselves behind it.
_MANY = 80


def plot_quality(run: RunRecord, path: Path) -> None:
    """Plot a run's losses, divergence from the teacher, agreement, and probability of the teacher's top tokens.

    Raises:
        InputError: there are no values to plot.
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    _save(_picture(quality_panels(run)), path)


def plot_speed(run: RunRecord, path: Path) -> None:
    """Plot a run's throughput, time spent waiting for data, learning rate and gradient norm.

    Raises:
        InputError: there are no values to plot.
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    _save(_picture(speed_panels(run)), path)


def plot_comparison(runs: Sequence[RunRecord], names: Sequence[str], path: Path) -> None:
    """Plot the results of several runs on held-out documents, and their throughput.

    Raises:
        InputError: there are no values to plot.
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure = _picture(comparison_panels(runs, names), legend=True)
    lines: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        lines = dict(zip(labels, handles, strict=True)) | lines
    if lines:
        style = {"loc": "lower center", "ncols": min(len(lines), 4), "frameon": False, "labelcolor": INK}
        figure.legend(list(lines.values()), list(lines), **style)
    _save(figure, path)


# -- panels ------------------------------------------------------------------------------------------------------------


def quality_panels(run: RunRecord) -> list[Panel]:
    """The panels of `plot_quality`, without those for which the run has no values."""
    where = "held out" if run.evaluations else "training"
    agreement = _measured(run, {"top1_agreement": "top-1 agreement", "topk_overlap": "overlap of top tokens"})
    mass = {} if run.all_ids else _measured(run, {"student_mass": "student", "teacher_mass": "teacher"})
    panels = []
    if any(run.series(name)[1] for name in ("loss", *run.parts)):
        panels.append(Panel("Training losses", lambda axes: _losses(axes, run)))
    divergences = _divergences(run)
    if divergences:
        title = f"KL and cross-entropy, {where} (nats)"
        panels.append(Panel(title, lambda axes: _draw_divergences(axes, run, divergences)))
    if agreement:
        title = f"Agreement with the teacher, {where}"
        panels.append(Panel(title, lambda axes: _draw_shares(axes, run, agreement, zero=True), "{:.2%}"))
    if mass:
        title = f"Probability of the teacher's top tokens, {where}"
        panels.append(Panel(title, lambda axes: _draw_shares(axes, run, mass, zero=False), "{:.2%}"))
    own = {"before": run.series("rollout_kl"), "after training on them": run.series("rollout_kl_after")}
    if all(values for _, values in own.values()):
        title = "KL(student ‖ teacher) on completions by the student (nats)"
        panels.append(Panel(title, lambda axes: _draw_rounds(axes, own)))
    return panels


def speed_panels(run: RunRecord) -> list[Panel]:
    """The panels of `plot_speed`, without those for which the run has no values."""
    return [
        Panel(title, functools.partial(_draw_speed, run=run, name=name, title=title, form=form), form)
        for name, title, form in (
            ("tokens_per_second", "Tokens per second", "{:,.0f}"),
            ("data_wait", "Fraction of time spent waiting for data", "{:.1%}"),
            ("teacher_wait", "Fraction of time spent waiting for the teacher", "{:.1%}"),
            ("learning_rate", "Learning rate", "{:.3g}"),
            ("grad_norm", "Gradient norm", "{:.3g}"),
        )
        if run.series(name)[1]
    ]


def comparison_panels(runs: Sequence[RunRecord], names: Sequence[str]) -> list[Panel]:
    """The panels of `plot_comparison`, without those for which no run has values."""
    panels = []
    for name, title, held_out, form in (
        ("eval_kl", "KL(teacher ‖ student), held out (nats)", True, "{:.4f}"),
        ("eval_cross_entropy", "Cross-entropy, held out (nats)", True, "{:.4f}"),
        ("eval_top1_agreement", "Top-1 agreement with the teacher, held out", True, "{:.2%}"),
        ("tokens_per_second", "Tokens per second", False, "{:,.0f}"),
    ):
        lines = [run.series(name, held_out=held_out) for run in runs]
        if any(values for _, values in lines):
            draw = functools.partial(_compared, lines=lines, names=names, held_out=held_out, form=form)
            panels.append(Panel(title, draw, form))
    return panels


def _losses(axes: Any, run: RunRecord) -> None:
    """The training loss and its parts; each part is an unweighted mean."""
    everything: list[float] = []
    parts = [name for name in run.parts if len(run.parts) > 1]
    for number, name in enumerate(("loss", *parts)):
        steps, values = run.series(name)
        if values:
            weight = run.parts.get(name)
            label = plot_text(name) if weight is None else f"{plot_text(name)} (× {weight:.3g})"
            _line(axes, steps, values, number, "total" if name == "loss" and parts else label)
            everything += values
    _wide_axis(axes, everything)
    if parts:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)


Series = dict[str, tuple[list[int], list[float]]]
"""Steps and values by label."""


def _divergences(run: RunRecord) -> Series:
    """KL and cross-entropy on held-out documents, or in training if there are none."""
    lines = {"kl": "KL(teacher ‖ student)", "cross_entropy": "cross-entropy", "kl_with_rest": "KL with the rest"}
    found = _measured(run, lines)
    # Of a teacher with all ids, there is no rest.
    if found.get(lines["kl_with_rest"]) == found.get(lines["kl"]):
        found.pop(lines["kl_with_rest"], None)
    return found


def _measured(run: RunRecord, lines: dict[str, str]) -> Series:
    """Metrics by their labels, on held-out documents or in training if there are none."""
    held_out = bool(run.evaluations)
    found = {
        label: run.series(f"eval_{name}" if held_out else name, held_out=held_out) for name, label in lines.items()
    }
    return {label: series for label, series in found.items() if series[1]}


def _draw_divergences(axes: Any, run: RunRecord, lines: Series) -> None:
    held_out = bool(run.evaluations)
    for number, (label, (steps, values)) in enumerate(lines.items()):
        _line(axes, steps, values, number, label, marked=held_out)
        if held_out and number < 2:
            # KL is the lower of the two.
            _label_last(axes, steps, values, "{:.3g}", above=number > 0)
    _wide_axis(axes, [value for _, values in lines.values() for value in values])
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _draw_rounds(axes: Any, lines: Series) -> None:
    for number, (label, (steps, values)) in enumerate(lines.items()):
        _line(axes, steps, values, number, label, marked=True)
    _wide_axis(axes, [value for _, values in lines.values() for value in values])
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _draw_shares(axes: Any, run: RunRecord, lines: Series, *, zero: bool) -> None:
    for number, (label, (steps, values)) in enumerate(lines.items()):
        _line(axes, steps, values, number, label, marked=bool(run.evaluations))
    _share_axis(axes, [value for _, values in lines.values() for value in values], zero=zero)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


def _draw_speed(axes: Any, *, run: RunRecord, name: str, title: str, form: str) -> None:
    steps, values = run.series(name)
    _line(axes, steps, values, 0, title, smooth=name != "learning_rate")
    axes.yaxis.set_major_formatter(_formatter(form))
    if name == "grad_norm":
        _wide_axis(axes, values)
    elif name in ("data_wait", "teacher_wait"):
        _share_axis(axes, values, zero=True)
    else:
        axes.set_ylim(0, 1.08 * max(values) or 1.0)


def _compared(
    axes: Any, *, lines: Sequence[tuple[list[int], list[float]]], names: Sequence[str], held_out: bool, form: str
) -> None:
    everything: list[float] = []
    for number, ((steps, values), label) in enumerate(zip(lines, names, strict=True)):
        if values:
            _line(axes, steps, values, number, plot_text(label), marked=held_out)
            everything += values
    if form.endswith("%}"):
        _share_axis(axes, everything, zero=True)
    elif held_out:
        _wide_axis(axes, everything)
    else:
        axes.yaxis.set_major_formatter(_formatter(form))
        axes.set_ylim(0, 1.08 * max(everything) or 1.0)


# -- parts of a panel --------------------------------------------------------------------------------------------------


def _picture(panels: Sequence[Panel], *, legend: bool = False) -> Any:
    """Draw panels side by side, two in a row, with room below for a shared legend if requested."""
    from matplotlib.figure import Figure

    if not panels:
        raise InputError("the runs have no values to plot")
    columns, rows = min(len(panels), 2), -(-len(panels) // 2)
    height = 3.4 * rows + 0.3 * legend
    # Created without pyplot, so there is no global state and no display.
    figure: Any = Figure(figsize=(5.5 * columns, height), dpi=110)
    # Fixed margins, since computing them (layout="constrained") would draw everything twice.
    bottom = 0.5 + 0.32 * legend
    figure.subplots_adjust(
        left=0.15 / columns,
        right=1 - 0.03 / columns,
        top=1 - 0.34 / height,
        bottom=bottom / height,
        wspace=0.17,
        hspace=0.27,
    )
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, axes in zip(panels, grid, strict=False):
        panel.draw(axes)
        style_axes(axes, panel.title)
        step_axis(axes)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes in figure.axes[-columns:]:
        axes.set_xlabel("step", color=INK)
    return figure


def step_axis(axes: Any) -> None:
    """Write steps as whole numbers. A single one is shown between the beginning and itself, not within a step."""
    from matplotlib.ticker import MaxNLocator

    steps = {step for line in axes.lines for step in line.get_xdata()}
    if len(steps) == 1:
        axes.set_xlim(0, 1.1 * max(steps.pop(), 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))


def _save(figure: Any, path: Path) -> None:
    # Replaced atomically, so that a viewer never sees half a picture while training is running.
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)


def _line(
    axes: Any,
    steps: list[int],
    values: list[float],
    number: int,
    label: str,
    *,
    marked: bool = False,
    smooth: bool = True,
) -> None:
    """Plot a metric over steps; with many values, their running mean, and the values themselves faintly behind it."""
    look = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _DASHES[number % len(_DASHES)], "lw": 1.7}
    if marked or len(values) == 1:
        look |= {"marker": _MARKERS[number % len(_MARKERS)], "ms": 5}
    if smooth and not marked and len(values) >= _MANY:
        axes.plot(steps, values, color=look["color"], lw=0.7, alpha=0.3, label=f"_{label}")
        values = _running_mean(values).tolist()
    axes.plot(steps, values, label=label, **look)


def _running_mean(values: list[float]) -> npt.NDArray[np.float64]:
    """Average each value with its neighbours, of which there are fewer at the ends."""
    reach = max(len(values) // 60, 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    start, stop = np.maximum(at - reach, 0), np.minimum(at + reach + 1, len(values))
    means: npt.NDArray[np.float64] = (sums[stop] - sums[start]) / (stop - start)
    return means


def _label_last(axes: Any, steps: list[int], values: list[float], form: str, *, above: bool) -> None:
    """Label the last point with its value."""
    place = {"xytext": (-6, 7 if above else -14), "textcoords": "offset points", "ha": "right"}
    axes.annotate(form.format(values[-1]), (steps[-1], values[-1]), fontsize=9, color=INK, **place)


def _wide_axis(axes: Any, values: list[float]) -> None:
    """Use a logarithmic axis for values that span a large factor, with room above and below."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = min(values), max(values)
    if low > 0 and high / low > _WIDE:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.5, high * 1.5)
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(_formatter("{:.3g}"))
    else:
        margin = 0.15 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - margin if low < margin else max(0.0, low - margin), high + margin)


def _formatter(form: str) -> Any:
    return lambda value, _: form.format(value) if value else "0"


def _share_axis(axes: Any, values: list[float], *, zero: bool) -> None:
    """Use an axis in percent, with as many decimals as its ticks need."""
    low, high = min(values), max(values)
    # Where all are 0, the ticks are whole percents.
    margin = max(0.08 * (high - low), 0.02 * high, 1e-6) if high else 0.05
    low, high = 0.0 if zero else max(0.0, low - margin), min(high + margin, 1.02)
    axes.set_ylim(low, high)
    decimals = max(0, math.ceil(-math.log10(100 * (high - low) / 8)))
    axes.yaxis.set_major_formatter(_formatter(f"{{:.{decimals}%}}"))

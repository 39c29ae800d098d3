"""Plots of training runs, as PNG files. Importing this module does not import matplotlib; drawing does.

Lines in a plot differ in dash pattern and lightness as well as in colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.reports.inspection_plots import BLUE, GREEN, GREY, INK, ORANGE, plot_text, style_axes
from distillkit.reports.run_record import RunRecord

__all__ = ["plot_comparison", "plot_quality", "plot_speed"]

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
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure, axes = _figure()
    held_out = bool(run.evaluations)
    _losses(axes[0, 0], run)
    _divergence(axes[0, 1], run)
    _shares(
        axes[1, 0], run, (("top1_agreement", "top-1 agreement"), ("topk_overlap", "overlap of top tokens")), zero=True
    )
    style_axes(axes[1, 0], f"Agreement with the teacher{_where(held_out)}")
    _shares(axes[1, 1], run, (("student_mass", "student"), ("teacher_mass", "teacher")), zero=False)
    style_axes(axes[1, 1], f"Probability of the teacher's top tokens{_where(held_out)}")
    _save(figure, path)


def plot_speed(run: RunRecord, path: Path) -> None:
    """Plot a run's throughput, time spent waiting for data, learning rate and gradient norm.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure, axes = _figure()
    for place, name, title, form in (
        ((0, 0), "tokens_per_second", "Tokens per second", "{:,.0f}"),
        ((0, 1), "data_wait", "Fraction of time spent waiting for data", "{:.0%}"),
        ((1, 0), "learning_rate", "Learning rate", "{:.3g}"),
        ((1, 1), "grad_norm", "Gradient norm", "{:.3g}"),
    ):
        panel = axes[place]
        steps, values = run.series(name)
        if values:
            _line(panel, steps, values, 0, None, smooth=name != "learning_rate")
            panel.yaxis.set_major_formatter(_formatter(form))
            if name == "grad_norm":
                _wide_axis(panel, values)
            else:
                panel.set_ylim(0, max(1.08 * max(values), 0.1 if name == "data_wait" else 0.0) or 1.0)
        else:
            _empty(panel)
        style_axes(panel, title)
    _save(figure, path)


def plot_comparison(runs: Sequence[RunRecord], names: Sequence[str], path: Path) -> None:
    """Plot the results of several runs on held-out documents, and their throughput.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    figure, axes = _figure(legend=True)
    for place, name, title, held_out, form in (
        ((0, 0), "eval_kl", "KL(teacher ‖ student), held out (nats)", True, None),
        ((0, 1), "eval_cross_entropy", "Cross-entropy, held out (nats)", True, None),
        ((1, 0), "eval_top1_agreement", "Top-1 agreement with the teacher, held out", True, "{:.0%}"),
        ((1, 1), "tokens_per_second", "Tokens per second", False, "{:,.0f}"),
    ):
        panel = axes[place]
        everything: list[float] = []
        for number, (run, label) in enumerate(zip(runs, names, strict=True)):
            steps, values = run.series(name, held_out=held_out)
            if values:
                _line(panel, steps, values, number, plot_text(label), marked=held_out)
                everything += values
        if not everything:
            _empty(panel)
        elif form is None:
            _wide_axis(panel, everything)
        else:
            panel.yaxis.set_major_formatter(_formatter(form))
            panel.set_ylim(0, 1.08 * max(everything) or 1.0)
        style_axes(panel, title)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if not handles:
        handles, labels = axes[1, 1].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="lower center", ncols=min(len(labels), 4), frameon=False, labelcolor=INK)
    _save(figure, path)


# -- panels ------------------------------------------------------------------------------------------------------------


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
    if everything:
        _wide_axis(axes, everything)
        if parts:
            axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    else:
        _empty(axes)
    style_axes(axes, "Training losses")


def _divergence(axes: Any, run: RunRecord) -> None:
    """KL and cross-entropy on held-out documents, or in training if there are none."""
    held_out = bool(run.evaluations)
    lines = {"KL(teacher ‖ student)": "kl", "cross-entropy": "cross_entropy", "KL with the rest": "kl_with_rest"}
    everything: dict[str, list[float]] = {}
    for number, (label, name) in enumerate(lines.items()):
        steps, values = run.series(f"eval_{name}" if held_out else name, held_out=held_out)
        # Of a teacher with all ids, there is no rest.
        if values and values != everything.get("kl"):
            _line(axes, steps, values, number, label, marked=held_out)
            everything[name] = values
            if held_out and name != "kl_with_rest":
                # KL is the lower of the two.
                _label_last(axes, steps, values, "{:.3g}", above=number > 0)
    if everything:
        _wide_axis(axes, [value for values in everything.values() for value in values])
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    else:
        _empty(axes)
    style_axes(axes, f"KL and cross-entropy{_where(held_out)} (nats)")


def _shares(axes: Any, run: RunRecord, names: Sequence[tuple[str, str]], *, zero: bool) -> None:
    """Plot metrics between 0 and 1, on held-out documents or in training if there are none."""
    held_out = bool(run.evaluations)
    everything: list[float] = []
    for number, (name, label) in enumerate(names):
        steps, values = run.series(f"eval_{name}" if held_out else name, held_out=held_out)
        if values:
            _line(axes, steps, values, number, label, marked=held_out)
            everything += values
    if not everything:
        _empty(axes)
        return
    low, high = min(everything), max(everything)
    margin = max(0.08 * (high - low), 0.01)
    axes.set_ylim(0.0 if zero else max(0.0, low - margin), min(high + margin, 1.02))
    axes.yaxis.set_major_formatter(_formatter("{:.0%}" if high - (0.0 if zero else low) > 0.05 else "{:.1%}"))
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)


# -- parts of a panel --------------------------------------------------------------------------------------------------


def _figure(*, legend: bool = False) -> tuple[Any, Any]:
    """Four panels, with room below for a shared legend if requested."""
    from matplotlib.figure import Figure

    # Created without pyplot, so there is no global state and no display.
    figure: Any = Figure(figsize=(11, 6.8), dpi=110)
    # Fixed margins, since computing them (layout="constrained") would draw everything twice.
    figure.subplots_adjust(
        left=0.075, right=0.985, top=0.95, bottom=0.075 + 0.05 * legend, wspace=0.17, hspace=0.27 + 0.02 * legend
    )
    axes = figure.subplots(2, 2)
    for panel in axes[-1]:
        panel.set_xlabel("step", color=INK)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    for panel in figure.axes:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    # Replaced atomically, so that a viewer never sees half a picture while training is running.
    unfinished = path.with_name(f".{path.name}")
    figure.savefig(unfinished, format="png")
    unfinished.replace(path)


def _line(
    axes: Any,
    steps: list[int],
    values: list[float],
    number: int,
    label: str | None,
    *,
    marked: bool = False,
    smooth: bool = True,
) -> None:
    """Plot a metric over steps; with many values, their running mean, and the values themselves faintly behind it."""
    look = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _DASHES[number % len(_DASHES)], "lw": 1.7}
    if marked or len(values) == 1:
        look |= {"marker": _MARKERS[number % len(_MARKERS)], "ms": 5}
    if smooth and not marked and len(values) >= _MANY:
        axes.plot(steps, values, color=look["color"], lw=0.7, alpha=0.3)
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
    place = {"xytext": (0, 8 if above else -15), "textcoords": "offset points", "ha": "right"}
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


def _empty(axes: Any) -> None:
    axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_yticks([])


def _where(held_out: bool) -> str:
    return ", held out" if held_out else ", training"

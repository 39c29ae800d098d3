"""Plots of a dataset, as PNG files. Importing this module does not import matplotlib; drawing does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import InputError, printable
from distillkit.reports.inspection import Inspection
from distillkit.reports.panels import Panel

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "INK",
    "ORANGE",
    "inspection_panels",
    "plot_inspection",
    "plot_text",
    "style_axes",
]

BLUE, ORANGE, GREEN, GREY, INK = "#2f6db3", "#d9822b", "#3c9a5f", "#9aa3ad", "#3d4752"
_LONGEST_NAME = 60
_STRONG, _LIGHT = (BLUE, ORANGE, "#7b5ea7", GREEN), ("#a9c3e2", "#f0cda5", "#cdc1de", "#b4dcc3")


def plot_inspection(inspection: Inspection, path: str | Path) -> None:
    """Plots the average distribution with the codec's error, the stored probability, and what takes how many bytes.

    Raises:
        InputError: there are no rows to plot.
        ModuleNotFoundError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    if not inspection.rows_read:
        raise InputError(f"{inspection.path}: contains no distributions, so there is nothing to plot")
    # Created without pyplot, so there is no global state and no display.
    figure: Any = Figure(figsize=(15, 5.2), dpi=120, layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[1.3, 1, 0.85])
    # The shares of draws sum to 1, whatever the teacher says.
    draw = _mass if inspection.draws is None else _effort
    draw(middle.subplots(), inspection)
    if _curves(inspection):
        upper, lower = left.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        _error(lower, inspection)
    else:
        upper = lower = left.subplots()
    _distribution(upper, inspection)
    _rank_axis(lower, len(inspection.logprob_mean))
    _bytes(right.subplots(), inspection)
    figure.suptitle(_title(inspection), fontsize=13, fontweight="bold", color=INK)
    figure.savefig(path, format="png")


def inspection_panels(inspection: Inspection) -> list[Panel]:
    """The plots of `plot_inspection` that are curves, one by one."""

    def by_rank(draw: Callable[[Any, Inspection], None]) -> Callable[[Any], None]:
        def panel(axes: Any) -> None:
            draw(axes, inspection)
            _rank_axis(axes, len(inspection.logprob_mean))
            for text in list(axes.texts):
                text.remove()  # too long for a small chart, where the note has it

        return panel

    exact, k = inspection.codec["config"].get("exact_k", 0), inspection.k
    note = f"Ranks up to {exact} (dashed line) are stored as values, the others as a curve." if 0 < exact < k else ""
    panels = [Panel("Average distribution by rank", by_rank(_distribution), "{:.3f}", "rank", note=note)]
    if _curves(inspection):
        panels.append(Panel("The codec's rms error by rank (nats)", by_rank(_error), "{:.2e}", "rank", note=note))
    if inspection.draws is None:
        title = "Stored probability"
        panels.append(Panel(title, lambda axes: _mass(axes, inspection), "{:.2%}", "stored probability", "{:.2%}"))
    rates = inspection.rate_by_entropy
    if len(rates) > 1:
        title = "Bytes per distribution by its entropy"
        panels.append(Panel(title, lambda axes: _rates(axes, rates), "{:,.0f}", "entropy (nats)", "{:.1f}"))
    return panels


def _effort(axes: Any, inspection: Inspection) -> None:
    _rates(axes, inspection.rate_by_entropy)
    axes.set_xlabel("entropy (nats)", color=INK)
    style_axes(axes, "Bytes per distribution by its entropy")


def _rates(axes: Any, rates: Sequence[tuple[float, float]]) -> None:
    """Bytes of rows of varying size, against their entropy."""
    axes.plot(*zip(*rates, strict=True), color=BLUE, lw=1.4, marker="o", ms=5, label="bytes, mean")
    axes.set_ylim(0, 1.08 * max(size for _, size in rates))


def plot_text(name: object) -> str:
    """Write a name so that a plot shows it as it is: $ begins no formula, and _ at the start does not hide a label."""
    text = printable(str(name)).replace("\n", " ").replace("$", r"\$")
    text = text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}…"
    return f" {text}" if text.startswith("_") else text


def _title(inspection: Inspection) -> str:
    title = f"{plot_text(Path(inspection.path).name)}: {inspection.rows:,} distributions"
    if inspection.teacher is not None and inspection.teacher.get("name"):
        title += f" of {plot_text(inspection.teacher['name'])}"
    if inspection.documents_read < inspection.documents:
        title += f" (sample of {inspection.documents_read:,} documents)"
    return title


def _curves(inspection: Inspection) -> dict[str, npt.NDArray[np.float64]]:
    """Fidelity by rank, compared with the original; empty if that is not available."""
    return {} if inspection.fidelity is None else inspection.fidelity.by_rank()


def style_axes(axes: Any, title: str) -> None:
    """Set the title of a plot and apply the common style."""
    axes.set_title(title, fontsize=11, loc="left", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


# -- left: values ------------------------------------------------------------------------------------------------------


def _distribution(axes: Any, inspection: Inspection) -> None:
    curves = _curves(inspection)
    ranks = np.arange(1, len(inspection.logprob_mean) + 1)
    if curves:
        middle, spread, error = curves["mean"], curves["std"], curves["rms_error"]
        low, high = middle - spread, middle + spread
        about, band, line = "", "original, ± 1 standard deviation", "original, mean"
    else:
        low, middle, high = inspection.logprob_quantiles
        about = " (the codec's error is not recorded)" if inspection.draws is None else " (shares of the draws)"
        band, line = "stored, 10% to 90%", "stored, median"
    axes.fill_between(ranks, low, high, color=BLUE, alpha=0.15, lw=0, label=band)
    if curves:
        axes.fill_between(ranks, middle - error, middle + error, color=ORANGE, lw=0, label="codec, ± rms error")
    axes.plot(ranks, middle, color=BLUE, lw=1.4, label=line)
    axes.set_ylabel("log-probability (nats)", color=INK)
    style_axes(axes, f"Average distribution by rank{about}")
    axes.legend(frameon=False, fontsize=9, loc="lower left", labelcolor=INK)
    _mark_exact(axes, inspection, label=True)


def _error(axes: Any, inspection: Inspection) -> None:
    error = _curves(inspection)["rms_error"]
    ranks = np.arange(1, len(error) + 1)
    axes.fill_between(ranks, error, color=ORANGE, alpha=0.35, lw=0)
    axes.plot(ranks, error, color=ORANGE, lw=1.4, label="rms error")
    # Values stored in float32 have no error at all, but the axis still needs a range.
    axes.set_ylim(0, 1.15 * max(float(np.nanmax(error)), 1e-6))
    axes.set_ylabel("nats", color=INK)
    style_axes(axes, "The codec's rms error by rank")
    _mark_exact(axes, inspection, label=False)


def _mark_exact(axes: Any, inspection: Inspection, *, label: bool) -> None:
    k = inspection.k
    exact = int(inspection.codec["config"].get("exact_k", k))
    if not 0 < exact < k:
        return
    axes.axvline(exact + 0.5, color=GREY, ls="--", lw=1)
    if label:
        what = "1st rank stored as a value," if exact == 1 else f"first {exact} ranks stored as values,"
        # On the side with more room, given the logarithmic axis.
        side, shift = ("right", -4) if exact**2 >= 2 * k else ("left", 4)
        style = {"ha": side, "va": "top", "fontsize": 9, "color": INK, "textcoords": "offset points"}
        top = axes.get_xaxis_transform()
        axes.annotate(f"{what}\nthe others as a curve", (exact + 0.5, 1.0), (shift, -2), xycoords=top, **style)


def _rank_axis(axes: Any, k: int) -> None:
    axes.set_xscale("log")
    axes.set_xlim(0.93, 1.07 * max(k, 2))
    ticks = [2**power for power in range(k.bit_length())]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("rank", color=INK)


# -- middle: mass ------------------------------------------------------------------------------------------------------


def _mass(axes: Any, inspection: Inspection) -> None:
    counts = inspection.mass_histogram
    share = np.cumsum(counts) / max(counts.sum(), 1)
    mass = np.arange(len(counts)) / (len(counts) - 1)
    # Starts where a thousandth of the positions is reached, with room for the label of the 1st percentile.
    low = float(mass[np.argmax(share > 0.001)])
    low = max(0.0, min(low, inspection.mass_p1 - 0.6 * (1 - inspection.mass_p1)) - 0.01)
    axes.set_xlim(low, 1.0)
    # No more points than can be told apart.
    first = max(int(np.searchsorted(mass, low)) - 1, 0)
    shown = np.unique(np.linspace(first, len(mass) - 1, 600).round().astype(int))
    axes.fill_between(mass[shown], share[shown], color=BLUE, alpha=0.15, lw=0, step="post")
    style = {"color": BLUE, "lw": 1.6, "drawstyle": "steps-post"}
    axes.plot(mass[shown], share[shown], label="positions with at most this", **style)
    for at, level, text in ((inspection.mass_p1, 0.01, "p1"), (inspection.mass_p50, 0.5, "median")):
        axes.plot(at, level, "o", color=ORANGE, ms=6)
        place, side = ((-9, 6), "right") if (at - low) / (1 - low) > 0.45 else ((0, 12), "center")
        if (at - low) / (1 - low) < 0.3:
            place, side = (9, 2), "left"
        axes.annotate(
            f"{text} {at:.2%}", (at, level), place, textcoords="offset points", ha=side, fontsize=9.5, color=INK
        )
    axes.annotate(f"mean {inspection.mass_mean:.2%}", (0.03, 0.93), xycoords="axes fraction", fontsize=9.5, color=INK)
    axes.set_ylim(0, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.4%}".rstrip("0%").rstrip(".") + "%" if value else "0%")
    axes.set_xlabel(f"total probability of the {inspection.ids_mean:.3g} stored ids", color=INK)
    axes.set_ylabel("cumulative fraction of positions", color=INK)
    style_axes(axes, "Stored probability")


# -- right: bytes ------------------------------------------------------------------------------------------------------


def _bytes(axes: Any, inspection: Inspection) -> None:
    k, stored = inspection.k if inspection.draws is None else inspection.ids_mean, inspection.part_bytes
    ids, values, prior = (stored.get(name, 0.0) for name in ("ids", "values", "prior"))
    ours = (ids, values, prior, inspection.total_bytes - ids - values - prior)
    plain = (4.0 * k, 2.0 * k, 0.0, 0.0)
    names = "ids", "values", "prior", "overhead" if set(stored) == {"ids", "values"} else "other"
    highest = max(sum(ours), sum(plain))
    for x, parts, colours, ink in ((0, ours, _STRONG, "white"), (1, plain, _LIGHT, INK)):
        at = 0.0
        for name, size, colour in zip(names, parts, colours, strict=True):
            axes.bar(x, size, bottom=at, color=colour, width=0.62)
            if size > 0.045 * highest:
                axes.text(x, at + size / 2, f"{name} {size:,.0f}", ha="center", va="center", color=ink, fontsize=10)
            at += size
        label = {"ha": "center", "va": "bottom", "color": INK}
        axes.text(x, at + 0.015 * highest, f"{at:,.0f}", fontsize=11, fontweight="bold", **label)
        if 0 < parts[-1] <= 0.045 * highest:
            label["color"] = GREEN
            axes.text(x, at + 0.08 * highest, f"{names[-1]} {parts[-1]:,.1f}", fontsize=9, **label)
    axes.set_xticks([0, 1], ["this dataset\n", f"plain top-k bf16\n{inspection.topk_ratio:.2f}× as much"])
    axes.set_xlim(-0.5, 1.5)
    axes.set_ylim(0, 1.2 * highest)
    dense = f"dense bf16: {2 * inspection.head_size:,} bytes, {inspection.dense_ratio:,.0f}× as much"
    axes.text(0.02, 0.985, dense, transform=axes.transAxes, va="top", fontsize=9.5, color=INK)
    style_axes(axes, "Bytes per token")

"""Pictures of a dataset, as PNG files. matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distillkit.errors import DistillKitError
from distillkit.inspect import Inspection

__all__ = ["plot_inspection"]

_BLUE, _ORANGE, _GREEN, _GREY = "#2f6db3", "#d9822b", "#3c9a5f", "#9aa3ad"


def plot_inspection(inspection: Inspection, path: str | Path) -> None:
    """Draws the average distribution with the codec's error, the probability stored, and where the bytes go.

    Raises:
        DistillKitError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DistillKitError("plots need matplotlib: pip install matplotlib") from error
    # A figure of its own, without pyplot: no global state, no display.
    figure = Figure(figsize=(15, 4.8), dpi=120, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.25, 1, 0.85])
    _distribution(left, inspection)
    _mass(middle, inspection)
    _bytes(right, inspection)
    teacher = (inspection.teacher or {}).get("name") or "unknown teacher"
    name = Path(inspection.path).name
    figure.suptitle(f"{name}: {inspection.rows:,} distributions of {teacher}", fontsize=14, fontweight="bold")
    figure.savefig(path)


def _style(axes: Any, title: str) -> None:
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e7eb", linewidth=0.8)
    axes.set_axisbelow(True)


def _distribution(axes: Any, inspection: Inspection) -> None:
    ranks = np.arange(1, len(inspection.logprob_mean) + 1)
    curves = inspection.fidelity.by_rank() if inspection.fidelity is not None else {}
    mean = curves.get("mean", inspection.logprob_mean)
    if curves:
        spread, error = curves["std"], curves["rms_error"]
        axes.fill_between(ranks, mean - spread, mean + spread, color=_BLUE, alpha=0.13, lw=0, label="teacher, ± 1 std")
        axes.fill_between(
            ranks, mean - error, mean + error, color=_ORANGE, alpha=0.85, lw=0, label="codec, ± rms error"
        )
    axes.plot(ranks, mean, color=_BLUE, lw=1.6, label="mean" if curves else "mean, decoded")
    exact = int(inspection.codec["config"]["exact_k"])
    if 0 < exact < len(ranks):
        axes.axvline(exact + 0.5, color=_GREY, ls="--", lw=1)
        axes.annotate(
            f"{exact} exact ", (exact + 0.5, axes.get_ylim()[1]), ha="right", va="top", color="#5b6570", fontsize=9
        )
    axes.set_xscale("log")
    axes.set_xticks([rank for rank in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if rank <= ranks[-1]])
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.minorticks_off()
    axes.set_xlabel("rank")
    axes.set_ylabel("log-probability (nats)")
    _style(axes, "Average distribution by rank" + ("" if curves else " (fidelity is not recorded)"))
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def _mass(axes: Any, inspection: Inspection) -> None:
    counts = inspection.mass_histogram
    share = np.cumsum(counts) / max(counts.sum(), 1)
    mass = np.arange(len(counts)) / (len(counts) - 1)
    axes.fill_between(mass, share, color=_BLUE, alpha=0.15, lw=0)
    axes.plot(mass, share, color=_BLUE, lw=1.6)
    low = max(0.0, float(mass[np.argmax(share > 0.0005)]) - 0.02)
    axes.set_xlim(low, 1.0)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(f"probability on the {inspection.codec['config']['k']} stored ids")
    axes.set_ylabel("positions with at most that much")
    text = f"mean {inspection.mass_mean:.1%}\nmedian {inspection.mass_p50:.1%}\nworst 1% below {inspection.mass_p1:.1%}"
    axes.text(0.04, 0.95, text, transform=axes.transAxes, va="top", fontsize=10)
    _style(axes, "Probability that is stored")


def _bytes(axes: Any, inspection: Inspection) -> None:
    parts = [("ids", inspection.id_bytes, _BLUE), ("values", inspection.value_bytes, _ORANGE)]
    parts.append(("files", inspection.overhead_bytes, _GREEN))
    plain = 6.0 * inspection.codec["config"]["k"]
    at = 0.0
    for name, size, colour in parts:
        axes.bar("this\ndataset", size, bottom=at, color=colour, width=0.6, label=f"{name}: {size:,.1f}")
        at += size
    axes.bar("plain\ntop-k", plain, color=_GREY, width=0.6)
    for x, height in ((0, at), (1, plain)):
        axes.annotate(f"{height:,.0f}", (x, height), ha="center", va="bottom", fontsize=10, fontweight="bold")
    axes.set_ylim(0, 1.35 * max(at, plain))
    axes.set_ylabel("bytes a token")
    dense = f"dense bf16: {2 * inspection.head_size:,} bytes, {inspection.dense_ratio:,.0f}× as many"
    _style(axes, "Size")
    axes.legend(frameon=False, fontsize=9, loc="upper left", title=dense, title_fontsize=9)

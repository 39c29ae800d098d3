"""What the tuner found, as a table, a plot, and the YAML that `capture` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Group
from rich.table import Table
from rich.text import Text

from distillkit.bench.sample import Sample
from distillkit.bench.tables import short_number
from distillkit.bench.tune import Candidate, Split, front
from distillkit.codec.config import CompactConfig
from distillkit.codec.presets import preset_of

__all__ = ["CRITERION", "Tuning"]

CRITERION = (
    "KL(teacher ‖ stored) in nats over the sample's {k} ids per row and all others as one outcome; the missing mass is "
    "spread evenly over the ids that are not stored, as nothing else is known of them"
)


@dataclass(frozen=True)
class Tuning:
    """All that was measured on a sample, and what was chosen of it.

    Attributes:
        found: what `distillkit.bench.tune.search` measured.
        chosen: one of these; None if no target was set.
        tokens: size of the dataset that one prior is counted over.
    """

    sample: Sample
    split: Split
    found: Sequence[Candidate]
    chosen: Candidate | None
    tokens: int

    def limits(self) -> str:
        """What the sample can't tell."""
        mass = float(np.exp(self.sample.logprobs.astype(np.float64)).sum(-1).mean())
        return (
            f"The sample has {self.sample.k} ids per row, with {mass:.1%} of the probability: larger k cannot be "
            "compared, and KL counts what is beyond them as one outcome."
        )

    def counts(self) -> str:
        """How the sample was divided."""
        unit = "blocks of rows" if self.split.blocks else "documents"
        return (
            f"priors learned from {self.split.learned_rows:,} rows of {self.split.learned_documents:,} {unit}, bytes "
            f"and KL measured on {len(self.split.measured.ids):,} rows of {len(self.split.held_out):,} others"
        )

    def table(self) -> Group:
        """The frontier, by bytes, with the presets beside it."""
        table = Table(box=None, padding=(0, 1, 0, 0))
        for number, heading in enumerate(("", "bytes", "ids", "mass", "KL of\nstored ids", "KL")):
            table.add_column(heading, justify="right" if number else "left", vertical="bottom")
        members = front(self.found)
        shown = [*members, *(each for each in self.found if preset_of(each.config) and each not in members)]
        for each in sorted(shown, key=lambda each: (each.bytes_per_row, each.kl)):
            style = "bold green" if each is self.chosen else "" if each in members else "dim"
            cells = (
                f"{'→' if each is self.chosen else ' '} {each.name}{'' if each in members else ' *'}",
                f"{each.bytes_per_row:.1f}",
                f"{each.ids:.1f}",
                f"{each.mass:.2%}",
                short_number(each.kl_stored),
                short_number(each.kl),
            )
            table.add_row(*(Text(cell, style) for cell in cells))
        about = (
            f"{CRITERION.format(k=self.sample.k)}. Bytes per row, with the prior's share over {self.tokens:,} tokens."
        )
        notes = [self.sample.caution, self.limits()]
        if len(members) < len(shown):
            notes.insert(0, "* not on the frontier: another has fewer bytes and less KL")
        title = f"{len(self.sample):,} {self.sample.about}"
        return Group(
            Text(title, "bold"),
            Text(f"{self.counts()}. {about}", "dim"),
            "",
            table,
            "",
            *(Text(note, "yellow") for note in notes if note),
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        members = front(self.found)
        sample = {"rows": len(self.sample), "k": self.sample.k, "vocab_size": self.sample.vocab_size}
        return {
            "sample": {**sample, "about": self.sample.about, "caution": self.sample.caution, "limits": self.limits()},
            "learned": {"rows": self.split.learned_rows, "documents": self.split.learned_documents},
            "measured": {"rows": len(self.split.measured.ids), "documents": len(self.split.held_out)},
            "documents_are_blocks": self.split.blocks,
            "criterion": CRITERION.format(k=self.sample.k),
            "prior_tokens": self.tokens,
            "chosen": None if self.chosen is None else self.chosen.to_dict(),
            "front": [each.to_dict() for each in members],
            "others": [each.to_dict() for each in self.found if each not in members],
        }

    def yaml(self) -> str:
        """The chosen configuration for `capture --compression-config`, with its figures as a comment.

        Raises:
            ValueError: no configuration was chosen.
        """
        if self.chosen is None:
            raise ValueError("no configuration was chosen: search with a target")
        each = self.chosen
        key = "compact" if isinstance(each.config, CompactConfig) else "logprob_compressor"
        fields = {name: value for name, value in each.config.model_dump(mode="json").items() if value is not None}
        return (
            f"# {each.bytes_per_row:.1f} bytes and a KL of {each.kl:.2e} per row on {self.sample.about}\n"
            f"# (stored mass {each.mass:.2%}, KL of the stored ids {each.kl_stored:.2e}; {self.counts()}).\n"
            + yaml.safe_dump({key: fields}, sort_keys=False, allow_unicode=True, width=10**6)
        )

    def plot(self, path: Path) -> None:
        """Plots KL over bytes: all that was measured, the frontier, the presets and the chosen one (PNG).

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
            OSError: the file cannot be written.
        """
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        from distillkit.reports.inspection_plots import BLUE, GREEN, GREY, INK, ORANGE, style_axes

        figure: Any = Figure(figsize=(9, 5.5), dpi=120, layout="constrained")
        axes = figure.subplots()
        members = front(self.found)
        compact = [each for each in self.found if isinstance(each.config, CompactConfig)]
        fixed = [each for each in self.found if each not in compact]
        for label, group, colour in (("compact", compact, GREY), ("published layouts", fixed, ORANGE)):
            axes.scatter([c.bytes_per_row for c in group], [c.kl for c in group], s=12, color=colour, label=label)
        line = [(each.bytes_per_row, each.kl) for each in members]
        axes.plot(*zip(*line, strict=True), color=BLUE, marker="o", markersize=4, label="frontier")
        for each in self.found:
            name = preset_of(each.config)
            if name:
                at = each.bytes_per_row, each.kl
                axes.annotate(name, at, xytext=(4, 4), textcoords="offset points", fontsize=8, color=INK)
        if self.chosen is not None:
            at = self.chosen.bytes_per_row, self.chosen.kl
            axes.scatter(*([value] for value in at), s=90, color=GREEN, zorder=3, label=f"chosen: {self.chosen.name}")
        axes.set(xscale="log", yscale="log", xlabel="bytes per row", ylabel="KL(teacher ‖ stored), nats per row")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        style_axes(axes, f"{len(self.sample):,} {self.sample.about}")
        axes.legend(fontsize=8, frameon=False)
        figure.savefig(path, format="png")

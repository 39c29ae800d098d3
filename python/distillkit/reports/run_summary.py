"""What a training run returns."""

from __future__ import annotations

from typing import Any

from distillkit.console import human_bytes
from distillkit.reports.run_record import MEASURES
from distillkit.types import Facts, Shown

__all__ = ["RunSummary"]


class RunSummary(dict[str, Any], Shown):
    """The figures of a run by name, as in its `summary.json`; prints as a table."""

    def facts(self) -> Facts:
        rows = [
            ("steps", f"{self['steps']:,}"),
            ("tokens", f"{self['train_tokens']:,} ({self['tokens_per_second']:,.0f} per second)"),
            ("time", f"{self['seconds']:,.1f} s"),
            ("waiting for data", f"{self['data_wait']:.1%} of the training time"),
            *(
                [("waiting for the teacher", f"{self['teacher_wait']:.1%} of the training time")]
                if "teacher_wait" in self
                else []
            ),
            ("peak memory", human_bytes(self["peak_cuda_bytes"] or self["peak_rss_bytes"])),
        ]
        if self["cut_documents"]:
            rows.append(("cut", f"{self['cut_documents']:,} documents, {self['cut_tokens']:,} tokens"))
        first, last = self["eval_first"], self["eval_last"]
        for measure in MEASURES if last is not None else ():
            after = measure.form.format(last[measure.name])
            before = measure.form.format(first[measure.name]) + " → " if first["step"] != last["step"] else ""
            rows.append((measure.label, before + after))
        return f"trained: {self['output_path']}", rows

    # dict's own would come first.
    __repr__ = Shown.__repr__

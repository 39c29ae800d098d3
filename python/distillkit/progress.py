"""Seeing a training run: a progress bar and a readable line on the console, and every metric in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["ConsoleProgress", "MetricsFile"]

# How metrics are shown on a line, in this order: name, label, format.
_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("kl", "KL", "{:.4f}"),
    ("cross_entropy", "CE", "{:.4f}"),
    ("perplexity", "perplexity", "{:,.2f}"),
    ("top1_agreement", "top-1", "{:.1%}"),
    ("student_mass", "mass", "{:.1%}"),
    ("learning_rate", "lr", "{:.2e}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)


class MetricsFile(transformers.TrainerCallback):  # type: ignore[misc]
    """Writes every log as a JSON object a line to `metrics.jsonl`, and remembers the first and last of each kind.

    A resumed run continues the file after the checkpoint's step; another run in the same folder begins it anew.

    Args:
        folder: where the file goes.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.jsonl"
        self.entries: list[dict[str, Any]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        earlier = self.path.read_text(encoding="utf-8").splitlines() if state.global_step and self.path.exists() else []
        self.entries = [entry for entry in map(json.loads, earlier) if entry["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        entry = {"step": state.global_step, **logs}
        self.entries.append(entry)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def ends(self) -> dict[str, dict[str, Any] | None]:
        """Return `eval_first`, `eval_last` and `train_last`, each a log entry or None."""
        evaluations = [entry for entry in self.entries if "eval_loss" in entry]
        training = [entry for entry in self.entries if "loss" in entry]
        return {
            "eval_first": evaluations[0] if evaluations else None,
            "eval_last": evaluations[-1] if evaluations else None,
            "train_last": training[-1] if training else None,
        }


class ConsoleProgress(transformers.TrainerCallback):  # type: ignore[misc]
    """Shows a progress bar with the time left, and a line for every log, on stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress: Progress | None = None
        self.training: TaskID | None = None
        self.evaluation: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal)
        self.progress.start()
        self.training = self.progress.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None and self.training is not None:
            self.progress.update(self.training, completed=state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.progress is None:
            return
        if self.evaluation is None:
            self.evaluation = self.progress.add_task("evaluating", total=len(eval_dataloader))
        self.progress.advance(self.evaluation)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None and self.evaluation is not None:
            self.progress.remove_task(self.evaluation)
        self.evaluation = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        prefix = "eval_" if "eval_loss" in logs else ""
        shown = [f"{label} {form.format(logs[prefix + name])}" for name, label, form in _SHOWN if prefix + name in logs]
        if f"{prefix}loss" in logs:
            kind, width = "held out" if prefix else "step", len(str(state.max_steps))
            head = f"{kind:>8} {state.global_step:>{width}}/{state.max_steps}"
            self.console.print(f"{head}  {'  '.join(shown)}", highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar away, also where training ended with an error."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

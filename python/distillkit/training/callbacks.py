"""Monitoring: a progress bar and readable lines on the console, and every metric in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from distillkit.console import duration, figure, make_progress
from distillkit.reports.run_record import METRICS, read_metrics

__all__ = ["ConsoleProgress", "MetricsFile"]

# Metrics on a console line, in this order: name, label, format.
_SHOWN = (
    ("kl", "KL", "{:.4f}"),
    ("cross_entropy", "CE", "{:.4f}"),
    ("perplexity", "perplexity", "{:,.2f}"),
    ("top1_agreement", "top-1", "{:.1%}"),
    ("student_mass", "mass", "{:.1%}"),
    ("learning_rate", "lr", "{:.2e}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
    ("data_wait", "data wait", "{:.0%}"),
    ("teacher_wait", "teacher wait", "{:.0%}"),
)
_LABELS = {name: label for name, label, _ in _SHOWN}


class MetricsFile(transformers.TrainerCallback):  # type: ignore[misc]
    """Writes every log entry to `metrics.jsonl`, one JSON object per line, and remembers the first and last of each
    kind.

    The file begins with a description of the run, `{"step": …, "run": {…}}`. A resumed run keeps the entries up to the
    checkpoint's step and adds a description of its own; any other run in the same folder overwrites the file.

    Args:
        folder: folder of the file.
        description: description of the run; see `describe`.

    Attributes:
        recording: whether entries are written: once training has begun, so that an evaluation alone leaves the record
            of an earlier run as it is.
    """

    def __init__(self, folder: Path, description: dict[str, Any]) -> None:
        self.path = folder / METRICS
        self.description = description
        self.entries: list[dict[str, Any]] = []
        self.recording = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.recording = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        earlier = read_metrics(self.path) if state.global_step and self.path.exists() else []
        self.entries = [entry for entry in earlier if entry["step"] <= state.global_step]
        run = {**self.description, "max_steps": state.max_steps, "epochs": state.num_train_epochs}
        self.entries.append({"step": state.global_step, "run": run})
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or not self.recording:
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
    """Shows a progress bar with the time left and a line for every log entry, on stderr. Without a terminal there is
    no bar; without a terminal or with NO_COLOR there are no colours.

    Args:
        parts: names of the losses; if there are several, training lines show the value of each.
        console: where to print; stderr if None.

    Attributes:
        sources: names of the datasets of which a line shows the loss and the KL, if there are several: those that are
            trained on, `train`, and held out, `eval`.
    """

    def __init__(self, parts: tuple[str, ...] = (), console: Console | None = None) -> None:
        self.parts = parts
        self.sources: Mapping[str, Sequence[str]] = {}
        self.console = console or Console(stderr=True)
        self.progress: Progress | None = None
        self.training: TaskID | None = None
        self.evaluation: TaskID | None = None
        self._began = (0, time.monotonic())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._began = (state.global_step, time.monotonic())
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.progress = make_progress(*columns, console=self.console, shown=self.console.is_terminal, notebook=True)
        self.progress.start()
        self.training = self.progress.add_task(
            "training", total=state.max_steps, completed=state.global_step, left=self._left(state)
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None and self.training is not None:
            self.progress.update(self.training, completed=state.global_step, left=self._left(state))

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if self.progress is None:
            return
        if self.evaluation is None:
            self.evaluation = self.progress.add_task("evaluating", total=len(eval_dataloader), left="")
        self.progress.advance(self.evaluation)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None and self.evaluation is not None:
            self.progress.remove_task(self.evaluation)
        self.evaluation = None

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or not state.is_world_process_zero:
            return
        prefix = "eval_" if "eval_loss" in logs else ""
        if f"{prefix}loss" not in logs:
            return
        kind, width = "held out" if prefix else "step", len(str(state.max_steps))
        # evaluate() before train(): how many steps there will be is not known yet.
        of_all = f"/{state.max_steps}" if state.max_steps > 0 else ""
        fields = [f"{kind:>8} {state.global_step:>{width}}{of_all}", self._loss(logs, prefix)]
        in_parts = () if prefix else self.parts
        fields += [
            f"{label} {figure(logs[prefix + name], form)}"
            for name, label, form in _SHOWN
            if prefix + name in logs and name not in in_parts
        ]
        left = self._left(state)
        lines = self._lines([*fields, left] if left else fields)
        for line in [*lines, *self._by_source(logs, prefix, len(kind) + width)]:
            self.console.print(line, highlight=False, soft_wrap=True)

    def _lines(self, fields: list[str]) -> list[str]:
        """Join fields to a line, or to several where a terminal would break it inside of a field."""
        lines = [fields[0]]
        for field in fields[1:]:
            if self.console.is_terminal and cell_len(f"{lines[-1]}  {field}") > self.console.width:
                lines.append(f"    {field}")
            else:
                lines[-1] += f"  {field}"
        return lines

    def _by_source(self, logs: dict[str, Any], prefix: str, indent: int) -> list[str]:
        """Format the loss and the KL of each of several datasets."""
        fields = [" " * indent]
        for name in self.sources.get("eval" if prefix else "train", ()):
            if f"{prefix}loss/{name}" in logs:
                kl = logs.get(f"{prefix}kl/{name}")
                shown = f"{name}: loss {logs[f'{prefix}loss/{name}']:.4f}"
                fields.append(shown if kl is None else f"{shown} KL {kl:.4f}")
        return self._lines(fields) if len(fields) > 1 else []

    def _loss(self, logs: dict[str, Any], prefix: str) -> str:
        """Format the loss and, for training lines, its parts: means, not multiplied by their weights."""
        total = f"loss {logs[prefix + 'loss']:.4f}"
        if prefix or len(self.parts) < 2:
            return total
        parts = [f"{_LABELS.get(name, name)} {logs[name]:.4f}" for name in self.parts if name in logs]
        return f"{total} ({', '.join(parts)})"

    def _left(self, state: Any) -> str:
        """Format the time left, at the pace since training began, including evaluations and checkpoints."""
        step, began = self._began
        done, to_do = state.global_step - step, state.max_steps - state.global_step
        if done <= 0 or to_do <= 0:
            return ""
        return f"{duration((time.monotonic() - began) / done * to_do)} left"

    def close(self) -> None:
        """Remove the bar; must also be called if training fails."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

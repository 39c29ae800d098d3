"""Records of training runs, as training writes them, with any text in place of every name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distillkit.reports.run_record import RunRecord, read_run

STEPS, EVERY = 12, 4
"""Number of steps, and of steps between evaluations."""


def write_run(folder: Path, name: str, *, scale: float = 1.0) -> RunRecord:
    """A finished run in which every text is this name, and whose losses are multiples of a scale."""
    folder.mkdir(exist_ok=True)
    lines = [{"step": 0, "run": _description(name)}]
    for step in range(STEPS + 1):
        loss = scale * (1.5 + 3 / (1 + step))
        if step:
            lines.append({"step": step, "loss": loss, "kl": 0.9 * loss, name: 1.1 * loss, **_costs(step)})
        if step % EVERY == 0:
            shares = {"eval_top1_agreement": 0.002 + step / 5000, "eval_topk_overlap": 0.1 + step / 100}
            masses = {"eval_student_mass": 0.5 + step / 100, "eval_teacher_mass": 0.9}
            divergences = {"eval_kl": 0.8 * loss, "eval_kl_with_rest": 0.7 * loss, "eval_cross_entropy": 1.2 * loss}
            lines.append({"step": step, "eval_loss": loss, **divergences, **shares, **masses})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "_differences.json").write_text(json.dumps(_differences(name)))
    return read_run(folder)


def _costs(step: int) -> dict[str, float]:
    return {"tokens_per_second": 1000.0 + step, "data_wait": 0.2, "learning_rate": 1e-3 / step, "grad_norm": 1.0 + step}


def _description(name: str) -> dict[str, Any]:
    settings: dict[str, Any] = dict.fromkeys(("optimizer", "schedule", "precision", "device", "workers", "seed"), name)
    numbers = ("batch", "accumulation", "processes", "sequence_length", "learning_rate", "warmup_steps", "weight_decay")
    data = {"path": name, "documents": 1, "tokens": 2, "rows": 1}
    return {
        "student": {"path": name, "class": name, "dtype": name, "attention": name, "trained": 1, "parameters": 2},
        "teacher": {"kind": "dataset", "name": name, "k": 8},
        "data": {"train": data, "eval": data},
        "losses": [{"name": name, "weight": 0.5, name: name}, {"name": "kl", "weight": 0.5}],
        "settings": {**settings, **dict.fromkeys(numbers, 1), "activation_checkpointing": False},
        "versions": {name: name},
        "began": name,
        "max_steps": STEPS,
        "epochs": 1,
    }


def _differences(name: str) -> dict[str, Any]:
    token = {"id": 7, "text": name, "p": 0.75}
    position = {
        "position": 5,
        "before": name,
        "next": {"id": 3, "text": name},
        "teacher": [{**token, "student_p": 0.0625}, {"id": 8, "text": " b", "p": 0.25, "student_p": 0.0001}],
        "student": [{"id": 9, "text": name, "p": 0.875}],
    }
    return {
        "step": STEPS,
        "positions": [{"document": number, "kl": 9.5 - number, **position} for number in range(14)],
        "documents": [{"document": 3, "positions": 11, "kl": 4.125, "top1_agreement": 0.125, "text": name}],
    }

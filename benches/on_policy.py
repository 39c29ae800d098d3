"""On-policy against off-policy training: the demo's distilled student, the same compute, its own held-out completions.

    make demo                       # once: teacher, text, captures, the distilled student
    python benches/on_policy.py [--steps 12] [--seeds 1 2] [--only NAME …] [--output FOLDER]

The student is trained further with `reverse_kl` on what it writes itself (on-policy), and for the same processor time
on the demo's capture (off-policy), with `reverse_kl` and with the default losses. Before and after, it continues the
same held-out prompts with the same random numbers, and KL(student ‖ teacher) is measured on what it wrote. Prompts are
the beginnings of the demo's paragraphs. Everything runs on one thread, so that processor time is what it costs. Rows
that are done are not done again. The table goes to benches/results/ and, as Markdown, to standard output.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit import DistillationTrainer
from distillkit.training.rollouts import rounds
from distillkit.training.rollouts.engine import HfEngine, Prompt, Sampling, stop_tokens
from distillkit.training.rollouts.rounds import repeated

ROOT = Path(__file__).resolve().parent.parent
WORDS = 16  # of a prompt
REVERSE_KL = [{"function": "reverse_kl", "weight": 1.0, "missing_probability_handling": "uniform"}]
DEFAULT = [
    {"function": "cross_entropy", "weight": 0.1},
    {"function": "kl", "weight": 0.9, "missing_probability_handling": "uniform"},
]


@dataclass(frozen=True)
class Setup:
    """What all rows have in common."""

    student: Path
    teacher: Path
    capture: Path
    text: Path
    output: Path
    steps: int
    new_tokens: int
    held_out: int


@dataclass(frozen=True)
class Row:
    """A way to train the student further; on its own completions, or on a capture."""

    name: str
    losses: list[dict[str, Any]] | None = None
    on_policy: bool = False


ROWS = (
    Row("before"),
    Row("on-policy, reverse_kl", REVERSE_KL, on_policy=True),
    Row("off-policy, reverse_kl", REVERSE_KL),
    Row("off-policy, default losses", DEFAULT),
)


class Budget(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends training once it has taken this much processor time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= time.process_time() - self.began >= self.seconds


def beginnings(path: Path) -> list[str]:
    """The first words of the paragraphs of a file of documents that are longer than that."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        for paragraph in re.split(r"\n\s*\n", json.loads(line)["text"]):
            words = paragraph.split()
            if len(words) > 2 * WORDS:
                found.append(" ".join(words[:WORDS]))
    return found


def measured(setup: Setup, model: Any) -> dict[str, float]:
    """Let a student continue the held-out prompts, and compare it with its teacher on what it wrote."""
    tokenizer = AutoTokenizer.from_pretrained(setup.student)
    teacher = AutoModelForCausalLM.from_pretrained(setup.teacher, dtype=torch.float32).eval()
    texts = beginnings(setup.text / "held-out.jsonl")
    chosen = np.linspace(0, len(texts) - 1, setup.held_out).astype(int)
    prompts = [
        Prompt(number, np.array(tokenizer(texts[index])["input_ids"], dtype=np.int32))
        for number, index in enumerate(chosen.tolist())
    ]
    stop = stop_tokens(model, tokenizer)
    engine = HfEngine(model, Sampling(setup.new_tokens, seed=1), stop=stop, pad_id=tokenizer.pad_token_id)
    written = engine.write(prompts, lambda done, total: None)
    values = []
    model.eval()
    for prompt, tokens in zip(prompts, written, strict=True):
        ids = torch.from_numpy(np.concatenate([prompt.ids, tokens])).long().unsqueeze(0)
        with torch.no_grad():
            q, p = (each(ids, use_cache=False).logits[0, len(prompt.ids) - 1 : -1] for each in (model, teacher))
        q, p = q.float().log_softmax(-1), p.float().log_softmax(-1)
        values.append((q.exp() * (q - p)).sum(-1))
    return {
        "reverse_kl": torch.cat(values).mean().item(),
        "ended": float(np.mean([int(tokens[-1]) in stop for tokens in written])),
        "repeated": float(np.mean([repeated(tokens) for tokens in written])),
    }


def trained(setup: Setup, row: Row, seed: int, seconds: float) -> tuple[Any, dict[str, Any]]:
    """Train the student further; returns it and what that took."""
    prompts = setup.output / "prompts.jsonl"
    lines = [json.dumps({"prompt": text}) for text in beginnings(setup.text / "train.jsonl")]
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    arguments = {
        "output_dir": str(setup.output / f"{row.name}-{seed}"),
        "max_steps": setup.steps if row.on_policy else 10_000,
        "per_device_train_batch_size": 4 if row.on_policy else 1,
        "learning_rate": 5e-4,
        "lr_scheduler_type": "constant",
        "logging_steps": 4,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "seed": seed,
        "data_seed": seed,
        "report_to": "none",
    }
    settings: dict[str, Any] = {"loss_functions": row.losses, "sequence_length": 256, "seed": seed}
    settings["frozen_modules"] = ["model.embed_tokens"]  # as in the demo
    settings["prepared_dataset_path"] = str(setup.output / "prepared")
    if row.on_policy:
        settings["rollouts"] = {
            "prompts": {"disk_path": str(prompts)},
            "every": 6,
            "max_new_tokens": setup.new_tokens,
            "batch_size": 24,
        }
        settings["teacher"] = {"kind": "hf", "path": str(setup.teacher), "kwargs": {"dtype": "float32"}}
    else:
        settings |= {"train_dataset": str(setup.capture), "packing": True, "overflow": "split"}
    budget = Budget(seconds)
    trainer = DistillationTrainer(model=str(setup.student), args=arguments, callbacks=[budget], **settings)
    trainer.train()
    return trainer.model, {"steps": trainer.state.global_step, "seconds": time.process_time() - budget.began}


def run(setup: Setup, row: Row, seed: int) -> dict[str, Any]:
    """Train and measure a row, if that is not done yet."""
    done = setup.output / f"{row.name}-{seed}.json"
    if not done.exists():
        if row.losses is None:
            model = AutoModelForCausalLM.from_pretrained(setup.student, dtype=torch.float32)
            found: dict[str, Any] = {"steps": 0, "seconds": 0.0}
        else:
            own = setup.output / f"{ROWS[1].name}-{seed}.json"
            seconds = float("inf") if row.on_policy else json.loads(own.read_text(encoding="utf-8"))["seconds"]
            model, found = trained(setup, row, seed, seconds)
        done.write_text(json.dumps({**found, **measured(setup, model)}), encoding="utf-8")
    result: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return result


def report(results: dict[tuple[str, int], dict[str, Any]]) -> None:
    """Write the table."""
    print("| | seed | steps | processor time | KL(student ‖ teacher) | ended | repeated |\n" + "|---" * 7 + "|")
    for (name, seed), found in results.items():
        print(
            f"| {name} | {seed or '–'} | {found['steps']} | {found['seconds']:.0f} s | {found['reverse_kl']:.3f} | "
            f"{found['ended']:.0%} | {found['repeated']:.1%} |"
        )
    path = ROOT / "benches" / "results" / f"{datetime.date.today()}-{platform.machine()}-on-policy.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        measures = ["steps", "seconds", "reverse_kl", "ended", "repeated"]
        writer.writerow(["row", "seed", *measures])
        writer.writerows(
            [name, seed, *(f"{found[each]:.6g}" for each in measures)] for (name, seed), found in results.items()
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    demo = ROOT / "demo-output"
    parser.add_argument("--student", type=Path, default=demo / "distilled", help="the student, distilled before")
    parser.add_argument("--teacher", type=Path, default=demo / "SmolLM2-135M-Instruct")
    parser.add_argument("--capture", type=Path, default=demo / "captured" / "train")
    parser.add_argument("--text", type=Path, default=demo / "text")
    parser.add_argument("--output", type=Path, default=ROOT / "benches" / ".cache" / "on-policy")
    parser.add_argument("--steps", type=int, default=12, help="on-policy steps")
    parser.add_argument("--new-tokens", type=int, default=32, help="longest completion")
    parser.add_argument("--held-out", type=int, default=24, help="held-out prompts")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--only", nargs="*", help="names of rows")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rounds.MEASURED = 4  # of so small rounds, measuring all would take longer than training
    setup = Setup(
        given.student,
        given.teacher,
        given.capture,
        given.text,
        given.output,
        given.steps,
        given.new_tokens,
        given.held_out,
    )
    setup.output.mkdir(parents=True, exist_ok=True)
    results = {}
    for seed in given.seeds:
        for row in ROWS:
            if given.only and row.name not in given.only:
                continue
            key = (row.name, seed if row.losses else 0)
            results[key] = run(setup, row, key[1])
            print(*key, results[key], file=sys.stderr, flush=True)
    report(results)


if __name__ == "__main__":
    main()

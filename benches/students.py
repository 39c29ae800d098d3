"""Students of one teacher compared by training: which layers, how many, how wide, or new weights; the same budget.

    make demo                       # once: teacher, text, captures
    python benches/students.py [--steps 20] [--only NAME …] [--output FOLDER]

Every student is made as `distillkit student` does and trained with examples/demo.yaml, but for its number of steps: 20
take about two minutes of one core for each. Runs that are done are not done again. The table goes to benches/results/
and, as Markdown, to standard output.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import sys
from pathlib import Path
from typing import Any

import yaml

from distillkit import train
from distillkit.console import quiet_libraries
from distillkit.training.make_student import make_student

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "SmolLM2-135M-Instruct"
MEASURES = ("eval_kl", "eval_perplexity", "eval_top1_agreement")
# The teacher has 30 layers, and MLPs of 1,536.
STUDENTS: dict[str, dict[str, Any]] = {
    "8 layers, evenly spread": {"layers": 8},
    "the first 8": {"layers": range(8)},
    "the last 8": {"layers": range(22, 30)},
    "4 layers, evenly spread": {"layers": 4},
    "8 layers, evenly spread, new MLPs of 1,024": {"layers": 8, "sizes": {"intermediate_size": 1024}},
    "8 layers of new weights": {"layers": 8, "from_scratch": True},
}


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make and train a student, if that is not done yet; its parameters, and what it measures at its end."""
    folder = arguments.output / f"{name.replace(' ', '-').replace(',', '')}-{arguments.steps}"
    done = folder / "done.json"
    if not done.exists():
        student = folder / "student"
        made = make_student(str(arguments.demo / TEACHER), student, **STUDENTS[name])
        summary = train(configuration(STUDENTS[name], student, folder / "trained", arguments))
        result = {measure: summary["eval_last"][measure] for measure in MEASURES}
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
        done.write_text(json.dumps({**result, "parameters": made.parameters}), encoding="utf-8")
    found: dict[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return found


def configuration(made: dict[str, Any], student: Path, output: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The demo's configuration, for a student."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text(encoding="utf-8"))
    config["model"], config["output_path"] = str(student), str(output)
    captured = arguments.demo / "captured"
    config["dataset"]["train_dataset"]["disk_path"] = str(arguments.train or captured / "train")
    config["dataset"]["eval_dataset"]["disk_path"] = str(arguments.held_out or captured / "held-out")
    if made.get("from_scratch"):
        del config["frozen_modules"]  # its embeddings are new, too
    steps = arguments.steps
    config["training_args"] |= {"max_steps": steps, "eval_steps": steps, "eval_on_start": False, "warmup_steps": 0.1}
    return config


def report(results: dict[str, dict[str, Any]], steps: int) -> None:
    """Write the table, the best KL first."""
    ordered = sorted(results.items(), key=lambda item: item[1]["eval_kl"])
    print("| student | parameters | KL from the teacher | perplexity | top-1 agreement |\n|---|--:|--:|--:|--:|")
    for name, measured in ordered:
        figures = f"{measured['eval_kl']:.3f} | {measured['eval_perplexity']:,.0f} | "
        figures += f"{measured['eval_top1_agreement']:.1%}"
        print(f"| {name} | {measured['parameters'] / 1e6:.0f}M | {figures} |")
    path = ROOT / "benches" / "results" / f"{datetime.date.today()}-{platform.machine()}-students.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["student", "parameters", "steps", *MEASURES])
        for name, measured in ordered:
            writer.writerow([name, measured["parameters"], steps, *(f"{measured[key]:.6g}" for key in MEASURES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=STUDENTS, help="some of the students")
    parser.add_argument("--demo", type=Path, default=ROOT / "demo-output", help="the folder of `make demo`")
    parser.add_argument("--train", type=Path, help="another capture to train on")
    parser.add_argument("--held-out", type=Path, help="another capture to measure on")
    parser.add_argument("--output", type=Path, default=ROOT / "benches" / ".cache" / "students")
    arguments = parser.parse_args()
    if not (arguments.demo / TEACHER).exists():
        parser.error(f"{arguments.demo} has no {TEACHER}: run `make demo` first")
    quiet_libraries()
    results = {}
    for name in arguments.only or STUDENTS:
        results[name] = run(name, arguments)
        print(name, {key: round(results[name][key], 4) for key in MEASURES}, file=sys.stderr, flush=True)
    report(results, arguments.steps)


if __name__ == "__main__":
    main()

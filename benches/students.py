"""Students of one teacher compared by training: which layers, how many, how wide, or new weights; the same budget.

    make demo                       # once: teacher, text, captures
    python benches/students.py [--steps 40] [--only NAME …] [--output FOLDER]

Every student is made by `distillkit student` and trained by `distillkit CONFIG.yaml` with examples/demo.yaml, but for
its number of steps. Runs that are done are not done again. The table goes to benches/results/ and, as Markdown, to
standard output.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
TEACHER = "SmolLM2-135M-Instruct"
MEASURES = ("eval_kl", "eval_perplexity", "eval_top1_agreement")
# The teacher has 30 layers, and MLPs of 1,536.
STUDENTS = {
    "8 layers, evenly spread": ["--layers", "8"],
    "the first 8": ["--layers", ",".join(map(str, range(8)))],
    "the last 8": ["--layers", ",".join(map(str, range(22, 30)))],
    "4 layers, evenly spread": ["--layers", "4"],
    "8 layers, evenly spread, new MLPs of 1,024": ["--layers", "8", "--set", "intermediate_size=1024"],
    "8 layers of new weights": ["--layers", "8", "--from-scratch"],
}


def run(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Make and train a student, if that is not done yet; its parameters, and what it measures at its end."""
    folder = arguments.output / f"{name.replace(' ', '-').replace(',', '')}-{arguments.steps}"
    made, summary = folder / "made.json", folder / "trained" / "summary.json"
    student = folder / "student"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        options = [*STUDENTS[name], "--json"]
        made.write_text(command("student", arguments.demo / TEACHER, student, *options), encoding="utf-8")
    if not summary.exists():
        config = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text(encoding="utf-8"))
        config["model"], config["output_path"] = str(student), str(folder / "trained")
        config["dataset"]["train_dataset"]["disk_path"] = str(arguments.train or arguments.demo / "captured" / "train")
        config["dataset"]["eval_dataset"]["disk_path"] = str(
            arguments.held_out or arguments.demo / "captured" / "held-out"
        )
        if "--from-scratch" in STUDENTS[name]:
            del config["frozen_modules"]  # its embeddings are new, too
        config["training_args"] |= {"max_steps": arguments.steps, "eval_steps": arguments.steps, "eval_on_start": False}
        path = folder / "train.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        command(path)
        for weights in folder.rglob("*.safetensors"):
            weights.unlink()
    result: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))["eval_last"]
    return {**result, "parameters": json.loads(made.read_text(encoding="utf-8"))["parameters"]}


def command(*arguments: str | Path) -> str:
    """Run the `distillkit` of this environment; returns what it printed."""
    words = [str(Path(sys.executable).parent / "distillkit"), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


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
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--only", nargs="*", choices=STUDENTS, help="some of the students")
    parser.add_argument("--demo", type=Path, default=ROOT / "demo-output", help="the folder of `make demo`")
    parser.add_argument("--train", type=Path, help="another capture to train on")
    parser.add_argument("--held-out", type=Path, help="another capture to measure on")
    parser.add_argument("--output", type=Path, default=ROOT / "benches" / ".cache" / "students")
    arguments = parser.parse_args()
    if not (arguments.demo / TEACHER).exists():
        parser.error(f"{arguments.demo} has no {TEACHER}: run `make demo` first")
    results = {}
    for name in arguments.only or STUDENTS:
        results[name] = run(name, arguments)
        print(name, {key: round(results[name][key], 4) for key in MEASURES}, file=sys.stderr, flush=True)
    report(results, arguments.steps)


if __name__ == "__main__":
    main()

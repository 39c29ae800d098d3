"""vLLM and transformers as the demo teacher's engine: the same text captured by both, and students trained from both.

    make demo test-vllm              # once: teacher, student and held-out capture; the environment with vLLM
    python benches/engines.py [--characters 430000] [--steps 100] [--seeds 42 43] [--vllm .venv-vllm/bin/python]

It says how far the engines' distributions are apart (over the ids that both stored), and the held-out KL of the
students, measured against the demo's own held-out capture. The seeds' spread is the noise that a difference is judged
by. Captures and runs that are done are not done again. The table goes to benches/results/ and to standard output.
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

import numpy as np
import yaml

from distillkit.shards import Dataset

ROOT = Path(__file__).resolve().parent.parent
MAX_SEQ_LEN = 512


def write_text(path: Path, characters: int) -> None:
    """Python's help topics, without those that share a paragraph with the demo's held-out text."""
    sys.path.insert(0, str(ROOT / "examples"))
    import demo

    demo.make_text(path.parent / "text", demo.TRAIN_CHARACTERS)
    held_out = {json.loads(line)["topic"] for line in (path.parent / "text" / "held-out.jsonl").open(encoding="utf-8")}
    from pydoc_data.topics import topics

    rows, size = [], 0
    for group in demo.related_groups(topics):
        if held_out.isdisjoint(group):
            for topic in group:
                text = topics[topic][: characters - size]
                size += len(text)
                rows += [{"topic": topic, "text": text}] if text else []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def capture(python: str, engine: str, demo: Path, text: Path, output: Path) -> dict[str, Any]:
    """Capture with one engine; the report of the run that did it."""
    report = output.with_suffix(".json")
    if not report.exists():
        command = [python, "-m", "distillkit", "capture", "--engine", engine, "--dtype", "float32", "--json"]
        options = {
            "model": demo / "SmolLM2-135M-Instruct",
            "dataset": text,
            "output": output,
            "max-seq-len": MAX_SEQ_LEN,
        }
        arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "python")}
        done = subprocess.run([*command, *arguments], check=True, stdout=subprocess.PIPE, text=True, env=environment)
        report.write_text(done.stdout[done.stdout.index("{") :], encoding="utf-8")
    found: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return found


def compare(first: Path, second: Path) -> dict[str, float]:
    """How far apart two captures of one text are: documents and tokens must be the same.

    KL and errors are over the ids that both have in a row, renormalised for the KL.
    """
    kl, errors, same_first, shared, rows = [], [], 0, 0, 0
    a, b = Dataset.open(first), Dataset.open(second)
    assert len(a) == len(b), (len(a), len(b))
    for (one, p), (other, q) in zip(a.decoded(), b.decoded(), strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        same_first += int((p.ids[:, 0] == q.ids[:, 0]).sum())
        rows += len(p.ids)
        for ids_p, log_p, ids_q, log_q in zip(p.ids, p.logprobs, q.ids, q.logprobs, strict=True):
            _, of_p, of_q = np.intersect1d(ids_p, ids_q, assume_unique=True, return_indices=True)
            left, right = log_p[of_p].astype(np.float64), log_q[of_q].astype(np.float64)
            shared += len(of_p)
            likely = left > np.log(1e-3)
            errors.append(np.abs(left - right)[likely].max(initial=0.0))
            left, right = (values - np.log(np.exp(values).sum()) for values in (left, right))
            kl.append(float((np.exp(left) * (left - right)).sum()))
    return {
        "rows": rows,
        "same_first_id": same_first / rows,
        "shared_ids": shared / (rows * a.codec.k),
        "kl_mean": float(np.mean(kl)),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "error_p50": float(np.median(errors)),
        "error_p99": float(np.quantile(errors, 0.99)),
        "error_max": float(np.max(errors)),
    }


def train(demo: Path, captured: Path, output: Path, steps: int, seed: int) -> dict[str, Any]:
    """Train the demo's student from a capture with `distillkit config.yaml`; its last evaluation."""
    config = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text(encoding="utf-8"))
    folder = output / f"{captured.name}-{steps}-{seed}"
    config["model"], config["output_path"] = str(demo / "student"), str(folder)
    config["dataset"]["train_dataset"]["disk_path"] = str(captured)
    config["dataset"]["eval_dataset"]["disk_path"] = str(demo / "captured" / "held-out")
    config["dataset"]["seed"] = seed
    config["training_args"] |= {"max_steps": steps, "eval_steps": steps, "eval_on_start": False, "seed": seed}
    summary = folder / "summary.json"
    if not summary.exists():
        path = output / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "distillkit", str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    result: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))["eval_last"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--characters", type=int, default=430_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43])
    parser.add_argument("--vllm", default=str(ROOT / ".venv-vllm" / "bin" / "python"), help="a Python that has vLLM")
    parser.add_argument("--demo", type=Path, default=ROOT / "demo-output")
    parser.add_argument("--output", type=Path, default=ROOT / "benches" / ".cache" / "engines")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    text = output / "text.jsonl"
    if not text.exists():
        write_text(text, arguments.characters)

    table = []
    for engine, python in (("hf", sys.executable), ("vllm", arguments.vllm)):
        report = capture(python, engine, arguments.demo, text, output / engine)
        line = {"engine": engine, "tokens": report["tokens"], "tokens_per_second": report["tokens_per_second"]}
        print(line, file=sys.stderr, flush=True)
        table.append(line)
    apart = compare(output / "hf", output / "vllm")
    print("engines apart:", apart, file=sys.stderr, flush=True)
    for line in table:
        for seed in arguments.seeds:
            measured = train(arguments.demo, output / str(line["engine"]), output, arguments.steps, seed)
            line[f"held_out_kl_seed_{seed}"] = measured["eval_kl"]
            print(line, file=sys.stderr, flush=True)
    path = ROOT / "benches" / "results" / f"{datetime.date.today()}-{platform.machine()}-engines.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*table[0], *apart])
        writer.writeheader()
        writer.writerows({**{name: f"{value:.6g}" for name, value in apart.items()}, **line} for line in table)
    print(path.read_text())


if __name__ == "__main__":
    main()

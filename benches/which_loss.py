"""Which loss, which handling of missing probability, which k: the demo's student trained with each, the same budget.

    make demo                       # once: teacher, text, captures, student
    python benches/which_loss.py [--steps 50] [--only NAME …] [--output FOLDER]

Every run is `distillkit CONFIG.yaml` with examples/demo.yaml, but for its losses and its number of steps. Captures of
smaller k are made of the demo's own: each document's first k ids, encoded with as many exact values. Runs that are done
are not done again. The table goes to benches/results/ and, as Markdown, to standard output.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from distillkit.codec import Codec, DistributionQuantizationConfig
from distillkit.shards import Dataset, ShardWriter
from distillkit.types import SparseLogprobs

ROOT = Path(__file__).resolve().parent.parent
WHOLE = 128
MEASURES = ("eval_kl", "eval_cross_entropy", "eval_perplexity", "eval_top1_agreement")


@dataclass(frozen=True)
class Row:
    """One run: a loss, what it takes, its share beside cross-entropy, and the k of its capture."""

    function: str
    missing: str | None = "zero"
    k: int = WHOLE
    weight: float = 0.9
    temperature: float = 1.0

    @property
    def name(self) -> str:
        parts = [self.function, self.missing, f"k{self.k}", f"{self.weight:g}"]
        parts += [f"T{self.temperature:g}"] if self.temperature != 1.0 else []
        return "-".join(part for part in parts if part)

    def losses(self) -> list[dict[str, Any]]:
        if self.function == "cross_entropy":
            return [{"function": "cross_entropy", "weight": 1.0}]
        entry: dict[str, Any] = {"function": self.function, "weight": self.weight, "temperature": self.temperature}
        if self.missing is not None:
            entry["missing_probability_handling"] = self.missing
        rest = round(1.0 - self.weight, 6)
        return [{"function": "cross_entropy", "weight": rest}, entry] if rest else [entry]


ROWS = [
    Row("cross_entropy", None, weight=0.0),
    Row("kl", "zero"),
    Row("kl", "uniform"),
    Row("kl", "label"),
    Row("kl", "zero", k=8),
    Row("kl", "uniform", k=8),
    Row("kl", "label", k=8),
    Row("jsd", "uniform"),
    Row("reverse_kl", "uniform"),
    Row("skewed_kl", "uniform"),
    Row("skewed_reverse_kl", "uniform"),
    Row("adaptive_kl", "uniform"),
    Row("kl", "zero", weight=0.5),
    Row("kl", "uniform", temperature=2.0),
    Row("kl", "uniform", k=32),
]


def shortened(source: Path, k: int, target: Path) -> Path:
    """A captured dataset with the first k ids of every position."""
    if k == WHOLE or target.exists():
        return source if k == WHOLE else target
    dataset = Dataset.open(str(source))
    codec = Codec(
        DistributionQuantizationConfig(
            d=dataset.codec.vocab_size, k=k, exact_k=k, exact_dtype="bfloat16", residual_bins=[], delta_encoding=False
        )
    )
    unfinished = target.with_name(f".{target.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    with ShardWriter(unfinished, replace(dataset.header, codec=codec.to_dict(), fidelity=None)) as writer:
        for number in range(len(dataset)):
            document = dataset[number]
            rows = dataset.codec.decode_document(document.teacher, document.num_rows)
            first = (np.asarray(part)[:, :k] for part in (rows.ids, rows.logprobs))
            writer.write(document.input_ids, SparseLogprobs(*first))
    unfinished.rename(target)
    return target


def run(row: Row, demo: Path, output: Path, steps: int) -> dict[str, Any]:
    """Train one row, if that is not done yet; its summary."""
    config = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text(encoding="utf-8"))
    folder = output / f"{row.name}-{steps}"
    config["model"], config["output_path"] = str(demo / "student"), str(folder)
    train = shortened(demo / "captured" / "train", row.k, output / f"train-k{row.k}")
    # Held-out documents are always measured against the whole capture.
    config["dataset"]["train_dataset"]["disk_path"] = str(train)
    config["dataset"]["eval_dataset"]["disk_path"] = str(demo / "captured" / "held-out")
    config["loss_functions"] = row.losses()
    config["training_args"] |= {"max_steps": steps, "eval_steps": steps, "eval_on_start": False}
    summary = folder / "summary.json"
    if not summary.exists():
        path = output / f"{folder.name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        command = [str(Path(sys.executable).parent / "distillkit"), str(path)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
    result: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))["eval_last"]
    return result


def report(results: dict[Row, dict[str, Any]], steps: int) -> None:
    """Write the table, the best KL first."""
    ordered = sorted(results.items(), key=lambda item: item[1]["eval_kl"])
    print(f"| loss | missing | k | weight beside cross-entropy | T | {' | '.join(MEASURES)} |")
    print("|---" * (5 + len(MEASURES)) + "|")
    for row, measured in ordered:
        values = [f"{measured[name]:.1%}" if "top1" in name else f"{measured[name]:.3f}" for name in MEASURES]
        print(
            f"| `{row.function}` | {row.missing or '–'} | {row.k} | {row.weight:g} | {row.temperature:g} | "
            f"{' | '.join(values)} |"
        )
    path = ROOT / "benches" / "results" / f"{datetime.date.today()}-{platform.machine()}-which-loss.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["function", "missing", "k", "weight", "temperature", "steps", *MEASURES])
        for row, measured in ordered:
            settings = [row.function, row.missing or "", row.k, row.weight, row.temperature, steps]
            writer.writerow([*settings, *(f"{measured[name]:.6g}" for name in MEASURES)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", nargs="*", help="names of rows, as in the output's folders")
    parser.add_argument("--demo", type=Path, default=ROOT / "demo-output")
    parser.add_argument("--output", type=Path, default=ROOT / "benches" / ".cache" / "which-loss")
    arguments = parser.parse_args()
    if not (arguments.demo / "captured" / "held-out" / "manifest.json").exists():
        parser.error(f"{arguments.demo} has no captures: run `make demo` first")
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {}
    for row in ROWS:
        if arguments.only and row.name not in arguments.only:
            continue
        results[row] = run(row, arguments.demo, arguments.output, arguments.steps)
        print(row.name, {name: round(results[row][name], 4) for name in MEASURES}, file=sys.stderr, flush=True)
    report(results, arguments.steps)


if __name__ == "__main__":
    main()

"""The losses' pass against losses of whole logits: time and peak memory, and first that both agree.

    python benches/losses.py [--vocabulary 151936] [--positions 2048] [--hidden 1024] [--k 128]

Cross-entropy and KL of a student's hidden states and head weight, forward and backward, float32. `fused` is
`distillkit.losses.fused`; `whole` makes all logits first and takes each loss from them, as the published trainer does.
Each side runs in a process of its own (on Linux); its memory is the peak above what was resident before the pass,
without the gradient of the head's weight, which either side has to return.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from distillkit.bench.machine import machine
from distillkit.losses.config import LossConfig
from distillkit.losses.fused import Objective
from distillkit.losses.positions import Targets
from distillkit.models.head import LMHead
from distillkit.types import SparseLogprobs

RESULTS = Path(__file__).resolve().parent / "results"
SIDES = ("fused", "whole")
MOST_OF_MEMORY, MOST_OF_TIME = 0.1, 1.1


class Head(LMHead):
    """A head without a model around it."""

    def __init__(self, weight: torch.Tensor) -> None:
        for name, value in (("scale", 1.0), ("softcap", None), ("weight", weight)):
            object.__setattr__(self, name, value)

    def weights(self) -> tuple[torch.Tensor, None]:
        return self.weight, None


def problem(vocabulary: int, positions: int, hidden: int, k: int) -> tuple[torch.Tensor, torch.Tensor, Targets]:
    """Hidden states, a head's weight, and targets; the same in every process."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(positions, hidden, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, generator=generator) / hidden**0.5).requires_grad_()
    # Distinct ids: a random start, and steps that never come round.
    steps = torch.randint(1, vocabulary // k, (positions, k), generator=generator)
    ids = (steps.cumsum(-1) + torch.randint(vocabulary, (positions, 1), generator=generator)) % vocabulary
    logprobs = (torch.randn(positions, k, generator=generator) * 2).log_softmax(-1) - 0.05
    order = logprobs.argsort(-1, descending=True)
    teacher = SparseLogprobs(ids.gather(-1, order), logprobs.gather(-1, order))
    return states, weight, Targets(ids[:, 0], teacher)


def fused(states: torch.Tensor, weight: torch.Tensor, targets: Targets) -> torch.Tensor:
    losses = [LossConfig(function="cross_entropy", weight=0.5), LossConfig(function="kl", weight=0.5)]
    return Objective.training(losses)(Head(weight), states, targets).loss


def whole(states: torch.Tensor, weight: torch.Tensor, targets: Targets) -> torch.Tensor:
    logits = F.linear(states, weight)
    entropy = F.cross_entropy(logits.float(), targets.labels, reduction="sum")
    student = logits.float().log_softmax(-1).gather(-1, targets.teacher.ids)
    target = targets.teacher.logprobs.log_softmax(-1)
    return 0.5 * entropy + 0.5 * (target.exp() * (target - student)).sum()


def status(name: str) -> int:
    """One of this process's sizes, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def run(side: str, sizes: tuple[int, int, int, int], repeats: int) -> dict[str, float]:
    """Measure one side in this process."""
    states, weight, targets = problem(*sizes)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = status("VmRSS")
    seconds = []
    for _ in range(repeats):
        states.grad = weight.grad = None
        started = time.perf_counter()
        value = globals()[side](states, weight, targets)
        value.backward()
        seconds.append(time.perf_counter() - started)
    peak = status("VmHWM") - before
    assert states.grad is not None
    assert weight.grad is not None
    return {
        "seconds": min(seconds),
        "bytes": peak - weight.grad.numel() * 4,
        "loss": value.item(),
        "states_gradient": states.grad.double().norm().item(),
        "weight_gradient": weight.grad.double().norm().item(),
        "one_gradient": weight.grad[targets.teacher.ids[0, 0]].double().sum().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("vocabulary", 151_936), ("positions", 2048), ("hidden", 1024), ("k", 128), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = (arguments.vocabulary, arguments.positions, arguments.hidden, arguments.k)
    if arguments.side:
        print(json.dumps(run(arguments.side, sizes, arguments.repeats)))
        return
    results = {}
    for side in SIDES:
        command = [sys.executable, __file__, "--side", side, "--repeats", str(arguments.repeats)]
        for name, size in zip(("vocabulary", "positions", "hidden", "k"), sizes, strict=True):
            command += [f"--{name}", str(size)]
        results[side] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for name in ("loss", "states_gradient", "weight_gradient", "one_gradient"):
        values = [results[side][name] for side in SIDES]
        assert abs(values[0] - values[1]) <= 1e-4 * abs(values[1]), (name, values)
    report(results, sizes)


def report(results: dict[str, dict[str, float]], sizes: tuple[int, int, int, int]) -> None:
    ratios = {name: results["fused"][name] / results["whole"][name] for name in ("seconds", "bytes")}
    vocabulary, positions, hidden, k = sizes
    table = Table(title=f"V = {vocabulary:,}, {positions:,} positions, hidden {hidden:,}, k = {k}; {machine()}")
    for column in ("", *SIDES, "ratio", "at most"):
        table.add_column(column, justify="right" if column else "left")
    for name, unit, scale, most in (("seconds", "s", 1, MOST_OF_TIME), ("bytes", "MB", 1e6, MOST_OF_MEMORY)):
        values = [f"{results[side][name] / scale:,.2f} {unit}" for side in SIDES]
        table.add_row("peak extra memory" if name == "bytes" else "time", *values, f"{ratios[name]:.3f}", f"{most}")
    Console().print(table)
    path = RESULTS / f"{datetime.date.today()}-{platform.machine()}-losses.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["machine", "vocabulary", "positions", "hidden", "k", "side", "seconds", "bytes"])
        for side in SIDES:
            writer.writerow([machine(), *sizes, side, results[side]["seconds"], int(results[side]["bytes"])])
    Console().print(f"figures in {path.relative_to(RESULTS.parent.parent)}")
    if ratios["seconds"] > MOST_OF_TIME or ratios["bytes"] > MOST_OF_MEMORY:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

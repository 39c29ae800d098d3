"""Which bytes make the better student: the demo's student trained from every way to store the teacher.

    make demo                       # once: teacher, text, student
    python benches/rate_distortion.py [--steps 150] [--seeds 1 2 3] [--only NAME …] [--done] [--output FOLDER]

The teacher's 256 most probable ids are captured once, exactly; every row is a conversion of that capture (or, for
sampled targets, a capture of its own), trained by `distillkit CONFIG.yaml` with examples/demo.yaml: the same steps, and
for a seed the same order of documents. Two runs frame them: cross-entropy alone, and a live teacher with its whole
vocabulary. Every student is measured against the live teacher's whole distribution on held-out text.

The cheap proxy beside it is the gradient at the hidden states of the untrained student, position by position: its
cosine with the gradient of the whole-vocabulary KL, and its squared error relative to it.

Bytes are those of the held-out documents, which no prior was learned from. Runs that are done are not done again; with
`--done`, others are left out. The table goes to benches/results/ and, as Markdown, to standard output; the plot beside
it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import AutoModelForCausalLM

from distillkit.losses.config import LossConfig
from distillkit.losses.fused import Objective
from distillkit.losses.positions import Targets, TeacherLogits
from distillkit.models.head import backbone_hidden, check_lm_head
from distillkit.shards import Dataset
from distillkit.types import Document, SparseLogprobs

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"
TOKENS = 512
AMORTISED = 10_000_000
"""Tokens over which the bytes of a dataset's prior are spread."""
PROXY_POSITIONS = 1_000


@dataclass(frozen=True, eq=False)
class Way:
    """A way to give the student its teacher.

    Attributes:
        name: in the table, and of its folders.
        preset: what the exact capture is converted to; None for a way that has no such capture.
        config: a codec's configuration instead of a preset.
        draws: sampled targets: draws per position.
    """

    name: str
    preset: str | None = None
    config: dict[str, Any] | None = None
    draws: int | None = None

    @property
    def stored(self) -> bool:
        return self.preset is not None or self.config is not None or self.draws is not None


def fixed(k: int) -> dict[str, Any]:
    """The published layout with the first k ids, as faithful per value as `recommended`'s exact ranks."""
    return {"k": k, "exact_k": k, "exact_dtype": "bfloat16", "residual_bins": [], "delta_encoding": False}


CROSS_ENTROPY, FULL = Way("cross-entropy alone"), Way("full vocabulary, live")
WAYS = [
    CROSS_ENTROPY,
    FULL,
    Way("recommended", "recommended"),
    Way("budget", "budget"),
    Way("fixed k = 8", config=fixed(8)),
    Way("fixed k = 24", config=fixed(24)),
    Way("compact-128", "compact-128"),
    Way("compact-50", "compact-50"),
    Way("compact-adaptive", "compact-adaptive"),
    Way("sampled, 12 draws", draws=12),
    Way("sampled, 50 draws", draws=50),
]


@dataclass(frozen=True)
class Measured:
    """One student on the held-out text, against the whole distribution of the live teacher."""

    kl: float
    perplexity: float
    top1: float


# -- captures ----------------------------------------------------------------------------------------------------------


class Bench:
    """Where everything is: the demo's parts, and the folder of this benchmark."""

    def __init__(self, demo: Path, output: Path, steps: int) -> None:
        self.demo, self.output, self.steps = demo, output, steps
        self.teacher = next(path.parent for path in sorted(demo.glob("SmolLM2*/config.json")))
        self.student = demo / "student"
        output.mkdir(parents=True, exist_ok=True)

    def capture(self, name: str, way: Way) -> Path:
        """The training or held-out text as a way stores it."""
        if way.draws is not None:
            config = {"sampled": {"vocab_size": self.width(), "draws": way.draws}}
            return self._captured(name, f"sampled-{way.draws}", config)
        exact = self._captured(name, "exact", {"logprob_compressor": {"d": self.width(), **fixed(256)}}, "float32")
        folder = self.output / f"{name}-{way.name.replace(' ', '')}"
        if not (folder / "manifest.json").exists():
            if way.config is None:
                codec = ["--preset", str(way.preset)]
            else:
                path = self.output / f"{folder.name}.yaml"
                path.write_text(yaml.safe_dump({"logprob_compressor": {"d": self.width(), **way.config}}))
                codec = ["--compression-config", str(path)]
            prior = self._prior(name, f"train-{way.name.replace(' ', '')}")
            run("distillkit-codec", "convert", exact, folder, *codec, *prior)
        return folder

    def _prior(self, name: str, train: str) -> list[str]:
        """Options by which the held-out text is stored with the prior of the training text."""
        own = self.output / train
        return ["--prior", str(own)] if name != "train" and (own / "prior.bin").exists() else []

    def _captured(self, name: str, how: str, config: dict[str, Any], dtype: str | None = None) -> Path:
        folder, path = self.output / f"{name}-{how}", self.output / f"{how}.yaml"
        if dtype is not None:
            config["logprob_compressor"]["exact_dtype"] = dtype
        if not (folder / "manifest.json").exists():
            path.write_text(yaml.safe_dump(config))
            text = self.demo / "text" / f"{name}.jsonl"
            options = ["--model", self.teacher, "--dataset", text, "--output", folder]
            options += self._prior(name, f"train-{how}")
            run("distillkit", "capture", *options, "--compression-config", path, "--max-seq-len", str(TOKENS))
        return folder

    def width(self) -> int:
        return int(json.loads((self.teacher / "config.json").read_text())["vocab_size"])

    def bytes_per_token(self, way: Way) -> float:
        """Bytes of the held-out rows, with the prior spread over ten million tokens."""
        if not way.stored:
            return 0.0
        folder = self.capture("held-out", way)
        documents = list(Dataset.open(str(folder)))
        teacher = sum(len(document.teacher) for document in documents)
        prior = folder / "prior.bin"
        shared = prior.stat().st_size / AMORTISED if prior.exists() else 0.0
        return teacher / sum(document.num_rows for document in documents) + shared


def run(*command: str | Path) -> None:
    """One of distillkit's commands."""
    program = Path(sys.executable).parent / str(command[0])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([program, *map(str, command[1:])], check=True, stdout=subprocess.DEVNULL, env=environment)


# -- training ----------------------------------------------------------------------------------------------------------


def measurement(bench: Bench, way: Way, seed: int) -> Path:
    """Where a run's figures are once it is done."""
    return bench.output / f"{way.name.replace(' ', '')}-{bench.steps}-{seed}.json"


def trained(bench: Bench, way: Way, seed: int) -> Measured:
    """Trains a student, if that is not done yet, and measures it."""
    found = measurement(bench, way, seed)
    folder = found.with_suffix("")
    if not found.exists():
        shutil.rmtree(folder, ignore_errors=True)
        path = folder.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(training(bench, way, seed, folder), sort_keys=False))
        run("distillkit", path)
        measured = evaluated(bench, folder)
        found.write_text(json.dumps(asdict(measured)))
        shutil.rmtree(folder)
    return Measured(**json.loads(found.read_text()))


def training(bench: Bench, way: Way, seed: int, folder: Path) -> dict[str, Any]:
    """The demo's configuration, but for the teacher, the losses and the seed."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text(encoding="utf-8"))
    config |= {"model": str(bench.student), "output_path": str(folder)}
    shown = way if way.stored else WAYS[2]
    config["dataset"] = {"train_dataset": {"disk_path": str(bench.capture("train", shown))}, "seed": seed}
    kept = ("save_strategy", "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size")
    arguments = {key: value for key, value in config["training_args"].items() if key not in kept}
    config["training_args"] = arguments | {"max_steps": bench.steps, "seed": seed, "save_strategy": "no"}
    if way == CROSS_ENTROPY:
        config["loss_functions"] = [{"function": "cross_entropy", "weight": 1.0}]
    elif way == FULL:
        config["teacher"] = {"kind": "hf", "path": str(bench.teacher), "kwargs": {"dtype": "float32"}}
    return config


@torch.no_grad()
def evaluated(bench: Bench, folder: Path) -> Measured:
    """A student against the live teacher on the held-out documents: sums over positions, in float64."""
    teacher, student = loaded(bench.teacher), loaded(folder)
    total = np.zeros(3)
    count = 0
    for document in Dataset.open(str(bench.capture("held-out", WAYS[2]))):
        log_p, log_q = (log_probs(model, document) for model in (teacher, student))
        labels = torch.from_numpy(document.input_ids[1:].astype(np.int64))
        divergence = (log_p.exp() * (log_p - log_q)).sum()
        loss = -log_q.gather(-1, labels.unsqueeze(-1)).sum()
        total += [divergence.item(), loss.item(), (log_p.argmax(-1) == log_q.argmax(-1)).sum().item()]
        count += len(labels)
    kl, loss, agreement = total / count
    return Measured(float(kl), float(np.exp(loss)), float(agreement))


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_probs(model: Any, document: Document) -> torch.Tensor:
    """(L − 1, V) float64 log-probabilities of each next token."""
    ids = torch.from_numpy(document.input_ids.astype(np.int64)).unsqueeze(0)
    return model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)


# -- the proxy ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proxy:
    """Gradients at the untrained student's hidden states: mean cosine with the whole-vocabulary KL's, and the median of
    the squared error relative to it."""

    cosine: float
    error: float


def proxies(bench: Bench, ways: list[Way]) -> Iterator[tuple[Way, Proxy]]:
    """The proxy of every way that stores the teacher."""
    teacher, student = loaded(bench.teacher), loaded(bench.student)
    head = check_lm_head(student)
    objective = Objective.training([LossConfig(function="kl", weight=1.0, missing_probability_handling="uniform")])

    def gradient(hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
        leaf = hidden.clone().requires_grad_()
        objective(head, leaf, targets).loss.backward()
        return leaf.grad.double()

    rows: dict[Way, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    sources = {way: Dataset.open(str(bench.capture("held-out", way))) for way in ways if way.stored}
    seen = 0
    for number in range(len(next(iter(sources.values())))):
        document = next(iter(sources.values()))[number]
        ids = torch.from_numpy(document.input_ids.astype(np.int64)).unsqueeze(0)
        with torch.no_grad():
            dense = teacher(input_ids=ids, use_cache=False).logits[0, :-1].float()
            hidden = backbone_hidden(student, input_ids=ids)[0, :-1]
        full = gradient(hidden, Targets(ids[0, 1:], TeacherLogits(dense)))
        for way, dataset in sources.items():
            stored = dataset.codec.decode_document(dataset[number].teacher, document.num_rows)
            parts = (torch.from_numpy(np.asarray(part)) for part in (stored.ids, stored.logprobs))
            sparse = SparseLogprobs(*parts, stored.draws)
            found = gradient(hidden, Targets(ids[0, 1:], sparse))
            cosine = torch.nn.functional.cosine_similarity(found, full, dim=-1)
            error = (found - full).square().sum(-1) / full.square().sum(-1)
            rows.setdefault(way, []).append((cosine, error))
        seen += len(hidden)
        if seen >= PROXY_POSITIONS:
            break
    for way, parts in rows.items():
        cosine, error = (torch.cat(each) for each in zip(*parts, strict=True))
        yield way, Proxy(float(cosine.mean()), float(error.median()))


# -- results -----------------------------------------------------------------------------------------------------------


def spread(values: list[float], form: str) -> str:
    """Mean, and standard deviation over the seeds where there are several."""
    mean = format(statistics.fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), form)}"


def table(found: dict[Way, list[Measured]], sizes: dict[Way, float], proxy: dict[Way, Proxy]) -> list[dict[str, str]]:
    """One line for each way, by bytes."""
    plain, full = (statistics.fmean(each.kl for each in found[way]) for way in (CROSS_ENTROPY, FULL))
    lines = []
    for way in sorted(found, key=lambda way: (way.stored, sizes[way])):
        measured, cheap = found[way], proxy.get(way)
        closed = [(plain - each.kl) / (plain - full) for each in measured]
        lines.append(
            {
                "stored": way.name,
                "seeds": str(len(measured)),
                "bytes a token": f"{sizes[way]:.1f}" if way.stored else "–",
                "held-out KL": spread([each.kl for each in measured], ".4f"),
                "perplexity": spread([each.perplexity for each in measured], ".1f"),
                "top-1": spread([100 * each.top1 for each in measured], ".2f") + " %",
                "gap closed": spread([100 * share for share in closed], ".1f") + " %",
                "gradient's cosine": "–" if cheap is None else f"{cheap.cosine:.4f}",
                "its squared error": "–" if cheap is None else f"{cheap.error:.1e}",
            }
        )
    return lines


def plot(found: dict[Way, list[Measured]], sizes: dict[Way, float], path: Path) -> None:
    """Held-out KL over bytes a token, one mark a seed, with the two runs that frame them as lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for way, measured in found.items():
        values = [each.kl for each in measured]
        if way.stored:
            axis.plot([sizes[way]] * len(values), values, "o", label=way.name)
        else:
            axis.axhline(statistics.fmean(values), linestyle="--", color="0.4")
            axis.annotate(way.name, (sizes[FULL] + 20, statistics.fmean(values)), va="bottom", color="0.3")
    axis.set(xscale="log", xlabel="bytes a token", ylabel="held-out KL(teacher ‖ student), nats, whole vocabulary")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="*", help="names of ways; the two that frame them are always run")
    parser.add_argument("--done", action="store_true", help="the table of the runs that are done")
    parser.add_argument("--demo", type=Path, default=ROOT / "demo-output")
    parser.add_argument("--output", type=Path, default=ROOT / "benches" / ".cache" / "rate-distortion")
    arguments = parser.parse_args()
    if not (arguments.demo / "student" / "config.json").exists():
        parser.error(f"{arguments.demo} has no student: run `make demo` first")
    bench = Bench(arguments.demo, arguments.output, arguments.steps)
    chosen = [way for way in WAYS if not arguments.only or way.name in arguments.only or not way.stored]
    for way in chosen:
        for name in ("train", "held-out") if way.stored else ():
            bench.capture(name, way)
    sizes = {way: bench.bytes_per_token(way) for way in chosen}
    proxy = dict(proxies(bench, chosen))
    found: dict[Way, list[Measured]] = {}
    for seed in arguments.seeds:
        for way in chosen:
            if arguments.done and not measurement(bench, way, seed).exists():
                continue
            found.setdefault(way, []).append(trained(bench, way, seed))
            print(way.name, seed, found[way][-1], file=sys.stderr, flush=True)
    lines = table(found, sizes, proxy)
    print(" | ".join(["", *lines[0], ""]).strip())
    print("|---" * len(lines[0]) + "|")
    for line in lines:
        print(" | ".join(["", *line.values(), ""]).strip())
    path = RESULTS / f"{datetime.date.today()}-{platform.machine()}-rate-distortion.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["steps", *lines[0]])
        writer.writeheader()
        writer.writerows({"steps": arguments.steps, **line} for line in lines)
    plot(found, sizes, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

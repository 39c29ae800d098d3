"""What retokenised rows keep of a teacher, what they take, and whether a student learns from them.

    make demo                                                   # once: teacher and text
    pip install --no-deps mistral-common dashscope
    python benches/retokenize.py [--demo FOLDER] [--output FOLDER] [--captures FOLDER] [--pairs NAME …]
        [--students NAME …] [--documents 12] [--steps 120] [--rates 1e-3 2e-3] [--seeds 1 2]

The demo's teacher, SmolLM2-135M-Instruct, is captured once and stored with its 128 most probable ids (`compact-128`;
`--captures` has `train-compact-128` and `held-out-compact-128` if that is done). The captures are retokenised for
students with each of the tokenizers (`--pairs`) of `benches/real_tokenizers.py`. The first table has, for the held-out
text, where the student's positions lie, the probability that rows store, and the bits per byte that the text takes by
the teacher's rows and by the student's. An id that a row does not store has an even share of its missing mass, on both
sides. The second has tokens of the teacher per CPU second on one core, from encoded rows to encoded rows, when the map
sees a text for the first time and again, and the CPU time of the command with one process.

The third is of students (`--students`): some of the teacher's layers, and the embedding of each of their tokens is the
average of those of the teacher's tokens of the same bytes. They are trained by cross-entropy alone, and by the default
losses on the retokenised rows, with the same documents, steps, order and learning rates, and measured in bits per byte
of the held-out text. Runs that are done are not done again. The tables go to benches/results/ and, as Markdown, to
standard output.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent))
from real_tokenizers import write_tokenizer

from distillkit.codec import preset
from distillkit.retokenize import Figures, Settings, retokenize
from distillkit.retokenize.chats import ChatReader
from distillkit.retokenize.rows import rewrite
from distillkit.retokenize.token_map import TokenMap
from distillkit.retokenize.vocabulary import read_vocabulary
from distillkit.shards import Dataset
from distillkit.shards.convert import convert, target_codec
from distillkit.shards.writer import encode_rows
from distillkit.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
EXACT = {"k": 256, "exact_k": 256, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False}
TEACHER = "SmolLM2-135M-Instruct"
REPEATED = 3
LENGTH = 256  # of the students' sequences
LOSSES = {
    "cross-entropy": [{"function": "cross_entropy", "weight": 1.0}],
    "retokenised": [
        {"function": "cross_entropy", "weight": 0.1},
        {"function": "kl", "weight": 0.9, "missing_probability_handling": "uniform"},
    ],
}


@dataclass(frozen=True)
class Bench:
    """Where things are."""

    demo: Path
    output: Path
    captures: Path
    layers: int
    documents: int
    steps: int

    @property
    def teacher(self) -> Path:
        return self.demo / TEACHER

    def captured(self, part: str) -> Path:
        """The teacher's capture of a part of the text, made if it is not there."""
        folder = self.captures / f"{part}-exact"
        if not (folder / "manifest.json").exists():
            codec = self.output / "exact.yaml"
            codec.write_text(yaml.safe_dump({"logprob_compressor": {"d": 49152, **EXACT}}))
            run(
                "distillkit", "capture", "--model", self.teacher, "--dataset", self.demo / "text" / f"{part}.jsonl",
                "--output", folder, "--compression-config", codec, "--max-seq-len", 512,
            )  # fmt: skip
        return folder

    def compact(self, part: str) -> Path:
        """That capture at k = 128 in the compact format, made if it is not there."""
        folder = self.captures / f"{part}-compact-128"
        if not (folder / "manifest.json").exists():
            source = Dataset.open(str(self.captured(part)))
            codec = target_codec(source, preset("compact-128", vocab_size=source.codec.vocab_size), folder=folder)
            convert(source, folder, codec=codec)
        return folder

    def rewritten(self, part: str, student: Path) -> Path:
        """The compact capture for a student, made if it is not there."""
        folder = self.output / f"{part}-{student.name}"
        if not (folder / "manifest.json").exists():
            retokenize(Settings(str(self.compact(part)), str(folder), str(student), tokenizer=str(self.teacher)))
        return folder


def run(*command: object) -> None:
    """Runs a command of distillkit with this interpreter."""
    code = "from distillkit.cli.entry import main; main()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, *map(str, command[1:])], check=True, env=environment)


# -- rows and speed ----------------------------------------------------------------------------------------------------


def measured(bench: Bench, student: Path) -> dict[str, Any]:
    """Figures of the held-out text, and the speed on the other."""
    figures = Figures.from_header(Dataset.open(str(bench.rewritten("held-out", student))).header)
    if figures is None:
        raise SystemExit(f"{student}: has the teacher's tokenizer")
    shares = {name: getattr(figures, name) / figures.positions for name in ("aligned", "inside", "without_row")}
    return {
        "student": student.name,
        **shares,
        "teacher_mass": figures.teacher.mean_mass,
        "student_mass": figures.student.mean_mass,
        "teacher_bits_per_byte": figures.teacher.bits_per_byte,
        "student_bits_per_byte": figures.student.bits_per_byte,
        **speed(bench, student),
    }


def speed(bench: Bench, student: Path) -> dict[str, float]:
    """CPU seconds, and tokens of the teacher per CPU second from encoded rows to encoded rows."""
    folder = bench.output / f"command-{student.name}"
    shutil.rmtree(folder, ignore_errors=True)
    before = children_seconds()
    run(
        "distillkit", "retokenize", bench.compact("train"), folder, "--student", student,
        "--tokenizer", bench.teacher, "--processes", 1,
    )  # fmt: skip
    found = {"command_seconds": children_seconds() - before}
    start = time.process_time()
    teacher = read_vocabulary(load_tokenizer(str(bench.teacher)), "teacher")
    token_map = TokenMap(teacher, read_vocabulary(load_tokenizer(str(student)), "student"))
    found["build_seconds"] = time.process_time() - start
    source, target = Dataset.open(str(bench.compact("train"))), Dataset.open(str(folder)).codec
    documents, chats = list(source), ChatReader(source, token_map)
    seconds = []
    for _ in range(1 + REPEATED):
        start = time.process_time()
        for first in range(0, len(documents), 32):
            for each in rewrite(documents[first : first + 32], source, chats, target, Figures()):
                encode_rows(target, each.rows)
        seconds.append(time.process_time() - start)
    found["first_tokens_per_second"] = source.num_tokens / seconds[0]
    found["again_tokens_per_second"] = source.num_tokens / min(seconds[1:])
    seconds = []
    for _ in range(REPEATED):
        start = time.process_time()
        for document in documents:
            encode_rows(source.codec, source.codec.decode_document(document.teacher, document.num_rows))
        seconds.append(time.process_time() - start)
    found["codec_tokens_per_second"] = source.num_tokens / min(seconds)
    return found


def children_seconds() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# -- students ----------------------------------------------------------------------------------------------------------


def transplanted(bench: Bench, tokenizer: Path) -> Path:
    """Some of the teacher's layers, with another tokenizer: the embedding of each of its tokens is the average of those
    of the teacher's tokens of the same bytes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = bench.output / f"student-{tokenizer.name}-{bench.layers}"
    if (folder / "config.json").exists():
        return folder
    smaller = bench.output / f"student-{bench.layers}"
    if not smaller.exists():
        run("distillkit", "student", bench.teacher, smaller, "--layers", bench.layers)
    model = AutoModelForCausalLM.from_pretrained(smaller, dtype=torch.float32)
    own, other = (AutoTokenizer.from_pretrained(place) for place in (bench.teacher, tokenizer))
    ours, theirs = read_vocabulary(own, "own"), read_vocabulary(other, "other")
    table = model.get_input_embeddings().weight.detach().clone()
    ids, ends = ours.tokenize(theirs.strings)
    mean = table.mean(0)
    rows = [table[torch.from_numpy(part)].mean(0) if len(part) else mean for part in np.split(ids, ends[:-1])]
    rows[other.eos_token_id] = table[own.eos_token_id]
    model.resize_token_embeddings(len(rows), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.stack(rows))
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.bos_token_id = other.eos_token_id, other.bos_token_id
        config.pad_token_id = None
    model.save_pretrained(folder)
    other.save_pretrained(folder)
    return folder


def trained(bench: Bench, student: Path, data: Path, losses: str, rate: float, seed: int) -> float:
    """Bits per byte of the held-out text after training with these losses."""
    import torch

    from distillkit import DistillationTrainer

    done = bench.output / f"{student.name}-{losses}-{bench.documents}-{bench.steps}-{rate:g}-{seed}.json"
    if not done.exists():
        torch.manual_seed(seed)
        arguments = {
            "output_dir": str(bench.output / "training"),
            "max_steps": bench.steps,
            "per_device_train_batch_size": 1,
            "learning_rate": rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "weight_decay": 0.01,
            "gradient_checkpointing": False,
            "logging_steps": 20,
            "save_strategy": "no",
            "report_to": "none",
            "seed": seed,
            "data_seed": seed,
        }
        trainer = DistillationTrainer(
            model=str(student),
            args=arguments,
            train_dataset=str(data),
            num_samples=bench.documents,
            sequence_length=LENGTH,
            overflow="split",
            seed=seed,
            loss_functions=LOSSES[losses],
            frozen_modules=["model.embed_tokens"],  # as in the demo
        )
        trainer.train()
        done.write_text(json.dumps(bits_per_byte(bench, trainer.model, student)))
    return float(json.loads(done.read_text()))


def compared(bench: Bench, name: str, rates: list[float], seeds: list[int]) -> list[dict[str, Any]]:
    """Bits per byte of students trained by cross-entropy alone and on retokenised rows, at each rate and seed."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    student = transplanted(bench, write_tokenizer(name, bench.output / "tokenizers"))
    data = bench.rewritten("train", student)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    start: dict[str, Any] = {
        "student": name,
        "layers": bench.layers,
        "documents": bench.documents,
        "steps": bench.steps,
    }
    start["untrained"] = bits_per_byte(bench, model, student)
    rows = []
    for seed, rate in itertools.product(seeds, rates):
        row = {**start, "rate": rate, "seed": seed}
        row |= {losses: trained(bench, student, data, losses, rate, seed) for losses in LOSSES}
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def bits_per_byte(bench: Bench, model: Any, tokenizer: Path) -> float:
    """Bits that a model takes for a byte of the held-out text, in pieces of the length that it was trained with."""
    import torch

    own = load_tokenizer(str(tokenizer))
    strings = read_vocabulary(own, "student").strings
    bits, count = 0.0, 0
    model.eval()
    for line in (bench.demo / "text" / "held-out.jsonl").read_text(encoding="utf-8").splitlines():
        for ids in torch.tensor(own(json.loads(line)["text"])["input_ids"]).split(LENGTH):
            with torch.no_grad():
                logprobs = model(input_ids=ids[None]).logits[0, :-1].double().log_softmax(-1)
            bits -= logprobs.gather(-1, ids[1:, None]).sum().item() / math.log(2)
            count += sum(len(strings[number]) for number in ids[1:].tolist())
    return bits / count


# -- tables ------------------------------------------------------------------------------------------------------------


def rows_table(rows: list[dict[str, Any]]) -> str:
    """What became of the rows, as Markdown."""
    lines = [
        "| student's tokenizer | aligned | inside | no row | mass, teacher's | student's "
        "| bits per byte, teacher's | student's |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for each in rows:
        teacher, student = each["teacher_bits_per_byte"], each["student_bits_per_byte"]
        lines.append(
            f"| {each['student']} | {each['aligned']:.1%} | {each['inside']:.1%} | {each['without_row']:.2%} "
            f"| {each['teacher_mass']:.2%} | {each['student_mass']:.2%} | {teacher:.4f} "
            f"| {student:.4f} ({student / teacher - 1:+.2%}) |"
        )
    return "\n".join(lines)


def students_table(rows: list[dict[str, Any]]) -> str:
    """Bits per byte of the students, as Markdown."""
    lines = [
        "| student's tokenizer | learning rate | seed | cross-entropy alone | retokenised rows |",
        "|---|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {each['student']} | {each['rate']:g} | {each['seed']} "
        f"| {each['cross-entropy']:.3f} | {each['retokenised']:.3f} |"
        for each in rows
    ]
    return "\n".join(lines)


def speed_table(rows: list[dict[str, Any]]) -> str:
    """CPU time, as Markdown."""
    lines = [
        "| student's tokenizer | map and codec | first time | codec alone | building the map | whole command |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {each['student']} | {each['again_tokens_per_second']:,.0f} | {each['first_tokens_per_second']:,.0f} "
        f"| {each['codec_tokens_per_second']:,.0f} | {each['build_seconds']:.1f} s | {each['command_seconds']:.1f} s |"
        for each in rows
    ]
    return "\n".join(lines)


def record(kind: str, rows: list[dict[str, Any]]) -> None:
    """Writes figures to benches/results/."""
    path = ROOT / "benches" / "results" / f"{datetime.date.today()}-{platform.machine()}-{kind}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )


def main() -> None:
    """Measures what is asked for, writes the results and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--demo", type=Path, default=ROOT / "demo-output")
    parser.add_argument("--output", type=Path, default=ROOT / "benches" / ".cache" / "retokenize")
    parser.add_argument("--captures", type=Path)
    parser.add_argument("--pairs", nargs="*", default=["mistral", "tekken", "qwen"])
    parser.add_argument("--students", nargs="*", default=["mistral"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--documents", type=int, default=12)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3, 2e-3])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.demo, args.output, args.captures or args.output, args.layers, args.documents, args.steps)
    pairs = [measured(bench, write_tokenizer(name, args.output / "tokenizers")) for name in args.pairs]
    students = [row for name in args.students for row in compared(bench, name, args.rates, args.seeds)]
    if pairs:
        record("retokenize", pairs)
        print(rows_table(pairs), speed_table(pairs), sep="\n\n", end="\n\n")
    if students:
        record("retokenize-students", students)
        print(students_table(students))


if __name__ == "__main__":
    main()

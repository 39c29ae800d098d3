"""What retokenised rows keep of a teacher, what they take, and whether a student learns from them.

    make demo                                                   # once: teacher and text
    pip install --no-deps mistral-common dashscope
    python benches/retokenize.py [--demo demo-output] [--output FOLDER] [--students tekken mistral qwen]
        [--captures FOLDER] [--train mistral] [--steps 150] [--seeds 1]

The demo's teacher, SmolLM2-135M-Instruct, is captured once with its 256 most probable ids, exactly (`--captures` has
`train-exact` and `held-out-exact` if that is done). Both captures are retokenised for students with each of the
tokenizers of `benches/real_tokenizers.py`. The table has, for the held-out text, where the student's positions lie, the
probability that rows store, and the bits per byte that the text takes by the teacher's rows and by the student's. An id
that a row does not store has an even share of its missing mass, on both sides.

Speed is CPU time on one core, from encoded rows to encoded rows, at k = 128 (`compact-128` on both sides): for the
first time that the map sees a text, and again.

With `--train`, the demo's student is given that tokenizer: each of its embeddings becomes the average of those of the
teacher's tokens of the same bytes. It is trained by cross-entropy alone and by the demo's losses on the retokenised
rows, with the same steps, text and order, and measured in bits per byte of the held-out text.
"""

from __future__ import annotations

import argparse
import json
import math
import os
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
RESULTS = ROOT / "benches" / "results" / "retokenize.json"
EXACT = {"k": 256, "exact_k": 256, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False}
TEACHER = "SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class Bench:
    """Where things are."""

    demo: Path
    output: Path
    captures: Path
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

    def rewritten(self, part: str, student: Path) -> tuple[Path, Figures]:
        """That capture for a student."""
        folder = self.output / f"{part}-{student.name}"
        shutil.rmtree(folder, ignore_errors=True)
        settings = Settings(str(self.captured(part)), str(folder), str(student), tokenizer=str(self.teacher))
        figures = retokenize(settings).figures
        if figures is None:
            raise SystemExit(f"{student}: has the teacher's tokenizer")
        return folder, figures


def run(*command: object) -> None:
    """Runs a command of distillkit with this interpreter."""
    code = "from distillkit.cli.entry import main; main()"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code, *map(str, command[1:])], check=True, env=environment)


# -- rows and speed ----------------------------------------------------------------------------------------------------


def measured(bench: Bench, student: Path) -> dict[str, Any]:
    """Figures of the held-out text, and the speed on the other."""
    _, figures = bench.rewritten("held-out", student)
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
    """Seconds that the map takes, and tokens of the teacher per CPU second at k = 128."""
    source = Dataset.open(str(bench.captured("train")))
    # What a capture with compact-128 would have stored.
    compact = bench.output / "train-compact-128"
    if not (compact / "manifest.json").exists():
        codec = target_codec(source, preset("compact-128", vocab_size=source.codec.vocab_size), folder=compact)
        convert(source, compact, codec=codec)
    source = Dataset.open(str(compact))
    found: dict[str, float] = {}
    start = time.process_time()
    teacher = read_vocabulary(load_tokenizer(str(bench.teacher)), "teacher")
    token_map = TokenMap(teacher, read_vocabulary(load_tokenizer(str(student)), "student"))
    found["build_seconds"] = time.process_time() - start
    folder = bench.output / f"train-compact-128-{student.name}"
    shutil.rmtree(folder, ignore_errors=True)
    retokenize(Settings(str(compact), str(folder), str(student), tokenizer=str(bench.teacher)))
    target = Dataset.open(str(folder)).codec
    documents, chats = list(source), ChatReader(source, token_map)
    for name in ("first", "again"):
        start = time.process_time()
        for first in range(0, len(documents), 32):
            for each in rewrite(documents[first : first + 32], source, chats, target, Figures()):
                encode_rows(target, each.rows)
        found[f"{name}_tokens_per_second"] = source.num_tokens / (time.process_time() - start)
    start = time.process_time()
    for document in documents:
        encode_rows(source.codec, source.codec.decode_document(document.teacher, document.num_rows))
    found["codec_tokens_per_second"] = source.num_tokens / (time.process_time() - start)
    return found


# -- students ----------------------------------------------------------------------------------------------------------


def transplanted(bench: Bench, tokenizer: Path) -> Path:
    """The demo's student with another tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from distillkit.retokenize.vocabulary import read_vocabulary

    folder = bench.output / f"student-{tokenizer.name}"
    if (folder / "config.json").exists():
        return folder
    model = AutoModelForCausalLM.from_pretrained(bench.demo / "student", dtype=torch.float32)
    own, other = (AutoTokenizer.from_pretrained(place) for place in (bench.teacher, tokenizer))
    ours, theirs = read_vocabulary(own, "own"), read_vocabulary(other, "other")
    table = model.get_input_embeddings().weight.detach()
    ids, ends = ours.tokenize(theirs.strings)
    mean = table.mean(0)
    rows = [table[part].mean(0) if len(part) else mean for part in np.split(ids, ends[:-1])]
    rows[other.eos_token_id] = table[own.eos_token_id]
    model.resize_token_embeddings(len(rows), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.stack(rows))
    model.config.eos_token_id = model.generation_config.eos_token_id = other.eos_token_id
    model.config.bos_token_id = model.generation_config.bos_token_id = other.bos_token_id
    model.save_pretrained(folder)
    other.save_pretrained(folder)
    return folder


def trained(bench: Bench, student: Path, data: Path, losses: str, seed: int) -> float:
    """Bits per byte of the held-out text after training; losses: "cross-entropy" or "retokenised"."""
    folder = bench.output / f"{student.name}-{losses}-{bench.steps}-{seed}"
    found = folder.with_suffix(".json")
    if found.exists():
        return float(json.loads(found.read_text()))
    config: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "demo.yaml").read_text(encoding="utf-8"))
    config |= {"model": str(student), "output_path": str(folder)}
    config["dataset"] = {"train_dataset": {"disk_path": str(data)}, "seed": seed}
    evaluation = ("save_strategy", "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size")
    arguments = {key: value for key, value in config["training_args"].items() if key not in evaluation}
    config["training_args"] = arguments | {"max_steps": bench.steps, "seed": seed, "save_strategy": "no"}
    if losses == "cross-entropy":
        config["loss_functions"] = [{"function": "cross_entropy", "weight": 1.0}]
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    shutil.rmtree(folder, ignore_errors=True)
    run("distillkit", path)
    bits = bits_per_byte(bench, folder)
    found.write_text(json.dumps(bits))
    shutil.rmtree(folder)
    return bits


def bits_per_byte(bench: Bench, model: Path) -> float:
    """Bits that a model takes for a byte of the held-out text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    bits, count = 0.0, 0
    for line in (bench.demo / "text" / "held-out.jsonl").read_text(encoding="utf-8").splitlines():
        text = json.loads(line)["text"]
        ids = torch.tensor([tokenizer(text)["input_ids"][:512]])
        with torch.no_grad():
            logprobs = loaded(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
        bits -= logprobs.gather(-1, ids[0, 1:, None]).sum().item() / math.log(2)
        count += len(tokenizer.decode(ids[0, 1:], skip_special_tokens=True).encode())
    return bits / count


# -- the table ---------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| student's tokenizer | aligned | inside | no row | mass, teacher's | mass, student's "
        "| bits per byte, teacher's | student's | tokens/s, first time | again |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for each in found["rows"]:
        teacher, student = each["teacher_bits_per_byte"], each["student_bits_per_byte"]
        lines.append(
            f"| {each['student']} | {each['aligned']:.1%} | {each['inside']:.1%} | {each['without_row']:.2%} "
            f"| {each['teacher_mass']:.2%} | {each['student_mass']:.2%} | {teacher:.4f} "
            f"| {student:.4f} ({student / teacher - 1:+.2%}) | {each['first_tokens_per_second']:,.0f} "
            f"| {each['again_tokens_per_second']:,.0f} |"
        )
    if found["students"]:
        lines += ["", "| student | untrained | cross-entropy alone | retokenised rows |", "|---|--:|--:|--:|"]
    for each in found["students"]:
        lines.append(
            f"| {each['student']}, {each['steps']} steps, seed {each['seed']} | {each['untrained']:.3f} "
            f"| {each['cross-entropy']:.3f} | {each['retokenised']:.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measures what is asked for, writes the results and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--demo", type=Path, default=Path("demo-output"))
    parser.add_argument("--output", type=Path, default=Path("retokenize-output"))
    parser.add_argument("--captures", type=Path)
    parser.add_argument("--students", nargs="*", default=["tekken", "mistral", "qwen"])
    parser.add_argument("--train", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, nargs="*", default=[1])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.demo, args.output, args.captures or args.output, args.steps)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": [], "students": []}
    for name in args.students:
        rows = measured(bench, write_tokenizer(name, args.output / "tokenizers"))
        found["rows"] = [each for each in found["rows"] if each["student"] != name] + [rows]
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    for name in args.train:
        tokenizer = write_tokenizer(name, args.output / "tokenizers")
        student = transplanted(bench, tokenizer)
        data, _ = bench.rewritten("train", student)
        for seed in args.seeds:
            row = {"student": name, "steps": args.steps, "seed": seed, "untrained": bits_per_byte(bench, student)}
            row |= {losses: trained(bench, student, data, losses, seed) for losses in ("cross-entropy", "retokenised")}
            same = ("student", "steps", "seed")
            kept = [each for each in found["students"] if any(each[key] != row[key] for key in same)]
            found["students"] = [*kept, row]
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()

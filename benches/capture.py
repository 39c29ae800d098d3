"""What capturing takes beyond the teacher itself: the same documents scored with nothing kept, and captured.

    python benches/capture.py [--documents 60] [--length 512] [--teacher FOLDER] [--set preset=compact-50 …]

Three teachers: SmolLM2-135M-Instruct, which the demo uses; its distributions given from memory at 20,000 tokens a
second, as an accelerator gives them, which leaves the CPU to the pipeline; and the same at once, which shows how fast
the pipeline is by itself. A compact codec has the prior that is set (`--set prior=FILE`), or the built-in one: a
capture that learns its prior has some of its rows beforehand. Both sides take turns, shard by shard, in one process;
which is first changes. That each stored document decodes to what the teacher gave is checked at the end.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from distillkit.bench.machine import machine
from distillkit.capture import CaptureSettings
from distillkit.capture.inputs import CaptureInputs
from distillkit.capture.pipeline import StageTimes, capture_shards
from distillkit.capture.settings import DEFAULT_PRESET
from distillkit.capture.shard_plan import ShardPlan
from distillkit.capture.teachers.base import RowRequest, ScoredDocument, Teacher
from distillkit.codec import Codec
from distillkit.shards.manifest import shard_name
from distillkit.shards.prior import keep_prior
from distillkit.shards.reader import ShardFile
from distillkit.shards.storage import Folder
from distillkit.text.tokenizer import load_tokenizer
from distillkit.types import SparseLogprobs, TokenDocument

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "benches" / ".cache"
RESULTS = ROOT / "benches" / "results"
MOST_OVERHEAD = 0.05
MEMORY, PACED = "from memory", "from memory, 20k tokens/s"
# Tokens a second that one process's teacher gives.
PACE = 20_000
# The teachers from memory read the documents so often: some seconds of work.
ROUNDS = 10

Rows = dict[bytes, SparseLogprobs]


class FromMemory:
    """A teacher that has all of its answers."""

    def __init__(self, teacher: Teacher, answers: Rows) -> None:
        self.head_size, self.identity = teacher.head_size, teacher.identity
        self._answers = answers

    def score(self, documents: Sequence[TokenDocument], request: RowRequest) -> Iterator[ScoredDocument]:
        for index, document in enumerate(documents):
            yield ScoredDocument(index, self._answers[document.input_ids.tobytes()])


class Paced(FromMemory):
    """A teacher on an accelerator: the CPU waits for each of its documents."""

    def score(self, documents: Sequence[TokenDocument], request: RowRequest) -> Iterator[ScoredDocument]:
        for scored in super().score(documents, request):
            time.sleep(len(documents[scored.index].input_ids) / PACE)
            yield scored


@dataclass
class Sides:
    """What both sides took, in seconds; `*_cpu` are of all cores.

    Attributes:
        overheads: of each shard, time beyond the teacher's as a share of it.
        tokens: of the documents.
        bare, bare_cpu: the teacher's answers taken and dropped.
        captured, captured_cpu: with the pipeline.
        encode, write: of that, the encoder thread's work.
        blocked: of that, what the teacher waited.
    """

    overheads: list[float]
    tokens: int = 0
    bare: float = 0.0
    bare_cpu: float = 0.0
    captured: float = 0.0
    captured_cpu: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    blocked: float = 0.0

    @property
    def overhead(self) -> float:
        """The middle one of the shards': what else the machine does is not in it."""
        return float(np.median(self.overheads))


def teacher_folder() -> Path:
    """SmolLM2-135M-Instruct, unpacked as the demo does it."""
    sys.path.insert(0, str(ROOT / "examples"))
    from demo import TEACHER, make_teacher

    folder = CACHE / TEACHER
    CACHE.mkdir(parents=True, exist_ok=True)
    (CACHE / ".gitignore").write_text("*\n")
    make_teacher(folder)
    return folder


def write_documents(path: Path, teacher: Path, documents: int, length: int) -> None:
    """Write pieces of Python's documentation, of half the length to the whole of it, as token ids."""
    from pydoc_data.topics import topics

    tokens = np.asarray(load_tokenizer(str(teacher))("\n\n".join(topics[name] for name in sorted(topics))).input_ids)
    lengths = np.random.default_rng(0).integers(length // 2, length, size=documents, endpoint=True)
    ends = np.cumsum(lengths)
    if ends[-1] > len(tokens):
        sys.exit(f"{documents} documents take {ends[-1]:,} tokens, Python's documentation has {len(tokens):,}")
    rows = [json.dumps({"input_ids": piece.tolist()}) + "\n" for piece in np.split(tokens[: ends[-1]], ends[:-1])]
    path.write_text("".join(rows))


def compare(teacher: Teacher, inputs: CaptureInputs, plan: ShardPlan, answers: Rows) -> Sides:
    """Run both sides on each shard of a plan; `answers` gets the teacher's."""
    sides = Sides([])
    header = inputs.complete_header(plan, teacher, {})
    for number, shard in enumerate(plan.shards):
        seconds = {}
        for side in ("bare", "captured") if number % 2 == 0 else ("captured", "bare"):
            started, cpu = time.perf_counter(), time.process_time()
            if side == "bare":
                documents = plan.read(number)
                for result in teacher.score(documents, inputs.request):
                    assert isinstance(result, ScoredDocument)
                    answers[documents[result.index].input_ids.tobytes()] = result.rows
            else:
                add(sides, capture_shards(teacher, plan, header, [number], inputs.request))
            seconds[side] = time.perf_counter() - started
            spent = getattr(sides, f"{side}_cpu") + time.process_time() - cpu
            setattr(sides, f"{side}_cpu", spent)
        sides.bare += seconds["bare"]
        sides.captured += seconds["captured"]
        sides.overheads.append(seconds["captured"] / seconds["bare"] - 1)
        sides.tokens += shard.tokens
    return sides


def add(sides: Sides, times: StageTimes) -> None:
    sides.encode += times.encode
    sides.write += times.write
    sides.blocked += times.blocked


def check(plan: ShardPlan, answers: Rows, codec: Codec) -> None:
    """What is stored is what the codec makes of the teacher's distributions, document by document."""
    for number in range(len(plan.shards)):
        stored = list(ShardFile(plan.folder.of(shard_name(number))))
        planned = plan.read(number)
        assert len(stored) == len(planned)
        for document, source in zip(stored, planned, strict=True):
            assert np.array_equal(document.input_ids, source.input_ids)
            rows = answers[source.input_ids.tobytes()]
            assert bytes(document.teacher) == codec.encode_document(rows), source.source
            assert np.array_equal(codec.decode_document(document.teacher, document.num_rows).ids[:, 0], rows.ids[:, 0])


def planned(inputs: CaptureInputs) -> ShardPlan:
    """The plan, after writing the prior."""
    folder = Folder(inputs.settings.output)
    plan = inputs.plan(folder)
    keep_prior(folder, plan.header, inputs.prior)
    return plan


def measure(folder: Path, model: Path, documents: int, length: int, chosen: dict[str, str]) -> dict[str, Sides]:
    """Both sides for each teacher."""
    write_documents(folder / "documents.jsonl", model, documents, length)
    shared: dict[str, Any] = {"model": str(model), "dataset": str(folder / "documents.jsonl"), "max_seq_len": length}
    shared |= {"prior_rows": 0, **chosen}
    answers: Rows = {}
    sides = {}
    # A dozen shards, so that what else the machine does meets both sides.
    tokens = documents * length * 3 // 4
    settings = CaptureSettings(**shared, output=folder / "slow", shard_tokens=tokens // 12)
    inputs = CaptureInputs.load(settings)
    plan = planned(inputs)
    teacher = inputs.teacher()
    # The first forward has things to set up.
    next(iter(teacher.score(plan.read(0)[:1], inputs.request)))
    sides[model.name] = compare(teacher, inputs, plan, answers)
    check(plan, answers, inputs.codec)

    lines = (folder / "documents.jsonl").read_text()
    (folder / "documents.jsonl").write_text(lines * ROUNDS)
    for name, kind in ((PACED, Paced), (MEMORY, FromMemory)):
        output = folder / kind.__name__
        settings = CaptureSettings(**shared, output=output, shard_tokens=tokens, drop_duplicates=False)
        inputs = CaptureInputs.load(settings)
        plan = planned(inputs)
        sides[name] = compare(kind(teacher, answers), inputs, plan, answers)
        check(plan, answers, inputs.codec)
    return sides


def report(results: dict[str, Sides], preset: str) -> None:
    """Print the table, and write the figures."""
    table = Table(title=f"capture with `{preset}`, on {machine()}", title_justify="left", box=None)
    headings = (
        "teacher",
        "\ntokens",
        "alone\ntokens/s",
        "captured\ntokens/s",
        "\noverhead",
        "encoder\nµs a token",
        "CPU alone\nµs a token",
    )
    for heading in (*headings, "pipeline's CPU\nµs a token"):
        table.add_column(heading, justify="right" if heading != "teacher" else "left", no_wrap=True)
    for name, sides in results.items():
        table.add_row(
            name,
            f"{sides.tokens:,}",
            f"{sides.tokens / sides.bare:,.0f}",
            f"{sides.tokens / sides.captured:,.0f}",
            "" if name == MEMORY else f"{sides.overhead:+.2%}",
            f"{1e6 * (sides.encode + sides.write) / sides.tokens:,.1f}",
            f"{1e6 * sides.bare_cpu / sides.tokens:,.1f}",
            f"{1e6 * (sides.captured_cpu - sides.bare_cpu) / sides.tokens:,.1f}" if name == MEMORY else "",
        )
    Console(width=120).print(table)
    path = RESULTS / f"{datetime.date.today()}-{platform.machine()}-capture-{preset}.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        names = [field.name for field in fields(Sides) if field.name != "overheads"]
        writer.writerow(["machine", "teacher", *names, "overhead", "least", "most"])
        for name, sides in results.items():
            figures = [round(getattr(sides, field), 4) for field in names]
            spread = [round(value, 4) for value in (sides.overhead, min(sides.overheads), max(sides.overheads))]
            writer.writerow([machine(), name, *figures, *spread])
    Console().print(f"figures in {path.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest document")
    parser.add_argument("--teacher", type=Path, help="another teacher's folder")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a setting of the capture")
    arguments = parser.parse_args()
    chosen = dict(setting.split("=", 1) for setting in arguments.set)
    model = arguments.teacher or teacher_folder()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), model, arguments.documents, arguments.length, chosen)
    report(results, chosen.get("preset", DEFAULT_PRESET))
    if max(results[name].overhead for name in (model.name, PACED)) > MOST_OVERHEAD:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

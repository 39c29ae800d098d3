"""Speed of the codec and of the read path from Python, on this machine.

    python benches/bench.py [--out benches/results/NAME.csv]

Every part first checks that what it times is right. Rates are the best of several runs, on all cores.
The limit of decoding is memory: the bytes of the arrays it fills, set beside a plain copy of as many bytes.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distillkit import __version__
from distillkit.codec import Codec, preset
from distillkit.shards import Dataset, Header, ShardWriter
from distillkit.topk import sparse_from_logits
from distillkit.types import SparseLogprobs

VOCAB = 49_152
ROWS = 16_384


def best(work: Callable[[], Any], *, seconds: float = 1.0) -> float:
    """Shortest time of one call, seconds."""
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def rows(k: int, count: int = ROWS) -> SparseLogprobs:
    """Rows like a language model's: values that fall with the logarithm of the rank, with some noise."""
    generator = np.random.default_rng(0)
    slopes = 1 + generator.random((count, 1))
    values = np.sort(-slopes * np.log(np.arange(1, k + 1)) + 0.3 * generator.random((count, k)))[:, ::-1]
    logprobs = values - np.log(np.exp(values).sum(1, keepdims=True)) - 0.1
    ids = (np.arange(k) * 383 + np.arange(count)[:, None] * 31) % VOCAB
    return SparseLogprobs(ids.astype(np.int64), logprobs.astype(np.float32))


def measure_codec(name: str) -> list[dict[str, Any]]:
    codec = Codec(preset(name, vocab_size=VOCAB))
    original = rows(codec.k)
    data = codec.encode(original.ids, original.logprobs)
    ids, logprobs = codec.decode(data)
    assert (ids == original.ids).all()
    assert np.abs(logprobs - original.logprobs).max() < 2
    tensor = torch.from_numpy(data)
    torch_ids, torch_logprobs = codec.decode_torch(tensor)
    assert (torch_ids.numpy() == ids).all()
    assert (torch_logprobs.numpy() == logprobs).all()
    filled = ids.nbytes + logprobs.nbytes
    source = np.ones(filled, np.uint8)
    target = np.empty_like(source)
    return [
        result(
            f"encode {name}", ROWS, best(lambda: codec.encode(original.ids, original.logprobs)), codec.bytes_per_token
        ),
        result(f"decode {name}", ROWS, best(lambda: codec.decode(data)), codec.bytes_per_token),
        result(f"decode_torch {name}", ROWS, best(lambda: codec.decode_torch(tensor)), codec.bytes_per_token),
        result(
            f"copy as many bytes as decoding {name} fills",
            ROWS,
            best(lambda: np.copyto(target, source)),
            filled // ROWS,
        ),
    ]


def measure_dense() -> list[dict[str, Any]]:
    width, count = 151_936, 256
    logits = torch.randn(count, width, generator=torch.Generator().manual_seed(0)) * 3
    found = sparse_from_logits(logits, 128)
    exact = torch.log_softmax(logits.double(), -1).topk(128)
    assert torch.allclose(found.logprobs.double(), exact.values, atol=1e-5)
    codec = Codec(preset("recommended", vocab_size=width))
    return [
        result("top-128 of 151,936 float32 logits", count, best(lambda: sparse_from_logits(logits, 128)), 4 * width),
        result("the same, encoded", count, best(lambda: codec.encode_logits(logits)), 4 * width),
        result("reading those logits (sum)", count, best(lambda: logits.sum()), 4 * width),
        result("torch log_softmax and topk", count, best(lambda: torch.log_softmax(logits, -1).topk(128)), 4 * width),
    ]


def measure_reading() -> list[dict[str, Any]]:
    codec = Codec(preset("recommended", vocab_size=VOCAB))
    original = rows(codec.k, 511)
    ids = np.arange(512)
    with tempfile.TemporaryDirectory() as folder:
        header = Header(codec=codec.to_dict(), vocab_size=VOCAB, head_size=VOCAB)
        with ShardWriter(folder, header) as writer:
            for _ in range(64):
                writer.write(ids, original)
        dataset = Dataset.open(folder)
        assert (codec.decode_document(dataset[0].teacher, 511).ids == original.ids).all()

        def read() -> int:
            return sum(document.num_rows for document in dataset)

        def read_and_decode() -> int:
            return sum(len(codec.decode_document(document.teacher, document.num_rows).ids) for document in dataset)

        count = 64 * 511
        assert read() == count
        return [
            result("shard to documents (checksums checked)", count, best(read), codec.bytes_per_token),
            result("shard to decoded arrays", count, best(read_and_decode), codec.bytes_per_token),
        ]


def result(work: str, tokens: int, seconds: float, bytes_per_token: int) -> dict[str, Any]:
    return {
        "work": work,
        "tokens_per_second": round(tokens / seconds),
        "bytes_per_token": bytes_per_token,
        "mb_per_second": round(tokens * bytes_per_token / seconds / 1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = Path(__file__).parent / "results" / f"{datetime.date.today()}-{platform.machine()}.csv"
    parser.add_argument("--out", type=Path, default=default, help="CSV file for the results (default: %(default)s)")
    arguments = parser.parse_args()
    results = [*measure_codec("recommended"), *measure_codec("budget"), *measure_dense(), *measure_reading()]
    machine = f"{_processor()}, {os.cpu_count()} cores"
    for row in results:
        print(f"{row['work']:<52}{row['tokens_per_second']:>12,} tokens/s {row['mb_per_second']:>8,} MB/s")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.out, "w", newline="") as file:
        writer = csv.DictWriter(
            file, ["work", "tokens_per_second", "bytes_per_token", "mb_per_second", "machine", "version"]
        )
        writer.writeheader()
        writer.writerows({**row, "machine": machine, "version": __version__} for row in results)
    print(f"{machine}; written to {arguments.out}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()

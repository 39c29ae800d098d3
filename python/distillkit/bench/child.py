"""Measurements that need a separate process: `python -m distillkit.bench.child WORK ARGUMENTS…` prints a JSON object.

`memory ours|published CONFIG DATA.npy`: peak memory of decoding CPU tensors, beyond input and output.
`reading FOLDER SECONDS`: reading and decoding a dataset on one core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distillkit.codec import Codec
from distillkit.errors import DistillKitError
from distillkit.shards import Dataset

__all__ = ["best_of", "one_core_reading", "peak_memory"]

_WARM_ROWS = 64
_TURNS = 3


def best_of(works: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Shortest time of one call of each function, in seconds.

    Each runs once to warm up, then for about `seconds` and at least three times. The functions take turns, so that
    other load on the machine affects all of them.
    """
    shortest = [float("inf")] * len(works)
    for work in works:
        work()
    for _ in range(_TURNS):
        for number, work in enumerate(works):
            end = time.perf_counter() + seconds / _TURNS
            now = 0.0
            while now < end:
                start = time.perf_counter()
                work()
                now = time.perf_counter()
                shortest[number] = min(shortest[number], now - start)
    return shortest


def peak_memory(who: str, codec: Codec, data: Path) -> int | None:
    """A decoder's peak memory in bytes, beyond its input rows and output tensors.

    Args:
        who: "ours" (`Codec.decode_torch`) or "published".
        data: .npy file of (N, bytes_per_token) uint8.

    Returns:
        The bytes, or None where a process cannot reset its peak, that is, on systems other than Linux.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    # Large blocks are returned to the system at once, so that memory freed by one step does not hide the next step's.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found = _run("memory", who, json.dumps(codec.to_dict()), str(data), environment=environment)
    return int(found["extra_bytes"])


def one_core_reading(folder: Path, seconds: float) -> dict[str, float]:
    """Measures reading and decoding a dataset on one core.

    Returns:
        tokens_per_second; copies_per_second, each of as many bytes as a token's decoded arrays; and whether the process
        was pinned to the core (on systems other than Linux, only our own threads are limited to one).
    """
    return _run("reading", str(folder), str(seconds), environment={"RAYON_NUM_THREADS": "1"})


def _run(*arguments: str, environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "distillkit.bench.child", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DistillKitError(f"measuring in a separate process failed ({arguments[0]}): {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# -- in the child ------------------------------------------------------------------------------------------------------


def _memory(who: str, description: str, path: str) -> dict[str, Any]:
    import torch

    from distillkit.bench.published import published_codec

    codec = Codec.from_dict(json.loads(description))
    decode = codec.decode_torch if who == "ours" else published_codec(codec.fixed_config).decode
    data = torch.from_numpy(np.load(path))
    decode(data[:_WARM_ROWS])
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    ids, logprobs = decode(data)
    returned = ids.numel() * ids.element_size() + logprobs.numel() * logprobs.element_size()
    return {"extra_bytes": max(0, _status("VmHWM") - before - returned)}


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise DistillKitError(f"/proc/self/status has no {name}")


def _reading(folder: str, seconds: str) -> dict[str, Any]:
    pinned = hasattr(os, "sched_setaffinity")
    if pinned:
        os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    dataset = Dataset.open(folder)
    rows = dataset.num_rows

    def read() -> int:
        return sum(dataset.codec.decode_document(document.teacher, document.num_rows).k for document in dataset)

    source = np.ones((rows, 12 * dataset.codec.k), np.uint8)
    target = np.empty_like(source)
    reading, copying = best_of((read, lambda: np.copyto(target, source)), float(seconds))
    return {"tokens_per_second": rows / reading, "copies_per_second": rows / copying, "pinned": pinned}


if __name__ == "__main__":
    found = _memory(*sys.argv[2:]) if sys.argv[1] == "memory" else _reading(*sys.argv[2:])
    sys.stdout.write(json.dumps(found))

"""Reads many damaged copies of a published dataset and of a shard, in child processes that may die of it.

    python -m support.mutations 2000 7

prints what happened to 2,000 copies of each kind of file with the seed 7, as JSON: how many were read or refused, and
each other outcome, such as an exception of Python, a message without the file, or a signal.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distillkit.errors import DistillKitError
from distillkit.reports.inspection import inspect_dataset
from distillkit.shards import Dataset
from support.shards import make_documents, write

GOLDEN = Path(__file__).parents[1] / "golden"
_AT_A_TIME = 200
_MEMORY = 6 << 30


def published(folder: Path, container: str, layout: str) -> Path:
    """Write two published documents with labels and a mask, in Parquet or Arrow, or a shard; returns the file."""
    if container == "shard":
        write(folder, make_documents(6), shard_tokens=1 << 20)
        (folder / "manifest.json").unlink()
        return folder / "data-00000.parquet"
    source = GOLDEN / {"quantized": "upstream_v1", "legacy": "upstream_legacy"}[layout]
    folder.mkdir(parents=True)
    shutil.copy(source / "compression_config.yaml", folder)
    table = pq.read_table(source / "data_0.parquet").slice(0, 2)
    ids = table["input_ids"].to_pylist()
    table = table.append_column("labels", pa.array([[-100] * 3 + part[3:] for part in ids]))
    table = table.append_column("attention_mask", pa.array([[1] * len(part) for part in ids]))
    path = folder / f"data_0.{container}"
    if container == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return path


def mutated(data: bytes, generator: random.Random) -> bytes:
    """Change a few bytes: bits, bytes, and numbers of four and eight bytes, where Arrow and Parquet keep offsets."""
    changed = bytearray(data)
    for _ in range(generator.choice([1, 1, 1, 2, 4, 16])):
        near = generator.choice([len(data), min(len(data), 1500)])
        at = generator.choice([generator.randrange(near), len(data) - 1 - generator.randrange(near)])
        kind = generator.randrange(4)
        if kind == 0:
            changed[at] ^= 1 << generator.randrange(8)
        elif kind == 1:
            changed[at] = generator.choice([0, 127, 128, 255, generator.randrange(256)])
        else:
            width, format_ = ((4, "<i"), (8, "<q"))[kind - 2]
            at = min(at - at % width, len(data) - width)
            value = generator.choice([0, -1, 2 ** (8 * width - 1) - 1, 1 << 30, generator.randrange(1 << 20)])
            changed[at : at + width] = struct.pack(format_, value)
    return bytes(changed)


def with_negative_offsets(data: bytes) -> list[bytes]:
    """Copies of an Arrow file in each of which one list ends before it begins."""
    table = pa.ipc.open_stream(data).read_all()
    ends = {len(table[name][0]) for name in table.column_names}
    places = [
        place
        for place in range(0, len(data) - 7, 4)
        if data[place : place + 4] == bytes(4) and int.from_bytes(data[place + 4 : place + 8], "little") in ends
    ]
    return [data[: place + 4] + struct.pack("<i", -5) + data[place + 8 :] for place in places]


def with_other_schemas(data: bytes) -> list[bytes]:
    """Copies of a shard with a bit flipped just before the name of a column in its footer's schema."""
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    copies = []
    for name in (b"checksum", b"element", b"teacher"):
        at = data.index(name, footer) + len(name)
        for place in (*range(at - len(name) - 6, at - len(name)), *range(at, at + 6)):
            copies += [data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :] for bit in range(8)]
    return copies


def outcome(path: Path) -> str:
    """Read everything that a dataset of one file offers."""
    try:
        dataset = Dataset.open(path.parent if path.name.startswith("data_") else path)
        dataset.lengths()
        inspect_dataset(dataset)
    except DistillKitError as error:
        return "refused" if path.name in str(error) else f"no file named: {error}"
    except Exception as error:  # noqa: BLE001 — the outcome that must not be
        return f"{type(error).__name__}: {error}"
    return "read"


def campaign(container: str, layout: str, count: int, seed: int) -> dict[str, int]:
    """How often each outcome occurred."""
    with tempfile.TemporaryDirectory() as folder:
        path = published(Path(folder) / "data", container, layout)
        data, found, first = path.read_bytes(), Counter[str](), 0
        crafted = {"arrow": with_negative_offsets, "shard": with_other_schemas}.get(container)
        copies = crafted(data) if crafted is not None else []
        count += len(copies)
        while first < count:
            reader, writer = os.pipe()
            child = os.fork()
            if not child:
                resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
                for number in range(first, min(first + _AT_A_TIME, count)):
                    path.unlink()  # not written over: an earlier copy may be mapped
                    copy = copies[number] if number < len(copies) else mutated(data, random.Random(f"{seed} {number}"))
                    path.write_bytes(copy)
                    os.write(writer, (json.dumps(outcome(path)[:300]) + "\n").encode())
                os._exit(0)
            os.close(writer)
            with os.fdopen(reader) as lines:
                outcomes = [json.loads(line) for line in lines]
            found.update(outcomes)
            first += len(outcomes)
            status = os.waitpid(child, 0)[1]
            if status:
                found[f"copy {first}: the process ended with status {status}"] += 1
                first += 1
    return dict(found)


if __name__ == "__main__":
    total = Counter[str]()
    for container, layout in (*itertools.product(("arrow", "parquet"), ("quantized", "legacy")), ("shard", "")):
        total.update(campaign(container, layout, int(sys.argv[1]), int(sys.argv[2])))
    print(json.dumps(total))

"""Fuzzes the readers of a shard: its header and groups with the hashes of what they say, or the whole file.

The first byte of an input chooses which. See `make fuzz`.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["distillkit"]):
    import xxhash

    from distillkit.errors import DistillKitError
    from distillkit.shards import Dataset
    from distillkit.shards.header import HEADER_KEY, Header
    from distillkit.shards.table import GROUPS_KEY, GroupDigest

import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).parent.parent))
from support.shards import make_documents, write

FOLDER = Path(tempfile.mkdtemp(dir="/dev/shm"))


def one_input(data: bytes) -> None:
    kind, data = data[:1], data[1:]
    try:
        if kind == b"h":
            Header.from_metadata(hashed(HEADER_KEY, data), where="header").make_codec()
        elif kind == b"g":
            GroupDigest.from_metadata(hashed(GROUPS_KEY, data), where="groups")
        else:
            path = FOLDER / "data-00000.parquet"
            path.write_bytes(data)
            for document, _ in Dataset.open(path).decoded():
                document.input_ids.sum()
    except (DistillKitError, OSError):
        pass


def hashed(key: bytes, text: bytes) -> dict[bytes, bytes]:
    return {key: text, key + b".xxh3": xxhash.xxh3_128_hexdigest(text).encode()}


def write_seeds(folder: Path) -> None:
    """A shard, its header and its groups."""
    write(FOLDER / "seed", make_documents(3), shard_tokens=10_000)
    path = FOLDER / "seed" / "data-00000.parquet"
    metadata = pq.read_metadata(path).metadata
    (folder / "file").write_bytes(b"f" + path.read_bytes())
    (folder / "header").write_bytes(b"h" + metadata[HEADER_KEY])
    (folder / "groups").write_bytes(b"g" + metadata[GROUPS_KEY])
    shutil.rmtree(FOLDER / "seed")


def main() -> None:
    if len(sys.argv) > 2 and sys.argv[1] == "seeds":
        write_seeds(Path(sys.argv[2]))
    else:
        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

"""Check an installed distillkit, with what it needs and nothing else: `python tests/smoke.py`.

The release workflow runs it on every wheel, on the system that the wheel is for. It encodes, decodes and verifies the
recorded vectors and datasets of `tests/golden/`, the last two with the installed commands.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy as np

import distillkit
from distillkit.codec import Codec
from distillkit.shards import Dataset

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"


def main() -> None:
    print(f"distillkit {distillkit.__version__} in {Path(distillkit.__file__).parent}, Python {sys.version.split()[0]}")
    check_codec()
    with tempfile.TemporaryDirectory() as folder:
        check_shards(Path(folder) / "shards")
    print("all is well")


def check_codec() -> None:
    """What the published encoder wrote decodes to what was recorded, and ours writes the recorded bytes."""
    cases = json.loads((GOLDEN / "cases.json").read_text(encoding="utf-8"))
    written = b""
    for name, case in sorted(cases.items()):
        key = "legacy_logit_compression" if case["format"] == "legacy" else "logprob_compressor"
        codec = Codec({key: case["config"]})
        with np.load(GOLDEN / f"{name}.npz") as recorded:
            columns = {column: recorded[column] for column in recorded.files if not column.startswith(("in_", "out_"))}
            ids, _ = codec.decode(codec.from_published(columns))
            check(np.array_equal(ids, recorded["out_ids"]), f"{name}: the recorded ids")
            written += codec.encode(recorded["in_ids"], recorded["in_logprobs"]).tobytes()
    source = (TESTS.parent / "rust" / "codec" / "tests" / "golden.rs").read_text(encoding="utf-8")
    expected = re.search(r"RECORDED: u64 = (0x[0-9a-f_]+);", source)
    check(expected is not None and fnv1a(written) == int(expected[1], 16), "the bytes that the encoder writes")
    print(f"{len(cases)} recorded cases decode as recorded, and encode to the recorded {len(written):,} bytes")


def check_shards(folder: Path) -> None:
    """A published dataset is converted to shards, which hold what was recorded and verify; a damaged one does not."""
    run("convert", str(GOLDEN / "upstream_v1"), str(folder))
    dataset = Dataset.open(folder)
    ids = np.concatenate([rows.ids for _, rows in dataset.decoded()])
    with np.load(GOLDEN / "upstream_v1_expected.npz") as recorded:
        check(np.array_equal(ids, recorded["ids"]), "the ids of upstream_v1")
    print(run("verify", str(folder)).strip())
    shard = next(folder.glob("data-*.parquet"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    run("verify", str(folder), status=1)


def run(*arguments: str, status: int = 0) -> str:
    """Run the `distillkit-codec` of this environment; returns what it printed."""
    program = shutil.which("distillkit-codec", path=sysconfig.get_path("scripts"))
    check(program is not None, "the program distillkit-codec is installed")
    ended = subprocess.run([str(program), *arguments], capture_output=True, text=True, encoding="utf-8")
    check(ended.returncode == status, f"distillkit-codec {' '.join(arguments)}: {ended.stdout}{ended.stderr}")
    return ended.stdout


def fnv1a(data: bytes) -> int:
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def check(holds: bool, what: str) -> None:
    if not holds:
        sys.exit(f"FAILED: {what}")


if __name__ == "__main__":
    main()

"""Check an installed distillkit, with what it needs and nothing else: `python tests/smoke.py`.

The release workflow runs it on every wheel, on the system that the wheel is for. It encodes, decodes and verifies the
recorded vectors and datasets of `tests/golden/`, of the published formats, the compact one and draws; datasets are
converted and verified with the installed commands.
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
from distillkit.codec import Codec, CompactConfig, Prior, SampledConfig
from distillkit.shards import Dataset, Header, ShardWriter

TESTS = Path(__file__).parent
GOLDEN = TESTS / "golden"


def main() -> None:
    print(f"distillkit {distillkit.__version__} in {Path(distillkit.__file__).parent}, Python {sys.version.split()[0]}")
    check_codec()
    with tempfile.TemporaryDirectory() as folder:
        check_shards(Path(folder) / "shards")
        check_compact(Path(folder) / "compact")
    check_sampled()
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
    check_verified(folder)


def check_compact(folder: Path) -> None:
    """Recorded documents decode to the recorded bits; one is encoded to the recorded bytes, stored and verified."""
    cases = json.loads((GOLDEN / "compact.json").read_text(encoding="utf-8"))["cases"]
    # The first case with a prior has its bytes.
    priors = {case["config"]["prior"]: Prior(bytes.fromhex(case["prior"])) for case in cases if case["prior"]}
    for case in cases:
        codec = Codec(CompactConfig(**case["config"]), prior=priors.get(case["config"]["prior"]))
        rows = codec.decode_document(bytes.fromhex(case["document"]), case["rows"])
        check(rows.ids.ravel().tolist() == case["ids"], f"{case['name']}: the recorded ids")
        bits = rows.logprobs.view(np.uint32).ravel().tolist()
        check(bits == case["logprob_bits"], f"{case['name']}: the recorded log-probabilities")
    print(f"{len(cases)} recorded documents of the compact format decode to the recorded bits")
    [case] = [case for case in cases if case["name"] == "fixed_learned_40"]
    prior, document = priors[case["config"]["prior"]], bytes.fromhex(case["document"])
    codec = Codec(CompactConfig(**case["config"]), prior=prior)
    rows = codec.decode_document(document, case["rows"])
    check(codec.encode_document(rows) == document, "its rows are encoded to the recorded document")
    header = Header(codec=codec.to_dict(), vocab_size=codec.vocab_size, head_size=codec.vocab_size)
    with ShardWriter(folder, header, prior=prior) as writer:
        # The teacher is always right: row t is the distribution over token t + 1.
        writer.write(np.append(0, rows.ids[:, 0]), rows)
    check(Dataset.open(folder)[0].teacher == document, "a shard keeps the document")
    check_verified(folder)


def check_sampled() -> None:
    """Recorded draws decode to the recorded ids and counts, and are encoded to the recorded bytes again."""
    cases = json.loads((GOLDEN / "sampled.json").read_text(encoding="utf-8"))["cases"]
    for case in cases:
        prior = None if case["prior"] is None else Prior(bytes.fromhex(case["prior"]))
        codec, document = Codec(SampledConfig(**case["config"]), prior=prior), bytes.fromhex(case["document"])
        rows = codec.decode_document(document, case["rows"])
        counts = np.rint(np.exp(rows.logprobs) * case["config"]["draws"])
        check(rows.ids.ravel().tolist() == case["ids"], f"{case['name']}: the recorded ids")
        check(counts.ravel().tolist() == case["counts"], f"{case['name']}: the recorded counts")
        check(codec.encode_document(rows) == document, f"{case['name']}: the recorded bytes")
    print(f"{len(cases)} recorded documents of draws decode as recorded, and are encoded to the recorded bytes")


def check_verified(folder: Path) -> None:
    """A dataset verifies, and with one damaged bit it does not."""
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

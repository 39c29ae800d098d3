"""`distillkit-codec` as a person runs it, and the figures it shows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from distillkit.console import human_bytes
from distillkit.reports.inspection import inspect_dataset
from distillkit.shards import Dataset, ShardWriter
from distillkit.shards.header import alignment
from distillkit.types import SparseLogprobs
from test_shards import CODEC, HEADER, VOCAB

GOLDEN = Path(__file__).parent / "golden"


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, 80 columns wide."""
    program = "import sys; from distillkit.cli.codec import main; sys.argv[0] = 'distillkit-codec'; main()"
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    settings = {**os.environ, "COLUMNS": "80", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120, check=False)


def predictable(folder: Path, *, shift: int = 0, rows: str = "L-1", segments: bool = False) -> Path:
    """A dataset whose teacher knows the next token, its rows moved by `shift`."""
    generator = np.random.default_rng(0)
    header = replace(HEADER, alignment=alignment("L" if rows == "L" else "L-1"))
    with ShardWriter(folder, header, shard_tokens=100) as writer:
        for _ in range(8):
            tokens = generator.permutation(VOCAB)[:40]
            count = header.rows_of(40)
            following = np.roll(tokens, -1 + shift)[:count]
            others = np.stack(
                [generator.choice(np.setdiff1d(np.arange(VOCAB), [t]), 5, replace=False) for t in following]
            )
            ids = np.concatenate([following[:, None], others], 1)
            logprobs = np.tile(np.log([0.6, 0.1, 0.08, 0.06, 0.05, 0.04]), (count, 1)).astype(np.float32)
            lengths = np.array([15, 25]) if segments else None
            writer.write(tokens, SparseLogprobs(ids, logprobs), segment_lengths=lengths)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predictable(tmp_path_factory.mktemp("data") / "captured")


def test_inspect_counts_what_is_there(dataset: Path) -> None:
    result = run("inspect", dataset, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    disk = sum(path.stat().st_size for path in dataset.glob("*.parquet"))
    assert (found["documents"], found["tokens"], found["rows"]) == (8, 320, 312)
    assert found["bytes_per_token"]["codec"] == CODEC.bytes_per_token
    assert found["bytes_per_token"]["total"] == pytest.approx(disk / 312)
    assert found["compression"]["dense_bf16"] == pytest.approx(2 * VOCAB * 312 / disk)
    assert found["compression"]["topk_bf16"] == pytest.approx(6 * 6 * 312 / disk)
    assert found["next_token"] == {"is_first": 1.0, "is_stored": 1.0}
    assert found["alignment"]["ok"] is True
    assert found["alignment"]["rates"]["0"] == 1.0
    # 0.93 is what was written; the codec rounds it a little.
    assert found["mass"]["p1"] == pytest.approx(0.93, abs=0.02)
    assert found["mass"]["mean"] == pytest.approx(0.93, abs=0.01)
    assert found["fidelity"]["rows"] == 312
    assert found["fidelity"]["source"] == "recorded by the writer"


def test_inspect_reads_well(dataset: Path, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    result = run("inspect", dataset, "--plot", plot, NO_COLOR="1")
    assert result.returncode == 0, result.stderr
    for text in (
        "312 (L − 1 for a document of L tokens)",
        "a teacher (float32)",
        "size  bytes a token",
        "  verdict                    ok",
        "KL(original top-k ‖ decoded)",
        "recorded by the writer, 312 rows",
        f"plot: {plot}",
    ):
        assert text in result.stdout
    assert "\x1b" not in result.stdout
    # The path of the plot is left whole, so that it can be copied.
    lines = [line for line in result.stdout.splitlines() if not line.startswith(("plot:", str(dataset)[:40]))]
    assert max(map(len, lines)) <= 80
    assert not [line for line in lines if line != line.rstrip()]
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert result.stderr == ""


@pytest.mark.parametrize(
    "changed", [{"exact_dtype": "float16"}, {"normalize_t": False}, {"polynomial_terms": ["sqrt", 4, 3, 2, 1, 0]}]
)
def test_another_codec_of_the_same_width_is_noticed(changed: dict[str, Any], tmp_path: Path) -> None:
    """Its bytes decode without complaint, into probabilities that can not be."""
    source = GOLDEN / "upstream_v1"
    settings = {**yaml.safe_load((source / "compression_config.yaml").read_text()), **changed}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(settings))
    shutil.copy(source / "data_0.parquet", tmp_path)
    result = run("inspect", tmp_path, "--config", tmp_path / "wrong.yaml")
    assert result.returncode == 1
    assert "IMPOSSIBLE" in result.stdout
    assert "add up to more than 1.1" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_value_that_is_no_number_is_located(tmp_path: Path) -> None:
    source = GOLDEN / "upstream_legacy"
    shutil.copy(source / "compression_config.yaml", tmp_path)
    table = pq.read_table(source / "data_0.parquet")
    values = table["exact_values"].to_pylist()
    values[1][3][0] = float("nan")
    index = table.schema.get_field_index("exact_values")
    changed = table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))
    pq.write_table(changed, tmp_path / "data_0.parquet")
    result = run("inspect", tmp_path)
    assert result.returncode == 1
    assert f"{tmp_path}: document " in result.stderr.replace("\n", "")
    assert "row 3: log-probability NaN at rank 0" in result.stderr


@pytest.mark.parametrize("shift", [-1, 1])
def test_shifted_rows_fail_the_check(shift: int, tmp_path: Path) -> None:
    result = run("inspect", predictable(tmp_path / "shifted", shift=shift))
    assert result.returncode == 1
    assert "FAILED" in result.stdout
    assert f"the rows are shifted by {shift:+d}" in result.stderr


def test_packed_documents_are_judged_by_themselves(tmp_path: Path) -> None:
    """The row over another document's first token counts nowhere, and neither does the last of L rows."""
    folder = predictable(tmp_path / "packed", rows="L", segments=True)
    inspection = inspect_dataset(Dataset.open(folder))
    assert inspection.rows == 320
    assert inspection.first_rate == 1.0
    assert inspection.shifts.positions == 8 * (13 + 23)


def test_a_sample_says_so(dataset: Path) -> None:
    result = run("inspect", dataset, "--sample", "3")
    assert "3 documents, evenly spread" in result.stdout
    assert json.loads(run("inspect", dataset, "--sample", "3", "--json").stdout)["documents_read"] == 3


def test_published_datasets_need_their_codec(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "upstream_legacy" / "data_0.parquet", tmp_path)
    refused = run("inspect", tmp_path)
    assert refused.returncode == 1
    assert "does not say how it was encoded" in refused.stderr
    assert "Traceback" not in refused.stderr
    found = run("inspect", tmp_path, "--config", GOLDEN / "upstream_legacy" / "compression_config.yaml", "--json")
    assert json.loads(found.stdout)["fidelity"] is None
    assert "not recorded" in run("inspect", GOLDEN / "upstream_v1").stdout


def test_works_without_torch(dataset: Path, tmp_path: Path) -> None:
    """torch can not be imported there: a package of that name, found first, refuses."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not installed here')")
    for command in (["inspect", dataset], ["verify", dataset], ["inspect", GOLDEN / "upstream_legacy"]):
        result = run(*command, PYTHONPATH=str(tmp_path))
        assert result.returncode == 0, result.stderr


def test_verify_names_file_and_document(dataset: Path, tmp_path: Path) -> None:
    sound = run("verify", dataset)
    assert sound.returncode == 0, sound.stderr
    assert "sound: 3 files, 8 documents, 320 tokens, 312 rows" in sound.stdout
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    damaged = copy / "data-00001.parquet"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 4] ^= 1
    damaged.write_bytes(data)
    result = run("verify", copy)
    assert result.returncode == 1
    assert "1 file of" in result.stderr
    assert "data-00001.parquet" in result.stderr
    assert json.loads(run("verify", dataset, "--json").stdout)["ok"] is True


def test_convert_then_inspect(tmp_path: Path) -> None:
    result = run(
        "convert", GOLDEN / "upstream_v1", tmp_path / "shards", "--shard-tokens", "600", "--teacher", "org/model"
    )
    assert result.returncode == 0, result.stderr
    assert "8 documents, 1,280 tokens in 2 shards" in result.stdout
    assert "byte for byte" in result.stdout
    found: dict[str, Any] = json.loads(run("inspect", tmp_path / "shards", "--json").stdout)
    before: dict[str, Any] = json.loads(run("inspect", GOLDEN / "upstream_v1", "--json").stdout)
    assert found["teacher"]["name"] == "org/model"
    for key in ("documents", "tokens", "rows", "mass", "next_token", "alignment", "codec"):
        assert found[key] == before[key]


def test_a_missing_package_is_named(dataset: Path, tmp_path: Path) -> None:
    refusal = "raise ModuleNotFoundError('no torch', name='torch')"
    (tmp_path / "torch.py").write_text(refusal)
    result = run("inspect", dataset, "--teacher", "org/model", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert "this needs torch, which is not installed: pip install 'distillkit[capture]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_reader_that_leaves_and_an_old_terminal(dataset: Path) -> None:
    program = "import sys; from distillkit.cli.codec import main; main()"
    command = [sys.executable, "-W", "error", "-c", program, "inspect", str(dataset)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 1
    plain = run("inspect", dataset, PYTHONIOENCODING="cp437")
    assert plain.returncode == 0, plain.stderr
    assert "KL(original top-k ? decoded)" in plain.stdout


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (9_996, "10.0 kB"),
        (8_441_234, "8.44 MB"),
        (99_960_000, "100 MB"),
        (999_700_000, "1.00 GB"),
        (3e17, "300 PB"),
        (5e18, "5000 PB"),
    ],
)
def test_bytes_have_three_digits(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["inspect"], 2, "Missing argument"),
        (["inspekt", "x"], 2, "No such command"),
        (["inspect", "/no/such/dataset"], 1, "/no/such/dataset: no such file or folder"),
        (["inspect", str(GOLDEN / "cases.json")], 1, "cases.json"),
        (["inspect", str(GOLDEN / "upstream_v1"), "--plot", "x.gif"], 2, "end its name in .png"),
        (["inspect", str(GOLDEN / "upstream_v1"), "--plot", "/no/such/x.png"], 2, "no folder to write to"),
        (["inspect", str(GOLDEN / "upstream_v1"), "--sample", "0"], 2, "--sample"),
        (["--help"], 0, ""),
    ],
)
def test_wrong_use_is_one_message(arguments: list[str], status: int, message: str) -> None:
    result = run(*arguments)
    assert result.returncode == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr

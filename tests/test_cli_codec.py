"""`distillkit-codec` as a person runs it, and the figures it shows."""

from __future__ import annotations

import json
import logging
import os
import re
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

from distillkit.cli.common import LogHandler
from distillkit.console import human_bytes
from distillkit.reports.inspection import inspect_dataset
from distillkit.shards import Dataset, ShardWriter
from distillkit.shards.header import alignment
from distillkit.text.tokenizer import fingerprint
from distillkit.types import SparseLogprobs
from support.cli import run, run_here
from support.refusals import check_names
from support.shards import CODEC, HEADER, VOCAB
from support.tokenizers import byte_tokenizer

GOLDEN = Path(__file__).parent / "golden"


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
    result = run_here("inspect", dataset, "--json")
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
        "312",
        "L − 1",
        "a teacher (float32)",
        "‖",
        "312 rows",
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
    result = run_here("inspect", tmp_path, "--config", tmp_path / "wrong.yaml")
    assert result.returncode == 1
    check_names(result.stderr, "1.1")


def test_a_value_that_is_no_number_is_located(tmp_path: Path) -> None:
    source = GOLDEN / "upstream_legacy"
    shutil.copy(source / "compression_config.yaml", tmp_path)
    table = pq.read_table(source / "data_0.parquet")
    values = table["exact_values"].to_pylist()
    values[1][3][0] = float("nan")
    index = table.schema.get_field_index("exact_values")
    changed = table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))
    pq.write_table(changed, tmp_path / "data_0.parquet")
    result = run_here("inspect", tmp_path)
    assert result.returncode == 1
    check_names(result.stderr, f"{tmp_path}/data_0.parquet, document 1", "row 3", "NaN", "rank 0")


@pytest.mark.parametrize("shift", [-1, 1])
def test_shifted_rows_fail_the_check(shift: int, tmp_path: Path) -> None:
    result = run_here("inspect", predictable(tmp_path / "shifted", shift=shift), "--json")
    assert result.returncode == 1
    alignment = json.loads(result.stdout)["alignment"]
    assert not alignment["ok"]
    assert alignment["rates"][f"{shift:+d}"] == 1.0
    assert f"{shift:+d}" in result.stderr


def test_packed_documents_are_judged_by_themselves(tmp_path: Path) -> None:
    """The row over another document's first token counts nowhere, and neither does the last of L rows."""
    folder = predictable(tmp_path / "packed", rows="L", segments=True)
    inspection = inspect_dataset(Dataset.open(folder))
    assert inspection.rows == 320
    assert inspection.first_rate == 1.0
    assert inspection.shifts.positions == 8 * (13 + 23)


def test_a_sample_says_so(dataset: Path) -> None:
    result = run_here("inspect", dataset, "--sample", "3")
    check_names(result.stdout, "3 documents")
    assert json.loads(run_here("inspect", dataset, "--sample", "3", "--json").stdout)["documents_read"] == 3


def test_published_datasets_need_their_codec(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "upstream_legacy" / "data_0.parquet", tmp_path)
    refused = run_here("inspect", tmp_path)
    assert refused.returncode == 1
    check_names(refused.stderr, str(tmp_path), "compression_config.yaml")
    found = run_here("inspect", tmp_path, "--config", GOLDEN / "upstream_legacy" / "compression_config.yaml", "--json")
    assert json.loads(found.stdout)["fidelity"] is None
    assert run_here("inspect", GOLDEN / "upstream_v1").returncode == 0


def test_works_without_torch(dataset: Path, tmp_path: Path) -> None:
    """torch can not be imported there: a package of that name, found first, refuses."""
    (tmp_path / "torch.py").write_text("raise ImportError('torch is not installed here')")
    commands = [["inspect", dataset], ["verify", dataset], ["inspect", GOLDEN / "upstream_legacy"]]
    program = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from distillkit.cli.codec import main
for command in {[[*map(str, command)] for command in commands]!r}:
    sys.argv = ["distillkit-codec", *command]
    try:
        main()
    except SystemExit as left:
        print("left with", left.code)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.count("left with 0") == 3, result.stdout + result.stderr


def test_verify_names_file_and_document(dataset: Path, tmp_path: Path) -> None:
    sound = run_here("verify", dataset)
    assert sound.returncode == 0, sound.stderr
    check_names(sound.stdout, "3 files", "8 documents", "320 tokens", "312 rows")
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    damaged = copy / "data-00001.parquet"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 4] ^= 1
    damaged.write_bytes(data)
    result = run_here("verify", copy)
    assert result.returncode == 1
    check_names(result.stderr, "1 file", "data-00001.parquet")
    assert json.loads(run_here("verify", dataset, "--json").stdout)["ok"] is True


def test_convert_then_inspect(tmp_path: Path) -> None:
    result = run_here(
        "convert", GOLDEN / "upstream_v1", tmp_path / "shards", "--shard-tokens", "600", "--teacher", "org/model"
    )
    assert result.returncode == 0, result.stderr
    check_names(result.stdout, "8 documents", "1,280 tokens", "2 shards")
    found: dict[str, Any] = json.loads(run_here("inspect", tmp_path / "shards", "--json").stdout)
    before: dict[str, Any] = json.loads(run_here("inspect", GOLDEN / "upstream_v1", "--json").stdout)
    assert found["teacher"]["name"] == "org/model"
    for key in ("documents", "tokens", "rows", "mass", "next_token", "alignment", "codec"):
        assert found[key] == before[key]


def test_a_missing_package_is_named(dataset: Path, tmp_path: Path) -> None:
    refusal = "raise ModuleNotFoundError('no torch', name='torch')"
    (tmp_path / "torch.py").write_text(refusal)
    places = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    result = run("inspect", dataset, "--teacher", "org/model", PYTHONPATH=places)
    assert result.returncode == 1
    check_names(result.stderr, "torch", "distillkit[capture]")
    assert "Traceback" not in result.stderr


@pytest.mark.slow
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
    assert "‖" not in plain.stdout
    assert " ? " in plain.stdout


def test_bytes_have_three_digits() -> None:
    written = {
        0: "0 bytes",
        1: "1 byte",
        999: "999 bytes",
        1000: "1.00 kB",
        9_996: "10.0 kB",
        8_441_234: "8.44 MB",
        99_960_000: "100 MB",
        999_700_000: "1.00 GB",
        3e17: "300 PB",
        5e18: "5000 PB",
    }
    assert {count: human_bytes(count) for count in written} == written


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["inspect"], 2, "Missing argument"),
        (["inspekt", "x"], 2, "No such command"),
        (["inspect", "/no/such/dataset"], 1, "/no/such/dataset"),
        (["inspect", str(GOLDEN / "cases.json")], 1, "cases.json"),
        (["inspect", str(GOLDEN / "upstream_v1"), "--plot", "x.gif"], 2, ".png"),
        (["inspect", str(GOLDEN / "upstream_v1"), "--plot", "/no/such/x.png"], 2, "/no/such"),
        (["inspect", str(GOLDEN / "upstream_v1"), "--sample", "0"], 2, "--sample"),
        (["--help"], 0, ""),
    ],
)
def test_wrong_use_is_one_message(arguments: list[str], status: int, message: str) -> None:
    result = run_here(*arguments)
    assert result.returncode == status
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_control_characters_of_others_never_reach_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of teachers and files, in results, errors, wrong usage and logs; with colours, too."""
    evil = "\x1b]0;t\x1b[2Jx\x9b1m\x7f\u202e\u2066\U000e0041"
    markup = "[red]:boom:[/red]"
    converted = tmp_path / f"c{evil}"
    run_here("convert", GOLDEN / "upstream_v1", converted, "--teacher", evil + markup)
    monkeypatch.setenv("FORCE_COLOR", "1")
    results = [
        run_here("inspect", converted),
        run_here("verify", converted),
        run_here("convert", converted, converted),
        run_here("inspect", tmp_path / (evil + markup)),
        run_here("inspect", converted, "--sample", evil + markup),
        run_here(evil),
    ]
    assert [result.returncode for result in results] == [0, 0, 1, 1, 2, 2]
    # What rich itself writes for colours and progress bars ends in one of these letters. Cells are wrapped.
    texts = [re.sub("\x1b\\[[?\\d;]*[mlhKA]|\\s", "", result.stdout + result.stderr) for result in results]
    for text in texts:
        assert text.isprintable(), text
    for place in (0, 3, 4):
        assert r"\x1b[2Jx\x9b1m\x7f\u202e\u2066\U000e0041" + markup in texts[place], "nor markup and emoji codes"


def test_secrets_and_control_characters_are_not_logged(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("a.library", logging.WARNING, "", 0, "%s", ("s3://k:pass-1@b/\x1b[2J",), None)
    LogHandler().emit(record)
    printed = "".join(capsys.readouterr().err.split())
    assert "pass-1" not in printed
    assert r"@b/\x1b[2J" in printed


def test_a_bug_keeps_its_traceback_but_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("https://me:pass-1@host/\x1b[2J")

    monkeypatch.setattr("distillkit.cli.inspect.inspect_dataset", broken)
    result = run_here("inspect", GOLDEN / "upstream_v1")
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert r"RuntimeError: https://me:***@host/\x1b[2J" in result.stderr
    assert "pass-1" not in result.stderr
    assert "\x1b[2J" not in result.stderr


# -- show --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset of one document of text with spaces, emojis and an end, and its tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("shown")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder / "bytes")
    ids = np.array([*tokenizer("a b\n\u20ac", add_special_tokens=False)["input_ids"], 1], np.int32)
    header = replace(HEADER, tokenizer={"name": "bytes", "fingerprint": fingerprint(tokenizer)})
    rows = np.stack([np.roll(ids, -1)[:-1], np.full(len(ids) - 1, 2), np.full(len(ids) - 1, 290)], 1)
    rows[0, 0] = 3  # the teacher did not expect the first space
    others = np.array([[291, 292, 293]] * len(rows))
    logprobs = np.tile(np.log([0.5, 0.25, 0.125, 0.01, 0.004, 0.0001]), (len(rows), 1)).astype(np.float32)
    with ShardWriter(folder / "data", header) as writer:
        writer.write(
            ids, SparseLogprobs(np.concatenate([rows, others], 1).astype(np.int64), logprobs), loss_mask=ids != 1
        )
    return folder / "data", folder / "bytes"


def test_show_has_each_token_with_the_teachers_best(shown: tuple[Path, Path]) -> None:
    data, _ = shown
    found = json.loads(run_here("show", data, "--json").stdout)
    tokens, dataset = found["tokens"], Dataset.open(data)
    assert [token["text"] for token in tokens] == ["a", " ", "b", "\n", "<E2>", "<82>", "<AC>", "</s>"]
    assert [token["special"] for token in tokens] == [False] * 7 + [True]
    assert [token["counts"] for token in tokens] == [True] * 7 + [False]
    assert (tokens[0]["best"], tokens[0]["logprob"], tokens[0]["rank"]) == ([], None, None)
    assert [token["rank"] for token in tokens[1:]] == [None] + [0] * 6
    document = dataset[0]
    rows = dataset.codec.decode_document(document.teacher, document.num_rows)
    for row, token in enumerate(tokens[1:]):
        assert [each["id"] for each in token["best"]] == rows.ids[row, :5].tolist()
        assert [each["logprob"] for each in token["best"]] == rows.logprobs[row, :5].tolist()
    assert tokens[2]["best"][1]["text"] == "<|im_start|>"
    assert tokens[2]["best"][2]["text"] is None, "the tokenizer has no such id"
    part = json.loads(run_here("show", data, "--tokens", "2:4", "--best", "2", "--document", "-1", "--json").stdout)
    assert part["tokens"] == [{**token, "best": token["best"][:2]} for token in tokens[2:4]]


def test_show_fits_its_columns_and_escapes(shown: tuple[Path, Path]) -> None:
    data, tokenizer = shown
    result = run_here("show", data)
    assert result.returncode == 0
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80
    assert "\x1b" not in result.stdout
    for token, line in zip(
        ("a", "·", "b", "⏎", "<E2>", "<82>", "<AC>", "(</s>)"), result.stdout.splitlines()[2:], strict=True
    ):
        assert line.split()[1] == token
    assert "50%" in result.stdout
    other = run_here(
        "show",
        GOLDEN / "upstream_v1" / "data_0.parquet",
        "--config",
        GOLDEN / "upstream_v1" / "compression_config.yaml",
    )
    assert other.returncode == 0, "without a tokenizer: ids"
    check_names(other.stderr, "--tokenizer")
    assert re.search(r"^ *1 +#\d+ ", other.stdout, flags=re.MULTILINE)
    for arguments, facts in (
        (("--document", "1"), ["1"]),
        (("--tokens", "x"), ["--tokens", "'x'"]),
        (("--tokenizer", data.parent / "nowhere"), ["nowhere"]),
    ):
        refusal = run_here("show", data, *arguments)
        assert refusal.returncode in (1, 2)
        check_names(refusal.stderr, *facts)
    (data.parent / "other").mkdir()
    for file in tokenizer.iterdir():
        text = file.read_text().replace("<|im_end|>", "<|other|>")
        (data.parent / "other" / file.name).write_text(text)
    refusal = run_here("show", data, "--tokenizer", data.parent / "other")
    assert refusal.returncode == 1
    check_names(refusal.stderr, "other", "bytes")

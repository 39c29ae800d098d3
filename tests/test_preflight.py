"""Wrong paths, files and engines of a capture are told at once: before any library is imported that runs a teacher."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from distillkit.capture import CaptureSettings, capture
from distillkit.capture.preflight import check_before_loading
from distillkit.capture.teachers.hf import load_config, resolve_device
from distillkit.cli.main import cli
from distillkit.errors import ConfigError
from distillkit.text.file_formats import FORMATS
from distillkit.text.file_names import DATA_FILES
from support.refusals import check_names, refused


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with something of everything, as the current one."""
    for folder in ("teacher", "empty", "output", "cut"):
        (tmp_path / folder).mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"\x00\x01")
    for file in (
        "teacher/config.json",
        "cut/config.json",
        "documents.jsonl",
        "table.xlsx",
        "held out.jsonl",
        "a.json.gz",
        "A.JSONL",
    ):
        (tmp_path / file).write_text("{}")
    (tmp_path / "codec.yaml").write_text("d: 128\nk: 8\nexact_k: 9\nexact_dtype: float32\nresidual_bins: []\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"model": "./techer"}, ["model", "./techer", "'./teacher'"]),
    ({"model": "runs/best/teacher"}, ["model", "runs/best/teacher"]),
    ({"model": "documents.jsonl"}, ["model", "documents.jsonl", "file"]),
    ({"model": "empty"}, ["model", "empty", "config.json"]),
    ({"model": "cut"}, ["model", "cut/model.safetensors"]),
    ({"model": ""}, ["model", "1"]),
    ({"dataset": ""}, ["dataset", "1"]),
    ({"output": ""}, ["output", "1"]),
    ({"tokenizer": "/no/such/tokenizer"}, ["tokenizer", "/no/such/tokenizer"]),
    ({"dataset": "document.jsonl"}, ["dataset", "document.jsonl", "'documents.jsonl'"]),
    ({"dataset": "./held_out"}, ["dataset", "./held_out"]),
    ({"dataset": "table.xlsx"}, ["dataset", "table.xlsx", ".xlsx", ".jsonl", ".parquet"]),
    ({"dataset": "nosuch://bucket/x.jsonl"}, ["dataset", "nosuch://bucket/x.jsonl"]),
    ({"output": "nosuch://bucket/x"}, ["output", "nosuch://bucket/x"]),
    ({"output": "s3://"}, ["output", "s3://"]),
    ({"output": "documents.jsonl"}, ["output", "documents.jsonl", "file"]),
    ({"output": "documents.jsonl/captured"}, ["output", "documents.jsonl", "file"]),
    ({"compression_config": "nowhere.yaml"}, ["compression_config", "nowhere.yaml"]),
    ({"compression_config": "codec.yaml"}, ["compression_config", "codec.yaml", "exact_k", "9"]),
    ({"engine": "vllm"}, ["engine", "vllm", "pip install 'distillkit[vllm]'"]),
]
RIGHT: list[dict[str, Any]] = [
    {},
    {"model": "owner/name", "tokenizer": "name", "dataset": "owner/data"},
    {"dataset": "s3://bucket/data", "output": "s3://bucket/captured"},
    {"output": "not/yet/there", "dataset": "held out.jsonl"},
    {"dataset": "a.json.gz"},
    {"dataset": "A.JSONL"},
]


def settings(options: dict[str, Any]) -> dict[str, Any]:
    return {"model": "teacher", "dataset": "documents.jsonl", "output": "output", **options}


@pytest.mark.usefixtures("there")
def test_what_is_not_there_is_named_with_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillkit.capture.preflight.find_spec", lambda name: None if name == "vllm" else True)
    for options, facts in WRONG:
        with refused((ConfigError, NotADirectoryError), *facts):
            check_before_loading(CaptureSettings(**settings(options)))
        with refused((ConfigError, NotADirectoryError), *facts):
            capture(**settings(options))
    for options in RIGHT:
        check_before_loading(CaptureSettings(**settings(options)))
    assert tuple(FORMATS) == DATA_FILES


def test_nothing_heavy_is_imported_for_it(there: Path) -> None:
    commands = []
    for options, _ in WRONG[:-1]:
        words = [f"--{name.replace('_', '-')}={value}" for name, value in settings(options).items()]
        commands.append(["capture", *words])
        if "output" not in options:
            # Where it is estimated need not be where it is captured.
            commands.append(["forecast", *words])
    code = (
        "import sys\n"
        "from distillkit.cli.main import main\n"
        f"for command in {commands!r}:\n"
        "    sys.argv[1:] = command\n"
        "    try: main()\n"
        "    except SystemExit as left: assert left.code == 1, command\n"
        "heavy = {'torch', 'transformers', 'datasets', 'huggingface_hub', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("error: ") == len(commands)


def test_a_device_that_is_not_there_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for device, facts in (
        ("cuda", ["device", "'cuda'", "0"]),
        ("cuda:1", ["device", "'cuda:1'", "0"]),
        ("gpu", ["device", "'gpu'", "cuda:1"]),
        ("meta", ["device", "'meta'"]),
    ):
        with refused(ConfigError, *facts):
            resolve_device(device)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with refused(ConfigError, "'cuda:2'", "2"):
        resolve_device("cuda:2")
    assert resolve_device("cpu") == "cpu"


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[1]", "{}", '{"model_type": "nosuch"}', '{"model_type": 5}', "\x00"),
        *('{"model_type": "llama", "vocab_size": "x"}', '{"model_type": "llama", "dtype": "float8"}'),
        '{"model_type": "llama", "num_attention_heads": 0}',
    ],
)
def test_a_config_that_is_none_is_named(tmp_path: Path, content: str) -> None:
    """Whatever the checks of the library raise for it."""
    (tmp_path / "config.json").write_text(content)
    with refused(ConfigError, "model", str(tmp_path)):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("pack", ["a", "b", f"--max-len={10**20}"]),
        ("pack", ["a", "b", "--max-len=32", f"--window={10**20}"]),
        ("forecast", ["--seconds=nan"]),
        ("forecast", ["--seconds=inf"]),
    ],
)
def test_numbers_that_mean_nothing_are_wrong_usage(command: str, options: list[str]) -> None:
    result = CliRunner().invoke(cli, [command, *options])
    assert result.exit_code == 2, result.output
    check_names(result.output, options[-1].partition("=")[0])

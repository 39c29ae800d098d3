"""The `distillkit` command as a person meets it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from distillkit.cli.main import cli, main
from distillkit.cli.train import summary_table
from support.refusals import check_names
from support.training import random_documents, run_config, save_student, write_dataset


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains two steps."""
    folder = tmp_path_factory.mktemp("cli")
    run = run_config(
        save_student(folder / "student"),
        folder / "out",
        write_dataset(folder / "train", random_documents(8)),
        write_dataset(folder / "eval", random_documents(2, seed=1)),
        training_args={
            "max_steps": 2,
            "eval_on_start": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "disable_tqdm": False,
        },
    )
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_unset=True)))
    return path


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "distillkit", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def status_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of the command, run here."""
    monkeypatch.setattr(sys, "argv", ["distillkit", *arguments])
    logger = logging.getLogger("distillkit")
    level = logger.level
    with pytest.raises(SystemExit) as ended:
        main()
    logger.setLevel(level)
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.slow
def test_a_configuration_alone_trains_and_ends_with_a_table(config: Path) -> None:
    result = run(str(config))
    assert result.returncode == 0, result.stderr
    assert "KL(teacher ‖ student)" in result.stdout
    assert "(step 0) →" in result.stdout
    lines = result.stderr.splitlines()
    assert any(line.strip().startswith("held out 0/2  loss") for line in lines), "a readable line for each log"
    assert any(line.strip().startswith("step 2/2  loss") for line in lines)
    assert any("FlashAttention" in line for line in lines)
    assert "Traceback" not in result.stderr


def test_the_summary_as_json_is_alone_on_stdout(config: Path) -> None:
    result = CliRunner().invoke(cli, ["train", "--json", str(config)], catch_exceptions=False)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["steps"] == 2


def test_exit_status_tells_failure_from_misuse(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And nothing but one message comes with it, on stderr."""
    content = yaml.safe_load(config.read_text())
    content["training_args"]["learnin_rate"] = content["training_args"].pop("learning_rate")
    bad = tmp_path / "bad.yaml"
    bad.write_text(yaml.safe_dump(content))
    for arguments, status, facts in (
        ([str(bad)], 1, [str(bad), "training_args.learnin_rate", "'learning_rate'"]),
        (["nowhere.yaml"], 1, ["nowhere.yaml"]),
        (["trian"], 1, ["'train'"]),
        (["train"], 2, ["CONFIG"]),
        (["train", "--no-such-option", "x"], 2, ["--no-such-option"]),
    ):
        assert status_of(monkeypatch, *arguments) == status
        printed = capsys.readouterr()
        check_names(" ".join(printed.err.split()), *facts)
        assert "Traceback" not in printed.err
        assert printed.out == ""


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from distillkit.cli.main import cli; cli(['--help'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    for word in ("train", "capture", "distillkit config.yaml"):
        assert word in result.stdout


def test_the_table_has_what_there_is() -> None:
    summary: dict[str, Any] = {
        "output_path": "out",
        "steps": 3,
        "seconds": 1.5,
        "train_tokens": 1000,
        "tokens_per_second": 500.0,
        "data_wait": 0.02,
        "cut_documents": 2,
        "cut_tokens": 30,
        "peak_rss_bytes": 10**9,
        "peak_cuda_bytes": 0,
        "eval_first": None,
        "eval_last": None,
        "train_last": None,
    }
    table = summary_table(summary)
    labels = ["steps", "tokens", "cut", "time", "waiting for data", "peak memory", "report"]
    assert list(table.columns[0].cells) == labels

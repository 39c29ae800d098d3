"""The `distillkit` command as a person meets it."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner

from distillkit.cli.commands import CODEC, DISTILLKIT, Commands
from distillkit.cli.main import cli, main
from distillkit.cli.train import summary_table
from support.processes import Processes
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
def test_a_configuration_alone_trains_and_ends_with_a_table(config: Path, processes: Processes) -> None:
    result = processes.run(["distillkit", config], config.parent)
    assert result.returncode == 0, result.stderr
    assert "KL(teacher ‖ student)" in result.stdout
    assert "(step 0) →" in result.stdout
    lines = result.stderr.splitlines()
    for step in ("0/2", "2/2"):
        assert any(f"{step}  loss " in line for line in lines), "a readable line for each log"
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
        (["inspect"], 1, ["'distillkit-codec inspect'"]),
        (["inspect", "captured"], 2, ["'distillkit-codec inspect'"]),
        (["inspekt", "captured"], 2, ["'distillkit-codec inspect'"]),
        (["catpure", "--model", "x"], 2, ["'capture'"]),
        (["--model", "x", "catpure"], 2, ["--model"]),
        ([str(tmp_path)], 1, [str(tmp_path), "folder"]),
        (["train"], 2, ["CONFIG"]),
        (["train", "--no-such-option", "x"], 2, ["--no-such-option"]),
    ):
        assert status_of(monkeypatch, *arguments) == status
        printed = capsys.readouterr()
        check_names(" ".join(printed.err.split()), *facts)
        assert "Traceback" not in printed.err
        assert printed.out == ""


@pytest.mark.parametrize(
    ("module", "words"),
    [("main", ("train", "capture", "distillkit train.yaml")), ("codec", ("inspect", "verify", "convert", "bench"))],
)
def test_help_imports_next_to_nothing(module: str, words: tuple[str, ...]) -> None:
    code = (
        f"import sys; from distillkit.cli.{module} import cli; cli(['--help'], standalone_mode=False); "
        "heavy = {'torch', 'numpy', 'pydantic', 'pyarrow', 'rich', 'yaml', 'fsspec'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    for word in words:
        assert word in result.stdout


def test_the_help_of_a_program_says_of_commands_what_they_say_themselves() -> None:
    for program, table in (("distillkit", DISTILLKIT), ("distillkit-codec", CODEC)):
        for name, entry in table.items():
            command = Commands(table=table).get_command(click.Context(cli), name)
            assert command is not None, program
            assert command.name == name
            assert entry.about == command.short_help, name


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------

_INTERRUPTED = """
import importlib.abc, os, signal, sys, time

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
            try:
                time.sleep(5)
            except KeyboardInterrupt:
                # As libraries do it.
                raise ImportError(name) from None

sys.meta_path.insert(0, Interrupting())
from distillkit.cli.entry import main
sys.argv[1:] = ["schema", "capture"]
main()
"""
_TWICE = """
import os, signal, sys, time
from distillkit.cli import entry, commands
import click

@click.command()
def schema():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(20)
    finally:
        print("cleaning up", file=sys.stderr, flush=True)
        {again}
        print("cleaned up", file=sys.stderr, flush=True)

commands.Commands.get_command = lambda self, context, name: schema
sys.argv[1:] = ["schema"]
entry.main()
"""
_AT_THE_END = """
import os, signal, sys

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGINT):
        kill(process, number)

sys.late = Late()
"""


@pytest.mark.parametrize(
    "code",
    [
        *(
            _INTERRUPTED.format(name=name)
            for name in ("click", "distillkit.cli.main", "numpy", "distillkit.cli.schema")
        ),
        _TWICE.format(again=""),
        _TWICE.format(again="os.kill(os.getpid(), signal.SIGINT); time.sleep(20)"),
        _AT_THE_END + _TWICE.format(again=""),
    ],
    ids=["click", "main", "numpy", "schema", "once", "twice", "at the end"],
)
def test_ctrl_c_ends_with_its_status_and_no_traceback(code: str) -> None:
    """While modules are imported, in a command, and again while the first one is being answered."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        # Jobs in the background of a script start with the signal ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
    assert "interrupted" in result.stderr
    assert ("cleaned up" in result.stderr) is code.endswith(_TWICE.format(again=""))
    assert result.stdout == ""


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

"""The README and the pages of docs/ are true: commands and snippets are run in a folder that has what they name, and
every YAML block is a valid configuration."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from distillkit.capture.settings_file import load_captures
from distillkit.cli.main import cli
from distillkit.shards.published import load_codec_config
from distillkit.training.config.file import parse_config
from support.processes import Processes
from support.training import random_documents, save_student

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# In this order, since later pages use what earlier ones made. The commands of docs/capture.md need GPUs, vLLM and a
# cluster: only their options are checked.
EXECUTED = (ROOT / "README.md", DOCS / "training.md", DOCS / "monitoring.md", DOCS / "datasets.md")


def blocks(page: Path, languages: str = r"\w+") -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    content = page.read_text(encoding="utf-8")
    return re.findall(rf"^```({languages})\n(.*?)^```", content, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """distillkit's own commands in a block; launchers, package managers and make are not run."""
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("distillkit")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teacher, student, documents and a published dataset, as the pages name them."""
    folder = tmp_path_factory.mktemp("readme")
    sizes = {"vocabulary": 160, "max_position_embeddings": 1024}
    save_student(folder / "teacher", seed=0, **sizes)
    save_student(folder / "student", seed=1, **sizes)
    for name, seed in (("documents", 0), ("held_out", 1)):
        rows = [{"input_ids": ids.tolist()} for ids in random_documents(12, seed=seed)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(ROOT / "tests" / "golden" / "upstream_v1", folder / "published")
    return folder


def run_program(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run an installed program, found as a shell finds it."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_commands_and_snippets_run(place: Path, processes: Processes) -> None:
    """The first command of each program is started as a person does, the others in forks that have all imports."""
    ran = 0
    started: set[str] = set()
    for language, text in (block for page in EXECUTED for block in blocks(page)):
        named = re.match(r"# (\w+\.yaml)$", text.split("\n", 1)[0])
        if language == "yaml" and named:
            (place / named[1]).write_text(text)
        for command in [["python", "-c", text]] if language == "python" else commands(text):
            run = processes.run if command[0] in {*started, "python"} else run_program
            result = run(command, place)
            assert result.returncode == 0, f"{command}: {result.stderr}"
            started.add(command[0])
            ran += 1
    assert ran == 24
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(place / "trained").config.vocab_size == 160
    assert (place / "captured.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("page", "least"), [("capture.md", 6), ("students.md", 3), ("retokenize.md", 1)])
def test_options_of_commands_that_are_not_run_exist(page: str, least: int) -> None:
    found = [command for _, text in blocks(DOCS / page, "bash") for command in commands(text)]
    assert len(found) >= least
    for _, name, *options in found:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None, name
        command.make_context(name, options)


@pytest.mark.parametrize(
    "path", [page for page in sorted(DOCS.glob("*.md")) if blocks(page, "yaml")], ids=lambda path: path.name
)
def test_settings_in_the_documents_are_valid(path: Path, tmp_path: Path) -> None:
    """Each YAML block, put into a small configuration, or read as a file of captures or of a codec."""
    for block in (yaml.safe_load(text) for _, text in blocks(path, "yaml")):
        if "captures" in block:
            (tmp_path / "captures.yaml").write_text(yaml.safe_dump(block), encoding="utf-8")
            assert len(load_captures(tmp_path / "captures.yaml")) == len(block["captures"])
            continue
        if "sampled" in block:
            load_codec_config(block)
            continue
        if "deepspeed" in block.get("training_args", {}) and importlib.util.find_spec("deepspeed") is None:
            continue
        base = {
            "model": "student",
            "output_path": "trained",
            "sequence_length": 1024,
            "dataset": {"train_dataset": {"disk_path": "captured"}},
            "teacher": {"kind": "dataset"},
        }
        if "teachers" in block:
            del base["teacher"]
        parse_config({**base, **block}, source=path.name)


def test_make_targets_exist() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    named = {
        name for page in pages for name in re.findall(r"(?m)(?:^|`)make ([a-z-]+)", page.read_text(encoding="utf-8"))
    }
    assert {"demo", "test", "test-fast", "lint", "bench", "wheel", "setup"} <= named
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert named <= targets

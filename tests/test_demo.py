"""The demo: it runs to its end, its text is split cleanly, and the trainer takes its configuration."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from distillkit.training.config.file import load_config
from support.processes import Processes

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", EXAMPLES / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_held_out_text_is_trained_on(demo: ModuleType, tmp_path: Path) -> None:
    demo.make_text(tmp_path)
    texts = {}
    for name in ("train", "held-out"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        texts[name] = [row["text"] for row in rows]
        assert len(rows) >= 8
    # At about 4 characters a token: enough to learn from, and enough to judge by.
    assert sum(map(len, texts["train"])) > 90_000
    assert sum(map(len, texts["held-out"])) > 12_000

    def long_paragraphs(name: str) -> set[str]:
        parts = [part for text in texts[name] for part in re.split(r"\n\s*\n", text)]
        return {" ".join(part.split()) for part in parts if len(part) >= 80}

    assert not long_paragraphs("train") & long_paragraphs("held-out")


def test_the_configuration_is_one_for_the_trainer(demo: ModuleType) -> None:
    config = load_config(EXAMPLES / "demo.yaml")
    assert [(loss.function, loss.weight) for loss in config.loss_functions] == [("cross_entropy", 0.1), ("kl", 0.9)]
    assert config.sequence_length == demo.MAX_TOKENS


@pytest.mark.slow
def test_it_runs_to_its_end_and_again(
    demo: ModuleType,
    processes: Processes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What `make demo` runs, with the real teacher, on little text and for a few steps."""

    def run(command: list[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
        ended = processes.run([Path(command[0]).name, *command[1:]], Path.cwd())
        assert ended.returncode == 0, ended.stderr
        return ended

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    monkeypatch.chdir(tmp_path)  # The demo leaves it for the repository.
    options = ["--output", str(tmp_path / "demo"), "--characters", "6000", "--steps", "2"]
    monkeypatch.setattr("sys.argv", ["demo.py", *options])
    for words in (["bytes per token", "on held-out text", "The same with your own models"], ["(there already)"]):
        demo.main()
        printed = capsys.readouterr().out
        assert all(word in printed for word in words), printed
    for name in ("codec.png", "training.png", "distilled/model.safetensors"):
        assert (tmp_path / "demo" / name).stat().st_size > 1000

"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from support.processes import Processes

# What an example takes says more of the machine than of the code.
hypothesis.settings.register_profile("distillkit", deadline=None)
hypothesis.settings.load_profile("distillkit")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama, see `support.teachers.write_llama`."""
    from support.teachers import write_llama

    folder = tmp_path_factory.mktemp("teacher")
    write_llama(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents of text for it, see `support.teachers.write_text`."""
    from support.teachers import write_text

    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    write_text(path, 120)
    return path


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a training run is put together from: folders of students, teachers and captured documents.

    Tests read these folders and write to folders of their own.
    """
    from support.training import captured_parts, save_student, tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("parts")
    tiny_model(1).save_pretrained(folder / "other")
    tiny_tokenizer(prefix="other").save_pretrained(folder / "other")
    return {
        **captured_parts(folder),
        "tied": save_student(folder / "tied", tie_word_embeddings=True),
        # The one that was captured from, and a larger one.
        "teacher": save_student(folder / "teacher", seed=7),
        "wide": save_student(folder / "wide", seed=7, hidden_size=48, num_hidden_layers=3),
        # A student with another tokenizer.
        "other": str(folder / "other"),
    }


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Training in several processes."""
    from support.processes import Processes

    with Processes() as running:
        yield running


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have no plots: to draw them takes most of a short training run's time."""
    for name in ("plot_quality", "plot_speed"):
        monkeypatch.setattr(f"distillkit.reports.run_plots.{name}", lambda run, path: None)

"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama, see `capturing.make_teacher`."""
    from capturing import make_teacher

    return make_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of text for it, see `capturing.write_text`."""
    from capturing import write_text

    return write_text(tmp_path_factory.mktemp("text") / "rows.jsonl")

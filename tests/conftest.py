"""Fixtures that several test files share."""

from __future__ import annotations

from pathlib import Path

import pytest


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

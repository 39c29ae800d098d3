"""docs/benchmarks.md is what benches/docs.py makes of the newest figures."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from support.scripts import load_script

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"


@pytest.fixture
def docs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("docs", monkeypatch)


def test_the_page_is_up_to_date(docs: ModuleType) -> None:
    assert PAGE.read_text(encoding="utf-8") == docs.page(), "run `make bench-docs`"


def test_the_page_has_presets_in_readable_lines() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"`(q|legacy)_", text)
    assert all(len(line) <= 100 for line in text.splitlines() if not line.startswith("|"))


def test_the_newest_figures_of_a_kind_are_taken(docs: ModuleType, tmp_path: Path) -> None:
    for name in ("2026-01-02-x86_64-losses", "2025-12-31-x86_64-losses", "2026-01-03-x86_64-which-loss"):
        (tmp_path / f"{name}.csv").write_text(f"side\n{name}\n")
    found = docs.newest("losses", tmp_path)
    assert (found.date, found.architecture) == ("2026-01-02", "x86_64")
    assert found.rows == [{"side": "2026-01-02-x86_64-losses"}]
    with pytest.raises(SystemExit, match="no speed figures"):
        docs.newest("speed", tmp_path)

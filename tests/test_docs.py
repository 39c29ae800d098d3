"""The pages are short enough to read, their links lead somewhere, and their language is the field's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "docs", "dev", "rust/codec", "python/distillkit/shards", "tests/golden")
PAGES = sorted(page for folder in FOLDERS for page in (ROOT / folder).glob("*.md"))

# Not plain English, or not the field's words; each was written here once.
AVOIDED = (
    r"can not\b",
    r"\bcan't\b",
    r"it goes on where",
    r"is trusted",
    r"its last bits are",
    r"is no setting",
    r"[Ww]hat would do",
    r"[Tt]aken and not needed",
    r"it is none\b",
    r"are none\b",
    r"beside the token it belongs to",
    r"^#+ (Surviving|What was run where|Seeing a run)",
)


def prose(page: Path) -> list[tuple[int, str]]:
    """A page's lines with their numbers, without fenced blocks."""
    lines, fenced = [], False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            lines.append((number, line))
    return lines


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = (line.lstrip("#").strip().lower() for _, line in prose(page) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings}


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_is_in_order(page: Path) -> None:
    for number, line in prose(page):
        where = f"{page.name}:{number}"
        assert len(line) <= 100 or line.startswith("|") or " " not in line.strip(), f"{where}: {len(line)} characters"
        for words in AVOIDED:
            assert re.search(words, line) is None, f"{where}: {words}"
        for target, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", line):
            if target.startswith("http"):
                continue
            other = page.parent / target if target else page
            assert other.exists(), f"{where}: {target}"
            assert not anchor or anchor in anchors(other), f"{where}: #{anchor}"

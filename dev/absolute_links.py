"""Prepare a checkout for a release: `python dev/absolute_links.py https://HOST/OWNER/NAME TAG`.

A package index shows the README without the repository around it. This makes the README's links absolute, and adds the
repository to the package's metadata. The release workflow calls it with the repository that it runs in, before it
builds; nothing of this is committed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Of [text](target): targets that are neither URLs nor places on the same page.
_LINK = re.compile(r"(?P<text>\]\()(?P<target>(?!\w+:|#)[^)\s]+)\)")


def absolute(markdown: str, repository: str, tag: str) -> str:
    """A page of the repository's root, with links to its other files as of a tag.

    Example:
        >>> absolute("[a](docs/a.md#b), [c](#c), [d](https://d)", "https://h/o/n", "v1")
        '[a](https://h/o/n/blob/v1/docs/a.md#b), [c](#c), [d](https://d)'
    """
    return _LINK.sub(lambda link: f"{link['text']}{repository}/blob/{tag}/{link['target']})", markdown)


def with_urls(pyproject: str, repository: str, tag: str) -> str:
    """pyproject.toml with the repository's addresses."""
    places = {"Repository": "", "Documentation": f"/blob/{tag}/docs/index.md", "Changelog": f"/blob/{tag}/CHANGELOG.md"}
    lines = [f'{name} = "{repository}{path}"' for name, path in {**places, "Issues": "/issues"}.items()]
    return "\n".join([pyproject.rstrip("\n"), "", "[project.urls]", *lines, ""])


def main(repository: str, tag: str) -> None:
    for name, change in (("README.md", absolute), ("pyproject.toml", with_urls)):
        path = ROOT / name
        path.write_text(change(path.read_text(encoding="utf-8"), repository.rstrip("/"), tag), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])

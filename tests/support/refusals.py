"""Errors are judged by their kind and by the facts they name, never by their wording."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def refused(error: type[BaseException] | tuple[type[BaseException], ...], *facts: str) -> Iterator[None]:
    """What is done here is refused with this kind of error, and its message has these facts (see `check_names`)."""
    try:
        yield
    except error as caught:
        check_names(str(caught), *facts)
    else:
        pytest.fail(f"not refused: nothing named {', '.join(facts)}")


def check_names(message: str, *facts: str) -> None:
    """A message has each of these facts as words of their own: dotted paths, numbers, names, files, options."""
    missing = [fact for fact in facts if not re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", message)]
    assert not missing, f"{message!r} does not name {missing}"

"""A headless Chromium that looks at pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("DISTILLKIT_CHROMIUM") or next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser; without one, the tests that need it are skipped."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="looking at pages needs playwright: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("looking at pages needs Chromium: apt install chromium, or its path in DISTILLKIT_CHROMIUM")
    with playwright.sync_playwright() as started:
        # In containers, Chromium cannot make its sandbox; it only opens our pages here.
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield Browser(browser)
        finally:
            browser.close()


class Browser:
    """Opens pages, and remembers what they do that they should not.

    Attributes:
        complaints: messages on the console, errors, dialogs, and requests for anything but the page itself.
    """

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self.complaints: list[str] = []

    @contextmanager
    def open(self, path: Path, *, width: int = 1600, scheme: str = "light") -> Iterator[Any]:
        """Open a page at a width in CSS pixels, with a preference for light or dark."""
        self.complaints = []
        context = self._browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        try:
            page = context.new_page()
            page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
            page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
            page.on("dialog", lambda dialog: (self.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
            page.on("request", lambda request: self._requested(request.url, path.as_uri()))
            page.goto(path.as_uri())
            yield page
        finally:
            context.close()

    def _requested(self, url: str, own: str) -> None:
        if url != own and not url.startswith("data:,"):
            self.complaints.append(f"request: {url}")

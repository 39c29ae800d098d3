"""`distillkit-codec`, as a person runs it."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

from distillkit.cli.codec import main

WIDTH = {"COLUMNS": "80"}


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, warnings as errors, 80 columns wide."""
    program = "import sys; from distillkit.cli.codec import main; sys.argv[0] = 'distillkit-codec'; main()"
    command = [sys.executable, "-W", "error", "-c", program, *map(str, arguments)]
    settings = {**os.environ, **WIDTH, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=settings, timeout=120, check=False)


def run_here(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, where Python and its modules are loaded already."""
    command = ["distillkit-codec", *map(str, arguments)]
    stdout, stderr = io.StringIO(), io.StringIO()
    logger = logging.getLogger("distillkit")
    level = logger.level
    try:
        with (
            mock.patch.object(sys, "argv", command),
            mock.patch.dict(os.environ, WIDTH),
            redirect_stdout(stdout),
            redirect_stderr(stderr),
            pytest.raises(SystemExit) as left,
        ):
            main()
    finally:
        logger.setLevel(level)
    return subprocess.CompletedProcess(command, left.value.code or 0, stdout.getvalue(), stderr.getvalue())

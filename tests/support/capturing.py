"""Captures of a small teacher, for tests."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from distillkit.capture import CaptureReport, capture
from support.teachers import EXACT

COMMAND = [sys.executable, "-c", "from distillkit.cli.capture import capture; capture()"]


def run(teacher: Path, dataset: Path, output: Path, **options: Any) -> CaptureReport:
    settings = {"max_seq_len": 64, "batch_tokens": 256, "head_rows": 50, "shard_tokens": 700, "progress": False}
    if "preset" not in options:
        settings["compression_config"] = EXACT
    return capture(model=str(teacher), dataset=str(dataset), output=output, **{**settings, **options})


def files(folder: Path) -> dict[str, bytes]:
    """The files of a dataset by name, without the plan of an unfinished one."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".capture"}


def everything(folder: Path) -> dict[str, bytes]:
    """All files of a folder and of those in it, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

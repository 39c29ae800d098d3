"""The package without what only Unix has: see `support/windows.py`."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from support.training import run_config
from support.windows import FUNCTIONS, MODULES

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "python" / "distillkit"
START = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
from support.windows import as_on_windows
as_on_windows(Path(sys.argv[1]))
from distillkit.cli import entry

def run(program, *arguments):
    sys.argv = [program.__name__, *map(str, arguments)]
    try:
        program()
    except SystemExit as end:
        assert not end.code, sys.argv

out = Path(sys.argv[1])
"""


def run_as_on_windows(script: str, folder: Path, *arguments: Path | str) -> list[str]:
    """Run a script in a process like one on Windows; returns the lines it printed."""
    ended = subprocess.run(
        [sys.executable, "-c", START + script, folder, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        # What Windows writes to pipes in.
        env={**os.environ, "PYTHONIOENCODING": "cp1252", "TMPDIR": str(folder)},
        encoding="cp1252",
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout.splitlines()


def test_what_only_unix_has_is_asked_for_first() -> None:
    """Each of these uses looks whether it is there, or runs where it is; see the lines around it."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        used = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= MODULES & {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used |= MODULES & {node.module}
            elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("os", "signal"):
                used |= FUNCTIONS & {node.attr}
        found |= {(path.relative_to(PACKAGE).as_posix(), name) for name in used}
    assert found == {
        ("memory.py", "resource"),
        ("shards/os_files.py", "fcntl"),
        ("shards/os_files.py", "register_at_fork"),
        ("capture/preflight.py", "statvfs"),
        ("capture/preflight.py", "ST_RDONLY"),
        ("bench/machine.py", "sched_getaffinity"),
        ("bench/child.py", "sched_getaffinity"),
        ("bench/child.py", "sched_setaffinity"),
        ("training/config/arguments.py", "sched_getaffinity"),
    }


def test_datasets_are_converted_packed_and_verified(tmp_path: Path) -> None:
    script = """
from distillkit.shards.os_files import _windows
assert _windows is not None
source = sys.argv[2]
run(entry.codec, "convert", source, out / "shards")
run(entry.codec, "convert", source, "memory://elsewhere")
run(entry.main, "pack", out / "shards", out / "packed", "--max-len", 600)
for place in (out / "shards", "memory://elsewhere", out / "packed"):
    run(entry.codec, "inspect", place)
    run(entry.codec, "verify", place)
"""
    lines = run_as_on_windows(script, tmp_path, TESTS / "golden" / "upstream_v1")
    assert sum(line.startswith("valid") for line in lines) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"shards", "packed"}
    assert {path.name for path in tmp_path.glob("*/*")} == {"manifest.json", "data-00000.parquet"}


def test_one_process_writes_a_dataset_and_leaves_no_locks(tmp_path: Path) -> None:
    """The second process is refused while the first writes, and not once it was killed."""
    script = """
import os, subprocess
from distillkit.errors import InputError
from distillkit.shards.lock import FolderLock
from distillkit.shards.storage import Folder
folder = Folder(out / "captured")
again = [sys.executable, "-c", sys.argv[2], sys.argv[1], "again"]
if sys.argv[2] == "again":
    lock = FolderLock(folder)
    print("locked", flush=True)
    os._exit(9)
with FolderLock(folder) as lock:
    with lock.turn():
        pass
    print(subprocess.run(again, capture_output=True, text=True).stderr.strip().splitlines()[-1])
print((out / "captured").exists())
print(subprocess.run(again, capture_output=True, text=True).stdout.strip())
print(len(list(out.glob("captured/.capture/writer-*"))))
with FolderLock(folder):
    print(len(list(out.glob("captured/.capture/writer-*"))))
"""
    refusal, *others = run_as_on_windows(script, tmp_path, START + script)
    assert "InputError" in refusal
    assert "has been writing" in refusal
    # Nothing is left of the first; a killed one leaves its files, which the next removes.
    assert others == ["False", "locked", "1", "1"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["captured"]


@pytest.mark.slow
def test_capture_and_training(teacher: Path, text: Path, tmp_path: Path) -> None:
    config = run_config(
        str(teacher), tmp_path / "trained", str(tmp_path / "captured"), training_args={"save_strategy": "steps"}
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    script = """
model, data = sys.argv[2:]
sources = ("--model", model, "--dataset", data)
run(entry.main, "capture", *sources, "--output", out / "captured", "--max-seq-len", 64, "--preset", "budget")
run(entry.main, "train", out / "config.yaml", "--dry-run")
run(entry.main, "train", out / "config.yaml")
"""
    run_as_on_windows(script, tmp_path, teacher, text)
    assert (tmp_path / "trained" / "model.safetensors").exists()
    assert json.loads((tmp_path / "captured" / "manifest.json").read_text())["shards"]
    assert not (tmp_path / "captured" / ".capture").exists()

"""Loads scripts of benches/, which are not modules of a package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "benches"


def load_script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of benches/ as a module, for one test."""
    spec = importlib.util.spec_from_file_location(f"benches_{name}", BENCHES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where its dataclasses look their types up
    spec.loader.exec_module(module)
    return module

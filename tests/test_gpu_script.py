"""`make gpu`: its parts with sizes for a CPU, and how the whole of it ends in time, whatever a part does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from support.scripts import load_script

Figures = dict[str, dict[str, Any]]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("gpu", monkeypatch)


@pytest.mark.slow
def test_every_part_measures_what_it_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: ModuleType) -> None:
    monkeypatch.syspath_prepend(Path(script.__file__).parent)
    parts = load_script("gpu_parts", monkeypatch)
    found: dict[str, Figures] = {}
    for part in script.PARTS:
        # The last runs pytest, on the files of the tests that need a GPU.
        if part != "tests":
            found[part] = {}
            getattr(parts, part.replace("-", "_"))(parts.TINY, tmp_path, found[part].__setitem__)
    for name, figures in found["decode"].items():
        if "eager" in name or "compiled" in name:
            assert figures["largest difference of approximated values"] == 0
    assert len(found["decode"]) == 2 + 3 * 2
    for name, figures in found["loss"].items():
        assert "Liger" in name or figures["error of states' gradient"] < 0.01
        assert "Liger" in name or figures["error of weight's gradient"] < 0.01
    assert found["packing"]["sdpa, packed"]["largest difference"] < 0.02
    assert found["packing"]["sdpa, as one document"]["largest difference"] > 0.1
    for part in ("training-plain", "training-ours", "capture"):
        assert all(figures["tokens/s"] > 0 for figures in found[part].values())
    assert math.isfinite(found["capture"]["capture"]["nats mean KL of the stored rows"])
    json.dumps(found)
    lines = script.table({part: {"figures": figures} for part, figures in found.items()})
    assert len(lines) == sum(map(len, found.values())) + 1
    assert any(line.startswith("training-ours") and "more time for a step" in line for line in lines)


def test_a_part_that_fails_or_takes_too_long_ends_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu_parts.py").write_text(
        "import pathlib, sys, time\n"
        'pathlib.Path(sys.argv[3]).write_text(\'{"a thing": {"tokens/s": 1234567.8}}\')\n'
        "time.sleep(60 if sys.argv[1] == 'loss' else 0)\n"
        "sys.exit('no such kernel' if sys.argv[1] == 'decode' else 0)\n"
    )
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(script, "PARTS", {"decode": 30, "loss": 0.5, "packing": 30})
    arguments = ["gpu.py", "--out", str(tmp_path / "out")]
    for seconds, third in (("480", None), ("0", "no time was left")):
        monkeypatch.setattr("sys.argv", [*arguments, "--seconds", seconds])
        with pytest.raises(SystemExit) as end:
            script.main()
        assert end.value.code == 1
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        assert results["packing"].get("error") == third
        if third is None:
            assert "no such kernel" in results["decode"]["error"]
            assert "stopped after" in results["loss"]["error"]
            assert results["loss"]["figures"] == {"a thing": {"tokens/s": 1234567.8}}
            printed = capsys.readouterr().out
            assert printed.count("1,234,568 tokens/s") == 3
            assert printed.count("FAILED") == 2

"""What distillkit does on a GPU, in at most eight minutes: `make gpu`, or without make and without a network

    python3 benches/gpu.py --wheels gpu-wheels

on a machine that has PyTorch and transformers. `make gpu-wheels` fills that folder beforehand, on a machine that has a
network. `--tiny` runs everything with sizes for a CPU, to see that it runs.

Each part is a process of its own with a time limit, and fails alone. The results so far are in OUT/results.json after
each part, its output in OUT/PART.log, and a table comes at the end. The parts are described in `gpu_parts.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MOST_SECONDS = 480

# In their order, with the seconds that each may take. `inputs` makes what `capture` and the two trainings read.
PARTS = {
    "decode": 100,
    "loss": 75,
    "packing": 45,
    "inputs": 60,
    "training-plain": 75,
    "training-ours": 75,
    "capture": 75,
    "tests": 90,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for the results (%(default)s)")
    parser.add_argument(
        "--wheels", type=Path, help="folder of wheels that the machine lacks; they are installed for this run only"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="only these parts")
    parser.add_argument("--seconds", type=float, default=MOST_SECONDS, help="for everything (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    arguments.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": platform.platform(), "python": platform.python_version()}
    with tempfile.TemporaryDirectory(prefix="distillkit-gpu-") as folder:
        environment = prepared(arguments.wheels, Path(folder) / "site")
        for part in arguments.parts:
            limit = min(PARTS[part] * (4 if arguments.tiny else 1), deadline - time.monotonic())
            results[part] = run(part, limit, arguments, Path(folder), environment)
            partial = arguments.out / "results.json"
            partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(summary(part, results[part]), flush=True)
    print("\n".join(["", *table(results)]))
    sys.exit(any("error" in results[part] for part in arguments.parts))


def prepared(wheels: Path | None, site: Path) -> dict[str, str]:
    """The environment of the parts: with the wheels installed where nothing else is, and nothing asked of the hub."""
    paths = [] if os.environ.get("PYTHONPATH") is None else [os.environ["PYTHONPATH"]]
    if wheels is not None:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        subprocess.run([*command, "--target", str(site), *map(str, sorted(wheels.glob("*.whl")))], check=True)
        paths.insert(0, str(site))
    offline = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        "WANDB_MODE": "disabled",
    }
    return {**os.environ, **offline, "PYTHONPATH": os.pathsep.join(paths)}


def run(
    part: str, limit: float, arguments: argparse.Namespace, folder: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """Run a part; returns its figures, or why there are none, and the seconds it took."""
    log, figures = arguments.out / f"{part}.log", folder / f"{part}.json"
    command = [sys.executable, str(HERE / "gpu_parts.py"), part, str(folder), str(figures)]
    command += ["--tiny"] if arguments.tiny else []
    started = time.monotonic()
    error = "no time was left" if limit <= 0 else ended(command, limit, log, environment)
    result: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1)}
    if error:
        result["error"] = error
    return {**result, "figures": json.loads(figures.read_text(encoding="utf-8")) if figures.exists() else {}}


def ended(command: list[str], limit: float, log: Path, environment: dict[str, str]) -> str | None:
    """Run a command, and end it with all that it started once its time is over; returns why it failed."""
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=HERE.parent, start_new_session=True
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"stopped after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit status {status}: {last_line(log)}" if status else None


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def summary(part: str, result: dict[str, Any]) -> str:
    return f"{part}: {result.get('error', 'done')} ({result['seconds']:.0f} s)"


def table(results: dict[str, Any]) -> list[str]:
    """What was measured, one thing on a line, and what only two parts together say."""
    figures = {part: dict(results[part]["figures"]) for part in PARTS if part in results}
    speeds = [row["tokens/s"] for who in ("plain", "ours") for row in figures.get(f"training-{who}", {}).values()]
    if len(speeds) == 2:
        figures["training-ours"]["against CE alone"] = {"more time for a step": speeds[0] / speeds[1] - 1}
    rows = [(part, name, row) for part, named in figures.items() for name, row in named.items()]
    width = max((len(name) for _, name, _ in rows), default=0)
    lines = [f"{part:14}  {name:{width}}  {', '.join(map(written, row.values(), row))}" for part, name, row in rows]
    return [*lines, *(f"{part:14}  FAILED: {results[part]['error']}" for part in figures if "error" in results[part])]


def written(figure: Any, unit: str) -> str:
    if isinstance(figure, str):
        return f"{unit} {figure}".lstrip()
    if not isinstance(figure, float):
        return f"{figure:,} {unit}"
    text = f"{figure:+.1%}" if unit.startswith("more") else f"{figure:.3g}" if abs(figure) < 1000 else f"{figure:,.0f}"
    return f"{text} {unit}"


if __name__ == "__main__":
    main()

"""Commands in processes that are forked from one that has imported everything already.

To import torch, transformers and TRL takes a process longer than most of these commands. That the installed programs
start by themselves is tested elsewhere: test_readme.py starts each of them, test_trackers.py starts two trainings with
torchrun, as a person does.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

SECONDS = 300
IMPORTED = (
    "peft",
    "torch.distributed.fsdp",
    "trl",
    "matplotlib.pyplot",
    "transformers.models.llama.modeling_llama",
    "distillkit.capture.run",
    "distillkit.capture.teachers.hf",
    "distillkit.cli.codec",
    "distillkit.cli.main",
    "distillkit.reports.inspection",
    "distillkit.reports.run_plots",
    "distillkit.training.run",
)


class Processes:
    """A process that forks others: each runs a command on the CPU, with one thread for torch."""

    def __enter__(self) -> Processes:
        self._server: Any = subprocess.Popen(
            [sys.executable, "-m", "support.processes"],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.stdin.close()
        self._server.wait(SECONDS)
        self._server.stdout.close()

    def run(self, command: Sequence[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
        """Run a command in a folder: `python` with a script or -c, or one of the installed programs."""
        words = [str(word) for word in command]
        with tempfile.TemporaryDirectory() as logs:
            output = [Path(logs) / name for name in ("stdout", "stderr")]
            [status] = self._start(words, folder, output, [{}])
            return subprocess.CompletedProcess(words, status, *(path.read_text(encoding="utf-8") for path in output))

    def train(self, config: Any, folder: Path, script: str | None = None, *, count: int = 2) -> None:
        """Train as `distillkit CONFIG` does under torchrun, or with this script in its place; without plots."""
        path, log = folder / "config.yaml", folder / "log"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
        log.write_text("")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = [
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            | {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
            | {name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
            for rank in range(count)
        ]
        command = ["distillkit"] if script is None else ["python", script]
        statuses = self._start([*command, str(path)], Path.cwd(), [log, log], ranks, plots=False)
        assert statuses == [0] * count, log.read_text()[-8000:]

    def _start(
        self,
        command: list[str],
        folder: Path,
        output: list[Path],
        environments: list[dict[str, str]],
        *,
        plots: bool = True,
    ) -> list[int]:
        """Run a command once for each of the environments, all at the same time; returns their exit statuses."""
        job = {"command": command, "folder": str(folder), "output": [str(path) for path in output], "plots": plots}
        self._server.stdin.write(json.dumps({**job, "environments": environments}) + "\n")
        self._server.stdin.flush()
        statuses: list[int] = json.loads(self._server.stdout.readline())
        return statuses


def serve() -> None:
    """Answer each line of stdin, a job, with the exit statuses of its processes."""
    for module in IMPORTED:
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(statuses_of([start(job, environment) for environment in job["environments"]])), flush=True)


def start(job: dict[str, Any], environment: dict[str, str]) -> int:
    """Fork one of a job's processes; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor, path in enumerate(job["output"], 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)
        os.chdir(job["folder"])
        os.environ |= environment
        if not job["plots"]:
            from distillkit.reports import run_plots

            run_plots.plot_quality = run_plots.plot_speed = lambda run, path: None
        call(job["command"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 — a fork must not run the parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def call(command: list[str]) -> None:
    """Do in this process what a command does in one of its own."""
    program, *arguments = command
    if program != "python":
        sys.argv = [program, *arguments]
        [entry] = entry_points(group="console_scripts", name=program)
        entry.load()()
    elif arguments[0] == "-c":
        sys.argv = arguments
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def statuses_of(children: list[int]) -> list[int]:
    """Wait for all; once one has failed, the others, which may wait for it, have a few seconds left."""
    statuses: dict[int, int] = {}
    end = time.monotonic() + SECONDS
    while len(statuses) < len(children):
        for child in set(children) - set(statuses):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
                if statuses[child] != 0:
                    end = min(end, time.monotonic() + 5)
            elif time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[child] for child in children]


if __name__ == "__main__":
    serve()

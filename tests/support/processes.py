"""Training in several processes, each forked from one that has imported everything already.

To import torch, transformers and TRL takes a process longer than most of these runs. test_trackers.py starts two with
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
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from distillkit.reports import run_plots

SECONDS = 300


class Processes:
    """A process that forks others: each trains as `distillkit CONFIG` does under torchrun on the CPU."""

    def __enter__(self) -> Processes:
        self._server: Any = subprocess.Popen(
            [sys.executable, "-m", "support.processes"],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.stdin.close()
        self._server.wait(SECONDS)
        self._server.stdout.close()

    def train(self, config: Any, folder: Path, script: str | None = None, *, count: int = 2) -> None:
        """Train as a configuration says, with this script in the place of the command."""
        path, log = folder / "config.yaml", folder / "log"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
        log.write_text("")
        job = {"config": str(path), "log": str(log), "script": script, "count": count}
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        assert self._server.stdout.readline() == f"{[0] * count}\n", log.read_text()[-8000:]


def serve() -> None:
    """Answer each line of stdin, a job, with the exit statuses of its processes."""
    for module in ("peft", "torch.distributed.fsdp", "trl", "distillkit.training.run"):
        importlib.import_module(module)
    run_plots.plot_quality = run_plots.plot_speed = lambda run, path: None
    for line in sys.stdin:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        job = json.loads(line)
        print(statuses_of([start(job, rank, port) for rank in range(job["count"])]), flush=True)


def start(job: dict[str, Any], rank: int, port: int) -> int:
    """Fork one of a job's processes; returns its id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for name in ("", "LOCAL_"):
            os.environ |= {f"{name}RANK": str(rank), f"{name}WORLD_SIZE": str(job["count"])}
        sys.argv = ["distillkit", job["config"]]
        if job["script"] is None:
            runpy.run_module("distillkit", run_name="__main__")
        else:
            runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 — a fork must not run the parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


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

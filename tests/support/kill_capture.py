"""Kills a capture with SIGKILL at random moments, again and again, and goes on with it each time.

Run by tests/test_capture_surviving.py. Everything is imported once, and each attempt is a fork. Prints as JSON how many
attempts were killed, how many datasets were finished on the way, how many of those differ from the uninterrupted one,
and the seconds of an uninterrupted run and of the last one, which goes on after a kill.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import tqdm

from distillkit.capture.run import run_capture
from distillkit.capture.settings import CaptureSettings
from support.capturing import everything

OPTIONS = {"max_seq_len": 64, "batch_tokens": 128, "head_rows": 50, "shard_tokens": 200, "preset": "budget"}


def start(teacher: str, dataset: str, output: Path) -> int:
    """Begin a capture in a fork; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            run_capture(CaptureSettings(model=teacher, dataset=dataset, output=output, **OPTIONS), progress=False)
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 — a fork must not run the parent's code
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return child


def ends_within(child: int, seconds: float) -> int | None:
    """Wait for a process; its exit status, or None if it still runs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def finish(child: int) -> None:
    """Wait for a run that is not to be killed; one that hangs does not outlive this process."""
    status = ends_within(child, 120)
    if status is None:
        os.kill(child, signal.SIGKILL)
    if status != 0:
        sys.exit(f"an uninterrupted run {'hangs' if status is None else 'failed'}")


def main(teacher: str, dataset: str, folder: str, kills: str) -> None:
    """Kill so many attempts."""
    torch.set_num_threads(1)
    # Progress bars share a lock between processes: a run killed with it would hold up all that follow.
    tqdm.tqdm.set_lock(threading.RLock())
    tqdm.tqdm.monitor_interval = 0
    whole, output = Path(folder) / "whole", Path(folder) / "killed"
    # Here, so that forks find everything imported.
    run_capture(CaptureSettings(model=teacher, dataset=dataset, output=whole, **OPTIONS), progress=False)
    begun = time.monotonic()
    finish(start(teacher, dataset, output))
    seconds = time.monotonic() - begun
    shutil.rmtree(output)
    expected = everything(whole)
    assert "manifest.json" in expected

    moments = random.Random(0)
    killed = finished = different = 0
    while killed < int(kills):
        child = start(teacher, dataset, output)
        status = ends_within(child, moments.uniform(0, seconds))
        if status is None:
            os.kill(child, signal.SIGKILL)
            killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        elif status != 0:
            sys.exit(f"a run that went on after {killed} kills failed")
        if (output / "manifest.json").exists() and not (output / ".capture").exists():
            finished += 1
            different += everything(output) != expected
            shutil.rmtree(output)
    begun = time.monotonic()
    finish(start(teacher, dataset, output))
    different += everything(output) != expected
    last = time.monotonic() - begun
    print(
        json.dumps({"killed": killed, "finished": finished + 1, "different": different, "whole": seconds, "last": last})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])

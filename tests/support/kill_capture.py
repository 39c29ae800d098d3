"""Kills a capture with SIGKILL at random moments, again and again, and goes on with it each time.

Then starts it twice at once, several times.

Run by tests/test_capture_surviving.py. Everything is imported once, and each attempt is a fork. Prints as JSON how many
attempts were killed, how many datasets were finished on the way, how many of those differ from the uninterrupted one,
how many times two started at once, with the errors that the refused ones raised, and the seconds of an uninterrupted
run and of the last one, which goes on after a kill.
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
from typing import Any

import torch
import tqdm

from distillkit.capture.run import run_capture
from distillkit.capture.settings import CaptureSettings
from distillkit.errors import InputError
from support.capturing import everything
from support.teachers import HEAD

SIZES = {"max_seq_len": 64, "batch_tokens": 128, "head_rows": 50, "shard_tokens": 200}
# With the compact one, a third of the text is scored before the first shard, to learn the prior from.
CODECS: dict[str, dict[str, Any]] = {
    "fixed": {"preset": "budget"},
    "compact": {"compression_config": {"vocab_size": HEAD, "k": 16, "step": 0.003}, "prior_rows": 2000},
}
OPTIONS: dict[str, Any] = dict(SIZES)
REFUSED = 17


def start(teacher: str, dataset: str, output: Path) -> int:
    """Begin a capture in a fork; returns its process id."""
    child = os.fork()
    if child == 0:
        try:
            run_capture(CaptureSettings(model=teacher, dataset=dataset, output=output, **OPTIONS), progress=False)
            os._exit(0)
        except InputError as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(REFUSED)
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


def race(teacher: str, dataset: str, output: Path) -> int:
    """Start two captures of one folder; returns how many were refused. At least one finishes the dataset."""
    children = [start(teacher, dataset, output) for _ in range(2)]
    statuses = [ends_within(child, 120) for child in children]
    if sorted(statuses, key=str) not in ([0, 0], [0, REFUSED]):
        sys.exit(f"two captures at once ended with {statuses}")
    return statuses.count(REFUSED)


def main(teacher: str, dataset: str, folder: str, kills: str, races: str, codec: str) -> None:
    """Kill so many attempts, and start so many pairs."""
    OPTIONS.update(CODECS[codec])
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

    # Spread evenly over a run, in random order.
    moments = [(part + random.Random(part).random()) / int(kills) * seconds for part in range(int(kills))]
    random.Random(0).shuffle(moments)
    attempts = killed = finished = different = 0
    while killed < int(kills):
        child = start(teacher, dataset, output)
        status = ends_within(child, moments[attempts % int(kills)])
        attempts += 1
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
    refused = 0
    for _ in range(int(races)):
        shutil.rmtree(output)
        refused += race(teacher, dataset, output)
        different += everything(output) != expected
    figures = {"killed": killed, "finished": finished + 1, "different": different, "refused": refused}
    print(json.dumps({**figures, "whole": seconds, "last": last}))


if __name__ == "__main__":
    main(*sys.argv[1:])

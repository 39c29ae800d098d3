"""Campaigns of damaged and crafted input, each attempt made in a process that may die.

`run` starts a process that makes one attempt after the other and says so before each, so that a crash, a hang or an
allocation without bound is reported with the seed of the attempt that caused it. To repeat one:

    cd tests && python -m support.attacks published_arrow /tmp/somewhere 1234
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from distillkit.errors import DistillKitError

HANG_SECONDS = 60
"""No attempt takes more than a second; the rest is for a machine that is busy."""
START_SECONDS = 300
MOST_FAILURES = 20
ANSWER = "attack: "
MEMORY = 1 << 30
"""Address space that an attempt may take in addition to what the process had before."""
LONG = os.environ.get("DISTILLKIT_ATTACK") == "long"
"""Whether every seed of a campaign is tried, as `make attack` does, or a sample of them."""


class Campaign(Protocol):
    """Attempts by seed, on files in a folder of their own."""

    seeds: int
    """How many there are."""

    def attempt(self, seed: int) -> None:
        """Damage and read. Raises a DistillKitError or an OSError if it is noticed, AssertionError if data is wrong."""


@dataclass
class Outcome:
    """What came of a campaign's attempts."""

    tried: int = 0
    noticed: int = 0
    failures: list[str] = field(default_factory=list)


def sample(count: int, most: int) -> Sequence[int]:
    """Seeds of a campaign: all of them in a long run, otherwise at most `most`, always the same."""
    if LONG or count <= most:
        return range(count)
    return sorted(random.Random(count).sample(range(count), most))


def run(name: str, most: int) -> Outcome:
    """Make the attempts of a campaign, see `sample`."""
    outcome = Outcome()
    seeds: list[int] | None = None
    while seeds is None or seeds:
        with tempfile.TemporaryDirectory() as folder:
            seeds = _rest(name, Path(folder), most, seeds, outcome)
    return outcome


def _rest(name: str, folder: Path, most: int, seeds: list[int] | None, outcome: Outcome) -> list[int]:
    """Make attempts until all are made or the process dies; returns what is left."""
    with Attacker(name, folder) as attacker:
        count = attacker.answer(START_SECONDS)
        assert count, f"{name} does not start: see `python -m support.attacks {name} {folder}`"
        left = list(sample(count, most)) if seeds is None else seeds
        attacker.begin(left)
        while left and len(outcome.failures) < MOST_FAILURES:
            result = attacker.answer(HANG_SECONDS)
            seed = left.pop(0)
            outcome.tried += 1
            if result is None:
                outcome.failures.append(f"{name} {seed}: {attacker.end()}")
                return left
            outcome.noticed += result == "noticed"
            if result not in ("noticed", "harmless"):
                outcome.failures.append(f"{name} {seed}: {result}")
    return []


class Attacker:
    """A process that makes the attempts it is given, see `main`."""

    def __init__(self, name: str, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.attacks", name, str(folder)],
            cwd=Path(__file__).parent.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Warnings of what is passed over, thousands of them.
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> Attacker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._reader.join()
        self._process.communicate()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(ANSWER):
                self._lines.put(line[len(ANSWER) :])
        self._lines.put(None)

    def begin(self, seeds: Sequence[int]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(list(seeds)) + "\n")
        self._process.stdin.flush()

    def answer(self, seconds: float) -> Any:
        """What it says next; None if it has ended or says nothing in time."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return None
        return None if line is None else json.loads(line)

    def end(self) -> str:
        """How it died, or that it hangs."""
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "hangs"
        return f"dies of {signal.Signals(-status).name}" if status < 0 else f"exits with {status}"


def _attempt(campaign: Campaign, seed: int) -> str:
    try:
        campaign.attempt(seed)
    except (DistillKitError, OSError):
        return "noticed"
    except BaseException:  # noqa: BLE001 — everything else is a finding
        return traceback.format_exc(limit=-6)
    return "harmless"


def _say(value: Any) -> None:
    print(f"{ANSWER}{json.dumps(value)}", flush=True)


def main(name: str, folder: str, seeds: Iterable[int] | None) -> None:
    campaign: Campaign = importlib.import_module("support.campaigns").CAMPAIGNS[name](Path(folder))
    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, held + MEMORY))
    if seeds is None:
        _say(campaign.seeds)
        seeds = json.loads(sys.stdin.readline())
    for seed in seeds:
        _say(_attempt(campaign, seed))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], [int(seed) for seed in sys.argv[3:]] or None)

"""Runs a teacher for some seconds, to measure its speed and sample its distributions."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distillkit.capture.settings import CaptureSettings
from distillkit.capture.teachers.base import RowRequest, ScoredDocument
from distillkit.capture.teachers.hf import length_batches
from distillkit.types import SparseLogprobs, TokenDocument

__all__ = ["Trial", "try_teacher"]

_KEPT_POSITIONS = 20_000
"""Approximate number of positions whose distributions are kept: enough for a 99th percentile, well under 100 MB."""


@dataclass
class Trial:
    """The results of a short run.

    Attributes:
        tokens, seconds: tokens scored, and how long that took.
        scored: distributions of the first documents, numpy (R, k) each.
    """

    tokens: int = 0
    seconds: float = 0.0
    scored: list[SparseLogprobs] = field(default_factory=list)

    @property
    def positions(self) -> int:
        """Number of distributions kept."""
        return sum(len(rows.ids) for rows in self.scored)


def try_teacher(
    teacher: Any,
    documents: Sequence[TokenDocument],
    request: RowRequest,
    settings: CaptureSettings,
    seconds: float,
    progress: Callable[[float, float], None],
) -> Trial:
    """Score documents in random order until the time is up or all of them are scored.

    Args:
        teacher: a `Teacher` whose `score` is a generator.
        documents: at least one.
        request: what to keep of the teacher's distributions.
        settings: the capture's settings.
        seconds: approximate duration.
        progress: called with the seconds elapsed and `seconds`.

    Raises:
        CaptureError: the teacher cannot continue.
    """
    batches = deque(_batches(settings, documents))
    rate, trial = _warm_up(teacher, documents, batches[0][0], request), Trial()
    started = time.perf_counter()
    while batches and trial.seconds < seconds:
        batch, limit = batches.popleft(), seconds
        if settings.engine == "hf":
            # This engine yields a batch all at once, and a slow teacher's batch may take longer than the time left.
            count = _fitting(batch, rate * (seconds - trial.seconds))
            batches.extend([batch[count:]] if count < len(batch) else [])
            batch, limit = batch[:count], math.inf
        _score(teacher, batch, request, trial, started, limit)
        rate = trial.tokens / trial.seconds
        progress(min(trial.seconds, seconds), seconds)
    return trial


def _warm_up(teacher: Any, documents: Sequence[TokenDocument], typical: TokenDocument, request: RowRequest) -> float:
    """Let the teacher do its one-time setup on first documents; return its approximate tokens per second."""
    shortest = min(documents, key=lambda document: len(document.input_ids))
    seconds = 0.0
    for document in (shortest, typical):
        clock = time.perf_counter()
        for _ in teacher.score([document], request):
            pass
        seconds = time.perf_counter() - clock
    return len(typical.input_ids) / seconds


def _fitting(documents: Sequence[TokenDocument], tokens: float) -> int:
    """How many leading documents have at most `tokens` tokens together; at least one."""
    ends = np.cumsum([len(document.input_ids) for document in documents])
    return max(int((ends <= tokens).sum()), 1)


def _batches(settings: CaptureSettings, documents: Sequence[TokenDocument]) -> list[list[TokenDocument]]:
    """Batch documents as the engine takes them, in random order, so that any prefix is representative."""
    random = np.random.default_rng(settings.seed)
    if settings.engine != "hf":
        # These engines start on the next documents before the previous ones are done.
        return [[documents[index] for index in random.permutation(len(documents))]]
    # As in a capture: documents of similar length share a forward pass, with hardly any padding.
    batches = length_batches([len(document.input_ids) for document in documents], settings.hf.forward_tokens)
    return [[documents[index] for index in batches[number]] for number in random.permutation(len(batches))]


def _score(
    teacher: Any,
    documents: Sequence[TokenDocument],
    request: RowRequest,
    trial: Trial,
    started: float,
    seconds: float,
) -> None:
    """Score documents and add them to the trial until the time is up."""
    positions = trial.positions
    with closing(teacher.score(documents, request)) as results:
        for result in results:
            trial.tokens += len(documents[result.index].input_ids)
            trial.seconds = time.perf_counter() - started
            if isinstance(result, ScoredDocument) and positions < _KEPT_POSITIONS:
                trial.scored.append(result.rows)
                positions += len(result.rows.ids)
            if trial.seconds >= seconds:
                break

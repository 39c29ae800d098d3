"""A teacher run for some seconds, to see how fast it is and what its distributions are like."""

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
"""Positions whose distributions are kept, about: enough for a 99th percentile, in well under 100 MB."""


@dataclass
class Trial:
    """What a short run has shown.

    Attributes:
        tokens, seconds: scored, and how long that took.
        scored: distributions of the first documents, numpy (R, k) each.
    """

    tokens: int = 0
    seconds: float = 0.0
    scored: list[SparseLogprobs] = field(default_factory=list)

    @property
    def positions(self) -> int:
        """How many distributions there are."""
        return sum(len(rows.ids) for rows in self.scored)


def try_teacher(
    teacher: Any,
    documents: Sequence[TokenDocument],
    request: RowRequest,
    settings: CaptureSettings,
    seconds: float,
    progress: Callable[[float, float], None],
) -> Trial:
    """Score documents, in a random order, until the time is over or all are done.

    Args:
        teacher: a `Teacher` whose `score` is a generator.
        documents: at least one.
        request: what is asked for.
        settings: the capture's.
        seconds: how long, about.
        progress: told of the seconds that are over, and how many there will be.

    Raises:
        CaptureError: the teacher cannot go on.
    """
    batches = deque(_batches(settings, documents))
    rate, trial = _warm_up(teacher, documents, batches[0][0], request), Trial()
    started = time.perf_counter()
    while batches and trial.seconds < seconds:
        batch, limit = batches.popleft(), seconds
        if settings.engine == "hf":
            # It gives a batch at once: one of a slow teacher may take longer than there is time.
            count = _fitting(batch, rate * (seconds - trial.seconds))
            batches.extend([batch[count:]] if count < len(batch) else [])
            batch, limit = batch[:count], math.inf
        _score(teacher, batch, request, trial, started, limit)
        rate = trial.tokens / trial.seconds
        progress(min(trial.seconds, seconds), seconds)
    return trial


def _warm_up(teacher: Any, documents: Sequence[TokenDocument], typical: TokenDocument, request: RowRequest) -> float:
    """Let the teacher set up what it does at its first documents; return about how many tokens a second it does."""
    shortest = min(documents, key=lambda document: len(document.input_ids))
    seconds = 0.0
    for document in (shortest, typical):
        clock = time.perf_counter()
        for _ in teacher.score([document], request):
            pass
        seconds = time.perf_counter() - clock
    return len(typical.input_ids) / seconds


def _fitting(documents: Sequence[TokenDocument], tokens: float) -> int:
    """How many of them have about so many tokens; at least one."""
    ends = np.cumsum([len(document.input_ids) for document in documents])
    return max(int((ends <= tokens).sum()), 1)


def _batches(settings: CaptureSettings, documents: Sequence[TokenDocument]) -> list[list[TokenDocument]]:
    """Put documents in a random order, so that any part is like the whole, as the engine takes them."""
    random = np.random.default_rng(settings.seed)
    if settings.engine != "hf":
        # These take the next documents before the last ones are done.
        return [[documents[index] for index in random.permutation(len(documents))]]
    # As in a shard: documents of like length share a forward, with hardly any padding.
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
    """Score documents and add them to the trial until the time is over."""
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

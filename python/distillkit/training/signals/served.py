"""A served teacher's signal: the distributions that a server gives for the documents of a batch.

The teacher reads what the student reads: each packed document by itself, up to the last token that counts. The
documents of the next batches are asked about ahead, so that the server works while the student trains.

Shape legend: B batch, S sequence, N counted positions, L tokens of a document, k ids per row.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distillkit.capture.teachers.base import ScoredDocument
from distillkit.errors import CaptureError, ConfigError
from distillkit.losses.positions import Targets
from distillkit.training.data.examples import DocumentSource
from distillkit.training.signals.base import Asked, TeacherSignal, check_ids_fit
from distillkit.training.signals.server import TeacherServer, flush_all, naming
from distillkit.training.signals.stored import within
from distillkit.types import Document, SparseLogprobs

__all__ = ["ASKED", "ServedSignal", "asked_ahead"]

ASKED = "asked"
"""The entry of a batch with the questions that were sent ahead."""


@dataclass(frozen=True)
class Question:
    """What the teacher is asked about a document of a batch.

    Attributes:
        input_ids: (L,) the document up to the last token that counts.
        positions: (P,) the counted positions, ascending.
        number: the document's number in the source.
    """

    input_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    number: int


class ServedSignal(TeacherSignal):
    """Distributions from a served teacher.

    Args:
        server: the teacher.
        head_size: width of the student's head. Larger ids (padding of a wider teacher's head) count as missing mass.
        source: the documents, of which errors name the one that they are about; None if they have no source.
        key: what errors call the source.

    Raises:
        ConfigError: more ids per row are asked for than the student's head has.
    """

    def __init__(
        self, server: TeacherServer, head_size: int, source: DocumentSource | None = None, key: str = "the dataset"
    ) -> None:
        k = server.request.k
        if k > head_size:
            raise ConfigError(f"{server.key}.top_k: {k:,} ids were requested, but the student's head has {head_size:,}")
        self._server: TeacherServer | None = server
        self.head_size = head_size
        self._teacher_head_size = server.head_size
        self._teacher_head = f"the teacher's head ({server.key})"
        self._source = source
        self._key = key
        self._waited = 0.0

    def __getstate__(self) -> dict[str, Any]:
        # DataLoader workers that are not forked get a copy.
        return {**self.__dict__, "_server": None, "_source": None}

    @property
    def server(self) -> TeacherServer:
        """The teacher."""
        if self._server is None:
            raise RuntimeError("the teacher can only be asked in the training process")
        return self._server

    def take(self, document: Document, positions: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return nothing: the batch's token ids are enough.

        Raises:
            MismatchError: a token id is beyond the head of the student or the teacher.
        """
        check_ids_fit(document, self.head_size)
        check_ids_fit(document, self._teacher_head_size, self._teacher_head)
        return {}

    @property
    def servers(self) -> tuple[TeacherServer, ...]:
        """The server, in the training process."""
        return (self.server,)

    @property
    def waited(self) -> float:
        """Seconds that `targets` has waited for the teacher until now."""
        return self._waited

    def ask(self, batch: Mapping[str, Any]) -> Asked:
        """Ask about the documents of a batch: see `TeacherSignal.ask`."""
        asked = questions(batch)
        names = [f"{self._key}, document {question.number:,}" for question in asked]
        answers = self.server.ask([each.input_ids for each in asked], names)
        return {self.server.key: list(zip(asked, answers, strict=True))}

    def targets(self, batch: Mapping[str, Any], labels: torch.Tensor) -> Targets:
        """Return the server's answers for a batch, (N, k): see `TeacherSignal.targets`. Asks about a batch that was not
        asked about ahead.

        Raises:
            CaptureError: the server failed, or has no valid answer for a document, which is named.
            ConfigError: the server refuses access.
        """
        asked = (batch[ASKED] if ASKED in batch else self.ask(batch))[self.server.key]
        started = time.perf_counter()
        answers = [(question, self._result(question, answer)) for question, answer in asked]
        self._waited += time.perf_counter() - started
        k = self.server.request.k
        ids = [np.empty((0, k), np.int64)]
        logprobs = [np.empty((0, k), np.float32)]
        for question, answer in answers:
            ids.append(np.asarray(answer.rows.ids)[question.positions])
            logprobs.append(np.asarray(answer.rows.logprobs)[question.positions])
        pair = [torch.from_numpy(np.concatenate(parts)).to(labels.device) for parts in (ids, logprobs)]
        if self._teacher_head_size > self.head_size and len(labels):
            pair = list(within(pair[0], pair[1], self.head_size))
        return Targets(
            labels, SparseLogprobs(pair[0], pair[1]), label_logprobs=self._label_logprobs(answers, batch, labels)
        )

    def _label_logprobs(
        self, answers: Sequence[tuple[Question, ScoredDocument]], batch: Mapping[str, Any], labels: torch.Tensor
    ) -> torch.Tensor | None:
        if not self.server.request.label_logprobs:
            return None
        known = [np.asarray(answer.label_logprobs)[question.positions] for question, answer in answers]
        found = torch.from_numpy(np.concatenate([np.empty(0, np.float32), *known])).to(labels.device)
        # A label may differ from the token that the teacher was asked about (eos_label_token_ids).
        tokens = batch["input_ids"].flatten()[batch["rows"] + 1].to(labels.device)
        return found.masked_fill(tokens != labels, torch.nan)

    def _result(self, question: Question, answer: Future[ScoredDocument]) -> ScoredDocument:
        with naming(self.server.key):
            try:
                return answer.result()
            except CaptureError as error:
                # Other errors are not of this document.
                if self._source is None or not str(error).startswith(self._key):
                    raise
                document = self._source[question.number]
                raise CaptureError(
                    f"{str(error).rstrip('.')} ({document.place}, doc_id {document.doc_id}). Training needs an answer "
                    "for each of its documents: look at the server's log, or take this document out of the data"
                ) from error


def questions(batch: Mapping[str, Any]) -> list[Question]:
    """Return what the teacher is asked about a collated batch, in the order of its counted positions.

    Args:
        batch: `input_ids` and `position_ids` (B, S), `rows` (N,) and `places` (N, 2), as `Collator` returns them.
    """
    rows = batch["rows"].cpu().numpy()
    if not len(rows):
        return []
    tokens = batch["input_ids"].cpu().numpy().astype(np.int32).reshape(-1)
    # Where the document of each token begins: there its position is 0.
    first = batch["position_ids"].cpu().numpy().reshape(-1) == 0
    begins = np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))[rows]
    numbers = batch["places"][:, 0].cpu().numpy()
    bounds = [0, *(np.flatnonzero(np.diff(begins)) + 1).tolist(), len(rows)]
    return [
        # The row of the last counted position is over the token after it.
        Question(tokens[begins[start] : rows[stop - 1] + 2], rows[start:stop] - begins[start], int(numbers[start]))
        for start, stop in itertools.pairwise(bounds)
    ]


def asked_ahead(signal: TeacherSignal, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield batches in order. Where servers teach, each has what they were asked about it, and they are asked about the
    next ones.

    So many batches are read ahead that twice as many documents as requests run at a time are asked about besides those
    of the batch that is yielded: this bounds the answers that are in memory. A batch of which no server is asked counts
    as one document, which bounds the batches.
    """
    return _ahead(signal, batches) if signal.servers else batches


def _ahead(signal: TeacherSignal, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    most = 2 * sum(server.concurrency for server in signal.servers)
    read: deque[dict[str, Any]] = deque()
    ended, ahead = False, 0  # the documents of all batches but the first
    while True:
        while not ended and (not read or ahead < most):
            batch = next(batches, None)
            if batch is None:
                ended = True
                continue
            batch = {**batch, ASKED: signal.ask(batch)}
            ahead += _documents(batch) if read else 0
            read.append(batch)
        if not read:
            flush_all(signal.servers)
            return
        yield read.popleft()
        ahead -= _documents(read[0]) if read else 0


def _documents(batch: Mapping[str, Any]) -> int:
    """Return the number of questions that were asked about a batch, and 1 if there are none."""
    return max(1, sum(map(len, batch[ASKED].values())))

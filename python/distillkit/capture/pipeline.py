"""Teacher → encoder → shards: a thread encodes and writes distributions while the teacher computes the next ones.

The queue between them is bounded in bytes, which bounds memory however slow the disk is; an error on either side stops
both. A shard's bytes depend only on its own documents and the settings.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from distillkit.capture.kept_rows import ScoredOrRejected, read_rows
from distillkit.capture.progress import CaptureProgress
from distillkit.capture.shard_plan import ShardPlan, ShardReceipt
from distillkit.capture.summary import ShardSummary
from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument, Teacher
from distillkit.codec.fidelity import FidelityStats
from distillkit.errors import CaptureError, InputError
from distillkit.shards import Header
from distillkit.shards.manifest import shard_name
from distillkit.shards.prior import keep_prior
from distillkit.shards.storage import Folder
from distillkit.shards.writer import NewShard, encode_rows, make_document
from distillkit.types import Document, TokenDocument

__all__ = ["BYTES_A_VALUE", "StageTimes", "capture_shards", "queue_bytes", "too_many_left_out"]

logger = logging.getLogger(__name__)

_QUEUE_BYTES = 256_000_000
BYTES_A_VALUE = 12
"""Bytes per queued value: an int64 id and a float32 log-probability."""


@dataclass
class StageTimes:
    """Where a run's time went, in seconds.

    Attributes:
        tokens: number of tokens that the teacher scored (not a time).
        teacher: time waiting for the teacher.
        blocked: time the teacher waited for room in the queue.
        encode, write: time the encoder thread spent encoding and writing.
        learn: time spent on learning the prior, once its rows were there.
        wall: from the first document to the last shard.
    """

    tokens: int = 0
    teacher: float = 0.0
    blocked: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    learn: float = 0.0
    wall: float = 0.0

    def add(self, other: StageTimes) -> None:
        """Add the times of another run."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def capture_shards(
    teacher: Teacher,
    plan: ShardPlan,
    header: Header,
    numbers: Sequence[int],
    request: RowRequest,
    *,
    skip_bad: int = 0,
    progress: CaptureProgress | None = None,
) -> StageTimes:
    """Score and write some shards of a plan, adding a receipt for each completed shard.

    Args:
        teacher: scores the documents.
        plan: decides which documents are in which shard.
        header: header of the shards.
        numbers: which shards.
        request: what to keep of the teacher's distributions.
        skip_bad: how many documents may be skipped because their distributions cannot be computed or stored.
        progress: updated after each document.

    Raises:
        CaptureError: the teacher cannot continue, or more than `skip_bad` documents would be skipped.
        OSError: a shard cannot be written; earlier shards are kept.
    """
    times = StageTimes()
    started = time.perf_counter()
    with _Encoder(
        plan.folder, header, plan.kept, _room(plan, request.k), skip_bad, plan.write_receipt, times
    ) as encoder:
        for number in numbers:
            documents = plan.read(number)
            encoder.begin(number, documents)
            clock = time.perf_counter()
            for result in _results(teacher, plan, header, number, documents, request):
                given = time.perf_counter()
                times.teacher += given - clock
                encoder.put(result)
                tokens = len(documents[result.index].input_ids)
                times.tokens += tokens
                if progress is not None:
                    progress.scored(tokens, encoder.waiting, encoder.room)
                clock = time.perf_counter()
                times.blocked += clock - given
            encoder.end()
            if progress is not None:
                progress.finished_shard()
    times.wall = time.perf_counter() - started
    return times


def _results(
    teacher: Teacher,
    plan: ShardPlan,
    header: Header,
    number: int,
    documents: Sequence[TokenDocument],
    request: RowRequest,
) -> Iterator[ScoredOrRejected]:
    """The results of a shard's documents. Those that the prior was learned from are scored by themselves, so that they
    are the same whether they were kept or have to be scored again.

    Raises:
        MismatchError: the rows that were kept are of another teacher.
    """
    sampled = plan.sample.get(number, 0)
    if sampled:
        wide = replace(request, k=plan.sample_k)
        kept = read_rows(plan, number)
        if kept is not None:
            replace(header, codec=kept.header.codec).check_same(kept.header, where=str(plan.inside))
        yield from teacher.score(documents[:sampled], wide) if kept is None else kept.results
    if sampled < len(documents):
        for result in teacher.score(documents[sampled:], request):
            yield replace(result, index=result.index + sampled)


def too_many_left_out(reason: str, skip_bad: int) -> CaptureError:
    """The error for a document that cannot be stored when no more may be left out."""
    limit = f"more than {skip_bad} such documents" if skip_bad else "such documents, up to N"
    return CaptureError(f"{reason}. --skip-bad-documents N would leave out {limit}")


def queue_bytes(longest: int, k: int) -> int:
    """Maximum bytes of distributions waiting for the encoder, for documents of at most `longest` tokens."""
    return _queue_room(longest, k) * longest * k * BYTES_A_VALUE


def _queue_room(longest: float, k: int) -> int:
    """How many documents may wait: as many as have rows of at most `_QUEUE_BYTES` in total, but at least two."""
    return max(2, min(4096, int(_QUEUE_BYTES / (longest * k * BYTES_A_VALUE))))


def _room(plan: ShardPlan, k: int) -> int:
    mean = plan.tokens / max(plan.documents, 1)
    return _queue_room(max(int(plan.header.capture.get("max_seq_len", 0)), mean), k)


@dataclass
class _OpenShard:
    """A shard that is being written."""

    number: int
    documents: Sequence[TokenDocument]
    file: NewShard
    summary: ShardSummary = field(default_factory=ShardSummary)
    skipped: dict[int, tuple[str, str]] = field(default_factory=dict)
    # Documents waiting for those before them: encoded, or None if skipped.
    waiting: dict[int, tuple[Document, FidelityStats] | None] = field(default_factory=dict)
    written: int = 0


class _Encoder:
    """A thread that encodes results and writes them in the documents' order.

    Its errors are raised by the next call; leaving the `with` block on an error discards the open shard.
    """

    def __init__(
        self,
        folder: Folder,
        header: Header,
        kept: pa.Schema,
        room: int,
        skip_bad: int,
        done: Callable[[int, ShardReceipt], None],
        times: StageTimes,
    ) -> None:
        self.room = room
        self._folder, self._header, self._kept, self._done, self._times = folder, header, kept, done, times
        self._codec = header.make_codec(keep_prior(folder, header, None))
        self._skip_bad, self._skipped = skip_bad, 0
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=room)
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._open: _OpenShard | None = None
        self._thread = threading.Thread(target=self._run, name="distillkit-encoder", daemon=True)

    # -- the caller's side ---------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Number of results in the queue."""
        return self._queue.qsize()

    def begin(self, number: int, documents: Sequence[TokenDocument]) -> None:
        """Open a shard for these documents."""
        self._put(lambda: self._begin(number, documents))

    def put(self, result: ScoredDocument | RejectedDocument) -> None:
        """Queue a document's distributions; blocks while the queue is full."""
        self._put(lambda: self._take(result))

    def end(self) -> None:
        """Finish the shard once all of its documents are written."""
        self._put(self._end)

    def _put(self, step: Callable[[], None]) -> None:
        while True:
            if self._error is not None:
                raise self._error
            try:
                self._queue.put(step, timeout=0.1)
                return
            except queue.Full:
                continue

    def __enter__(self) -> _Encoder:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            while self._error is None and self._thread.is_alive():
                try:
                    self._queue.put(None, timeout=0.1)
                    break
                except queue.Full:
                    continue
        else:
            self._stopped.set()
        self._thread.join()
        if self._open is not None:
            self._open.file.abort()
        if kind is None and self._error is not None:
            raise self._error

    # -- the thread's side ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopped.is_set():
                try:
                    step = self._queue.get(timeout=0.1)
                except queue.Empty:
                    continue
                if step is None:
                    return
                step()
        except BaseException as error:  # noqa: BLE001 — raised again in the caller's thread
            self._error = error

    def _begin(self, number: int, documents: Sequence[TokenDocument]) -> None:
        name = shard_name(number)
        self._folder.remove_leftovers(lambda file: file == name)
        self._open = _OpenShard(number, documents, NewShard(self._folder, name, self._kept))

    def _take(self, result: ScoredDocument | RejectedDocument) -> None:
        shard = self._shard()
        source = shard.documents[result.index].source
        if result.index in shard.waiting or result.index < shard.written:
            raise CaptureError(f"{source}: the teacher returned its distributions twice")
        shard.waiting[result.index] = self._encoded(result)
        while shard.written in shard.waiting:
            ready = shard.waiting.pop(shard.written)
            if ready is not None:
                clock = time.perf_counter()
                shard.file.add(*ready, columns=shard.documents[shard.written].columns)
                self._times.write += time.perf_counter() - clock
            shard.written += 1

    def _encoded(self, result: ScoredDocument | RejectedDocument) -> tuple[Document, FidelityStats] | None:
        """Encode a document's rows; None if the document is skipped.

        Raises:
            CaptureError: the rows cannot be stored, and no more documents may be skipped.
        """
        shard = self._shard()
        document = shard.documents[result.index]
        if isinstance(result, RejectedDocument):
            self._skip(result.index, result.reason)
            return None
        clock = time.perf_counter()
        try:
            data, kept, stats = encode_rows(self._codec, result.rows)
            stored = make_document(
                document.input_ids,
                data,
                self._header,
                self._codec,
                loss_mask=document.loss_mask,
                label_logprobs=result.label_logprobs,
            )
        except InputError as error:
            reason = f"{document.source}: the teacher's output cannot be stored: {error}"
            self._skip(result.index, reason)
            return None
        shard.summary.add(stored, kept)
        self._times.encode += time.perf_counter() - clock
        return stored, stats

    def _skip(self, index: int, reason: str) -> None:
        if self._skipped == self._skip_bad:
            raise too_many_left_out(reason, self._skip_bad)
        shard = self._shard()
        shard.skipped[index] = (shard.documents[index].source, reason)
        self._skipped += 1
        logger.warning("left out: %s", reason)

    def _end(self) -> None:
        shard = self._shard()
        if shard.written != len(shard.documents):
            missing = shard.documents[shard.written].source
            raise CaptureError(f"{missing}: the teacher returned no distributions for this document")
        clock = time.perf_counter()
        header = replace(self._header, fidelity=shard.file.fidelity())
        info = shard.file.finish(header)
        self._open = None
        skipped = tuple(shard.skipped[index] for index in sorted(shard.skipped))
        self._done(shard.number, ShardReceipt(info, header, shard.summary, skipped))
        self._times.write += time.perf_counter() - clock

    def _shard(self) -> _OpenShard:
        if self._open is None:
            raise RuntimeError("no shard is open: `begin` must be called before `put` and `end`")
        return self._open

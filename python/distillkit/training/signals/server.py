"""A served teacher as training asks it: many token sequences at once, by a bounded number of threads, answers kept if a
cache is configured.

The engine is that of captures (`capture/teachers/openai.py`), with its validation, retries and bounds.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from distillkit.capture.engine_settings import OpenAISettings
from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument
from distillkit.capture.teachers.connection import Use
from distillkit.capture.teachers.openai import OpenAITeacher
from distillkit.errors import CaptureError, ConfigError, InputError
from distillkit.training.signals.cache import AnswerCache, cache_header
from distillkit.types import SparseLogprobs, TokenDocument

if TYPE_CHECKING:
    from distillkit.training.config.schema import RunConfig

__all__ = ["TeacherServer", "check_caches", "connect", "flush_all", "naming", "stop_all"]

logger = logging.getLogger(__name__)


def _use(key: str) -> Use:
    """Return how messages name the settings of the teacher with this key."""
    return Use(
        base_url=f"{key}.base_url",
        served_model=f"{key}.served_model",
        request_timeout=f"{key}.request_timeout",
        max_seq_len="sequence_length:",
        k=f"{key}.top_k",
        fewer="set it to at most",
        again="Once the server is back, run the same command with --set training_args.resume_from_checkpoint=true, "
        "which continues from the last checkpoint",
    )


class _Engine(Protocol):
    """What is needed of `OpenAITeacher`."""

    @property
    def head_size(self) -> int: ...

    @property
    def served_model(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    def score_one(self, index: int, document: TokenDocument, request: RowRequest) -> ScoredDocument | RejectedDocument:
        """Return one document's distributions; called in several threads at once."""


@dataclass
class _Asked:
    document: TokenDocument
    answer: Future[ScoredDocument]


class TeacherServer:
    """Asks a served teacher about token sequences.

    Requests are sent in the order in which they were asked for, at most `concurrency` at a time. Threads only exist
    while there is something to ask, and never keep the process from ending.

    Args:
        engine: the connection to the server; its `score_one` may be called in several threads.
        request: how many ids per row, and whether the next tokens' own log-probabilities are needed.
        concurrency: the most requests at a time.
        cache: keeps answers; None: nothing is kept.
        key: the teacher's key in the configuration.

    Example:
        Rows of sequences of token ids, all at once or as they come:

            rows = server.rows([[5, 7, 11], [5, 8]])  # SparseLogprobs of (2, k) and (1, k), numpy
            futures = server.ask([[5, 7, 11], [5, 8]])
            futures[1].result().rows
    """

    def __init__(
        self,
        engine: _Engine,
        request: RowRequest,
        *,
        concurrency: int,
        cache: AnswerCache | None = None,
        key: str = "teacher",
    ) -> None:
        self.key = key
        self.engine = engine
        self.request = request
        self.concurrency = concurrency
        self.cache = cache
        self._lock = Lock()
        self._waiting: deque[_Asked] = deque()
        self._threads = 0

    @property
    def head_size(self) -> int:
        """V, the width of the teacher's head: all ids are below it."""
        return self.engine.head_size

    @property
    def name(self) -> str:
        """The served model's name; of a path, its last part."""
        return str(self.engine.identity["name"])

    def ask(
        self, sequences: Sequence[Sequence[int] | npt.NDArray[Any]], names: Sequence[str] | None = None
    ) -> list[Future[ScoredDocument]]:
        """Ask for the teacher's distributions over the next tokens of sequences; does not wait for the server.

        Args:
            sequences: token ids, at least two each.
            names: what messages call them; by default "sequence 0", …

        Returns:
            A future for each, in order. Its result's `rows` are numpy (L − 1, k) for a sequence of L tokens: row t is
            the distribution after tokens 0 … t. It raises `CaptureError` if the server fails, or has no valid answer
            for this sequence, and `ConfigError` if it refuses access.

        Raises:
            InputError: a sequence has fewer than two tokens, so that there is nothing to predict.
        """
        asked = []
        for number, sequence in enumerate(sequences):
            name = f"sequence {number}" if names is None else names[number]
            if len(sequence) < 2:
                raise InputError(
                    f"{name}: {len(sequence)} tokens; a teacher predicts the next token from the second on"
                )
            asked.append(_Asked(TokenDocument(np.asarray(sequence, dtype=np.int32), name), Future()))
        new = [each for each in asked if not self._answered(each)]
        with self._lock:
            self._waiting.extend(new)
            starting = min(len(self._waiting), self.concurrency - self._threads)
            self._threads += starting
        for _ in range(starting):
            # A daemon, so that training that ends or is interrupted does not wait for the server.
            Thread(target=self._work, name="distillkit-request", daemon=True).start()
        return [each.answer for each in asked]

    def rows(self, sequences: Sequence[Sequence[int] | npt.NDArray[Any]]) -> list[SparseLogprobs]:
        """Return the teacher's distributions over the next tokens of sequences, once the server has answered.

        Returns:
            Of each sequence, numpy (L − 1, k); see `ask`.

        Raises:
            CaptureError, ConfigError, InputError: as for `ask` and its futures.
        """
        return [answer.result().rows for answer in self.ask(sequences)]

    def stop(self) -> None:
        """Cancel what was asked and not sent yet, and write what the cache holds. More can be asked afterwards."""
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
        for each in waiting:
            each.answer.cancel()
        self.flush()

    def flush(self) -> None:
        """Write what the cache holds, if there is one."""
        if self.cache is not None:
            self.cache.flush()

    def _answered(self, asked: _Asked) -> bool:
        """Answer from the cache, if it has the answer."""
        found = None if self.cache is None else self.cache.find(asked.document.input_ids)
        if found is not None:
            asked.answer.set_result(found)
        return found is not None

    def _work(self) -> None:
        """Send requests as long as any wait."""
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                asked = self._waiting.popleft()
            if not asked.answer.set_running_or_notify_cancel():
                continue
            try:
                result = self.engine.score_one(0, asked.document, self.request)
                if isinstance(result, ScoredDocument) and self.cache is not None:
                    self.cache.add(asked.document, result)
            except BaseException as error:  # noqa: BLE001 - raised where the answer is used
                self._give_up(asked, error)
                continue
            if isinstance(result, RejectedDocument):
                asked.answer.set_exception(CaptureError(result.reason))
            else:
                asked.answer.set_result(result)

    def _give_up(self, asked: _Asked, error: BaseException) -> None:
        """Fail with what was asked also what waits: the server has failed for all of it, after all retries."""
        with self._lock:
            waiting = list(self._waiting)
            self._waiting.clear()
        asked.answer.set_exception(error)
        for each in waiting:
            if each.answer.set_running_or_notify_cancel():
                each.answer.set_exception(error)


def stop_all(servers: Iterable[TeacherServer]) -> None:
    """Stop all servers, also if one cannot write its cache.

    Raises:
        OSError: the first cache that cannot be written; names its setting. Those of the others are its context.
        CorruptDataError: likewise, another process's shard is damaged.
    """
    # The callback that was added first is called last, so that its error is the one that is raised.
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.stop)


def flush_all(servers: Iterable[TeacherServer]) -> None:
    """Write what all caches hold, also if one cannot be written.

    Raises:
        OSError, CorruptDataError: as `stop_all`.
    """
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.flush)


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Name the teacher in errors of its server, unless they have the key of one of its settings already."""
    try:
        yield
    except (CaptureError, ConfigError) as error:
        if f"{key}." in str(error) or f"{key}:" in str(error):
            raise
        kind = CaptureError if isinstance(error, CaptureError) else ConfigError
        raise kind(f"{key}: {error}") from error


def connect(config: RunConfig, tokenizer: Any, key: str = "teacher") -> TeacherServer:
    """Connect to a served teacher of a configuration.

    The server is asked which models it serves, and for the log-probabilities of a tiny prompt.

    Args:
        config: a configuration with a served teacher.
        tokenizer: the student's tokenizer, which is also the teacher's (`check_teacher_tokenizer`).
        key: its key in `RunConfig.served_teachers`.

    Raises:
        ConfigError: the teacher's config cannot be loaded; or the server does not serve the model, returns fewer
            log-probabilities, or does not accept documents of `sequence_length` tokens.
        CaptureError: the server does not answer.
        CorruptDataError: the cache is damaged.
    """
    from distillkit.capture.teachers.hf import load_config

    teacher = config.served_teachers[key]
    try:
        found = load_config(teacher.model, trust_remote_code=config.trust_remote_code)
    except ConfigError as error:
        raise ConfigError(f"{config.source}: {key}.{error}") from error
    head_size = int(found.get_text_config().vocab_size)
    if teacher.top_k > head_size:
        raise ConfigError(
            f"{key}.top_k: {teacher.top_k:,} ids were requested, but the teacher's head has {head_size:,}"
        )
    settings = OpenAISettings(
        base_url=teacher.base_url,
        served_model=teacher.served_model,
        concurrency=teacher.concurrency,
        max_retries=teacher.max_retries,
        request_timeout=teacher.request_timeout,
    )
    with naming(key):
        engine = OpenAITeacher(
            settings,
            head_size=head_size,
            k=teacher.top_k,
            max_seq_len=config.sequence_length,
            use=_use(key),
            model=teacher.model,
        )
    request = RowRequest(teacher.top_k, label_logprobs=teacher.label_logprobs)
    cache = None
    if teacher.cache is not None:
        header = cache_header(engine.identity, request, head_size, tokenizer)
        cache = AnswerCache(Path(teacher.cache), header, key)
        logger.info("%s.cache: %s: %s documents are answered already", key, cache.folder, f"{len(cache):,}")
    logger.info(
        "%s: %s, served, top %s, %s requests at a time",
        key,
        engine.identity["name"],
        teacher.top_k,
        teacher.concurrency,
    )
    return TeacherServer(engine, request, concurrency=teacher.concurrency, cache=cache, key=key)


def check_caches(config: RunConfig, servers: Mapping[str, TeacherServer]) -> None:
    """Refuse two teachers whose answers would be kept in one folder, since that has neither a server's URL nor, of a
    model served by its path, more than the last part.

    Args:
        config: the configuration.
        servers: its served teachers, by their keys.

    Raises:
        ConfigError: names both.
    """
    seen: dict[Path, tuple[str, str]] = {}
    for key, server in servers.items():
        if server.cache is None:
            continue
        model = f"{server.engine.served_model!r} at {config.served_teachers[key].base_url.rstrip('/')}"
        first, other = seen.setdefault(server.cache.folder.resolve(), (key, model))
        if model != other:
            raise ConfigError(
                f"{key}.cache: {model}, and {other} ({first}) would keep their answers in one folder, "
                f"{server.cache.folder}; give each a cache of its own"
            )

"""A running server as the teacher: any OpenAI-compatible completions API that returns prompt log-probabilities."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np

from distillkit.capture.engine_settings import OpenAISettings
from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument
from distillkit.capture.teachers.connection import MALFORMED, ServerConnection, Use
from distillkit.capture.teachers.ranked import RankedEntries, check_request, scored_document
from distillkit.errors import CaptureError, ConfigError
from distillkit.types import TokenDocument

__all__ = ["CAPTURE", "OpenAITeacher", "echoed_entries", "prompt_entries"]

# With return_tokens_as_token_ids, servers write a token as "token_id:17".
_TOKEN_ID = "token_id:"
_CAP = re.compile(r"(?:max(?:imum)?(?: allowed)?|at most|up to)\D{0,20}?(\d+)", re.IGNORECASE)
_PROBE = 3
# Bad request, too large, unprocessable; and internal errors, which a single document can cause on every attempt.
_DOCUMENT_ERRORS = (400, 413, 422, 500)
# JSON takes up to 100 bytes for an id with its log-probability, rank and text.
_BYTES_PER_ENTRY = 256
_OTHER_BYTES = 4 << 20

CAPTURE = Use(
    base_url="--base-url",
    served_model="--served-model",
    request_timeout="--request-timeout",
    max_seq_len="--max-seq-len",
    k="the codec",
    fewer="choose a codec with k ≤",
    again="Run the capture again once the server is back: it resumes after the last complete shard",
)


class OpenAITeacher(ServerConnection):
    """A served model that returns the log-probabilities of prompts given as token ids.

    Args:
        settings: the engine's settings; `base_url` must be set.
        head_size: V, from the model's config, since servers do not report it.
        k: maximum number of ids per row that will be requested; checked at once with a small probe.
        max_seq_len: length of the longest document, in tokens.
        use: how messages name the settings.
        model: the teacher's own name, by which it is served unless `served_model` is set; by default the only model.

    Raises:
        ConfigError: the package is not installed; or the server does not serve the model, returns fewer
            log-probabilities, or does not accept documents of that length.
        CaptureError: the server does not answer.
    """

    def __init__(
        self,
        settings: OpenAISettings,
        *,
        head_size: int,
        k: int,
        max_seq_len: int,
        use: Use = CAPTURE,
        model: str | None = None,
    ) -> None:
        super().__init__(settings, _OTHER_BYTES + (max_seq_len + 1) * (k + 1) * _BYTES_PER_ENTRY, use)
        self._head_size = head_size
        self._k = k
        self._concurrency = settings.concurrency
        self._model = self._find_model(settings.served_model, model, max_seq_len)
        self._echoes = self._probe()
        self._answered = True

    @property
    def head_size(self) -> int:
        """V."""
        return self._head_size

    @property
    def served_model(self) -> str:
        """The server's whole name for the model, which requests have."""
        return self._model

    @property
    def identity(self) -> dict[str, Any]:
        """The served model's name; servers report neither revision nor dtype."""
        name = Path(self._model).name if self._model.startswith(("/", ".", "~")) else self._model
        return {"name": name, "revision": None, "engine": "openai"}

    def score(
        self, documents: Sequence[TokenDocument], request: RowRequest
    ) -> Iterator[ScoredDocument | RejectedDocument]:
        """Yield every document's distributions as the server answers; see `Teacher.score`."""
        check_request(request, self._k, "a server", "the server was set up for")
        waiting = iter(enumerate(documents))
        results: SimpleQueue[ScoredDocument | RejectedDocument | BaseException] = SimpleQueue()

        def score_one(index: int, document: TokenDocument) -> None:
            try:
                results.put(self.score_one(index, document, request))
            except BaseException as error:  # noqa: BLE001 - raised below, in the thread that waits
                results.put(error)

        running = 0
        while True:
            # Bounds memory: at most `concurrency` requests are running or have answers that are not yet yielded.
            while running < self._concurrency and (item := next(waiting, None)) is not None:
                # A daemon, so that an interrupted capture does not wait for the server before it ends.
                Thread(target=score_one, args=item, name="distillkit-request", daemon=True).start()
                running += 1
            if not running:
                return
            result = results.get()
            running -= 1
            if isinstance(result, BaseException):
                raise result
            yield result

    def score_one(self, index: int, document: TokenDocument, request: RowRequest) -> ScoredDocument | RejectedDocument:
        """Return one document's distributions; may be called in several threads at once.

        Raises:
            CaptureError, ConfigError: the server fails, or refuses access, whatever the document.
        """
        prompt = document.input_ids.tolist()
        try:
            choice = self._complete(prompt, request.k, echo=self._echoes, last_row=request.last_row)
        except self._errors.APIError as error:
            if getattr(error, "status_code", None) in _DOCUMENT_ERRORS:
                return RejectedDocument(
                    index, f"{document.source}: the server rejected this document: {self._message(error)}"
                )
            raise self._failed(error) from error
        generated = None
        try:
            entries = echoed_entries(choice, len(prompt)) if self._echoes else prompt_entries(choice)
            if request.last_row:
                last, generated = _last_entries(choice, request.k)
                entries = entries.then(last)
        except MALFORMED as error:
            reason = f"unexpected answer from the server: {self._quoted(repr(error))}"
            return RejectedDocument(index, f"{document.source}: {reason}")
        return scored_document(index, document, entries, request, self._head_size, generated=generated)

    def _complete(self, prompt: list[int], k: int, *, echo: bool, last_row: bool = False) -> Mapping[str, Any]:
        """Request a prompt's log-probabilities; return the only choice of the answer, as JSON.

        Raises:
            openai.APIError: the server rejects the request, or still fails after all retries.
            CaptureError: the answer is not a completion.
        """
        extra: dict[str, Any] = {} if echo else {"prompt_logprobs": k}
        arguments: dict[str, Any] = {}
        if echo or last_row:
            extra["return_tokens_as_token_ids"] = True
            arguments["logprobs"] = k
        # The raw answer, because the client's classes would create an object for each value.
        response = self._client.completions.with_raw_response.create(
            model=self._model, prompt=prompt, max_tokens=1, temperature=0.0, echo=echo, extra_body=extra, **arguments
        )
        try:
            choice: Mapping[str, Any] = self._parse(response.http_response.content)["choices"][0]
            return choice
        except MALFORMED as error:
            raise CaptureError(
                f"{self._server} did not answer with completions: {self._quoted(repr(error))}"
            ) from error

    def _probe(self) -> bool:
        """Request k log-probabilities of a tiny prompt, and return whether the server needs `echo` for them.

        Raises:
            ConfigError: the server returns fewer, or none.
        """
        prompt = list(range(1, 1 + _PROBE))
        try:
            choice = self._complete(prompt, self._k, echo=False)
            if choice.get("prompt_logprobs"):
                return False
            choice = self._complete(prompt, self._k, echo=True)
            echoed_entries(choice, _PROBE)
        except self._errors.APIError as error:
            if not isinstance(error, self._errors.BadRequestError):
                raise self._failed(error) from error
            message = self._message(error)
            cap = _CAP.search(message)
            if cap is None:
                raise ConfigError(
                    f"{self._server} refuses {self._k} log-probabilities per position: {message}"
                ) from error
            raise ConfigError(
                f"{self._server} returns at most {cap[1]} log-probabilities per position, but {self._use.k} needs "
                f"{self._k}: start it with --max-logprobs {self._k}, or {self._use.fewer} {cap[1]}. Its answer: "
                f"{message}"
            ) from error
        except MALFORMED as error:
            raise ConfigError(
                f"{self._server} returns no log-probabilities of a prompt with token ids, neither for "
                "prompt_logprobs (as vLLM does) nor for echo with logprobs, so it cannot be a teacher"
            ) from error
        return True


def prompt_entries(choice: Mapping[str, Any]) -> RankedEntries:
    """Read `prompt_logprobs`: for each position, null or a mapping from ids to log-probability and rank."""
    positions = choice["prompt_logprobs"][1:]
    ids: list[int] = []
    logprobs: list[float] = []
    ranks: list[int] = []
    for position in positions:
        for token, entry in (position or {}).items():
            ids.append(_number(token))
            logprobs.append(entry["logprob"])
            ranks.append(entry["rank"])
    return _entries(ids, logprobs, ranks, [len(position or {}) for position in positions])


def echoed_entries(choice: Mapping[str, Any], prompt_tokens: int) -> RankedEntries:
    """Read the log-probabilities of an echoed prompt whose tokens are written as ids.

    Each position has the k most probable tokens, and the prompt's own token as one more if it is not among them.

    Raises:
        ValueError: tokens are written as text, so their ids are unknown.
    """
    positions = choice["logprobs"]["top_logprobs"][1:prompt_tokens]
    tokens = choice["logprobs"]["tokens"][1:prompt_tokens]
    ids: list[int] = []
    logprobs: list[float] = []
    ranks: list[int] = []
    for token, position in zip(tokens, positions, strict=True):
        least = min(position.values()) if position else 0.0
        for name, logprob in (position or {}).items():
            ids.append(_id_of(name))
            logprobs.append(logprob)
            # Servers do not return ranks here. All that matters is whether the own token is among the k, or the extra.
            ranks.append(len(position) if name == token and logprob <= least else 1)
    return _entries(ids, logprobs, ranks, [len(position or {}) for position in positions])


def _last_entries(choice: Mapping[str, Any], k: int) -> tuple[RankedEntries, int]:
    """Read the distribution after the last token, and the generated token, which is the most probable one."""
    tokens, positions = choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"]
    position, generated = positions[-1], _id_of(tokens[-1])
    ids = [_id_of(name) for name in position]
    ranks = [1] * len(ids)
    return _entries(ids, list(position.values()), ranks, [len(ids)]), generated


def _id_of(token: str) -> int:
    if not token.startswith(_TOKEN_ID):
        raise ValueError(f"the token {token[:50]!r} is written as text, not as {_TOKEN_ID}…")
    return _number(token.removeprefix(_TOKEN_ID))


def _number(text: str) -> int:
    # Python's own conversion also takes signs, spaces, underscores and the digits of other scripts.
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text[:50]!r} is not a token id")
    return int(text)


def _entries(ids: list[int], logprobs: list[Any], ranks: list[Any], counts: list[int]) -> RankedEntries:
    # NumPy would read numbers in text, and null as NaN.
    wrong = {type(value) for value in logprobs} - {int, float} or {type(value) for value in ranks} - {int}
    if wrong:
        names = ", ".join(sorted(each.__name__ for each in wrong))
        raise TypeError(f"log-probabilities and ranks must be numbers, found {names}")
    # What is too large for float32 becomes infinite, and is refused as such.
    with np.errstate(over="ignore"):
        values = np.array(logprobs, dtype=np.float32)
    return RankedEntries(
        np.array(ids, dtype=np.int64), values, np.array(ranks, dtype=np.int64), np.array(counts, dtype=np.int64)
    )

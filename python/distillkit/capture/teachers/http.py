"""An HTTP client for servers that are not trusted: every answer is bounded in time and bytes, and stays on its host."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any

import openai

from distillkit.console import human_bytes
from distillkit.errors import CaptureError

__all__ = ["BoundedClient"]

# What the retries of the OpenAI client depend on. Everything else in a header is up to the server.
_KEPT_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry")
_REDIRECTS = 3


class BoundedClient(openai.DefaultHttpxClient):  # type: ignore[misc]
    """The HTTP client of the OpenAI package, with bounds on every answer.

    Redirects are only followed to the same scheme, host and port, and with the same method: prompts, and the key, go
    nowhere else.

    Args:
        seconds: how long an answer may take, from connecting to its last byte.
        largest: how many bytes an answer may have once it is decompressed.
    """

    def __init__(self, seconds: float, largest: int) -> None:
        super().__init__(timeout=seconds)
        self._seconds = seconds
        self._largest = largest

    def send(self, request: Any, *, stream: bool = False, follow_redirects: Any = None, **options: Any) -> Any:
        """Send a request and read the whole answer, as the OpenAI client asks for each attempt.

        Raises:
            CaptureError: the answer is larger than allowed, or compressed in a way that was not asked for.
            httpx.TimeoutException: it is not complete in time.
        """
        answers: SimpleQueue[Any] = SimpleQueue()
        given_up = Event()

        def ask() -> None:
            try:
                answers.put((self._ask(request, given_up, options), None))
            except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
                answers.put((None, error))

        # The limits of HTTP clients are for each read, which a byte now and then satisfies. The thread of an answer
        # that was given up on ends with its next part, or with the process.
        Thread(target=ask, name="distillkit-answer", daemon=True).start()
        try:
            answer, error = answers.get(timeout=self._seconds)
        except Empty:
            given_up.set()
            # The package of the HTTP client depends on the version of the OpenAI package.
            package = importlib.import_module(type(request).__module__.partition(".")[0])
            raise package.ReadTimeout("the answer is not complete", request=request) from None
        if error is not None:
            raise error
        return answer

    def _ask(self, request: Any, given_up: Event, options: dict[str, Any]) -> Any:
        request.headers["Accept-Encoding"] = "gzip"
        for left in reversed(range(_REDIRECTS + 1)):
            answer = super().send(request, stream=True, follow_redirects=False, **options)
            following = answer.next_request
            if not left or following is None or not _stays(request, following):
                break
            answer.close()
            request = following
        try:
            content = b"".join(self._parts(answer, given_up))
        finally:
            answer.close()
        headers = {name: answer.headers[name] for name in _KEPT_HEADERS if name in answer.headers}
        if answer.is_redirect:
            headers["location"] = answer.headers["location"]
        return type(answer)(answer.status_code, headers=headers, content=content, request=request)

    def _parts(self, answer: Any, given_up: Event) -> Iterator[bytes]:
        """Yield the decompressed content, none of it beyond the limit."""
        encoding = answer.headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "gzip"):
            raise CaptureError(f"{answer.url.host} compresses answers with {encoding[:50]}, which was not asked for")
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16) if encoding == "gzip" else None
        left = self._largest
        for part in answer.iter_raw(1 << 16):
            if given_up.is_set():
                return
            try:
                content = part if unpacker is None else unpacker.decompress(part, left + 1)
            except zlib.error as error:
                raise CaptureError(f"{answer.url.host} sent an answer that is not gzip, as it says: {error}") from error
            left -= len(content)
            if left < 0:
                raise CaptureError(
                    f"{answer.url.host} sent more than {human_bytes(self._largest)} as one answer, which is more than "
                    "the log-probabilities that were asked for can take"
                )
            yield content


def _stays(request: Any, following: Any) -> bool:
    """Whether a redirect repeats the request at the same server."""
    before, after = request.url, following.url
    same = (before.scheme, before.host, before.port) == (after.scheme, after.host, after.port)
    return same and bool(request.method == following.method)

"""The connection to an OpenAI-compatible server: its key, bounds and retries, the model it serves, and what its errors
mean."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from distillkit.configuration.secrets import redacted
from distillkit.errors import CaptureError, ConfigError, printable

__all__ = ["MALFORMED", "ServerConnection", "ServerSettings", "Use"]

MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What reading an answer raises if it has another form than expected."""

_KEY_VARIABLES = ("DISTILLKIT_API_KEY", "OPENAI_API_KEY")
_LONGEST_QUOTE = 500


@dataclass(frozen=True)
class Use:
    """What a server is asked for, in the words of its user: how messages name the settings, and how to go on.

    Attributes:
        base_url, served_model, request_timeout, max_seq_len: the settings; the last limits the tokens of a document.
        k: what needs that many log-probabilities of each position.
        fewer: how to need fewer, before the number.
        again: what to do once a server that failed is back.
    """

    base_url: str
    served_model: str
    request_timeout: str
    max_seq_len: str
    k: str
    fewer: str
    again: str


class ServerSettings(Protocol):
    """What is needed of an engine's settings."""

    @property
    def base_url(self) -> str | None: ...

    @property
    def max_retries(self) -> int: ...

    @property
    def request_timeout(self) -> float: ...


class ServerConnection:
    """A running server, with a client that retries and whose answers are bounded.

    The key comes from the environment: `DISTILLKIT_API_KEY` or `OPENAI_API_KEY`.

    Args:
        settings: where the server is, and how long to wait for it; `base_url` must be set.
        largest: how many bytes an answer may have.
        use: how messages name the settings.

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self, settings: ServerSettings, largest: int, use: Use) -> None:
        try:
            import jiter
            import openai

            from distillkit.capture.teachers.http import BoundedClient
        except ImportError as error:
            raise ConfigError("engine: openai is not installed: pip install 'distillkit[openai]'") from error
        url = urlsplit(settings.base_url or "")
        key = next((os.environ[name] for name in _KEY_VARIABLES if os.environ.get(name)), None)
        password = unquote(url.password or "")
        # Basic access sends the last one.
        found = (key, url.password, password, f"{unquote(url.username or '')}:{password}" if password else None)
        self._secrets = [text for text in found if text]
        # The client retries after 429, 5xx, timeouts and connection errors.
        self._client = openai.OpenAI(
            base_url=settings.base_url,
            api_key=key or "none",
            max_retries=settings.max_retries,
            timeout=settings.request_timeout,
            http_client=BoundedClient(settings.request_timeout, largest),
        )
        # Its connections are kept open between requests.
        weakref.finalize(self, self._client.close)
        self._errors = openai
        # The package's own parser takes half the time of Python's, during which no other thread runs.
        self._parse = jiter.from_json
        # Without the user and password that a URL may contain.
        self._server = url.netloc.rpartition("@")[2]
        self._timeout = settings.request_timeout
        self._use = use
        # Until it has, what fails is to start it.
        self._answered = False

    def _find_model(self, name: str | None, own_name: str | None, max_seq_len: int) -> str:
        """Find the served model, and check its context length if the server reports it."""
        use = self._use
        try:
            served = self._served_models()
        except self._errors.NotFoundError as error:
            if name is None:
                raise ConfigError(
                    f"{self._server} does not report which models it serves ({self._message(error)}): set "
                    f"{use.served_model}, and check that {use.base_url} ends in /v1"
                ) from error
            return name
        except self._errors.APIError as error:
            raise self._failed(error) from error
        names = self._quoted(", ".join(served) or "nothing")
        if name is None and own_name in served:
            name = own_name
        if name is None and len(served) != 1:
            raise ConfigError(f"{self._server} serves {names}: set {use.served_model}")
        name = name or next(iter(served))
        if name not in served:
            raise ConfigError(f"{use.served_model}: {self._server} serves {names}, not {name!r}")
        longest = served[name].get("max_model_len")
        if isinstance(longest, int) and longest < max_seq_len + 1:
            raise ConfigError(
                f"documents of {max_seq_len} tokens and the one that must be generated exceed the {longest} that "
                f"{self._server} accepts: use {use.max_seq_len} {longest - 1}, or start the server with "
                f"--max-model-len {max_seq_len + 1}"
            )
        return name

    def _served_models(self) -> dict[str, Mapping[str, Any]]:
        """Return the server's description of each model it serves, by name.

        Raises:
            openai.APIError: the server rejects the request, or still fails after all retries.
            ConfigError: the answer is no list of models.
        """
        content = self._client.models.with_raw_response.list().http_response.content
        try:
            served = {model["id"]: model for model in self._parse(content)["data"]}
            unusable = [name for name in served if not isinstance(name, str) or self._quoted(name) != name]
            if unusable:
                raise ValueError(f"{unusable[0]!r} is not the name of a model")
        except MALFORMED as error:
            raise ConfigError(
                f"{self._server} did not answer with a list of models ({self._quoted(repr(error))}): check that "
                f"{self._use.base_url} is the URL of an OpenAI-compatible API, which ends in /v1"
            ) from error
        return served

    def _failed(self, error: Any) -> CaptureError | ConfigError:
        """Turn an error that persists after all retries into one that says what to do."""
        if isinstance(error.__cause__, CaptureError):
            return error.__cause__
        if isinstance(error, (self._errors.AuthenticationError, self._errors.PermissionDeniedError)):
            return ConfigError(
                f"{self._server} refuses access: {self._message(error)}. The key is read from the environment: "
                f"{' or '.join(_KEY_VARIABLES)}"
            )
        if 300 <= getattr(error, "status_code", 0) < 400:
            target = self._quoted(error.response.headers.get("location", "an unknown place"))
            return ConfigError(
                f"{self._use.base_url}: {self._server} redirects to {target}, which is not followed: prompts and key "
                "only go to the server that was given. Pass the URL of the API itself"
            )
        again = self._use.again if self._answered else f"Start the server first, or correct {self._use.base_url}"
        return CaptureError(
            f"{self._server} failed even after {self._client.max_retries} retries: "
            f"{self._message(error).rstrip('.')}. {again}"
        )

    def _message(self, error: Any) -> str:
        """The server's error message, or why there is no answer."""
        if isinstance(error, self._errors.APITimeoutError):
            return f"no complete answer within {self._timeout:g} s ({self._use.request_timeout})"
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, Mapping) else None
        cause = f" {error.__cause__}" if isinstance(error, self._errors.APIConnectionError) else ""
        return self._quoted(f"{said or error}{cause}").rstrip(".")

    def _quoted(self, text: str) -> str:
        """Quote what a server wrote: on one line, of limited length, without secrets."""
        # A server can send megabytes.
        words = " ".join(text[: 20 * _LONGEST_QUOTE].split())
        quoted = printable(redacted(words, *self._secrets))
        return quoted if len(quoted) <= _LONGEST_QUOTE else f"{quoted[:_LONGEST_QUOTE]}…"

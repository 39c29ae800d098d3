"""An HTTP server that answers with whatever bytes a test gives it, at whatever pace."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

# What the path, the body and the headers of a request are answered with, as it goes over the wire.
Answer = Callable[[str, dict[str, Any], dict[str, str]], Iterator[bytes]]

MODELS = json.dumps({"object": "list", "data": [{"id": "tiny", "object": "model"}]}).encode()


def plain(content: bytes, status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer with a length; underscores in the names of headers are dashes."""
    given = {"Content-Type": "application/json", "Content-Length": str(len(content)), "Connection": "close"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + content


def slowly(content: bytes, seconds: float = 0.05) -> Iterator[bytes]:
    """A byte now and then, of which none is late."""
    for byte in content:
        yield bytes([byte])
        time.sleep(seconds)


@contextmanager
def hostile_server(answer: Answer) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A running server: its URL, and what it was asked, with path, body, headers and the bytes it could send."""
    asked: list[dict[str, Any]] = []
    ended = Event()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers["Content-Length"] or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            request: dict[str, Any] = {"path": self.path, "body": body, "headers": dict(self.headers), "sent": 0}
            asked.append(request)
            self.close_connection = True
            try:
                for part in answer(self.path, body, dict(self.headers)):
                    if ended.is_set():
                        return
                    self.wfile.write(part)
                    self.wfile.flush()
                    request["sent"] += len(part)
            except OSError:
                request["cut"] = True

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, *arguments: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    running.daemon_threads = True
    thread = Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", asked
    finally:
        ended.set()
        running.shutdown()
        thread.join()
        running.socket.close()

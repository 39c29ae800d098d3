"""A server on loopback that answers as vLLM's does, from whatever a test gives it or from a small teacher."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import numpy as np
import torch

Reply = tuple[int, dict[str, Any]]


@contextmanager
def server(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server with one model: its URL, and the requests for completions, with their headers."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": 65}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({**body, "key": self.headers["Authorization"]})
            self._send(*reply(body))

        def _send(self, status: int, body: dict[str, Any]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            if status >= 500:
                self.send_header("Retry-After-Ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=running.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_port}/v1", requests
    finally:
        running.shutdown()
        running.server_close()
        thread.join()


def ok(choice: dict[str, Any]) -> Reply:
    return 200, {"id": "1", "object": "text_completion", "model": "tiny", "created": 0, "choices": [choice]}


def answers_of(model: Any) -> Callable[[dict[str, Any]], Reply]:
    """The prompt log-probabilities of a teacher."""
    one_at_a_time = Lock()

    def reply(body: dict[str, Any]) -> Reply:
        ids = body["prompt"]
        with one_at_a_time, torch.no_grad():
            dense = model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1).numpy()
        positions: list[Any] = [None]
        for token, row in zip(ids[1:], dense, strict=False):
            best = np.argsort(-row, kind="stable")[: body["prompt_logprobs"]].tolist()
            order = [token, *(i for i in best if i != token)]
            positions.append({str(i): {"logprob": float(row[i]), "rank": int((row >= row[i]).sum())} for i in order})
        return ok({"text": "", "prompt_logprobs": positions, "logprobs": None})

    return reply


def answering(model: Any) -> AbstractContextManager[tuple[str, list[dict[str, Any]]]]:
    """A server of a teacher: its URL, and what it was asked."""
    return server(answers_of(model))

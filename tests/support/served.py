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
from safetensors.torch import load_file

Reply = tuple[int, dict[str, Any]]


MODELS: Reply = (200, {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": 65}]})


@contextmanager
def server(reply: Callable[[dict[str, Any]], Reply]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server with one model: its URL, and the requests for completions, with their headers."""
    with serving(lambda path, body: MODELS if body is None else reply(body)) as (url, requests):
        yield url, requests


@contextmanager
def serving(answer: Callable[[str, Any], Reply]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An HTTP server: its URL, and what it was sent, with the headers. It answers by path and body (None: GET)."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*answer(self.path, None))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append({**body, "path": self.path, "key": self.headers["Authorization"]})
            self._send(*answer(self.path, body))

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

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # connections of several processes at once; more would be reset

    running = Server(("127.0.0.1", 0), Handler)
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


class Writer:
    """A server that continues prompts with the weights that it was told to load, as vLLM's or SGLang's does.

    Args:
        model: whose weights are replaced.
        kind: vllm or sglang.
    """

    def __init__(self, model: Any, kind: str = "vllm") -> None:
        self.model = model.eval()
        self.kind = kind
        self.loaded = 0
        self._lock = Lock()

    def __call__(self, path: str, body: Any) -> Reply:
        loads = {"vllm": "/collective_rpc", "sglang": "/update_weights_from_disk"}[self.kind]
        if path == "/v1/models":
            return MODELS
        if body is None:
            return (405 if path == loads else 404), {"detail": "no"}
        if path == loads:
            if self.kind == "vllm":
                assert body["method"] == "reload_weights"
                return self.load(body["kwargs"]["weights_path"])
            assert body["flush_cache"] is True
            return self.load(body["model_path"])
        if path == "/reset_prefix_cache":
            return 200, {"success": self.loaded > 0}
        return self.vllm(body) if self.kind == "vllm" else self.sglang(body)

    def load(self, folder: str) -> Reply:
        missing, unexpected = self.model.load_state_dict(load_file(f"{folder}/model.safetensors"), strict=False)
        assert not unexpected
        assert missing in ([], ["lm_head.weight"])
        self.loaded += 1
        return 200, {"results": [None]} if self.kind == "vllm" else {"success": True, "message": "loaded"}

    def vllm(self, body: dict[str, Any]) -> Reply:
        assert body["return_token_ids"] is True
        ids, logprobs = self.written(body["prompt"], body, body["max_tokens"])
        return ok({"text": "", "token_ids": ids, "logprobs": {"token_logprobs": logprobs}})

    def sglang(self, body: dict[str, Any]) -> Reply:
        sampling = body["sampling_params"]
        assert body["return_logprob"] is True
        assert sampling["sampling_seed"] >= 0
        ids, logprobs = self.written(body["input_ids"], sampling, sampling["max_new_tokens"])
        entries = [[logprob, token, None] for token, logprob in zip(ids, logprobs, strict=True)]
        return 200, {"text": "", "output_ids": ids, "meta_info": {"output_token_logprobs": entries}}

    @torch.no_grad()
    def written(self, prompt: list[int], settings: dict[str, Any], longest: int) -> tuple[list[int], list[float]]:
        """The most probable tokens, one at a time."""
        wanted = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        assert {name: settings[name] for name in wanted} == wanted
        assert settings["ignore_eos"] is True
        ids, logprobs = list(prompt), []
        with self._lock:
            while len(logprobs) < longest and (not logprobs or ids[-1] not in settings["stop_token_ids"]):
                row = self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
                ids.append(int(row.argmax()))
                logprobs.append(float(row.max()))
        return ids[len(prompt) :], logprobs

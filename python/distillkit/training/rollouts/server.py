"""A running server that writes the completions: vLLM's or SGLang's. The student's weights are written to a folder that
the server sees, too, and the server is told to load them before each round."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from distillkit.capture.teachers.connection import MALFORMED, ServerConnection, Use
from distillkit.errors import CaptureError, ConfigError
from distillkit.models.head import lm_head_of
from distillkit.training.config.schema import RolloutServerConfig
from distillkit.training.rollouts.engine import Progress, Prompt, Sampling, Student
from distillkit.training.rollouts.weights import PROBE_TOKENS, check_weights, write_folder, write_weights

__all__ = ["ServerEngine"]

_USE = Use(
    base_url="rollouts.server.base_url",
    served_model="rollouts.server.served_model",
    request_timeout="rollouts.server.request_timeout",
    max_seq_len="sequence_length:",
    k="rollouts",
    fewer="set it to at most",
    again="Once the server is back, run the same command with --set training_args.resume_from_checkpoint=true, which "
    "continues from the last checkpoint",
)
# JSON takes up to 100 bytes for a token with its log-probability and text.
_BYTES_PER_TOKEN = 512
_OTHER_BYTES = 1 << 20
# Marks a folder that this writes and removes.
_OURS = ".distillkit_rollouts"
_NOT_FOUND = 404
_REFUSED = (401, 403)


class _Protocol(Protocol):
    """How a kind of server is told to load weights, and to write."""

    name: str
    loads: str
    """The path that only this kind of server has."""

    def loading(self, folder: Path) -> list[tuple[str, dict[str, Any]]]:
        """Return the requests that make it load a folder's weights: path and body."""

    def writing(self, model: str, ids: list[int], settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the request for a completion."""

    def written(self, answer: Any) -> tuple[list[int], list[float]]:
        """Read a completion's tokens and their log-probabilities."""


class _VLLM:
    name = "vLLM"
    loads = "/collective_rpc"

    def loading(self, folder: Path) -> list[tuple[str, dict[str, Any]]]:
        load = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        # Keys and values that the weights before have computed must not be used.
        return [(self.loads, load), ("/reset_prefix_cache", {})]

    def writing(self, model: str, ids: list[int], settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        body = {"model": model, "prompt": ids, **settings, "logprobs": 0, "return_token_ids": True}
        return "/v1/completions", body

    def written(self, answer: Any) -> tuple[list[int], list[float]]:
        [choice] = answer["choices"]
        return choice["token_ids"], choice["logprobs"]["token_logprobs"]


class _SGLang:
    name = "SGLang"
    loads = "/update_weights_from_disk"

    def loading(self, folder: Path) -> list[tuple[str, dict[str, Any]]]:
        return [(self.loads, {"model_path": str(folder), "flush_cache": True})]

    def writing(self, model: str, ids: list[int], settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        given = dict(settings)
        sampling = {
            "max_new_tokens": given.pop("max_tokens"),
            "sampling_seed": given.pop("seed"),
            "no_stop_trim": True,
            **given,
        }
        return "/generate", {"input_ids": ids, "sampling_params": sampling, "return_logprob": True}

    def written(self, answer: Any) -> tuple[list[int], list[float]]:
        entries = answer["meta_info"]["output_token_logprobs"]
        return [entry[1] for entry in entries], [entry[0] for entry in entries]


_PROTOCOLS: tuple[_Protocol, ...] = (_SGLang(), _VLLM())


class ServerEngine(ServerConnection):
    """Generates with a server.

    Args:
        student: whose weights it loads.
        sampling: how tokens are chosen; each completion has a seed of its own.
        settings: where the server is.
        folder: where the weights are written, which the server must see under the same path.
        batch_size: most requests at the same time.
        leads: whether this process writes the weights; one of all processes.

    Raises:
        ConfigError: the package openai is not installed, the server does not serve the student or so many tokens, or it
            has no way of loading other weights.
        CaptureError: the server does not answer.
    """

    def __init__(
        self,
        student: Student,
        sampling: Sampling,
        settings: RolloutServerConfig,
        folder: Path,
        *,
        batch_size: int,
        leads: bool,
    ) -> None:
        super().__init__(settings, _OTHER_BYTES + sampling.max_new_tokens * _BYTES_PER_TOKEN, _USE)
        self.student = student
        self.sampling = sampling
        self.folder = folder.absolute()
        self.batch_size = batch_size
        self.leads = leads
        self._root = settings.base_url.rstrip("/").removesuffix("/v1")
        self._head_size = lm_head_of(student.model).size
        self._model = self._find_model(settings.served_model, None, student.longest - 1)
        self._protocol = self._find_protocol()
        self._answered = True

    def synchronise(self) -> None:
        """See `Engine`. Writes the weights, has the server load them, and checks that it has.

        Raises:
            ConfigError: the server cannot load them, or the folder has other files.
            CaptureError: the server does not answer.
            DistillKitError: afterwards, its log-probabilities are not the student's.
        """
        if not self.leads:
            return
        self._take_folder()
        write_folder(self.student, self.folder)
        write_weights(self.student, self.folder)
        for path, body in self._protocol.loading(self.folder):
            self._load(path, body)
        ids, logprobs = self._complete(self.student.probe, temperature=0.0, top_p=1.0, max_tokens=PROBE_TOKENS, seed=0)
        check_weights(self.student, ids, logprobs, engine=f"server ({self._protocol.name} at {self._server})")

    def _take_folder(self) -> None:
        """Make the folder, unless an earlier round or run has: its files are overwritten, and removed in the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        found = next((path.name for path in self.folder.iterdir()), None)
        if found is not None and not (self.folder / _OURS).exists():
            raise ConfigError(
                f"rollouts.server.folder: {self.folder} has other files ({found}), which would be overwritten and "
                "removed; choose an empty or new folder"
            )
        (self.folder / _OURS).touch()

    def _load(self, path: str, body: Mapping[str, Any]) -> None:
        try:
            answer = self._post(path, body)
        except self._errors.APIStatusError as error:
            if error.status_code in _REFUSED:
                raise self._failed(error) from error
            raise self._not_loaded(self._message(error)) from error
        except self._errors.APIError as error:
            raise self._failed(error) from error
        if isinstance(answer, Mapping) and answer.get("success") is False:
            raise self._not_loaded(self._quoted(f"{path} answers {dict(answer)}"))

    def _not_loaded(self, message: str) -> ConfigError:
        return ConfigError(
            f"rollouts.server: {self._server} ({self._protocol.name}) could not load the student's weights from "
            f"{self.folder}: {message}. The server must see this folder under the same path (rollouts.server.folder "
            "chooses another), and serve a model of the student's architecture"
        )

    def write(self, prompts: Sequence[Prompt], progress: Progress) -> list[npt.NDArray[np.int32]]:
        """See `Engine`."""
        found: list[npt.NDArray[np.int32]] = []
        threads = ThreadPoolExecutor(self.batch_size, thread_name_prefix="distillkit-request")
        try:
            progress(0, len(prompts))
            for ids in threads.map(self._written, prompts):
                found.append(ids)
                progress(len(found), len(prompts))
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
        return found

    def held_bytes(self) -> int:
        """See `Engine`. The server has its own memory."""
        return 0

    def close(self) -> None:
        """See `Engine`. Removes the weights' folder."""
        if self.leads:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _written(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        sampling = self.sampling
        ids, _ = self._complete(
            prompt.ids,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            seed=sampling.request_seed(prompt.number),
        )
        return ids

    def _complete(self, prompt: npt.NDArray[np.int32], **settings: Any) -> tuple[npt.NDArray[np.int32], list[float]]:
        """Ask for a completion.

        Raises:
            CaptureError: the server fails, or its answer is not a completion.
        """
        # Those that the model's generation config or the server might set otherwise.
        neutral = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False}
        neutral |= {"frequency_penalty": 0.0, "presence_penalty": 0.0}
        ends = {"stop_token_ids": sorted(self.student.stop), "ignore_eos": True}
        path, body = self._protocol.writing(self._model, prompt.tolist(), {**settings, **neutral, **ends})
        try:
            answer = self._post(path, body)
        except self._errors.APIError as error:
            raise self._failed(error) from error
        try:
            ids, logprobs = self._protocol.written(answer)
            self._check_completion(ids, settings["max_tokens"])
            return np.array(ids, dtype=np.int32), [float(value) for value in logprobs[: len(ids)]]
        except MALFORMED as error:
            raise CaptureError(
                f"{self._server} ({self._protocol.name}) did not answer with a completion's token ids and "
                f"log-probabilities: {self._quoted(repr(error))}"
            ) from error

    def _check_completion(self, ids: list[int], longest: int) -> None:
        """Raise `ValueError` if these cannot be the tokens of a completion."""
        wrong = [each for each in ids if type(each) is not int or not 0 <= each < self._head_size]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is not an id of a head with {self._head_size} rows")
        ended = [index for index, each in enumerate(ids) if each in self.student.stop]
        whole = len(ids) == longest if not ended else ended == [len(ids) - 1]
        if not ids or not whole:
            raise ValueError(
                f"{len(ids)} tokens (at most {longest}), with tokens that end a text at {ended[:5]}: a completion ends "
                "with the first of these, or with the last that it may have"
            )

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send a request, and return the answer as JSON, or None if it is empty.

        Raises:
            openai.APIError: the server rejects it, or still fails after all retries.
            CaptureError: the answer is not JSON.
        """
        text = self._client.post(f"{self._root}{path}", cast_to=str, body=dict(body))
        if not text:
            return None
        try:
            return self._parse(text.encode())
        except ValueError as error:
            raise CaptureError(f"{self._server} did not answer with JSON: {self._quoted(text)}") from error

    def _find_protocol(self) -> _Protocol:
        """Find out how the server loads weights, without making it do so.

        Raises:
            ConfigError: it does not.
        """
        for protocol in _PROTOCOLS:
            try:
                self._client.get(f"{self._root}{protocol.loads}", cast_to=str)
            except self._errors.APIStatusError as error:
                if error.status_code == _NOT_FOUND:
                    continue
                if error.status_code in _REFUSED or error.status_code >= 500:
                    raise self._failed(error) from error
            except self._errors.APIError as error:
                raise self._failed(error) from error
            return protocol  # 405, usually: the path is there, for another method
        paths = " nor ".join(f"{each.loads} ({each.name})" for each in _PROTOCOLS)
        raise ConfigError(
            f"rollouts.server: {self._server} cannot load other weights: it has neither {paths}. Start vLLM with "
            "VLLM_SERVER_DEV_MODE=1 in its environment, or use SGLang; or engine: hf, which needs no server"
        )

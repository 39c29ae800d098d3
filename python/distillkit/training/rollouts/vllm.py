"""vLLM in the process that trains: it has a second copy of the student, which is overwritten in place before each
round."""

from __future__ import annotations

import gc
import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from distillkit.capture.teachers.vllm import check_installed, cpu_kv_bytes, quiet
from distillkit.errors import ConfigError
from distillkit.memory import total_memory
from distillkit.models.head import bare_model, elements_of
from distillkit.training.rollouts.engine import Progress, Prompt, Sampling, Student
from distillkit.training.rollouts.weights import PROBE_TOKENS, check_weights, checkpoint_weights, write_folder

__all__ = ["VLLMEngine"]

# The engine runs in this process, so that it can read the student's weights, and leaves the cores to it.
_IN_THIS_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


class VLLMEngine:
    """Generates with vLLM, which starts with the first round.

    Args:
        student: whose weights it copies.
        sampling: how tokens are chosen; each completion has a seed of its own.
        batch_size: most completions at the same time.
        gpu_memory_utilization: share of the GPU's memory for weights, activations, keys and values.

    Raises:
        ConfigError: vLLM is not installed.
    """

    def __init__(self, student: Student, sampling: Sampling, *, batch_size: int, gpu_memory_utilization: float) -> None:
        check_installed()
        self.student = student
        self.sampling = sampling
        self.batch_size = batch_size
        self.gpu_memory_utilization = gpu_memory_utilization
        self._engine: Any = None

    def synchronise(self) -> None:
        """See `Engine`. Overwrites vLLM's copy of the weights in place.

        Raises:
            ConfigError: vLLM does not start with this student.
            DistillKitError: afterwards, its log-probabilities are not the student's.
        """
        student = self.student
        with _apart_from_training():
            if self._engine is None:
                self._engine = self._start()
            weights = checkpoint_weights(student.model)
            # It says of each module without parameters, such as rotary embeddings, that loading has failed.
            logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
            converted = (
                (name, tensor.to(student.dtype) if tensor.is_floating_point() else tensor)
                for name, tensor in weights.items()
            )
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": converted})
            self._engine.apply_model(_pack_heads)
            greedy = self._parameters(temperature=0.0, max_tokens=PROBE_TOKENS, logprobs=0)
            [output] = self._run([(student.probe, greedy)], lambda done, total: None)
        written = np.array(output.token_ids, dtype=np.int32)
        values = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs, strict=True)]
        check_weights(student, written, values, engine="vllm")

    def write(self, prompts: Sequence[Prompt], progress: Progress) -> list[npt.NDArray[np.int32]]:
        """See `Engine`."""
        sampling = self.sampling
        requests = [
            (
                prompt.ids,
                self._parameters(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=sampling.request_seed(prompt.number),
                    max_tokens=sampling.max_new_tokens,
                ),
            )
            for prompt in prompts
        ]
        with _apart_from_training():
            outputs = self._run(requests, progress)
        return [np.array(output.token_ids, dtype=np.int32) for output in outputs]

    def held_bytes(self) -> int:
        """See `Engine`. On a GPU, all of its share, since vLLM fills it with room for keys and values."""
        device = self.student.model.device
        if device.type == "cuda":
            return int(self.gpu_memory_utilization * total_memory(device))
        model = bare_model(self.student.model)
        return sum(map(elements_of, model.parameters())) * self.student.dtype.itemsize + cpu_kv_bytes()

    def close(self) -> None:
        """See `Engine`. Stops vLLM."""
        if self._engine is not None:
            self._engine.engine_core.shutdown()
            self._engine = None
            gc.collect()

    def _parameters(self, **settings: Any) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            stop_token_ids=sorted(self.student.stop),
            ignore_eos=True,  # its own idea of them; those of the student are above
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **settings,
        )

    def _run(self, requests: Sequence[tuple[npt.NDArray[np.int32], Any]], progress: Progress) -> list[Any]:
        """Return vLLM's completion of each request."""
        from vllm.inputs import tokens_input

        for index, (ids, parameters) in enumerate(requests):
            self._engine.add_request(str(index), tokens_input(ids.tolist()), parameters)
        found: dict[int, Any] = {}
        progress(0, len(requests))
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                found[int(output.request_id)] = output.outputs[0]
                progress(len(found), len(requests))
        return [found[index] for index in range(len(requests))]

    def _start(self) -> Any:
        """Start vLLM with the student's config; its weights come later."""
        student = self.student
        quiet()
        with _environment(_IN_THIS_PROCESS), TemporaryDirectory(prefix="distillkit-") as folder:
            from vllm import EngineArgs, LLMEngine

            write_folder(student, Path(folder))
            arguments: dict[str, Any] = {
                "model": folder,
                "load_format": "dummy",
                "generation_config": "vllm",
                "dtype": str(student.dtype).removeprefix("torch."),
                "max_model_len": student.longest,
                "max_num_seqs": self.batch_size,
                "gpu_memory_utilization": self.gpu_memory_utilization,
                # Prompts differ, and what was computed with other weights must not be used.
                "enable_prefix_caching": False,
                "disable_log_stats": True,
            }
            if not torch.cuda.is_available():
                arguments |= {"kv_cache_memory_bytes": cpu_kv_bytes(), "enforce_eager": True}
            try:
                return LLMEngine.from_engine_args(EngineArgs(**arguments))
            except (ValueError, NotImplementedError, RuntimeError, MemoryError) as error:
                raise ConfigError(
                    f"rollouts.engine: vllm does not start with this student: {error} (its log above may say more). If "
                    "memory ran out, lower rollouts.gpu_memory_utilization; engine: hf runs every student"
                ) from error


def _pack_heads(model: torch.nn.Module) -> None:
    """On a CPU, vLLM computes with a packed copy of the head's weight, which reloading leaves as it was if the weight
    is also the embedding's."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set environment variables that are not set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def _apart_from_training() -> Iterator[None]:
    """Leave training its random numbers, such as those of dropout, and its threads: vLLM seeds all generators, and on a
    CPU takes threads away."""
    states, threads = (random.getstate(), np.random.get_state()), torch.get_num_threads()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_num_threads(threads)

"""Writes the student's completions, with transformers and the very weights that are being trained.

Every completion has its own random numbers, which depend on the seed and its number alone. So it does not matter which
others are written at the same time, or by which process, and there is no generator whose state would have to be kept.

Shape legend: B prompts written at the same time, V width of the head, M new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import TemperatureLogitsWarper, TopPLogitsWarper

from distillkit.models.head import bare_model

__all__ = ["Engine", "HfEngine", "Prompt", "Sampling", "Student", "draw", "stop_tokens"]

Progress = Callable[[int, int], None]
"""Gets how many completions are written, and how many there will be."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to continue.

    Attributes:
        number: number of the completion, which decides its random numbers.
        ids: (L,) int32 token ids.
    """

    number: int
    ids: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: M, the longest completion.
        temperature: softens the student's distribution; 0 takes the most probable token.
        top_p: keeps the most probable tokens up to this total probability.
        seed: seed of all random numbers.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def uniforms(self, number: int) -> npt.NDArray[np.float32]:
        """(M,) the random numbers of a completion, uniform in [0, 1)."""
        return np.random.default_rng([self.seed, number, 3]).random(self.max_new_tokens, dtype=np.float32)

    def request_seed(self, number: int) -> int:
        """The seed of a completion's random numbers, for engines that draw their own: below 2³¹."""
        return int(np.random.default_rng([self.seed, number, 4]).integers(2**31))


@dataclass(frozen=True)
class Student:
    """The student, as engines with a copy of its weights need it.

    Attributes:
        model: the student; may have adapters, which are merged into the copy.
        tokenizer: its tokenizer.
        dtype: of the copy, such as torch.bfloat16.
        stop: token ids that end a completion.
        probe: (L,) token ids after which both write a few tokens, to check that their weights are the same.
        longest: most tokens of a prompt with its completion.
    """

    model: Any
    tokenizer: Any
    dtype: torch.dtype
    stop: frozenset[int]
    probe: npt.NDArray[np.int32]
    longest: int


class Engine(Protocol):
    """Writes completions with the student's current weights."""

    def synchronise(self) -> None:
        """Take over the student's weights. Every process must call this, and wait for the others, before `write`."""
        ...

    def write(self, prompts: Sequence[Prompt], progress: Progress) -> list[npt.NDArray[np.int32]]:
        """Return the new tokens of each prompt, with the token that ended it, if one did."""
        ...

    def held_bytes(self) -> int:
        """Return how much memory it keeps on the student's device from the first round on, besides the student."""
        ...

    def close(self) -> None:
        """Give back what is only needed to write; `synchronise` gets it again."""
        ...


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the token ids that end a completion: those that the model's generation config names, and the tokenizer's
    end-of-sequence token."""
    named = getattr(bare_model(model), "generation_config", None)
    ids = None if named is None else named.eos_token_id
    listed = [ids] if isinstance(ids, int) else list(ids or ())
    return frozenset(each for each in (*listed, tokenizer.eos_token_id) if each is not None)


class HfEngine:
    """Generates with transformers, in batches that are padded on the left, with a key-value cache.

    Args:
        model: the student; may have adapters.
        sampling: how tokens are chosen.
        stop: token ids that end a completion.
        pad_id: token id of the padding.
        batch_size: most prompts that are continued at the same time.
    """

    def __init__(
        self, model: Any, sampling: Sampling, *, stop: frozenset[int], pad_id: int, batch_size: int = 8
    ) -> None:
        self.model = model
        self.sampling = sampling
        self.stop = stop
        self.pad_id = pad_id
        self.batch_size = batch_size

    def synchronise(self) -> None:
        """See `Engine`. There is nothing to do: the weights are the student's own."""

    def write(self, prompts: Sequence[Prompt], progress: Progress) -> list[npt.NDArray[np.int32]]:
        """See `Engine`. Prompts of similar length are continued together."""
        found: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: (len(prompts[index].ids), prompts[index].number))
        with _generating(self.model) as bare:
            for start in range(0, len(order), self.batch_size):
                progress(start, len(order))
                chosen = order[start : start + self.batch_size]
                written = self._batch(bare, [prompts[index] for index in chosen])
                for index, completion in zip(chosen, written, strict=True):
                    found[index] = completion
            progress(len(order), len(order))
        return found

    def held_bytes(self) -> int:
        """See `Engine`."""
        return 0

    def close(self) -> None:
        """See `Engine`. There is nothing to give back."""

    def _batch(self, model: Any, prompts: Sequence[Prompt]) -> list[npt.NDArray[np.int32]]:
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = np.full((len(prompts), longest), self.pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt.ids) :] = prompt.ids
            mask[row, longest - len(prompt.ids) :] = 1
        settings = GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens,
            do_sample=False,  # of the scores that `_processors` leave
            use_cache=True,
            eos_token_id=sorted(self.stop) or None,
            pad_token_id=self.pad_id,
        )
        output = model.generate(
            input_ids=torch.from_numpy(ids).to(model.device),
            attention_mask=torch.from_numpy(mask).to(model.device),
            generation_config=settings,
            logits_processor=self._processors(prompts, longest, model.device),
        )
        return [self._until_stop(row) for row in output[:, longest:].cpu().numpy().astype(np.int32)]

    def _processors(self, prompts: Sequence[Prompt], start: int, device: torch.device) -> LogitsProcessorList:
        sampling, processors = self.sampling, LogitsProcessorList()
        if not sampling.temperature:
            return processors
        if sampling.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_p < 1.0:
            processors.append(TopPLogitsWarper(sampling.top_p))
        uniforms = np.stack([sampling.uniforms(prompt.number) for prompt in prompts])
        processors.append(_Draw(torch.from_numpy(uniforms).to(device), start))
        return processors

    def _until_stop(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Cut off the padding after the token that ended a completion."""
        ends = np.flatnonzero(np.isin(tokens, list(self.stop)))
        return tokens[: ends[0] + 1] if len(ends) else tokens


@contextmanager
def _generating(model: Any) -> Iterator[Any]:
    """Yield the bare model in evaluation mode, without gradients, and without the generation settings that it came
    with (top_k, repetition_penalty, …): what is learned from must be the student's own distribution."""
    bare, training = bare_model(model), model.training
    own, bare.generation_config = bare.generation_config, GenerationConfig()
    model.eval()
    try:
        with torch.no_grad():
            yield bare
    finally:
        bare.generation_config = own
        model.train(training)


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Leaves only the token that is drawn, so that the greedy search of `generate` takes it.

    Args:
        uniforms: (B, M) the random numbers of each completion.
        start: length of the padded prompts.
    """

    def __init__(self, uniforms: torch.Tensor, start: int) -> None:
        self.uniforms = uniforms
        self.start = start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = draw(scores, self.uniforms[:, input_ids.shape[1] - self.start])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.unsqueeze(1), 0.0)


def draw(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Draw an id from each row of scores (B, V), by its uniform random number (B,): the first id at which the
    cumulative probability exceeds it. Ids with a score of −inf are never drawn.

    Returns:
        (B,) int64.
    """
    cumulative = scores.float().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # Rounding must not reach the total, which no id exceeds.
    wanted = torch.minimum(uniforms.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(1)

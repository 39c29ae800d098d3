"""Rounds: at the beginning of each, the student writes the completions that it will be trained on in the next optimiser
steps.

All processes write their share of a round and then exchange it: each knows the whole round, so that a checkpoint has it
once, and can be resumed by any number of processes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from distillkit.errors import ConfigError
from distillkit.losses.fused import Objective
from distillkit.losses.registry import Term, loss
from distillkit.models.adapters import check_merge
from distillkit.models.head import bare_model
from distillkit.shards.table import document_id
from distillkit.training.data.examples import DistillationDataset, Example
from distillkit.training.rollouts.engine import Engine, HfEngine, Progress, Prompt, Sampling, Student, stop_tokens
from distillkit.training.rollouts.order import MixedOrder, PromptOrder, Slot
from distillkit.training.rollouts.prompts import Prompts
from distillkit.types import Document

if TYPE_CHECKING:
    from distillkit.training.config.schema import RolloutsConfig

__all__ = ["COMPLETIONS", "MEASURED", "Completion", "Rollouts", "Round", "repeated"]

COMPLETIONS = "distillkit_rollouts.npz"
"""File of a checkpoint with the completions of a round that has not ended."""

MEASURED = 64
"""Completions of a round on which the divergence from the teacher is measured, in all processes together."""

_REVERSE_KL = Objective((Term("reverse_kl", 1.0, loss("reverse_kl", missing_probability_handling="uniform")),))
# Completions at the same time, for engines that decide themselves how many run.
_AT_ONCE = {"vllm": 256, "server": 64}
# Tokens of the prompt by which an engine's weights are checked: a few suffice.
_PROBE = 64
# Length of the sequences whose repetition is counted.
_REPEATED = 4


@dataclass(frozen=True)
class Completion:
    """A prompt, and what the student wrote after it.

    Attributes:
        ids: (L,) int32, both.
        start: where the student's tokens begin.
        prompt: index of the prompt.
    """

    ids: npt.NDArray[np.int32]
    start: int
    prompt: int

    @property
    def written(self) -> npt.NDArray[np.int32]:
        """The student's tokens."""
        return self.ids[self.start :]


class Round:
    """The completions of some optimiser steps, as documents of which only the student's tokens count.

    Args:
        steps: optimiser steps that are trained on them, counted from 0.
        first: number of the first slot.
        completions: those of that slot and the next ones.
    """

    def __init__(self, steps: range, first: int, completions: Sequence[Completion]) -> None:
        self.steps = steps
        self.first = first
        self.completions = completions

    def __len__(self) -> int:
        return len(self.completions)

    def __getitem__(self, index: int) -> Document:
        completion = self.completions[index]
        ids, mask = completion.ids, np.arange(len(completion.ids)) >= completion.start
        place = f"completion {self.first + index} (rollouts.prompts, prompt {completion.prompt})"
        return Document(document_id(ids, mask), ids, b"", len(ids) - 1, mask, place=place)

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each completion with its prompt (D,)."""
        return np.array([len(completion.ids) for completion in self.completions], dtype=np.int64)

    def save(self, path: Path) -> None:
        """Write the round to a file."""
        with path.open("wb") as file:
            np.savez(
                file,
                steps=np.array([self.steps.start, self.steps.stop, self.first]),
                ids=np.concatenate([completion.ids for completion in self.completions]),
                lengths=self.lengths(),
                starts=np.array([completion.start for completion in self.completions]),
                prompts=np.array([completion.prompt for completion in self.completions]),
            )

    @classmethod
    def load(cls, path: Path) -> Round:
        """Read a round from a file that `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            start, stop, first = file["steps"].tolist()
            pieces = np.split(file["ids"], np.cumsum(file["lengths"])[:-1])
            parts = zip(pieces, file["starts"].tolist(), file["prompts"].tolist(), strict=True)
            return cls(range(start, stop), first, [Completion(*part) for part in parts])


class Rollouts:
    """The student's completions in a run, and what they are made of.

    Args:
        settings: the section of the configuration.
        prompts: what to continue.
        sequence_length: maximum number of tokens in a row.
        progress: gets the number of completions that are written, and of those that will be.

    Attributes:
        current: the round whose completions are trained on; None before the first.
    """

    def __init__(self, settings: RolloutsConfig, prompts: Prompts, sequence_length: int, progress: Progress) -> None:
        self.settings = settings
        self.prompts = prompts
        self.sequence_length = sequence_length
        self.progress = progress
        self.current: Round | None = None
        self._scored = (0, 0.0)  # tokens, seconds

    def attach(self, trainer: Any) -> None:
        """Write with the student of this trainer.

        Raises:
            ConfigError: the student's weights are divided among processes, or the engine cannot take them.
            CaptureError: the engine is a server that does not answer.
        """
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError(
                "rollouts: a student that FSDP or DeepSpeed divides among processes cannot write completions yet; "
                "train without them (several processes then use DDP, each with the whole student), or LoRA adapters"
            )
        self._trainer = trainer
        arguments, settings, tokenizer = trainer.args, self.settings, trainer.processing_class
        seed = trainer.order_seed()
        self._seed = seed
        self._order = PromptOrder(len(self.prompts), seed)
        sampling = Sampling(
            settings.max_new_tokens, settings.temperature, settings.top_p, arguments.seed if seed is None else seed
        )
        self._stop = stop_tokens(trainer.model, tokenizer)
        rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
        self.batch_size = settings.batch_size or _AT_ONCE.get(settings.engine, rows)
        self.engine = self._engine(sampling)
        trainer.add_callback(_RoundEnds(self))

    def _engine(self, sampling: Sampling) -> Engine:
        trainer, settings = self._trainer, self.settings
        if settings.engine == "hf":
            return HfEngine(
                trainer.model,
                sampling,
                stop=self._stop,
                pad_id=trainer.data_collator.pad_id,
                batch_size=self.batch_size,
            )
        if settings.engine == "vllm" and trainer.args.world_size > 1:
            raise ConfigError(
                f"rollouts.engine: vllm writes in the only process that trains, but there are "
                f"{trainer.args.world_size}; several processes can ask a server together (engine: server), or each "
                "write its share (engine: hf)"
            )
        student = self._student()
        if settings.engine == "vllm":
            from distillkit.training.rollouts.vllm import VLLMEngine

            memory = settings.gpu_memory_utilization
            return VLLMEngine(student, sampling, batch_size=self.batch_size, gpu_memory_utilization=memory)
        if settings.server is None:
            raise TypeError("the configuration has no server")
        from distillkit.training.rollouts.server import ServerEngine

        folder = Path(settings.server.folder or Path(trainer.args.output_dir) / "rollouts_student")
        leads = bool(trainer.args.process_index == 0)
        return ServerEngine(student, sampling, settings.server, folder, batch_size=self.batch_size, leads=leads)

    def _student(self) -> Student:
        """Describe the student for an engine with a copy of its weights.

        Raises:
            ConfigError: its adapters cannot be merged into the copy.
        """
        model, arguments = self._trainer.model, self._trainer.args
        if bare_model(model) is not model:
            check_merge(
                model,
                lora_bias=any(getattr(each, "lora_bias", False) for each in model.peft_config.values()),
                key=f"rollouts.engine: {self.settings.engine}",
                otherwise="use engine: hf",
            )
        return Student(
            model,
            self._trainer.processing_class,
            dtype=torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else model.dtype,
            stop=self._stop,
            probe=self.prompts[0][:_PROBE],
            longest=self.prompts.longest + self.settings.max_new_tokens,
        )

    # -- rows of training ----------------------------------------------------------------------------------------------

    def rows(self, documents: int) -> MixedOrder:
        """Return the order of an epoch's rows, of which some are completions.

        Args:
            documents: number of documents that are trained on besides; without any, the number of prompts.
        """
        arguments = self._trainer.args
        batch = arguments.per_device_train_batch_size * arguments.world_size
        self._rows = MixedOrder(
            documents,
            self.settings.fraction,
            seed=self._seed,
            batch=batch,
            step=batch * arguments.gradient_accumulation_steps,
            fill=arguments.world_size > 1 and not arguments.dataloader_drop_last,
            drop_last=arguments.dataloader_drop_last,
        )
        return self._rows

    def filled(self, batches: Iterator[list[Any]]) -> Iterator[dict[str, Any]]:
        """Collate batches of rows, with completions in place of slots. `begin` must come first."""
        for batch in batches:
            yield self._trainer.data_collator([self._example(row) if isinstance(row, Slot) else row for row in batch])

    def _example(self, slot: Slot) -> Example:
        if self.current is None:
            raise RuntimeError("no completions have been written yet")
        return self._documents(self.current).piece(slot.number - self.current.first)

    def _documents(self, current: Round) -> DistillationDataset:
        return DistillationDataset(current, self._trainer.train_dataset.signal, self.sequence_length)

    # -- rounds --------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Write the completions of the next steps, unless those of the next step are there. Every process must call
        this before it fetches the batches of a step."""
        step, every = self._trainer.state.global_step, self.settings.every
        if self.current is not None and step in self.current.steps:
            return
        steps = range(step, min((step // every + 1) * every, self._trainer.state.max_steps))
        slots = self._rows.slots(steps)
        with self._trainer.untimed():
            began = time.perf_counter()
            completions = self._gathered(self._written(slots))
            seconds = max(self._gathered([time.perf_counter() - began]))
            self.current = Round(steps, slots.start, completions)
            if completions:
                self._log({**self._figures(self.current, seconds), "rollout_kl": self.divergence(self.current)})

    def end(self) -> None:
        """After the last step of a round, measure the divergence from the teacher again."""
        current = self.current
        if current is None or not len(current) or self._trainer.state.global_step != current.steps.stop:
            return
        with self._trainer.untimed():
            self._log({"rollout_kl_after": self.divergence(current)})

    def rehearse(self) -> tuple[Round, float]:
        """Write a single completion, and use it for every slot of the first step.

        Returns:
            The round, and the seconds that its completion took.
        """
        slots, began = self._rows.slots(range(1)), time.perf_counter()
        [completion] = self._written(range(slots.start, slots.start + 1), everything=True)
        self.current = Round(range(1), slots.start, [completion] * max(len(slots), 1))
        return self.current, time.perf_counter() - began

    def _written(self, slots: range, *, everything: bool = False) -> list[Completion]:
        """Return this process's share of the completions, every n-th of n processes."""
        arguments = self._trainer.args
        own = slots if everything else slots[arguments.process_index :: arguments.world_size]
        numbers = [self._order[slot] for slot in own]
        prompts = [Prompt(slot, self.prompts[number]) for slot, number in zip(own, numbers, strict=True)]
        self.engine.synchronise()
        self._trainer.accelerator.wait_for_everyone()
        written = self.engine.write(prompts, self.progress)
        return [
            Completion(np.concatenate([prompt.ids, ids]), len(prompt.ids), number)
            for prompt, ids, number in zip(prompts, written, numbers, strict=True)
        ]

    def _gathered(self, own: list[Any]) -> list[Any]:
        """Return the values of all processes, in the order of the slots that they were dealt from."""
        processes = self._trainer.args.world_size
        if processes == 1:
            return own
        shares: list[Any] = [None] * processes
        torch.distributed.all_gather_object(shares, own)
        longest = max(map(len, shares))
        return [share[index] for index in range(longest) for share in shares if index < len(share)]

    # -- measures ------------------------------------------------------------------------------------------------------

    def _figures(self, current: Round, seconds: float) -> dict[str, float]:
        written = [completion.written for completion in current.completions]
        tokens = sum(map(len, written))
        return {
            "rollout_length": tokens / len(written),
            "rollout_ended": float(np.mean([int(each[-1]) in self._stop for each in written])),
            "rollout_repeated": float(np.mean([repeated(each) for each in written])),
            "generating_tokens_per_second": tokens / max(seconds, 1e-9),
        }

    @torch.no_grad()
    def divergence(self, current: Round) -> float:
        """Return KL(student ‖ teacher) in nats, the mean over the student's tokens of up to 64 completions. Every
        process must call this."""
        trainer, documents = self._trainer, self._documents(current)
        arguments = trainer.args
        chosen = np.unique(np.linspace(0, len(current) - 1, min(MEASURED, len(current)), dtype=np.int64))
        own = chosen[arguments.process_index :: arguments.world_size].tolist()
        model, training = trainer.model, trainer.model.training
        sums = torch.zeros(2, dtype=torch.float32, device=arguments.device)
        model.eval()
        for start in range(0, len(own), arguments.per_device_train_batch_size):
            examples = [documents.piece(index) for index in own[start : start + arguments.per_device_train_batch_size]]
            batch = trainer._prepare_inputs(trainer.data_collator(examples))
            with trainer.compute_loss_context_manager():
                output = trainer._forward(model, batch, _REVERSE_KL, documents)
            sums += torch.stack([output.loss.float(), torch.tensor(float(len(batch["rows"])), device=sums.device)])
        model.train(training)
        total, positions = trainer.accelerator.reduce(sums, reduction="sum").tolist()
        return float(total / max(positions, 1.0))

    @contextmanager
    def scoring(self, batch: Mapping[str, Any]) -> Iterator[None]:
        """Measure the time that the teacher takes for a batch."""
        device, began = self._trainer.args.device, time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        tokens, seconds = self._scored
        self._scored = (tokens + int(batch["counts"][0]), seconds + time.perf_counter() - began)

    def speed(self) -> dict[str, float]:
        """Return the teacher's tokens per second in all processes since the last call, and start again. Every process
        must call this."""
        tokens, seconds = self._trainer.accelerator.reduce(
            torch.tensor(self._scored, dtype=torch.float32, device=self._trainer.args.device), reduction="sum"
        ).tolist()
        self._scored = (0, 0.0)
        return {"scoring_tokens_per_second": tokens / max(seconds / self._trainer.args.world_size, 1e-9)}

    def _log(self, measures: dict[str, float]) -> None:
        control = self._trainer.control
        # Logging counts as the log of the step, if one is due.
        due = control.should_log
        self._trainer.log(measures)
        control.should_log = due

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write the completions that are still to be trained on to a checkpoint, if there are any."""
        current = self.current
        if current is not None and len(current) and self._trainer.state.global_step in current.steps:
            current.save(folder / COMPLETIONS)

    def load(self, folder: Path) -> None:
        """Go on with the completions of a checkpoint."""
        path = folder / COMPLETIONS
        self.current = Round.load(path) if path.is_file() else None


class _RoundEnds(transformers.TrainerCallback):  # type: ignore[misc]
    """Measures each round after its last step, and gives back what only the engine needs after the last one."""

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rollouts.end()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rollouts.engine.close()


def repeated(tokens: npt.NDArray[np.int32]) -> float:
    """Return the share of sequences of four tokens that have occurred before; 0 for fewer than five tokens.

    Example:
        >>> repeated(np.array([1, 2, 3, 4, 1, 2, 3, 4], np.int32))  # the last of five has occurred before
        0.2
    """
    if len(tokens) <= _REPEATED:
        return 0.0
    sequences = np.lib.stride_tricks.sliding_window_view(tokens, _REPEATED)
    return 1.0 - len(np.unique(sequences, axis=0)) / len(sequences)

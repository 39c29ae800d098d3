"""A live teacher: a transformers model that runs next to the student, on the same batches.

Its logits are never kept for a batch: only its hidden states at the counted positions are, and its head is applied to
one chunk of positions at a time, along with the student's.

Shape legend: B batch, S sequence, N counted positions, H hidden size of the teacher, V width of its head, k kept ids.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch

from distillkit.codec.topk import sparse_from_logits
from distillkit.configuration.places import neighbour
from distillkit.configuration.secrets import redacted
from distillkit.errors import ConfigError, DistillKitError, MismatchError
from distillkit.losses.positions import DenseTeacher, DenseTeachers, Targets
from distillkit.models.head import backbone_layers, bare_model, check_lm_head, logit_chunks
from distillkit.models.rope import choose_frequencies_by_document
from distillkit.models.weights import loading_errors, loading_reason, model_problem
from distillkit.text import tokenizer as tokenizers
from distillkit.training.data.examples import MODEL_INPUTS
from distillkit.training.signals.base import TeacherSignal, check_ids_fit
from distillkit.training.signals.stored import within
from distillkit.types import Document, SparseLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distillkit.training.config.schema import RunConfig

__all__ = ["OnlineSignal", "check_teacher_tokenizer", "load_teacher", "most_probable"]

logger = logging.getLogger(__name__)


class OnlineSignal(TeacherSignal):
    """Distributions and hidden states of a live teacher.

    Args:
        model: the teacher, on any devices. If this is a student with PEFT adapters, they are disabled while it teaches,
            which makes it the student before training.
        top_k: keep only the k most probable ids; None: all ids.
        layers: indices of the teacher's hidden states to compare.
        head_size: width of the student's head; ids beyond it (padding of a wider teacher's head) count as missing mass.
            By default that of the teacher's.
        key: the teacher's key in the configuration.

    Raises:
        DistillKitError: the teacher's head cannot be applied apart from the model; names its setting.
        ConfigError: top_k is more than the teacher or the student has ids.
    """

    def __init__(
        self,
        model: Any,
        *,
        top_k: int | None = None,
        layers: tuple[int, ...] = (),
        head_size: int | None = None,
        key: str = "teacher",
    ) -> None:
        self.model = model
        self.key = key
        self.layers = layers
        self.top_k = top_k
        try:
            self.head = check_lm_head(model)
        except DistillKitError as error:
            raise DistillKitError(f"{key}.path: {error}") from error
        self.head_size = self.head.size if head_size is None else head_size
        for whose, size in (("teacher's", self.head.size), ("student's", self.head_size)):
            if top_k is not None and top_k > size:
                raise ConfigError(f"{key}.top_k: {top_k:,} ids were requested, but the {whose} head has {size:,}")

    def take(self, document: Document, positions: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Return nothing: the batch's token ids are enough.

        Raises:
            MismatchError: a token id is beyond the head of the student or the teacher.
        """
        check_ids_fit(document, self.head_size)
        check_ids_fit(document, self.head.size, f"the teacher's head ({self.key})")
        return {}

    def targets(self, batch: Mapping[str, Any], labels: torch.Tensor) -> Targets:
        """Run the teacher on a batch: see `TeacherSignal.targets`."""
        dense, hidden = self.run(batch, labels.device)
        if self.top_k is None:
            return Targets(labels, dense, hidden)
        first = most_probable(dense, (len(labels), self.head.size), self.top_k, self.head_size, labels.device)
        return Targets(labels, first, hidden)

    @torch.no_grad()
    def run(self, batch: Mapping[str, Any], device: torch.device) -> tuple[DenseTeacher, tuple[torch.Tensor, ...]]:
        """Run the teacher on a batch, and return its whole distributions and its hidden states (N, H) of `layers`, the
        latter on `device`."""
        with _as_teacher(self.model) as bare:
            inputs = {name: _moved(value, bare.device) for name, value in batch.items() if name in MODEL_INPUTS}
            last, layers = backbone_layers(bare, self.layers, **inputs)
            weights = self.head.weights()
        rows = batch["rows"]
        hidden = tuple(states.flatten(0, 1)[rows.to(states.device)].to(device) for states in layers)
        return DenseTeacher(last.flatten(0, 1)[rows.to(last.device)], self.head, weights), hidden

    @property
    def models(self) -> dict[str, Any]:
        """The teacher's model by the key of the configuration that names it."""
        return {f"{self.key}.path": self.model}


@torch.no_grad()
def most_probable(
    dense: DenseTeacher | DenseTeachers, shape: tuple[int, int], k: int, head_size: int, device: torch.device
) -> SparseLogprobs:
    """Keep the k most probable ids of each position.

    Args:
        dense: the distributions.
        shape: number of positions, and of ids.
        k: number of ids to keep.
        head_size: width of the student's head; ids beyond it count as missing mass.
        device: where to return them.
    """
    parts: list[SparseLogprobs] = []
    for start, stop in logit_chunks(*shape, device):
        parts.append(sparse_from_logits(dense.logits(start, stop).logits, k))
    if not parts:
        empty = torch.empty(0, k, device=device)
        return SparseLogprobs(empty.long(), empty)
    ids, logprobs = (torch.cat([getattr(part, name) for part in parts]).to(device) for name in ("ids", "logprobs"))
    return SparseLogprobs(*within(ids, logprobs, head_size)) if shape[1] > head_size else SparseLogprobs(ids, logprobs)


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


@contextmanager
def _as_teacher(model: Any) -> Iterator[PreTrainedModel]:
    """Temporarily disable dropout and adapters, and yield the bare model."""
    bare, training = bare_model(model), model.training
    model.eval()
    try:
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                yield bare
        else:
            yield bare
    finally:
        model.train(training)


def load_teacher(config: RunConfig, device: torch.device, key: str = "teacher") -> PreTrainedModel:
    """Load a live teacher of a configuration.

    Its weights have the checkpoint's dtype unless `kwargs.dtype` is set, and are on `device` unless `kwargs.device_map`
    places them.

    Args:
        config: the configuration.
        device: where to load it.
        key: its key in `RunConfig.live_teachers`.

    Raises:
        ConfigError: the teacher cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    teacher = config.live_teachers[key]
    arguments = {"dtype": "auto", "trust_remote_code": config.trust_remote_code, **teacher.kwargs}
    try:
        model = AutoModelForCausalLM.from_pretrained(teacher.path, **arguments)
    except loading_errors() as error:
        problem = model_problem(teacher.path) or (
            f"{teacher.path!r} cannot be loaded with {redacted(str(arguments))}: {redacted(loading_reason(error))}"
            f"{neighbour(teacher.path)}"
        )
        raise ConfigError(f"{config.source}: {key}.path: {problem}") from error
    choose_frequencies_by_document(model)
    if "device_map" not in arguments:
        model.to(device)
    model.eval().requires_grad_(False)
    logger.info(
        "teacher %s: %s, %s parameters, %s on %s",
        teacher.path,
        type(model).__name__,
        f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        str(model.dtype).removeprefix("torch."),
        model.device,
    )
    return model


def check_teacher_tokenizer(config: RunConfig, tokenizer: Any, key: str = "teacher") -> None:
    """Refuse a teacher whose token ids mean other tokens than the student's.

    Args:
        config: a configuration with a live or a served teacher.
        tokenizer: the student's tokenizer.
        key: the teacher's key in `RunConfig.teachers_by_key`.

    Raises:
        MismatchError: the tokenizers differ; the message has both fingerprints.
        ConfigError: the teacher's tokenizer cannot be loaded.
    """
    teacher = config.teachers_by_key[key]
    name, path = (f"{key}.path", teacher.path) if teacher.kind == "hf" else (f"{key}.model", teacher.model)
    theirs = tokenizers.load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    fingerprints = [tokenizers.fingerprint(each) for each in (theirs, tokenizer)]
    if fingerprints[0] != fingerprints[1]:
        sizes = [tokenizers.vocab_size(each) for each in (theirs, tokenizer)]
        raise MismatchError(
            f"{name}: {path} has another tokenizer than the student: {fingerprints[0]}, {sizes[0]:,} "
            f"ids, against {config.model} ({fingerprints[1]}, {sizes[1]:,} ids). Token ids would mean different "
            "tokens; use a student with the teacher's tokenizer"
        )

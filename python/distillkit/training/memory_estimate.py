"""How much memory a training step will take, and how much room its checkpoints: estimated from the loaded student and
the settings, before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from distillkit.memory import available_memory
from distillkit.models.head import backbone_hidden, bare_model, elements_of, logit_chunks, rows_of
from distillkit.training.config.arguments import to_plain_value

if TYPE_CHECKING:
    from trl import SFTConfig

    from distillkit.losses.fused import Objective

__all__ = ["MemoryEstimate", "checkpoint_bytes", "checkpointing", "estimate_memory", "optimizer_bytes"]

# Values that an optimiser keeps for each trained one, in the parameter's own dtype.
_LIKE_PARAMETERS = {
    "adamw_torch": 2,
    "adamw_torch_fused": 2,
    "adamw_torch_npu_fused": 2,
    "adamw_torch_xla": 2,
    "schedule_free_adamw": 2,
    "schedule_free_radam": 2,
    "schedule_free_sgd": 1,
    "adagrad": 1,
    "rmsprop": 1,
    "sgd": 0,
}
# Those of bitsandbytes: how many values, and the bytes of each (with the scales of its blocks of 256).
_OWN_PRECISION = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), (2, 1 + 4 / 256)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), (1, 1 + 4 / 256)),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), (3, 1 + 4 / 256)),
    "paged_adamw_32bit": (2, 4.0),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), (1, 4.0)),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), (3, 4.0)),
}
# Arrays of a chunk's logits that exist at a time, at most: logits, their gradient, and what a loss makes of them.
_CHUNK_ARRAYS = 3
# Tokens of the forwards that measure activations: what grows with their number is told from what does not.
_PROBES = (16, 48)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes on one device.

    Attributes:
        weights: of the student.
        teacher: weights of a live teacher that is a model of its own.
        gradients: of what is trained.
        optimizer: its state; None if it is not known for this optimiser.
        activations: of the longest micro-batch, measured on a few tokens; None where the model is sharded, since it can
            be run by all processes together only.
        losses: a chunk of logits with its gradient, and float32 gradients of hidden states and head.
        at_hand: what there is for all of it.
    """

    weights: int
    teacher: int
    gradients: int
    optimizer: int | None
    activations: int | None
    losses: int
    at_hand: int

    @property
    def certain(self) -> int:
        """What is known without measuring: weights, gradients and optimiser."""
        return self.weights + self.teacher + self.gradients + (self.optimizer or 0)

    @property
    def total(self) -> int:
        """All of it."""
        return self.certain + (self.activations or 0) + self.losses


def estimate_memory(
    model: Any,
    arguments: SFTConfig,
    objective: Objective,
    sequence_length: int,
    *,
    teacher: Any = None,
    sharded: bool = False,
) -> MemoryEstimate:
    """Estimate what a training step takes.

    Args:
        model: the student, loaded, on the device it trains on.
        arguments: the trainer's.
        objective: the losses.
        sequence_length: longest row in tokens.
        teacher: a live teacher's model, if it is another one than the student's.
        sharded: whether FSDP or DeepSpeed will divide weights, gradients and optimiser among the processes.
    """
    tokens = arguments.per_device_train_batch_size * sequence_length
    head = bare_model(model).get_output_embeddings().weight
    vocabulary, hidden = rows_of(head), bare_model(model).config.get_text_config().hidden_size
    chunk = max(stop - start for start, stop in logit_chunks(tokens, vocabulary, head.device, objective.chunk_length))
    head_gradient = vocabulary * hidden if head.requires_grad else 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights, taught = _bytes(model), 0 if teacher is None else _bytes(teacher)
    return MemoryEstimate(
        weights=weights,
        teacher=taught,
        gradients=sum(map(_size, trained)),
        optimizer=optimizer_bytes(trained, str(to_plain_value(arguments.optim))),
        activations=None if sharded else _activations(model, arguments, tokens),
        losses=4 * (_CHUNK_ARRAYS * chunk * vocabulary + tokens * hidden + head_gradient),
        # What is loaded already is not free any more.
        at_hand=available_memory(arguments.device) + weights + taught,
    )


def optimizer_bytes(parameters: list[torch.nn.Parameter], name: str) -> int | None:
    """Estimate the state that an optimiser keeps for some parameters; None if it is not known here.

    Args:
        parameters: what is trained.
        name: of the optimiser, as `training_args.optim` has it.
    """
    if name in _LIKE_PARAMETERS:
        return _LIKE_PARAMETERS[name] * sum(map(_size, parameters))
    if name in _OWN_PRECISION:
        values, size = _OWN_PRECISION[name]
        return round(values * size * sum(_size(part) // part.element_size() for part in parameters))
    if name == "adafactor":
        # A matrix has a value a row and a value a column (Shazeer and Stern, "Adafactor", 2018), all else one a value.
        return 4 * sum(
            part.numel() // part.shape[-1] + part.numel() // part.shape[-2] if part.ndim >= 2 else part.numel()
            for part in parameters
        )
    return None


def checkpoint_bytes(model: Any, optimizer: int | None, *, optimizer_too: bool) -> tuple[int, int]:
    """Return the bytes of the saved student, and of a checkpoint of it.

    Args:
        model: the student; with PEFT adapters only they are saved.
        optimizer: the state's bytes, if they are known.
        optimizer_too: whether checkpoints hold it.
    """
    adapters = hasattr(model, "peft_config")
    saved = sum(_size(part) for part in model.parameters() if part.requires_grad or not adapters)
    return saved, saved + ((optimizer or 0) if optimizer_too else 0)


def _bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(map(_size, tensors.values()))


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of the whole one where DeepSpeed's ZeRO-3 has left a part of it here."""
    return elements_of(tensor) * tensor.element_size()


# -- activations -------------------------------------------------------------------------------------------------------


def _activations(model: Any, arguments: SFTConfig, tokens: int) -> int:
    """Estimate the activations that a forward keeps for its backward.

    Two short forwards are measured and continued in a line: what attention keeps of every pair of positions, where it
    does (eager attention, packed rows without FlashAttention), is not in it.
    """
    whole = _line(model, arguments, tokens, recomputed=False)
    if not arguments.activation_checkpointing:
        return whole
    layers = getattr(bare_model(model).config.get_text_config(), "num_hidden_layers", 1) or 1
    # The inputs of all layers, and all of the one that is computed again.
    return _line(model, arguments, tokens, recomputed=True) + whole // layers


def _line(model: Any, arguments: SFTConfig, tokens: int, *, recomputed: bool) -> int:
    with checkpointing(model, arguments, wanted=recomputed):
        short, long = (_kept(model, arguments, length) for length in _PROBES)
    slope = (long - short) / (_PROBES[1] - _PROBES[0])
    return round(max(short - slope * _PROBES[0], 0.0) + slope * tokens)


@contextmanager
def checkpointing(model: Any, arguments: SFTConfig, *, wanted: bool) -> Iterator[None]:
    """Put a model in training mode for a while, with activations recomputed as the trainer does or kept.

    Args:
        model: the student; layers recompute in training mode only.
        arguments: the trainer's.
        wanted: whether activations are recomputed.
    """
    training = model.training
    model.train()
    if wanted:
        given = dict(arguments.activation_checkpointing_kwargs or {})
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=given or None)
    try:
        yield
    finally:
        if wanted:
            model.activation_checkpointing_disable()
        model.train(training)


def _kept(model: Any, arguments: SFTConfig, length: int) -> int:
    """Count the bytes that a forward of one row keeps for its backward, beside the model itself."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    unchanged: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # noqa: E731
    device = bare_model(model).device
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    mixed = torch.autocast(device.type, dtype=dtype, enabled=bool(arguments.bf16 or arguments.fp16))
    with torch.enable_grad(), mixed, torch.autograd.graph.saved_tensors_hooks(note, unchanged):
        # Kept alive until all is counted: memory that is given back would be counted once for several tensors.
        hidden = backbone_hidden(model, input_ids=ids)
        total = sum(kept.values())
    del hidden
    return total

"""Estimates the memory of a training step and the size of its checkpoints, from the loaded student and the settings,
before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from distillkit.memory import available_memory
from distillkit.models.head import backbone_hidden, bare_model, chunk_length, elements_of, rows_of
from distillkit.training.config.arguments import recomputing, to_plain_value

if TYPE_CHECKING:
    from trl import SFTConfig

    from distillkit.losses.fused import Objective

__all__ = ["MemoryEstimate", "cache_bytes", "checkpoint_bytes", "checkpointing", "estimate_memory", "optimizer_bytes"]

# Values that an optimiser keeps for each trained parameter, in the parameter's own dtype.
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
# bitsandbytes optimisers: values per parameter, and bytes per value (including the scales of blocks of 256).
_OWN_PRECISION = {
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), (2, 1 + 4 / 256)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), (1, 1 + 4 / 256)),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), (3, 1 + 4 / 256)),
    "paged_adamw_32bit": (2, 4.0),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), (1, 4.0)),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), (3, 4.0)),
}
# Maximum number of simultaneous arrays of a chunk's size: logits, their gradient, and a loss's intermediate values.
_CHUNK_ARRAYS = 3
# Lengths of the forwards that measure activations; two of them separate what grows with the length from what does not.
_PROBES = (16, 48)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training takes on one device.

    Attributes:
        weights: the student's weights.
        teacher: the weights of live teachers that are separate models.
        gradients: gradients of the trained parameters.
        optimizer: optimiser state; None if unknown for this optimiser.
        activations: activations of the longest micro-batch, extrapolated from a few tokens; None if the model is
            sharded, since only all processes together can run it.
        losses: a chunk of logits with its gradient, and float32 gradients of hidden states and head.
        at_hand: available memory for all of these.
        engine: what an engine with a copy of the student holds on to, also while training; 0 without.
        cache: the key-value cache of the student while it writes completions, when there are no activations; 0 if it
            writes none.
    """

    weights: int
    teacher: int
    gradients: int
    optimizer: int | None
    activations: int | None
    losses: int
    at_hand: int
    engine: int = 0
    cache: int = 0

    @property
    def certain(self) -> int:
        """What is known without measuring: weights, gradients, optimiser state, and what an engine holds on to."""
        return self.weights + self.teacher + self.gradients + (self.optimizer or 0) + self.engine

    @property
    def total(self) -> int:
        """Sum of all parts that are known, where they are largest: while training, or while writing completions."""
        return self.certain + max((self.activations or 0) + self.losses, self.cache)


def estimate_memory(
    model: Any,
    arguments: SFTConfig,
    objective: Objective,
    sequence_length: int,
    *,
    teachers: Sequence[Any] = (),
    sharded: bool = False,
) -> MemoryEstimate:
    """Estimate the memory of a training step.

    Args:
        model: the loaded student, on the device it trains on.
        arguments: the trainer's arguments.
        objective: the losses.
        sequence_length: longest row in tokens.
        teachers: the models of live teachers, other than the student's.
        sharded: whether FSDP or DeepSpeed will shard weights, gradients and optimiser state across processes.
    """
    tokens = arguments.per_device_train_batch_size * sequence_length
    head = bare_model(model).get_output_embeddings().weight
    vocabulary, hidden = rows_of(head), bare_model(model).config.get_text_config().hidden_size
    chunk = chunk_length(tokens, vocabulary, head.device, objective.chunk_length)
    head_gradient = vocabulary * hidden if head.requires_grad else 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights, taught = _bytes(model), sum(map(_bytes, teachers))
    return MemoryEstimate(
        weights=weights,
        teacher=taught,
        gradients=sum(map(_size, trained)),
        optimizer=optimizer_bytes(trained, str(to_plain_value(arguments.optim))),
        activations=None if sharded else _activations(model, arguments, tokens),
        losses=4 * (_CHUNK_ARRAYS * chunk * vocabulary + tokens * hidden + head_gradient),
        # Models that are already loaded are no longer part of the free memory.
        at_hand=available_memory(arguments.device) + weights + taught,
    )


@torch.no_grad()
def cache_bytes(model: Any, arguments: SFTConfig, rows: int, tokens: int) -> int:
    """Estimate the bytes of a key-value cache, extrapolated from two short ones.

    Args:
        model: the student.
        arguments: the trainer's arguments.
        rows: sequences that are written at the same time.
        tokens: length of the longest of them, with its prompt.
    """
    short, long = (_cached(model, arguments, length) for length in _PROBES)
    slope = (long - short) / (_PROBES[1] - _PROBES[0])
    return round(rows * (max(short - slope * _PROBES[0], 0.0) + slope * tokens))


def _cached(model: Any, arguments: SFTConfig, length: int) -> int:
    """Count the bytes that a forward of one row caches."""
    bare, training = bare_model(model), model.training
    ids = torch.zeros(1, length, dtype=torch.int64, device=bare.device)
    model.eval()
    with _mixed(bare.device, arguments):
        found = bare(input_ids=ids, use_cache=True)
    # transformers 5.24 gave it another name, and warns of the old one.
    cache = found.cache if hasattr(found, "cache") else found.past_key_values
    model.train(training)
    layers = getattr(cache, "layers", None) or []
    return sum(_size(part) for layer in layers for part in vars(layer).values() if isinstance(part, torch.Tensor))


def _mixed(device: torch.device, arguments: SFTConfig) -> torch.autocast:
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16
    return torch.autocast(device.type, dtype=dtype, enabled=bool(arguments.bf16 or arguments.fp16))


def optimizer_bytes(parameters: list[torch.nn.Parameter], name: str) -> int | None:
    """Estimate the bytes of an optimiser's state; None for an unknown optimiser.

    Args:
        parameters: the trained parameters.
        name: name of the optimiser, as in `training_args.optim`.
    """
    if name in _LIKE_PARAMETERS:
        return _LIKE_PARAMETERS[name] * sum(map(_size, parameters))
    if name in _OWN_PRECISION:
        values, size = _OWN_PRECISION[name]
        return round(values * size * sum(_size(part) // part.element_size() for part in parameters))
    if name == "adafactor":
        # One value per row and per column of a matrix (Shazeer and Stern, "Adafactor", 2018), else one per parameter.
        return 4 * sum(
            part.numel() // part.shape[-1] + part.numel() // part.shape[-2] if part.ndim >= 2 else part.numel()
            for part in parameters
        )
    return None


def checkpoint_bytes(model: Any, optimizer: int | None, *, optimizer_too: bool, merged: bool) -> tuple[int, int]:
    """Return the size in bytes of the saved student, and of one checkpoint.

    Args:
        model: the student; with PEFT adapters, only the adapters are saved in checkpoints.
        optimizer: bytes of the optimiser state, if known.
        optimizer_too: whether checkpoints include the optimiser state.
        merged: whether the saved student is the whole model, into which its adapters are merged.
    """
    adapters = hasattr(model, "peft_config")
    trained, frozen = (
        sum(_size(part) for part in model.parameters() if part.requires_grad is asked) for asked in (True, False)
    )
    each = trained if adapters else trained + frozen
    # Adapters stand beside frozen weights of the model that they become part of.
    return frozen if adapters and merged else each, each + ((optimizer or 0) if optimizer_too else 0)


def _bytes(model: Any) -> int:
    """Bytes of a model's parameters and buffers, counting shared ones once."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(map(_size, tensors.values()))


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor; of the full tensor if DeepSpeed's ZeRO-3 has sharded it."""
    return elements_of(tensor) * tensor.element_size()


# -- activations -------------------------------------------------------------------------------------------------------


def _activations(model: Any, arguments: SFTConfig, tokens: int) -> int:
    """Estimate the bytes of activations that a forward keeps for its backward.

    Extrapolates linearly from two short forwards. Attention that keeps values for every pair of positions (eager
    attention, packed rows without FlashAttention) is therefore underestimated.
    """
    whole = _line(model, arguments, tokens, recomputed=False)
    if not recomputing(arguments)[0]:
        return whole
    layers = getattr(bare_model(model).config.get_text_config(), "num_hidden_layers", 1) or 1
    # The inputs of all layers, and the activations of the one being recomputed.
    return _line(model, arguments, tokens, recomputed=True) + whole // layers


def _line(model: Any, arguments: SFTConfig, tokens: int, *, recomputed: bool) -> int:
    with checkpointing(model, arguments, wanted=recomputed):
        short, long = (_kept(model, arguments, length) for length in _PROBES)
    slope = (long - short) / (_PROBES[1] - _PROBES[0])
    return round(max(short - slope * _PROBES[0], 0.0) + slope * tokens)


@contextmanager
def checkpointing(model: Any, arguments: SFTConfig, *, wanted: bool) -> Iterator[None]:
    """Temporarily put a model in training mode, with or without recomputing activations as the trainer does.

    Args:
        model: the student; its layers only recompute in training mode.
        arguments: the trainer's arguments.
        wanted: whether to recompute activations.
    """
    training = model.training
    model.train()
    if wanted:
        # Before 5.23, transformers calls it gradient checkpointing.
        kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        how = {f"{kind}_checkpointing_kwargs": recomputing(arguments)[1] or None}
        getattr(model, f"{kind}_checkpointing_enable")(**how)
    try:
        yield
    finally:
        if wanted:
            getattr(model, f"{kind}_checkpointing_disable")()
        model.train(training)


def _kept(model: Any, arguments: SFTConfig, length: int) -> int:
    """Count the bytes that a forward of one row keeps for its backward, not counting the model itself."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    unchanged: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor  # noqa: E731
    device = bare_model(model).device
    ids = torch.zeros(1, length, dtype=torch.int64, device=device)
    with torch.enable_grad(), _mixed(device, arguments), torch.autograd.graph.saved_tensors_hooks(note, unchanged):
        # Kept alive until the count is done: reused memory would be counted once for several tensors.
        hidden = backbone_hidden(model, input_ids=ids)
        total = sum(kept.values())
    del hidden
    return total

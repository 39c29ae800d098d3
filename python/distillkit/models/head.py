"""Splits a causal LM into its backbone, which returns hidden states, and the head that turns them into logits.

Capture and the losses apply the head to a slice of positions at a time, so that [batch, sequence, vocabulary] logits
are never materialised. That requires computing the head outside the model's own forward. Most heads are
`hidden @ weight.T`; some model families add a bias, a scale or a soft cap. `LMHead` derives these from the model's
config, and `check_lm_head` compares the result with the model's own logits, so that an unknown kind of head is rejected
instead of silently miscomputed.

Shape legend: B batch, S sequence, N positions of a slice, H hidden size, V width of the head (at least the tokenizer's
vocabulary size).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from distillkit.errors import DistillKitError
from distillkit.memory import total_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "LMHead",
    "backbone_hidden",
    "backbone_layers",
    "bare_model",
    "check_lm_head",
    "chunk_length",
    "elements_of",
    "lm_head_of",
    "logit_chunks",
    "probing",
    "rows_of",
]

# Config attributes that multiply the logits, and those that divide them. They are used by Cohere (`logit_scale`),
# Muse (`output_multiplier`), Falcon-H1 (`lm_head_multiplier`), Granite and MiniCPM3 (`logits_scaling`), Inkling
# (`logits_mup_width_multiplier`).
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
# HyperCLOVA X multiplies by `logits_scaling` instead of dividing by it.
_MULTIPLIES_BY_LOGITS_SCALING = ("hyperclovax",)
# Config attributes for c in a soft cap, c·tanh(logits / c), in this order: Gemma and others, RecurrentGemma, xLSTM.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# For a float32 product, a lower-precision weight is converted in blocks of about this many bytes, never all at once.
_WIDENED_BLOCK_BYTES = 64 * 2**20

# Bounds on the number of logits in a chunk (too few, and the head's weight is read too often), and the fraction of the
# device's memory that a chunk may take in float32.
_MOST_ELEMENTS, _LEAST_ELEMENTS = 2**26, 2**22
_MEMORY_SHARE = 1 / 64


@dataclass(frozen=True)
class LMHead:
    """The output head of a causal LM as a function of hidden states. Created by `lm_head_of`.

    Attributes:
        model: the bare causal LM; the head's weight is looked up on each call, since PEFT and FSDP replace it.
        scale: factor applied to the raw logits (1.0 for most models).
        softcap: c in c·tanh(logits / c), applied after the scale; None for most models.
    """

    model: PreTrainedModel
    scale: float = 1.0
    softcap: float | None = None

    @property
    def size(self) -> int:
        """V, the number of logits per position."""
        return rows_of(_head_module(self.model).weight)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Look up the head's (V, H) weight and (V,) bias (None if it has none), unsharded and differentiable.

        Under FSDP2 this gathers them, so call it once per forward and pass the result for every slice.

        Raises:
            DistillKitError: the head is not a plain linear layer, or carries a LoRA adapter.
        """
        module = _head_module(self.model)
        bias = getattr(module, "bias", None)
        return _whole(module.weight), None if bias is None else _whole(bias)

    def __call__(
        self,
        hidden: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor | None] | None = None,
        *,
        float32_product: bool = False,
    ) -> torch.Tensor:
        """Compute logits, differentiable in the hidden states and weights.

        Args:
            hidden: (..., H) hidden states after the final norm, any float dtype.
            weights: the result of `weights()`; looked up if None.
            float32_product: multiply in float32 even if the weight has a lower precision, in blocks of the vocabulary
                and without gradients. A bfloat16 product rounds logits to 8 significant bits, which noticeably changes
                the distributions.

        Returns:
            (..., V) float32 logits, as the model's own forward would return them.
        """
        weight, bias = self.weights() if weights is None else weights
        if float32_product and weight.dtype != torch.float32:
            return self.finish(_float32_product(hidden.to(weight.device), weight, bias))
        return self.finish(self.product(hidden, (weight, bias)))

    def product(
        self,
        hidden: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor | None],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute raw logits (..., V), in the weight's precision, from hidden states (..., H).

        Args:
            hidden, weights: as for `__call__`.
            out: (N, V) tensor to write the logits of (N, H) hidden states into; not differentiable.
        """
        weight, bias = weights
        hidden = hidden.to(weight.device, weight.dtype)
        if out is None:
            return F.linear(hidden, weight, bias)
        return torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)

    def finish(self, raw: torch.Tensor) -> torch.Tensor:
        """Turn raw logits into the model's float32 logits by applying its scale and soft cap, if any."""
        logits = raw.float() if self.scale == 1.0 else raw.float() * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def logit_chunks(
    positions: int, vocabulary: int, device: torch.device, most: int | None = None
) -> list[tuple[int, int]]:
    """Divide positions into chunks whose logits fit in memory at one time.

    Args:
        positions: N.
        vocabulary: V.
        device: the logits' device. Its total memory determines the chunk size, so runs on one machine are reproducible.
        most: maximum positions per chunk; overrides the choice by memory.

    Returns:
        (start, stop) of each chunk. Chunks have about equal sizes, since a small last one would cost as many passes
        over the weight as a full one.
    """
    length = chunk_length(positions, vocabulary, device, most)
    return [(start, min(start + length, positions)) for start in range(0, positions, max(1, length))]


def chunk_length(positions: int, vocabulary: int, device: torch.device, most: int | None = None) -> int:
    """Return the number of positions in the longest chunk of `logit_chunks`, which has the same arguments."""
    most = most or max(1, _chunk_elements(device) // vocabulary)
    return -(-positions // max(1, -(-positions // most)))


@cache
def _chunk_elements(device: torch.device) -> int:
    """Number of logits per chunk on a device, a power of two."""
    wanted = int(total_memory(device) * _MEMORY_SHARE) // 4
    return max(_LEAST_ELEMENTS, min(_MOST_ELEMENTS, 1 << (wanted.bit_length() - 1)))


def bare_model(model: Any) -> PreTrainedModel:
    """Return the causal LM inside a PEFT wrapper, or the model itself. Adapters in its layers stay active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lm_head_of(model: Any) -> LMHead:
    """Describe a causal LM's head.

    Args:
        model: a transformers causal LM (or a vision-language model with a text head), bare or inside a PEFT wrapper.

    Raises:
        DistillKitError: the head is not a plain linear layer, carries a LoRA adapter, or has a scale or soft cap in the
            config that is not a number.
    """
    bare = bare_model(model)
    _head_module(bare)
    config = bare.config.get_text_config()
    return LMHead(model=bare, scale=_scale(config), softcap=_first_number(config, _SOFTCAPS))


def backbone_hidden(model: Any, **inputs: Any) -> torch.Tensor:
    """Run the model without its head.

    Args:
        model: a causal LM, bare or inside a PEFT wrapper.
        **inputs: arguments of the backbone's forward (`input_ids`, `attention_mask`, `position_ids`, …).

    Returns:
        (B, S, H) hidden states after the final norm. The key-value cache is disabled: with it, packed documents would
        attend to each other.

    Raises:
        DistillKitError: the model has no separate backbone, or the backbone returns no `last_hidden_state`.
    """
    return backbone_layers(model, (), **inputs)[0]


def backbone_layers(model: Any, layers: Sequence[int], **inputs: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run the model without its head, and also return the hidden states of selected layers.

    Args:
        model, **inputs: as for `backbone_hidden`.
        layers: indices into the hidden states as numbered by transformers: 0 is the embeddings' output, n the n-th
            layer's; the last one is after the final norm.

    Returns:
        (B, S, H) final hidden states, and (B, S, H) for each selected layer.

    Raises:
        DistillKitError: as for `backbone_hidden`, or the backbone does not return its layers' hidden states.
    """
    bare = bare_model(model)
    backbone = _backbone(bare)
    if layers:
        inputs["output_hidden_states"] = True
    if not _knows_positions(type(backbone)):
        # That packed documents are then not kept apart is for `distillkit.models.separation` to find.
        inputs.pop("position_ids", None)
    output = backbone(**inputs, use_cache=False)
    hidden, states = getattr(output, "last_hidden_state", None), getattr(output, "hidden_states", None)
    if hidden is None or (layers and states is None):
        missing = "last_hidden_state" if hidden is None else "hidden_states of its layers"
        raise DistillKitError(f"{type(backbone).__name__}, the backbone of {type(bare).__name__}, returns no {missing}")
    before_head = _before_head(bare)
    hidden = hidden if before_head is None else before_head(hidden)
    return hidden, [states[index] for index in layers] if states else []


def _backbone(bare: PreTrainedModel) -> torch.nn.Module:
    """Return the model without its head."""
    # The prefix of Llama 4's text model is that of its place in checkpoints, not the name of its backbone.
    backbone = bare.base_model if bare.base_model is not bare else getattr(bare, "model", None)
    if not isinstance(backbone, torch.nn.Module):
        raise DistillKitError(
            f"{type(bare).__name__} has no separate backbone (base_model_prefix={bare.base_model_prefix!r}); "
            "load a model class with a language-model head, for example through AutoModelForCausalLM"
        )
    return backbone


def _before_head(bare: PreTrainedModel) -> torch.nn.Module | None:
    """Return the layers between the backbone and the head (ModernBERT's dense layer and norm), if there are any."""
    between = getattr(bare, "lm_head", None)
    is_head = between is None or any(module is bare.get_output_embeddings() for module in between.modules())
    return None if is_head else between


def _knows_positions(backbone: Any) -> bool:
    """Return whether a backbone takes position ids; models that carry a state instead of attending may not."""
    parameters = inspect.signature(backbone.forward).parameters
    return "position_ids" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def rows_of(weight: torch.Tensor) -> int:
    """Return the number of rows of an embedding or head, sharded or not."""
    return int(_shape(weight)[0])


def elements_of(tensor: torch.Tensor) -> int:
    """Return the number of values of a parameter or buffer, sharded or not."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def _shape(parameter: torch.Tensor) -> Sequence[int]:
    """Return a parameter's full shape, which DeepSpeed ZeRO-3 stores separately when it empties the tensor."""
    return getattr(parameter, "ds_shape", parameter.shape)


@torch.no_grad()
def check_lm_head(model: Any, forward: Callable[..., Any] | None = None) -> LMHead:
    """Compare the logits computed by `LMHead` with the model's own, on eight token ids.

    Args:
        model: a causal LM, bare or inside a PEFT wrapper.
        forward: function to call for the model's own logits; the model itself by default.

    Returns:
        The verified head.

    Raises:
        DistillKitError: the logits differ, so the head does something that `LMHead` does not reproduce; or as for
            `lm_head_of` and `backbone_hidden`.
    """
    head = lm_head_of(model)
    bare = head.model
    vocabulary = rows_of(bare.get_input_embeddings().weight)
    ids = torch.linspace(0, vocabulary - 1, 8, device=bare.device).round().long().unsqueeze(0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    training = bare.training
    bare.eval()
    try:
        with probing(bare):
            ours = head(backbone_hidden(bare, **inputs))
            theirs = (forward or bare)(**inputs, use_cache=False).logits.float().to(ours.device)
    finally:
        bare.train(training)
    if ours.shape != theirs.shape:
        raise DistillKitError(
            f"{type(bare).__name__} returns logits of shape {tuple(theirs.shape)}, but its head gives "
            f"{tuple(ours.shape)}: this model is not supported"
        )
    # The model may round its product, scale and cap once each in its own dtype, where ours are in float32.
    precision = torch.finfo(next(bare.parameters()).dtype).eps
    allowed = max(1e-4, 4 * precision) * float(theirs.abs().max())
    difference = float((ours - theirs).abs().max())
    if not difference <= allowed:
        raise DistillKitError(
            f"the head of {type(bare).__name__} (model_type {bare.config.model_type!r}) cannot be reproduced: "
            "applied to the hidden states, it "
            f"differs from the model's own logits by {difference:.3g} (allowed {allowed:.3g}; scale {head.scale:g}, "
            f"soft cap {head.softcap}). "
            "This model transforms its logits in a way that distillkit does not know"
        )
    return head


@contextmanager
def probing(bare: PreTrainedModel) -> Iterator[None]:
    """Turn what a model raises on a few ordinary token ids into one error: it needs other inputs, or is broken."""
    try:
        yield
    except (DistillKitError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise DistillKitError(
            f"{type(bare).__name__} (model_type {bare.config.model_type!r}) cannot be run on token ids alone: "
            f"{type(error).__name__}: {error}. This model is not supported"
        ) from error


def _head_module(bare: PreTrainedModel) -> torch.nn.Linear:
    """Return the model's output layer: a linear layer, or PEFT's full trainable copy of one."""
    module: Any = bare.get_output_embeddings()
    name = type(bare).__name__
    if module is None:
        raise DistillKitError(
            f"{name} has no output head; load a model class with a language-model head, for example "
            "AutoModelForCausalLM"
        )
    peft = sys.modules.get("peft")
    if peft is not None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper

        if isinstance(module, BaseTunerLayer):
            raise DistillKitError(
                f"the head of {name} has a PEFT adapter ({type(module).__name__}), which is not part of its weight: "
                "remove 'lm_head' from target_modules, or add it to modules_to_save to train the full head"
            )
        if isinstance(module, ModulesToSaveWrapper):
            trained = module.active_adapters and not module.disable_adapters
            module = module.modules_to_save[module.active_adapters[0]] if trained else module.original_module
    if (
        not isinstance(module, torch.nn.Linear)
        or not module.weight.is_floating_point()
        or len(_shape(module.weight)) != 2
    ):
        weight = getattr(module, "weight", None)
        found = (
            type(module).__name__
            if weight is None
            else f"{type(module).__name__} with a {weight.dtype} weight {tuple(weight.shape)}"
        )
        raise DistillKitError(
            f"the head of {name} is {found}; it must be a linear layer with a float weight (leave the head unquantised)"
        )
    return module


def _scale(config: Any) -> float:
    """Return the factor that the config applies to the logits."""
    factor = _first_number(config, _MULTIPLIERS)
    divisor = _first_number(config, _DIVISORS)
    if divisor is not None:
        if config.model_type in _MULTIPLIES_BY_LOGITS_SCALING:
            return (1.0 if factor is None else factor) * divisor
        return (1.0 if factor is None else factor) / divisor
    return 1.0 if factor is None else factor


def _first_number(config: Any, names: tuple[str, ...]) -> float | None:
    """Return the first of the named config attributes that is set."""
    for name in names:
        value = getattr(config, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise DistillKitError(f"{type(config).__name__}.{name} is {value!r}; expected a number or null")
        return float(value)
    return None


def _whole(parameter: Any) -> torch.Tensor:
    """Gather a parameter sharded by FSDP2; return others unchanged."""
    if not hasattr(parameter, "full_tensor"):
        return parameter  # type: ignore[no-any-return]
    from torch.distributed.tensor import Partial

    if parameter.device_mesh.ndim != 1:
        raise DistillKitError(
            f"the head's weight is sharded over a mesh of {parameter.device_mesh.ndim} dimensions; only plain FSDP2 "
            "(one dimension) is supported"
        )
    # Without this placement, the gradient of the gathered weight would not be reduced over the processes.
    return parameter.full_tensor(grad_placements=[Partial("avg")])  # type: ignore[no-any-return]


def _float32_product(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute hidden (..., H) times a lower-precision weight (V, H), plus bias, in float32: (..., V)."""
    with torch.no_grad():
        flat = hidden.reshape(-1, hidden.shape[-1]).float()
        logits = torch.empty(flat.shape[0], weight.shape[0], dtype=torch.float32, device=flat.device)
        block = max(1, _WIDENED_BLOCK_BYTES // (4 * weight.shape[1]))
        for start in range(0, weight.shape[0], block):
            logits[:, start : start + block] = flat @ weight[start : start + block].float().T
        if bias is not None:
            logits += bias.float()
    return logits.view(*hidden.shape[:-1], weight.shape[0])

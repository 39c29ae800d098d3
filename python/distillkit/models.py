"""The student: loading it as the configuration says, and computing the losses inside its forward."""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput

from distillkit.errors import ConfigError
from distillkit.layers import LayerMatching
from distillkit.lm_head import LMHead, backbone_layers, check_lm_head
from distillkit.losses.fused import Objective
from distillkit.losses.positions import Targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from distillkit.config import RunConfig

__all__ = [
    "DistillationInputs",
    "DistillationOutput",
    "attach_losses",
    "attention_implementation",
    "freeze",
    "load_student",
    "widen_embeddings",
]

logger = logging.getLogger(__name__)

_FLASH = "flash_attention_2"


@dataclass(frozen=True)
class DistillationInputs:
    """What the student's forward needs to compute losses instead of logits.

    Attributes:
        rows: (N,) int64, counted positions of the flattened batch.
        targets: of those positions.
        objective: the losses.
    """

    rows: torch.Tensor
    targets: Targets
    objective: Objective


@dataclass
class DistillationOutput(ModelOutput):  # type: ignore[misc]
    """What the student's forward then returns: small, since mixed precision copies every output to float32.

    Attributes:
        loss: float32 scalar, the weighted losses summed over positions.
        statistics: float32 sums over positions, by `Objective.names`.
    """

    # ModelOutput wants defaults; both are always there.
    loss: torch.Tensor = None  # type: ignore[assignment]
    statistics: torch.Tensor = None  # type: ignore[assignment]


def attach_losses(model: PreTrainedModel, matching: LayerMatching | None = None) -> LMHead:
    """Let `model(**inputs, distill=DistillationInputs(…))` return losses. Without `distill` the model is as before.

    Done on the bare model before anything wraps it. Whatever wrapper is called then (DDP, FSDP, autocast), hidden
    states and head are at hand inside it, its hooks run, and no logits of a whole batch leave the forward.

    Args:
        model: the bare student.
        matching: which of its hidden states are compared with the teacher's, if any are.

    Returns:
        The model's head, as checked against its logits.

    Raises:
        DistillKitError: the head can't be applied apart from the model.
    """
    head = check_lm_head(model)
    original = model.forward
    wanted = () if matching is None else matching.student_layers

    # The signature stays: generate() and the Trainer read it.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, distill: DistillationInputs | None = None, **inputs: Any) -> Any:
        if distill is None:
            return original(*args, **inputs)
        hidden, states = backbone_layers(self, wanted, **inputs)
        counted = [each.flatten(0, 1)[distill.rows] for each in (hidden, *states)]
        layers = () if matching is None else zip(matching.project(counted[1:]), distill.targets.hidden, strict=True)
        result = distill.objective(head, counted[0], distill.targets, tuple(layers))
        return DistillationOutput(loss=result.loss, statistics=result.statistics)

    model.forward = types.MethodType(forward, model)
    return head


def load_student(config: RunConfig, vocab_size: int) -> PreTrainedModel:
    """Load the student as the configuration says.

    Weights are float32 unless `model_kwargs.dtype` says otherwise, or bfloat16 with FlashAttention, which needs 16
    bits.

    Args:
        config: the run.
        vocab_size: ids the tokenizer can produce.

    Returns:
        The model, with `requires_grad` set on what is trained.

    Raises:
        ConfigError: it can't be loaded, or a setting does not fit it.
    """
    from transformers import AutoModelForCausalLM

    arguments = dict(config.model_kwargs)
    attention = attention_implementation(config)
    if attention is not None:
        arguments["attn_implementation"] = attention
    arguments.setdefault("dtype", "bfloat16" if attention == _FLASH else "float32")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            config.model, trust_remote_code=config.trust_remote_code, **arguments
        )
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise ConfigError(
            f"{config.source}: model: {config.model!r} can not be loaded with {arguments}: {error}"
        ) from error
    if config.resize_embeddings_to_multiple_of is not None:
        widen_embeddings(model, vocab_size, config.resize_embeddings_to_multiple_of)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows < vocab_size:
        raise ConfigError(
            f"{config.source}: model: {config.model} has embeddings for {rows:,} ids, its tokenizer makes "
            f"{vocab_size:,}; set resize_embeddings_to_multiple_of to widen them"
        )
    freeze(model, config.frozen_modules, config.frozen_res)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if not trained:
        raise ConfigError(f"{config.source}: frozen_modules and frozen_res leave nothing to train")
    logger.info(
        "student %s: %s, %s parameters (%s trained), %s, %s attention",
        config.model,
        type(model).__name__,
        f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        f"{trained:,}",
        str(model.dtype).removeprefix("torch."),
        model.config._attn_implementation,
    )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.sequence_length > longest:
        logger.warning(
            "sequence_length %s is more than the student's max_position_embeddings, %s", config.sequence_length, longest
        )
    return model


def attention_implementation(config: RunConfig) -> str | None:
    """Decide which attention the student gets.

    Returns:
        A name for `attn_implementation`, or None to leave the choice to `model_kwargs`.

    Raises:
        ConfigError: FlashAttention is demanded and can't run here, or two settings contradict each other.
    """
    wanted, named = config.use_flash_attention, config.model_kwargs.get("attn_implementation")
    if named is not None:
        if wanted is not None and wanted != str(named).startswith("flash"):
            raise ConfigError(
                f"{config.source}: use_flash_attention: {str(wanted).lower()} contradicts "
                f"model_kwargs.attn_implementation: {named!r}; give one"
            )
        return None
    if wanted is False:
        return "sdpa"
    missing = _why_no_flash_attention()
    if missing is None:
        return _FLASH
    if wanted:
        raise ConfigError(
            f"{config.source}: use_flash_attention: true, but {missing}. Install it (`pip install flash-attn "
            "--no-build-isolation`, on a machine with a CUDA GPU), or set use_flash_attention: false to use "
            "PyTorch's scaled dot-product attention"
        )
    logger.info("FlashAttention is not used (%s): PyTorch's scaled dot-product attention (sdpa) instead", missing)
    return "sdpa"


def _why_no_flash_attention() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    return None


def widen_embeddings(model: PreTrainedModel, vocab_size: int, multiple: int) -> None:
    """Widen embeddings and head to a multiple of `multiple` that holds `vocab_size` ids; never narrow them.

    The tokenizer's vocabulary is often smaller than the checkpoint's padded head, and a teacher may have put
    probability on those rows.
    """
    size = model.get_input_embeddings().weight.shape[0]
    wanted = -(-max(size, vocab_size) // multiple) * multiple
    if wanted != size:
        model.resize_token_embeddings(wanted)
        logger.info("embeddings and head widened from %s to %s rows", f"{size:,}", f"{wanted:,}")


def freeze(model: torch.nn.Module, modules: list[str], expressions: list[str]) -> None:
    """Stop some parameters from being trained.

    Args:
        modules: exact names of modules, as `named_modules` has them.
        expressions: regular expressions, searched in the names of parameters.

    Raises:
        ConfigError: there is no such module, or an expression matches nothing.
    """
    from distillkit.config import nearest

    known = dict(model.named_modules())
    for name in modules:
        if name not in known or not name:
            raise ConfigError(f"frozen_modules: the student has no module {name!r}{nearest(name, known)}")
        known[name].requires_grad_(False)
    for expression in expressions:
        matched = [parameter for name, parameter in model.named_parameters() if re.search(expression, name)]
        if not matched:
            example = next((name for name, _ in model.named_parameters()), "none")
            raise ConfigError(f"frozen_res: {expression!r} matches no parameter's name (they look like {example!r})")
        for parameter in matched:
            parameter.requires_grad_(False)

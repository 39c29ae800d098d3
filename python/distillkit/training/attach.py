"""Computes the losses inside the student's forward."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput

from distillkit.losses.fused import Objective, PositionDetails
from distillkit.losses.positions import Targets
from distillkit.models.head import LMHead, backbone_layers, bare_model, check_lm_head, lm_head_of
from distillkit.models.layers import LayerMatching

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["DistillationInputs", "DistillationOutput", "attach_losses", "needs_gpu"]


class DistillationInputs:
    """What the student's forward needs to compute losses instead of logits.

    Not a dataclass: under mixed precision, FSDP2 casts every tensor among a forward's arguments, even inside
    dataclasses, which would round the teacher's log-probs to bfloat16.

    Attributes:
        rows: (N,) int64, counted positions of the flattened batch.
        targets: targets of those positions.
        objective: the losses.
    """

    def __init__(self, rows: torch.Tensor, targets: Targets, objective: Objective) -> None:
        self.rows = rows
        self.targets = targets
        self.objective = objective


@dataclass
class DistillationOutput(ModelOutput):  # type: ignore[misc]
    """What the student's forward returns with losses: small, since mixed precision copies every output to float32.

    Attributes:
        loss: float32 scalar, the weighted losses summed over positions.
        statistics: float32 sums over positions, by `Objective.names`.
        details: in evaluation, the details of the positions; otherwise None.
    """

    # ModelOutput requires defaults; the first two fields are always set.
    loss: torch.Tensor = None  # type: ignore[assignment]
    statistics: torch.Tensor = None  # type: ignore[assignment]
    details: PositionDetails | None = None


def attach_losses(
    model: PreTrainedModel | PeftModel,
    matching: LayerMatching | None = None,
    check: Callable[[], None] | None = None,
) -> LMHead:
    """Make `model(**inputs, distill=DistillationInputs(…))` return losses; without `distill` the model is unchanged.

    This extends the bare model (inside PEFT's wrapper) before anything else wraps it. Whatever wrapper is then called
    (DDP, FSDP, autocast), its hooks run, hidden states and head are available inside it, and the logits of an entire
    batch never leave the forward.

    Args:
        model: the student.
        matching: which of its hidden states are compared with the teacher's, if any.
        check: what else to check, when the head is.

    Returns:
        The model's head, checked against its logits.

    Raises:
        DistillKitError: the head cannot be applied apart from the model, or what `check` raises.
    """
    model = bare_model(model)
    original = model.forward
    # ZeRO-3 sharded the weights while loading them, and FlashAttention only runs once the weights are on a GPU: the
    # checks must then wait for the first forward.
    checked = not _shard_head(model) and not needs_gpu(model)
    head = check_lm_head(model) if checked else lm_head_of(model)
    if checked and check is not None:
        check()
    wanted = () if matching is None else matching.student_layers

    # Keeps the signature, which generate() and the Trainer inspect.
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, distill: DistillationInputs | None = None, **inputs: Any) -> Any:
        nonlocal checked
        if distill is None:
            return original(*args, **inputs)
        if not checked:
            check_lm_head(self, original)
            if check is not None:
                check()
            checked = True
        hidden, states = backbone_layers(self, wanted, **inputs)
        counted = [each.flatten(0, 1)[distill.rows] for each in (hidden, *states)]
        layers = () if matching is None else zip(matching.project(counted[1:]), distill.targets.hidden, strict=True)
        result = distill.objective(head, counted[0], distill.targets, tuple(layers))
        return DistillationOutput(loss=result.loss, statistics=result.statistics, details=result.details)

    model.forward = types.MethodType(forward, model)
    return head


def needs_gpu(model: PreTrainedModel) -> bool:
    """Return whether a model cannot run before it is moved to a GPU."""
    return str(model.config._attn_implementation).startswith("flash") and model.device.type == "cpu"


def _shard_head(model: PreTrainedModel) -> bool:
    """Return whether DeepSpeed's ZeRO-3 has sharded the model; if so, have the head's parameters gathered for the
    model's forward and backward, which use them outside of the head's own forward."""
    head = model.get_output_embeddings()
    if head is None or not hasattr(head.weight, "ds_id"):
        return False
    import deepspeed

    for parameter in head.parameters():
        deepspeed.zero.register_external_parameter(model, parameter)
    return True

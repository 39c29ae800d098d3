"""The student's weights as another engine loads them, and a check that it has.

Shape legend: L tokens of a prompt, M of its completion.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import SAFE_WEIGHTS_NAME

from distillkit.errors import DistillKitError
from distillkit.models.head import bare_model
from distillkit.training.rollouts.engine import Student

__all__ = ["PROBE_TOKENS", "check_weights", "checkpoint_weights", "write_folder", "write_weights"]

PROBE_TOKENS = 16
"""Tokens by which it is checked that an engine has the student's weights."""

# Engines that compute in bfloat16 are up to 0.05 from transformers, other weights usually more than 1.
_MOST_APART = 0.1


def checkpoint_weights(model: Any) -> dict[str, torch.Tensor]:
    """Return the student's weights under the names, and in the shapes, that its checkpoints have, with adapters merged.

    The student stays as it is: adapters are merged into copies, which are in main memory. All other tensors are the
    student's own.

    Args:
        model: the student; may have adapters.

    Raises:
        DistillKitError: an adapter is not finite, so that it cannot be merged.
    """
    bare = bare_model(model)
    weights = {name: tensor.detach() for name, tensor in bare.state_dict().items()}
    if bare is not model:
        for name, layer in _replaced_layers(bare):
            weights = {key: tensor for key, tensor in weights.items() if not key.startswith(f"{name}.")}
            weights |= {f"{name}.{part}": tensor for part, tensor in _merged(name, layer).items()}
    return dict(revert_weight_conversion(bare, remove_tied_weights_from_state_dict(weights, bare)))


def _replaced_layers(bare: Any) -> Iterator[tuple[str, Any]]:
    """Yield the layers that PEFT has put in place of the model's own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    inside: list[str] = []
    for name, module in bare.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and not name.startswith(tuple(inside)):
            inside.append(f"{name}.")
            yield name, module


def _merged(name: str, layer: Any) -> dict[str, torch.Tensor]:
    """Return the weights of the layer that would be there after merging. Merging, and undoing that, would round the
    student's own weights; they are put back as they were."""
    if hasattr(layer, "modules_to_save"):
        return dict(layer.modules_to_save[layer.active_adapters[0]].state_dict())
    adapter = getattr(layer, "token_adapter", layer)
    base = adapter.get_base_layer()
    own = {part: parameter.data for part, parameter in base.named_parameters()}
    try:
        adapter.merge(safe_merge=True)
        return {part: parameter.detach().cpu() for part, parameter in base.named_parameters()}
    except ValueError as error:
        raise DistillKitError(f"rollouts: the adapter of {name} cannot be merged: {error}") from error
    finally:
        for part, parameter in base.named_parameters():
            parameter.data = own[part]
        adapter.merged_adapters.clear()


def write_folder(student: Student, folder: Path) -> None:
    """Write what an engine needs to know of the student besides its weights: config and tokenizer."""
    bare_model(student.model).config.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)


def write_weights(student: Student, folder: Path) -> None:
    """Write the student's weights, in its dtype, as one file that takes the place of the one before at once.

    Raises:
        OSError: the disk is full.
    """
    weights = {
        name: tensor.to("cpu", student.dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in checkpoint_weights(student.model).items()
    }
    partial = folder / f"{SAFE_WEIGHTS_NAME}.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(folder / SAFE_WEIGHTS_NAME)


@torch.no_grad()
def check_weights(student: Student, written: npt.NDArray[np.int32], logprobs: list[float], *, engine: str) -> float:
    """Check that an engine has the student's weights, by the log-probabilities that both give the same tokens.

    Args:
        student: the student, and the prompt.
        written: (M,) the most probable tokens after it, as the engine writes them.
        logprobs: (M,) the engine's log-probabilities of these.
        engine: what the message calls it.

    Returns:
        How far apart the log-probabilities are, in nats, on average.

    Raises:
        DistillKitError: they are too far apart.
    """
    model, prompt = student.model, student.probe
    bare, training = bare_model(model), model.training
    ids = torch.from_numpy(np.concatenate([prompt, written])).long().unsqueeze(0).to(bare.device)
    model.eval()
    logits = bare(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    model.train(training)
    own = logits.float().log_softmax(-1).gather(1, ids[0, len(prompt) :].unsqueeze(1)).squeeze(1).cpu().numpy()
    found = np.array(logprobs, dtype=np.float64)
    apart = float(np.abs(found - own).mean())
    if not apart <= _MOST_APART:
        raise DistillKitError(
            f"rollouts.engine: {engine} does not have the student's weights, although it was given them: of "
            f"{len(written)} tokens that it wrote, its log-probabilities are {apart:.3g} nats from the student's on "
            f"average (at most {_MOST_APART:g} is expected of rounding); the first: {found[0]:.4f} against "
            f"{own[0]:.4f}. Another model, quantised weights or processed log-probabilities give such a difference; "
            "engine: hf needs no second copy of the weights"
        )
    return apart

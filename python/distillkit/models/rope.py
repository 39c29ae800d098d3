"""Rotary embeddings whose frequencies depend on the length of a sequence: `longrope` (Phi-3 and others) has two sets of
frequencies, for lengths up to `original_max_position_embeddings` and beyond; `dynamic` (NTK) has other ones for each
length beyond `max_position_embeddings`.

Transformers chooses them by the longest sequence of a batch, and `dynamic` even by earlier batches. A document would
then get other hidden states beside longer ones than alone. Here, each document gets those of its own length.

Shape legend: B rows, S their common length, D rotary dimensions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from distillkit.errors import DistillKitError
from distillkit.models.head import bare_model

__all__ = ["choose_frequencies_by_document", "frequencies_change_after"]


def frequencies_change_after(model: Any) -> int | None:
    """Return the length up to which all documents get the same frequencies; None if all lengths do."""
    limits = [limit for module in bare_model(model).modules() for _, limit in _limits(module)]
    return min(limits, default=None)


def choose_frequencies_by_document(model: Any) -> None:
    """Make the model's rotary embeddings choose frequencies by the length of each document, instead of by the batch.

    The model must then be run with `position_ids` in which each document, and padding, starts at 0.

    Raises:
        DistillKitError: the model has such embeddings, but not those of transformers.
    """
    bare = bare_model(model)
    config = bare.config.get_text_config()
    dependent = [module for module in bare.modules() if any(True for _ in _limits(module))]
    declared = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = declared.get("rope_type", declared.get("type"))
    if not dependent and isinstance(kind, str) and ("dynamic" in kind or kind in ("longrope", "su")):
        raise DistillKitError(
            f"{type(bare).__name__} has {kind} rotary embeddings, whose frequencies depend on the longest document of "
            "a batch, but not in the way that transformers implements them. Load the model with transformers' own "
            "code (trust_remote_code: false)"
        )
    for module in dependent:
        module.forward = _by_document(module)


def _limits(module: Any) -> Iterator[tuple[str | None, int]]:
    """Yield the layer types (None: all) whose frequencies a rotary embedding takes by length, and up to which length
    they are the same."""
    kinds = getattr(module, "rope_type", None)
    parameters = getattr(getattr(module, "config", None), "rope_parameters", None)
    if parameters is None or not isinstance(kinds, (str, dict)):
        return
    for layer_type, kind in {None: kinds}.items() if isinstance(kinds, str) else kinds.items():
        if kind == "longrope":
            own = parameters if layer_type is None else parameters[layer_type]
            yield layer_type, int(own["original_max_position_embeddings"])
        elif "dynamic" in kind:
            yield layer_type, int(module.original_max_seq_len)


def _by_document(module: Any) -> Callable[..., Any]:
    """Extend a rotary embedding's forward."""
    original, limits = module.forward, dict(_limits(module))
    kinds = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}

    @functools.wraps(original)
    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:
        named = {} if layer_type is None else {"layer_type": layer_type}
        limit = limits.get(layer_type)
        if limit is None:
            return original(x, position_ids, **named)
        lengths = _document_lengths(position_ids)
        if kinds[layer_type] == "longrope":
            beyond = torch.cat([position_ids, torch.full_like(position_ids[..., :1], limit)], dim=-1)
            short = _cut(original(x, _up_to(position_ids, limit), **named))
            return _chosen(lengths > limit, _cut(original(x, beyond, **named)), short)
        found = None
        for length in sorted(set(lengths.clamp(min=limit).flatten().tolist())):
            original(x, torch.zeros_like(position_ids[..., :1]), **named)  # forgets the longest length so far
            these = _cut(original(x, _up_to(position_ids, length), **named))
            found = these if found is None else _chosen(lengths == length, these, found)
        return found

    return forward


def _up_to(position_ids: torch.Tensor, length: int) -> torch.Tensor:
    """Limit the positions to a length, and append one so that there is a position of just that length."""
    last = torch.full_like(position_ids[..., :1], length - 1)
    return torch.cat([position_ids.clamp(max=length - 1), last], dim=-1)


def _cut(embeddings: Any) -> Any:
    """Remove the appended position: cosines and sines (B, S + 1, D), or one complex tensor of that shape."""
    return tuple(each[..., :-1, :] for each in embeddings) if isinstance(embeddings, tuple) else embeddings[..., :-1, :]


def _chosen(where: torch.Tensor, these: Any, others: Any) -> Any:
    if isinstance(these, tuple):
        return tuple(torch.where(where[..., None], *pair) for pair in zip(these, others, strict=True))
    return torch.where(where[..., None], these, others)


def _document_lengths(position_ids: torch.Tensor) -> torch.Tensor:
    """Return the length of each position's document, (B, S): a document ends where positions do not go up by one."""
    starts = torch.ones_like(position_ids)
    starts[..., 1:] = position_ids.diff(dim=-1) != 1
    document = starts.cumsum(-1) - 1
    lengths = torch.zeros_like(position_ids).scatter_reduce(-1, document, position_ids + 1, "amax")
    return lengths.gather(-1, document)

"""Copies of a model with some of its layers: which layers a model has, their settings in its config, and whether a
layer of the copy computes what the original's does.

Nothing here knows an architecture by name. A layer list is told by its length changing with the config's number of
layers, and each layer of the copy is compared with its original, so that what the config cannot express is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from distillkit.errors import ConfigError

__all__ = ["Layers", "evenly_spread", "with_layers"]

# A list of as many values as there are layers has one for each (layer_types, no_rope_layers, intermediate_size, …),
# unless its name says otherwise: a small model may have as many end-of-sequence tokens.
_OF_NO_LAYER = re.compile(r"token|limit|factor|architectures")
# Settings that list layers by their index, and those that say at which layer something begins or ends.
_INDICES = ("mlp_only_layers", "moe_layers", "hybrid_layer_ids")
_BOUNDARIES = ("first_k_dense_replace", "num_dense_layers", "max_window_layers", "moe_layer_start_index")
# Attributes by which a layer knows its own place.
_PLACES = ("layer_idx", "layer_id", "layer_index", "layer_number", "block_idx")


def evenly_spread(count: int, depth: int) -> list[int]:
    """Return `count` of `depth` layers, evenly spread, the first and the last among them.

    Example:
        >>> evenly_spread(8, 30)
        [0, 4, 8, 12, 17, 21, 25, 29]
    """
    return [0] if count == 1 else [round(index * (depth - 1) / (count - 1)) for index in range(count)]


def with_layers(config: Any, kept: Sequence[int]) -> Any:
    """Return a copy of a model's config with only these layers: their number, and settings that are given by layer.

    Args:
        config: a transformers config; in that of a vision-language model, the text model's layers are meant.
        kept: indices of layers, ascending.
    """
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    depth = int(text.num_hidden_layers)
    updates: dict[str, Any] = {}
    for name, value in vars(text).items():
        if name in _INDICES and isinstance(value, (list, tuple)):
            updates[name] = [new for new, old in enumerate(kept) if old in value]
        elif name in _BOUNDARIES and isinstance(value, int):
            updates[name] = sum(old < value for old in kept)
        elif isinstance(value, (list, tuple)) and len(value) == depth and not _OF_NO_LAYER.search(name):
            updates[name] = [value[old] for old in kept]
    text.num_hidden_layers = len(kept)
    for name, value in updates.items():
        setattr(text, name, value)
    return changed


class Layers:
    """Where the layers of a model are, and which of them a copy has.

    Args:
        model: a model; its weights are not needed.
        copied: a model of the same class, with the config that `with_layers` returned; without weights, too.
        depth: the model's number of layers.
        kept: those that the copy has.

    Attributes:
        lists: names of the module lists that hold the layers; several if each has a part of every layer.

    Raises:
        ConfigError: the layers cannot be told apart, or one of the copy's would compute something else than the
            original; the message names the first module that differs.
    """

    def __init__(self, model: torch.nn.Module, copied: torch.nn.Module, depth: int, kept: Sequence[int]) -> None:
        self.depth, self.kept = depth, list(kept)
        self.lists = self._find(model, copied)
        self._check(model, copied)

    def _find(self, model: torch.nn.Module, copied: torch.nn.Module) -> list[str]:
        others = dict(copied.named_modules())
        found: list[str] = []
        for name, module in model.named_modules():
            if not isinstance(module, torch.nn.ModuleList) or len(module) != self.depth:
                continue
            other = others.get(name)
            outermost = not any(name.startswith(f"{outer}.") for outer in found)
            if outermost and isinstance(other, torch.nn.ModuleList) and len(other) == len(self.kept):
                found.append(name)
        if not found:
            raise ConfigError(
                f"the layers of {type(model).__name__} cannot be told apart: it has no list of {self.depth} modules "
                f"that becomes one of {len(self.kept)} with num_hidden_layers"
            )
        return found

    def original_name(self, name: str) -> str:
        """Return the name that a module or parameter of the copy has in the original."""
        for prefix in self.lists:
            index, _, rest = name.removeprefix(f"{prefix}.").partition(".")
            if name.startswith(f"{prefix}.") and index.isdecimal():
                return f"{prefix}.{self.kept[int(index)]}" + (f".{rest}" if rest else "")
        return name

    def original_value(self, value: torch.Tensor, shape: torch.Size) -> torch.Tensor | None:
        """Return the part of an original tensor that a tensor of the copy has, or None if their shapes do not fit.

        A tensor outside of the layers may have values for each of them side by side, as Gemma's embeddings by layer.
        """
        if value.shape == shape:
            return value
        axis = self._axis_of_layers(value.shape, shape)
        if axis is None:
            return None
        by_layer = value.reshape(*value.shape[:axis], self.depth, -1, *value.shape[axis + 1 :])
        return by_layer.index_select(axis, torch.tensor(self.kept, device=value.device)).reshape(shape)

    def _axis_of_layers(self, original: torch.Size, shape: torch.Size) -> int | None:
        """Return the axis along which a tensor has as many values for each layer, if all other axes are alike."""
        if len(original) != len(shape):
            return None
        differing = [axis for axis in range(len(shape)) if original[axis] != shape[axis]]
        if len(differing) != 1:
            return None
        before, after = original[differing[0]], shape[differing[0]]
        by_layer = before % self.depth == 0 and before // self.depth * len(self.kept) == after
        return differing[0] if by_layer else None

    def _check(self, model: torch.nn.Module, copied: torch.nn.Module) -> None:
        """Compare each module of the copy with its original: their classes, shapes and, in layers, their settings."""
        originals = dict(model.named_modules())
        for name, module in copied.named_modules():
            if isinstance(module, torch.nn.ModuleList):
                continue
            source = self.original_name(name)
            ours, theirs = dict(_facts(module)), dict(_facts(originals[source])) if source in originals else {}
            for key, value in ours.items():
                other = theirs.get(key, "missing")
                if value != other and not self._is_expected(name, value, other):
                    raise ConfigError(
                        f"layers: {name or 'the model'}: {key} would be {value!r}, but is {other!r} in the teacher's "
                        f"{source or 'model'}: what this architecture ({type(model).__name__}) does depends on a "
                        "layer's place; choose layers for which it is the same"
                    )

    def _is_expected(self, name: str, value: Any, other: Any) -> bool:
        """Whether a difference outside of the layers comes with their number."""
        if any(name.startswith(f"{prefix}.") for prefix in self.lists):
            return False
        if isinstance(value, torch.Size) and isinstance(other, torch.Size):
            return self._axis_of_layers(other, value) is not None
        return not isinstance(value, (torch.Size, str)) and other != "missing"


def _facts(module: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what decides what a module computes apart from its weights: class, shapes, and plain settings."""
    yield "its class", type(module).__name__
    tensors: Mapping[str, torch.Tensor | None] = {**module._parameters, **module._buffers}
    for name, value in tensors.items():
        yield name, None if value is None else value.shape
    for name, value in vars(module).items():
        plain = value is None or isinstance(value, (bool, int, float, str))
        if plain and not name.startswith("_") and name not in (*_PLACES, "training"):
            yield name, value

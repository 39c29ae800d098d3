"""Matches the student's layers with the teacher's, and projects between their hidden sizes.

Hidden states are numbered as in transformers: 0 is the embeddings' output, n the n-th layer's; the last one is after
the final norm. Negative numbers count from the end.

Shape legend: B batch, S sequence, N counted positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from distillkit.errors import ConfigError
from distillkit.models.head import bare_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "LayerMatching",
    "exported",
    "layer_pairs",
    "load_projections",
    "match_layers",
    "save_projections",
    "without_projections",
]

# The projections are part of the student during training, so that the optimiser, DDP and FSDP handle them.
_NAME = "distillkit_projections"
_FILE = "distillkit_projections.safetensors"


class LayerMatching:
    """Pairs of a student's and a teacher's hidden states. Created by `match_layers`.

    Attributes:
        pairs: (student index, teacher index) pairs.
        model: the bare student, which holds the projections.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], model: PreTrainedModel) -> None:
        self.pairs = tuple(pairs)
        self.model = model

    @property
    def student_layers(self) -> tuple[int, ...]:
        """Indices of the student's hidden states, one per pair."""
        return tuple(student for student, _ in self.pairs)

    @property
    def teacher_layers(self) -> tuple[int, ...]:
        """Indices of the teacher's hidden states, one per pair."""
        return tuple(teacher for _, teacher in self.pairs)

    def project(self, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Project the student's hidden states (N, H), one per pair, to the teacher's size."""
        projections = getattr(self.model, _NAME, None)
        if projections is None:
            return list(states)
        return [layer(state.to(layer.weight.dtype)) for layer, state in zip(projections, states, strict=True)]


def match_layers(
    mapping: Sequence[tuple[int, int]] | Literal["all"], student: Any, teacher: Any, *, force_projection: bool = False
) -> LayerMatching:
    """Match a student's hidden states with a teacher's; if their sizes differ, give the student a projection per pair.

    A projection is linear, without bias, from the student's size to the teacher's, initialised as in Glorot and Bengio,
    "Understanding the difficulty of training deep feedforward neural networks", 2010, eq. 16.

    Args:
        mapping: pairs of indices, or "all" to pair states of the same index in models of equal depth.
        student, teacher: the models, bare or with adapters.
        force_projection: project even if the sizes are equal.

    Raises:
        ConfigError: an index is out of range, or "all" does not fit.
    """
    bare, configs = bare_model(student), [bare_model(model).config.get_text_config() for model in (student, teacher)]
    pairs = layer_pairs(mapping, *configs)
    sizes = [int(config.hidden_size) for config in configs]
    if force_projection or sizes[0] != sizes[1]:
        linears = [torch.nn.Linear(sizes[0], sizes[1], bias=False) for _ in pairs]
        for linear in linears:
            torch.nn.init.xavier_uniform_(linear.weight)
        setattr(bare, _NAME, torch.nn.ModuleList(linears).to(bare.device, bare.dtype))
    return LayerMatching(pairs, bare)


def layer_pairs(
    mapping: Sequence[tuple[int, int]] | Literal["all"], student: Any, teacher: Any
) -> Sequence[tuple[int, int]]:
    """Return the pairs of hidden states that a mapping means.

    Args:
        mapping: as for `match_layers`.
        student, teacher: the text configs of the models.

    Raises:
        ConfigError: an index is out of range, or "all" does not fit.
    """
    depths = [int(config.num_hidden_layers) for config in (student, teacher)]
    if mapping == "all":
        if depths[0] != depths[1]:
            raise ConfigError(
                f"layer_mapping: 'all' needs models of equal depth, but the student has {depths[0]} layers and the "
                f"teacher {depths[1]}. Give pairs of [student layer, teacher layer], such as {_spread(*depths)}"
            )
        return [(i, i) for i in range(depths[0] + 1)]
    for pair in mapping:
        for index, depth, whose in zip(pair, depths, ("student", "teacher"), strict=True):
            if not -depth - 1 <= index <= depth:
                raise ConfigError(
                    f"layer_mapping: the {whose} has no hidden state {index}; it has {depth} layers: 0 (embeddings) … "
                    f"{depth}, or −1 … {-depth - 1} from the end"
                )
    return mapping


def _spread(student: int, teacher: int) -> list[list[int]]:
    """Pair up to four layers at the same relative depth, the last ones among them."""
    count = min(student, teacher, 4)
    return [[round(n * student / count), round(n * teacher / count)] for n in range(1, count + 1)]


@contextmanager
def without_projections(model: Any) -> Iterator[None]:
    """Remove the projections from the student for the duration of the block, since an exported model has none."""
    bare = bare_model(model)
    projections = bare._modules.pop(_NAME, None)
    try:
        yield
    finally:
        if projections is not None:
            bare._modules[_NAME] = projections


def exported(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without the projections."""
    return {name: value for name, value in state.items() if f"{_NAME}." not in name}


def save_projections(model: Any, folder: str, state: dict[str, Any] | None = None) -> None:
    """Write the projections, if the student has any, into a checkpoint's folder.

    Args:
        model: the student.
        folder: the checkpoint's folder.
        state: the student's full state dict, needed if its parameters are sharded.
    """
    from safetensors.torch import save_file

    projections = getattr(bare_model(model), _NAME, None)
    if projections is None:
        return
    if state is None:
        tensors = dict(projections.state_dict())
    else:
        tensors = {name.partition(f"{_NAME}.")[2]: value for name, value in state.items() if f"{_NAME}." in name}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, Path(folder) / _FILE)


def load_projections(model: Any, folder: str) -> None:
    """Load the projections, if the student has any, from a checkpoint's folder.

    Raises:
        ConfigError: the checkpoint has no projections, or their sizes do not match.
    """
    from safetensors.torch import load_file

    projections = getattr(bare_model(model), _NAME, None)
    if projections is None:
        return
    path = Path(folder) / _FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder}: the checkpoint has no {_FILE}: it was trained without projections of hidden states"
        )
    try:
        projections.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ConfigError(f"{path}: the projections do not fit layer_mapping: {error}") from error

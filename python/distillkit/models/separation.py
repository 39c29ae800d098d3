"""Finds out whether a model keeps the documents of a batch apart: those packed into one row, and those padded to the
length of another.

Most models keep packed documents apart by their `position_ids`. Models that ignore these in their mask, or carry a
state from token to token, do not, and nothing that they return says so. So the model itself is asked: what it computes
for documents in a batch is compared with what it computes for each of them alone. What follows from the answer for
training is in `distillkit.training.batching`.

Shape legend: L tokens of a document, B rows, S their common length, H hidden size.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from distillkit.errors import DistillKitError
from distillkit.models.head import backbone_hidden, bare_model, elements_of, probing, rows_of

__all__ = ["Collate", "Separation", "separation_of"]

Collate = Callable[[Sequence[Sequence[torch.Tensor]]], dict[str, Any]]
"""Makes a model's inputs of B rows of documents, (L,) token ids each: the documents in order, then padding."""

# Probe documents are longer than a sliding window or chunk of up to this many tokens.
_LONGEST_WINDOW = 32
# Where the model's precision or near-zero weights leave less than this between rounding and a full leak, a copy with
# other weights is asked, unless it would take more than so many bytes.
_DECISIVE = 1e5
_COPIED_BYTES = 2**32


@dataclass(frozen=True)
class Separation:
    """Why a model's documents change each other, or None where they do not.

    Attributes:
        padded: one document in each row.
        packed: several documents in a row.
    """

    padded: str | None
    packed: str | None

    def check_padding(self) -> None:
        """Refuse a model that cannot be run on batches of documents.

        Raises:
            DistillKitError: padding, or the other rows of a batch, change a document.
        """
        if self.padded is not None:
            raise DistillKitError(self.padded)


def separation_of(model: Any, collate: Collate, *, packs: bool = True) -> Separation:
    """Compare what a model computes for the documents of a batch with what it computes for each of them alone.

    Args:
        model: a causal LM, bare or inside a PEFT wrapper.
        collate: how batches are made for it.
        packs: whether several documents may share a row.

    Raises:
        DistillKitError: the model cannot be run on token ids alone.
    """
    bare = bare_model(model)
    training = bare.training
    bare.eval()
    try:
        with torch.no_grad(), probing(bare):
            measured = _measure(bare, collate, packs)
            if not measured.decisive and _can_be_copied(bare):
                measured = _measure(_with_ordinary_weights(bare), collate, packs)
    finally:
        bare.train(training)
    padded, packed = measured.leak(measured.padded), measured.leak(measured.packed)
    if padded is not None:
        padded = (
            f"{_named(bare)} computes other hidden states for a document in a batch, where it is padded, than for the "
            f"document alone ({padded}), so its distributions would be wrong. This model is not supported"
        )
    if packed is not None:
        packed = (
            f"{_named(bare)} does not keep documents apart that share a row: their hidden states are not those of each "
            f"document alone ({packed}){_way_out(bare)}"
        )
    return Separation(padded, packed)


def _named(bare: Any) -> str:
    return (
        f"{type(bare).__name__} (model_type {bare.config.model_type!r}, {bare.config._attn_implementation} attention)"
    )


def _way_out(bare: Any) -> str:
    """Name what would make this model keep documents apart, if its family has something."""
    if str(bare.config._attn_implementation).startswith("flash"):
        return ""
    if "cu_seq_lens" in inspect.getsource(sys.modules[type(bare).__module__]):
        return (
            ". Its layers take the documents' boundaries under FlashAttention (use_flash_attention: true), with the "
            "packages flash-linear-attention and causal-conv1d"
        )
    if bare._supports_flash_attn and not bare._is_stateful:
        return ". It may keep them apart under FlashAttention (use_flash_attention: true)"
    return ""


@dataclass(frozen=True)
class _Measured:
    """Largest relative changes of a position's hidden state.

    Attributes:
        padded, packed: by the other documents of a batch, and of a row.
        context: by other tokens before it in the same document: a full leak.
        rounding: by rounding its embeddings differently, or by a row of equal length beside it.
    """

    padded: float
    packed: float
    context: float
    rounding: float

    @property
    def decisive(self) -> bool:
        """Whether even a small part of a leak would stand out from rounding."""
        return self.context > _DECISIVE * self.rounding

    def leak(self, change: float) -> str | None:
        """Describe a change that is more than rounding."""
        # Other kernels round several times as much, and a leak may be small (a convolution, at a document's start).
        allowed = max(4 * self.rounding, self.rounding**0.75 * self.context**0.25)
        if change <= allowed:
            return None
        return (
            f"a relative difference of {change:.2g}, where rounding makes {self.rounding:.1g} and other tokens before "
            f"it {self.context:.2g}"
        )


def _measure(bare: Any, collate: Collate, packs: bool) -> _Measured:
    """Run documents alone, in a padded batch and in a packed one, and see how much the comparison can tell."""
    documents = first, second, _ = _documents(bare)
    alone = [_run(bare, document[None])[0] for document in documents]

    def changed(rows: list[list[int]]) -> float:
        """Return the change in a batch whose rows hold documents by number."""
        hidden = backbone_hidden(bare, **collate([[documents[number] for number in row] for row in rows]))
        found = 0.0
        for states, row in zip(hidden, rows, strict=True):
            start = 0
            for number in row:
                stop = start + len(documents[number])
                found, start = max(found, _change(states[start:stop], alone[number])), stop
        return found

    behind = _run(bare, torch.stack([torch.cat([before, second]) for before in (first, first.roll(1))]))
    rounding = _change(_run(bare, torch.stack([first, first.roll(1)]))[0], alone[0])
    with _rounded_embeddings(bare):
        rounding = max(rounding, _change(_run(bare, first[None])[0], alone[0]))
    return _Measured(
        padded=changed([[1], [0], [2]]),
        packed=changed([[0, 1], [2]]) if packs else 0.0,
        context=_change(behind[1, len(first) :], behind[0, len(first) :]),
        rounding=rounding,
    )


def _run(bare: Any, ids: torch.Tensor) -> torch.Tensor:
    """Run rows of equal length, as the model does by default."""
    return backbone_hidden(bare, input_ids=ids)


def _change(hidden: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative difference of the hidden states (L, H) of a document's positions; NaN counts as infinite."""
    difference = (hidden.float() - expected.float()).norm(dim=-1)
    relative = torch.where(difference == 0, 0.0, difference / expected.float().norm(dim=-1))
    return float(relative.nan_to_num(nan=math.inf).max())


@contextmanager
def _rounded_embeddings(bare: Any) -> Iterator[None]:
    """Change the embeddings' output by about one rounding error of the model's precision."""
    generator = torch.Generator().manual_seed(0)

    def round_differently(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, output.shape, generator=generator).to(output.device) * 2 - 1
        return output * (1 + signs * torch.finfo(output.dtype).eps).to(output.dtype)

    handle = bare.get_input_embeddings().register_forward_hook(round_differently)
    try:
        yield
    finally:
        handle.remove()


def _documents(bare: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make three documents (L,) of ordinary tokens, of different lengths.

    They are short, but longer than the model's windows where those are short, too.
    """
    config = bare.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "floor_scale")]
    longest = 4 + max([8, *(each for each in windows if isinstance(each, int) and each <= _LONGEST_WINDOW)])
    settings = {**config.to_dict(), **bare.config.to_dict()}
    special = {settings[name] for name in settings if name.endswith(("token_id", "token_index", "tokens_id"))}
    vocabulary = rows_of(bare.get_input_embeddings().weight)
    ordinary = [token for token in range(min(vocabulary, 4096)) if token not in special]
    generator = torch.Generator().manual_seed(0)
    first, second, third = (
        torch.tensor(ordinary)[torch.randint(len(ordinary), (length,), generator=generator)].to(bare.device)
        for length in (longest, longest - 3, longest // 2)
    )
    return first, second, third


def _can_be_copied(bare: Any) -> bool:
    parameters = list(bare.parameters())
    plain = getattr(bare, "quantization_method", None) is None and not any(hasattr(p, "ds_id") for p in parameters)
    return plain and 4 * sum(elements_of(parameter) for parameter in parameters) <= _COPIED_BYTES


def _with_ordinary_weights(bare: Any) -> Any:
    """Copy a model in float32, with random weights that pass on what a layer gets: trained ones may be too near zero,
    and 16 bits too coarse, for a leak to be seen."""
    other = copy.deepcopy(bare).float()
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        if parameter.ndim > 1:
            values = torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
            parameter.data = values.to(parameter.device)
    return other

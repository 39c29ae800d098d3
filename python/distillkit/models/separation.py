"""Checks that the documents of a batch do not change each other: neither those packed into one row, nor those padded to
the length of another.

Most models keep packed documents apart by their `position_ids`. Models that ignore these in their mask, or carry a
state from token to token, do not, and nothing that they return says so. So the model itself is asked: what it computes
for documents in a batch is compared with what it computes for each of them alone.

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

__all__ = ["Collate", "check_padding", "packing_problem"]

Collate = Callable[[Sequence[Sequence[torch.Tensor]]], dict[str, Any]]
"""Makes a model's inputs of B rows of documents, (L,) token ids each: the documents in order, then padding."""

# Probe documents are longer than a sliding window or chunk of up to this many tokens.
_LONGEST_WINDOW = 32
# A verdict needs this factor between what a full leak changes, and what rounding does. Where the model's precision or
# near-zero weights do not give it, a copy with other weights is asked, unless it would take more than these bytes.
_DECISIVE = 16.0
_COPIED_BYTES = 2**32


def check_padding(model: Any, collate: Collate) -> None:
    """Check that neither padding nor the other rows of a batch change a document.

    Args:
        model: a causal LM, bare or inside a PEFT wrapper.
        collate: how batches are made for it.

    Raises:
        DistillKitError: they do, or the model cannot be run on token ids alone.
    """
    bare = bare_model(model)
    first, second, third = _documents(bare)
    difference = _difference(bare, collate, [[second], [first], [third]])
    if difference is not None:
        raise DistillKitError(
            f"{_named(bare)} computes other hidden states for a document in a padded batch than for the document "
            f"alone ({difference}), so that batches would give wrong distributions. This model is not supported"
        )


def packing_problem(model: Any, collate: Collate) -> str | None:
    """Return why a model cannot be run on packed documents, or None if it keeps them apart.

    Args:
        model, collate: as for `check_padding`.

    Raises:
        DistillKitError: the model cannot be run on token ids alone.
    """
    bare = bare_model(model)
    first, second, third = _documents(bare)
    difference = _difference(bare, collate, [[first, second], [third]])
    if difference is None:
        return None
    return (
        f"{_named(bare)} does not keep documents apart that are packed into one row: their hidden states are not those "
        f"of each document alone ({difference}){_way_out(bare)}"
    )


def _named(bare: Any) -> str:
    return f"{type(bare).__name__} (model_type {bare.config.model_type!r}, {bare.config._attn_implementation} attention)"


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


@torch.no_grad()
def _difference(bare: Any, collate: Collate, rows: list[list[torch.Tensor]]) -> str | None:
    """Say by how much a batch changes the hidden states of its documents; None if by no more than rounding does."""
    training = bare.training
    bare.eval()
    try:
        with probing(bare):
            measured = _measure(bare, collate, rows)
            if not measured.decisive and _bytes(bare) <= _COPIED_BYTES:
                measured = _measure(_with_ordinary_weights(bare), collate, rows)
    finally:
        bare.train(training)
    return measured.verdict()


@dataclass(frozen=True)
class _Measured:
    """Largest relative changes of a position's hidden state.

    Attributes:
        batch: by the batch that is checked.
        context: by a document before it, as if the two were one: a full leak.
        rounding: by rounding its embeddings differently, or by a row of equal length beside it in a batch.
    """

    batch: float
    context: float
    rounding: float

    @property
    def decisive(self) -> bool:
        """Whether a leak would stand out from rounding."""
        return self.context > _DECISIVE * self.rounding

    def verdict(self) -> str | None:
        """Describe the leak, if there is one: a change nearer to that by a context than to that by rounding."""
        allowed = max(self.rounding, math.sqrt(self.rounding * self.context))
        if self.batch <= allowed:
            return None
        return (
            f"a relative difference of {self.batch:.2g}, where rounding makes {self.rounding:.1g} and a document in "
            f"front of it {self.context:.2g}"
        )


def _measure(bare: Any, collate: Collate, rows: list[list[torch.Tensor]]) -> _Measured:
    """Compare each document of a batch with itself alone, and see how much that comparison can tell."""
    together = backbone_hidden(bare, **collate(rows))
    changed, context, rounding = [], [], []
    for row, documents in enumerate(rows):
        start = 0
        for document in documents:
            alone = _alone(bare, document[None])[0]
            changed.append(_change(together[row, start : start + len(document)], alone))
            start += len(document)
            other = document.roll(1)
            context.append(_change(_alone(bare, torch.cat([other, document])[None])[0, len(other) :], alone))
            rounding.append(_change(_alone(bare, torch.stack([document, other]))[0], alone))
            with _rounded_embeddings(bare):
                rounding.append(_change(_alone(bare, document[None])[0], alone))
    return _Measured(max(changed), max(context), max(rounding))


def _alone(bare: Any, ids: torch.Tensor) -> torch.Tensor:
    """Run rows of equal length, as the model does by default."""
    return backbone_hidden(bare, input_ids=ids)


def _change(hidden: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative difference of the hidden states (L, H) of a document's positions; NaN counts as infinite."""
    difference = (hidden.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return float(difference.nan_to_num(nan=math.inf).max())


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
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = 4 + max([window for window in windows if isinstance(window, int) and window <= _LONGEST_WINDOW], default=8)
    special = {getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "unk")}
    ordinary = [token for token in range(min(rows_of(bare.get_input_embeddings().weight), 4096)) if token not in special]
    generator = torch.Generator().manual_seed(0)
    lengths = (longest, longest - 3, longest // 2)
    ids = torch.tensor(ordinary)[torch.randint(len(ordinary), (sum(lengths),), generator=generator)]
    first, second, third = ids.to(bare.device).split(lengths)
    return first, second, third


def _bytes(bare: Any) -> int:
    return sum(4 * elements_of(parameter) for parameter in bare.parameters())


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

"""From documents to batches: cutting, packing, padding and order.

Shape legend: L tokens of a document, P its counted positions, B rows per batch, S their common length, N counted
positions of a batch.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from distillkit.errors import ConfigError, CorruptDataError
from distillkit.losses.positions import Targets
from distillkit.shards.alignment import counted_positions
from distillkit.shards.overflow import Pieces
from distillkit.shards.packing import Packing
from distillkit.training.signals.base import TeacherSignal
from distillkit.types import Document

__all__ = [
    "BLANK",
    "MODEL_INPUTS",
    "Collator",
    "DistillationDataset",
    "DocumentOrder",
    "DocumentSource",
    "Example",
    "counted_positions",
    "joined",
]

logger = logging.getLogger(__name__)

MODEL_INPUTS = ("input_ids", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""The entries of a batch that are passed to the models, student or teacher; targets are made from the others."""

IGNORED = -100
"""The label of tokens without a loss, as everywhere in PyTorch."""

BLANK = -1
"""Index of an empty document; these fill up the last batches so that all processes have the same number of batches."""


@dataclass(frozen=True)
class Example:
    """A training example: a document, or several packed ones.

    Attributes:
        input_ids: (L,) int32, at most the sequence length.
        segment_lengths: lengths of the packed documents, in order; they sum to L.
        positions: (P,) int64, counted positions t, ascending, at which token t + 1 is predicted.
        teacher: arrays (P, …) from the teacher's signal.
        cut_tokens: number of tokens that were cut off.
        places: (P, 2) int64, where each counted position is in the source: the number of its document, and t there.
    """

    input_ids: npt.NDArray[np.int32]
    segment_lengths: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    teacher: dict[str, npt.NDArray[Any]]
    cut_tokens: int = 0
    places: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty((0, 2), np.int64))


class DocumentSource(Protocol):
    """Documents by index: a stored dataset, or prepared text."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the number of tokens of each document (D,), without reading the documents."""
        ...


class DistillationDataset(torch.utils.data.Dataset[Example]):
    """Map-style dataset of documents or their pieces, at most the sequence length, together with their teacher rows.

    Args:
        source: the documents.
        signal: provides the teacher's data.
        sequence_length: maximum L.
        indices: which documents of the source to use; all if None.
        pieces: which parts of these to use; each one's beginning if None.
        packing: which of these pieces share a row, by whose number examples are then indexed; None: no packing.
        tokens: number of tokens of all examples, where it is known.
    """

    names: tuple[str, ...] = ()
    """Of several datasets as one (`Mixture`), their names."""

    def __init__(
        self,
        source: DocumentSource,
        signal: TeacherSignal,
        sequence_length: int,
        indices: npt.NDArray[np.int64] | None = None,
        *,
        pieces: Pieces | None = None,
        packing: Packing | None = None,
        tokens: int = 0,
    ) -> None:
        self.source = source
        self.signal = signal
        self.sequence_length = sequence_length
        self.indices = np.arange(len(source), dtype=np.int64) if indices is None else indices
        self.pieces = pieces
        self.packing = packing
        self.tokens = tokens

    @property
    def parts(self) -> tuple[DistillationDataset, ...]:
        """The datasets that this one is made of: itself."""
        return (self,)

    @property
    def packed(self) -> bool:
        """Whether examples are rows of several documents."""
        return self.packing is not None

    def order(self, *, seed: int | None, multiple: int = 1) -> DocumentOrder:
        """Return the order in which training reads examples; see `DocumentOrder`."""
        return DocumentOrder(len(self), seed=seed, multiple=multiple)

    def targets(self, batch: Mapping[str, Any], labels: torch.Tensor) -> Targets:
        """Make the targets of a batch; see `TeacherSignal.targets`."""
        return self.signal.targets(batch, labels)

    def __len__(self) -> int:
        if self.packing is not None:
            return len(self.packing)
        return len(self.indices if self.pieces is None else self.pieces)

    @property
    def documents(self) -> int:
        """Number of documents of which any part is used."""
        return len(self.indices) if self.pieces is None else len(np.unique(self.pieces.documents))

    def __getitem__(self, index: int) -> Example:
        """Read a document, or the documents of a packed row; `BLANK` returns an example without tokens.

        Raises:
            CorruptDataError: a stored document is damaged.
        """
        if index == BLANK:
            return Example(
                np.empty(0, np.int32), np.zeros(1, np.int64), np.empty(0, np.int64), self.signal.empty_targets()
            )
        if self.packing is None:
            return self.piece(index)
        pieces = self.packing[index].tolist()
        example = joined([self.piece(piece) for piece in pieces])
        if len(example.input_ids) > self.sequence_length:
            raise CorruptDataError(
                f"the documents or pieces {pieces} have {len(example.input_ids):,} tokens, but at most "
                f"{self.sequence_length:,} were packed: the data changed after their lengths were read"
            )
        return example

    def piece(self, index: int) -> Example:
        """Read a document or one of its pieces, and the teacher rows of its counted positions."""
        if self.pieces is None:
            source_number = int(self.indices[index])
            document = self.source[source_number]
            start, stop, first = 0, min(len(document.input_ids), self.sequence_length), 0
            cut = len(document.input_ids) - stop
        else:
            number, start, stop, first = self.pieces[index]
            source_number = int(self.indices[number])
            document, cut = self.source[source_number], 0
        lengths = document.segments(stop, start)
        mask = None if document.loss_mask is None else document.loss_mask[start:stop]
        positions = counted_positions(lengths, mask)
        # The rest of the tokens is context, and counts in the piece before.
        positions = positions[positions + 1 >= first - start]
        teacher = self.signal.take(document, positions + start)
        places = np.stack([np.full_like(positions, source_number), positions + start], -1)
        return Example(document.input_ids[start:stop], lengths, positions, teacher, cut, places)


def joined(examples: Sequence[Example]) -> Example:
    """Concatenate examples into one, in which each remains a separate document."""
    if len(examples) == 1:
        return examples[0]
    lengths = np.array([len(example.input_ids) for example in examples])
    starts = (np.cumsum(lengths) - lengths).tolist()
    return Example(
        np.concatenate([example.input_ids for example in examples]),
        np.concatenate([example.segment_lengths for example in examples]),
        np.concatenate([start + example.positions for start, example in zip(starts, examples, strict=True)]),
        {name: np.concatenate([example.teacher[name] for example in examples]) for name in examples[0].teacher},
        sum(example.cut_tokens for example in examples),
        np.concatenate([example.places for example in examples]),
    )


class Collator:
    """Collates examples into a batch of tensors.

    Rows are padded on the right. There is no `attention_mask`: the model keeps packed documents apart by `position_ids`
    that restart, and no token attends to the padding after it. Position ids of the padding continue the last document,
    so that a batch without packed documents needs no mask at all.

    Args:
        pad_id: token id of the padding; any id of the vocabulary.
        pad_to_multiple_of: pad the common length S to a multiple of this.
        flash_attention: also return the document boundaries of the flattened batch, which FlashAttention needs for
            packed rows.
        longest_alike: documents up to this length have the same rotary frequencies. Where padding would make one look
            longer, its position ids begin again at 0.
        eos_labels: token ids that become `eos_id` in the labels.
        eos_id: the tokenizer's end-of-sequence id.

    Attributes:
        unpackable: why a model cannot be run on rows of several documents, which are then refused; None if it can.
    """

    def __init__(
        self,
        pad_id: int = 0,
        *,
        pad_to_multiple_of: int | None = None,
        flash_attention: bool = False,
        longest_alike: int | None = None,
        eos_labels: Sequence[int] = (),
        eos_id: int | None = None,
    ) -> None:
        self.pad_id = pad_id
        self.multiple = pad_to_multiple_of or 1
        self.flash_attention = flash_attention
        self.longest_alike = longest_alike
        self.unpackable: str | None = None
        self.eos_labels = np.array(sorted(eos_labels), dtype=np.int64)
        self.eos_id = eos_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Collate B examples.

        Returns:
            input_ids, position_ids, labels: (B, S) int64; labels[b, t + 1] is the token predicted at a counted position
                t, else −100.
            rows: (N,) int64, counted positions of the flattened batch, b·S + t, ascending.
            teacher_<name>: (N, …), arrays from the signal.
            places: (N, 2) int64, the document and the position in the source of each counted position.
            counts: (3,) int64: tokens without padding, documents that were cut, tokens cut off.
            With packed documents under FlashAttention also cu_seq_lens_q and cu_seq_lens_k int32, max_length_q and
                max_length_k.

        Raises:
            ConfigError: a row holds several documents, and a model does not keep them apart.
        """
        packed = any(len(example.segment_lengths) > 1 for example in examples)
        if packed and self.unpackable is not None:
            raise ConfigError(f"the dataset's rows hold several documents, but {self.unpackable}")
        longest = max(1, *(len(example.input_ids) for example in examples))
        length = -(-longest // self.multiple) * self.multiple
        input_ids = np.full((len(examples), length), self.pad_id, dtype=np.int64)
        position_ids = np.empty_like(input_ids)
        labels = np.full_like(input_ids, IGNORED)
        for row, example in enumerate(examples):
            input_ids[row, : len(example.input_ids)] = example.input_ids
            starts = np.cumsum(example.segment_lengths) - example.segment_lengths
            # Each position minus the start of its document; padding belongs to the last document.
            position_ids[row] = np.arange(length) - np.repeat(starts, np.diff(starts, append=length))
            padding = position_ids[row, len(example.input_ids) :]
            if self.longest_alike is not None and padding.max(initial=0) >= self.longest_alike:
                padding[:] = np.arange(len(padding)) % self.longest_alike
            labels[row, example.positions + 1] = example.input_ids[example.positions + 1]
        if len(self.eos_labels) and self.eos_id is not None:
            labels[np.isin(labels, self.eos_labels)] = self.eos_id
        rows = np.concatenate([row * length + example.positions for row, example in enumerate(examples)])
        batch: dict[str, Any] = {
            "input_ids": torch.from_numpy(input_ids),
            "position_ids": torch.from_numpy(position_ids),
            "labels": torch.from_numpy(labels),
            "rows": torch.from_numpy(rows),
            "places": torch.from_numpy(np.concatenate([example.places for example in examples])),
            "counts": torch.tensor(
                [
                    sum(len(example.input_ids) for example in examples),
                    sum(example.cut_tokens > 0 for example in examples),
                    sum(example.cut_tokens for example in examples),
                ]
            ),
        }
        for name in examples[0].teacher:
            batch[f"teacher_{name}"] = torch.from_numpy(np.concatenate([example.teacher[name] for example in examples]))
        if self.flash_attention and packed:
            batch |= _boundaries(position_ids)
        return batch


def _boundaries(position_ids: npt.NDArray[np.int64]) -> dict[str, Any]:
    """Document boundaries of a flattened batch (B, S), as FlashAttention's variable-length kernels expect them."""
    starts = np.flatnonzero(position_ids.reshape(-1) == 0)
    bounds = np.append(starts, position_ids.size)
    longest = int(np.diff(bounds).max())
    lengths = torch.from_numpy(bounds.astype(np.int32))
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}


class DocumentOrder(torch.utils.data.Sampler[int]):
    """The order of documents: a permutation that depends only on the seed and the epoch, then `BLANK` to fill up
    batches.

    Args:
        size: number of documents.
        seed: seed of the permutation; None keeps the stored order.
        multiple: the number of indices is filled up to a multiple of this.
    """

    def __init__(self, size: int, *, seed: int | None, multiple: int = 1) -> None:
        self.size = size
        self.seed = seed
        self.length = -(-size // multiple) * multiple
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch for the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = (
            np.arange(self.size)
            if self.seed is None
            else np.random.default_rng([self.seed, self.epoch]).permutation(self.size)
        )
        return itertools.chain(order.tolist(), itertools.repeat(BLANK, self.length - self.size))

"""The compact presets in the benchmark: each learns its prior from some documents of a sample, and encodes others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from distillkit.bench.fidelity import FidelityRow, figures
from distillkit.bench.sample import Sample
from distillkit.bench.tune import Split
from distillkit.codec import Codec, CompactConfig, Prior, preset
from distillkit.codec.fidelity import values_of
from distillkit.codec.presets import COMPACT_PRESETS
from distillkit.errors import DistillKitError, InputError
from distillkit.types import SparseLogprobs

__all__ = ["LearnedPreset", "learn_presets"]


@dataclass(frozen=True)
class LearnedPreset:
    """A compact preset with a prior of a sample's rows, and documents of which the prior knows nothing.

    Attributes:
        name: of the preset.
        codec: has the learned prior.
        documents: the rows (R, k) of each document that is encoded.
        learned_rows: how many rows of other documents the prior was learned from.
        note: what the prior was learned from, and how the preset was made to fit the sample, if it was.
    """

    name: str
    codec: Codec
    documents: tuple[SparseLogprobs, ...]
    learned_rows: int
    note: str

    @staticmethod
    def of(name: str, sample: Sample, vocab_size: int) -> LearnedPreset:
        """Learns the prior of a preset.

        Raises:
            InputError: the sample has too few ids per row, or fewer than two documents.
        """
        config = preset(name, vocab_size=vocab_size)
        if not isinstance(config, CompactConfig):
            raise InputError(f"{name}: only compact presets learn a prior from log-probabilities")
        about = ""
        if config.threshold is not None and config.k > sample.k:
            # k is only the most that a row may have.
            config, about = config.model_copy(update={"k": sample.k}), f"at most {sample.k} ids, as the sample has; "
        if config.k > sample.k:
            raise InputError(f"stores {config.k} ids per row, but the sample has {sample.k}")
        ids, logprobs = sample.top(config.k, vocab_size)
        split = Split.of(replace(sample, ids=ids, logprobs=logprobs))
        prior = Prior.learn(config, split.learned)
        learned, size = split.learned_rows, len(prior.data) / 1000
        others = sum(len(each.ids) for each in split.held_out)
        about += (
            f"its prior ({size:,.0f} kB, not counted) is of {learned:,} of the rows, the figures of {others:,} others"
        )
        return LearnedPreset(name, Codec(config, prior=prior), split.held_out, learned, about)

    @property
    def rows(self) -> int:
        """Rows of all documents."""
        return sum(len(document.ids) for document in self.documents)

    @cached_property
    def encoded(self) -> tuple[bytes, ...]:
        """The bytes of each document."""
        return tuple(self.encode())

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of a row, without the prior, which a dataset stores once."""
        return sum(map(len, self.encoded)) / self.rows

    @cached_property
    def decoded(self) -> SparseLogprobs:
        """(R, k) rows of all documents, as they come back."""
        return _joined(list(self.decode()))

    @property
    def ids_mean(self) -> float:
        """Mean number of ids that a row stores."""
        return float(np.isfinite(self.decoded.logprobs).sum() / self.rows)

    def encode(self) -> Iterator[bytes]:
        """Encodes document by document."""
        return map(self.codec.encode_document, self.documents)

    def decode(self) -> Iterator[SparseLogprobs]:
        """Decodes document by document."""
        for data, document in zip(self.encoded, self.documents, strict=True):
            yield self.codec.decode_document(data, len(document.ids))

    def fidelity(self) -> FidelityRow:
        """The fidelity table's row.

        Raises:
            DistillKitError: other ids came back, which is a bug.
        """
        rows = _joined(self.documents)
        original, known = values_of(rows, self.decoded)
        if not known.all() or not np.array_equal(self.decoded.ids[:, 0], rows.ids[:, 0]):
            raise DistillKitError(f"{self.name}: the decoded ids are not those that were encoded; this is a bug")
        ours = figures(original, np.asarray(self.decoded.logprobs))
        return FidelityRow(self.name, self.bytes_per_token, rows=self.rows, ours=ours, note=self.note)


def _joined(parts: Sequence[SparseLogprobs]) -> SparseLogprobs:
    ids, logprobs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "logprobs"))
    return SparseLogprobs(ids, logprobs)


def learn_presets(
    sample: Sample, vocab_size: int, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[LearnedPreset], list[FidelityRow]]:
    """Learns a prior for each compact preset.

    Returns:
        The presets that fit the sample, and a row of the fidelity table for each that does not, which says why.
    """
    learned, skipped = [], []
    for done, name in enumerate(COMPACT_PRESETS):
        progress(done, len(COMPACT_PRESETS))
        try:
            learned.append(LearnedPreset.of(name, sample, vocab_size))
        except InputError as error:
            skipped.append(FidelityRow(name, 0, note=str(error), skipped=True))
    progress(len(COMPACT_PRESETS), len(COMPACT_PRESETS))
    return learned, skipped

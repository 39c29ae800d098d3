"""Looks for the codec configuration that keeps most of a teacher's rows in so many bytes.

The criterion is comparable across numbers of stored ids: KL(teacher ‖ stored) over all K ids of the sample's rows and
the rest of the vocabulary as one more outcome, where the stored missing mass is spread evenly over the ids that are not
stored, as nothing else is known of them. KL over the stored ids alone would be least for one id. Since a student knows
more of the ids that are not stored than that, KL over the stored ids is limited apart from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.bench.sample import Sample
from distillkit.codec import Codec, CodecConfig, Prior
from distillkit.codec.config import CompactConfig, DistributionQuantizationConfig
from distillkit.codec.fidelity import kl_rows, values_of
from distillkit.codec.presets import COMPACT_PRESETS, FIXED_PRESETS, preset_of
from distillkit.errors import InputError
from distillkit.types import SparseLogprobs

__all__ = ["Candidate", "Split", "best", "dropped_kl", "front", "narrowed", "search"]

F64 = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]

_BLOCK = 512
"""Rows of a document where a sample does not say which rows are of one."""
_HELD_OUT = 4
"""Every so many documents, one is measured on; priors are learned from the others."""
_TABLE_ROWS = 4096
"""Rows that a configuration's code tables are learned from; its lists of ids are learned once, from all."""
_MEASURED_ROWS = 4000
"""About so many held-out rows are measured on."""
_MOST_IDS = 256
_COUNTS = 8, 16, 32, 50, 64, 100, 128, _MOST_IDS
_THRESHOLDS = 8e-3, 4e-3, 2e-3, 1.4e-3, 1e-3, 7e-4, 5e-4, 3e-4, 2e-4
_STEPS = 0.0025, 0.012, 0.03
_BASE_STEP = 0.006
_ROUNDS, _FAMILIES = 3, 3
"""At a target, so many rounds try the steps that would just meet it, of so many numbers of ids."""

Family = tuple[int, "float | None"]
"""Which ids a compact configuration stores: the most of them, and the threshold of their probability."""


@dataclass(frozen=True)
class Candidate:
    """A configuration and what it makes of the held-out rows.

    Attributes:
        config: the configuration, without a prior.
        bytes_per_row: mean over rows, with the prior's share.
        prior_bytes: size of the learned prior; 0 for fixed layouts.
        ids: mean number of stored ids.
        mass: mean probability, under the teacher, of the stored ids.
        kl_stored: mean KL over the stored ids and all others as one more outcome, nats.
        kl: mean KL over the sample's ids and all others as one more outcome, nats: the criterion.
    """

    config: CodecConfig
    bytes_per_row: float
    prior_bytes: int
    ids: float
    mass: float
    kl_stored: float
    kl: float

    @property
    def name(self) -> str:
        """A preset's name, or which ids are stored and how: "compact, k 64, step 0.012"."""
        known, config = preset_of(self.config), self.config
        if known is not None:
            return known
        if isinstance(config, CompactConfig):
            kept = f"k {config.k}" if config.threshold is None else f"p ≥ {config.threshold:.3g}, k ≤ {config.k}"
            return f"compact, {kept}, step {config.step:.3g}"
        return f"published layout, k {config.k}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        figures = {name: getattr(self, name) for name in ("bytes_per_row", "prior_bytes", "ids", "mass")}
        return {
            "name": self.name,
            "format": self.config.format,
            "config": self.config.model_dump(mode="json"),
            **figures,
            "kl_stored": self.kl_stored,
            "kl": self.kl,
        }


@dataclass(frozen=True)
class Split:
    """A sample's documents, shared between learning and measuring; the same sample is always split alike.

    Attributes:
        learned: rows (≥ 1, K) that priors are learned from.
        held_out: the rows of each document that is measured on.
        learned_documents: how many documents `learned` is of.
        blocks: whether documents are blocks of rows, since the sample does not tell its documents.
    """

    learned: SparseLogprobs
    held_out: tuple[SparseLogprobs, ...]
    learned_documents: int
    blocks: bool

    @staticmethod
    def of(sample: Sample) -> Split:
        """Splits a sample.

        Raises:
            InputError: it has fewer than two documents.
        """
        numbers = sample.documents
        if numbers is None:
            numbers = np.arange(len(sample)) // max(1, min(_BLOCK, len(sample) // (2 * _HELD_OUT)))
        starts = np.flatnonzero(np.diff(numbers, prepend=numbers[:1] - 1))
        documents = np.split(np.arange(len(sample)), starts[1:])
        every = min(_HELD_OUT, len(documents))
        if every < 2:
            raise InputError(
                f"a prior is learned from some documents and measured on others, but the sample has {len(documents)} "
                f"({len(sample):,} rows): take one of more documents"
            )
        learned = [rows for number, rows in enumerate(documents) if number % every != every - 1]
        others = documents[every - 1 :: every]
        wanted = max(1, round(len(others) * min(1.0, _MEASURED_ROWS / sum(map(len, others)))))
        chosen = np.unique(np.linspace(0, len(others) - 1, wanted).round().astype(int))

        def rows_of(rows: npt.NDArray[np.int64]) -> SparseLogprobs:
            return SparseLogprobs(sample.ids[rows], sample.logprobs[rows])

        return Split(
            rows_of(np.concatenate(learned)),
            tuple(rows_of(others[number]) for number in chosen),
            len(learned),
            sample.documents is None,
        )

    @property
    def learned_rows(self) -> int:
        """Rows that priors are learned from."""
        return len(self.learned.ids)

    @cached_property
    def measured(self) -> SparseLogprobs:
        """All held-out rows, (R, K)."""
        return SparseLogprobs(
            np.concatenate([rows.ids for rows in self.held_out]),
            np.concatenate([rows.logprobs for rows in self.held_out]),
        )


def narrowed(sample: Sample, k: int) -> Sample:
    """The first k ids of a sample's rows: those beyond become part of the rest.

    Raises:
        InputError: the sample has fewer.
    """
    if k > sample.k:
        raise InputError(f"k = {k}: the sample has {sample.k} ids per row")
    return replace(sample, ids=sample.ids[:, :k], logprobs=sample.logprobs[:, :k])


def dropped_kl(logprobs: npt.NDArray[Any], vocab_size: int) -> F64:
    """What a row loses by not storing ids after its first n, if their mass is spread evenly over all that are not.

    Over the row's K ids and the rest, KL(teacher ‖ stored) is that over the n stored ids and all others as one outcome,
    plus this (the chain rule).

    Args:
        logprobs: (R, K) of the teacher, most probable first.

    Returns:
        (R, K + 1) nats, for n = 0 … K.
    """
    logs = logprobs.astype(np.float64)
    p = np.exp(logs)
    width = p.shape[-1]
    rest_R1 = np.maximum(1 - p.sum(-1, keepdims=True), 0.0)

    def tails(values: F64, last: F64) -> F64:
        return np.asarray(np.cumsum(np.concatenate([values, last], -1)[:, ::-1], -1)[:, ::-1])

    def plogp(values: F64) -> F64:
        return np.asarray(values * np.log(np.maximum(values, 1e-300)))

    missing, entropy = tails(p, rest_R1), tails(plogp(p), plogp(rest_R1))
    others = np.log(np.maximum(vocab_size - np.arange(width + 1), 1))
    spread = entropy - plogp(missing) + missing * others - rest_R1 * np.log(max(vocab_size - width, 1))
    return np.asarray(np.maximum(spread, 0.0))


class _Bench:
    """Measures configurations on a split."""

    def __init__(self, split: Split, vocab_size: int, tokens: int) -> None:
        self.split, self.vocab_size, self.tokens = split, vocab_size, tokens
        learned = split.learned
        chosen = np.linspace(0, len(learned.ids) - 1, min(_TABLE_ROWS, len(learned.ids))).round().astype(int)
        self.table_rows = SparseLogprobs(learned.ids[chosen], learned.logprobs[chosen])
        self.dropped = dropped_kl(np.asarray(split.measured.logprobs), vocab_size)
        self.base: Prior | None = None

    def compact(self, family: Family, step: float) -> Candidate:
        """A compact configuration with a prior learned from the other documents."""
        k, threshold = family
        config = CompactConfig(vocab_size=self.vocab_size, k=k, threshold=threshold, step=float(f"{step:.3g}"))
        if self.base is None:
            widest = CompactConfig(vocab_size=self.vocab_size, k=min(self.split.learned.k, 128), step=_BASE_STEP)
            self.base = Prior.learn(widest, self.split.learned)
        prior = Prior.learn(config, self.table_rows, base=self.base)
        return self.measure(config, Codec(config, prior=prior), len(prior.data))

    def measure(self, config: CodecConfig, codec: Codec, prior_bytes: int = 0) -> Candidate:
        """Encodes and decodes the held-out rows, a document at a time."""
        rows, size, parts = self.split.measured, 0, []
        for document in self.split.held_out:
            first = SparseLogprobs(
                np.ascontiguousarray(document.ids[:, : codec.k]), np.ascontiguousarray(document.logprobs[:, : codec.k])
            )
            data = codec.encode_document(first)
            size += len(data)
            parts.append(codec.decode_document(data, len(document.ids)))
        decoded = SparseLogprobs(
            np.concatenate([part.ids for part in parts]), np.concatenate([part.logprobs for part in parts])
        )
        original, _ = values_of(rows, decoded)
        stored, count = kl_rows(original, np.asarray(decoded.logprobs)), len(rows.ids)
        counts = np.isfinite(decoded.logprobs).sum(-1)
        return Candidate(
            config,
            size / count + prior_bytes / self.tokens,
            prior_bytes,
            ids=float(counts.mean()),
            mass=float(np.exp(original.astype(np.float64)).sum(-1).mean()),
            kl_stored=float(stored.mean()),
            kl=float((stored + self.dropped[np.arange(count), counts]).mean()),
        )


# -- search ------------------------------------------------------------------------------------------------------------


def search(
    split: Split,
    vocab_size: int,
    *,
    tokens: int,
    target: tuple[str, float] | None = None,
    most_stored: float = np.inf,
    progress: Progress = lambda done, total: None,
) -> list[Candidate]:
    """Measures fixed layouts and a grid of compact configurations, then more of them where they just meet a target.

    Args:
        tokens: size of the dataset that one prior is for; each row counts its share of the prior.
        target: "bytes_per_row" or "kl", and the most there may be of it.
        most_stored: the most KL over the stored ids and all others as one outcome.
        progress: called with how many of how many configurations are measured.

    Returns:
        All that were measured, of at most `most_stored`; `front` and `best` choose among them.

    Raises:
        InputError: none has at most `most_stored`.
    """
    bench = _Bench(split, vocab_size, tokens)
    width = min(split.learned.k, _MOST_IDS, vocab_size)
    fixed = list(_fixed(split.learned.k, vocab_size))
    grid = [(family, step) for family in _families(width) for step in _STEPS]
    named = [
        ((fields["k"], fields.get("threshold")), fields["step"])
        for fields in COMPACT_PRESETS.values()
        if fields["k"] <= width
    ]
    total = len(fixed) + len(grid) + len(named) + (0 if target is None else _ROUNDS * _FAMILIES)
    found: list[Candidate] = []
    for config in fixed:
        found.append(bench.measure(config, Codec(config)))
        progress(len(found), total)
    for family, step in (*named, *grid):
        found.append(bench.compact(family, step))
        progress(len(found), total)
    if target is not None:
        for _ in range(_ROUNDS):
            for family, step in _promising(found, *target, most_stored):
                found.append(bench.compact(family, step))
                progress(len(found), total)
    progress(total, total)
    kept = [each for each in found if each.kl_stored <= most_stored]
    if not kept:
        least = min(each.kl_stored for each in found)
        raise InputError(
            f"no configuration has a KL of at most {most_stored:g} over the stored ids; least: {least:.2e}"
        )
    return kept


def _families(width: int) -> list[Family]:
    counts = sorted({*(count for count in _COUNTS if count <= width), width})
    return [*((count, None) for count in counts), *((width, threshold) for threshold in _THRESHOLDS)]


def _fixed(width: int, vocab_size: int) -> Iterator[CodecConfig]:
    """The fixed presets, and the published layouts for other numbers of ids."""
    for fields in FIXED_PRESETS.values():
        if fields["k"] <= width:
            yield DistributionQuantizationConfig(d=vocab_size, **fields)
    for count in _COUNTS:
        fields = FIXED_PRESETS["recommended" if count > 64 else "budget"]
        if count <= width and count != fields["k"]:
            yield DistributionQuantizationConfig(d=vocab_size, **{**fields, "k": count})


def _promising(found: Sequence[Candidate], name: str, most: float, most_stored: float) -> list[tuple[Family, float]]:
    """Numbers of ids, and steps at which they would just meet the target, by interpolation between those measured."""
    other = "kl" if name == "bytes_per_row" else "bytes_per_row"
    predicted: list[tuple[float, Family, float]] = []
    measured: dict[Family, list[Candidate]] = {}
    for each in found:
        if isinstance(each.config, CompactConfig):
            measured.setdefault((each.config.k, each.config.threshold), []).append(each)
    for family, members in measured.items():
        points = sorted({(_step(each), getattr(each, name), getattr(each, other), each.kl_stored) for each in members})
        steps, limited, free, stored = (np.log(np.maximum(column, 1e-12)) for column in zip(*points, strict=True))
        if limited.min() > np.log(most):
            continue
        # Bytes fall and KL rises with the step; interpolation needs them ascending.
        order = np.argsort(limited, kind="stable")
        at = float(np.interp(np.log(most * 0.998), limited[order], steps[order]))
        at = min(at, float(np.interp(np.log(most_stored * 0.95), stored, steps)))
        step = float(np.exp(at))
        if all(abs(step / _step(each) - 1) > 0.01 for each in members):
            predicted.append((float(np.interp(np.log(step), steps, free)), family, step))
    return [(family, step) for _, family, step in sorted(predicted, key=lambda each: each[0])[:_FAMILIES]]


def _step(each: Candidate) -> float:
    return each.config.step if isinstance(each.config, CompactConfig) else 0.0


def front(found: Iterable[Candidate]) -> list[Candidate]:
    """Those than which no other has both fewer (or as many) bytes and less KL, by bytes."""
    kept: list[Candidate] = []
    for each in sorted(found, key=lambda each: (each.bytes_per_row, each.kl)):
        if not kept or each.kl < kept[-1].kl:
            kept.append(each)
    return kept


def best(found: Sequence[Candidate], name: str, most: float) -> Candidate:
    """The least KL with `most` bytes_per_row, or the fewest bytes with `most` kl.

    Raises:
        InputError: nothing measured meets it; says what comes nearest.
    """
    members = front(found)
    fitting = [each for each in members if getattr(each, name) <= most]
    if fitting:
        return fitting[-1] if name == "bytes_per_row" else fitting[0]
    nearest = members[0] if name == "bytes_per_row" else members[-1]
    wanted = f"at most {most:g} bytes" if name == "bytes_per_row" else f"a KL of at most {most:g}"
    raise InputError(
        f"nothing that was tried has {wanted}; nearest: {nearest.name} with {nearest.bytes_per_row:.1f} bytes and a KL "
        f"of {nearest.kl:.2e}"
    )

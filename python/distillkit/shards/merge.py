"""Averages the distributions of several captures of the same documents. Uses numpy only.

p_s is the distribution of source s, K_s the ids that it stores in a row, m_s = 1 − Σ_{i ∈ K_s} p_s(i) its missing mass,
w_s its weight (Σ_s w_s = 1), U the union of all K_s, I their intersection, V the size of the vocabulary.

In *probabilities*, the result is the mixture Σ_s w_s p_s. Stored of an id i ∈ U is what is known of it,
Σ_{s: i ∈ K_s} w_s p_s(i), so that the missing mass of the result is exactly Σ_s w_s m_s. If the most probable ids are
stored, those that s does not store have at most q_s each, the least probability in its row, and m_s together. What the
stored ids lack is then at most Σ_s w_s min(m_s, |U \\ K_s| q_s).

In *logits*, the result is the geometric mean Π_s p_s^{w_s} / Z, the softmax of the averaged logits. The ids that a
source does not store are taken to share its missing mass evenly, p_s(i) = m_s / (V − |K_s|), so that g is defined for
all ids (m_s counts as 1e-6 if it is less: stored values are no more exact):

    g(i) = Π_s p_s(i)^{w_s} for i ∈ U,   g(rest) = (V − |U|) Π_s (m_s / (V − |K_s|))^{w_s}
    Z = Σ_{i ∈ U} g(i) + g(rest)

Of ids in I, g is exact. All others together have, however the missing masses are divided in truth, at most
R = Π_s (1 − Σ_{i ∈ I} p_s(i))^{w_s} (Hölder's inequality). With Z_I = Σ_{i ∈ I} g(i) and β = R / (Z_I + R), the
probability of an id in I is therefore at least 1 − β and at most 1 / (1 − β) times the true one, and the total
variation distance is at most β.

If every source stores all ids, both are exact.

Shape legend: R rows of a document, k ids of a source, K = Σ k ids of all, at most.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from distillkit.codec import Codec, CodecConfig, Prior
from distillkit.codec.fidelity import FidelityStats
from distillkit.configuration.places import folder_name
from distillkit.console import human_bytes, number_of
from distillkit.errors import ConfigError, CorruptDataError, InputError, MismatchError
from distillkit.shards.convert import (
    PRIOR_ROWS,
    RowSource,
    distributions,
    fitting,
    target_codec,
    write_documents,
)
from distillkit.shards.header import Header, alignment
from distillkit.shards.manifest import read_manifest
from distillkit.shards.plausibility import check_plausible, decoded, sampled
from distillkit.shards.reader import Dataset
from distillkit.shards.verify import verify_dataset
from distillkit.shards.writer import ShardWriter
from distillkit.types import Document, Facts, Shown, SparseLogprobs

__all__ = ["Average", "AveragedRows", "MergeReport", "Merged", "average_labels", "average_rows", "merge"]

logger = logging.getLogger(__name__)

Average = Literal["probabilities", "logits"]

# Float32 log-probabilities of a row sum to 1 within this.
_ROUNDING = 1e-6

Progress = Callable[[str, int, int], None]
"""Called with what is done (`comparing`, `learning`, `merging` or `verifying`), how much of it, and the total."""


@dataclass(frozen=True, repr=False)
class MergeReport(Shown):
    """The result of a merge.

    Attributes:
        output: the output folder.
        average: what was averaged.
        sources: `name`, `weight` (their sum is 1) and `teacher` of each source.
        documents, tokens, rows: what was written, including `resumed_documents` of an interrupted run.
        shards, bytes: files, and their size with the prior.
        ids: mean number of ids in the rows of the average, before the codec keeps its first k.
        missing_mass: mean missing mass of the average, before that.
        uncertainty: mean over rows of how much probability may be elsewhere than the average says, because the sources
            do not store all ids; see the module docstring.
        kl_mean, kl_p99: KL(average ‖ stored) in nats; NaN if all was written by an earlier run.
        seconds: time taken, including reading everything back.
    """

    output: str
    average: Average
    sources: list[dict[str, Any]]
    documents: int
    tokens: int
    rows: int
    resumed_documents: int
    shards: int
    bytes: int
    ids: float
    missing_mass: float
    uncertainty: float
    kl_mean: float
    kl_p99: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable mapping."""
        return asdict(self)

    def facts(self) -> Facts:
        """Return what is shown."""
        rows = [
            (f"{source['weight']:.1%} of {self.average}", f"{source['name']} ({source['teacher']})")
            for source in self.sources
        ]
        resumed = f"  ({self.resumed_documents:,} from an earlier run)" if self.resumed_documents else ""
        undecided = f"at most {self.uncertainty:.2%} of the probability, by ids that not all teachers stored"
        size = f"{human_bytes(self.bytes)} in {number_of(self.shards, 'shard')}"
        rows += [
            ("documents", f"{self.documents:,}{resumed}"),
            ("tokens", f"{self.tokens:,}"),
            ("distributions", f"{self.rows:,}, of {self.ids:,.1f} ids on average before the codec's k"),
            ("missing mass", f"{self.missing_mass:.2%} on average, before the codec's k"),
            ("undecided", undecided),
            ("size", f"{size}, {self.bytes / max(self.rows, 1):,.1f} bytes per distribution"),
        ]
        if not math.isnan(self.kl_mean):
            rows.append(("KL(average ‖ stored)", f"{self.kl_mean:.2e} on average, {self.kl_p99:.2e} at p99"))
        rows.append(("time", f"{self.seconds:,.1f} s, with everything read back and checked"))
        return f"merged: {self.output}", rows


class AveragedRows(NamedTuple):
    """The average of rows.

    Attributes:
        rows: (R, K), most probable first; those of fewer ids repeat their first, with a log-probability of −inf.
        uncertainty: (R,) float64, the bound in the module docstring.
        log_z: (R,) float64, log Z; zeros for an average of probabilities.
    """

    rows: SparseLogprobs
    uncertainty: npt.NDArray[np.float64]
    log_z: npt.NDArray[np.float64]


def average_rows(
    rows: Sequence[SparseLogprobs], weights: Sequence[float], average: Average, vocab_size: int
) -> AveragedRows:
    """Average the rows of several sources, position by position; see the module docstring.

    Args:
        rows: numpy (R, k) of each source; k may differ. Ids of log-probability −inf do not count.
        weights: of the sources; they need not sum to 1.
        average: `probabilities` or `logits`.
        vocab_size: V.

    Raises:
        InputError: numbers of rows differ, or an id is beyond the vocabulary.

    Example:
        >>> import numpy as np
        >>> from distillkit import SparseLogprobs
        >>> from distillkit.shards.merge import average_rows
        >>> one = SparseLogprobs(np.array([[5, 2]]), np.log(np.array([[0.5, 0.25]], np.float32)))
        >>> two = SparseLogprobs(np.array([[2, 9]]), np.log(np.array([[0.75, 0.125]], np.float32)))
        >>> found = average_rows([one, two], [1, 1], "probabilities", 100)
        >>> found.rows.ids.tolist(), np.exp(found.rows.logprobs).round(6).tolist()
        ([[2, 5, 9, 2]], [[0.5, 0.25, 0.0625, 0.0]])
    """
    if len({len(each.ids) for each in rows}) != 1:
        raise InputError(f"sources have different numbers of rows: {', '.join(str(len(each.ids)) for each in rows)}")
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    stack = _Stack.of(rows, shares, vocab_size)
    values, uncertainty, log_z = stack.probabilities() if average == "probabilities" else stack.logits()
    return AveragedRows(stack.ranked(values), uncertainty, log_z)


def average_labels(
    known: npt.NDArray[np.floating], weights: Sequence[float], average: Average, log_z: npt.NDArray[np.float64]
) -> npt.NDArray[np.float32]:
    """Average what several sources say of the next tokens; see the module docstring.

    Args:
        known: (S, R) log-probabilities of the next tokens by each source.
        weights: of the sources; they need not sum to 1.
        average: `probabilities` or `logits`.
        log_z: (R,) log Z, from `average_rows`.

    Returns:
        (R,) log-probabilities; NaN where that of a source is.

    Example:
        >>> import numpy as np
        >>> from distillkit.shards.merge import average_labels
        >>> known = np.log(np.array([[0.5, 0.25], [0.125, 0.25]]))
        >>> np.exp(average_labels(known, [2, 1], "probabilities", np.zeros(2))).round(6).tolist()
        [0.375, 0.25]
    """
    shares = np.asarray(weights, np.float64) / np.sum(weights)
    values = known.astype(np.float64)
    if average == "probabilities":
        with np.errstate(divide="ignore"):
            mean = np.log(shares @ np.exp(values))
    else:
        mean = shares @ values - log_z
    return np.asarray(np.minimum(mean, 0.0), np.float32)


@dataclass(frozen=True)
class _Stack:
    """The entries of all sources, sorted by row and id. E entries of G pairs of row and id, S sources.

    Attributes:
        shares: (S,) weights that sum to 1.
        vocab_size: V.
        width: K.
        logprobs: (E,) float64.
        source, row: (E,) of which source and row an entry is.
        group: (E,) the number of its pair of row and id.
        row_of, id_of: (G,) the row and the id of a pair.
        missing, least, count: (R, S) missing mass, least stored probability, and number of stored ids.
    """

    shares: npt.NDArray[np.float64]
    vocab_size: int
    width: int
    logprobs: npt.NDArray[np.float64]
    source: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    group: npt.NDArray[np.int64]
    row_of: npt.NDArray[np.int64]
    id_of: npt.NDArray[np.int64]
    missing: npt.NDArray[np.float64]
    least: npt.NDArray[np.float64]
    count: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: Sequence[SparseLogprobs], shares: npt.NDArray[np.float64], vocab_size: int) -> _Stack:
        ids = np.concatenate([np.asarray(each.ids) for each in rows], -1)
        logprobs = np.concatenate([np.asarray(each.logprobs, np.float64) for each in rows], -1)
        source = np.repeat(np.arange(len(rows)), [each.k for each in rows])
        stored = np.isfinite(logprobs)
        if ids.size and int(ids.max()) >= vocab_size:
            raise InputError(f"id {int(ids.max()):,} is beyond the vocabulary of {vocab_size:,}")
        p = np.where(stored, np.exp(logprobs), 0.0)
        per_source = [source == number for number in range(len(rows))]
        total = np.stack([p[:, mine].sum(-1) for mine in per_source], -1)
        least = np.stack([np.where(stored, p, 1.0)[:, mine].min(-1, initial=1.0) for mine in per_source], -1)
        count = np.stack([stored[:, mine].sum(-1) for mine in per_source], -1)
        # By id in each row; what is not stored comes last and is cut off. Sorting ids and places as one number takes
        # a fraction of the time of an argsort.
        bits = ids.shape[-1].bit_length()
        keys = np.sort(np.where(stored, ids, vocab_size) << bits | np.arange(ids.shape[-1]), -1)
        order, sorted_ids = keys & (1 << bits) - 1, keys >> bits
        kept = sorted_ids < vocab_size
        row = np.broadcast_to(np.arange(len(ids))[:, None], ids.shape)[kept]
        sorted_ids = sorted_ids[kept]
        first = np.ones(len(row), bool)
        first[1:] = (row[1:] != row[:-1]) | (sorted_ids[1:] != sorted_ids[:-1])
        return cls(
            shares=shares,
            vocab_size=vocab_size,
            width=ids.shape[-1],
            logprobs=np.take_along_axis(logprobs, order, -1)[kept],
            source=source[order][kept],
            row=row,
            group=np.cumsum(first) - 1,
            row_of=row[first],
            id_of=sorted_ids[first],
            missing=np.maximum(1.0 - total, 0.0),
            least=least,
            count=count,
        )

    def probabilities(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the log-probabilities (G,) of the mixture, the uncertainty (R,), and zeros (R,)."""
        mixed = np.bincount(self.group, self.shares[self.source] * np.exp(self.logprobs), len(self.row_of))
        absent = self._union[:, None] - self.count
        unknown = np.minimum(self.missing, absent * self.least)
        return np.log(mixed), unknown @ self.shares, np.zeros(len(self.count))

    def logits(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return the log-probabilities (G,) of the geometric mean, the uncertainty (R,), and log Z (R,)."""
        others = self.vocab_size - self.count
        # Of an id that is not stored; it cancels out where a source stores all.
        spread = np.log(np.maximum(self.missing, _ROUNDING) / np.maximum(others, 1))
        log_g = self._summed(self.shares[self.source] * (self.logprobs - spread[self.row, self.source]))
        log_g += (spread @ self.shares)[self.row_of]
        z = self._by_row(np.exp(log_g)) + (self.vocab_size - self._union) * np.exp(spread @ self.shares)
        common = self._summed(np.ones(len(self.row))) == len(self.shares)
        z_common = self._by_row(np.where(common, np.exp(log_g), 0.0))
        beyond = np.where(others > 0, self.missing + _ROUNDING, 0.0)
        np.add.at(beyond, (self.row, self.source), np.where(common[self.group], 0.0, np.exp(self.logprobs)))
        outside = np.prod(beyond**self.shares, -1)
        return log_g - np.log(z)[self.row_of], outside / (z_common + outside), np.log(z)

    def _summed(self, values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        """Sum values of entries (E,) over each pair of row and id, (G,)."""
        return np.bincount(self.group, values, len(self.row_of)).astype(np.float64, copy=False)

    def _by_row(self, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Sum values of pairs (G,) over each row, (R,)."""
        return np.bincount(self.row_of, values, len(self.count)).astype(np.float64, copy=False)

    @cached_property
    def _union(self) -> npt.NDArray[np.int64]:
        """(R,) |U|."""
        return np.bincount(self.row_of, minlength=len(self.count))

    def ranked(self, values: npt.NDArray[np.float64]) -> SparseLogprobs:
        """Return values (G,) as rows (R, K), the largest first."""
        rows = len(self.count)
        starts = np.cumsum(self._union) - self._union
        column = np.arange(len(self.row_of)) - starts[self.row_of]
        ids = np.zeros((rows, self.width), np.int64)
        logprobs = np.full((rows, self.width), -np.inf)
        ids[self.row_of, column], logprobs[self.row_of, column] = self.id_of, values
        order = np.argsort(-logprobs, -1, kind="stable")
        ids, logprobs = np.take_along_axis(ids, order, -1), np.take_along_axis(logprobs, order, -1)
        ids = np.where(np.isfinite(logprobs), ids, ids[:, :1])
        return SparseLogprobs(ids, logprobs.astype(np.float32))


class Merged:
    """The same documents with the average of their distributions in several datasets.

    Documents are matched by their content: token ids, loss mask and segments. Their order is that of the first dataset;
    of equal documents, the n-th of one belongs to the n-th of the others.

    Args:
        sources: at least two datasets.
        weights: a positive number for each.
        average: what to average.
        common: leave out documents that some datasets do not have; otherwise these are refused.
        progress: called with the documents compared and their total.

    Raises:
        ConfigError: weights are not positive numbers, or not one for each dataset.
        MismatchError: the datasets have other tokenizers, vocabularies or temperatures, or other documents.
        CorruptDataError: a document is damaged.
    """

    def __init__(
        self,
        sources: Sequence[Dataset],
        weights: Sequence[float],
        average: Average,
        *,
        common: bool = False,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        self.sources, self.average = list(sources), average
        self.weights = _checked_weights(weights, sources)
        _check_same_vocabulary(sources)
        for source in sources:
            check_plausible(sampled(source), source.codec, source.path)
        self.vocab_size = max(source.codec.vocab_size for source in sources)
        self.numbers = _matched(sources, common, progress)
        self.rows = self.ids = 0
        self.missing = self.uncertainty = 0.0

    def __len__(self) -> int:
        return len(self.numbers[0])

    def read(self, index: int) -> tuple[Document, SparseLogprobs, npt.NDArray[np.float64]]:
        """Return a document as it is in the first dataset, but with the average of the log-probabilities of its tokens
        if all datasets have them; its averaged rows (L − 1, K); and the uncertainty (L − 1,) of each."""
        found = [source[int(own[index])] for source, own in zip(self.sources, self.numbers, strict=True)]
        count = max(len(found[0].input_ids) - 1, 0)
        rows = []
        for document, source in zip(found, self.sources, strict=True):
            each = distributions(decoded(document, source.codec), source.codec.k)
            rows.append(SparseLogprobs(each.ids[:count], each.logprobs[:count]))
        averaged = average_rows(rows, self.weights, self.average, self.vocab_size)
        known = [document.label_logprobs for document in found if document.label_logprobs is not None]
        labels = None
        if len(known) == len(found):
            labels = average_labels(np.stack(known), self.weights, self.average, averaged.log_z)
        return replace(found[0], label_logprobs=labels), averaged.rows, averaged.uncertainty

    def documents(self, codec: Codec) -> Iterator[tuple[Document, SparseLogprobs]]:
        """Yield all documents with the rows that a codec stores of them, and add up what the report says of them."""
        for index in range(len(self)):
            document, rows, uncertainty = self.read(index)
            self.rows += len(rows.ids)
            self.ids += int(np.isfinite(rows.logprobs).sum())
            self.missing += float(np.asarray(rows.missing_mass(), np.float64).sum())
            self.uncertainty += float(uncertainty.sum())
            yield document, fitting(_first(rows, codec.k), codec, document.place)

    def figures(self) -> dict[str, float]:
        """Return means over the rows that `documents` has yielded, for the report."""
        sums = {"ids": self.ids, "missing_mass": self.missing, "uncertainty": self.uncertainty}
        return {name: value / max(self.rows, 1) for name, value in sums.items()}

    def row_source(self, k: int) -> RowSource:
        """Return the averaged rows as what a codec of k ids is chosen and a prior is learned for.

        The sources' own priors are not used: none of them knows the average.
        """
        widths = [source.codec.k for source in self.sources]
        rows = int(np.maximum(self.sources[0].lengths()[self.numbers[0]] - 1, 0).sum())

        def read(index: int) -> SparseLogprobs:
            return _first(self.read(index)[1], max(k, *widths))

        return RowSource(self.name, self.vocab_size, sum(widths), len(self), rows, None, read)

    @property
    def name(self) -> str:
        """What the average is of, for messages."""
        return f"the merge of {' and '.join(source.path for source in self.sources)}"

    def header(self, codec: Codec, *, standalone: bool) -> Header:
        """Return the header of the merged dataset."""
        first = self.sources[0].header
        teachers = [_teacher_name(source) for source in self.sources]
        parts = [f"{weight:.3g} {teacher}" for weight, teacher in zip(self.weights, teachers, strict=True)]
        merged = {
            "average": self.average,
            "sources": [
                {
                    "name": folder_name(source.path),
                    "weight": weight,
                    "teacher": None if source.header.teacher is None else dict(source.header.teacher),
                    "codec": source.codec.to_dict(),
                    "documents": len(source),
                    "kl_mean": (source.header.fidelity or {}).get("kl_mean"),
                }
                for source, weight in zip(self.sources, self.weights, strict=True)
            ],
        }
        capture = {name: value for name, value in first.capture.items() if name in ("packed", "label_logprobs")}
        if not all(source.header.capture.get("label_logprobs") for source in self.sources):
            capture.pop("label_logprobs", None)
        return Header(
            codec=codec.to_dict(),
            vocab_size=first.vocab_size,
            head_size=max(source.header.head_size for source in self.sources),
            tokenizer=next((h.tokenizer for h in (s.header for s in self.sources) if h.tokenizer is not None), None),
            teacher={"name": f"{self.average} of {' + '.join(parts)}", "revision": None, "dtype": None},
            temperature=first.temperature,
            logprobs=f"log of the average of {self.average}, float32",
            alignment=alignment("L-1"),
            capture={**capture, "merged": merged, **({"standalone": True} if standalone else {})},
        )


def merge(
    sources: Sequence[Dataset],
    folder: str | Path,
    *,
    weights: Sequence[float] | None = None,
    average: Average = "probabilities",
    config: CodecConfig | None = None,
    prior: Prior | None = None,
    prior_rows: int = PRIOR_ROWS,
    common: bool = False,
    standalone: bool = False,
    shard_tokens: int = 262_144,
    progress: Progress = lambda what, done, total: None,
) -> MergeReport:
    """Write the average of the distributions of several captures of the same documents, and verify what was written.

    An interrupted merge is resumed after its finished shards.

    Args:
        sources: at least two datasets with the same documents and tokenizer. The first decides the order, and what is
            kept besides the distributions.
        folder: output folder; created if needed.
        weights: a positive number for each source, equal ones by default.
        average: what is averaged: see the module docstring, or docs/several.md.
        config: codec of the output; by default that of the first source.
        prior: for a compact codec; by default one is learned from the averaged rows.
        prior_rows: how many rows to learn it from.
        common: leave out documents that not all sources have.
        standalone, shard_tokens: as for `convert`.
        progress: see `Progress`.

    Raises:
        ConfigError: there is no weight for each source, or one is not a positive number.
        InputError: the folder contains a finished dataset, or rows cannot be stored in this codec.
        MismatchError: sources differ in tokenizer, vocabulary, temperature or documents, or the folder has shards of
            another merge.
        CorruptDataError: a document is damaged, or what was written is.

    Example:
        >>> from distillkit.shards import Dataset, merge
        >>> report = merge([Dataset.open("captured"), Dataset.open("captured")], "merged", weights=[2, 1])
        >>> report.documents, [round(source["weight"], 3) for source in report.sources]
        (3, [0.667, 0.333])
    """
    started = time.perf_counter()
    if read_manifest(folder) is not None:  # before anything that takes long
        raise InputError(f"{folder}: contains a finished dataset; choose another folder or remove it")
    given = [1.0] * len(sources) if weights is None else weights
    merged = Merged(sources, given, average, common=common, progress=partial(progress, "comparing"))
    wanted = sources[0].codec.config if config is None else config
    if config is None and sources[0].codec.vocab_size != merged.vocab_size:
        raise MismatchError(
            f"{sources[0].path}: its codec has {sources[0].codec.vocab_size:,} ids, but those of the others up to "
            f"{merged.vocab_size:,}: name the one with the widest head first, or choose a preset"
        )
    codec = target_codec(
        merged.row_source(wanted.k),
        wanted,
        folder=folder,
        prior=prior,
        prior_rows=prior_rows,
        progress=partial(progress, "learning"),
    )
    total, done = len(merged), 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += 1
        progress("merging", done, total)

    header = merged.header(codec, standalone=standalone)
    options = {"prior": codec.prior, "standalone": standalone, "kept": sources[0].kept_schema}
    with ShardWriter(folder, header, shard_tokens=shard_tokens, resume=True, **options) as writer:
        resumed = sum(shard.documents for shard in writer.resumed)
        otherwise = f"{folder}: the folder contains an unfinished dataset that is not {merged.name}"
        write_documents(writer, merged.documents(codec), codec, otherwise, advance)
        manifest = writer.close()
    verified = verify_dataset(folder, progress=partial(progress, "verifying"))
    if not verified.ok:
        raise CorruptDataError(f"{folder}: what was written cannot be read back: {'; '.join(verified.problems[:3])}")
    return MergeReport(
        output=str(folder),
        average=average,
        sources=[
            {"name": source.path, "weight": weight, "teacher": _teacher_name(source)}
            for source, weight in zip(sources, merged.weights, strict=True)
        ],
        documents=verified.documents,
        tokens=verified.tokens,
        rows=verified.rows,
        resumed_documents=resumed,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards) + (0 if codec.prior is None else len(codec.prior.data)),
        **merged.figures(),
        **_fidelity(manifest.header),
        seconds=time.perf_counter() - started,
    )


def _fidelity(header: Header) -> dict[str, float]:
    stats = None if header.fidelity is None else FidelityStats.from_dict(header.fidelity)
    return {name: math.nan if stats is None else float(getattr(stats, name)) for name in ("kl_mean", "kl_p99")}


def _first(rows: SparseLogprobs, k: int) -> SparseLogprobs:
    return SparseLogprobs(np.ascontiguousarray(rows.ids[:, :k]), np.ascontiguousarray(rows.logprobs[:, :k]))


def _teacher_name(source: Dataset) -> str:
    """The teacher's name; that of the folder if it is not recorded."""
    return str((source.header.teacher or {}).get("name") or folder_name(source.path))


def _checked_weights(weights: Sequence[float], sources: Sequence[Dataset]) -> list[float]:
    """Return weights that sum to 1.

    Raises:
        ConfigError: there are fewer than two sources, or not a positive number for each.
    """
    if len(sources) < 2:
        raise ConfigError(f"a merge needs at least two datasets, found {len(sources)}")
    if len(weights) != len(sources):
        raise ConfigError(f"{len(weights)} weights for {len(sources)} datasets; give one for each, in their order")
    for weight, source in zip(weights, sources, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"the weight of {source.path} is {weight:g}; it must be a positive number")
    largest = max(weights)
    total = sum(weight / largest for weight in weights)
    return [weight / largest / total for weight in weights]


def _check_same_vocabulary(sources: Sequence[Dataset]) -> None:
    """Refuse datasets whose token ids mean different tokens, or whose distributions are not of the same kind.

    Raises:
        MismatchError: names both datasets and what differs.
    """
    first = sources[0]
    for source in sources:
        if source.codec.draws is not None:
            raise MismatchError(
                f"{source.path}: its rows are draws from the teacher's distributions (format {source.codec.format}), "
                "which are no probabilities to average; capture the teacher again in another format"
            )
    for source in sources[1:]:
        ours, theirs = (each.header.tokenizer for each in (first, source))
        if ours is None or theirs is None:
            unknown = first if ours is None else source
            logger.warning(
                "%s does not record its tokenizer: cannot check that it is the same as that of the others", unknown.path
            )
        elif ours["fingerprint"] != theirs["fingerprint"]:
            raise MismatchError(
                f"{first.path} and {source.path} were captured with different tokenizers: {ours['name']} "
                f"({ours['fingerprint']}, {first.header.vocab_size:,} ids) and {theirs['name']} "
                f"({theirs['fingerprint']}, {source.header.vocab_size:,} ids). Their ids mean different tokens, so "
                "that their distributions have no average"
            )
        for name in ("vocab_size", "temperature"):
            values = [getattr(each.header, name) for each in (first, source)]
            if values[0] != values[1]:
                raise MismatchError(
                    f"the {name} of {first.path} is {values[0]:,}, that of {source.path} is {values[1]:,}: their "
                    "distributions cannot be averaged"
                )


def _matched(
    sources: Sequence[Dataset], common: bool, progress: Callable[[int, int], None]
) -> list[npt.NDArray[np.int64]]:
    """For each dataset, the numbers of the documents that all have, in the order of the first.

    Raises:
        MismatchError: a dataset has other documents, and `common` is not set; or there is no common one.
    """
    total, done = sum(map(len, sources)), 0
    places: list[dict[tuple[str, int], int]] = []
    for source in sources:
        seen = Counter[str]()
        own: dict[tuple[str, int], int] = {}
        for number, document in enumerate(source):
            own[document.doc_id, seen[document.doc_id]] = number
            seen[document.doc_id] += 1
            done += 1
            progress(done, total)
        places.append(own)
    first = places[0]
    for source, own in zip(sources[1:], places[1:], strict=True):
        if not common:
            _check_same_documents((sources[0].path, first), (source.path, own))
            _check_same_documents((source.path, own), (sources[0].path, first))
    keys = [key for key in first if all(key in own for own in places)]
    if not keys:
        raise MismatchError(
            f"{' and '.join(source.path for source in sources)} have no document in common: capture the same text "
            "with the same tokenizer, template and windows"
        )
    return [np.array([own[key] for key in keys], np.int64) for own in places]


def _check_same_documents(
    whole: tuple[str, Mapping[tuple[str, int], int]], other: tuple[str, Mapping[tuple[str, int], int]]
) -> None:
    """Refuse a dataset that lacks documents of another."""
    lacking = [number for key, number in whole[1].items() if key not in other[1]]
    if lacking:
        raise MismatchError(
            f"{other[0]} lacks {len(lacking):,} of the {len(whole[1]):,} documents of {whole[0]}, such as document "
            f"{lacking[0]:,}: none has the same tokens, loss mask and segments. Capture the same text with the same "
            "settings, or merge only what they have in common (--common)"
        )

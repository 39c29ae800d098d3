"""Inspects a dataset: its size, its fidelity, and whether its rows line up with its tokens. Needs torch only to run a
teacher.

Shape legend: R rows of a document, k stored ids per row.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from distillkit.codec import Codec
from distillkit.codec.fidelity import FidelityStats, values_of
from distillkit.codec.presets import preset_of, published_bytes
from distillkit.errors import CaptureError, ConfigError, InputError, MismatchError
from distillkit.shards import Dataset, Header
from distillkit.shards.alignment import SHIFTS, ShiftRates, counted_positions
from distillkit.shards.plausibility import IMPOSSIBLE_MASS, WRONG_CODEC, Plausibility, decoded
from distillkit.types import Document, Facts, Shown, SparseLogprobs

if TYPE_CHECKING:
    from distillkit.capture.teachers.hf import HFTeacher

__all__ = ["DrawnRows", "Inspection", "inspect_dataset", "recompute_fidelity"]

logger = logging.getLogger(__name__)

_MASS_BINS = 10_000
"""Resolution of the mass histogram: 0.0001."""
_LOGPROB_BINS, _LOWEST_LOGPROB = 600, -30.0
"""Log-probability histograms: the number of bins (0.05 nats each) and the lower bound; smaller values count as it."""
_QUANTILES = (0.1, 0.5, 0.9)
_ENTROPY_STEP, _ENTROPY_STEPS = 0.5, 13
"""Nats, and how many steps; higher entropies count to the last."""
_WORST = 10


@dataclass(frozen=True)
class DrawnRows:
    """How noisy draws are, with w the shares of a row's ids among its N draws, and p the teacher's probabilities.

    Attributes:
        number, temperature: N, and the temperature of the draws.
        effective_ids: mean of 1 / Σ w²: as many ids of equal shares would be as concentrated.
        variance: estimate of the mean of Σ Var(w) = (1 − Σ p²) / N, the expected squared error of a row: (1 − Σ w²) /
            (N − 1), which is right on average; NaN if N is 1 or without rows.
        variance_bound: 1 / N, which it never exceeds.
    """

    number: int
    temperature: float
    effective_ids: float
    variance: float
    variance_bound: float


@dataclass(frozen=True, repr=False)
class Inspection(Shown):
    """Statistics of a dataset. Rates and masses are over the documents that were read.

    Attributes:
        path, kind: the path that was opened; "distillkit" or "published".
        origin: how the dataset came about, in words: "captured by distillkit", and what became of it since.
        documents, tokens, rows: totals for the dataset.
        documents_read, rows_read: number of documents and rows over which rates and masses are computed.
        files, file_bytes: totals for the dataset.
        part_bytes: the codec's bytes per row, by part: `ids` and `values` (of draws, their counts); in the formats
            compact and sampled also `head`, `framing` and `prior`, whose bytes are divided by all rows. Those of rows
            of varying size are of the documents read.
        overhead_bytes: everything else in the files (the documents' token ids, checksums, Parquet), per row.
        rate_by_entropy: for rows of varying size, (mean entropy over K ∪ {R} in nats, mean bytes) of rows by entropy,
            in steps of half a nat up to 6; else empty.
        ids_per_row: (k + 1,) number of rows by how many ids they have.
        dense_ratio: how many times larger dense bfloat16 logits are: 2 · head_size bytes per row against total bytes.
        topk_ratio: the same for plain top-k: k · (4 bytes per id + 2 per bfloat16 value); of draws, for as many ids as
            rows have on average.
        published_ratio: the same for the published layout with as many ids as rows have on average
            (`distillkit.codec.presets.published_bytes`).
        codec: format, version and config.
        codec_warnings: settings in that config that are valid but probably not intended.
        preset: name of the preset that the config equals, or None.
        teacher, tokenizer, capture, temperature: as in the header; None or empty if unknown.
        rows_per_document: "L-1" or "L", the number of rows of a document of L tokens.
        vocab_size, head_size: ids in the tokenizer's vocabulary, logits per position.
        mass_p1, mass_p50, mass_mean: 1st percentile, median and mean of the total probability of a row's stored ids.
        mass_impossible: fraction of rows whose stored probabilities sum to more than 1.1.
        mass_histogram: (10001,) number of rows by mass, in steps of 0.0001; masses above 1 count as 1.
        counted: number of positions read whose next token counts in a loss.
        first_rate, stored_rate: how often the true next token is the first stored id, and any stored id.
        shifts: result of the alignment check.
        impossible: what the rows show that their codec cannot have written; see `distillkit.shards.plausibility`.
        doubts: what they show that real distributions do not.
        worst_documents: the documents read of which the least probability is stored, up to 10, the least first.
        logprob_mean: (k,) mean decoded log-probability by rank, over the rows that have an id there; NaN if none has.
        logprob_quantiles: (3, k) 10%, 50% and 90% quantiles of the decoded log-probabilities, by rank; NaN likewise.
        fidelity: as recorded by the writer, or recomputed; None if neither is available.
        fidelity_source: "recorded by the writer", what a conversion, merge or retokenization compared it with, the
            teacher's name, or None.
        draws: how noisy the draws of the format sampled are (`DrawnRows`); None for other formats.
    """

    path: str
    kind: str
    origin: str
    documents: int
    tokens: int
    rows: int
    documents_read: int
    rows_read: int
    files: int
    file_bytes: int
    part_bytes: dict[str, float]
    overhead_bytes: float
    rate_by_entropy: tuple[tuple[float, float], ...]
    ids_per_row: npt.NDArray[np.int64]
    dense_ratio: float
    topk_ratio: float
    published_ratio: float
    codec: dict[str, Any]
    codec_warnings: tuple[str, ...]
    preset: str | None
    teacher: dict[str, Any] | None
    tokenizer: dict[str, Any] | None
    capture: dict[str, Any]
    temperature: float
    rows_per_document: str
    vocab_size: int
    head_size: int
    mass_p1: float
    mass_p50: float
    mass_mean: float
    mass_impossible: float
    mass_histogram: npt.NDArray[np.int64]
    counted: int
    first_rate: float
    stored_rate: float
    shifts: ShiftRates
    impossible: tuple[str, ...]
    doubts: tuple[str, ...]
    worst_documents: tuple[dict[str, Any], ...]
    logprob_mean: npt.NDArray[np.float64]
    logprob_quantiles: npt.NDArray[np.float64]
    fidelity: FidelityStats | None
    fidelity_source: str | None
    draws: DrawnRows | None = None

    @property
    def k(self) -> int:
        """Most ids per row."""
        return len(self.logprob_mean)

    @property
    def total_bytes(self) -> float:
        """Total bytes per row, including overhead."""
        return sum(self.part_bytes.values()) + self.overhead_bytes

    @property
    def ids_mean(self) -> float:
        """Mean number of ids per row."""
        rows = self.ids_per_row.sum()
        return float(self.ids_per_row @ np.arange(len(self.ids_per_row)) / rows) if rows else float("nan")

    @property
    def alignment(self) -> Literal["ok", "shifted", "undecided"]:
        """Whether the rows line up with their tokens; "undecided" if there is too little data to decide."""
        if self.shifts.shifted() is not None:
            return "shifted"
        return "ok" if self.shifts.rate(0) > max(self.shifts.rate(-1), self.shifts.rate(1)) else "undecided"

    def facts(self) -> Facts:
        teacher = (self.teacher or {}).get("name", "not recorded")
        rows = [
            ("documents", f"{self.documents:,} of {self.tokens:,} tokens ({self.rows:,} distributions)"),
            ("teacher", str(teacher)),
            ("size", f"{self.total_bytes:,.1f} bytes per token, dense logits {self.dense_ratio:,.0f}× as much"),
            ("codec", f"{self.codec['format']}" + (f", preset {self.preset}" if self.preset else "")),
        ]
        if self.rows_read and self.draws is None:
            below = f"1% of the positions below {self.mass_p1:.2%}"
            rows.append(("stored mass", f"{self.mass_mean:.2%} on average, {below}"))
        if self.rows_read:
            rows += [
                ("in the loss", f"{self.counted / self.rows_read:.1%} of the distributions"),
                ("next token", f"{self.first_rate:.1%} the teacher's first, {self.stored_rate:.1%} stored"),
            ]
        rows.append(("alignment", self.alignment))
        if self.draws is not None:
            rows.append(("draws", f"{self.draws.number}, {self.ids_mean:.1f} ids, variance {self.draws.variance:.2g}"))
        elif self.fidelity is not None and self.fidelity.rows:
            rows.append(("fidelity", f"KL mean {self.fidelity.kl_mean:.2e}, p99 {self.fidelity.kl_p99:.2e} nats"))
        rows += [("IMPOSSIBLE", finding) for finding in self.impossible]
        rows += [("doubtful", finding) for finding in self.doubts]
        rows.insert(0, ("origin", self.origin))
        return self.path, rows

    def _mass(self) -> dict[str, float]:
        shares = {"p1": self.mass_p1, "p50": self.mass_p50, "mean": self.mass_mean}
        return {**shares, "impossible": self.mass_impossible}

    def ids_quantile(self, share: float) -> int:
        """The number of ids that `share` of the rows do not exceed."""
        return int(np.searchsorted(np.cumsum(self.ids_per_row), share * self.ids_per_row.sum()))

    def _ids_per_row(self) -> dict[str, float]:
        return {"mean": self.ids_mean, **{f"p{int(100 * share)}": self.ids_quantile(share) for share in _QUANTILES}}

    @property
    def plausible(self) -> bool:
        """Whether the decoded rows can be distributions. If not, the rows were written with a different codec."""
        return not self.impossible

    def check(self) -> None:
        """Refuse a dataset that should not be trained on.

        Raises:
            MismatchError: the codec is not the dataset's, or its rows are shifted against the tokens.
        """
        if self.impossible:
            raise MismatchError(f"{self.path}: {'; '.join(self.impossible)}. {WRONG_CODEC}")
        if self.alignment == "shifted":
            raise MismatchError(
                f"{self.path}: the rows are shifted by {self.shifts.shifted():+d} against the tokens: the next token "
                f"is the first stored id at {self.shifts}. A student would learn from the wrong positions"
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything except the histogram and curves, as printed by `distillkit-codec inspect --json`.

        These keys are stable; later releases may add others.

        | key | |
        |---|---|
        | `path`, `kind` | the path that was opened; "distillkit" or "published" |
        | `origin` | how the dataset came about, in words |
        | `documents`, `tokens`, `rows`, `files`, `file_bytes` | totals for the dataset |
        | `documents_read`, `rows_read` | sample size for the rates, masses and alignment |
        | `bytes_per_token` | `ids`, `values` (compact, sampled: also `head`, `framing`, `prior`), `codec` (all of
        these), `overhead`, `total`, per stored distribution |
        | `rate_by_entropy` | compact, sampled: pairs of mean entropy (nats) and bytes per distribution, by entropy |
        | `ids_per_row` | `mean`, `p10`, `p50`, `p90` of the stored ids of a distribution, or null |
        | `compression` | `dense_bf16`, `topk_bf16`, `published`: how many times larger these are |
        | `codec` | `format`, `version`, `config`, `preset` (or null), `warnings` |
        | `teacher`, `tokenizer` | name and identification, or null |
        | `capture`, `temperature` | settings of the capture; the temperature that divided the logits |
        | `rows_per_document` | "L-1" or "L" for a document of L tokens |
        | `vocab_size`, `head_size` | ids in the tokenizer's vocabulary, width of the logits |
        | `mass` | null, or total probability of a row's stored ids: `p1`, `p50`, `mean`; `impossible`, fraction of rows
        above 1.1 |
        | `plausibility` | `ok`; `impossible` and `doubts`, lists of what the rows show |
        | `counted` | number of distributions read whose next token counts in a loss (`--loss-on`) |
        | `next_token` | fraction of positions whose true next token `is_first`, `is_stored` |
        | `alignment` | `rates` at "-1", "0", "+1", over `positions`; `verdict` "ok", "shifted", "undecided"; `ok` |
        | `worst_documents` | up to 10 documents of which the least probability is stored: `document` (its number),
        `doc_id`, `rows`, `mass` (mean), `is_first` (fraction of positions whose true next token is the first stored id)
        |
        | `fidelity` | null, or `rows`, `kl_mean`, `kl_p99`, `kl_max`, `worst_error` (nats), `top1_agreement`,
        `mass_error`, `source` |
        | `draws` | null, or of the format sampled `number` N, `temperature`, `effective_ids` (mean of 1 / Σ w², w the
        shares of the draws), `variance` (estimate of the mean Σ Var(w), or null) and `variance_bound`, 1 / N |
        """
        fidelity = None
        if self.fidelity is not None:
            fidelity = {key: value for key, value in self.fidelity.to_dict().items() if key != "sums"}
            fidelity["source"] = self.fidelity_source
        return {
            "path": self.path,
            "kind": self.kind,
            "origin": self.origin,
            "documents": self.documents,
            "tokens": self.tokens,
            "rows": self.rows,
            "files": self.files,
            "file_bytes": self.file_bytes,
            "documents_read": self.documents_read,
            "rows_read": self.rows_read,
            "bytes_per_token": {
                **self.part_bytes,
                "codec": sum(self.part_bytes.values()),
                "overhead": self.overhead_bytes,
                "total": self.total_bytes,
            },
            "rate_by_entropy": [list(pair) for pair in self.rate_by_entropy],
            "ids_per_row": self._ids_per_row() if self.rows_read else None,
            "compression": {
                "dense_bf16": self.dense_ratio,
                "topk_bf16": self.topk_ratio,
                "published": self.published_ratio,
            },
            "codec": {**self.codec, "preset": self.preset, "warnings": list(self.codec_warnings)},
            "teacher": self.teacher,
            "tokenizer": self.tokenizer,
            "capture": self.capture,
            "temperature": self.temperature,
            "rows_per_document": self.rows_per_document,
            "vocab_size": self.vocab_size,
            "head_size": self.head_size,
            "mass": self._mass() if self.rows_read else None,
            "plausibility": {"ok": self.plausible, "impossible": list(self.impossible), "doubts": list(self.doubts)},
            "counted": self.counted,
            "next_token": {"is_first": self.first_rate, "is_stored": self.stored_rate},
            "alignment": {
                "rates": {f"{shift:+d}" if shift else "0": self.shifts.rate(shift) for shift in SHIFTS},
                "positions": self.shifts.positions,
                "verdict": self.alignment,
                "ok": self.alignment != "shifted",
            },
            "worst_documents": list(self.worst_documents),
            "fidelity": fidelity,
            "draws": None if self.draws is None else _finite(asdict(self.draws)),
        }


def inspect_dataset(
    dataset: Dataset, *, sample: int | None = None, progress: Callable[[int, int], None] = lambda done, total: None
) -> Inspection:
    """Reads a dataset once, document by document, and decodes every row.

    Args:
        dataset: any dataset.
        sample: read only this many documents, evenly spaced.
        progress: called with the documents done and the total.

    Raises:
        ConfigError: `sample` is not positive.
        CorruptDataError: a document is damaged.
    """
    if sample is not None and sample < 1:
        raise ConfigError(f"sample: must be at least 1 document, found {sample}")
    seen = _Seen(dataset.codec)
    count = min(sample or len(dataset), len(dataset))
    for number, (index, document) in enumerate(zip(_indices(dataset, count), _chosen(dataset, count), strict=True)):
        seen.add(index, document, decoded(document, dataset.codec))
        progress(number + 1, count)
    codec, header, rows = dataset.codec, dataset.header, dataset.num_rows
    file_bytes = sum(shard.bytes for shard in dataset.shards)
    overhead = (file_bytes - dataset.teacher_bytes) / max(rows, 1)
    parts = seen.part_bytes(0 if codec.prior is None else len(codec.prior.data) / max(rows, 1))
    total = sum(parts.values()) + overhead
    # Draws are stored as they are.
    recorded = header.fidelity if codec.draws is None else None
    return Inspection(
        path=dataset.path,
        kind=dataset.kind,
        origin=_origin(dataset),
        documents=len(dataset),
        tokens=dataset.num_tokens,
        rows=rows,
        documents_read=count,
        files=len(dataset.shards),
        file_bytes=file_bytes,
        part_bytes=parts,
        overhead_bytes=overhead,
        rate_by_entropy=seen.rate_by_entropy(),
        dense_ratio=2 * header.head_size / total,
        topk_ratio=6 * (codec.k if codec.draws is None else seen.ids_mean()) / total,
        published_ratio=(published_bytes(math.ceil(seen.ids_mean()), codec.vocab_size) + overhead) / total,
        codec=codec.to_dict(),
        codec_warnings=tuple(codec.warnings),
        preset=preset_of(codec.config),
        teacher=None if header.teacher is None else dict(header.teacher),
        tokenizer=None if header.tokenizer is None else dict(header.tokenizer),
        capture=dict(header.capture),
        temperature=header.temperature,
        rows_per_document=header.alignment["rows"],
        vocab_size=header.vocab_size,
        head_size=header.head_size,
        fidelity=None if recorded is None else FidelityStats.from_dict(recorded),
        fidelity_source=None if recorded is None else _measured_against(header),
        **seen.figures(),
    )


def _finite(figures: dict[str, Any]) -> dict[str, Any]:
    """Figures for JSON, which has no NaN."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in figures.items()}


def _entropies(logprobs_Rk: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """(R,) entropy of each row over K ∪ {R}, nats."""
    p = np.exp(np.minimum(logprobs_Rk, 0.0))
    rest = np.clip(1 - p.sum(-1), 1e-12, 1.0)
    return np.asarray(-(p * np.where(p > 0, logprobs_Rk, 0.0)).sum(-1) - rest * np.log(rest))


def _chosen(dataset: Dataset, count: int) -> Iterator[Document]:
    if count == len(dataset):
        yield from dataset
    else:
        for index in _indices(dataset, count):
            yield dataset[index]


def _indices(dataset: Dataset, count: int) -> list[int]:
    """The numbers of the documents that are read, evenly spaced."""
    indices: list[int] = np.linspace(0, len(dataset) - 1, count).round().astype(int).tolist()
    return indices


def _origin(dataset: Dataset) -> str:
    if dataset.kind != "distillkit":
        return "published dataset"
    # A capture says of what; other datasets were converted or written.
    made = "captured" if dataset.header.capture.get("dataset") else "written"
    return ", ".join([f"{made} by distillkit", *dataset.header.changes.values()])


def _measured_against(header: Header) -> str:
    """What the recorded fidelity compares the decoded rows with."""
    converted = header.capture.get("converted")
    if not isinstance(converted, Mapping):
        written = {"retokenized": "which is the retokenized row", "merged": "which is the average of the sources"}
        return next((about for key, about in written.items() if key in header.changes), "recorded by the writer")
    known = converted.get("source_kl_mean")
    own = f" (their own KL to the teacher: {known:.2e})" if isinstance(known, float) else ""
    return f"which is what the dataset that it was converted from decodes to{own}"


class _Seen:
    """Accumulates statistics over the documents read."""

    def __init__(self, codec: Codec) -> None:
        k = codec.k
        self._codec = codec
        self._rows = 0
        self._parts: Counter[str] = Counter()
        self._rates = np.zeros((3, _ENTROPY_STEPS))
        self._ids = np.zeros(k + 1, np.int64)
        self._logprob_sum = np.zeros(k)
        self._logprobs = np.zeros((k, _LOGPROB_BINS), np.int64)
        self._mass_sum = 0.0
        self._impossible = 0
        self._masses = np.zeros(_MASS_BINS + 1, np.int64)
        self._first = self._stored = self._predictions = self._counted = 0
        self._plausibility = Plausibility(codec.exact_k)
        self._worst: list[dict[str, Any]] = []
        self._draws = np.zeros(2)

    def add(self, number: int, document: Document, rows: SparseLogprobs) -> None:
        ids, logprobs = np.asarray(rows.ids), np.asarray(rows.logprobs, dtype=np.float64)
        mass = self._add_values(logprobs)
        self._add_sizes(document, logprobs)
        t = counted_positions(document.segments())
        following = document.input_ids[t + 1][:, None]
        self._predictions += len(t)
        self._counted += len(counted_positions(document.segments(), document.loss_mask))
        first = int((ids[t, :1] == following).sum())
        self._first += first
        self._stored += int((ids[t] == following).any(-1).sum())
        self._plausibility.add(document, rows)
        if len(mass):
            about = {"document": number, "doc_id": document.doc_id, "rows": len(mass), "mass": float(mass.mean())}
            worst = [*self._worst, {**about, "is_first": first / max(len(t), 1)}]
            self._worst = sorted(worst, key=lambda each: each["mass"])[:_WORST]

    def _add_values(self, logprobs_Rk: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Add the values of a document; returns the total probability of each row (R,)."""
        k = logprobs_Rk.shape[1]
        # With the wrong codec, values can be arbitrary; e^100 is clearly impossible, yet finite.
        mass_R: npt.NDArray[np.float64] = np.exp(np.minimum(logprobs_Rk, 100.0)).sum(-1)
        self._impossible += int((mass_R > IMPOSSIBLE_MASS).sum())
        self._rows += len(mass_R)
        self._mass_sum += float(mass_R.sum())
        bins = np.floor(np.minimum(mass_R, 1.0) * _MASS_BINS + 1e-9).astype(int)
        self._masses += np.bincount(bins, minlength=_MASS_BINS + 1)
        if self._codec.draws is not None:
            squares_R = np.exp(2 * logprobs_Rk).sum(-1)
            self._draws += (1 / squares_R).sum(), (1 - squares_R).sum()
        there_Rk = logprobs_Rk > -np.inf
        self._ids += np.bincount(there_Rk.sum(-1), minlength=k + 1)
        self._logprob_sum += np.where(there_Rk, logprobs_Rk, 0.0).sum(0)
        bins_Rk = np.clip((1 - logprobs_Rk / _LOWEST_LOGPROB) * _LOGPROB_BINS, 0, _LOGPROB_BINS - 1).astype(int)
        bins_Rk += np.arange(k) * _LOGPROB_BINS
        self._logprobs += np.bincount(bins_Rk[there_Rk], minlength=k * _LOGPROB_BINS).reshape(k, -1)
        return mass_R

    def _add_sizes(self, document: Document, logprobs_Rk: npt.NDArray[np.float64]) -> None:
        """Counts what the parts of a document take and, of rows of varying size, how they depend on their entropy."""
        self._parts.update(self._codec.sizes(document.teacher, document.num_rows))
        if not self._codec.is_fixed:
            entropy_R = _entropies(logprobs_Rk)
            at_R = np.minimum(entropy_R / _ENTROPY_STEP, _ENTROPY_STEPS - 1).astype(int)
            bytes_R = self._codec.row_bits(document.teacher, document.num_rows) / 8
            for sums, values_R in zip(self._rates, (np.ones(len(at_R)), entropy_R, bytes_R), strict=True):
                sums += np.bincount(at_R, values_R, minlength=_ENTROPY_STEPS)

    def part_bytes(self, prior: float) -> dict[str, float]:
        """Bytes per row by part, with those of the prior."""
        if self._codec.is_fixed:
            return {"ids": float(self._codec.id_bytes), "values": float(self._codec.value_bytes)}
        rows = max(self._rows, 1)
        found = {name: self._parts[name] / rows for name in ("head", "ids", "values", "framing")}
        return {**found, "prior": prior} if prior else found

    def ids_mean(self) -> float:
        """Mean number of ids per row; k without rows."""
        return float(self._ids @ np.arange(len(self._ids)) / self._rows) if self._rows else float(self._codec.k)

    def rate_by_entropy(self) -> tuple[tuple[float, float], ...]:
        """Mean entropy and bytes of rows, by entropy."""
        return tuple((float(entropy / rows), float(size / rows)) for rows, entropy, size in self._rates.T if rows)

    def figures(self) -> dict[str, Any]:
        rows, predictions, there_k = self._rows or float("nan"), max(self._predictions, 1), self._rows_with_rank()
        return {
            "rows_read": self._rows,
            "mass_p1": self._mass_quantile(0.01),
            "mass_p50": self._mass_quantile(0.5),
            "mass_mean": self._mass_sum / rows,
            "mass_impossible": self._impossible / rows,
            "mass_histogram": self._masses,
            "counted": self._counted,
            "first_rate": self._first / predictions,
            "stored_rate": self._stored / predictions,
            "shifts": self._plausibility.shifts,
            "impossible": tuple(self._plausibility.impossible()),
            "doubts": tuple(self._plausibility.doubts()),
            "ids_per_row": self._ids,
            "worst_documents": tuple(self._worst),
            "draws": self._drawn(),
            "logprob_mean": np.divide(self._logprob_sum, there_k, out=np.full(len(there_k), np.nan), where=there_k > 0),
            "logprob_quantiles": np.where(
                there_k > 0, np.stack([self._logprob_quantile(share) for share in _QUANTILES]), np.nan
            ),
        }

    def _drawn(self) -> DrawnRows | None:
        draws, rows = self._codec.draws, self._rows or float("nan")
        if draws is None:
            return None
        effective, spread = self._draws / rows
        variance = spread / (draws.number - 1) if draws.number > 1 else float("nan")
        return DrawnRows(draws.number, draws.temperature, float(effective), float(variance), 1 / draws.number)

    def _rows_with_rank(self) -> npt.NDArray[np.int64]:
        """(k,) number of rows that have an id at each rank."""
        return np.asarray(self._rows - np.cumsum(self._ids)[:-1])

    def _mass_quantile(self, share: float) -> float:
        if not self._rows:
            return float("nan")
        index = int(np.searchsorted(np.cumsum(self._masses), share * self._rows))
        return index / _MASS_BINS

    def _logprob_quantile(self, share: float) -> npt.NDArray[np.float64]:
        """(k,) the centre of the bin that contains the quantile."""
        bins_k = (np.cumsum(self._logprobs, -1) < share * self._rows_with_rank()[:, None]).sum(-1)
        return np.asarray((1 - (bins_k + 0.5) / _LOGPROB_BINS) * _LOWEST_LOGPROB)


def recompute_fidelity(
    dataset: Dataset, teacher: str, *, sample: int = 16, progress: Callable[[int, int], None] = lambda done, total: None
) -> FidelityStats:
    """Runs a teacher on a sample of the documents and compares its distributions with the stored ones.

    The stored ids are looked up among the teacher's 2k most probable ones, since ids of nearly equal probability at the
    end of the list may be ranked differently on another machine. Rows with an id that is not among them are skipped,
    and a warning reports their number.

    Args:
        dataset: any dataset of unpacked documents.
        teacher: folder or Hub id of the model. It runs in the dtype recorded in the header, if any.
        sample: number of documents, evenly spaced.
        progress: called with the documents done and the total.

    Raises:
        MismatchError: this is not the dataset's teacher: its head has a different size, most of its first ids differ,
            or most rows have ids that are not among its most probable ones.
        InputError: documents are packed, the logits were divided by a temperature, or rows were drawn.
        ConfigError: the model cannot be loaded.
        CaptureError: the teacher rejects a document.
    """
    if dataset.codec.draws is not None:
        raise InputError(
            f"{dataset.path}: contains draws of the teacher's distributions (format sampled), stored as they are: "
            "there is no fidelity to compute; `inspect` without --teacher shows their variance"
        )
    if dataset.header.temperature != 1:
        raise InputError(
            f"{dataset.path}: contains distributions at temperature {dataset.header.temperature}; only those at "
            "temperature 1 can be recomputed"
        )
    engine = _teacher_of(dataset, teacher)
    stats, rows, agreeing = FidelityStats(), 0, 0
    count = min(sample, len(dataset))
    for number, document in enumerate(_chosen(dataset, count)):
        if len(document.input_ids) > 1:
            now = _scored(engine, dataset, document)
            stored = decoded(document, dataset.codec)
            first = np.asarray(now.ids)[:, 0] == np.asarray(stored.ids)[: len(now.ids), 0]
            rows, agreeing = rows + len(first), agreeing + int(first.sum())
            stats.update(*_same_ids(now, stored))
        progress(number + 1, count)
    if agreeing < 0.5 * rows:
        raise MismatchError(
            f"{teacher}: its most probable token equals the stored one at only {agreeing / rows:.1%} of {rows:,} "
            "positions; this is not the dataset's teacher"
        )
    _check_left_out(teacher, stats.rows, rows)
    return stats


def _check_left_out(teacher: str, compared: int, rows: int) -> None:
    """Reports skipped rows, since the fidelity of the others says nothing about them."""
    left_out = rows - compared
    said = f"{left_out:,} of {rows:,} rows have ids that are not among its most probable ones"
    if left_out > 0.5 * rows:
        raise MismatchError(f"{teacher}: {said}; this is not the dataset's teacher, or the ids are wrong")
    if left_out:
        logger.warning("%s: %s; fidelity was computed without them", teacher, said)


def _teacher_of(dataset: Dataset, teacher: str) -> HFTeacher:

    from distillkit.capture.engine_settings import HFSettings
    from distillkit.capture.teachers.hf import HFTeacher

    dtype: Any = (dataset.header.teacher or {}).get("dtype") or "auto"
    try:
        settings = HFSettings(dtype=dtype)
    except ValueError as error:
        raise ConfigError(
            f"{dataset.path}: the header's teacher.dtype is {dtype!r:.100}, not a type of weights"
        ) from error
    engine = HFTeacher(teacher, settings)
    if engine.head_size != dataset.header.head_size:
        raise MismatchError(
            f"{teacher}: its head size is {engine.head_size}, but the dataset's is {dataset.header.head_size}"
        )
    return engine


def _scored(engine: HFTeacher, dataset: Dataset, document: Document) -> SparseLogprobs:
    """Runs the teacher on a document, for twice as many ids as are stored."""
    from distillkit.capture.teachers.base import RejectedDocument, RowRequest
    from distillkit.types import TokenDocument

    if document.segment_lengths is not None:
        raise InputError(
            f"{dataset.path}: document {document.doc_id} is packed, but the teacher would read it as a single document"
        )
    wide = min(2 * dataset.codec.k, engine.head_size)
    [scored] = engine.score([TokenDocument(document.input_ids, dataset.path)], RowRequest(wide))
    if isinstance(scored, RejectedDocument):
        raise CaptureError(scored.reason)
    return scored.rows


def _same_ids(now: SparseLogprobs, stored: SparseLogprobs) -> tuple[SparseLogprobs, SparseLogprobs]:
    """Looks up the teacher's values of the stored ids, in the stored order.

    Args:
        now: (R, n) rows of the teacher.
        stored: at least R rows of k ≤ n ids; rows after the R-th have no next token and are ignored.

    Returns:
        The teacher's rows and the stored ones, for the same ids. Rows are omitted if a stored id is not among the
        teacher's n ids.
    """
    count = len(now.ids)
    ids, logprobs = np.asarray(stored.ids)[:count], np.asarray(stored.logprobs)[:count]
    original, whole = values_of(now, SparseLogprobs(ids, logprobs))
    return SparseLogprobs(ids[whole], original[whole]), SparseLogprobs(ids[whole], logprobs[whole])

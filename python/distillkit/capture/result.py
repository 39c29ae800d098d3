"""What a capture reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distillkit.console import human_bytes
from distillkit.types import Facts, Shown

__all__ = ["CaptureReport", "counted"]

_COUNTED = {
    "empty_rows": "empty rows left out",
    "documents_of_one_token": "documents of one token left out",
    "rows_left_out_by_where": "rows left out by --where",
    "documents_left_out_by_length": "documents left out by their length",
    "duplicate_documents": "duplicate documents left out",
    "documents_without_a_counted_token": "documents left out that have no counted token",
    "long_documents_skipped": "long documents left out",
    "long_documents_truncated": "long documents truncated",
    "long_documents_in_windows": "long documents captured in windows",
}


def counted(counts: Mapping[str, int]) -> list[str]:
    """What was done with rows and documents that were not captured as they are, from a reader's counts."""
    texts = {name: _COUNTED.get(name, name.replace("_", " ")) for name in counts if name != "rows"}
    return [
        f"1 {text.replace('documents', 'document', 1).replace('rows', 'row', 1)}"
        if counts[name] == 1
        else f"{counts[name]:,} {text}"
        for name, text in texts.items()
        if counts[name]
    ]


@dataclass(frozen=True, kw_only=True, repr=False)
class CaptureReport(Shown):
    """The result of a capture. Counts cover the entire dataset, including what earlier runs wrote.

    Attributes:
        output: the dataset's folder.
        documents, tokens, rows, shards: its size; a document of L tokens has L − 1 rows, or L with `last_row`.
        unfinished_shards: shards still missing, which were not part of this run; the manifest is written after the
            last one.
        bytes_per_token: the codec's bytes per row, ids and values; in the compact format, their mean and the row's
            share of the prior; 0 without rows.
        prior_bytes: size of the prior, which the dataset stores once; 0 without one.
        published_bytes_per_token: bytes per row of the published layout with as many ids; None for draws.
        disk_bytes: size of the shards and of the prior.
        kl_mean, kl_p99: KL(teacher ‖ decoded) over K ∪ {R} in nats per row, measured while writing; None without rows,
            and for draws, which are stored as they are.
        mass_mean: mean total probability of the stored ids of a row; None if unknown, and for draws.
        mass_quantiles: quantiles of that probability, by the share of rows that do not exceed them; empty for draws.
        next_token_rates: how often the teacher's first id is the next token, with the rows in place ("0") and shifted
            by one; the rate should be far higher in place.
        shifted: −1 or +1 if rows match the tokens significantly better when shifted by one; else None.
        resumed_documents: number of documents written by earlier runs.
        already_complete: the dataset was already complete; nothing was captured.
        passed_over: number of source rows, and of rows and documents left out, truncated or divided, by reason.
        skipped: (source, reason) of each document whose distributions could not be computed or stored.
        seconds: time this run spent scoring and writing, without loading.
        new_tokens, tokens_per_second: number of tokens captured in this run, and throughput.
        teacher_seconds, blocked_seconds: time this run waited for the teacher, and time the teacher waited for the
            encoder.
        learn_seconds: time this run spent on learning the prior, once the teacher had scored what it is learned from.
        encode_seconds, write_seconds: time spent by the encoder thread, in parallel with the teacher.
        peak_rss_bytes: peak resident memory of the process.
        peak_cuda_bytes: peak memory on the first CUDA device; 0 without one.
    """

    output: str
    documents: int
    tokens: int
    rows: int
    shards: int
    unfinished_shards: int
    bytes_per_token: float
    prior_bytes: int
    published_bytes_per_token: int | None
    disk_bytes: int
    kl_mean: float | None
    kl_p99: float | None
    mass_mean: float | None
    mass_quantiles: dict[str, float | None]
    next_token_rates: dict[str, float]
    shifted: int | None
    resumed_documents: int
    already_complete: bool
    passed_over: dict[str, int]
    skipped: list[list[str]]
    seconds: float
    new_tokens: int
    tokens_per_second: float
    teacher_seconds: float
    blocked_seconds: float
    encode_seconds: float
    write_seconds: float
    learn_seconds: float
    peak_rss_bytes: int
    peak_cuda_bytes: int

    def facts(self) -> Facts:
        rows = [
            (
                "documents",
                f"{self.documents:,}" + (f" ({self.resumed_documents:,} before)" if self.resumed_documents else ""),
            ),
            ("tokens", f"{self.tokens:,} ({self.rows:,} distributions)"),
            (
                "shards",
                f"{self.shards:,}" + (f", {self.unfinished_shards:,} missing" if self.unfinished_shards else ""),
            ),
            ("size", f"{human_bytes(self.disk_bytes)}, {self.bytes_per_token:.4g} bytes per token"),
        ]
        if self.kl_mean is not None and self.kl_p99 is not None:
            rows.append(("fidelity", f"KL mean {self.kl_mean:.2e}, p99 {self.kl_p99:.2e} nats"))
        if self.mass_mean is not None:
            rows.append(("stored mass", f"{self.mass_mean:.2%} on average"))
        if self.shifted is not None:
            rows.append(("alignment", f"ROWS ARE SHIFTED by {self.shifted:+d} against their tokens"))
        if self.new_tokens:
            rows.append(("this run", f"{self.new_tokens:,} tokens, {self.tokens_per_second:,.0f} per second"))
        return f"captured: {self.output}", rows + [("left out", text) for text in counted(self.passed_over)]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able mapping."""
        return asdict(self)

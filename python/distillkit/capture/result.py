"""What a capture reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CaptureReport"]


@dataclass(frozen=True, kw_only=True)
class CaptureReport:
    """What a capture made. Counts are those of the whole dataset, also where an earlier run wrote part of it.

    Attributes:
        output: the dataset's folder.
        documents, tokens, rows, shards: its size; a document of L tokens has L − 1 rows, or L with the last one.
        unfinished_shards: shards that this run was not to do, and nobody has done yet; without them no manifest.
        bytes_per_token: the codec's bytes a row, ids and values.
        disk_bytes: size of the shards.
        kl_mean, kl_p99: KL(teacher's top k ‖ decoded) in nats a row, as measured while writing; None if there are no
            rows.
        mass_mean: mean probability of the stored ids of a row; None if it is not known.
        mass_quantiles: that probability, not exceeded by this share of the rows.
        next_token_rates: how often the teacher's first id is the next token, with rows at their place ("0") and one
            off; at its place it should be far more often.
        shifted: −1 or +1 if rows fit the tokens better one off, beyond chance; else None.
        resumed_documents: how many documents an earlier run had written.
        already_complete: the whole dataset was there, nothing was captured.
        passed_over: rows of the source, and what of it is not in the dataset, by reason.
        skipped: documents that the teacher gave no distributions for: where they are from, and why.
        seconds: time of this run's scoring and writing, without loading.
        new_tokens, tokens_per_second: tokens this run captured, and how fast.
        teacher_seconds, blocked_seconds: this run's time waiting for the teacher, and that the teacher waited for the
            encoder.
        encode_seconds, write_seconds: of the encoder's thread, beside the teacher.
        peak_rss_bytes: largest resident memory of the process so far.
        peak_cuda_bytes: largest memory on the first CUDA device; 0 without one.
    """

    output: str
    documents: int
    tokens: int
    rows: int
    shards: int
    unfinished_shards: int
    bytes_per_token: float
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
    peak_rss_bytes: int
    peak_cuda_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able mapping."""
        return asdict(self)

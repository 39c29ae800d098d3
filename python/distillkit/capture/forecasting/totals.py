"""How much text a capture has to process: counted, or estimated from a random sample of the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distillkit.capture.inputs import CaptureInputs, document_reader
from distillkit.capture.settings import CaptureSettings
from distillkit.capture.shard_plan import ShardPlan, read_plan
from distillkit.errors import ConfigError
from distillkit.shards import Manifest, read_manifest
from distillkit.shards.storage import Folder
from distillkit.types import TokenDocument

__all__ = ["SAMPLED_ROWS", "Amount", "TextForecast", "read_totals", "total"]

SAMPLED_ROWS = 512
"""Number of rows sampled to estimate the totals of a larger source; smaller sources are counted."""
_SIGMAS = 1.96
"""Standard deviations of a 95% interval."""


@dataclass(frozen=True)
class Amount:
    """A number that is known exactly, or estimated with a 95% confidence interval.

    Attributes:
        value: the number, or its estimate.
        low, high: the interval; both equal `value` if the number is exact.
    """

    value: int
    low: int
    high: int

    @classmethod
    def known(cls, value: int) -> Amount:
        """Return an exact amount."""
        return cls(value, value, value)

    @property
    def exact(self) -> bool:
        """Whether the number is known exactly."""
        return self.low == self.high

    def times(self, factor: float) -> Amount:
        """Return this amount times `factor`, rounded up."""
        return Amount(*(math.ceil(number * factor) for number in (self.value, self.low, self.high)))

    def plus(self, count: int) -> Amount:
        """Return this amount plus `count`."""
        return Amount(*(number + count for number in (self.value, self.low, self.high)))

    def less(self, count: int) -> Amount:
        """Return this amount minus `count`, but at least 0."""
        return Amount(*(max(number - count, 0) for number in (self.value, self.low, self.high)))


@dataclass(frozen=True)
class TextForecast:
    """How much text the capture processes.

    Attributes:
        rows: number of source rows that the capture reads.
        sampled_rows: how many of them were read for this forecast; 0 if an earlier run has read them all.
        documents, tokens: size of the finished dataset.
        captured_tokens: tokens in shards that earlier runs completed.
        left_tokens: tokens that this run would capture.
        passed_over: number of rows and documents left out, by reason, among the rows that were read.
        duplicates_unknown: whether unread rows may be duplicates, which would be skipped.
    """

    rows: int
    sampled_rows: int
    documents: Amount
    tokens: Amount
    captured_tokens: int
    left_tokens: Amount
    passed_over: dict[str, int]
    duplicates_unknown: bool


def read_totals(inputs: CaptureInputs, folder: Folder) -> tuple[TextForecast, list[TokenDocument]]:
    """Count or estimate the text, and return some of its documents for a trial run of the teacher."""
    finished, plan = read_manifest(folder.url), read_plan(folder)
    if finished is not None:
        inputs.check_finished(finished, folder)
        return _finished_text(finished), []
    if plan is not None:
        return _planned_text(inputs, inputs.plan(folder))
    return _sampled_text(inputs)


def _finished_text(finished: Manifest) -> TextForecast:
    counts, rows = _passed_over((finished.capture or {}).get("passed_over", {}))
    tokens = sum(shard.tokens for shard in finished.shards)
    documents = Amount.known(sum(shard.documents for shard in finished.shards))
    return TextForecast(
        rows, 0, documents, Amount.known(tokens), tokens, Amount.known(0), counts, duplicates_unknown=False
    )


def _planned_text(inputs: CaptureInputs, plan: ShardPlan) -> tuple[TextForecast, list[TokenDocument]]:
    """Take the numbers from the plan of an interrupted capture."""
    done = plan.receipts(trusted=range(len(plan.shards)))
    left = [number for number in inputs.settings.shard_numbers(len(plan.shards)) if number not in done]
    counts, rows = _passed_over(plan.counts)
    text = TextForecast(
        rows=rows,
        sampled_rows=0,
        documents=Amount.known(plan.documents),
        tokens=Amount.known(plan.tokens),
        captured_tokens=sum(plan.shards[number].tokens for number in done),
        left_tokens=Amount.known(sum(plan.shards[number].tokens for number in left)),
        passed_over=counts,
        duplicates_unknown=False,
    )
    return text, plan.read(left[0]) if left else []


def _sampled_text(inputs: CaptureInputs) -> tuple[TextForecast, list[TokenDocument]]:
    """Read a random sample of the rows, or all of them if there are few."""
    settings, source = inputs.settings, inputs.source()
    # Raises the capture's own errors, for example for another model's tokenizer.
    inputs.header(source)
    there = source.num_rows
    rows = min(settings.samples or there, there)
    everything = rows <= SAMPLED_ROWS
    chosen = settings if everything else settings.model_copy(update={"samples": SAMPLED_ROWS, "shuffle": False})
    reader = document_reader(chosen, source, inputs.tokenizer, id_limit=inputs.head_size)
    documents, tokens_of, documents_of = [], dict[int, int](), dict[int, int]()
    for document in reader:
        # The reader yields all documents of a row before it advances `rows`.
        tokens_of[reader.rows] = tokens_of.get(reader.rows, 0) + len(document.input_ids)
        documents_of[reader.rows] = documents_of.get(reader.rows, 0) + 1
        documents.append(document)
    counts, read = _passed_over(reader.counts)
    tokens = total(list(tokens_of.values()), read, rows, there)
    text = TextForecast(
        rows=rows,
        sampled_rows=read,
        documents=total(list(documents_of.values()), read, rows, there),
        tokens=tokens,
        captured_tokens=0,
        left_tokens=_in_range(settings, tokens),
        passed_over=counts,
        duplicates_unknown=not everything and bool(settings.identity()["drop_duplicates"]),
    )
    if not documents and everything:
        raise ConfigError(
            f"{settings.dataset}: contains no document of at least 2 tokens: {text.passed_over or 'no rows'}"
        )
    return text, documents


def _passed_over(counts: Mapping[str, int]) -> tuple[dict[str, int], int]:
    """Split a reader's counts into the non-zero reasons for leaving rows or documents out, and the rows read."""
    return {reason: count for reason, count in counts.items() if count and reason != "rows"}, counts.get("rows", 0)


def total(values: Sequence[int], sampled: int, rows: int, there: int) -> Amount:
    """Estimate a sum over rows from a random sample of them.

    Args:
        values: the non-zero values of sampled rows; the other sampled rows have 0.
        sampled: number of rows in the sample.
        rows: number of rows that the sum is over; themselves a random sample if fewer than `there`.
        there: total number of rows.
    """
    if sampled >= rows:
        return Amount.known(sum(values))
    each = np.zeros(sampled)
    each[: len(values)] = values
    # Variance of the difference between the means of two random samples of `there` rows.
    variance = float(each.var(ddof=1)) * ((1 / sampled - 1 / there) + (1 / rows - 1 / there))
    mean, error = float(each.mean()), _SIGMAS * math.sqrt(variance)
    return Amount(
        round(rows * mean), max(round(rows * (mean - error)), int(each.sum())), math.ceil(rows * (mean + error))
    )


def _in_range(settings: CaptureSettings, tokens: Amount) -> Amount:
    """The tokens in the shards that the settings select."""
    if settings.shard_range is None:
        return tokens
    shards = math.ceil(tokens.value / settings.shard_tokens)
    return tokens.times(len(settings.shard_numbers(shards)) / max(shards, 1))

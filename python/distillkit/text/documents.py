"""The documents of a capture: which rows are read, and how documents that are too long for the teacher are cut."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from distillkit.errors import ConfigError, InputError
from distillkit.shards.overflow import default_overlap, windows
from distillkit.text.arrow_rows import stored_value
from distillkit.text.layouts import has_value
from distillkit.text.policy import capture_policy
from distillkit.text.rows import RowReader
from distillkit.text.sources import Row, Source, chosen_rows, kept_schema
from distillkit.types import TokenDocument

__all__ = ["DocumentReader"]

logger = logging.getLogger(__name__)

# Rows tokenised per call: fast tokenizers use all cores for a batch.
_TOKENIZE_ROWS = 64


@dataclass
class DocumentReader:
    """Reads a source's rows as documents; every iteration yields the same ones.

    Attributes:
        source: where rows come from.
        tokenizer: a transformers tokenizer.
        max_tokens: maximum length of the documents yielded.
        id_limit: ids in rows that are already tokenised must be below this.
        chat: whether chat rows may be rendered with the tokenizer's chat template; if not, they are refused.
        samples: read a random sample of this many rows, in the source's order; None: all rows.
        seed: seed of the sample and of the shuffled order.
        shuffle: read rows in random order; does not change which rows are sampled.
        where: (column, value) pairs; read only rows that match all of them. Values that are not text are compared as
            JSON.
        shortest, longest: skip documents with fewer or more tokens, measured before they are cut.
        overflow: what to do with documents longer than `max_tokens`: "window" cuts them into overlapping pieces in
            which each token counts once, "truncate" keeps the beginning, "skip" leaves them out.
        overlap: tokens that each piece repeats from the previous one as context; None: `default_overlap`.
        loss_on: which tokens count in the loss; see `capture_policy`.
        keep_columns: names of source columns to copy to the documents, "all", or "none".
        read_columns: the columns to read rows by; none: those that they have. See `capture_policy`.
        append_eos: whether plain text ends with the end-of-sequence token. None: if the tokenizer has one.
        drop_duplicates: skip documents whose ids and mask have been seen before, measured before they are cut; takes
            about 120 bytes of memory per document. None: only if no columns are kept, so that with columns the output
            rows match the input rows.
        skip_bad: skip up to this many rows that are not understood or cannot be rendered.
        rows, empty, short: counted while iterating: rows read, rows without content, and documents of one token (no
            next token to predict).
    """

    source: Source
    tokenizer: Any
    max_tokens: int
    id_limit: int
    chat: bool = True
    samples: int | None = None
    seed: int = 42
    shuffle: bool = False
    where: Sequence[tuple[str, str]] = ()
    shortest: int | None = None
    longest: int | None = None
    overflow: str = "window"
    overlap: int | None = None
    loss_on: str = "auto"
    keep_columns: str | Sequence[str] = "none"
    read_columns: Sequence[str] = ()
    append_eos: bool | None = None
    drop_duplicates: bool | None = None
    skip_bad: int = 0
    rows: int = field(default=0, init=False)
    empty: int = field(default=0, init=False)
    short: int = field(default=0, init=False)
    _counts: dict[str, int] = field(default_factory=dict, init=False)
    _seen: set[bytes] | None = field(default=None, init=False)

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows read so far, and of rows and documents left out, by reason; most only if non-zero."""
        known = {"rows": self.rows, "empty_rows": self.empty, "documents_of_one_token": self.short}
        return {**known, **self._counts}

    @cached_property
    def kept(self) -> pa.Schema:
        """Schema of the source columns copied to the documents.

        Raises:
            ConfigError: the source has no such column, or the column cannot be kept.
        """
        return kept_schema(self.source, self.keep_columns)

    @cached_property
    def _reader(self) -> RowReader:
        ends = getattr(self.tokenizer, "eos_token", None) is not None if self.append_eos is None else self.append_eos
        policy = capture_policy(self.loss_on, render_chats=self.chat, columns=self.read_columns, append_eos=ends)
        return RowReader(self.tokenizer, policy, self.id_limit)

    def __iter__(self) -> Iterator[TokenDocument]:
        """Yield the documents.

        Raises:
            InputError: a row has an unknown format; the message names the row, its columns and the known formats.
            ConfigError: a setting does not fit the rows: there are chat rows, but the tokenizer has no chat template
                or `chat` is off; the rows lack the part that `loss_on` names; no row has a column named in `where`.
        """
        self.rows = self.empty = self.short = 0
        self._counts = {}
        drop = self.keep_columns in ("none", ("none",)) if self.drop_duplicates is None else self.drop_duplicates
        self._seen = set() if drop else None
        return self._read()

    def _is_duplicate(self, document: TokenDocument) -> bool:
        """Whether a complete document has been seen before: long ones may have pieces in common."""
        from distillkit.shards.table import document_id

        if self._seen is None:
            return False
        mask = document.loss_mask
        # Nothing predicts the first token, so its mask does not matter.
        key = bytes.fromhex(document_id(document.input_ids, None if mask is None or mask[1:].all() else mask))
        known = key in self._seen
        self._seen.add(key)
        return known

    def _count(self, what: str) -> None:
        self._counts[what] = self._counts.get(what, 0) + 1

    def _read(self) -> Iterator[TokenDocument]:
        pending: list[Row] = []
        for row in self._matching_rows():
            pending.append(row)
            if len(pending) == _TOKENIZE_ROWS:
                yield from self._documents(pending)
                pending = []
        yield from self._documents(pending)

    def _matching_rows(self) -> Iterator[Row]:
        unseen = {column for column, _ in self.where}
        for where, row in self._chosen_rows():
            if isinstance(row, InputError):
                yield where, row
                continue
            unseen -= row.keys()
            if all(has_value(row.get(column), value) for column, value in self.where):
                yield where, row
            else:
                self.rows += 1
                self._count("rows_left_out_by_where")
        if unseen:
            raise ConfigError(f"where: no row of the dataset has a column {', '.join(sorted(unseen))}")

    def _chosen_rows(self) -> Iterator[Row]:
        rows = self.source.num_rows
        everything = self.samples is None or self.samples >= rows
        if everything and not self.shuffle:
            return self.source.rows()
        random = np.random.default_rng(self.seed)
        order = random.permutation(rows) if everything else random.choice(rows, self.samples, replace=False)
        return self.source.rows(order) if self.shuffle else chosen_rows(self.source, order)

    def _documents(self, rows: Sequence[Row]) -> Iterator[TokenDocument]:
        """Tokenise some rows and cut their documents."""
        kept = self.kept
        for where, row, documents in self._read_rows(rows):
            self.rows += 1
            if not any(len(document.input_ids) for document in documents):
                self.empty += 1
                continue
            columns = {field.name: stored_value(row.get(field.name), field.type) for field in kept} or None
            for document in documents:
                length = len(document.input_ids)
                for start, stop, mask in self._pieces(document):
                    place = where if stop - start == length else f"{where}, tokens {start}…{stop - 1}"
                    yield TokenDocument(document.input_ids[start:stop], place, mask, columns)

    def _read_rows(self, rows: Sequence[Row]) -> Iterator[tuple[str, Any, list[TokenDocument]]]:
        """Yield (place, row, documents), without rows that cannot be read."""
        try:
            found = self._reader(rows)
        except InputError:
            if not self.skip_bad:
                raise
            for row in rows:
                documents = self._read_or_skip(row)
                if documents is not None:
                    yield *row, documents
            return
        for row, documents in zip(rows, found, strict=True):
            yield *row, documents

    def _read_or_skip(self, row: Row) -> list[TokenDocument] | None:
        """Tokenise a row; None if it is one of those that may be left out."""
        try:
            return self._reader([row])[0]
        except InputError as error:
            if self._counts.get("rows_that_cannot_be_used", 0) == self.skip_bad:
                raise InputError(
                    f"{error} (after {self.skip_bad} others; --skip-bad-documents sets how many may be left out)"
                ) from error
            logger.warning("left out: %s", error)
        self.rows += 1
        self._count("rows_that_cannot_be_used")
        return None

    def _pieces(self, document: TokenDocument) -> Iterator[tuple[int, int, npt.NDArray[np.bool_] | None]]:
        """Yield (start, stop, mask) of each piece of a document to capture: none, the complete document, or several.

        Pieces in which no token counts are skipped.
        """
        length = len(document.input_ids)
        if length < 2:
            self.short += 1
            return
        if not (self.shortest or 0) <= length <= (self.longest or length):
            self._count("documents_left_out_by_length")
            return
        if self._is_duplicate(document):
            self._count("duplicate_documents")
            return
        pieces = [(0, length)]
        if length > self.max_tokens:
            if self.overflow == "skip":
                self._count("long_documents_skipped")
                return
            if self.overflow == "truncate":
                self._count("long_documents_truncated")
                pieces = [(0, self.max_tokens)]
            else:
                self._count("long_documents_in_windows")
                pieces = windows(length, self.max_tokens, self.overlap or default_overlap(self.max_tokens))
        counted = np.ones(length, bool) if document.loss_mask is None else document.loss_mask
        done, some = 0, False
        for start, stop in pieces:
            mask = counted[start:stop].copy()
            mask[: done - start] = False
            done = stop
            # Nothing predicts the first token, so its mask does not matter.
            if mask[1:].any():
                some = True
                yield start, stop, None if mask[1:].all() else mask
        if not some:
            self._count("documents_without_a_counted_token")

"""Documents that are longer than a row of tokens: cut, split into pieces, or left out. Uses numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distillkit.errors import ConfigError
from distillkit.types import Overflow

__all__ = ["LongDocuments", "Pieces", "default_overlap", "windows"]

# The share of the tokens that may be cut off without having been asked for.
_UNASKED = 0.05


def default_overlap(max_tokens: int) -> int:
    """Return how many tokens each piece of a long document repeats from the previous one: an eighth of a piece."""
    return max(1, max_tokens // 8)


def windows(length: int, limit: int, overlap: int) -> list[tuple[int, int]]:
    """Cut `length` tokens into (start, stop) pieces of at most `limit`, each starting `overlap` before the last ends.

    With an overlap of at least one, every token but the first shares a piece with the token before it, so each of
    them gets a distribution.
    """
    pieces = [(0, min(length, limit))]
    while pieces[-1][1] < length:
        start = pieces[-1][1] - overlap
        pieces.append((start, min(length, start + limit)))
    return pieces


@dataclass(frozen=True)
class LongDocuments:
    """How many documents are longer than a row.

    Attributes:
        limit: tokens of a row.
        documents, tokens: all of them.
        long: documents that are longer than a row.
        long_tokens: tokens of these.
        beyond: their tokens beyond a row's length.
        longest: tokens of the longest document.
    """

    limit: int
    documents: int
    tokens: int
    long: int
    long_tokens: int
    beyond: int
    longest: int

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int64], limit: int) -> LongDocuments:
        """Count those among documents of some lengths."""
        long = lengths[lengths > limit]
        tokens, most = int(long.sum()), int(lengths.max(initial=0))
        return cls(limit, len(lengths), int(lengths.sum()), len(long), tokens, tokens - limit * len(long), most)

    def check(self, overflow: Overflow | None, *, key: str, row: str, setting: str) -> None:
        """Refuse to cut off more than a twentieth of the tokens unless that was asked for.

        Args:
            overflow: what was asked for.
            key: the dataset, for the message.
            row: the setting that limits a row, with its value.
            setting: the setting that says what to do.

        Raises:
            ConfigError: names the share, and the ways out.
        """
        if overflow is None and self.beyond > _UNASKED * self.tokens:
            raise ConfigError(
                f"{key}: {self.long:,} of {self.documents:,} documents are longer than {row}: "
                f"{self.beyond / self.tokens:.1%} of the tokens would be cut off. Set {setting} to split (into pieces "
                "that fit, with nothing lost but context), cut (keep each document's beginning) or drop (leave these "
                f"documents out), or allow longer rows: the longest document has {self.longest:,} tokens"
            )

    def outcome(self, overflow: Overflow | None) -> str:
        """Say what happens to the long documents; empty if there are none."""
        if not self.long:
            return ""
        which = f"{self.long:,} of {self.documents:,} documents are longer than {self.limit:,} tokens and are"
        if overflow == "split":
            return f"{which} split into pieces"
        if overflow == "drop":
            return f"{which} left out ({self.long_tokens / self.tokens:.1%} of the tokens)"
        return f"{which} cut ({self.beyond / self.tokens:.1%} of the tokens)"


@dataclass(frozen=True)
class Pieces:
    """Which parts of which documents are used: whole ones, cut ones, or the pieces of split ones.

    Attributes:
        documents: (P,) int64, the document of each piece, ascending.
        starts, stops: (P,) int64, its first token and the one after its last.
        firsts: (P,) int64, its first token that is in no earlier piece; tokens before it are context and do not count.
    """

    documents: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]
    firsts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, lengths: npt.NDArray[np.int64], limit: int, overflow: Overflow | None) -> Pieces:
        """Choose the pieces of documents of some lengths; the pieces of a split document are those of `windows`."""
        documents = np.arange(len(lengths), dtype=np.int64)
        if overflow == "drop":
            documents = documents[lengths <= limit]
        if overflow != "split":
            stops = np.minimum(lengths[documents], limit)
            return cls(documents, np.zeros_like(documents), stops, np.zeros_like(documents))
        overlap = default_overlap(limit)
        counts = 1 + np.maximum(-(-(lengths - limit) // (limit - overlap)), 0)
        documents = np.repeat(documents, counts)
        number = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = number * (limit - overlap)
        stops = np.minimum(starts + limit, lengths[documents])
        return cls(documents, starts, stops, np.where(number == 0, 0, starts + overlap))

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(P,) int64 tokens of each piece."""
        return self.stops - self.starts

    def __getitem__(self, piece: int) -> tuple[int, int, int, int]:
        """Return document, start, stop and first counted token of a piece."""
        return int(self.documents[piece]), int(self.starts[piece]), int(self.stops[piece]), int(self.firsts[piece])

"""A teacher's document in the student's tokens: which bytes of the teacher's text each of them covers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from distillkit.retokenize.token_map import Side, TokenMap
from distillkit.types import Document

__all__ = ["Aligned", "align"]

I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Aligned:
    """A document, or one of those packed into it, in the tokens of both.

    Attributes:
        teacher, student: its tokens.
        first: the number of its first token in the document of the teacher.
        mask: (L,) which of the student's tokens count in a loss; None: all.
    """

    teacher: Side
    student: Side
    first: int
    mask: Mask | None


@dataclass(frozen=True)
class _Text:
    """A text between special tokens.

    Attributes:
        content: its bytes.
        start: where it begins in the teacher's bytes.
        spaced: whether the teacher's tokenizer put a space before it, which is not part of it.
    """

    content: bytes
    start: int
    spaced: bool = False


def align(documents: Sequence[Document], token_map: TokenMap) -> list[list[Aligned]]:
    """Tokenises documents for the student; several at a time, since that is faster.

    Returns:
        Of each document, those that it consists of: one, unless it is packed.

    Raises:
        InputError: the student's tokenizer cannot write a document; names its place.
    """
    parts = [list(_parts(document, token_map)) for document in documents]
    texts = [text for each in parts for part in each for text in part.items if isinstance(text, _Text)]
    places = [
        document.place
        for document, each in zip(documents, parts, strict=True)
        for part in each
        for text in part.items
        if isinstance(text, _Text)
    ]
    encoded = iter(token_map.student.encode([text.content for text in texts], places))
    return [[part.aligned(encoded, token_map) for part in each] for each in parts]


@dataclass(frozen=True)
class _Part:
    """A document before its texts are tokenised.

    Attributes:
        teacher: its tokens.
        first: the number of its first token.
        mask: (L,) of the teacher's tokens.
        items: its texts, and the student's ids of special tokens with where each begins.
        begins: the special tokens that the student's tokenizer puts before it.
    """

    teacher: Side
    first: int
    mask: Mask | None
    items: list[_Text | tuple[int, int]]
    begins: list[int]

    def aligned(self, encoded: Iterator[tuple[list[int], bool]], token_map: TokenMap) -> Aligned:
        ids: list[int] = list(self.begins)
        starts, ends = [np.zeros(len(ids), np.int64)], [np.zeros(len(ids), np.int64)]
        for item in self.items:
            if isinstance(item, _Text):
                found, space = next(encoded)
                lengths = token_map.lengths(np.array(found, dtype=np.int64))
                # Where both put a space before the text, it is the same.
                lengths[:1] -= space and not item.spaced
                start = item.start - (space and item.spaced)
            else:
                found, start = [item[0]], item[1]
                lengths = token_map.lengths(np.array(found, dtype=np.int64))
            ids += found
            ends.append(start + np.cumsum(lengths))
            starts.append(ends[-1] - lengths)
        student = Side(np.array(ids, dtype=np.int64), np.concatenate(starts), np.concatenate(ends))
        return Aligned(self.teacher, student, self.first, _carried(self.mask, self.teacher, student))


def _parts(document: Document, token_map: TokenMap) -> Iterator[_Part]:
    """The documents that one consists of, with their texts."""
    first = 0
    for length in document.segments().tolist():
        ids = document.input_ids[first : first + length].astype(np.int64)
        mask = None if document.loss_mask is None else document.loss_mask[first : first + length]
        yield _part(ids, first, mask, token_map)
        first += length


def _part(ids: I64, first: int, mask: Mask | None, token_map: TokenMap) -> _Part:
    teacher, special = token_map.teacher, token_map.special
    begins = teacher.begins
    begun = len(begins) if begins and ids[: len(begins)].tolist() == begins else 0
    lengths = token_map.teacher_lengths[ids]
    # What the tokenizer puts before a text stands for no part of it.
    lengths[:begun] = 0
    ends = np.cumsum(lengths)
    side = Side(ids, ends - lengths, ends)
    numbers = ids.tolist()
    cuts = (np.flatnonzero(token_map.is_special[ids[begun:]]) + begun).tolist()
    items: list[_Text | tuple[int, int]] = []
    for start, stop in itertools.pairwise([begun - 1, *cuts, len(numbers)]):
        if start in cuts:
            items.append((special[numbers[start]], int(side.starts[start])))
        content = token_map.text_of(numbers[start + 1 : stop])
        if content:
            at = int(side.starts[start + 1])
            spaced = teacher.adds_space and not items and (begun or not begins) and content.startswith(b" ")
            items.append(_Text(content[1:], at + 1, True) if spaced else _Text(content, at))
    # A document that was cut from the middle of a text does not begin one.
    whole = bool(begun) or not begins
    return _Part(side, first, mask, items, token_map.student.begins if whole else [])


def _carried(mask: Mask | None, teacher: Side, student: Side) -> Mask | None:
    """The mask of the student's tokens: each counts that covers a byte of a teacher's token that does."""
    if mask is None:
        return None
    counted = np.concatenate([[0], np.cumsum((teacher.ends - teacher.starts) * mask)])
    borders = np.concatenate([[0], teacher.ends])
    # Between borders, a token's bytes count or do not.
    before, after = (np.interp(side, borders, counted) for side in (student.starts, student.ends))
    return np.asarray(after > before)

"""The map from a teacher's vocabulary to a student's: built once, and then asked for the rows of documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import xxhash

from distillkit import _native
from distillkit.codec import Codec
from distillkit.retokenize.vocabulary import Vocabulary, edited
from distillkit.types import SparseLogprobs

__all__ = ["MappedRows", "Side", "TokenMap"]

I64 = npt.NDArray[np.int64]

VERSION = 1
"""Of what the map computes; part of its hash."""

# Of each kind of character that pre-tokenizers tell from the others.
_BEFORE = (b"a", b"1", b",", b" ", b"\n")

_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eot|>", "<end_of_turn>", "<|end|>", "<|END_OF_TURN_TOKEN|>")
_END_OF_TEXT = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)

# No UTF-8 text has these bytes.
_MARK, _DIGITS = b"\xff", bytes(range(0xF8, 0xFF))


@dataclass(frozen=True)
class Side:
    """The tokens of a document, and the bytes of the teacher's text that each covers.

    Attributes:
        ids: (L,) int64.
        starts, ends: (L,) int64; −1 for tokens of the student that stand for nothing in the teacher's text.
    """

    ids: I64
    starts: I64
    ends: I64

    def arrays(self) -> tuple[I64, I64, I64]:
        """All three, as the native map takes them."""
        return self.ids, self.starts, self.ends


@dataclass(frozen=True)
class MappedRows:
    """The student's rows of a document.

    Attributes:
        rows: (R, k), −inf at places without an id.
        labels: (R,) log-probability of each next token.
        kinds: (R,) 0 without a row of the teacher, 1 at the beginning of a teacher's token, 2 inside one.
        sums: probability stored, rows, bits and bytes of the teacher, and the same of the student.
    """

    rows: SparseLogprobs
    labels: npt.NDArray[np.float32]
    kinds: npt.NDArray[np.uint8]
    sums: npt.NDArray[np.float64]


class TokenMap:
    """Maps rows over the teacher's ids to rows over the student's.

    What it computes does not depend on the documents before; it only becomes faster with them.

    Args:
        teacher, student: the vocabularies.

    Attributes:
        special: the student's token for each special token of the teacher that has one.
    """

    def __init__(self, teacher: Vocabulary, student: Vocabulary) -> None:
        self.teacher, self.student = teacher, student
        self.special: Mapping[int, int] = _special_tokens(teacher, student)
        self._teacher_strings, self._student_strings = self._marked()
        self.teacher_lengths = np.array([len(text) for text in self._teacher_strings], dtype=np.int64)
        self._pieces = self._all_pieces()
        self._native = _native.TokenMap(
            _joined(self._teacher_strings),
            _joined(self._student_strings),
            self._pieces,
            self._varying(),
            student.merges(),
        )

    @cached_property
    def unmapped(self) -> dict[int, str]:
        """The names of the teacher's special tokens that stand for their names as text, by id."""
        return {number: name for number, name in self.teacher.special.items() if number not in self.special}

    @cached_property
    def is_unmapped(self) -> npt.NDArray[np.bool_]:
        """(V,) whether each of the teacher's ids is one of `unmapped`."""
        return self._among(self.unmapped)

    @cached_property
    def is_special(self) -> npt.NDArray[np.bool_]:
        """(V,) whether each of the teacher's ids is one of `special`."""
        return self._among(self.special)

    def _among(self, numbers: Mapping[int, object]) -> npt.NDArray[np.bool_]:
        return np.isin(np.arange(len(self.teacher_lengths)), list(numbers))

    @cached_property
    def hash(self) -> str:
        """Of the map from token to pieces, "xxh3-128:" and 32 hexadecimal digits."""
        digest = xxhash.xxh3_128(f"{VERSION} {self.teacher.fingerprint} {self.student.fingerprint}".encode())
        special = np.array(sorted(self.special.items()), dtype="<i8")
        for array in (*self._pieces, special):
            digest.update(np.array([array.size], dtype="<i8").tobytes())
            digest.update(array.astype("<i8").tobytes())
        return f"xxh3-128:{digest.hexdigest()}"

    def text_of(self, ids: Sequence[int]) -> bytes:
        """The bytes of the teacher's tokens, of which special ones that the student has too are marked."""
        return b"".join([self._teacher_strings[number] for number in ids])

    def student_bytes(self, ids: Sequence[int]) -> bytes:
        """The same of the student's tokens."""
        return b"".join([self._student_strings[number] for number in ids])

    def lengths(self, ids: I64) -> I64:
        """(L,) bytes of each of the student's tokens."""
        return self._student_lengths[ids]

    @cached_property
    def _student_lengths(self) -> I64:
        return np.array([len(text) for text in self._student_strings], dtype=np.int64)

    def map(
        self, teacher: Side, student: Side, rows: SparseLogprobs, labels: npt.NDArray[np.float32] | None, target: Codec
    ) -> MappedRows:
        """The student's rows of a document.

        Args:
            teacher, student: its tokens.
            rows: numpy (L − 1 or more, k) of the teacher, with −inf at places without an id.
            labels: (L − 1,) the teacher's log-probability of each next token.
            target: the codec of the student's rows. They keep as many ids as it has; where there are fewer, a fixed
                format gets ids with an even share of the missing mass.

        Raises:
            InputError: the arrays do not fit each other.
        """
        ids, logprobs, own, kinds, sums = self._native.map(
            teacher.arrays(),
            student.arrays(),
            np.ascontiguousarray(rows.ids),
            np.ascontiguousarray(rows.logprobs),
            labels,
            (target.k, target.is_fixed),
            self.student.tokenize,
        )
        return MappedRows(SparseLogprobs(ids, logprobs), own, kinds, np.array(sums))

    # -- building ------------------------------------------------------------------------------------------------------

    def _marked(self) -> tuple[list[bytes], list[bytes]]:
        """The bytes of all tokens, with the same mark for special tokens that stand for each other. The student's other
        special tokens have none, since no text contains them."""
        teacher, student = list(self.teacher.strings), list(self.student.strings)
        for number in self.student.special:
            student[number] = b""
        for number, own in self.special.items():
            teacher[number] = student[own] = _mark(own)
        return teacher, student

    def _all_pieces(self) -> tuple[I64, I64]:
        ids, ends = self.student.tokenize(self.teacher.strings)
        special = np.isin(np.arange(len(ends)), list(self.special))
        return edited(ids, ends, cleared=special, added=self.special)

    def _varying(self) -> I64:
        """The teacher's tokens that the student's tokenizer divides otherwise behind some text, although no token
        crosses the border: its pre-tokenizer sees a comma before `'s`."""
        ids, ends = self._pieces
        counts = np.diff(ends, prepend=0)
        owners = np.repeat(np.arange(len(ends)), counts)
        nth = np.arange(len(ids)) - (ends - counts)[owners]
        varies = np.zeros(len(ends), bool)
        for before in _BEFORE:
            own, _ = self.student.tokenize([before])
            together, their_ends = self.student.tokenize([before + text for text in self.teacher.strings])
            their_counts = np.diff(their_ends, prepend=0)
            starts = their_ends - their_counts
            # The border is kept if the pieces of what is before it are.
            kept = (their_counts >= len(own)) & (counts > 0)
            for place, piece in enumerate(own.tolist()):
                kept &= together[np.minimum(starts + place, len(together) - 1)] == piece
            other = their_counts != counts + len(own)
            after = together[np.minimum(starts[owners] + len(own) + nth, len(together) - 1)]
            other[owners[after != ids]] = True
            varies |= kept & other
        varies[list(self.special)] = False
        return np.flatnonzero(varies)


def _joined(strings: Sequence[bytes]) -> tuple[bytes, I64]:
    return b"".join(strings), np.cumsum([len(text) for text in strings], dtype=np.int64)


def _mark(number: int) -> bytes:
    """Bytes for a special token: always as many, so that none begins with another's."""
    digits = []
    for _ in range(8):
        number, digit = divmod(number, len(_DIGITS))
        digits.append(_DIGITS[digit])
    return _MARK + bytes(digits)


def _special_tokens(teacher: Vocabulary, student: Vocabulary) -> dict[int, int]:
    """The student's special token for each of the teacher's: of the same name, or with the same role."""
    named = {name: number for number, name in student.special.items()}
    found = {number: named[name] for number, name in teacher.special.items() if name in named}
    theirs, ours = (_ends(vocabulary) for vocabulary in (teacher, student))
    for role, numbers in theirs.items():
        for number in numbers:
            if number not in found and ours[role]:
                found[number] = ours[role][0]
    return found


def _ends(vocabulary: Vocabulary) -> dict[str, list[int]]:
    """The tokens that end a turn, and that end a text; the tokenizer's own end-of-sequence token may be either."""
    named = {name: number for number, name in vocabulary.special.items()}
    own = vocabulary.tokenizer.eos_token_id
    ends = {"turn": [named[name] for name in _END_OF_TURN if name in named]}
    ends["text"] = [named[name] for name in _END_OF_TEXT if name in named]
    if own in vocabulary.special and own not in ends["turn"] + ends["text"]:
        ends["text"].insert(0, own)
    # Where there is only one of them, it ends both; the end-of-sequence token goes first.
    first = [own] if own in vocabulary.special else []
    return {role: numbers or first or ends["turn"] or ends["text"] for role, numbers in ends.items()}

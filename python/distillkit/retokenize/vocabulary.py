"""The exact bytes of a tokenizer's tokens, and tokenizers that lose bytes, which are refused."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import ConfigError, InputError
from distillkit.text.tokenizer import fingerprint

__all__ = ["Vocabulary", "edited", "read_vocabulary"]

I64 = npt.NDArray[np.int64]

_SPACE = "▁"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_LOSSLESS = {"ByteLevel", "Metaspace", "Digits", "Split", "Punctuation", "UnicodeScripts"}


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's ids mean, in bytes.

    Attributes:
        name: where the tokenizer comes from, for messages.
        tokenizer: the transformers tokenizer.
        strings: the bytes of each id: of special tokens those of their names, of ids without a token none.
        special: the name of each special token, by id.
        content: the tokenizer as JSON, as its library writes it.
        byte_level: whether characters of the vocabulary stand for bytes; otherwise ▁ stands for a space.
    """

    name: str
    tokenizer: Any
    strings: list[bytes]
    special: dict[int, str]
    content: dict[str, Any]
    byte_level: bool

    @cached_property
    def fingerprint(self) -> str:
        """See `distillkit.text.tokenizer.fingerprint`."""
        return fingerprint(self.tokenizer)

    @cached_property
    def lengths(self) -> I64:
        """(V,) bytes of each id."""
        return np.array([len(text) for text in self.strings], dtype=np.int64)

    @cached_property
    def ids(self) -> dict[bytes, int]:
        """The ordinary token of these bytes; the first of several."""
        found: dict[bytes, int] = {}
        for number, text in enumerate(self.strings):
            if text and number not in self.special:
                found.setdefault(text, number)
        return found

    @cached_property
    def begins(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        ids = self.tokenizer("a")["input_ids"]
        first = next((place for place, number in enumerate(ids) if number not in self.special), 0)
        return list(ids[:first])

    @cached_property
    def adds_space(self) -> bool:
        """Whether a text gets a space before it, which it does not have."""
        return self._bytes_of(self._whole.encode("a", add_special_tokens=False).ids).startswith(b" ")

    @property
    def is_bpe(self) -> bool:
        """Whether tokens are found by merges."""
        return bool(self.content["model"]["type"] == "BPE")

    def merges(self) -> npt.NDArray[np.int64] | None:
        """(M, 3) the ids of the left, the right and the merged token of each merge of a BPE; None for other models."""
        if not self.is_bpe:
            return None
        model = self.content["model"]
        known, found = model["vocab"], []
        for merge in model["merges"]:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            found.append((known[left], known[right], known[left + right]))
        return np.array(found, dtype=np.int64).reshape(-1, 3)

    def _bytes_of(self, ids: Sequence[int]) -> bytes:
        return b"".join([self.strings[number] for number in ids])

    # -- whole texts ---------------------------------------------------------------------------------------------------

    @cached_property
    def _whole(self) -> Any:
        """The tokenizer for texts: names of special tokens in them are text, and characters stay what they are."""
        content = {**self.content, "post_processor": None, "truncation": None, "padding": None}
        content["normalizer"] = _without(content["normalizer"], "normalizers", lambda part: part["type"] != "NFC")
        return _loaded(content)

    def encode(self, texts: Sequence[bytes], where: Sequence[str]) -> list[tuple[list[int], bool]]:
        """Tokenises texts. Bytes that are not UTF-8, at the cuts of a document, become tokens of a byte each.

        Args:
            texts: bytes without special tokens.
            where: the place of each, for messages.

        Returns:
            Of each text its tokens, and whether the first begins with a space that the text does not have.

        Raises:
            InputError: the tokenizer has no tokens for some characters, or changes them.
        """
        runs = [list(_runs(text)) for text in texts]
        encoded = iter(self._whole.encode_batch_fast([run for each in runs for run in each if isinstance(run, str)]))
        found = []
        for text, parts, place in zip(texts, runs, where, strict=True):
            ids: list[int] = []
            for part in parts:
                ids += next(encoded).ids if isinstance(part, str) else self._single_bytes(part, place)
            written = self._bytes_of(ids)
            space = written != text and written == b" " + text
            if written != text and not space:
                raise InputError(f"{place}: {self._difference(text, written)}")
            found.append((ids, space))
        return found

    def _single_bytes(self, text: bytes, place: str) -> list[int]:
        missing = [byte for byte in text if bytes([byte]) not in self.ids]
        if missing:
            raise InputError(
                f"{place}: has the byte {missing[0]:#04x} where a document was cut within a character, for which the "
                f"tokenizer {self.name} has no token: capture without cutting, or leave the document out"
            )
        return [self.ids[bytes([byte])] for byte in text]

    def _difference(self, text: bytes, written: bytes) -> str:
        at = next((n for n, (a, b) in enumerate(zip(text, written, strict=False)) if a != b), len(written))
        return (
            f"the tokenizer {self.name} does not keep the text: {text[max(at - 10, 0) : at + 20]!r} becomes "
            f"{written[max(at - 10, 0) : at + 20]!r} (byte {at}). Choose a student whose tokenizer has a token for "
            "every byte"
        )

    # -- strings in the middle of a text -------------------------------------------------------------------------------

    @cached_property
    def _inner(self) -> Any:
        """The tokenizer for strings in the middle of a text: it puts no space before them."""
        content = {**self.content, "post_processor": None, "truncation": None, "padding": None}
        content["normalizer"] = _without(content["normalizer"], "normalizers", _replaces_space)
        content["pre_tokenizer"] = _without_prefix(content["pre_tokenizer"])
        return _loaded(content)

    def tokenize(self, strings: Sequence[bytes]) -> tuple[I64, I64]:
        """Tokenises strings as they would be in the middle of a text, each by itself.

        Of a string that ends within a character, the bytes of that character are a token if there is one of these
        bytes; otherwise its tokens end before. What cannot be told has no tokens.

        Returns:
            The tokens of all, and where those of each end.
        """
        texts, rests = [], []
        for string in strings:
            text, rest = _readable(string)
            texts.append(text)
            rests.append(rest)
        lists = [each.ids for each in self._inner.encode_batch_fast(texts, add_special_tokens=False)]
        ids = np.fromiter(itertools.chain.from_iterable(lists), np.int64)
        ends = np.cumsum([len(each) for each in lists], dtype=np.int64)
        added = {number: self.ids[rest] for number, rest in enumerate(rests) if rest is not None and rest in self.ids}
        if added:
            ids, ends = edited(ids, ends, added=added)
        return self._checked(ids, ends, strings)

    def _checked(self, ids: I64, ends: I64, strings: Sequence[bytes]) -> tuple[I64, I64]:
        """Leaves out the tokens of strings that they do not write, such as that of unknown characters."""
        covered = np.diff(np.concatenate([[0], np.cumsum(self.lengths[ids])])[np.concatenate([[0], ends])])
        wrong = covered > np.array([len(string) for string in strings], dtype=np.int64)
        unknown = self._is_special[ids]
        if not wrong.any() and not unknown.any():
            return ids, ends
        wrong[np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))[unknown]] = True
        return edited(ids, ends, cleared=wrong)

    @cached_property
    def _is_special(self) -> npt.NDArray[np.bool_]:
        return np.isin(np.arange(len(self.strings)), list(self.special))


def edited(
    ids: I64, ends: I64, *, cleared: npt.NDArray[np.bool_] | None = None, added: Mapping[int, int] | None = None
) -> tuple[I64, I64]:
    """Changes some of many lists of tokens.

    Args:
        ids, ends: the tokens of all lists, and where those of each end.
        cleared: of each list, whether its tokens are left out.
        added: tokens to add at the end of lists, by the number of the list.
    """
    counts = np.diff(ends, prepend=0)
    if cleared is not None:
        ids, counts = ids[~np.repeat(cleared, counts)], np.where(cleared, 0, counts)
    if added:
        numbers = np.array(sorted(added), dtype=np.int64)
        ids = np.insert(ids, np.cumsum(counts)[numbers], [added[number] for number in numbers.tolist()])
        counts[numbers] += 1
    return ids, np.cumsum(counts)


def read_vocabulary(tokenizer: Any, name: str) -> Vocabulary:
    """Reads the bytes of a tokenizer's tokens.

    Raises:
        ConfigError: they cannot be told, or the tokenizer loses some of a text; names the part that does.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise ConfigError(
            f"the tokenizer {name} ({type(tokenizer).__name__}) has no tokenizer.json, from which the bytes of its "
            "tokens are read: save it as a fast tokenizer first (AutoTokenizer.from_pretrained(…, use_fast=True)"
            ".save_pretrained(…))"
        )
    content = json.loads(backend.to_str())
    byte_level = _check(content, name)
    vocabulary = tokenizer.get_vocab()
    added = {entry["id"]: entry for entry in content["added_tokens"]}
    strings = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for text, number in vocabulary.items():
        if number in added:
            strings[number] = added[number]["content"].encode()
        else:
            strings[number] = _byte_level(text) if byte_level else _sentencepiece(text)
    special = {number: entry["content"] for number, entry in added.items() if entry["special"]}
    return Vocabulary(name, tokenizer, strings, special, content, byte_level)


def _check(content: dict[str, Any], name: str) -> bool:
    """Returns whether the tokenizer is byte-level.

    Raises:
        ConfigError: it loses some of a text.
    """
    model = content["model"]
    if model["type"] not in ("BPE", "Unigram"):
        raise ConfigError(
            f"the tokenizer {name} has a model of type {model['type']}, whose tokens do not keep all bytes of a text; "
            "BPE and Unigram do"
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ConfigError(f"the tokenizer {name} marks its tokens ({key} {model[key]!r}), so spaces are lost")
    normalizers = list(_parts(content["normalizer"], "normalizers"))
    before = list(_parts(content["pre_tokenizer"], "pretokenizers"))
    for part in normalizers:
        if not (part["type"] in ("NFC", "Prepend") or _replaces_space(part) or _doubles_space(part)):
            raise ConfigError(
                f"the tokenizer {name} has the normalizer {_described(part)}, which changes the text: the bytes of its "
                "tokens are not those of the document"
            )
    for part in before:
        if part["type"] not in _LOSSLESS or part.get("behavior") == "Removed":
            raise ConfigError(
                f"the tokenizer {name} has the pre-tokenizer {_described(part)}, which loses the spaces of the text"
            )
    decoders = list(_parts(content["decoder"], "decoders"))
    if any(part["type"] == "ByteLevel" for part in (*before, *decoders)):
        return True
    if any(part["type"] == "Metaspace" for part in before) or any(map(_replaces_space, normalizers)):
        return False
    raise ConfigError(
        f"the tokenizer {name} is neither byte-level nor a SentencePiece one (with {_SPACE} for spaces), so the bytes "
        "of its tokens cannot be told"
    )


def _described(part: dict[str, Any]) -> str:
    about = {key: value for key, value in part.items() if key != "type" and isinstance(value, (str, bool, dict))}
    return f"{part['type']} {json.dumps(about, ensure_ascii=False)}"[:120]


def _parts(part: dict[str, Any] | None, several: str) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder."""
    if part is not None and part["type"] == "Sequence":
        for each in part[several]:
            yield from _parts(each, several)
    elif part is not None:
        yield part


def _replaces_space(part: dict[str, Any]) -> bool:
    return bool(part["type"] == "Replace" and part["pattern"] == {"String": " "} and part["content"] == _SPACE)


def _doubles_space(part: dict[str, Any]) -> bool:
    """Whether a normalizer writes the space before a text that begins with one."""
    doubled = part["type"] == "Replace" and part["pattern"] == {"Regex": rf"\A{_SPACE}"}
    return bool(doubled and part["content"] == 2 * _SPACE)


def _without(part: dict[str, Any] | None, several: str, keeps: Any) -> dict[str, Any] | None:
    kept = [each for each in _parts(part, several) if keeps(each)]
    return {"type": "Sequence", several: kept} if kept else None


def _without_prefix(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A pre-tokenizer that puts no space before a text."""
    parts = []
    for each in _parts(part, "pretokenizers"):
        if each["type"] == "ByteLevel":
            each = {**each, "add_prefix_space": False}
        elif each["type"] == "Metaspace":
            each = {**each, "prepend_scheme": "never"}
        parts.append(each)
    return {"type": "Sequence", "pretokenizers": parts} if parts else None


def _loaded(content: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(content))
    backend.encode_special_tokens = True
    return backend


def _runs(text: bytes) -> Iterator[str | bytes]:
    """Divides bytes into texts and bytes that are not UTF-8."""
    while text:
        try:
            yield text.decode()
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield text[: error.start].decode()
            yield text[error.start : error.end]
            text = text[error.end :]


def _readable(string: bytes) -> tuple[str, bytes | None]:
    """Divides a string into its whole characters and what follows them; all of it is the latter if it does not begin
    with a character."""
    try:
        return string.decode(), None
    except UnicodeDecodeError as error:
        whole = error.start if "end of data" in error.reason else 0
        return string[:whole].decode(), string[whole:]


def _byte_level(text: str) -> bytes:
    if all(character in _BYTES for character in text):
        return bytes([_BYTES[character] for character in text])
    return text.encode()


def _sentencepiece(text: str) -> bytes:
    byte = _BYTE.fullmatch(text)
    return bytes([int(byte[1], 16)]) if byte else text.replace(_SPACE, " ").encode()


def _byte_characters() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _byte_characters()

"""A document token by token, with what the teacher expected at each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import ConfigError, InputError, MismatchError
from distillkit.shards.reader import Dataset
from distillkit.text.tokenizer import fingerprint, load_tokenizer

__all__ = ["Candidate", "TokenView", "dataset_tokenizer", "token_texts", "view_document"]

# The character that byte-level tokenizers write for each byte: itself if it is printable, otherwise one from U+0100 on.
_PRINTABLE_BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE_BYTES} | {
    chr(256 + number): byte for number, byte in enumerate(byte for byte in range(256) if byte not in _PRINTABLE_BYTES)
}


@dataclass(frozen=True)
class Candidate:
    """One of the teacher's most probable tokens: its id, its text (None without a tokenizer), its log-probability."""

    id: int
    text: str | None
    logprob: float


@dataclass(frozen=True)
class TokenView:
    """A token of a document.

    Attributes:
        position: its index in the document.
        id, text: the token; the text is None without a tokenizer.
        special: whether it is a special token.
        counts: whether it counts in a loss.
        logprob: the teacher's log-probability of it; None at the beginning of a document, or if it is not stored.
        rank: its place among the row's stored ids, from 0; None if it is not one of them.
        best: the teacher's most probable tokens here, the most probable first; empty at the beginning of a document.
    """

    position: int
    id: int
    text: str | None
    special: bool
    counts: bool
    logprob: float | None
    rank: int | None
    best: list[Candidate]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able mapping."""
        return asdict(self)


def view_document(
    dataset: Dataset, index: int, tokenizer: Any = None, *, best: int = 5, tokens: slice = slice(None)
) -> list[TokenView]:
    """Return a document's tokens, each with the teacher's distribution over it: the row of the position before.

    Args:
        dataset: a captured or published dataset.
        index: number of the document, from 0; negative ones count from the end.
        tokenizer: the teacher's, for the texts; None: only ids.
        best: how many of the teacher's most probable tokens; at most the codec's k.
        tokens: which positions.

    Raises:
        InputError: there is no such document.
        CorruptDataError: the document is damaged.

    Example:
        >>> from distillkit.shards import Dataset
        >>> view = view_document(Dataset.open("captured"), 0, best=2)
        >>> view[0].best, len(view[1].best), view[1].best[0].logprob >= view[1].best[1].logprob
        ([], 2, True)
    """
    if not -len(dataset) <= index < len(dataset):
        raise InputError(f"{dataset.path}: there is no document {index}; its {len(dataset):,} are numbered from 0")
    document = dataset[index]
    ids = document.input_ids
    rows = dataset.codec.decode_document(document.teacher, document.num_rows)
    row_ids, logprobs = np.asarray(rows.ids), np.asarray(rows.logprobs)
    starts = {0, *np.cumsum(document.segments())[:-1].tolist()}
    chosen = range(len(ids))[tokens]
    shown = {int(ids[position]) for position in chosen}
    shown |= {int(token) for position in chosen if position not in starts for token in row_ids[position - 1, :best]}
    texts = token_texts(tokenizer, sorted(shown))
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    views = []
    for position in chosen:
        token = int(ids[position])
        candidates: list[Candidate] = []
        rank, logprob = None, None
        if position not in starts:
            row = position - 1
            candidates = [
                Candidate(int(each), texts.get(int(each)), float(value))
                for each, value in zip(row_ids[row, :best], logprobs[row, :best], strict=True)
                if value > -np.inf  # a row may have fewer ids
            ]
            rank = _rank(row_ids[row], token)
            if rank is not None:
                logprob = float(logprobs[row, rank])
            elif document.label_logprobs is not None:
                logprob = float(document.label_logprobs[row])
        counts = document.loss_mask is None or bool(document.loss_mask[position])
        views.append(TokenView(position, token, texts.get(token), token in special, counts, logprob, rank, candidates))
    return views


def _rank(row: npt.NDArray[np.int64], token: int) -> int | None:
    places = np.flatnonzero(row == token)
    return int(places[0]) if len(places) else None


def dataset_tokenizer(dataset: Dataset, name: str | None = None) -> Any:
    """Return the tokenizer of a dataset's token ids.

    Args:
        dataset: a captured or published dataset.
        name: folder or hub id; by default the one in the dataset's header: a hub id, or the name of a folder in the
            working folder or beside the dataset.

    Raises:
        ConfigError: none is recorded, or it cannot be loaded.
        MismatchError: it has other tokens than the dataset's.
    """
    recorded = dataset.header.tokenizer
    if name is None:
        if recorded is None:
            raise ConfigError(f"{dataset.path} does not record its tokenizer")
        name = str(recorded["name"])
        beside = Path(dataset.path).parent / name
        name = str(beside) if not Path(name).exists() and beside.is_dir() else name
    tokenizer = load_tokenizer(name)
    if recorded is not None and (found := fingerprint(tokenizer)) != recorded["fingerprint"]:
        raise MismatchError(
            f"{name}: its tokens ({found}) are not those of {dataset.path} ({recorded['name']}, "
            f"{recorded['fingerprint']})"
        )
    return tokenizer


def token_texts(tokenizer: Any, ids: list[int]) -> dict[int, str]:
    """Return the text of each token as it is inside of a document, with its spaces.

    Tokens that are only a part of a character are written as their bytes, such as <E282>. Ids that the tokenizer
    does not have, as those of a padded head, are left out; so are all without a tokenizer.
    """
    if tokenizer is None:
        return {}
    # A token at the beginning may lose its space when it is decoded alone.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    begun = _decoded(tokenizer, anchor)
    texts = {}
    for each in ids:
        name = tokenizer.convert_ids_to_tokens(each)
        if name is None:
            continue
        name = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        text = _decoded(tokenizer, [*anchor, each])
        text = text[len(begun) :] if text.startswith(begun) else _decoded(tokenizer, [each])
        texts[each] = _bytes_of(name) if "\ufffd" in text else text or name
    return texts


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _bytes_of(name: str) -> str:
    """Return the bytes of a token that is not text, by its name in the vocabulary."""
    if not all(character in _BYTE_OF for character in name):
        return name
    return f"<{''.join(f'{_BYTE_OF[character]:02X}' for character in name)}>"

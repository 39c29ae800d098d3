"""Documents of a teacher's tokens and rows as documents of the student's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from distillkit.codec import Codec
from distillkit.retokenize.alignment import Aligned, align
from distillkit.retokenize.chats import ChatReader
from distillkit.retokenize.figures import Figures
from distillkit.retokenize.token_map import MappedRows, TokenMap
from distillkit.shards import Dataset
from distillkit.shards.plausibility import decoded
from distillkit.types import Document, SparseLogprobs

__all__ = ["Rewritten", "rewrite"]


@dataclass(frozen=True)
class Rewritten:
    """A document in the student's tokens; the attributes are those of `ShardWriter.write`."""

    input_ids: npt.NDArray[np.int32]
    rows: SparseLogprobs
    loss_mask: npt.NDArray[np.bool_] | None
    segment_lengths: npt.NDArray[np.int32] | None
    label_logprobs: npt.NDArray[np.float32] | None
    columns: Mapping[str, Any] | None


def rewrite(
    documents: Sequence[Document], source: Dataset, chats: ChatReader, target: Codec, figures: Figures
) -> list[Rewritten]:
    """Rewrites documents; those with fewer than two of the student's tokens are left out.

    Args:
        documents: the teacher's.
        source: the dataset that they are from.
        chats: reads the messages that the dataset kept.
        target: the codec of the student's rows, which says how many ids they have.
        figures: what is counted is added to these.

    Raises:
        InputError: the student's tokenizer cannot write a document.
        CorruptDataError: its rows cannot be decoded.
    """
    found, token_map, codec = [], chats.token_map, source.codec
    read = [chats.read(document) for document in documents]
    others = iter(align([each for each, chat in zip(documents, read, strict=True) if chat is None], token_map))
    for document, chat in zip(documents, read, strict=True):
        parts = next(others) if chat is None else chat
        if sum(len(part.student.ids) for part in parts) < 2:
            figures.left_out += 1
            continue
        rows = decoded(document, codec)
        mapped = [_mapped(document, part, rows, token_map, target) for part in parts]
        for each in mapped:
            figures.add(each)
        _count(document, parts, token_map, figures)
        found.append(_joined(document, parts, mapped, target))
    return found


def _mapped(document: Document, part: Aligned, rows: SparseLogprobs, token_map: TokenMap, target: Codec) -> MappedRows:
    # A packed document has a row and a label between those that it consists of, too.
    own = slice(part.first, part.first + max(len(part.teacher.ids) - 1, 0))
    labels = None if document.label_logprobs is None else document.label_logprobs[own]
    kept = SparseLogprobs(rows.ids[own], rows.logprobs[own])
    return token_map.map(part.teacher, part.student, kept, labels, target)


def _count(document: Document, parts: Sequence[Aligned], token_map: TokenMap, figures: Figures) -> None:
    figures.documents += 1
    figures.teacher_tokens += len(document.input_ids)
    figures.student_tokens += sum(len(part.student.ids) for part in parts)
    for number in document.input_ids[token_map.is_unmapped[document.input_ids]].tolist():
        name = token_map.unmapped[number]
        figures.unmapped[name] = figures.unmapped.get(name, 0) + 1


def _joined(document: Document, parts: Sequence[Aligned], mapped: Sequence[MappedRows], target: Codec) -> Rewritten:
    """A document of one or several. Between two, there is a row of which nothing is known, and that does not count."""
    full = [(part, rows) for part, rows in zip(parts, mapped, strict=True) if len(part.student.ids)]
    ids, logprobs, labels, masks = [], [], [], []
    for number, (part, rows) in enumerate(full):
        if number:
            ids.append(np.arange(target.k, dtype=np.int64)[None])
            logprobs.append(np.full((1, target.k), -np.log(target.vocab_size), np.float32))
            labels.append(np.full(1, -np.log(target.vocab_size), np.float32))
        ids.append(np.asarray(rows.rows.ids))
        logprobs.append(np.asarray(rows.rows.logprobs))
        labels.append(rows.labels)
        mask = np.ones(len(part.student.ids), bool) if part.mask is None else part.mask.copy()
        mask[1:] &= rows.kinds > 0
        mask[0] &= number == 0
        masks.append(mask)
    mask = np.concatenate(masks)
    lengths = np.array([len(part.student.ids) for part, _ in full], dtype=np.int32)
    return Rewritten(
        np.concatenate([part.student.ids for part, _ in full]).astype(np.int32),
        SparseLogprobs(_concatenated(ids), _concatenated(logprobs)),
        # Nothing predicts the first token, so its mask does not matter.
        None if mask[1:].all() else mask,
        lengths if document.segment_lengths is not None else None,
        None if document.label_logprobs is None else np.concatenate(labels),
        document.columns,
    )


def _concatenated(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    # Most documents are one: not a copy of all its rows.
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

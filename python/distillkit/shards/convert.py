"""Lossless conversion of published datasets to shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distillkit import __version__
from distillkit.errors import MismatchError
from distillkit.shards.manifest import Manifest
from distillkit.shards.plausibility import check_plausible, sampled
from distillkit.shards.reader import Dataset
from distillkit.shards.writer import ShardWriter
from distillkit.types import Document

__all__ = ["convert"]


def convert(
    source: Dataset,
    folder: str | Path,
    *,
    shard_tokens: int = 262_144,
    vocab_size: int | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Manifest:
    """Writes a dataset's documents to shards, with their encoded bytes unchanged.

    Args:
        source: any dataset, typically a published one.
        folder: output folder; created if needed. An interrupted conversion is resumed after its finished shards.
        shard_tokens: tokens per shard.
        vocab_size, tokenizer, teacher: values for the header, which a published dataset does not record.
        progress: called after each document with its number of tokens.

    Raises:
        InputError: the folder contains a finished dataset.
        MismatchError: the folder contains shards of another dataset, or the source's rows cannot have been written with
            its codec.
        CorruptDataError: a source document is damaged.

    Example:
        >>> from distillkit.shards import Dataset, convert
        >>> convert(Dataset.open("captured"), "converted", shard_tokens=20).shards[0].documents
        2
    """
    check_plausible(sampled(source), source.codec, source.path)
    header = replace(
        source.header,
        fidelity=None,
        distillkit_version=__version__,
        vocab_size=vocab_size or source.header.vocab_size,
        tokenizer=tokenizer or source.header.tokenizer,
        teacher=teacher or source.header.teacher,
    )
    with ShardWriter(folder, header, shard_tokens=shard_tokens, resume=True) as writer:
        resumed = writer.finished_documents()
        for index, document in enumerate(source):
            written = next(resumed, None)
            if written is None:
                writer.copy(document)
            elif not _same(written, document):
                raise MismatchError(
                    f"{folder}: its document {index} is not document {index} of {source.path}: the folder contains an "
                    "unfinished conversion of another dataset; choose another folder or remove it"
                )
            progress(len(document.input_ids))
        if next(resumed, None) is not None:
            raise MismatchError(
                f"{folder}: has more documents than the {len(source)} of {source.path}: the folder contains an "
                "unfinished conversion of another dataset; choose another folder or remove it"
            )
        return writer.close()


def _same(written: Document, document: Document) -> bool:
    """Whether all that is stored of two documents is equal; `doc_id` stands for ids, mask and segments."""
    labels, expected = written.label_logprobs, document.label_logprobs
    same_labels = labels is expected if labels is None or expected is None else np.array_equal(labels, expected)
    return same_labels and written.doc_id == document.doc_id and written.teacher == document.teacher

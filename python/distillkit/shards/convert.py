"""Published datasets → shards, without loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distillkit import __version__
from distillkit.shards.manifest import Manifest
from distillkit.shards.reader import Dataset
from distillkit.shards.writer import ShardWriter

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
    """Writes the documents of a dataset into shards, bytes as they are.

    Args:
        source: any dataset, published ones above all.
        folder: for the shards; made if needed. Shards of an interrupted conversion are continued.
        shard_tokens: tokens of a shard.
        vocab_size, tokenizer, teacher: what the header should say that the source does not know.
        progress: called with the tokens of each document when it is written.

    Raises:
        InputError: the folder holds a finished dataset.
        MismatchError: the folder holds shards of something else.
        CorruptDataError: a document of the source is damaged.

    Example:
        >>> from distillkit.shards import Dataset, convert
        >>> convert(Dataset.open("captured"), "converted", shard_tokens=20).shards[0].documents
        2
    """
    header = replace(
        source.header,
        fidelity=None,
        distillkit_version=__version__,
        vocab_size=vocab_size or source.header.vocab_size,
        tokenizer=tokenizer or source.header.tokenizer,
        teacher=teacher or source.header.teacher,
    )
    with ShardWriter(folder, header, shard_tokens=shard_tokens, resume=True) as writer:
        done = sum(shard.documents for shard in writer.resumed)
        for index, document in enumerate(source):
            if index >= done:
                writer.write(
                    document.input_ids,
                    document.teacher,
                    loss_mask=document.loss_mask,
                    segment_lengths=document.segment_lengths,
                    label_logprobs=document.label_logprobs,
                )
            progress(len(document.input_ids))
        return writer.close()

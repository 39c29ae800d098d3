"""Conversion of datasets to shards: without loss, or to another codec."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from distillkit import __version__
from distillkit.codec import Codec, CodecConfig, CompactConfig, Prior, SampledConfig
from distillkit.errors import InputError, MismatchError
from distillkit.shards.manifest import Manifest
from distillkit.shards.plausibility import check_plausible, decoded, sampled
from distillkit.shards.prior import PRIOR, load_prior
from distillkit.shards.reader import Dataset
from distillkit.shards.storage import Folder
from distillkit.shards.writer import ShardWriter
from distillkit.types import Document, SparseLogprobs

__all__ = ["PRIOR_ROWS", "convert", "target_codec"]

logger = logging.getLogger(__name__)

PRIOR_ROWS = 131_072
"""Rows from which a prior is learned. Twice as many save 0.3% of the bytes."""


def convert(
    source: Dataset,
    folder: str | Path,
    *,
    codec: Codec | None = None,
    shard_tokens: int = 262_144,
    vocab_size: int | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    teacher: Mapping[str, Any] | None = None,
    standalone: bool = False,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Manifest:
    """Writes a dataset's documents to shards, with their encoded bytes unchanged or in another codec.

    In another codec, each row keeps its first k ids, and what they leave out becomes missing mass. The header's
    fidelity then compares with the source's decoded rows, since the teacher's own are not at hand; `capture.converted`
    in the header says so, and how close the source was.

    Args:
        source: any dataset.
        folder: output folder; created if needed. An interrupted conversion is resumed after its finished shards.
        codec: what to write; see `target_codec`. None keeps the source's bytes.
        shard_tokens: tokens per shard.
        vocab_size, tokenizer, teacher: values for the header, which a published dataset does not record.
        standalone: put the prior of a compact codec into each shard, so that it can be read without the folder.
        progress: called after each document with its number of tokens.

    Raises:
        InputError: the folder contains a finished dataset, or rows cannot be stored in this codec.
        MismatchError: the folder contains shards of another dataset, or the source's rows cannot have been written with
            its codec.
        CorruptDataError: a source document is damaged.

    Example:
        >>> from distillkit.shards import Dataset, convert
        >>> convert(Dataset.open("captured"), "converted", shard_tokens=20).shards[0].documents
        2
    """
    check_plausible(sampled(source), source.codec, source.path)
    target = source.codec if codec is None else codec
    header = replace(
        source.header,
        codec=target.to_dict(),
        fidelity=None,
        distillkit_version=__version__,
        vocab_size=vocab_size or source.header.vocab_size,
        tokenizer=tokenizer or source.header.tokenizer,
        teacher=teacher or source.header.teacher,
        capture=_settings(source, target, standalone),
    )
    with ShardWriter(
        folder,
        header,
        shard_tokens=shard_tokens,
        resume=True,
        prior=target.prior,
        standalone=standalone,
        kept=source.kept_schema,
    ) as writer:
        resumed = writer.finished_documents()
        for index, document in enumerate(source):
            rows = _rows(document, source.codec, target)
            written = next(resumed, None)
            if written is None:
                writer.write(document.input_ids, document.teacher if rows is None else rows, **_others(document))
            elif not _same(written, document, document.teacher if rows is None else target.encode_document(rows)):
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


def target_codec(
    source: Dataset,
    config: CodecConfig,
    *,
    folder: str | Path,
    prior: Prior | None = None,
    prior_rows: int = PRIOR_ROWS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Codec:
    """The codec of a conversion; in the compact format, with a prior for it.

    A prior is for one configuration. One that was learned for another keeps its lists of likely ids, and its tables are
    learned anew from the source's rows; without a prior, given or of the source, both are learned from them.

    Args:
        source: the dataset to convert.
        config: what to convert it to. A compact configuration stores at most as many ids per row as the source does.
        folder: where the conversion is written. A prior that an interrupted conversion left there is used again.
        prior: that of another dataset of the same teacher; see `load_prior`.
        prior_rows: how many rows to learn from, in documents evenly spread over the source.
        progress: called with the rows read and their total.

    Raises:
        ConfigError: the configuration is invalid.
        InputError: the source has fewer ids per row than a fixed format stores, or either has draws and the other one
            has not the same.
        MismatchError: the vocabularies differ.
        CorruptDataError: a source document or the prior is damaged.
    """
    k = source.codec.k
    _check_draws(source, config)
    if config.k > k and not isinstance(config, CompactConfig):
        raise InputError(
            f"{source.path}: its rows have {k} ids, but the format {config.format} with k = {config.k} stores exactly "
            f"{config.k}: choose a compact preset, or a configuration with k = {k} or less"
        )
    if not isinstance(config, (CompactConfig, SampledConfig)):
        codec = Codec(config)
    else:
        if config.k > k:
            logger.info("%s: its rows have %d ids: k is %d instead of %d", source.path, k, k, config.k)
            config = config.model_copy(update={"k": k})
        # A source with a prior has learned from the teacher already.
        given = prior or _kept(folder) or source.codec.prior
        codec = _with_prior(source, config, given, prior_rows, progress)
    if codec.vocab_size != source.codec.vocab_size:
        raise MismatchError(
            f"{source.path}: its codec has {source.codec.vocab_size:,} ids, but the configuration given has "
            f"{codec.vocab_size:,}"
        )
    return codec


def _check_draws(source: Dataset, config: CodecConfig) -> None:
    """Refuse conversions between draws and distributions, or to other draws.

    Raises:
        InputError: says why.
    """
    theirs, draws = source.codec.draws, isinstance(config, SampledConfig)
    if theirs is None and not draws:
        return
    if theirs is None:
        raise InputError(
            f"{source.path}: its rows have the {source.codec.k} most probable ids, but draws (format sampled) are made "
            "from the whole distribution: capture again with the transformers engine, whose teacher has all logits"
        )
    own = source.codec.config
    if not isinstance(config, SampledConfig) or not isinstance(own, SampledConfig):
        raise InputError(
            f"{source.path}: its rows are {theirs.number} draws from the teacher's distributions (format sampled), not "
            f"probabilities, which the format {config.format} stores: capture the teacher again in that format"
        )
    ours, found = config.without_prior().model_dump(exclude={"vocab_size"}), own.without_prior().model_dump()
    odd = [f"{key} {found[key]!r} (wanted: {ours[key]!r})" for key in ours if ours[key] != found[key]]
    if odd:
        raise InputError(f"{source.path}: its draws have {', '.join(odd)}: other draws need the teacher; capture again")


def _with_prior(
    source: Dataset,
    config: CompactConfig | SampledConfig,
    prior: Prior | None,
    rows: int,
    progress: Callable[[int, int], None],
) -> Codec:
    """The codec with a prior that is given, adapted or learned."""
    wanted = config.without_prior()
    if prior is None or prior.config != wanted.for_prior():
        learned_from = _sample(source, rows, progress)
        logger.info("%s: learning a prior from %s rows", source.path, f"{len(learned_from.ids):,}")
        # Lists that were learned from draws are no base for a compact prior.
        base = prior if prior is None or isinstance(prior.config, CompactConfig) or wanted.format == "sampled" else None
        prior = Prior.learn(wanted, learned_from, base=base, source=f"the prior learned from {source.path}")
    return Codec(wanted, prior=prior)


def _kept(folder: str | Path) -> Prior | None:
    """The prior that an interrupted conversion left in its folder."""
    place = Folder(folder)
    return None if place.size(PRIOR) is None else load_prior(place.of(PRIOR))


def _sample(source: Dataset, rows: int, progress: Callable[[int, int], None]) -> SparseLogprobs:
    """About so many rows, of documents evenly spread over a dataset, with all of their ids: those beyond the k that are
    to be stored tell rows apart, too."""
    share = min(1.0, rows / max(source.num_rows, 1))
    parts: list[SparseLogprobs] = []
    total, done = min(rows, source.num_rows), 0
    for index in np.unique(np.linspace(0, len(source) - 1, max(1, round(share * len(source)))).astype(int)).tolist():
        part = _distributions(decoded(source[index], source.codec), source.codec.k)
        parts.append(part)
        done += len(part.ids)
        progress(min(done, total), total)
        if done >= total:
            break
    ids, logprobs = (np.concatenate([getattr(part, name) for part in parts])[:total] for name in ("ids", "logprobs"))
    return SparseLogprobs(ids, logprobs, source.codec.draws)


def _settings(source: Dataset, target: Codec, standalone: bool) -> dict[str, Any]:
    """The header's `capture`, with what the conversion does."""
    settings = dict(source.header.capture)
    if target.to_dict() != source.codec.to_dict():
        stats = source.header.fidelity or {}
        settings["converted"] = {"source_codec": source.codec.to_dict(), "source_kl_mean": stats.get("kl_mean")}
    if standalone:
        settings["standalone"] = True
    return settings


def _rows(document: Document, codec: Codec, target: Codec) -> SparseLogprobs | None:
    """A document's rows for the target; None if its bytes are kept.

    Raises:
        InputError: a row has fewer ids than a fixed format stores.
    """
    if target == codec:
        return None
    rows = _distributions(decoded(document, codec), target.k)
    counts_R = np.isfinite(rows.logprobs).sum(-1)
    if target.is_fixed and (counts_R < target.k).any():
        row = int(counts_R.argmin())
        raise InputError(
            f"{document.place}: row {row} has {counts_R[row]} ids, but the format {target.format} stores exactly "
            f"{target.k} per row: choose a compact preset"
        )
    return rows


def _distributions(rows: SparseLogprobs, k: int) -> SparseLogprobs:
    """The first k ids of decoded rows. The coarser fixed formats decode some rows to probabilities that sum to more
    than 1; these are divided by their sum, as losses do."""
    if rows.draws is not None:
        return rows
    ids, logprobs = np.asarray(rows.ids), np.asarray(rows.logprobs)
    with np.errstate(over="ignore"):
        total_R1 = np.exp(logprobs.astype(np.float64)).sum(-1, keepdims=True)
    logprobs = logprobs - np.log(np.maximum(total_R1, 1.0)).astype(np.float32)
    return SparseLogprobs(np.ascontiguousarray(ids[:, :k]), np.ascontiguousarray(logprobs[:, :k]))


def _others(document: Document) -> dict[str, Any]:
    """What is stored of a document besides its tokens and rows."""
    return {name: getattr(document, name) for name in ("loss_mask", "segment_lengths", "label_logprobs", "columns")}


def _same(written: Document, document: Document, teacher: bytes | memoryview) -> bool:
    """Whether all that is stored of two documents is equal; `doc_id` stands for ids, mask and segments."""
    labels, expected = written.label_logprobs, document.label_logprobs
    same_labels = labels is expected if labels is None or expected is None else np.array_equal(labels, expected)
    return same_labels and written.doc_id == document.doc_id and written.teacher == teacher

"""Conversion of datasets to shards: without loss, or to another codec."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
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

__all__ = ["PRIOR_ROWS", "RowSource", "convert", "distributions", "fitting", "target_codec", "write_documents"]

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
        found = ((document, _rows(document, source.codec, target)) for document in source)
        write_documents(
            writer,
            found,
            target,
            f"{folder}: the folder contains an unfinished conversion of another dataset than {source.path}",
            progress,
        )
        return writer.close()


def write_documents(
    writer: ShardWriter,
    documents: Iterable[tuple[Document, SparseLogprobs | None]],
    codec: Codec,
    otherwise: str,
    progress: Callable[[int], None],
) -> None:
    """Writes documents after those that an interrupted run has finished, which are compared with their own.

    Args:
        writer: writes to the folder.
        documents: all documents in order, each with its rows; None keeps its bytes.
        codec: encodes the rows.
        otherwise: what is wrong if the folder has other documents, for the message.
        progress: called after each document with its number of tokens.

    Raises:
        InputError: rows cannot be stored in this codec.
        MismatchError: the folder has other documents.
    """
    resumed, index = writer.finished_documents(), 0
    for index, (document, rows) in enumerate(documents, 1):
        written = next(resumed, None)
        if written is None:
            writer.write(document.input_ids, document.teacher if rows is None else rows, **_others(document))
        elif not _same(written, document, document.teacher if rows is None else codec.encode_document(rows)):
            raise MismatchError(f"{otherwise}: document {index - 1} differs; choose another folder or remove it")
        progress(len(document.input_ids))
    if next(resumed, None) is not None:
        raise MismatchError(f"{otherwise}: it has more than {index} documents; choose another folder or remove it")


@dataclass(frozen=True)
class RowSource:
    """Distributions that are to be stored in a codec.

    Attributes:
        name: what they are, for messages.
        vocab_size: their ids are smaller.
        k: the most ids that a row has.
        documents, rows: how many there are.
        prior: what is known of them already.
        read: returns the rows of a document by its index.
        sampled: of draws: how they were drawn.
    """

    name: str
    vocab_size: int
    k: int
    documents: int
    rows: int
    prior: Prior | None
    read: Callable[[int], SparseLogprobs]
    sampled: SampledConfig | None = None

    @classmethod
    def of(cls, source: Dataset) -> RowSource:
        """Those of a dataset."""
        codec = source.codec

        def read(index: int) -> SparseLogprobs:
            return distributions(decoded(source[index], codec), codec.k)

        own = codec.config if isinstance(codec.config, SampledConfig) else None
        return cls(source.path, codec.vocab_size, codec.k, len(source), source.num_rows, codec.prior, read, own)


def target_codec(
    source: Dataset | RowSource,
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
        source: the dataset, or the distributions, to convert.
        config: what to convert them to. A compact configuration stores at most as many ids per row as the source does.
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
    source = RowSource.of(source) if isinstance(source, Dataset) else source
    k = source.k
    _check_draws(source, config)
    if config.k > k and not isinstance(config, CompactConfig):
        raise InputError(
            f"{source.name}: its rows have {k} ids, but the format {config.format} with k = {config.k} stores exactly "
            f"{config.k}: choose a compact preset, or a configuration with k = {k} or less"
        )
    if not isinstance(config, (CompactConfig, SampledConfig)):
        codec = Codec(config)
    else:
        if config.k > k:
            logger.info("%s: its rows have %d ids: k is %d instead of %d", source.name, k, k, config.k)
            config = config.model_copy(update={"k": k})
        # A source with a prior has learned from the teacher already.
        given = prior or _kept(folder) or source.prior
        codec = _with_prior(source, config, given, prior_rows, progress)
    if codec.vocab_size != source.vocab_size:
        raise MismatchError(
            f"{source.name}: its codec has {source.vocab_size:,} ids, but the configuration given has "
            f"{codec.vocab_size:,}"
        )
    return codec


def _check_draws(source: RowSource, config: CodecConfig) -> None:
    """Refuse conversions between draws and distributions, or to other draws.

    Raises:
        InputError: says why.
    """
    own = source.sampled
    if own is None and not isinstance(config, SampledConfig):
        return
    if own is None:
        raise InputError(
            f"{source.name}: its rows have the {source.k} most probable ids, but draws (format sampled) are made "
            "from the whole distribution: capture again with the transformers engine, whose teacher has all logits"
        )
    if not isinstance(config, SampledConfig):
        raise InputError(
            f"{source.name}: its rows are {own.draws} draws from the teacher's distributions (format sampled), not "
            f"probabilities, which the format {config.format} stores: capture the teacher again in that format"
        )
    ours, found = config.without_prior().model_dump(exclude={"vocab_size"}), own.without_prior().model_dump()
    odd = [f"{key} {found[key]!r} (wanted: {ours[key]!r})" for key in ours if ours[key] != found[key]]
    if odd:
        raise InputError(f"{source.name}: its draws have {', '.join(odd)}: other draws need the teacher; capture again")


def _with_prior(
    source: RowSource,
    config: CompactConfig | SampledConfig,
    prior: Prior | None,
    rows: int,
    progress: Callable[[int, int], None],
) -> Codec:
    """The codec with a prior that is given, adapted or learned."""
    wanted = config.without_prior()
    if prior is None or prior.config != wanted.for_prior():
        learned_from = _sample(source, rows, progress)
        logger.info("%s: learning a prior from %s rows", source.name, f"{len(learned_from.ids):,}")
        # Lists that were learned from draws are no base for a compact prior.
        base = prior if prior is None or isinstance(prior.config, CompactConfig) or wanted.format == "sampled" else None
        prior = Prior.learn(wanted, learned_from, base=base, source=f"the prior learned from {source.name}")
    return Codec(wanted, prior=prior)


def _kept(folder: str | Path) -> Prior | None:
    """The prior that an interrupted conversion left in its folder."""
    place = Folder(folder)
    return None if place.size(PRIOR) is None else load_prior(place.of(PRIOR))


def _sample(source: RowSource, rows: int, progress: Callable[[int, int], None]) -> SparseLogprobs:
    """About so many rows, of documents evenly spread over a dataset, with all of their ids: those beyond the k that are
    to be stored tell rows apart, too."""
    share = min(1.0, rows / max(source.rows, 1))
    parts: list[SparseLogprobs] = []
    total, done = min(rows, source.rows), 0
    last, count = source.documents - 1, max(1, round(share * source.documents))
    for index in np.unique(np.linspace(0, last, count).astype(int)).tolist():
        part = source.read(index)
        parts.append(part)
        done += len(part.ids)
        progress(min(done, total), total)
        if done >= total:
            break
    ids, logprobs = (np.concatenate([getattr(part, name) for part in parts])[:total] for name in ("ids", "logprobs"))
    return SparseLogprobs(ids, logprobs, parts[0].draws)


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
    return fitting(distributions(decoded(document, codec), target.k), target, document.place)


def fitting(rows: SparseLogprobs, target: Codec, place: str) -> SparseLogprobs:
    """Rows that a codec can store, as they are.

    Raises:
        InputError: a row has fewer ids than a fixed format stores.
    """
    counts_R = np.isfinite(rows.logprobs).sum(-1)
    if target.is_fixed and (counts_R < target.k).any():
        row = int(counts_R.argmin())
        raise InputError(
            f"{place}: row {row} has {counts_R[row]} ids, but the format {target.format} stores exactly "
            f"{target.k} per row: choose a compact preset"
        )
    return rows


def distributions(rows: SparseLogprobs, k: int) -> SparseLogprobs:
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

"""The documents of a training run, captured or tokenised from text."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from distillkit.console import number_of
from distillkit.errors import ConfigError
from distillkit.losses.config import refuse_draws
from distillkit.models.head import bare_model
from distillkit.shards import Dataset as StoredDataset
from distillkit.shards.overflow import LongDocuments, Pieces
from distillkit.shards.packing import pack
from distillkit.shards.reader import is_captured
from distillkit.shards.storage import TEMPORARY_PREFIX
from distillkit.text.policy import TextOptions, training_policy
from distillkit.text.rows import RowReader
from distillkit.text.sources import Source, open_hub, open_local
from distillkit.text.tokenizer import vocab_size
from distillkit.training.data.examples import DistillationDataset, DocumentSource
from distillkit.training.data.prepared import Part, PreparedDataset, content_hash, prepare
from distillkit.training.data.stored import Sample, check_tokenizer, open_dataset

if TYPE_CHECKING:
    from trl import SFTConfig

    from distillkit.training.config.schema import DatasetEntry, DatasetSource, RunConfig
    from distillkit.training.signals.base import TeacherSignal

__all__ = [
    "cache_folder",
    "check_positions",
    "check_row_lengths",
    "document_lengths",
    "is_packed",
    "long_documents",
    "open_documents",
    "open_rows",
    "streamed",
    "training_dataset",
]

logger = logging.getLogger(__name__)

SLOW_SECONDS = 1.0
"""Document lengths that took longer than this to read are cached."""


def open_documents(
    config: RunConfig, entry: DatasetEntry, tokenizer: Any, arguments: SFTConfig, opened: StoredDataset | None = None
) -> DocumentSource:
    """Open the documents of a dataset to train or evaluate on.

    With stored distributions, this is a captured or published dataset. With a live teacher it may also be one (whose
    distributions are ignored), or text, which is prepared here. Must run in one process before the others.

    Args:
        config: the run's configuration.
        entry: which of its datasets to open.
        tokenizer: the student's tokenizer; see `configure_tokenizer`.
        arguments: the trainer's arguments.
        opened: the dataset, if it is open already.

    Raises:
        ConfigError: there is no such data, a setting or a loss does not fit it, or much of it would be cut off unasked.
        InputError: a row has an unknown format.
        MismatchError: the data were captured with another tokenizer or codec.
    """
    from distillkit.training.config.schema import StoredTeacherConfig

    source, key = entry.source, entry.key
    cache = cache_folder(config)
    documents: DocumentSource
    if opened is not None or config.teacher.kind == "dataset" or _is_captured(source):
        teacher = config.teacher if config.teacher.kind == "dataset" else StoredTeacherConfig(kind="dataset")
        stored = open_dataset(source, teacher, key) if opened is None else opened
        check_tokenizer(stored, tokenizer, config.model, key)
        if stored.codec.draws is not None and config.teacher.kind == "dataset":
            refuse_draws(config.loss_functions, stored.codec.draws, f"{key} ({stored.path})")
        documents = stored
    else:
        documents = prepare(
            open_rows(source, entry.part, key),
            RowReader(tokenizer, training_policy(tokenizer, _text_options(config, arguments)), vocab_size(tokenizer)),
            cache,
            key=key,
            sample=_sample(config, entry),
            columns=tuple(dict.fromkeys(name for teacher in config.teachers or () for name in teacher.where)),
            processes=arguments.dataset_num_proc or 1,
        )
    long = long_documents(config, entry, documents)
    overflow = config.dataset.overflow
    long.check(overflow, key=key, row=f"sequence_length: {long.limit:,}", setting="dataset.overflow")
    if long.long:
        logger.log(logging.INFO if overflow == "split" else logging.WARNING, "%s: %s", key, long.outcome(overflow))
    return documents


def long_documents(config: RunConfig, entry: DatasetEntry, documents: DocumentSource) -> LongDocuments:
    """Count the documents, among those that a run uses, that are longer than the sequence length."""
    return LongDocuments.of(_chosen(config, entry, documents)[1], config.sequence_length)


def check_positions(
    config: RunConfig, entry: DatasetEntry, documents: DocumentSource, arguments: SFTConfig, models: Mapping[str, Any]
) -> None:
    """Refuse rows beyond a model's table of positions, and warn of documents beyond what it was made for.

    Args:
        config: the run's configuration.
        entry: whose documents these are.
        documents: the documents.
        arguments: the trainer's arguments.
        models: the student, and a live teacher, by the setting that names them.

    Raises:
        ConfigError: the model has no embedding for a position.
    """
    header = documents.header.capture or {} if isinstance(documents, StoredDataset) else {}
    if config.dataset.prepacked or "packed" in header:
        return  # positions restart in rows that are packed already
    longest = min(long_documents(config, entry, documents).longest, config.sequence_length)
    # The positions of padding continue those of a row's last document.
    multiple = arguments.pad_to_multiple_of or 1
    row = -(-(config.sequence_length if is_packed(config, arguments, entry.part) else longest) // multiple) * multiple
    check_row_lengths(models, row, longest, entry.key)


def check_row_lengths(models: Mapping[str, Any], row: int, longest: int, key: str) -> None:
    """Refuse rows beyond a model's table of positions, and warn of documents beyond what it was made for.

    Args:
        models: the student, and a live teacher, by the setting that names them.
        row: the longest row in tokens, with padding.
        longest: the longest document in tokens.
        key: the setting whose rows these are, for messages.

    Raises:
        ConfigError: the model has no embedding for a position.
    """
    for name, model in models.items():
        limit = getattr(bare_model(model).config.get_text_config(), "max_position_embeddings", None)
        if not isinstance(limit, int) or row <= limit:
            continue
        made = f"{name} was made for {limit:,} positions (max_position_embeddings), and {key} has"
        if _position_table(model, limit):
            raise ConfigError(
                f"{made} rows of up to {row:,} tokens, for which it has no embeddings. Set sequence_length to at most "
                f"{limit:,}"
            )
        if longest > limit:
            logger.warning("%s documents of up to %s tokens", made, f"{longest:,}")


def _position_table(model: Any, size: int) -> bool:
    """Whether a model has an embedding for each position, which some of them number from 1 or 2."""
    import torch

    bare = bare_model(model)
    return any(
        isinstance(module, torch.nn.Embedding)
        and module is not bare.get_input_embeddings()
        and size <= module.num_embeddings <= size + 2
        for module in bare.modules()
    )


def _chosen(
    config: RunConfig, entry: DatasetEntry, documents: DocumentSource
) -> tuple[npt.NDArray[np.int64] | None, npt.NDArray[np.int64]]:
    """Return which documents a run uses, None for all, and their lengths."""
    lengths = document_lengths(documents, cache_folder(config))
    # Rows of text were already sampled when they were prepared.
    chosen = None if isinstance(documents, PreparedDataset) else _sample(config, entry).choose(len(documents))
    return chosen, lengths if chosen is None else lengths[chosen]


def training_dataset(
    config: RunConfig, entry: DatasetEntry, documents: DocumentSource, signal: TeacherSignal, arguments: SFTConfig
) -> DistillationDataset:
    """Make training examples of documents: sample them, split or drop long ones, and pack them as configured.

    Raises:
        ConfigError: the dataset has fewer documents than requested, or all of them are dropped.
    """
    chosen, lengths = _chosen(config, entry, documents)
    pieces = None
    if config.dataset.overflow in ("split", "drop") and lengths.max(initial=0) > config.sequence_length:
        pieces = Pieces.of(lengths, config.sequence_length, config.dataset.overflow)
        lengths = pieces.lengths
        if not len(pieces):
            raise ConfigError(
                f"dataset.overflow: drop leaves nothing of {entry.key}: all its documents are longer than "
                f"sequence_length: {config.sequence_length:,}"
            )
    packing = None
    if is_packed(config, arguments, entry.part):
        packing = pack(lengths, config.sequence_length, seed=config.dataset.seed)
        logger.info(
            "%s: %s packed in %s of %s tokens, %.1f%% full",
            entry.key,
            number_of(len(packing.documents), "document"),
            number_of(len(packing), "row"),
            f"{config.sequence_length:,}",
            100 * packing.fill,
        )
    tokens = int(np.minimum(lengths, config.sequence_length).sum())
    return DistillationDataset(
        documents, signal, config.sequence_length, chosen, pieces=pieces, packing=packing, tokens=tokens
    )


def _sample(config: RunConfig, entry: DatasetEntry) -> Sample:
    if entry.source.num_samples is not None:
        return Sample(entry.source.num_samples, config.dataset.seed, f"{entry.key}.num_samples")
    setting = {"train": "num_samples", "eval": "num_eval_samples"}[entry.part]
    return Sample(getattr(config.dataset, setting), config.dataset.seed, f"dataset.{setting}")


def is_packed(config: RunConfig, arguments: SFTConfig, part: Part) -> bool:
    """Whether several documents share a row, according to `packing` or `functionary_packing`, and `eval_packing` for
    evaluation. Rows that are already packed are used unchanged (`dataset.prepacked`). For `dataset.packing: auto`,
    `choose_packing` sets `arguments.packing`."""
    if config.dataset.prepacked:
        return False
    if part == "eval" and arguments.eval_packing is not None:
        return bool(arguments.eval_packing)
    if isinstance(config.dataset.packing, bool):
        return config.dataset.packing
    return bool(arguments.packing or config.functionary_packing)


def cache_folder(config: RunConfig) -> Path:
    """Return the folder for prepared data: `prepared_dataset_path`, or one in the cache of the datasets library."""
    if config.dataset.prepared_dataset_path is not None:
        return Path(config.dataset.prepared_dataset_path).expanduser()
    from datasets.config import HF_DATASETS_CACHE

    return Path(HF_DATASETS_CACHE) / "distillkit"


def _text_options(config: RunConfig, arguments: SFTConfig) -> TextOptions:
    return TextOptions(
        text_column=arguments.dataset_text_field,
        text_first="dataset_text_field" in config.training_args,
        completion_only=arguments.completion_only_loss,
        assistant_only=arguments.assistant_only_loss,
        tokenised=bool((arguments.dataset_kwargs or {}).get("skip_prepare_dataset")),
    )


def _is_captured(source: DatasetSource) -> bool:
    """Whether a dataset was captured by distillkit: it has a manifest."""
    if source.repo_id is None:
        return source.disk_path is not None and Path(source.disk_path).exists() and is_captured(source.disk_path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    manifest = f"{_folder_on_hub(source)}manifest.json"
    try:
        hf_hub_download(source.repo_id, manifest, repo_type="dataset", revision=source.revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
        return False  # if the repository cannot be read at all, loading it raises
    return True


def _folder_on_hub(source: DatasetSource) -> str:
    """Return the folder of a hub dataset's configuration, with a slash at its end, or nothing."""
    return "" if source.config_name is None else f"{source.config_name}/"


def streamed(source: DatasetSource) -> DatasetSource:
    """Return a source that reads a capture on the hub by row group and downloads nothing; any other one as it is.

    Offline, captures are those in the hub's cache.
    """
    from huggingface_hub import constants

    if source.repo_id is None or constants.HF_HUB_OFFLINE or not _is_captured(source):
        return source
    revision = "" if source.revision is None else f"@{quote(source.revision, safe='')}"
    url = f"hf://datasets/{source.repo_id}{revision}/{_folder_on_hub(source)}"
    return source.model_copy(update={"repo_id": None, "revision": None, "config_name": None, "disk_path": url})


def open_rows(source: DatasetSource, part: Part, key: str) -> Source:
    """Open rows of text; without a split, use the only one, or for training "train"."""
    try:
        if source.disk_path is not None:
            return _with_default_split(source.split, part, lambda split: open_local(str(source.disk_path), split=split))
        return _with_default_split(
            source.split,
            part,
            lambda split: open_hub(
                str(source.repo_id), configuration=source.config_name, split=split, revision=source.revision
            ),
        )
    except ConfigError as error:
        raise ConfigError(f"{key}: {str(error).removeprefix('dataset: ')}") from error


def _with_default_split(split: str | None, part: Part, opened: Any) -> Source:
    try:
        source: Source = opened(split)
    except ConfigError:
        if split is not None or part != "train":
            raise
        source = opened("train")
    return source


def document_lengths(documents: DocumentSource, cache: Path) -> npt.NDArray[np.int64]:
    """Return the number of tokens of each document (D,).

    For a stored dataset, lengths are read from the column of token ids (12 million tokens per second on two cores), and
    kept in `cache` if that took long, so that a resumed run starts at once.
    """
    if not isinstance(documents, StoredDataset):
        return documents.lengths()
    identity = _stored_identity(documents)
    path = cache / f"lengths-{content_hash(identity)}.npy"
    if identity is not None and path.is_file():
        kept = np.load(path)
        if len(kept) == len(documents):
            return np.asarray(kept, dtype=np.int64)
    started = time.perf_counter()
    lengths = documents.lengths()
    if identity is not None and time.perf_counter() - started > SLOW_SECONDS:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}"
        with temporary.open("wb") as file:
            np.save(file, lengths)
        os.replace(temporary, path)
    return lengths


def _stored_identity(documents: StoredDataset) -> Any:
    """Return what identifies a stored dataset: its shards' hashes, or its files; None if the files are remote."""
    if documents.kind == "distillkit" and all(shard.xxh3_128 for shard in documents.shards):
        return [[shard.file, shard.documents, shard.xxh3_128] for shard in documents.shards]
    paths = [Path(file.path) for file in documents.files]
    if not all(path.is_file() for path in paths):
        return None
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]

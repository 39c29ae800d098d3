"""Opens captured datasets for training, and checks them against the student."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distillkit.configuration.hub import hub_problem, is_hub_error
from distillkit.console import number_of
from distillkit.errors import ConfigError, InputError, MismatchError
from distillkit.shards.plausibility import check_plausible, sampled
from distillkit.shards.prior import PRIOR
from distillkit.text import tokenizer as tokenizers
from distillkit.training.data.examples import DocumentSource
from distillkit.training.signals.base import check_ids_fit
from distillkit.types import Document

if TYPE_CHECKING:
    from distillkit.shards import Dataset as StoredDataset
    from distillkit.training.config.schema import DatasetSource, StoredTeacherConfig

__all__ = ["Sample", "check_dataset", "check_ids", "check_tokenizer", "open_dataset"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """How many documents of a dataset a run uses, and which.

    Attributes:
        documents: number of documents to use; None: all.
        seed: seed for choosing them at random; None: the first ones.
        setting: the setting with this number, for messages.
    """

    documents: int | None = None
    seed: int | None = None
    setting: str = "dataset.num_samples"

    def choose(self, size: int) -> npt.NDArray[np.int64] | None:
        """Return the indices of the documents to use, out of `size`, ascending; None: all.

        Raises:
            ConfigError: there are fewer documents than requested.
        """
        count = self.documents
        if count is None:
            return None
        if count > size:
            raise ConfigError(f"{self.setting}: {count:,} documents were requested, but the dataset has only {size:,}")
        chosen = np.arange(count) if self.seed is None else np.random.default_rng(self.seed).permutation(size)[:count]
        return np.sort(chosen).astype(np.int64)


def open_dataset(source: DatasetSource, teacher: StoredTeacherConfig, key: str) -> StoredDataset:
    """Open a captured or published dataset with its codec.

    Args:
        source: the dataset; a hub repository is downloaded into the hub's cache.
        teacher: has the codec of a published dataset; if set, it must match the dataset's own.
        key: dotted path of `source` in the configuration, for messages.

    Raises:
        ConfigError: there is no such dataset.
        MismatchError: the configuration's codec or vocabulary size is not the dataset's.
    """
    from distillkit.shards import Dataset

    path = source.disk_path or _downloaded(source, str(source.repo_id), key)
    codec = teacher.codec()
    try:
        dataset = Dataset.open(
            path,
            config=codec,
            split=source.split,
            vocab_size=teacher.vocab_size,
        )
    except FileNotFoundError as error:
        raise ConfigError(f"{key}: {error.strerror}: {error.filename}") from error
    except MismatchError as error:
        raise MismatchError(f"{key} and teacher: {error}") from error
    except InputError as error:
        hint = ", or use teacher.kind: hf" if "distillkit capture" in str(error) else ""
        raise InputError(f"{key}: {error}{hint}") from error
    if teacher.vocab_size is not None:
        known = {dataset.codec.vocab_size, dataset.header.vocab_size, dataset.header.head_size}
        if teacher.vocab_size not in known:
            raise MismatchError(
                f"teacher.vocab_size is {teacher.vocab_size:,}, but {key} ({path}) was captured with a vocabulary of "
                f"{dataset.header.vocab_size:,} in a head of {dataset.header.head_size:,} (its codec: "
                f"{dataset.codec.vocab_size:,})"
            )
    return dataset


def _downloaded(source: DatasetSource, repo_id: str, key: str) -> str:
    """Download a hub dataset's files and return their folder."""
    from pathlib import Path

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    inside = "" if source.config_name is None else f"{source.config_name}/"
    suffixes = (".parquet", ".arrow", ".json", ".yaml", ".yml", PRIOR)
    patterns = [f"{inside}**{suffix}" for suffix in suffixes]
    try:
        folder = snapshot_download(
            repo_id,
            repo_type="dataset",
            revision=source.revision,
            allow_patterns=[*patterns, "compression_config.y*ml", "prior.bin"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = hub_problem(error) if is_hub_error(error) else str(error)
        raise ConfigError(f"{key}.repo_id: {repo_id!r} cannot be downloaded from the hub: {reason}") from error
    path = Path(folder) / (source.config_name or "")
    if not path.is_dir():
        raise ConfigError(f"{key}.config_name: {repo_id} has no folder {source.config_name!r}")
    return str(path)


def check_tokenizer(dataset: StoredDataset, tokenizer: Any, student: str, key: str) -> None:
    """Refuse a dataset that was captured with another tokenizer than the student's.

    Raises:
        MismatchError: the tokenizers differ; the message has both fingerprints.
    """
    recorded = dataset.header.tokenizer
    if recorded is None:
        logger.warning("%s does not record its tokenizer: cannot check that it is the same as the student's", key)
        return
    ours = tokenizers.fingerprint(tokenizer)
    if recorded["fingerprint"] != ours:
        raise MismatchError(
            f"{key} was captured with another tokenizer than the student's: {recorded['name']} "
            f"({recorded['fingerprint']}, {dataset.header.vocab_size:,} ids) against {student} ({ours}, "
            f"{tokenizers.vocab_size(tokenizer):,} ids). Token ids would mean different tokens: rewrite the "
            "dataset in the student's (distillkit retokenize), or use a student with the teacher's tokenizer"
        )


def check_dataset(dataset: StoredDataset, head_size: int, key: str) -> None:
    """Refuse a dataset with ids beyond the student's head, or with teacher rows that are shifted against its tokens or
    cannot have been written with its codec.

    Padded heads may differ in width (151,936 and 152,064 for one tokenizer): only the tokenizer's vocabulary must fit.

    Args:
        dataset: the stored documents; a sample of them is read.
        head_size: width of the student's head.
        key: dotted path of the dataset in the configuration, for messages.

    Raises:
        ConfigError: the dataset has no documents.
        MismatchError: names what does not match, and both values.
    """
    if len(dataset) == 0:
        raise ConfigError(f"{key}: the dataset has no documents")
    header = dataset.header
    draws = dataset.codec.draws
    if draws is not None and header.temperature != draws.temperature:
        raise MismatchError(
            f"{key} was captured at temperature {header.temperature:g}, but its codec says that it was drawn at "
            f"{draws.temperature:g}: the header is damaged"
        )
    if draws is None and header.temperature != 1.0:
        raise MismatchError(
            f"{key} was captured at temperature {header.temperature:g}; the losses apply their own temperature and "
            "need 1"
        )
    # A published dataset only records the codec's vocabulary size.
    needed = header.vocab_size if header.tokenizer is not None else dataset.codec.vocab_size
    if needed > head_size:
        raise MismatchError(
            f"{key} holds ids of a vocabulary of {needed:,}, but the student's head has {head_size:,} rows. If their "
            "tokenizers are the same and only the padding differs, set resize_embeddings_to_multiple_of so that the "
            "head is wide enough"
        )
    if dataset.codec.k > head_size:
        raise MismatchError(
            f"{key}: each row holds {dataset.codec.k:,} ids, more than the student's head has rows: {head_size:,}. "
            "Capture fewer ids per row (k), or set resize_embeddings_to_multiple_of"
        )
    sample = list(sampled(dataset))
    for document in sample:
        _check_ids_fit(document, head_size, key)
    rates = check_plausible(sample, dataset.codec, key)
    found = number_of(len(dataset), "document")
    logger.info("%s: %s; the true next token is the teacher's first: %s", key, found, rates)


def check_ids(documents: DocumentSource, head_size: int, key: str) -> None:
    """Refuse an empty dataset for a live teacher, or one with token ids beyond the student's head.

    Args:
        documents: the documents; a sample of them is read.
        head_size: width of the student's head.
        key: dotted path of the dataset in the configuration, for messages.

    Raises:
        ConfigError: there are no documents.
        MismatchError: an id is beyond the head; the message has both values.
    """
    if len(documents) == 0:
        raise ConfigError(f"{key}: the dataset has no documents")
    for document in sampled(documents):
        _check_ids_fit(document, head_size, key)
    logger.info("%s: %s", key, number_of(len(documents), "document"))


def _check_ids_fit(document: Document, head_size: int, key: str) -> None:
    try:
        check_ids_fit(document, head_size)
    except MismatchError as error:
        raise MismatchError(f"{key}: {error}") from error

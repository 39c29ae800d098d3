"""The documents of a training run: captured ones as they are stored, text and chat made into token ids once and kept.

Prepared data are a folder of flat arrays that are mapped, not read: opening them takes no time whatever their size, and
no document is touched before it is wanted.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from distillkit import tokenizer as tokenizers
from distillkit.capture.sources import Row, Source, open_hub, open_local
from distillkit.cli.common import progress_bar
from distillkit.data import DistillationDataset, DocumentSource, check_tokenizer, choose_documents, open_dataset
from distillkit.errors import ConfigError, CorruptDataError
from distillkit.packing import pack
from distillkit.shards import Dataset as StoredDataset
from distillkit.shards.files import TEMPORARY_PREFIX, Folder
from distillkit.shards.header import canonical_json
from distillkit.shards.reader import is_captured
from distillkit.shards.table import document_id
from distillkit.text_rows import RowTokenizer, TextOptions, Tokens
from distillkit.types import Document

if TYPE_CHECKING:
    from trl import SFTConfig

    from distillkit.config import DatasetSource, RunConfig
    from distillkit.signals.types import TeacherSignal

__all__ = [
    "Part",
    "PreparedDataset",
    "check_eos_labels",
    "configure_model",
    "configure_tokenizer",
    "document_lengths",
    "is_packed",
    "open_documents",
    "prepare",
    "training_dataset",
]

logger = logging.getLogger(__name__)

Part = Literal["train", "eval"]

VERSION = 1
"""Goes into the key of prepared data: to be raised when the same settings come to mean other tokens."""

_DESCRIPTION = "prepared.json"
_ROWS_AT_A_TIME = 64
_SLOW_SECONDS = 1.0
"""Lengths of stored documents that took longer than this to read are kept."""

# Flat arrays by file name, with their dtype; all documents' values one after the other.
_ARRAYS: dict[str, str] = {
    "offsets": "<i8",  # (D + 1,) where in input_ids and loss_mask a document begins
    "input_ids": "<i4",
    "loss_mask": "|b1",  # absent where all tokens count
    "segment_offsets": "<i8",  # (D + 1,) where in segment_lengths a document begins; absent without packed rows
    "segment_lengths": "<i4",
}


# -- what a configuration asks for -------------------------------------------------------------------------------------


def open_documents(config: RunConfig, part: Part, tokenizer: Any, arguments: SFTConfig) -> DocumentSource | None:
    """Open the documents to train or evaluate on; None if the configuration has none.

    With stored distributions that is a captured or published dataset. With a live teacher it may be one as well (its
    distributions are left aside), or text, which is prepared here. Call it on one process first.

    Args:
        config: the run's.
        part: which of its datasets.
        tokenizer: the student's; see `configure_tokenizer`.
        arguments: the trainer's.

    Raises:
        ConfigError: there is no such data, or a setting does not fit it.
        InputError: rows that are not understood.
        MismatchError: captured data of another tokenizer or codec.
    """
    from distillkit.config import DatasetTeacher

    source = config.dataset.train_dataset if part == "train" else config.dataset.eval_dataset
    if source is None:
        return None
    key = f"dataset.{part}_dataset"
    cache = cache_folder(config)
    documents: DocumentSource
    if config.teacher.kind == "dataset" or _is_captured(source):
        teacher = config.teacher if config.teacher.kind == "dataset" else DatasetTeacher(kind="dataset")
        stored = open_dataset(source, teacher, key)
        check_tokenizer(stored, tokenizer, config.model, key)
        documents = stored
    else:
        documents = prepare(
            _open_rows(source, part, key),
            RowTokenizer(tokenizer, _text_options(arguments)),
            cache,
            key=key,
            samples=_wanted(config, part),
            seed=config.dataset.seed,
            samples_key=f"dataset.{_SAMPLES[part]}",
            processes=arguments.dataset_num_proc or 1,
        )
    if is_packed(config, arguments, part):
        document_lengths(documents, cache)  # kept where reading them takes long
    return documents


def training_dataset(
    config: RunConfig, part: Part, documents: DocumentSource, signal: TeacherSignal, arguments: SFTConfig
) -> DistillationDataset:
    """Make training examples of documents: choose as many as are wanted, and pack them if that is asked for.

    Raises:
        ConfigError: more documents are wanted than there are.
    """
    chosen = None
    if not isinstance(documents, PreparedDataset):  # there, rows were chosen
        chosen = choose_documents(
            len(documents), _wanted(config, part), config.dataset.seed, f"dataset.{_SAMPLES[part]}"
        )
    packing = None
    if is_packed(config, arguments, part):
        lengths = document_lengths(documents, cache_folder(config))
        packing = pack(lengths if chosen is None else lengths[chosen], config.sequence_length, seed=config.dataset.seed)
        logger.info(
            "dataset.%s_dataset: %s documents packed in %s rows of %s tokens, %.1f%% full",
            part,
            f"{len(packing.documents):,}",
            f"{len(packing):,}",
            f"{config.sequence_length:,}",
            100 * packing.fill,
        )
    return DistillationDataset(documents, signal, config.sequence_length, chosen, packing=packing)


_SAMPLES = {"train": "num_samples", "eval": "num_eval_samples"}


def _wanted(config: RunConfig, part: Part) -> int | None:
    wanted: int | None = getattr(config.dataset, _SAMPLES[part])
    return wanted


def is_packed(config: RunConfig, arguments: SFTConfig, part: Part) -> bool:
    """Whether several documents share a row: as `packing` or `functionary_packing` say, and for evaluation
    `eval_packing`. Rows that are packed already stay as they are (`dataset.prepacked`)."""
    if config.dataset.prepacked:
        return False
    if part == "eval" and arguments.eval_packing is not None:
        return bool(arguments.eval_packing)
    return bool(arguments.packing or config.functionary_packing)


def cache_folder(config: RunConfig) -> Path:
    """Return where prepared data are kept: `prepared_dataset_path`, else in the cache of the datasets library."""
    if config.dataset.prepared_dataset_path is not None:
        return Path(config.dataset.prepared_dataset_path).expanduser()
    from datasets.config import HF_DATASETS_CACHE

    return Path(HF_DATASETS_CACHE) / "distillkit"


def _text_options(arguments: SFTConfig) -> TextOptions:
    return TextOptions(
        text_column=arguments.dataset_text_field,
        completion_only=arguments.completion_only_loss,
        assistant_only=arguments.assistant_only_loss,
        tokenised=bool((arguments.dataset_kwargs or {}).get("skip_prepare_dataset")),
    )


def _is_captured(source: DatasetSource) -> bool:
    """Whether a dataset is one of ours, by its manifest."""
    if source.disk_path is not None:
        return Path(source.disk_path).exists() and is_captured(source.disk_path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    assert source.repo_id is not None
    try:
        hf_hub_download(source.repo_id, "manifest.json", repo_type="dataset", revision=source.revision)
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return False  # loading it as text says what is wrong, if something is
    return True


def _open_rows(source: DatasetSource, part: Part, key: str) -> Source:
    """Open rows of text; without a split, training takes the only one or "train"."""
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


# -- the tokenizer -----------------------------------------------------------------------------------------------------


def configure_tokenizer(tokenizer: Any, arguments: SFTConfig) -> None:
    """Give the student's tokenizer the special tokens and the chat template that `training_args` name.

    Raises:
        ConfigError: a token is not in its vocabulary, or there is no such template.
    """
    for name in ("eos_token", "pad_token"):
        token = getattr(arguments, name)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ConfigError(f"training_args.{name}: {token!r} is not in the student's vocabulary")
        setattr(tokenizer, name, token)
    path = arguments.chat_template_path
    if path is None:
        return
    if path.endswith((".jinja", ".j2")):
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"training_args.chat_template_path: {path} can not be read: {error}") from error
        return
    other = tokenizers.load_tokenizer(path)
    if not other.chat_template:
        raise ConfigError(f"training_args.chat_template_path: the tokenizer in {path} has no chat template")
    template = other.get_chat_template()
    ours = tokenizer.get_vocab()
    strange = sorted(token for token in other.added_tokens_encoder if token in template and token not in ours)
    if strange:
        raise ConfigError(
            f"training_args.chat_template_path: the template in {path} writes {', '.join(strange)}, which the "
            "student's vocabulary does not have: add them to the student first, or take another template"
        )
    tokenizer.chat_template = template


def check_eos_labels(config: RunConfig, tokenizer: Any) -> list[int]:
    """Return the ids that become the end of sequence in the labels (`dataset.eos_label_token_ids`).

    Raises:
        ConfigError: one is no token of the student's, or its tokenizer has no end of sequence.
    """
    ids = config.dataset.eos_label_token_ids or []
    size = tokenizers.vocab_size(tokenizer)
    for token in ids:
        if token >= size:
            raise ConfigError(
                f"dataset.eos_label_token_ids: {token:,} is no token of the student's, whose ids end at {size - 1:,}"
            )
    if ids and tokenizer.eos_token_id is None:
        raise ConfigError(
            "dataset.eos_label_token_ids: the student's tokenizer has no end of sequence that they could become; name "
            "one of its tokens as training_args.eos_token"
        )
    return ids


def configure_model(model: Any, tokenizer: Any, arguments: SFTConfig) -> None:
    """Let the student end where its tokenizer says, if `training_args.eos_token` changed that."""
    if arguments.eos_token is None:
        return
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if tokenizer.eos_token_id not in known:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *known]


# -- lengths of stored documents ---------------------------------------------------------------------------------------


def document_lengths(documents: DocumentSource, cache: Path) -> npt.NDArray[np.int64]:
    """Return the tokens of each document (D,).

    Of a stored dataset they are read from the column of token ids (12 million tokens a second on two cores) and kept in
    `cache` if that took long, so that a run that is resumed begins at once.
    """
    if not isinstance(documents, StoredDataset):
        return documents.lengths()
    identity = _stored_identity(documents)
    path = cache / f"lengths-{_hash(identity)}.npy"
    if identity is not None and path.is_file():
        kept = np.load(path)
        if len(kept) == len(documents):
            return np.asarray(kept, dtype=np.int64)
    started = time.perf_counter()
    lengths = documents.lengths()
    if identity is not None and time.perf_counter() - started > _SLOW_SECONDS:
        cache.mkdir(parents=True, exist_ok=True)
        temporary = cache / f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}"
        with temporary.open("wb") as file:
            np.save(file, lengths)
        os.replace(temporary, path)
    return lengths


def _stored_identity(documents: StoredDataset) -> Any:
    """Return what tells a stored dataset from others: its shards' hashes, or its files; None if they are remote."""
    if documents.kind == "distillkit" and all(shard.xxh3_128 for shard in documents.shards):
        return [[shard.file, shard.documents, shard.xxh3_128] for shard in documents.shards]
    paths = [Path(file.path) for file in documents.files]
    if not all(path.is_file() for path in paths):
        return None
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


# -- preparing text ----------------------------------------------------------------------------------------------------


def prepare(
    rows: Source,
    tokenize: RowTokenizer,
    cache: Path,
    *,
    key: str,
    samples: int | None = None,
    seed: int | None = None,
    samples_key: str = "dataset.num_samples",
    processes: int = 1,
) -> PreparedDataset:
    """Make documents of rows, or take those that were made before from the same rows in the same way.

    Rows without content, documents of a single token and those without any token to predict are left out.

    Args:
        rows: where they come from.
        tokenize: makes tokens of them.
        cache: the folder for prepared data; each has a folder of its own there.
        key: dotted path of the dataset in the configuration, for messages.
        samples, seed, samples_key: how many rows to take, and which; see `choose_documents`.
        processes: how many processes work on it.

    Raises:
        ConfigError: no document is left, or a setting does not fit the rows.
        InputError: a row is not understood.
    """
    from filelock import FileLock

    identity = _identity(rows, tokenize, samples, seed)
    folder = cache / f"prepared-{_hash(identity)}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if (folder / _DESCRIPTION).is_file():
            dataset = PreparedDataset(folder)
            logger.info("%s: %s documents, prepared before in %s", key, f"{len(dataset):,}", folder)
            return dataset
        chosen = choose_documents(rows.num_rows, samples, seed, samples_key)
        temporary = cache / f"{TEMPORARY_PREFIX}{folder.name}"
        shutil.rmtree(temporary, ignore_errors=True)  # of a run that was interrupted: the lock is ours
        try:
            with progress_bar(f"preparing {key}") as progress:
                counts = _write(temporary, _chosen(rows, chosen), tokenize, processes, progress, rows.num_rows)
            if not counts["documents"]:
                raise ConfigError(
                    f"{key}: of its {rows.num_rows:,} rows none gives a document ({counts['empty']:,} empty, "
                    f"{counts['short']:,} of one token, {counts['masked']:,} without a token to predict)"
                )
            Folder(temporary).write(_DESCRIPTION, canonical_json({"identity": identity, **counts}).encode())
            os.replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    logger.info(
        "%s: %s documents of %s tokens, prepared in %s (left out: %s empty, %s of one token, %s without a token to "
        "predict)",
        key,
        *(f"{counts[name]:,}" for name in ("documents", "tokens")),
        folder,
        *(f"{counts[name]:,}" for name in ("empty", "short", "masked")),
    )
    return PreparedDataset(folder)


def _identity(rows: Source, tokenize: RowTokenizer, samples: int | None, seed: int | None) -> dict[str, Any]:
    """Return everything that decides the prepared data."""
    tokenizer, options = tokenize.tokenizer, tokenize.options
    backend = getattr(tokenizer, "backend_tokenizer", None)
    pipeline = json.loads(backend.to_str()) if backend is not None else {}
    for changed_by_use in ("truncation", "padding"):
        pipeline.pop(changed_by_use, None)
    return {
        "version": VERSION,
        "rows": rows.identity,
        "sample": None if samples is None else [samples, seed],
        "tokenizer": [tokenizers.fingerprint(tokenizer), type(tokenizer).__name__, tokenizer.eos_token],
        "pipeline": _hash(pipeline),
        "template": tokenize.template or tokenizer.chat_template,
        "options": [options.text_column, options.completion_only, options.assistant_only, options.tokenised],
    }


def _hash(identity: Any) -> str:
    return str(xxhash.xxh3_128_hexdigest(canonical_json(identity).encode()))


def _chosen(rows: Source, chosen: npt.NDArray[np.int64] | None) -> Iterator[Row]:
    if chosen is None:
        return rows.rows()
    wanted = set(chosen.tolist())
    return (row for index, row in enumerate(rows.rows()) if index in wanted)


def _write(
    folder: Path, rows: Iterator[Row], tokenize: RowTokenizer, processes: int, progress: Any, total: int
) -> dict[str, int]:
    """Write the documents of rows into a folder, and count them and what was left out."""
    folder.mkdir(parents=True)
    counts = dict.fromkeys(("rows", "documents", "tokens", "empty", "short", "masked"), 0)
    with _Writer(folder) as writer:
        for found in _tokenized(rows, tokenize, processes):
            for tokens in found:
                left_out = _left_out(tokens)
                if left_out is not None:
                    counts[left_out] += 1
                    continue
                assert tokens is not None
                writer.add(tokens)
                counts["documents"] += 1
                counts["tokens"] += len(tokens.input_ids)
            counts["rows"] += len(found)
            progress(counts["rows"], total)
    return counts


def _left_out(tokens: Tokens | None) -> str | None:
    """Say why a row gives no document, if it gives none."""
    if tokens is None:
        return "empty"
    if len(tokens.input_ids) < 2:
        return "short"
    if tokens.loss_mask is not None and not tokens.loss_mask[1:].any():
        return "masked"
    return None


def _tokenized(rows: Iterator[Row], tokenize: RowTokenizer, processes: int) -> Iterator[list[Tokens | None]]:
    """Yield the tokens of rows in their order, some rows at a time."""
    batches = iter(lambda: list(itertools.islice(rows, _ROWS_AT_A_TIME)), [])
    if processes == 1:
        yield from map(tokenize, batches)
        return
    # Forked processes have the tokenizer already; each then tokenises on one thread.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(processes, context, _start_worker, (tokenize,)) as pool:
        pending: deque[Future[list[Tokens | None]]] = deque()
        for batch in batches:
            pending.append(pool.submit(_work, batch))
            if len(pending) > 4 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


_worker: RowTokenizer | None = None


def _start_worker(tokenize: RowTokenizer) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = tokenize


def _work(rows: Sequence[Row]) -> list[Tokens | None]:
    assert _worker is not None
    return _worker(rows)


class _Writer:
    """Appends documents to the arrays of a folder; masks and segments only if some document has them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = {name: (folder / name).open("wb") for name in _ARRAYS}
        self._ends = {"offsets": 0, "segment_offsets": 0}
        self._optional: dict[str, bool] = {"loss_mask": False, "segment_lengths": False}

    def __enter__(self) -> _Writer:
        for name in self._ends:
            self._append(name, [0])
        return self

    def add(self, tokens: Tokens) -> None:
        length = len(tokens.input_ids)
        mask, segments = tokens.loss_mask, tokens.segment_lengths
        self._optional["loss_mask"] |= mask is not None
        self._optional["segment_lengths"] |= segments is not None
        self._append("input_ids", tokens.input_ids)
        self._append("loss_mask", np.ones(length, bool) if mask is None else mask)
        self._append("segment_lengths", [length] if segments is None else segments)
        for name, count in (("offsets", length), ("segment_offsets", 1 if segments is None else len(segments))):
            self._ends[name] += count
            self._append(name, [self._ends[name]])

    def _append(self, name: str, values: Any) -> None:
        self._files[name].write(np.asarray(values, dtype=_ARRAYS[name]).tobytes())

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        for file in self._files.values():
            if kind is None:
                file.flush()
                os.fsync(file.fileno())
            file.close()
        if not self._optional["loss_mask"]:
            (self._folder / "loss_mask").unlink()
        if not self._optional["segment_lengths"]:
            (self._folder / "segment_lengths").unlink()
            (self._folder / "segment_offsets").unlink()


class PreparedDataset:
    """Documents of token ids, without a teacher's distributions; map-style.

    Safe in forked and spawned workers: they map the arrays again.

    Args:
        folder: made by `prepare`.

    Raises:
        CorruptDataError: its files do not fit each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.description: Mapping[str, Any] = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        self._map()
        documents, tokens = self.description["documents"], self.description["tokens"]
        offsets = self._arrays["offsets"]
        if len(offsets) != documents + 1 or offsets[-1] != tokens or len(self._arrays["input_ids"]) != tokens:
            raise CorruptDataError(
                f"{folder}: {documents:,} documents of {tokens:,} tokens were written, but the files hold "
                f"{len(offsets) - 1:,} and {len(self._arrays['input_ids']):,}; remove the folder to prepare them again"
            )

    def _map(self) -> None:
        self._arrays: dict[str, npt.NDArray[Any]] = {
            name: np.memmap(self.folder / name, dtype=dtype, mode="r")
            for name, dtype in _ARRAYS.items()
            if (self.folder / name).exists()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "description": self.description}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return int(self.description["documents"])

    def lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each document (D,)."""
        return np.diff(self._arrays["offsets"]).astype(np.int64)

    def __getitem__(self, index: int) -> Document:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        ids = np.array(self._part("input_ids", "offsets", index), dtype=np.int32)
        mask = np.array(self._part("loss_mask", "offsets", index), bool) if "loss_mask" in self._arrays else None
        lengths = None
        if "segment_lengths" in self._arrays:
            lengths = np.array(self._part("segment_lengths", "segment_offsets", index), dtype=np.int32)
            lengths = lengths if len(lengths) > 1 else None
        return Document(document_id(ids, mask, lengths), ids, b"", max(len(ids) - 1, 0), mask, lengths)

    def _part(self, name: str, bounds: str, index: int) -> npt.NDArray[Any]:
        offsets = self._arrays[bounds]
        return self._arrays[name][offsets[index] : offsets[index + 1]]

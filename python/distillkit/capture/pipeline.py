"""The capture itself: documents → teacher → shards, with progress, and on from where one was interrupted.

The bytes of a shard depend on its own documents and the settings alone: documents are scored in windows that never
reach over a shard's border, so a run that starts again after the last whole shard writes what one run would have.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow.parquet
from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distillkit.capture.engines import Refused, Teacher, Wanted, make_teacher
from distillkit.capture.engines.hf import HFTeacher, load_config, resolve_device, resolve_dtype
from distillkit.capture.settings import CaptureReport, CaptureSettings
from distillkit.capture.sources import Source, open_source
from distillkit.capture.text import DocumentReader, TokenDocument
from distillkit.codec import Codec
from distillkit.errors import CaptureError, ConfigError, MismatchError
from distillkit.memory import peak_memory
from distillkit.shards import Header, Manifest, ShardInfo, ShardWriter, read_manifest
from distillkit.shards.table import document_id
from distillkit.tokenizer import fingerprint, load_tokenizer, vocab_size
from distillkit.types import SparseLogprobs

__all__ = ["run_capture"]

logger = logging.getLogger(__name__)

# Documents of like length are batched within a window of this many batches: more would hardly save padding, and a
# window's rows wait in memory until they are written in the source's order.
_WINDOW_BATCHES = 8


def run_capture(settings: CaptureSettings, *, progress: bool = True) -> CaptureReport:
    """Run a teacher over a dataset and write its distributions; see `distillkit.capture.capture`."""
    inputs = _Inputs.load(settings)
    folder = Path(settings.output)
    finished = read_manifest(folder)
    if finished is not None:
        inputs.check_finished(finished, folder)
        logger.info("%s is complete already, with these settings: nothing to do", folder)
        return _report(folder, finished, finished.header.make_codec(), _Run(resumed=finished.shards))

    teacher = make_teacher(settings)
    header = inputs.header(teacher.head_size, teacher.identity)
    codec = header.make_codec()
    for warning in codec.warnings:
        logger.warning("codec: %s", warning)
    if isinstance(teacher, HFTeacher):
        _log_memory(teacher, codec, settings)
    reader = DocumentReader(
        inputs.source,
        inputs.tokenizer,
        max_tokens=settings.max_seq_len,
        id_limit=teacher.head_size,
        chat=settings.apply_chat_template,
        samples=settings.samples,
        seed=settings.seed,
    )
    with _saying_how_to_go_on(folder):
        writer = ShardWriter(folder, header, shard_tokens=settings.shard_tokens, resume=True)
    with writer, _ProgressBar(shown=progress) as bar:
        documents = iter(reader)
        _skip_stored(documents, folder, writer.resumed)
        run = _Run(resumed=writer.resumed, bar=bar)
        for window in _windows(documents, settings.shard_tokens, _WINDOW_BATCHES * settings.forward_tokens):
            for document, rows in zip(window, run.score(teacher, window, codec.k), strict=True):
                writer.write(document.input_ids, rows)
        if not run.new_tokens and not writer.resumed:
            raise CaptureError(
                f"{settings.dataset}: no document of at least 2 tokens in {reader.rows} rows ({reader.empty} empty, "
                f"{reader.short} documents of one token)"
            )
    return _report(folder, writer.close(), codec, run, reader)


@dataclass(frozen=True)
class _Inputs:
    """What a capture starts from, loaded without the teacher's weights."""

    settings: CaptureSettings
    tokenizer: Any
    source: Source
    device: str
    dtype: str

    @classmethod
    def load(cls, settings: CaptureSettings) -> _Inputs:
        trust = settings.trust_remote_code
        config = load_config(settings.config_source, trust_remote_code=trust)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and settings.max_seq_len > longest:
            raise ConfigError(
                f"max_seq_len: {settings.max_seq_len} tokens are more than the {longest} positions that "
                f"{settings.model} was made for (max_position_embeddings): give at most those"
            )
        source = open_source(settings.dataset, configuration=settings.dataset_configuration, split=settings.split)
        device = "server" if settings.engine == "openai" else resolve_device(settings.device)
        return cls(
            settings,
            load_tokenizer(settings.tokenizer or settings.model, trust_remote_code=trust),
            source,
            device,
            resolve_dtype(settings.dtype, config, device),
        )

    def header(self, head_size: int, teacher: dict[str, Any]) -> Header:
        """Make the header of the shards.

        Raises:
            MismatchError: the tokenizer knows ids that the teacher has no logits for; or see `CaptureSettings.codec`.
        """
        known = vocab_size(self.tokenizer)
        name = self.settings.tokenizer or self.settings.model
        if known > head_size:
            raise MismatchError(
                f"the tokenizer {name} knows {known} ids, the teacher's logits are only {head_size} wide: they do not "
                "belong together"
            )
        return Header(
            codec=self.settings.codec(head_size).to_dict(),
            vocab_size=known,
            head_size=head_size,
            tokenizer={"name": _public_name(name), "fingerprint": fingerprint(self.tokenizer)},
            teacher=teacher,
            capture={
                **self.settings.deciding(),
                "dataset": self.source.description,
                "device": self.device.partition(":")[0],
            },
        )

    def check_finished(self, finished: Manifest, folder: Path) -> None:
        """Refuse a finished dataset that these inputs would not have made; the teacher's weights are not looked at.

        Raises:
            MismatchError: names the setting and both values.
        """
        stored = finished.header.teacher or {}
        # A server tells no dtype, and may have another name for the model.
        known = {} if self.settings.engine == "openai" else {"name": _public_name(self.settings.model)}
        if "dtype" in stored:
            known["dtype"] = self.dtype
        teacher = {**stored, **known}
        with _saying_how_to_go_on(folder):
            self.header(finished.header.head_size, teacher).check_same(finished.header, where=str(folder))


@contextmanager
def _saying_how_to_go_on(folder: Path) -> Iterator[None]:
    try:
        yield
    except MismatchError as error:
        raise MismatchError(
            f"{error}. {folder} holds a capture with other settings: repeat those to go on with it, or give another "
            "output folder"
        ) from error


def _public_name(path: str) -> str:
    """Return a hub id as it is, and of a local folder its name only: headers travel with published datasets."""
    return Path(path).resolve().name if Path(path).exists() else path


class _Run:
    """One run's scoring: keeps the time and the count, and moves the bar."""

    def __init__(self, *, resumed: tuple[ShardInfo, ...], bar: _ProgressBar | None = None) -> None:
        self.resumed = resumed
        self.new_tokens = 0
        self._bar = bar
        self._started = time.perf_counter()
        self._progress: float | None = None

    @property
    def seconds(self) -> float:
        """Time since the run began to score."""
        return time.perf_counter() - self._started

    def score(self, teacher: Teacher, window: list[TokenDocument], k: int) -> list[SparseLogprobs]:
        """Score a window of documents; their rows in the documents' order."""
        scored: dict[int, SparseLogprobs] = {}
        window_tokens = sum(len(document.input_ids) for document in window)
        # Where in the source the window begins is where the one before it ended; unknown for the first of a run.
        begin = window[0].progress if self._progress is None else self._progress
        done = 0
        for result in teacher.score(window, Wanted(k)):
            if isinstance(result, Refused):
                raise CaptureError(result.reason)
            scored[result.index] = result.rows
            done += len(window[result.index].input_ids)
            if self._bar is not None:
                fraction = begin + (window[-1].progress - begin) * done / window_tokens
                self._bar.update(fraction, self.new_tokens + done, self.seconds)
        self.new_tokens += window_tokens
        self._progress = window[-1].progress
        return [scored[index] for index in range(len(window))]


def _windows(
    documents: Iterable[TokenDocument], shard_tokens: int, window_tokens: int
) -> Iterator[list[TokenDocument]]:
    """Group consecutive documents: a window ends when it has `window_tokens`, and where the writer ends a shard."""
    window: list[TokenDocument] = []
    in_window = in_shard = 0
    for document in documents:
        window.append(document)
        in_window += len(document.input_ids)
        in_shard += len(document.input_ids)
        if in_shard >= shard_tokens or in_window >= window_tokens:
            yield window
            window, in_window = [], 0
        if in_shard >= shard_tokens:
            in_shard = 0
    if window:
        yield window


def _skip_stored(documents: Iterator[TokenDocument], folder: Path, shards: tuple[ShardInfo, ...]) -> None:
    """Advance `documents` past those that whole shards hold, checking that they are the same.

    Raises:
        MismatchError: the dataset no longer gives the documents that were captured.
    """
    for shard in shards:
        stored = pyarrow.parquet.read_table(folder / shard.file, columns=["doc_id"]).column("doc_id").to_pylist()
        for index, doc_id in enumerate(stored):
            document = next(documents, None)
            if document is None or document_id(document.input_ids) != doc_id:
                found = "ends before it" if document is None else f"has another at {document.source}"
                raise MismatchError(
                    f"{folder / shard.file}, document {index}: the dataset {found}; it has changed since this capture "
                    "began. Give another output folder"
                )
    if shards:
        logger.info(
            "%s has %d whole shards with %s documents: going on after them",
            folder,
            len(shards),
            f"{sum(shard.documents for shard in shards):,}",
        )


class _ProgressBar:
    """Share of the dataset, tokens a second and time left, on stderr."""

    def __init__(self, *, shown: bool) -> None:
        self._bar = Progress(
            TextColumn("capturing"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._task = self._bar.add_task("", total=1.0, rate="")

    def __enter__(self) -> _ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, fraction: float, tokens: int, seconds: float) -> None:
        """Show that `fraction` of the dataset is done, of it `tokens` in this run."""
        rate = f"{tokens:,} tokens, {tokens / max(seconds, 1e-9):,.0f}/s"
        self._bar.update(self._task, completed=fraction, rate=rate)


def _log_memory(teacher: HFTeacher, codec: Codec, settings: CaptureSettings) -> None:
    """Say what the run will take, with the arithmetic."""
    width, identity = teacher.head_size, teacher.identity
    window = _WINDOW_BATCHES * settings.forward_tokens
    logger.info(
        "teacher %s in %s: weights %s; logits %d positions × %s × 4 B = %s at a time; rows waiting to be written "
        "≤ %s tokens × k %d × 12 B = %s",
        identity["name"],
        identity["dtype"],
        filesize.decimal(teacher.parameter_bytes),
        settings.head_rows,
        f"{width:,}",
        filesize.decimal(settings.head_rows * width * 4),
        f"{window:,}",
        codec.k,
        filesize.decimal(window * codec.k * 12),
    )
    logger.info(
        "stored: %d bytes a token (values %d, ids %d), against %s in bfloat16 logits",
        codec.bytes_per_token,
        codec.value_bytes,
        codec.id_bytes,
        filesize.decimal(2 * width),
    )


def _report(
    folder: Path, manifest: Manifest, codec: Codec, run: _Run, reader: DocumentReader | None = None
) -> CaptureReport:
    """Sum up a finished dataset; `reader` is None where nothing was read because it was finished before."""
    shards, fidelity, memory = manifest.shards, manifest.header.fidelity or {}, peak_memory()
    seconds = run.seconds if reader is not None else 0.0
    return CaptureReport(
        output=str(folder),
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        rows=sum(shard.rows for shard in shards),
        shards=len(shards),
        bytes_per_token=codec.bytes_per_token,
        disk_bytes=sum(shard.bytes for shard in shards),
        kl_mean=fidelity.get("kl_mean"),
        kl_p99=fidelity.get("kl_p99"),
        resumed_documents=sum(shard.documents for shard in run.resumed),
        already_complete=reader is None,
        empty_rows=None if reader is None else reader.empty,
        short_documents=None if reader is None else reader.short,
        seconds=seconds,
        new_tokens=run.new_tokens,
        tokens_per_second=run.new_tokens / seconds if seconds else 0.0,
        **memory,
    )

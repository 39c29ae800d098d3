"""Retokenises a captured dataset: shard by shard, on several processes, resumable."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import xxhash

from distillkit import __version__
from distillkit.codec import Codec, CodecConfig, CompactConfig, Prior, SampledConfig
from distillkit.codec.fidelity import FidelityStats
from distillkit.configuration.places import folder_name
from distillkit.console import human_bytes, number_of
from distillkit.errors import ConfigError, InputError, MismatchError
from distillkit.retokenize.chats import ChatReader
from distillkit.retokenize.figures import Figures
from distillkit.retokenize.rows import Rewritten, rewrite
from distillkit.retokenize.sources import head_size, teacher_tokenizer
from distillkit.retokenize.token_map import TokenMap
from distillkit.retokenize.vocabulary import read_vocabulary
from distillkit.shards import Dataset, Header, Manifest, ShardInfo, load_prior, read_manifest
from distillkit.shards.convert import PRIOR_ROWS
from distillkit.shards.header import MEASURED, alignment
from distillkit.shards.lock import FolderLock
from distillkit.shards.manifest import is_shard_name, merged_fidelity, shard_name
from distillkit.shards.plausibility import check_plausible, sampled
from distillkit.shards.prior import PRIOR, keep_prior
from distillkit.shards.storage import Folder
from distillkit.shards.writer import NewShard, encode_rows, is_dataset_file, make_document, shard_info
from distillkit.text.tokenizer import fingerprint, load_tokenizer, vocab_size
from distillkit.types import Document, Facts, Shown, SparseLogprobs

__all__ = ["Retokenization", "Settings", "retokenize"]

logger = logging.getLogger(__name__)

_TOGETHER = 32
"""Documents that are tokenised at a time."""


@dataclass(frozen=True)
class Settings:
    """What is retokenised, to what.

    Attributes:
        source: path or URL of the dataset.
        folder: where it is written.
        student: the student's model or tokenizer: a folder or hub id.
        tokenizer: the teacher's tokenizer; None: the one that the dataset names.
        codec: how rows are stored; None: as in the source, over the student's ids.
        config, split: of a published dataset; see `Dataset.open`.
        prior: a prior of the compact format for the student's ids; None: one is learned.
        prior_rows: from how many rows.
        shard_tokens: the source's tokens per shard.
        standalone: whether each shard contains the prior, too.
        trust_remote_code: whether tokenizers may run code of their own.
    """

    source: str
    folder: str
    student: str
    tokenizer: str | None = None
    codec: CodecConfig | None = None
    config: str | None = None
    split: str | None = None
    prior: str | None = None
    prior_rows: int = PRIOR_ROWS
    shard_tokens: int = 262_144
    standalone: bool = False
    trust_remote_code: bool = False


@dataclass(frozen=True, repr=False)
class Retokenization(Shown):
    """What was written.

    Attributes:
        output: the output folder.
        manifest: of the dataset.
        figures: what became of its positions and their probability; None if both tokenizers are the same.
        resumed: how many of its shards an interrupted run had written.
    """

    output: str
    manifest: Manifest
    figures: Figures | None
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as a JSON-serialisable mapping."""
        header = self.manifest.header
        return {
            "path": self.output,
            **{name: self._total(name) for name in ("documents", "tokens", "bytes")},
            "shards": len(self.manifest.shards),
            "resumed_shards": self.resumed,
            "codec": header.codec,
            "tokenizer": header.tokenizer,
            "retokenized": header.capture["retokenized"],
            "measured": None if self.figures is None else self.figures.to_dict(),
            "fidelity": header.fidelity,
        }

    def facts(self) -> Facts:
        """What is shown."""
        if self.figures is None:
            rows = [
                ("documents", f"{self._total('documents'):,}, copied byte for byte: the tokenizers are the same"),
                ("tokens", f"{self._total('tokens'):,}"),
            ]
        else:
            rows = list(self.figures.facts()[1])
        shards, size = number_of(len(self.manifest.shards), "shard"), self._total("bytes")
        resumed = f" ({self.resumed:,} from an earlier run)" if self.resumed else ""
        each = size / max(self._total("rows"), 1)
        rows.append(("size", f"{human_bytes(size)} in {shards}{resumed}, {each:,.1f} bytes per distribution"))
        if self.manifest.header.fidelity is not None:
            stats = FidelityStats.from_dict(self.manifest.header.fidelity)
            rows.append(("KL(rows ‖ stored)", f"{stats.kl_mean:.2e} on average, {stats.kl_p99:.2e} at p99"))
        return f"retokenised: {self.output}", rows

    def _total(self, name: str) -> int:
        return sum(getattr(shard, name) for shard in self.manifest.shards)


def retokenize(
    settings: Settings,
    *,
    processes: int = 1,
    learning: Callable[[int, int], None] = lambda done, total: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Retokenization:
    """Writes a dataset of a teacher's rows as one in the tokens of a student with another tokenizer.

    docs/retokenize.md says what the rows are. Documents of the same tokenizer are copied, byte for byte. Killed at any
    moment, it resumes after the last complete shard; shards are the same for any number of processes.

    Args:
        settings: see there.
        processes: how many work at the same time, each on a shard.
        learning: called with the rows read and their total, while a prior is learned.
        progress: called with the source's tokens done and their total.

    Raises:
        ConfigError: a tokenizer cannot be loaded, or loses some of the text; names the part that does.
        MismatchError: the tokenizer is not that of the dataset, or the folder contains another dataset.
        InputError: a document cannot be written in the student's tokens, rows cannot be stored in the codec, or the
            folder contains a finished dataset.
        CorruptDataError: a document or a finished shard is damaged.
    """
    work = _Work(settings)
    source, folder = work.source, Folder(settings.folder)
    check_plausible(sampled(source), source.codec, source.path)
    if source.header.temperature != 1.0:
        raise MismatchError(
            f"{source.path}: its logits were divided by the temperature {source.header.temperature:g}, so its rows do "
            "not multiply to the probability of a text: capture again at 1"
        )
    folder.make()
    lock = FolderLock(folder)
    try:
        if read_manifest(folder.url) is not None:
            raise InputError(f"{folder}: contains a finished dataset; choose another folder or remove it")
        folder.remove_leftovers(is_dataset_file)
        codec = work.target(learning)
        header = work.header(codec)
        keep_prior(folder, header, codec.prior)
        plan = _plan(source, settings.shard_tokens)
        done = _finished(folder, header, plan)
        resumed = len(done)
        _write_missing(work, header, [part for part in plan if part.number not in done], done, processes, progress)
        written = [done[part.number] for part in plan]
        manifest = Manifest(_whole(header, [own for _, own in written]), tuple(info for info, _ in written))
        manifest.write(folder)
    finally:
        lock.release()
    return Retokenization(settings.folder, manifest, Figures.from_header(manifest.header), resumed)


def _whole(header: Header, headers: Sequence[Header]) -> Header:
    """The header of the manifest: with what was measured over all shards."""
    header = replace(header, fidelity=merged_fidelity(list(headers)))
    measured = [figures for figures in map(Figures.from_header, headers) if figures is not None]
    if not measured:
        return header
    total = Figures()
    for figures in measured:
        total.merge(figures)
    return replace(header, capture={**header.capture, MEASURED: total.to_dict()})


@dataclass(frozen=True)
class Part:
    """The documents of a shard: from `start` on, before `stop`."""

    number: int
    start: int
    stop: int
    tokens: int


def _plan(source: Dataset, shard_tokens: int) -> list[Part]:
    """Which documents of the source go into which shard. Depends on nothing but their lengths."""
    parts: list[Part] = []
    start, tokens = 0, 0
    lengths = source.lengths().tolist()
    for index, length in enumerate(lengths):
        tokens += length
        if tokens >= shard_tokens or index == len(lengths) - 1:
            parts.append(Part(len(parts), start, index + 1, tokens))
            start, tokens = index + 1, 0
    if not parts:
        raise InputError(f"{source.path}: has no documents")
    return parts


def _finished(folder: Folder, header: Header, plan: Sequence[Part]) -> dict[int, tuple[ShardInfo, Header]]:
    """The shards that an interrupted run has finished, by number. Reads and checks all of them."""
    known = {shard_name(part.number): part for part in plan}
    found = {}
    for name in filter(is_shard_name, folder.names()):
        part = known.get(name)
        info, own = shard_info(folder, name)
        header.check_same(own, where=folder.of(name))
        measured = Figures.from_header(own) or Figures()
        if part is None or info.documents + measured.left_out != part.stop - part.start:
            raise MismatchError(
                f"{folder.of(name)}: {info.documents} documents, but {header.capture['retokenized']['source']['name']} "
                "is divided otherwise: the folder contains an unfinished dataset of other content; choose another "
                "folder or remove it"
            )
        found[part.number] = (info, own)
    return found


def _write_missing(
    work: _Work,
    header: Header,
    parts: Sequence[Part],
    done: dict[int, tuple[ShardInfo, Header]],
    processes: int,
    progress: Callable[[int, int], None],
) -> None:
    """Writes shards, and adds them to those that are done."""
    total = work.source.num_tokens
    before = total - sum(part.tokens for part in parts)
    progress(before, total)
    if processes <= 1 or len(parts) <= 1:
        for part in parts:
            done[part.number] = work.write(header, part, partial(_further, progress, before, total))
            before += part.tokens
        return
    # A forked process would inherit the locks of the libraries' threads, held by nobody.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(parts)), context, _start, (work.settings, header)) as pool:
        futures = {pool.submit(_write_in_worker, part): part for part in parts}
        try:
            for future in as_completed(futures):
                done[futures[future].number] = future.result()
                before += futures[future].tokens
                progress(before, total)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _further(progress: Callable[[int, int], None], before: int, total: int, tokens: int) -> None:
    progress(before + tokens, total)


_worker: list[tuple[_Work, Header]] = []
"""What a process of the pool works with."""


def _start(settings: Settings, header: Header) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.append((_Work(settings), header))


def _write_in_worker(part: Part) -> tuple[ShardInfo, Header]:
    work, header = _worker[0]
    return work.write(header, part, lambda tokens: None)


class _Work:
    """What a process needs to write shards.

    Args:
        settings: see there.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.source = Dataset.open(settings.source, config=settings.config, split=settings.split)
        trust = settings.trust_remote_code
        teacher = teacher_tokenizer(self.source, settings.tokenizer, trust_remote_code=trust)
        student = load_tokenizer(settings.student, trust_remote_code=trust)
        self._teacher, self._student = teacher, student
        self.fingerprints = fingerprint(teacher), fingerprint(student)
        self._map: TokenMap | None = None
        self._chats: ChatReader | None = None
        if isinstance(self.source.codec.config, SampledConfig) and not self.same:
            raise InputError(
                f"{settings.source}: its rows are draws from the teacher's distributions (format sampled), which do "
                "not say how probable the text's own tokens are: retokenise a capture in another format"
            )
        if self.same and settings.codec is not None:
            raise InputError(
                f"{settings.source}: its tokenizer is the student's own, so its documents are copied as they are; to "
                "change the codec, use distillkit-codec convert"
            )

    @property
    def same(self) -> bool:
        """Whether both tokenizers give every token the same id."""
        return self.fingerprints[0] == self.fingerprints[1]

    @property
    def token_map(self) -> TokenMap:
        """The map between the vocabularies; building it takes seconds."""
        if self._map is None:
            names = (self.settings.tokenizer or "of the dataset", self.settings.student)
            teacher, student = map(read_vocabulary, (self._teacher, self._student), names)
            self._map = TokenMap(teacher, student)
        return self._map

    def target(self, progress: Callable[[int, int], None]) -> Codec:
        """The codec to write; in the compact format with the prior that is given, left by an interrupted run, or
        learned."""
        own = self.source.codec
        if self.same:
            return own
        width = head_size(self.settings.student, vocab_size(self._student))
        config = self.settings.codec or _over(own.config, width)
        if isinstance(config, SampledConfig):
            raise ConfigError(
                "the rows cannot be stored as draws (format sampled), as they are no longer the teacher's whole "
                "distributions: choose another codec (--preset)"
            )
        if config.k > width:
            raise ConfigError(
                f"{self.source.path}: its rows have {config.k} ids, but the student only {width}: choose a codec with "
                "fewer (--preset)"
            )
        if not isinstance(config, CompactConfig):
            if self.settings.prior is not None:
                raise ConfigError(
                    f"prior: only the compact format has one, but the rows are to be stored as {config.format}: choose "
                    "a compact preset, or leave it out"
                )
            return Codec(config)
        wanted, place = config.without_prior(), Folder(self.settings.folder)
        given = None if self.settings.prior is None else load_prior(self.settings.prior)
        if given is None and place.size(PRIOR) is not None:
            given = load_prior(place.of(PRIOR))
        if given is None or given.config != wanted:
            given = self._learned(wanted, given, progress)
        return Codec(wanted, prior=given)

    def _learned(self, config: CompactConfig, base: Prior | None, progress: Callable[[int, int], None]) -> Prior:
        """A prior learned from the rows of documents evenly spread over the source."""
        source, codec = self.source, Codec(config)
        rows = min(self.settings.prior_rows, source.num_rows)
        count = max(1, round(len(source) * rows / max(source.num_rows, 1)))
        parts: list[SparseLogprobs] = []
        done = 0
        for index in np.unique(np.linspace(0, len(source) - 1, count).astype(int)).tolist():
            parts += [each.rows for each in self._rewritten([source[index]], codec, Figures())]
            done += source[index].num_rows
            progress(min(done, rows), rows)
            if done >= rows:
                break
        ids, logprobs = (np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "logprobs"))
        logger.info("%s: learning a prior from %s rows", source.path, f"{len(ids):,}")
        learned_from = SparseLogprobs(ids, logprobs)
        return Prior.learn(config, learned_from, base=base, source=f"the prior learned from {source.path}")

    def _rewritten(self, documents: Sequence[Document], codec: Codec, figures: Figures) -> list[Rewritten]:
        if self._chats is None:
            self._chats = ChatReader(self.source, self.token_map)
        return rewrite(documents, self.source, self._chats, codec, figures)

    def header(self, codec: Codec) -> Header:
        """The header of all shards, without what is measured."""
        source, settings = self.source, self.settings
        own = {"name": folder_name(settings.student), "fingerprint": self.fingerprints[1]}
        known = {"name": folder_name(settings.tokenizer)} if settings.tokenizer else dict(source.header.tokenizer or {})
        about = {
            "source": {"name": folder_name(source.path), "content": _content(source)},
            "tokenizer": {**known, "fingerprint": self.fingerprints[0]},
            "shard_tokens": settings.shard_tokens,
        }
        header = replace(source.header, fidelity=None, distillkit_version=__version__)
        capture = {key: value for key, value in source.header.capture.items() if key != MEASURED}
        if not self.same:
            about |= {"map": self.token_map.hash, "source_codec": source.codec.to_dict()}
            if "converted" in capture:
                # Of the source: fidelity is that of these rows.
                about["converted"] = capture.pop("converted")
            size = vocab_size(self._student)
            header = replace(
                header,
                codec=codec.to_dict(),
                vocab_size=size,
                head_size=max(codec.vocab_size, size),
                alignment=alignment("L-1"),
            )
        capture |= {"retokenized": about, **({"standalone": True} if settings.standalone else {})}
        return replace(header, tokenizer=own, capture=capture)

    def write(self, header: Header, part: Part, progress: Callable[[int], None]) -> tuple[ShardInfo, Header]:
        """Writes a shard. `progress` is called with the source's tokens done."""
        folder = Folder(self.settings.folder)
        codec = header.make_codec(keep_prior(folder, header, None))
        embedded = codec.prior if self.settings.standalone else None
        shard = NewShard(folder, shard_name(part.number), self.source.kept_schema, prior=embedded)
        figures, done = Figures(), 0
        try:
            for start in range(part.start, part.stop, _TOGETHER):
                documents = [self.source[index] for index in range(start, min(start + _TOGETHER, part.stop))]
                self._add(shard, documents, header, codec, figures)
                done += sum(len(document.input_ids) for document in documents)
                progress(done)
            own = header if self.same else replace(header, capture={**header.capture, MEASURED: figures.to_dict()})
            own = replace(own, fidelity=shard.fidelity())
            return shard.finish(own), own
        except BaseException:
            shard.abort()
            raise

    def _add(
        self, shard: NewShard, documents: Sequence[Document], header: Header, codec: Codec, figures: Figures
    ) -> None:
        if self.same:
            for document in documents:
                shard.add(_copied(document, header, codec), None, document.columns)
            return
        for each in self._rewritten(documents, codec, figures):
            data, _, stats = encode_rows(codec, each.rows)
            made = make_document(
                each.input_ids,
                data,
                header,
                codec,
                loss_mask=each.loss_mask,
                segment_lengths=each.segment_lengths,
                label_logprobs=each.label_logprobs,
            )
            shard.add(made, stats, each.columns)


def _copied(document: Document, header: Header, codec: Codec) -> Document:
    return make_document(
        document.input_ids,
        bytes(document.teacher),
        header,
        codec,
        loss_mask=document.loss_mask,
        segment_lengths=document.segment_lengths,
        label_logprobs=document.label_logprobs,
    )


def _over(config: CodecConfig, width: int) -> CodecConfig:
    """A configuration for another number of ids."""
    if isinstance(config, CompactConfig):
        return config.without_prior().model_copy(update={"vocab_size": width})
    name = "d" if "d" in type(config).model_fields else "vocab_size"
    return config.model_copy(update={name: width})


def _content(source: Dataset) -> str:
    """A hash of what the source consists of."""
    digest = xxhash.xxh3_128()
    for shard in source.shards:
        digest.update(repr((shard.documents, shard.tokens, shard.bytes, shard.xxh3_128)).encode())
    return f"xxh3-128:{digest.hexdigest()}"

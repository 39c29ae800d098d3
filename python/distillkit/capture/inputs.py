"""What a capture needs before the teacher's weights are loaded: settings, tokenizer, head size, plan, header."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from distillkit.capture.kept_rows import BYTES_A_VALUE
from distillkit.capture.result import counted
from distillkit.capture.settings import CaptureSettings
from distillkit.capture.shard_plan import PRIOR_RECEIPT, ShardPlan, ShardReceipt, make_plan, read_plan
from distillkit.capture.teachers.base import RowRequest, Teacher
from distillkit.capture.teachers.hf import load_config, resolve_device, resolve_dtype
from distillkit.capture.teachers.make import make_teacher
from distillkit.codec import Codec, LearnedConfig, Prior, SampledConfig
from distillkit.configuration.places import folder_name
from distillkit.configuration.urls import locate, without_trailing_slash
from distillkit.console import human_bytes, number_of
from distillkit.errors import CaptureError, ConfigError, InputError, MismatchError
from distillkit.shards import Header, Manifest, load_prior, read_manifest
from distillkit.shards.header import DRAWN, alignment
from distillkit.shards.storage import Folder
from distillkit.text.documents import DocumentReader
from distillkit.text.sources import Source, open_source
from distillkit.text.tokenizer import fingerprint, load_tokenizer, vocab_size

__all__ = [
    "CaptureInputs",
    "check_disk_space",
    "document_reader",
    "explaining_mismatch",
    "sample_bytes",
    "sampled_tokens",
    "stored_bytes_per_token",
]

logger = logging.getLogger(__name__)

_SAMPLE_K = 128


@dataclass(frozen=True)
class CaptureInputs:
    """What a capture needs before the teacher's weights are loaded.

    Attributes:
        settings: the capture's settings.
        tokenizer: the tokenizer whose ids are stored.
        head_size: width of the teacher's logits.
        device, dtype: what the teacher runs on and in.
        prior: the given prior of the codec; None if it is learned, or the built-in one.
    """

    settings: CaptureSettings
    tokenizer: Any
    head_size: int
    device: str
    dtype: str
    prior: Prior | None = None

    @classmethod
    def load(cls, settings: CaptureSettings) -> CaptureInputs:
        """Load the teacher's config, the tokenizer and, if one is given, the prior.

        Raises:
            ConfigError: one of them cannot be loaded, or the settings do not fit the teacher.
            MismatchError: the prior is of another tokenizer or configuration.
        """
        trust = settings.trust_remote_code
        config = load_config(settings.config_source, trust_remote_code=trust)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and settings.max_seq_len > longest:
            raise ConfigError(
                f"max_seq_len: {settings.max_seq_len} exceeds the {longest} positions that {settings.model} supports "
                "(max_position_embeddings)"
            )
        device = "server" if settings.engine == "openai" else resolve_device(settings.hf.device)
        tokenizer = load_tokenizer(settings.tokenizer or settings.model, trust_remote_code=trust)
        head_size = int(config.get_text_config().vocab_size)
        return cls(
            settings,
            tokenizer,
            head_size,
            device,
            resolve_dtype(settings.dtype, config, device),
            _given_prior(settings, settings.codec(head_size), tokenizer),
        )

    @property
    def codec(self) -> Codec:
        """The codec, with the given prior, or the built-in one as long as none is learned; see `CaptureSettings`."""
        codec = self.settings.codec(self.head_size)
        return codec if self.prior is None else Codec(codec.config, prior=self.prior)

    @property
    def sampled_rows(self) -> int:
        """From how many rows the codec's prior is learned; 0 if none is."""
        learns = self.prior is None and isinstance(self.codec.config, LearnedConfig)
        return self.settings.prior_rows if learns else 0

    @property
    def request(self) -> RowRequest:
        """What is kept of the teacher's distributions."""
        settings, codec = self.settings, self.codec
        return RowRequest(
            codec.k,
            settings.token_ids(self.tokenizer, codec.k),
            settings.label_logprobs,
            settings.last_row,
            codec.draws,
            codec.config.seed if isinstance(codec.config, SampledConfig) else 0,
        )

    def sample_k(self, k: int) -> int:
        """Number of ids per row that the prior of a codec with so many is learned from.

        Rows are told apart by their first ids, whatever number of them is stored: with 128, `compact-50` takes 1% fewer
        bytes than with 50. (`sampled-50`, too, whose rows are kept with these ids besides their draws.) Other engines
        are started for as many ids as are stored.
        """
        if self.settings.engine != "hf" or self.settings.keep_ids:
            return k
        return max(k, min(_SAMPLE_K, self.head_size))

    @property
    def append_eos(self) -> bool:
        """Whether plain text ends with the end-of-sequence token."""
        if self.settings.append_eos is None:
            return self.tokenizer.eos_token is not None
        return self.settings.append_eos

    def source(self) -> Source:
        """Open the dataset."""
        settings = self.settings
        return open_source(settings.dataset, configuration=settings.dataset_configuration, split=settings.split)

    def header(self, source: Source) -> Header:
        """Make the header of the shards, without the teacher.

        Raises:
            MismatchError: the tokenizer has ids that the teacher has no logits for; or see `CaptureSettings.codec`.
        """
        known = vocab_size(self.tokenizer)
        name = self.settings.tokenizer or self.settings.model
        if known > self.head_size:
            raise MismatchError(
                f"the tokenizer {name} has {known} ids, but the teacher's logits are only {self.head_size} wide: "
                "tokenizer and teacher do not match"
            )
        return Header(
            codec=self.codec.to_dict(),
            vocab_size=known,
            head_size=self.head_size,
            tokenizer={"name": folder_name(name), "fingerprint": fingerprint(self.tokenizer)},
            **self._distributions(),
            alignment=alignment("L" if self.request.last_row else "L-1"),
            capture={
                **self.settings.identity(),
                **({"prior_rows": self.sampled_rows} if self.sampled_rows else {}),
                "append_eos": self.append_eos,
                "dataset": source.description,
                "device": self.device.partition(":")[0],
            },
        )

    def _distributions(self) -> dict[str, Any]:
        """The header's fields that say what the teacher's logits were turned into."""
        draws = self.codec.draws
        return {} if draws is None else {"temperature": draws.temperature, "logprobs": DRAWN}

    def plan(self, folder: Folder) -> ShardPlan:
        """The plan in the folder, or a new one.

        Raises:
            MismatchError: the folder contains a capture with other settings, or the text has changed since.
            CaptureError: there is nothing to capture.
            OSError: the plan cannot be written.
        """
        source = self.source()
        header, content = self.header(source), source.fingerprint
        plan = read_plan(folder)
        if plan is not None:
            with explaining_mismatch(folder):
                plan.check_same(header, content)
            return plan
        settings = self.settings
        reader = document_reader(settings, source, self.tokenizer, id_limit=self.head_size)
        plan = make_plan(
            folder,
            header,
            reader,
            settings.shard_tokens,
            source=content,
            kept=reader.kept,
            counts=lambda: reader.counts,
            sampled_rows=self.sampled_rows,
            sample_k=self.sample_k(self.codec.k),
        )
        if not plan.shards:
            plan.remove()
            why = ", ".join(counted(plan.counts)) or "it is empty"
            raise CaptureError(f"{settings.dataset}: contains no document of at least 2 tokens: {why}")
        logger.info(
            "%s: %s with %s in %s",
            settings.dataset,
            number_of(plan.documents, "document"),
            number_of(plan.tokens, "token"),
            number_of(len(plan.shards), "shard"),
        )
        return plan

    def teacher(self) -> Teacher:
        """Load the teacher."""
        return make_teacher(self.settings)

    def complete_header(self, plan: ShardPlan, teacher: Teacher, done: Mapping[int, ShardReceipt]) -> Header:
        """The plan's header, completed with the teacher.

        Raises:
            MismatchError: completed shards were captured, or the prior was learned, from another teacher.
        """
        if teacher.head_size != self.head_size:
            raise MismatchError(
                f"{self.settings.model}: its logits are {teacher.head_size} wide, but its config says {self.head_size}"
            )
        header = replace(plan.header, teacher=teacher.identity)
        with explaining_mismatch(plan.folder):
            if plan.header.teacher is not None:
                header.check_same(plan.header, where=plan.inside.of(PRIOR_RECEIPT))
            for receipt in done.values():
                header.check_same(receipt.header, where=plan.folder.of(receipt.info.file))
        return header

    def check_finished(self, finished: Manifest, folder: Folder) -> None:
        """Refuse a finished dataset that was captured from other inputs; the teacher's weights are not compared.

        Raises:
            MismatchError: names the setting and both values.
        """
        stored = finished.header.teacher or {}
        # A server does not report a dtype, and may have another name for the model.
        known = {} if self.settings.engine == "openai" else {"name": folder_name(self.settings.model)}
        if "dtype" in stored:
            known["dtype"] = self.dtype
        teacher = {**stored, **known}
        with explaining_mismatch(folder):
            header = replace(self.header(self.source()), teacher=teacher)
            if self.sampled_rows:
                config = {**header.codec["config"], "prior": finished.header.prior}
                header = replace(header, codec={**header.codec, "config": config})
            header.check_same(finished.header, where=str(folder))


def document_reader(settings: CaptureSettings, source: Source, tokenizer: Any, *, id_limit: int) -> DocumentReader:
    """Make the document reader for a capture's settings."""
    return DocumentReader(
        source,
        tokenizer,
        max_tokens=settings.max_seq_len,
        id_limit=id_limit,
        chat=settings.apply_chat_template,
        samples=settings.samples,
        seed=settings.seed,
        shuffle=settings.shuffle,
        where=settings.row_filters,
        shortest=settings.min_tokens,
        longest=settings.max_tokens,
        overflow=settings.overflow,
        overlap=settings.overlap,
        loss_on=settings.loss_on,
        keep_columns=settings.keep_columns,
        read_columns=settings.read_columns,
        append_eos=settings.append_eos,
        drop_duplicates=settings.drop_duplicates,
        skip_bad=settings.skip_bad_documents,
    )


@contextmanager
def explaining_mismatch(folder: Folder) -> Iterator[None]:
    """Add to a MismatchError what to do about the capture in a folder."""
    try:
        yield
    except MismatchError as error:
        raise MismatchError(
            f"{error}. {folder} contains a capture with other settings: use those to resume it, or choose another "
            "output folder"
        ) from error


def _given_prior(settings: CaptureSettings, codec: Codec, tokenizer: Any) -> Prior | None:
    """The prior of `prior`, or None.

    Raises:
        ConfigError: it cannot be read, or the codec has none.
        MismatchError: it was learned for another configuration, or with another tokenizer.
    """
    name, named = settings.prior, settings.prior_hash
    if name is None and named is not None:
        raise ConfigError(
            f"compression_config: its prior is {named}: pass that prior as well (--prior), or leave the field prior "
            "out, so that one is learned"
        )
    if name is None:
        return None
    if not isinstance(codec.config, LearnedConfig):
        raise ConfigError(
            f"prior: only the formats compact and sampled have a prior, but this capture's is {codec.format}: choose "
            f"--preset compact-50, for example, or leave it out (found {name!r})"
        )
    try:
        prior = load_prior(name)
    except (OSError, InputError) as error:
        raise ConfigError(f"prior: {error}") from error
    if named not in (None, prior.hash):
        raise MismatchError(f"prior: the hash of {name} is {prior.hash}, but compression_config names {named}")
    config = codec.config.for_prior()
    ours, theirs = ({"format": each.format, **each.model_dump()} for each in (config, prior.config))
    different = [f"{key} {theirs.get(key)!r} (here: {ours[key]!r})" for key in ours if ours[key] != theirs.get(key)]
    if different:
        raise MismatchError(
            f"prior: {name} was learned for {', '.join(different)}: choose the codec that it was learned for, or leave "
            "it out, so that one is learned"
        )
    stored, own = _tokenizer_beside(name, prior), fingerprint(tokenizer)
    if stored is not None and stored["fingerprint"] != own:
        raise MismatchError(
            f"prior: {name} was learned from ids of the tokenizer {stored['name']} (fingerprint "
            f"{stored['fingerprint']}), but this capture's has the fingerprint {own}: leave the prior out, so that one "
            "is learned"
        )
    return prior


def _tokenizer_beside(name: str, prior: Prior) -> Mapping[str, Any] | None:
    """The tokenizer of the finished dataset that a prior is part of; None if unknown."""
    place = without_trailing_slash(name)
    filesystem, inner = locate(place)
    folder = place if filesystem.isdir(inner) else place.rpartition("/")[0] or "."
    manifest = read_manifest(folder)
    return manifest.header.tokenizer if manifest is not None and manifest.header.prior == prior.hash else None


def stored_bytes_per_token(codec: Codec, settings: CaptureSettings) -> int:
    """Bytes on disk per token: its row (about, if rows differ in size), its id and its label's log-probability."""
    # Ids take up to 4 bytes. Everything else adds some tens of bytes per document: less than 1% of its rows.
    return codec.expected_bytes_per_token + 4 + (4 if settings.label_logprobs else 0)


def sampled_tokens(plan: ShardPlan, number: int) -> int:
    """About how many tokens of a shard the prior is learned from."""
    shard = plan.shards[number]
    return shard.tokens * plan.sample[number] // shard.documents


def sample_bytes(plan: ShardPlan) -> int:
    """About how many bytes the rows take that the prior is learned from, until their shards are complete."""
    return sum(sampled_tokens(plan, number) for number in plan.sample) * plan.sample_k * BYTES_A_VALUE


def check_disk_space(plan: ShardPlan, codec: Codec, settings: CaptureSettings, numbers: Sequence[int]) -> None:
    """Refuse to start a capture that does not fit on the disk.

    Raises:
        CaptureError: says how much is needed and how much is free.
    """
    free = plan.folder.free_bytes()
    tokens = sum(plan.shards[number].tokens for number in numbers)
    needed = tokens * stored_bytes_per_token(codec, settings)
    kept = sample_bytes(plan) if plan.header.teacher is None else 0
    if free is not None and needed + kept > free:
        learning = f", the distributions that the prior is learned from {human_bytes(kept)}" if kept else ""
        raise CaptureError(
            f"{plan.folder}: {tokens:,} tokens × {codec.expected_bytes_per_token} bytes (and their ids) take "
            f"{human_bytes(needed)}{learning}, but only {human_bytes(free)} are free there. Nothing was captured: free "
            "some space, choose another output, fewer --samples or a smaller codec (distillkit forecast compares them)"
        )

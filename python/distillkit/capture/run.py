"""A capture from its settings to its report: plan, teacher, shards, manifest; on from where an earlier run stopped."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import filesize

from distillkit.capture.engines import Teacher, Wanted, make_teacher
from distillkit.capture.engines.hf import HFTeacher, load_config, resolve_device, resolve_dtype
from distillkit.capture.pipeline import StageTimes, capture_shards
from distillkit.capture.plan import FOLDER, Plan, Receipt, make_plan, read_plan
from distillkit.capture.progress import CaptureProgress
from distillkit.capture.settings import CaptureReport, CaptureSettings
from distillkit.capture.sources import Source, open_source
from distillkit.capture.summary import QUANTILES, ShardSummary
from distillkit.capture.text import DocumentReader
from distillkit.codec import Codec
from distillkit.errors import CaptureError, ConfigError, MismatchError
from distillkit.memory import peak_memory
from distillkit.shards import Header, Manifest, read_manifest
from distillkit.shards.files import Folder
from distillkit.shards.header import alignment
from distillkit.shards.manifest import merged_fidelity
from distillkit.tokenizer import fingerprint, load_tokenizer, vocab_size

__all__ = ["CaptureInputs", "run_capture", "stored_bytes_per_token"]

logger = logging.getLogger(__name__)


def run_capture(settings: CaptureSettings, *, progress: bool = True) -> CaptureReport:
    """Run a teacher over a dataset and write its distributions; see `distillkit.capture.capture`."""
    inputs = CaptureInputs.load(settings)
    folder = Folder(settings.output)
    finished = read_manifest(folder.url)
    if finished is not None:
        inputs.check_finished(finished, folder)
        # A run that was killed right after the manifest left it.
        folder.inner(FOLDER).remove_all()
        logger.info("%s is complete already, with these settings: nothing to do", folder)
        return _report(folder, finished, StageTimes(), resumed=sum(shard.documents for shard in finished.shards))

    plan = inputs.plan(folder)
    done = plan.receipts()
    numbers = [number for number in settings.shard_numbers(len(plan.shards)) if number not in done]
    check_room(plan, inputs.codec, settings, numbers)
    times = StageTimes()
    if numbers:
        times = _capture(inputs, plan, done, numbers, progress)
    resumed = sum(receipt.info.documents for receipt in done.values())
    return _finish(plan, times, resumed, settings.skip_bad_documents)


def _capture(
    inputs: CaptureInputs, plan: Plan, done: Mapping[int, Receipt], numbers: Sequence[int], progress: bool
) -> StageTimes:
    """Load the teacher and capture some shards."""
    settings = inputs.settings
    if done:
        logger.info("%s: %d of %d shards are whole: going on with the others", plan.folder, len(done), len(plan.shards))
    tokens = sum(plan.shards[number].tokens for number in numbers)
    before = sum(plan.shards[number].tokens for number in done)
    bar = CaptureProgress(before + tokens, len(done) + len(numbers), before, len(done), shown=progress)
    if settings.workers == "ray":
        from distillkit.capture.ray_workers import capture_with_ray

        with bar:
            return capture_with_ray(settings, plan, numbers, bar)
    teacher = inputs.teacher()
    header = inputs.complete_header(plan, teacher, done)
    _log_memory(teacher, header.make_codec(), settings)
    with bar:
        return capture_shards(
            teacher, plan, header, numbers, inputs.wanted, skip_bad=settings.skip_bad_documents, progress=bar
        )


@dataclass(frozen=True)
class CaptureInputs:
    """What a capture starts from, loaded without the teacher's weights."""

    settings: CaptureSettings
    tokenizer: Any
    head_size: int
    device: str
    dtype: str

    @classmethod
    def load(cls, settings: CaptureSettings) -> CaptureInputs:
        """Load the teacher's config and the tokenizer.

        Raises:
            ConfigError: one is not there, or the settings do not fit the teacher.
        """
        trust = settings.trust_remote_code
        config = load_config(settings.config_source, trust_remote_code=trust)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        if longest is not None and settings.max_seq_len > longest:
            raise ConfigError(
                f"max_seq_len: {settings.max_seq_len} tokens are more than the {longest} positions that "
                f"{settings.model} was made for (max_position_embeddings): give at most those"
            )
        device = "server" if settings.engine == "openai" else resolve_device(settings.device)
        return cls(
            settings,
            load_tokenizer(settings.tokenizer or settings.model, trust_remote_code=trust),
            int(config.get_text_config().vocab_size),
            device,
            resolve_dtype(settings.dtype, config, device),
        )

    @property
    def codec(self) -> Codec:
        """The codec; see `CaptureSettings.codec`."""
        return self.settings.codec(self.head_size)

    @property
    def wanted(self) -> Wanted:
        """What is kept of the teacher's distributions."""
        settings, k = self.settings, self.codec.k
        return Wanted(k, settings.token_ids(self.tokenizer, k), settings.label_logprobs, settings.last_row)

    def source(self) -> Source:
        """Open the dataset."""
        settings = self.settings
        return open_source(settings.dataset, configuration=settings.dataset_configuration, split=settings.split)

    def header(self, source: Source) -> Header:
        """Make the header of the shards, without the teacher.

        Raises:
            MismatchError: the tokenizer knows ids that the teacher has no logits for; or see `CaptureSettings.codec`.
        """
        known = vocab_size(self.tokenizer)
        name = self.settings.tokenizer or self.settings.model
        if known > self.head_size:
            raise MismatchError(
                f"the tokenizer {name} knows {known} ids, the teacher's logits are only {self.head_size} wide: they do "
                "not belong together"
            )
        return Header(
            codec=self.codec.to_dict(),
            vocab_size=known,
            head_size=self.head_size,
            tokenizer={"name": _public_name(name), "fingerprint": fingerprint(self.tokenizer)},
            alignment=alignment("L" if self.wanted.last_row else "L-1"),
            capture={
                **self.settings.deciding(),
                "dataset": source.description,
                "device": self.device.partition(":")[0],
            },
        )

    def plan(self, folder: Folder) -> Plan:
        """The plan in the folder, or a new one.

        Raises:
            MismatchError: the folder holds a capture with other settings, or the text has changed since.
            CaptureError: there is nothing to capture.
            OSError: it can not be written.
        """
        source = self.source()
        header, content = self.header(source), source.fingerprint
        plan = read_plan(folder)
        if plan is not None:
            with _saying_how_to_go_on(folder):
                plan.check_same(header, content)
            return plan
        settings = self.settings
        reader = DocumentReader.of(settings, source, self.tokenizer, id_limit=self.head_size)
        plan = make_plan(
            folder,
            header,
            reader,
            settings.shard_tokens,
            source=content,
            kept=reader.kept,
            counts=lambda: reader.counts,
        )
        if not plan.shards:
            plan.remove()
            raise CaptureError(
                f"{settings.dataset}: no document of at least 2 tokens in it: {_passed_over(plan.counts)}"
            )
        logger.info(
            "%s: %s documents with %s tokens in %d shards",
            settings.dataset,
            f"{plan.documents:,}",
            f"{plan.tokens:,}",
            len(plan.shards),
        )
        return plan

    def teacher(self) -> Teacher:
        """Load the teacher."""
        return make_teacher(self.settings)

    def complete_header(self, plan: Plan, teacher: Teacher, done: Mapping[int, Receipt]) -> Header:
        """The plan's header with its teacher.

        Raises:
            MismatchError: the teacher is another than that of shards which are done.
        """
        if teacher.head_size != self.head_size:
            raise MismatchError(
                f"{self.settings.model}: its logits are {teacher.head_size} wide, its config says {self.head_size}"
            )
        header = replace(plan.header, teacher=teacher.identity)
        with _saying_how_to_go_on(plan.folder):
            for receipt in done.values():
                header.check_same(receipt.header, where=plan.folder.of(receipt.info.file))
        return header

    def check_finished(self, finished: Manifest, folder: Folder) -> None:
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
            header = replace(self.header(self.source()), teacher=teacher)
            header.check_same(finished.header, where=str(folder))


@contextmanager
def _saying_how_to_go_on(folder: Folder) -> Iterator[None]:
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


def _passed_over(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()) or "it is empty"


def stored_bytes_per_token(codec: Codec, settings: CaptureSettings) -> int:
    """Bytes on disk of a token: its row, its id and its label's log-probability."""
    # Ids take up to 4 bytes, all the rest of a document some tens: less than a row in a hundred.
    return codec.bytes_per_token + 4 + (4 if settings.label_logprobs else 0)


def check_room(plan: Plan, codec: Codec, settings: CaptureSettings, numbers: Sequence[int]) -> None:
    """Refuse to begin what the disk can't hold.

    Raises:
        CaptureError: says how much is needed and free.
    """
    free = plan.folder.free_bytes()
    tokens = sum(plan.shards[number].tokens for number in numbers)
    needed = tokens * stored_bytes_per_token(codec, settings)
    if free is not None and needed > free:
        raise CaptureError(
            f"{plan.folder}: {tokens:,} tokens × {codec.bytes_per_token} bytes (and their ids) take "
            f"{filesize.decimal(int(needed))}, and only {filesize.decimal(free)} are free there. Nothing was "
            "captured: make room, give another output, fewer --samples or a smaller codec (distillkit plan compares "
            "them)"
        )


def _finish(plan: Plan, times: StageTimes, resumed: int, skip_bad: int) -> CaptureReport:
    """Write the manifest if all shards are whole, and report.

    A run that was to do a part only leaves the rest to others; whoever comes last writes the manifest.

    Raises:
        CaptureError: more than `skip_bad` documents were left out.
    """
    receipts = plan.receipts()
    if len(receipts) < len(plan.shards):
        logger.info(
            "%s: %d of %d shards are whole; the manifest is written when all of them are",
            plan.folder,
            len(receipts),
            len(plan.shards),
        )
        return _report(
            plan.folder, _manifest(plan, receipts), times, resumed, unfinished=len(plan.shards) - len(receipts)
        )
    skipped = sum(len(receipt.skipped) for receipt in receipts.values())
    if skipped > skip_bad:
        raise CaptureError(
            f"{plan.folder}: {skipped} documents were left out by all workers together, allowed are {skip_bad} "
            "(--skip-bad-documents)"
        )
    manifest = _manifest(plan, receipts)
    plan.folder.remove_leftovers()
    manifest.write(plan.folder)
    plan.remove()
    return _report(plan.folder, manifest, times, resumed)


def _manifest(plan: Plan, receipts: Mapping[int, Receipt]) -> Manifest:
    """The index of the shards that are done.

    Raises:
        MismatchError: they do not belong together.
    """
    ordered = [receipts[number] for number in sorted(receipts)]
    summary = ShardSummary()
    for receipt in ordered:
        ordered[0].header.check_same(receipt.header, where=plan.folder.of(receipt.info.file))
        summary.merge(receipt.summary)
    header = ordered[0].header if ordered else plan.header
    fidelity = merged_fidelity([receipt.header for receipt in ordered]) if ordered else None
    capture = {
        "passed_over": dict(plan.counts),
        "skipped": [list(skipped) for receipt in ordered for skipped in receipt.skipped],
        "summary": summary.to_dict(),
    }
    return Manifest(replace(header, fidelity=fidelity), tuple(receipt.info for receipt in ordered), capture)


def _log_memory(teacher: Teacher, codec: Codec, settings: CaptureSettings) -> None:
    """Say what the run will take, with the arithmetic."""
    width, identity = teacher.head_size, teacher.identity
    if isinstance(teacher, HFTeacher):
        logger.info(
            "teacher %s in %s: weights %s; logits %d positions × %s × 4 B = %s at a time",
            identity["name"],
            identity["dtype"],
            filesize.decimal(teacher.parameter_bytes),
            settings.head_rows,
            f"{width:,}",
            filesize.decimal(settings.head_rows * width * 4),
        )
    logger.info(
        "stored: %d bytes a token (values %d, ids %d), against %s in bfloat16 logits",
        codec.bytes_per_token,
        codec.value_bytes,
        codec.id_bytes,
        filesize.decimal(2 * width),
    )


def _report(folder: Folder, manifest: Manifest, times: StageTimes, resumed: int, unfinished: int = 0) -> CaptureReport:
    """Sum up a dataset."""
    shards, fidelity, memory = manifest.shards, manifest.header.fidelity or {}, peak_memory()
    capture = manifest.capture or {}
    summary = ShardSummary.from_dict(capture["summary"]) if "summary" in capture else ShardSummary()
    return CaptureReport(
        output=str(folder),
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        rows=sum(shard.rows for shard in shards),
        shards=len(shards),
        unfinished_shards=unfinished,
        bytes_per_token=manifest.header.make_codec().bytes_per_token,
        disk_bytes=sum(shard.bytes for shard in shards),
        kl_mean=fidelity.get("kl_mean"),
        kl_p99=fidelity.get("kl_p99"),
        mass_mean=summary.mass_mean,
        mass_quantiles={f"{share:g}": summary.mass_quantile(share) for share in QUANTILES},
        next_token_rates={f"{shift:+d}" if shift else "0": summary.shifts.rate(shift) for shift in (-1, 0, 1)},
        shifted=summary.shifts.shifted(),
        resumed_documents=resumed,
        already_complete=times.tokens == 0 and not unfinished,
        passed_over=dict(capture.get("passed_over", {})),
        skipped=[list(entry) for entry in capture.get("skipped", [])],
        seconds=times.wall,
        new_tokens=times.tokens,
        tokens_per_second=times.tokens / times.wall if times.wall else 0.0,
        teacher_seconds=times.teacher,
        blocked_seconds=times.blocked,
        encode_seconds=times.encode,
        write_seconds=times.write,
        **memory,
    )

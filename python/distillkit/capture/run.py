"""Runs a capture from its settings to its report: plan, teacher, shards, manifest; resumes an interrupted one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from distillkit.capture.inputs import CaptureInputs, check_disk_space, sampled_tokens
from distillkit.capture.learning import score_sample, settle_prior
from distillkit.capture.pipeline import StageTimes, capture_shards
from distillkit.capture.progress import CaptureProgress
from distillkit.capture.result import CaptureReport
from distillkit.capture.settings import CaptureSettings
from distillkit.capture.shard_plan import ShardPlan, ShardReceipt, remove_plan
from distillkit.capture.summary import QUANTILES, ShardSummary
from distillkit.capture.teachers.base import Teacher
from distillkit.capture.teachers.hf import HFTeacher
from distillkit.codec import Codec
from distillkit.codec.presets import published_bytes
from distillkit.console import human_bytes
from distillkit.errors import CaptureError
from distillkit.memory import peak_memory
from distillkit.shards import Dataset, Manifest, read_manifest
from distillkit.shards.lock import CAPTURE_FOLDER, FolderLock
from distillkit.shards.manifest import MANIFEST, merged_fidelity
from distillkit.shards.prior import PRIOR
from distillkit.shards.reader import ShardFile
from distillkit.shards.storage import Folder
from distillkit.shards.writer import is_dataset_file

__all__ = ["run_capture"]

logger = logging.getLogger(__name__)


def run_capture(settings: CaptureSettings, *, progress: bool = True) -> CaptureReport:
    """Run a teacher over a dataset and write its distributions; see `distillkit.capture.capture`."""
    inputs = CaptureInputs.load(settings)
    folder = Folder(settings.output)
    if read_manifest(folder.url) is None:
        with FolderLock(folder, _share(settings)) as lock:
            run = _Run(inputs, progress)
            with lock.turn():
                # Another job may have finished the dataset while this one waited.
                plan = inputs.plan(folder) if read_manifest(folder.url) is None else None
                if plan is not None:
                    plan = run.settle_prior(plan, lock)
            if plan is not None:
                resumed = run.capture(plan)
                with lock.turn():
                    return _finish(plan, run.times, resumed, settings)
    return _already_complete(inputs, folder)


def _share(settings: CaptureSettings) -> range | None:
    """The shards of this run, of which the plan may have fewer; None for all."""
    return None if settings.shard_range is None else range(*map(int, settings.shard_range.split(":")))


def _already_complete(inputs: CaptureInputs, folder: Folder) -> CaptureReport:
    """Report a finished dataset, after comparing it with the settings."""
    finished = read_manifest(folder.url)
    if finished is None:
        raise CaptureError(f"{folder}: {MANIFEST} was removed while this capture started; run it again")
    inputs.check_finished(finished, folder)
    # Refuses a dataset whose shards are not those that it lists.
    Dataset.open(folder.url)
    if folder.inner(CAPTURE_FOLDER).names():
        # Left behind by a run that was killed right after it had written the manifest.
        with FolderLock(folder, range(0)):
            remove_plan(folder)
    logger.info("%s is already complete with these settings: nothing to do", folder)
    return _report(folder, finished, StageTimes(), resumed=sum(shard.documents for shard in finished.shards))


class _Run:
    """What a run does with a plan; the teacher is loaded when it is first needed.

    Attributes:
        times: where the time went so far.
    """

    def __init__(self, inputs: CaptureInputs, progress: bool) -> None:
        self.times = StageTimes()
        self._inputs, self._settings, self._progress = inputs, inputs.settings, progress

    @cached_property
    def _teacher(self) -> Teacher:
        teacher = self._inputs.teacher()
        _log_memory(teacher, self._inputs.codec, self._settings)
        return teacher

    def settle_prior(self, plan: ShardPlan, lock: FolderLock) -> ShardPlan:
        """The plan with the prior that its shards have; see `settle_prior`."""
        plan, times = settle_prior(self._inputs, plan, lock, self._score_sample, progress=self._progress)
        self.times.add(times)
        return plan

    def capture(self, plan: ShardPlan) -> int:
        """Capture this run's share of a plan; returns the number of documents that earlier runs captured."""
        settings = self._settings
        share = settings.shard_numbers(len(plan.shards))
        # The shards of other jobs are compared by whoever finishes the dataset.
        done = plan.receipts(trusted={*range(len(plan.shards))} - {*share})
        numbers = [number for number in share if number not in done]
        check_disk_space(plan, self._inputs.codec, settings, numbers)
        if numbers:
            plan.remove_receipts(numbers)
            self.times.add(self._capture(plan, done, numbers))
        return sum(receipt.info.documents for receipt in done.values())

    def _capture(self, plan: ShardPlan, done: Mapping[int, ShardReceipt], numbers: Sequence[int]) -> StageTimes:
        """Load the teacher and capture some shards."""
        settings = self._settings
        if done:
            logger.info(
                "%s: %d of %d shards are complete: resuming with the others", plan.folder, len(done), len(plan.shards)
            )
        tokens = sum(plan.shards[number].tokens for number in numbers)
        before = sum(plan.shards[number].tokens for number in done)
        bar = CaptureProgress(
            "capturing",
            before + tokens,
            len(done) + len(numbers),
            done_tokens=before,
            done_shards=len(done),
            shown=self._progress,
        )
        if settings.workers == "ray":
            from distillkit.capture.ray import capture_with_ray

            with bar:
                return capture_with_ray(settings, plan, numbers, bar)
        header = self._inputs.complete_header(plan, self._teacher, done)
        with bar:
            return capture_shards(
                self._teacher,
                plan,
                header,
                numbers,
                self._inputs.request,
                skip_bad=settings.skip_bad_documents,
                progress=bar,
            )

    def _score_sample(self, plan: ShardPlan, numbers: Sequence[int]) -> StageTimes:
        """Score the documents of some shards that the prior is learned from, and keep their rows."""
        settings, times = self._settings, StageTimes()
        tokens = sum(sampled_tokens(plan, number) for number in numbers)
        bar = CaptureProgress("scoring for the prior", tokens, len(numbers), shown=self._progress)
        if settings.workers == "ray":
            from distillkit.capture.ray import capture_with_ray

            with bar:
                return capture_with_ray(settings, plan, numbers, bar, sample=True)
        header = self._inputs.complete_header(plan, self._teacher, {})
        with bar:
            for number in numbers:
                times.add(
                    score_sample(
                        self._teacher,
                        plan,
                        number,
                        header,
                        self._inputs.request,
                        skip_bad=settings.skip_bad_documents,
                        progress=bar,
                    )
                )
                bar.finished_shard()
        return times


def _finish(plan: ShardPlan, times: StageTimes, resumed: int, settings: CaptureSettings) -> CaptureReport:
    """Write the manifest if all shards are complete, and report.

    With `shard_range` several runs share the work; the last one to finish writes the manifest.

    Raises:
        CaptureError: more than `skip_bad_documents` documents were skipped.
    """
    finished = read_manifest(plan.folder.url)
    if finished is not None:
        _check_finished_by_another(plan, finished)
        return _report(plan.folder, finished, times, resumed)
    receipts = plan.receipts(trusted=settings.shard_numbers(len(plan.shards)))
    if len(receipts) < len(plan.shards):
        logger.info(
            "%s: %d of %d shards are complete; the manifest is written when all of them are",
            plan.folder,
            len(receipts),
            len(plan.shards),
        )
        return _report(
            plan.folder, _manifest(plan, receipts), times, resumed, unfinished=len(plan.shards) - len(receipts)
        )
    skipped = sum(len(receipt.skipped) for receipt in receipts.values())
    skip_bad = settings.skip_bad_documents
    if skipped > skip_bad:
        raise CaptureError(
            f"{plan.folder}: {skipped} documents were left out by all workers together; at most {skip_bad} are "
            "allowed (--skip-bad-documents)"
        )
    manifest = _manifest(plan, receipts)
    plan.folder.remove_leftovers(is_dataset_file)
    manifest.write(plan.folder)
    plan.remove()
    return _report(plan.folder, manifest, times, resumed)


def _check_finished_by_another(plan: ShardPlan, finished: Manifest) -> None:
    """Compare this run's shards with a manifest that another run has written meanwhile.

    Jobs that share a dataset may write their last shards at once. Where storage has no locks, it may also be a second
    capture of the same shards, and this run has replaced some of its files.

    Raises:
        CaptureError: names the shards that differ.
    """
    listed = {info.file: info for info in finished.shards}
    receipts = plan.receipts(trusted=range(len(plan.shards))).values()
    odd = [receipt.info.file for receipt in receipts if listed.get(receipt.info.file) != receipt.info]
    if odd:
        raise CaptureError(
            f"{plan.folder}: another capture has finished this dataset meanwhile, with other contents of "
            f"{', '.join(odd[:5])}: remove the folder and capture again"
        )
    plan.remove()


def _manifest(plan: ShardPlan, receipts: Mapping[int, ShardReceipt]) -> Manifest:
    """The manifest of the completed shards.

    Raises:
        MismatchError: their headers differ.
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
    """Log the memory and disk space that the run needs, with the arithmetic."""
    width, identity = teacher.head_size, teacher.identity
    if isinstance(teacher, HFTeacher):
        logger.info(
            "teacher: %s in %s; weights %s; logits %d positions × %s × 4 B = %s at a time",
            identity["name"],
            identity["dtype"],
            human_bytes(teacher.parameter_bytes),
            settings.hf.head_rows,
            f"{width:,}",
            human_bytes(settings.hf.head_rows * width * 4),
        )
    parts = f" (values {codec.value_bytes}, ids {codec.id_bytes})" if codec.is_fixed else ""
    logger.info(
        "stored: %s%d bytes per token%s, compared with %s as bfloat16 logits",
        "" if codec.is_fixed else "about ",
        codec.expected_bytes_per_token,
        parts,
        human_bytes(2 * width),
    )


def _bytes_per_token(folder: Folder, manifest: Manifest, prior_bytes: int) -> float:
    """The codec's bytes per row; where rows differ in size, their mean with their prior, or 0 without rows."""
    if manifest.header.codec.get("format") not in ("compact", "sampled"):
        return manifest.header.make_codec().bytes_per_token
    rows = sum(shard.rows for shard in manifest.shards)
    size = sum(ShardFile(folder.of(shard.file)).teacher_bytes() for shard in manifest.shards)
    return (size + prior_bytes) / rows if rows else 0.0


def _report(folder: Folder, manifest: Manifest, times: StageTimes, resumed: int, unfinished: int = 0) -> CaptureReport:
    """Summarise a dataset."""
    header, shards, memory = manifest.header, manifest.shards, peak_memory()
    fidelity = header.fidelity or {}
    capture = manifest.capture or {}
    summary = ShardSummary.from_dict(capture["summary"]) if "summary" in capture else ShardSummary()
    prior_bytes = 0 if header.prior is None else folder.size(PRIOR) or 0
    k = header.codec["config"].get("k")
    drawn = k is None
    if drawn:
        # Draws are stored as they are: their shares sum to 1, and no published layout has any.
        fidelity = {}
    return CaptureReport(
        output=str(folder),
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        rows=sum(shard.rows for shard in shards),
        shards=len(shards),
        unfinished_shards=unfinished,
        bytes_per_token=_bytes_per_token(folder, manifest, prior_bytes),
        prior_bytes=prior_bytes,
        published_bytes_per_token=None if k is None else published_bytes(k, header.head_size),
        disk_bytes=sum(shard.bytes for shard in shards) + prior_bytes,
        kl_mean=fidelity.get("kl_mean"),
        kl_p99=fidelity.get("kl_p99"),
        mass_mean=None if drawn else summary.mass_mean,
        mass_quantiles={} if drawn else {f"{share:g}": summary.mass_quantile(share) for share in QUANTILES},
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
        learn_seconds=times.learn,
        **memory,
    )

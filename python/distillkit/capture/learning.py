"""The prior of a capture in the format compact or sampled, which is learned before the first shard is written.

It is learned once, from rows of documents that the plan names, by whoever plans the capture; all others find it. The
rows are kept in `.capture` (`kept_rows.py`), so that the teacher scores each document once, and a run that was killed
goes on where it was. `prior.json` has the header that all shards then have, with teacher and prior. It is written
last, after `prior.bin`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import xxhash

from distillkit.capture.inputs import CaptureInputs, check_disk_space, explaining_mismatch
from distillkit.capture.kept_rows import KeptRows, ScoredOrRejected, read_rows, write_rows
from distillkit.capture.pipeline import StageTimes, too_many_left_out
from distillkit.capture.progress import CaptureProgress
from distillkit.capture.settings import CaptureSettings
from distillkit.capture.shard_plan import PRIOR_RECEIPT, ShardPlan, read_json, write_json
from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument, Teacher
from distillkit.codec import Codec, Prior
from distillkit.console import duration, human_bytes, number_of, progress_bar
from distillkit.errors import CaptureError, ConfigError, CorruptDataError, InputError
from distillkit.shards import Header
from distillkit.shards.lock import FolderLock
from distillkit.shards.prior import PRIOR
from distillkit.shards.writer import make_document
from distillkit.types import SparseLogprobs, TokenDocument

__all__ = ["score_sample", "settle_prior", "with_learned_prior"]

logger = logging.getLogger(__name__)


def settle_prior(
    inputs: CaptureInputs,
    plan: ShardPlan,
    lock: FolderLock,
    score: Callable[[ShardPlan, Sequence[int]], StageTimes],
    *,
    progress: bool = False,
) -> tuple[ShardPlan, StageTimes]:
    """Make sure that the folder has the prior of its shards, which is learned if nobody has yet.

    Args:
        inputs, plan: the capture.
        lock: of the folder, at this run's turn.
        score: lets the teacher score the sampled documents of some shards and keeps their rows; see `score_sample`.
        progress: show that it is being learned.

    Returns:
        The plan, whose header now names the prior and, if it was learned, the teacher; and the times of learning it.

    Raises:
        ConfigError: another job has to learn it first.
        MismatchError: an interrupted run scored documents with another teacher.
        CaptureError: the teacher failed, or there is not enough disk space.
        CorruptDataError: the prior is missing or damaged.
        OSError: it cannot be written.
    """
    given = inputs.prior
    if given is not None and plan.folder.read(PRIOR) != given.data:
        plan.folder.write(PRIOR, given.data)
    settled, times = with_learned_prior(plan), StageTimes()
    if settled is None:
        started = time.perf_counter()
        _check_alone(inputs.settings, plan, lock)
        check_disk_space(plan, inputs.codec, inputs.settings, inputs.settings.shard_numbers(len(plan.shards)))
        kept = {number: read_rows(plan, number) for number in plan.sample}
        missing = [number for number, rows in kept.items() if rows is None]
        if missing:
            times = score(plan, missing)
            kept |= {number: read_rows(plan, number) for number in missing}
        clock = time.perf_counter()
        with progress_bar("learning the prior", shown=progress):
            _learn(inputs, plan, {number: rows for number, rows in kept.items() if rows is not None})
        times.learn, times.wall = time.perf_counter() - clock, time.perf_counter() - started
        settled = with_learned_prior(plan)
    if settled is None:
        raise CaptureError(f"{plan.folder}: its plan was removed while the prior was learned; run the command again")
    return settled, times


def with_learned_prior(plan: ShardPlan) -> ShardPlan | None:
    """The plan with the header that its shards have; None if their prior has yet to be learned.

    Raises:
        CorruptDataError: the prior is not the one that was learned.
    """
    if not plan.sample:
        return plan
    if plan.inside.size(PRIOR_RECEIPT) is None:
        return None
    place = plan.inside.of(PRIOR_RECEIPT)
    try:
        header = Header.from_dict(read_json(plan.inside, PRIOR_RECEIPT).get("header"), where=place)
    except CorruptDataError as error:
        raise CorruptDataError(f"{error}: {plan.starting_over}") from error
    data = plan.folder.read(PRIOR)
    found = None if data is None else xxhash.xxh3_128_hexdigest(data)
    if found != header.prior:
        raise CorruptDataError(
            f"{plan.folder.of(PRIOR)} {'is missing' if found is None else f'has the hash {found}'}, but {place} names "
            f"{header.prior}: put that file back, or {plan.starting_over}"
        )
    return replace(plan, header=header)


def _check_alone(settings: CaptureSettings, plan: ShardPlan, lock: FolderLock) -> None:
    """Where nothing is locked, several jobs would learn at once, and those that differ destroy each other's shards.

    Raises:
        ConfigError: says what to do.
    """
    if lock.locks or settings.shard_range is None or not settings.shard_numbers(len(plan.shards)):
        return
    raise ConfigError(
        f"shard_range: {plan.folder} has no prior yet, and storage of this kind has no locks, so that only one job may "
        f"learn it: run the same command with --shard-range 0:0 first, which learns it, or pass --prior (found "
        f"{settings.shard_range})"
    )


def score_sample(
    teacher: Teacher,
    plan: ShardPlan,
    number: int,
    header: Header,
    request: RowRequest,
    *,
    skip_bad: int = 0,
    progress: CaptureProgress | None = None,
) -> StageTimes:
    """Score the sampled documents of a shard and keep their rows.

    Args:
        teacher, request, skip_bad, progress: as for `capture_shards`; the plan decides how many ids are kept.
        plan: decides which documents.
        number: which shard.
        header: header of the shards, with the teacher.

    Raises:
        CaptureError: the teacher cannot continue, or more than `skip_bad` documents would be left out.
        OSError: the rows cannot be written.
    """
    documents, times = plan.read(number)[: plan.sample[number]], StageTimes()
    request = replace(request, k=plan.sample_k, likely=0 if request.draws is None else plan.sample_k)
    codec, found = header.make_codec(), dict[int, ScoredOrRejected]()
    clock = time.perf_counter()
    for result in teacher.score(documents, request):
        times.teacher += time.perf_counter() - clock
        document = documents[result.index]
        if result.index in found:
            raise CaptureError(f"{document.source}: the teacher returned its distributions twice")
        found[result.index] = _storable(result, document, header, codec)
        if progress is not None:
            progress.scored(len(document.input_ids), 0, 0)
        clock = time.perf_counter()
    for index, document in enumerate(documents):
        if index not in found:
            raise CaptureError(f"{document.source}: the teacher returned no distributions for this document")
    rejected = [result for result in found.values() if isinstance(result, RejectedDocument)]
    if len(rejected) > skip_bad:
        raise too_many_left_out(rejected[-1].reason, skip_bad)
    write_rows(plan, number, KeptRows(header, tuple(found.values())))
    return times


def _storable(result: ScoredOrRejected, document: TokenDocument, header: Header, codec: Codec) -> ScoredOrRejected:
    """A document's result; its refusal if the codec cannot store it, so that nothing is learned from it."""
    if isinstance(result, RejectedDocument):
        return result
    try:
        data = codec.encode_document(result.rows)
        make_document(document.input_ids, data, header, codec, label_logprobs=result.label_logprobs)
    except InputError as error:
        return RejectedDocument(result.index, f"{document.source}: the teacher's output cannot be stored: {error}")
    return result


def _learn(inputs: CaptureInputs, plan: ShardPlan, kept: Mapping[int, KeptRows]) -> None:
    """Learn the prior from the rows that are kept, and write it.

    Raises:
        MismatchError: they are of different teachers.
        CaptureError: there are no rows.
    """
    headers = {number: rows.header for number, rows in kept.items()}
    first = next(iter(headers.values()), plan.header)
    with explaining_mismatch(plan.folder):
        for header in headers.values():
            first.check_same(header, where=str(plan.inside))
    scored = [result for each in kept.values() for result in each.results if isinstance(result, ScoredDocument)]
    rows = [result.rows for result in scored]
    likely = [result.likely for result in scored if result.likely is not None]
    count = sum(len(part.ids) for part in rows)
    if not count:
        raise CaptureError(
            f"{plan.folder}: the teacher returned no distributions to learn a prior from: choose other documents, pass "
            "--prior, or --prior-rows 0 for the built-in one"
        )
    sources = number_of(len(kept), "shard")
    logger.info("%s: learning the prior from %s distributions of %s", plan.folder, f"{count:,}", sources)
    together = SparseLogprobs(
        np.concatenate([part.ids for part in rows]), np.concatenate([part.logprobs for part in rows]), rows[0].draws
    )
    clock = time.perf_counter()
    config = inputs.codec.config
    prior = Prior.learn(
        config,
        together,
        likely=np.concatenate(likely) if likely else None,
        source=f"the prior learned for {plan.folder}",
    )
    logger.info(
        "%s: learned the prior in %s: %s, once per dataset",
        plan.folder.of(PRIOR),
        duration(time.perf_counter() - clock),
        human_bytes(len(prior.data)),
    )
    plan.folder.write(PRIOR, prior.data)
    header = replace(first, codec=Codec(config, prior=prior).to_dict())
    write_json(plan.inside, PRIOR_RECEIPT, {"header": header.to_dict()})

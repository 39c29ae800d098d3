"""A capture survives being killed, terminated, a full disk, a read-only folder and failing parts, and loses nothing."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distillkit.capture.shard_plan import ShardPlan, read_plan
from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument
from distillkit.capture.teachers.hf import HFTeacher
from distillkit.errors import CaptureError, CorruptDataError
from distillkit.shards import Dataset, read_manifest, verify_dataset
from distillkit.shards.storage import Folder
from distillkit.text.documents import TokenDocument
from distillkit.types import SparseLogprobs
from support.capturing import everything, files, run
from support.disks import fill, mounted
from support.refusals import check_names, refused


@pytest.fixture(scope="module")
def whole(teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted capture."""
    folder = tmp_path_factory.mktemp("captured") / "whole"
    run(teacher, text, folder)
    assert set(everything(folder)) == set(files(folder)), "nothing but shards and manifest"
    return folder


@pytest.mark.slow
def test_killed_200_times(teacher: Path, text: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "support.kill_capture", str(teacher), str(text), str(tmp_path), "200"]
    result = subprocess.run(arguments, cwd=Path(__file__).parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["killed"] == 200
    assert figures["finished"] > 5
    assert figures["different"] == 0


@pytest.mark.slow
def test_sigterm_leaves_whole_shards_and_says_so(
    teacher: Path,
    text: Path,
    whole: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "distillkit", "capture", "--model", str(teacher), "--dataset", str(text)]
    exact = tmp_path / "exact.yaml"
    exact.write_text("{d: 128, k: 8, exact_k: 8, exact_dtype: float32, residual_bins: [], delta_encoding: false}")
    options = ["--max-seq-len", "64", "--batch-tokens", "256", "--head-rows", "50", "--shard-tokens", "700"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [*command, *options, "--output", str(out), "--compression-config", str(exact)],
        env={**os.environ, **threads},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (out / ".capture" / "data-00000.json").exists():
        time.sleep(0.001)
    process.terminate()
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, errors
    check_names(errors, "SIGTERM")
    assert not [name for name in everything(out) if ".incomplete-" in name]
    assert 0 < len(files(out)) < len(files(whole))
    assert files(out).items() < files(whole).items()
    run(teacher, text, out)
    assert everything(out) == everything(whole)


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_a_full_disk(
    teacher: Path,
    text: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=4m"):
        out = disk / "out"
        honest = ShardPlan.write_receipt

        def filling(self: ShardPlan, number: int, *rest: Any) -> None:
            honest(self, number, *rest)
            if number == 1:
                fill(disk / "filler")

        with monkeypatch.context() as patch:
            patch.setattr(ShardPlan, "write_receipt", filling)
            with pytest.raises(OSError) as full:  # noqa: PT011 - its number and file are checked
                run(teacher, text, out)
        assert full.value.errno == errno.ENOSPC
        assert "data-00002.parquet" in str(full.value.filename)
        assert files(out).items() < files(whole).items()
        assert len(files(out)) == 2

        (disk / "filler").unlink()
        run(teacher, text, out)
        assert everything(out) == everything(whole)

    with mounted(tmp_path / "small", "size=100k"), refused(CaptureError, "39"):
        run(teacher, text, tmp_path / "small" / "out")


def test_a_folder_that_can_not_be_written(teacher: Path, text: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro"), refused(OSError, os.strerror(errno.EROFS)):
        run(teacher, text, tmp_path / "disk" / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        run(teacher, text, tmp_path / "file" / "out")


# -- parts that fail ---------------------------------------------------------------------------------------------------


def test_an_error_of_the_encoder_stops_the_teacher(
    teacher: Path,
    text: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def failing(codec: Any, rows: Any) -> Any:
        calls.append(threading.current_thread().name)
        if len(calls) == 60:
            raise RuntimeError("the encoder's disk of thoughts is full")
        return honest(codec, rows)

    from distillkit.capture import pipeline

    honest = pipeline.encode_rows
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "encode_rows", failing)
        with pytest.raises(RuntimeError, match="disk of thoughts"):
            run(teacher, text, tmp_path / "out")
    assert set(calls) == {"distillkit-encoder"}
    assert not [thread for thread in threading.enumerate() if thread.name == "distillkit-encoder"]
    left = files(tmp_path / "out")
    assert 0 < len(left) < len(files(whole))
    assert left.items() < files(whole).items()
    run(teacher, text, tmp_path / "out")
    assert everything(tmp_path / "out") == everything(whole)


class _Teacher:
    """Scores documents with another teacher, and changes what it gives."""

    def __init__(self, teacher: HFTeacher, change: Any) -> None:
        self._teacher, self._change = teacher, change
        self.head_size, self.identity = teacher.head_size, teacher.identity

    def score(
        self, documents: Sequence[TokenDocument], request: RowRequest
    ) -> Iterator[ScoredDocument | RejectedDocument]:
        for result in self._teacher.score(documents, request):
            yield from self._change(result)


def changed(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    from distillkit.capture.inputs import CaptureInputs

    honest = CaptureInputs.teacher
    monkeypatch.setattr(CaptureInputs, "teacher", lambda self: _Teacher(honest(self), change))


def _with(
    result: ScoredDocument, position: tuple[int, int], *, logprob: float | None = None, token: int | None = None
) -> ScoredDocument:
    ids, logprobs = np.array(result.rows.ids), np.array(result.rows.logprobs)
    if logprob is not None:
        logprobs[position] = logprob
    if token is not None:
        ids[position] = token
    return ScoredDocument(result.index, SparseLogprobs(ids, logprobs))


def _rejected(result: ScoredDocument) -> list[RejectedDocument]:
    return [RejectedDocument(result.index, "rows.jsonl: no distribution after token 3")]


def _not_finite(result: ScoredDocument) -> list[ScoredDocument]:
    return [_with(result, (0, 3), logprob=-np.inf)]


# What the teacher gives for a document, and what the message names besides its file.
BAD: list[tuple[Any, list[str]]] = [
    (_not_finite, []),
    (lambda r: [_with(r, (0, 3), token=int(r.rows.ids[0, 0]))], []),
    (lambda r: [_with(r, (0, 3), token=128)], ["128"]),
    (lambda r: [_with(r, (0, 0), logprob=0.5)], []),
    (_rejected, ["no distribution after token 3"]),
    (lambda r: [ScoredDocument(r.index, SparseLogprobs(r.rows.ids[1:], r.rows.logprobs[1:]))], []),
    (lambda r: [r, r], []),
    (lambda r: [], []),
]


def test_a_bad_document_is_named_and_nothing_wrong_is_stored(
    teacher: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (change, facts) in enumerate(BAD):
        out, seen = tmp_path / str(number), iter(range(10**6))

        def once(result: ScoredDocument, change: Any = change, seen: Iterator[int] = seen) -> Any:
            return change(result) if next(seen) == 40 else [result]

        with monkeypatch.context() as patch:
            changed(patch, once)
            with refused(CaptureError, "rows.jsonl", *facts):
                run(teacher, text, out)
        assert files(out).items() < files(whole).items()
    # All leave the same behind, and the next run goes on from there.
    run(teacher, text, out)
    assert everything(out) == everything(whole)


def test_bad_documents_can_be_left_out(
    teacher: Path,
    text: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad: dict[int, Any] = {3: _rejected, 40: _not_finite}

    def change(result: ScoredDocument) -> list[ScoredDocument | RejectedDocument]:
        return bad.get(next(seen), lambda r: [r])(result)

    seen = iter(range(10**6))
    with monkeypatch.context() as patch:
        changed(patch, change)
        with refused(CaptureError, "rows.jsonl", "1"):
            run(teacher, text, tmp_path / "one", skip_bad_documents=1)
    seen = iter(range(10**6))
    with monkeypatch.context() as patch:
        changed(patch, change)
        report = run(teacher, text, tmp_path / "two", skip_bad_documents=2)
    manifest = read_manifest(tmp_path / "two")
    assert manifest is not None
    assert manifest.capture is not None
    assert len(report.skipped) == 2
    assert [list(entry) for entry in manifest.capture["skipped"]] == report.skipped
    assert all("rows.jsonl, line" in source and reason for source, reason in report.skipped)
    assert report.documents == len(Dataset.open(whole)) - 2
    assert verify_dataset(tmp_path / "two").ok


def test_memory_is_bounded_however_slow_the_disk_is(
    teacher: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With room for two documents the teacher never is more than those, and one on each side, ahead of the encoder."""
    from distillkit.capture import pipeline

    scored, encoded, lead = [], [], []
    honest, room = pipeline.encode_rows, 2
    monkeypatch.setattr(pipeline, "_room", lambda plan, k: room)

    def slow(codec: Any, rows: Any) -> Any:
        time.sleep(0.002)
        encoded.append(0)
        return honest(codec, rows)

    def watch(result: ScoredDocument) -> list[ScoredDocument]:
        scored.append(0)
        lead.append(len(scored) - len(encoded))
        return [result]

    monkeypatch.setattr(pipeline, "encode_rows", slow)
    changed(monkeypatch, watch)
    report = run(teacher, text, tmp_path / "out", samples=60)
    assert max(lead) <= room + 2
    assert report.blocked_seconds > 0


# -- the plan ----------------------------------------------------------------------------------------------------------


def test_jobs_that_share_the_shards(teacher: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shards = len(files(whole)) - 1
    last = run(teacher, text, out, shard_range=f"{shards - 2}:{shards}")
    assert (last.shards, last.unfinished_shards) == (2, shards - 2)
    assert not (out / "manifest.json").exists()
    planned = run(teacher, text, out, shard_range="0:0")
    assert planned.new_tokens == 0
    middle = run(teacher, text, out, shard_range=f"1:{shards - 2}")
    assert (middle.shards, middle.unfinished_shards) == (shards - 1, 1)
    assert not (out / "manifest.json").exists(), "one shard is not there yet"
    first = run(teacher, text, out, shard_range=f"0:{shards - 2}")
    assert (first.shards, first.unfinished_shards) == (shards, 0)
    assert everything(out) == everything(whole)


def test_a_damaged_plan_or_shard_is_not_built_on(teacher: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(teacher, text, out, shard_range="0:2")
    shard = out / "data-00001.parquet"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with refused(CorruptDataError, "data-00001.parquet", str(len(data) - 1), str(len(data))):
        run(teacher, text, out)
    shard.write_bytes(data)
    for name in ("plan.json", "data-00000.json", "documents-00003.parquet"):
        path = out / ".capture" / name
        before = path.read_bytes()
        path.write_bytes(before.replace(b"1", b"2", 1) if name.endswith(".json") else before[: len(before) // 2])
        with refused(CorruptDataError, name):
            run(teacher, text, out)
        path.write_bytes(before)
    run(teacher, text, out)
    assert verify_dataset(out).ok


def test_an_empty_shard(teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard all of whose documents were left out is a file of none."""
    with monkeypatch.context() as patch:
        changed(patch, _rejected)
        run(teacher, text, tmp_path / "out", samples=3, shard_tokens=1, shard_range="0:1", skip_bad_documents=1)
    plan = read_plan(Folder(tmp_path / "out"))
    assert plan is not None
    assert plan.shards[0].documents == 1
    report = run(teacher, text, tmp_path / "out", samples=3, shard_tokens=1, skip_bad_documents=1)
    assert report.documents == plan.documents - 1
    assert len(Dataset.open(tmp_path / "out")) == report.documents
    assert verify_dataset(tmp_path / "out").ok

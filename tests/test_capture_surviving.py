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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import support.attacks as attacks
from distillkit.capture.shard_plan import ShardPlan, make_plan, read_plan
from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument
from distillkit.capture.teachers.hf import HFTeacher
from distillkit.errors import CaptureError, ConfigError, CorruptDataError, InputError
from distillkit.shards import Dataset, read_manifest, verify_dataset
from distillkit.shards.storage import Folder
from distillkit.types import SparseLogprobs, TokenDocument
from support.capturing import everything, files, run
from support.disks import fill, mounted
from support.processes import Processes
from support.refusals import check_names, refused
from support.shards import HEADER


@pytest.fixture(scope="module")
def whole(teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted capture."""
    folder = tmp_path_factory.mktemp("captured") / "whole"
    run(teacher, text, folder)
    assert set(everything(folder)) == set(files(folder)), "nothing but shards and manifest"
    return folder


KILLS, RACES = (200, 50) if attacks.LONG else (40, 4)


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "kills"), [("fixed", KILLS), ("compact", KILLS // 2)])
def test_killed_again_and_again(
    codec: str, kills: int, teacher: Path, text: Path, tmp_path: Path, processes: Processes
) -> None:
    """And started twice at once: one of the two is refused, or finds the dataset complete."""
    arguments = [str(teacher), str(text), str(tmp_path), str(kills), str(RACES), codec]
    script = Path(__file__).parent / "support" / "kill_capture.py"
    result = processes.run(["python", script, *arguments], tmp_path, seconds=20 * kills)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["killed"] == kills
    assert figures["finished"] > kills / 40
    assert figures["different"] == 0
    assert figures["refused"] > 0


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
    with refused(ConfigError, "output", str(tmp_path / "file")):
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


def test_a_damaged_plan_is_not_built_on(teacher: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(teacher, text, out, shard_range="0:2")
    inside = out / ".capture"
    other = (inside / "documents-00004.parquet").read_bytes()
    damage: list[tuple[str, Callable[[bytes], bytes]]] = [
        ("plan.json", lambda data: data.replace(b"1", b"2", 1)),
        ("plan.json", lambda data: b"[" * 100_000),
        ("documents-00003.parquet", lambda data: data[: len(data) // 2]),
        ("documents-00003.parquet", lambda data: other),
    ]
    for name, change in damage:
        before = (inside / name).read_bytes()
        (inside / name).write_bytes(change(before))
        with refused(CorruptDataError, str(inside / name), str(inside)):
            run(teacher, text, out)
        (inside / name).write_bytes(before)
    run(teacher, text, out)
    assert everything(out) == everything(whole)


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0xFF for byte in data[middle : middle + 4]) + data[middle + 4 :]


def test_what_does_not_fit_its_receipt_is_captured_again(
    teacher: Path, text: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A shard of the right size included."""
    out = tmp_path / "out"
    run(teacher, text, out, shard_range="0:7")
    documents = [shard.documents for shard in Dataset.open(whole).shards]
    (cut, changed, missing), receipts = (
        [out / f"data-{number:05}.parquet" for number in (0, 1, 2)],
        [out / ".capture" / f"data-{number:05}.json" for number in (3, 4, 5)],
    )
    cut.write_bytes(cut.read_bytes()[:-1])
    changed.write_bytes(_flip(changed.read_bytes()))
    missing.unlink()
    receipts[0].write_bytes(_flip(receipts[0].read_bytes()))
    one, two = (path.read_bytes() for path in receipts[1:])
    receipts[1].write_bytes(two)
    receipts[2].write_bytes(one)
    # A job with other shards leaves these to whoever captures them.
    job = run(teacher, text, out, shard_range=f"7:{len(documents)}")
    assert job.unfinished_shards == 6
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for number in range(6):
        assert any(f"data-{number:05}." in message for message in said)
    report = run(teacher, text, out)
    assert report.resumed_documents == sum(documents[6:])
    assert everything(out) == everything(whole)


def test_a_second_capture_is_refused_at_once(
    teacher: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names who holds the folder, and disturbs nothing. Jobs with other shards may run."""
    out, tried = tmp_path / "out", []

    def meanwhile(result: ScoredDocument) -> list[ScoredDocument]:
        if not tried:
            tried.append("all")
            for options in ({}, {"shard_range": "1:2"}):
                with refused(InputError, str(out), str(os.getpid()), "0:2"):
                    run(teacher, text, out, **options)
            run(teacher, text, out, shard_range="2:3")
        return [result]

    with monkeypatch.context() as patch:
        changed(patch, meanwhile)
        run(teacher, text, out, shard_range="0:2")
    assert tried
    assert read_manifest(out) is None
    run(teacher, text, out)
    assert everything(out) == everything(whole)


def test_only_what_a_capture_made_is_removed(
    teacher: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the folder is called, and whoever has something in it."""
    monkeypatch.chdir(tmp_path)
    own = {".capture/notes.txt": b"mine", ".incomplete-thoughts": b"mine", "v1/plan.json": b"mine"}
    place = Path("qwen::v1")
    for name, data in own.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(data)
    run(teacher, text, place, shard_range="0:2")
    run(teacher, text, place)
    assert everything(place) == {**everything(whole), **own}
    assert run(teacher, text, place).already_complete
    assert everything(place) == {**everything(whole), **own}


def test_objects_without_fields_are_kept_as_nulls(teacher: Path, tmp_path: Path) -> None:
    """Parquet has no objects without fields."""
    rows = [{"text": "the cat sat", "meta": {}, "parts": [{}, {}], "mixed": {"empty": {}, "number": n}} for n in (1, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(teacher, tmp_path / "rows.jsonl", tmp_path / "out", keep_columns="all")
    table = pq.read_table(tmp_path / "out" / "data-00000.parquet")
    assert table.column("meta").to_pylist() == [None, None]
    assert table.column("parts").to_pylist() == [[None, None]] * 2
    assert table.column("mixed").to_pylist() == [{"empty": None, "number": n} for n in (1, 2)]
    assert verify_dataset(tmp_path / "out").ok


def test_a_plan_with_large_columns_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow cannot read more than 2 GB of a nested column at once."""
    monkeypatch.setattr("distillkit.capture.shard_plan._GROUP_BYTES", 10_000)
    kept = pa.schema([pa.field("pages", pa.list_(pa.string()))])
    documents = [
        TokenDocument(np.arange(n + 2, dtype=np.int32), f"row {n}", columns={"pages": [str(n) * 1000] * 4})
        for n in range(9)
    ]
    make_plan(Folder(tmp_path), HEADER, documents, 10**6, source=None, kept=kept, counts=dict)
    plan = read_plan(Folder(tmp_path))
    assert plan is not None
    path = tmp_path / ".capture" / "documents-00000.parquet"
    assert pq.ParquetFile(path).num_row_groups == 3
    for found, expected in zip(plan.read(0), documents, strict=True):
        np.testing.assert_array_equal(found.input_ids, expected.input_ids)
        assert (found.source, found.columns) == (expected.source, expected.columns)


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

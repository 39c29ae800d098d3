"""The prior of a capture is learned once, from the rows that are then stored, whoever captures what and however often
it is interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner

from distillkit.capture.inputs import CaptureInputs
from distillkit.capture.shard_plan import read_plan
from distillkit.capture.teachers.base import RowRequest, ScoredDocument
from distillkit.cli.capture import capture as capture_command
from distillkit.codec import Prior
from distillkit.errors import CaptureError, ConfigError, CorruptDataError, MismatchError
from distillkit.shards import Dataset, convert, load_prior, verify_dataset
from distillkit.shards.storage import Folder
from distillkit.types import SparseLogprobs, TokenDocument
from support.capturing import everything, files
from support.capturing import run as run_capture
from support.refusals import refused
from support.teachers import HEAD

COMPACT = {"vocab_size": HEAD, "k": 16, "step": 0.003}
ROWS = 1500


def run(teacher: Path, text: Path, out: Path | str, **options: Any) -> Any:
    """Of the text's 6,000 rows, a quarter teaches the prior."""
    given = {} if "preset" in options else {"compression_config": COMPACT}
    return run_capture(teacher, text, out, **{"prior_rows": ROWS, "preset": None, **given, **options})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted capture."""
    folder = tmp_path_factory.mktemp("captured") / "whole"
    run(teacher, text, folder)
    assert set(everything(folder)) == set(files(folder)), "nothing but shards, prior and manifest"
    return folder


class _Counting:
    """A teacher that counts what it is asked for, and may end after some documents."""

    def __init__(self, teacher: Any, asked: list[str], last: int) -> None:
        self._teacher, self._asked, self._last = teacher, asked, last
        self.head_size, self.identity = teacher.head_size, teacher.identity

    def score(self, documents: Sequence[TokenDocument], request: RowRequest) -> Iterator[Any]:
        for result in self._teacher.score(documents, request):
            if len(self._asked) == self._last:
                raise KeyboardInterrupt
            self._asked.append(documents[result.index].source)
            yield result


def counting(patch: pytest.MonkeyPatch, last: int = -1) -> list[str]:
    asked: list[str] = []
    honest = CaptureInputs.teacher
    patch.setattr(CaptureInputs, "teacher", lambda self: _Counting(honest(self), asked, last))
    return asked


def rows_of(dataset: Dataset) -> list[SparseLogprobs]:
    return [dataset.codec.decode_document(each.teacher, each.num_rows) for each in dataset]


# -- what is learned ---------------------------------------------------------------------------------------------------


def test_the_prior_is_that_of_the_planned_rows(teacher: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    """By definition: that of the rows of evenly spread shards' first documents, as the teacher gave them."""
    run(teacher, text, tmp_path / "planned", shard_range="0:0")
    plan = read_plan(Folder(tmp_path / "planned"))
    assert plan is not None
    numbers = sorted(plan.sample)
    assert numbers[0] == 0
    assert len(plan.sample) == 3
    assert np.ptp(np.diff([*numbers, len(plan.shards)])) <= 1, "evenly spread"
    exact = tmp_path / "exact"
    full = {"d": HEAD, "k": 16, "exact_k": 16, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False}
    run(teacher, text, exact, compression_config=full)
    rows, first, dataset = [], 0, Dataset.open(exact)
    for number, shard in enumerate(plan.shards):
        sampled = [dataset[index] for index in range(first, first + plan.sample.get(number, 0))]
        rows += [dataset.codec.decode_document(document.teacher, document.num_rows) for document in sampled]
        first += shard.documents
    together = SparseLogprobs(*(np.concatenate([getattr(part, name) for part in rows]) for name in ("ids", "logprobs")))
    assert ROWS <= len(together.ids) < ROWS + 64 * len(plan.sample)
    # Documents that are scored by themselves may differ in their last bits from those in larger batches.
    own, expected = load_prior(whole), Prior.learn(COMPACT, together)
    assert own.config == expected.config
    assert len(own.data) == pytest.approx(len(expected.data), rel=0.02)
    dataset = Dataset.open(whole)
    assert dataset.header.prior == own.hash
    assert dataset.header.capture["prior_rows"] == ROWS
    for found, original in zip(rows_of(dataset), rows_of(Dataset.open(exact)), strict=True):
        assert np.abs(np.exp(found.logprobs).sum(-1) - np.exp(original.logprobs).sum(-1)).mean() < 5e-3
        assert (found.ids[:, 0] == original.ids[:, 0]).mean() > 0.99
    assert verify_dataset(whole).ok


def test_no_document_is_scored_twice(
    teacher: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        asked = counting(patch)
        report = run(teacher, text, tmp_path / "out")
    assert len(asked) == report.documents
    assert everything(tmp_path / "out") == everything(whole)
    # A small capture is scored whole before its first shard.
    with monkeypatch.context() as patch:
        asked = counting(patch)
        report = run(teacher, text, tmp_path / "small", samples=9, prior_rows=10**6)
    assert len(asked) == report.documents
    assert verify_dataset(tmp_path / "small").ok


def test_a_report_counts_the_prior(teacher: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    arguments = ["--model", teacher, "--dataset", text, "--output", tmp_path / "out", "--preset", "compact-50"]
    arguments += ["--samples", 40, "--max-seq-len", 64]
    result = CliRunner().invoke(capture_command, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    dataset = Dataset.open(tmp_path / "out")
    size = sum(len(document.teacher) for document in dataset)
    prior = (tmp_path / "out" / "prior.bin").stat().st_size
    assert report["prior_bytes"] == prior == len(load_prior(tmp_path / "out").data)
    assert report["disk_bytes"] == prior + sum(shard.stat().st_size for shard in (tmp_path / "out").glob("*.parquet"))
    assert report["bytes_per_token"] == pytest.approx((size + prior) / dataset.num_rows, rel=1e-3)
    # 50 ids of 7 bits, and 14 bytes of values.
    assert report["published_bytes_per_token"] == 14 + 44
    assert report["learn_seconds"] > 0
    text_report = CliRunner().invoke(capture_command, [*map(str, arguments)]).stdout
    for fact in ("58", "prior", f"{100 * report['bytes_per_token'] / 58:.0f}%"):
        assert fact in text_report


# -- interruptions and jobs --------------------------------------------------------------------------------------------


def test_interrupted_while_learning_it_goes_on(
    teacher: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, documents = tmp_path / "out", len(Dataset.open(whole))
    scored = 0
    # While the first and a later shard is scored; when all are; when the prior is learned, but not recorded.
    for last in (3, 20, 10**6, 10**6):
        with monkeypatch.context() as patch:
            asked = counting(patch, last)
            if last > documents:
                name = "write_json" if scored else "Prior"
                patch.setattr(f"distillkit.capture.learning.{name}", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(teacher, text, out)
            scored += len(asked)
        assert not list(out.glob("*.parquet"))
    assert not (out / ".capture" / "prior.json").exists()
    with monkeypatch.context() as patch:
        asked = counting(patch)
        run(teacher, text, out)
    assert everything(out) == everything(whole)
    repeated = scored + len(asked) - documents
    assert 0 < repeated <= 40, "only what a shard's rows were begun of"


def _interrupted(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


_interrupted.learn = _interrupted  # type: ignore[attr-defined]


def test_jobs_share_one_prior(
    teacher: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that starts alone learns it, from documents of others too, which then only encode them."""
    out, shards = tmp_path / "out", len(Dataset.open(whole).shards)
    first = run(teacher, text, out, shard_range=f"{shards - 3}:{shards}")
    assert first.learn_seconds > 0
    assert (out / "prior.bin").read_bytes() == (whole / "prior.bin").read_bytes()
    with monkeypatch.context() as patch:
        asked = counting(patch)
        patch.setattr("distillkit.capture.learning.Prior", None)
        second = run(teacher, text, out, shard_range=f"0:{shards - 3}")
    assert second.learn_seconds == 0
    assert 0 < len(asked) < second.documents - first.documents
    assert everything(out) == everything(whole)


def test_a_shard_is_the_same_without_the_rows_that_were_kept(
    teacher: Path, text: Path, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Damaged ones, and those of a shard that was captured, and damaged since."""
    out = tmp_path / "out"
    run(teacher, text, out, shard_range="0:1")
    assert not (out / ".capture" / "rows-00000.bin").exists()
    (out / "data-00000.parquet").write_bytes(b"")
    damaged = sorted((out / ".capture").glob("rows-*.bin"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    caplog.clear()
    run(teacher, text, out)
    assert any(damaged.with_suffix(".json").name in record.getMessage() for record in caplog.records)
    assert everything(out) == everything(whole)


def test_another_prior_or_teacher_is_refused(
    teacher: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "begun"
    run(teacher, text, out, shard_range="0:1")
    other = {"prior_rows": ROWS + 1}
    learned = Prior.learn(COMPACT, rows_of(Dataset.open(whole))[0])
    (tmp_path / "prior.bin").write_bytes(learned.data)
    for folder in (whole, out):
        before = everything(folder)
        with refused(MismatchError, "capture.prior_rows", str(ROWS), str(ROWS + 1)):
            run(teacher, text, folder, **other)
        with refused(MismatchError, "capture.prior_rows", str(ROWS), "None"):
            run(teacher, text, folder, prior=str(tmp_path / "prior.bin"))
        assert everything(folder) == before
    prior = (out / "prior.bin").read_bytes()
    for damage in (learned.data, None):
        if damage is None:
            (out / "prior.bin").unlink()
        else:
            (out / "prior.bin").write_bytes(damage)
        with refused(CorruptDataError, str(out / "prior.bin"), load_prior(whole).hash, ".capture"):
            run(teacher, text, out)
    (out / "prior.bin").write_bytes(prior)

    def renamed(self: CaptureInputs) -> Any:
        made = honest(self)
        made._name = "another"
        return made

    honest = CaptureInputs.teacher
    with monkeypatch.context() as patch:
        patch.setattr(CaptureInputs, "teacher", renamed)
        run(teacher, text, tmp_path / "other", shard_range="0:0")
    with refused(MismatchError, "teacher.name", "another", teacher.name):
        run(teacher, text, tmp_path / "other")
    run(teacher, text, out)
    assert everything(out) == everything(whole)


def test_storage_without_locks(teacher: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    """There one job must learn the prior before the others start."""
    url = f"memory://{tmp_path.name}/captured"
    with refused(ConfigError, "shard_range", "2:4", "0:0"):
        run(teacher, text, url, shard_range="2:4")
    assert run(teacher, text, url, shard_range="0:0").learn_seconds > 0
    run(teacher, text, url, shard_range="2:4")
    run(teacher, text, url)
    filesystem = fsspec.filesystem("memory")
    found = {Path(path).name: filesystem.cat_file(path) for path in filesystem.find(f"/{tmp_path.name}/captured")}
    assert found == files(whole)


def test_documents_that_can_not_be_stored_teach_nothing(
    teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: _Counting, documents: Sequence[TokenDocument], request: RowRequest) -> Iterator[Any]:
        for result in self._teacher.score(documents, request):
            if result.index in (0, 2):
                ids = np.array(result.rows.ids)
                ids[0, 1] = ids[0, 0]
                result = ScoredDocument(result.index, SparseLogprobs(ids, result.rows.logprobs))
            yield result

    monkeypatch.setattr(_Counting, "score", broken)
    counting(monkeypatch)
    options = {"samples": 20, "shard_tokens": 10**6, "prior_rows": 10**6}
    with refused(CaptureError, "rows.jsonl", "--skip-bad-documents"):
        run(teacher, text, tmp_path / "out", **options, skip_bad_documents=1)
    assert not (tmp_path / "out" / "prior.bin").exists()
    report = run(teacher, text, tmp_path / "out", **options, skip_bad_documents=2)
    assert len(report.skipped) == 2
    assert verify_dataset(tmp_path / "out").ok


# -- a given prior -----------------------------------------------------------------------------------------------------


def test_a_prior_of_another_capture(
    teacher: Path, text: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillkit.capture.learning.Prior", None)
    places = [whole, whole / "prior.bin"]
    for number, place in enumerate(places):
        report = run(teacher, text, tmp_path / str(number), samples=20, prior=place)
        assert report.learn_seconds == 0
        assert load_prior(tmp_path / str(number)) == load_prior(whole)
        assert "prior_rows" not in Dataset.open(tmp_path / str(number)).header.capture
    assert everything(tmp_path / "0") == everything(tmp_path / "1")
    assert run(teacher, text, tmp_path / "1", samples=20, prior=whole).already_complete
    # Named by the configuration as well.
    hash = load_prior(whole).hash
    named = {"compression_config": {**COMPACT, "prior": hash}}
    assert run(teacher, text, tmp_path / "1", samples=20, prior=whole, **named).already_complete
    with refused(ConfigError, "compression_config", hash, "--prior"):
        run(teacher, text, tmp_path / "2", samples=20, **named)
    with refused(MismatchError, hash, "0" * 32):
        run(teacher, text, tmp_path / "2", prior=whole, compression_config={**COMPACT, "prior": "0" * 32})


def test_the_built_in_prior(teacher: Path, text: Path, tmp_path: Path) -> None:
    run(teacher, text, tmp_path / "out", samples=20, prior_rows=0)
    header = Dataset.open(tmp_path / "out").header
    assert header.prior is None
    assert not (tmp_path / "out" / "prior.bin").exists()


def test_a_prior_that_does_not_fit_is_refused(teacher: Path, text: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with refused(ConfigError, "prior", "quantized", "compact-50"):
        run(teacher, text, out, preset="budget", prior=whole)
    with refused(ConfigError, "prior", str(tmp_path / "nowhere")):
        run(teacher, text, out, prior=tmp_path / "nowhere")
    (tmp_path / "damaged.bin").write_bytes((whole / "prior.bin").read_bytes()[:-9])
    with refused(CorruptDataError, str(tmp_path / "damaged.bin")):
        run(teacher, text, out, prior=tmp_path / "damaged.bin")
    with refused(MismatchError, "prior", "k 16", "15", "step"):
        run(teacher, text, out, prior=whole, compression_config={**COMPACT, "k": 15, "step": 0.01})
    wider = Prior.learn({**COMPACT, "vocab_size": HEAD + 1}, rows_of(Dataset.open(whole))[0])
    (tmp_path / "wider.bin").write_bytes(wider.data)
    with refused(MismatchError, "vocab_size", str(HEAD + 1), str(HEAD)):
        run(teacher, text, out, prior=tmp_path / "wider.bin")
    tokenizer = {"name": "other", "fingerprint": "xxh3-128:0123"}
    convert(Dataset.open(whole), tmp_path / "renamed", tokenizer=tokenizer)
    for place in (tmp_path / "renamed", tmp_path / "renamed" / "prior.bin"):
        with refused(MismatchError, "prior", "other", "xxh3-128:0123"):
            run(teacher, text, out, prior=place)
    assert not out.exists()

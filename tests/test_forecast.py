"""`distillkit forecast` says beforehand what a capture then takes, and refuses what does not fit."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from distillkit.capture import CaptureSettings
from distillkit.capture.forecasting import forecast as forecasting
from distillkit.capture.forecasting.forecast import Forecast, forecast_captures
from distillkit.capture.forecasting.totals import SAMPLED_ROWS, total
from distillkit.capture.inputs import CaptureInputs, document_reader
from distillkit.capture.settings import DEFAULT_PRESET
from distillkit.cli.forecast import forecast as forecast_command
from distillkit.codec import PRESETS
from distillkit.errors import CaptureError, ConfigError, MismatchError
from distillkit.shards import read_manifest
from distillkit.shards.storage import Folder
from support.capturing import run
from support.disks import mounted
from support.refusals import check_names, refused
from support.teachers import EXACT, HEAD, write_text

SIZES = {"max_seq_len": 64, "batch_tokens": 256, "head_rows": 50, "shard_tokens": 700}


def settings(teacher: Path, dataset: Path, output: Path, **options: Any) -> CaptureSettings:
    return CaptureSettings(model=str(teacher), dataset=str(dataset), output=output, **{**SIZES, **options})


def planned(teacher: Path, dataset: Path, output: Path, *, seconds: float = 0, **options: Any) -> Forecast:
    (found,) = forecast_captures([settings(teacher, dataset, output, **options)], seconds=seconds)
    return found


def command(*arguments: Any) -> Result:
    return CliRunner().invoke(forecast_command, [*map(str, arguments), "--no-progress"])


def options(teacher: Path, dataset: Path, output: Path) -> list[Any]:
    given = {"model": teacher, "dataset": dataset, "output": output, **SIZES}
    return [part for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More rows than a forecast reads."""
    path = tmp_path_factory.mktemp("many") / "rows.jsonl"
    write_text(path, 6 * SAMPLED_ROWS)
    return path


# -- totals ------------------------------------------------------------------------------------------------------------


def test_what_is_planned_is_what_comes(teacher: Path, text: Path, tmp_path: Path) -> None:
    """All rows are read and scored: tokens, fidelity and stored mass are those of the capture itself."""
    found = planned(teacher, text, tmp_path / "out", seconds=100, compression_config=EXACT, drop_duplicates=True)
    assert not (tmp_path / "out").exists()
    report = run(teacher, text, tmp_path / "out", drop_duplicates=True)
    assert found.text.tokens.exact
    assert (found.text.tokens.value, found.text.documents.value) == (report.tokens, report.documents)
    assert found.text.left_tokens == found.text.tokens
    passed_over = {reason: count for reason, count in report.passed_over.items() if count and reason != "rows"}
    assert found.text.passed_over == passed_over
    chosen = found.chosen
    assert (chosen.bytes_per_token, chosen.positions) == (report.bytes_per_token, report.rows)
    assert report.disk_bytes < chosen.left_bytes.value * 1.2
    assert chosen.kl_mean == pytest.approx(report.kl_mean, rel=1e-6, abs=1e-12)
    assert chosen.mass_mean == pytest.approx(report.mass_mean, rel=1e-6)
    assert found.speed is not None
    assert found.speed.tokens == report.tokens
    assert found.problems == []


def test_a_large_source_is_sampled(teacher: Path, many: Path, tmp_path: Path) -> None:
    for samples in (None, 2 * SAMPLED_ROWS):
        chosen = settings(teacher, many, tmp_path / "out", samples=samples)
        inputs = CaptureInputs.load(chosen)
        reader = document_reader(chosen, inputs.source(), inputs.tokenizer, id_limit=inputs.head_size)
        lengths = [len(document.input_ids) for document in reader]
        found = planned(teacher, many, tmp_path / "out", samples=samples).text
        assert (found.rows, found.sampled_rows) == (samples or 6 * SAMPLED_ROWS, SAMPLED_ROWS)
        for amount, truth in ((found.tokens, sum(lengths)), (found.documents, len(lengths))):
            assert amount.low <= truth <= amount.high
            assert amount.high - amount.low < 0.2 * truth
        assert found.duplicates_unknown


def test_intervals_hold_as_often_as_they_say() -> None:
    random = np.random.default_rng(0)
    lengths = random.lognormal(5, 1, 5000).round()
    lengths[random.random(5000) < 0.2] = 0
    for rows in (1000, 2000, 5000):
        hits = 0
        for _ in range(400):
            sample = random.choice(lengths, 512, replace=False)
            truth = random.choice(lengths, rows, replace=False).sum()
            found = total([int(value) for value in sample if value], 512, rows, 5000)
            hits += found.low <= truth <= found.high
        assert 0.92 * 400 <= hits <= 0.98 * 400, rows
    assert total([3, 4], 5, 5, 5).exact


def test_part_of_a_capture(teacher: Path, text: Path, tmp_path: Path) -> None:
    """What is left of a capture that was begun, and of one that is finished."""
    out, shared = tmp_path / "out", {"compression_config": EXACT}
    part = run(teacher, text, out, shard_range="0:2")
    before = sorted(path.name for path in out.rglob("*"))
    found = planned(teacher, text, out, **shared, seconds=0.1)
    assert found.text.tokens.exact
    assert found.text.captured_tokens == part.tokens
    assert found.text.left_tokens.value == found.text.tokens.value - part.tokens
    assert found.speed is not None
    assert sorted(path.name for path in out.rglob("*")) == before
    third = planned(teacher, text, out, **shared, shard_range="1:3").text.left_tokens
    assert 700 <= third.value < 800
    with refused(MismatchError, "max_seq_len", "64", "32"):
        planned(teacher, text, out, **shared, max_seq_len=32)

    report = run(teacher, text, out)
    assert report.tokens == found.text.tokens.value
    found = planned(teacher, text, out, **shared, seconds=1)
    assert (found.text.left_tokens.value, found.text.captured_tokens) == (0, report.tokens)
    assert found.speed is None
    assert read_manifest(out) is not None


def test_shards_of_a_capture_that_is_not_begun(teacher: Path, text: Path, tmp_path: Path) -> None:
    whole = planned(teacher, text, tmp_path / "out").text.tokens.value
    found = planned(teacher, text, tmp_path / "out", shard_range="0:2").text
    assert found.tokens.value == whole
    assert found.left_tokens.value == pytest.approx(1400, rel=0.1)


def test_what_learning_a_prior_takes(teacher: Path, text: Path, tmp_path: Path) -> None:
    """8 bytes for each of 128 ids, which a prior is learned from however many are stored."""
    compact: dict[str, Any] = {"compression_config": {"vocab_size": HEAD, "k": 16, "step": 0.003}}
    out = tmp_path / "out"
    found = planned(teacher, text, out, **compact, prior_rows=1500, seconds=0.3)
    assert found.learning is not None
    assert found.learning.rows == 1500
    assert found.learning.seconds is not None
    assert found.speed is not None
    assert found.speed.left_seconds.value >= found.learning.seconds
    assert (found.chosen.kept_bytes, found.chosen.estimated) == (1500 * HEAD * 8, True)
    everything = planned(teacher, text, out, **compact)
    assert everything.learning is not None
    assert everything.learning.rows == everything.text.tokens.value
    # Counted in what has to be free.
    smaller = planned(teacher, text, out, **compact, prior_rows=0)
    assert smaller.learning is None
    with mounted(tmp_path / "disk", "size=1m"):
        problems = planned(teacher, text, tmp_path / "disk" / "out", **compact).problems
        assert len(problems) == 1
        assert not planned(teacher, text, tmp_path / "disk" / "out", **compact, prior_rows=0).problems
    run(teacher, text, out, **compact, prior_rows=1500, shard_range="0:0")
    begun = planned(teacher, text, out, **compact, prior_rows=1500)
    assert (begun.learning, begun.chosen.kept_bytes) == (None, 0)


# -- codecs ------------------------------------------------------------------------------------------------------------


def test_codecs_are_compared(teacher: Path, text: Path, tmp_path: Path) -> None:
    found = planned(teacher, text, tmp_path / "out", seconds=100, preset="budget", keep_ids=[5])
    names = [codec.name for codec in found.codecs]
    # As many ids as the teacher has logits are the most.
    assert names == [
        "budget",
        "recommended",
        "faithful",
        "balanced",
        "compact-128",
        "compact-50",
        "compact-adaptive",
        *(f"budget, k = {k}" for k in (32, 64, 128)),
    ]
    assert [codec.name for codec in found.codecs if codec.chosen] == ["budget"]
    # Draws take no ids that are always kept.
    assert list(found.left_out) == ["sampled-50", "budget, k = 256"]
    for codec in found.codecs:
        assert codec.left_bytes.value == found.text.tokens.value * (codec.bytes_per_token + 8)
        assert codec.kl_mean is not None
        assert codec.kl_p99 is not None
        assert 0 <= codec.kl_mean <= codec.kl_p99
    by_name = {codec.name: codec for codec in found.codecs}
    assert by_name["budget, k = 128"].mass_mean == pytest.approx(1, abs=1e-5)
    masses = [by_name[f"budget, k = {k}"].mass_mean for k in (32, 64, 128)]
    assert masses == sorted(masses)
    # With few ids there is no room for residuals of the next ranks; more than 40 exact values want more ids.
    few = {**EXACT, "k": 100, "exact_k": 40, "exact_dtype": "float16", "polynomial_terms": [0, 1]}
    left_out = planned(teacher, text, tmp_path / "out", compression_config=few).left_out
    assert list(left_out) == ["compression_config, k = 32", "compression_config, k = 256"]
    assert "exact_k" in left_out["compression_config, k = 32"]
    with refused(ConfigError, "k", str(HEAD + 1)):
        planned(teacher, text, tmp_path / "out", compression_config={**EXACT, "k": HEAD + 1, "exact_k": HEAD + 1})


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command(teacher: Path, text: Path, tmp_path: Path) -> None:
    arguments = options(teacher, text, tmp_path / "out")
    result = command(*arguments, "--seconds", "0.2")
    assert result.exit_code == 0, result.output
    check_names(result.output, *PRESETS, "k = 64", "tokens/s")

    result = command(*arguments, "--seconds", "0.2", "--json", "--workers", "ray", "--num-workers", "4")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert content.keys() == {field.name for field in dataclasses.fields(Forecast)} | {"fits"}
    assert content["fits"] is True
    assert {*PRESETS} < {codec["name"] for codec in content["codecs"]}
    assert content["free_bytes"] > 0
    assert content["memory"]["device"] == "cpu"
    assert content["memory"]["peak_rss_bytes"] > content["memory"]["teacher"]["weights"] > 0
    speed = content["speed"]
    rate = 1 / (1 / speed["teacher"] + 1 / speed["encoder"])
    assert speed["tokens_per_second"] == pytest.approx(rate)
    capturing = content["text"]["left_tokens"]["value"] / (4 * rate)
    assert speed["left_seconds"]["value"] == np.ceil(capturing) + np.ceil(content["learning"]["seconds"])


def test_sizes_only(teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(self: CaptureInputs) -> Any:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(CaptureInputs, "teacher", loaded)
    result = command(*options(teacher, text, tmp_path / "out"), "--seconds", "0")
    assert result.exit_code == 0, result.output
    assert "recommended" in result.output
    assert "tokens/s" not in result.output
    monkeypatch.chdir(tmp_path)
    # Without an output, what other captures are here is no matter.
    (tmp_path / "captured").mkdir()
    arguments = options(teacher, text, tmp_path / "out")
    at = arguments.index("--output")
    without_output = command(*arguments[:at], *arguments[at + 2 :], "--seconds", "0")
    assert without_output.exit_code == 0, without_output.output
    check_names(without_output.output, "captured-2")
    memory = options(teacher, text, f"memory://{tmp_path}")  # type: ignore[arg-type]
    result = command(*memory, "--seconds", "0", "--json")
    assert json.loads(result.stdout)["free_bytes"] is None


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_disk_that_is_too_small(teacher: Path, text: Path, tmp_path: Path) -> None:
    """What the message says would do does."""
    with mounted(tmp_path / "disk", "size=600k"):
        out = tmp_path / "disk" / "out"
        fixed = [*options(teacher, text, out), "--preset", "recommended", "--seconds", "0"]
        result = command(*fixed)
        assert result.exit_code == 1
        check_names(result.output, *PRESETS)
        assert isinstance(result.exception, CaptureError)
        message = str(result.exception)
        check_names(message, "recommended", "--samples", "kB", "MB")
        codecs = re.search(rf"\b({'|'.join(set(PRESETS) - {'recommended'})})\b", message)
        samples = re.search(r"--samples (\d+)", message)
        assert codecs
        assert samples
        assert planned(teacher, text, out, preset=codecs[1]).problems == []
        for tenths, fits in ((8, True), (12, False)):
            samples_given = int(samples[1]) * tenths // 10
            found = planned(teacher, text, out, preset="recommended", samples=samples_given)
            assert (found.problems == []) is fits
        result = command(*fixed, "--json")
        assert result.exit_code == 1
        assert json.loads(result.stdout)["fits"] is False
        report = run(teacher, text, out, preset=codecs[1])
        assert report.disk_bytes > 0


def test_captures_on_one_disk(teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = {"model": str(teacher), "dataset": str(text), **SIZES}
    path = tmp_path / "captures.yaml"
    path.write_text(yaml.safe_dump({**shared, "captures": [{"output": str(tmp_path / name)} for name in "ab"]}))
    chosen = planned(teacher, text, tmp_path / "out").chosen
    # The rows that a prior is learned from are gone before the second begins.
    needed = chosen.left_bytes.value
    monkeypatch.setattr(Folder, "free_bytes", lambda self: int(1.5 * needed) + chosen.kept_bytes)
    result = command(path, "--seconds", "0", "--json")
    assert result.exit_code == 1
    first, second = json.loads(result.stdout)
    assert (first["fits"], second["fits"]) == (True, False)
    assert second["reserved_bytes"] == needed
    check_names(str(result.exception), str(tmp_path / "b"), DEFAULT_PRESET)


def test_memory_that_is_too_small(teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(forecasting, "available_memory", lambda device: 10_000)
        result = command(*options(teacher, text, tmp_path / "out"), "--seconds", "1")
    assert result.exit_code == 1
    assert "tokens/s" not in result.output, "it is not loaded"
    check_names(str(result.exception), "25.6 kB", "cpu", "10.0 kB")
    for error in (torch.OutOfMemoryError("no room"), CaptureError("no room")):

        def failing(self: CaptureInputs, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(CaptureInputs, "teacher", failing)
        result = command(*options(teacher, text, tmp_path / "out"), "--seconds", "1")
        assert result.exit_code == 1
        check_names(result.output, *PRESETS)
        check_names(str(result.exception), "no room")

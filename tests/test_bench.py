"""The baseline against the published vectors, the tables' figures against hand computation, and the command."""

from __future__ import annotations

import csv
import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distillkit.bench.fidelity import Figures, compare, figures, least_squares, optimum
from distillkit.bench.learned import learn_presets
from distillkit.bench.machine import machine
from distillkit.bench.published import is_resolved, published_codec
from distillkit.bench.sample import Sample, bundled_sample, load_sample, save_sample
from distillkit.bench.speed import PACKED_ROWS, measure_decoding
from distillkit.bench.tables import csv_rows, write_csv
from distillkit.codec import Codec, Prior, preset
from distillkit.codec.presets import COMPACT_PRESETS, FIXED_PRESETS
from distillkit.errors import InputError
from distillkit.shards import ShardWriter
from distillkit.types import SparseLogprobs
from support import reference
from support.cli import run, run_here
from support.golden import CASES, HALF_ULP, golden, published_tolerance
from support.refusals import check_names, refused
from support.shards import CODEC, HEADER, VOCAB


def test_baseline_is_the_published_codec(subtests: pytest.Subtests) -> None:
    """It reads the recorded bytes as recorded, and its own lose as much as the recorded ones do."""
    for name in CASES:
        with subtests.test(case=name):
            check_baseline(*golden(name))


def check_baseline(codec: Codec, recorded: dict[str, np.ndarray[Any, Any]], data: np.ndarray[Any, Any]) -> None:
    baseline = published_codec(codec.config)
    ids, logprobs = baseline.decode(torch.from_numpy(data))
    np.testing.assert_array_equal(ids.numpy(), recorded["out_ids"])
    # Sums come out a little different with the order in which a machine adds, in the terms' type.
    tolerance = published_tolerance(codec, recorded)[1]
    tolerance += 2 * HALF_ULP[codec.config.term_dtype] * np.abs(recorded["out_logprobs"]).max()
    np.testing.assert_allclose(logprobs.numpy(), recorded["out_logprobs"], rtol=0, atol=tolerance)
    exact_k = codec.config.exact_k
    np.testing.assert_array_equal(logprobs.numpy()[:, :exact_k], recorded["out_logprobs"][:, :exact_k])

    original = torch.from_numpy(recorded["in_logprobs"].astype(np.float32))
    written = baseline.encode(torch.from_numpy(recorded["in_ids"].astype(np.int64)), original)
    assert tuple(written.shape) == data.shape
    descending = original.sort(descending=True).values.numpy()
    own = reference.kl_with_missing(descending, baseline.decode(written)[1].numpy()).mean()
    theirs = reference.kl_with_missing(descending, recorded["out_logprobs"]).mean()
    if is_resolved(codec.config):
        assert theirs / 1.25 - 1e-9 <= own <= 1.25 * theirs + 1e-9
    else:
        # Its coefficients are rounding errors, which differ from machine to machine.
        least = reference.kl_with_missing(descending, optimum(codec.config, descending)).mean()
        assert least <= min(own, theirs)


def test_baseline_takes_dense_logits() -> None:
    config = preset("recommended", vocab_size=400)
    logits = torch.randn(5, 400, generator=torch.Generator().manual_seed(0)) * 3
    baseline = published_codec(config)
    exact = torch.log_softmax(logits.double(), -1).topk(128)
    ids, logprobs = Codec(config).decode(baseline.encode_logits(logits).numpy())
    np.testing.assert_array_equal(ids, exact.indices.numpy())
    np.testing.assert_allclose(logprobs[:, :16], exact.values[:, :16].numpy(), rtol=2**-8)


def test_figures_by_hand() -> None:
    """Two rows of two ids: one decoded as it is, one with the probabilities 3/4 and 1/4 swapped."""
    original = np.log([[0.5, 0.25], [0.75, 0.25]])
    decoded = np.log([[0.5, 0.25], [0.25, 0.75]])
    swapped = 0.75 * math.log(3) - 0.25 * math.log(3)
    expected = Figures(
        kl_mean=swapped / 2,
        kl_p99=0.99 * swapped,
        kl_max=swapped,
        mass_error=0.0,
        mass_above_one=0.0,
        top1_agreement=0.5,
        worst_error=math.log(3),
        worst_likely=math.log(3),
        increasing=0.5,
    )
    assert vars(figures(original, decoded)) == pytest.approx(vars(expected), abs=1e-12)
    # A second row of mass 1.25, and an error of 5 nats where there is next to nothing.
    found = figures(np.log([[0.5, 1e-7]]), np.log([[1.25, 1e-7 / math.exp(5)]]))
    assert (found.mass_above_one, found.worst_error) == (1.0, pytest.approx(5.0))
    assert found.worst_likely == pytest.approx(math.log(2.5))
    assert found.mass_error == pytest.approx(0.75, abs=1e-6)


def test_limits_of_a_layout() -> None:
    """No coefficients near the optimum are better; two ranks and two terms are fitted exactly."""
    sample = bundled_sample().first(40)
    config = preset("budget", vocab_size=sample.vocab_size)
    _, original = sample.top(config.k, config.d)
    best, fitted = optimum(config, original), least_squares(config, original)
    least = reference.kl_with_missing(original, best)
    assert (least <= reference.kl_with_missing(original, fitted) + 1e-9).all()
    np.testing.assert_array_equal(best[:, :1], original[:, :1])
    # With a constant among the terms, the optimum keeps the mass.
    np.testing.assert_allclose(np.exp(best).sum(-1), np.exp(original.astype(np.float64)).sum(-1), atol=1e-4)
    t = np.arange(49.0)
    for change in (np.sqrt(t), t / 49, np.ones(49)):
        for size in (-0.02, 0.02):
            moved = best.copy()
            moved[:, 1:] += size * change
            assert (reference.kl_with_missing(original, moved) >= least - 1e-7).all()

    exact = codec_of(k=3, exact_k=1, polynomial_terms=[0, 1])
    np.testing.assert_allclose(optimum(exact.config, original[:, :3]), original[:, :3], atol=1e-4)
    np.testing.assert_allclose(least_squares(exact.config, original[:, :3]), original[:, :3], atol=1e-6)


def codec_of(**fields: Any) -> Codec:
    return Codec({"d": 49_152, "residual_bins": [], "delta_encoding": False, **fields})


def test_a_row_of_the_table(tmp_path: Path) -> None:
    sample = bundled_sample().first(64)
    row = compare("recommended", preset("recommended", vocab_size=300), sample)  # smaller than the sample's ids
    assert row.ours is not None
    assert row.published is not None
    assert row.optimum is not None
    assert row.over_optimum is not None
    assert row.rows == 64
    assert 0.98 < row.over_optimum < 1.2
    # The published encoder's figure depends on rounding errors: compare with its best.
    spread = row.published_spread
    assert spread is not None
    assert spread.normalized is not None
    assert spread.least <= min(spread.one_thread, spread.all_threads)
    assert max(spread.one_thread, spread.all_threads) <= spread.most
    assert row.ours.kl_mean < spread.normalized < spread.least < 0.75 * spread.most
    assert compare("budget", preset("budget", vocab_size=300), sample).published_spread is None
    bins = [{"scale_dtype": "float32", "element_bits": 8, "num_elements": 4}]
    delta = compare("delta", codec_of(k=8, exact_k=4, residual_bins=bins).config, sample)
    assert (delta.optimum, delta.least_squares) == (None, None)
    skipped = compare("wide", codec_of(k=200, exact_k=200).config, sample)
    assert skipped.skipped
    check_names(skipped.note, "200", "128")
    rows = [row, delta, skipped]
    write_csv(tmp_path / "results" / "table.csv", csv_rows(rows, {"machine": machine()}))
    with (tmp_path / "results" / "table.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["config"] for line in lines] == ["recommended", "delta", "wide"]
    assert float(lines[0]["published_spread_least"]) == pytest.approx(spread.least, rel=1e-5)
    assert {line["machine"] for line in lines} == {machine()}


def test_samples_of_files_and_datasets(tmp_path: Path) -> None:
    sample = bundled_sample()
    assert (len(sample), sample.k) == (512, 128)
    assert (np.diff(sample.logprobs) <= 0).all()
    save_sample(tmp_path / "own.npz", Sample(sample.ids[:9, ::-1], sample.logprobs[:9, ::-1], 49_152, "own rows"))
    own = load_sample(tmp_path / "own.npz")
    np.testing.assert_array_equal(own.ids, sample.ids[:9])
    np.testing.assert_array_equal(own.logprobs, sample.logprobs[:9])
    assert (own.about, own.vocab_size, own.caution) == ("own rows", 49_152, "")
    np.savez(tmp_path / "other.npz", tokens=np.zeros(3))
    with refused(InputError, "other.npz", "ids", "logprobs", "tokens"):
        load_sample(tmp_path / "other.npz")
    with ShardWriter(tmp_path / "captured", HEADER) as writer:
        values = np.tile(np.log([0.6, 0.1, 0.08, 0.06, 0.05, 0.04]), (9, 1)).astype(np.float32)
        ids = np.tile(np.arange(6), (9, 1))
        writer.write(np.arange(10), SparseLogprobs(ids, values))
    captured = load_sample(tmp_path / "captured")
    assert (len(captured), captured.k, captured.vocab_size) == (9, CODEC.k, VOCAB)
    assert captured.caution, "its rows were rounded before: fidelity on them looks better than it is"
    check_names(captured.about, "a teacher", "captured")


def test_ids_are_made_to_fit_a_small_vocabulary() -> None:
    ids, _ = bundled_sample().top(100, 130)
    assert ids.max() < 130
    assert (np.diff(np.sort(ids)) > 0).all()


def test_compact_presets_are_measured_on_documents_that_their_priors_do_not_know() -> None:
    sample = bundled_sample()
    learned, skipped = learn_presets(sample, sample.vocab_size)
    assert [each.name for each in learned] == list(COMPACT_PRESETS)
    assert not skipped
    for each in learned:
        row, config = each.fidelity(), each.codec.config
        assert each.learned_rows + each.rows == len(sample)
        known = {ids.tobytes() for ids in sample.ids[:, : each.codec.k]}
        held_out = {ids.tobytes() for document in each.documents for ids in np.ascontiguousarray(document.ids)}
        assert held_out <= known
        others = np.array([ids.tobytes() not in held_out for ids in sample.ids[:, : each.codec.k]])
        rows = SparseLogprobs(sample.ids[others, : each.codec.k], sample.logprobs[others, : each.codec.k])
        again = Codec(config, prior=Prior.learn(config, rows))
        assert again.prior == each.codec.prior
        size = kl = 0.0
        for document in each.documents:
            data = again.encode_document(document)
            decoded = again.decode_document(data, len(document.ids))
            size += len(data)
            for n in range(len(document.ids)):
                count = int(np.isfinite(decoded.logprobs[n]).sum())
                # Ids of values that are stored alike may change places.
                values = dict(zip(document.ids[n, :count].tolist(), document.logprobs[n], strict=False))
                original = np.array([[values[each] for each in decoded.ids[n, :count].tolist()]])
                kl += reference.kl_with_missing(original, decoded.logprobs[n : n + 1, :count])[0]
        assert row.bytes_per_token == size / row.rows
        assert row.ours is not None
        assert row.ours.kl_mean == pytest.approx(kl / row.rows, rel=1e-6)
        assert row.ours.top1_agreement == 1
        assert np.isfinite(row.ours.worst_error)
    assert max(each.ids_mean for each in learned) == 128 > learned[2].ids_mean > 1
    # One document is not enough, and a preset may store more ids than there are.
    few = Sample(sample.ids[:1, :60], sample.logprobs[:1, :60], sample.vocab_size, "one row")
    learned, skipped = learn_presets(few, sample.vocab_size)
    assert not learned
    assert [row.config for row in skipped] == list(COMPACT_PRESETS)
    check_names(skipped[0].note, "128", "60")


@pytest.mark.slow
def test_decoding_of_a_preset_is_timed() -> None:
    (row,) = measure_decoding(bundled_sample(), ["compact"], vocab_size=5000, seconds=0.01)
    assert (row.work, row.rows) == ("decode compact", PACKED_ROWS)
    assert row.bytes_per_token == Codec(preset("compact", vocab_size=5000)).bytes_per_token
    assert row.tokens_per_second > 0


def test_bench_shows_both_tables(tmp_path: Path) -> None:
    result = run_here("bench", "--quick", "--json", "--vocab-size", "5000")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert [row["config"] for row in found["fidelity"]] == [*FIXED_PRESETS, *COMPACT_PRESETS]
    assert found["sample"]["rows"] == 256
    for row in found["fidelity"][: len(FIXED_PRESETS)]:
        # Residual bins have no such limit.
        if FIXED_PRESETS[row["config"]]["residual_bins"]:
            assert row["over_optimum"] is None
            assert 0 < row["ours"]["kl_mean"] < row["published"]["kl_mean"]
        else:
            assert 0.9 < row["over_optimum"] < 1.2
    works = [row["work"] for row in found["speed"]]
    assert works[:4] == ["encode recommended", "decode recommended", "encode budget", "decode budget"]
    assert works[10:] == [f"{work} {name}, one core" for name in COMPACT_PRESETS for work in ("encode", "decode")]
    for row in found["speed"]:
        assert row["tokens_per_second"] > 0
        assert row["limit"] > 0
        assert (row["ratio"] is None) == (row["work"].startswith("shard") or "compact-" in row["work"])


def test_without_torch_bench_shows_what_ours_keeps(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['torch'] = None")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    table = run("bench", "--quick", PYTHONPATH=path)
    assert table.returncode == 0, table.stderr
    check_names(table.stdout, *FIXED_PRESETS, *COMPACT_PRESETS, "distillkit[capture]")
    found = json.loads(run("bench", "--quick", "--json", PYTHONPATH=path).stdout)
    assert found["speed"] == []
    for row, name in zip(found["fidelity"], FIXED_PRESETS, strict=False):
        codec = Codec(preset(name, vocab_size=bundled_sample().vocab_size))
        ids, original = bundled_sample().first(256).top(codec.k, codec.vocab_size)
        decoded = codec.decode(codec.encode(ids, original))[1]
        assert row["ours"] == pytest.approx(asdict(figures(original, decoded)))
        assert (row["published"], row["optimum"]) == (None, None)

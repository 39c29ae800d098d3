"""Figures of a dataset against the same ones worked out plainly from the rows."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from distillkit.bench.sample import bundled_sample
from distillkit.codec import Codec, DistributionQuantizationConfig
from distillkit.codec.fidelity import FidelityStats
from distillkit.errors import ConfigError, InputError, MismatchError
from distillkit.reports.inspection import inspect_dataset, recompute_fidelity
from distillkit.reports.inspection_plots import plot_inspection
from distillkit.shards import Dataset, Header, ShardWriter
from distillkit.types import SparseLogprobs
from support.refusals import check_names, refused
from support.shards import HEADER, VOCAB, make_documents, write
from support.training import random_documents, save_student, teacher_rows

GOLDEN = Path(__file__).parent / "golden"
TEACHER_VOCAB, K = 64, 8


def captured(folder: Path, teacher: Path, *, codec: Codec, header: dict[str, Any] | None = None) -> Dataset:
    """Six documents as the teacher in that folder sees them."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    described = Header(codec=codec.to_dict(), vocab_size=TEACHER_VOCAB, head_size=TEACHER_VOCAB, **(header or {}))
    with ShardWriter(folder, described, shard_tokens=60) as writer:
        for ids in random_documents(6):
            rows = teacher_rows(model, ids, k=K)
            writer.write(ids, SparseLogprobs(np.asarray(rows.ids), np.asarray(rows.logprobs)))
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_student(tmp_path_factory.mktemp("models") / "teacher", seed=7))


def quantized(**fields: Any) -> Codec:
    plain = {"residual_bins": [], "delta_encoding": False, "exact_dtype": "float32"}
    return Codec(DistributionQuantizationConfig(d=TEACHER_VOCAB, k=K, **{**plain, **fields}))


def test_masses_and_curves_are_those_of_the_rows(tmp_path: Path) -> None:
    write(tmp_path / "data", make_documents(12))
    dataset = Dataset.open(tmp_path / "data")
    inspection = inspect_dataset(dataset)
    rows = [dataset.codec.decode_document(document.teacher, document.num_rows).logprobs for document in dataset]
    logprobs = np.concatenate([np.asarray(part, dtype=np.float64) for part in rows])
    masses = np.exp(logprobs).sum(-1)
    assert inspection.rows_read == len(logprobs) == inspection.mass_histogram.sum()
    assert inspection.mass_mean == pytest.approx(masses.mean())
    # Masked documents are in two segments, the first of one token: no token before the third is predicted.
    documents = make_documents(12)
    counted = [extra["loss_mask"][2:].sum() if extra else len(ids) - 1 for ids, _, extra in documents]
    assert inspection.counted == sum(counted)
    for found, share in ((inspection.mass_p1, 1), (inspection.mass_p50, 50)):
        assert found == pytest.approx(np.percentile(masses, share, method="inverted_cdf"), abs=2e-4)
    np.testing.assert_allclose(inspection.logprob_mean, logprobs.mean(0))
    expected = np.percentile(logprobs, (10, 50, 90), axis=0, method="inverted_cdf")
    np.testing.assert_allclose(inspection.logprob_quantiles, expected, atol=0.051)
    assert inspection.file_bytes == sum(path.stat().st_size for path in (tmp_path / "data").glob("*.parquet"))
    assert inspection.total_bytes * inspection.rows == pytest.approx(inspection.file_bytes)


def test_ranks_that_no_row_has_have_no_figures(tmp_path: Path) -> None:
    sample = bundled_sample()
    codec = Codec({"vocab_size": sample.vocab_size, "k": 8, "step": 0.01, "threshold": 0.2})
    header = Header(codec=codec.to_dict(), vocab_size=sample.vocab_size, head_size=sample.vocab_size)
    with ShardWriter(tmp_path, header) as writer:
        rows = SparseLogprobs(sample.ids[:40].copy(), sample.logprobs[:40].copy())
        writer.write(np.append(0, rows.ids[:, 0]).astype(np.int32), rows)
    inspection = inspect_dataset(Dataset.open(tmp_path))
    # At most five ids have a probability of 0.2.
    assert np.isnan(inspection.logprob_mean[5:]).all()
    assert np.isnan(inspection.logprob_quantiles[:, 5:]).all()
    median = np.sort(sample.logprobs[:40, 0])[19]
    assert inspection.logprob_quantiles[1, 0] == pytest.approx(median, abs=0.06)
    assert inspection.origin == "written by distillkit"


def test_the_worst_documents_are_those_with_the_least_mass(tmp_path: Path) -> None:
    write(tmp_path / "data", make_documents(12))
    dataset = Dataset.open(tmp_path / "data")
    masses = []
    for number, document in enumerate(dataset):
        rows = dataset.codec.decode_document(document.teacher, document.num_rows)
        if document.num_rows:
            mass = np.exp(np.asarray(rows.logprobs, dtype=np.float64)).sum(-1).mean()
            masses.append((mass, number, document.doc_id, document.num_rows))
    found = inspect_dataset(dataset).to_dict()["worst_documents"]
    expected = sorted(masses)[:10]
    assert [each["mass"] for each in found] == pytest.approx([mass for mass, *_ in expected])
    assert [(each["document"], each["doc_id"], each["rows"]) for each in found] == [
        tuple(rest) for _, *rest in expected
    ]
    sampled = inspect_dataset(dataset, sample=3).to_dict()["worst_documents"]
    assert {each["document"] for each in sampled} <= {0, 6, 11, 5}


def test_a_sample_is_evenly_spread(tmp_path: Path) -> None:
    """Documents of a length of their own, so that the rows tell which were taken."""
    lengths = [2 ** (index + 1) + 1 for index in range(5)]
    rows = SparseLogprobs(np.tile(np.arange(6), (40, 1)), np.full((40, 6), -2.0, np.float32))
    with ShardWriter(tmp_path / "data", HEADER, shard_tokens=20) as writer:
        for length in lengths:
            part = SparseLogprobs(rows.ids[: length - 1], rows.logprobs[: length - 1])
            writer.write(np.arange(length) % VOCAB, part)
    dataset = Dataset.open(tmp_path / "data")
    inspection = inspect_dataset(dataset, sample=3)
    assert (inspection.documents, inspection.documents_read) == (5, 3)
    assert inspection.rows_read == 2 + 8 + 32
    assert inspection.rows == 2 + 4 + 8 + 16 + 32
    assert inspect_dataset(dataset, sample=99).documents_read == 5
    with refused(ConfigError, "sample", "1", "0"):
        inspect_dataset(dataset, sample=0)


def test_nothing_stored_is_said_and_not_divided_by(tmp_path: Path) -> None:
    nothing = SparseLogprobs(np.zeros((0, 6), np.int64), np.zeros((0, 6), np.float32))
    with ShardWriter(tmp_path / "data", HEADER) as writer:
        writer.write(np.array([5]), nothing)
    inspection = inspect_dataset(Dataset.open(tmp_path / "data"))
    assert (inspection.rows, inspection.alignment) == (0, "undecided")
    assert inspection.to_dict()["mass"] is None
    with refused(InputError, str(tmp_path / "data")):
        plot_inspection(inspection, tmp_path / "plot.png")


def test_json_keys_are_stable() -> None:
    keys = (
        "path kind origin documents tokens rows files file_bytes documents_read rows_read bytes_per_token "
        "rate_by_entropy ids_per_row compression codec teacher tokenizer capture temperature rows_per_document "
        "vocab_size head_size mass plausibility counted next_token alignment worst_documents fidelity draws"
    )
    found = inspect_dataset(Dataset.open(GOLDEN / "upstream_v1")).to_dict()
    assert list(found) == keys.split()
    assert (found["kind"], found["origin"]) == ("published", "published dataset")
    assert found["plausibility"] == {"ok": True, "impossible": [], "doubts": []}
    assert set(found["alignment"]) == {"rates", "positions", "verdict", "ok"}
    assert set(found["alignment"]["rates"]) == {"-1", "0", "+1"}


@pytest.mark.parametrize("source", ["upstream_v1", "upstream_legacy", "recorded"])
def test_plots_are_pictures(source: str, tmp_path: Path) -> None:
    if source == "recorded":
        write(tmp_path / "data", make_documents(12))
    dataset = Dataset.open(tmp_path / "data" if source == "recorded" else GOLDEN / source)
    assert (dataset.header.fidelity is not None) == (source == "recorded")
    plot_inspection(inspect_dataset(dataset), tmp_path / "plot.png")
    from matplotlib.image import imread

    pixels = imread(tmp_path / "plot.png")
    assert pixels.shape[:2] == (624, 1800)
    # Something is drawn in each of the three panels.
    for panel in np.array_split(pixels[..., :3], 3, axis=1):
        assert (panel < 0.9).any(-1).mean() > 0.02


def test_plotting_leaves_matplotlibs_state_alone() -> None:
    """No pyplot, which would choose a display, and no matplotlib at all before something is drawn."""
    program = (
        "import sys\n"
        "from distillkit.reports.inspection_plots import plot_inspection\n"
        "assert not [name for name in sys.modules if name.startswith(('matplotlib', 'torch'))]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# -- fidelity, computed again ------------------------------------------------------------------------------------------


def test_fidelity_computed_again_is_what_the_writer_recorded(teacher: Path, tmp_path: Path) -> None:
    dataset = captured(tmp_path / "data", teacher, codec=quantized(exact_k=1, polynomial_terms=[0, 1]))
    recorded = FidelityStats.from_dict(dataset.header.fidelity or {})
    again = recompute_fidelity(dataset, str(teacher), sample=99)
    assert again.rows == recorded.rows
    assert recorded.kl_mean > 1e-4
    for name in ("kl_mean", "kl_max", "worst_error", "top1_agreement", "mass_error"):
        assert getattr(again, name) == pytest.approx(getattr(recorded, name), rel=1e-3), name
    np.testing.assert_allclose(again.by_rank()["rms_error"], recorded.by_rank()["rms_error"], rtol=1e-3, atol=1e-6)


def test_fidelity_of_swapped_and_strange_ids(teacher: Path, tmp_path: Path) -> None:
    """Stored ids may stand in another order than the teacher's now; a row with an id that it gives no chance to is
    left out."""
    codec = quantized(exact_k=K, polynomial_terms=[])
    source = captured(tmp_path / "data", teacher, codec=codec)
    with ShardWriter(tmp_path / "changed", replace(source.header, fidelity=None)) as writer:
        for document in source:
            rows = codec.decode_document(document.teacher, document.num_rows)
            ids, logprobs = np.array(rows.ids), np.array(rows.logprobs)
            ids[:, [-2, -1]] = ids[:, [-1, -2]]
            # Of the first row: the id of lowest probability in place of the last.
            absent = _least_probable(teacher, document.input_ids)[0]
            ids[0, -1] = absent
            writer.write(document.input_ids, SparseLogprobs(ids, logprobs))
    stats = recompute_fidelity(Dataset.open(tmp_path / "changed"), str(teacher), sample=99)
    assert stats.rows == source.num_rows - len(source)
    rms = stats.by_rank()["rms_error"]
    assert (rms[:-2] < 1e-5).all()
    assert rms[-1] == pytest.approx(rms[-2], rel=1e-3)


def _least_probable(teacher: Path, input_ids: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(teacher).eval()
    with torch.no_grad():
        return model(torch.tensor(input_ids[None]).long()).logits[0].argmin(-1).numpy()


def test_another_teacher_is_refused(teacher: Path, tmp_path: Path) -> None:
    dataset = captured(tmp_path / "data", teacher, codec=quantized(exact_k=K, polynomial_terms=[]))
    other = save_student(tmp_path / "other", seed=8)
    with refused(MismatchError, other, f"{dataset.num_rows}"):
        recompute_fidelity(dataset, other)
    with refused(MismatchError, "70", "64"):
        recompute_fidelity(dataset, save_student(tmp_path / "wide", vocabulary=70))
    hot = captured(tmp_path / "hot", teacher, codec=dataset.codec, header={"temperature": 2.0})
    with refused(InputError, "2.0"):
        recompute_fidelity(hot, str(teacher))
    double = captured(
        tmp_path / "double", teacher, codec=dataset.codec, header={"teacher": {"name": "t", "dtype": "float64"}}
    )
    with refused(ConfigError, "'float64'"):
        recompute_fidelity(double, str(teacher))


def test_packed_documents_are_not_read_as_one(teacher: Path, tmp_path: Path) -> None:
    codec = quantized(exact_k=K, polynomial_terms=[])
    header = replace(HEADER, codec=codec.to_dict(), vocab_size=TEACHER_VOCAB, head_size=TEACHER_VOCAB)
    rows = SparseLogprobs(np.tile(np.arange(K), (9, 1)), np.full((9, K), -3.0, np.float32))
    with ShardWriter(tmp_path / "packed", header) as writer:
        writer.write(np.arange(10), rows, segment_lengths=np.array([4, 6]))
    dataset = Dataset.open(tmp_path / "packed")
    with refused(InputError, str(tmp_path / "packed"), dataset[0].doc_id):
        recompute_fidelity(dataset, str(teacher))


def test_rows_that_do_not_fit_the_teacher_are_counted(
    teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows with wrong ids are left out of the figures, so their number must be said, and most of them refused."""
    codec = quantized(exact_k=K, polynomial_terms=[])
    source = captured(tmp_path / "data", teacher, codec=codec)

    def with_wrong_ids(name: str, step: int) -> Dataset:
        with ShardWriter(tmp_path / name, replace(source.header, fidelity=None)) as writer:
            for document in source:
                rows = codec.decode_document(document.teacher, document.num_rows)
                ids = np.array(rows.ids)
                ids[::step, -1] = _least_probable(teacher, document.input_ids)[: len(ids) : step]
                writer.write(document.input_ids, SparseLogprobs(ids, np.array(rows.logprobs)))
        return Dataset.open(tmp_path / name)

    some = recompute_fidelity(with_wrong_ids("some", 4), str(teacher), sample=99)
    assert 0 < some.rows < source.num_rows
    check_names(caplog.text, f"{source.num_rows - some.rows} of {source.num_rows} rows")
    with refused(MismatchError, str(teacher), f"{source.num_rows} of {source.num_rows} rows"):
        recompute_fidelity(with_wrong_ids("all", 1), str(teacher), sample=99)

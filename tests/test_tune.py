"""`distillkit-codec tune`: its criterion, what it learns from and measures on, and what it chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distillkit.bench.sample import Sample, load_sample, save_sample
from distillkit.bench.tune import Split, dropped_kl
from distillkit.codec import Codec, codec_config, sparse_from_logits
from distillkit.errors import InputError
from distillkit.shards.published import load_codec_config
from support.cli import run_here
from support.refusals import refused
from support.shards import make_documents, write


def test_dropped_ids_cost_what_spreading_their_mass_evenly_does() -> None:
    """Against the divergence written out over the whole vocabulary, with only the sample's ids told apart."""
    size, width = 40, 12
    generator = np.random.default_rng(0)
    p_RV = -np.sort(-generator.dirichlet(np.full(size, 0.2), 5), axis=-1)
    found = dropped_kl(np.log(p_RV[:, :width]), size)
    for n in range(width + 1):
        q_RV = np.where(np.arange(size) < n, p_RV, p_RV[:, n:].sum(-1, keepdims=True) / (size - n))
        p, q = (np.concatenate([v[:, :width], v[:, width:].sum(-1, keepdims=True)], -1) for v in (p_RV, q_RV))
        np.testing.assert_allclose(found[:, n], (p * np.log(p / q)).sum(-1), rtol=1e-5, atol=1e-9)


def test_priors_never_see_the_documents_that_are_measured() -> None:
    rows = 230
    ids = np.arange(rows * 4).reshape(rows, 4)
    documents = np.repeat(np.arange(23), 10)
    sample = Sample(ids, np.full((rows, 4), -2, np.float32), 1000, "rows", documents=documents)
    split = Split.of(sample)
    learned = set(documents[split.learned.ids[:, 0] // 4])
    held_out = [set(documents[part.ids[:, 0] // 4]) for part in split.held_out]
    assert all(len(each) == 1 for each in held_out)
    assert not learned & set.union(*held_out)
    assert len(learned) + len(held_out) == 23
    with refused(InputError, "1 (230 rows)"):
        Split.of(replace(sample, documents=np.zeros(rows, np.int64)))


def test_the_documents_of_a_dataset_are_known(tmp_path: Path) -> None:
    documents = make_documents(12)
    write(tmp_path / "captured", documents)
    captured = load_sample(tmp_path / "captured")
    save_sample(tmp_path / "saved.npz", captured)
    numbers = load_sample(tmp_path / "saved.npz").documents
    assert numbers is not None
    np.testing.assert_array_equal(numbers, captured.documents)
    assert np.bincount(numbers).tolist() == [len(rows.ids) for _, rows, _ in documents]
    result = run_here("tune", str(tmp_path / "captured"), "--bytes", "12")
    assert result.returncode == 0, result.stderr
    assert "9 documents" in result.stdout
    assert "→ compact, " in result.stdout


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sample") / "sample.npz"
    logits = np.random.default_rng(0).standard_normal((600, 400), dtype=np.float32) * 3
    rows = sparse_from_logits(logits, 32)
    save_sample(path, Sample(rows.ids, rows.logprobs, 400, "drawn rows"))
    return path


@pytest.mark.parametrize(
    ("option", "most", "measure", "least"),
    [("--bytes", 24, "bytes_per_row", "kl"), ("--kl", 0.3, "kl", "bytes_per_row")],
)
def test_it_chooses_the_best_within_a_limit(
    tmp_path: Path, sample: Path, option: str, most: float, measure: str, least: str
) -> None:
    file, plot = tmp_path / "codec.yaml", tmp_path / "front.png"
    arguments = [str(sample), "--k", "24", option, str(most), "--stored-kl", "0.01", "--json"]
    found = json.loads(run_here("tune", *arguments, "--write", str(file), "--plot", str(plot)).stdout)
    everything = [*found["front"], *found["others"]]
    fitting = [each for each in everything if each[measure] <= most]
    assert found["chosen"] in fitting
    assert found["chosen"][least] == min(each[least] for each in fitting)
    if option == "--bytes":
        assert found["chosen"][measure] > 0.9 * most
    assert found["learned"]["rows"] + found["measured"]["rows"] == len(load_sample(sample))
    chosen = load_codec_config(file)
    assert chosen.model_dump(mode="json") == found["chosen"]["config"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    for each in everything:
        assert each["kl_stored"] <= 0.01
        assert each["kl"] >= each["kl_stored"] - 1e-9
        if each["format"] == "quantized":
            assert each["bytes_per_row"] == Codec(codec_config(each["config"])).bytes_per_token


def test_limits_that_cannot_be_met_are_refused_with_the_nearest(tmp_path: Path, sample: Path) -> None:
    result = run_here("tune", str(sample), "--k", "8", "--bytes", "1")
    assert result.returncode == 1
    assert "at most 1 bytes" in result.stderr
    result = run_here("tune", str(sample), "--write", str(tmp_path / "codec.yaml"))
    assert result.returncode == 2
    assert "--bytes" in result.stderr

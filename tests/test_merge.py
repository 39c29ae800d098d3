"""Averages of several captures of the same documents, against float64 sums over whole vocabularies."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from distillkit.cli.main import cli
from distillkit.codec import (
    Codec,
    CompactConfig,
    DistributionQuantizationConfig,
    SampledConfig,
    draws_from_logits,
    uniforms,
)
from distillkit.errors import ConfigError, InputError, MismatchError
from distillkit.shards import Dataset, Header, ShardWriter, merge
from distillkit.shards.merge import average_rows
from distillkit.types import SparseLogprobs
from support.refusals import check_names, refused

V = 40


def dense(seed: int, rows: int = 6, spread: float = 2.0) -> npt.NDArray[np.float64]:
    """Random distributions (rows, V)."""
    logits = np.random.default_rng(seed).normal(size=(rows, V)) * spread
    p = np.exp(logits)
    return p / p.sum(-1, keepdims=True)


def first(p: npt.NDArray[np.float64], k: int) -> SparseLogprobs:
    """The k most probable ids of distributions."""
    ids = np.argsort(-p, -1, kind="stable")[:, :k].astype(np.int64)
    return SparseLogprobs(ids, np.log(np.take_along_axis(p, ids, -1)).astype(np.float32))


def spelled_out(rows: SparseLogprobs) -> list[dict[int, float]]:
    """Probabilities by id, of each row."""
    return [
        {i: math.exp(v) for i, v in zip(ids, values, strict=True) if v > -math.inf}
        for ids, values in zip(rows.ids.tolist(), rows.logprobs.tolist(), strict=True)
    ]


def truth(sources: list[npt.NDArray[np.float64]], shares: list[float], average: str) -> npt.NDArray[np.float64]:
    if average == "probabilities":
        return sum(w * p for w, p in zip(shares, sources, strict=True))  # type: ignore[return-value]
    log_mean = sum(w * np.log(p) for w, p in zip(shares, sources, strict=True))
    mean = np.exp(log_mean)
    return np.asarray(mean / mean.sum(-1, keepdims=True))


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@given(
    ks=st.lists(st.sampled_from([1, 3, 8, V - 1, V]), min_size=2, max_size=3),
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.3, 2.0, 6.0]),
    weights=st.lists(st.floats(0.05, 20), min_size=3, max_size=3),
)
def test_rows_are_the_average_within_the_bound(
    average: Any, ks: list[int], seed: int, spread: float, weights: list[float]
) -> None:
    """Exactly that of dense rows where all ids are stored; else as near as the uncertainty says."""
    sources = [dense(seed + number, spread=spread) for number in range(len(ks))]
    used = weights[: len(ks)]
    shares = [weight / sum(used) for weight in used]
    found = average_rows([first(p, k) for p, k in zip(sources, ks, strict=True)], used, average, V)
    expected = truth(sources, shares, average)
    assert (found.rows.logprobs[:, 1:] <= found.rows.logprobs[:, :-1]).all()
    for row, stored in enumerate(spelled_out(found.rows)):
        kept = [set(np.argsort(-p[row], kind="stable")[:k].tolist()) for p, k in zip(sources, ks, strict=True)]
        union, common = set.union(*kept), set.intersection(*kept)
        bound = float(found.uncertainty[row]) + 1e-6
        missing = [1 - p[row][list(ids)].sum() for p, ids in zip(sources, kept, strict=True)]
        assert set(stored) <= union
        if average == "probabilities":
            assert 1 - sum(stored.values()) == pytest.approx(np.dot(shares, missing), abs=1e-5)
            assert all(stored[i] <= expected[row, i] + 1e-6 for i in union)
            assert sum(expected[row, i] - stored[i] for i in union) <= bound
            assert all(stored[i] == pytest.approx(expected[row, i], rel=1e-5) for i in common)
        else:
            rest = 1 - sum(stored.values()) - (1 - expected[row, list(union)].sum())
            distance = 0.5 * (sum(abs(stored.get(i, 0.0) - expected[row, i]) for i in union) + abs(rest))
            assert distance <= bound
            for i in common:
                ratio = stored[i] / expected[row, i]
                assert 1 - bound - 1e-5 <= ratio <= 1 / max(1 - bound, 1e-9) + 1e-5
        if min(ks) == V:
            assert found.uncertainty[row] == pytest.approx(0, abs=1e-5)
            assert all(stored[i] == pytest.approx(expected[row, i], rel=2e-5) for i in range(V))


def test_logits_of_ids_that_a_teacher_does_not_store() -> None:
    """By hand, in two rows: V = 6. In the second, nothing is missing of the first teacher, as far as float32 tells:
    what it does not store has 1e-6 together."""
    one = SparseLogprobs(np.array([[0, 1], [0, 1]]), np.log(np.array([[0.5, 0.3], [0.5, 0.5]], np.float32)))
    two = SparseLogprobs(np.array([[1, 2], [1, 2]]), np.log(np.array([[0.6, 0.2], [0.6, 0.2]], np.float32)))
    found = average_rows([one, two], [1, 3], "logits", 6)
    for row, (p, others) in enumerate((((0.5, 0.3), 0.05), ((0.5, 0.5), 0.25e-6))):
        g = {0: p[0] ** 0.25 * 0.05**0.75, 1: p[1] ** 0.25 * 0.6**0.75, 2: others**0.25 * 0.2**0.75}
        rest = 3 * others**0.25 * 0.05**0.75
        z = sum(g.values()) + rest
        assert spelled_out(found.rows)[row] == pytest.approx({i: value / z for i, value in g.items()}, rel=1e-4)
        assert float(found.rows.missing_mass()[row]) == pytest.approx(rest / z, rel=1e-3)
        assert found.log_z[row] == pytest.approx(math.log(z), rel=1e-4)
        outside = (1 - p[1] + 1e-6) ** 0.25 * (0.4 + 1e-6) ** 0.75
        assert found.uncertainty[row] == pytest.approx(outside / (g[1] + outside), rel=1e-4)


# -- datasets ----------------------------------------------------------------------------------------------------------


def exact(k: int) -> Codec:
    return Codec(
        DistributionQuantizationConfig(
            d=V, k=k, exact_k=k, exact_dtype="float32", residual_bins=[], delta_encoding=False
        )
    )


TOKENS = [np.random.default_rng(n).integers(0, V, 5 + n).astype(np.int32) for n in range(6)]


def captured(
    folder: Path, seed: int, order: list[int], *, k: int = 8, labels: bool = False, **header: Any
) -> tuple[Dataset, dict[int, npt.NDArray[np.float64]]]:
    """A capture of some documents by a random teacher, and its distributions by document."""
    codec, truths = exact(k), {}
    settings = {"tokenizer": {"name": "tok", "fingerprint": "f"}, "teacher": {"name": f"teacher-{seed}"}, **header}
    with ShardWriter(
        folder, Header(codec=codec.to_dict(), vocab_size=V, head_size=V, **settings), shard_tokens=20
    ) as writer:
        for number, document in enumerate(order):
            ids = TOKENS[document]
            p = truths[number] = dense(1000 * seed + document, len(ids) - 1)
            known = np.log(p[np.arange(len(p)), ids[1:]]).astype(np.float32) if labels else None
            writer.write(ids, first(p, k), label_logprobs=known, loss_mask=np.arange(len(ids)) > 1)
    return Dataset.open(folder), truths


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_documents_are_matched_by_content_and_resumed(tmp_path: Path, average: Any) -> None:
    """Whatever their order, and if one is there twice; with masks and the log-probabilities of next tokens."""
    one, truth_one = captured(tmp_path / "one", 1, [0, 1, 2, 3, 1], k=V, labels=True)
    two, truth_two = captured(tmp_path / "two", 2, [3, 1, 0, 1, 2], k=V, labels=True)
    partner = [2, 1, 4, 0, 3]
    output = tmp_path / "merged"
    report = merge([one, two], output, weights=[3, 1], average=average, config=exact(V).config, shard_tokens=12)
    merged = Dataset.open(output)
    assert (report.documents, report.rows, report.resumed_documents) == (5, one.num_rows, 0)
    assert report.uncertainty == pytest.approx(0, abs=1e-5)
    for number, (document, rows) in enumerate(merged.decoded()):
        expected = truth([truth_one[number], truth_two[partner[number]]], [0.75, 0.25], average)
        assert document.input_ids.tolist() == one[number].input_ids.tolist()
        assert document.loss_mask is not None
        assert document.loss_mask.tolist() == (np.arange(len(document.input_ids)) > 1).tolist()
        for row, stored in enumerate(spelled_out(rows)):
            assert [stored[i] for i in range(V)] == pytest.approx(expected[row].tolist(), rel=1e-4)
        labels = np.log(expected[np.arange(len(expected)), document.input_ids[1:]])
        assert document.label_logprobs is not None
        assert document.label_logprobs.tolist() == pytest.approx(labels.tolist(), abs=1e-4)
    recorded = merged.header.capture["merged"]
    assert recorded["average"] == average
    assert [(source["name"], source["weight"]) for source in recorded["sources"]] == [("one", 0.75), ("two", 0.25)]

    content = {path.name: path.read_bytes() for path in output.iterdir()}
    (output / "manifest.json").unlink()
    last = max(path for path in output.iterdir() if path.name.startswith("data-"))
    last.unlink()
    with refused(MismatchError, "capture.merged.sources"):
        merge([one, two], output, weights=[1, 1], average=average, config=exact(V).config, shard_tokens=12)
    again = merge([one, two], output, weights=[3, 1], average=average, config=exact(V).config, shard_tokens=12)
    assert again.resumed_documents > 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == content


def test_the_command_learns_a_prior_and_reports(tmp_path: Path) -> None:
    captured(tmp_path / "one", 1, [0, 1, 2, 3])
    captured(tmp_path / "two", 2, [0, 1, 2, 3, 4], k=12)
    compact = CompactConfig(vocab_size=V, k=14, step=0.01)
    config = tmp_path / "codec.yaml"
    config.write_text(json.dumps({"compact": compact.model_dump(exclude_none=True)}))
    places = [str(tmp_path / name) for name in ("one", "two", "merged")]
    options = ["--compression-config", str(config), "--weights", "2,1"]
    failed = CliRunner().invoke(cli, ["merge", *places, *options])
    assert isinstance(failed.exception, MismatchError) or failed.exit_code == 1
    result = CliRunner().invoke(cli, ["merge", *places, *options, "--common", "--json"], catch_exceptions=False)
    report = json.loads(result.stdout)
    assert report["documents"] == 4
    assert 8 <= report["ids"] <= 20
    assert 0 < report["uncertainty"] <= report["missing_mass"] < 1
    assert 0 < report["kl_mean"] < 0.01
    assert (tmp_path / "merged" / "prior.bin").is_file()
    rows = Dataset.open(tmp_path / "merged").decode(0)
    one, two = (Dataset.open(tmp_path / name).decode(0) for name in ("one", "two"))
    best = average_rows([one, two], [2, 1], "probabilities", V).rows
    assert (rows.ids[:, 0] == best.ids[:, 0]).mean() > 0.7


def test_what_cannot_be_averaged_is_refused_by_name(tmp_path: Path) -> None:
    one, _ = captured(tmp_path / "one", 1, [0, 1])
    same, _ = captured(tmp_path / "same", 2, [0, 1])
    fewer, _ = captured(tmp_path / "fewer", 2, [1])
    others, _ = captured(tmp_path / "others", 2, [3, 4])
    token, _ = captured(tmp_path / "token", 2, [0, 1], tokenizer={"name": "other", "fingerprint": "g"})
    hot, _ = captured(tmp_path / "hot", 2, [0, 1], temperature=2.0)
    for source, facts in (
        (token, ("token", "tok", "f", "other", "g")),
        (hot, ("hot", "temperature", "2.0")),
        (fewer, ("fewer", "1", "2", "0")),
    ):
        with refused(MismatchError, str(one.path), *facts):
            merge([one, source], tmp_path / "out")
    with refused(MismatchError, "others"):
        merge([one, others], tmp_path / "out", common=True)
    draws = Codec(SampledConfig(vocab_size=V, draws=9))
    with ShardWriter(tmp_path / "drawn", Header(codec=draws.to_dict(), vocab_size=V, head_size=V)) as writer:
        for ids in TOKENS[:2]:
            logits = np.log(dense(5, len(ids) - 1)).astype(np.float32)
            writer.write(ids, draws_from_logits(logits, uniforms(ids, len(logits), 9)))
    with refused(MismatchError, "drawn", "sampled"):
        merge([one, Dataset.open(tmp_path / "drawn")], tmp_path / "out")
    for weights, fact in (([1, 0], "0"), ([-1, 1], "-1"), ([1, math.nan], "nan"), ([1, math.inf], "inf"), ([1], "1")):
        with refused(ConfigError, fact):
            merge([one, same], tmp_path / "out", weights=weights)
    with refused(ConfigError, "1"):
        merge([one], tmp_path / "out")
    with refused(InputError, "same"):
        merge([one, same], same.path)
    assert not (tmp_path / "out").exists()
    wrong = CliRunner().invoke(cli, ["merge", str(one.path), str(same.path), str(tmp_path / "out"), "--weights", "2;1"])
    assert wrong.exit_code != 0
    check_names(wrong.output + str(wrong.exception), "2;1")

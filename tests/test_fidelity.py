"""Fidelity figures against the definition, whole and merged."""

from __future__ import annotations

import json

import numpy as np
import pytest

from distillkit.codec.fidelity import FidelityStats, kl_rows, values_of
from distillkit.errors import CorruptDataError, InputError
from distillkit.types import SparseLogprobs
from support import reference
from support.refusals import refused


def rows(count: int, k: int, noise: float, seed: int = 0) -> tuple[SparseLogprobs, SparseLogprobs]:
    generator = np.random.default_rng(seed)
    logits = np.sort(generator.standard_normal((count, k)) * 3)[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True)) - 0.05
    decoded = logprobs + generator.standard_normal((count, k)) * noise
    ids = np.tile(np.arange(k), (count, 1))
    return SparseLogprobs(ids, logprobs.astype(np.float32)), SparseLogprobs(ids, decoded.astype(np.float32))


@pytest.mark.parametrize("parts", [1, 7])
def test_figures_are_the_definition_however_they_are_split(parts: int) -> None:
    original, decoded = rows(1000, 12, 0.3)
    total = FidelityStats()
    for index in np.array_split(np.arange(1000), parts):
        part = FidelityStats()
        part.update(
            SparseLogprobs(original.ids[index], original.logprobs[index]),
            SparseLogprobs(decoded.ids[index], decoded.logprobs[index]),
        )
        total.merge(FidelityStats.from_dict(json.loads(json.dumps(part.to_dict()))))
    p, q = (np.asarray(part.logprobs, dtype=np.float64) for part in (original, decoded))
    kl = reference.kl_with_missing(p, q)
    assert total.rows == 1000
    assert total.kl_mean == pytest.approx(kl.mean(), rel=1e-9)
    assert total.kl_max == pytest.approx(kl.max(), rel=1e-12)
    exact = np.quantile(kl, 0.99, method="inverted_cdf")
    assert exact <= total.kl_p99 <= exact * 2 ** (1 / 16) * (1 + 1e-9)
    assert total.worst_error == np.abs(q - p).max()
    assert total.top1_agreement == (q.argmax(1) == 0).mean()
    assert total.mass_error == pytest.approx(np.abs(np.exp(q).sum(1) - np.exp(p).sum(1)).mean())
    by_rank = total.by_rank()
    np.testing.assert_allclose(by_rank["mean"], p.mean(0))
    np.testing.assert_allclose(by_rank["std"], p.std(0), rtol=1e-6)
    np.testing.assert_allclose(by_rank["rms_error"], np.sqrt(((q - p) ** 2).mean(0)))


def test_one_id_a_row_and_no_rows() -> None:
    stats = FidelityStats()
    assert stats.to_dict()["kl_mean"] is None
    stats.update(*rows(0, 4, 0.1))
    assert stats.rows == 0
    stats.update(*rows(5, 1, 0.1))
    original, decoded = rows(5, 1, 0.1)
    kl = reference.kl_with_missing(original.logprobs, decoded.logprobs)
    assert (stats.kl_mean, stats.top1_agreement) == (pytest.approx(kl.mean(), rel=1e-9), 1.0)


def test_the_missing_outcome_counts_by_hand() -> None:
    """p = (1/2, 1/4) leaves 1/4 for R; q = (1/4, 1/4) leaves 1/2: KL = ½ ln 2 + ¼ ln ½."""
    found = kl_rows(np.log([[0.5, 0.25]]), np.log([[0.25, 0.25]]))
    np.testing.assert_allclose(found, [0.25 * np.log(2)], rtol=1e-12)
    assert kl_rows(np.log([[0.5, 0.25]]), np.log([[0.5, 0.25]]))[0] < 1e-15


def test_values_are_looked_up_by_id() -> None:
    """Places without an id repeat the row's first one, and say nothing of it."""
    none = -np.inf
    logprobs = np.log(np.array([[0.5, 0.2, 0.1], [0.6, 0.3, 1.0]], np.float32))
    logprobs[1, 2] = none
    given = SparseLogprobs(np.array([[7, 0, 3], [2, 9, 2]]), logprobs)
    stored = SparseLogprobs(np.array([[3, 7, 3], [9, 5, 2]]), np.array([[-1, -1, none], [-1, -1, -1]], np.float32))
    values, known = values_of(given, stored)
    np.testing.assert_allclose(np.exp(values), [[0.1, 0.5, 0], [0.3, 0, 0.6]], rtol=1e-6)
    assert known.tolist() == [True, False]


def test_refusals() -> None:
    original, decoded = rows(3, 4, 0.1)
    with refused(InputError, "ids"):
        FidelityStats().update(original, SparseLogprobs(decoded.ids + 1, decoded.logprobs))
    with refused(CorruptDataError, "sums"):
        FidelityStats.from_dict({"rows": 1})

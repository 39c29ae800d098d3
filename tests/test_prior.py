"""Priors of the compact format, learned from rows of a teacher (rust/codec/src/compact/learn/)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest

from distillkit import _native
from distillkit.bench.sample import Sample, bundled_sample
from distillkit.errors import ConfigError, CorruptDataError, InputError
from support.refusals import refused

K = 32
LEARN = """
import hashlib, sys
from distillkit import _native
from distillkit.bench.sample import bundled_sample
sample = bundled_sample()
prior = _native.learn_prior(sys.argv[1], sample.ids[::3].copy(), sample.logprobs[::3].copy(), None)
print(hashlib.sha256(prior).hexdigest())
"""


@pytest.fixture(scope="module")
def sample() -> Sample:
    return bundled_sample()


def config(sample: Sample, **fields: object) -> str:
    return json.dumps({"vocab_size": sample.vocab_size, "k": K, "step": 0.007, **fields})


def rows(sample: Sample, which: slice) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    return np.ascontiguousarray(sample.ids[which]), np.ascontiguousarray(sample.logprobs[which])


def test_processes_and_threads_learn_the_same(sample: Sample) -> None:
    found = set()
    for threads in "1", "3":
        command = [sys.executable, "-c", LEARN, config(sample)]
        environment = os.environ | {"RAYON_NUM_THREADS": threads}
        found.add(subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout)
    assert len(found) == 1


@pytest.mark.parametrize("threshold", [None, 1e-3])
def test_other_rows_take_fewer_bytes_and_come_back(sample: Sample, threshold: float | None) -> None:
    half = len(sample) // 2
    description = config(sample, threshold=threshold)
    prior = _native.learn_prior(description, *rows(sample, slice(half)), None)
    ids, logprobs = rows(sample, slice(half, None))
    learned, builtin = (_native.CompactCodec(description, data) for data in (prior, None))
    data = learned.encode_document(ids, logprobs)
    assert len(data) < 0.9 * len(builtin.encode_document(ids, logprobs))
    found, values = np.empty((len(ids), K), np.int64), np.empty((len(ids), K), np.float32)
    learned.decode_document(np.frombuffer(data, np.uint8), found, values)
    stored = np.isfinite(values)
    wanted = stored if threshold is None else logprobs[:, :K] >= np.log(threshold)
    wanted[:, 0] = True
    assert (stored == wanted).all()
    assert (np.sort(np.where(stored, found, -1)) == np.sort(np.where(stored, ids[:, :K], -1))).all()


def test_clusters_of_another_prior_are_taken_over(sample: Sample) -> None:
    learn_from = rows(sample, slice(None, None, 2))
    base = _native.learn_prior(config(sample), *learn_from, None)
    prior = _native.learn_prior(config(sample, k=20, mass=0.9), *learn_from, base)
    assert json.loads(_native.prior_config(prior))["k"] == 20
    with refused(InputError, "base", str(sample.vocab_size), "50000"):
        _native.learn_prior(config(sample, vocab_size=50_000), *learn_from, base)
    with refused(CorruptDataError, "prior"):
        _native.learn_prior(config(sample), *learn_from, b"no prior")


def test_rows_that_cannot_be_encoded_are_named(sample: Sample) -> None:
    ids, logprobs = rows(sample, slice(40))
    with refused(ConfigError, "step"):
        _native.learn_prior(config(sample, step=7), ids, logprobs, None)
    with refused(InputError, "rows"):
        _native.learn_prior(config(sample), ids[:0], logprobs[:0], None)
    with refused(InputError, str(K), str(K - 1)):
        narrow = np.ascontiguousarray(ids[:, : K - 1]), np.ascontiguousarray(logprobs[:, : K - 1])
        _native.learn_prior(config(sample), *narrow, None)
    ids[17, 3] = sample.vocab_size
    with refused(InputError, "row 17", str(sample.vocab_size)):
        _native.learn_prior(config(sample), ids, logprobs, None)

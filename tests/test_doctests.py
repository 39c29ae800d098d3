"""The examples in the docstrings of the public modules run, and give what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest

from distillkit.codec import Codec, Prior, preset, sparse_from_logits
from distillkit.shards import Header, ShardWriter

MODULES = (
    *("types", "codec.bits", "codec.codec", "codec.config", "codec.presets", "codec.prior"),
    *("shards.convert", "shards.manifest", "shards.prior", "shards.reader", "shards.verify", "shards.writer"),
    *("training.config.file", "configuration.cards", "configuration.overrides", "reports", "reports.token_view"),
)
YAML = """\
model: ./student
output_path: ./trained
sequence_length: 1024
dataset: {train_dataset: {disk_path: ./captured}}
teacher: {kind: dataset}
loss_functions: [{function: cross_entropy, weight: 0.1}, {function: kl, weight: 0.9}]
"""


@pytest.fixture
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the examples speak of: a captured dataset of three documents, and a training configuration."""
    monkeypatch.chdir(tmp_path)
    Path("train.yaml").write_text(YAML)
    codec = Codec(preset("budget", vocab_size=1000))
    logits = np.random.default_rng(0).standard_normal((3, 9, 1000), dtype=np.float32)
    with ShardWriter("captured", Header(codec=codec.to_dict(), vocab_size=1000, head_size=1000)) as writer:
        for rows in logits:
            writer.write(np.arange(10), codec.encode_logits(rows).tobytes())
    config = preset("compact-50", vocab_size=1000)
    learned = Codec(config, prior=Prior.learn(config, sparse_from_logits(logits.reshape(27, 1000), 50)))
    header = Header(codec=learned.to_dict(), vocab_size=1000, head_size=1000)
    with ShardWriter("compact", header, prior=learned.prior) as writer:
        for rows in logits:
            writer.write(np.arange(10), sparse_from_logits(rows, 50))


@pytest.mark.usefixtures("_workplace")
@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"distillkit.{name}"), optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0
    assert found.failed == 0

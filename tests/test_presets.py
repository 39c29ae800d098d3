"""Presets beyond the published ones: better in the same bytes, readable as published; and the search behind them."""

from __future__ import annotations

import json
from types import ModuleType

import pytest

from distillkit.bench.fidelity import FidelityRow, Figures, compare
from distillkit.bench.sample import bundled_sample
from distillkit.codec import preset
from support.scripts import load_script

COUNTERPARTS = {"faithful": "recommended", "compact": "budget"}


def measured(name: str) -> tuple[FidelityRow, Figures]:
    """On the bundled rows; raises if the published decoder does not read the bytes as ours does."""
    sample = bundled_sample()
    row = compare(name, preset(name, vocab_size=sample.vocab_size), sample)
    assert row.ours is not None
    return row, row.ours


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_better_than_published_in_the_same_bytes(name: str) -> None:
    (row, found), (published_row, published) = measured(name), measured(COUNTERPARTS[name])
    assert preset(name, vocab_size=65_536).k == preset(COUNTERPARTS[name], vocab_size=65_536).k
    assert row.bytes_per_token <= published_row.bytes_per_token
    assert found.kl_mean < published.kl_mean / 4
    assert found.kl_p99 < published.kl_p99 / 4
    assert found.kl_max < published.kl_max
    assert found.top1_agreement >= published.top1_agreement


def test_balanced_is_far_better_for_a_few_bytes_more() -> None:
    (row, found), (published_row, published) = measured("balanced"), measured("budget")
    assert row.bytes_per_token <= published_row.bytes_per_token + 16
    assert found.kl_mean < published.kl_mean / 100
    assert found.kl_p99 < published.kl_p99 / 100
    assert found.top1_agreement >= published.top1_agreement


def search_script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script("presets", monkeypatch)


def test_the_search_finds_better_ones(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    script, sample = search_script(monkeypatch), bundled_sample().first(200)
    start = script.published("budget", 20)
    found = script.search(sample.first(50), [start], most_bytes=14, tries=240)
    reference = script.measure(sample, start)
    members = script.confirm(sample, found, reference.found.top1_agreement)
    assert reference.value_bytes == 14
    sizes = [each.value_bytes for each in members]
    losses = [each.found.kl_mean for each in members]
    assert sizes == sorted(set(sizes))
    assert losses == sorted(losses, reverse=True)
    assert sizes[-1] <= 14
    better = script.winner(members, reference)
    assert better.found.kl_mean < reference.found.kl_mean
    script.show(sample, 20, members, {"budget": reference})
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["d"] == sample.vocab_size
    assert printed["exact_k"] == better.fields["exact_k"]
    assert script.measure(sample, start | {"exact_k": 21}) is None

"""Bytes and settings from outside: each attempt is noticed or harmless; none ends a process, hangs, or takes memory.

A sample of each campaign's seeds here; all of them with `make attack`.
"""

from __future__ import annotations

import pytest

import support.attacks as attacks

MOST = {
    "shard_bits": 3000,
    "shard_bytes": 400,
    "compact_bytes": 400,
    "compact_codes": 2000,
    "sampled_codes": 1000,
    "shard_metadata": 400,
    "manifest_bits": 1000,
    "manifests": 400,
    "capture_plans": 400,
    "published": 400,
    "published_legacy": 200,
    "published_arrow": 400,
    "published_legacy_arrow": 200,
    "published_arrow_bits": 700,
    "published_arrow_lists": 7,
    "bombs": 6,
    "sources": 800,
    "rows": 1000,
    "configurations": 600,
    "run_records": 500,
}


@pytest.mark.slow
@pytest.mark.parametrize("campaign", MOST)
def test_a_campaign(campaign: str) -> None:
    outcome = attacks.run(campaign, MOST[campaign])
    assert not outcome.failures, "\n\n".join(outcome.failures)
    assert outcome.tried >= MOST[campaign]
    assert outcome.noticed > outcome.tried // 10, "hardly an attempt did any damage"

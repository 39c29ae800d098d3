"""Recorded documents of the compact format: as the codec reads them, and a decoder from FORMAT.md alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.compact_reference import decode_compact

from distillkit import _native

CASES = json.loads((Path(__file__).parent / "golden" / "compact.json").read_text())["cases"]
PRIORS = {case["config"]["prior"]: bytes.fromhex(case["prior"]) for case in CASES if case["prior"]}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_recorded_documents_decode_to_what_was_recorded(case: dict[str, Any]) -> None:
    config, rows = case["config"], case["rows"]
    prior = PRIORS.get(config["prior"])
    codec = _native.CompactCodec(json.dumps(config), prior)
    document = bytes.fromhex(case["document"])
    expected_ids = np.array(case["ids"], np.int64).reshape(rows, config["k"])
    expected = np.array(case["logprob_bits"], np.uint32).view(np.float32).reshape(expected_ids.shape)

    ids, logprobs = np.empty_like(expected_ids), np.empty_like(expected)
    codec.decode_document(np.frombuffer(document, np.uint8), ids, logprobs)
    assert (ids == expected_ids).all()
    assert (logprobs.view(np.uint32) == expected.view(np.uint32)).all()

    # Tables of the built-in prior are not on the page.
    if prior is not None and document[0] == 0:
        ids, reference = decode_compact(prior, document, rows)
        assert (ids == expected_ids).all()
        np.testing.assert_allclose(reference, expected, rtol=3e-7, atol=3e-7)

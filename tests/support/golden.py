"""The published codec's recorded vectors: see tests/golden/README.md."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from distillkit.codec import Codec, LegacyLogitCompressionConfig
from support.bombs import write_arrow

GOLDEN = Path(__file__).parents[1] / "golden"
CASES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "cases.json").read_text())
# Half a unit in the last place, relative: what one rounding to a type can change.
HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-23, "float64": 2.0**-23}


def golden(name: str) -> tuple[Codec, dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """Codec, recorded arrays, and the recorded bytes as rows."""
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        recorded = {key: arrays[key] for key in arrays.files}
    key = "legacy_logit_compression" if CASES[name]["format"] == "legacy" else "logprob_compressor"
    codec = Codec({key: CASES[name]["config"]})
    return (
        codec,
        recorded,
        codec.from_published({k: v for k, v in recorded.items() if not k.startswith(("in_", "out_"))}),
    )


def published_tolerance(codec: Codec, recorded: dict[str, np.ndarray[Any, Any]]) -> tuple[np.ndarray[Any, Any], float]:
    """How far the published decoder's roundings (FORMAT.md §2.3) can take it: exact ranks, and the others."""
    out = np.abs(recorded["out_logprobs"])
    if isinstance(codec.config, LegacyLogitCompressionConfig):
        # A float32 sum of terms much larger than the result, in whatever order it was added.
        terms = codec._native.terms()
        parts = np.abs(recorded["coeffs"]) @ np.abs(terms) if terms.size else np.zeros(1)
        return np.zeros_like(out), float(parts.max() * 2.0**-22)
    config = codec.config
    rounded_sum = config.delta_encoding
    exact = out * HALF_ULP[config.exact_dtype] * 1.01 + 1e-6 if rounded_sum else np.zeros_like(out)
    rest = 1e-5
    if config.residual_bins or rounded_sum or not config.polynomial_terms:
        rest += 2.02 * HALF_ULP[config.exact_dtype] * float(out.max())
    if config.term_dtype in ("float16", "bfloat16"):
        # Values, and with delta encoding their running sums, pass through 16 bits.
        steps = codec.k - config.exact_k if config.delta_encoding else 1
        rest += 2.02 * HALF_ULP[config.term_dtype] * float(out.max()) + steps * HALF_ULP[config.term_dtype] * 0.1
    return exact, rest


def published(folder: Path, container: str, layout: str) -> Path:
    """Write two published documents with labels and a mask, in Parquet or Arrow; returns the file."""
    source = GOLDEN / {"quantized": "upstream_v1", "legacy": "upstream_legacy"}[layout]
    folder.mkdir(parents=True)
    shutil.copy(source / "compression_config.yaml", folder)
    table = pq.read_table(source / "data_0.parquet").slice(0, 2)
    ids = table["input_ids"].to_pylist()
    table = table.append_column("labels", pa.array([[-100] * 3 + part[3:] for part in ids]))
    table = table.append_column("attention_mask", pa.array([[1] * len(part) for part in ids]))
    path = folder / f"data_0.{container}"
    if container == "parquet":
        pq.write_table(table, path)
    else:
        write_arrow(path, table)
    return path

"""Oracles in float64, written from the definitions and not from the code they check."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

# -- codec: FORMAT.md, a value at a time -------------------------------------------------------------------------------


def _stored_float(data: bytes, name: str) -> float:
    if name == "bfloat16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    return float(struct.unpack({"float16": "<e", "float32": "<f", "float64": "<d"}[name], data)[0])


_SIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


def _rounded(value: float, name: str) -> float:
    """To the nearest value of a stored type."""
    if name == "bfloat16":
        bits = struct.unpack("<I", struct.pack("<f", value))[0]
        bits += 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even, in the upper half
        return float(struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0])
    return _stored_float(struct.pack({"float16": "<e", "float32": "<f", "float64": "<d"}[name], value), name)


def _bit_stream(data: bytes, width: int, count: int) -> list[int]:
    stream = int.from_bytes(data, "big") >> (8 * len(data) - width * count)
    return [(stream >> (width * (count - 1 - i))) & ((1 << width) - 1) for i in range(count)]


def _term(term: int | str, t: float) -> float:
    return {"sqrt": math.sqrt(t), "exp": math.exp(t)}[term] if isinstance(term, str) else t**term


def decode_row(description: dict[str, Any], row: bytes) -> tuple[list[int], npt.NDArray[np.float64]]:
    """Ids and log-probabilities of one row, sums in float64."""
    config = description["config"]
    if description["format"] == "legacy":
        return _decode_legacy(config, row)
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return row[at - size : at]

    def take_floats(count: int, name: str) -> list[float]:
        return [_stored_float(take(_SIZES[name]), name) for _ in range(count)]

    n = config["k"] - config["exact_k"]
    exact = take_floats(config["exact_k"], config["exact_dtype"])
    terms = config["polynomial_terms"] or []
    coefficients = take_floats(len(terms), config["term_dtype"])
    points = [j / (n - 1) if config["normalize_t"] and n > 1 else float(j) for j in range(n)]
    if config["normalize_t"] and n == 1:
        points = [0.0]
    values = [
        sum(c * _rounded(_term(term, t), config["term_dtype"]) for c, term in zip(coefficients, terms, strict=True))
        for t in points
    ]
    j = 0
    for bin_ in config["residual_bins"]:
        bits, count = bin_["element_bits"], bin_["num_elements"]
        (scale,) = take_floats(1, bin_["scale_dtype"])
        for code in _bit_stream(take(-(-bits * count // 8)), bits, count):
            values[j] += (2 * code - 1 if bits == 1 else code - 2 ** (bits - 1)) * scale
            j += 1
    sequence = np.array(exact + values, dtype=np.float64)
    logprobs = np.cumsum(sequence) if config["delta_encoding"] else sequence
    return _bit_stream(row[at:], math.ceil(math.log2(config["d"])), config["k"]), logprobs


def _decode_legacy(config: dict[str, Any], row: bytes) -> tuple[list[int], npt.NDArray[np.float64]]:
    k, exact_k = config["k"], config["exact_k"]
    stored = "float32" if config["term_dtype"] == "float64" else config["term_dtype"]
    terms: list[int | str] = []
    if exact_k < k:
        sign = -1 if config["invert_polynomial"] else 1
        terms = [sign * i for i in range(config["polynomial_degree"] + 1)] + ["sqrt"] * config["with_sqrt_term"]
    values = [_stored_float(row[2 * i : 2 * i + 2], "float16") for i in range(exact_k)]
    size, start = _SIZES[stored], 2 * exact_k
    coefficients = [_stored_float(row[start + size * i : start + size * (i + 1)], stored) for i in range(len(terms))]
    for a in range(1, k - exact_k + 1):
        pairs = zip(coefficients, terms, strict=True)
        values.append(sum(c * _rounded(_term(term, float(a)), config["term_dtype"]) for c, term in pairs))
    words_at = start + size * len(terms)
    bits = math.ceil(math.log2(config["vocab_size"]))
    words = [int.from_bytes(row[i : i + 8], "little") for i in range(words_at, len(row), 8)]
    ids = [(word >> (bits * i)) & (2**bits - 1) for word in words for i in range(64 // bits)]
    return ids[:k], np.array(values, dtype=np.float64)


def kl_renormalised(original: npt.ArrayLike, decoded: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """KL(p ‖ q) a row, of the stored log-probabilities renormalised to one, in nats; (R, k) and (R, k) → (R,)."""

    def normalised(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        logs = np.asarray(values, dtype=np.float64)
        return np.asarray(logs - np.log(np.exp(logs).sum(-1, keepdims=True)))

    p, q = normalised(original), normalised(decoded)
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


# -- losses: one position at a time, over the whole vocabulary ---------------------------------------------------------


def softmax(logits: npt.ArrayLike, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """Probabilities of one position's logits."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


def kl_at(logits: npt.ArrayLike, ids: list[int], logprobs: list[float], temperature: float, missing: str) -> float:
    """T²·KL(target ‖ student) of one position; the vocabulary is split into the stored ids and the rest."""
    student = softmax(logits, temperature)
    stored = [math.exp(value) for value in logprobs]
    target = [p ** (1 / temperature) for p in stored]
    outcomes = list(zip(target, [student[i] for i in ids], strict=True))
    if missing == "uniform" and len(ids) < len(student):
        rest = max(0.0, 1.0 - math.fsum(stored)) ** (1 / temperature)
        outcomes.append((rest, math.fsum(student[i] for i in range(len(student)) if i not in set(ids))))
    total = math.fsum(p for p, _ in outcomes)
    return temperature**2 * math.fsum(p / total * math.log(p / total / q) for p, q in outcomes if p > 0)


def cross_entropy_at(logits: npt.ArrayLike, label: int) -> float:
    """Negative log-likelihood of one position's label."""
    return -math.log(softmax(logits)[label])


def gradient(
    function: Callable[[npt.NDArray[np.float64]], float], at: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Central differences."""
    result = np.empty_like(at)
    for index in np.ndindex(at.shape):
        step = 1e-5 * max(1.0, abs(at[index]))
        high, low = at.copy(), at.copy()
        high[index] += step
        low[index] -= step
        result[index] = (function(high) - function(low)) / (high[index] - low[index])
    return result

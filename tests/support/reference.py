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


def _polynomial(coefficients: list[float], terms: list[float], number: type[np.floating[Any]]) -> float:
    """Products and sums in the order of the terms, each rounded to the type: terms may cancel."""
    value = number(0.0)
    for coefficient, term in zip(coefficients, terms, strict=True):
        value = number(value + number(number(coefficient) * number(term)))
    return float(value)


def decode_row(description: dict[str, Any], row: bytes) -> tuple[list[int], npt.NDArray[np.float64]]:
    """Ids and log-probabilities of one row; the polynomial as FORMAT.md says, other sums in float64."""
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
    number = np.float64 if config["term_dtype"] == "float64" else np.float32
    values = [
        _polynomial(coefficients, [_rounded(_term(term, t), config["term_dtype"]) for term in terms], number)
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
        at_rank = [_rounded(_term(term, float(a)), config["term_dtype"]) for term in terms]
        values.append(_polynomial(coefficients, at_rank, np.float32))
    words_at = start + size * len(terms)
    bits = math.ceil(math.log2(config["vocab_size"]))
    words = [int.from_bytes(row[i : i + 8], "little") for i in range(words_at, len(row), 8)]
    ids = [(word >> (bits * i)) & (2**bits - 1) for word in words for i in range(64 // bits)]
    return ids[:k], np.array(values, dtype=np.float64)


def kl_with_missing(original: npt.ArrayLike, decoded: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """KL(p ‖ q) a row over K ∪ {R} in nats: the stored ids, and what is missing from 1 as one more outcome."""

    def outcomes(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
        p = np.exp(np.asarray(values, dtype=np.float64))
        p = np.concatenate([p, np.maximum(1 - p.sum(-1, keepdims=True), 1e-12)], axis=-1)
        return np.asarray(p / p.sum(-1, keepdims=True))

    p, q = outcomes(original), outcomes(decoded)
    # An id may be too improbable for float64.
    return np.asarray(np.where(p > 0, p * np.log(np.where(p > 0, p / np.maximum(q, 1e-300), 1.0)), 0.0).sum(-1))


# -- losses: one position at a time, over the whole vocabulary ---------------------------------------------------------


def softmax(logits: npt.ArrayLike, temperature: float = 1.0) -> npt.NDArray[np.float64]:
    """Probabilities of one position's logits."""
    scaled = np.asarray(logits, dtype=np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return weights / weights.sum()


Outcomes = list[tuple[float, float]]
"""(teacher, student) probabilities of disjoint outcomes, which sum to one."""


def outcomes_at(
    logits: npt.ArrayLike,
    ids: list[int],
    logprobs: list[float],
    label: int,
    temperature: float,
    missing: str,
    label_logprob: float = math.nan,
    *,
    published: bool = False,
) -> tuple[Outcomes, tuple[float, float] | None]:
    """One position's outcomes one by one, and the pair of all other ids together (None if there is no other id).

    Both are taken at temperature 1 and softened after that; published: the student's over its whole vocabulary first.
    `label_logprob` is the teacher's of the label, NaN if it was not kept.
    """
    student = softmax(logits, temperature if published else 1.0)
    stored = {i: math.exp(value) for i, value in zip(ids, logprobs, strict=True) if value > -math.inf}
    if missing != "zero" and not math.isnan(label_logprob):
        stored.setdefault(label, math.exp(label_logprob))
    left = max(0.0, 1.0 - math.fsum(stored.values())) if len(stored) < len(student) else 0.0
    if missing == "label" and left > 0:
        stored[label] = stored.get(label, 0.0) + left
    p = _softened([*stored.values(), left if missing == "uniform" else 0.0], temperature)
    if not any(p):
        return [], None
    others = [float(student[i]) for i in range(len(student)) if i not in stored]
    q = _softened([*(float(student[i]) for i in stored), math.fsum(others)], 1.0 if published else temperature)
    return list(zip(p[:-1], q[:-1], strict=True)), (p[-1], q[-1]) if others else None


def _softened(probabilities: list[float], temperature: float) -> list[float]:
    """Raised to 1/T and divided by their sum, if there is any."""
    raised = [p ** (1 / temperature) for p in probabilities]
    total = math.fsum(raised)
    return [p / total for p in raised] if total else raised


def dense_outcomes_at(
    logits: npt.ArrayLike, teacher: npt.ArrayLike, temperature: float
) -> tuple[Outcomes, tuple[float, float] | None]:
    """The same for a teacher's logits of all ids; heads of one vocabulary may be padded to different widths."""
    student = softmax(logits, temperature)
    width = min(len(student), len(np.asarray(teacher)))
    p = softmax(np.asarray(teacher)[:width], temperature)
    rest = None if width == len(student) else (0.0, math.fsum(student[width:]))
    return list(zip(p.tolist(), student[:width].tolist(), strict=True)), rest


def measure_of(
    name: str, outcomes: Outcomes, rest: tuple[float, float] | None, share: float | None = None, **settings: Any
) -> float:
    """A loss of one position by its definition, at T² = 1; `share` holds the weight of `adaptive_kl` still."""
    if not outcomes and rest is None:
        return 0.0
    pairs = outcomes if rest is None else [*outcomes, rest]

    def divergence(of: Callable[[float, float], float], by: Callable[[float, float], float]) -> float:
        """KL of one mixture of (p, q) from another."""
        return math.fsum(of(p, q) * math.log(of(p, q) / by(p, q)) for p, q in pairs if of(p, q) > 0)

    def teacher(p: float, q: float) -> float:
        return p

    def student(p: float, q: float) -> float:
        return q

    if name == "kl":
        return divergence(teacher, student)
    if name == "reverse_kl":
        if rest is None or rest[0] > 0:
            return divergence(student, teacher)
        mass = math.fsum(q for _, q in outcomes)
        return math.fsum(q / mass * math.log(q / mass / p) for p, q in outcomes if q > 0) - math.log(mass)
    if name == "jsd":
        middle = lambda p, q: (p + q) / 2  # noqa: E731
        return 0.5 * divergence(teacher, middle) + 0.5 * divergence(student, middle)
    if name == "tvd":
        return 0.5 * math.fsum(abs(p - q) for p, q in pairs)
    if name in ("skewed_kl", "skewed_reverse_kl"):
        a = settings.get("alpha", 0.1)
        if name == "skewed_kl":
            return divergence(teacher, lambda p, q: a * p + (1 - a) * q)
        return divergence(student, lambda p, q: a * q + (1 - a) * p)
    if name == "adaptive_kl":
        share = adaptive_share(outcomes, rest) if share is None else share
        return share * measure_of("kl", outcomes, rest) + (1 - share) * measure_of("reverse_kl", outcomes, rest)
    preferred = [(i, j) for i in range(len(outcomes)) for j in range(len(outcomes)) if outcomes[i][0] > outcomes[j][0]]
    if name == "hinge":
        margin = settings.get("margin")
        terms = [
            max(
                0.0, (outcomes[i][0] - outcomes[j][0] if margin is None else margin) - (outcomes[i][1] - outcomes[j][1])
            )
            for i, j in preferred
        ]
    else:
        assert name == "logistic_ranking"
        terms = [math.log1p(math.exp(-math.log(outcomes[i][1] / outcomes[j][1]))) for i, j in preferred]
    return math.fsum(terms) / len(terms) if terms else 0.0


def adaptive_share(outcomes: Outcomes, rest: tuple[float, float] | None) -> float:
    """The weight of KL(p ‖ q) in `adaptive_kl`: the share of Σ|p − q| that lies in the teacher's head: its most
    probable outcome, and the next ones up to a total of one half."""
    head = tail = total = 0.0
    for rank, (p, q) in enumerate(sorted(outcomes, key=lambda pair: -pair[0])):
        total += p
        if rank == 0 or total <= 0.5:
            head += abs(p - q)
        else:
            tail += abs(p - q)
    tail += 0.0 if rest is None else abs(rest[0] - rest[1])
    return head / (head + tail) if head + tail > 0 else 0.5


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

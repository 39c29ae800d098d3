"""Reads JSON that may have been damaged or crafted: shards' metadata, manifests, plans and receipts, and the JSON of
`save_to_disk` folders. Writes it in the one form that is hashed."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import xxhash

from distillkit.errors import CorruptDataError

__all__ = ["canonical_json", "json_hash", "parse_json"]

_DEEPEST = 32
"""Levels of nesting. Ours has fewer than ten; the functions that walk through it need a bound."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, so that equal values give equal text and hashes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def json_hash(value: Any) -> str:
    """XXH3-128 of a value's canonical JSON, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(canonical_json(value).encode())


def parse_json(data: bytes, *, where: str) -> Any:
    """Parses JSON which may have been damaged or crafted.

    Raises:
        CorruptDataError: it is not JSON in UTF-8, is nested too deeply, or has a number or text that JSON cannot have:
            NaN, infinity, half of a surrogate pair.
    """
    try:
        value = json.loads(data.decode(), parse_constant=_no_number, parse_float=_finite)
        if _depth_exceeds(value, _DEEPEST):
            raise CorruptDataError(f"{where}: JSON nested more than {_DEEPEST} levels deep")
        if b"\\u" in data:
            # Only an escape can give text that has no UTF-8.
            canonical_json(value).encode()
    except RecursionError:
        raise CorruptDataError(f"{where}: JSON nested more than {_DEEPEST} levels deep") from None
    except ValueError as error:
        raise CorruptDataError(f"{where}: not valid JSON: {error}") from error
    return value


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text:.20} is too large")
    return number


def _depth_exceeds(value: Any, deepest: int) -> bool:
    level = [value]
    for _ in range(deepest):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
    return bool(level)

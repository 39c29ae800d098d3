"""Tokenizer fingerprints: whether two tokenizers assign the same ids to the same tokens.

A student can only learn from distributions over token ids if its ids mean the same tokens. Names do not show that (a
fine-tune may add tokens, two names may share one vocabulary), so datasets carry a fingerprint of the id → token map.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xxhash

from distillkit.configuration.places import missing_place, neighbour
from distillkit.errors import ConfigError

__all__ = ["fingerprint", "load_tokenizer", "vocab_size"]


def fingerprint(tokenizer: Any) -> str:
    """Hash the id → token map and which ids are special tokens.

    The roles of special tokens (padding, end of sequence) are left out: training code changes them without changing
    what ids mean.

    Args:
        tokenizer: a transformers tokenizer.

    Returns:
        "xxh3-128:" and 32 hexadecimal digits; equal for tokenizers that agree on every id.
    """
    entries = _entries(tokenizer)
    special = sorted(int(i) for i, token in tokenizer.added_tokens_decoder.items() if getattr(token, "special", False))
    tokens = [token for _, token in entries]
    digest = xxhash.xxh3_128()
    # Ids and lengths before the bytes, so that different token sequences never hash the same bytes.
    digest.update(np.array([len(entries), len(special)], dtype="<u4").tobytes())
    digest.update(np.array([i for i, _ in entries], dtype="<u4").tobytes())
    digest.update(np.array([len(token) for token in tokens], dtype="<u4").tobytes())
    digest.update(b"".join(tokens))
    digest.update(np.array(special, dtype="<u4").tobytes())
    return f"xxh3-128:{digest.hexdigest()}"


def vocab_size(tokenizer: Any) -> int:
    """Return the number of ids the tokenizer can produce: its largest id plus one, added tokens included.

    The model's head is often wider (padded to a multiple of 64 or 128), and never narrower in a valid checkpoint.
    """
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def load_tokenizer(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load a transformers tokenizer from a folder or the hub.

    Raises:
        ConfigError: no tokenizer could be loaded from `path`.
    """
    problem = missing_place(path)
    if problem is not None:
        raise ConfigError(f"no tokenizer could be loaded: {problem}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ConfigError(
            f"no tokenizer could be loaded from {path!r} (a model folder or a hub id): {error}{neighbour(path)}"
        ) from error


def _entries(tokenizer: Any) -> list[tuple[int, bytes]]:
    """Return (id, token bytes) pairs sorted by id; most tokenizers store tokens as text, some as bytes."""
    return sorted(
        (int(i), token if isinstance(token, bytes) else token.encode("utf-8", "surrogatepass"))
        for token, i in tokenizer.get_vocab().items()
    )

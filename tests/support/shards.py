"""Small datasets of a codec that stores six ids a row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distillkit.codec import Codec, DistributionQuantizationConfig
from distillkit.shards import Header, ShardWriter
from distillkit.types import SparseLogprobs

VOCAB = 300
CODEC = Codec(
    DistributionQuantizationConfig(
        d=VOCAB, k=6, exact_k=2, polynomial_terms=[0, 1], residual_bins=[], delta_encoding=False, exact_dtype="float16"
    )
)
HEADER = Header(
    codec=CODEC.to_dict(),
    vocab_size=290,
    head_size=VOCAB,
    tokenizer={"name": "tiny", "fingerprint": "xxh3-128:00"},
    teacher={"name": "a teacher", "revision": None, "dtype": "float32"},
    capture={"seed": 42},
)
Written = list[tuple[np.ndarray[Any, Any], SparseLogprobs, dict[str, Any]]]


def make_documents(count: int, seed: int = 0) -> Written:
    """Token ids, rows and what else is stored: every other one has a mask and segments."""
    generator = np.random.default_rng(seed)
    documents: Written = []
    for index in range(count):
        tokens = int(generator.integers(2, 30))
        logits = generator.standard_normal((tokens - 1, VOCAB)) * 4
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ids = np.argsort(-logprobs, axis=-1)[:, : CODEC.k]
        rows = SparseLogprobs(ids, np.take_along_axis(logprobs, ids, -1).astype(np.float32))
        extra: dict[str, Any] = {}
        if index % 2:
            extra = {"loss_mask": generator.random(tokens) < 0.5, "segment_lengths": np.array([1, tokens - 1])}
        documents.append((generator.integers(0, VOCAB, tokens), rows, extra))
    return documents


def write(folder: Path | str, documents: Written, **options: Any) -> None:
    """Write those that are not in a dataset yet, a few to a shard."""
    with ShardWriter(folder, HEADER, **{"shard_tokens": 60, **options}) as writer:
        for ids, rows, extra in documents[sum(shard.documents for shard in writer.resumed) :]:
            writer.write(ids, rows, **extra)


def files(folder: Path) -> dict[str, bytes]:
    """The files of a folder by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}

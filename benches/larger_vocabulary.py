"""Rewrites a sample's rows for a larger vocabulary: a simulation, where no teacher of that size is at hand.

    python benches/larger_vocabulary.py TOKENIZER.json QWEN.tiktoken SAMPLE OUT.npz

TOKENIZER.json is the byte-level BPE of the sample's teacher, QWEN.tiktoken the larger one (the `dashscope` package has
one of 151,936 ids). An id becomes the id of the same string, or an unused one. A larger vocabulary also has longer
tokens that begin like shorter ones: an id with such continuations gives a random part of its probability, half at most,
to up to three of them, always the same three, in shares that differ by row. Rows keep their 256 most probable ids. The
result is deterministic.
"""

from __future__ import annotations

import argparse
import base64
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import numpy.typing as npt

from distillkit.bench.sample import Sample, load_sample, save_sample

I64 = npt.NDArray[np.int64]
CONTINUATIONS = 3
KEPT = 256
LEAST = 1e-12
ROWS = 4096


def byte_level_strings(tokenizer: Path) -> dict[int, bytes]:
    """Bytes of each id of a byte-level BPE tokenizer (GPT-2's characters for bytes)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    bytes_of = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    return {
        number: bytes(bytes_of[character] for character in text)
        for text, number in vocabulary.items()
        if all(character in bytes_of for character in text)
    }


def mapping(small: dict[int, bytes], large: dict[bytes, int], vocab_size: int) -> tuple[I64, I64]:
    """(V,) the new id of each id, and (V, 3) the ids that continue it, −1 where there are fewer."""
    random = np.random.default_rng(0)
    new = np.full(vocab_size, -1)
    for number, text in small.items():
        if text in large:
            new[number] = large[text]
    unused = random.permutation(sorted(set(large.values()) - set(new.tolist())))
    missing = new < 0
    new[missing] = unused[: missing.sum()]
    own, taken = set(small.values()), set(new.tolist())
    begun = defaultdict(list)
    for text, number in large.items():
        longest = next((text[:end] for end in range(len(text) - 1, 1, -1) if text[:end] in own), None)
        if longest is not None and number not in taken:
            begun[longest].append(number)
    continued = np.full((vocab_size, CONTINUATIONS), -1)
    for number, text in small.items():
        chosen = random.permutation(sorted(begun[text])[:8])[:CONTINUATIONS]
        continued[number, : len(chosen)] = chosen
    return new, continued


def rewritten(sample: Sample, new: I64, continued: I64) -> tuple[I64, npt.NDArray[np.float32]]:
    """(N, 256) ids and log-probabilities in the larger vocabulary."""
    random = np.random.default_rng(1)
    ids, logprobs = [], []
    for start in range(0, len(sample), ROWS):
        old = sample.ids[start : start + ROWS]
        p = np.exp(sample.logprobs[start : start + ROWS].astype(np.float64))
        others = continued[old]
        there = others >= 0
        shares = random.gamma(0.5, 1.0, others.shape) * there
        shares /= np.maximum(shares.sum(-1, keepdims=True), LEAST)
        given = 0.5 * random.random(old.shape) * there.any(-1)
        all_ids = np.concatenate([new[old], others.reshape(len(old), -1)], axis=1)
        all_p = np.concatenate(
            [p * (1 - given), (p * given)[..., None].repeat(CONTINUATIONS, -1).reshape(len(old), -1)], axis=1
        )
        all_p[:, old.shape[1] :] *= shares.reshape(len(old), -1)
        all_p[all_ids < 0] = 0
        order = np.argsort(-all_p, axis=1, kind="stable")[:, :KEPT]
        ids.append(np.take_along_axis(all_ids, order, axis=1))
        logprobs.append(np.log(np.maximum(np.take_along_axis(all_p, order, axis=1), LEAST)))
    return np.concatenate(ids), np.concatenate(logprobs).astype(np.float32)


def main() -> None:
    """Writes the rewritten sample."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER.json")
    parser.add_argument("larger", type=Path, metavar="QWEN.tiktoken")
    parser.add_argument("sample", metavar="SAMPLE", help="an .npz file or a dataset")
    parser.add_argument("out", type=Path, metavar="OUT.npz")
    args = parser.parse_args()
    sample = load_sample(args.sample)
    lines = [line.split() for line in args.larger.read_bytes().splitlines() if line.strip()]
    large = {base64.b64decode(token): int(number) for token, number in lines}
    small = byte_level_strings(args.tokenizer)
    new, continued = mapping(small, large, max(sample.vocab_size, max(small) + 1))
    ids, logprobs = rewritten(sample, new, continued)
    # Special ids follow the tokens; tables have a multiple of 128 ids.
    vocab_size = -(-(max(large.values()) + 256) // 128) * 128
    save_sample(args.out, Sample(ids, logprobs, vocab_size, f"simulated rows over {vocab_size:,} ids"))


if __name__ == "__main__":
    main()

"""Bytes, fidelity and speed of the compact format by what its prior was learned from.

    python benches/compact.py --learn SAMPLE... --test SAMPLE... [--rows N...] [--config K:STEP[:THRESHOLD]...]

A SAMPLE is an .npz file with `ids` and `logprobs`, (N, K), or a dataset (evenly spaced documents). For each
configuration a prior is learned from the first N rows of the `--learn` samples, for each N of `--rows`, and each
`--test` sample is encoded with it, in documents of 512 rows, decoded and compared: ids must come back exactly.
`--rows 0` is the built-in prior. Prints a Markdown table.

KL is over the stored ids and all others as one more outcome. Bytes of a row are those of documents, without the prior,
which a dataset stores once. Speeds are of one core.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distillkit.bench.sample import Sample, load_sample
from distillkit.codec import Codec, Prior
from distillkit.codec.config import CompactConfig
from distillkit.codec.fidelity import kl_rows, values_of
from distillkit.errors import CorruptDataError
from distillkit.types import SparseLogprobs

DOCUMENT = 512
PARTS = "head", "ids", "values", "framing"


@dataclass
class Figures:
    """Sums over the rows of a sample; seconds of encoding and decoding."""

    rows: int = 0
    ids: int = 0
    kl: float = 0.0
    encoding: float = 0.0
    decoding: float = 0.0
    parts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def cells(self) -> list[str]:
        """The table's cells: ids, bytes by part and in all, KL, thousands of rows a second."""
        each = [f"{self.parts[part] / self.rows:.1f}" for part in PARTS]
        total = sum(self.parts.values()) / self.rows
        speeds = [f"{self.rows / seconds / 1000:.0f}k" for seconds in (self.encoding, self.decoding)]
        return [f"{self.ids / self.rows:.1f}", *each, f"**{total:.1f}**", f"{self.kl / self.rows:.2e}", *speeds]


HEADINGS = "k", "step", "threshold", "prior's rows", "prior", "learned in", "text", "ids a row", *PARTS, "bytes", "KL"
SPEEDS = "encode", "decode"


def documents(sample: Sample) -> Iterator[SparseLogprobs]:
    """Rows of a sample, (≤ 512, K) at a time."""
    for start in range(0, len(sample), DOCUMENT):
        rows = slice(start, start + DOCUMENT)
        yield SparseLogprobs(sample.ids[rows], sample.logprobs[rows])


def measure(codec: Codec, sample: Sample) -> Figures:
    """Encodes and decodes all rows of a sample.

    Raises:
        CorruptDataError: other ids came back.
    """
    found = Figures()
    for rows in documents(sample):
        count = len(rows.ids)
        start = time.perf_counter()
        data = codec.encode_document(rows)
        found.encoding += time.perf_counter() - start
        start = time.perf_counter()
        decoded = codec.decode_document(data, count)
        found.decoding += time.perf_counter() - start
        original, known = values_of(rows, decoded)
        if not known.all() or (decoded.ids[:, 0] != rows.ids[:, 0]).any():
            raise CorruptDataError(f"other ids than a row's own came back, first in row {int(known.argmin())}")
        found.rows += count
        found.ids += int(np.isfinite(decoded.logprobs).sum())
        found.kl += float(kl_rows(original, decoded.logprobs).sum())
        for part, size in codec.sizes(data, count).items():
            found.parts[part] += size
    return found


def configuration(text: str, vocab_size: int) -> CompactConfig:
    """Reads K:STEP[:THRESHOLD]."""
    k, step, *threshold = text.split(":")
    return CompactConfig(
        vocab_size=vocab_size, k=int(k), step=float(step), threshold=float(threshold[0]) if threshold else None
    )


def joined(samples: Sequence[Sample]) -> SparseLogprobs:
    """All rows of some samples."""
    return SparseLogprobs(
        np.concatenate([sample.ids for sample in samples]), np.concatenate([sample.logprobs for sample in samples])
    )


def table(args: argparse.Namespace) -> Iterator[Sequence[str]]:
    """The rows of the table."""
    learn = [load_sample(path) for path in args.learn]
    tests = [(path, load_sample(path)) for path in args.test]
    vocab_size = args.vocab_size or max(sample.vocab_size for sample in [*learn, *(sample for _, sample in tests)])
    rows = joined(learn)
    for text in args.config:
        config = configuration(text, vocab_size)
        for count in args.rows or [len(rows.ids)]:
            start = time.perf_counter()
            used = SparseLogprobs(rows.ids[:count], rows.logprobs[:count])
            prior = Prior.learn(config, used) if count else None
            seconds = time.perf_counter() - start
            codec = Codec(config, prior=prior)
            size = f"{len(prior.data) / 1000:.0f} kB" if prior else "-"
            learned = [len(used.ids) or "built-in", size, f"{seconds:.1f} s"]
            about = [config.k, config.step, config.threshold or "-", *learned]
            for path, sample in tests:
                yield [*map(str, about), Path(path).name, *measure(codec, sample).cells()]


def main() -> None:
    """Prints the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--learn", nargs="+", required=True, metavar="SAMPLE", help="rows to learn priors from")
    parser.add_argument("--test", nargs="+", required=True, metavar="SAMPLE", help="rows to encode, of other documents")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="rows to learn from (default: all)")
    parser.add_argument(
        "--config", nargs="+", default=["128:0.00338", "50:0.0054"], metavar="K:STEP[:THRESHOLD]",
        help="configurations (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--vocab-size", type=int, metavar="V", help="of the tokenizer (default: the samples')")
    args = parser.parse_args()
    headings = [*HEADINGS, *SPEEDS]
    print("|", " | ".join(headings), "|")
    print("|", " | ".join("---" for _ in headings), "|")
    for cells in table(args):
        print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()

"""Fidelity and speed of the codec on this machine: tables, and their figures in benches/results/.

    python benches/bench.py [fidelity] [speed] [decode] [learned]

- `fidelity`: every preset and every configuration of tests/golden/cases.json, on more than 20,000 real positions of the
  demo's teacher (`benches/sample.py` makes them once); and the presets on the rows that come with distillkit.
- `speed`: encoding, decoding and reading, as `distillkit-codec bench` times them.
- `decode`: decoding of every fixed preset in several runs, for their spread.
- `learned`: the compact presets, with priors learned from three quarters of the positions: size and fidelity of the
  others, and encoding and decoding on one core in several runs. Less than a minute.

Without arguments all are measured. `make bench-docs` makes docs/benchmarks.md of the newest figures.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console, Group
from sample import benchmark_sample

from distillkit import __version__
from distillkit.bench.fidelity import measure_fidelity
from distillkit.bench.learned import learn_presets
from distillkit.bench.machine import machine
from distillkit.bench.sample import Sample, bundled_sample
from distillkit.bench.speed import (
    DENSE_VOCABULARY,
    PACKED_ROWS,
    SpeedRow,
    measure_decoding,
    measure_learned,
    measure_speed,
)
from distillkit.bench.tables import csv_rows, fidelity_table, speed_table, write_csv
from distillkit.codec import CodecConfig, codec_config, preset
from distillkit.codec.presets import FIXED_PRESETS

ROOT = Path(__file__).resolve().parent.parent

RATIOS = {
    ("encode recommended", PACKED_ROWS): 30,
    ("encode budget", PACKED_ROWS): 20,
    ("decode recommended", PACKED_ROWS): 100,
    ("decode budget", PACKED_ROWS): 100,
    ("dense float32 logits to bytes of recommended, V = 151,936", 256): 8,
    ("decode_torch recommended, CPU tensors", PACKED_ROWS): 10,
}
"""How many times as fast as the published algorithm it has to be, by work and rows a call."""
ONE_CORE = ("shard to decoded arrays, one core", 2e6)
LEAST_OF_READING = 0.5
MOST_OF_MEMORY = 1 / 8
DECODE_RUNS, LEARNED_RUNS = 7, 5

Writer = Callable[[str, Sequence[Mapping[str, Any]]], None]
"""Writes lines to the CSV of a kind."""


def configurations(vocab_size: int) -> dict[str, CodecConfig]:
    """Every preset and every recorded configuration, by name; of those that are the same, the first."""
    cases = json.loads((ROOT / "tests" / "golden" / "cases.json").read_text())
    named: dict[str, CodecConfig] = {name: preset(name, vocab_size=vocab_size) for name in FIXED_PRESETS}
    named |= {name: codec_config(case["config"]) for name, case in cases.items()}
    kept: dict[str, CodecConfig] = {}
    for name, config in named.items():
        if config not in kept.values():
            kept[name] = config
    return kept


def goals(rows: Sequence[SpeedRow]) -> list[tuple[str, str, bool]]:
    """What was to be reached, what was, and whether that is enough."""
    found = []
    for row in rows:
        least = RATIOS.get((row.work, row.rows))
        if least is not None and row.ratio is not None:
            found.append((row.work, f"{row.ratio:.1f}× of at least {least}×", row.ratio >= least))
        if row.work.startswith("dense float32"):
            share = f"{row.of_limit:.0%} of reading once, of at least {LEAST_OF_READING:.0%}"
            found.append((row.work, share, row.of_limit >= LEAST_OF_READING))
        if row.extra_bytes is not None and row.published_extra_bytes:
            share = row.extra_bytes / row.published_extra_bytes
            text = f"peak extra memory 1/{1 / max(share, 1e-3):.1f}, of at most 1/{1 / MOST_OF_MEMORY:.0f}"
            found.append((row.work, text, share <= MOST_OF_MEMORY))
        if row.work == ONE_CORE[0]:
            text = f"{row.tokens_per_second / 1e6:.2f} M tokens/s of at least {ONE_CORE[1] / 1e6:.0f} M"
            found.append((row.work, text, row.tokens_per_second >= ONE_CORE[1]))
    return found


def bench_fidelity(sample: Sample, write: Writer) -> None:
    """Fidelity on the benchmark's sample, and of the presets on the bundled rows."""
    rows = list(measure_fidelity(sample, configurations(sample.vocab_size)))
    print_tables(fidelity_table(rows, sample))
    write("fidelity", csv_rows(rows, {"sample": sample.about}))
    bundled = bundled_sample()
    presets = {name: preset(name, vocab_size=bundled.vocab_size) for name in FIXED_PRESETS}
    rows = list(measure_fidelity(bundled, presets))
    print_tables(fidelity_table(rows, bundled))
    write("bundled", csv_rows(rows, {"sample": bundled.about}))


def bench_speed(sample: Sample, write: Writer) -> None:
    """The speed table, and whether it reaches what it has to."""
    rows = list(measure_speed(sample, vocab_size=sample.vocab_size, dense_vocab_size=DENSE_VOCABULARY))
    print_tables(speed_table(rows))
    for work, text, reached in goals(rows):
        print(f"{'reached' if reached else 'MISSED '}  {work}: {text}")
    write("speed", csv_rows(rows, {}))


def bench_decode(sample: Sample, write: Writer) -> None:
    """Decoding of every preset in turn, and again, with the spread of the runs."""
    runs = [
        list(measure_decoding(sample, list(FIXED_PRESETS), vocab_size=sample.vocab_size)) for _ in range(DECODE_RUNS)
    ]
    lines: list[dict[str, Any]] = []
    for same in zip(*runs, strict=True):
        line: dict[str, Any] = {"work": same[0].work, "rows": same[0].rows, "bytes_per_token": same[0].bytes_per_token}
        line["runs"] = len(same)
        for side, name in (("tokens_per_second", "ours"), ("published", "published")):
            found = spread([getattr(row, side) for row in same])
            line |= {f"{name}_{what}": value for what, value in found.items()}
        print(line)
        lines.append(line)
    write("decode", lines)


def bench_learned(sample: Sample, write: Writer) -> None:
    """The compact presets: size, fidelity, and speed in several runs."""
    learned, _ = learn_presets(sample, sample.vocab_size)
    lines = csv_rows([each.fidelity() for each in learned], {"sample": sample.about})
    for each, line in zip(learned, lines, strict=True):
        line |= {"ids": each.ids_mean, "learned_rows": each.learned_rows, "runs": LEARNED_RUNS}
        runs = [list(measure_learned(each, seconds=0.4)) for _ in range(LEARNED_RUNS)]
        for same in zip(*runs, strict=True):
            work = same[0].work.partition(" ")[0]
            line |= {f"{work}_{what}": value for what, value in spread([row.tokens_per_second for row in same]).items()}
        print(line)
    write("learned", lines)


def spread(speeds: Sequence[float]) -> dict[str, float]:
    """Median, slowest and fastest of some runs."""
    found = {"median": median(speeds), "slowest": min(speeds), "fastest": max(speeds)}
    return {what: float(f"{value:.6g}") for what, value in found.items()}


PARTS = {"fidelity": bench_fidelity, "speed": bench_speed, "decode": bench_decode, "learned": bench_learned}


def print_tables(*tables: Group) -> None:
    Console(highlight=False).print(*tables, "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"what to measure: {', '.join(PARTS)} (default: all)")
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results", help="folder of the CSV files")
    arguments = parser.parse_args()
    unknown = [part for part in arguments.parts if part not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; known are {', '.join(PARTS)}")
    sample = benchmark_sample()
    about = {"machine": machine(), "version": __version__}
    stem = f"{datetime.date.today()}-{platform.machine()}"

    def write(kind: str, lines: Sequence[Mapping[str, Any]]) -> None:
        path = arguments.results / f"{stem}-{kind}.csv"
        write_csv(path, [{**line, **about} for line in lines])
        print(f"figures in {path}")

    for part in arguments.parts or PARTS:
        PARTS[part](sample, write)


if __name__ == "__main__":
    main()

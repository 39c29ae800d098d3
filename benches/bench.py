"""Fidelity and speed of the codec on this machine: two tables, and their figures in benches/results/.

    python benches/bench.py [--markdown]

Fidelity is measured for every configuration of tests/golden/cases.json and every preset, on more than 20,000 real
positions of the demo's teacher (`benches/sample.py` makes them once). The tables are those of `distillkit-codec bench`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from sample import benchmark_sample

from distillkit import __version__
from distillkit.bench.fidelity import measure_fidelity
from distillkit.bench.speed import DENSE_VOCABULARY, PACKED_ROWS, SpeedRow, machine, measure_speed
from distillkit.bench.tables import fidelity_markdown, fidelity_table, speed_markdown, speed_table, write_csv
from distillkit.codec import PRESETS, CodecConfig, codec_config, preset

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


def configurations(vocab_size: int) -> dict[str, CodecConfig]:
    """Every preset and every recorded configuration, by name; of those that are the same, the first."""
    cases = json.loads((ROOT / "tests" / "golden" / "cases.json").read_text())
    named: dict[str, CodecConfig] = {name: preset(name, vocab_size=vocab_size) for name in PRESETS}
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--markdown", action="store_true", help="print the tables as the README has them")
    parser.add_argument("--results", type=Path, default=ROOT / "benches" / "results", help="folder of the CSV files")
    arguments = parser.parse_args()
    sample = benchmark_sample()
    started = time.perf_counter()
    configs = configurations(sample.vocab_size)
    fidelity = list(measure_fidelity(sample, configs))
    speed = list(measure_speed(sample, vocab_size=sample.vocab_size, dense_vocab_size=DENSE_VOCABULARY))
    if arguments.markdown:
        print(f"On {len(sample):,} {sample.about}:\n\n{fidelity_markdown(fidelity)}")
        print(f"On {machine()}:\n\n{speed_markdown(speed)}")
    else:
        console = Console(highlight=False)
        console.print(fidelity_table(fidelity, sample), "", speed_table(speed), "")
    for work, text, reached in goals(speed):
        print(f"{'reached' if reached else 'MISSED '}  {work}: {text}")
    about = {"machine": machine(), "version": __version__}
    stem = f"{datetime.date.today()}-{platform.machine()}"
    paths = {"fidelity": arguments.results / f"{stem}-fidelity.csv", "speed": arguments.results / f"{stem}-speed.csv"}
    write_csv(paths["fidelity"], fidelity, {**about, "sample": sample.about})
    write_csv(paths["speed"], speed, about)
    print(f"{time.perf_counter() - started:.0f} seconds; written to {paths['fidelity']} and {paths['speed']}")


if __name__ == "__main__":
    main()

"""Looks for codec configurations that are more faithful than the published presets in the same bytes.

    python benches/presets.py [--sample FILE.npz|DATASET] [--k 32 50 64 128] [--out FRONT.csv]

Every configuration is one of the published quantized format, so the published decoder reads its bytes. For each k the
search walks from the published presets to neighbours (one field changed a little) and keeps the front: configurations
than which none is both smaller and of less mean KL. It screens on a few of the sample's rows and confirms the front on
all of them. It is deterministic: the same sample and arguments give the same front.

Compare only configurations of the same k. KL is over the stored ids and all others as one more outcome, which it does
not divide; the mass that the k ids have is printed above each table.
"""

from __future__ import annotations

import argparse
import csv
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distillkit.bench.fidelity import Figures, compare, figures
from distillkit.bench.machine import machine
from distillkit.bench.sample import Sample, load_sample
from distillkit.codec import Codec, DistributionQuantizationConfig
from distillkit.codec.presets import FIXED_PRESETS
from distillkit.errors import ConfigError

PUBLISHED = "recommended", "budget"
TERMS: tuple[int | str, ...] = (0, 1, 2, 3, 4, 5, "sqrt", "exp")
VALUE_DTYPES = "float16", "bfloat16"
TERM_DTYPES = "float32", "float16", "bfloat16"
MOST_BINS, MOST_BITS = 2, 8
NEW_BINS = (4, 8), (2, 16), (5, 24), (4, 44)
"""Bits and ranks of a bin that is added, with a float16 scale (bfloat16 is as large and coarser)."""
NEAR = 1.5
"""Screened configurations up to this many times the front's mean KL are measured on all rows."""

Fields = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """A configuration's figures on some rows; `value_bytes` are those before the ids."""

    fields: Fields
    value_bytes: int
    found: Figures

    def describe(self) -> str:
        """The fields in a line: "exact 2 float16 + 0 1 sqrt float16 on [0, 1] + 24 x 6 bits"."""
        fields = self.fields
        terms = " ".join(str(term) for term in fields["polynomial_terms"])
        unit = " on [0, 1]" if fields["normalize_t"] else ""
        bins = [
            f" + {each['num_elements']} x {each['element_bits']} bits ({each['scale_dtype']})"
            for each in fields["residual_bins"]
        ]
        exact = f"exact {fields['exact_k']} {fields['exact_dtype']}"
        return f"{exact} + {terms} {fields['term_dtype']}{unit}{''.join(bins)}"

    def row(self) -> dict[str, Any]:
        """For a CSV."""
        fields = {name: json.dumps(value) if isinstance(value, list) else value for name, value in self.fields.items()}
        return {"value_bytes": self.value_bytes, **{n: f"{v:.6g}" for n, v in asdict(self.found).items()}, **fields}


def published(name: str, k: int) -> Fields:
    """A published preset's fields, for another k."""
    return {"normalize_t": False, **FIXED_PRESETS[name], "k": k}


def starting_points(references: Sequence[Fields]) -> list[Fields]:
    """The references, and each in 16-bit floats; on [0, 1] all powers are finite in those."""
    halved = {"exact_dtype": "float16", "term_dtype": "float16", "normalize_t": True}
    return [*references, *(fields | halved for fields in references)]


def measure(sample: Sample, fields: Fields) -> Measured | None:
    """Encodes and decodes the sample's rows; None if the fields are no valid configuration."""
    try:
        codec = Codec(DistributionQuantizationConfig(d=sample.vocab_size, **fields))
    except ConfigError:
        return None
    ids, original = sample.top(codec.k, sample.vocab_size)
    decoded = codec.decode(codec.encode(ids, original))[1]
    return Measured(fields, codec.value_bytes, figures(original, decoded))


# -- neighbours --------------------------------------------------------------------------------------------------------


def neighbours(fields: Fields) -> Iterator[Fields]:
    """Configurations that differ in one thing; not all of them are valid."""
    for step in (-4, -2, -1, 1, 2, 4):
        yield fields | {"exact_k": fields["exact_k"] + step}
    for term in TERMS:
        chosen = set(fields["polynomial_terms"]) ^ {term}
        if chosen:
            yield fields | {"polynomial_terms": [each for each in TERMS if each in chosen]}
    for name, dtypes in (("exact_dtype", VALUE_DTYPES), ("term_dtype", TERM_DTYPES)):
        for dtype in dtypes:
            yield fields | {name: dtype}
    yield fields | {"normalize_t": not fields["normalize_t"]}
    yield from _other_bins(fields)


def _other_bins(fields: Fields) -> Iterator[Fields]:
    bins: list[Fields] = fields["residual_bins"]
    for number, each in enumerate(bins):
        before, after = bins[:number], bins[number + 1 :]
        yield fields | {"residual_bins": before + after}
        for name, step in (
            *(("element_bits", step) for step in (-1, 1)),
            *(("num_elements", step) for step in (-16, -8, -4, -1, 1, 4, 8, 16)),
        ):
            if each[name] + step >= 1 and (name != "element_bits" or each[name] + step <= MOST_BITS):
                yield fields | {"residual_bins": [*before, each | {name: each[name] + step}, *after]}
    if bins:  # The first bin takes over an exact rank, or more.
        for step in (1, 2, 4):
            longer = bins[0] | {"num_elements": bins[0]["num_elements"] + step}
            yield fields | {"exact_k": fields["exact_k"] - step, "residual_bins": [longer, *bins[1:]]}
    if len(bins) == 2:  # Ranks move from one bin to the other.
        for step in (-8, -2, 2, 8):
            moved = [
                each | {"num_elements": each["num_elements"] + sign * step}
                for sign, each in zip((1, -1), bins, strict=True)
            ]
            if all(each["num_elements"] >= 1 for each in moved):
                yield fields | {"residual_bins": moved}
    if len(bins) < MOST_BINS:
        for bits, ranks in NEW_BINS:
            added = {"scale_dtype": "float16", "element_bits": bits, "num_elements": ranks}
            for fewer in (0, 2, 6, 14):
                yield fields | {"exact_k": fields["exact_k"] - fewer, "residual_bins": [*bins, added]}


# -- search ------------------------------------------------------------------------------------------------------------


def front(measured: Sequence[Measured]) -> list[Measured]:
    """Those than which no other has both fewer (or as many) bytes and less mean KL, by bytes."""
    kept: list[Measured] = []
    for each in sorted(measured, key=lambda each: (each.value_bytes, each.found.kl_mean)):
        if not kept or each.found.kl_mean < kept[-1].found.kl_mean:
            kept.append(each)
    return kept


def sound(measured: Measured, top1: float) -> bool:
    """Finite, and the most probable id stays it in a share `top1` of the rows."""
    found = measured.found
    return bool(np.isfinite([found.kl_max, found.worst_error]).all()) and found.top1_agreement >= top1


def near_front(measured: Sequence[Measured]) -> list[Measured]:
    """The best of each size and `exact_k`, if its mean KL is at most `NEAR` times that of the front's member there.

    More rows may show what few did not: that two ids are swapped, where residuals decide their order.
    """
    best = {(each.value_bytes, each.fields["exact_k"]): each for each in sorted(measured, key=_by_kl, reverse=True)}
    kept, least = [], np.inf
    for each in sorted(best.values(), key=lambda each: (each.value_bytes, each.found.kl_mean)):
        least = min(least, each.found.kl_mean)
        if each.found.kl_mean <= NEAR * least:
            kept.append(each)
    return kept


def _by_kl(measured: Measured) -> float:
    return measured.found.kl_mean


def search(sample: Sample, starts: Sequence[Fields], most_bytes: int, tries: int) -> list[Measured]:
    """All on or near the front that a walk over neighbours finds within `most_bytes`, in at most `tries` measurements.

    Every round tries the neighbours of the front's members that have not been expanded yet; the search ends early when
    there are none.
    """
    seen: set[str] = set()
    expanded: set[str] = set()
    found: list[Measured] = []
    waiting = list(starts)
    while waiting and len(seen) < tries:
        for fields in waiting:
            key = json.dumps(fields, sort_keys=True)
            if key in seen or len(seen) >= tries:
                continue
            seen.add(key)
            measured = measure(sample, fields)
            if measured is not None and measured.value_bytes <= most_bytes and sound(measured, top1=1.0):
                found.append(measured)
        members = [
            each.fields for each in reversed(front(found)) if json.dumps(each.fields, sort_keys=True) not in expanded
        ]
        expanded |= {json.dumps(fields, sort_keys=True) for fields in members}
        waiting = [neighbour for fields in members for neighbour in neighbours(fields)]
    return near_front(found)


def confirm(sample: Sample, candidates: Sequence[Measured], top1: float) -> list[Measured]:
    """The front of the candidates on all rows, of those with a top-1 agreement of at least `top1`."""
    again = [measure(sample, each.fields) for each in candidates]
    return front([each for each in again if each is not None and sound(each, top1)])


def winner(candidates: Sequence[Measured], reference: Measured) -> Measured | None:
    """The one of least mean KL within the reference's bytes, if mean, 99th percentile and top-1 are no worse."""
    fitting = [
        each
        for each in candidates
        if each.value_bytes <= reference.value_bytes
        and each.found.kl_mean < reference.found.kl_mean
        and each.found.kl_p99 < reference.found.kl_p99
        and each.found.top1_agreement >= reference.found.top1_agreement
    ]
    return min(fitting, key=lambda each: each.found.kl_mean, default=None)


# -- output ------------------------------------------------------------------------------------------------------------


def _line(label: str, each: Measured) -> str:
    found = each.found
    return (
        f"{each.value_bytes:5}  {found.kl_mean:8.2e}  {found.kl_p99:8.2e}  {found.mass_error:8.2e}  "
        f"{found.top1_agreement:7.3%}  {found.worst_likely:6.2f}  {found.increasing:4.0%}  {label}"
    )


def show(sample: Sample, k: int, members: Sequence[Measured], references: dict[str, Measured]) -> None:
    """The front with the published presets between its members, and what beats each of them."""
    mass = np.exp(sample.logprobs[:, :k].astype(np.float64)).sum(-1).mean()
    print(f"\nk = {k}: the stored ids have {mass:.2%} of the mass; compare only within this table")
    print("value\nbytes   KL mean    KL p99  mass err    top-1  p>1e-6  rise")
    lines = [(each.value_bytes, 1, _line(each.describe(), each)) for each in members]
    lines += [(each.value_bytes, 0, _line(f"{name}'s fields", each)) for name, each in references.items()]
    for _, _, line in sorted(lines):
        print(line)
    for name, reference in references.items():
        better = winner(members, reference)
        if better is None:
            print(f"nothing beats {name}'s fields")
            continue
        config = DistributionQuantizationConfig(d=sample.vocab_size, **better.fields)
        # `compare` has the published decoder read the bytes, and raises if it doesn't read the same.
        checked = compare(name, config, sample.first(500))
        assert checked.ours is not None
        times = reference.found.kl_mean / better.found.kl_mean
        print(f"{name}'s fields are beaten {times:.1f}x in {better.value_bytes} of {reference.value_bytes} bytes by")
        print(f"  {json.dumps(config.model_dump())}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", help="rows to measure on (default: those of benches/sample.py)")
    parser.add_argument("--k", type=int, nargs="+", default=[32, 50, 64, 128], help="stored ids a row")
    parser.add_argument("--most-bytes", type=int, default=64, help="largest size of a row's values")
    parser.add_argument("--rows", type=int, default=500, help="rows to screen on")
    parser.add_argument("--tries", type=int, default=3000, help="configurations to screen for each k")
    parser.add_argument("--out", type=Path, help="CSV file for the fronts")
    arguments = parser.parse_args()
    if arguments.sample is None:
        from sample import benchmark_sample

        sample = benchmark_sample()
    else:
        sample = load_sample(arguments.sample)
    started = time.perf_counter()
    print(f"{len(sample):,} {sample.about}" + (f"\n{sample.caution}" if sample.caution else ""))
    rows: list[dict[str, Any]] = []
    for k in arguments.k:
        if k > sample.k:
            parser.error(f"--k {k}: the sample has {sample.k} ids a row")
        published_fields = {name: published(name, k) for name in PUBLISHED if FIXED_PRESETS[name]["exact_k"] < k}
        found = search(
            sample.first(arguments.rows),
            starting_points(list(published_fields.values())),
            arguments.most_bytes,
            arguments.tries,
        )
        references = {
            name: each for name, fields in published_fields.items() if (each := measure(sample, fields)) is not None
        }
        # None may swap the most probable id more often than the published presets do.
        members = confirm(sample, found, min(each.found.top1_agreement for each in references.values()))
        show(sample, k, members, references)
        rows += [{"name": f"{name}'s fields", **each.row()} for name, each in references.items()]
        rows += [{"name": "", **each.row()} for each in members]
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with open(arguments.out, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*rows[0], "machine"])
            writer.writeheader()
            writer.writerows(row | {"machine": machine()} for row in rows)
    print(f"\n{time.perf_counter() - started:.0f} seconds")


if __name__ == "__main__":
    main()

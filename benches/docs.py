"""Makes docs/benchmarks.md of the newest figures of each kind in benches/results/.

    python benches/docs.py

Recorded test layouts (`q_…`, `legacy_…`) are left out. A test holds that the page is up to date.
"""

from __future__ import annotations

import csv
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distillkit.bench.published import term_matrix
from distillkit.bench.tables import short_number
from distillkit.capture.settings import DEFAULT_PRESET
from distillkit.codec import preset
from distillkit.codec.presets import FIXED_PRESETS, FORMER_PRESETS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
WIDTH = 100
# What is known of the machine's load during a run, by kind and date; the CSV files do not record it.
QUIET = ", on a quiet machine"
LOAD = {
    ("capture-compact-128", "2026-11-30"): QUIET,
    ("decode", "2026-11-29"): QUIET,
    ("learned", "2026-11-30"): QUIET,
}

Row = Mapping[str, str]


@dataclass(frozen=True)
class Table:
    """A CSV file of benches/results: its kind, date and processor architecture, by its name, and its lines."""

    kind: str
    date: str
    architecture: str
    rows: Sequence[Row]

    @property
    def load(self) -> str:
        """Whether the machine did other work; empty if that is not known."""
        return LOAD.get((self.kind, self.date), "")

    @property
    def measured(self) -> str:
        """When and where: "2026-11-29 on AMD EPYC, 2 cores (x86_64)"."""
        machine = self.rows[0].get("machine")
        return f"{self.date} on {f'{machine} ({self.architecture})' if machine else self.architecture}"


def newest(kind: str, results: Path = RESULTS) -> Table:
    """The newest table of a kind ("fidelity", "speed", …)."""
    pattern = re.compile(rf"(\d{{4}}-\d\d-\d\d)-([^-]+)-{re.escape(kind)}\.csv")
    found = sorted((match.groups(), path) for path in results.iterdir() if (match := pattern.fullmatch(path.name)))
    if not found:
        raise SystemExit(f"{results} has no {kind} figures")
    (date, architecture), path = found[-1]
    with path.open(newline="", encoding="utf-8") as file:
        return Table(kind, date, architecture, list(csv.DictReader(file)))


# -- Markdown ----------------------------------------------------------------------------------------------------------


def prose(text: str) -> str:
    """A paragraph in lines of at most `WIDTH` characters."""
    return textwrap.fill(" ".join(text.split()), WIDTH, break_long_words=False, break_on_hyphens=False)


def bullets(items: Iterable[str]) -> str:
    """A list with one item a paragraph."""
    fill = {"initial_indent": "- ", "subsequent_indent": "  "}
    return "\n".join(
        textwrap.fill(" ".join(item.split()), WIDTH, break_long_words=False, break_on_hyphens=False, **fill)
        for item in items
    )


def table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table; numbers, in all columns but the first, to the right."""
    rows = [headings, ["---"] + ["---:"] * (len(headings) - 1), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def number(row: Row, column: str) -> str:
    return short_number(float(row[column])) if row[column] else "–"


def percent(row: Row, column: str, digits: int = 1) -> str:
    return f"{float(row[column]):.{digits}%}"


def span(row: Row, least: str, most: str) -> str:
    return f"{number(row, least)} to {number(row, most)}"


def offered(rows: Iterable[Row]) -> list[Row]:
    """The kinds of work, but for those with presets that are not offered any more."""
    return [row for row in rows if row["work"].split()[-1] not in FORMER_PRESETS]


def of_presets(found: Table) -> list[Row]:
    return [row for row in found.rows if row["config"] in FIXED_PRESETS]


def named(rows: Iterable[Row], **values: str) -> Row:
    """The row with these values."""
    return next(row for row in rows if all(row[column] == value for column, value in values.items()))


# -- sections ----------------------------------------------------------------------------------------------------------


def at_a_glance() -> list[str]:
    fidelity, decode, learned = newest("fidelity"), newest("decode"), newest("learned")
    lines = [
        [
            f"`{row['config']}`",
            number(row, "bytes_per_token"),
            number(row, "ours_kl_mean"),
            percent(row, "ours_top1_agreement"),
            f"{number(row, 'decode_median')} a core",
        ]
        for row in learned.rows
    ]
    for row in of_presets(fidelity):
        speed = named(decode.rows, work=f"decode {row['config']}")
        lines.append(
            [
                f"`{row['config']}`",
                row["bytes_per_token"],
                number(row, "ours_kl_mean"),
                percent(row, "ours_top1_agreement"),
                number(speed, "ours_median"),
            ]
        )
    rows = int(fidelity.rows[0]["rows"])
    return [
        "## At a glance",
        table(["preset", "bytes per token", "mean KL, nats", "top-1 kept", "decoded tokens/s"], lines),
        prose(
            f"""KL and top-1 kept (the share of rows whose most probable id stays the most probable) are measured on
            {rows:,} {fidelity.rows[0]["sample"]}, of compact presets on {int(learned.rows[0]["rows"]):,} of them; KL is
            over the stored ids and all others as one more outcome.
            `compact-128`, `recommended` and `faithful` store 128 ids per token, `compact-50`, `balanced` and `budget`
            50, and KL is comparable only for the same number. Speed is the median of {decode.rows[0]["runs"]} runs on
            all cores, {decode.measured}{decode.load}, and of compact presets, on one core, of
            {learned.rows[0]["runs"]}, {learned.measured}{learned.load}; the spread is below. Bytes are those of a
            vocabulary of 32,769 to 65,536 ids, and of compact presets those of the
            [priors below](#compact-presets)."""
        ),
    ]


FIDELITY = {
    "KL mean": "kl_mean",
    "KL p99": "kl_p99",
    "KL max": "kl_max",
    "mass error": "mass_error",
    "top-1 kept": "top1_agreement",
    "worst error": "worst_error",
    "worst, p > 1e-6": "worst_likely",
}


def fidelity_line(row: Row) -> list[str]:
    show = {column: percent if column == "top1_agreement" else number for column in FIDELITY.values()}
    cells = []
    for column in show:
        ours, published = (float(row[f"{side}_{column}"]) for side in ("ours", "published"))
        texts = [show[column](row, f"{side}_{column}") for side in ("ours", "published")]
        # What reads the same is not marked, whatever further digits say.
        if texts[0] != texts[1]:
            better = int((ours < published) == (column == "top1_agreement"))
            texts[better] = f"**{texts[better]}**"
        cells.append(" / ".join(texts))
    over = f"{float(row['over_optimum']):.3f}" if row["over_optimum"] else ""
    return [f"`{row['config']}`", row["bytes_per_token"], *cells, over]


def fidelity_section() -> list[str]:
    found = newest("fidelity")
    rows = of_presets(found)
    return [
        "## Fidelity",
        prose(
            f"""Ours / the published encoder in the same bytes, both read by the same decoder, the better in bold, on
            {int(rows[0]["rows"]):,} {rows[0]["sample"]}. KL(original ‖ decoded) is in nats, over
            K ∪ {{R}}: the stored ids, and all others together as one more outcome R; mass error is the
            mean of |Σp̂ − Σp|; top-1 kept is the share of rows whose most probable id stays the most probable; errors
            are of log-probabilities. The last column is our mean KL over the least that the layout allows with
            unrounded coefficients and values in any order."""
        ),
        table(["preset", "bytes per token", *FIDELITY, "ours / least KL"], map(fidelity_line, rows)),
        prose(
            f"""Measured {found.measured}. The published algorithm, that of the original DistillKit, is written down in
            plain torch (`python/distillkit/bench/published.py`); bytes of both encoders are readable by both decoders,
            which is checked first. Its figures here are those with one thread; for `recommended` they say little: see
            below."""
        ),
        prose(
            """Without residuals and with float32 coefficients (`recommended`, `budget`), no decoded row rises from one
            id to the next, and none has a total probability above 1. Presets with residuals (`faithful`, `balanced`)
            are closer in KL, but neighbours may change places beyond the exact ranks. Errors of ids with
            p > 1e-6 stay within the largest one of the row's unweighted fit or, if that is more, within a
            [slack](encoder.md#4-bounds) (`budget`: 7.8 nats), or slightly above where the order of the values demands
            it."""
        ),
        prose(
            """What would change these figures: another teacher or another text, whose distributions have other shapes.
            The load and the number of threads change nothing but the published encoder's figures."""
        ),
    ]


def spread_section() -> list[str]:
    singular = np.linalg.svd(term_matrix(preset("recommended", vocab_size=65_536)).numpy(), compute_uv=False)
    resolved = singular[0] * 2.0**-23
    lines, samples = [], (newest("fidelity"), newest("bundled"))
    for found in samples:
        row = named(found.rows, config="recommended")
        spread = "published_spread_"
        lines.append(
            [
                f"{int(row['rows']):,} {'positions' if found is samples[0] else 'bundled positions'}",
                number(row, f"{spread}one_thread"),
                number(row, f"{spread}all_threads"),
                span(row, f"{spread}least", f"{spread}most"),
                number(row, f"{spread}normalized"),
                number(row, "ours_kl_mean"),
                number(row, "optimum_kl_mean"),
            ]
        )
    row = samples[0].rows[0]
    threads, orders = row["published_spread_threads"], row["published_spread_orders"]
    headings = ["sample", "1 thread", f"{threads} threads", "all settings", "`normalize_t`", "ours", "least KL"]
    return [
        "## The published encoder on `recommended`",
        prose(
            f"""The published encoder has no single figure for `recommended`: its KL changes with the number of threads.
            It fits the coefficients by a singular value decomposition in float32. The terms, the square root of the
            rank and powers up to 111⁴, have singular values from {singular[0] / 1e6:.0f} million
            down to {singular[-1]:.2f}, of which float32 cannot resolve those below about {resolved:.0f}:
            {int((singular < resolved).sum())} of the {len(singular)}. What the encoder divides by are rounding errors,
            and those depend on the order in which numbers are added: on the number of threads, the processor and the
            library. Its cutoff, an absolute 1e-5, lies far below all of them and removes none. Mean KL of the same
            algorithm on the same rows:"""
        ),
        table(headings, lines),
        prose(
            f""""All settings" is the range over both numbers of threads and {orders} orders in which the decomposition
            takes the ranks; in exact arithmetic all of them give the same result. Other machines may leave this range.
            With `normalize_t`, which puts the ranks on [0, 1], float32 resolves the terms, and the result is the same
            in every setting: that is the published code at its best in this layout, and the figure to compare ours
            with. The published preset does not set it."""
        ),
    ]


def order_section() -> list[str]:
    found = newest("order")
    whats = list(dict.fromkeys(row["what"] for row in found.rows))
    configs = list(dict.fromkeys(row["config"] for row in found.rows))
    lines = [
        [f"`{config}`", *(f"{float(named(found.rows, config=config, what=what)['ratio']) - 1:.1%}" for what in whats)]
        for config in configs
    ]
    return [
        "## What is left to gain",
        prose(
            """How far above the least KL of its layout a row must be, if its exact values are rounded to the nearest
            bfloat16; if its values must also not rise from one to the next; and what our encoder reaches:"""
        ),
        table(["preset", *whats], lines),
        prose(
            f"""Ours can be below such a bound because it rounds exact values jointly, such that their errors cancel.
            Measured {found.measured}, on every fourth row of the sample."""
        ),
    ]


def speed_section() -> list[str]:
    found = newest("speed")
    lines = []
    memory = ""
    for row in offered(found.rows):
        lines.append(
            [
                row["work"],
                f"{int(row['rows']):,}",
                number(row, "tokens_per_second"),
                number(row, "published"),
                f"**{number(row, 'ratio')}×**" if row["ratio"] else "–",
                number(row, "bytes_per_token"),
                f"{float(row['mb_per_second']):,.0f}",
                f"{number(row, 'limit')} ({row['limit_is']})",
            ]
        )
        if row["published_extra_bytes"]:
            sizes = [float(row[column]) / 1e6 for column in ("extra_bytes", "published_extra_bytes")]
            sides = ["less than 1 MB" if size < 1 else f"{size:.0f} MB" for size in sizes]
            memory = f"""At its peak, decoding on CPU tensors takes {sides[0]} beyond inputs and outputs, the published
            algorithm {sides[1]}."""
    headings = ["work", "rows per call", "tokens/s", "published, tokens/s", "ratio", "bytes per token", "MB/s"]
    return [
        "## Speed",
        prose(
            f"""Ours and the published algorithm in batched torch, interleaved in one process, with all cores unless
            the row says otherwise; the best of several calls. What is timed is checked first. MB/s are of the decoded
            ids and values (12 bytes for each of k), or of the logits. The limit is what the same machine does with as
            many bytes. Measured {found.measured}{found.load}."""
        ),
        table([*headings, "limit, tokens/s"], lines),
        prose(memory),
        prose(
            """What would change these figures: the number of cores; AVX-512 (the codec falls back to AVX2 or portable
            code); memory bandwidth, which moved by a third between runs on this machine; and other work on the machine.
            The published algorithm expands every id to a tensor of its bits, so its speed depends on whether these
            tensors fit into the caches: compare calls of 512 rows with those of 8,192."""
        ),
        prose(
            """The two rows on reading shards into arrays do not show how reading scales: the one with one core is
            measured in a process of its own and not interleaved with the other, and they differ by less than this
            machine varies between runs."""
        ),
    ]


def decode_section() -> list[str]:
    found = newest("decode")
    lines = [
        [
            f"`{row['work'].removeprefix('decode ')}`",
            row["bytes_per_token"],
            number(row, "ours_median"),
            span(row, "ours_slowest", "ours_fastest"),
            number(row, "published_median"),
            span(row, "published_slowest", "published_fastest"),
        ]
        for row in offered(found.rows)
    ]
    headings = ["preset", "bytes per token", "tokens/s, median", "slowest to fastest run", "published, median"]
    first = found.rows[0]
    return [
        "### Decoding, preset by preset",
        prose(
            f"""{first["runs"]} runs of decoding {int(first["rows"]):,} rows per call, with the spread of the runs; each
            run's figure is its best call. Measured {found.measured}{found.load}."""
        ),
        table([*headings, "slowest to fastest run"], lines),
    ]


def learned_section() -> list[str]:
    found = newest("learned")
    first = found.rows[0]
    lines = [
        [
            f"`{row['config']}`",
            f"{float(row['ids']):.0f}",
            number(row, "bytes_per_token"),
            number(row, "ours_kl_mean"),
            number(row, "ours_kl_p99"),
            *(
                f"{number(row, f'{work}_median')} ({span(row, f'{work}_slowest', f'{work}_fastest')})"
                for work in ("encode", "decode")
            ),
        ]
        for row in found.rows
    ]
    headings = ["preset", "ids per row", "bytes per token", "KL mean", "KL p99", "encode, tokens/s", "decode, tokens/s"]
    return [
        "## Compact presets",
        prose(
            f"""Each preset learns its prior from {int(first["learned_rows"]):,} positions of the sample, three quarters
            of its documents, and is measured on {int(first["rows"]):,} of the others, a document at a time. Larger
            captures learn from up to 131,072 positions, and take about 6% fewer bytes than here; the prior itself is
            not counted ([bytes.md](bytes.md)). Speed is that of one core: a document is coded by one, several documents
            by several at the same time. Median, and slowest to fastest of {first["runs"]} runs. Measured
            {found.measured}{found.load}."""
        ),
        table(headings, lines),
    ]


def packer_section() -> list[str]:
    found = newest("bits")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in found.rows:
        groups.setdefault((row["work"], row["values"], row["best_other_name"]), []).append(row)
    lines = []
    for (work, values, other), rows in groups.items():
        widths = [int(row["width"]) for row in rows]
        ours = [max(float(row[name] or 0) for name in ("portable", "avx2", "avx512")) for row in rows]
        theirs = [float(row["best_other"]) for row in rows]
        ratios = [1 / float(row["other_to_ours"]) for row in rows]
        lines.append(
            [
                f"{work} {values.replace('u', '')}-bit integers",
                f"{min(widths)} to {max(widths)}",
                f"{min(ours) / 1e9:.1f} to {max(ours) / 1e9:.1f}",
                f"{other}: {min(theirs) / 1e9:.1f} to {max(theirs) / 1e9:.1f}",
                f"{min(ratios):.2f} to {max(ratios):.2f}",
            ]
        )
    return [
        "## The bit packer",
        prose(
            f"""Billions of integers per second on one core, compared with the fastest of the crates fastlanes and
            bitpacking at each width; the range is over the widths. All buffers lie in the first-level cache, and every
            packer's values are checked before its time counts. The other crates interleave values in layouts of their
            own; ours is the published one. Measured {found.measured}{found.load}; without AVX-512 our rates are lower
            (columns `portable` and `avx2` of the CSV)."""
        ),
        table(["work", "bits wide", "ours", "fastest other", "ours / other"], lines),
    ]


def capture_section() -> list[str]:
    found = newest(f"capture-{DEFAULT_PRESET}")
    lines = []
    for row in found.rows:
        tokens = int(row["tokens"])
        alone, captured = (tokens / float(row[column]) for column in ("bare", "captured"))
        work = 1e6 * (float(row["encode"]) + float(row["write"])) / tokens
        memory = row["teacher"] == "from memory"
        lines.append(
            [
                row["teacher"],
                f"{tokens:,}",
                short_number(alone),
                short_number(captured),
                "–" if memory else percent(row, "overhead"),
                "–" if memory else f"{percent(row, 'least')} to {percent(row, 'most')}",
                f"{work:.1f}",
            ]
        )
    headings = ["teacher", "tokens", "alone, tokens/s", "captured, tokens/s", "extra time, median shard", "range"]
    return [
        "## What capturing costs",
        prose(
            f"""The same documents scored by the teacher with nothing kept, and captured with `{DEFAULT_PRESET}`, whose
            prior was learned before; the shards of both are interleaved. Answers from memory stand for a teacher on an
            accelerator, which gives 20,000 tokens per second and leaves the CPU to the pipeline; and, all at once, show
            the speed of the pipeline itself. Measured {found.measured}{found.load}. The last column is the time of the
            encoder's thread. Where the teacher runs on the CPU, it shares the cores with it."""
        ),
        table([*headings, "encoder and writer, µs per token"], lines),
    ]


def engines_section() -> list[str]:
    found = newest("engines")
    seeds = [column for column in found.rows[0] if column.startswith("held_out_kl_seed_")]
    first = found.rows[0]
    lines = [
        [
            row["engine"],
            f"{int(row['tokens']):,}",
            number(row, "tokens_per_second"),
            *(f"{float(row[s]):.5f}" for s in seeds),
        ]
        for row in found.rows
    ]
    return [
        "## transformers and vLLM",
        prose(
            f"""The demo's teacher in float32 on a CPU, captured by both engines, and the demo's student trained from
            either capture for 100 steps. Over {int(first["rows"]):,} rows, {percent(first, "same_first_id")} have the
            same most probable id, {percent(first, "shared_ids", 4)} of the stored ids are the same, and the KL between
            the stored distributions is {number(first, "kl_mean")} on average and {number(first, "kl_p99")} at the 99th
            percentile. Measured {found.measured}. A GPU, or a lower precision, would change both the speed and the
            distance."""
        ),
        table(["engine", "tokens", "tokens/s", *(f"held-out KL, seed {s.rsplit('_', 1)[1]}" for s in seeds)], lines),
    ]


def losses_section() -> list[str]:
    found = newest("losses")
    fused, whole = (named(found.rows, side=side) for side in ("fused", "whole"))
    lines = [
        [
            what,
            f"{float(fused[column]) / unit:,.{digits}f} {name}",
            f"{float(whole[column]) / unit:,.{digits}f} {name}",
            f"{float(fused[column]) / float(whole[column]):.2f}",
        ]
        for what, column, unit, name, digits in (
            ("peak memory beyond the weight's gradient", "bytes", 1e6, "MB", 0),
            ("time", "seconds", 1.0, "s", 1),
        )
    ]
    return [
        "## Losses without whole logits",
        prose(
            f"""Cross-entropy and KL, forward and backward in float32, with the head's products made in chunks, and with
            all logits made first: V = {int(fused["vocabulary"]):,}, {int(fused["positions"]):,} positions, hidden size
            {int(fused["hidden"]):,}, k = {fused["k"]}. Both sides are checked to agree. Measured {found.measured}. The
            saving grows with the number of positions and the vocabulary."""
        ),
        table(["", "in chunks", "all logits first", "ratio"], lines),
    ]


def which_loss_section() -> list[str]:
    found = newest("which-loss")
    lines = [
        [
            f"`{row['function']}`",
            row["missing"] or "–",
            row["k"] if row["missing"] else "–",
            f"{float(row['eval_kl']):.3f}",
            f"{float(row['eval_perplexity']):.0f}",
            percent(row, "eval_top1_agreement"),
        ]
        for row in found.rows
    ]
    return [
        "## Which loss",
        prose(
            f"""The demo's student trained with each loss for the same {found.rows[0]["steps"]} steps over the same
            documents, one seed, {found.measured}; see [losses.md](losses.md) for what follows from it. Differences of
            a few hundredths may be due to the seed, and a longer run may rank them differently."""
        ),
        table(["loss", "missing probability", "k", "held-out KL", "perplexity", "top-1 agreement"], lines),
    ]


RERUN = [
    "`make bench`: fidelity, speed, decoding, compact presets and the bit packer, on an otherwise idle machine, "
    "written to benches/results/ under today's date. Enter a known load in `LOAD` of `benches/docs.py`.",
    "`python benches/bench.py fidelity`, `speed`, `decode` or `learned`: one of them. They run on positions of the "
    "demo's teacher, which `benches/sample.py` collects once, in a few minutes.",
    "`python benches/order.py`, `benches/capture.py`, `benches/losses.py`, `benches/engines.py` and "
    "`benches/which_loss.py`: the other sections. The last two need `make demo` first, engines also `make test-vllm`.",
    "`make bench-docs`: this page, from the newest file of each kind.",
    "`distillkit-codec bench --quick --sample ./captured`: fidelity and speed on your machine and your own data.",
]


def page() -> str:
    """The whole page."""
    parts = [
        "# Benchmarks",
        prose(
            """Generated by `make bench-docs` (`benches/docs.py`) from the newest CSV files in
            [benches/results](../benches/results); do not edit it by hand. Every section says when, where and how its
            figures were measured, and what would change them. Where a section does not say whether the machine was
            quiet during a timing, its load was not recorded. How to measure them again is at the end."""
        ),
    ]
    sections = (
        at_a_glance,
        fidelity_section,
        spread_section,
        order_section,
        speed_section,
        decode_section,
        learned_section,
        packer_section,
        capture_section,
        engines_section,
        losses_section,
        which_loss_section,
    )
    for section in sections:
        parts += section()
    parts += ["## How to measure again", bullets(RERUN)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

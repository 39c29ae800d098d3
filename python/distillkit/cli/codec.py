"""`distillkit-codec`: look at captured datasets, check them, convert them, and time the codec."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distillkit import __version__
from distillkit.cli.common import output, progress_console, run_cli
from distillkit.codec import PRESETS, Codec, preset
from distillkit.errors import DistillKitError
from distillkit.inspect import Inspection, inspect_dataset, recompute_fidelity
from distillkit.shards import Dataset, convert, verify_dataset

__all__ = ["cli", "main"]

_CONFIG = click.option(
    "--config",
    type=click.Path(dir_okay=False),
    help="YAML with the codec of a published dataset, if there is no compression_config.yaml beside it.",
)
_SPLIT = click.option("--split", help="Split of a published dataset that has splits.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="distillkit-codec")
def cli() -> None:
    """Look at captured distributions: how small, how faithful, are they sound."""


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=progress_console(), transient=True) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# -- inspect -----------------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("path")
@_CONFIG
@_SPLIT
@click.option(
    "--sample", type=click.IntRange(min=1), help="Look at this many documents, evenly spread, instead of all."
)
@click.option(
    "--teacher", help="Measure fidelity again with this model (folder or hub id), on --sample documents or 16."
)
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw the distribution, the mass and the sizes (PNG).")
@_JSON
def inspect(
    path: str,
    config: str | None,
    split: str | None,
    sample: int | None,
    teacher: str | None,
    plot: str | None,
    as_json: bool,
) -> None:
    """Show how small and how faithful the dataset at PATH is.

    PATH is a captured dataset, one of its shards, or a published dataset; a folder, a file or an fsspec URL.

    Bytes a token are those of a stored distribution: its ids, its values, and as overhead everything else in the
    files (token ids, checksums,
    the container). Ratios compare all of it with dense bfloat16 logits (2 bytes a vocabulary entry) and with plain
    top-k (4 bytes an id, 2 a
    value).

    The alignment check counts how often the true next token is the stored first one, with the rows as they are and
    shifted by one. It must
    peak at 0; otherwise the rows stand beside the wrong tokens, and the exit status is 1.
    """
    dataset = Dataset.open(path, config=config, split=split)
    with _progress("reading documents") as progress:
        inspection = inspect_dataset(dataset, sample=sample, progress=progress)
    if teacher is not None:
        with _progress("running the teacher") as progress:
            stats = recompute_fidelity(dataset, teacher, sample=sample or 16, progress=progress)
        source = f"computed again with {teacher} on {stats.rows:,} rows"
        inspection = replace(inspection, fidelity=stats, fidelity_source=source)
    if plot is not None:
        from distillkit.plots import plot_inspection

        plot_inspection(inspection, plot)
    if as_json:
        click.echo(json.dumps(inspection.to_dict(), indent=2))
    else:
        _show(inspection, plot)
    if not inspection.aligned:
        raise DistillKitError(
            f"{path}: the rows are shifted by {inspection.shifts.shifted():+d} against the tokens: the next "
            f"token is the stored first at {inspection.shifts}. A student would learn the wrong positions"
        )


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="cyan", min_width=18)
    table.add_column(overflow="fold")
    return table


def _show(inspection: Inspection, plot: str | None) -> None:
    console = output()
    for table in (_what(inspection), _size(inspection), _content(inspection), _fidelity(inspection)):
        console.print(table)
        console.print()
    if plot is not None:
        console.print(f"plot: {plot}", soft_wrap=True)


def _what(inspection: Inspection) -> Table:
    table = _table(inspection.path)
    count = f"{inspection.documents:,} of {inspection.tokens:,} tokens ({inspection.rows:,} distributions)"
    table.add_row("documents", count)
    if inspection.documents_read < inspection.documents:
        table.add_row("", f"figures below are over a sample of {inspection.documents_read:,} documents")
    table.add_row("kind", "captured by distillkit" if inspection.kind == "distillkit" else "published dataset")
    table.add_row("teacher", _named(inspection.teacher, "dtype", "revision"))
    table.add_row("tokenizer", _named(inspection.tokenizer, "fingerprint"))
    table.add_row("vocabulary", f"{inspection.vocab_size:,} ids, head of {inspection.head_size:,}")
    name = f"{inspection.codec['format']} version {inspection.codec['version']}"
    table.add_row("codec", name + (f", preset {inspection.preset}" if inspection.preset else ""))
    config = inspection.codec["config"]
    table.add_row("", ", ".join(f"{key} {json.dumps(value)}" for key, value in config.items()))
    return table


def _named(facts: dict[str, Any] | None, *details: str) -> str:
    if facts is None:
        return "not recorded"
    known = ", ".join(str(facts[detail]) for detail in details if facts.get(detail))
    return f"{facts.get('name')}" + (f" ({known})" if known else "")


def _size(inspection: Inspection) -> Table:
    table = _table("size")
    codec = inspection.id_bytes + inspection.value_bytes
    table.add_row(
        "bytes a token", f"{codec:,.0f}: {inspection.id_bytes:,.0f} ids + {inspection.value_bytes:,.0f} values"
    )
    table.add_row(
        "overhead", f"{inspection.overhead_bytes:,.1f} bytes a token in the files, {inspection.total_bytes:,.1f} in all"
    )
    table.add_row("against dense bf16", f"{inspection.dense_ratio:,.0f}× smaller")
    table.add_row("against top-k bf16", f"{inspection.topk_ratio:,.2f}× smaller")
    return table


def _content(inspection: Inspection) -> Table:
    table = _table("content")
    mean, median, low = inspection.mass_mean, inspection.mass_p50, inspection.mass_p1
    table.add_row("mass stored", f"mean {mean:.2%}, median {median:.1%}, 1% of positions below {low:.1%}")
    table.add_row(
        "true next token", f"is the first {inspection.first_rate:.1%}, is stored {inspection.stored_rate:.1%}"
    )
    verdict = "[green]ok[/]" if inspection.aligned else "[bold red]FAILED[/]"
    table.add_row("alignment", f"{verdict}: {inspection.shifts}")
    return table


def _fidelity(inspection: Inspection) -> Table:
    stats = inspection.fidelity
    table = _table("fidelity of the codec")
    if stats is None or not stats.rows:
        table.add_row("not recorded", "measure it with --teacher MODEL")
        return table
    table.add_row("source", inspection.fidelity_source)
    table.add_row(
        "KL(top-k ‖ decoded)", f"mean {stats.kl_mean:.2e}, p99 {stats.kl_p99:.2e}, max {stats.kl_max:.2e} nats"
    )
    table.add_row("worst error", f"{stats.worst_error:.2f} nats, of any stored id")
    table.add_row("top-1 agreement", f"{stats.top1_agreement:.3%}")
    table.add_row("mass error", f"{stats.mass_error:.1e}")
    return table


# -- verify, convert ---------------------------------------------------------------------------------------------------


@cli.command()
@click.argument("path")
@_CONFIG
@_SPLIT
@_JSON
def verify(path: str, config: str | None, split: str | None, as_json: bool) -> None:
    """Check the dataset at PATH: manifest against files, every hash and checksum, every row decoded.

    Exit status 1 if anything is wrong; each problem is named with its file and document.
    """
    with _progress("checking documents") as progress:
        report = verify_dataset(path, config=config, split=split, progress=progress)
    if as_json:
        click.echo(json.dumps({**asdict(report), "ok": report.ok}, indent=2))
    else:
        found = f"{report.files} files, {report.documents:,} documents, {report.tokens:,} tokens, {report.rows:,} rows"
        output().print(f"{'sound' if report.ok else 'sound so far'}: {found}", soft_wrap=True)
    if not report.ok:
        raise DistillKitError("\n".join((f"{len(report.problems)} problems in {path}", *report.problems)))


@cli.command("convert")
@click.argument("source")
@click.argument("destination", type=click.Path(file_okay=False))
@_CONFIG
@_SPLIT
@click.option(
    "--shard-tokens", type=click.IntRange(min=1), default=262_144, show_default=True, help="Tokens of a shard."
)
@click.option(
    "--tokenizer", help="The teacher's tokenizer (folder or hub id), so that training can check the student's."
)
@click.option("--teacher", help="The teacher's name, for the header.")
def convert_command(
    source: str,
    destination: str,
    config: str | None,
    split: str | None,
    shard_tokens: int,
    tokenizer: str | None,
    teacher: str | None,
) -> None:
    """Turn a published dataset at SOURCE into checked, self-describing shards at DESTINATION, without loss."""
    dataset = Dataset.open(source, config=config, split=split)
    facts, vocab_size = _tokenizer_facts(tokenizer)
    total, done = dataset.num_tokens, 0
    with _progress("converting tokens") as progress:

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            progress(done, total)

        manifest = convert(
            dataset,
            destination,
            shard_tokens=shard_tokens,
            vocab_size=vocab_size,
            tokenizer=facts,
            teacher=None if teacher is None else {"name": teacher, "revision": None, "dtype": None},
            progress=advance,
        )
    documents, tokens = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("documents", "tokens"))
    output().print(
        f"{documents:,} documents, {tokens:,} tokens in {len(manifest.shards)} shards: {destination}", soft_wrap=True
    )


def _tokenizer_facts(name: str | None) -> tuple[dict[str, Any] | None, int | None]:
    if name is None:
        return None, None
    from distillkit.tokenizer import fingerprint, load_tokenizer, vocab_size

    tokenizer = load_tokenizer(name)
    label = Path(name).resolve().name if Path(name).exists() else name
    return {"name": label, "fingerprint": fingerprint(tokenizer)}, vocab_size(tokenizer)


# -- bench -------------------------------------------------------------------------------------------------------------


@cli.command()
@click.option("--vocab-size", type=click.IntRange(min=256), default=49_152, show_default=True)
@_JSON
def bench(vocab_size: int, as_json: bool) -> None:
    """Time encoding and decoding on this machine, all cores, on made-up rows; what is timed is checked first."""
    results = [_bench_preset(name, vocab_size) for name in PRESETS]
    if as_json:
        click.echo(json.dumps(results, indent=2))
        return
    table = Table(title="codec speed on this machine, tokens a second", title_justify="left", title_style="bold")
    for heading in ("preset", "bytes a token", "encode", "decode", "decoded MB/s"):
        table.add_column(heading, justify="left" if heading == "preset" else "right")
    for row in results:
        table.add_row(
            row["preset"],
            f"{row['bytes_per_token']:,}",
            f"{row['encode_tokens_per_second']:,.0f}",
            f"{row['decode_tokens_per_second']:,.0f}",
            f"{row['decode_mb_per_second']:,.0f}",
        )
    output().print(table)


def _bench_preset(name: str, vocab_size: int) -> dict[str, Any]:
    import numpy as np

    codec = Codec(preset(name, vocab_size=vocab_size))
    generator = np.random.default_rng(0)
    rows, k = 8192, codec.k
    slopes = 1 + generator.random((rows, 1))
    values = np.sort(-slopes * np.log(np.arange(1, k + 1)) + 0.3 * generator.random((rows, k)))[:, ::-1]
    logprobs = (values - np.log(np.exp(values).sum(1, keepdims=True)) - 0.1).astype(np.float32)
    ids = generator.integers(0, vocab_size - k, (rows, 1)) + np.arange(k)
    data = codec.encode(ids, logprobs)
    decoded_ids, decoded = codec.decode(data)
    if not (decoded_ids == ids).all() or np.abs(decoded - logprobs).max() > 2:
        raise DistillKitError(f"preset {name}: decoding does not give back what was encoded; this is a bug")
    encode = _best(lambda: codec.encode(ids, logprobs))
    decode = _best(lambda: codec.decode(data))
    return {
        "preset": name,
        "bytes_per_token": codec.bytes_per_token,
        "encode_tokens_per_second": rows / encode,
        "decode_tokens_per_second": rows / decode,
        "decode_mb_per_second": rows * 12 * k / decode / 1e6,
    }


def _best(work: Callable[[], Any], seconds: float = 1.0) -> float:
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Run the command line."""
    run_cli(cli)

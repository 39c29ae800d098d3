"""`distillkit capture`: run a teacher over text once, and keep its distributions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.table import Table

from distillkit.capture.result import CaptureReport
from distillkit.capture.settings import CaptureSettings, default_of
from distillkit.capture.settings_file import load_captures
from distillkit.cli.common import stopping_on_sigterm
from distillkit.codec import PRESETS
from distillkit.console import human_bytes, show
from distillkit.text.documents import LOSS_ON, OVERFLOWS

__all__ = ["capture", "capture_options", "chosen_captures", "show_reports"]


def _option(name: str, help: str, **attributes: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make an option whose default is the setting's."""
    default = default_of(name.partition("/")[0].removeprefix("--").replace("-", "_"))
    return click.option(name, default=default, show_default=default is not None, help=help, **attributes)


_OPTIONS = (
    click.argument("config", required=False, metavar="[FILE.yaml]", type=click.Path(dir_okay=False, path_type=Path)),
    click.option(
        "--model", help="The teacher: a folder or a hub id. For a server's: where its config and tokenizer are."
    ),
    click.option(
        "--dataset",
        help="What it reads: a .jsonl, .json, .txt or .parquet file, a folder of them, a save_to_disk folder, a URL "
        "of these, or a hub id. Rows have text; messages; conversations; instruction (+ input) + output; inputs + "
        "targets; tools + turns; prompt + response or completion; or input_ids.",
    ),
    click.option("--output", help="Folder for the captured dataset."),
    _option(
        "--preset", "Codec configuration by name; recommended if nothing is given.", type=click.Choice(list(PRESETS))
    ),
    _option(
        "--compression-config",
        "Codec configuration from a YAML file, such as the compression_config.yaml of a published dataset.",
        metavar="FILE",
    ),
    _option("--dataset-configuration", "Configuration of a hub dataset."),
    _option("--split", "Split of the dataset; in a folder of files, those with the split's name in their path."),
    _option("--samples", "Capture a random sample of this many rows, in the dataset's order.", type=int),
    _option("--seed", "Decides the sample and the shuffled order.", type=int),
    _option("--shuffle/--no-shuffle", "Capture rows in a random order."),
    _option(
        "--where",
        "Capture only rows whose column has this value (JSON if it is not text); repeat it for more columns.",
        metavar="COLUMN=VALUE",
        multiple=True,
    ),
    _option("--min-tokens", "Leave out shorter documents.", type=int),
    _option("--max-tokens", "Leave out longer documents.", type=int),
    _option(
        "--drop-duplicates/--keep-duplicates",
        "Leave out documents that were there before; dropped unless --keep-columns is given.",
    ),
    _option(
        "--keep-columns",
        "Columns of the dataset that the capture has as well: NAME,NAME,…, all or none.",
        metavar="NAMES",
    ),
    _option("--tokenizer", "Folder or hub id, if not the teacher's own."),
    _option(
        "--apply-chat-template/--no-apply-chat-template", "Render chat rows with the chat template, or refuse them."
    ),
    _option("--max-seq-len", "Tokens of a stored document, at most.", type=int),
    _option(
        "--overflow",
        "Longer documents: window captures them in pieces, truncate their beginning, skip leaves them out.",
        type=click.Choice(OVERFLOWS),
    ),
    _option(
        "--overlap",
        "Tokens that a piece repeats of the one before it, as context; an eighth of --max-seq-len if nothing is given.",
        type=int,
    ),
    _option(
        "--loss-on",
        "Which tokens count in a loss. auto: of prompt and response the response, of token ids what their loss_mask or "
        "labels say, else all; assistant: the assistant's turns; completion: the response.",
        type=click.Choice(LOSS_ON),
    ),
    _option(
        "--keep-ids",
        "Ids or tokens that every row stores, whatever their rank, with commas between: end of turn, tool calls, …",
        metavar="IDS",
    ),
    _option(
        "--label-logprobs/--no-label-logprobs", "Also store the log-probability of each next token, whatever its rank."
    ),
    _option("--last-row/--no-last-row", "Also store the distribution after a document's last token."),
    _option("--dtype", "float32, bfloat16, float16, or auto: the checkpoint's own, on a CPU float32."),
    _option(
        "--head-dtype",
        "float32 multiplies by the head exactly whatever the dtype is; auto in that dtype: faster, less exact.",
        type=click.Choice(["float32", "auto"]),
    ),
    _option("--device", "auto, cpu, cuda, cuda:1, …; balanced or sequential: over all CUDA devices."),
    _option("--trust-remote-code/--no-trust-remote-code", "Run code that comes with the model."),
    _option(
        "--batch-tokens",
        "Tokens of one forward, padding included; 4096 if not given, with vLLM as many as memory has room for.",
        type=int,
    ),
    _option("--head-rows", "Positions whose logits exist at a time: each takes 4 bytes × vocabulary.", type=int),
    _option("--shard-tokens", "Tokens of a shard; an interrupted capture goes on after the last whole one.", type=int),
    _option(
        "--shard-range", "Capture only these shards of the plan, FIRST:END, END not included.", metavar="FIRST:END"
    ),
    _option("--skip-bad-documents", "Leave out up to so many documents that the teacher can't score.", type=int),
    _option("--workers", "ray: share the shards out over a Ray cluster.", type=click.Choice(["ray"])),
    _option(
        "--num-workers", "Ray workers, each with its own engine.  [default: as the GPUs allow; one a node]", type=int
    ),
    _option("--worker-cpus", "CPUs of a Ray worker.", type=int),
    _option(
        "--engine",
        "What runs the teacher: hf is transformers; openai is a running server, see --base-url.",
        type=click.Choice(["hf", "vllm", "openai"]),
    ),
    _option("--max-model-len", "vLLM: positions it plans with; if not given, --max-seq-len and one more.", type=int),
    _option("--tensor-parallel-size", "vLLM: GPUs that each layer is spread over.", type=int),
    _option("--pipeline-parallel-size", "vLLM: groups of GPUs that the layers are spread over.", type=int),
    _option("--enable-expert-parallel/--no-enable-expert-parallel", "vLLM: spread experts whole instead of in pieces."),
    _option("--quantization", "vLLM: its name for it, if not as the checkpoint says."),
    _option(
        "--gpu-memory-utilization",
        "vLLM: share of a GPU's memory that it plans with; a batch's log-probabilities need some beside it.",
        type=float,
    ),
    _option(
        "--base-url",
        "Server: its URL, such as http://localhost:8000/v1; its key from DISTILLKIT_API_KEY or OPENAI_API_KEY.",
        metavar="URL",
    ),
    _option("--served-model", "Server: its name for the teacher, if it serves several."),
    _option("--concurrency", "Server: requests at a time.", type=int),
    _option("--max-retries", "Server: how often a failed request is tried again, with growing pauses.", type=int),
    _option("--request-timeout", "Server: seconds until a request has failed.", type=float),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option("--progress/--no-progress", default=True, help="Show a progress bar (on stderr)."),
)


def capture_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the file with settings, an option for each of them, and those for its output."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@click.command(short_help="Run a teacher over text and store its distributions.")
@capture_options
@click.pass_context
def capture(context: click.Context, /, config: Path | None, as_json: bool, progress: bool, **options: Any) -> None:
    """Run a teacher over text and store its next-token distributions, compressed.

    Started again with the same options, an interrupted capture goes on after its last whole shard, and a finished one
    is left as it is. Look at the result with: distillkit-codec inspect OUTPUT

    Settings may stand in a YAML file, by the options' names (max_seq_len: 2048); under `captures` it can have a list
    of those in which several captures differ, which are run one after the other. Options go before the file's.

    \b
    Examples:
      distillkit capture --model teacher/ --dataset text.jsonl --output captured/
      distillkit capture teachers.yaml --samples 1000
    """
    captures = chosen_captures(context, config, options)
    show_reports(captures, as_json=as_json, progress=progress)


def show_reports(captures: Sequence[CaptureSettings], *, as_json: bool = False, progress: bool = True) -> None:
    """Capture one after the other, and print what came of it."""
    from transformers.utils.logging import disable_progress_bar

    from distillkit.capture.run import run_capture

    # Their bar for loading weights runs into ours.
    disable_progress_bar()
    reports = []
    with stopping_on_sigterm():
        for settings in captures:
            reports.append(run_capture(settings, progress=progress))
            if not as_json:
                show(_table(reports[-1]))
    if as_json:
        found = [report.to_dict() for report in reports]
        click.echo(json.dumps(found[0] if len(found) == 1 else found, indent=1))


def chosen_captures(context: click.Context, config: Path | None, options: dict[str, Any]) -> list[CaptureSettings]:
    """Return what to capture, by the options and the file.

    Raises:
        ConfigError: a setting is not allowed.
        click.UsageError: model, dataset or output are not given.
    """
    if config is not None:
        given = {
            name: value
            for name, value in options.items()
            if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
        }
        return load_captures(config, given)
    for name in ("model", "dataset", "output"):
        if options[name] is None:
            raise click.UsageError(f"Missing option '--{name}', or a file with settings.", ctx=context)
    return [CaptureSettings.of(**options)]


def _table(report: CaptureReport) -> Table:
    """Lay out the summary for a person."""
    table = Table(title=f"captured: {report.output}", show_header=False, title_justify="left")
    table.add_row("documents", _documents(report))
    table.add_row("tokens", f"{report.tokens:,}  ({report.rows:,} distributions in {report.shards} shards)")
    if report.unfinished_shards:
        table.add_row(
            "unfinished", f"{report.unfinished_shards:,} shards are left to do; the manifest comes with the last"
        )
    table.add_row("bytes a token", f"{report.bytes_per_token:g}  ({human_bytes(report.disk_bytes)} on disk)")
    if report.kl_mean is not None and report.kl_p99 is not None:
        table.add_row("fidelity", f"KL mean {report.kl_mean:.2e}, p99 {report.kl_p99:.2e} nats (top k ‖ decoded)")
    if report.mass_mean is not None:
        shares = ", ".join(
            f"{float(share):.0%} of rows ≤ {mass:.3f}"
            for share, mass in report.mass_quantiles.items()
            if mass is not None
        )
        table.add_row("stored mass", f"mean {report.mass_mean:.4f}; {shares}")
        table.add_row("alignment", _alignment(report))
    if report.already_complete:
        table.add_row("this run", "nothing to do: it was complete")
    elif not report.new_tokens:
        table.add_row("this run", "nothing captured: the plan is made, or its part was there")
    else:
        speed = f"{report.new_tokens:,} tokens in {report.seconds:,.1f} s: {report.tokens_per_second:,.0f} tokens/s"
        table.add_row("this run", speed)
        table.add_row("stages", _stages(report))
        cuda = f", {human_bytes(report.peak_cuda_bytes)} on the GPU" if report.peak_cuda_bytes else ""
        table.add_row("peak memory", f"{human_bytes(report.peak_rss_bytes)}{cuda}")
    return table


def _alignment(report: CaptureReport) -> str:
    """Say where the next token is the teacher's first id."""
    rates = ", ".join(f"{rate:.1%} at {shift}" for shift, rate in report.next_token_rates.items())
    verdict = "" if report.shifted is None else f". Rows fit the tokens at {report.shifted:+d}: THEY ARE SHIFTED"
    return f"the next token is the teacher's first id: {rates}{verdict}"


def _stages(report: CaptureReport) -> str:
    """Say how fast each stage was while it worked."""
    stages = {
        "teacher": report.teacher_seconds,
        "encode": report.encode_seconds,
        "write": report.write_seconds,
    }
    rates = ", ".join(f"{name} {report.new_tokens / seconds:,.0f}" for name, seconds in stages.items() if seconds > 0)
    return f"{rates} tokens/s; the teacher waited {report.blocked_seconds:,.1f} s for the others"


def _documents(report: CaptureReport) -> str:
    """Say how many documents there are, and what was passed over."""
    notes = []
    if report.resumed_documents and not report.already_complete:
        notes.append(f"{report.resumed_documents:,} from an earlier run")
    if report.skipped:
        notes.append(f"{len(report.skipped):,} that the teacher can't score left out")
    for name, count in report.passed_over.items():
        if name != "rows" and count:
            notes.append(f"{count:,} {name.replace('_', ' ')} passed over")
    return f"{report.documents:,}" + (f"  ({', '.join(notes)})" if notes else "")

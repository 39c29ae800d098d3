"""`distillkit capture`: run a teacher over text once, and keep its distributions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click
from rich.table import Table

from distillkit.capture.settings import CaptureReport, CaptureSettings, default_of
from distillkit.cli.common import human_bytes, show
from distillkit.codec import PRESETS

__all__ = ["capture", "show_report"]


def _option(name: str, help: str, **attributes: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make an option whose default is the setting's."""
    default = default_of(name.partition("/")[0].removeprefix("--").replace("-", "_"))
    return click.option(name, default=default, show_default=default is not None, help=help, **attributes)


@click.command(short_help="Run a teacher over text and store its distributions.")
@click.option(
    "--model",
    required=True,
    help="The teacher: a folder or a hub id. For a server's: where its config and tokenizer are.",
)
@click.option(
    "--dataset",
    required=True,
    help="What it reads: a .jsonl, .json, .txt or .parquet file, a folder of them, a save_to_disk folder, or a hub id. "
    "Rows have text; messages; conversations; instruction (+ input) + output; inputs + targets; tools + turns; or "
    "input_ids.",
)
@click.option("--output", required=True, help="Folder for the captured dataset.")
@_option("--preset", "Codec configuration by name; recommended if nothing is given.", type=click.Choice(list(PRESETS)))
@_option(
    "--compression-config",
    "Codec configuration from a YAML file, such as the compression_config.yaml of a published dataset.",
    metavar="FILE",
)
@_option("--dataset-configuration", "Configuration of a hub dataset.")
@_option("--split", "Split of the dataset; in a folder of files, those with the split's name in their path.")
@_option("--samples", "Capture a random sample of this many rows, in the dataset's order.", type=int)
@_option("--seed", "Decides the sample.", type=int)
@_option("--tokenizer", "Folder or hub id, if not the teacher's own.")
@_option("--apply-chat-template/--no-apply-chat-template", "Render chat rows with the chat template, or refuse them.")
@_option("--max-seq-len", "Split longer documents in pieces of this many tokens; nothing is dropped.", type=int)
@_option("--dtype", "float32, bfloat16, float16, or auto: the checkpoint's own, on a CPU float32.")
@_option(
    "--head-dtype",
    "float32 multiplies by the head exactly whatever the dtype is; auto in that dtype: faster, less exact.",
    type=click.Choice(["float32", "auto"]),
)
@_option("--device", "auto, cpu, cuda, cuda:1, …; balanced or sequential: over all CUDA devices.")
@_option("--trust-remote-code/--no-trust-remote-code", "Run code that comes with the model.")
@_option(
    "--batch-tokens",
    "Tokens of one forward, padding included; 4096 if not given, with vLLM as many as memory has room for.",
    type=int,
)
@_option("--head-rows", "Positions whose logits exist at a time: each takes 4 bytes × vocabulary.", type=int)
@_option("--shard-tokens", "Tokens of a shard; an interrupted capture goes on after the last whole one.", type=int)
@_option(
    "--engine",
    "What runs the teacher: hf is transformers; openai is a running server, see --base-url.",
    type=click.Choice(["hf", "vllm", "openai"]),
)
@_option("--max-model-len", "vLLM: positions it plans with; if not given, --max-seq-len and one more.", type=int)
@_option("--tensor-parallel-size", "vLLM: GPUs that each layer is spread over.", type=int)
@_option("--pipeline-parallel-size", "vLLM: groups of GPUs that the layers are spread over.", type=int)
@_option("--enable-expert-parallel/--no-enable-expert-parallel", "vLLM: spread experts whole instead of in pieces.")
@_option("--quantization", "vLLM: its name for it, if not as the checkpoint says.")
@_option(
    "--gpu-memory-utilization",
    "vLLM: share of a GPU's memory that it plans with; a batch's log-probabilities need some beside it.",
    type=float,
)
@_option(
    "--base-url",
    "Server: its URL, such as http://localhost:8000/v1; its key from DISTILLKIT_API_KEY or OPENAI_API_KEY.",
    metavar="URL",
)
@_option("--served-model", "Server: its name for the teacher, if it serves several.")
@_option("--concurrency", "Server: requests at a time.", type=int)
@_option("--max-retries", "Server: how often a failed request is tried again, with growing pauses.", type=int)
@_option("--request-timeout", "Server: seconds until a request has failed.", type=float)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--progress/--no-progress", default=True, help="Show a progress bar (on stderr).")
def capture(as_json: bool, progress: bool, **options: Any) -> None:
    """Run a teacher over text and store its next-token distributions, compressed.

    Started again with the same options, an interrupted capture goes on after its last whole shard, and a finished one
    is left as it is. Look at the result with: distillkit-codec inspect OUTPUT

    \b
    Example:
      distillkit capture --model teacher/ --dataset text.jsonl --output captured/
    """
    show_report(CaptureSettings.of(**options), as_json=as_json, progress=progress)


def show_report(settings: CaptureSettings, *, as_json: bool = False, progress: bool = True) -> None:
    """Capture, and print what came of it."""
    from transformers.utils.logging import disable_progress_bar

    from distillkit.capture.pipeline import run_capture

    # Their bar for loading weights runs into ours.
    disable_progress_bar()
    report = run_capture(settings, progress=progress)
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=1))
    else:
        show(_table(report))


def _table(report: CaptureReport) -> Table:
    """Lay out the summary for a person."""
    table = Table(title=f"captured: {report.output}", show_header=False, title_justify="left")
    table.add_row("documents", _documents(report))
    table.add_row("tokens", f"{report.tokens:,}  ({report.rows:,} distributions in {report.shards} shards)")
    table.add_row("bytes a token", f"{report.bytes_per_token:g}  ({human_bytes(report.disk_bytes)} on disk)")
    if report.kl_mean is not None and report.kl_p99 is not None:
        table.add_row("fidelity", f"KL mean {report.kl_mean:.2e}, p99 {report.kl_p99:.2e} nats (top k ‖ decoded)")
    if report.already_complete:
        table.add_row("this run", "nothing to do: it was complete")
    else:
        speed = f"{report.new_tokens:,} tokens in {report.seconds:,.1f} s: {report.tokens_per_second:,.0f} tokens/s"
        table.add_row("this run", speed)
        cuda = f", {human_bytes(report.peak_cuda_bytes)} on the GPU" if report.peak_cuda_bytes else ""
        table.add_row("peak memory", f"{human_bytes(report.peak_rss_bytes)}{cuda}")
    return table


def _documents(report: CaptureReport) -> str:
    """Say how many documents there are, and what was passed over."""
    notes = []
    if report.resumed_documents and not report.already_complete:
        notes.append(f"{report.resumed_documents:,} from an earlier run")
    if report.empty_rows:
        notes.append(f"{report.empty_rows:,} empty rows passed over")
    if report.short_documents:
        notes.append(f"{report.short_documents:,} of one token passed over")
    return f"{report.documents:,}" + (f"  ({', '.join(notes)})" if notes else "")

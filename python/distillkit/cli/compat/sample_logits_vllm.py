"""`python -m distillkit.sample_logits_vllm`: capture with vLLM under its published name and options."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from distillkit.capture.settings import CaptureSettings
from distillkit.cli.capture import show_reports
from distillkit.codec.config import DistributionQuantizationConfig

__all__ = ["main"]

logger = logging.getLogger("distillkit")


def _switch(name: str, help: str, default: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(f"--{name}/--no-{name}", default=default, show_default=True, help=help)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", required=True, help="The teacher: a folder or a hub id.")
@click.option("--dataset", required=True, help="Text, chat or token ids: files, a save_to_disk folder or a hub id.")
@click.option("--dataset-configuration", help="Configuration of a hub dataset.")
@click.option("--output", required=True, help="Folder for the captured dataset.")
@click.option("--split", default="train", show_default=True, help="Split of the dataset.")
@click.option("--samples", type=int, help="Capture a random sample of this many rows.")
@click.option("--seed", type=int, default=42, show_default=True, help="Decides the sample.")
@click.option("--tokenizer", help="Folder or hub id, if not the teacher's own.")
@_switch("apply-chat-template", "Render chat rows with the chat template, or refuse them.", default=True)
@click.option(
    "--max-seq-len", type=int, default=1024, show_default=True, help="Split longer documents in pieces of this many."
)
@click.option("--max-model-len", type=int, help="Positions that vLLM plans with; if not given, --max-seq-len + 1.")
@click.option("--tensor-parallel-size", type=int, default=1, help="GPUs that each layer is spread over.")
@click.option("--pipeline-parallel-size", type=int, default=1, help="Groups of GPUs that the layers are spread over.")
@_switch("enable-expert-parallel", "Spread experts whole instead of in pieces.")
@click.option("--dtype", default="auto", help="float32, bfloat16, float16, or auto: the checkpoint's own.")
@click.option("--quantization", help="vLLM's name for it, if not as the checkpoint says.")
@_switch("trust-remote-code", "Run code that comes with the model.")
@click.option(
    "--gpu-memory-utilization",
    type=float,
    default=0.9,
    show_default=True,
    help="Share of a GPU's memory that vLLM plans with; a batch's log-probabilities need some beside it.",
)
@click.option("--compression-config", help="Codec configuration, a YAML file; if not given, the preset recommended.")
@_switch(
    "auto-vocab-size",
    "Set the vocabulary size in the codec's configuration to the width of the teacher's logits. (Published: to the "
    "tokenizer's, which is too little where the head is padded.) Without it another one is refused.",
    default=True,
)
@click.option("--macrobatch-size", type=int, default=256, help="Taken and not needed: documents go to vLLM one by one.")
@click.option("--max-workers", type=int, help="Taken and not needed: rows are encoded on all cores, in native code.")
def main(macrobatch_size: int, max_workers: int | None, auto_vocab_size: bool, **options: Any) -> None:
    """Run a teacher over text with vLLM and store its next-token distributions, compressed.

    The same as: distillkit capture --engine vllm. Started again, an interrupted capture goes on.
    """
    if macrobatch_size != 256 or max_workers is not None:
        logger.info("--macrobatch-size and --max-workers change nothing here")
    settings = CaptureSettings.of(engine="vllm", **options)
    if auto_vocab_size and settings.compression_config is not None:
        settings = _with_vocab_size(settings)
    show_reports([settings])


def _with_vocab_size(settings: CaptureSettings) -> CaptureSettings:
    """Put the width of the teacher's logits into its codec's configuration."""
    from dataclasses import replace

    from distillkit.capture.teachers.hf import load_config

    config = load_config(settings.model, trust_remote_code=settings.trust_remote_code)
    head_size = int(config.get_text_config().vocab_size)
    codec = settings.read_compression_config()
    field = "d" if isinstance(codec, DistributionQuantizationConfig) else "vocab_size"
    if getattr(codec, field) != head_size:
        name = Path(str(settings.compression_config)).name
        logger.info("%s: %s is %s there, taken as %s", name, field, getattr(codec, field), head_size)
    return replace(settings, compression_config=type(codec)(**{**codec.model_dump(), field: head_size}))

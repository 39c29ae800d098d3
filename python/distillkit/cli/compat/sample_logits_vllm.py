"""`python -m distillkit.sample_logits_vllm`: capture with vLLM, with its published name and options."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import click

from distillkit.capture.settings import CaptureSettings
from distillkit.cli.capture import show_reports
from distillkit.cli.setting_options import setting_option, setting_options
from distillkit.codec.config import DistributionQuantizationConfig

__all__ = ["main"]

logger = logging.getLogger("distillkit")


_SETTINGS = (
    *("dataset_configuration", "split", "samples", "seed", "tokenizer", "apply_chat_template", "max_seq_len"),
    *("max_model_len", "tensor_parallel_size", "pipeline_parallel_size", "enable_expert_parallel", "dtype"),
    *("quantization", "trust_remote_code", "gpu_memory_utilization", "compression_config"),
)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@setting_option("model", required=True)
@setting_option("dataset", required=True)
@setting_option("output", required=True)
@setting_options(_SETTINGS)
@click.option(
    "--auto-vocab-size/--no-auto-vocab-size",
    default=True,
    show_default=True,
    help="Set the vocabulary size in the codec's configuration to the width of the teacher's logits (the published "
    "command uses the tokenizer's size, which is too small for a padded head). If off, another size is an error.",
)
@click.option("--macrobatch-size", type=int, default=256, help="Accepted for compatibility; ignored.")
@click.option("--max-workers", type=int, help="Accepted for compatibility; ignored.")
def main(macrobatch_size: int, max_workers: int | None, auto_vocab_size: bool, **options: Any) -> None:
    """Run a teacher over text with vLLM and store its next-token distributions, compressed.

    The same as: distillkit capture --engine vllm. Run it again to resume an interrupted capture.
    """
    if macrobatch_size != 256 or max_workers is not None:
        logger.info("--macrobatch-size and --max-workers are accepted for compatibility and ignored")
    settings = CaptureSettings(engine="vllm", **options)
    if auto_vocab_size and settings.compression_config is not None:
        settings = _with_vocab_size(settings)
    show_reports([settings])


def _with_vocab_size(settings: CaptureSettings) -> CaptureSettings:
    """Put the width of the teacher's logits into its codec's configuration."""
    from distillkit.capture.teachers.hf import load_config

    config = load_config(settings.model, trust_remote_code=settings.trust_remote_code)
    head_size = int(config.get_text_config().vocab_size)
    codec = settings.read_compression_config()
    field = "d" if isinstance(codec, DistributionQuantizationConfig) else "vocab_size"
    if getattr(codec, field) != head_size:
        name = Path(str(settings.compression_config)).name
        logger.info("%s: %s is %s, using %s instead", name, field, getattr(codec, field), head_size)
    sized = type(codec)(**{**codec.model_dump(), field: head_size})
    return settings.model_copy(update={"compression_config": sized})

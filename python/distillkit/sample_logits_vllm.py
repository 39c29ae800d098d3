"""`python -m distillkit.sample_logits_vllm`: the published spelling of `distillkit.cli.compat.sample_logits_vllm`."""

from __future__ import annotations

from distillkit.cli.common import run_cli
from distillkit.cli.compat.sample_logits_vllm import main

__all__ = ["main"]

if __name__ == "__main__":
    run_cli(main)

"""`python -m distillkit.pack_logits`: the published spelling of `distillkit.cli.compat.pack_logits`."""

from __future__ import annotations

from distillkit.cli.common import run_cli
from distillkit.cli.compat.pack_logits import main

__all__ = ["main"]

if __name__ == "__main__":
    run_cli(main)

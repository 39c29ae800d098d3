"""`python -m distillkit`, for launchers that start modules: `torchrun --nproc_per_node 2 -m distillkit config.yaml`."""

from __future__ import annotations

from distillkit.cli.entry import main

if __name__ == "__main__":
    main()

"""`distillkit CONFIG` with DeepSpeed on the CPU, for tests: started by torchrun with the configuration's path.

On the CPU accelerate starts PyTorch's process group alone, and ZeRO-3 shards while the student is loaded: DeepSpeed has
to know the other processes by then. On GPUs accelerate sees to that.
"""

from __future__ import annotations

import sys

import deepspeed

from distillkit.cli.main import main

if __name__ == "__main__":
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    sys.exit(main())

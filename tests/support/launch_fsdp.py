"""`distillkit CONFIG` with FSDP2 on the CPU, for tests: started by torchrun with the configuration's path.

accelerate gives FSDP to accelerators only; on the CPU it takes DDP without a word, which distillkit refuses. Only these
two decisions are changed here. Sharding, gathering, optimiser and checkpoints are accelerate's and PyTorch's own.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

from distillkit.cli.main import main
from distillkit.training.config import arguments as training_args

original = state.AcceleratorState.__init__


@functools.wraps(original)
def with_fsdp(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    fresh = not state.AcceleratorState._shared_state
    original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh and fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)
        state.PartialState._shared_state["distributed_type"] = self.distributed_type


state.AcceleratorState.__init__ = with_fsdp
training_args.WITHOUT_FSDP = ()

if __name__ == "__main__":
    sys.exit(main())

"""The training losses: what each one is called and takes (`config`), their formulas (`sparse`), and the pass that
applies them (`fused`).

Importing this package does not import torch; its modules `sparse`, `table` and `fused` do.
"""

from __future__ import annotations

from distillkit.losses.config import LossConfig

__all__ = ["LossConfig"]

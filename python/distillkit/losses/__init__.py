"""The training losses: names and settings (`config`), formulas (`divergences`, `ranking`, `hidden`), and the pass that
computes them (`fused`).

Importing this package does not import torch; all of its modules except `config` do.
"""

from __future__ import annotations

from distillkit.losses.config import LossConfig

__all__ = ["LossConfig"]

"""The Hugging Face hub: captures are pushed there as datasets with cards."""

from __future__ import annotations

from distillkit.hub.pushing import PushReport, push

__all__ = ["PushReport", "push"]

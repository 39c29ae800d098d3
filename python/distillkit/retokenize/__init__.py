"""Captures of a teacher with another tokenizer, in the student's tokens."""

from __future__ import annotations

from distillkit.retokenize.figures import Figures
from distillkit.retokenize.run import Retokenization, Settings, retokenize

__all__ = ["Figures", "Retokenization", "Settings", "retokenize"]

"""distillkit: capture a teacher's next-token distributions, store them small, train students from them.

Nothing here imports torch or transformers; the parts that need them do so when they are used.
"""

from __future__ import annotations

from distillkit._native import __version__

__all__ = ["__version__"]

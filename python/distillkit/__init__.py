"""distillkit: capture a teacher's next-token distributions, store them small, train students from them.

Importing this package imports neither torch nor transformers; the modules that need them import them on use.
"""

from __future__ import annotations

from distillkit._native import __version__

__all__ = ["__version__"]

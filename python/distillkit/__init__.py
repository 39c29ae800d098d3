"""distillkit: capture a teacher's next-token distributions, store them small, train students from them.

Importing this package imports neither torch nor transformers; the modules that need them import them on use.
"""

from __future__ import annotations

import os

from distillkit._native import __version__
from distillkit.configuration.installation import warn_of_another

__all__ = ["__version__"]

warn_of_another(os.path.dirname(__file__), __version__)

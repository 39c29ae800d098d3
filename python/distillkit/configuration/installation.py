"""Notices that two packages called distillkit share a folder.

The published toolkit has the same name, for pip and for Python, and its version is higher. So pip takes either for the
other: it replaces one by the other, or finds that `distillkit` is installed already. It never mixes them by itself;
`pip install --target`, copies of environments and other package managers can.
"""

from __future__ import annotations

import os
import warnings

__all__ = ["warn_of_another"]


def warn_of_another(package: str, version: str) -> None:
    """Warn if the folder around a package records another distillkit than this one. Reads that folder's names only.

    Args:
        package: the package's folder.
        version: its version.
    """
    around = os.path.dirname(package)
    names = os.listdir(around) if os.path.isdir(around) else []
    recorded = sorted(name for name in names if name.startswith("distillkit-") and name.endswith(".dist-info"))
    others = [name for name in recorded if name != f"distillkit-{version}.dist-info"]
    if others:
        warnings.warn(
            f"this is distillkit {version}, but {around} also has {', '.join(others)}: another package or release of "
            "the name distillkit (the toolkit by Arcee is distillkit 1.0.0), and files of both may be mixed. Run "
            "`pip uninstall distillkit` until nothing is left, and install the one that you want",
            stacklevel=3,
        )

"""Reports: metrics and reports of training runs, and inspection of datasets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distillkit.codec import CodecConfig
    from distillkit.reports.inspection import Inspection
    from distillkit.shards import Dataset

__all__ = ["inspect"]


def inspect(
    dataset: Dataset | str | PathLike[str],
    *,
    config: CodecConfig | Mapping[str, Any] | str | PathLike[str] | None = None,
    split: str | None = None,
    sample: int | None = None,
    teacher: str | None = None,
    progress: bool = True,
) -> Inspection:
    """Read a dataset, and return its size, its fidelity and whether its rows line up with their tokens, as
    `distillkit-codec inspect` shows them.

    Args:
        dataset: a dataset, or what `Dataset.open` opens with `config` and `split`.
        sample: read only this many documents, evenly spread.
        teacher: recompute fidelity with this model (folder or hub id), on `sample` documents or 16.
        progress: show a progress bar, on stderr or in the notebook.

    Returns:
        The statistics; `check()` raises if the dataset should not be trained on.

    Raises:
        FileNotFoundError, DistillKitError: as for `Dataset.open`; or a document is damaged.

    Example:
        >>> import distillkit
        >>> found = distillkit.inspect("captured", progress=False)
        >>> found.documents, found.alignment
        (3, 'undecided')
    """
    from distillkit.console import progress_bar
    from distillkit.reports.inspection import inspect_dataset, recompute_fidelity
    from distillkit.shards import Dataset

    opened = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset, config=config, split=split)
    with progress_bar("reading documents", shown=progress) as advance:
        found = inspect_dataset(opened, sample=sample, progress=advance)
    if teacher is None:
        return found
    with progress_bar("running the teacher", shown=progress) as advance:
        stats = recompute_fidelity(opened, teacher, sample=sample or 16, progress=advance)
    return replace(found, fidelity=stats, fidelity_source=f"recomputed with {teacher}")

"""Capture: a teacher and text in, a dataset of its compressed next-token distributions out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillkit.capture.result import CaptureReport
from distillkit.capture.settings import CaptureSettings
from distillkit.codec import CodecConfig

__all__ = ["CaptureReport", "CaptureSettings", "capture"]


def capture(
    *,
    model: str,
    dataset: str,
    output: str | Path,
    preset: str | None = None,
    compression_config: str | Path | Mapping[str, Any] | CodecConfig | None = None,
    progress: bool = True,
    **options: Any,
) -> CaptureReport:
    """Run a transformers model over a dataset and write its next-token distributions as compressed shards.

    An interrupted capture that is started again with the same arguments goes on after its last whole shard, and ends
    with the bytes that one run would have written; one that is finished is left as it is.

    Args:
        model: the teacher: a folder or a hub id.
        dataset: a `.jsonl`, `.json`, `.txt` or `.parquet` file, a folder of them, a `save_to_disk` folder or a hub id.
        output: the folder for the captured dataset.
        preset: name of a codec configuration; "recommended" if neither this nor `compression_config` is given.
        compression_config: a codec configuration: YAML file, mapping or config object.
        progress: show a progress bar on stderr.
        **options: the other fields of `CaptureSettings`; those of an engine flat or in its part.

    Returns:
        What was made.

    Raises:
        ConfigError: a setting is unknown or not allowed, or names something that is not there.
        InputError: a row of the dataset is not understood.
        MismatchError: the codec is for another vocabulary, or the output folder holds a capture with other settings.
        CaptureError: the teacher gave something that can't be stored.
    """
    from distillkit.capture.run import run_capture

    settings = CaptureSettings(
        model=model,
        dataset=dataset,
        output=output,
        preset=preset,
        compression_config=compression_config,
        **options,
    )
    return run_capture(settings, progress=progress)

"""Capture: runs a teacher over text and stores its compressed next-token distributions as a dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillkit.capture.preflight import check_before_loading
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

    Called again with the same arguments, an interrupted capture resumes after its last complete shard, and the result
    has the same bytes as an uninterrupted run; a finished capture is left as it is.

    Args:
        model: folder or hub id of the teacher.
        dataset: text, chats or token ids: a file, a folder of files, a `save_to_disk` folder, a URL or a hub id.
        output: folder for the captured dataset.
        preset: name of a codec configuration; "recommended" if neither this nor `compression_config` is given.
        compression_config: a codec configuration: YAML file, mapping or config object.
        progress: show a progress bar on stderr.
        **options: the other fields of `CaptureSettings`; engine settings either nested or flat.

    Returns:
        What was captured.

    Raises:
        ConfigError: a setting is unknown or not allowed, or refers to something that does not exist.
        InputError: a row of the dataset has an unknown format.
        MismatchError: the codec is for another vocabulary, or the output folder contains a capture with other settings.
        CaptureError: the teacher failed, or its output cannot be stored.
    """
    settings = CaptureSettings(
        model=model,
        dataset=dataset,
        output=output,
        preset=preset,
        compression_config=compression_config,
        **options,
    )
    check_before_loading(settings)
    from distillkit.capture.run import run_capture

    return run_capture(settings, progress=progress)

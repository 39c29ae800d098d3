"""Capture: runs a teacher over text and stores its compressed next-token distributions as a dataset.

The package can be called: `distillkit.capture(…)` is `distillkit.capture.capture(…)`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from distillkit.capture.preflight import check_before_loading
from distillkit.capture.result import CaptureReport
from distillkit.capture.settings import CaptureSettings
from distillkit.codec import CodecConfig
from distillkit.configuration.places import new_folder

if TYPE_CHECKING:
    from typing import Unpack

    from distillkit.capture.forecasting.forecast import Forecast
    from distillkit.capture.options import CaptureOptions

__all__ = ["CaptureReport", "CaptureSettings", "capture", "forecast"]


def capture(
    *,
    model: str,
    dataset: str,
    output: str | Path,
    preset: str | None = None,
    compression_config: str | Path | Mapping[str, Any] | CodecConfig | None = None,
    progress: bool = True,
    **options: Unpack[CaptureOptions],
) -> CaptureReport:
    """Run a transformers model over a dataset and write its next-token distributions as compressed shards.

    Called again with the same arguments, an interrupted capture resumes after its last complete shard, and the result
    has the same bytes as an uninterrupted run; a finished capture is left as it is.

    Args:
        model: folder or hub id of the teacher.
        dataset: text, chats or token ids: a file, a folder of files, a `save_to_disk` folder, a URL or a hub id.
        output: folder for the captured dataset.
        preset: name of a codec configuration; "compact-128" if neither this nor `compression_config` is given.
        compression_config: a codec configuration: YAML file, mapping or config object.
        progress: show a progress bar, on stderr or in the notebook.
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


def forecast(
    *,
    model: str,
    dataset: str,
    output: str | Path | None = None,
    preset: str | None = None,
    compression_config: str | Path | Mapping[str, Any] | CodecConfig | None = None,
    seconds: float = 10.0,
    progress: bool = True,
    **options: Unpack[CaptureOptions],
) -> Forecast:
    """Estimate what a capture would cost (tokens, disk space, memory, time) and how faithful each codec is on this
    text, without writing anything; what `distillkit forecast` prints.

    Args:
        model, dataset, preset, compression_config, **options: as for `capture`.
        output: whose disk has to have room; if a capture has begun there, it must be the same one, and what is left of
            it is estimated. None: a new folder in the working folder.
        seconds: how long to run the teacher, to measure its speed and the fidelity of each codec; 0: not at all.
        progress: show a progress bar, on stderr or in the notebook.

    Returns:
        The forecast. `problems` says why the capture would not fit; it is empty if it would.

    Raises:
        ConfigError, InputError, MismatchError: as for `capture`.
    """
    from distillkit.capture.preflight import check_inputs
    from distillkit.console import progress_bar

    settings = CaptureSettings(
        model=model,
        dataset=dataset,
        output=new_folder("captured") if output is None else output,
        preset=preset,
        compression_config=compression_config,
        **options,
    )
    check_inputs(settings)
    from distillkit.capture.forecasting.forecast import forecast_captures

    with progress_bar("running the teacher", shown=progress) as advance:
        (found,) = forecast_captures(
            [settings], seconds=seconds, progress=lambda done, total: advance(int(done), int(total))
        )
    return found


class _Callable(ModuleType):
    """`import distillkit.capture` binds this package where `distillkit.capture(…)` is looked up."""

    __call__ = staticmethod(capture)


sys.modules[__name__].__class__ = _Callable

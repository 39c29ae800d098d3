"""Experiment trackers (wandb, trackio, …): transformers logs to them; this opens and closes them around a run, and
tells them what is trained."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import transformers

from distillkit.errors import DistillKitError

if TYPE_CHECKING:
    from distillkit.training.config.schema import RunConfig

__all__ = ["TrackedDescription", "tracking"]

_PROJECT = "WANDB_PROJECT"


class TrackedDescription(transformers.TrainerCallback):  # type: ignore[misc]
    """Adds what is trained to the configuration that the trackers keep: transformers gives them its arguments and the
    model's configuration, which say nothing of teacher, data and losses.

    Args:
        description: see `describe`.
    """

    def __init__(self, description: dict[str, Any]) -> None:
        self.description = description

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        for name in ("wandb", "trackio"):
            if name in args.report_to:
                sys.modules[name].config.update({"distillkit": self.description}, allow_val_change=True)


@contextmanager
def tracking(config: RunConfig) -> Iterator[None]:
    """Name the project for the trackers, and end their runs when training ends, well or badly.

    A run of wandb that was begun before is used and left open.

    Raises:
        DistillKitError: wandb can't begin a run, because nobody has logged in or its server is out of reach.
    """
    before = os.environ.get(_PROJECT)
    if before is None or "project_name" in config.model_fields_set:
        os.environ[_PROJECT] = config.project_name
    mine = _wandb_run() is None
    failed = 1
    try:
        yield
        failed = 0
    except Exception as error:
        if not _of_wandb(error):
            raise
        raise DistillKitError(
            f"{config.source}: training_args.report_to: wandb: {error}. Log in with `wandb login`, or keep the run on "
            "this machine with WANDB_MODE=offline"
        ) from error
    finally:
        if mine and _wandb_run() is not None:
            # Left to the interpreter's end, its last lines would come after the summary.
            sys.modules["wandb"].finish(exit_code=failed)
        if failed and "trackio" in sys.modules and sys.modules["trackio"].context_vars.current_run.get() is not None:
            # After a training that ended well, transformers has done so.
            sys.modules["trackio"].finish()
        if before is None:
            os.environ.pop(_PROJECT, None)
        else:
            os.environ[_PROJECT] = before


def _wandb_run() -> Any:
    """Return wandb's open run; None without one, or where wandb has not been imported."""
    return getattr(sys.modules.get("wandb"), "run", None)


def _of_wandb(error: Exception) -> bool:
    return "wandb" in sys.modules and isinstance(error, sys.modules["wandb"].errors.Error)

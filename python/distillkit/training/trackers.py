"""Experiment trackers (wandb, trackio, …): transformers logs to them; this module opens and closes them around a run,
and gives them its description."""

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
    """Adds the run's description to the trackers' configuration: transformers only gives them its arguments and the
    model's config, which do not mention teacher, data and losses.

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
    """Set the trackers' project name, and finish their runs when training succeeds or fails.

    A wandb run that is already open is used and left open.

    Raises:
        DistillKitError: wandb failed, for example because nobody is logged in or its server cannot be reached.
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
        reason = str(error).rstrip(".")
        raise DistillKitError(
            f"{config.source}: training_args.report_to: wandb: {reason}. Log in with `wandb login`, or keep the run on "
            "this machine with WANDB_MODE=offline"
        ) from error
    finally:
        if mine and _wandb_run() is not None:
            # Otherwise wandb would finish at interpreter exit, and print after the summary.
            sys.modules["wandb"].finish(exit_code=failed)
        if failed and "trackio" in sys.modules and sys.modules["trackio"].context_vars.current_run.get() is not None:
            # After successful training, transformers has already finished it.
            sys.modules["trackio"].finish()
        if before is None:
            os.environ.pop(_PROJECT, None)
        else:
            os.environ[_PROJECT] = before


def _wandb_run() -> Any:
    """Return wandb's open run; None if there is none or wandb has not been imported."""
    return getattr(sys.modules.get("wandb"), "run", None)


def _of_wandb(error: Exception) -> bool:
    return "wandb" in sys.modules and isinstance(error, sys.modules["wandb"].errors.Error)

"""Saves the trained student so that it loads on its own, however it was trained."""

from __future__ import annotations

import errno
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distillkit.configuration.hub import hub_problem, is_hub_error
from distillkit.errors import DistillKitError
from distillkit.training.checkpoints import RECEIPT

if TYPE_CHECKING:
    import transformers

    from distillkit.training.config.schema import RunConfig

__all__ = ["reaching_hub", "save_student", "saving"]

logger = logging.getLogger(__name__)

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# Additional files of a vision-language student, besides model and tokenizer.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")

# A failed save is blamed on a full disk if less than this is free.
_FULL_BYTES = 16 << 20


@contextmanager
def saving(folder: Path, *, checkpoint: bool) -> Iterator[None]:
    """Turn the errors of torch and safetensors on a full disk into one message, and remove incomplete checkpoints.

    Args:
        folder: the folder being written.
        checkpoint: whether it is a checkpoint's folder.

    Raises:
        OSError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        # Their own error types have no errno.
        full = getattr(error, "errno", None) == errno.ENOSPC or _free_bytes(folder) < _FULL_BYTES
        if checkpoint and not (folder / RECEIPT).is_file():
            shutil.rmtree(folder, ignore_errors=True)
        if not full:
            raise
        resume = "training_args.resume_from_checkpoint: true"
        if checkpoint:
            rest = (
                f"this checkpoint was removed, earlier ones are kept: free some space, then resume with {resume} "
                "(save_total_limit keeps fewer of them, save_only_model makes them smaller)"
            )
        else:
            rest = f"the trained student is incomplete: free some space, then resume with {resume}"
        raise OSError(errno.ENOSPC, f"No space left on device; {rest}", str(folder)) from error


def _free_bytes(folder: Path) -> int:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def save_student(trainer: transformers.Trainer, config: RunConfig) -> None:
    """Save the trained student, its tokenizer and its processor in the output folder. Every process must call this.

    Args:
        trainer: after training; with `peft.merge_on_save`, merges the adapters into its model.
        config: the run's configuration.

    Raises:
        OSError: the disk is full.
        DistillKitError: the student is saved, but cannot be pushed to the hub.
    """
    if trainer.is_fsdp_enabled:
        # With sharded checkpoints, save_model would not save a model at all.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    first = trainer.is_world_process_zero()
    if config.peft is not None and config.peft.merge_on_save:
        trainer.model = trainer.model.merge_and_unload(safe_merge=True)
        if first:
            _remove_adapters(Path(config.output_path))
    with saving(Path(config.output_path), checkpoint=False):
        if first:
            _copy_processor(config)
        # Pushed below, so that an unreachable hub is not taken for a failed save.
        trainer.save_model(_internal_call=True)
    if trainer.args.push_to_hub:
        with reaching_hub(config):
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)


@contextmanager
def reaching_hub(config: RunConfig) -> Iterator[None]:
    """Turn the hub's errors into one message.

    Raises:
        DistillKitError: the hub cannot be reached, or refuses.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DistillKitError) or not is_hub_error(error):
            raise
        raise DistillKitError(
            f"{config.source}: training_args.push_to_hub: the hub: {hub_problem(error)} ({config.output_path} has "
            "everything that was saved until now)"
        ) from error


def _remove_adapters(folder: Path) -> None:
    """Remove an earlier run's adapters from the folder: `from_pretrained` would apply them to the merged weights."""
    for name in _ADAPTER_FILES:
        if (folder / name).exists():
            (folder / name).unlink()
            logger.info(
                "removing %s of an earlier run: the student in this folder is now saved with merged weights",
                folder / name,
            )


def _copy_processor(config: RunConfig) -> None:
    """Copy the files that define how images become a student's inputs; training on text does not change them."""
    from transformers.utils import cached_file

    for name in _PROCESSOR_FILES:
        file = cached_file(config.model, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            Path(config.output_path).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, Path(config.output_path) / name)

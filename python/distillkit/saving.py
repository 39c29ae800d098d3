"""Saving the trained student so that it loads by itself, however it was trained."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import transformers

    from distillkit.config import RunConfig

__all__ = ["save_student"]

logger = logging.getLogger(__name__)

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What a vision-language student's folder has beside model and tokenizer.
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def save_student(trainer: transformers.Trainer, config: RunConfig) -> None:
    """Save the trained student, its tokenizer and its processor in the output folder. Every process must call it.

    Args:
        trainer: after training; with `peft.merge_on_save` its model has no adapters any more then.
        config: the run.
    """
    if trainer.is_fsdp_enabled:
        # With sharded checkpoints, save_model would leave no model behind at all.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    first = trainer.is_world_process_zero()
    if config.peft is not None and config.peft.merge_on_save:
        trainer.model = trainer.model.merge_and_unload(safe_merge=True)
        if first:
            _remove_adapters(Path(config.output_path))
    if first:
        _copy_processor(config)
    trainer.save_model()


def _remove_adapters(folder: Path) -> None:
    """Remove adapters that an earlier run left in the folder: `from_pretrained` would put them on top of the merged
    weights."""
    for name in _ADAPTER_FILES:
        if (folder / name).exists():
            (folder / name).unlink()
            logger.info("%s, from an earlier run, is removed: the weights saved beside it are whole now", folder / name)


def _copy_processor(config: RunConfig) -> None:
    """Copy the files that turn images into a student's inputs: training from text does not change them."""
    from transformers.utils import cached_file

    for name in _PROCESSOR_FILES:
        file = cached_file(config.model, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            Path(config.output_path).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, Path(config.output_path) / name)

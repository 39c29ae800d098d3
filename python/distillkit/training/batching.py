"""What student and live teacher need of a training batch, and whether its rows may hold several documents.

The models themselves are asked, before training, by `distillkit.models.separation`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distillkit.errors import ConfigError, DistillKitError
from distillkit.models.head import bare_model
from distillkit.models.rope import frequencies_change_after
from distillkit.models.separation import Collate, separation_of
from distillkit.training.attach import needs_gpu
from distillkit.training.data.examples import MODEL_INPUTS, Collator, Example

if TYPE_CHECKING:
    from trl import SFTConfig

__all__ = ["batch_layout", "check_batches", "choose_packing", "packing_problem", "trained_models"]

logger = logging.getLogger(__name__)


def trained_models(student: Any, teachers: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the models that run on a batch, by their keys in the configuration; a student may be its own teacher.

    Args:
        student: the student.
        teachers: live teachers, by their keys.
    """
    others = {key: teacher for key, teacher in (teachers or {}).items() if teacher is not student}
    return {"model": student, **others}


def batch_layout(models: Mapping[str, Any]) -> dict[str, Any]:
    """Return what models need of a batch, as arguments of `Collator`.

    Args:
        models: see `trained_models`.
    """
    limits = [frequencies_change_after(model) for model in models.values()]
    attention = [str(bare_model(model).config._attn_implementation) for model in models.values()]
    return {
        "flash_attention": any(name.startswith("flash") for name in attention),
        "longest_alike": min((limit for limit in limits if limit is not None), default=None),
    }


def packing_problem(models: Mapping[str, Any]) -> str | None:
    """Check that padding does not change documents, and return why rows cannot hold several of them; None if they can.

    Args:
        models: see `trained_models`.

    Raises:
        DistillKitError: a model cannot be run on padded batches.
    """
    collate = _collate_with(Collator(**batch_layout(models)))
    problem = None
    for key, model in models.items():
        try:
            found = separation_of(model, collate)
            found.check_padding()
        except DistillKitError as error:
            raise DistillKitError(f"{key}: {error}") from error
        problem = problem or (None if found.packed is None else f"{key}: {found.packed}")
    return problem


def check_batches(models: Mapping[str, Any], collator: Collator, *, packed: bool) -> None:
    """Check that models can be run on the batches of a run, and let the collator refuse rows that they cannot.

    Args:
        models: see `trained_models`.
        collator: makes the batches.
        packed: whether documents are packed.

    Raises:
        ConfigError: documents are packed, and a model does not keep them apart.
        DistillKitError: a model cannot be run on padded batches.
    """
    collator.unpackable = packing_problem(models)
    if packed and collator.unpackable is not None:
        raise ConfigError(
            f"packing: {collator.unpackable}. It can be trained without packing: set training_args.packing, "
            "dataset.packing or functionary_packing to false, or use dataset.packing: auto, which packs only if all "
            "models keep documents apart"
        )


def choose_packing(arguments: SFTConfig, models: Mapping[str, Any]) -> None:
    """Set `arguments.packing` for `dataset.packing: auto`: documents are packed if all models keep them apart.

    Raises:
        ConfigError: that cannot be told before training.
        DistillKitError: a model cannot be run on padded batches.
    """
    for key, model in models.items():
        if not needs_gpu(bare_model(model)):
            continue
        if arguments.fsdp or arguments.deepspeed:
            raise ConfigError(
                f"dataset.packing: auto: {key} uses FlashAttention, which cannot be tried before the weights are "
                "sharded; set dataset.packing to true or false"
            )
        model.to(arguments.device)
    problem = packing_problem(models)
    arguments.packing = problem is None
    if problem is not None:
        logger.info("dataset.packing: auto: not packed. %s", problem)


def _collate_with(collator: Collator) -> Collate:
    """Make batches of token ids as training makes them of documents."""

    def collate(rows: Sequence[Sequence[torch.Tensor]]) -> dict[str, Any]:
        batch = collator([_example(documents) for documents in rows])
        device = rows[0][0].device
        return {
            name: batch[name].to(device) if isinstance(batch[name], torch.Tensor) else batch[name]
            for name in MODEL_INPUTS
            if name in batch
        }

    return collate


def _example(documents: Sequence[torch.Tensor]) -> Example:
    ids = torch.cat(list(documents)).cpu().numpy().astype(np.int32)
    lengths = np.array([len(document) for document in documents], dtype=np.int64)
    return Example(ids, lengths, np.arange(0), {})

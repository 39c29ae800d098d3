"""The prompts of a run: opened, tokenised once for all runs, and checked for their length."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distillkit.errors import ConfigError
from distillkit.text.prompts import PromptReader, prompt_policy
from distillkit.text.tokenizer import vocab_size
from distillkit.training.data.documents import cache_folder, open_rows
from distillkit.training.data.prepared import PreparedDataset, prepare

if TYPE_CHECKING:
    from trl import SFTConfig

    from distillkit.training.config.schema import RunConfig

__all__ = ["KEY", "Prompts", "open_prompts"]

logger = logging.getLogger(__name__)

KEY = "rollouts.prompts"
# As for documents that are too long: more are hardly meant to be left out.
_MOST_LEFT_OUT = 0.05


@dataclass(frozen=True)
class Prompts:
    """Prompts to continue.

    Attributes:
        documents: all of them, tokenised.
        chosen: (P,) indices of those that leave room for a completion.
        longest: tokens of the longest one of these.
    """

    documents: PreparedDataset
    chosen: npt.NDArray[np.int64]
    longest: int

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def left_out(self) -> int:
        """Number of prompts that are too long."""
        return len(self.documents) - len(self.chosen)

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        return self.documents[int(self.chosen[index])].input_ids

    def place(self, index: int) -> str:
        """Say which prompt this is, for messages."""
        return f"{KEY}, prompt {int(self.chosen[index])}"


def open_prompts(config: RunConfig, tokenizer: Any, arguments: SFTConfig) -> Prompts:
    """Open a run's prompts. Must run in one process before the others.

    Prompts that leave no room for `max_new_tokens` within `sequence_length` are left out; if they are more than 5% of
    all prompts, the run is refused.

    Args:
        config: a configuration with rollouts.
        tokenizer: the student's tokenizer; see `configure_tokenizer`.
        arguments: the trainer's arguments.

    Raises:
        ConfigError: there are no such prompts, or too many are too long.
        InputError: a row has no text to continue, or an unknown format.
    """
    rollouts = config.rollouts
    if rollouts is None:
        raise TypeError("the configuration has no rollouts")
    policy = prompt_policy(arguments.dataset_text_field, text_first="dataset_text_field" in config.training_args)
    documents = prepare(
        open_rows(rollouts.prompts, "train", KEY),
        PromptReader(tokenizer, policy, vocab_size(tokenizer)),
        cache_folder(config),
        key=KEY,
        processes=arguments.dataset_num_proc or 1,
    )
    lengths, room = documents.lengths(), config.sequence_length - rollouts.max_new_tokens
    chosen = np.flatnonzero(lengths <= room)
    prompts = Prompts(documents, chosen, int(lengths[chosen].max(initial=0)))
    limit = (
        f"{room:,} tokens (sequence_length: {config.sequence_length:,} − max_new_tokens: {rollouts.max_new_tokens:,})"
    )
    longer = f"{prompts.left_out:,} of {len(documents):,} prompts are longer than {limit}"
    if prompts.left_out > _MOST_LEFT_OUT * len(documents):
        raise ConfigError(
            f"{KEY}: {longer}; the longest has {int(lengths.max()):,}. Raise sequence_length, lower "
            "rollouts.max_new_tokens, or shorten the prompts"
        )
    if prompts.left_out:
        logger.warning("%s: %s, and are left out", KEY, longer)
    return prompts

"""On-policy runs of a small student, and what is written in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distillkit.training.config.schema import RunConfig
from distillkit.training.rollouts.rounds import Rollouts, Round
from support.training import run_config

SAVING = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "learning_rate": 2e-3}


def on_policy(words: dict[str, str], output: Path, **settings: Any) -> RunConfig:
    """4 steps of 4 completions or, at the end of the 7 prompts, of 3; a round has 3 steps."""
    rollouts = {"prompts": {"disk_path": words["prompts.jsonl"]}, "every": 3, "max_new_tokens": 8}
    rollouts |= settings.pop("rollouts", {})
    given = {"teacher": {"kind": "hf", "path": words["teacher"]}, "rollouts": rollouts, **settings}
    config = {"dataset": {"prepared_dataset_path": str(output.parent / "cache"), **given.pop("dataset", {})}, **given}
    train_data = config["dataset"].pop("train_dataset", None)
    made = {"loss_functions": [{"function": "reverse_kl", "weight": 1}], **config}
    where = rollouts["prompts"]["disk_path"] if train_data is None else train_data
    return run_config(words["student"], output, where, **made)


def recorded(patch: pytest.MonkeyPatch) -> list[Round]:
    """The rounds that are trained on, as they begin."""
    rounds: list[Round] = []
    began = Rollouts.begin

    def begin(self: Rollouts) -> None:
        began(self)
        if self.current is not None and self.current not in rounds:
            rounds.append(self.current)

    patch.setattr(Rollouts, "begin", begin)
    return rounds


def written(rounds: list[Round]) -> list[tuple[int, list[int]]]:
    return [
        (each.first + n, completion.ids.tolist()) for each in rounds for n, completion in enumerate(each.completions)
    ]

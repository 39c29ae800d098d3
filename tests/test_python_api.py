"""The Python way: `import distillkit` is light, its names work, results print well, and `DistillationTrainer` is a
transformers Trainer that does what a YAML file does."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from distillkit.errors import ConfigError, MismatchError
from distillkit.shards import Dataset
from distillkit.training.config.objects import TrainerSettings
from distillkit.training.config.schema import DatasetSection, RunConfig
from distillkit.training.distillation import DistillationTrainer
from distillkit.training.run import train
from support.refusals import refused
from support.training import losses_of, run_config

LOSSES: list[dict[str, Any]] = [
    {"function": "cross_entropy", "weight": 0.25},
    {"function": "kl", "weight": 0.75},
]


def arguments(folder: Path, **settings: Any) -> transformers.TrainingArguments:
    """Those of `run_config`, as an object."""
    return transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        },
    )


class Steps(transformers.TrainerCallback):  # type: ignore[misc]
    """Counts steps."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1


@pytest.mark.usefixtures("without_plots")
def test_objects_train_the_student_that_a_yaml_file_trains(parts: dict[str, str], tmp_path: Path) -> None:
    """Model, tokenizer, datasets and arguments as objects: the same losses in every step, and the same weights."""
    train(run_config(parts["student"], tmp_path / "yaml", parts["train"], parts["eval"]))
    steps = Steps()
    trainer = DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(parts["student"]),
        arguments(tmp_path / "python"),
        train_dataset=Dataset.open(parts["train"]),
        eval_dataset=Dataset.open(parts["eval"]),
        processing_class=AutoTokenizer.from_pretrained(parts["student"]),
        callbacks=[steps],
        loss_functions=LOSSES,
        sequence_length=64,
    )
    before = trainer.evaluate()["eval_kl"]
    assert trainer.train().global_step == steps.count == 4
    trainer.save_model()
    assert trainer.evaluate()["eval_kl"] < before
    assert losses_of(tmp_path / "python") == losses_of(tmp_path / "yaml")
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / way).state_dict() for way in ("yaml", "python")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert trainer.summary is not None
    assert trainer.summary == json.loads((tmp_path / "python" / "summary.json").read_text())


@pytest.mark.usefixtures("without_plots")
def test_names_are_enough_and_a_stopped_run_resumes(parts: dict[str, str], tmp_path: Path) -> None:
    """Five lines; a checkpoint of another run is refused as with YAML."""

    def trainer(**settings: Any) -> DistillationTrainer:
        args = {"learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "report_to": "none", "disable_tqdm": True}
        args |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "out")}
        args |= {"max_steps": settings.pop("steps"), "gradient_checkpointing": False}
        return DistillationTrainer(parts["student"], args, train_dataset=parts["train"], **settings)

    trainer(steps=2).train()
    with refused(ConfigError, str(tmp_path / "nowhere")):
        trainer(steps=4).train(resume_from_checkpoint=tmp_path / "nowhere")
    with refused(MismatchError, "loss_functions"):
        trainer(steps=4, loss_functions=LOSSES).train(resume_from_checkpoint=True)
    resumed = trainer(steps=4)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4
    assert sorted(losses_of(tmp_path / "out")) == [1, 2, 3, 4]


def test_what_does_not_fit_is_refused_as_in_a_yaml_file(parts: dict[str, str], tmp_path: Path) -> None:
    args, data = arguments(tmp_path, label_smoothing_factor=0.1, eval_strategy="epoch"), parts["train"]
    with refused(ConfigError, "label_smoothing_factor", "eval_strategy"):
        DistillationTrainer(parts["student"], args, train_dataset=data)
    with refused(ConfigError, "overflwo", "overflow"):
        DistillationTrainer(parts["student"], args, train_dataset=data, overflwo="cut")  # type: ignore[call-arg]
    with refused(ConfigError, "train_dataset", "list"):
        DistillationTrainer(parts["student"], {}, train_dataset=[1])  # type: ignore[arg-type]
    with refused(ConfigError, "args", "int"):
        DistillationTrainer(parts["student"], 3, train_dataset=data)  # type: ignore[arg-type]
    with refused(ConfigError, "studnet"):
        DistillationTrainer("./studnet", {}, train_dataset=data)
    other = AutoTokenizer.from_pretrained(parts["other"])
    with refused(MismatchError, "tokenizer"):
        DistillationTrainer(parts["student"], {}, train_dataset=Dataset.open(data), processing_class=other)


def test_tokens_are_not_saved(parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "before")
    args = arguments(tmp_path, hub_token="hf_aaaabbbbccccddddeeee")
    trainer = DistillationTrainer(parts["student"], args, train_dataset=parts["train"], sequence_length=64)
    assert b"hf_aaaabbbb" not in pickle.dumps(trainer.args)


def test_every_setting_is_typed() -> None:
    elsewhere = {"model", "output_path", "dataset", "training_args", "train_dataset", "eval_dataset"}
    assert {*TrainerSettings.__annotations__} == {*RunConfig.model_fields, *DatasetSection.model_fields} - elsewhere

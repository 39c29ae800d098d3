"""Resuming: only the same run goes on, from a checkpoint that is whole, and as if it had never been interrupted."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from trl import SFTConfig

from distillkit.errors import ConfigError, DistillKitError, MismatchError
from distillkit.training.checkpoints import RECEIPT, checked, newest_checkpoint
from distillkit.training.config.argument_table import ARGUMENTS, DEPENDS_ON_EVALUATION, FREE, LAST_STEP, ROWS
from distillkit.training.config.arguments import BEFORE_5_23
from distillkit.training.config.schema import RunConfig
from distillkit.training.identity import check_same_run
from distillkit.training.run import Run, resumed_checkpoint, train
from support.refusals import check_names, refused
from support.training import (
    exact_codec,
    losses_of,
    metrics_of,
    random_documents,
    run_config,
    save_student,
    write_dataset,
)

pytestmark = pytest.mark.usefixtures("without_plots")


def saving(parts: dict[str, str], output: Path, **settings: Any) -> RunConfig:
    """4 steps over 24 documents, 8 a step, with a checkpoint after each: the second epoch begins after the third."""
    arguments = {
        "max_steps": 4,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        **settings.pop("training_args", {}),
    }
    return run_config(
        settings.pop("model", parts["student"]),
        output,
        settings.pop("train", parts["train"]),
        settings.pop("eval", parts["eval"]),
        training_args=arguments,
        **settings,
    )


@pytest.fixture(scope="module")
def whole(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_quality", "plot_speed"):
            patch.setattr(f"distillkit.reports.run_plots.{name}", lambda run, path: None)
        output = tmp_path_factory.mktemp("resuming") / "whole"
        train(saving(parts, output))
    return output


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All weights in a folder."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def check_resumable(config: RunConfig) -> None:
    resumed_checkpoint(Run(config), config)


# -- the same run ------------------------------------------------------------------------------------------------------

# What is changed, and what the refusal names: the setting, its value in the checkpoint, and its value now.
CHANGES: list[tuple[dict[str, Any], list[str]]] = [
    ({"training_args": {"per_device_train_batch_size": 2}}, ["per_device_train_batch_size", "8", "4"]),
    ({"training_args": {"gradient_accumulation_steps": 1}}, ["gradient_accumulation_steps", "8", "4"]),
    ({"training_args": {"learning_rate": 0.02}}, ["training_args.learning_rate", "0.01", "0.02"]),
    ({"training_args": {"lr_scheduler_type": "cosine"}}, ["training_args.lr_scheduler_type", "'constant'", "'cosine'"]),
    ({"training_args": {"warmup_steps": 3}}, ["training_args.warmup_steps", "0", "3"]),
    ({"training_args": {"warmup_steps": 0.5}}, ["training_args.warmup_steps", "0.5", "training_args.max_steps"]),
    ({"training_args": {"adam_beta2": 0.95}}, ["training_args.adam_beta2", "0.999", "0.95"]),
    ({"training_args": {"seed": 1}}, ["training_args.seed", "42", "1"]),
    ({"training_args": {"packing": True}}, ["packing", "False", "True"]),
    ({"training_args": {"bf16": True}}, ["training_args.bf16", "False", "True"]),
    ({"functionary_packing": True}, ["packing", "False", "True"]),
    ({"dataset": {"seed": 7}}, ["dataset.seed", "42", "7"]),
    ({"dataset": {"num_samples": 20}}, ["dataset.train_dataset", "24", "20"]),
    ({"dataset": {"eos_label_token_ids": [5]}}, ["dataset.eos_label_token_ids", "None", "[5]"]),
    ({"train": "fewer"}, ["dataset.train_dataset", "24", "23"]),
    ({"train": "others"}, ["dataset.train_dataset"]),
    ({"train": "other k"}, ["dataset.train_dataset", "8", "4"]),
    ({"train": "other rows"}, ["dataset.train_dataset"]),
    ({"sequence_length": 63}, ["sequence_length", "64", "63"]),
    ({"loss_functions": [{"function": "kl", "weight": 1}]}, ["loss_functions", "'cross_entropy'", "'kl'"]),
    ({"model": "another"}, ["model"]),
    ({"model_kwargs": {"dtype": "bfloat16"}}, ["model"]),
    ({"peft": {"r": 2}}, ["peft.r", "None", "2"]),
    ({"frozen_modules": ["lm_head"]}, ["frozen_modules", "[]", "['lm_head']"]),
]


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Other data, by what they differ in, and another student of the same shapes."""
    folder, documents = tmp_path_factory.mktemp("others"), random_documents(24)
    changed = [*documents[:-1], documents[-1][::-1].copy()]
    return {
        "fewer": write_dataset(folder / "fewer", documents[:-1]),
        "others": write_dataset(folder / "documents", changed),
        "other k": write_dataset(folder / "k", documents, codec=exact_codec(k=4)),
        "other rows": write_dataset(folder / "rows", documents, seed=8),
        "another": save_student(folder / "student", seed=9),
    }


def test_another_run_is_refused_with_both_values(
    parts: dict[str, str], others: dict[str, str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = str(whole / "checkpoint-2")
    for change, facts in CHANGES:
        settings = {key: others.get(value, value) if isinstance(value, str) else value for key, value in change.items()}
        arguments = {**settings.pop("training_args", {}), "resume_from_checkpoint": checkpoint}
        with refused(MismatchError, checkpoint, *facts):
            check_resumable(saving(parts, tmp_path, training_args=arguments, **settings))
    run = Run(saving(parts, tmp_path))
    _ = run.datasets, run.live
    monkeypatch.setattr(SFTConfig, "world_size", property(lambda self: 2))
    with refused(MismatchError, checkpoint, "processes", "8", "16"):
        check_same_run(checked(Path(checkpoint), content=False).identity, run.identity, Path(checkpoint))


def test_what_changes_nothing_may_change(parts: dict[str, str], whole: Path, tmp_path: Path) -> None:
    """The student is the same, from moved data and a moved student, and with the rows of a step cut otherwise."""
    for name in ("student", "train"):
        shutil.copytree(parts[name], tmp_path / name)
    arguments = {
        "resume_from_checkpoint": str(whole / "checkpoint-2"),
        "gradient_checkpointing": True,
        "logging_steps": 3,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 2,
        "report_to": [],
        "run_name": "another",
        "save_steps": 4,
        "save_total_limit": 1,
    }
    config = saving(
        parts,
        tmp_path / "out",
        model=str(tmp_path / "student"),
        train=str(tmp_path / "train"),
        eval=None,
        project_name="another",
        dataset={"num_samples": 24},
        loss_functions=[
            {"function": "cross_entropy", "weight": 0.25, "sparse_chunk_length": 7},
            # The defaults, written out.
            {
                "function": "kl",
                "weight": 0.75,
                "temperature": 1.0,
                "missing_probability_handling": "zero",
                "published_temperature": False,
            },
        ],
        training_args=arguments,
    )
    assert train(config)["steps"] == 4
    expected = load_file(whole / "model.safetensors")
    for name, value in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)
    # The schedule has no end, so the run may have a later one.
    longer = saving(parts, tmp_path / "longer", training_args={**arguments, "max_steps": 6, "num_train_epochs": 9})
    check_resumable(longer)


def test_every_argument_is_classified_and_new_ones_must_stay_the_same(parts: dict[str, str], tmp_path: Path) -> None:
    names = {field.name for field in dataclasses.fields(SFTConfig) if field.init} | set(BEFORE_5_23)
    assert names - set(ARGUMENTS) == set(), "arguments that the table lacks: decide whether a resumed run may change it"
    assert set(ARGUMENTS) - names == set(), "arguments that the installed trl no longer has"
    groups = (ROWS, LAST_STEP, DEPENDS_ON_EVALUATION, FREE)
    assert sum(map(len, groups)) == len(frozenset().union(*groups)), "each is in one group"
    run = Run(saving(parts, tmp_path))
    kept = run.identity
    # What the identity does not have must be known to change nothing, or be in it in another form.
    elsewhere = {"max_length", "packing", "packing_strategy", "remove_unused_columns"}
    missing = {name for name in names if not any(f"{key}.".startswith(f"training_args.{name}.") for key in kept)}
    assert missing == frozenset().union(*groups) | elsewhere
    run.arguments.invented_by_a_later_release = 1
    later = Run(run.config)
    later.__dict__ |= {name: getattr(run, name) for name in ("arguments", "model", "datasets", "tokenizer", "live")}
    with refused(MismatchError, "training_args.invented_by_a_later_release", "None", "1"):
        check_same_run(kept, later.identity, tmp_path)


def test_evaluations_are_part_of_a_run_that_keeps_the_best_student(parts: dict[str, str], tmp_path: Path) -> None:
    best = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "kl",
        "save_total_limit": 1,
    }
    train(saving(parts, tmp_path / "out", training_args=best))
    kls = {entry["step"]: entry["eval_kl"] for entry in metrics_of(tmp_path / "out") if "eval_kl" in entry}
    step = min(kls, key=lambda each: kls[each])
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "out" / f"checkpoint-{step}"), "the least KL is the best"
    resumed = {**best, "resume_from_checkpoint": True}
    with refused(MismatchError, "training_args.eval_steps", "1", "2"):
        check_resumable(saving(parts, tmp_path / "out", training_args={**resumed, "eval_steps": 2, "save_steps": 2}))
    with refused(MismatchError, "training_args.metric_for_best_model", "'kl'", "'loss'"):
        check_resumable(saving(parts, tmp_path / "out", training_args={**resumed, "metric_for_best_model": "loss"}))
    # Moved, and without the last student: the best one is saved again.
    (tmp_path / "out").rename(tmp_path / "moved")
    expected = bytes_of(tmp_path / "moved")
    for name in ("model.safetensors", "summary.json"):
        (tmp_path / "moved" / name).unlink()
    train(saving(parts, tmp_path / "moved", training_args=resumed))
    assert bytes_of(tmp_path / "moved") == expected


def test_another_live_teacher_or_other_rows_are_refused(
    parts: dict[str, str], others: dict[str, str], tmp_path: Path
) -> None:
    text, documents = tmp_path / "rows.jsonl", [document.tolist() for document in random_documents(8)]
    text.write_text("".join(json.dumps({"input_ids": document}) + "\n" for document in documents))

    def live(path: str = parts["teacher"], top_k: int = 4, **arguments: Any) -> RunConfig:
        teacher = {"kind": "hf", "path": path, "top_k": top_k}
        settings = {"dataset": {"prepared_dataset_path": str(tmp_path / "prepared")}, "teacher": teacher}
        merged = {"max_steps": 1, **arguments}
        return saving(parts, tmp_path / "out", train=str(text), eval=None, training_args=merged, **settings)

    train(live())
    resumed = {"resume_from_checkpoint": True, "max_steps": 2}
    check_resumable(live(str(shutil.copytree(parts["teacher"], tmp_path / "teacher")), **resumed))
    with refused(MismatchError, "teacher.path"):
        check_resumable(live(others["another"], **resumed))
    with refused(MismatchError, "teacher.top_k", "4", "5"):
        check_resumable(live(top_k=5, **resumed))
    # In place, of the same length and time.
    documents[3][0], documents[3][1] = documents[3][1], documents[3][0]
    before = text.stat()
    text.write_text("".join(json.dumps({"input_ids": document}) + "\n" for document in documents))
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert text.stat().st_size == before.st_size
    with refused(MismatchError, "dataset.train_dataset"):
        check_resumable(live(**resumed))


# -- whole checkpoints -------------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """For each file: missing, cut off, with one bit changed; and checkpoints whose saving was interrupted."""
    shutil.copytree(whole, tmp_path / "out")
    newest = tmp_path / "out" / "checkpoint-4"
    names = sorted(str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file())
    assert {RECEIPT, "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"} <= {
        *names
    }
    for name in names:
        content = (newest / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        for damaged in (None, content[:-1], flipped):
            (newest / name).unlink() if damaged is None else (newest / name).write_bytes(damaged)
            caplog.clear()
            with caplog.at_level(logging.WARNING, logger="distillkit"):
                found = newest_checkpoint(tmp_path / "out", content=True)
            assert found is not None
            assert found.folder.name == "checkpoint-3", name
            check_names(caplog.text, name, str(newest), "checkpoint-3")
            with refused(ConfigError, str(newest), name):
                checked(newest, content=True)
        (newest / name).write_bytes(content)
    assert checked(newest, content=True).step == 4
    # Killed while it was saved: without the receipt, whatever else is there is not taken.
    for number in (1, 2, 3, 4):
        (tmp_path / "out" / f"checkpoint-{number}" / RECEIPT).unlink()
    with refused(ConfigError, *(f"checkpoint-{number}" for number in (1, 2, 3, 4))):
        newest_checkpoint(tmp_path / "out")


def test_a_run_goes_on_from_the_checkpoint_before_and_is_then_finished(
    parts: dict[str, str], whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    for name in ("model.safetensors", "summary.json", "checkpoint-4/optimizer.pt"):
        (output / name).unlink()
    resumed = saving(parts, output, training_args={"resume_from_checkpoint": True})
    summary = train(resumed)
    check_names(caplog.text, "checkpoint-4", "optimizer.pt", "checkpoint-3")
    assert bytes_of(output) == bytes_of(whole)
    assert bytes_of(output / "checkpoint-4") == bytes_of(whole), "it was saved again"
    assert losses_of(output) == losses_of(whole)

    # Now it is finished: again and again, nothing is trained or written.
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()}
    for _ in range(2):
        assert train(resumed) == summary
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*") if path.is_file()} == before
    # Killed before the student was saved, or if it was lost or cut off since, it is saved without another step.
    student = output / "model.safetensors"
    for lost in ((student, output / "summary.json"), (student,), ()):
        student.write_bytes(student.read_bytes()[:-1])
        for path in lost:
            path.unlink()
        assert train(resumed)["steps"] == 4
        assert bytes_of(output) == bytes_of(whole)
    # In epochs, in the middle of one, and beyond the end.
    for settings, step, steps in (({"max_steps": -1, "num_train_epochs": 1}, 3, 3), ({"max_steps": 2}, 2, 2)):
        arguments = {**settings, "resume_from_checkpoint": str(whole / f"checkpoint-{step}")}
        assert train(saving(parts, tmp_path / f"{step}", training_args=arguments))["steps"] == steps
        assert bytes_of(tmp_path / f"{step}") == bytes_of(whole / f"checkpoint-{step}")
    with refused(ConfigError, "checkpoint-4", "4", "2", "max_steps"):
        check_resumable(saving(parts, output, training_args={"resume_from_checkpoint": True, "max_steps": 2}))


def test_adapters_go_on_as_if_never_interrupted(parts: dict[str, str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"peft": {"r": 2, "lora_dropout": 0.2}}
    train(saving(parts, tmp_path / "whole", **settings))
    for moved in (False, True):
        model = parts["student"]
        if moved:
            model = str(shutil.copytree(model, tmp_path / "student"))
        arguments = {"resume_from_checkpoint": str(tmp_path / "whole" / "checkpoint-2"), "save_strategy": "no"}
        train(saving(parts, tmp_path / f"{moved}", model=model, training_args=arguments, **settings))
        assert bytes_of(tmp_path / f"{moved}") == bytes_of(tmp_path / "whole")
    changed = {"peft": {"r": 2, "lora_dropout": 0.2}, "model": save_student(tmp_path / "base", seed=9)}
    with refused(MismatchError, "model", "checkpoint-2"):
        check_resumable(saving(parts, tmp_path / "True", training_args=arguments, **changed))


def test_a_checkpoint_of_the_model_alone_is_not_resumed(parts: dict[str, str], tmp_path: Path) -> None:
    arguments = {"save_only_model": True, "save_total_limit": 2, "max_steps": 3}
    train(saving(parts, tmp_path, training_args=arguments))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    arguments["resume_from_checkpoint"] = True
    with refused(ConfigError, "training_args.resume_from_checkpoint", "training_args.save_only_model"):
        train(saving(parts, tmp_path, training_args=arguments))


def test_no_checkpoint_has_what_is_not_finite(parts: dict[str, str], tmp_path: Path) -> None:
    """Although the loss is only logged much later; and the last checkpoint is the one that is named."""
    arguments = {"optim": "sgd", "learning_rate": 1e30, "max_grad_norm": 0.0, "logging_steps": 100}
    diverging = {**arguments, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1}
    with refused(DistillKitError, "3", str(tmp_path / "out" / "checkpoint-2")):
        train(saving(parts, tmp_path / "out", training_args=diverging))
    saved = list((tmp_path / "out").glob("checkpoint-*"))
    assert sorted(path.name for path in saved) == ["checkpoint-1", "checkpoint-2"]
    for folder in saved:
        assert all(value.isfinite().all() for value in load_file(folder / "model.safetensors").values())
    with pytest.raises(DistillKitError):
        train(saving(parts, tmp_path / "unsaved", training_args={**arguments, "save_strategy": "no", "max_steps": 2}))
    assert not (tmp_path / "unsaved" / "model.safetensors").exists()


# -- what is written ---------------------------------------------------------------------------------------------------


def test_secrets_are_written_nowhere(parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    secret = "s3cr3t-" * 3
    config = saving(
        parts,
        tmp_path / "out",
        model_kwargs={"token": secret, "dtype": "float32"},
        training_args={"hub_token": secret, "max_steps": 1},
    )
    train(config)
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {"training_args.bin", "distillkit_config.yaml", "metrics.jsonl", RECEIPT} <= {path.name for path in written}
    assert [path for path in written if secret.encode() in path.read_bytes()] == []
    kept = (tmp_path / "out" / "distillkit_config.yaml").read_text()
    check_names(kept, "training_args.hub_token", "model_kwargs.token")
    assert yaml.safe_load(kept)["model_kwargs"] == {"dtype": "float32"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 1

"""`distillkit config.yaml --dry-run`: what it finds, that it trains and leaves nothing, and that its estimates are
near the truth."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from click.testing import CliRunner

from distillkit.cli.init import KINDS
from distillkit.cli.main import cli
from distillkit.reports.run_record import read_metrics
from distillkit.training import memory_estimate as estimate
from distillkit.training.config.schema import RunConfig
from distillkit.training.dry_run import DryRun, dry_run
from distillkit.training.memory_estimate import optimizer_bytes
from distillkit.training.run import Run, train
from support.refusals import check_names, refused
from support.served import answering
from support.training import random_documents, run_config, save_student, tiny_model

pytestmark = pytest.mark.usefixtures("without_plots")


def config_for(parts: dict[str, str], output: Path, **settings: Any) -> RunConfig:
    arguments = {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": 2, **settings.pop("arguments", {})}
    train_data = settings.pop("train", parts["train"])
    return run_config(
        settings.pop("student", parts["student"]),
        output,
        train_data,
        parts["eval"],
        training_args=arguments,
        **settings,
    )


def written(config: RunConfig, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return path


def figures(result: DryRun, name: str) -> dict[str, Any]:
    return next(check.figures for check in result.checks if check.name == name)


def test_all_is_well_and_nothing_is_left(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a repository on the hub, which the trainer would make at once."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", lambda *_, **__: pytest.fail("it asks the hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "")
    pushing = {"push_to_hub": True, "hub_token": "s3cret"}
    config = written(config_for(parts, tmp_path / "out", arguments=pushing), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli, [str(config), "--dry-run"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert (result.stdout.count("✓"), result.stdout.count("✗")) == (16, 0)
    assert f"{tmp_path / 'out' / 'report.md'}" in result.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_the_first_batch_is_the_first_of_training(parts: dict[str, str], tmp_path: Path) -> None:
    losses = [{"function": "cross_entropy", "weight": 1}, {"function": "kl", "weight": 1, "temperature": 2.0}]
    config = config_for(parts, tmp_path / "out", loss_functions=losses, arguments={"gradient_checkpointing": True})
    result = CliRunner().invoke(cli, [str(written(config, tmp_path)), "--dry-run", "--json"], catch_exceptions=False)
    content = json.loads(result.stdout)
    assert content["ok"]
    checks = {check["name"]: check for check in content["checks"]}
    train(config)
    trained = next(entry for entry in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in entry)
    for name in ("cross_entropy", "kl", "top1_agreement"):
        assert checks["first batch"][name] == pytest.approx(trained[name], rel=1e-6), name
    assert checks["steps"]["steps"] == 4
    # Two checkpoints, at steps 2 and 4, and the student, each with its weights; and twice as much for AdamW's state.
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert checks["disk"]["checkpoints"] == len(list((tmp_path / "out").glob("checkpoint-*"))) == 2
    assert checks["disk"]["needed_bytes"] == pytest.approx((1 + 2 * 3) * weights, rel=0.1)
    # Another run into the same folder, and one that goes on.
    assert [c.status for c in dry_run(tmp_path / "config.yaml").checks if c.name == "output folder"] == ["warning"]
    config = config_for(parts, tmp_path / "out", arguments={"resume_from_checkpoint": True, "max_steps": 6})
    resumed = dry_run(written(config, tmp_path))
    assert figures(resumed, "output folder")["resumes_from"].endswith("checkpoint-4")


# What is changed; the check that fails, and what it names; what can not be checked then.
FAILURES: list[tuple[dict[str, Any], str, list[str], set[str]]] = [
    ({"student": "nowhere/at/all"}, "paths and packages", ["model", "nowhere/at/all"], {"tokenizer", "data"}),
    ({"train": "nowhere"}, "paths and packages", ["dataset.train_dataset", "nowhere"], {"data", "first batch"}),
    ({"student": "other"}, "data", ["dataset.train_dataset", "xxh3-128"], {"data fits student", "memory"}),
    (
        {"arguments": {"report_to": "mlflow"}},
        "training arguments",
        ["training_args.report_to", "'mlflow'"],
        {"tokenizer"},
    ),
    (
        {"arguments": {"lr_scheduler_type": "cosine_with_min_lr"}},
        "steps",
        ["training_args", "lr_scheduler_kwargs", "min_lr"],
        {"first batch", "resume"},
    ),
    (
        {"arguments": {"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"min_lr": 0}}},
        "steps",
        ["training_args", "lr_scheduler_kwargs", "'min_lr'"],
        {"disk"},
    ),
    ({"dataset": {"num_samples": 1000}}, "data", ["dataset.num_samples", "1,000", "24"], {"steps"}),
    (
        {"sequence_length": 8},
        "data",
        ["dataset.train_dataset", "19 of 24", "67.2", "dataset.overflow"],
        {"first batch"},
    ),
    ({"frozen_res": ["nothing"]}, "student's settings", ["frozen_res", "'nothing'"], {"student"}),
    (
        {"arguments": {"resume_from_checkpoint": True}},
        "paths and packages",
        ["training_args.resume_from_checkpoint", "out"],
        {"disk"},
    ),
]


def test_what_fails_is_named_and_the_rest_is_checked(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whether the tracker is installed depends on the machine.
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: [])
    for changes, failing, facts, unchecked in FAILURES:
        settings = {key: parts.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
        config = written(config_for(parts, tmp_path / "out", **settings), tmp_path)
        result = CliRunner().invoke(cli, [str(config), "--dry-run", "--json"], catch_exceptions=False)
        assert result.exit_code == 1
        checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
        assert [name for name, check in checks.items() if check["status"] == "failed"] == [failing]
        check_names(checks[failing]["detail"], *facts)
        assert unchecked <= {name for name, check in checks.items() if check["status"] == "not checked"}
        assert checks["configuration"]["status"] == "passed"
        assert not (tmp_path / "out").exists()


def test_documents_that_will_be_cut_or_split_are_told(parts: dict[str, str], tmp_path: Path) -> None:
    for overflow, status, facts in (
        ("cut", "warning", ["train", "19 of 24", "67.2", "eval", "5 of 7"]),
        ("split", "passed", ["train", "19 of 24"]),
    ):
        config = config_for(parts, tmp_path / "out", sequence_length=8, dataset={"overflow": overflow})
        (check,) = [check for check in dry_run(written(config, tmp_path)).checks if check.name == "data"]
        assert check.status == status
        check_names(check.detail, *facts)


def test_a_configuration_with_mistakes_is_all_that_is_said(parts: dict[str, str], tmp_path: Path) -> None:
    path = written(config_for(parts, tmp_path / "out"), tmp_path)
    path.write_text(path.read_text().replace("sequence_length", "sequence_lenght"))
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli, ["--dry-run", str(path)], catch_exceptions=False)
    assert result.exit_code == 1
    assert "✗" in result.stdout
    assert "✓" not in result.stdout
    check_names(result.stdout, "sequence_lenght", "'sequence_length'", "configuration")


def test_too_little_memory_and_disk(parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(config_for(parts, tmp_path / "out"), tmp_path)
    weights = figures(dry_run(path), "memory")["gradients_bytes"]

    def checked(free: int) -> dict[str, str]:
        monkeypatch.setattr(estimate, "available_memory", lambda device: free)
        return {check.name: check.status for check in dry_run(path).checks}

    # Gradients and AdamW's state are three times the weights, which are there already.
    assert checked(3 * weights - 1)["memory"] == "failed"
    assert checked(3 * weights - 1)["first batch"] == "not checked"
    assert checked(3 * weights)["memory"] == "warning"
    assert checked(10**12)["memory"] == "passed"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6, 7 * weights - 1))
    failed = [check for check in dry_run(path).checks if check.status == "failed"]
    assert [check.name for check in failed] == ["disk"]
    check_names(failed[0].detail, "training_args.save_total_limit")


def test_a_live_teacher_and_adapters(parts: dict[str, str], tmp_path: Path) -> None:
    teacher = {"kind": "hf", "path": parts["teacher"], "top_k": 4}
    config = config_for(parts, tmp_path / "out", teacher=teacher, peft={"r": 2}, arguments={"save_steps": 1})
    result = dry_run(written(config, tmp_path))
    assert result.ok, result
    memory, student = figures(result, "memory"), figures(result, "student")
    assert memory["teacher_bytes"] == pytest.approx(memory["weights_bytes"], rel=0.3)
    assert memory["gradients_bytes"] == 4 * student["trained"]
    assert figures(result, "disk")["needed_bytes"] == 4 * student["trained"] * (1 + 4 * 3)
    # Merged, the student is as large as the base model; checkpoints are not.
    merging = {"peft": {"r": 2, "merge_on_save": True}, "arguments": {"save_steps": 1}}
    config = config_for(parts, tmp_path / "out", teacher=teacher, **merging)
    merged = figures(dry_run(written(config, tmp_path)), "disk")["needed_bytes"]
    base = 4 * (student["parameters"] - student["trained"])
    assert merged == base + 4 * student["trained"] * 4 * 3
    train(config)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size == pytest.approx(base, rel=0.05)


# -- estimates ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_optimisers_state_is_as_large_as_estimated(parts: dict[str, str], tmp_path: Path) -> None:
    for optimizer in ("adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop"):
        config = config_for(parts, tmp_path, arguments={"optim": optimizer, "max_steps": 1, "save_strategy": "no"})
        trainer = Run(config).trainer
        trainer.train()
        state = trainer.optimizer.optimizer.state_dict()["state"]
        tensors = [value for entry in state.values() for value in entry.values() if isinstance(value, torch.Tensor)]
        real = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        estimated = optimizer_bytes(list(trainer.model.parameters()), optimizer)
        # Step counters and the like are left out.
        assert estimated == pytest.approx(real, rel=0.02, abs=200), optimizer


def test_an_unknown_optimisers_state_is_not_made_up() -> None:
    assert optimizer_bytes(list(tiny_model().parameters()), "galore_adamw") is None
    assert optimizer_bytes([torch.nn.Parameter(torch.zeros(1000))], "adamw_8bit") == pytest.approx(2000, rel=0.05)


def test_activations_are_measured(parts: dict[str, str], tmp_path: Path) -> None:
    """Two short forwards tell what a long one keeps."""
    student = save_student(tmp_path / "student", num_hidden_layers=6, max_position_embeddings=512)
    for checkpointing in (False, True):
        arguments = {"gradient_checkpointing": checkpointing}
        run = Run(config_for(parts, tmp_path / "out", student=student, arguments=arguments))
        model, settings = run.trainer.model, run.arguments
        estimated = estimate._activations(model, settings, 400)
        with estimate.checkpointing(model, settings, wanted=checkpointing):
            real = estimate._kept(model, settings, 400)
        whole = estimate._kept(model, settings, 400)
        # Recomputing keeps the inputs of the layers, and for a while all of one layer.
        expected = real + whole / 6 if checkpointing else real
        assert estimated == pytest.approx(expected, rel=0.1)
        assert (estimated < whole / 2) is checkpointing


# -- configurations to begin with --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_configuration_needs_only_its_paths(kind: str, parts: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / f"{kind}.yaml"
    text = tmp_path / "my text.jsonl"
    text.write_text("".join(json.dumps({"input_ids": ids.tolist()}) + "\n" for ids in random_documents(40)))
    prompts = tmp_path / "prompts.jsonl"
    words = [f"t{number}" for number in (*range(3, 10), *range(30, 63))]  # t1 and t2 are special
    prompts.write_text("".join(json.dumps({"prompt": word}) + "\n" for word in words))
    data, held_out = (str(text), str(text)) if kind in ("live", "server") else (parts["train"], parts["eval"])
    data = str(prompts) if kind == "on-policy" else data
    output = str(tmp_path / "trained: #1")
    options = ["--teacher", parts["tied"], "--student", parts["student"], "--data", data, "--eval-data", held_out]
    arguments = ["init", str(file), "--kind", kind, *options, "--output", output]
    assert CliRunner().invoke(cli, arguments, catch_exceptions=False).exit_code == 0
    overrides: dict[str, Any] = {"sequence_length": 64, "training_args.bf16": False}
    overrides |= {"rollouts.max_new_tokens": 8} if kind == "on-policy" else {}
    with answering(tiny_model(7)) as (url, _):
        if kind == "server":
            overrides |= {"teacher.top_k": 8, "teacher.base_url": url}
        result = dry_run(file, overrides)
    assert result.ok, [check for check in result.checks if check.status == "failed"]
    assert "sequence_length" in result.checks[0].detail
    steps = next(check for check in result.checks if check.name == "steps")
    assert (steps.status, steps.figures["steps"] < 10) == ("warning", True), "40 short documents fill a few rows"
    if kind == "on-policy":
        assert figures(result, "rollouts")["prompts"] == 40
        assert 1 <= figures(result, "rollouts")["completion_tokens"] <= 8
        # 2 layers of keys and values, 32 wide, for 16 completions of 1 + 8 tokens.
        assert figures(result, "memory")["cache_bytes"] == pytest.approx(2 * 2 * 32 * 4 * 16 * 9, rel=0.1)
    assert "#" in file.read_text()
    assert yaml.safe_load(file.read_text())["output_path"] == output
    with refused(FileExistsError, str(file), "another name"):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)

"""Training in two processes on the CPU (gloo): whatever shards or copies the student, losses, gradients and the saved
student are those of one process."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distillkit.training.config.schema import RunConfig
from distillkit.training.run import train
from support.processes import Processes
from support.training import run_config, save_student

FSDP = str(Path(__file__).parent / "support" / "launch_fsdp.py")
DEEPSPEED = str(Path(__file__).parent / "support" / "launch_deepspeed.py")
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16}

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_plots")]


@pytest.fixture(scope="module")
def wider_teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As deep as the student, with wider layers."""
    return save_student(tmp_path_factory.mktemp("distributed") / "teacher", seed=5, hidden_size=48)


def run(parts: dict[str, str], output: Path, student: str, processes: int, **settings: Any) -> RunConfig:
    """6 steps over 24 documents, 8 a step, with evaluations and a checkpoint in between."""
    arguments = {
        "max_steps": 6,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 4,
        "per_device_train_batch_size": 8 if processes == 1 else 2,
        "gradient_accumulation_steps": processes,
        "per_device_eval_batch_size": 2,
        **settings.pop("training_args", {}),
    }
    return run_config(parts[student], output, parts["train"], parts["eval"], training_args=arguments, **settings)


def metrics_of(output: Path) -> dict[str, float]:
    """Losses, norms of gradients and evaluations by name and step."""
    found = {}
    for line in (output / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name in ("loss", "grad_norm", "eval_loss", "eval_kl", "eval_cross_entropy", "eval_positions"):
            if name in entry:
                found[f"{name} {entry['step']}"] = entry[name]
    return found


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def check_same(one: Path, two: Path, tolerance: float = 1e-5) -> None:
    expected = metrics_of(one)
    assert len([name for name in expected if name.startswith(("loss", "eval_loss"))]) == 10
    # Norms are the first to show a gradient that was not reduced.
    assert metrics_of(two) == pytest.approx(expected, rel=tolerance)
    differences, others = (json.loads((folder / "_differences.json").read_text()) for folder in (one, two))
    for kind in ("positions", "documents"):
        others_kl = [each["kl"] for each in others[kind]]
        assert others_kl == pytest.approx([each["kl"] for each in differences[kind]], rel=1e-3)
    weights = weights_of(two)
    for name, value in weights_of(one).items():
        torch.testing.assert_close(weights[name], value, rtol=0, atol=3e-5, msg=name)


def check_resumed(whole: Path, resumed: Path) -> None:
    """From the checkpoint of step 4, where the resumed run evaluates first."""
    expected = metrics_of(whole)
    late = {name for name in expected if name.split()[1] > "4" or (name.endswith(" 4") and name.startswith("eval"))}
    assert metrics_of(resumed) == pytest.approx({name: expected[name] for name in late}, rel=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("teacher", ["dataset", "itself"])
def test_adapters_under_ddp(parts: dict[str, str], tmp_path: Path, processes: Processes, teacher: str) -> None:
    settings: dict[str, Any] = {"peft": LORA}
    if teacher == "itself":
        settings["teacher"] = {"kind": "hf", "path": parts["student"]}
    checkpointing = {"gradient_checkpointing": teacher == "dataset"}
    train(run(parts, tmp_path / "one", "student", 1, **settings))
    processes.train(run(parts, tmp_path / "two", "student", 2, **settings, training_args=checkpointing), tmp_path)
    check_same(tmp_path / "one", tmp_path / "two", 1e-4)


# How FSDP2 groups the student: as it does by itself, or with every linear layer in a group of its own, so that the head
# is still sharded when the losses need it.
OWN_GROUP = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "Linear"]}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("student", "fsdp_config", "settings"),
    [
        ("student", {}, {}),
        ("tied", {"state_dict_type": "SHARDED_STATE_DICT"}, {}),
        ("student", OWN_GROUP, {}),
        ("tied", {"activation_checkpointing": True}, {"frozen_modules": ["model.embed_tokens"]}),
        ("student", {}, {"peft": LORA}),
    ],
    ids=["untied", "tied-sharded", "head-apart", "tied-frozen-recomputed", "adapters"],
)
def test_fsdp2(
    parts: dict[str, str],
    tmp_path: Path,
    processes: Processes,
    student: str,
    fsdp_config: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    train(run(parts, tmp_path / "one", student, 1, **settings))
    fsdp = {"fsdp": True, "fsdp_config": fsdp_config}
    processes.train(run(parts, tmp_path / "two", student, 2, training_args=fsdp, **settings), tmp_path, FSDP)
    check_same(tmp_path / "one", tmp_path / "two")
    checkpoint = tmp_path / "two" / "checkpoint-4"
    assert any(path.name.startswith("pytorch_model_fsdp") for path in checkpoint.iterdir()), "it is FSDP that trained"
    if "peft" not in settings:
        saved = weights_of(tmp_path / "two")
        tied = torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])
        assert tied == (student == "tied")

    if fsdp_config == OWN_GROUP or "frozen_modules" in settings:
        return  # resuming is another part, seen in the others
    resumed = {**fsdp, "resume_from_checkpoint": str(checkpoint)}
    processes.train(run(parts, tmp_path / "resumed", student, 2, training_args=resumed, **settings), tmp_path, FSDP)
    check_resumed(tmp_path / "two", tmp_path / "resumed")


def test_packed_rows_in_two_processes(parts: dict[str, str], tmp_path: Path, processes: Processes) -> None:
    """Four rows of several documents a step, in one process or two of each."""
    one = {"packing": True, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    two = {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    train(run(parts, tmp_path / "one", "student", 1, training_args=one))
    processes.train(run(parts, tmp_path / "two", "student", 2, training_args=two), tmp_path)
    check_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("script", [None, FSDP], ids=["ddp", "fsdp"])
def test_live_teachers_and_projections(
    parts: dict[str, str], wider_teacher: str, tmp_path: Path, processes: Processes, script: str | None
) -> None:
    """A teacher with wider layers beside the student, whose projections are trained with it."""
    settings: dict[str, Any] = {
        "teacher": {"kind": "hf", "path": wider_teacher},
        "layer_mapping": "all",
        "loss_functions": [{"function": "kl", "weight": 0.5}, {"function": "hs_mse", "weight": 0.5}],
    }
    fsdp = {} if script is None else {"fsdp": True}
    train(run(parts, tmp_path / "one", "student", 1, **settings))
    processes.train(run(parts, tmp_path / "two", "student", 2, training_args=fsdp, **settings), tmp_path, script)
    check_same(tmp_path / "one", tmp_path / "two")
    resumed = {**fsdp, "resume_from_checkpoint": str(tmp_path / "two" / "checkpoint-4")}
    processes.train(run(parts, tmp_path / "resumed", "student", 2, training_args=resumed, **settings), tmp_path, script)
    check_resumed(tmp_path / "two", tmp_path / "resumed")


def test_fsdp2_keeps_the_teachers_precision(parts: dict[str, str], tmp_path: Path, processes: Processes) -> None:
    """Its mixed precision rounds the inputs of every forward to bfloat16."""
    train(run(parts, tmp_path / "one", "student", 1, training_args={"bf16": True}))
    arguments = {"fsdp": True, "bf16": True}
    processes.train(run(parts, tmp_path / "two", "student", 2, training_args=arguments), tmp_path, FSDP)
    expected, found = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    for name in expected:
        if "loss" in name:
            assert found[name] == pytest.approx(expected[name], rel=0.02), name


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("stage", "student", "settings"),
    [(2, "student", {}), (3, "tied", {}), (3, "student", {"peft": LORA})],
    ids=["stage-2", "tied", "adapters"],
)
def test_deepspeed(
    parts: dict[str, str],
    tmp_path: Path,
    processes: Processes,
    stage: int,
    student: str,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    zero = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": "auto"},
        **dict.fromkeys(
            (
                "train_batch_size",
                "train_micro_batch_size_per_gpu",
                "gradient_accumulation_steps",
                "gradient_clipping",
            ),
            "auto",
        ),
    }
    train(run(parts, tmp_path / "one", student, 1, **settings))
    processes.train(
        run(parts, tmp_path / "two", student, 2, training_args={"deepspeed": zero}, **settings), tmp_path, DEEPSPEED
    )
    check_same(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "two" / "checkpoint-4" / "zero_to_fp32.py").exists(), "it is DeepSpeed that trained"
    resumed = {"deepspeed": zero, "resume_from_checkpoint": str(tmp_path / "two" / "checkpoint-4")}
    processes.train(
        run(parts, tmp_path / "resumed", student, 2, training_args=resumed, **settings), tmp_path, DEEPSPEED
    )
    check_resumed(tmp_path / "two", tmp_path / "resumed")

"""Students of every kind: adapters, quantised weights, vision-language models; and what is refused before one loads."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from distillkit.errors import ConfigError, DistillKitError
from distillkit.losses.config import LossConfig
from distillkit.losses.fused import Objective
from distillkit.losses.positions import Targets
from distillkit.models.adapters import LoraSection, add_adapters
from distillkit.models.head import backbone_hidden, check_lm_head
from distillkit.training.attach import DistillationInputs, attach_losses
from distillkit.training.config.arguments import training_arguments
from distillkit.training.config.schema import RunConfig
from distillkit.training.run import train
from distillkit.training.student import check_student, load_student
from distillkit.types import SparseLogprobs
from support.refusals import refused
from support.training import (
    VOCABULARY,
    losses_of,
    run_config,
    save_student,
    save_vision_student,
    teacher_rows,
    tiny_model,
)

pytestmark = pytest.mark.usefixtures("without_plots")

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16}


@pytest.fixture(scope="module")
def vision(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same with a student that also reads images."""
    return {**parts, "vision": save_vision_student(tmp_path_factory.mktemp("students") / "vision")}


def run(parts: dict[str, str], output: Path, student: str = "student", **settings: Any) -> RunConfig:
    arguments = {
        "max_steps": 8,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 8,
        **settings.pop("training_args", {}),
    }
    return run_config(parts[student], output, parts["train"], parts["eval"], training_args=arguments, **settings)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model.eval()(torch.arange(12)[None], use_cache=False).logits
    return result


# -- LoRA --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"use_dora": True}], ids=["rslora", "dora"])
def test_loss_and_gradients_of_adapters_are_those_of_merged_weights(settings: dict[str, Any]) -> None:
    """The same function of the adapters, computed through plain logits of weights with the adapters added in."""
    torch.manual_seed(0)
    section = LoraSection(init_lora_weights=False, **LORA, **settings)
    model, plain = (add_adapters(tiny_model(3), section, set()) for _ in range(2))
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(12).reshape(2, 6)
    rows = torch.tensor([0, 1, 4, 6, 9])
    sparse = teacher_rows(tiny_model(7), ids.flatten().numpy(), rows=12)
    teacher = SparseLogprobs(torch.from_numpy(sparse.ids)[rows], torch.from_numpy(sparse.logprobs)[rows])
    attach_losses(model)
    model.train()
    objective = Objective.training([LossConfig(function="kl", weight=1)])
    distill = DistillationInputs(rows, Targets(ids.flatten()[rows + 1], teacher), objective)
    loss = model(input_ids=ids, distill=distill).loss
    loss.backward()

    # KL from the definition: renormalised stored ids against the whole softmax.
    p = teacher.logprobs - teacher.logprobs.logsumexp(-1, keepdim=True)
    q = plain(ids).logits.flatten(0, 1)[rows].log_softmax(-1).gather(-1, teacher.ids)
    expected = (p.exp() * (p - q)).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    checked = 0
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.requires_grad == ("lora_" in name)
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked >= 28

    merged = model.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), logits_of(plain), rtol=1e-4, atol=1e-4)
    after = merged(input_ids=ids, distill=distill).loss
    assert after.item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT, when it loads
def test_adapters_learn_the_same_however_activations_are_kept(parts: dict[str, str], tmp_path: Path) -> None:
    """And what is saved loads on the base model."""
    losses = []
    for name, arguments in (
        ("plain", {}),
        ("recomputed", {"gradient_checkpointing": True}),
        ("reentrant", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ):
        output = tmp_path / name
        summary = train(run(parts, output, peft=LORA, training_args=arguments))
        assert summary["eval_last"]["eval_kl"] < 0.95 * summary["eval_first"]["eval_kl"]
        losses.append(list(losses_of(output).values()))
        assert not (output / "model.safetensors").exists(), "the base weights are not saved again"
        loaded = AutoModelForCausalLM.from_pretrained(output)
        applied = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(parts["student"]), output)
        assert torch.equal(logits_of(loaded), logits_of(applied))
        with applied.disable_adapter():
            assert (logits_of(applied) - logits_of(loaded)).abs().max() > 0.01
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_merged_students_are_whole_models(parts: dict[str, str], tmp_path: Path) -> None:
    """With adapters of an earlier run in the folder, which must not be applied on top."""
    train(run(parts, tmp_path, peft=LORA))
    adapted = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path))
    train(run(parts, tmp_path, peft={**LORA, "merge_on_save": True}, training_args={"save_strategy": "steps"}))
    assert not (tmp_path / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not any("lora" in name for name in merged.state_dict())
    torch.testing.assert_close(logits_of(merged), adapted, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "checkpoint-8" / "adapter_model.safetensors").exists(), "checkpoints hold adapters"


@pytest.mark.slow
def test_adapters_are_resumed(parts: dict[str, str], tmp_path: Path) -> None:
    steps = {"save_strategy": "steps", "save_steps": 4, "eval_steps": 4}
    train(run(parts, tmp_path / "whole", peft=LORA, training_args=steps))
    checkpoint = str(tmp_path / "whole" / "checkpoint-4")
    resumed = {**steps, "resume_from_checkpoint": checkpoint}
    train(run(parts, tmp_path / "resumed", peft=LORA, training_args=resumed))
    whole = losses_of(tmp_path / "whole")
    assert losses_of(tmp_path / "resumed") == {step: loss for step, loss in whole.items() if step > 4}
    ends = [logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / name)) for name in ("whole", "resumed")]
    assert torch.equal(*ends)


def test_what_is_frozen_gets_no_adapter(parts: dict[str, str]) -> None:
    config = run(
        parts,
        Path("out"),
        frozen_modules=["model.layers.0.mlp"],
        frozen_res=[r"layers\.1\.self_attn\.[qk]_proj"],
        peft={**LORA, "exclude_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    )
    model = load_student(config, VOCABULARY)
    trained = {name.split(".lora_")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.removeprefix("base_model.model.") for name in trained} == {
        *[f"model.layers.0.self_attn.{name}_proj" for name in "qkv"],
        "model.layers.1.self_attn.v_proj",
        *[f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")],
        "lm_head.modules_to_save.default.weight",
    }


@pytest.mark.slow
def test_a_tied_head_is_trained_as_one(parts: dict[str, str], tmp_path: Path) -> None:
    """Embedding and head are one matrix in the trained and merged student too."""
    section = {**LORA, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "merge_on_save": True}
    summary = train(run(parts, tmp_path, "tied", peft=section))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    again = train(run({**parts, "tied": str(tmp_path)}, tmp_path / "again", "tied", training_args={"max_steps": 1}))
    assert again["eval_first"]["eval_kl"] == pytest.approx(summary["eval_last"]["eval_kl"], rel=1e-5)


def test_widened_embeddings_need_a_whole_model(parts: dict[str, str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "resize_embeddings_to_multiple_of": 48,
        "training_args": {"max_steps": 2, "eval_steps": 2},
    }
    with refused(ConfigError, "resize_embeddings_to_multiple_of", "64", "96", "peft.merge_on_save"):
        load_student(run(parts, tmp_path, peft=LORA, **settings), VOCABULARY)
    settings = {"resize_embeddings_to_multiple_of": 48, "training_args": {"max_steps": 2, "eval_steps": 2}}
    train(run(parts, tmp_path, peft={**LORA, "merge_on_save": True}, **settings))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).get_output_embeddings().weight.shape[0] == 96


def test_a_student_with_adapters_teaches_itself(parts: dict[str, str], tmp_path: Path) -> None:
    """Adapters off, it's its own teacher: where training starts, the two agree."""
    config = run(parts, tmp_path, teacher={"kind": "hf", "path": parts["student"]}, peft=LORA)
    summary = train(config)
    assert summary["eval_first"]["eval_kl"] == pytest.approx(0, abs=1e-6)
    assert summary["eval_last"]["eval_kl"] > 1e-4, "cross-entropy moves the adapters"


# -- other models ------------------------------------------------------------------------------------------------------

VISION: dict[str, Any] = {
    "model_auto_class": "AutoModelForImageTextToText",
    "frozen_modules": ["model.vision_tower"],
    "frozen_res": ["multi_modal_projector"],
}


@pytest.mark.slow
@pytest.mark.parametrize("peft", [None, {**LORA, "merge_on_save": True}], ids=["whole", "adapters"])
def test_a_vision_language_student_trains_from_text(
    vision: dict[str, str], tmp_path: Path, peft: dict[str, Any] | None
) -> None:
    processor = '{"image_processor_type": "CLIPImageProcessor"}'
    (Path(vision["vision"]) / "preprocessor_config.json").write_text(processor)
    summary = train(run(vision, tmp_path, "vision", **VISION, peft=peft))
    assert summary["eval_last"]["eval_kl"] < summary["eval_first"]["eval_kl"]
    before, after = (
        dict(AutoModelForImageTextToText.from_pretrained(folder).state_dict())
        for folder in (vision["vision"], tmp_path)
    )
    assert before.keys() == after.keys()
    frozen = {name for name in before if "vision_tower" in name or "multi_modal_projector" in name}
    assert len(frozen) > 20
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged >= frozen
    assert any("language_model.layers.0.self_attn.q_proj" in name for name in before.keys() - unchanged)
    assert (tmp_path / "preprocessor_config.json").read_text() == processor, "it still takes images"
    assert "use_cache" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_adapters_train_on_quantised_weights(parts: dict[str, str], tmp_path: Path, settings: dict[str, Any]) -> None:
    student = save_student(tmp_path / "student", hidden_size=64, intermediate_size=64)
    summary = train(run({**parts, "student": student}, tmp_path / "out", model_kwargs=settings, peft=LORA))
    assert summary["eval_last"]["eval_kl"] < summary["eval_first"]["eval_kl"]


# -- refused before any weights are loaded -----------------------------------------------------------------------------

# Settings, and what the message names: the setting's path, what was found, and what is meant.
MISTAKES: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"model_auto_class": "AutoModelForImageTextToTxt"},
        ["model_auto_class", "'AutoModelForImageTextToTxt'", "'AutoModelForImageTextToText'"],
    ),
    ({"model_auto_class": "AutoModelForImageTextToText"}, ["model", "AutoModelForImageTextToText"]),
    ({"model_auto_class": "AutoModel"}, ["LlamaModel"]),
    ({"model": "/no/such/folder"}, ["model", "/no/such/folder"]),
    ({"frozen_modules": ["model.embed_token"]}, ["frozen_modules", "'model.embed_tokens'"]),
    ({"frozen_res": ["vision"]}, ["frozen_res", "'vision'"]),
    ({"frozen_res": ["."]}, ["frozen_modules", "frozen_res"]),
    ({"frozen_res": ["."], "peft": LORA}, ["peft", "LlamaForCausalLM"]),
    ({"peft": {"rank": 8}}, ["peft.rank"]),
    ({"peft": {"lora_alpa": 8}}, ["peft.lora_alpa", "'lora_alpha'"]),
    ({"peft": {"r": 0}}, ["peft.r", "1", "0"]),
    ({"peft": {"lora_dropout": 1.0}}, ["peft.lora_dropout", "1.0"]),
    ({"peft": {"bias": "some"}}, ["peft.bias", "'some'", "'none'", "'all'", "'lora_only'"]),
    ({"peft": {"init_lora_weights": "gausian"}}, ["peft.init_lora_weights", "'gausian'"]),
    ({"peft": {"target_modules": []}}, ["peft.target_modules", "[]"]),
    ({"peft": {"target_modules": ["query"]}}, ["peft", "query", "LlamaForCausalLM"]),
    ({"peft": {"target_modules": "(q_proj"}}, ["peft.target_modules", "'(q_proj'"]),
    ({"peft": {"layers_to_transform": [-1]}}, ["peft.layers_to_transform", "[-1]"]),
    ({"peft": {"layers_pattern": "layers"}}, ["peft.layers_pattern", "layers_to_transform"]),
    ({"peft": {"modules_to_save": ["lm_heads"]}}, ["peft.modules_to_save", "'lm_heads'", "'lm_head'"]),
    (
        {"peft": {"modules_to_save": ["lm_head"]}, "frozen_modules": ["lm_head"]},
        ["peft.modules_to_save", "'lm_head'", "frozen_modules"],
    ),
    ({"peft": {"target_modules": ["q_proj", "lm_head"]}}, ["Linear"]),
    ({"model_kwargs": {"load_in_4bit": True}}, ["model_kwargs.load_in_4bit", "peft"]),
    (
        {"model_kwargs": {"load_in_4bit": True, "load_in_8bit": True}, "peft": LORA},
        ["model_kwargs.load_in_4bit", "load_in_8bit"],
    ),
    (
        {"model_kwargs": {"quantization_config": "4bit"}, "peft": LORA},
        ["model_kwargs.quantization_config", "'4bit'"],
    ),
    (
        {"model_kwargs": {"quantization_config": {"load_in_4bits": True}}, "peft": LORA},
        ["model_kwargs.quantization_config.load_in_4bits", "'load_in_4bit'"],
    ),
    (
        {"model_kwargs": {"quantization_config": {"quant_method": "nothing"}}, "peft": LORA},
        ["model_kwargs.quantization_config", "nothing"],
    ),
    (
        {"model_kwargs": {"load_in_8bit": True}, "peft": {**LORA, "merge_on_save": True}},
        ["peft.merge_on_save", "model_kwargs.load_in_8bit"],
    ),
    ({"model_kwargs": {"trust_remote_code": True}}, ["model_kwargs.trust_remote_code"]),
    (
        {"peft": {**LORA, "merge_on_save": True}, "training_args": {"fsdp": True}},
        ["peft.merge_on_save", "training_args.fsdp"],
    ),
]


def test_a_mistake_is_one_message_before_weights_are_loaded(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("weights are loaded")
    )
    for mistake, facts in MISTAKES:
        settings = dict(mistake)
        model = settings.pop("model", parts["student"])
        with refused(DistillKitError, *facts):
            check_student(run({**parts, "student": model}, tmp_path, **settings))


def test_a_tied_head_does_not_come_apart(parts: dict[str, str], tmp_path: Path) -> None:
    for name in ("lm_head", "embed_tokens"):
        with refused(ConfigError, "peft.modules_to_save", name, "peft.ensure_weight_tying"):
            check_student(run(parts, tmp_path, "tied", peft={**LORA, "modules_to_save": [name]}))


# Sections that are merged on saving, and what a refusal names: merged, they would be another model.
MERGED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("tied", {"target_modules": ["q_proj", "embed_tokens"]}, ["peft.merge_on_save", "embed_tokens"]),
    ("tied", {"target_modules": r".*(q_proj|embed_tokens)", "use_dora": True}, ["peft.merge_on_save"]),
    ("tied", {"trainable_token_indices": [1, 2]}, ["peft.trainable_token_indices", "peft.ensure_weight_tying"]),
    ("student", {"trainable_token_indices": [1, 64]}, ["peft.trainable_token_indices", "64"]),
    ("student", {"target_modules": ["q_proj"], "lora_bias": True}, ["peft.merge_on_save", "peft.lora_bias"]),
    ("tied", {"target_modules": ["q_proj"], "use_dora": True}, []),
    ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, []),
    ("student", {"target_modules": ["q_proj", "embed_tokens"], "use_dora": True}, []),
    ("student", {"trainable_token_indices": [1, 2], "bias": "all"}, []),
]


@pytest.mark.parametrize(("student", "section", "facts"), MERGED)
def test_a_merged_student_is_the_one_that_was_evaluated(
    parts: dict[str, str], tmp_path: Path, student: str, section: dict[str, Any], facts: list[str]
) -> None:
    config = run(parts, tmp_path, student, peft={**LORA, **section, "merge_on_save": True})
    if facts:
        with refused(ConfigError, *facts):
            check_student(config)
        return
    model = load_student(config, VOCABULARY)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    head = check_lm_head(model)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        evaluated = head(backbone_hidden(model.eval(), input_ids=ids))
    model.merge_and_unload(safe_merge=True).save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(saved), evaluated, rtol=1e-4, atol=1e-4)


def test_without_bitsandbytes_there_is_nothing_quantised(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)
    )
    for kwargs in ({"load_in_4bit": True}, {"quantization_config": {"load_in_4bit": True}}):
        with refused(ConfigError, "model_kwargs", "load_in_4bit", "pip install bitsandbytes"):
            check_student(run(parts, tmp_path, model_kwargs=kwargs, peft=LORA))
    for optimiser in ("paged_adamw_8bit", "adamw_bnb_8bit", "lion_32bit"):
        with refused(ConfigError, "training_args.optim", f"'{optimiser}'", "pip install bitsandbytes"):
            training_arguments(run(parts, tmp_path, training_args={"optim": optimiser}))


def test_sharding_that_can_not_be_done(parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(arguments: dict[str, Any], facts: list[str], **environment: str) -> None:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            with refused(ConfigError, *facts):
                training_arguments(run(parts, tmp_path, training_args=arguments))

    check({"fsdp": True}, ["training_args.fsdp", "torchrun"])
    check({"fsdp": True}, ["training_args.fsdp", "cpu"], WORLD_SIZE="2")
    check({"fsdp_config": {"version": 2}}, ["training_args.fsdp_config", "training_args.fsdp"])
    check({"fsdp": True, "deepspeed": {"a": 1}}, ["training_args.fsdp", "training_args.deepspeed"])
    check({"deepspeed": {"zero_optimization": {"stage": 3}}}, ["training_args.deepspeed", "torchrun"])
    launched = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    check({}, ["fsdp_cpu_ram_efficient_loading"], **launched)
    check({"optim": "schedule_free_adamw"}, ["training_args.optim", "pip install schedulefree"])

    monkeypatch.setattr("distillkit.training.config.arguments.WITHOUT_FSDP", ())
    section = "training_args.fsdp_config"
    for settings, facts in (
        ({"cpu_offlod": True}, [f"{section}.cpu_offlod", "'cpu_offload'"]),
        ({"fsdp_version": 1}, [f"{section}.fsdp_version", "1", "2"]),
        ({"use_orig_params": True}, [f"{section}.use_orig_params"]),
        ("nowhere.json", [section, "nowhere.json"]),
    ):
        check({"fsdp": True, "fsdp_config": settings}, facts, WORLD_SIZE="2")


def test_deepspeed_is_passed_through(parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    zero = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": "auto"}
    config = run(parts, tmp_path, training_args={"deepspeed": zero})
    if importlib.util.find_spec("deepspeed") is None:
        with refused(ConfigError, "training_args.deepspeed", "pip install deepspeed"):
            training_arguments(config)
    given: dict[str, Any] = {}
    monkeypatch.setattr("distillkit.training.config.arguments.missing_package", lambda *_: None)
    monkeypatch.setattr("trl.SFTConfig.__init__", lambda self, **arguments: given.update(arguments))
    training_arguments(config)
    assert given["deepspeed"] == zero

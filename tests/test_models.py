"""The student: attention, precision, embeddings, freezing; and losses inside its forward."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from distillkit.errors import ConfigError
from distillkit.losses.config import LossConfig
from distillkit.losses.fused import Objective
from distillkit.losses.positions import Positions, Targets
from distillkit.losses.registry import loss
from distillkit.training.attach import DistillationInputs, attach_losses
from distillkit.training.config.schema import RunConfig
from distillkit.training.student import attention_implementation, freeze, load_student, widen_embeddings
from distillkit.types import SparseLogprobs
from support.architectures import save_architecture
from support.refusals import check_names, refused
from support.training import VOCABULARY, run_config, save_student, teacher_rows, tiny_model


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_student(tmp_path_factory.mktemp("student"))


def config(student: str, **settings: Any) -> RunConfig:
    return run_config(student, Path("out"), "data", **settings)


@pytest.mark.parametrize("tied", [False, True])
def test_the_losses_are_those_of_the_models_own_logits(tied: bool) -> None:
    model, plain = (tiny_model(3, tie_word_embeddings=tied) for _ in range(2))
    ids = torch.arange(12).reshape(2, 6)
    rows = torch.tensor([0, 1, 4, 6, 9])
    sparse = teacher_rows(tiny_model(7), ids.flatten().numpy(), rows=12)
    teacher = SparseLogprobs(torch.from_numpy(sparse.ids)[rows], torch.from_numpy(sparse.logprobs)[rows])
    signature = inspect.signature(model.forward)
    attach_losses(model)
    assert inspect.signature(model.forward) == signature, "generate() and the Trainer read it"

    objective = Objective.training([LossConfig(function="kl", weight=1)])
    distill = DistillationInputs(rows, Targets(ids.flatten()[rows + 1], teacher), objective)
    model.train()
    output = model(input_ids=ids, position_ids=torch.arange(6).expand(2, -1), distill=distill)
    output.loss.backward()
    targets = Targets(ids.flatten()[rows + 1], teacher)
    expected = loss("kl")(Positions(plain(ids).logits.flatten(0, 1)[rows], targets)).sum()
    expected.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    assert set(output) == {"loss", "statistics"}, "nothing large leaves the forward"


def test_without_targets_the_model_is_as_before() -> None:
    model, plain = tiny_model(3), tiny_model(3)
    attach_losses(model)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert torch.equal(
        model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0),
        plain.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0),
    )


def test_flash_attention_is_never_replaced_in_silence(student: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not torch.cuda.is_available()
    with refused(ConfigError, "use_flash_attention: true", "CUDA", "use_flash_attention: false"):
        load_student(config(student, use_flash_attention=True), VOCABULARY)
    with caplog.at_level(logging.INFO, logger="distillkit"):
        assert load_student(config(student), VOCABULARY).config._attn_implementation == "sdpa"
    (said,) = (record.message for record in caplog.records if "FlashAttention" in record.message)
    check_names(said, "CUDA", "sdpa")
    caplog.clear()
    assert attention_implementation(config(student, use_flash_attention=False)) is None
    assert attention_implementation(config(student, model_kwargs={"attn_implementation": "eager"})) is None
    assert not caplog.records
    for named, wanted in (("eager", True), ("flash_attention_2", False)):
        with refused(ConfigError, f"use_flash_attention: {str(wanted).lower()}", "attn_implementation", named):
            attention_implementation(
                config(student, use_flash_attention=wanted, model_kwargs={"attn_implementation": named})
            )
    with refused(ConfigError, "use_flash_attention: true", "model_kwargs.attn_implementation", "eager"):
        attention_implementation(
            config(student, use_flash_attention=True, model_kwargs={"attn_implementation": "eager"})
        )


def test_flash_attention_is_only_for_models_that_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it can run: by default where the model supports it, and a reason where it is required and does not."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: name)
    for model_type, name in {"llama": None, "mamba": "MambaForCausalLM", "bloom": "BloomForCausalLM"}.items():
        folder = save_architecture(tmp_path / model_type, model_type)
        chosen = attention_implementation(config(folder))
        assert chosen == ("flash_attention_2" if name is None else None)
        if name is not None:
            with refused(ConfigError, "use_flash_attention: true", name):
                attention_implementation(config(folder, use_flash_attention=True))


def test_model_kwargs_reach_the_model(student: str) -> None:
    assert load_student(config(student), VOCABULARY).dtype == torch.float32
    model = load_student(
        config(student, model_kwargs={"torch_dtype": "bfloat16", "attn_implementation": "eager"}), VOCABULARY
    )
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, "eager")


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"model": "/no/such/folder"}, ["model", "/no/such/folder"]),
        (
            {"model_kwargs": {"dtype": "float13"}},
            ["model_kwargs.dtype", "float13", "auto", "float32"],
        ),
        (
            {"frozen_modules": ["model.embed_token"]},
            ["frozen_modules", "model.embed_token", "model.embed_tokens"],
        ),
        ({"frozen_res": ["visual"]}, ["frozen_res", "visual"]),
        ({"frozen_res": ["."]}, ["frozen_modules", "frozen_res"]),
    ],
)
def test_settings_that_do_not_fit_the_student(student: str, settings: dict[str, Any], facts: list[str]) -> None:
    with refused(ConfigError, *facts):
        load_student(run_config(settings.pop("model", student), Path("out"), "data", **settings), VOCABULARY)


def test_what_is_frozen_is_exactly_what_was_named() -> None:
    model = tiny_model()
    named = freeze(model, ["model.layers.0"], [r"layers\.1\.self_attn\.[qk]_proj", "norm"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    everything = {name for name, _ in model.named_parameters()}
    assert named == everything - trained
    assert named == {
        name
        for name in everything
        if ".layers.0." in name or "norm" in name or ".1.self_attn.q" in name or ".1.self_attn.k" in name
    }


def test_embeddings_are_widened_and_never_narrowed(tmp_path: Path) -> None:
    model = tiny_model()
    before = model.get_output_embeddings().weight.detach().clone()
    widen_embeddings(model, 50, 16)
    assert model.get_output_embeddings().weight.shape[0] == 64
    widen_embeddings(model, 50, 48)
    assert model.get_output_embeddings().weight.shape[0] == 96
    assert torch.equal(model.get_output_embeddings().weight[:64], before)
    widen_embeddings(model, 100, 50)
    assert model.config.vocab_size == 100
    model.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == 100


def test_a_tokenizer_with_more_ids_than_embeddings(student: str) -> None:
    with refused(ConfigError, "64", "70", "resize_embeddings_to_multiple_of"):
        load_student(config(student), 70)
    assert load_student(config(student, resize_embeddings_to_multiple_of=8), 70).config.vocab_size == 72

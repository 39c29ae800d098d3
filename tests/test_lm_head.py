"""The head applied by itself equals the model's own logits, for every known kind of head, or is refused by name."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers

from distillkit.errors import DistillKitError
from distillkit.models.head import (
    LMHead,
    backbone_hidden,
    bare_model,
    check_lm_head,
    chunk_length,
    lm_head_of,
    logit_chunks,
)
from support.refusals import refused

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Model family, what its config needs, and the (scale, soft cap) that its logits get. Caps are low so that they bend
# small logits.
FAMILIES: dict[str, tuple[dict[str, Any], float, float | None]] = {
    "Llama": ({"tie_word_embeddings": True}, 1.0, None),
    "Qwen3": ({"tie_word_embeddings": False}, 1.0, None),
    "Phi": ({}, 1.0, None),  # a head with a bias
    "GPT2": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, 1.0, None),  # backbone called `transformer`
    "Gemma2": ({"final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}, 1.0, 0.5),
    "RecurrentGemma": ({"logits_soft_cap": 0.5, "lru_width": 32}, 1.0, 0.5),
    "Cohere": ({"logit_scale": 0.0625}, 0.0625, None),
    "Granite": ({"logits_scaling": 4.0}, 0.25, None),
    "HyperCLOVAX": ({"logits_scaling": 3.0}, 3.0, None),
}


def model_of(family: str, **overrides: Any) -> Any:
    """A random model with logits of ordinary size."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SMALL, **FAMILIES.get(family, ({},))[0], **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
        if model.get_output_embeddings().bias is not None:
            model.get_output_embeddings().bias.normal_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_models_own_logits(family: str) -> None:
    model = model_of(family)
    _, scale, softcap = FAMILIES[family]
    ids = torch.randint(0, VOCAB, (2, 7))

    head = check_lm_head(model)
    logits = head(backbone_hidden(model, input_ids=ids))

    assert (head.scale, head.softcap, head.size) == (pytest.approx(scale), softcap, VOCAB)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model(ids, use_cache=False).logits)
    # Slices are the same function.
    torch.testing.assert_close(head(backbone_hidden(model, input_ids=ids)[0, 2:5], head.weights()), logits[0, 2:5])


def test_gradients_are_those_of_the_models_own_forward() -> None:
    model = model_of("Gemma2")
    ids = torch.randint(0, VOCAB, (2, 7))
    names = [name for name, _ in model.named_parameters()]

    head = lm_head_of(model)
    ours = torch.autograd.grad(head(backbone_hidden(model, input_ids=ids)).square().mean(), list(model.parameters()))
    theirs = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), list(model.parameters()))

    for name, one, other in zip(names, ours, theirs, strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_float32_product_is_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # Blocks of 16 bytes × 4: several blocks and a shorter last one.
    monkeypatch.setattr("distillkit.models.head._WIDENED_BLOCK_BYTES", 4 * 32 * 36)
    model = model_of("Phi").to(torch.bfloat16)
    head = lm_head_of(model)
    hidden = torch.randn(3, 5, 32).to(torch.bfloat16)
    weight, bias = head.weights()
    assert bias is not None
    exact = (hidden.double() @ weight.double().T + bias.double()).float()

    torch.testing.assert_close(head(hidden, float32_product=True), exact)
    assert head(hidden).dtype == torch.float32
    assert (head(hidden) - exact).abs().max() > 1e-3, "the bfloat16 product rounds"


def test_a_head_that_does_more_is_refused() -> None:
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = Doubled(model_of("Llama").config)
    with refused(DistillKitError, "Doubled", "llama"):
        check_lm_head(model)


def test_models_without_a_usable_head_are_refused() -> None:
    backbone = model_of("Llama").base_model
    with refused(DistillKitError, "LlamaModel", "AutoModelForCausalLM"):
        lm_head_of(backbone)
    with refused(DistillKitError, "LlamaModel", "base_model_prefix"):
        backbone_hidden(backbone, input_ids=torch.zeros(1, 2, dtype=torch.long))

    quantised = model_of("Llama", tie_word_embeddings=False)
    quantised.lm_head.weight = torch.nn.Parameter(quantised.lm_head.weight.to(torch.int8), requires_grad=False)
    with refused(DistillKitError, "LlamaForCausalLM", "Linear", "torch.int8", "(96, 32)"):
        lm_head_of(quantised)

    worded = model_of("Llama")
    worded.config.logit_scale = "inv_sqrt_d_model"
    with refused(DistillKitError, "LlamaConfig.logit_scale", "inv_sqrt_d_model"):
        lm_head_of(worded)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT asks transformers 5 so
class TestPeft:
    """PEFT replaces modules after the head was looked at: what counts is the weight at each call."""

    def test_lora_on_other_layers(self) -> None:
        model = model_of("Llama")
        head = check_lm_head(model)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        wrapped.eval()
        ids = torch.randint(0, VOCAB, (2, 7))

        assert bare_model(wrapped) is model
        assert check_lm_head(wrapped).model is model
        torch.testing.assert_close(head(backbone_hidden(wrapped, input_ids=ids)), wrapped(ids, use_cache=False).logits)

    def test_lora_on_the_head_is_refused(self) -> None:
        model = model_of("Llama", tie_word_embeddings=False)
        head = lm_head_of(model)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "lm_head"]))
        for look in (head.weights, lambda: lm_head_of(wrapped)):
            with refused(DistillKitError, "LlamaForCausalLM", "Linear", "target_modules", "modules_to_save"):
                look()

    def test_a_head_in_modules_to_save_is_the_trained_copy(self) -> None:
        model = model_of("Llama", tie_word_embeddings=False)
        head: LMHead = lm_head_of(model)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
        copy = model.lm_head.modules_to_save["default"].weight
        with torch.no_grad():
            copy.mul_(3.0)

        assert head.weights()[0] is copy
        check_lm_head(wrapped)
        head(torch.ones(1, 32)).sum().backward()
        assert copy.grad is not None
        with wrapped.disable_adapter():
            torch.testing.assert_close(head.weights()[0] * 3, copy)


def test_the_longest_chunk_is_known_without_dividing_the_positions() -> None:
    device = torch.device("cpu")
    for positions, most in ((1, 7), (7, 7), (8, 7), (100, 7), (100, None)):
        chunks = logit_chunks(positions, 64, device, most)
        assert [start for start, _ in chunks] == [0, *(stop for _, stop in chunks[:-1])]
        assert chunk_length(positions, 64, device, most) == max(stop - start for start, stop in chunks)
    assert chunk_length(10**30, 64, device, 7) == 7, "however large a batch of a mistyped configuration is"

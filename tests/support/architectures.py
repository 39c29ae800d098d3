"""Every causal language model of transformers, tiny and with random weights."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from support.training import tiny_tokenizer

VOCABULARY = 96
# Sizes by the names that configs give them. Windows are shorter than the checks' documents.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "lru_width", "attention_hidden_size", "embedding_size"),
        32,
    ),
    **dict.fromkeys(("intermediate_size", "d_ff", "ffn_dim", "decoder_ffn_dim", "n_inner", "feed_forward_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_attention_heads"), 4),
    **dict.fromkeys(("n_head", "n_heads", "num_heads", "decoder_attention_heads", "rotary_dim", "time_step_rank"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "linear_num_value_heads"), 4),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "mamba_dt_rank", "linear_num_heads"), 4),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_key_value_heads", "num_experts_per_tok"), 2),
    **dict.fromkeys(("linear_num_key_heads", "num_labels", "eos_token_id"), 2),
    **dict.fromkeys(("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "state_size"), 8),
    **dict.fromkeys(
        ("mamba_d_state", "ssm_state_size", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8
    ),
    "hidden_size_per_layer_input": 8,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "moe_intermediate_size", "q_lora_rank"), 16),
    **dict.fromkeys(("shared_expert_intermediate_size", "kv_lora_rank", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("n_shared_experts", "first_k_dense_replace", "moe_layer_start_index", "n_group"), 1),
    **dict.fromkeys(("topk_group", "mamba_n_groups", "n_groups", "bos_token_id"), 1),
    "pad_token_id": 0,
}
_ALIKE_HEADS = {"num_key_value_heads": 4}
_ATTENTION_BETWEEN = {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}
# What an architecture needs besides.
SETTINGS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _ALIKE_HEADS),
    **dict.fromkeys(("glm_moe_dsa", "kimi_linear", "youtu", "minicpm3", "sarvam_mla"), _ALIKE_HEADS),
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16], "attention_head_size": 8},
    "lfm2": _ATTENTION_BETWEEN,
    "lfm2_moe": _ATTENTION_BETWEEN,
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
    "phi3": {
        "max_position_embeddings": 64,
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4,
            "original_max_position_embeddings": 16,
        },
    },
}
ARCHITECTURES = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
_LARGEST = 50_000_000


def architecture(model_type: str, **settings: Any) -> Any:
    """Build a model; raises whatever transformers does if these sizes do not fit the architecture."""
    config = _config(CONFIG_MAPPING[model_type], {**SETTINGS.get(model_type, {}), **settings})
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"{model_type} has {size:,} parameters even here")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def save_architecture(folder: Path, model_type: str, **settings: Any) -> str:
    """Save a model with a tokenizer of as many ids."""
    architecture(model_type, **settings).save_pretrained(folder)
    tiny_tokenizer(settings.get("vocab_size", VOCABULARY)).save_pretrained(folder)
    return str(folder)


def _config(kind: Any, settings: dict[str, Any]) -> Any:
    fields = {name for each in kind.__mro__ for name in getattr(each, "__annotations__", {})}
    fields |= set(inspect.signature(kind.__init__).parameters)
    sizes = {name: value for name, value in SMALL.items() if name in fields}
    for name, part in (kind.sub_configs or {}).items():
        own = part
        if not (isinstance(part, type) and part is not transformers.AutoConfig):
            default = getattr(kind(), name, None)
            own = None if default is None else type(default)
        if own is not None and name not in settings:
            sizes[name] = _config(own, SETTINGS.get(own.model_type, {})).to_dict()
    return kind(**{**sizes, **settings})

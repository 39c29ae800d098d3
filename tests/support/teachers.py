"""A small random Llama and text for it, on disk."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HEAD = 128
SENTENCE = "the cat sat on a mat and saw one dog run far from its old red house while rain fell"
WORDS = SENTENCE.split()
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
# All k values stored as they are: what is read is what the teacher said.
EXACT = {"d": HEAD, "k": 8, "exact_k": 8, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False}


def write_llama(folder: Path, **config: Any) -> None:
    """A random Llama whose head is wider than its tokenizer's vocabulary."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>", "<eos>"], show_progress=False)
    backend.train_from_iterator([SENTENCE, "user assistant"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": HEAD,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": None,
        "eos_token_id": 1,
        "initializer_range": 0.3,
    }
    LlamaForCausalLM(LlamaConfig(**{**sizes, **config})).save_pretrained(folder)


def write_text(path: Path, documents: int) -> None:
    """Documents of 2 to 100 words."""
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(2, 100)))} for _ in range(documents)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

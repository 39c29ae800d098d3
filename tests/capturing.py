"""A small teacher, text for it, and captures of them, for tests."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distillkit.capture import CaptureReport, capture

HEAD = 128
SENTENCE = "the cat sat on a mat and saw one dog run far from its old red house while rain fell"
WORDS = SENTENCE.split()
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
# All k values stored as they are: what is read is what the teacher said.
EXACT = {"d": HEAD, "k": 8, "exact_k": 8, "exact_dtype": "float32", "residual_bins": [], "delta_encoding": False}


def make_teacher(folder: Path) -> Path:
    """A small random Llama whose head is wider than its tokenizer's vocabulary."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>", "<eos>"], show_progress=False)
    backend.train_from_iterator([SENTENCE, "user assistant"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=HEAD,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_text(path: Path) -> Path:
    """120 documents of 2 to 100 words."""
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(2, 100)))} for _ in range(120)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(teacher: Path, dataset: Path, output: Path, **options: Any) -> CaptureReport:
    settings = {"max_seq_len": 64, "batch_tokens": 256, "head_rows": 50, "shard_tokens": 700, "progress": False}
    if "preset" not in options:
        settings["compression_config"] = EXACT
    return capture(model=str(teacher), dataset=str(dataset), output=output, **{**settings, **options})


def files(folder: Path) -> dict[str, bytes]:
    """The files of a dataset by name, without the plan of an unfinished one."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".capture"}


COMMAND = [sys.executable, "-c", "from distillkit.cli.capture import capture; capture()"]

"""Small real parts for the training tests: models, tokenizers and captured datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from distillkit.codec import Codec, DistributionQuantizationConfig
from distillkit.codec.topk import sparse_from_logits
from distillkit.shards import Header, ShardWriter
from distillkit.text.tokenizer import fingerprint
from distillkit.training.config.file import parse_config
from distillkit.training.config.schema import RunConfig
from distillkit.types import SparseLogprobs

VOCABULARY = 64

# Models this small run slower on several threads.
torch.set_num_threads(1)


def tiny_model(seed: int = 0, vocabulary: int = VOCABULARY, **overrides: Any) -> LlamaForCausalLM:
    """A random Llama whose distributions are far from uniform."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        **overrides,
    }
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


def tiny_tokenizer(vocabulary: int = VOCABULARY, prefix: str = "t") -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `vocabulary` ids."""
    words = WordLevel({f"{prefix}{i}": i for i in range(vocabulary)}, unk_token=f"{prefix}0")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token=f"{prefix}0", eos_token=f"{prefix}1", pad_token=f"{prefix}2"
    )


def save_student(folder: Path, seed: int = 1, vocabulary: int = VOCABULARY, **overrides: Any) -> str:
    """A student's folder: model and tokenizer."""
    tiny_model(seed, vocabulary, **overrides).save_pretrained(folder)
    tiny_tokenizer(vocabulary).save_pretrained(folder)
    return str(folder)


def exact_codec(vocabulary: int = VOCABULARY, k: int = 8) -> Codec:
    """Stores float32 values as they are."""
    return Codec(
        DistributionQuantizationConfig(
            d=vocabulary, k=k, exact_k=k, exact_dtype="float32", residual_bins=[], delta_encoding=False
        )
    )


def random_documents(count: int, seed: int = 0, longest: int = 40) -> list[np.ndarray]:
    """Token ids of documents of 2 … `longest` tokens."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest + 1, count)
    return [generator.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]


@torch.no_grad()
def teacher_rows(
    teacher: LlamaForCausalLM, input_ids: np.ndarray, k: int = 8, rows: int | None = None
) -> SparseLogprobs:
    """The teacher's distributions after each token of a document but the last."""
    logits = teacher(torch.from_numpy(input_ids).long().unsqueeze(0), use_cache=False).logits[0]
    sparse = sparse_from_logits(logits[: len(input_ids) - 1 if rows is None else rows], k)
    return SparseLogprobs(sparse.ids.numpy(), sparse.logprobs.numpy())


def header_for(codec: Codec, tokenizer: Any = None, **overrides: Any) -> Header:
    """A header as a capture writes it."""
    settings: dict[str, Any] = {
        "codec": codec.to_dict(),
        "vocab_size": codec.vocab_size,
        "head_size": codec.vocab_size,
        "tokenizer": None if tokenizer is None else {"name": "teacher", "fingerprint": fingerprint(tokenizer)},
        **overrides,
    }
    return Header(**settings)


def write_dataset(
    folder: Path,
    documents: list[np.ndarray],
    *,
    codec: Codec | None = None,
    shift: int = 0,
    tokenizer: Any = None,
    seed: int = 7,
) -> str:
    """A captured dataset of a random teacher; with `shift`, its rows are moved by one position."""
    codec = codec or exact_codec()
    teacher = tiny_model(seed)
    header = header_for(codec, tokenizer or tiny_tokenizer())
    with ShardWriter(folder, header) as writer:
        for input_ids in documents:
            rows = teacher_rows(teacher, input_ids, codec.k)
            order = np.clip(np.arange(len(rows.ids)) - shift, 0, len(rows.ids) - 1)
            writer.write(input_ids, SparseLogprobs(rows.ids[order], rows.logprobs[order]))
    return str(folder)


def captured_parts(folder: Path, *, train: int = 24, held_out: int = 7) -> dict[str, str]:
    """A student, and captured documents of a random teacher: some to train on, some held out."""
    return {
        "student": save_student(folder / "student"),
        "train": write_dataset(folder / "train", random_documents(train)),
        "eval": write_dataset(folder / "eval", random_documents(held_out, seed=1)),
    }


def metrics_of(output: Path) -> list[dict[str, Any]]:
    """Every log of a run."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def losses_of(output: Path) -> dict[int, float]:
    """The training loss by step."""
    return {entry["step"]: entry["loss"] for entry in metrics_of(output) if "loss" in entry}


def run_config(student: str, output: Path, train: str, evaluate: str | None = None, **settings: Any) -> RunConfig:
    """A training configuration; `training_args` are merged into small ones."""
    arguments = {
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        **settings.pop("training_args", {}),
    }
    dataset: dict[str, Any] = {"train_dataset": {"disk_path": train}, **settings.pop("dataset", {})}
    if evaluate is not None:
        dataset["eval_dataset"] = {"disk_path": evaluate}
    return parse_config(
        {
            "model": student,
            "output_path": str(output),
            "sequence_length": 64,
            "dataset": dataset,
            **({} if "teachers" in settings else {"teacher": {"kind": "dataset"}}),
            "loss_functions": [{"function": "cross_entropy", "weight": 0.25}, {"function": "kl", "weight": 0.75}],
            "training_args": arguments,
            **settings,
        }
    )


def save_vision_student(folder: Path, seed: int = 1) -> str:
    """A vision-language student's folder: a Llava whose vision tower and text model are tiny, random weights."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=tiny_model().config, image_token_index=VOCABULARY - 1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)

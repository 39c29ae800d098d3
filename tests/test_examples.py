"""Every configuration of examples/ trains: with its models and data replaced by tiny ones, and everything else as it
is, but for what this machine does not have (a GPU, the hub, a tracker's account)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from distillkit.codec import Codec, codec_config
from distillkit.training.config.file import load_config, parse_config
from distillkit.training.run import train
from support.training import (
    VOCABULARY,
    random_documents,
    save_student,
    save_vision_student,
    teacher_rows,
    tiny_model,
    tiny_tokenizer,
    write_dataset,
)

EXAMPLES = sorted(path for path in (Path(__file__).parent.parent / "examples").glob("*.y*ml"))
K = 8


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_valid_configuration(path: Path) -> None:
    missing = [name for name in ("deepspeed", "bitsandbytes") if importlib.util.find_spec(name) is None]
    text = path.read_text()
    if any(name in text or (name == "bitsandbytes" and "8bit" in text) for name in missing):
        pytest.skip(f"needs {', '.join(missing)}")
    assert load_config(path).model_fields_set == yaml.safe_load(text).keys()


def published_rows(folder: Path, legacy: dict[str, Any]) -> str:
    """A packed dataset as published: nested lists, numbered attention masks, as many rows as tokens."""
    codec, teacher = Codec(codec_config({"legacy_logit_compression": legacy})), tiny_model(7)
    columns: dict[str, list[Any]] = {}
    for first, second in zip(random_documents(12), random_documents(12, seed=5), strict=True):
        rows = [teacher_rows(teacher, ids, codec.k, rows=len(ids)) for ids in (first, second)]
        ids, logprobs = (np.concatenate([getattr(row, name) for row in rows]) for name in ("ids", "logprobs"))
        row = codec.to_published(codec.encode(ids, logprobs))
        row |= {
            "input_ids": np.concatenate([first, second]),
            "attention_mask": np.repeat([1, 2], [len(first), len(second)]),
        }
        for name, value in row.items():
            columns.setdefault(name, []).append(value.tolist())
    folder.mkdir()
    types = {"packed_indices": pa.list_(pa.list_(pa.uint64())), "input_ids": pa.list_(pa.uint64())}
    table = pa.table({name: pa.array(value, type=types.get(name)) for name, value in columns.items()})
    pq.write_table(table, folder / "data_0.parquet")
    return str(folder)


def chats(path: Path) -> str:
    generator = np.random.default_rng(0)

    def words() -> str:
        return " ".join(f"t{i}" for i in generator.integers(0, VOCABULARY, 8))

    messages = [[{"role": "user", "content": words()}, {"role": "assistant", "content": words()}] for _ in range(12)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in messages))
    return str(path)


TEMPLATE = "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} {% endfor %}"


def chat_student(folder: Path, seed: int) -> str:
    save_student(folder, seed)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_codec(section: dict[str, Any]) -> dict[str, Any]:
    """The same codec for a vocabulary and a k of these tests."""
    size = "vocab_size" if "vocab_size" in section else "d"
    return {**section, size: VOCABULARY, "k": K, "exact_k": min(K, section["exact_k"] * K // section["k"])}


def with_tiny_parts(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Replace models and data, and what this machine does not have."""
    teacher, dataset, arguments = content["teacher"], content["dataset"], content["training_args"]
    if teacher["kind"] == "hf":
        content["model"], teacher["path"] = chat_student(folder / "student", 1), chat_student(folder / "teacher", 7)
        data = chats(folder / "chats.jsonl")
    else:
        vision = content.get("model_auto_class") == "AutoModelForImageTextToText"
        content["model"] = (save_vision_student if vision else save_student)(folder / "student")
        if "legacy_logit_compression" in teacher:
            teacher["legacy_logit_compression"] = tiny_codec(teacher["legacy_logit_compression"])
            data = published_rows(folder / "data", teacher["legacy_logit_compression"])
        elif "logprob_compressor" in teacher:
            teacher["logprob_compressor"] = tiny_codec(teacher["logprob_compressor"])
            codec = Codec(codec_config({"logprob_compressor": teacher["logprob_compressor"]}))
            data = write_dataset(folder / "data", random_documents(12), codec=codec)
        else:
            data = write_dataset(folder / "data", random_documents(12))
    for part in ("train_dataset", "eval_dataset"):
        if part in dataset:
            dataset[part] = {"disk_path": data}
    for name in ("num_samples", "num_eval_samples"):
        if name in dataset:
            dataset[name] = 6
    if "prepared_dataset_path" in dataset:
        dataset["prepared_dataset_path"] = str(folder / "prepared")
    content["output_path"] = str(folder / "output")
    if content.get("use_flash_attention"):
        content["use_flash_attention"] = False
    arguments |= {"max_steps": 2, "disable_tqdm": True, "report_to": "none"}
    arguments |= {"push_to_hub": False} if arguments.get("push_to_hub") else {}
    return content


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_trains(path: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    if "deepspeed" in content["training_args"]:
        pytest.importorskip("deepspeed")
    if "8bit" in content["training_args"].get("optim", ""):
        pytest.importorskip("bitsandbytes")
    summary = train(parse_config(with_tiny_parts(content, tmp_path), source=path.name))
    assert summary["steps"] == 2
    logged = [json.loads(line) for line in (tmp_path / "output" / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(entry["loss"]) for entry in logged if "loss" in entry)
    assert (tmp_path / "output" / "config.json").exists()

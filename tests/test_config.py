"""The training configuration: the published one is understood, and what is wrong is named by its path."""

from __future__ import annotations

import copy
import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit.errors import ConfigError
from distillkit.training.config.argument_rules import argument_problems
from distillkit.training.config.arguments import training_arguments
from distillkit.training.config.file import load_config, parse_config
from support.refusals import check_names, refused

# Every key of the published configuration that is supported, with the spellings it is used in.
PUBLISHED = """
project_name: my-distillation
model: Qwen/Qwen3-8B
output_path: ./output
sequence_length: 8192
dataset:
  train_dataset: {repo_id: some/Logits-Packed-8192, revision: main, config_name: null, split: train}
  eval_dataset: {disk_path: ./held-out, split: null}
  seed: 42
  num_samples: 100
  num_eval_samples: 10
  eos_label_token_ids: null
  prepared_dataset_path: null
  prepacked: true
teacher:
  kind: dataset
  vocab_size: 151936
  logprob_compressor:
    d: 151936
    delta_encoding: true
    error_diffusion: false
    exact_dtype: float32
    exact_k: 32
    k: 128
    polynomial_terms: [0, 1, 2]
    residual_bins: []
    term_dtype: float32
loss_functions:
  - {function: cross_entropy, weight: 0.5}
  - function: kl
    weight: 0.5
    temperature: 1.0
    missing_probability_handling: symmetric_uniform
    sparse_chunk_length: 1024
layer_mapping: null
force_hidden_state_projection: false
resize_embeddings_to_multiple_of: 64
use_flash_attention: true
functionary_packing: true
model_kwargs: {torch_dtype: bfloat16}
model_auto_class: AutoModelForCausalLM
trust_remote_code: false
frozen_modules: [model.embed_tokens]
frozen_res: ['\\.bias$']
training_args:
  num_train_epochs: 1
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 8
  learning_rate: 2e-6
  bf16: true
  optim: adamw_torch
  gradient_checkpointing: true
  gradient_checkpointing_kwargs: {use_reentrant: false}
  max_length: 8192
  packing: true
  dataset_kwargs: {skip_prepare_dataset: true}
  remove_unused_columns: false
  report_to: none
  evaluation_strategy: "no"
  save_strategy: no
  warmup_ratio: 0.1
  resume_from_checkpoint: true
"""

MINIMAL: dict[str, Any] = {
    "model": "student",
    "output_path": "out",
    "sequence_length": 128,
    "dataset": {"train_dataset": {"disk_path": "data"}},
    "teacher": {"kind": "dataset"},
}


MISSING = object()


def config_with(path: str, value: Any) -> dict[str, Any]:
    """The minimal configuration with one more setting, by its dotted path, or one less."""
    content = copy.deepcopy(MINIMAL)
    *parents, last = path.split(".")
    section: Any = content
    if parents and parents[0] == "loss_functions":
        section["loss_functions"] = [{"function": "kl", "weight": 1}]
    for parent in parents:
        section = section[int(parent)] if parent.isdigit() else section.setdefault(parent, {})
    if value is MISSING:
        del section[last]
    else:
        section[last] = value
    return content


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


def test_the_published_configuration_is_understood(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, PUBLISHED))
    assert config.dataset.train_dataset.repo_id == "some/Logits-Packed-8192"
    assert config.loss_functions[1].missing_probability_handling == "uniform"
    assert config.model_kwargs == {"dtype": "bfloat16"}
    codec = config.teacher.codec()  # type: ignore[union-attr]
    assert codec is not None
    assert (codec.k, codec.vocab_size) == (128, 151936)
    arguments = training_arguments(config)
    assert arguments.learning_rate == 2e-6, "YAML reads 2e-6 as a string"
    assert arguments.save_strategy == "no", "YAML reads an unquoted no as false"
    assert arguments.warmup_steps == 0.1
    assert arguments.bf16 is True, "on a CPU, if it is asked for"
    assert (arguments.activation_checkpointing, arguments.activation_checkpointing_kwargs) == (
        True,
        {"use_reentrant": False},
    )
    assert (arguments.output_dir, arguments.max_length) == ("./output", 8192)


def test_defaults_run_on_a_cpu_and_are_the_published_ones_but_for_the_loss() -> None:
    config = parse_config(MINIMAL)
    assert [(loss.function, loss.weight) for loss in config.loss_functions] == [("cross_entropy", 0.1), ("kl", 0.9)]
    assert config.loss_functions[1].missing_probability_handling == "uniform"
    assert (config.project_name, config.dataset.seed, config.use_flash_attention) == ("distillkit", 42, None)
    arguments = training_arguments(config)
    assert (arguments.use_cpu, arguments.bf16, arguments.dataloader_pin_memory) == (True, False, False)
    assert arguments.dataloader_num_workers == 0, "beside an accelerator there are some"
    assert (arguments.data_seed, arguments.activation_checkpointing, arguments.learning_rate) == (42, True, 2e-5)


def test_a_written_configuration_reads_back_the_same(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, PUBLISHED))
    again = parse_config(config.model_dump(mode="json", exclude_unset=True))
    assert again.model_dump() == config.model_dump()


# Path of the mistake, its value, and what the message names besides the path: what was found, or is meant or allowed.
MISTAKES: list[tuple[str, Any, list[str]]] = [
    ("modle", "x", ["'model'"]),
    ("dataset.train_dataste", {}, ["'train_dataset'"]),
    ("dataset.train_dataset.splitt", "train", ["'split'"]),
    ("teacher.logprob_compresor", {}, ["'logprob_compressor'"]),
    ("sequence_length", "long", ["'long'"]),
    ("sequence_length", 1, ["2", "1"]),
    ("dataset.num_samples", 0, ["1", "0"]),
    ("dataset.train_dataset", {"disk_path": "data", "repo_id": "a/b"}, ["repo_id", "disk_path"]),
    ("dataset.train_dataset.revision", "main", ["repo_id"]),
    ("dataset.train_dataset.split", "train[:100]", ["'train[:100]'", "num_samples"]),
    ("dataset.eval_dataset", {"split": "test"}, ["repo_id", "disk_path"]),
    ("dataset.eos_label_token_ids", [3, -1], ["0", "-1"]),
    ("dataset.eos_label_token_ids", 3, ["3"]),
    ("dataset.prepared_dataset_path", "", ["''"]),
    ("teacher.kind", "hff", ["'hff'", "'hf'", "'dataset'"]),
    ("teacher.kind", None, ["'hf'", "'dataset'"]),
    ("teacher.vocab_size", "many", ["'many'"]),
    ("teacher.logprob_compressor", {"d": 100, "k": 2, "exact_k": 8, "residual_bins": []}, ["exact_k"]),
    ("teacher.legacy_logit_compression", {"vocab_size": 100, "k": 8, "exact_k": 2}, ["polynomial_degree"]),
    ("model_kwargs", {"dtype": "float32", "torch_dtype": "bfloat16"}, ["'float32'", "'bfloat16'"]),
    ("frozen_res", ["("], ["'('"]),
    ("use_flash_attention", "perhaps", ["'perhaps'"]),
    ("loss_functions", [], ["1", "[]"]),
    ("loss_functions.0.function", "klx", ["'klx'", "'kl'"]),
    ("loss_functions.0.weight", -1, ["-1"]),
    ("loss_functions", [{"function": "kl", "weight": 0}], ["0"]),
    ("loss_functions.0.weight", MISSING, []),
    ("loss_functions.0.temperature", 0, ["0"]),
    ("loss_functions.0.tempreature", 2, ["'temperature'"]),
    ("loss_functions.0.margin", 1.0, ["1.0", "kl", "hinge"]),
    ("dataset.overflow", "window", ["'window'", "cut", "split", "drop"]),
    ("loss_functions.0.missing_probability_handling", "none", ["'none'", "'uniform'"]),
]

# The same for arguments of the trainer, whose names and types are those of TRL.
ARGUMENTS: list[tuple[str, Any, list[str]]] = [
    ("learnin_rate", 1e-4, ["'learning_rate'"]),
    ("num_epochs", 1, ["'num_train_epochs'"]),
    ("learning_rate", "fast", ["'fast'"]),
    ("max_steps", 1.5, ["1.5"]),
    ("save_strategy", "step", ["'step'", "'steps'", "'epoch'"]),
    ("packing", "some", ["'some'"]),
    # What contradicts other sections.
    ("max_length", 64, ["64", "sequence_length", "128"]),
    ("output_dir", "elsewhere", ["'elsewhere'", "output_path", "'out'"]),
    ("eval_strategy", "steps", ["dataset.eval_dataset"]),
    ("eval_on_start", True, ["dataset.eval_dataset"]),
    # What this trainer does otherwise, and would ignore.
    ("remove_unused_columns", True, ["True"]),
    ("average_tokens_across_devices", False, ["False"]),
    ("train_sampling_strategy", "group_by_length", ["'group_by_length'", "'random'", "'sequential'"]),
    ("model_init_kwargs", {"dtype": "auto"}, ["model_kwargs"]),
    ("trust_remote_code", True, ["True"]),
    ("resume_from_checkpoint", 3, ["3"]),
    ("group_by_length", True, ["True"]),
    ("accelerator_config", {"split_batches": True}, ["split_batches"]),
    ("use_liger_kernel", True, ["True"]),
    ("label_smoothing_factor", 0.1, ["0.1"]),
    ("torch_compile", True, ["True"]),
    # What prepares text, of which stored distributions have none.
    ("dataset_text_field", "content", ["'content'"]),
    ("chat_template_path", "chat.jinja", ["'chat.jinja'"]),
    ("assistant_only_loss", True, ["True"]),
    ("completion_only_loss", True, ["True"]),
    ("dataset_kwargs", {"add_special_tokens": False}, ["'add_special_tokens'", "'skip_prepare_dataset'"]),
    ("dataset_kwargs", "skip", ["'skip'"]),
    ("dataset_num_proc", 0, ["0", "1"]),
    ("packing_strategy", "wrapped", ["'wrapped'", "'bfd'"]),
    ("packing_strategy", "bfd_split", ["'bfd_split'", "'bfd'", "sequence_length"]),
    ("packing_strategy", "ffd", ["'ffd'", "'bfd'"]),
]


def check_mistakes(mistakes: list[tuple[str, Any, list[str]]]) -> None:
    """Each is refused in one line that begins with its path."""
    for path, value, facts in mistakes:
        with pytest.raises(ConfigError) as caught:
            pytest.fail(f"{path} is understood: {parse_config(config_with(path, value))}")
        message = str(caught.value)
        assert re.match(rf"config: {re.escape(path)}\b", message), message
        assert "\n" not in message, "one mistake is one line"
        check_names(message, *facts)


def test_a_mistake_is_named_by_its_path() -> None:
    check_mistakes(MISTAKES)


def test_a_mistake_in_an_argument_is_named_by_its_path() -> None:
    check_mistakes([(f"training_args.{name}", value, facts) for name, value, facts in ARGUMENTS])


def test_a_live_teacher_takes_what_prepares_text() -> None:
    arguments = {
        "assistant_only_loss": True,
        "completion_only_loss": False,
        "chat_template_path": "chat.jinja",
        "dataset_text_field": "content",
        "dataset_num_proc": 96,
        "packing": True,
        "packing_strategy": "bfd",
    }
    assert argument_problems({**MINIMAL, "teacher": {"kind": "hf"}, "training_args": arguments}) == []


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    content = {
        **MINIMAL,
        "modle": 1,
        "sequence_length": 1,
        "training_args": {"learnin_rate": 1, "padding_free": True},
    }
    path = written(tmp_path, yaml.safe_dump(content))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    first, *problems = str(caught.value).splitlines()
    check_names(first, str(path), "4")
    assert len(problems) == 4
    assert {line.split(":")[0].strip() for line in problems} == {
        "modle",
        "sequence_length",
        "training_args.learnin_rate",
        "training_args.padding_free",
    }


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    for text, facts in (
        ("", []),
        ("- a\n- b\n", ["list"]),
        ("model: [unclosed\n", ["line 2"]),
        ("model: a\nmodel: b\n", ["'model'", "line 1", "line 2"]),
        ("dataset: {seed: 1, seed: 2}\n", ["'seed'", "line 1"]),
    ):
        path = written(tmp_path, text)
        with refused(ConfigError, str(path), *facts):
            load_config(path)
    with refused(ConfigError, str(tmp_path / "none.yaml"), os.strerror(errno.ENOENT)):
        load_config(tmp_path / "none.yaml")


def test_the_argument_combinations_of_transformers_are_one_clear_message() -> None:
    config = parse_config(config_with("training_args.dataloader_prefetch_factor", 2))
    with refused(ConfigError, "training_args", "dataloader_prefetch_factor"):
        training_arguments(config)

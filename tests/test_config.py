"""The training configuration: the published one is understood, and what is wrong is named by its path."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit.errors import ConfigError
from distillkit.training.config.argument_rules import argument_problems
from distillkit.training.config.arguments import training_arguments
from distillkit.training.config.file import load_config, parse_config
from distillkit.training.config.schema import RunConfig

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


def config_with(path: str, value: Any) -> dict[str, Any]:
    """The minimal configuration with one more setting, by its dotted path."""
    content = copy.deepcopy(MINIMAL)
    *parents, last = path.split(".")
    section = content
    for parent in parents:
        section = section.setdefault(parent, {})
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


# Path of the mistake, its value, and what the message must say besides the path.
MISTAKES = [
    ("modle", "x", "did you mean 'model'"),
    ("dataset.train_dataste", {}, "did you mean 'train_dataset'"),
    ("dataset.train_dataset.splitt", "train", "did you mean 'split'"),
    ("teacher.logprob_compresor", {}, "did you mean 'logprob_compressor'"),
    ("training_args.learnin_rate", 1e-4, "did you mean 'learning_rate'"),
    ("training_args.num_epochs", 1, "num_train_epochs"),
    ("sequence_length", "long", "'long'"),
    ("sequence_length", 1, "at least 2"),
    ("dataset.num_samples", 0, "at least 1"),
    ("dataset.train_dataset", {"disk_path": "data", "repo_id": "a/b"}, "found both"),
    ("dataset.train_dataset.revision", "main", "belongs to a hub dataset"),
    ("dataset.train_dataset.split", "train[:100]", "num_samples"),
    ("dataset.eval_dataset", {"split": "test"}, "found neither"),
    ("teacher.kind", "hff", "did you mean 'hf'"),
    ("teacher.kind", None, "must be 'hf' or 'dataset'"),
    ("teacher.vocab_size", "many", "'many'"),
    ("teacher.logprob_compressor", {"d": 100, "k": 2, "exact_k": 8, "residual_bins": []}, "exact_k"),
    ("teacher.legacy_logit_compression", {"vocab_size": 100, "k": 8, "exact_k": 2}, "polynomial_degree"),
    ("loss_functions", [], "a list of length 1 or more"),
    ("model_kwargs", {"dtype": "float32", "torch_dtype": "bfloat16"}, "one setting"),
    ("frozen_res", ["("], "not a regular expression"),
    ("use_flash_attention", "perhaps", "'perhaps'"),
    ("training_args.learning_rate", "fast", "'fast'"),
    ("training_args.max_steps", 1.5, "1.5"),
    ("training_args.save_strategy", "step", "did you mean 'steps'"),
    ("training_args.max_length", 64, "sequence_length: 128"),
    ("training_args.output_dir", "elsewhere", "output_path"),
    ("training_args.remove_unused_columns", True, "must be false"),
    ("training_args.eval_strategy", "steps", "dataset.eval_dataset"),
    ("training_args.eval_on_start", True, "dataset.eval_dataset"),
    ("training_args.average_tokens_across_devices", False, "all processes"),
    ("training_args.train_sampling_strategy", "group_by_length", "'sequential'"),
    ("training_args.dataset_text_field", "content", "token ids already"),
    ("training_args.chat_template_path", "chat.jinja", "token ids already"),
    ("training_args.assistant_only_loss", True, "loss mask decides"),
    ("training_args.completion_only_loss", True, "loss mask decides"),
    ("training_args.dataset_kwargs", {"add_special_tokens": False}, "allowed: 'skip_prepare_dataset'"),
    ("training_args.dataset_kwargs", "skip", "a mapping is expected"),
    ("training_args.dataset_num_proc", 0, "at least 1"),
    ("training_args.packing", "some", "'some'"),
    ("training_args.packing_strategy", "wrapped", "see each other"),
    ("training_args.packing_strategy", "bfd_split", "cuts documents that are longer than sequence_length"),
    ("training_args.packing_strategy", "ffd", "allowed"),
    ("dataset.eos_label_token_ids", [3, -1], "at least 0"),
    ("dataset.eos_label_token_ids", 3, "list"),
    ("dataset.prepared_dataset_path", "", "text of length 1 or more"),
    ("training_args.model_init_kwargs", {"dtype": "auto"}, "model_kwargs"),
    ("training_args.trust_remote_code", True, "top level"),
    ("training_args.resume_from_checkpoint", 3, "checkpoint's folder"),
    ("training_args.group_by_length", True, "seed and the epoch"),
    ("training_args.accelerator_config", {"split_batches": True}, "leave split_batches"),
]


@pytest.mark.parametrize(
    ("path", "value", "says"), MISTAKES, ids=[f"{path}={str(value)[:20]}" for path, value, _ in MISTAKES]
)
def test_a_mistake_is_named_by_its_path(path: str, value: Any, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(config_with(path, value))
    message = str(caught.value)
    assert path in message
    assert says in message
    assert "\n" not in message, "one mistake is one line"


NOT_YET = [
    ("training_args.use_liger_kernel", True, "training_args.use_liger_kernel"),
    ("training_args.label_smoothing_factor", 0.1, "training_args.label_smoothing_factor"),
    ("training_args.torch_compile", True, "training_args.torch_compile"),
]


@pytest.mark.parametrize(
    ("path", "value", "named"), NOT_YET, ids=[f"{path}-{i}" for i, (path, *_) in enumerate(NOT_YET)]
)
def test_what_comes_later_is_refused_by_name(path: str, value: Any, named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(config_with(path, value))
    assert f"{named}: not supported yet" in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"function": "klx", "weight": 1}, "loss_functions.0.function: must be"),
        ({"function": "kl"}, "loss_functions.0.weight: is required and missing"),
        ({"function": "kl", "weight": -1}, "loss_functions.0.weight"),
        ({"function": "kl", "weight": 0}, "all weights are 0"),
        ({"function": "kl", "weight": 1, "temperature": 0}, "loss_functions.0.temperature"),
        (
            {"function": "kl", "weight": 1, "tempreature": 2},
            "loss_functions.0.tempreature: unknown key; did you mean 'temperature'",
        ),
        ({"function": "kl", "weight": 1, "margin": 1.0}, "loss_functions.0.margin: 1.0 has no meaning for kl"),
        (
            {"function": "kl", "weight": 1, "missing_probability_handling": "none"},
            "loss_functions.0.missing_probability_handling: must be 'zero', 'uniform' or 'label', found 'none'",
        ),
        (
            {"function": "cross_entropy", "weight": 1, "temperature": 2},
            "loss_functions.0.temperature: 2.0 has no meaning",
        ),
    ],
)
def test_a_loss_takes_only_what_it_means(entry: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "loss_functions": [entry]})
    assert says in str(caught.value)


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
    assert first == f"{path}: 4 problems"
    assert {line.split(":")[0].strip() for line in problems} == {
        "modle",
        "sequence_length",
        "training_args.learnin_rate",
        "training_args.padding_free",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "found nothing"),
        ("- a\n- b\n", "found list"),
        ("model: [unclosed\n", "not valid YAML"),
        ("model: a\nmodel: b\n", "'model' is given twice, first on line 1"),
        ("dataset: {seed: 1, seed: 2}\n", "'seed' is given twice"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(written(tmp_path, text))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "none.yaml")


def test_a_yaml_anchor_may_be_merged(tmp_path: Path) -> None:
    text = yaml.safe_dump(MINIMAL) + "training_args: {<<: {max_steps: 5}, seed: 1}\n"
    assert load_config(written(tmp_path, text)).training_args == {"max_steps": 5, "seed": 1}


def test_the_argument_combinations_of_transformers_are_one_clear_message() -> None:
    config = parse_config(config_with("training_args.dataloader_prefetch_factor", 2))
    with pytest.raises(ConfigError, match=r"training_args: .*dataloader_prefetch_factor"):
        training_arguments(config)


def test_a_reporter_that_is_not_there() -> None:
    config = parse_config(config_with("training_args.report_to", "clearml"))
    with pytest.raises(ConfigError, match=r"training_args.report_to: 'clearml' is not installed"):
        training_arguments(config)


def test_bf16_on_a_cpu_may_be_asked_for() -> None:
    assert training_arguments(parse_config(config_with("training_args.bf16", True))).bf16 is True


def test_the_configuration_is_frozen() -> None:
    config = parse_config(MINIMAL)
    assert isinstance(config, RunConfig)
    with pytest.raises(ValueError, match="frozen"):
        config.model = "other"  # type: ignore[misc]

"""The training configuration: the published one is understood, and what is wrong is named by its path."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import errno
import importlib.metadata
import math
import os
import re
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import httpx
import pytest
import transformers
import yaml
from click.testing import CliRunner
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core._pydantic_core import list_all_errors
from trl import SFTConfig

from distillkit.capture.settings import CaptureSettings
from distillkit.capture.settings_file import load_captures
from distillkit.cli.main import cli
from distillkit.codec import Codec, DistributionQuantizationConfig, LegacyLogitCompressionConfig
from distillkit.configuration.overrides import parse_overrides, with_overrides
from distillkit.configuration.places import folder_name, missing_place
from distillkit.configuration.problems import shown
from distillkit.configuration.secrets import redacted, secret_paths, without_secrets
from distillkit.errors import ConfigError, DistillKitError
from distillkit.models.weights import damaged_file
from distillkit.text.tokenizer import load_tokenizer
from distillkit.training.config.argument_rules import argument_problems, converted, evaluation_metrics
from distillkit.training.config.argument_table import ARGUMENTS as TABLE
from distillkit.training.config.argument_table import ROWS
from distillkit.training.config.arguments import recomputing, training_arguments
from distillkit.training.config.file import load_config, parse_config
from distillkit.training.config.schema import (
    AUTO_CLASSES,
    ListedLiveTeacherConfig,
    LiveTeacherConfig,
    RunConfig,
    StoredTeacherConfig,
)
from distillkit.training.config.surroundings import check_surroundings
from distillkit.training.run import Run
from support.refusals import check_names, refused
from support.training import run_config, save_student

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


LIVE = {"kind": "hf", "path": "x"}
SERVED = {"kind": "server", "base_url": "http://localhost:1", "model": "x", "top_k": 1}

MISSING = object()


def config_with(path: str, value: Any) -> dict[str, Any]:
    """The minimal configuration with one more setting, by its dotted path, or one less."""
    content = copy.deepcopy(MINIMAL)
    *parents, last = path.split(".")
    section: Any = content
    if parents and parents[0] == "loss_functions":
        section["loss_functions"] = [{"function": "kl", "weight": 1}]
    if parents and parents[0] == "teachers":
        del section["teacher"]
        section["teachers"] = [dict(LIVE if last in ListedLiveTeacherConfig.model_fields else SERVED)]
    if parents and parents[0] == "rollouts":
        section["rollouts"] = {"prompts": {"disk_path": "prompts"}}
    if "0" in parents and parents[0] == "dataset":
        section["dataset"][parents[1]] = [{"disk_path": "data"}]
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
    assert (codec.k, codec.d) == (128, 151936)  # type: ignore[union-attr]
    arguments = training_arguments(config)
    assert arguments.learning_rate == 2e-6, "YAML reads 2e-6 as a string"
    assert arguments.save_strategy == "no", "YAML reads an unquoted no as false"
    assert arguments.warmup_steps == 0.1
    assert arguments.bf16 is True, "on a CPU, if it is asked for"
    assert recomputing(arguments) == (True, {"use_reentrant": False})
    assert (arguments.output_dir, arguments.max_length) == ("./output", 8192)


def test_defaults_run_on_a_cpu_and_are_the_published_ones_but_for_the_loss() -> None:
    config = parse_config(MINIMAL)
    assert [(loss.function, loss.weight) for loss in config.loss_functions] == [("cross_entropy", 0.1), ("kl", 0.9)]
    assert config.loss_functions[1].missing_probability_handling == "uniform"
    assert (config.project_name, config.dataset.seed, config.use_flash_attention) == ("distillkit", 42, None)
    arguments = training_arguments(config)
    assert (arguments.use_cpu, arguments.bf16, arguments.dataloader_pin_memory) == (True, False, False)
    assert arguments.dataloader_num_workers == 0, "beside an accelerator there are some"
    assert (arguments.data_seed, recomputing(arguments)[0], arguments.learning_rate) == (42, True, 2e-5)


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
    ("dataset.train_dataset.disk_path", "", ["1", "''"]),
    ("loss_functions", [{"function": "kl", "weight": 1e308}] * 2, ["weights"]),
    ("loss_functions.0.temperature", 1e300, ["1000", "1e+300"]),
    ("peft.rank_pattern", {"q_proj": 0}, ["q_proj", "1", "0"]),
    ("peft.trainable_token_indices", [-1], ["0", "-1"]),
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
    ("gradient_checkpointing_kwargs", {"use_reentrent": False}, ["'use_reentrent'", "'use_reentrant'"]),
    ("activation_checkpointing_kwargs", {"use_reentrant": "no"}, ["use_reentrant", "'no'"]),
    ("activation_checkpointing_kwargs", {"every_n_layers": 0}, ["every_n_layers", "1", "0"]),
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
    ("packing_strategy", "bfd_split", ["'bfd_split'", "'bfd'", "dataset.overflow"]),
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


@pytest.mark.parametrize("teacher", [{"teacher": LIVE}, {"teacher": SERVED}, {"teacher": None, "teachers": [SERVED]}])
def test_live_and_served_teachers_take_what_prepares_text(teacher: dict[str, Any]) -> None:
    arguments = {
        "assistant_only_loss": True,
        "completion_only_loss": False,
        "chat_template_path": "chat.jinja",
        "dataset_text_field": "content",
        "dataset_num_proc": 96,
        "packing": True,
        "packing_strategy": "bfd",
    }
    assert argument_problems({**MINIMAL, **teacher, "training_args": arguments}) == []


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


@pytest.mark.parametrize("extra", [{"x" * 100_000: 1}, {f"k{number}": 1 for number in range(5000)}])
def test_problems_fit_on_a_screen(extra: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path, yaml.safe_dump({**MINIMAL, **extra}))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    check_names(message, str(path), *([] if len(extra) == 1 else ["5,000", "k0", "4,950"]))
    assert len(message) < 4000


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


def test_how_workers_are_kept_says_nothing_where_there_are_none() -> None:
    content = config_with("training_args.dataloader_persistent_workers", True)
    content["training_args"]["dataloader_multiprocessing_context"] = "spawn"
    arguments = training_arguments(parse_config(content))
    found = (arguments.dataloader_persistent_workers, arguments.dataloader_multiprocessing_context)
    assert found == (False, None), "torch refuses them without workers"


def test_the_argument_combinations_of_transformers_are_one_clear_message() -> None:
    config = parse_config(config_with("training_args.dataloader_prefetch_factor", 2))
    with refused(ConfigError, "training_args", "dataloader_prefetch_factor"):
        training_arguments(config)


# -- wrong values of every setting -------------------------------------------------------------------------------------

WRONG: tuple[Any, ...] = (
    *(None, "text", "", "1k", "x" * 5000, "\udc80", -1, 0, 1, 1.5, 10**400, True, math.nan, math.inf),
    *([], {}, [1], ["a", 1], [[]], [None], {"a": 1}, {1: 2}, datetime.date(2020, 1, 1), b"x", {"a"}),
)
# Beginnings of pydantic's own messages: "Input should be", "Field required", "Extra inputs are not permitted", …
PHRASES = {error["message_template_python"].split("{")[0].strip() for error in list_all_errors()}
PHRASES = {phrase for phrase in PHRASES if len(phrase) >= 12} | {"instance of", "after validation", "unable to parse"}


def settings_in(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """The dotted paths of all settings; of lists of sections, the first."""
    for name, field in model.model_fields.items():
        yield f"{path}{name}"
        pending, inner = [field.annotation], f"{path}{name}."
        while pending:
            annotation = pending.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from settings_in(annotation, inner)
            if get_origin(annotation) is list:
                inner += "0."
            pending += get_args(annotation)


def checks() -> Iterator[tuple[str, Callable[[Any], object]]]:
    """Every setting of training, capture and codecs, and what checks a value of it."""
    for path in [*settings_in(RunConfig), *(f"training_args.{name}" for name in TABLE)]:
        for teacher in ({"kind": "dataset"}, {"kind": "hf", "path": "x"}) if path.startswith("teacher.") else (None,):

            def check(value: Any, path: str = path, teacher: Any = teacher) -> object:
                content = config_with(path, value)
                if teacher is not None and path != "teacher.kind":
                    content["teacher"] = {**teacher, path.removeprefix("teacher."): value}
                return parse_config(content)

            yield path, check
    given = {"model": "m", "dataset": "d", "output": "o"}
    for path in settings_in(CaptureSettings):
        section, _, name = path.rpartition(".")
        if section:
            yield path, lambda v, s=section, n=name: CaptureSettings(**given, engine=s, **{s: {n: v}})  # type: ignore[misc]
        else:
            yield path, lambda v, n=name: CaptureSettings(**{**given, n: v})  # type: ignore[misc]
    bins = {"scale_dtype": "float32", "element_bits": 4, "num_elements": 2}
    quantized = {"d": 100, "k": 8, "exact_k": 4, "polynomial_terms": [0, 1], "residual_bins": [bins]}
    for name in DistributionQuantizationConfig.model_fields:
        yield name, lambda v, n=name: DistributionQuantizationConfig(**{**quantized, n: v})  # type: ignore[misc]
    for name in bins:
        yield name, lambda v, n=name: Codec({**quantized, "residual_bins": [{**bins, n: v}]})  # type: ignore[misc]
    legacy = {"vocab_size": 100, "k": 8, "exact_k": 2, "polynomial_degree": 2}
    for name in LegacyLogitCompressionConfig.model_fields:
        yield name, lambda v, n=name: LegacyLogitCompressionConfig(**{**legacy, n: v})  # type: ignore[misc]


def refusal_of(check: Callable[[Any], object], value: Any) -> str | None:
    try:
        check(value)
    except ConfigError as error:
        return str(error)
    return None


def test_wrong_values_of_every_setting_are_refused_in_our_own_words() -> None:
    refusals = 0
    for path, check in checks():
        for value in WRONG:
            message = refusal_of(check, value)
            if message is not None:
                refusals += 1
                assert [phrase for phrase in PHRASES if phrase in message] == [], (path, message)
                assert len(message) < 2500, path
                assert path.split(".")[0] in message, (path, message)
    assert refusals > 4000
    assert len(shown(10**6000)) < 200


def test_true_and_false_are_no_numbers() -> None:
    """pydantic takes true as 1, so that `num_samples: true` would train on one document."""
    numeric = [path for path in settings_in(RunConfig) if kinds(setting(path).annotation) & {int, float}]
    plain = [path for path in numeric if not kinds(setting(path).annotation) & {bool, list, dict, tuple}]
    assert {"sequence_length", "dataset.num_samples", "teacher.top_k", "peft.r", "loss_functions.0.weight"} <= {*plain}
    for path in plain:
        content = config_with(path, True)
        name = path.removeprefix("teacher.")
        if path != name and name not in StoredTeacherConfig.model_fields:
            content["teacher"] = {**(LIVE if name in LiveTeacherConfig.model_fields else SERVED), name: True}
        if path.startswith("rollouts.server."):
            content["rollouts"]["server"]["base_url"] = "http://localhost:1"
        with refused(ConfigError, f"config: {path}", "True"):
            parse_config(content)


def setting(path: str) -> FieldInfo:
    """The field of a setting."""
    models: list[Any] = [RunConfig]
    for name in path.split("."):
        if name.isdigit():
            continue
        field = next(model.model_fields[name] for model in models if name in model.model_fields)
        models, pending = [], [field.annotation]
        while pending:
            annotation = pending.pop()
            models += [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
            pending += get_args(annotation)
    return field


NUMBERS: list[tuple[str, tuple[Any, ...]]] = [
    *((name, (0, -4, 1.5, math.nan, True, "none")) for name in ROWS),
    *((name, (0, -4, 1.5)) for name in ("per_device_eval_batch_size", "dataset_num_proc", "ddp_timeout")),
    *((name, (-1, -1e-9, math.nan, math.inf, "fast", None)) for name in ("learning_rate", "weight_decay")),
    *((name, (-0.1, math.nan, math.inf)) for name in ("max_grad_norm", "eval_delay", "neftune_noise_alpha")),
    *((name, (-0.1, 1, 1.5, math.nan)) for name in ("adam_beta1", "adam_beta2", "warmup_ratio")),
    *((name, (0, -1, 1.5, math.nan, math.inf)) for name in ("save_steps", "eval_steps", "logging_steps")),
    ("warmup_steps", (-1, 1.5, math.nan, math.inf)),
    ("adam_epsilon", (0, -1e-8, math.nan)),
    ("num_train_epochs", (0, -1, math.nan, math.inf)),
    ("max_steps", (0, -2, 1.5)),
    ("save_total_limit", (0, -1, 1.5)),
    ("seed", (-1, 2**32, 1.5)),
    ("data_seed", (-1, 1.5)),
    ("dataloader_num_workers", (-1, 1.5)),
    ("dataloader_prefetch_factor", (0, -1)),
]


def test_numbers_beyond_their_limits_are_refused_when_read() -> None:
    tried = set()
    for name, values in NUMBERS:
        tried.add(name)
        for value in values:
            with refused(ConfigError, f"config: training_args.{name}"):
                parse_config(config_with(f"training_args.{name}", value))
    numeric = {name for name in TABLE if {int, float} & kinds(TABLE[name])}
    ignored = {"label_smoothing_factor", "local_rank", "max_length", "pad_to_multiple_of", "router_aux_loss_coef"}
    ignored |= {"ddp_bucket_cap_mb", "eval_accumulation_steps", "torch_empty_cache_steps"}
    assert numeric - ignored <= tried | {"warmup_steps"}, "every number has its limits tried"


def kinds(annotation: Any) -> set[type]:
    """The plain types in an annotation."""
    if isinstance(annotation, type) and not get_args(annotation):
        return {annotation}
    inner = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    if get_origin(annotation) is Literal:
        return {type(value) for value in inner}
    return set().union(*(kinds(part) for part in inner), {get_origin(annotation)} & {list, dict})


def test_the_table_has_the_types_of_the_installed_trl() -> None:
    """Of names that are chosen from, all; of other arguments, the plain types."""
    hints = typing.get_type_hints(SFTConfig)
    # Wider than declared, since both are used; or refused whatever it is.
    wider = {"fsdp": {bool}, "resume_from_checkpoint": {bool}, "pad_to_multiple_of": set(), "parallelism_config": None}
    for field in dataclasses.fields(SFTConfig):
        if not field.init or wider.get(field.name, set()) is None:
            continue
        expected, found = hints[field.name], kinds(TABLE[field.name])
        members = [kind for kind in kinds(expected) if issubclass(kind, Enum)]
        if members and get_origin(expected) is not list and field.name != "debug":
            names = {member.value for member in members[0]}
            assert {value for value in literals(TABLE[field.name]) if isinstance(value, str)} == names, field.name
            assert {converted(field.name, name) for name in names} == names
            continue
        plain = {kind for kind in kinds(expected) if not issubclass(kind, Enum)}
        assert found - {Any} == (plain | (wider.get(field.name) or set())) - {Any}, field.name


def literals(annotation: Any) -> set[Any]:
    """The values of the literals in an annotation."""
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    return set().union(*(literals(part) for part in get_args(annotation))) if get_args(annotation) else set()


def test_the_classes_of_models_are_those_of_transformers() -> None:
    assert all(hasattr(transformers, name) for name in AUTO_CLASSES)


def test_metrics_of_the_best_student_are_those_that_are_measured(parts: dict[str, str], tmp_path: Path) -> None:
    losses = [{"function": name, "weight": 1} for name in ("kl", "jsd", "kl")]
    arguments = {"eval_on_start": True, "max_steps": 1, "metric_for_best_model": "jsd"}
    config = run_config(
        parts["student"],
        tmp_path,
        parts["train"],
        parts["eval"],
        loss_functions=losses,
        training_args=arguments,
    )
    measured = Run(config).trainer.evaluate()
    known = evaluation_metrics({"loss_functions": losses})
    assert {f"eval_{name}" for name in known} == {name for name in measured if name.startswith("eval_")}
    assert training_arguments(config).greater_is_better is False
    for name in known:
        parse_config(config_with_losses(losses, name))
    with refused(ConfigError, "training_args.metric_for_best_model", "'accuracy'", "'top1_agreement'", "'kl@2'"):
        parse_config(config_with_losses(losses, "accuracy"))
    with refused(ConfigError, "training_args.metric_for_best_model", "'eval_top1_agrement'", "'top1_agreement'"):
        parse_config(config_with_losses(losses, "eval_top1_agrement"))


def config_with_losses(losses: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    content = config_with("training_args.metric_for_best_model", metric)
    return {**content, "loss_functions": losses}


IMPORTED = """
import sys
from distillkit.cli.main import cli
try:
    cli(sys.argv[1:], standalone_mode=False)
except Exception as error:
    print(error)
heavy = {"torch", "transformers", "trl", "datasets", "accelerate", "peft"} & set(sys.modules)
print("imported:", *sorted(heavy))
"""


def test_a_wrong_key_or_path_is_told_before_anything_large_is_imported(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    for options, name, value, facts in (
        ([], "training_args.learnin_rate", 1, ["training_args.learnin_rate", "'learning_rate'"]),
        ([], "model", "./studnet", ["model", "./studnet"]),
        (["--dry-run"], "model_auto_class", "AutoModelForCausal", ["model_auto_class"]),
        (["--dry-run"], "model", "./studnet", ["model", "./studnet"]),
    ):
        path.write_text(yaml.safe_dump(config_with(name, value)))
        result = subprocess.run(
            [sys.executable, "-c", IMPORTED, str(path), *options],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={**os.environ, "COLUMNS": "300"},
        )
        check_names(result.stdout, *facts)
        assert result.stdout.splitlines()[-1] == "imported:"


def test_all_that_is_not_there_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "captured").mkdir()
    (tmp_path / "file").touch()
    content = {
        "model": "./studnet",
        "output_path": "file/out",
        "sequence_length": 64,
        "dataset": {"train_dataset": {"disk_path": "capturd"}, "eval_dataset": {"repo_id": "./captured"}},
        "teacher": {"kind": "hf", "path": "runs/no/teacher"},
        "training_args": {"deepspeed": "zero.json", "eval_strategy": "steps"},
    }
    for place in ("s3://bucket/out", "hf://a/b"):
        with refused(ConfigError, "output_path", place):
            check_surroundings(parse_config({**MINIMAL, "output_path": place}))
    facts = ["./studnet", "'./student'", "file", "capturd", "'captured'", "runs/no/teacher", "zero.json"]
    paths = ["model", "output_path", "dataset.train_dataset.disk_path", "dataset.eval_dataset.repo_id", "teacher.path"]
    with refused(ConfigError, "6", *facts, *paths, "training_args.deepspeed", os.strerror(errno.ENOENT)):
        check_surroundings(parse_config(content))


def test_a_damaged_file_of_weights_is_named(tmp_path: Path) -> None:
    save_student(tmp_path / "student")
    file = tmp_path / "student" / "model.safetensors"
    whole = file.read_bytes()
    assert damaged_file(str(tmp_path / "student")) is None
    assert damaged_file("Qwen/Qwen3-0.6B") is None
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"
    for content in (b"", whole[:5], whole[:100], whole[:-1], whole + b"x", pointer, b"\xff" * 200, b"\0" * 100):
        file.write_bytes(content)
        config = parse_config({**MINIMAL, "model": str(tmp_path / "student")})
        with refused(ConfigError, "model", str(file)):
            check_surroundings(config)
    file.write_bytes(whole)
    index = tmp_path / "student" / "model.safetensors.index.json"
    for text, fact in (('{"weight_map": {"a": "other.safetensors"}}', "other.safetensors"), ("{", index.name)):
        index.write_text(text)
        check_names(str(damaged_file(str(tmp_path / "student"))), str(index.parent / fact))
    index.unlink()
    (tmp_path / "student" / "tokenizer.json").write_text('{"model": 3}')
    with refused(ConfigError, str(tmp_path / "student")):
        load_tokenizer(str(tmp_path / "student"))


def test_pushing_needs_the_hub_and_a_token(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"push_to_hub": True}
    config = run_config(parts["student"], tmp_path, parts["train"], training_args=arguments)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with refused(ConfigError, "training_args.push_to_hub", "HF_HUB_OFFLINE"):
        check_surroundings(config)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with refused(ConfigError, "training_args.push_to_hub", "HF_TOKEN"):
        check_surroundings(config)
    check_surroundings(
        run_config(parts["student"], tmp_path, parts["train"], training_args={**arguments, "hub_token": "x"})
    )


def test_a_hub_that_cannot_be_reached_is_one_message(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise httpx.ConnectError("Name or service not known\nfor https://me:s3cret@host")

    monkeypatch.setattr(transformers.Trainer, "init_hf_repo", unreachable)
    config = run_config(parts["student"], tmp_path, parts["train"], training_args={"push_to_hub": True})
    with pytest.raises(DistillKitError) as caught:
        Run(config).trainer  # noqa: B018
    assert "\n" not in str(caught.value)
    check_names(str(caught.value), "training_args.push_to_hub", "Name or service not known")


def test_packages_that_are_too_old_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    lowest = ['transformers>=5.23; extra == "train"', 'torch>=2.7; extra == "train"', 'ray>=99; extra == "ray"']
    versions = {"transformers": "5.22.2", "torch": "2.7.0", "accelerate": "1"}
    monkeypatch.setattr("importlib.metadata.requires", lambda name: lowest)

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr("importlib.metadata.version", version)
    config = parse_config({**MINIMAL, "model": "a/b", "dataset": {"train_dataset": {"repo_id": "a/b"}}})
    with refused(ConfigError, "transformers", "5.23", "5.22.2", "trl", "distillkit[train]"):
        check_surroundings(config)


# -- secrets and places ------------------------------------------------------------------------------------------------

SECRETS = (
    ("https://me:s3cret@example.com/data", "https://me:***@example.com/data"),
    ("s3://key:p@ss@bucket/x, then hdfs://u:s3cret@h", "s3://key:***@bucket/x, then hdfs://u:***@h"),
    ("https://s3cret@example.com/x", "https://***@example.com/x"),
    ("ssh:/me:s3cret@h/x: no such folder; https:/s3cret@h", "ssh:/me:***@h/x: no such folder; https:/***@h"),
    ("https://h/x?X-Amz-Signature=s3cret&split=a&sig=s3cret", "https://h/x?X-Amz-Signature=***&split=a&sig=***"),
    ("with {'token': 's3cret', 'eos_token': '</s>'}", "with {'token': '***', 'eos_token': '</s>'}"),
    ('{"api_key": "s3cret"}', '{"api_key": "***"}'),
    ("Authorization: Bearer s3cret-s3cret", "Authorization: ***"),
    ("hf_s3crets3crets3cret", "***"),
    ("no token: log in with name@example.com at https://example.com/a?b=c", None),
    ("s3://bucket/a@b?version=3; git@github.com:a/b", None),
)


def test_secrets_are_redacted_and_nothing_else() -> None:
    for text, expected in SECRETS:
        assert redacted(text) == (text if expected is None else expected)
    settings = {
        "model_kwargs": {"token": "s3cret", "dtype": "auto", "headers": [{"x_api_key": 1234}]},
        "training_args": {"hub_token": "s3cret", "eos_token": "</s>", "num_tokens": 3, "keep": True},
        "token": True,
        "path": "https://me:s3cret@host/x",
    }
    assert without_secrets(settings) == {
        "model_kwargs": {"dtype": "auto", "headers": [{}]},
        "training_args": {"eos_token": "</s>", "num_tokens": 3, "keep": True},
        "token": True,
        "path": "https://me:***@host/x",
    }
    assert secret_paths(settings) == ["model_kwargs.token", "training_args.hub_token"]


def test_a_path_is_told_from_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "student").mkdir()
    (tmp_path / "file.txt").touch()
    for name in ("gpt2", "Qwen/Qwen3-0.6B", "student", "./student/", str(tmp_path / "student")):
        assert missing_place(name) is None, name
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_config({**MINIMAL, "model": "~/student", "output_path": "~/out"})
    assert (config.model, config.output_path) == (str(tmp_path / "student"), str(tmp_path / "out"))
    for name in ("./studnet", "studnet/", "runs/a/b", "~/no-such-folder", "a b", "x" * 500, "a\0b", ".hidden", "a--b"):
        message = missing_place(name)
        assert message is not None
        assert repr(name) in message
    check_names(str(missing_place("./studnet")), "'./student'")
    check_names(str(missing_place(str(tmp_path / "studnet"))), f"'{tmp_path / 'student'}'")
    assert missing_place("file.txt") is not None, "a model is a folder"
    assert missing_place("file.txt", "file or folder") is None


# -- overrides ---------------------------------------------------------------------------------------------------------

FILE: dict[str, Any] = {
    "model": "./student",
    "output_path": "./trained",
    "sequence_length": 64,
    "dataset": {"train_dataset": {"disk_path": "./captured"}},
    "teacher": {"kind": "dataset"},
    "loss_functions": [{"function": "cross_entropy", "weight": 0.1}, {"function": "kl", "weight": 0.9}],
}


def test_values_on_the_command_line_replace_those_of_the_file() -> None:
    texts = [
        *("training_args.learning_rate=1e-4", "training_args.max_steps=3", "training_args.max_steps=7"),
        *("loss_functions.1.weight=0.5", "loss_functions.2={function: jsd, weight: 1}", "model=a=b"),
        *("frozen_res=[embed, 'norm$']", "dataset.num_samples="),
    ]
    config = parse_config(copy.deepcopy(FILE), source="f.yaml", overrides=parse_overrides(texts))
    assert [(loss.function, loss.weight) for loss in config.loss_functions] == [
        ("cross_entropy", 0.1),
        ("kl", 0.5),
        ("jsd", 1.0),
    ]
    assert training_arguments(config).learning_rate == 1e-4
    assert (config.training_args["max_steps"], config.model) == (7, "a=b")
    assert (config.frozen_res, config.dataset.num_samples) == (["embed", "norm$"], None)
    assert config.overrides["loss_functions.1.weight"] == 0.5


def test_a_folder_has_the_name_that_it_is_called_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "SmolLM2").mkdir(parents=True)
    (tmp_path / "teacher").symlink_to(tmp_path / "models" / "SmolLM2")
    monkeypatch.chdir(tmp_path / "models" / "SmolLM2")
    names = (str(tmp_path / "teacher"), ".", "../SmolLM2/", "..", "org/model")
    assert [folder_name(name) for name in names] == ["teacher", "SmolLM2", "SmolLM2", "models", "org/model"]


def test_an_override_changes_one_of_the_places_of_an_alias() -> None:
    content = yaml.safe_load("{a: &same {x: 1}, b: *same, list: [*same, *same]}")
    changed = with_overrides(content, {"b.x": 2, "list.1.x": 3})
    assert changed == {"a": {"x": 1}, "b": {"x": 2}, "list": [{"x": 1}, {"x": 3}]}
    assert content == {"a": {"x": 1}, "b": {"x": 1}, "list": [{"x": 1}, {"x": 1}]}


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ("training_args.learnin_rate=1", ["training_args.learnin_rate", "'learning_rate'"]),
        ("trainng_args.max_steps=1", ["trainng_args", "'training_args'"]),
        ("dataset.train_datset.split=x", ["dataset.train_datset", "'train_dataset'"]),
        ("loss_functions.1.wieght=1", ["loss_functions.1.wieght", "'weight'"]),
        ("loss_functions.kl.weight=1", ["loss_functions.kl", "1", "kl"]),
        ("loss_functions.3.weight=1", ["loss_functions.3", "2"]),
        ("frozen_res.0=x", ["frozen_res", "frozen_res.0"]),
        ("model.x=1", ["model", "./student", "'x'"]),
        ("training_args.max_steps=many", ["training_args.max_steps", "many"]),
        ("training_args.max_steps", ["training_args.max_steps", "KEY=VALUE"]),
        ("a..b=1", ["a..b=1"]),
        ("=1", ["=1"]),
        ("frozen_res=[a", ["frozen_res"]),
    ],
)
def test_a_wrong_override_is_named_with_the_nearest_key(text: str, facts: list[str]) -> None:
    with refused(ConfigError, *facts):
        parse_config(copy.deepcopy(FILE), source="f.yaml", overrides=parse_overrides([text]))


def test_captures_take_overrides_too(tmp_path: Path) -> None:
    file = tmp_path / "captures.yaml"
    file.write_text("model: a\ndataset: b\nmax_seq_len: 64\ncaptures: [{output: c}, {output: d}]")
    changes = parse_overrides(["captures.1.max_seq_len=32", "samples=5", "vllm.tensor_parallel_size=2", "engine=vllm"])
    found = load_captures(file, {"samples": 6}, changes)
    assert [(each.output, each.max_seq_len, each.samples) for each in found] == [("c", 64, 6), ("d", 32, 6)]
    assert found[0].vllm.tensor_parallel_size == 2
    with refused(ConfigError, "captures.0.max_seq_length", "'max_seq_len'"):
        load_captures(file, {}, {"captures.0.max_seq_length": 3})
    result = CliRunner().invoke(cli, ["capture", "--set", "samples=5", "--model", "a"])
    assert result.exit_code == 2
    check_names(result.output, "--set")

"""Settings are described once: models, files, options, help, schema and docs/settings.md say the same."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from distillkit.capture import CaptureSettings
from distillkit.capture.engine_settings import ENGINES, engines_with
from distillkit.capture.settings_file import load_captures
from distillkit.cli import capture as capture_cli
from distillkit.cli.capture import capture as capture_command
from distillkit.cli.compat.sample_logits_vllm import main as published_command
from distillkit.cli.convert import convert as convert_command
from distillkit.cli.forecast import forecast as forecast_command
from distillkit.cli.main import cli
from distillkit.cli.schema import SCHEMAS, settings_page
from distillkit.codec import PRESETS
from distillkit.codec.presets import FORMER_PRESETS, PresetName
from distillkit.errors import ConfigError
from distillkit.training.config.file import parse_config
from distillkit.training.config.schema import RunConfig
from support.refusals import check_names

ROOT = Path(__file__).parent.parent
GIVEN = {"model": "m", "dataset": "d", "output": "o"}
# One value other than the default of each setting that only some engines have.
OF_ENGINES: dict[str, dict[str, Any]] = {
    "hf": {"dtype": "float16", "batch_tokens": 7, "device": "cpu", "head_dtype": "auto", "head_rows": 7},
    "vllm": {
        **{"dtype": "float16", "batch_tokens": 7, "max_model_len": 7, "tensor_parallel_size": 2},
        **{"pipeline_parallel_size": 2, "enable_expert_parallel": True, "quantization": "fp8"},
        "gpu_memory_utilization": 0.5,
    },
    "openai": {
        **{"base_url": "http://host/v1", "served_model": "s", "concurrency": 2, "max_retries": 2},
        "request_timeout": 2.0,
    },
}


def problems(**options: Any) -> dict[str, str]:
    """What is wrong with settings: messages by dotted path."""
    with pytest.raises(ConfigError) as caught:
        CaptureSettings(**{**GIVEN, **options})
    lines = str(caught.value).splitlines()
    return dict(line.strip().split(": ", 1) for line in (lines[1:] if len(lines) > 1 else lines))


def models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A model and all within it."""
    yield model
    pending = [field.annotation for field in model.model_fields.values()]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from models(annotation)
        pending += get_args(annotation)


# -- problems ----------------------------------------------------------------------------------------------------------


def test_all_problems_come_at_once_each_by_its_path() -> None:
    found = problems(
        **{"engine": "openai", "dtype": "float16", "samples": 0, "seed": "3", "where": "x", "keep_ids": 3},
        **{"min_tokens": 5, "max_tokens": 3, "max_seq_len": 64, "overlap": 33, "tensr_parallel_size": 4, "vllm": 3},
        **{"keep_columns": ["a", 3], "shard_range": "1", "shuffle": 1, "overflow": "windows", "preset": "compct-50"},
    )
    assert found.keys() == {
        *("dtype", "samples", "seed", "where", "keep_ids", "max_tokens", "overlap", "tensr_parallel_size", "vllm"),
        *("keep_columns.1", "shard_range", "shuffle", "overflow", "preset", "openai.base_url"),
    }
    for path, says in {
        "samples": "at least 1, found 0",
        "overlap": "between 1 and 32",
        "max_tokens": "min_tokens, which is 5, found 3",
        "overflow": "found 'windows'; did you mean 'window'?",
        "preset": "found 'compct-50'; did you mean 'compact-50'?",
        "tensr_parallel_size": "unknown capture setting; did you mean 'tensor_parallel_size'?",
        "dtype": "is for engine hf or vllm, but this capture uses openai (found 'float16')",
    }.items():
        assert says in found[path], path


@pytest.mark.parametrize(
    ("options", "path", "says"),
    [
        ({"preset": "budget", "compression_config": "a.yaml"}, "compression_config", "not both"),
        ({"compression_config": 3}, "compression_config", "found 3"),
        (
            {"compression_config": {"d": 9, "k": 2, "exact_k": 8, "residual_bins": []}},
            "compression_config.exact_k",
            "8",
        ),
        ({"overlap": 3, "overflow": "skip"}, "overlap", "overflow is skip"),
        ({"engine": "vllm", "vllm": {"tensr_parallel_size": 2}}, "vllm.tensr_parallel_size", "'tensor_parallel_size'"),
        ({"engine": "vllm", "vllm": {"head_rows": 2}}, "vllm.head_rows", "unknown capture setting"),
        ({"vllm": {"quantization": "fp8"}}, "vllm.quantization", "this capture uses hf"),
        ({"hf": {"head_rows": 0}}, "hf.head_rows", "at least 1, found 0"),
        ({"head_rows": True}, "head_rows", "a whole number, found True"),
        ({"engine": "vllm", "gpu_memory_utilization": 1}, "gpu_memory_utilization", "less than 1, found 1"),
        ({"model": None}, "model", "text, found None"),
    ],
)
def test_a_problem_is_named_as_it_was_written(options: dict[str, Any], path: str, says: str) -> None:
    found = problems(**options)
    assert list(found) == [path]
    assert says in found[path]


# -- two spellings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", OF_ENGINES)
def test_flat_and_nested_are_the_same(engine: str) -> None:
    values = OF_ENGINES[engine]
    assert values.keys() == ENGINES[engine].model_fields.keys()
    flat = CaptureSettings(**GIVEN, engine=engine, **values)
    assert flat == CaptureSettings(**GIVEN, engine=engine, **{engine: values})
    assert getattr(flat, engine).model_dump() == values
    assert pickle.loads(pickle.dumps(flat)) == flat, "as Ray sends it"
    other = {name: value for name, value in values.items() if "hf" not in engines_with(name)}
    if engine != "hf":
        assert problems(**other).keys() == other.keys(), "another engine refuses all of them"


def test_a_setting_given_in_both_ways() -> None:
    both = {"tensor_parallel_size": 2, "vllm": {"tensor_parallel_size": 4}}
    assert problems(engine="vllm", **both).keys() == {"tensor_parallel_size"}


FILE = """
dataset: d
engine: vllm
dtype: float16
vllm: {tensor_parallel_size: 4, quantization: fp8}
captures:
- {model: a, output: a}
- {model: b, output: b, tensor_parallel_size: 2, vllm: {batch_tokens: 9}}
- {model: c, output: c, vllm: {tensor_parallel_size: 8}}
"""


def loaded(tmp_path: Path, content: str, **overrides: Any) -> list[CaptureSettings]:
    path = tmp_path / "captures.yaml"
    path.write_text(content)
    return load_captures(path, overrides)


def test_files_may_mix_spellings(tmp_path: Path) -> None:
    found = [settings.vllm for settings in loaded(tmp_path, FILE)]
    assert [part.tensor_parallel_size for part in found] == [4, 2, 8]
    assert [(part.quantization, part.dtype) for part in found] == [("fp8", "float16")] * 3
    assert [part.batch_tokens for part in found] == [None, 9, None]
    assert {settings.vllm.tensor_parallel_size for settings in loaded(tmp_path, FILE, tensor_parallel_size=3)} == {3}
    (one,) = loaded(tmp_path, "{model: a, dataset: d, output: o, dtype: float16, hf:}", engine="hf")
    assert one.dtype == "float16"


def test_files_report_what_is_written_where_it_is(tmp_path: Path) -> None:
    content = FILE.replace("quantization: fp8", "quantization: 8").replace("dataset: d", "shufle: true")
    content = content.replace("tensor_parallel_size: 2", "tensor_parallel_size: 0").replace("batch_tokens", "batch")
    with pytest.raises(ConfigError) as caught:
        loaded(tmp_path, content, max_seq_len=1)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{tmp_path / 'captures.yaml'}: {len(lines)} problems"
    assert {line.strip().split(":")[0] for line in lines} == {
        *("shufle", "vllm.quantization", "captures.1.tensor_parallel_size", "captures.1.vllm.batch", "max_seq_len"),
        *(f"captures.{index}.dataset" for index in range(3)),
    }
    with pytest.raises(ConfigError, match="'dataset' is given twice, first on line 2"):
        loaded(tmp_path, FILE + "dataset: e\n")


# -- headers -----------------------------------------------------------------------------------------------------------

DEFAULT_IDENTITY = {
    **{"max_seq_len": 1024, "apply_chat_template": True, "shard_tokens": 262_144, "overflow": "window"},
    **{"loss_on": "auto", "head_dtype": "float32", "head_rows": 512, "batch_tokens": 4096, "overlap": 128},
    "drop_duplicates": True,
}


def test_headers_hold_what_they_always_held() -> None:
    """In this order: a header's bytes are hashed."""
    assert list(CaptureSettings(**GIVEN).identity().items()) == list(DEFAULT_IDENTITY.items())
    options: dict[str, Any] = {"engine": "vllm", "quantization": "fp8", "keep_ids": "5,<eos>", "overflow": "skip"}
    options |= {"samples": 3, "where": "a=b", "keep_columns": "x,y", "last_row": True}
    assert list(CaptureSettings(**GIVEN, **options).identity().items()) == [
        *[("max_seq_len", 1024), ("apply_chat_template", True), ("shard_tokens", 262_144), ("overflow", "skip")],
        *[("loss_on", "auto"), ("engine", "vllm"), ("seed", 42), ("drop_duplicates", False), ("samples", 3)],
        *[("where", ["a=b"]), ("keep_columns", ["x", "y"]), ("keep_ids", [5, "<eos>"]), ("last_row", True)],
        ("quantization", "fp8"),
    ]


# -- options -----------------------------------------------------------------------------------------------------------


def all_fields() -> dict[str, Any]:
    """The default of each capture setting, flat."""
    found: dict[str, Any] = {}
    for model in (CaptureSettings, *ENGINES.values()):
        found |= {name: field.default for name, field in model.model_fields.items() if name not in ENGINES}
    return found


def test_every_setting_is_an_option_with_its_default() -> None:
    fields = all_fields()
    for command in (capture_command, forecast_command, published_command):
        options = {option.name: option for option in command.params if option.name in fields}
        assert command is published_command or options.keys() == fields.keys()
        shown = {name: option.default for name, option in options.items() if option.show_default}
        # Lists are written with commas.
        assert shown == {name: "none" if name == "keep_columns" else fields[name] for name in shown}
        assert {name for name in options if fields[name] not in (None, (), PydanticUndefined)} == shown.keys()


@pytest.mark.parametrize("engine", OF_ENGINES)
def test_options_become_settings(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[CaptureSettings] = []
    monkeypatch.setattr(capture_cli, "show_reports", lambda captures, **_: found.extend(captures))
    arguments = [part for name, value in {**GIVEN, "engine": engine}.items() for part in (f"--{name}", value)]
    for name, value in OF_ENGINES[engine].items():
        flag = f"--{name.replace('_', '-')}"
        arguments += [flag] if value is True else [flag, str(value)]
    result = CliRunner().invoke(capture_command, arguments)
    assert result.exit_code == 0, result.output
    assert found == [CaptureSettings(**GIVEN, engine=engine, **OF_ENGINES[engine])]


def test_help_lists_the_options_of_engines_apart() -> None:
    sections = re.split(r"^(\w.*):$", CliRunner().invoke(capture_command, ["--help"]).output, flags=re.MULTILINE)
    found = {
        title: re.findall(r"^  --([\w-]+)", text, flags=re.MULTILINE)
        for title, text in zip(sections[1::2], sections[2::2], strict=True)
    }
    assert found["Only for --engine hf or vllm"] == ["dtype", "batch-tokens"]
    assert found["Only for --engine openai"] == [name.replace("_", "-") for name in OF_ENGINES["openai"]]
    options = [name for names in found.values() for name in names]
    assert len(options) == len(set(options))
    assert {name.replace("_", "-") for name in all_fields()} <= set(options), "each in a section"
    assert set(found["Other options"]) - {"help"} == {"set", "json", "progress"}


def test_help_needs_no_torch() -> None:
    code = "import sys; from distillkit.cli.main import cli; cli([sys.argv[1], '--help'], standalone_mode=False)\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules), 'imported'"
    for command in ("capture", "forecast", "schema"):
        subprocess.run([sys.executable, "-c", code, command], check=True, capture_output=True)


@pytest.mark.parametrize("command", [capture_command, convert_command])
def test_a_mistyped_choice_is_answered_with_the_closest(command: click.Command) -> None:
    result = CliRunner().invoke(command, ["--preset", "compct-50"])
    assert result.exit_code == 2
    check_names(result.output, "--preset", "'compct-50'", "'compact-50'?")


def test_plan_is_an_earlier_name_of_forecast() -> None:
    context = click.Context(cli)
    assert cli.get_command(context, "plan") is cli.get_command(context, "forecast") is forecast_command
    assert "plan" not in cli.list_commands(context)
    assert "forecast" in CliRunner().invoke(cli, ["plan", "--help"]).output


# -- descriptions ------------------------------------------------------------------------------------------------------


def test_every_setting_is_described_in_a_sentence() -> None:
    for root in (CaptureSettings, RunConfig):
        for model in models(root):
            assert model.__doc__
            for name, field in model.model_fields.items():
                assert re.fullmatch(r".*[.…]", field.description or "", flags=re.DOTALL), f"{model.__name__}.{name}"
    assert get_args(PresetName) == (*PRESETS, *FORMER_PRESETS)


def test_the_page_of_settings_is_generated() -> None:
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == settings_page(), "make docs writes it"


def printed(kind: str) -> dict[str, Any]:
    result = CliRunner().invoke(cli, ["schema", kind])
    assert result.exit_code == 0, result.output
    content: dict[str, Any] = json.loads(result.stdout)
    return content


@pytest.mark.parametrize("kind", SCHEMAS)
def test_schemas_know_every_setting(kind: str) -> None:
    schema = printed(kind)
    assert schema["$schema"].startswith("https://json-schema.org/")
    names = RunConfig.model_fields.keys() if kind == "train" else all_fields().keys() | ENGINES.keys() | {"captures"}
    assert schema["properties"].keys() == names
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        for name, field in section["properties"].items():
            assert "description" in field or "$ref" in field, name


def test_schemas_agree_with_the_checks(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    train, capture = (jsonschema.Draft202012Validator(printed(kind)) for kind in ("train", "capture"))
    examples = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "examples").glob("*.y*ml"))]
    assert len(examples) >= 6
    for content in examples:
        train.validate(content)
        assert parse_config(content)
    nulls = {"model_kwargs": None, "training_args": None, "frozen_modules": None, "layer_mapping": [[0, 1]]}
    train.validate({**examples[0], **nulls})
    assert parse_config({**examples[0], **nulls})
    for mistake in ({"modle": 1}, {"sequence_length": 1}, {"loss_functions": []}, {"peft": {"r": 0}}):
        assert not train.is_valid({**examples[0], **mistake}), mistake

    files = [FILE, "{model: a, dataset: d, output: o, where: [x=1], keep_ids: '5,6', compression_config: {d: 1}}"]
    for content in map(yaml.safe_load, files):
        capture.validate(content)
        for mistake in ({"modle": 1}, {"samples": 0}, {"engine": "vlm"}, {"vllm": {"head_rows": 1}}, {"captures": []}):
            assert not capture.is_valid({**content, **mistake}), mistake
    assert not capture.is_valid({"model": "a", "dataset": "d"})
    assert len(loaded(tmp_path, FILE)) == 3

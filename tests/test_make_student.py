"""Students made of a teacher's layers: compared with the teacher cut by hand, for architectures of every kind."""

from __future__ import annotations

import copy
import doctest
import importlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import support.attacks as attacks
from distillkit.cli.main import cli
from distillkit.errors import ConfigError
from distillkit.models.depth import Layers, evenly_spread, with_layers
from distillkit.text.tokenizer import fingerprint
from distillkit.training.make_student import make_student
from support.architectures import ARCHITECTURES, architecture
from support.refusals import check_names, refused
from support.training import save_student

KEPT = [0, 2]
# With layers of one kind; of kinds listed in the config, by index, by a boundary; with values by layer outside of them;
# with shared parts; recurrent.
KINDS = ("gpt2", "gemma3_text", "qwen2_moe", "deepseek_v3", "llama4_text", "gemma3n_text", "zamba2", "mamba")
# Of which a layer's place decides what it does.
REFUSED = {"jamba": "feed_forward", "diffllama": "lambda_init", "minicpm3": "residual_scale"}


def cut_by_hand(model: Any, config: Any, lists: list[str]) -> Any:
    """The model with some of its layers, without building it anew."""
    depth, modules = config.get_text_config().num_hidden_layers, dict(model.named_modules())
    depth = len(modules[lists[0]])
    for name in lists:
        parent, _, attribute = name.rpartition(".")
        setattr(modules[parent], attribute, torch.nn.ModuleList([modules[name][index] for index in KEPT]))
    for name, module in modules.items():
        for suffix, axis in (("embed_tokens_per_layer", 1), ("per_layer_model_projection", 0)):
            if name.endswith(suffix):
                parts = module.weight.data.chunk(depth, axis)
                module.weight = torch.nn.Parameter(torch.cat([parts[index] for index in KEPT], axis))
        for attribute in ("num_hidden_layers", "num_layers", "n_layers"):
            if getattr(module, attribute, None) == depth:
                setattr(module, attribute, len(KEPT))
    text = model.config.get_text_config()
    for name, value in vars(config.get_text_config()).items():
        if not name.startswith("_"):
            setattr(text, name, copy.deepcopy(value))
    return model


def outlines(*configs: Any) -> list[Any]:
    with torch.device("meta"):
        return [AutoModelForCausalLM.from_config(config) for config in configs]


@pytest.mark.parametrize("model_type", ARCHITECTURES if attacks.LONG else KINDS)
@torch.no_grad()
def test_a_student_is_its_teacher_with_some_layers(model_type: str, tmp_path: Path) -> None:
    try:
        teacher = architecture(model_type)
        config = with_layers(teacher.config, KEPT)
        layers = Layers(*outlines(teacher.config, config), 4, KEPT)
    except Exception:
        if model_type in KINDS:
            raise
        pytest.skip("cannot be made this small, or is refused")
    teacher.save_pretrained(tmp_path / "teacher")
    (tmp_path / "tokenizer").mkdir()
    save_student(tmp_path / "tokenizer")
    for file in (tmp_path / "tokenizer").glob("token*"):
        file.rename(tmp_path / "teacher" / file.name)
    made = make_student(str(tmp_path / "teacher"), tmp_path / "student", KEPT)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    assert made.new == []
    assert made.copied == made.parameters == student.num_parameters() < teacher.num_parameters()
    ids = torch.randint(3, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    expected = cut_by_hand(teacher, config, layers.lists)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(student(input_ids=ids, use_cache=False).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("model_type", REFUSED)
def test_layers_that_would_do_something_else_are_refused(model_type: str) -> None:
    config = architecture(model_type).config
    models = outlines(config, with_layers(config, KEPT))
    with refused(ConfigError, REFUSED[model_type], type(models[0]).__name__):
        Layers(*models, 4, KEPT)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "teacher"
    save_student(folder, num_hidden_layers=6, tie_word_embeddings=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    GenerationConfig(max_new_tokens=7, eos_token_id=1).save_pretrained(folder)
    return folder


def test_the_command_copies_what_belongs_to_a_model(teacher: Path, tmp_path: Path) -> None:
    arguments = ["student", str(teacher), str(tmp_path / "student"), "--layers", "3", "--json"]
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    made = json.loads(result.stdout)
    assert (made["layers"], made["teacher_layers"], made["vocab_size"]) == ([0, 2, 5], 6, 64)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert student.generation_config.max_new_tokens == 7
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (teacher, tmp_path / "student")]
    assert fingerprint(tokenizers[0]) == fingerprint(tokenizers[1])
    assert tokenizers[0].chat_template == tokenizers[1].chat_template
    # A second time nothing is overwritten.
    before = {file.name: file.read_bytes() for file in (tmp_path / "student").iterdir()}
    with refused(FileExistsError, str(tmp_path / "student")):
        CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert {file.name: file.read_bytes() for file in (tmp_path / "student").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_other_sizes_and_new_weights(teacher: Path, tmp_path: Path) -> None:
    """What fits is the teacher's; the rest is new, and the same for the same seed."""
    sizes = {"intermediate_size": 16}
    models = {}
    for name, options in (
        ("a", {"sizes": sizes}),
        ("b", {"sizes": sizes}),
        ("c", {"sizes": sizes, "seed": 1}),
        ("d", {"from_scratch": True}),
    ):
        made = make_student(str(teacher), tmp_path / name, 2, **options)
        models[name] = AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        values = [value for key, value in models[name].items() if key != "lm_head.weight"]
        assert made.parameters == sum(value.numel() for value in values)
        assert made.copied == (0 if options.get("from_scratch") else made.parameters - 2 * 3 * 16 * 32)
    original = AutoModelForCausalLM.from_pretrained(teacher).state_dict()
    for key, value in models["a"].items():
        source = original[key.replace("layers.1.", "layers.5.")]
        assert torch.equal(value, models["b"][key])
        assert (value.shape == source.shape and torch.equal(value, source)) is ("mlp" not in key), key
        assert torch.equal(value, models["c"][key]) is ("mlp" not in key), key
        assert "norm" in key or not torch.equal(models["d"][key], source[: len(models["d"][key])]), key


@pytest.mark.parametrize(
    ("layers", "options", "facts"),
    [
        (7, {}, ["layers", "6", "7"]),
        (0, {}, ["layers", "6", "0"]),
        ([0, 6], {}, ["layers", "5", "0, 6"]),
        ([3, 1], {}, ["layers", "3, 1"]),
        (2, {"sizes": {"intermediat_size": 8}}, ["intermediat_size", "'intermediate_size'"]),
        (2, {"sizes": {"vocab_size": 8}}, ["vocab_size", "tokenizer"]),
        (2, {"sizes": {"hidden_size": 33}}, ["33", "2"]),
        (2, {"sizes": {"hidden_size": "wide"}}, ["hidden_size", "wide"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(
    teacher: Path, tmp_path: Path, layers: Any, options: dict[str, Any], facts: list[str]
) -> None:
    with refused(ConfigError, *facts):
        make_student(str(teacher), tmp_path / "student", layers, **options)
    assert list(tmp_path.iterdir()) == []


def test_teachers_of_other_kinds_are_refused(teacher: Path, tmp_path: Path) -> None:
    for change, facts in (
        ({"quantization_config": {"quant_method": "fp8"}}, ["quantised"]),
        ({"is_encoder_decoder": True}, ["encoder"]),
    ):
        folder = tmp_path / facts[0]
        folder.mkdir()
        for file in teacher.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        config = json.loads((teacher / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with refused(ConfigError, str(folder), *facts):
            make_student(str(folder), tmp_path / "student", 2)
    result = CliRunner().invoke(cli, ["student", str(teacher), str(tmp_path / "student")])
    assert result.exit_code == 2
    check_names(result.output, "--layers")
    with refused(ConfigError, "./nowhere"):
        make_student("./nowhere", tmp_path / "student", 2)


def test_the_examples_of_the_docstrings_run(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(teacher.parent)
    for name in ("training.make_student", "models.depth"):
        found = doctest.testmod(importlib.import_module(f"distillkit.{name}"))
        assert (found.attempted > 0, found.failed) == (True, 0)


def test_layers_are_spread_from_the_first_to_the_last() -> None:
    for depth in range(1, 40):
        for count in range(1, depth + 1):
            kept = evenly_spread(count, depth)
            assert len(set(kept)) == count
            assert kept == sorted(kept)
            assert count == 1 or (kept[0], kept[-1]) == (0, depth - 1)
            steps = {b - a for a, b in pairwise(kept)}
            assert not steps or max(steps) - min(steps) <= 1

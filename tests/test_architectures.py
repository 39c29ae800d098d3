"""Student and teacher of every architecture: its head, and whether the documents of a batch change each other, which is
compared with each document alone. What cannot be used is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version

import support.attacks as attacks
from distillkit.capture.engine_settings import HFSettings
from distillkit.capture.teachers.base import RowRequest, ScoredDocument
from distillkit.capture.teachers.hf import HFTeacher
from distillkit.errors import ConfigError, DistillKitError
from distillkit.models.head import backbone_hidden, check_lm_head
from distillkit.models.rope import choose_frequencies_by_document, frequencies_change_after
from distillkit.models.separation import separation_of
from distillkit.training.batching import batch_layout, packing_problem
from distillkit.training.data.examples import Collator, Example
from distillkit.training.run import Run
from distillkit.training.student import load_student
from distillkit.types import TokenDocument
from support.architectures import ARCHITECTURES, VOCABULARY, architecture, save_architecture
from support.refusals import check_names, refused
from support.training import run_config, tiny_tokenizer, write_dataset

# Whether packed documents are kept apart: by the mask, or not, or since there is a state instead of a mask.
PACKS = {"llama": True, "gpt2": True, "gemma2": True, "deepseek_v3": True, "phi3": True, "modernbert-decoder": True}
NEW = Version(transformers.__version__) >= Version("5.23")  # before, Llama 4 let documents attend to each other
PACKS |= {"llama4": NEW, "gpt_oss": False, "bloom": False, "opt": False, "mpt": False}
PACKS |= dict.fromkeys(("mamba", "qwen3_next", "falcon_h1", "lfm2_moe", "recurrent_gemma", "rwkv", "xlstm"), False)
# Those whose default attention is not `sdpa`.
OTHER_ATTENTION = ("gemma2", "gpt_oss", "bloom", "mpt", "mamba", "mamba2", "rwkv", "xlstm")


def documents(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(3, 64, length).astype(np.int32) for length in lengths]


def batch_of(models: dict[str, Any], rows: Sequence[Sequence[np.ndarray]]) -> dict[str, Any]:
    """A batch as it is made in training."""
    examples = [
        Example(np.concatenate(row), np.array([len(document) for document in row]), np.arange(0), {}) for row in rows
    ]
    batch = Collator(**batch_layout(models))(examples)
    return {name: batch[name] for name in ("input_ids", "position_ids")}


@torch.no_grad()
def furthest(model: Any, rows: Sequence[Sequence[np.ndarray]], fresh: Any = None) -> float:
    """How far the hidden states of a batch's documents are from those of each document alone, relatively, in a model
    that may have to be a fresh one."""
    hidden, found = backbone_hidden(model, **batch_of({"model": model}, rows)), 0.0
    for row, parts in zip(hidden, rows, strict=True):
        start = 0
        for document in parts:
            one = backbone_hidden(fresh() if fresh else model, input_ids=torch.from_numpy(document)[None].long())[0]
            difference = (row[start : start + len(document)] - one).norm(dim=-1) / one.norm(dim=-1)
            found = max(found, float(difference.max()))
            start += len(document)
    return found


def ordinary(model: Any, seed: int = 0) -> Any:
    """The same model with weights that make every layer matter."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("model_type", PACKS)
def test_packing_is_refused_where_documents_leak(model_type: str) -> None:
    model = architecture(model_type)
    choose_frequencies_by_document(model)
    check_lm_head(model)
    problem = packing_problem({"model": model})
    first, second, third = documents(21, 19, 14)
    assert furthest(model, [[first], [third], [second]]) < 1e-5, "padding changes nothing"
    assert (furthest(model, [[first, second], [third]]) < 1e-5) == PACKS[model_type] == (problem is None)
    if problem is not None:
        check_names(problem, "model", type(model).__name__, f"'{model.config.model_type}'")


def test_ways_out_are_those_of_the_family() -> None:
    for model_type, facts in {
        "gpt_oss": ["use_flash_attention: true"],
        "qwen3_next": ["use_flash_attention: true", "flash-linear-attention", "causal-conv1d"],
        "opt": ["use_flash_attention: true"],
    }.items():
        check_names(packing_problem({"model": architecture(model_type)}) or "", *facts)
    for model_type in ("mamba", "bloom"):
        assert "use_flash_attention" not in (packing_problem({"model": architecture(model_type)}) or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_near_zero_and_coarse_numbers_hide_nothing(dtype: torch.dtype) -> None:
    """From scratch, layers may pass on nothing yet; in 16 bits, a convolution's leak may be less than rounding."""
    for model_type, packs in {"llama": True, "gpt_oss": False, "lfm2_moe": False, "opt": False}.items():
        model = architecture(model_type).to(dtype)
        assert (packing_problem({"model": model}) is None) == packs
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.data.zero_()
        before = {name: parameter.clone() for name, parameter in model.named_parameters()}
        assert (packing_problem({"model": model}) is None) == packs
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), "the model itself is untouched"


def test_padding_that_changes_documents_is_refused(tmp_path: Path) -> None:
    """In training and in a capture: CPM-Ant attends to all of a row; an encoder attends to what follows."""
    model = architecture("cpmant")
    with refused(DistillKitError, "model", "CpmAntForCausalLM", "'cpmant'"):
        packing_problem({"model": model})
    model.save_pretrained(tmp_path)
    with refused(DistillKitError, "CpmAntForCausalLM", "'cpmant'"):
        HFTeacher(str(tmp_path), HFSettings())


@pytest.mark.parametrize("model_type", ["llama4", "modernbert-decoder", "gemma2", "mamba"])
def test_teachers_rows_are_the_models_own(model_type: str, tmp_path: Path) -> None:
    """Also of a head behind further layers (ModernBERT), and of one whose backbone has another name (Llama 4)."""
    model = ordinary(architecture(model_type))
    model.save_pretrained(tmp_path)
    compare(HFTeacher(str(tmp_path), HFSettings()), lambda: model, documents(7, 20, 12))


def compare(teacher: HFTeacher, fresh: Any, texts: Sequence[np.ndarray]) -> None:
    """Compare a teacher's rows with the logits of a model that has seen only this one document."""
    scored = list(teacher.score([TokenDocument(ids, "doc") for ids in texts], RowRequest(k=8)))
    for each in scored:
        assert isinstance(each, ScoredDocument)
        with torch.no_grad():
            logits = fresh()(input_ids=torch.from_numpy(texts[each.index])[None].long(), use_cache=False).logits[0, :-1]
        expected = logits.log_softmax(-1).topk(8)
        np.testing.assert_allclose(each.rows.logprobs, expected.values.numpy(), atol=1e-4)


# Frequencies that depend on the longest sequence of a batch: two sets of them, or ones for each length.
BY_LENGTH: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": ("phi3", {}),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
}


@pytest.mark.parametrize("kind", BY_LENGTH)
def test_rotary_frequencies_are_those_of_each_document(kind: str, tmp_path: Path) -> None:
    """In padded and packed batches, whatever was run before, and in a capture."""
    model_type, settings = BY_LENGTH[kind]
    model = ordinary(architecture(model_type, **settings))

    def fresh() -> Any:
        return ordinary(architecture(model_type, **settings))

    short, edge, longer, long = documents(5, 16, 17, 30)
    assert furthest(model, [[short], [long]], fresh) > 0.01, "as transformers runs it"
    model = fresh()
    choose_frequencies_by_document(model)
    assert frequencies_change_after(model) == 16
    for rows in ([[short], [long]], [[longer], [long]], [[edge], [longer]], [[short, long], [longer, edge]], [[short]]):
        assert max(furthest(model, rows, fresh) for _ in range(2)) < 1e-5
    model.save_pretrained(tmp_path)
    compare(HFTeacher(str(tmp_path), HFSettings()), fresh, [long, short, longer, edge])


def test_each_model_of_a_run_decides_about_its_batches(tmp_path: Path) -> None:
    """Students are loaded as transformers loads them; packing is refused, or left out if that is allowed."""
    train = write_dataset(tmp_path / "train", documents(9, 5, 12, 7))
    students = {name: save_architecture(tmp_path / name, name, vocab_size=64) for name in ("llama", "gpt_oss", "phi3")}

    def run(student: str, **settings: Any) -> Run:
        dataset = {"dataset": settings.pop("dataset", {})}
        return Run(run_config(students[student], tmp_path / "out", train, **dataset, **settings))

    with refused(ConfigError, "packing", "model", "GptOssForCausalLM", "dataset.packing: auto"):
        _ = run("gpt_oss", training_args={"packing": True}).trainer
    for student, packs in (("llama", True), ("gpt_oss", False)):
        trainer = run(student, dataset={"packing": "auto"}).trainer
        assert (trainer.train_dataset.packing is not None) == packs
    assert run("llama", dataset={"packing": True}).trainer.train_dataset.packing is not None
    with refused(ConfigError, "dataset.packing", "training_args.packing"):
        run("llama", dataset={"packing": "auto"}, training_args={"packing": False})
    live = {"kind": "hf", "path": students["gpt_oss"]}
    with refused(ConfigError, "packing", "teacher.path", "GptOssForCausalLM"):
        _ = run("llama", teacher=live, training_args={"packing": True}).trainer
    assert run("llama", teacher=live, dataset={"packing": "auto"}).trainer.train_dataset.packing is None
    live["path"] = students["phi3"]
    for trainer in (run("phi3").trainer, run("llama", teacher=live).trainer):
        assert trainer.data_collator.longest_alike == 16


def test_rows_that_are_packed_already_are_refused_too(tmp_path: Path) -> None:
    model = architecture("gpt_oss")
    collator = Collator()
    collator.unpackable = packing_problem({"model": model})
    with refused(ConfigError, "GptOssForCausalLM"):
        collator([Example(np.arange(5, dtype=np.int32), np.array([2, 3]), np.arange(0), {})])
    collator([Example(np.arange(5, dtype=np.int32), np.array([5]), np.arange(0), {})])


@pytest.mark.parametrize("model_type", OTHER_ATTENTION)
def test_students_get_the_attention_that_transformers_chooses(model_type: str, tmp_path: Path) -> None:
    folder = save_architecture(tmp_path, model_type)
    for settings in ({}, {"use_flash_attention": False}):
        model = load_student(run_config(folder, tmp_path / "out", "data", **settings), VOCABULARY)
        assert model.config._attn_implementation == ("eager" if NEW or model_type != "gemma2" else "sdpa")
    if not model._supports_sdpa:
        config = run_config(folder, tmp_path / "out", "data", model_kwargs={"attn_implementation": "sdpa"})
        with refused(ConfigError, "model", "sdpa"):
            load_student(config, VOCABULARY)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ARCHITECTURES if attacks.LONG else ())  # all of them take minutes
def test_every_architecture_works_or_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    try:
        model = architecture(model_type)
    except Exception as error:  # noqa: BLE001 - transformers raises all kinds
        pytest.skip(f"cannot be built tiny: {error}")
    choose_frequencies_by_document(model)
    first, second, third = documents(21, 19, 14)

    def masked(rows: Sequence[Sequence[torch.Tensor]]) -> dict[str, Any]:
        lengths = torch.tensor([len(row[0]) for row in rows])
        ids = torch.nn.utils.rnn.pad_sequence([row[0] for row in rows], batch_first=True)
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}

    try:
        check_lm_head(model)
        separation_of(model, masked, packs=False).check_padding()
        problem = packing_problem({"model": model})
    except DistillKitError as error:
        check_names(str(error), type(model).__name__)
        return
    assert furthest(model, [[first], [third], [second]]) < 1e-4
    assert (furthest(model, [[first, second], [third]]) < 1e-4) == (problem is None)

    try:
        model.save_pretrained(tmp_path)
    except RuntimeError as error:
        pytest.skip(f"transformers cannot save it: {error}")
    tiny_tokenizer(64).save_pretrained(tmp_path)
    try:
        teacher = HFTeacher(str(tmp_path), HFSettings())
    except ConfigError as error:
        # The text model of some vision-language models is saved with a config that no auto class loads.
        check_names(str(error), "model", str(tmp_path), type(model.config).__name__)
        return
    compare(teacher, lambda: model, [third, first, second])
    student = load_student(run_config(str(tmp_path), tmp_path / "out", "data"), 64)
    assert (packing_problem({"model": student}) is None) == (problem is None)
    with suppress(DistillKitError):  # some only run in float32
        assert (packing_problem({"model": model.to(torch.bfloat16)}) is None) == (problem is None)

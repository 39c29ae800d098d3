"""A live teacher: the same training as from its captured distributions, its whole distribution, its hidden states."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from distillkit.errors import ConfigError, MismatchError
from distillkit.training.config.file import parse_config
from distillkit.training.config.schema import RunConfig
from distillkit.training.run import train
from distillkit.training.signals.live import OnlineSignal
from distillkit.training.student import check_student
from support.refusals import check_names, refused
from support.training import VOCABULARY, losses_of, random_documents, run_config, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("without_plots")

HIDDEN = [
    {"function": "hs_mse", "weight": 1.0},
    {"function": "hs_cosine", "weight": 2.0},
    {"function": "kl", "weight": 1.0},
]


DEEP = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}


def live(parts: dict[str, str], output: Path, which: str = "teacher", **settings: Any) -> RunConfig:
    teacher = {"kind": "hf", "path": parts[which], **settings.pop("teacher", {})}
    return run_config(parts["student"], output, parts["train"], parts["eval"], teacher=teacher, **settings)


def losses(output: Path) -> list[float]:
    """The training losses in order."""
    return list(losses_of(output).values())


def test_the_first_k_of_a_live_teacher_train_as_the_captured_ones(parts: dict[str, str], tmp_path: Path) -> None:
    arguments = {"eval_on_start": True}
    stored = run_config(parts["student"], tmp_path / "stored", parts["train"], parts["eval"], training_args=arguments)
    results = [train(stored), train(live(parts, tmp_path / "live", teacher={"top_k": 8}, training_args=arguments))]
    assert losses(tmp_path / "live") == pytest.approx(losses(tmp_path / "stored"), rel=1e-5)
    for name in ("eval_kl", "eval_teacher_mass", "eval_student_mass", "eval_top1_agreement", "eval_topk_overlap"):
        assert results[1]["eval_first"][name] == pytest.approx(results[0]["eval_first"][name], rel=1e-5), name


def test_a_dense_teacher_is_compared_with_over_every_id(parts: dict[str, str], tmp_path: Path) -> None:
    config = live(parts, tmp_path, training_args={"max_steps": 1, "eval_on_start": True})
    measured = train(config)["eval_first"]
    student = AutoModelForCausalLM.from_pretrained(parts["student"]).eval()
    teacher = tiny_model(7)
    total, agreed, positions = 0.0, 0, 0
    for document in random_documents(7, seed=1):
        ids = torch.from_numpy(document).long().unsqueeze(0)
        with torch.no_grad():
            q, p = (model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1) for model in (student, teacher))
        total += (p.exp() * (p - q)).sum().item()
        agreed += (p.argmax(-1) == q.argmax(-1)).sum().item()
        positions += len(p)
    assert measured["eval_positions"] == positions
    assert measured["eval_kl"] == pytest.approx(total / positions, rel=1e-5)
    assert measured["eval_top1_agreement"] == pytest.approx(agreed / positions)
    assert measured["eval_teacher_mass"] == 1.0


@pytest.mark.slow
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_cut(parts: dict[str, str], tmp_path: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(parts["student"]).state_dict()
    start = torch.cat([value.double().flatten() for value in before.values()])
    for top_k in (None, 6):
        results = []
        for batch, accumulation in ((8, 1), (2, 4)):
            arguments = {
                "max_steps": 1,
                "optim": "sgd",
                "learning_rate": 1.0,
                "max_grad_norm": 0.0,
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": accumulation,
                "gradient_checkpointing": batch == 2,
            }
            output = tmp_path / f"{top_k}-{batch}"
            settings = {"loss_functions": HIDDEN, "layer_mapping": [[0, 0], [1, 2], [-1, -1]]}
            train(live(parts, output, "wide", teacher={"top_k": top_k}, training_args=arguments, **settings))
            weights = AutoModelForCausalLM.from_pretrained(output).state_dict()
            results.append((losses(output)[0], torch.cat([value.double().flatten() for value in weights.values()])))
        assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
        whole, cut = (end - start for _, end in results)
        assert ((cut - whole).norm() / whole.norm()).item() < 1e-6


def test_hidden_losses_are_means_over_positions_and_pairs(parts: dict[str, str], tmp_path: Path) -> None:
    functions = [{"function": "hs_mse", "weight": 1.0}, {"function": "hs_cosine", "weight": 1.0}]
    arguments = {"max_steps": 1, "eval_on_start": True}
    config = live(parts, tmp_path, loss_functions=functions, layer_mapping="all", training_args=arguments)
    measured = train(config)["eval_first"]
    models = (AutoModelForCausalLM.from_pretrained(parts["student"]).eval(), tiny_model(7))
    squares, cosines, positions = [], [], 0
    for document in random_documents(7, seed=1):
        ids = torch.from_numpy(document).long().unsqueeze(0)
        with torch.no_grad():
            states = [model(ids, output_hidden_states=True, use_cache=False).hidden_states for model in models]
        for a, b in zip(*states, strict=True):
            a, b = (each[0, :-1].double() for each in (a, b))
            squares.append((a - b).square().mean(-1).sum().item())
            cosines.append((1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).sum().item())
        positions += len(document) - 1
    assert measured["eval_hs_mse"] == pytest.approx(np.sum(squares) / 3 / positions, rel=1e-5)
    assert measured["eval_hs_cosine"] == pytest.approx(np.sum(cosines) / 3 / positions, rel=1e-5)
    assert measured["eval_loss"] == pytest.approx((measured["eval_hs_mse"] + measured["eval_hs_cosine"]) / 2, rel=1e-5)


@pytest.mark.slow
def test_projections_are_trained_saved_reloaded_and_not_exported(parts: dict[str, str], tmp_path: Path) -> None:
    def config(output: Path, **arguments: Any) -> RunConfig:
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, **arguments}
        return live(parts, output, "wide", loss_functions=HIDDEN, layer_mapping=[[1, 1], [2, 3]], training_args=steps)

    train(config(tmp_path / "whole"))
    saved = [
        load_file(tmp_path / "whole" / f"checkpoint-{step}" / "distillkit_projections.safetensors") for step in (2, 4)
    ]
    assert [tuple(weight.shape) for weight in saved[0].values()] == [(48, 32), (48, 32)]
    assert all(not torch.equal(saved[0][name], saved[1][name]) for name in saved[0])
    for folder in (tmp_path / "whole", tmp_path / "whole" / "checkpoint-2"):
        assert not [name for name in load_file(folder / "model.safetensors") if "projection" in name]
    assert not (tmp_path / "whole" / "distillkit_projections.safetensors").exists()

    train(config(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2")))
    assert losses(tmp_path / "resumed") == losses(tmp_path / "whole")[2:]
    again = load_file(tmp_path / "resumed" / "checkpoint-4" / "distillkit_projections.safetensors")
    assert all(torch.equal(again[name], saved[1][name]) for name in again)


def test_a_projection_between_equal_sizes_may_be_forced(parts: dict[str, str], tmp_path: Path) -> None:
    settings = {"loss_functions": HIDDEN, "layer_mapping": [[1, 1]], "force_hidden_state_projection": True}
    train(live(parts, tmp_path, training_args={"save_strategy": "steps", "save_steps": 4}, **settings))
    (weight,) = load_file(tmp_path / "checkpoint-4" / "distillkit_projections.safetensors").values()
    assert tuple(weight.shape) == (32, 32)


@pytest.mark.slow
def test_a_padded_head_is_no_other_vocabulary(parts: dict[str, str], tmp_path: Path) -> None:
    """Heads of one tokenizer are padded to different widths: the teacher's wider, then narrower."""
    model = tiny_model(7)
    model.resize_token_embeddings(VOCABULARY + 32)
    model.save_pretrained(tmp_path / "padded")
    tiny_tokenizer().save_pretrained(tmp_path / "padded")
    padded = {**parts, "padded": str(tmp_path / "padded")}
    for top_k in (None, 8):
        train(live(padded, tmp_path / "wide-teacher", "padded", teacher={"top_k": top_k}))
        wider = {**padded, "student": padded["padded"]}
        train(live(wider, tmp_path / "wide-student", "teacher", teacher={"top_k": top_k}))
        assert np.isfinite(losses(tmp_path / "wide-teacher")).all()
        assert np.isfinite(losses(tmp_path / "wide-student")).all()


def test_another_tokenizer_is_refused_with_both_fingerprints(parts: dict[str, str], tmp_path: Path) -> None:
    teacher = live(parts, tmp_path / "out", "other")
    with pytest.raises(MismatchError) as caught:
        train(teacher)
    check_names(str(caught.value), "teacher.path", parts["other"])
    assert len(set(re.findall(r"xxh3-128:\w+", str(caught.value)))) == 2


def test_settings_that_do_not_fit_the_teacher(parts: dict[str, str], tmp_path: Path) -> None:
    deep = {"loss_functions": HIDDEN}
    for which, settings, facts in (
        ("teacher", {"teacher": {"top_k": 65}}, ["teacher.top_k", "65", "64"]),
        ("teacher", {**deep, "layer_mapping": [[3, 1]]}, ["layer_mapping", "student", "3"]),
        ("teacher", {**deep, "layer_mapping": [[1, 5]]}, ["layer_mapping", "teacher", "5"]),
        ("wide", {**deep, "layer_mapping": "all"}, ["layer_mapping", "2", "3", "[[1, 2], [2, 3]]"]),
    ):
        with refused(ConfigError, *facts):
            train(live(parts, tmp_path, which, **settings))


def test_layers_are_checked_by_the_configs_alone(parts: dict[str, str], tmp_path: Path) -> None:
    """Before any weights are loaded: this teacher has none. What is proposed fits."""
    for depth, proposed in ((30, "[[1, 15], [2, 30]]"), (1, "[[2, 1]]")):
        LlamaConfig(**DEEP, num_hidden_layers=depth).save_pretrained(tmp_path)
        settings: dict[str, Any] = {"loss_functions": HIDDEN, "layer_mapping": "all"}
        with refused(ConfigError, "layer_mapping", "2", str(depth), proposed):
            check_student(live({**parts, "deep": str(tmp_path)}, tmp_path / "out", "deep", **settings))
        settings["layer_mapping"] = json.loads(proposed)
        check_student(live({**parts, "deep": str(tmp_path)}, tmp_path / "out", "deep", **settings))


def test_the_first_k_stay_within_the_students_head() -> None:
    """A teacher's head may be padded further: these ids are missing mass, and more ids than the student has are not
    asked for."""
    torch.manual_seed(0)
    teacher = tiny_model(7, vocabulary=96)
    ids = torch.arange(12)[None]
    batch = {"input_ids": ids, "position_ids": ids, "rows": torch.arange(11)}
    targets = OnlineSignal(teacher, top_k=40, head_size=64).targets(batch, ids[0, 1:])
    with torch.no_grad():
        expected = teacher(ids).logits[0, :11].log_softmax(-1).topk(40)
    inside = expected.indices < 64
    assert not inside.all()
    assert targets.teacher.ids.max() < 64
    torch.testing.assert_close(targets.teacher.logprobs, expected.values.masked_fill(~inside, -torch.inf))
    assert torch.equal(targets.teacher.ids[inside], expected.indices[inside])
    with refused(ConfigError, "teacher.top_k", "65", "student's", "64"):
        OnlineSignal(teacher, top_k=65, head_size=64)


def test_settings_that_contradict_each_other() -> None:
    for settings, facts in (
        ({"loss_functions": HIDDEN}, ["layer_mapping", "hs_mse"]),
        ({"teacher": {"kind": "hf", "path": "t", "kwargs": {"dtype": "int8"}}}, ["teacher.kwargs.dtype", "'int8'"]),
        ({"layer_mapping": "all"}, ["layer_mapping", "hs_mse", "hs_cosine"]),
        ({"force_hidden_state_projection": True}, ["force_hidden_state_projection", "hs_mse", "hs_cosine"]),
        (
            {"loss_functions": HIDDEN, "layer_mapping": "all", "teacher": {"kind": "dataset"}},
            ["loss_functions", "hs_mse", "teacher.kind"],
        ),
    ):
        content = {
            "model": "student",
            "output_path": "out",
            "sequence_length": 64,
            "dataset": {"train_dataset": {"disk_path": "data"}},
            "teacher": {"kind": "hf", "path": "teacher"},
            **settings,
        }
        with refused(ConfigError, *facts):
            parse_config(content)

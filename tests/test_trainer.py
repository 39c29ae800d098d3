"""Training: exact losses and gradients however batches are cut, evaluation, resuming, refusals, and what is left on
disk."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from distillkit.errors import ConfigError, DistillKitError, MismatchError
from distillkit.shards import ShardWriter
from distillkit.text.tokenizer import fingerprint
from distillkit.training.config.schema import RunConfig
from distillkit.training.run import Run, train
from distillkit.training.trainer import SignalTrainer
from distillkit.types import SparseLogprobs
from support import reference
from support.disks import fill, mounted
from support.processes import Processes
from support.refusals import check_names, refused
from support.training import (
    VOCABULARY,
    exact_codec,
    header_for,
    losses_of,
    metrics_of,
    random_documents,
    run_config,
    save_student,
    teacher_rows,
    tiny_model,
    tiny_tokenizer,
    write_dataset,
)

pytestmark = pytest.mark.usefixtures("without_plots")

GOLDEN = Path(__file__).parent / "golden"


def weights_of(folder: Path | str) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def test_a_student_learns_and_leaves_everything_behind(parts: dict[str, str], tmp_path: Path) -> None:
    config = run_config(
        parts["student"],
        tmp_path,
        parts["train"],
        parts["eval"],
        dataset={"num_samples": 20, "num_eval_samples": 6},
        training_args={
            "max_steps": 30,
            "eval_on_start": True,
            "eval_strategy": "steps",
            "eval_steps": 15,
            "logging_steps": 5,
        },
    )
    summary = train(config)
    assert summary["eval_last"]["eval_kl"] < 0.9 * summary["eval_first"]["eval_kl"]
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["steps"] == 30
    assert summary["peak_rss_bytes"] > 10**8

    logs = metrics_of(tmp_path)
    assert [(entry["step"], "eval_loss" in entry) for entry in logs if "eval_loss" in entry or "loss" in entry] == [
        (0, True),
        *[(step, False) for step in (5, 10, 15)],
        (15, True),
        *[(step, False) for step in (20, 25, 30)],
        (30, True),
    ]
    trained = next(entry for entry in logs if "loss" in entry)
    for name in ("cross_entropy", "kl", "teacher_mass", "student_mass", "top1_agreement", "topk_overlap"):
        assert np.isfinite(trained[name]), name
    assert trained["tokens_per_second"] > 0
    assert yaml.safe_load((tmp_path / "distillkit_config.yaml").read_text())["model"] == parts["student"]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.use_cache is True, "a saved student generates with its cache"
    assert fingerprint(tokenizer) == fingerprint(tiny_tokenizer())
    changed = weights_of(tmp_path)
    assert any(not torch.equal(changed[name], value) for name, value in weights_of(parts["student"]).items())


def test_evaluation_is_the_mean_over_all_held_out_positions(parts: dict[str, str], tmp_path: Path) -> None:
    """Whatever the batches, and with dataloader_drop_last, which is for training: checked against whole logits and the
    float64 oracle, document by document."""
    config = run_config(
        parts["student"],
        tmp_path,
        parts["train"],
        parts["eval"],
        training_args={
            "max_steps": 1,
            "eval_on_start": True,
            "per_device_eval_batch_size": 3,
            "dataloader_drop_last": True,
        },
    )
    measured = train(config)["eval_first"]
    student, teacher = AutoModelForCausalLM.from_pretrained(parts["student"]), tiny_model(7)
    kl, with_rest, entropy, agreement, mass, positions = 0.0, 0.0, 0.0, 0, 0.0, 0
    for document in random_documents(7, seed=1):
        rows = teacher_rows(teacher, document)
        with torch.no_grad():
            logits = student(torch.from_numpy(document).long()[None]).logits[0].double().numpy()
        for t, (ids, logprobs) in enumerate(zip(rows.ids.tolist(), rows.logprobs.tolist(), strict=True)):
            kl += reference.measure_of("kl", *reference.outcomes_at(logits[t], ids, logprobs, 0, 1.0, "zero"))
            with_rest += reference.measure_of("kl", *reference.outcomes_at(logits[t], ids, logprobs, 0, 1.0, "uniform"))
            entropy += reference.cross_entropy_at(logits[t], int(document[t + 1]))
            agreement += int(logits[t].argmax() == ids[0])
            mass += float(np.exp(logprobs).sum())
            positions += 1
    assert measured["eval_positions"] == positions
    assert measured["eval_kl"] == pytest.approx(kl / positions, rel=1e-5)
    assert measured["eval_kl_with_rest"] == pytest.approx(with_rest / positions, rel=1e-5)
    assert measured["eval_cross_entropy"] == pytest.approx(entropy / positions, rel=1e-5)
    assert measured["eval_perplexity"] == pytest.approx(np.exp(entropy / positions), rel=1e-4)
    assert measured["eval_loss"] == pytest.approx((0.25 * entropy + 0.75 * kl) / positions, rel=1e-5)
    assert measured["eval_top1_agreement"] == pytest.approx(agreement / positions)
    assert measured["eval_teacher_mass"] == pytest.approx(mass / positions, rel=1e-5)


def test_documents_beyond_a_students_positions_are_refused_or_told(
    parts: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever sequence_length is, as long as no document is so long."""
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=30, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "table")
    tiny_tokenizer().save_pretrained(tmp_path / "table")
    rotary = save_student(tmp_path / "rotary", max_position_embeddings=30)

    def told(student: str, length: int, **arguments: Any) -> bool:
        caplog.clear()
        settings = {"sequence_length": length, "dataset": {"overflow": "cut"}, "training_args": arguments}
        _ = Run(run_config(student, tmp_path / "out", parts["train"], **settings)).datasets
        return "max_position_embeddings" in caplog.text

    with refused(ConfigError, "model", "30", "dataset.train_dataset", "39", "sequence_length"):
        told(str(tmp_path / "table"), 100_000)
    assert not told(str(tmp_path / "table"), 30)
    # Padding has positions, too.
    for length, arguments, row in ((30, {"pad_to_multiple_of": 8}, "32"), (31, {"packing": True}, "31")):
        with refused(ConfigError, "model", "30", "dataset.train_dataset", row):
            told(str(tmp_path / "table"), length, **arguments)
    assert told(rotary, 64)
    assert not told(rotary, 30)
    assert not told(parts["student"], 100_000)


def test_arithmetic_other_than_the_published_one_is_told(
    parts: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    told = []
    stored, whole = {"kind": "dataset"}, {"kind": "hf", "path": parts["teacher"]}
    for teacher, temperature, published in (
        (stored, 2.0, None),
        (whole | {"top_k": 8}, 2.0, None),
        (stored, 1.0, None),
        (stored, 2.0, True),
        (stored, 2.0, False),
        (whole, 2.0, None),
    ):
        loss = {"function": "kl", "weight": 1, "temperature": temperature, "published_temperature": published}
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="distillkit"):
            config = run_config(parts["student"], tmp_path, parts["train"], teacher=teacher, loss_functions=[loss])
            _ = Run(config).objective
        told.append("published_temperature" in caplog.text)
    assert told == [True, True, False, False, False, False]


def test_a_training_set_smaller_than_a_batch_that_drops_the_last_is_refused(
    parts: dict[str, str], tmp_path: Path
) -> None:
    arguments = {"dataloader_drop_last": True, "per_device_train_batch_size": 5}
    for settings in ({"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 2}):
        config = run_config(
            parts["student"], tmp_path, parts["train"], dataset={"num_samples": 3}, training_args=arguments | settings
        )
        with refused(ConfigError, "dataloader_drop_last", "3", "5", "per_device_train_batch_size"):
            train(config)
    assert not list(tmp_path.iterdir()), "nothing was trained or saved"


def test_stored_log_probs_of_next_tokens_reach_the_loss(parts: dict[str, str], tmp_path: Path) -> None:
    """Checked against whole logits and the float64 oracle; in some documents they are missing."""
    teacher, codec = tiny_model(7), exact_codec()
    header = header_for(codec, tiny_tokenizer(), capture={"label_logprobs": True})
    documents = random_documents(7, seed=1)
    known = []
    with ShardWriter(tmp_path / "eval", header) as writer:
        for index, document in enumerate(documents):
            ids = torch.from_numpy(document).long()
            with torch.no_grad():
                logprobs = teacher(ids[None]).logits[0, :-1].log_softmax(-1)
            labels = logprobs.gather(1, ids[1:, None])[:, 0].numpy()
            known.append(np.full_like(labels, np.nan) if index == 3 else labels)
            writer.write(document, teacher_rows(teacher, document), label_logprobs=None if index == 3 else labels)
    config = run_config(
        parts["student"],
        tmp_path / "out",
        parts["train"],
        str(tmp_path / "eval"),
        loss_functions=[{"function": "kl", "weight": 1.0, "missing_probability_handling": "uniform"}],
        training_args={"max_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 3},
    )
    measured = train(config)["eval_first"]["eval_loss"]
    student, total, positions = AutoModelForCausalLM.from_pretrained(parts["student"]), 0.0, 0
    for document, labels in zip(documents, known, strict=True):
        rows = teacher_rows(teacher, document)
        with torch.no_grad():
            logits = student(torch.from_numpy(document).long()[None]).logits[0].double().numpy()
        for t, label in enumerate(labels.tolist()):
            row = (rows.ids[t].tolist(), rows.logprobs[t].tolist(), int(document[t + 1]))
            total += reference.measure_of("kl", *reference.outcomes_at(logits[t], *row, 1.0, "uniform", label))
            positions += 1
    assert measured == pytest.approx(total / positions, rel=1e-5)


def packed(documents: Sequence[np.ndarray], folder: Path) -> str:
    """The same documents, three packed into each row, as published: with as many rows as tokens."""
    teacher = tiny_model(7)
    header = header_for(exact_codec(), tiny_tokenizer(), alignment={"row": "t predicts t+1", "rows": "L"})
    with ShardWriter(folder, header) as writer:
        for start in range(0, len(documents), 3):
            group = documents[start : start + 3]
            rows = [teacher_rows(teacher, ids, rows=len(ids)) for ids in group]
            joined = SparseLogprobs(np.concatenate([r.ids for r in rows]), np.concatenate([r.logprobs for r in rows]))
            writer.write(np.concatenate(group), joined, segment_lengths=np.array([len(ids) for ids in group]))
    return str(folder)


@pytest.mark.slow
def test_packed_documents_do_not_see_each_other(parts: dict[str, str], tmp_path: Path) -> None:
    documents = random_documents(24)
    data = packed(documents, tmp_path / "packed")
    results = []
    for name, dataset in (("separate", parts["train"]), ("packed", data)):
        config = run_config(
            parts["student"],
            tmp_path / name,
            parts["train"],
            dataset,
            sequence_length=128,
            training_args={"max_steps": 1, "eval_on_start": True, "per_device_eval_batch_size": 4},
        )
        results.append(train(config)["eval_first"])
    for name in ("eval_positions", "eval_loss", "eval_kl", "eval_cross_entropy", "eval_top1_agreement"):
        assert results[1][name] == pytest.approx(results[0][name], rel=1e-5), name


@pytest.fixture(scope="module")
def packed_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return packed(random_documents(24), tmp_path_factory.mktemp("packed") / "data")


def one_step(
    parts: dict[str, str], output: Path, train_data: str, batch: int, accumulation: int, **arguments: Any
) -> RunConfig:
    """One step of plain gradient descent at rate 1 over 8 rows: the change of the weights is the gradient."""
    return run_config(
        parts["student"],
        output,
        train_data,
        sequence_length=128,
        loss_functions=[
            {"function": "cross_entropy", "weight": 1},
            {"function": "kl", "weight": 1, "temperature": 2.0, "missing_probability_handling": "uniform"},
            {"function": "kl", "weight": 2, "sparse_chunk_length": 5},
        ],
        training_args={
            "max_steps": 1,
            "optim": "sgd",
            "learning_rate": 1.0,
            "max_grad_norm": 0.0,
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            **arguments,
        },
    )


def gradient_of(parts: dict[str, str], output: Path) -> torch.Tensor:
    before, after = weights_of(parts["student"]), weights_of(output)
    return torch.cat([(before[name] - after[name]).double().flatten() for name in before])


@pytest.mark.parametrize("kind", ["padded", pytest.param("packed", marks=pytest.mark.slow)])
def test_loss_and_gradient_do_not_depend_on_how_a_step_is_cut(
    parts: dict[str, str], packed_data: str, tmp_path: Path, kind: str
) -> None:
    data = parts["train"] if kind == "padded" else packed_data
    results = []
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        output = tmp_path / f"{batch}x{accumulation}"
        train(one_step(parts, output, data, batch, accumulation, gradient_checkpointing=batch == 2))
        results.append((losses_of(output)[1], gradient_of(parts, output)))
    whole_loss, whole_gradient = results[0]
    # The weights' change is rounded to float32, hence the comparison of the whole vector.
    for loss, gradient in results[1:]:
        assert loss == pytest.approx(whole_loss, rel=1e-6)
        assert ((gradient - whole_gradient).norm() / whole_gradient.norm()).item() < 1e-6


@pytest.mark.slow
def test_packing_changes_neither_loss_nor_gradient(parts: dict[str, str], tmp_path: Path) -> None:
    """All 24 documents in one step: one a row, packed in full rows, and packed in rows of several micro-batches."""
    train(one_step(parts, tmp_path / "padded", parts["train"], 24, 1))
    loss, gradient = losses_of(tmp_path / "padded")[1], gradient_of(parts, tmp_path / "padded")
    tokens = sum(len(document) for document in random_documents(24))
    rows = -(-tokens // 128)
    for batch, accumulation in ((rows, 1), (1, rows)):
        output = tmp_path / f"packed-{batch}"
        train(one_step(parts, output, parts["train"], batch, accumulation, packing=True))
        assert json.loads((output / "summary.json").read_text())["train_tokens"] == tokens
        assert losses_of(output)[1] == pytest.approx(loss, rel=1e-6)
        packed_gradient = gradient_of(parts, output)
        assert ((packed_gradient - gradient).norm() / gradient.norm()).item() < 1e-6


def test_labels_of_named_ids_become_the_end_of_sequence(parts: dict[str, str], tmp_path: Path) -> None:
    """The same loss as data whose predicted ids were changed; what the student reads stays as it is."""
    documents = random_documents(4, seed=8)
    config = one_step(parts, tmp_path / "out", write_dataset(tmp_path / "data", documents), 4, 1)
    named = config.dataset.model_copy(update={"eos_label_token_ids": [5, 9]})
    summary = train(config.model_copy(update={"dataset": named, "loss_functions": config.loss_functions[:1]}))
    student = AutoModelForCausalLM.from_pretrained(parts["student"])
    entropy, positions = 0.0, 0
    for document in documents:
        with torch.no_grad():
            logits = student(torch.from_numpy(document).long()[None]).logits[0].double().numpy()
        for t, token in enumerate(document[1:].tolist()):
            entropy += reference.cross_entropy_at(logits[t], 1 if token in (5, 9) else token)
            positions += 1
    assert summary["steps"] == 1
    assert losses_of(tmp_path / "out")[1] == pytest.approx(entropy / positions, rel=1e-5)


def resumable(parts: dict[str, str], output: Path, **arguments: Any) -> RunConfig:
    """8 steps over 24 documents, 8 a step: the checkpoints are in the middle of the second epoch, and at its end."""
    return run_config(
        parts["student"],
        output,
        parts["train"],
        parts["eval"],
        training_args={
            "max_steps": 8,
            "gradient_accumulation_steps": 2,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "save_strategy": "steps",
            "save_steps": 2,
            **arguments,
        },
    )


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"packing": True, "per_device_train_batch_size": 1}], ids=["", "packed"])
def test_a_resumed_run_equals_the_uninterrupted_one(
    parts: dict[str, str], tmp_path: Path, settings: dict[str, Any]
) -> None:
    train(resumable(parts, tmp_path / "whole", **settings))
    expected = metrics_of(tmp_path / "whole")
    timing = (
        "tokens_per_second",
        "data_wait",
        "peak_memory_gb",
        "eval_runtime",
        "eval_samples_per_second",
        "eval_steps_per_second",
    )

    def comparable(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        kept = [entry for entry in entries if "loss" in entry or "eval_loss" in entry]
        return [{key: value for key, value in entry.items() if key not in timing} for entry in kept]

    for step in (4, 6):
        checkpoint = str(tmp_path / "whole" / f"checkpoint-{step}")
        output = tmp_path / f"resumed-{step}"
        train(resumable(parts, output, resume_from_checkpoint=checkpoint, **settings))
        assert comparable(metrics_of(output)) == [entry for entry in comparable(expected) if entry["step"] > step]
        whole = weights_of(tmp_path / "whole")
        assert all(torch.equal(value, whole[name]) for name, value in weights_of(output).items())

    # In its own folder, from the newest checkpoint: the file of metrics goes on where it was.
    train(resumable(parts, tmp_path / "whole", resume_from_checkpoint=True, max_steps=10, **settings))
    continued = comparable(metrics_of(tmp_path / "whole"))
    assert continued[: len(comparable(expected))] == comparable(expected)
    assert [entry["step"] for entry in continued if "loss" in entry] == list(range(1, 11))


def test_every_checkpoint_loads_with_its_tokenizer(parts: dict[str, str], tmp_path: Path) -> None:
    train(resumable(parts, tmp_path, max_steps=2))
    folder = tmp_path / "checkpoint-2"
    assert AutoModelForCausalLM.from_pretrained(folder).config.vocab_size == VOCABULARY
    assert fingerprint(AutoTokenizer.from_pretrained(folder)) == fingerprint(tiny_tokenizer())


@pytest.mark.slow
def test_a_full_disk_leaves_whole_checkpoints(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    train(resumable(parts, tmp_path / "expected"))
    honest = SignalTrainer._save_checkpoint

    def filling(self: SignalTrainer, *arguments: Any) -> None:
        """The second checkpoint finds half the room it needs."""
        if self.state.global_step == 4:
            size = sum(file.stat().st_size for file in (output / "checkpoint-2").iterdir())
            fill(output.parent / "filler")
            with (output.parent / "filler").open("r+b") as file:
                file.truncate((output.parent / "filler").stat().st_size - size // 2)
        honest(self, *arguments)

    with mounted(tmp_path / "disk", "size=20m"):
        output = tmp_path / "disk" / "student"
        with monkeypatch.context() as patch:
            patch.setattr(SignalTrainer, "_save_checkpoint", filling)
            with pytest.raises(OSError) as full:  # noqa: PT011 - its number and file are checked
                train(resumable(parts, output))
        assert full.value.errno == errno.ENOSPC
        assert full.value.filename == str(output / "checkpoint-4")
        assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]

        (tmp_path / "disk" / "filler").unlink()
        # What a run that was killed while it saved leaves.
        shutil.copytree(output / "checkpoint-2", output / "checkpoint-6")
        (output / "checkpoint-6" / "trainer_state.json").unlink()
        train(resumable(parts, output, resume_from_checkpoint=True))
        check_names(caplog.text, "checkpoint-6")
        assert losses_of(output) == losses_of(tmp_path / "expected")

        (output / "summary.json").unlink()  # as if it had been killed before the student was saved
        fill(tmp_path / "disk" / "filler")
        with refused(OSError, os.strerror(errno.ENOSPC)):
            train(resumable(parts, output, resume_from_checkpoint=True))


def test_long_documents_are_cut_split_or_left_out_as_asked(
    parts: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In training and evaluation, packed or not; unasked, at most a twentieth of the tokens is cut."""

    def run(name: str, overflow: str | None, limit: int = 16, **arguments: Any) -> dict[str, Any]:
        config = run_config(
            parts["student"],
            tmp_path / name,
            parts["train"],
            parts["eval"],
            sequence_length=limit,
            dataset={"overflow": overflow},
            training_args={"num_train_epochs": 1, "max_steps": -1, "eval_strategy": "epoch", **arguments},
        )
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="distillkit"):
            return train(config)

    lengths = np.array([len(document) for document in random_documents(24)])
    held_out = np.array([len(document) for document in random_documents(7, seed=1)])
    share = f"{np.maximum(lengths - 16, 0).sum() / lengths.sum():.1%}"
    with refused(ConfigError, "dataset.train_dataset", "dataset.overflow", "split", "cut", "drop", "16", share):
        run("asked", None)
    summary = run("cut", "cut", packing=True)
    assert summary["cut_documents"] == (lengths > 16).sum()
    assert summary["cut_tokens"] == np.maximum(lengths - 16, 0).sum()
    assert summary["train_tokens"] == np.minimum(lengths, 16).sum()
    assert summary["eval_last"]["eval_positions"] == (np.minimum(held_out, 16) - 1).sum()
    said = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert sum("dataset.train_dataset" in message and share in message for message in said) == 1
    summary = run("split", "split", packing=False)
    assert summary["cut_documents"] == 0
    assert summary["eval_last"]["eval_positions"] == (held_out - 1).sum()
    # Each piece after the first repeats two tokens.
    assert summary["train_tokens"] == lengths.sum() + 2 * np.maximum(-(-(lengths - 16) // 14), 0).sum()
    summary = run("drop", "drop", packing=True, eval_packing=False)
    assert summary["train_tokens"] == lengths[lengths <= 16].sum()
    assert summary["eval_last"]["eval_positions"] == (held_out[held_out <= 16] - 1).sum()
    summary = run("unasked", None, int(lengths.max()) - 1)
    assert summary["cut_tokens"] == (lengths == lengths.max()).sum()
    with refused(ConfigError, "dataset.overflow", "drop"):
        run("none", "drop", 2)


def test_a_masked_document_trains_nothing(parts: dict[str, str], tmp_path: Path) -> None:
    """One micro-batch of the step has no counted position at all."""
    teacher, documents = tiny_model(7), random_documents(2, seed=5)
    with ShardWriter(tmp_path / "data", header_for(exact_codec(), tiny_tokenizer())) as writer:
        for document, counted in zip(documents, (True, False), strict=True):
            mask = np.full(len(document), counted)
            writer.write(document, teacher_rows(teacher, document), loss_mask=mask)
    train(one_step(parts, tmp_path / "both", str(tmp_path / "data"), 1, 2))
    only = write_dataset(tmp_path / "only", documents[:1])
    train(one_step(parts, tmp_path / "one", only, 1, 1))
    assert losses_of(tmp_path / "both")[1] == pytest.approx(losses_of(tmp_path / "one")[1], rel=1e-6)
    both, one = gradient_of(parts, tmp_path / "both"), gradient_of(parts, tmp_path / "one")
    assert ((both - one).norm() / one.norm()).item() < 1e-6


def test_frozen_parameters_stay_and_the_rest_trains(parts: dict[str, str], tmp_path: Path) -> None:
    config = run_config(
        parts["student"],
        tmp_path,
        parts["train"],
        frozen_modules=["lm_head", "model.embed_tokens"],
        frozen_res=[r"layers\.0\."],
        training_args={"max_steps": 2},
    )
    train(config)
    before, after = weights_of(parts["student"]), weights_of(tmp_path)
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if "lm_head" in name or "embed" in name or ".layers.0." in name}


@pytest.mark.slow
def test_bf16_autocast_and_workers(parts: dict[str, str], tmp_path: Path) -> None:
    """Mixed precision copies a forward's outputs to float32; they are small, and the losses stay what they are."""
    losses = []
    for name, arguments in (("float32", {}), ("bf16", {"bf16": True, "dataloader_num_workers": 2})):
        train(
            run_config(parts["student"], tmp_path / name, parts["train"], training_args={"max_steps": 3, **arguments})
        )
        losses.append(list(losses_of(tmp_path / name).values()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.slow
def test_reading_processes_change_nothing(parts: dict[str, str], tmp_path: Path) -> None:
    """They are forked after the codec's threads have worked here, and read packed rows ahead."""
    losses = []
    for workers in (0, 2):
        arguments = {"packing": True, "per_device_train_batch_size": 1, "dataloader_num_workers": workers}
        config = run_config(parts["student"], tmp_path / str(workers), parts["train"], training_args=arguments)
        train(config)
        losses.append(losses_of(tmp_path / str(workers)))
    assert losses[0] == losses[1]


def test_a_loss_that_is_not_finite_ends_the_run(parts: dict[str, str], tmp_path: Path) -> None:
    arguments = {"optim": "sgd", "learning_rate": 1e30, "max_grad_norm": 0.0}
    with pytest.raises(DistillKitError, match=r"\b(nan|inf)\b.*\b2\b"):
        train(run_config(parts["student"], tmp_path, parts["train"], training_args=arguments))


# -- refused before the first step -------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_the_first_step(parts: dict[str, str], tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "eval", random_documents(3), tokenizer=tiny_tokenizer(prefix="other"))
    fingerprints = [fingerprint(tiny_tokenizer()), fingerprint(tiny_tokenizer(prefix="other"))]
    student, captured, golden = parts["student"], parts["train"], str(GOLDEN / "upstream_v1")
    for error, config, facts in (
        (MismatchError, (parts["other"], captured), ["dataset.train_dataset", *fingerprints]),
        (MismatchError, (student, captured, other), ["dataset.eval_dataset", *fingerprints]),
        (MismatchError, (student, golden), ["dataset.train_dataset", "49,152", "64"]),
        (ConfigError, (student, str(tmp_path / "nowhere")), ["dataset.train_dataset", str(tmp_path / "nowhere")]),
    ):
        model, *data = config
        with refused(error, *facts):
            train(run_config(model, tmp_path / "out", *data, dataset={"overflow": "cut"}))
    labels = run_config(student, tmp_path / "out", captured, dataset={"eos_label_token_ids": [3, 64]})
    with refused(ConfigError, "dataset.eos_label_token_ids", "64"):
        train(labels)
    for value, facts in ((True, [str(tmp_path / "out")]), ("elsewhere", ["'elsewhere'"])):
        with refused(ConfigError, "training_args.resume_from_checkpoint", *facts):
            train(resumable(parts, tmp_path / "out", resume_from_checkpoint=value))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


# -- published datasets ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "vocabulary", "key"),
    [("upstream_v1", 49152, None), ("upstream_legacy", 129280, "legacy_logit_compression")],
    ids=["codec-beside", "legacy-codec-in-configuration"],
)
def test_published_datasets_train(tmp_path: Path, name: str, vocabulary: int, key: str | None) -> None:
    student = save_student(
        tmp_path / "student", vocabulary=vocabulary, hidden_size=8, intermediate_size=8, num_hidden_layers=1
    )
    teacher: dict[str, Any] = {"kind": "dataset"}
    if key is not None:
        teacher[key] = yaml.safe_load((GOLDEN / name / "compression_config.yaml").read_text())
    config = run_config(
        student,
        tmp_path / "out",
        str(GOLDEN / name),
        str(GOLDEN / name),
        sequence_length=32,
        dataset={"num_samples": 4, "num_eval_samples": 1, "overflow": "cut"},
        teacher=teacher,
        training_args={
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "eval_on_start": True,
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
    )
    summary = train(config)
    assert summary["steps"] == 2
    assert 0 < summary["eval_last"]["eval_kl"] < summary["eval_first"]["eval_kl"]
    assert 0.5 < summary["eval_last"]["eval_teacher_mass"] < 1.01


# -- several processes -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_have_the_loss_and_gradient_of_one(
    parts: dict[str, str], tmp_path: Path, processes: Processes
) -> None:
    train(one_step(parts, tmp_path / "one", parts["train"], 8, 1))
    processes.train(one_step(parts, tmp_path / "two", parts["train"], 2, 2), tmp_path)
    assert losses_of(tmp_path / "two")[1] == pytest.approx(losses_of(tmp_path / "one")[1], rel=1e-6)
    one, two = gradient_of(parts, tmp_path / "one"), gradient_of(parts, tmp_path / "two")
    assert ((two - one).norm() / one.norm()).item() < 1e-6


@pytest.mark.slow
def test_two_processes_see_every_document_once_evaluate_alike_and_resume(
    parts: dict[str, str], tmp_path: Path, processes: Processes
) -> None:
    """23 documents do not divide among two processes of two: the last batches are filled with blanks."""
    settings: dict[str, Any] = {"dataset": {"num_samples": 23}}
    arguments = {"max_steps": 9, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 3}

    def config(output: Path, batch: int, accumulation: int, **more: Any) -> RunConfig:
        sizes = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "per_device_eval_batch_size": 3,
        }
        merged = {**arguments, **sizes, **more}
        return run_config(parts["student"], output, parts["train"], parts["eval"], training_args=merged, **settings)

    train(config(tmp_path / "one", 8, 1))
    processes.train(config(tmp_path / "two", 2, 2), tmp_path)
    # The order of sums differs, and grows over nine steps.
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    evaluations = [
        {
            entry["step"]: (entry["eval_kl"], entry["eval_positions"])
            for entry in metrics_of(tmp_path / name)
            if "eval_kl" in entry
        }
        for name in ("one", "two")
    ]
    for step, (kl, positions) in evaluations[0].items():
        assert evaluations[1][step] == (pytest.approx(kl, rel=1e-4), positions)
    tokens = [json.loads((tmp_path / name / "summary.json").read_text())["train_tokens"] for name in ("one", "two")]
    assert tokens[0] == tokens[1]
    # Step 4 is in the second epoch.
    checkpoint = str(tmp_path / "two" / "checkpoint-4")
    processes.train(config(tmp_path / "resumed", 2, 2, resume_from_checkpoint=checkpoint), tmp_path)
    expected = {step: loss for step, loss in losses_of(tmp_path / "two").items() if step > 4}
    assert losses_of(tmp_path / "resumed") == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_bytes_are_decoded_there(parts: dict[str, str], tmp_path: Path) -> None:
    results = []
    for name, arguments in (("cpu", {"use_cpu": True}), ("cuda", {"bf16": False})):
        merged = {"max_steps": 3, "eval_on_start": True, **arguments}
        config = run_config(
            parts["student"],
            tmp_path / name,
            parts["train"],
            parts["eval"],
            use_flash_attention=False,
            training_args=merged,
        )
        results.append((train(config)["eval_first"]["eval_kl"], losses_of(tmp_path / name)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-3)


@pytest.mark.parametrize("part", ["train", "eval"])
def test_documents_of_which_no_token_counts_are_refused(parts: dict[str, str], tmp_path: Path, part: str) -> None:
    """Before training, which would save the student as it was, or train an epoch and then fail."""
    teacher = tiny_model(7)
    with ShardWriter(tmp_path / "masked", header_for(exact_codec(), tiny_tokenizer())) as writer:
        for document in random_documents(4):
            writer.write(document, teacher_rows(teacher, document), loss_mask=np.zeros(len(document), bool))
    places = {"train": parts["train"], "eval": parts["eval"], part: str(tmp_path / "masked")}
    config = run_config(parts["student"], tmp_path / "out", places["train"], places["eval"])
    with refused(ConfigError, f"dataset.{part}_dataset"):
        _ = Run(config).datasets

"""Several live teachers: each teaches the rows that it matches; where several do, their probabilities are averaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from distillkit.cli.main import cli
from distillkit.errors import ConfigError, MismatchError
from distillkit.shards import ShardWriter
from distillkit.training.config.schema import RunConfig
from distillkit.training.run import train
from support import reference
from support.refusals import refused
from support.training import (
    exact_codec,
    header_for,
    metrics_of,
    random_documents,
    run_config,
    save_student,
    teacher_rows,
    tiny_model,
    tiny_tokenizer,
)

pytestmark = pytest.mark.usefixtures("without_plots")

LANGUAGES = ("de", "en", "fr")
DOCUMENTS = random_documents(9, seed=11, longest=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, text with a column, and the same documents captured with it."""
    folder = tmp_path_factory.mktemp("several")
    save_student(folder / "first", seed=7)
    save_student(folder / "second", seed=8, hidden_size=48, num_hidden_layers=3)
    rows = [
        {"text": " ".join(f"t{token}" for token in ids), "lang": LANGUAGES[n % 3]} for n, ids in enumerate(DOCUMENTS)
    ]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codec = exact_codec()
    kept = pa.schema([("lang", pa.string())])
    with ShardWriter(folder / "captured", header_for(codec, tiny_tokenizer()), kept=kept) as writer:
        for row, ids in zip(rows, DOCUMENTS, strict=True):
            writer.write(ids, teacher_rows(tiny_model(7), ids), columns={"lang": row["lang"]})
    return folder


def taught(parts: dict[str, str], folder: Path, output: Path, teachers: list[dict[str, Any]], **more: Any) -> RunConfig:
    """A step over all documents, evaluated before."""
    dataset = {"prepared_dataset_path": str(folder / "prepared"), **more.pop("dataset", {})}
    listed = [{"kind": "hf", **teacher, "path": str(folder / teacher["path"])} for teacher in teachers]
    arguments = {
        "max_steps": 1,
        "eval_on_start": True,
        "per_device_train_batch_size": 9,
        "per_device_eval_batch_size": 4,
        **more.pop("training_args", {}),
    }
    data = more.pop("data", str(folder / "text.jsonl"))
    return run_config(
        parts["student"], output, data, data, dataset=dataset, teachers=listed, training_args=arguments, **more
    )


@torch.no_grad()
def distributions(path: Path | str, ids: np.ndarray) -> np.ndarray:
    """A model's whole distributions (L − 1, V), float64."""
    model = AutoModelForCausalLM.from_pretrained(path).double()
    return np.asarray(model(torch.from_numpy(ids).long()[None]).logits[0, :-1].softmax(-1).numpy())


@pytest.mark.parametrize(("data", "packing"), [("text.jsonl", True), ("captured", False)])
def test_rows_are_taught_by_those_that_match_them(
    parts: dict[str, str], folder: Path, tmp_path: Path, data: str, packing: bool
) -> None:
    """The KL and the loss of a step, against whole distributions in float64: German is taught by the first teacher,
    French by the second, English by both, at 3 to 1."""
    teachers = [
        {"path": "first", "where": {"lang": ["de", "en"]}, "weight": 3},
        {"path": "second", "where": {"lang": ["en", "fr"]}},
    ]
    config = taught(
        parts, folder, tmp_path / "out", teachers, data=str(folder / data), training_args={"packing": packing}
    )
    measured = train(config)["eval_first"]
    kl, positions = 0.0, 0
    for number, ids in enumerate(DOCUMENTS):
        one, two = (distributions(folder / name, ids) for name in ("first", "second"))
        p = {"de": one, "fr": two, "en": 0.75 * one + 0.25 * two}[LANGUAGES[number % 3]]
        q = distributions(parts["student"], ids)
        kl += float((p * (np.log(p) - np.log(q))).sum())
        positions += len(ids) - 1
    assert measured["eval_positions"] == positions
    assert measured["eval_kl"] == pytest.approx(kl / positions, rel=1e-4)
    step = next(entry for entry in metrics_of(tmp_path / "out") if "loss" in entry)
    assert step["kl"] == pytest.approx(kl / positions, rel=1e-4)


def test_the_first_ids_of_the_average(parts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    """With top_k, those of the averaged distribution, and the rest is missing."""
    teachers = [{"path": "first", "top_k": 5}, {"path": "second", "top_k": 5}]
    measured = train(taught(parts, folder, tmp_path, teachers))["eval_first"]
    kl, positions = 0.0, 0
    for ids in DOCUMENTS:
        p = 0.5 * distributions(folder / "first", ids) + 0.5 * distributions(folder / "second", ids)
        q = np.log(distributions(parts["student"], ids))
        for t in range(len(p)):
            best = np.argsort(-p[t], kind="stable")[:5]
            kl += reference.measure_of(
                "kl", *reference.outcomes_at(q[t], best.tolist(), np.log(p[t][best]).tolist(), 0, 1.0, "uniform")
            )
            positions += 1
    assert measured["eval_kl_with_rest"] == pytest.approx(kl / positions, rel=1e-4)


def test_what_does_not_fit_is_refused_by_name(parts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    german = {"path": "first", "where": {"lang": "de"}}
    for data in ("text.jsonl", "captured"):
        with refused(MismatchError, "dataset.train_dataset", "lang", "en"):
            train(taught(parts, folder, tmp_path / "out", [german], data=str(folder / data)))
        lacking = {"path": "first", "where": {"topic": 1}}
        with refused(MismatchError, "topic"):
            train(taught(parts, folder, tmp_path / "out", [lacking], data=str(folder / data)))
    with refused(MismatchError, "teachers.1.path", parts["other"]):
        train(taught(parts, folder, tmp_path / "out", [german, {"path": parts["other"]}]))
    with refused(ConfigError, "teachers.1.path"):
        train(taught(parts, folder, tmp_path / "out", [german, {"path": "nothing"}]))
    with refused(ConfigError, "teachers.1.weight"):
        taught(parts, folder, tmp_path / "out", [german, {"path": "second", "weight": 0}])
    with refused(ConfigError, "teachers", "teacher"):
        taught(parts, folder, tmp_path / "out", [german], teacher={"kind": "hf", "path": "first"})
    with refused(ConfigError, "teachers.1.top_k"):
        taught(parts, folder, tmp_path / "out", [german, {"path": "second", "top_k": 5}])
    hidden = [{"function": "hs_mse", "weight": 1}]
    with refused(ConfigError, "layer_mapping", "teachers"):
        taught(parts, folder, tmp_path / "out", [german], loss_functions=hidden, layer_mapping="all")


def test_a_dry_run_lists_them_and_another_weight_is_another_run(
    parts: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    teachers = [{"path": "first", "where": {"lang": "de"}}, {"path": "second", "weight": 2}]
    saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    config = taught(parts, folder, tmp_path / "out", teachers, training_args=saving)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    result = CliRunner().invoke(cli, [str(path), "--dry-run", "--json"], catch_exceptions=False)
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.exit_code == 0, result.output
    assert len(checks["teacher"]["teachers"]) == 2
    sizes = [sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder / n).parameters()) for n in ("first",)]
    assert checks["memory"]["teacher_bytes"] > 4 * sizes[0] * 1.5

    train(config)
    assert "first" in (tmp_path / "out" / "report.md").read_text()
    resumed = {**saving, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-1")}
    other = [teachers[0], {**teachers[1], "weight": 3}]
    with refused(MismatchError, "teachers.1.weight", "2.0", "3.0"):
        train(taught(parts, folder, tmp_path / "other", other, training_args=resumed))
    train(taught(parts, folder, tmp_path / "again", teachers, training_args=resumed))
    losses = [
        {entry["step"]: entry["loss"] for entry in metrics_of(tmp_path / name) if "loss" in entry}
        for name in ("out", "again")
    ]
    assert losses[1] == {2: losses[0][2]}

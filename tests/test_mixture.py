"""Several datasets in one run: how often and in which order they are read, whose rows are which, metrics of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from distillkit.cli.main import cli
from distillkit.codec import Codec, CompactConfig, SampledConfig, draws_from_logits, uniforms
from distillkit.errors import ConfigError, InputError, MismatchError
from distillkit.shards import ShardWriter
from distillkit.training.config.file import parse_config
from distillkit.training.config.schema import RunConfig
from distillkit.training.data.examples import BLANK
from distillkit.training.data.mixture import MixtureOrder
from distillkit.training.distillation import DistillationTrainer
from distillkit.training.run import train
from support.processes import Processes
from support.refusals import refused
from support.training import (
    VOCABULARY,
    exact_codec,
    header_for,
    losses_of,
    metrics_of,
    random_documents,
    run_config,
    tiny_model,
    tiny_tokenizer,
    write_dataset,
)

FSDP = str(Path(__file__).parent / "support" / "launch_fsdp.py")

pytestmark = pytest.mark.usefixtures("without_plots")


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Captures of two teachers, in three codecs, with other numbers of ids."""
    folder = tmp_path_factory.mktemp("captures")
    return {
        "chat": write_dataset(folder / "chat", random_documents(9, seed=2, longest=30)),
        "code": write_dataset(folder / "code", random_documents(5, seed=3), codec=exact_codec(k=20), seed=8),
        "math": write_dataset(
            folder / "math",
            random_documents(4, seed=4),
            codec=Codec(CompactConfig(vocab_size=64, k=12, step=0.01)),
            seed=8,
        ),
    }


def mixed(student: str, output: Path, train_dataset: list[dict[str, Any]], **settings: Any) -> RunConfig:
    """A run on a list of datasets."""
    dataset = {"train_dataset": train_dataset, **settings.pop("dataset", {})}
    return run_config(student, output, "", dataset=dataset, **settings)


@torch.no_grad()
def drawn_dataset(folder: Path, documents: list[np.ndarray]) -> str:
    """A capture in the format sampled."""
    codec, teacher = Codec(SampledConfig(vocab_size=VOCABULARY, draws=20)), tiny_model(7)
    with ShardWriter(folder, header_for(codec, tiny_tokenizer())) as writer:
        for ids in documents:
            logits = teacher(torch.from_numpy(ids).long()[None]).logits[0, :-1].numpy()
            writer.write(ids, draws_from_logits(logits, uniforms(ids, len(logits), 20)))
    return str(folder)


# -- how often, and in which order -------------------------------------------------------------------------------------


def test_an_epoch_depends_on_seed_and_epoch_alone_and_uses_all_documents_alike() -> None:
    sizes, taken = [10, 4, 3], [5, 6, 3]
    order = MixtureOrder(sizes, taken, seed=3, multiple=4)
    epochs = []
    for epoch in range(6):
        order.set_epoch(epoch)
        found = list(order)
        assert len(found) == len(order) == 16
        assert found[14:] == [BLANK, BLANK]
        counts = np.bincount(found[:14], minlength=17)
        assert [counts[:10].sum(), counts[10:14].sum(), counts[14:].sum()] == taken
        epochs.append(found)
        used = np.bincount([index for each in epochs for index in each[:14]], minlength=17)
        for start, stop in ((0, 10), (10, 14), (14, 17)):
            assert np.ptp(used[start:stop]) <= 1, f"after epoch {epoch}, some are used more often than others"
    again = MixtureOrder(sizes, taken, seed=3)
    for epoch in (4, 1):
        again.set_epoch(epoch)
        assert list(again) == epochs[epoch][:14], "whatever came before, and whatever the batches"
    assert len({tuple(each) for each in epochs}) == 6
    assert list(MixtureOrder(sizes, taken, seed=4)) != epochs[0][:14]
    assert list(MixtureOrder([2, 3], [3, 2], seed=None)) == [0, 1, 0, 2, 3], "sequential: as they are listed"


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([{"weight": 0}, {}], "dataset.train_dataset.0.weight: must be greater than 0, found 0"),
        ([{}, {"weight": -2}], "dataset.train_dataset.1.weight: must be greater than 0, found -2"),
        ([{"weight": float("nan")}], "dataset.train_dataset.0.weight: must be a finite number, found nan"),
        ([{"weight": True}], "dataset.train_dataset.0.weight"),
        ([{"epochs": 0.0}], "dataset.train_dataset.0.epochs: must be greater than 0"),
        ([{"weight": 2}, {"epochs": 2}], "dataset.train_dataset.1.epochs: entry 0 has a weight"),
        ([{"name": "a"}, {"name": "a"}], "dataset.train_dataset.1.name: 'a'"),
        ([{"wieght": 1}], "dataset.train_dataset.0.wieght: unknown key; did you mean 'weight'?"),
        ([], "dataset.train_dataset: must be a list of length 1 or more"),
    ],
)
def test_wrong_shares_are_refused_by_name(entries: list[dict[str, Any]], problem: str) -> None:
    content = {"train_dataset": [{"disk_path": f"./data-{n}", **entry} for n, entry in enumerate(entries)]}
    with pytest.raises(ConfigError) as caught:
        parse_config(
            {"model": "m", "output_path": "o", "sequence_length": 8, "dataset": content, "teacher": {"kind": "dataset"}}
        )
    assert problem in str(caught.value)


def test_what_is_for_lists_or_not_for_them(captures: dict[str, str], tmp_path: Path) -> None:
    with refused(ConfigError, "dataset.train_dataset.weight"):
        mixed("student", tmp_path, {"disk_path": captures["chat"], "weight": 2})  # type: ignore[arg-type]
    with refused(ConfigError, "dataset.num_samples", "num_samples"):
        mixed("student", tmp_path, [{"disk_path": captures["chat"]}], dataset={"num_samples": 3})
    with refused(ConfigError, "dataset.eval_dataset.0.epochs"):
        mixed(
            "student",
            tmp_path,
            [{"disk_path": captures["chat"]}],
            dataset={"eval_dataset": [{"disk_path": captures["chat"], "epochs": 2}]},
        )
    wanted = {"metric_for_best_model": "eval_kl/chta", "eval_strategy": "epoch"}
    evaluated = {"eval_dataset": [{"disk_path": captures["chat"]}]}
    with refused(ConfigError, "training_args.metric_for_best_model", "kl/chat"):
        mixed("student", tmp_path, [{"disk_path": captures["chat"]}], dataset=evaluated, training_args=wanted)


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_each_dataset_has_the_metrics_that_it_has_alone(
    parts: dict[str, str], captures: dict[str, str], tmp_path: Path
) -> None:
    """Whatever the codecs and numbers of ids of the others in its batches; and all together have their mean."""

    def once(name: str, data: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        summary = train(
            run_config(
                parts["student"],
                tmp_path / name,
                "",
                dataset={"train_dataset": data, "eval_dataset": data},
                loss_functions=[
                    {"function": "cross_entropy", "weight": 0.25},
                    {"function": "kl", "weight": 0.5, "missing_probability_handling": "uniform"},
                    {"function": "jsd", "weight": 0.25, "missing_probability_handling": "label"},
                ],
                training_args={"max_steps": 1, "eval_on_start": True, "per_device_train_batch_size": 18},
            )
        )
        return summary["eval_first"], summary["train_last"]

    together, step = once("all", [{"disk_path": path} for path in captures.values()])
    total = {"eval_kl": 0.0, "eval_loss": 0.0, "loss": 0.0}
    positions = 0
    for name, path in captures.items():
        alone, alone_step = once(name, {"disk_path": path})
        count = alone["eval_positions"]
        measured = [metric for metric in alone if metric.startswith("eval_") and f"{metric}/{name}" in together]
        assert {"eval_kl", "eval_loss", "eval_topk_overlap", "eval_student_mass", "eval_jsd"} <= set(measured)
        for metric in measured:
            assert together[f"{metric}/{name}"] == pytest.approx(alone[metric], rel=2e-5), metric
        for metric in ("loss", "kl", "jsd", "cross_entropy"):
            assert step[f"{metric}/{name}"] == pytest.approx(alone_step[metric], rel=2e-5), metric
        assert step[f"positions/{name}"] == count == together[f"eval_positions/{name}"]
        for metric in total:
            total[metric] += count * (alone_step if metric == "loss" else alone)[metric]
        positions += count
    assert together["eval_positions"] == positions
    for metric, value in total.items():
        assert (step if metric == "loss" else together)[metric] == pytest.approx(value / positions, rel=2e-5), metric


def test_weights_are_shares_of_the_tokens_and_a_resumed_run_is_the_same(
    parts: dict[str, str], captures: dict[str, str], tmp_path: Path
) -> None:
    """Also with reading processes. 13 documents an epoch, 4 a step: the checkpoint is in the second epoch."""
    entries = [
        {"disk_path": captures["chat"], "weight": 1, "num_samples": 8},
        {"disk_path": captures["code"], "weight": 3, "name": "programs"},
    ]

    def config(output: Path, entries: list[dict[str, Any]] = entries, **arguments: Any) -> RunConfig:
        settings = {"max_steps": 7, "save_strategy": "steps", "save_steps": 5, **arguments}
        return mixed(parts["student"], output, entries, training_args=settings)

    train(config(tmp_path / "whole"))
    logs = metrics_of(tmp_path / "whole")
    sources = logs[0]["run"]["data"]["train"]["sources"]
    assert [source["name"] for source in sources] == ["chat", "programs"]
    assert [source["documents"] for source in sources] == [8, 5]
    tokens = sum(len(document) for document in random_documents(5, seed=3))
    chosen = json.loads(json.dumps(sources))
    share = chosen[1]["passes"] * tokens
    assert chosen[1]["share"] == pytest.approx(0.75, abs=0.04), "whole documents come as near as this"
    rest = share * chosen[0]["share"] / chosen[1]["share"]
    average = rest / (chosen[0]["passes"] * 8)
    assert share + rest == pytest.approx(tokens + 8 * average, rel=0.06), "an epoch is as long as all together"

    resumed = config(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    train(resumed)
    expected = losses_of(tmp_path / "whole")
    assert losses_of(tmp_path / "resumed") == {step: loss for step, loss in expected.items() if step > 5}
    train(config(tmp_path / "workers", dataloader_num_workers=2))
    assert losses_of(tmp_path / "workers") == expected

    other = [entries[0], {**entries[1], "weight": 1}]
    with refused(MismatchError, "dataset.train_dataset"):
        train(config(tmp_path / "other", other, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5")))


@pytest.mark.slow
@pytest.mark.parametrize("script", [None, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_have_the_losses_and_the_metrics_of_one(
    parts: dict[str, str], captures: dict[str, str], tmp_path: Path, processes: Processes, script: str | None
) -> None:
    entries = [{"disk_path": captures["chat"], "epochs": 1.5}, {"disk_path": captures["math"], "epochs": 0.5}]

    def config(output: Path, **sizes: Any) -> RunConfig:
        arguments = {"max_steps": 5, "eval_strategy": "steps", "eval_steps": 5, **sizes}
        held_out = [{"disk_path": captures["code"]}, {"disk_path": captures["math"]}]
        return mixed(parts["student"], output, entries, dataset={"eval_dataset": held_out}, training_args=arguments)

    train(config(tmp_path / "one", per_device_train_batch_size=4))
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "fsdp": script is not None}
    processes.train(config(tmp_path / "two", **sizes), tmp_path, script)
    for one, two in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two"), strict=True):
        for metric, value in one.items():
            if "/" in metric or metric in ("loss", "eval_loss"):
                assert two[metric] == pytest.approx(value, rel=1e-4), metric


def test_packed_and_live(parts: dict[str, str], captures: dict[str, str], tmp_path: Path) -> None:
    """A live teacher reads text and captures alike; packed rows are of one dataset each."""
    text = tmp_path / "text.jsonl"
    rows = [{"input_ids": document.tolist()} for document in random_documents(6, seed=5)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = train(
        mixed(
            parts["student"],
            tmp_path / "out",
            [{"disk_path": str(text)}, {"disk_path": captures["code"], "epochs": 2}],
            dataset={
                "eval_dataset": [{"disk_path": captures["chat"]}],
                "prepared_dataset_path": str(tmp_path / "kept"),
            },
            teacher={"kind": "hf", "path": parts["teacher"]},
            training_args={"packing": True, "max_steps": 3, "eval_strategy": "steps", "eval_steps": 3},
        )
    )
    entries = [entry for entry in metrics_of(tmp_path / "out") if "loss" in entry]
    assert all(entry[f"positions/{name}"] > 0 for name in ("text.jsonl", "code") for entry in entries[:1])
    assert summary["eval_last"]["eval_kl/chat"] == pytest.approx(summary["eval_last"]["eval_kl"])


def test_what_does_not_fit_is_named_by_its_place_in_the_list(
    parts: dict[str, str], captures: dict[str, str], tmp_path: Path
) -> None:
    first = {"disk_path": captures["chat"]}
    other = write_dataset(tmp_path / "other", random_documents(3), tokenizer=tiny_tokenizer(prefix="x"))
    with refused(MismatchError, "dataset.train_dataset.1", "tokenizer"):
        train(mixed(parts["student"], tmp_path / "out", [first, {"disk_path": other}]))
    drawn = drawn_dataset(tmp_path / "drawn", random_documents(3))
    kl = [{"function": "kl", "weight": 1}]
    train(mixed(parts["student"], tmp_path / "draws", [{"disk_path": drawn}] * 2, loss_functions=kl))
    with refused(ConfigError, "dataset.train_dataset.1", "dataset.train_dataset.0", "draws"):
        train(mixed(parts["student"], tmp_path / "out", [first, {"disk_path": drawn}], loss_functions=kl))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "t1 t2 t3"}\n')
    with refused(InputError, "dataset.train_dataset.1", "teacher.kind"):
        train(mixed(parts["student"], tmp_path / "out", [first, {"disk_path": str(text)}]))
    with refused(ConfigError, "dataset.train_dataset.1.disk_path"):
        train(mixed(parts["student"], tmp_path / "out", [first, {"disk_path": str(tmp_path / "nothing")}]))
    with refused(ConfigError, "dataset.train_dataset.1.epochs", "0.001"):
        train(mixed(parts["student"], tmp_path / "out", [first, {"disk_path": captures["code"], "epochs": 0.001}]))


def test_a_dry_run_and_the_reports_list_the_datasets(
    parts: dict[str, str], captures: dict[str, str], tmp_path: Path
) -> None:
    listed = [{"disk_path": captures["chat"]}, {"disk_path": captures["math"], "epochs": 2}]
    config = mixed(
        parts["student"],
        tmp_path / "out",
        listed,
        dataset={"eval_dataset": listed[:1]},
        training_args={"eval_on_start": True, "eval_strategy": "epoch"},
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    result = CliRunner().invoke(cli, [str(path), "--dry-run", "--json"], catch_exceptions=False)
    checks = {check["name"]: check for check in json.loads(result.stdout)["checks"]}
    assert result.exit_code == 0, result.output
    assert checks["data"]["train"]["math"]["documents"] == 4
    assert checks["data"]["train"]["math"]["bytes"] > 1000
    shares = {each["name"]: each for each in checks["steps"]["sources"]}
    assert (shares["chat"]["passes"], shares["math"]["passes"]) == (1.0, 2.0)
    assert shares["chat"]["share"] + shares["math"]["share"] == pytest.approx(1)

    train(config)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| math | 4 |" in report
    page = CliRunner().invoke(cli, ["report", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")])
    assert page.exit_code == 0, page.output
    assert "chat 8" in (tmp_path / "page.html").read_text() or "chat 0" in (tmp_path / "page.html").read_text()


def test_from_python(parts: dict[str, str], captures: dict[str, str], tmp_path: Path) -> None:
    from distillkit import Dataset

    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(parts["student"]),
        processing_class=tiny_tokenizer(),
        train_dataset=[Dataset.open(captures["chat"]), {"disk_path": captures["math"], "weight": 1.0}],
        args={"output_dir": str(tmp_path), "max_steps": 1, "report_to": "none", "save_strategy": "no"},
    )
    trainer.train()
    found = trainer.evaluate([captures["code"], Dataset.open(captures["math"])])
    alone = trainer.evaluate(captures["math"])
    assert found["eval_kl/math"] == pytest.approx(alone["eval_kl"], rel=1e-5)
    with refused(ConfigError, "eval_dataset.0.weight"):
        trainer.evaluate([{"disk_path": captures["code"], "weight": 2}])

"""Several teachers, live and served: each teaches the rows that it matches; where several do, their probabilities are
averaged."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from distillkit.cli.main import cli
from distillkit.errors import CaptureError, ConfigError, DistillKitError, MismatchError
from distillkit.shards import Dataset, ShardWriter
from distillkit.training.config.schema import RunConfig
from distillkit.training.dry_run import dry_run
from distillkit.training.run import Run, train
from distillkit.training.signals.server import TeacherServer
from support import reference
from support.refusals import check_names, refused
from support.served import Reply, answering, answers_of, server, serving
from support.training import (
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
)

pytestmark = pytest.mark.usefixtures("without_plots")

LANGUAGES = ("de", "en", "fr")
DOCUMENTS = random_documents(9, seed=11, longest=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three teachers, rows with a column, and the same documents captured with it."""
    folder = tmp_path_factory.mktemp("several")
    save_student(folder / "first", seed=7)
    save_student(folder / "second", seed=8, hidden_size=48, num_hidden_layers=3)
    save_student(folder / "third", seed=9)
    rows = [{"input_ids": ids.tolist(), "lang": LANGUAGES[n % 3]} for n, ids in enumerate(DOCUMENTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codec = exact_codec()
    kept = pa.schema([("lang", pa.string())])
    with ShardWriter(folder / "captured", header_for(codec, tiny_tokenizer()), kept=kept) as writer:
        for row, ids in zip(rows, DOCUMENTS, strict=True):
            writer.write(ids, teacher_rows(tiny_model(7), ids), columns={"lang": row["lang"]})
    return folder


def taught(parts: dict[str, str], folder: Path, output: Path, teachers: list[dict[str, Any]], **more: Any) -> RunConfig:
    """A step over all documents, evaluated before."""
    dataset = {"prepared_dataset_path": str(folder / "prepared"), **more.pop("dataset", {})}
    listed = [
        {**teacher, "model": str(folder / teacher["model"])}
        if "model" in teacher
        else {"kind": "hf", **teacher, "path": str(folder / teacher["path"])}
        for teacher in teachers
    ]
    arguments = {
        "max_steps": 1,
        "eval_on_start": True,
        "per_device_train_batch_size": 9,
        "per_device_eval_batch_size": 4,
        **more.pop("training_args", {}),
    }
    data = more.pop("data", str(folder / "rows.jsonl"))
    return run_config(
        parts["student"], output, data, data, dataset=dataset, teachers=listed, training_args=arguments, **more
    )


@torch.no_grad()
def distributions(path: Path | str, ids: np.ndarray) -> np.ndarray:
    """A model's whole distributions (L − 1, V), float64."""
    model = AutoModelForCausalLM.from_pretrained(path).double()
    return np.asarray(model(torch.from_numpy(ids).long()[None]).logits[0, :-1].softmax(-1).numpy())


@pytest.mark.parametrize(("data", "packing"), [("rows.jsonl", True), ("captured", False)])
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
    for data in ("rows.jsonl", "captured"):
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
    with refused(ConfigError, "teachers", "63"):
        taught(parts, folder, tmp_path / "out", [german] * 64)


@pytest.mark.parametrize("mapping", [None, "all"])
def test_losses_of_hidden_states_say_once_which_teacher_they_need(
    parts: dict[str, str], folder: Path, tmp_path: Path, mapping: str | None
) -> None:
    live, asked = {"path": "first", "top_k": 5}, served("http://localhost:1/v1", "second", 4)
    settings: dict[str, Any] = {"loss_functions": [{"function": "hs_mse", "weight": 1}], "layer_mapping": mapping}
    for teachers, facts in (
        ([live, asked], ["hs_mse", "several"]),
        ([asked, live], ["hs_mse", "several"]),
        ([live, live], ["hs_mse", "several"]),
        ([asked], ["hs_mse", "server", "teachers.0.kind"]),
    ):
        with pytest.raises(ConfigError) as error:
            taught(parts, folder, tmp_path, teachers, **settings)
        check_names(str(error.value), *facts)
        assert str(error.value).count("loss_functions:") == 1
        assert "layer_mapping:" not in str(error.value)


def test_a_member_whose_head_does_not_fit_is_named(
    parts: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head with fewer rows than the tokenizer has ids, before training; one that is not reproduced."""
    beyond = max(int(ids.max()) for ids in DOCUMENTS)
    save_student(tmp_path / "narrow", seed=7, vocab_size=beyond)
    teachers = [{"path": "first", "top_k": 5}, {"path": str(tmp_path / "narrow"), "top_k": 5}]
    for data in ("rows.jsonl", "captured"):
        with refused(MismatchError, "dataset.train_dataset", "teachers.1", str(beyond)):
            _ = Run(taught(parts, folder, tmp_path / "out", teachers, data=str(folder / data))).datasets
    forward = LlamaForCausalLM.forward

    def doubled(self: Any, *arguments: Any, **settings: Any) -> Any:
        output = forward(self, *arguments, **settings)
        output.logits = output.logits * (2 if self.config.num_hidden_layers == 3 else 1)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with refused(DistillKitError, "teachers.1.path", "LlamaForCausalLM"):
        _ = Run(taught(parts, folder, tmp_path / "out", [{"path": "first"}, {"path": "second"}])).live


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


# -- served teachers ---------------------------------------------------------------------------------------------------


def served(url: str, model: str, top_k: int, **settings: Any) -> dict[str, Any]:
    given = {"kind": "server", "base_url": url, "model": model, "top_k": top_k, "max_retries": 0}
    return {**given, "concurrency": 2, **settings}


def model_of(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path).eval()


def asked(requests: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """What was asked since the last call, in any order, without the probe."""
    found = sorted(tuple(request["prompt"]) for request in requests if request["prompt"] != [1, 2, 3])
    requests.clear()
    return found


def first_ids(p: np.ndarray, k: int) -> dict[int, float]:
    """The k most probable ids of a distribution, with their probabilities."""
    return {int(i): float(p[i]) for i in np.argsort(-p, kind="stable")[:k]}


def mixture(known: list[tuple[float, dict[int, float]]]) -> dict[int, float]:
    """Of each id what is known of the average: the definition in docs/several.md."""
    total = sum(weight for weight, _ in known)
    ids = {i for _, row in known for i in row}
    return {i: sum(weight * row.get(i, 0.0) for weight, row in known) / total for i in ids}


def test_served_teachers_have_their_rows_and_their_shares(parts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    """Against float64: German by the first server, English by both, French by the second and two live teachers. The
    servers give different numbers of ids, and what they know of the labels."""
    pytest.importorskip("openai")
    paths = [folder / name for name in ("first", "second", "third")]
    uniform = [{"function": "kl", "weight": 1.0, "missing_probability_handling": "uniform"}]
    with answering(model_of(paths[0])) as (one, of_one), answering(model_of(paths[1])) as (two, of_two):
        teachers = [
            served(one, "first", 6, label_logprobs=True, where={"lang": ["de", "en"]}, weight=3),
            {"path": "first", "top_k": 5, "where": {"lang": "fr"}, "weight": 2},
            served(two, "second", 4, label_logprobs=True, where={"lang": ["en", "fr"]}),
            {"path": "third", "top_k": 5, "where": {"lang": "fr"}},
        ]
        config = taught(parts, folder, tmp_path, teachers, loss_functions=uniform, training_args={"packing": True})
        measured = train(config)["eval_first"]
        for requests, languages in ((of_one, "de en"), (of_two, "en fr")):
            own = [tuple(ids.tolist()) for n, ids in enumerate(DOCUMENTS) if LANGUAGES[n % 3] in languages]
            assert set(asked(requests)) == set(own)
    with_rest, trained, positions = 0.0, 0.0, 0
    for number, ids in enumerate(DOCUMENTS):
        language = LANGUAGES[number % 3]
        first, second, third = (distributions(path, ids) for path in paths)
        live = (2 * first + third) / 3
        q = np.log(distributions(parts["student"], ids))
        for t, label in enumerate(ids[1:].tolist()):
            row, y = {
                "de": (first_ids(first[t], 6), first[t, label]),
                "en": (
                    mixture([(3, first_ids(first[t], 6)), (1, first_ids(second[t], 4))]),
                    0.75 * first[t, label] + 0.25 * second[t, label],
                ),
                # A live teacher does not say what it knows of the label, and so the average does not, either.
                "fr": (mixture([(3, first_ids(live[t], 5)), (1, first_ids(second[t], 4))]), math.nan),
            }[language]
            values = [math.log(p) for p in row.values()]
            compared = [list(row), values, label, 1.0, "uniform"]
            with_rest += reference.measure_of("kl", *reference.outcomes_at(q[t], *compared))
            trained += reference.measure_of("kl", *reference.outcomes_at(q[t], *compared, np.log(y)))
            positions += 1
    assert measured["eval_positions"] == positions
    assert measured["eval_kl_with_rest"] == pytest.approx(with_rest / positions, rel=1e-4)
    step = next(entry for entry in metrics_of(tmp_path) if "loss" in entry)
    assert step["loss"] == pytest.approx(trained / positions, rel=1e-4)
    assert trained != pytest.approx(with_rest, rel=1e-3)
    assert 0 < step["teacher_wait"] <= 1
    report = (tmp_path / "report.md").read_text()
    check_names(report, "live and served", "top 4 or 5 or 6", "time spent waiting for the teacher")


def test_a_member_that_stops_is_named_and_resumed_from_and_each_has_its_cache(
    parts: dict[str, str], folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openai")
    saving = {"max_steps": 3, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 1}
    saving["eval_on_start"] = False
    first, second = (model_of(folder / name) for name in ("first", "second"))
    left = [5]  # the probe, and the documents of the first batch

    def stopping(body: dict[str, Any]) -> Reply:
        left[0] -= 1
        return answers_of(second)(body) if left[0] >= 0 else (503, {"error": {"message": "shutting down"}})

    def run(output: str, urls: tuple[str, str], **more: Any) -> None:
        each = {"cache": str(tmp_path / "answers"), "concurrency": 1}
        teachers = [served(urls[0], "first", 6, **each), served(urls[1], "second", 4, **each)]
        train(taught(parts, folder, tmp_path / output, teachers, training_args={**saving, **more}))

    everything = sorted(tuple(ids.tolist()) for ids in DOCUMENTS)
    with answering(first) as (one, of_one):
        with server(stopping) as (two, _), refused(CaptureError, "teachers.1", two.split("/")[2], "shutting down"):
            run("out", (one, two))
        assert list(losses_of(tmp_path / "out")) == [1]
        before = asked(of_one)
        with answering(second) as (two, of_two):
            run("out", (one, two), resume_from_checkpoint=True)
            both = before + asked(of_one)
            # Again only what was being answered when the other failed.
            assert (set(both), len(both) - len(everything) <= 1) == (set(everything), True)
            assert len(asked(of_two)) == len(everything) - 4
            run("whole", (one, two))
            assert asked(of_one) == asked(of_two) == []
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "whole")
    caches = {path.name.partition("-k")[2][0]: Dataset.open(path) for path in (tmp_path / "answers").glob("tiny-k*/")}
    assert {k: (cache.codec.k, len(cache)) for k, cache in caches.items()} == {"6": (6, 9), "4": (4, 9)}


def test_a_list_of_one_teacher_is_that_teacher(parts: dict[str, str], folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    hidden = {"loss_functions": [{"function": "hs_mse", "weight": 1}], "layer_mapping": [[-1, -1]]}
    with answering(model_of(folder / "first")) as (url, _):
        for name, teacher, settings in (
            ("served", served(url, str(folder / "first"), 6), {}),
            ("own", {"kind": "hf", "path": parts["student"], "top_k": 6}, {"peft": {"r": 2}}),
            ("hidden", {"kind": "hf", "path": str(folder / "first")}, hidden),
        ):
            for kind in ("alone", "listed"):
                settings = {**settings, "training_args": {"max_steps": 2, "per_device_train_batch_size": 5}}
                output, data = tmp_path / f"{name}-{kind}", str(folder / "rows.jsonl")
                settings["dataset"] = {"prepared_dataset_path": str(folder / "prepared")}
                given = {"teacher": teacher} if kind == "alone" else {"teachers": [teacher]}
                train(run_config(parts["student"], output, data, **given, **settings))
            assert losses_of(tmp_path / f"{name}-alone") == losses_of(tmp_path / f"{name}-listed"), name


def test_what_does_not_fit_of_a_server_is_refused_by_the_name_of_the_member(
    parts: dict[str, str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    nowhere = "http://localhost:1/v1"
    live = {"path": "first", "where": {"lang": "de"}}
    for wrong, facts in (
        (served(nowhere, "second", 4), ["teachers.0.top_k", "teachers.1"]),
        (served("localhost:1", "second", 4), ["teachers.1.base_url", "'localhost:1'"]),
        (served(nowhere, "second", 4, weight=0), ["teachers.1.weight"]),
        (served(nowhere, "second", 4, path="x"), ["teachers.1.path"]),
        ({"kind": "dataset", "path": "second"}, ["teachers.1.kind", "'hf'", "'server'"]),
    ):
        with refused(ConfigError, *facts):
            taught(parts, folder, tmp_path, [live, wrong])
    honest = answers_of(model_of(folder / "second"))

    def certain(body: dict[str, Any]) -> Reply:
        status, content = honest(body)
        if body["prompt"] != [1, 2, 3]:
            for entry in content["choices"][0]["prompt_logprobs"][1].values():
                entry["logprob"] = -0.1
        return status, content

    with answering(model_of(folder / "first")) as (one, _), server(certain) as (two, _):
        for second, error, facts in (
            (served(two, parts["other"], 4), MismatchError, ["teachers.1.model", parts["other"]]),
            (served(two, "second", 65), ConfigError, ["teachers.1.top_k", "65", "64"]),
            (served(two, "second", 4, served_model="large"), ConfigError, ["teachers.1.served_model", "'large'"]),
            (served(two, "second", 6, cache=str(tmp_path / "c")), ConfigError, ["teachers.1.cache", "teachers.0", one]),
            (served(two, "second", 4), CaptureError, ["teachers.1", "dataset.train_dataset, document", "doc_id"]),
        ):
            teachers = [served(one, "first", 6, cache=str(tmp_path / "c")), second]
            arguments = {"eval_on_start": False}
            with refused(error, *facts):
                train(taught(parts, folder, tmp_path / "out", teachers, training_args=arguments))
        # Of one server, models that are served by paths with the same last part.
        paths = ["/ckpt/de/final", "/ckpt/code/final"]
        both = {"data": [{"id": path, "object": "model", "max_model_len": 65} for path in paths]}
        with serving(lambda _, body: (200, both) if body is None else honest(body)) as (url, _):
            teachers = [served(url, "first", 6, served_model=path, cache=str(tmp_path / "c")) for path in paths]
            with refused(ConfigError, "teachers.1.cache", "teachers.0", *paths):
                train(taught(parts, folder, tmp_path / "out", teachers))
        config = taught(parts, folder, tmp_path / "out", [served(one, "first", 6), served(two, "second", 4, weight=2)])
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
        stopped: list[str] = []
        monkeypatch.setattr(TeacherServer, "stop", lambda self: stopped.append(self.key))
        found = {check.name: check for check in dry_run(path).checks}["teacher"]
        assert sorted(stopped) == ["teachers.0", "teachers.1"], "nothing is asked after a dry run"
        check_names(found.detail, "tiny", "top 6", "top 4", "weight 2")
        assert len(found.figures["teachers"]) == 2
    # Servers are connected before models are loaded, as in training.
    config = taught(parts, folder, tmp_path / "out", [{"path": "first", "top_k": 5}, served(two, "second", 4)])
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    monkeypatch.setattr("distillkit.training.run.load_teacher", lambda *_: pytest.fail("a model was loaded"))
    found = {check.name: check for check in dry_run(path).checks}["teacher"]
    assert found.status == "failed"
    check_names(found.detail, "teachers.1.base_url")

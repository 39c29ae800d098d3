"""A served teacher: the same training as from its capture, nothing asked twice, and whatever a server does is refused
or survived."""

from __future__ import annotations

import errno
import json
import pickle
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import numpy as np
import pytest
import yaml

from distillkit.capture import capture
from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument
from distillkit.errors import CaptureError, ConfigError, CorruptDataError, DistillKitError, InputError, MismatchError
from distillkit.shards import Dataset, Manifest, read_manifest, verify_dataset
from distillkit.shards.storage import Folder
from distillkit.training.config.file import parse_config
from distillkit.training.config.schema import RunConfig
from distillkit.training.config.surroundings import check_surroundings
from distillkit.training.data.examples import Collator, DistillationDataset
from distillkit.training.dry_run import dry_run
from distillkit.training.run import Run, train
from distillkit.training.signals.cache import AnswerCache, cache_header
from distillkit.training.signals.served import ServedSignal, asked_ahead
from distillkit.training.signals.server import TeacherServer, connect
from distillkit.types import TokenDocument
from support.processes import Processes
from support.refusals import check_names, refused
from support.served import Reply, answering, answers_of, server
from support.training import (
    VOCABULARY,
    exact_codec,
    losses_of,
    metrics_of,
    random_documents,
    run_config,
    teacher_rows,
    tiny_model,
    tiny_tokenizer,
)
from test_hostile_server import mutate

pytest.importorskip("openai")
pytestmark = pytest.mark.usefixtures("without_plots")

K = 8
# The one that `parts` is captured from.
TEACHER = tiny_model(7)
PROBE = [1, 2, 3]


def served(parts: dict[str, str], url: str, output: Path, **settings: Any) -> RunConfig:
    given = {"kind": "server", "base_url": url, "model": parts["teacher"], "top_k": K, "max_retries": 0}
    teacher = {**given, **settings.pop("teacher", {})}
    data, held_out = settings.pop("train", parts["train"]), settings.pop("evaluate", None)
    return run_config(parts["student"], output, data, held_out, teacher=teacher, **settings)


def asked(requests: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """What was asked since the last call, in any order, without the probe."""
    found = sorted(tuple(request["prompt"]) for request in requests if request["prompt"] != PROBE)
    requests.clear()
    return found


def documents_of(path: str) -> list[tuple[int, ...]]:
    return sorted(tuple(document.input_ids.tolist()) for document in Dataset.open(path))


def test_it_trains_as_a_capture_of_the_same_server(parts: dict[str, str], tmp_path: Path) -> None:
    """Packed, in epochs and micro-batches, with evaluations, and with the next tokens' own log-probabilities."""
    rows = [{"text": " ".join(f"t{i}" for i in ids)} for ids in random_documents(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = {"max_steps": 6, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "packing": True}
    settings: dict[str, Any] = {
        "training_args": {**arguments, "eval_on_start": True},
        "loss_functions": [{"function": "kl", "weight": 1.0, "missing_probability_handling": "label"}],
        "train": str(tmp_path / "captured"),
        "evaluate": str(tmp_path / "captured"),
    }
    with answering(TEACHER) as (url, requests):
        options: dict[str, Any] = {"engine": "openai", "base_url": url, "max_seq_len": 64, "label_logprobs": True}
        options |= {"compression_config": exact_codec().config, "progress": False}
        capture(model=parts["teacher"], dataset=str(tmp_path / "rows.jsonl"), output=tmp_path / "captured", **options)
        asked(requests)
        results = [
            train(
                served(parts, url, tmp_path / "served", teacher={"label_logprobs": True, "concurrency": 3}, **settings)
            )
        ]
        assert set(asked(requests)) == set(documents_of(settings["train"])), "each packed document by itself"
    data = [settings.pop(name) for name in ("train", "evaluate")]
    results.append(train(run_config(parts["student"], tmp_path / "stored", *data, **settings)))
    assert losses_of(tmp_path / "served") == losses_of(tmp_path / "stored")
    for name in ("loss", "kl", "kl_with_rest", "cross_entropy", "teacher_mass", "top1_agreement", "positions"):
        first, second = (result["eval_first"][f"eval_{name}"] for result in results)
        assert first == second, name
    waits = [entry["teacher_wait"] for entry in metrics_of(tmp_path / "served") if "loss" in entry]
    assert all(0 < wait <= 1 for wait in waits)
    assert 0 < results[0]["teacher_wait"] <= 1
    assert "teacher_wait" not in results[1]
    check_names(
        (tmp_path / "served" / "report.md").read_text(), "served distributions", "time spent waiting for the teacher"
    )


def test_a_cache_asks_nothing_twice_and_is_a_dataset(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DISTILLKIT_API_KEY", "top-secret")
    # Two epochs of 24 documents.
    settings: dict[str, Any] = {"training_args": {"max_steps": 12}, "teacher": {"cache": str(tmp_path / "answers")}}
    everything = documents_of(parts["train"])
    with answering(TEACHER) as (url, requests):
        train(served(parts, url, tmp_path / "plain", training_args={"max_steps": 12}))
        assert asked(requests) == sorted(2 * everything)
        train(served(parts, url, tmp_path / "first", **settings))
        assert asked(requests) == everything
        train(served(parts, url, tmp_path / "second", **settings))
        assert asked(requests) == []
        settings["teacher"] = {**settings["teacher"], "top_k": 4}
        train(served(parts, url, tmp_path / "other", training_args={"max_steps": 1}, teacher=settings["teacher"]))
        assert len(asked(requests)) >= 4
    assert losses_of(tmp_path / "first") == losses_of(tmp_path / "second") == losses_of(tmp_path / "plain")
    folder = next((tmp_path / "answers").glob("tiny-k8-*/"))
    assert verify_dataset(folder).ok
    assert documents_of(str(folder)) == everything
    dataset = Dataset.open(folder)
    assert dataset.header.teacher == {"name": "tiny", "revision": None, "engine": "openai"}
    for document, rows in dataset.decoded():
        expected = teacher_rows(TEACHER, document.input_ids.copy())
        np.testing.assert_array_equal(rows.ids, expected.ids)
        np.testing.assert_allclose(rows.logprobs, expected.logprobs, atol=1e-5)
    for path in (file for folder in ("answers", "first") for file in (tmp_path / folder).rglob("*") if file.is_file()):
        assert b"top-secret" not in path.read_bytes()


def test_a_server_that_stops_in_the_middle_is_resumed_from(parts: dict[str, str], tmp_path: Path) -> None:
    settings: dict[str, Any] = {"training_args": {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}}
    left = [20]

    def stopping(body: dict[str, Any]) -> Reply:
        left[0] -= 1
        return answers_of(TEACHER)(body) if left[0] > 0 else (503, {"error": {"message": "shutting down"}})

    with (
        server(stopping) as (url, _),
        refused(CaptureError, "127.0.0.1", "shutting down", "training_args.resume_from_checkpoint"),
    ):
        train(served(parts, url, tmp_path / "out", teacher={"concurrency": 1}, **settings))
    begun = losses_of(tmp_path / "out")
    assert 2 <= len(begun) < 6
    until(lambda: "distillkit-request" not in {thread.name for thread in threading.enumerate()})
    settings["training_args"]["resume_from_checkpoint"] = True
    with answering(TEACHER) as (url, _):
        train(served(parts, url, tmp_path / "out", **settings))
        del settings["training_args"]["resume_from_checkpoint"]
        train(served(parts, url, tmp_path / "whole", **settings))
    assert losses_of(tmp_path / "out") == losses_of(tmp_path / "whole")
    other = {**settings["training_args"], "max_steps": 8, "resume_from_checkpoint": True}
    with answering(TEACHER) as (url, _), refused(MismatchError, "teacher.top_k", "8", "4"):
        train(served(parts, url, tmp_path / "out", training_args=other, teacher={"top_k": 4}))


@pytest.mark.slow
def test_processes_share_a_cache(parts: dict[str, str], tmp_path: Path, processes: Processes) -> None:
    """Two, in two epochs: each document is asked about once, and they train as one process."""
    settings: dict[str, Any] = {"training_args": {"max_steps": 12}}
    with answering(TEACHER) as (url, requests):
        train(served(parts, url, tmp_path / "one", **settings))
        asked(requests)
        settings["training_args"]["per_device_train_batch_size"] = 2
        settings["teacher"] = {"cache": str(tmp_path / "answers"), "concurrency": 4}
        processes.train(served(parts, url, tmp_path / "two", **settings), tmp_path)
        assert asked(requests) == documents_of(parts["train"])
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-5)


# -- what is asked, and when -------------------------------------------------------------------------------------------


class Engine:
    """Answers when it is let to, and remembers what it was asked and how many requests ran at a time."""

    head_size = VOCABULARY

    def __init__(self) -> None:
        self.identity = {"name": "engine"}
        self.open, self.lock = Event(), Lock()
        self.asked: list[str] = []
        self.running = self.most = 0

    def score_one(self, index: int, document: TokenDocument, request: RowRequest) -> ScoredDocument | RejectedDocument:
        with self.lock:
            self.asked.append(document.source)
            self.running += 1
            self.most = max(self.most, self.running)
        self.open.wait(60)
        with self.lock:
            self.running -= 1
        rows = teacher_rows(TEACHER, document.input_ids, request.k)
        return ScoredDocument(index, rows)


def signal_of(parts: dict[str, str], engine: Any, concurrency: int) -> tuple[ServedSignal, list[dict[str, Any]]]:
    """A signal, and the batches of two documents of its source."""
    source = Dataset.open(parts["train"])
    signal = ServedSignal(TeacherServer(engine, RowRequest(K), concurrency=concurrency), VOCABULARY, source, "train")
    dataset = DistillationDataset(source, signal, 64)
    return signal, [Collator()([dataset[i], dataset[i + 1]]) for i in range(0, len(dataset), 2)]


def until(condition: Any) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail("it never became true")


def test_the_next_documents_are_asked_about_and_no_more(parts: dict[str, str]) -> None:
    engine = Engine()
    signal, batches = signal_of(parts, engine, concurrency=2)
    read = iter(batches)
    ahead = asked_ahead(signal, read)
    first = next(ahead)
    # Besides its own two documents, twice as many as run at a time, of which two run.
    assert len(list(read)) == len(batches) - 3
    until(lambda: len(engine.asked) == 2)
    time.sleep(0.05)
    assert engine.asked == ["train, document 0", "train, document 1"]
    signal.server.stop()
    engine.open.set()
    labels = first["labels"].flatten()[first["rows"] + 1]
    expected = [teacher_rows(TEACHER, signal._source[number].input_ids.copy()) for number in (0, 1)]  # type: ignore[index]
    targets = signal.targets(first, labels)
    np.testing.assert_array_equal(targets.teacher.ids, np.concatenate([rows.ids for rows in expected]))
    assert 0 < signal.waited < 60
    with pytest.raises(CancelledError):
        signal.targets(next(ahead), labels)
    until(lambda: "distillkit-request" not in {thread.name for thread in threading.enumerate()})

    # In order, whatever is read ahead; asked anew after it was stopped.
    seen = [batch["places"][:, 0].unique().tolist() for batch in asked_ahead(signal, iter(batches))]
    assert seen == [batch["places"][:, 0].unique().tolist() for batch in batches]
    until(lambda: engine.running == 0)
    assert engine.most == 2
    # What a reading process gets that is not forked.
    source = Dataset.open(parts["train"])
    assert pickle.loads(pickle.dumps(signal)).take(source[0], np.arange(1)) == {}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_batches_without_questions_are_not_read_ahead_without_end(parts: dict[str, str], share: float) -> None:
    """When a batch is yielded, no more are read than it takes for four documents after it, of which a batch that asks
    nothing has one."""
    engine = Engine()
    engine.open.set()
    signal, found = signal_of(parts, engine, concurrency=2)
    empty = {**found[0], "rows": found[0]["rows"][:0], "places": found[0]["places"][:0]}
    choose = random.Random(3)
    sizes = [2 if choose.random() < share else 1 for _ in range(40)]
    read = 0

    def batches() -> Iterator[dict[str, Any]]:
        nonlocal read
        for size in sizes:
            read += 1
            yield found[0] if size == 2 else empty

    for number, _ in enumerate(asked_ahead(signal, batches())):
        enough = (n for n in range(number + 1, 41) if sum(sizes[number + 1 : n]) >= 4)
        assert read == next(enough, 40)


def test_sequences_are_answered_in_order_and_failures_end_what_waits(parts: dict[str, str]) -> None:
    engine = Engine()
    engine.open.set()
    teacher = TeacherServer(engine, RowRequest(K), concurrency=3)
    sequences = [document.tolist() for document in random_documents(9)]
    for sequence, rows in zip(sequences, teacher.rows(sequences), strict=True):
        np.testing.assert_array_equal(rows.ids, teacher_rows(TEACHER, np.array(sequence, np.int32)).ids)
    with refused(InputError, "sequence 1", "1"):
        teacher.ask([[1, 2], [5]])

    engine.open.clear()

    def fail(*arguments: Any) -> ScoredDocument:
        engine.open.wait(60)
        raise CaptureError("gone")

    engine.score_one = fail  # type: ignore[method-assign]
    answers: list[Future[ScoredDocument]] = teacher.ask(sequences)
    engine.open.set()
    for answer in answers:
        with refused(CaptureError, "gone"):
            answer.result(60)


def test_mutated_answers_are_rows_or_errors(parts: dict[str, str], tmp_path: Path) -> None:
    """By seed: a part replaced, removed, repeated or renamed; statuses; no JSON."""
    rng, lock = random.Random(7), Lock()
    honest = answers_of(TEACHER)

    def reply(body: dict[str, Any]) -> Reply:
        status, content = honest(body)
        if body["prompt"] == PROBE:
            return status, content
        with lock:
            status = rng.choice((200, 200, 200, 400, 413, 500, 503))
            return status, content if rng.random() < 0.5 else mutate(json.loads(json.dumps(content)), rng)

    outcomes, said = {"rows": 0, "errors": 0}, list[str]()
    with server(reply) as (url, _):
        teacher = connect(served(parts, url, tmp_path, teacher={"concurrency": 4}), tiny_tokenizer())
        for _ in range(60):
            for answer in teacher.ask([[5, 7, 11, 9]]):
                try:
                    rows = answer.result(60).rows
                except DistillKitError as error:
                    outcomes["errors"] += 1
                    said.append(str(error))
                else:
                    outcomes["rows"] += 1
                    assert rows.ids.shape == rows.logprobs.shape == (3, K)
                    assert np.isfinite(rows.logprobs).all()
                    assert 0 <= rows.ids.min() <= rows.ids.max() < VOCABULARY
    assert min(outcomes.values()) > 5
    assert all(text.isprintable() for text in said)


def test_what_is_wrong_with_a_document_is_said_with_its_place_and_id(parts: dict[str, str], tmp_path: Path) -> None:
    honest = answers_of(TEACHER)

    def certain(body: dict[str, Any]) -> Reply:
        status, content = honest(body)
        if body["prompt"] != PROBE:
            for entry in content["choices"][0]["prompt_logprobs"][2].values():
                entry["logprob"] = -0.1
        return status, content

    source = Dataset.open(parts["train"])
    first = source[0]
    with server(certain) as (url, _):
        teacher = connect(served(parts, url, tmp_path), tiny_tokenizer())
        signal = ServedSignal(teacher, VOCABULARY, source, "dataset.train_dataset")
        batch = Collator()([DistillationDataset(source, signal, 64)[0]])
        with refused(CaptureError, "dataset.train_dataset, document 0", first.place, first.doc_id, "token 1"):
            signal.targets(batch, batch["labels"].flatten()[batch["rows"] + 1])


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_training(parts: dict[str, str], tmp_path: Path) -> None:
    cap = (400, {"error": {"message": "Requested prompt logprobs of 8, which is greater than max allowed: 3"}})
    with server(lambda body: cap) as (url, _), refused(ConfigError, "teacher.top_k", "8", "3", "--max-logprobs 8"):
        train(served(parts, url, tmp_path))
    denied = (401, {"error": {"message": "no"}})
    with server(lambda body: denied) as (url, _), refused(ConfigError, "DISTILLKIT_API_KEY", "OPENAI_API_KEY"):
        train(served(parts, url, tmp_path))
    with answering(TEACHER) as (url, _):
        for settings, error, facts in (
            ({"teacher": {"model": parts["other"]}}, MismatchError, ["teacher.model", parts["other"]]),
            ({"teacher": {"top_k": 65}}, ConfigError, ["teacher.top_k", "65", "64"]),
            ({"teacher": {"served_model": "large"}}, ConfigError, ["teacher.served_model", "tiny", "'large'"]),
            ({"sequence_length": 65}, ConfigError, ["sequence_length", "64", "65", "--max-model-len 66"]),
        ):
            with refused(error, *facts):
                train(served(parts, url, tmp_path, **settings))
    with refused(CaptureError, "127.0.0.1", "teacher.base_url"):
        train(served(parts, url, tmp_path))


def test_settings_that_contradict_a_server(parts: dict[str, str], tmp_path: Path) -> None:
    url = "http://localhost:8000/v1"
    hidden = {"loss_functions": [{"function": "hs_mse", "weight": 1.0}], "layer_mapping": "all"}
    for settings, facts in (
        (hidden, ["loss_functions", "hs_mse", "server", "teacher.kind"]),
        ({"teacher": {"base_url": "localhost:8000"}}, ["teacher.base_url", "'localhost:8000'"]),
        ({"teacher": {"base_url": "http://me:word@host/v1"}}, ["teacher.base_url", "DISTILLKIT_API_KEY"]),
        ({"teacher": {"top_k": None}}, ["teacher.top_k"]),
        ({"teacher": {"concurrency": 0}}, ["teacher.concurrency", "0"]),
        ({"teacher": {"path": "x"}}, ["teacher.path"]),
    ):
        with refused(ConfigError, *facts):
            served(parts, url, tmp_path, **settings)
    with refused(ConfigError, "teacher.model", "nowhere", "teacher.cache", "'s3://bucket/answers'"):
        check_surroundings(served(parts, url, tmp_path, teacher={"model": "./nowhere", "cache": "s3://bucket/answers"}))
    with refused(ConfigError, "teacher.kind", "'served'", "server"):
        parse_config({**served(parts, url, tmp_path).model_dump(), "teacher": {"kind": "served"}})


def test_a_dry_run_asks_the_server_first(parts: dict[str, str], tmp_path: Path) -> None:
    with answering(TEACHER) as (url, _):
        pass
    config = served(parts, url, tmp_path / "out").model_dump(mode="json", exclude_unset=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    checks = {check.name: check for check in dry_run(tmp_path / "config.yaml").checks}
    assert checks["teacher"].status == "failed"
    check_names(checks["teacher"].detail, url.split("/")[2])
    assert checks["data fits student"].status == "not checked"


# -- the cache ---------------------------------------------------------------------------------------------------------


def scored(ids: np.ndarray[Any, Any]) -> tuple[TokenDocument, ScoredDocument]:
    return TokenDocument(ids, "a document"), ScoredDocument(0, teacher_rows(TEACHER, ids))


def test_a_cache_that_cannot_be_written_is_named_and_keeps_no_other_from_it(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = random_documents(3)
    servers, caches, waiting, engines = {}, [], [], (Engine(), Engine())
    for number, engine in enumerate(engines):
        key = f"teachers.{number}"
        header = cache_header({"name": key}, RowRequest(K), VOCABULARY, tiny_tokenizer())
        cache = AnswerCache(tmp_path / "answers", header, key)
        servers[key] = TeacherServer(engine, RowRequest(K), concurrency=1, cache=cache, key=key)
        cache.add(*scored(documents[0]))
        caches.append(cache)
        waiting.append(servers[key].ask([ids.tolist() for ids in documents[1:]])[1])

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "no space", "somewhere")

    monkeypatch.setattr(caches[0], "_written", full)
    run = Run(run_config(parts["student"], tmp_path / "out", parts["train"]))
    run.__dict__["servers"] = servers
    with refused(OSError, "teachers.0.cache", "no space", "somewhere"):
        run.stop_asking()
    assert [answer.cancelled() for answer in waiting] == [True, True]
    assert documents_of(str(caches[1].folder)) == [tuple(documents[0].tolist())]
    with refused(CaptureError, "the server is gone"), run.asking():
        raise CaptureError("the server is gone")
    for engine in engines:
        engine.open.set()


def test_a_cache_survives_kills_and_is_shared(tmp_path: Path) -> None:
    header = cache_header({"name": "org/name"}, RowRequest(K), VOCABULARY, tiny_tokenizer())
    caches = [AnswerCache(tmp_path, header) for _ in range(2)]
    folder = caches[0].folder
    documents = [np.unique(ids).astype(np.int32) for ids in random_documents(30, longest=20)]
    documents = [ids for ids in documents if len(ids) > 1]

    # Both write at once, half of it the same.
    def fill(cache: AnswerCache, some: list[np.ndarray[Any, Any]]) -> None:
        for number, ids in enumerate(some):
            cache.add(*scored(ids))
            if number % 5 == 4:
                cache.flush()

    threads = [
        Thread(target=fill, args=(caches[0], documents[:20])),
        Thread(target=fill, args=(caches[1], documents[5:])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for cache in (*caches, *caches):
        cache.flush()
    expected = {tuple(ids.tolist()) for ids in documents}
    assert set(documents_of(str(folder))) == expected
    assert verify_dataset(folder).ok
    for cache in (*caches, AnswerCache(tmp_path, header)):
        assert len(cache) == len(expected)
        for ids in documents:
            found = cache.find(ids)
            assert found is not None
            np.testing.assert_array_equal(found.rows.logprobs, teacher_rows(TEACHER, ids).logprobs)
        assert cache.find(np.array([1, 1, 1], np.int32)) is None

    # Killed between a shard and its entry, and while writing one.
    manifest = read_manifest(folder)
    assert manifest is not None
    Manifest(manifest.header, manifest.shards[:-2]).write(Folder(folder))
    (folder / ".incomplete-data-00099.parquet.0a1b2c3d").write_bytes(b"half")
    assert len(AnswerCache(tmp_path, header)) == len(expected)
    assert verify_dataset(folder).ok
    assert not list(folder.glob(".incomplete*"))

    # Damaged, it says what to do.
    shard, first = folder / manifest.shards[0].file, Dataset.open(folder)[0]
    content = shard.read_bytes()
    shard.write_bytes(content.replace(bytes(first.teacher), bytes(len(first.teacher))))
    damaged = AnswerCache(tmp_path, header)
    with refused(CorruptDataError, "teacher.cache", str(shard), str(folder)):
        damaged.find(first.input_ids)
    shard.write_bytes(content[:-100])
    with refused(CorruptDataError, "teacher.cache", str(shard), str(folder)):
        AnswerCache(tmp_path, header)

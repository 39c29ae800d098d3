"""The real vLLM against transformers, in process and as a server: `make test-vllm`."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from distillkit.capture import CaptureSettings, capture
from distillkit.capture.teachers.base import RowRequest, ScoredDocument, Teacher
from distillkit.capture.teachers.make import make_teacher
from distillkit.capture.teachers.openai import OpenAITeacher
from distillkit.capture.teachers.vllm import VLLMTeacher
from distillkit.errors import CaptureError, ConfigError
from distillkit.shards import Dataset, verify_dataset
from distillkit.text.tokenizer import load_tokenizer
from distillkit.training.config.schema import RolloutServerConfig
from distillkit.training.data.examples import Collator, Example, counted_positions
from distillkit.training.rollouts.engine import HfEngine, Prompt, Sampling, Student
from distillkit.training.signals.live import OnlineSignal
from distillkit.training.signals.served import ServedSignal, asked_ahead
from distillkit.training.signals.server import connect
from distillkit.types import TokenDocument
from support.refusals import check_names, refused
from support.teachers import EXACT, HEAD, write_llama, write_text
from support.training import run_config

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    # Of importing vLLM, which imports torch's compiler.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning"),
    # Of vLLM's client, once its engine is stopped.
    pytest.mark.filterwarnings("ignore:Unclosed context <zmq:ResourceWarning"),
]

ROOT = Path(__file__).resolve().parent.parent
WANTED = RowRequest(8, label_logprobs=True, last_row=True)
# Both engines compute in float32, in another order: logits of ±20 agree to about 3e-4.
TOLERANCE = 1e-3


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    """Whole models on two cores: no more threads than that, and a small cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher whose heads are wide enough for vLLM's kernels."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny-llama"
    write_llama(folder, hidden_size=128)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    write_text(path, 40)
    return path


def settings(folder: Path, **options: Any) -> CaptureSettings:
    given: dict[str, Any] = {"max_seq_len": 512, "compression_config": EXACT}
    return CaptureSettings(model=str(folder), dataset="-", output="-", **{**given, **options})


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Iterator[VLLMTeacher]:
    running = make_teacher(settings(folder, engine="vllm", batch_tokens=512))
    assert isinstance(running, VLLMTeacher)
    yield running
    running.close()


def documents(*lengths: int) -> list[TokenDocument]:
    rng = np.random.default_rng(0)
    return [
        TokenDocument(rng.integers(2, 100, length).astype(np.int32), f"document {index}")
        for index, length in enumerate(lengths)
    ]


# The longest has as many tokens as the model has positions.
DOCUMENTS = documents(2, 512, 30, 3, 511, 64, 100, 257, 256, 5, 17, 300)


def scores(teacher: Teacher, given: list[TokenDocument], request: RowRequest) -> list[ScoredDocument]:
    found = {}
    for result in teacher.score(given, request):
        assert isinstance(result, ScoredDocument), result
        assert result.index not in found, "each document once"
        found[result.index] = result
    return [found[index] for index in range(len(given))]


def check_same(
    found: list[ScoredDocument], expected: list[ScoredDocument], tolerance: float, *, apart: float = 0.0
) -> None:
    """Rows agree: the first ids but for those closer together than `apart`, and the log-probabilities by rank."""
    for one, other in zip(found, expected, strict=True):
        ids, logprobs = np.asarray(one.rows.ids), np.asarray(one.rows.logprobs)
        assert ids.shape == np.asarray(other.rows.ids).shape
        np.testing.assert_allclose(logprobs, other.rows.logprobs, atol=tolerance)
        clear = logprobs[:, 0] - logprobs[:, 1] > apart
        np.testing.assert_array_equal(ids[clear, 0], np.asarray(other.rows.ids)[clear, 0])
        if other.label_logprobs is not None:
            np.testing.assert_allclose(one.label_logprobs, other.label_logprobs, atol=tolerance)


def test_vllm_and_transformers_agree(teacher: VLLMTeacher, folder: Path) -> None:
    reference = make_teacher(settings(folder))
    assert teacher.head_size == reference.head_size == HEAD
    assert teacher.identity["dtype"] == reference.identity["dtype"] == "float32"
    assert teacher.identity["name"] == "tiny-llama"
    assert re.fullmatch(r"vllm \d+\.\d+.*", teacher.identity["engine"])
    expected = scores(reference, DOCUMENTS, WANTED)
    check_same(scores(teacher, DOCUMENTS, WANTED), expected, TOLERANCE, apart=TOLERANCE)
    assert [len(one.rows.ids) for one in expected] == [len(document.input_ids) for document in DOCUMENTS]

    without = scores(teacher, DOCUMENTS, RowRequest(5))
    assert [one.rows.ids.shape for one in without] == [(len(document.input_ids) - 1, 5) for document in DOCUMENTS]
    assert all(one.label_logprobs is None for one in without)


def test_what_vllm_can_not_do(teacher: VLLMTeacher) -> None:
    with refused(ConfigError, "keep_ids"):
        next(teacher.score(DOCUMENTS, RowRequest(8, keep_ids=(3,))))
    with refused(ConfigError, "k", "9", "8"):
        next(teacher.score(DOCUMENTS, RowRequest(9)))
    with refused(CaptureError, "long"):
        list(teacher.score([TokenDocument(np.full(600, 5, dtype=np.int32), "long")], RowRequest(8)))
    # Left in the middle, it begins anew with the next.
    next(teacher.score(DOCUMENTS, WANTED))
    assert len(scores(teacher, DOCUMENTS, WANTED)) == len(DOCUMENTS)


def test_capture_under_its_published_name(folder: Path, text: Path, tmp_path: Path) -> None:
    config = tmp_path / "compression_config.yaml"
    config.write_text(yaml.safe_dump({**EXACT, "d": 100}))
    options = ["--model", folder, "--dataset", text, "--output", tmp_path / "vllm", "--compression-config", config]
    command = [sys.executable, "-m", "distillkit.sample_logits_vllm", *options, "--max-seq-len", "64"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("captured:"), "vLLM's log is on stderr"
    check_names(" ".join(done.stderr.split()), "100", "8192", "128", "8 B")

    shared: dict[str, Any] = {"max_seq_len": 64, "compression_config": EXACT, "progress": False}
    capture(model=str(folder), dataset=str(text), output=tmp_path / "hf", **shared)
    found, expected = Dataset.open(tmp_path / "vllm"), Dataset.open(tmp_path / "hf")
    assert verify_dataset(tmp_path / "vllm").ok
    assert len(found) == len(expected) >= 40
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        rows, reference = (
            dataset.codec.decode_document(d.teacher, d.num_rows) for dataset, d in ((found, one), (expected, other))
        )
        np.testing.assert_allclose(rows.logprobs, reference.logprobs, atol=TOLERANCE)
    assert found.header.capture is not None
    assert found.header.teacher is not None
    assert found.header.capture["engine"] == "vllm"
    assert found.header.teacher["engine"].startswith("vllm ")

    # Finished: the engine is not even started.
    again = capture(model=str(folder), dataset=str(text), output=tmp_path / "vllm", engine="vllm", **shared)
    assert again.already_complete


# -- a server ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """vLLM's server on loopback, which gives at most 8 log-probabilities."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"--host 127.0.0.1 --port {port} --served-model-name tiny --max-logprobs 8 --max-model-len 257"
    command = f"-m vllm.entrypoints.openai.api_server {options} --dtype float32 --enforce-eager --api-key secret"
    log = tmp_path_factory.mktemp("server") / "log"
    environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command.split(), "--model", str(folder)],
            stdout=file,
            stderr=file,
            env=environment,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (URLError, OSError):
                time.sleep(0.5)
        else:
            pytest.fail(log.read_text())
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes of its engine."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)


def test_a_server_and_transformers_agree(
    server: tuple[str, Any], folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, _ = server
    options: dict[str, Any] = {"engine": "openai", "base_url": url, "max_seq_len": 256}
    with refused(ConfigError, "DISTILLKIT_API_KEY", "OPENAI_API_KEY"):
        make_teacher(settings(folder, **options))
    monkeypatch.setenv("DISTILLKIT_API_KEY", "secret")
    served = make_teacher(settings(folder, **options))
    assert served.identity == {"name": "tiny", "revision": None, "engine": "openai"}
    short = [document for document in DOCUMENTS if len(document.input_ids) <= 256]
    expected = scores(make_teacher(settings(folder)), short, WANTED)
    check_same(scores(served, short, WANTED), expected, TOLERANCE, apart=TOLERANCE)
    assert isinstance(served, OpenAITeacher)
    served._echoes = True
    check_same(scores(served, short, WANTED), expected, TOLERANCE, apart=TOLERANCE)

    capture(
        model=str(folder),
        dataset=str(text),
        output=tmp_path / "out",
        compression_config=EXACT,
        progress=False,
        **options,
    )
    assert verify_dataset(tmp_path / "out").ok
    for path in (tmp_path / "out").iterdir():
        assert b"secret" not in path.read_bytes()
        assert b"127.0.0.1" not in path.read_bytes()


def test_what_training_asks_a_server_is_what_the_live_teacher_gives(
    server: tuple[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a batch of packed and masked documents; from the cache, too."""
    url, _ = server
    monkeypatch.setenv("DISTILLKIT_API_KEY", "secret")
    lengths = np.array([64, 100, 30, 17, 2], np.int64)
    ids = np.concatenate([document.input_ids for document in documents(*lengths.tolist())])
    mask = np.random.default_rng(1).random(len(ids)) < 0.7
    positions = counted_positions(lengths, mask)
    packed = Example(ids, lengths, positions, {}, places=np.stack([positions, positions], -1))
    ids = documents(120)[0].input_ids
    alone = Example(ids, np.array([120]), np.arange(119), {}, places=np.zeros((119, 2), np.int64))
    batch = Collator()([packed, alone])
    labels = batch["labels"].flatten()[batch["rows"] + 1]
    expected = OnlineSignal(AutoModelForCausalLM.from_pretrained(folder), top_k=8).targets(batch, labels)

    teacher = {"kind": "server", "base_url": url, "model": str(folder), "top_k": 8, "cache": str(tmp_path / "kept")}
    config = run_config("student", tmp_path, "data", teacher={**teacher, "label_logprobs": True}, sequence_length=256)
    for stopped in (False, True):
        asking = connect(config, load_tokenizer(str(folder)))
        if stopped:  # answers of the cache alone
            monkeypatch.setattr(asking.engine, "score_one", lambda *_: pytest.fail("asked again"))
        (given,) = asked_ahead(ServedSignal(asking, HEAD), iter([batch]))
        found = ServedSignal(asking, HEAD).targets(given, labels)
        np.testing.assert_allclose(found.teacher.logprobs, expected.teacher.logprobs, atol=TOLERANCE)
        clear = (expected.teacher.logprobs[:, 0] - expected.teacher.logprobs[:, 1]).numpy() > TOLERANCE
        np.testing.assert_array_equal(found.teacher.ids[clear, 0], expected.teacher.ids[clear, 0])
        inside = expected.teacher.ids == labels[:, None]
        own = (expected.teacher.logprobs * inside).sum(-1)[inside.any(-1)]
        np.testing.assert_allclose(found.label_logprobs[inside.any(-1)], own, atol=TOLERANCE)
        asking.stop()
    (kept,) = (path for path in (tmp_path / "kept").iterdir() if path.is_dir())
    assert verify_dataset(kept).ok
    assert len(Dataset.open(kept)) == 6


def test_a_server_writes_what_the_student_does_as_its_weights_change(
    server: tuple[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distillkit.training.rollouts.server import ServerEngine

    url, _ = server
    monkeypatch.setenv("DISTILLKIT_API_KEY", "secret")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), load_tokenizer(str(folder))
    prompts = [Prompt(number, each.input_ids) for number, each in enumerate(documents(1, 5, 30, 100, 200))]
    student = Student(model, tokenizer, torch.float32, frozenset({1, 5}), prompts[2].ids, 257)
    sampling = Sampling(40, 0.0)
    where = RolloutServerConfig(base_url=url)
    engine = ServerEngine(student, sampling, where, tmp_path / "weights", batch_size=4, leads=True)
    own = HfEngine(model, sampling, stop=student.stop, pad_id=2)
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {name: tensor + torch.randn_like(tensor) * 0.02 for name, tensor in original.items()}
    found = []
    for weights in (original, changed, original):
        model.load_state_dict(weights)
        engine.synchronise()
        expected, given = ([ids.tolist() for ids in each.write(prompts, lambda *_: None)] for each in (own, engine))
        assert given == expected
        found.append(given)
    assert found[0] == found[2] != found[1]
    engine.sampling = Sampling(40, 0.9, 0.95, seed=3)
    drawn = [[ids.tolist() for ids in engine.write(order, lambda *_: None)] for order in (prompts, prompts[::-1])]
    assert drawn[0] == drawn[1][::-1] != found[0]


def test_what_a_server_does_not_give(
    server: tuple[str, Any], folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, process = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    options: dict[str, Any] = {"engine": "openai", "base_url": url, "max_seq_len": 256, "max_retries": 1}
    more = {**EXACT, "k": 16, "exact_k": 16}
    with refused(ConfigError, "8", "--max-logprobs 16", "k"):
        make_teacher(settings(folder, **options, compression_config=more))
    with refused(ConfigError, "257", "--max-seq-len 256"):
        make_teacher(settings(folder, **{**options, "max_seq_len": 257}))
    with refused(ConfigError, "tiny", "'large'"):
        make_teacher(settings(folder, **options, served_model="large"))

    served = make_teacher(settings(folder, **options))
    results = served.score(DOCUMENTS[2:4] * 200, WANTED)
    next(results)
    kill_group(process)
    with refused(CaptureError, "1"):
        list(results)


# -- a real model ------------------------------------------------------------------------------------------------------


def test_smollm2_at_k_128(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "examples" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    folder = tmp_path / "smollm2"
    demo.make_teacher(folder)
    tokenizer = load_tokenizer(str(folder))
    words = (ROOT / "README.md").read_text(encoding="utf-8")
    ids = np.array(tokenizer(words)["input_ids"][:900], dtype=np.int32)
    given = [TokenDocument(part, "README.md") for part in np.split(ids, [100, 200, 500])]
    options: dict[str, Any] = {"max_seq_len": 512, "compression_config": None, "preset": "recommended"}
    request = RowRequest(128, label_logprobs=True, last_row=True)
    expected = scores(make_teacher(settings(folder, **options)), given, request)
    teacher = make_teacher(settings(folder, engine="vllm", **options))
    assert isinstance(teacher, VLLMTeacher)
    found = scores(teacher, given, request)
    teacher.close()
    check_same(found, expected, 1e-3, apart=1e-3)
    worst = max(
        np.abs(one.rows.logprobs - other.rows.logprobs).max() for one, other in zip(found, expected, strict=True)
    )
    same = np.mean([np.mean(one.rows.ids == other.rows.ids) for one, other in zip(found, expected, strict=True)])
    print(json.dumps({"worst": float(worst), "same ids": float(same)}))
    assert same > 0.99


# -- an engine that dies, last: it takes the others' teacher with it ---------------------------------------------------


def kill_engine() -> None:
    """End the engine's process, as the system does when memory is out."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        # Engines of earlier tests may have ended without being waited for.
        if process.status() == psutil.STATUS_ZOMBIE:
            continue
        if "EngineCore" in process.name() + " ".join(process.cmdline()):
            process.kill()
            return
    pytest.fail("no engine is running")


def test_an_engine_that_dies_starts_anew_with_half_the_batch(
    teacher: VLLMTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    before = scores(teacher, DOCUMENTS, WANTED)
    results = teacher.score(DOCUMENTS, WANTED)
    found = [next(results)]
    kill_engine()
    found += list(results)
    assert all(isinstance(result, ScoredDocument) for result in found)
    assert sorted(result.index for result in found) == list(range(len(DOCUMENTS)))
    in_order = [
        result for result in sorted(found, key=lambda result: result.index) if isinstance(result, ScoredDocument)
    ]
    check_same(in_order, before, TOLERANCE, apart=TOLERANCE)
    assert teacher.batch_tokens == 256
    check_names(caplog.text, "256", "512", "--batch-tokens")

    results = teacher.score(DOCUMENTS, WANTED)
    next(results)
    kill_engine()
    with refused(CaptureError, "256"):
        list(results)

"""What engines answer becomes rows, or a reason; a server that stumbles is asked again."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from distillkit.capture import CaptureSettings, capture
from distillkit.capture.engine_settings import OpenAISettings, VLLMSettings
from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument
from distillkit.capture.teachers.make import make_teacher
from distillkit.capture.teachers.openai import OpenAITeacher, echoed_entries, prompt_entries
from distillkit.capture.teachers.ranked import RankedEntries, scored_document
from distillkit.capture.teachers.vllm import VLLMTeacher, batch_tokens_that_fit, checkpoint_hash, flat_entries
from distillkit.cli.compat.sample_logits_vllm import main as sample_logits_vllm
from distillkit.errors import CaptureError, ConfigError
from distillkit.shards import Dataset
from distillkit.types import TokenDocument
from support.refusals import check_names, refused
from support.served import Reply, ok, server
from support.teachers import EXACT, HEAD, write_text

K = 8
V = HEAD


def true_logprobs(ids: list[int]) -> np.ndarray:
    """(L, V) float32: some distributions; documents of one length have the same."""
    logits = np.random.default_rng(len(ids)).standard_normal((len(ids), V)) * 3
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def document(ids: list[int]) -> TokenDocument:
    return TokenDocument(np.array(ids, dtype=np.int32), "rows.jsonl, line 3")


def answer(ids: list[int], k: int = K, *, dense: np.ndarray | None = None, generated: int | None = None) -> Any:
    """What vLLM's FlatLogprobs holds: of each position the own token with its true rank, then the k best."""
    dense = true_logprobs(ids) if dense is None else dense
    own = ids[1:] if generated is None else [generated]
    rows = dense[:-1] if generated is None else dense[-1:]
    flat = SimpleNamespace(token_ids=[], logprobs=[], ranks=[], start_indices=[], end_indices=[])
    if generated is None:
        flat.start_indices.append(0)
        flat.end_indices.append(0)
    for token, row in zip(own, rows, strict=True):
        best = np.argsort(-row, kind="stable")[:k]
        flat.start_indices.append(len(flat.token_ids))
        flat.token_ids += [token, *best.tolist()]
        flat.logprobs += [float(row[token]), *row[best].tolist()]
        flat.ranks += [int((row >= row[token]).sum()), *range(1, k + 1)]
        flat.end_indices.append(len(flat.token_ids))
    return flat


# The first next token is the most probable one, the second the last of the k, the others are far from them.
BEST = np.argsort(-true_logprobs([0] * 12), axis=1)
IDS = [3, int(BEST[0, 0]), int(BEST[1, K - 1]), *BEST[2:11, 60].tolist()]


def scored(flat: Any) -> ScoredDocument | RejectedDocument:
    return scored_document(7, document(IDS), flat_entries(flat, skip=1), RowRequest(K, label_logprobs=True), V)


def test_rows_are_the_k_best_and_the_own_token_is_none_of_them_by_itself() -> None:
    dense = true_logprobs(IDS)
    ranks = [int((row >= row[token]).sum()) for token, row in zip(IDS[1:], dense, strict=False)]
    assert ranks[:2] == [1, K]
    assert min(ranks[2:]) > K
    result = scored(answer(IDS))
    assert isinstance(result, ScoredDocument)
    assert result.index == 7
    best = np.argsort(-dense[:-1], axis=1)[:, :K]
    np.testing.assert_array_equal(result.rows.ids, best)
    np.testing.assert_array_equal(result.rows.logprobs, np.take_along_axis(dense[:-1], best, 1))
    np.testing.assert_array_equal(result.label_logprobs, dense[np.arange(len(IDS) - 1), IDS[1:]])


def test_the_last_row_is_that_of_the_generated_token() -> None:
    dense = true_logprobs(IDS)
    entries = flat_entries(answer(IDS), skip=1).then(flat_entries(answer(IDS, generated=17)))
    request = RowRequest(K, label_logprobs=True, last_row=True)
    result = scored_document(0, document(IDS), entries, request, V, generated=17)
    assert isinstance(result, ScoredDocument)
    np.testing.assert_array_equal(result.rows.ids, np.argsort(-dense, axis=1)[:, :K])
    assert result.label_logprobs is not None
    assert len(result.label_logprobs) == len(IDS) - 1


def test_ranks_in_another_order_are_put_in_order() -> None:
    flat = answer(IDS)
    start, end = flat.start_indices[4], flat.end_indices[4]
    for values in (flat.token_ids, flat.logprobs, flat.ranks):
        values[start:end] = values[start:end][::-1]
    first, second = scored(flat), scored(answer(IDS))
    assert isinstance(first, ScoredDocument)
    assert isinstance(second, ScoredDocument)
    np.testing.assert_array_equal(first.rows.ids, second.rows.ids)


def _fewer(flat: Any) -> None:
    del flat.token_ids[-1], flat.logprobs[-1], flat.ranks[-1]
    flat.end_indices[-1] -= 1


def _repeated(flat: Any) -> None:
    flat.token_ids[flat.start_indices[3] + 2] = flat.token_ids[flat.start_indices[3] + 1]


def _nan(flat: Any) -> None:
    flat.logprobs[flat.start_indices[3] + 1] = float("nan")


def _clamped(flat: Any) -> None:
    flat.logprobs[flat.start_indices[3] + K] = -9999.0


def _own_clamped(flat: Any) -> None:
    flat.logprobs[flat.start_indices[2]] = -9999.0


def _missing(flat: Any) -> None:
    del flat.start_indices[-1], flat.end_indices[-1]
    for values in (flat.token_ids, flat.logprobs, flat.ranks):
        del values[-K - 1 :]


def _empty(flat: Any) -> None:
    start, end = flat.start_indices[3], flat.end_indices[3]
    for values in (flat.token_ids, flat.logprobs, flat.ranks):
        del values[start:end]
    flat.end_indices[3] = start
    for index in range(4, len(flat.start_indices)):
        flat.start_indices[index] -= K + 1
        flat.end_indices[index] -= K + 1


def _beyond(flat: Any) -> None:
    flat.token_ids[flat.start_indices[3] + 1] = V


def _too_much(flat: Any) -> None:
    flat.logprobs[flat.start_indices[3] + 1 : flat.start_indices[3] + 3] = [-0.1, -0.2]


def _other_prompt(flat: Any) -> None:
    flat.token_ids[flat.start_indices[3]] = int(BEST[2, 70])


# What is done to an answer, and what the reason names: after which of 12 tokens, and figures.
DAMAGE: list[tuple[Callable[[Any], None], list[str]]] = [
    (_fewer, ["10", "12", "7", "8"]),
    (_repeated, ["2", "12"]),
    (_nan, ["2", "12", "NaN"]),
    (_clamped, ["2", "12", "8"]),
    (_own_clamped, ["1", "12"]),
    (_missing, ["10", "11"]),
    (_empty, ["2", "12"]),
    (_beyond, ["2", "12", "128"]),
    (_too_much, ["2", "12"]),
    (_other_prompt, ["2", "12"]),
]


def test_what_is_no_distribution_is_refused() -> None:
    for damage, facts in DAMAGE:
        flat = answer(IDS)
        damage(flat)
        result = scored(flat)
        assert isinstance(result, RejectedDocument), damage
        assert result.index == 7
        check_names(result.reason, "rows.jsonl, line 3", *facts)


def test_batch_tokens_are_what_memory_has_room_for() -> None:
    def fit(free: float, head_size: int, logit_bytes: int = 2) -> int:
        return batch_tokens_that_fit(int(free), head_size, logit_bytes, where="of 80 GB", remedy="More")

    assert fit(8e9, 151_936) == 8192, "8.8k tokens would fit"
    assert fit(2.4e9, 151_936) == 2560 == int(2.4e9 / (151_936 * 6)) // 256 * 256
    assert fit(2.4e9, 151_936, 4) == 1792, "float32 logits beside float32 log-probabilities"
    assert fit(256 * 262_144 * 6, 262_144) == 256
    with refused(ConfigError, "256", "262,144", "6 B", "403 MB", "of 80 GB"):
        fit(256 * 262_144 * 6 - 1, 262_144)
    with refused(ConfigError, "0 bytes"):
        fit(-1, 1000)


def test_another_checkpoint_has_another_hash(tmp_path: Path) -> None:
    weights = np.random.default_rng(0).bytes(3_000_000)
    (tmp_path / "model.safetensors").write_bytes(weights)
    before = checkpoint_hash(tmp_path)
    assert checkpoint_hash(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(weights[:1_500_000] + weights[1_500_000:][::-1])
    assert checkpoint_hash(tmp_path) != before


# -- settings ----------------------------------------------------------------------------------------------------------


def test_settings_of_another_engine_are_refused() -> None:
    for options, facts in (
        ({"engine": "vlm"}, ["engine", "'vlm'", "hf", "vllm", "openai"]),
        ({"tensor_parallel_size": 2}, ["tensor_parallel_size", "2", "vllm", "hf"]),
        ({"engine": "vllm", "head_rows": 7}, ["head_rows", "7", "hf"]),
        ({"engine": "vllm", "base_url": "http://a"}, ["base_url", "'http://a'", "openai"]),
        ({"engine": "openai", "base_url": "x", "dtype": "float32"}, ["dtype", "hf", "vllm"]),
        ({"engine": "openai"}, ["base_url", "openai"]),
        ({"engine": "vllm", "gpu_memory_utilization": 1.0}, ["gpu_memory_utilization", "1"]),
        ({"engine": "vllm", "max_model_len": 0}, ["max_model_len", "1"]),
        ({"engine": "openai", "base_url": "x", "request_timeout": 0}, ["request_timeout", "0"]),
    ):
        with refused(ConfigError, *facts):
            CaptureSettings(model="m", dataset="d", output="o", **options)


def test_the_engine_is_in_the_header_where_it_decides() -> None:
    settings = {"model": "m", "dataset": "d", "output": "o"}
    assert "engine" not in CaptureSettings(**settings).identity()
    deciding = CaptureSettings(**settings, engine="vllm", quantization="fp8", batch_tokens=512).identity()
    assert (deciding["engine"], deciding["quantization"]) == ("vllm", "fp8")
    assert "batch_tokens" not in deciding
    text = json.dumps(CaptureSettings(**settings, engine="openai", base_url="http://host:1/v1").identity())
    assert "host" not in text


def test_vllm_that_is_not_there(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillkit.capture.teachers.vllm.find_spec", lambda name: None)
    settings = CaptureSettings(model=str(teacher), dataset="d", output="o", engine="vllm", compression_config=EXACT)
    with refused(ConfigError, "pip install 'distillkit[vllm]'"):
        make_teacher(settings)


def test_an_engine_without_a_teacher_is_refused(teacher: Path) -> None:
    settings = CaptureSettings(model=str(teacher), dataset="d", output="o", compression_config=EXACT)
    with refused(ConfigError, "engine", "'other'"):
        make_teacher(settings.model_copy(update={"engine": "other"}))


def test_vllm_needs_room_for_a_token_more(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillkit.capture.teachers.vllm.find_spec", lambda name: True)
    with refused(ConfigError, "max_model_len", "64", "65"):
        VLLMTeacher(str(teacher), VLLMSettings(max_model_len=64), k=8, max_seq_len=64)


def test_published_options_are_understood(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[CaptureSettings] = []
    monkeypatch.setattr("distillkit.cli.compat.sample_logits_vllm.show_reports", taken.extend)
    (tmp_path / "codec.yaml").write_text(json.dumps({**EXACT, "d": 100}))
    sizes = "--tensor-parallel-size 2 --pipeline-parallel-size 3 --max-model-len 600 --gpu-memory-utilization 0.8"
    others = (
        "--dtype bfloat16 --quantization fp8 --samples 5 --seed 1 --split test --macrobatch-size 64 --max-workers 4"
    )
    switches = "--enable-expert-parallel --no-trust-remote-code --apply-chat-template --auto-vocab-size"
    arguments = (
        f"--dataset d --output o --max-seq-len 512 --dataset-configuration c {sizes} {others} {switches}".split()
    )
    files = ["--model", str(teacher), "--tokenizer", str(teacher), "--compression-config", str(tmp_path / "codec.yaml")]
    sample_logits_vllm.main([*files, *arguments], standalone_mode=False)
    (settings,) = taken
    assert (settings.engine, settings.vllm.tensor_parallel_size, settings.vllm.pipeline_parallel_size) == ("vllm", 2, 3)
    assert (settings.vllm.max_model_len, settings.vllm.quantization) == (600, "fp8")
    assert settings.vllm.enable_expert_parallel
    assert settings.codec(HEAD).vocab_size == HEAD, "100 in the file"

    sample_logits_vllm.main([*files, *arguments, "--no-auto-vocab-size"], standalone_mode=False)
    assert taken[1].compression_config == str(tmp_path / "codec.yaml")


# -- a server ----------------------------------------------------------------------------------------------------------


def completion(body: dict[str, Any], *, ids_in_echo: bool = False) -> dict[str, Any]:
    """A choice: prompt log-probabilities as vLLM gives them or, where a server only knows echo, those of OpenAI."""
    ids, name = body["prompt"], "token_id:{}" if ids_in_echo else "word{}"
    positions: list[Any] = [None]
    for token, row in zip(ids[1:], true_logprobs(ids), strict=False):
        best = np.argsort(-row)[:K].tolist()
        order = [token, *(i for i in best if i != token)]
        positions.append(
            {
                str(i): {"logprob": float(row[i]), "rank": int((row >= row[i]).sum()), "decoded_token": "x"}
                for i in order
            }
        )
    if "prompt_logprobs" in body:
        return {"text": "", "prompt_logprobs": None if body.get("echo_only") else positions, "logprobs": None}
    top = [p and {name.format(i): entry["logprob"] for i, entry in p.items()} for p in positions]
    tokens = [name.format(i) for i in ids]
    return {"text": "", "logprobs": {"tokens": [*tokens, "…"], "top_logprobs": [*top, {}]}}


def ask(url: str, **options: Any) -> OpenAITeacher:
    return OpenAITeacher(OpenAISettings(base_url=url, **options), head_size=V, k=K, max_seq_len=64)


# The last one's tokens have the ranks 1 and K and lower ones: each is given once, K ids a position or one more.
DOCUMENTS = [document(np.random.default_rng(n).integers(0, V, n).tolist()) for n in (2, 9, 33, 64)] + [document(IDS)]


def check(results: Iterator[ScoredDocument | RejectedDocument]) -> None:
    found = {result.index: result for result in results}
    assert sorted(found) == list(range(len(DOCUMENTS)))
    for index, given in enumerate(DOCUMENTS):
        result, dense = found[index], true_logprobs(given.input_ids.tolist())[:-1]
        assert isinstance(result, ScoredDocument), result
        np.testing.assert_array_equal(result.rows.ids, np.argsort(-dense, axis=1)[:, :K])
        np.testing.assert_array_equal(result.label_logprobs, dense[np.arange(len(dense)), given.input_ids[1:]])


def test_a_server_that_stumbles_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("DISTILLKIT_API_KEY", "secret")
    stumbles = iter([200, 503, 429, 200, 502])

    def reply(body: dict[str, Any]) -> Reply:
        status = next(stumbles, 200)
        return ok(completion(body)) if status == 200 else (status, {"error": {"message": "busy"}})

    with server(reply) as (url, requests):
        teacher = ask(url, concurrency=3, max_retries=4)
        assert teacher.identity == {"name": "tiny", "revision": None, "engine": "openai"}
        check(teacher.score(DOCUMENTS, RowRequest(K, label_logprobs=True)))
        assert len(requests) == 1 + len(DOCUMENTS) + 3
        assert {request["key"] for request in requests} == {"Bearer secret"}
        assert all((request["max_tokens"], request["prompt_logprobs"]) == (1, K) for request in requests)


def test_a_server_that_only_echoes(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")

    def reply(body: dict[str, Any], ids: bool) -> Reply:
        return ok(completion({**body, "echo_only": True}, ids_in_echo=ids))

    with server(lambda body: reply(body, True)) as (url, _):
        check(ask(url).score(DOCUMENTS, RowRequest(K, label_logprobs=True)))
    with (
        server(lambda body: reply(body, False)) as (url, _),
        refused(ConfigError, "prompt_logprobs", "echo"),
    ):
        ask(url)


def test_what_a_server_can_not_give_is_said_plainly() -> None:
    pytest.importorskip("openai")
    said = "Requested prompt logprobs of 8, which is greater than max allowed: 3"
    with (
        server(lambda body: (400, {"error": {"message": said}})) as (url, _),
        refused(ConfigError, "3", "--max-logprobs 8", "k"),
    ):
        ask(url)
    with (
        server(lambda body: (401, {"error": {"message": "no"}})) as (url, _),
        refused(ConfigError, "DISTILLKIT_API_KEY", "OPENAI_API_KEY"),
    ):
        ask(url)
    with server(lambda body: ok(completion(body))) as (url, _):
        with refused(ConfigError, "tiny", "'large'"):
            ask(url, served_model="large")
        with refused(ConfigError, "65", "--max-seq-len 64"):
            OpenAITeacher(OpenAISettings(base_url=url), head_size=V, k=K, max_seq_len=65)


def test_a_document_that_a_server_can_not_do_and_a_server_that_is_gone() -> None:
    pytest.importorskip("openai")

    def reply(body: dict[str, Any]) -> Reply:
        if len(body["prompt"]) == 9:
            return 500, {"error": {"message": "Out of range float values are not JSON compliant"}}
        return ok(completion(body))

    with server(reply) as (url, _):
        teacher = ask(url, max_retries=1)
        rejected = [
            result for result in teacher.score(DOCUMENTS, RowRequest(K)) if isinstance(result, RejectedDocument)
        ]
    assert [result.index for result in rejected] == [1]
    check_names(rejected[0].reason, "rows.jsonl, line 3", "Out of range float values are not JSON compliant")
    with refused(CaptureError, "1"):
        list(teacher.score(DOCUMENTS, RowRequest(K)))
    # Not one that was never there.
    with refused(CaptureError, "127.0.0.1", "--base-url"):
        ask(url, max_retries=0)


def test_a_capture_from_a_server_has_neither_key_nor_url(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai")
    monkeypatch.setenv("DISTILLKIT_API_KEY", "top-secret")
    write_text(tmp_path / "rows.jsonl", 5)
    with server(lambda body: ok(completion(body))) as (url, _):
        options: dict[str, Any] = {"max_seq_len": 64, "compression_config": EXACT}
        options |= {"engine": "openai", "base_url": url, "progress": False}
        capture(model=str(teacher), dataset=str(tmp_path / "rows.jsonl"), output=tmp_path / "out", **options)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.header.teacher == {"name": "tiny", "revision": None, "engine": "openai"}
    assert len(dataset) >= 5
    for path in (tmp_path / "out").iterdir():
        for hidden in (b"top-secret", b"127.0.0.1"):
            assert hidden not in path.read_bytes()


def test_a_server_is_asked_once_for_what_a_prior_is_learned_from(teacher: Path, tmp_path: Path) -> None:
    pytest.importorskip("openai")
    write_text(tmp_path / "rows.jsonl", 20)
    config = {"vocab_size": V, "k": K, "step": 0.003}
    with server(lambda body: ok(completion(body))) as (url, requests):
        options: dict[str, Any] = {"max_seq_len": 64, "compression_config": config, "prior_rows": 200}
        options |= {"engine": "openai", "base_url": url, "shard_tokens": 200, "progress": False}
        report = capture(model=str(teacher), dataset=str(tmp_path / "rows.jsonl"), output=tmp_path / "out", **options)
    prompts = [tuple(request["prompt"]) for request in requests[1:]]
    dataset = Dataset.open(tmp_path / "out")
    assert sorted(prompts) == sorted(tuple(each.input_ids.tolist()) for each in dataset)
    assert report.prior_bytes > 0
    for each, rows in dataset.decoded():
        best = np.argsort(-true_logprobs(each.input_ids.tolist())[:-1], axis=1)[:, :K]
        np.testing.assert_array_equal(np.sort(rows.ids), np.sort(best))


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with refused(ConfigError, "pip install 'distillkit[openai]'"):
        ask("http://127.0.0.1:1/v1")


def test_answers_that_lack_positions() -> None:
    entries = prompt_entries({"prompt_logprobs": [None, {"5": {"logprob": -0.5, "rank": 1}}, None]})
    assert entries.counts.tolist() == [1, 0]
    assert isinstance(entries, RankedEntries)
    # Tokens are written as text there, which may stand for several ids.
    with refused(ValueError):
        echoed_entries({"logprobs": {"tokens": ["a", "b"], "top_logprobs": [None, {"b": -1.0}]}}, 2)

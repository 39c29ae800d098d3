"""Whatever a server answers: nothing invalid is stored, no bound is exceeded, no secret is printed."""

from __future__ import annotations

import base64
import gc
import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any

import numpy as np
import pytest

import support.attacks as attacks
from distillkit.capture.engine_settings import OpenAISettings
from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument
from distillkit.configuration.secrets import redacted
from distillkit.errors import CaptureError, ConfigError, DistillKitError
from support.hostile_server import MODELS, Answer, hostile_server, plain, slowly
from support.refusals import check_names, refused
from test_engines import DOCUMENTS, IDS, K, V, completion, document, ok, true_logprobs

pytest.importorskip("openai")

# How often the campaigns are repeated, each time with other seeds.
ROUNDS = 20 if attacks.LONG else 1
KEY = "sesame-8f31-open"
LONGEST = 64
# What the teacher allows for one answer of LONGEST tokens: see _OTHER_BYTES and _BYTES_PER_ENTRY.
ALLOWED = (4 << 20) + (LONGEST + 1) * (K + 1) * 256


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISTILLKIT_API_KEY", KEY)


def ask(url: str, **options: Any) -> Any:
    from distillkit.capture.teachers.openai import OpenAITeacher

    settings = OpenAISettings(base_url=url, **{"max_retries": 0, "request_timeout": 5.0, **options})
    return OpenAITeacher(settings, head_size=V, k=K, max_seq_len=LONGEST)


def honest(body: dict[str, Any]) -> bytes:
    return plain(json.dumps(ok(completion(body))[1]).encode())


def served(spoil: Callable[[dict[str, Any], dict[str, str]], Iterator[bytes]]) -> Answer:
    """Honest about its models and about the probe, and whatever `spoil` gives for documents."""

    def answer(path: str, body: dict[str, Any], headers: dict[str, str]) -> Iterator[bytes]:
        if path.endswith("/models"):
            return iter([plain(MODELS)])
        return iter([honest(body)]) if len(body["prompt"]) == 3 else spoil(body, headers)

    return answer


# -- bounds ------------------------------------------------------------------------------------------------------------


def bomb(size: int) -> Iterator[bytes]:
    """Compressed zeros, a million bytes of which are a thousand on the wire."""
    packer = zlib.compressobj(9, wbits=zlib.MAX_WBITS | 16)
    yield b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nConnection: close\r\n\r\n"
    for _ in range(size >> 20):
        yield packer.compress(b" " * (1 << 20))
    yield packer.flush()


def endless() -> Iterator[bytes]:
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    yield from repeat(b"10000\r\n" + b" " * (1 << 16) + b"\r\n")


def test_an_answer_is_bounded_in_bytes_by_what_was_asked_for() -> None:
    for spoil in (lambda: bomb(2 << 30), endless):
        with hostile_server(served(lambda body, headers, spoil=spoil: spoil())) as (url, asked):
            teacher = ask(url)
            with refused(CaptureError, "127.0.0.1", f"{ALLOWED / 1e6:.3g} MB"):
                list(teacher.score(DOCUMENTS[:1], RowRequest(K)))
        # What was read of it is the limit at most, and what sockets hold.
        assert asked[-1]["sent"] < 3 * ALLOWED
    # Also where it is about models, errors, or packed twice or in another way.
    twice = gzip.compress(gzip.compress(b" " * (64 << 20)))
    for answer, facts in (
        (lambda *_: bomb(64 << 20), ["MB"]),
        (lambda *_: iter([plain(b" " * (8 << 20), "500 Oh")]), ["MB"]),
        (lambda *_: iter([plain(twice, Content_Encoding="gzip, gzip")]), ["gzip, gzip"]),
        (lambda *_: iter([plain(b"x", Content_Encoding="br")]), ["br"]),
        (lambda *_: iter([plain(b"not packed", Content_Encoding="gzip")]), ["gzip"]),
    ):
        with hostile_server(answer) as (url, _), refused(CaptureError, "127.0.0.1", *facts):
            ask(url)


def test_connections_end_with_the_teacher() -> None:
    with hostile_server(served(lambda body, headers: iter([honest(body)]))) as (url, _):
        teacher = ask(url)
        client = teacher._client
        assert not client.is_closed()
        del teacher
        gc.collect()
        assert client.is_closed()


def test_answers_of_the_allowed_size_are_read_packed_or_not() -> None:
    def spoil(body: dict[str, Any], headers: dict[str, str]) -> Iterator[bytes]:
        content = json.dumps(ok(completion(body))[1]).encode()
        padded = content + b" " * (ALLOWED - len(content))
        yield plain(gzip.compress(padded), Content_Encoding="gzip") if len(body["prompt"]) == 9 else plain(padded)

    with hostile_server(served(spoil)) as (url, _):
        results = list(ask(url).score(DOCUMENTS, RowRequest(K)))
    assert [type(result) for result in results] == [ScoredDocument] * len(DOCUMENTS)


@pytest.mark.parametrize("start", [0, 20, 200], ids=["head", "in the head", "body"])
def test_the_time_limit_is_for_the_whole_answer(start: int) -> None:
    def spoil(body: dict[str, Any], headers: dict[str, str]) -> Iterator[bytes]:
        whole = honest(body)
        yield whole[:start]
        yield from slowly(whole[start:])

    with hostile_server(served(spoil)) as (url, _):
        teacher = ask(url, request_timeout=0.5)
        with refused(CaptureError, "0.5", "--request-timeout"):
            list(teacher.score([document(IDS)], RowRequest(K)))


def test_redirects_stay_on_their_host() -> None:
    def moved(status: str, target: str) -> Answer:
        def answer(path: str, body: dict[str, Any], headers: dict[str, str]) -> Iterator[bytes]:
            if path.startswith("/v1"):
                yield plain(b"", status, Location=target + path)
            else:
                yield plain(MODELS) if path.endswith("/models") else honest(body)

        return answer

    with hostile_server(moved("307 There", "/moved")) as (url, asked):
        results = list(ask(url).score(DOCUMENTS, RowRequest(K)))
        assert [type(result) for result in results] == [ScoredDocument] * len(DOCUMENTS)
        assert {request["path"] for request in asked} > {"/moved/v1/completions", "/v1/completions"}
    with hostile_server(served(lambda body, headers: iter([honest(body)]))) as (other, elsewhere):
        # Another port is another server; so is another name, even of the same machine.
        for target in (other, other.replace("127.0.0.1", "localhost")):
            for status in ("301 There", "302 There", "303 There", "307 There", "308 There"):
                place = target.removesuffix("/v1")
                with hostile_server(moved(status, place)) as (url, _), refused(ConfigError, "--base-url", place):
                    ask(url)
        assert elsewhere == []
    # A completion that becomes a GET, and a circle.
    for status, target in (("303 There", "/moved"), ("307 There", "/v1")):
        with hostile_server(moved(status, target)) as (url, asked), refused(DistillKitError, "--base-url"):
            ask(url, served_model="tiny")
        assert len(asked) < 8


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_what_a_server_repeats_of_the_key_is_hidden(capfd: pytest.CaptureFixture[str]) -> None:
    """In errors, in the reasons of left out documents, in names of models; with the user and password of the URL."""
    spoken = "\x1b]0;owned\x07\u202e\ud800"

    def echo(headers: dict[str, str], status: str = "400 No") -> bytes:
        said = f"{spoken} got {headers} {KEY} and {base64.b64encode(KEY.encode()).decode()}"
        return plain(json.dumps({"error": {"message": said}}).encode(), status)

    def by_name(path: str, body: dict[str, Any], headers: dict[str, str]) -> Iterator[bytes]:
        yield plain(json.dumps({"data": [{"id": f"model {headers}"}]}).encode())

    statuses = (400, 401, 403, 404, 409, 418, 429, 500)
    by_status: list[Answer] = [
        lambda path, body, headers, status=status: iter([echo(headers, f"{status} No")]) for status in statuses
    ]
    said = []
    for answer in (by_name, *by_status):
        with hostile_server(answer) as (url, _):
            for base in (url, url.replace("//", "//someone:pass%2Fword-1@")):
                with pytest.raises(DistillKitError) as caught:
                    ask(base)
                said.append(str(caught.value))
    with hostile_server(served(lambda body, headers: iter([echo(headers)]))) as (url, _):
        (rejected,) = ask(url).score([document(IDS)], RowRequest(K))
    assert isinstance(rejected, RejectedDocument)
    check_names(rejected.reason, "rows.jsonl, line 3")
    said.append(rejected.reason)
    for text in (*said, *capfd.readouterr()):
        for hidden in (KEY, "pass%2Fword-1", "pass/word-1", base64.b64encode(b"someone:pass").decode()[:12]):
            assert hidden not in text
        assert text.isprintable() or not text
        text.encode()


def test_secrets_of_the_environment_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "aws+secret/1")
    monkeypatch.setenv("SHORT_TOKEN", "word")
    assert redacted("aws+secret/1 and aws%2Bsecret%2F1, a word", "given") == "*** and ***, a word"
    for spelling in (r"a\/b&c", "a%252Fb%2526c", "a/b&amp;c", base64.b64encode(b"a/b&c").decode()):
        assert redacted(f"before {spelling} after", "a/b&c").replace("=", "") == "before *** after"


# -- what is answered --------------------------------------------------------------------------------------------------

HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1.5, 2**31, 2**63, 2**70, -(2**70), 10**400, 1e308, float("nan"), float("inf")),
    *(-float("inf"), "", "x", "-0.5", " 7 ", "+7", "1_0", "٣", "\ud800", "\x1b[2J", "a" * 10_000, [], {}, [[]], [None]),
    *({"": None}, {"logprob": -1.0}, {"logprob": 0.5, "rank": 1}, {"logprob": -0.1, "rank": 0}, [[[[1]]]]),
]
NAMES = ("", "-1", "7", "007", str(V), str(2**70), "token_id:9", "token_id:-1", "٣")
DEEP = b"[" * 200_000 + b"]" * 200_000


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths to everything inside a JSON value."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def mutate(content: Any, rng: random.Random) -> Any:
    """Replace, remove, repeat or rename something of a JSON value."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        *path, last = rng.choice(list(places(content)) or [(0,)])
        holder = content
        for key in path:
            holder = holder[key]
        if not isinstance(holder, (dict, list)) or not holder:
            return rng.choice(HOSTILE)
        change = rng.randrange(4)
        if change < 2:
            holder[last] = rng.choice(HOSTILE)
        elif change == 2:
            del holder[last]
        elif isinstance(holder, list):
            holder.insert(last, rng.choice(holder))
        else:
            holder[rng.choice(NAMES)] = holder.pop(last)
    return content


def check_valid(result: ScoredDocument | RejectedDocument, tokens: int) -> None:
    """A result is a reason that can be printed, or rows that the codec may get."""
    if isinstance(result, RejectedDocument):
        assert result.reason.isprintable()
        assert len(result.reason) < 1000
        return
    ids, logprobs, labels = np.asarray(result.rows.ids), np.asarray(result.rows.logprobs), result.label_logprobs
    assert labels is not None
    assert ids.shape == logprobs.shape == (tokens, K)
    assert labels.shape == (len(IDS) - 1,)
    assert np.isfinite(logprobs).all()
    assert np.isfinite(labels).all()
    assert labels.max() < 0.01
    assert np.exp(logprobs.astype(np.float64)).sum(1).max() <= 1.01
    assert (np.diff(logprobs, axis=1) <= 0).all()
    assert ids.min() >= 0
    assert ids.max() < V
    assert all(len(set(row)) == K for row in ids.tolist())


@pytest.mark.parametrize("echoes", [False, True], ids=["prompt_logprobs", "echo"])
def test_mutated_answers_are_refused_or_are_distributions(echoes: bool) -> None:
    """By seed: JSON with a part replaced, removed, repeated or renamed, and bytes that are no JSON."""
    rng = random.Random(2026)
    true = true_logprobs(IDS)

    def spoil(body: dict[str, Any], headers: dict[str, str]) -> Iterator[bytes]:
        content = mutate(
            json.loads(json.dumps(ok(completion({**body, "echo_only": echoes}, ids_in_echo=True))[1])), rng
        )
        data = json.dumps(content).encode()
        if rng.random() < 0.1:
            data = rng.choice((DEEP, b"", b"<html>", b"\xff\xfe{", data[: len(data) // 2], b"[" + b"9" * 5000 + b"]"))
        yield plain(data, rng.choice(("200 OK", "200 OK", "200 OK", "204 Empty", "400 No", "500 Oh", "999 What")))

    def answer(path: str, body: dict[str, Any], headers: dict[str, str]) -> Iterator[bytes]:
        if path.endswith("/completions") and len(body["prompt"]) == 3 and echoes:
            return iter([plain(json.dumps(ok(completion({**body, "echo_only": True}, ids_in_echo=True))[1]).encode())])
        return served(spoil)(path, body, headers)

    outcomes, said = {"stored": 0, "rejected": 0}, list[str]()
    with hostile_server(answer) as (url, _):
        teacher = ask(url)
        for _ in range(250 * ROUNDS):
            try:
                (result,) = teacher.score([document(IDS)], RowRequest(K, label_logprobs=True))
            except CaptureError as error:
                said.append(str(error))
                continue
            check_valid(result, len(true) - 1)
            outcomes["stored" if isinstance(result, ScoredDocument) else "rejected"] += 1
    assert min(*outcomes.values(), len(said)) > 5
    assert all(text.isprintable() for text in said)


def test_mutated_lists_of_models_are_refused_or_used() -> None:
    rng = random.Random(2027)

    def answer(path: str, body: dict[str, Any], headers: dict[str, str]) -> Iterator[bytes]:
        if not path.endswith("/models"):
            return iter([honest(body)])
        content = {
            "object": "list",
            "data": [{"id": "tiny", "max_model_len": 65}, {"id": "other"}][: rng.choice((1, 2))],
        }
        data = json.dumps(mutate(content, rng)).encode()
        data = rng.choice((DEEP, b"", b"<html>", b"\xff\xfe{", data[:20])) if rng.random() < 0.2 else data
        return iter(
            [plain(data, Content_Type=rng.choice(("application/json", "text/html", "text/plain; charset=hex")))]
        )

    refusals = []
    with hostile_server(answer) as (url, _):
        for _ in range(50 * ROUNDS):
            try:
                assert ask(url, served_model=rng.choice((None, "tiny"))).identity["name"] == "tiny"
            except DistillKitError as error:
                refusals.append(str(error))
    assert 5 < len(refusals) / ROUNDS < 47
    assert all(text.isprintable() and len(text) < 2000 for text in refusals)


def test_what_is_no_web_address_is_refused_when_it_is_read() -> None:
    for url in (
        "x",
        "http://",
        "ftp://h/v1",
        "http://h:99999999/v1",
        "http://[",
        "http://h/ v1",
        "http://h\x1b/v1",
        "file:///x",
    ):
        with pytest.raises(ValueError, match="base_url"):
            OpenAISettings(base_url=url)
    with pytest.raises(ValueError, match="base_url") as caught:
        OpenAISettings(base_url="ftp://me:secret-1@h/v1")
    assert "must be a URL such as http://localhost:8000/v1, found 'ftp://me:***@h/v1'" in str(caught.value)

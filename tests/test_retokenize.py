"""Captures in the tokens of a student with another tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from distillkit.cli.main import cli
from distillkit.codec import Codec, preset
from distillkit.codec.config import DistributionQuantizationConfig
from distillkit.errors import ConfigError, InputError, MismatchError
from distillkit.hub.dataset_card import dataset_card
from distillkit.reports.inspection import inspect_dataset
from distillkit.retokenize import Settings, retokenize
from distillkit.retokenize.token_map import TokenMap
from distillkit.retokenize.vocabulary import read_vocabulary
from distillkit.shards import Dataset, Header, ShardWriter, verify_dataset
from distillkit.text.tokenizer import fingerprint, vocab_size
from distillkit.types import SparseLogprobs
from support.refusals import check_names, refused
from support.scripts import load_script

TEXT = (
    "The theory of theories: there, then, the other theorist's thesis is that these themes are theirs.  "
    "A cat sat on the mat, and the catalogue of cats grew;\n\nnaïve café owners said 12345 times: “déjà vu”. "
    "def f(x):\n    return x+1  # the end 🙂🙂\n"
) * 3
WORDS = TEXT.split(" ")


def byte_level(size: int, *, eos: str = "</s>", texts: Sequence[str] = (TEXT,)) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[eos, "<x>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)


def sentencepiece(size: int, *, unigram: bool = False) -> PreTrainedTokenizerFast:
    """As Llama's: spaces are ▁, one more before the text, other characters are bytes; <s> before it."""
    escaped = [word.replace(" ", "▁") for word in (TEXT, TEXT.upper()[:200])]
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    if unigram:
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        backend.train_from_iterator([TEXT], trainer)
        content = json.loads(backend.to_str())
        content["model"]["byte_fallback"] = True
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special, limit_alphabet=60, show_progress=False, max_token_length=12
        )
        backend.pre_tokenizer = pre_tokenizers.Split("▁", behavior="merged_with_next")
        backend.train_from_iterator(escaped, trainer)
        content = json.loads(backend.to_str())
        content["pre_tokenizer"] = {
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first",
            "split": False,
        }
    # Only the tokens for bytes are trained as special ones, so that they are there.
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    content["post_processor"] = json.loads(_begins().__getstate__())
    backend = Tokenizer.from_str(json.dumps(content))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _begins() -> Any:
    from tokenizers import processors

    return processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])


STUDENTS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "longer tokens": lambda: byte_level(350),
    "shorter tokens": lambda: byte_level(280, eos="<end>", texts=[TEXT[::-1], TEXT]),
    "sentencepiece": lambda: sentencepiece(480),
    "unigram": lambda: sentencepiece(420, unigram=True),
}


def teacher_rows(
    ids: np.ndarray[Any, Any], size: int, k: int, seed: int, *, spread: float = 2.0, best: float = 9.0
) -> SparseLogprobs:
    """The k most probable ids of random rows over a vocabulary, in which the text's own tokens are likely."""
    generator = np.random.default_rng(seed)
    count = len(ids) - 1
    # Of a large vocabulary, only some ids can come next.
    some = np.stack([generator.choice(size, min(size, 400), replace=False) for _ in range(count)])
    some[np.arange(count), (some == ids[1:, None]).argmax(-1)] = ids[1:]
    logits = generator.standard_normal(some.shape) * spread
    logits += (some == ids[1:, None]) * generator.uniform(0, best, (count, 1))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-logprobs, axis=-1, kind="stable")[:, :k]
    found, values = np.take_along_axis(some, order, -1), np.take_along_axis(logprobs, order, -1)
    return SparseLogprobs(found, values.astype(np.float32))


def exact(size: int, k: int) -> DistributionQuantizationConfig:
    """Stores all k values of a row as they are."""
    return DistributionQuantizationConfig(
        d=size, k=k, exact_k=k, exact_dtype="float32", polynomial_terms=None, residual_bins=[], delta_encoding=False
    )


def write(
    folder: Path,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    k: int,
    masks: bool = False,
    labels: bool = False,
    **shape: float,
) -> list[tuple[Any, SparseLogprobs, Any]]:
    """A capture of texts, each ended, with all values stored as they are."""
    size = vocab_size(tokenizer)
    codec = Codec(exact(size, k))
    header = Header(
        codec=codec.to_dict(),
        vocab_size=size,
        head_size=size,
        tokenizer={"name": "teacher", "fingerprint": fingerprint(tokenizer)},
    )
    written = []
    with ShardWriter(folder, header, shard_tokens=100) as writer:
        for number, text in enumerate(texts):
            ids = np.array(tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])
            full = teacher_rows(ids, size, min(size, 400), number, **shape)
            rows = SparseLogprobs(full.ids[:, :k].copy(), full.logprobs[:, :k].copy())
            own = np.take_along_axis(full.logprobs, np.argmax(full.ids == ids[1:, None], -1)[:, None], -1)[:, 0]
            mask = np.arange(len(ids)) % 7 > 2 if masks else None
            writer.write(ids, rows, loss_mask=mask, label_logprobs=own if labels else None)
            written.append((ids, rows, mask))
    return written


def save(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


TEXTS = [" ".join(WORDS[start : start + 25]) for start in range(0, len(WORDS), 25)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(byte_level(300), tmp_path_factory.mktemp("tokenizers") / "teacher")


@pytest.fixture(scope="module")
def capture(teacher: Path) -> Path:
    folder = teacher.parent / "capture"
    write(folder, PreTrainedTokenizerFast.from_pretrained(teacher), TEXTS, k=200)
    return folder


def settings(capture: Path, out: Path, student: Path, **more: Any) -> Settings:
    return Settings(str(capture), str(out), str(student), shard_tokens=250, **more)


# -- rows --------------------------------------------------------------------------------------------------------------


class Oracle:
    """The student's rows by the definition: every continuation by one token of the teacher is written out and
    tokenised as a whole. Needs rows over the whole vocabulary.

    Args:
        teacher, student: the vocabularies, and the map between them for the bytes of special tokens.
    """

    def __init__(self, token_map: TokenMap, ids: Any, rows: SparseLogprobs) -> None:
        self.map, self.ids = token_map, ids.tolist()
        self.ends = np.cumsum([len(token_map.text_of([number])) for number in self.ids]).tolist()
        self.p = [
            dict(zip(i, np.exp(p.astype(float)), strict=True))
            for i, p in zip(rows.ids.tolist(), np.asarray(rows.logprobs), strict=True)
        ]
        self.cache: dict[tuple[int, ...], list[int]] = {}

    def learn(self, row: int) -> None:
        """Tokenises all continuations of a row, as wholes."""
        begun = self.ids[: row + 1]
        wanted = [(*begun, number) for number in self.p[row]]
        ended = [ids for ids in wanted if ids[-1] in self.map.special]
        others = [ids for ids in wanted if ids[-1] not in self.map.special]
        found = self.map.student.encode([self.map.text_of(ids) for ids in others], ["here"] * len(others))
        self.cache |= {ids: own for ids, (own, _) in zip(others, found, strict=True)}
        [(own, _)] = self.map.student.encode([self.map.text_of(begun)], ["here"])
        self.cache |= {ids: [*own, self.map.special[ids[-1]]] for ids in ended}

    def tokens(self, ids: tuple[int, ...]) -> list[int]:
        """The student's tokens of the teacher's."""
        if ids not in self.cache:
            self.learn(len(ids) - 2)
        return self.cache[ids]

    def row(self, student: list[int], position: int, end_of: list[int]) -> dict[int, float] | None:
        """The distribution after a position of the student's tokens (without what begins a text)."""
        at = end_of[position]
        row = max((n for n in range(len(self.ids) - 1) if self.ends[n] <= at), default=None)
        if row is None or at >= self.ends[-1]:
            return None
        read = student[: position + 1]
        found: dict[int, float] = {}
        total = 0.0
        # What the row before says goes on beyond its true token; earlier rows are not looked at.
        last, weight = max(row - 1, 0), 1.0
        while True:
            for number, p in self.p[last].items():
                on_path = number == self.ids[last + 1]
                if on_path and last + 1 < len(self.ids) - 1 and self.ends[last + 1] <= end_of[position + 1]:
                    # What follows it is known.
                    following = weight * p
                    continue
                tokens = student if on_path else self.tokens((*self.ids[: last + 1], number))
                if on_path:
                    following = 0.0
                if tokens[: position + 1] != read:
                    continue
                total += weight * p
                if len(tokens) > position + 1:
                    found[tokens[position + 1]] = found.get(tokens[position + 1], 0.0) + weight * p
            if not following:
                return {token: p / total for token, p in found.items()}
            last, weight = last + 1, following


@pytest.mark.parametrize("name", sorted(STUDENTS))
def test_rows_are_those_of_all_continuations_written_out(tmp_path: Path, name: str) -> None:
    # Tokens that are parts of characters are not told in the same way.
    tokenizer = byte_level(300, texts=[TEXT.encode("ascii", "ignore").decode()])
    save(tokenizer, tmp_path / "teacher")
    student = read_vocabulary(STUDENTS[name](), "student")
    token_map = TokenMap(read_vocabulary(tokenizer, "teacher"), student)
    size = vocab_size(tokenizer)
    [(ids, rows, _)] = write(tmp_path / "one", tokenizer, [TEXTS[0][:64]], k=size, spread=0.7, best=4.0)
    save(student.tokenizer, tmp_path / "student")
    wide = vocab_size(student.tokenizer)
    written = retokenize(settings(tmp_path / "one", tmp_path / "out", tmp_path / "student", codec=exact(wide, wide)))
    out = Dataset.open(tmp_path / "out")
    own = out[0].input_ids.tolist()
    begins = len(student.begins)
    end_of = np.cumsum([len(token_map.student_bytes([token])) for token in own[begins:]])
    end_of -= int(student.adds_space)
    oracle = Oracle(token_map, ids, rows)
    stored = out.decode(0)
    compared = 0
    for position in range(len(own) - begins - 1):
        expected = oracle.row(own[begins:], position, end_of.tolist())
        place = position + begins
        if expected is None:
            assert out[0].loss_mask is not None
            assert not out[0].loss_mask[place + 1]
            continue
        found = dict(zip(stored.ids[place].tolist(), np.exp(stored.logprobs[place]), strict=True))
        best = sorted(expected, key=lambda token: -expected[token])[:50]
        assert [found.get(token, 0.0) for token in best] == pytest.approx([expected[token] for token in best], abs=2e-6)
        compared += 1
    assert compared >= 10
    assert written.figures is not None
    assert written.figures.positions == len(own) - 1


@pytest.mark.parametrize("name", sorted(STUDENTS))
def test_a_text_takes_the_same_bits_by_the_students_rows(teacher: Path, tmp_path: Path, name: str) -> None:
    """Where nothing is missing, the rows of a text's tokens multiply to the same probability: the chain rule."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
    write(tmp_path / "one", tokenizer, TEXTS, k=vocab_size(tokenizer))
    student = STUDENTS[name]()
    save(student, tmp_path / "student")
    wide = vocab_size(student)
    written = retokenize(
        settings(
            tmp_path / "one", tmp_path / "out", tmp_path / "student", tokenizer=str(teacher), codec=exact(wide, wide)
        )
    )
    figures = written.figures
    assert figures is not None
    assert figures.teacher.bits_per_byte > 0.5
    assert figures.student.bits == pytest.approx(figures.teacher.bits, rel=1e-3)
    assert figures.student.bits_per_byte == pytest.approx(figures.teacher.bits_per_byte, rel=0.01)
    assert figures.student.mean_mass > 0.97


@pytest.mark.parametrize("fixed", [False, True])
def test_a_dataset_of_the_students_tokens_comes_of_it(
    capture: Path, teacher: Path, tmp_path: Path, fixed: bool
) -> None:
    student = save(STUDENTS["sentencepiece"](), tmp_path / "student")
    size = vocab_size(PreTrainedTokenizerFast.from_pretrained(student))
    codec = None if fixed else preset("compact-50", vocab_size=size)
    written = retokenize(settings(capture, tmp_path / "out", student, tokenizer=str(teacher), codec=codec))
    assert verify_dataset(tmp_path / "out").ok
    out = Dataset.open(tmp_path / "out")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(student)
    assert out.header.tokenizer == {"name": "student", "fingerprint": fingerprint(tokenizer)}
    assert len(out) == len(TEXTS)
    assert len(out.shards) > 1
    for document, text in zip(out, TEXTS, strict=True):
        assert document.input_ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        rows = out.codec.decode_document(document.teacher, document.num_rows)
        assert np.exp(rows.logprobs.astype(float)).sum(-1).max() <= 1 + 1e-6
    measured = written.manifest.header.capture["measured"]
    assert measured["aligned"] + measured["inside"] + measured["without_row"] == out.num_rows
    assert written.manifest.header.capture["retokenized"]["map"].startswith("xxh3-128:")
    # Who looks at it, or finds its card on the hub, sees what it is, and what its fidelity is to.
    inspection = inspect_dataset(out)
    check_names(inspection.origin, "retokenized", capture.name, teacher.name)
    check_names(str(inspection.fidelity_source), "retokenized")
    check_names(
        dataset_card(written.manifest, out.codec, "me/out"), inspection.origin.partition(", ")[2], "KL(retokenized"
    )


def test_the_command_reports_what_it_wrote(capture: Path, teacher: Path, tmp_path: Path) -> None:
    student = save(STUDENTS["shorter tokens"](), tmp_path / "student")

    def run(name: str, *more: str) -> str:
        options = ["--student", str(student), "--tokenizer", str(teacher), "--processes", "1", *more]
        command = ["retokenize", str(capture), str(tmp_path / name), *options]
        return CliRunner().invoke(cli, command, catch_exceptions=False).stdout

    report = json.loads(run("one", "--json"))
    written = Dataset.open(tmp_path / "one")
    assert report["measured"] == written.header.capture["measured"]
    assert (report["documents"], report["tokens"]) == (len(TEXTS), written.num_tokens)
    assert f"{report['measured']['student']['bits_per_byte']:.4f}" in run("two")


def test_the_same_tokenizer_gives_the_same_bytes(capture: Path, teacher: Path, tmp_path: Path) -> None:
    written = retokenize(settings(capture, tmp_path / "out", teacher, tokenizer=str(teacher)))
    assert written.figures is None
    before, after = Dataset.open(capture), Dataset.open(tmp_path / "out")
    assert [(d.doc_id, bytes(d.teacher)) for d in before] == [(d.doc_id, bytes(d.teacher)) for d in after]
    assert verify_dataset(tmp_path / "out").ok


def test_masks_packed_documents_and_labels_are_carried_over(teacher: Path, tmp_path: Path) -> None:
    from distillkit.shards.repack import pack_dataset

    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher)
    own = write(tmp_path / "one", tokenizer, TEXTS, k=30, masks=True, labels=True)
    pack_dataset(Dataset.open(tmp_path / "one"), tmp_path / "packed", 400)
    student = save(byte_level(350), tmp_path / "student")
    for name in ("one", "packed"):
        retokenize(settings(tmp_path / name, tmp_path / f"{name}-out", student, tokenizer=str(teacher)))
        assert verify_dataset(tmp_path / f"{name}-out").ok
    other, vocabulary = PreTrainedTokenizerFast.from_pretrained(student), read_vocabulary(tokenizer, "teacher")
    theirs = read_vocabulary(other, "student")
    alone = list(Dataset.open(tmp_path / "one-out"))
    for document, (ids, _, mask) in zip(alone, own, strict=True):
        counted = np.repeat(mask, vocabulary.lengths[ids])
        ends = np.cumsum(theirs.lengths[document.input_ids])
        starts = ends - theirs.lengths[document.input_ids]
        covered = [counted[start:end].any() for start, end in zip(starts, ends, strict=True)]
        # The first token of the teacher has no row; nor have the student's inside it.
        first = ends > vocabulary.lengths[ids[0]]
        assert document.loss_mask is not None
        assert document.loss_mask[1:].tolist() == (covered & first)[1:].tolist()
        assert document.label_logprobs is not None
        rows = Dataset.open(tmp_path / "one-out").codec.decode_document(document.teacher, document.num_rows)
        stored = np.where(rows.ids == document.input_ids[1:, None], rows.logprobs, -np.inf).max(-1)
        there = np.isfinite(stored) & document.loss_mask[1:]
        assert document.label_logprobs[there] == pytest.approx(stored[there], abs=1e-5)
    packed = list(Dataset.open(tmp_path / "packed-out"))
    assert len(packed) < len(alone)
    ids = [part for document in packed for part in np.split(document.input_ids, np.cumsum(document.segments())[:-1])]
    assert sorted(part.tolist() for part in ids) == sorted(document.input_ids.tolist() for document in alone)
    counted = sum(int(document.loss_mask[1:].sum()) for document in alone if document.loss_mask is not None)
    assert sum(int(d.loss_mask.sum()) for d in packed if d.loss_mask is not None) == counted


def test_an_interrupted_run_resumes_and_processes_change_no_byte(
    capture: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distillkit.retokenize import run
    from support.shards import files

    student = save(STUDENTS["longer tokens"](), tmp_path / "student")
    retokenize(settings(capture, tmp_path / "whole", student, tokenizer=str(teacher)))
    retokenize(settings(capture, tmp_path / "several", student, tokenizer=str(teacher)), processes=2)
    calls = []

    def killed(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rewrite(*arguments)

    rewrite = run.rewrite
    monkeypatch.setattr(run, "rewrite", killed)
    monkeypatch.setattr(run, "_TOGETHER", 2)
    with pytest.raises(KeyboardInterrupt):
        retokenize(settings(capture, tmp_path / "killed", student, tokenizer=str(teacher)))
    assert (tmp_path / "killed" / "data-00000.parquet").exists()
    monkeypatch.setattr(run, "rewrite", rewrite)
    with refused(MismatchError, "data-00000.parquet", "capture.retokenized.map"):
        other = save(STUDENTS["shorter tokens"](), tmp_path / "other")
        retokenize(settings(capture, tmp_path / "killed", other, tokenizer=str(teacher)))
    report = retokenize(settings(capture, tmp_path / "killed", student, tokenizer=str(teacher)))
    assert report.resumed >= 1
    assert files(tmp_path / "killed") == files(tmp_path / "whole") == files(tmp_path / "several")


# -- what is refused ---------------------------------------------------------------------------------------------------


def _lossy(part: str, value: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(byte_level(300).backend_tokenizer.to_str())
    setattr(backend, part, value)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@pytest.mark.parametrize(
    ("part", "value", "name"),
    [
        ("normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), "Lowercase"),
        ("normalizer", normalizers.NFKC(), "NFKC"),
        ("normalizer", normalizers.Replace("a", "b"), "Replace"),
        ("pre_tokenizer", pre_tokenizers.Whitespace(), "Whitespace"),
        ("pre_tokenizer", pre_tokenizers.Split(" ", "removed"), "Split"),
    ],
)
def test_tokenizers_that_lose_bytes_are_refused_by_the_part_that_does(part: str, value: Any, name: str) -> None:
    with refused(ConfigError, "mine", name):
        read_vocabulary(_lossy(part, value), "mine")


def test_a_capture_without_its_tokenizer_or_characters_without_tokens_are_refused(
    capture: Path, teacher: Path, tmp_path: Path
) -> None:
    student = save(STUDENTS["longer tokens"](), tmp_path / "student")
    moved = shutil.copytree(capture, tmp_path / "elsewhere" / "capture")
    with refused(ConfigError, "teacher", "--tokenizer"):
        retokenize(settings(moved, tmp_path / "out", student))
    with refused(MismatchError, "--tokenizer", str(student)):
        retokenize(settings(capture, tmp_path / "out", student, tokenizer=str(student)))
    few = Tokenizer(models.BPE())
    few.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    few.train_from_iterator(["The theory of"], trainers.BpeTrainer(vocab_size=30, show_progress=False))
    few.add_special_tokens([AddedToken("</s>", special=True)])
    poor = save(PreTrainedTokenizerFast(tokenizer_object=few, eos_token="</s>"), tmp_path / "poor")
    with refused(InputError, "document 0", str(poor)):
        codec = exact(vocab_size(PreTrainedTokenizerFast.from_pretrained(poor)), 5)
        retokenize(settings(capture, tmp_path / "out", poor, tokenizer=str(teacher), codec=codec))


# -- chats -------------------------------------------------------------------------------------------------------------

CHATML = "{% for m in messages %}<x>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
INST = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}<end>"
    "{% endif %}{% endfor %}"
)


def test_chats_are_rendered_with_the_students_template(tmp_path: Path) -> None:
    """The student has rows for what both templates write: what messages say, and the ends of turns."""
    from distillkit.text.policy import capture_policy
    from distillkit.text.rows import RowReader

    messages = [
        {"role": "user", "content": "The theory of cats"},
        {"role": "assistant", "content": "there, then, the other"},
        {"role": "user", "content": "the mat"},
        {"role": "assistant", "content": "A cat sat on the mat"},
    ]
    teacher, student = byte_level(300), byte_level(350, eos="<end>")
    teacher.chat_template, student.chat_template = CHATML, INST
    policy = capture_policy("assistant")
    [[own]] = RowReader(teacher, policy, 300)([("row", {"messages": messages})])
    [[expected]] = RowReader(student, policy, 350)([("row", {"messages": messages})])
    size = vocab_size(teacher)
    rows = teacher_rows(own.input_ids, size, 200, 0)
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    header = Header(
        codec=Codec(exact(size, 200)).to_dict(),
        vocab_size=size,
        head_size=size,
        tokenizer={"name": "teacher", "fingerprint": fingerprint(teacher)},
        capture={"loss_on": "assistant", "append_eos": True},
    )
    with ShardWriter(tmp_path / "chats", header, kept=pa.schema([("messages", kind)])) as writer:
        writer.write(own.input_ids, rows, loss_mask=own.loss_mask, columns={"messages": messages})
    for tokenizer, name in ((teacher, "teacher"), (student, "student")):
        save(tokenizer, tmp_path / name)
    retokenize(settings(tmp_path / "chats", tmp_path / "out", tmp_path / "student"))
    [document] = Dataset.open(tmp_path / "out")
    assert document.input_ids.tolist() == expected.input_ids.tolist()
    assert document.columns is not None
    assert document.columns["messages"] == messages
    strings = read_vocabulary(student, "student").strings
    counted = b"".join(strings[i] for i, counts in zip(document.input_ids, document.loss_mask, strict=True) if counts)
    # The first token of a turn, here with the template's space, may begin before what both have: it has no row then.
    assert counted.count(b"<end>") == 2
    for words in (b", then, the other<end>", b"cat sat on the mat<end>"):
        assert words in counted
    assert set(np.flatnonzero(document.loss_mask)) <= set(np.flatnonzero(expected.loss_mask))


# -- real tokenizers ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("ours", "theirs"), [("tekken", "mistral"), ("mistral", "tekken")])
def test_real_tokenizers_keep_the_bits_of_a_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ours: str, theirs: str
) -> None:
    """Within 3%, with 128 ids of each row; ids that are not stored share the missing mass."""
    pytest.importorskip("mistral_common")
    import pydoc_data.topics

    scripts = load_script("real_tokenizers", monkeypatch)
    folders = {name: scripts.write_tokenizer(name, tmp_path) for name in (ours, theirs)}
    teacher, student = (PreTrainedTokenizerFast.from_pretrained(folders[name]) for name in (ours, theirs))
    topics = pydoc_data.topics.topics
    texts = [topics[name][:1000] + " naïve 中文 🙂" for name in sorted(topics)[:8]]
    write(tmp_path / "capture", teacher, texts, k=128)
    report = retokenize(settings(tmp_path / "capture", tmp_path / "out", folders[theirs], tokenizer=str(folders[ours])))
    figures = report.figures
    assert figures is not None
    assert verify_dataset(tmp_path / "out").ok
    assert figures.student.bits_per_byte == pytest.approx(figures.teacher.bits_per_byte, rel=0.03)
    assert figures.without_row <= 2 * figures.documents
    for document, text in zip(Dataset.open(tmp_path / "out"), texts, strict=True):
        assert document.input_ids.tolist() == [*student(text)["input_ids"], student.eos_token_id]

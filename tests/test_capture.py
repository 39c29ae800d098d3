"""A capture holds the teacher's own distributions, in the text's order, and the same bytes however often it was
killed."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from distillkit.capture import CaptureSettings
from distillkit.capture.result import counted
from distillkit.capture.settings_file import load_captures
from distillkit.capture.teachers.hf import length_batches, resolve_dtype
from distillkit.cli.capture import capture as capture_command
from distillkit.errors import CaptureError, ConfigError, InputError, MismatchError
from distillkit.models.head import LMHead, backbone_hidden
from distillkit.shards import Dataset, verify_dataset, whole_shards
from distillkit.shards.overflow import windows
from distillkit.text.tokenizer import fingerprint, load_tokenizer
from support.capturing import COMMAND, files, run
from support.refusals import check_names, refused
from support.teachers import EXACT, HEAD, WORDS

# -- what is captured --------------------------------------------------------------------------------------------------


def test_rows_are_the_teachers_own_distributions(teacher: Path, text: Path, tmp_path: Path) -> None:
    report = run(teacher, text, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(teacher).eval().double()
    tokenizer = load_tokenizer(str(teacher))
    dataset = Dataset.open(tmp_path / "out")

    read = []
    for document in dataset:
        rows = dataset.codec.decode_document(document.teacher, document.num_rows)
        with torch.no_grad():
            logits = model(torch.from_numpy(document.input_ids.astype(np.int64))[None], use_cache=False).logits[0, :-1]
        expected = logits.log_softmax(-1).numpy()
        best = np.sort(expected, axis=-1)[:, ::-1][:, :8]
        np.testing.assert_allclose(rows.logprobs, best, atol=2e-5)
        np.testing.assert_allclose(np.take_along_axis(expected, rows.ids, -1), rows.logprobs, atol=2e-5)
        read.append(document.input_ids.tolist())

    written = [json.loads(line)["text"] + tokenizer.eos_token for line in text.read_text().splitlines()]
    whole = tokenizer(written)["input_ids"]
    pieces = [ids[start:stop] for ids in whole for start, stop in windows(len(ids), 64, 8)]
    assert read == pieces, "all tokens, in the text's order"
    assert (report.documents, report.tokens) == (len(read), sum(map(len, read)))
    assert report.rows == report.tokens - report.documents == dataset.num_rows
    assert report.documents > 120, "documents of more than 64 tokens were split"
    assert verify_dataset(tmp_path / "out").ok
    assert report.shards == len(dataset.shards) > 5
    assert report.kl_mean == pytest.approx(0.0, abs=1e-9)
    assert report.bytes_per_token == 8 * 4 + 7
    assert report.peak_rss_bytes > 50e6


def test_the_header_says_what_was_captured(teacher: Path, text: Path, tmp_path: Path) -> None:
    run(teacher, text, tmp_path / "out", samples=5, preset="budget")
    header = Dataset.open(tmp_path / "out").header
    assert header.teacher is not None
    assert header.tokenizer is not None
    tokenizer = load_tokenizer(str(teacher))
    assert (header.vocab_size, header.head_size) == (len(tokenizer), HEAD)
    assert len(tokenizer) < HEAD
    assert header.tokenizer == {"name": teacher.name, "fingerprint": fingerprint(tokenizer)}
    assert (header.teacher["name"], header.teacher["dtype"]) == (teacher.name, "float32")
    assert header.teacher["revision"].startswith("sample-xxh3-64:")
    assert header.alignment == {"row": "t predicts t+1", "rows": "L-1"}
    assert header.capture == {
        "max_seq_len": 64,
        "overflow": "window",
        "overlap": 8,
        "loss_on": "auto",
        "drop_duplicates": True,
        "apply_chat_template": True,
        "append_eos": True,
        "head_dtype": "float32",
        "batch_tokens": 256,
        "head_rows": 50,
        "shard_tokens": 700,
        "samples": 5,
        "seed": 42,
        "device": "cpu",
        "dataset": {"name": "rows.jsonl", "files": 1, "bytes": text.stat().st_size},
    }
    assert str(text.parent) not in json.dumps(header.to_dict())


def test_no_more_logits_exist_than_asked(
    teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    whole = LMHead.__call__

    def watched(self: LMHead, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(hidden.numel() // hidden.shape[-1])
        return whole(self, hidden, *args, **kwargs)

    monkeypatch.setattr(LMHead, "__call__", watched)
    report = run(teacher, text, tmp_path / "out", samples=40, head_rows=17)
    assert max(sizes) == 17
    # The first call checks the head on eight ids.
    assert sum(sizes) == report.rows + 8


def test_a_bfloat16_teacher_with_an_exact_head(teacher: Path, text: Path, tmp_path: Path) -> None:
    """With the product in float32 only the hidden states are rounded, so the captured rows are closer to float32's."""
    run(teacher, text, tmp_path / "float32", samples=20)
    run(teacher, text, tmp_path / "exact", samples=20, dtype="bfloat16")
    run(teacher, text, tmp_path / "rounded", samples=20, dtype="bfloat16", head_dtype="auto")

    def first_logprobs(name: str) -> np.ndarray:
        dataset = Dataset.open(tmp_path / name)
        rows = [dataset.codec.decode_document(document.teacher, document.num_rows) for document in dataset]
        return np.concatenate([np.asarray(part.logprobs)[:, 0] for part in rows])

    exact, rounded = (np.abs(first_logprobs(name) - first_logprobs("float32")).mean() for name in ("exact", "rounded"))
    assert exact < rounded < 0.1
    assert Dataset.open(tmp_path / "exact").header.teacher["dtype"] == "bfloat16"  # type: ignore[index]


def test_chat_and_token_ids(teacher: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]},
        {"input_ids": [HEAD - 1, 5, 6]},  # an id of the padded head: given ids are taken as they are
        {"text": ""},
        {"input_ids": [5]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = run(teacher, path, tmp_path / "out")
    tokenizer = load_tokenizer(str(teacher))
    found = [document.input_ids.tolist() for document in Dataset.open(tmp_path / "out")]
    assert found == [tokenizer("user the cat assistant sat", add_special_tokens=False)["input_ids"], [HEAD - 1, 5, 6]]
    assert report.documents == 2
    assert report.passed_over == {"rows": 4, "empty_rows": 1, "documents_of_one_token": 1}


def test_kept_ids_labels_and_the_last_row(teacher: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(teacher))
    named = next(token for token, number in tokenizer.get_vocab().items() if number == 40)
    options = {"keep_ids": [3, named], "label_logprobs": True, "last_row": True, "samples": 30}
    run(teacher, text, tmp_path / "out", **options)
    kept = [3, 40]
    model = AutoModelForCausalLM.from_pretrained(teacher).eval().double()
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.header.alignment["rows"] == "L"
    assert verify_dataset(tmp_path / "out").ok
    replaced = 0
    for document, rows in dataset.decoded():
        ids = torch.from_numpy(document.input_ids.astype(np.int64))
        with torch.no_grad():
            expected = model(ids[None], use_cache=False).logits[0].log_softmax(-1).numpy()
        assert rows.ids.shape == (len(ids), 8)
        np.testing.assert_allclose(rows.logprobs, np.take_along_axis(expected, rows.ids, 1), atol=2e-5)
        assert (np.diff(rows.logprobs, axis=1) <= 0).all()
        assert document.label_logprobs is not None
        labels = np.take_along_axis(expected[:-1], ids.numpy()[1:, None], 1)[:, 0]
        np.testing.assert_allclose(document.label_logprobs, labels, atol=2e-5)
        best = np.argsort(-expected, axis=1, kind="stable")[:, :8]
        for row, top in zip(rows.ids, best, strict=True):
            missing = [token for token in kept if token not in top]
            replaced += len(missing)
            others = [token for token in top.tolist() if token not in kept][: 8 - len(kept)]
            assert {*row.tolist()} == {*kept, *others}
    assert replaced > 100


@given(st.lists(st.integers(2, 40), max_size=30), st.integers(1, 100))
def test_batches_hold_every_document_once_and_keep_to_their_tokens(lengths: list[int], batch_tokens: int) -> None:
    batches = length_batches(lengths, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= batch_tokens


def test_responses_one_has_already(teacher: Path, tmp_path: Path) -> None:
    """The same rows out, in their order, with their columns, the teacher's rows, and a loss on the answers."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": " ".join(WORDS[: index % 5 + 1])},
                {"role": "assistant", "content": "one dog" if index % 2 else " ".join(WORDS * 2)},
            ],
            "id": f"row {index}",
            "score": index / 2,
        }
        for index in range(12)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options: dict[str, Any] = {"keep_columns": "id,score", "loss_on": "assistant", "max_seq_len": 32}
    run(teacher, path, tmp_path / "out", **options, keep_ids="<eos>,7", label_logprobs=True, last_row=True)
    dataset, tokenizer = Dataset.open(tmp_path / "out"), load_tokenizer(str(teacher))
    table = pyarrow.dataset.dataset(tmp_path / "out", format="parquet", exclude_invalid_files=True).to_table(
        columns=["id", "score"]
    )
    counted: dict[str, list[int]] = {}
    for document, kept in zip(dataset, table.to_pylist(), strict=True):
        assert document.num_rows == len(document.input_ids)
        decoded = dataset.codec.decode_document(document.teacher, document.num_rows)
        assert all({7, tokenizer.eos_token_id} <= set(ids) for ids in np.asarray(decoded.ids).tolist())
        labels = document.label_logprobs
        assert labels is not None
        next_ids = document.input_ids[1:, None]
        there = np.asarray(decoded.ids)[:-1] == next_ids
        np.testing.assert_allclose(labels[there.any(1)], np.asarray(decoded.logprobs)[:-1][there], atol=1e-5)
        mask = np.ones(len(document.input_ids), bool) if document.loss_mask is None else document.loss_mask
        counted.setdefault(kept["id"], []).extend(document.input_ids[mask].tolist())
        assert rows[int(kept["id"].split()[1])]["score"] == kept["score"]
    assert list(counted) == [row["id"] for row in rows]
    for row, ids in zip(rows, counted.values(), strict=True):
        assert ids == tokenizer(row["messages"][1]["content"] + " ")["input_ids"]


# -- interruptions -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_started_again_it_writes_the_same_bytes(teacher: Path, text: Path, tmp_path: Path) -> None:
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    options = ["--max-seq-len", "64", "--batch-tokens", "128", "--head-rows", "50", "--shard-tokens", "200"]
    settings = {"max_seq_len": 64, "batch_tokens": 128, "head_rows": 50, "shard_tokens": 200, "preset": "budget"}
    run(teacher, text, uninterrupted, **settings)

    arguments = ["--model", str(teacher), "--dataset", str(text), "--output", str(killed), "--preset", "budget"]
    # One thread count for both: products of another are summed in another order.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([*COMMAND, *arguments, *options], env={**os.environ, **threads}, stderr=subprocess.PIPE)
    while process.poll() is None and not (killed / "data-00002.parquet").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    left = whole_shards(killed)
    assert 3 <= len(left) < len(list(uninterrupted.glob("*.parquet")))
    assert not (killed / "manifest.json").exists()

    report = run(teacher, text, killed, **settings)
    # A shard whose receipt was not written yet is done again.
    assert report.resumed_documents in [sum(info.documents for info, _ in part) for part in (left, left[:-1])]
    assert 0 < report.new_tokens < report.tokens
    assert files(killed) == files(uninterrupted)


def test_an_error_keeps_whole_shards_and_the_next_run_goes_on(
    teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(teacher, text, tmp_path / "whole")
    calls = iter(range(100))

    def interrupted(model: Any, **inputs: Any) -> Any:
        if next(calls) == 20:
            raise KeyboardInterrupt
        return backbone_hidden(model, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr("distillkit.capture.teachers.hf.backbone_hidden", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(teacher, text, tmp_path / "out")
    left = files(tmp_path / "out")
    assert left
    assert left.items() < files(tmp_path / "whole").items(), "whole shards, and nothing else"

    run(teacher, text, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_finished_capture_is_left_alone(
    teacher: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(teacher, text, tmp_path / "out", samples=20)
    before = files(tmp_path / "out")
    # Not even the weights are loaded.
    monkeypatch.setattr("distillkit.capture.inputs.make_teacher", None)
    again = run(teacher, text, tmp_path / "out", samples=20)
    assert again.already_complete
    assert (again.documents, again.tokens, again.kl_mean) == (first.documents, first.tokens, first.kl_mean)
    assert files(tmp_path / "out") == before


# A setting that was another one, and what the message names: where it is written, what is there, what was expected.
OTHER_SETTINGS: list[tuple[dict[str, Any], list[str]]] = [
    ({"max_seq_len": 32}, ["capture.max_seq_len", "64", "32"]),
    ({"samples": 21}, ["capture.samples", "20", "21"]),
    ({"samples": None}, ["capture.samples", "20", "None"]),
    ({"dtype": "bfloat16"}, ["teacher.dtype", "'float32'", "'bfloat16'"]),
    ({"preset": "budget"}, ["codec.config"]),
]


def test_other_settings_in_the_same_folder_are_refused(teacher: Path, text: Path, tmp_path: Path) -> None:
    for name, shard_range in (("finished", None), ("begun", "0:1")):
        out = tmp_path / name
        run(teacher, text, out, samples=20, shard_range=shard_range)
        before = files(out)
        assert ("manifest.json" in before) == (name == "finished")
        for changed, facts in OTHER_SETTINGS:
            with refused(MismatchError, *facts):
                run(teacher, text, out, **{"samples": 20, **changed})
            assert files(out) == before


def test_another_teacher_or_text_is_refused(teacher: Path, text: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    rows.write_bytes(text.read_bytes())
    run(teacher, rows, out, shard_range="0:2")

    # The same name, size and number of rows, one word changed.
    rows.write_bytes(text.read_bytes().replace(b" cat ", b" dog ", 1))
    with pytest.raises(MismatchError, match=r"\bcontent\b.*\b\w{32}\b.*\b\w{32}\b"):
        run(teacher, rows, out)
    rows.write_bytes(text.read_bytes())

    other = tmp_path / teacher.name
    load_tokenizer(str(teacher)).save_pretrained(other)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    model.save_pretrained(other)
    with pytest.raises(MismatchError, match=r"teacher\.revision\b.*'sample-xxh3-64:\w+'.*'sample-xxh3-64:\w+'"):
        run(other, rows, out)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_logits_that_are_no_distribution(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    documents = [[5, 6, 7, 8], [5, 6, 7, 8, 5, 9, 6], [8, 7]]
    rows.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))

    def overflowing(model: Any, *, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        hidden = backbone_hidden(model, input_ids=input_ids, **inputs)
        return hidden.masked_fill((input_ids == 9)[..., None], float("nan"))

    monkeypatch.setattr("distillkit.capture.teachers.hf.backbone_hidden", overflowing)
    with refused(CaptureError, "rows.jsonl, line 2", "5", "7", "9", "NaN"):
        run(teacher, rows, tmp_path / "out", head_rows=3)
    assert files(tmp_path / "out") == {}


def test_what_was_done_with_rows_is_told_as_it_was() -> None:
    counts = {"rows": 9, "long_documents_in_windows": 1, "duplicate_documents": 2, "empty_rows": 0, "odd_rows": 1}
    assert counted(counts) == ["1 long document captured in windows", "2 duplicate documents left out", "1 odd row"]


def test_codec_configurations(teacher: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "compression_config.yaml"
    legacy = {"legacy_logit_compression": {"vocab_size": HEAD, "k": 8, "exact_k": 4, "polynomial_degree": 2}}
    for number, config in enumerate([EXACT, {"logprob_compressor": EXACT}, legacy]):
        path.write_text(yaml.safe_dump(config))
        run(teacher, text, tmp_path / str(number), samples=3, compression_config=path)
    assert Dataset.open(tmp_path / "0").codec == Dataset.open(tmp_path / "1").codec
    assert Dataset.open(tmp_path / "2").codec.format == "legacy"

    out = tmp_path / "out"
    path.write_text(yaml.safe_dump({**EXACT, "d": 100}))
    with refused(MismatchError, str(path), "d", "100", "128"):
        run(teacher, text, out, compression_config=path)
    path.write_text("a: [")
    with refused(ConfigError, str(path), "line 1"):
        run(teacher, text, out, compression_config=str(path))
    with refused(ConfigError, str(tmp_path / "missing.yaml"), os.strerror(errno.ENOENT)):
        run(teacher, text, out, compression_config=tmp_path / "missing.yaml")
    with refused(ConfigError, "'recomended'", "recommended"):
        run(teacher, text, out, preset="recomended")
    assert not out.exists()


# A setting that is not allowed, and what the message names.
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"max_seq_len": 1}, ["max_seq_len", "2", "1"]),
    ({"max_seq_len": 513}, ["max_seq_len", "513", "512"]),
    ({"samples": 0}, ["samples", "1", "0"]),
    ({"preset": "budget", "compression_config": {}}, ["preset", "compression_config"]),
    ({"max_sequence_len": 3}, ["max_sequence_len", "max_seq_len"]),
    ({"dtype": "int8"}, ["dtype", "'int8'", "float32"]),
    ({"device": "tpu7"}, ["device", "'tpu7'"]),
    ({"overflow": "cut"}, ["overflow", "'cut'", "window", "truncate", "skip"]),
    ({"overlap": 33}, ["overlap", "1", "32", "33"]),
    ({"overlap": 0}, ["overlap", "1", "0"]),
    ({"overlap": 3, "overflow": "skip"}, ["overlap", "overflow", "window", "skip"]),
    ({"loss_on": "user"}, ["loss_on", "'user'", "auto", "all", "assistant", "completion"]),
    ({"shuffle": "yes"}, ["shuffle", "'yes'"]),
    ({"where": "a"}, ["where", "'a'"]),
    ({"min_tokens": 9, "max_tokens": 3}, ["min_tokens", "max_tokens", "9", "3"]),
    ({"keep_ids": 5}, ["keep_ids", "5"]),
    ({"head_dtype": "half"}, ["head_dtype", "float32", "auto"]),
    ({"tokenizer": "./nowhere"}, ["'./nowhere'"]),
    ({"teacher": "./nowhere"}, ["model", "'./nowhere'"]),
]


def test_settings_that_are_refused(teacher: Path, text: Path, tmp_path: Path) -> None:
    for options, facts in REFUSED:
        with refused(ConfigError, *facts):
            run(**{"teacher": teacher, "dataset": text, "output": tmp_path / "out", **options})
        assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_knows_more_than_the_teacher(teacher: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(teacher))
    tokenizer.add_tokens([f"word{index}" for index in range(HEAD)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with refused(MismatchError, str(len(tokenizer)), "128"):
        run(teacher, text, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))


def test_text_without_documents(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"input_ids": [5]}\n')
    with refused(CaptureError, "2", "1"):
        run(teacher, tmp_path / "rows.jsonl", tmp_path / "out")


def test_dtypes(teacher: Path) -> None:
    config = LlamaConfig(dtype="bfloat16")
    assert resolve_dtype("auto", config, "cpu") == "float32"
    assert resolve_dtype("auto", config, "cuda") == "bfloat16"
    assert resolve_dtype("half", config, "cpu") == "float16"


# -- the command -------------------------------------------------------------------------------------------------------


def test_command(teacher: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(teacher), "--dataset", str(text), "--output", str(tmp_path / "out"), "--samples", "10"]
    first = CliRunner().invoke(capture_command, [*arguments, "--max-seq-len", "64", "--preset", "budget", "--json"])
    assert first.exit_code == 0, first.output
    report = json.loads(first.stdout)
    assert report["documents"] >= 10
    assert not report["already_complete"]

    again = CliRunner().invoke(capture_command, [*arguments, "--max-seq-len", "64", "--preset", "budget"])
    assert again.exit_code == 0, again.output
    check_names(again.stdout, "KL", f"{report['tokens']:,}")

    refused = CliRunner().invoke(capture_command, [*arguments, "--max-seq-len", "65", "--preset", "budget"])
    assert isinstance(refused.exception, MismatchError)
    assert CliRunner().invoke(capture_command, ["--model", "x"]).exit_code == 2


def test_options_are_the_settings_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[CaptureSettings] = []
    monkeypatch.setattr("distillkit.capture.run.run_capture", lambda settings, **_: found.append(settings))
    monkeypatch.setattr("distillkit.cli.capture._table", lambda report: "")
    given = {"model": "m", "dataset": "d", "output": "o"}
    arguments = [argument for name, value in given.items() for argument in (f"--{name}", value)]
    for options in ([], ["--where", "a=b", "--where", "c=1", "--keep-ids", "<eos>,5", "--keep-columns", "x, y"]):
        assert CliRunner().invoke(capture_command, [*arguments, *options, "--keep-duplicates"]).exit_code == 0
    assert found[0] == CaptureSettings(**given, drop_duplicates=False)
    assert found[1] == CaptureSettings(
        **given, where=["a=b", "c=1"], keep_ids=["<eos>", 5], keep_columns=["x", "y"], drop_duplicates=False
    )
    assert found[1].row_filters == (("a", "b"), ("c", "1"))


def test_what_decides_the_bytes() -> None:
    given = {"model": "m", "dataset": "d", "output": "o"}
    changed: dict[str, Any] = {
        **{"overflow": "skip", "loss_on": "all", "samples": 3, "shuffle": True, "where": "a=b", "min_tokens": 3},
        **{"max_tokens": 9, "keep_columns": "all", "drop_duplicates": False, "keep_ids": "5", "label_logprobs": True},
        **{"last_row": True, "overlap": 3, "max_seq_len": 99, "apply_chat_template": False, "shard_tokens": 9},
    }
    before = CaptureSettings(**given).identity()
    for name, value in changed.items():
        after = CaptureSettings(**{**given, name: value}).identity()
        assert after != before, name
        json.dumps(after)
    assert CaptureSettings(**given, seed=3).identity() == before, "nothing is drawn"
    assert CaptureSettings(**given, overlap=128).identity() == before, "as if it was not said"


def test_kept_ids_by_name_and_number(teacher: Path) -> None:
    tokenizer = load_tokenizer(str(teacher))
    end = tokenizer.eos_token_id

    def ids(keep: Any, k: int = 8) -> tuple[int, ...]:
        return CaptureSettings(model="m", dataset="d", output="o", keep_ids=keep).token_ids(tokenizer, k)

    assert ids("") == ids([]) == ()
    assert ids(f"7,<eos>,{end}") == ids([7, "<eos>"]) == tuple(sorted({7, end}))
    with refused(ConfigError, "keep_ids", "'<eoss>'", "'<eos>'"):
        ids("<eoss>")
    with refused(ConfigError, "keep_ids", "100000", str(len(tokenizer) - 1)):
        ids("100000")
    with refused(ConfigError, "keep_ids", "2"):
        ids("1,2", k=2)


FILE = """
dataset: text.jsonl
preset: budget
captures:
- {model: a, output: out/a}
- {model: b, output: out/b, compression_config: codec.yaml, where: [x=1, "y=2"], keep_ids: [<eos>, 5]}
"""


def test_several_captures_in_one_file(tmp_path: Path, teacher: Path, text: Path) -> None:
    path = tmp_path / "captures.yaml"

    def load(content: str, **overrides: Any) -> list[CaptureSettings]:
        path.write_text(content)
        return load_captures(path, overrides)

    first, second = load(FILE, samples=7)
    assert first == CaptureSettings(model="a", dataset="text.jsonl", output="out/a", preset="budget", samples=7)
    assert second == CaptureSettings(
        **{"model": "b", "dataset": "text.jsonl", "output": "out/b", "compression_config": "codec.yaml"},
        **{"where": ["x=1", "y=2"], "keep_ids": ["<eos>", 5], "samples": 7},
    )
    assert {settings.preset for settings in load(FILE, preset="compact")} == {"compact"}
    assert len(load("{model: a, dataset: d, output: o}")) == 1
    for content, facts in (
        (FILE.replace("model: b", "modle: b"), ["captures.1.modle", "'model'"]),
        (FILE.replace("dataset:", "datasets:"), ["datasets", "dataset"]),
        (FILE.replace("model: b,", ""), ["captures.1.model"]),
        (FILE.replace("out/b", "out/a/"), ["captures.0.output", "captures.1.output", "out/a"]),
        (FILE.replace("[x=1", "[x"), ["captures.1.where", "'x'"]),
        (FILE.replace("- {model: b", "- {samples: 0, model: b"), ["captures.1.samples", "1", "0"]),
        (FILE + "  samples: 0\n", ["line 7"]),
        ("captures: 3", ["captures", "3"]),
        ("- a", ["list"]),
    ):
        with refused(ConfigError, str(path), *facts):
            load(content)

    shared = {"dataset": str(text), "model": str(teacher), "preset": "budget", "max_seq_len": 64}
    outputs = [str(tmp_path / name) for name in ("a", "b")]
    path.write_text(yaml.safe_dump({**shared, "captures": [{"output": output} for output in outputs]}))
    result = CliRunner().invoke(capture_command, [str(path), "--samples", "2", "--json"])
    assert result.exit_code == 0, result.output
    assert [report["output"] for report in json.loads(result.stdout)] == outputs


def test_unknown_rows_name_file_and_columns(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with refused(InputError, "rows.jsonl, line 1", "prompt", "text", "messages"):
        run(teacher, tmp_path / "rows.jsonl", tmp_path / "out")

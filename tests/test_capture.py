"""A capture holds the teacher's own distributions, in the text's order, and the same bytes however often it was "
"killed."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from distillkit.capture import CaptureReport, CaptureSettings, capture
from distillkit.capture.engines.hf import length_batches, resolve_dtype
from distillkit.cli.capture import capture as capture_command
from distillkit.errors import CaptureError, ConfigError, InputError, MismatchError
from distillkit.lm_head import LMHead, backbone_hidden
from distillkit.shards import Dataset, verify_dataset, whole_shards
from distillkit.tokenizer import fingerprint, load_tokenizer
from teachers import EXACT, HEAD, write_llama, write_text


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama whose head is wider than its tokenizer's vocabulary."""
    folder = tmp_path_factory.mktemp("teacher")
    write_llama(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents of 2 to 100 words."""
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    write_text(path, 120)
    return path


def run(teacher: Path, dataset: Path, output: Path, **options: Any) -> CaptureReport:
    settings = {"max_seq_len": 64, "batch_tokens": 256, "head_rows": 50, "shard_tokens": 700, "progress": False}
    if "preset" not in options:
        settings["compression_config"] = EXACT
    return capture(model=str(teacher), dataset=str(dataset), output=output, **{**settings, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


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

    whole = [tokenizer(json.loads(line)["text"])["input_ids"] for line in text.read_text().splitlines()]
    assert list(chain(*read)) == list(chain(*whole)), "all tokens, in the text's order"
    assert (report.documents, report.tokens) == (len(read), sum(map(len, read)))
    assert report.rows == report.tokens - report.documents == dataset.num_rows
    assert report.documents > 120, "documents of more than 64 tokens were split"
    assert verify_dataset(tmp_path / "out")
    assert report.shards == len(dataset.shards) > 5
    assert report.kl_mean == pytest.approx(0.0, abs=1e-9)
    assert report.bytes_per_token == 8 * 4 + 7
    assert report.peak_rss_bytes > 50e6


def test_the_header_says_what_was_captured(teacher: Path, text: Path, tmp_path: Path) -> None:
    run(teacher, text, tmp_path / "out", samples=5, preset="budget")
    header = Dataset.open(tmp_path / "out").header
    assert header.teacher is not None
    assert header.tokenizer is not None
    assert (header.vocab_size, header.head_size) == (100, HEAD) or header.vocab_size < HEAD == header.head_size
    assert header.tokenizer == {"name": teacher.name, "fingerprint": fingerprint(load_tokenizer(str(teacher)))}
    assert (header.teacher["name"], header.teacher["dtype"]) == (teacher.name, "float32")
    assert header.teacher["revision"].startswith("sample-xxh3-64:")
    assert header.alignment == {"row": "t predicts t+1", "rows": "L-1"}
    assert header.capture == {
        "max_seq_len": 64,
        "apply_chat_template": True,
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
    assert (report.documents, report.empty_rows, report.short_documents) == (2, 1, 1)


@given(st.lists(st.integers(2, 40), max_size=30), st.integers(1, 100))
def test_batches_hold_every_document_once_and_keep_to_their_tokens(lengths: list[int], batch_tokens: int) -> None:
    batches = length_batches(lengths, batch_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= batch_tokens


# -- interruptions -----------------------------------------------------------------------------------------------------

COMMAND = [sys.executable, "-c", "from distillkit.cli.capture import capture; capture()"]


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
    assert report.resumed_documents == sum(info.documents for info, _ in left)
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
        patch.setattr("distillkit.capture.engines.hf.backbone_hidden", interrupted)
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
    monkeypatch.setattr("distillkit.capture.pipeline.make_teacher", None)
    again = run(teacher, text, tmp_path / "out", samples=20)
    assert again.already_complete
    assert (again.documents, again.tokens, again.kl_mean) == (first.documents, first.tokens, first.kl_mean)
    assert files(tmp_path / "out") == before


OTHER_SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "max_seq_len": ({"max_seq_len": 32}, "capture.max_seq_len is 64 there, expected 32"),
    "samples": ({"samples": 21}, "capture.samples is 20 there, expected 21"),
    "all instead of a sample": ({"samples": None}, "capture.samples is 20 there, expected None"),
    "dtype": ({"dtype": "bfloat16"}, "teacher.dtype is 'float32' there, expected 'bfloat16'"),
    "codec": ({"preset": "budget"}, r"codec.config.\w+ is .* there, expected"),
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("setting", OTHER_SETTINGS)
def test_other_settings_in_the_same_folder_are_refused(
    setting: str, finished: bool, teacher: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(teacher, text, out, samples=20)
    if not finished:
        (out / "manifest.json").unlink()
    before = files(out)
    changed, message = OTHER_SETTINGS[setting]
    with pytest.raises(MismatchError, match=message) as caught:
        run(teacher, text, out, **{"samples": 20, **changed})
    assert "give another output folder" in str(caught.value)
    assert files(out) == before


def test_another_teacher_or_text_is_refused(teacher: Path, text: Path, tmp_path: Path) -> None:
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    rows.write_bytes(text.read_bytes())
    run(teacher, rows, out)
    (out / "manifest.json").unlink()

    # The same name, size and number of rows, one word changed: the documents tell.
    rows.write_bytes(text.read_bytes().replace(b" cat ", b" dog ", 1))
    with pytest.raises(MismatchError, match=r"data-00000.parquet, document \d+: the dataset has another at rows.jsonl"):
        run(teacher, rows, out)
    rows.write_bytes(text.read_bytes())

    other = tmp_path / teacher.name
    load_tokenizer(str(teacher)).save_pretrained(other)
    model = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    model.save_pretrained(other)
    with pytest.raises(
        MismatchError, match=r"teacher.revision is 'sample-xxh3-64:\w+' there, expected 'sample-xxh3-64"
    ):
        run(other, rows, out)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_logits_that_are_no_distribution(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    documents = [[5, 6, 7, 8], [5, 6, 7, 8, 5, 9, 6], [8, 7]]
    rows.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in documents))

    def overflowing(model: Any, *, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
        hidden = backbone_hidden(model, input_ids=input_ids, **inputs)
        return hidden.masked_fill((input_ids == 9)[..., None], float("nan"))

    monkeypatch.setattr("distillkit.capture.engines.hf.backbone_hidden", overflowing)
    with pytest.raises(CaptureError, match=r"rows.jsonl, line 2: after token 5 of 7 \(id 9\) the teacher gives NaN"):
        run(teacher, rows, tmp_path / "out", head_rows=3)
    assert files(tmp_path / "out") == {}


def test_codec_configurations(teacher: Path, text: Path, tmp_path: Path) -> None:
    path = tmp_path / "compression_config.yaml"
    legacy = {"legacy_logit_compression": {"vocab_size": HEAD, "k": 8, "exact_k": 4, "polynomial_degree": 2}}
    for number, config in enumerate([EXACT, {"logprob_compressor": EXACT}, legacy]):
        path.write_text(yaml.safe_dump(config))
        run(teacher, text, tmp_path / str(number), samples=3, compression_config=path)
    assert Dataset.open(tmp_path / "0").codec == Dataset.open(tmp_path / "1").codec
    assert Dataset.open(tmp_path / "2").codec.format == "legacy"

    path.write_text(yaml.safe_dump({**EXACT, "d": 100}))
    with pytest.raises(MismatchError, match=r"compression_config.yaml: d is 100, the teacher's logits are 128 wide"):
        run(teacher, text, tmp_path / "out", compression_config=path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match=r"compression_config.yaml is not YAML"):
        run(teacher, text, tmp_path / "out", compression_config=str(path))
    with pytest.raises(ConfigError, match=r"missing.yaml can not be read: No such file"):
        run(teacher, text, tmp_path / "out", compression_config=tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"there is no 'recomended', .* did you mean recommended"):
        run(teacher, text, tmp_path / "out", preset="recomended")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seq_len": 2}, "max_seq_len: must be a whole number of at least 3, found 2"),
        ({"max_seq_len": 513}, r"max_seq_len: 513 tokens are more than the 512 positions that .* was made for"),
        ({"samples": 0}, "samples: must be a whole number of at least 1, found 0"),
        ({"preset": "budget", "compression_config": {}}, "preset and compression_config: give one of the two"),
        ({"max_sequence_len": 3}, "capture has no setting 'max_sequence_len'; did you mean max_seq_len"),
        ({"dtype": "int8"}, "dtype: 'int8' is not known; auto, float32"),
        ({"device": "tpu7"}, "device: 'tpu7' is none"),
        ({"head_dtype": "half"}, "head_dtype: must be float32 or auto"),
        ({"tokenizer": "./nowhere"}, "no tokenizer could be loaded from './nowhere'"),
        ({"teacher": "./nowhere"}, "model: no model config could be loaded from './nowhere'"),
    ],
)
def test_settings_that_are_refused(
    options: dict[str, Any], message: str, teacher: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(**{"teacher": teacher, "dataset": text, "output": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_knows_more_than_the_teacher(teacher: Path, text: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(teacher))
    tokenizer.add_tokens([f"word{index}" for index in range(HEAD)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(MismatchError, match=r"knows \d+ ids, the teacher's logits are only 128 wide"):
        run(teacher, text, tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))


def test_text_without_documents(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"input_ids": [5]}\n')
    with pytest.raises(CaptureError, match=r"no document of at least 2 tokens in 2 rows \(1 empty, 1 documents of one"):
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
    for shown in ("KL mean", "nothing to do", f"{report['tokens']:,}"):
        assert shown in again.stdout

    refused = CliRunner().invoke(capture_command, [*arguments, "--max-seq-len", "65", "--preset", "budget"])
    assert isinstance(refused.exception, MismatchError)
    assert CliRunner().invoke(capture_command, ["--model", "x"]).exit_code == 2


def test_every_setting_is_an_option() -> None:
    settings = set(inspect.signature(CaptureSettings).parameters)
    options = {parameter.name for parameter in capture_command.params}
    assert settings | {"as_json", "progress"} == options


def test_unknown_rows_name_file_and_columns(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl, line 1: found the columns prompt; understood are text"):
        run(teacher, tmp_path / "rows.jsonl", tmp_path / "out")

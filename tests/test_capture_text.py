"""Every source and every layout of rows becomes the same documents of token ids; what is not understood is refused by "
"place and columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from distillkit.capture.sources import open_source
from distillkit.capture.text import DocumentReader, chunks
from distillkit.errors import ConfigError, InputError

WORDS = ["<unk>", "<bos>", "[", "]", "user", "assistant", "system", "tool", "a", "b", "c", "d", "e"]
TEMPLATE = "<bos> {% for m in messages %}[ {{ m.role }} ] {{ m.content }} {% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words, with a <bos> put before text and written out by the chat template."""
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", chat_template=TEMPLATE
    )


def reader(dataset: Any, tokenizer: Any, **options: Any) -> DocumentReader:
    settings = {"max_tokens": 100, "id_limit": len(WORDS), **options}
    return DocumentReader(open_source(str(dataset)), tokenizer, **settings)


def words(ids: Any) -> str:
    return " ".join(WORDS[i] for i in ids)


def write_rows(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    return path


# -- layouts -----------------------------------------------------------------------------------------------------------

CHAT = "<bos> [ user ] a b [ assistant ] c"
LAYOUTS = {
    "text": ({"text": "a b c"}, "<bos> a b c"),
    "messages": ({"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}, CHAT),
    "conversations": (
        {
            "conversations": [
                {"from": "system", "value": "d"},
                {"from": "human", "value": "a b"},
                {"from": "gpt", "value": "c"},
            ]
        },
        "<bos> [ system ] d [ user ] a b [ assistant ] c",
    ),
    "instruction": ({"instruction": "a b", "output": "c"}, CHAT),
    "instruction, input": ({"instruction": "a", "input": "b", "output": "c"}, CHAT),
    "inputs": ({"inputs": "a b", "targets": "c"}, CHAT),
    "turns": (
        {
            "tools": ['{"name": "f"}'],
            "turns": [
                {"role": "user", "content": "a b", "tool_calls": None},
                {"role": "tool", "content": "e", "tool_calls": None},
                {"role": "assistant", "content": "c", "tool_calls": None},
            ],
        },
        "<bos> [ user ] a b [ tool ] e [ assistant ] c",
    ),
    "input_ids": ({"input_ids": [8, 9, 10]}, "a b c"),
    "several layouts, one with a value": (
        {"text": None, "messages": [{"role": "user", "content": "a"}]},
        "<bos> [ user ] a",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, tmp_path: Path, tokenizer: Any) -> None:
    row, expected = LAYOUTS[layout]
    (document,) = reader(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer)
    assert words(document.input_ids) == expected
    assert document.input_ids.dtype == np.int32
    assert document.source == "rows.jsonl, line 1"


def test_tool_calls_reach_the_template(tmp_path: Path, tokenizer: Any) -> None:
    template = "{{ tools[0].name }} {{ messages[0].tool_calls[0].function.arguments.x }} {{ messages[0].content }}"
    tokenizer_of_calls = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    call = {"name": "f", "arguments": '{"x": "b"}'}
    row = {"tools": ['{"name": "a"}'], "turns": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    (document,) = reader(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer_of_calls)
    assert words(document.input_ids) == "a b"


def test_packed_and_padded_ids_are_taken_apart(tmp_path: Path, tokenizer: Any) -> None:
    row = {"input_ids": [8, 9, 10, 11, 12, 0, 0], "attention_mask": [1, 1, 2, 2, 2, 0, 0]}
    documents = list(reader(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer))
    assert [words(document.input_ids) for document in documents] == ["a b", "c d e"]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            InputError,
            "rows.jsonl, line 3: found the columns question, answer; understood are text; messages",
        ),
        ({"instruction": "a"}, InputError, "rows.jsonl, line 3: found the columns instruction; understood are"),
        ({"text": ["a"]}, InputError, "rows.jsonl, line 3: text must be text, found list"),
        ({"messages": "a"}, InputError, "rows.jsonl, line 3: messages must be a list, found str"),
        (
            {"messages": [{"content": "a"}]},
            InputError,
            r"line 3: messages\[0\] must have role and content, or from and value",
        ),
        (
            {"conversations": [{"from": "robot", "value": "a"}]},
            InputError,
            r"conversations\[0\]: the role 'robot' is not known",
        ),
        ({"input_ids": [8, 13]}, InputError, "line 3: input_ids has 13; the model knows ids 0…12"),
        (
            {"input_ids": [8, 9], "attention_mask": [1]},
            InputError,
            r"attention_mask has shape \(1,\), input_ids \(2,\)",
        ),
        (["a"], InputError, "line 3: a row must be an object with named columns, found list"),
    ],
)
def test_rows_that_are_not_understood(
    row: Any, error: type[Exception], message: str, tmp_path: Path, tokenizer: Any
) -> None:
    # A blank line stands between the rows, as `write_rows` writes them.
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a b"}, row])
    with pytest.raises(error, match=message):
        list(reader(path, tokenizer))


def test_chat_needs_a_template(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [LAYOUTS["messages"][0]])
    with pytest.raises(ConfigError, match=r"line 1: a row of messages needs the chat template, which is switched off"):
        list(reader(path, tokenizer, chat=False))
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(
        ConfigError, match=r"line 1: a row of messages needs a chat template, and the tokenizer has none"
    ):
        list(reader(path, without))
    strict = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template="{{ raise_exception('no such turn') }}"
    )
    with pytest.raises(InputError, match=r"line 1: the tokenizer's chat template refuses this row: no such turn"):
        list(reader(path, strict))


# -- counting and cutting ----------------------------------------------------------------------------------------------


def test_empty_rows_and_short_documents_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "a b"}, {"text": " \n"}, {"text": None}, {"messages": []}, {"input_ids": []}, {"input_ids": [8]}]
    documents = reader(write_rows(tmp_path / "rows.jsonl", rows), tokenizer)
    for _ in range(2):  # the same again: counts belong to one pass
        assert [words(document.input_ids) for document in documents] == ["<bos> a b"]
        assert (documents.rows, documents.empty, documents.short) == (6, 4, 1)


@pytest.mark.parametrize("length", range(2, 14))
@pytest.mark.parametrize("limit", [3, 4, 5, 20])
def test_chunks_hold_every_token_and_can_have_a_row(length: int, limit: int) -> None:
    pieces = chunks(length, limit)
    assert [token for start, stop in pieces for token in range(start, stop)] == list(range(length))
    assert all(2 <= stop - start <= limit for start, stop in pieces)
    assert len(pieces) == -(-length // limit)


def test_long_documents_are_cut(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "a b"}, {"text": "a b c d e a b c d"}]
    documents = list(reader(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, max_tokens=4))
    assert [words(document.input_ids) for document in documents] == ["<bos> a b", "<bos> a b c", "d e a b", "c d"]
    assert [document.source.partition(", line 3")[2] for document in documents] == [
        "",
        ", tokens 0…3",
        ", tokens 4…7",
        ", tokens 8…9",
    ]


def test_samples(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"input_ids": [8, i % 13, i // 13]} for i in range(100)])

    def drawn(**options: Any) -> list[int]:
        return [int(d.input_ids[2]) * 13 + int(d.input_ids[1]) for d in reader(path, tokenizer, **options)]

    first = drawn(samples=30)
    assert first == sorted(set(first))
    assert len(first) == 30
    assert drawn(samples=30) == first
    assert drawn(samples=30, seed=7) != first
    assert drawn(samples=1000) == list(range(100))


# -- sources -----------------------------------------------------------------------------------------------------------

ROWS = [{"text": "a b"}, {"text": "c d"}, {"text": "e a"}]
EXPECTED = ["<bos> a b", "<bos> c d", "<bos> e a"]


def documents_of(dataset: Any, tokenizer: Any, split: str = "train") -> list[str]:
    source = open_source(str(dataset), split=split)
    found = [words(d.input_ids) for d in DocumentReader(source, tokenizer, max_tokens=100, id_limit=len(WORDS))]
    assert source.num_rows == len(found)
    return found


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_files(suffix: str, tmp_path: Path, tokenizer: Any) -> None:
    assert documents_of(write_rows(tmp_path / f"rows{suffix}", ROWS), tokenizer) == EXPECTED


def test_a_json_file_may_hold_lines(tmp_path: Path, tokenizer: Any) -> None:
    assert documents_of(write_rows(tmp_path / "rows.jsonl", ROWS).rename(tmp_path / "rows.json"), tokenizer) == EXPECTED


def test_a_folder_is_read_by_name_and_a_text_file_is_one_document(tmp_path: Path, tokenizer: Any) -> None:
    write_rows(tmp_path / "2.jsonl", ROWS[1:2])
    (tmp_path / "deep").mkdir()
    write_rows(tmp_path / "deep" / "3.parquet", ROWS[2:])
    (tmp_path / "1.txt").write_text("a\nb\n", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("d")
    (tmp_path / "notes.md").write_text("d")
    assert documents_of(tmp_path, tokenizer) == EXPECTED
    assert open_source(str(tmp_path)).description["files"] == 3


def test_splits_of_a_folder(tmp_path: Path, tokenizer: Any) -> None:
    write_rows(tmp_path / "train-00000-of-00001.jsonl", ROWS[:1])
    write_rows(tmp_path / "dev.jsonl", ROWS[1:2])
    write_rows(tmp_path / "more.jsonl", ROWS[2:])
    assert documents_of(tmp_path, tokenizer) == [EXPECTED[2], EXPECTED[0]]
    assert documents_of(tmp_path, tokenizer, split="validation") == [EXPECTED[1]]
    with pytest.raises(
        ConfigError, match=r"no files of split 'test'; by their names there are files of train, validation"
    ):
        open_source(str(tmp_path), split="test")


def test_save_to_disk_folders(tmp_path: Path, tokenizer: Any) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "splits")

    assert documents_of(tmp_path / "plain", tokenizer) == EXPECTED
    assert documents_of(tmp_path / "splits", tokenizer) == EXPECTED
    assert documents_of(tmp_path / "splits", tokenizer, split="test") == EXPECTED[1:2]
    with pytest.raises(ConfigError, match="it has no split 'dev', but train, test"):
        open_source(str(tmp_path / "splits"), split="dev")


def test_what_can_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"there is no file or folder .*missing.jsonl"):
        open_source(str(tmp_path / "missing.jsonl"))
    (tmp_path / "data.csv").write_text("a")
    with pytest.raises(ConfigError, match=r"files of .jsonl, .json, .txt, .parquet are understood, not '.csv'"):
        open_source(str(tmp_path / "data.csv"))
    with pytest.raises(ConfigError, match=r"no .jsonl, .json, .txt, .parquet files in it"):
        open_source(str(tmp_path))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(FileNotFoundError("nothing there"))
    )
    with pytest.raises(
        ConfigError,
        match=r"'some/name' is no local file or folder, and loading it from the hub .* failed: nothing there",
    ):
        open_source("some/name")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.json", b'[{"text": "a"}', "a.json: not JSON"),
        ("a.txt", b"\xff\xfe", "a.txt: not UTF-8"),
        ("a.parquet", b"PAR1", "a.parquet: not a Parquet file"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, message: str, tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(reader(tmp_path / name, tokenizer))

"""Every source and every layout of rows becomes the same documents of token ids; what is not understood is refused by
place and columns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from distillkit.errors import ConfigError, InputError
from distillkit.shards.overflow import default_overlap, windows
from distillkit.text.documents import DocumentReader
from distillkit.text.policy import TextOptions, training_policy
from distillkit.text.rows import RowReader
from distillkit.text.sources import kept_schema, open_source
from support.refusals import refused

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


def test_layouts(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    for layout, (row, expected) in LAYOUTS.items():
        (document,) = reader(write_rows(path, [row]), tokenizer)
        assert words(document.input_ids) == expected, layout
        assert document.input_ids.dtype == np.int32
        assert document.source == "rows.jsonl, line 1"


def test_tool_calls_reach_the_template(tmp_path: Path, tokenizer: Any) -> None:
    template = (
        "{{ tools[0].name }} {% set f = messages[0].tool_calls[0].function %}{{ f.name }} {{ f.arguments.x }} "
        "{{ messages[0].content }}"
    )
    tokenizer_of_calls = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, chat_template=template)
    call = {"name": "e", "arguments": '{"x": "b"}'}
    row = {"tools": ['{"name": "a"}'], "turns": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    (document,) = reader(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer_of_calls)
    assert words(document.input_ids) == "a e b"


def test_packed_and_padded_ids_are_taken_apart(tmp_path: Path, tokenizer: Any) -> None:
    row = {"input_ids": [8, 9, 10, 11, 12, 0, 0], "attention_mask": [1, 1, 2, 2, 2, 0, 0]}
    documents = list(reader(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer))
    assert [words(document.input_ids) for document in documents] == ["a b", "c d e"]


# Rows, and what the message names besides file and line.
MISFITS: list[tuple[Any, list[str]]] = [
    ({"question": "a", "answer": "b"}, ["question", "answer", "text", "messages"]),
    ({"instruction": "a"}, ["instruction", "text", "messages"]),
    ({"text": ["a"]}, ["text", "list"]),
    ({"messages": "a"}, ["messages", "str"]),
    ({"messages": [{"content": "a"}]}, ["messages[0]", "role", "content", "from", "value"]),
    ({"conversations": [{"from": "robot", "value": "a"}]}, ["conversations[0]", "'robot'"]),
    ({"input_ids": [8, 13]}, ["input_ids", "13", "0…12"]),
    ({"input_ids": [[8], [8, 9]]}, ["input_ids"]),
    ({"input_ids": [8, 2**70]}, ["input_ids", str(2**70)]),
    ({"input_ids": [8, 9], "loss_mask": "ab"}, ["loss_mask", "'ab'"]),
    ({"input_ids": [8, 9], "attention_mask": [1]}, ["attention_mask", "(1,)", "input_ids", "(2,)"]),
    (["a"], ["list"]),
]


def test_rows_that_are_not_understood(tmp_path: Path, tokenizer: Any) -> None:
    for row, facts in MISFITS:
        # A blank line stands between the rows, as `write_rows` writes them.
        path = write_rows(tmp_path / "rows.jsonl", [{"text": "a b"}, row])
        with refused(InputError, "rows.jsonl, line 3", *facts):
            list(reader(path, tokenizer))


def test_chat_needs_a_template(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [LAYOUTS["messages"][0]])
    with refused(ConfigError, "line 1", "messages"):
        list(reader(path, tokenizer, chat=False))
    backend = tokenizer.backend_tokenizer
    with refused(ConfigError, "line 1", "messages"):
        list(reader(path, PreTrainedTokenizerFast(tokenizer_object=backend)))
    strict = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template="{{ raise_exception('no such turn') }}")
    with refused(InputError, "line 1", "no such turn"):
        list(reader(path, strict))


# -- counting and cutting ----------------------------------------------------------------------------------------------


def test_empty_rows_and_short_documents_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": "a b"}, {"text": " \n"}, {"text": None}, {"messages": []}, {"input_ids": []}, {"input_ids": [8]}]
    documents = reader(write_rows(tmp_path / "rows.jsonl", rows), tokenizer)
    for _ in range(2):  # the same again: counts belong to one pass
        assert [words(document.input_ids) for document in documents] == ["<bos> a b"]
        assert (documents.rows, documents.empty, documents.short) == (6, 4, 1)


@given(st.data())
def test_every_token_of_a_long_document_counts_once(data: st.DataObject) -> None:
    """Cut in any way, each token but the first has one distribution that counts, and the context it was promised."""
    limit = data.draw(st.integers(2, 20))
    overlap = data.draw(st.none() | st.integers(1, max(1, limit // 2)))
    lengths = data.draw(st.lists(st.integers(2, 70), min_size=1, max_size=4))
    masks = [data.draw(st.none() | st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths]
    rows = [
        {"input_ids": [row, *range(1, length)], "loss_mask": mask}
        for row, (length, mask) in enumerate(zip(lengths, masks, strict=True))
    ]
    source = _Rows(rows)
    documents = list(
        DocumentReader(source, None, max_tokens=limit, id_limit=100, overlap=overlap, drop_duplicates=False)
    )
    counted: dict[tuple[int, int], int] = {}
    for document in documents:
        row, _, place = document.source.partition(", tokens ")
        start = int(place.partition("…")[0] or 0)
        assert 2 <= len(document.input_ids) <= limit
        assert document.loss_mask is None or not document.loss_mask[1:].all()
        for t in range(1, len(document.input_ids)):
            if document.loss_mask is None or document.loss_mask[t]:
                assert start == 0 or t >= (default_overlap(limit) if overlap is None else overlap)
                key = (int(row), start + t)
                counted[key] = counted.get(key, 0) + 1
                assert document.input_ids[t] == start + t
    expected = {
        (row, t): 1
        for row, (length, mask) in enumerate(zip(lengths, masks, strict=True))
        for t in range(1, length)
        if mask is None or mask[t]
    }
    assert counted == expected


class _Rows:
    """Rows in memory as a source."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows
        self.num_rows = len(rows)

    def schema(self, columns: Any = None) -> pyarrow.Schema:
        return pyarrow.schema([])

    def rows(self, order: Any = None) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((str(index), row) for index, row in enumerate(self._rows))


def test_windows() -> None:
    assert windows(10, 10, 2) == [(0, 10)]
    assert windows(11, 10, 2) == [(0, 10), (8, 11)]
    assert windows(20, 8, 3) == [(0, 8), (5, 13), (10, 18), (15, 20)]


def test_long_documents(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a b"}, {"text": "a b c d e a b c d"}])

    def read(**options: Any) -> tuple[list[str], dict[str, int]]:
        documents = reader(path, tokenizer, max_tokens=4, **options)
        return [words(document.input_ids) for document in documents], documents.counts

    counts = {"rows": 2, "empty_rows": 0, "documents_of_one_token": 0}
    assert read() == (
        ["<bos> a b", "<bos> a b c", "c d e a", "a b c d"],
        {**counts, "long_documents_in_windows": 1},
    )
    assert read(overflow="truncate") == (["<bos> a b", "<bos> a b c"], {**counts, "long_documents_truncated": 1})
    assert read(overflow="skip") == (["<bos> a b"], {**counts, "long_documents_skipped": 1})

    documents = list(reader(path, tokenizer, max_tokens=4, overlap=2))
    assert [document.source.partition(", line 3")[2] for document in documents] == [
        "",
        ", tokens 0…3",
        ", tokens 2…5",
        ", tokens 4…7",
        ", tokens 6…9",
    ]
    masks = [None if document.loss_mask is None else document.loss_mask.tolist() for document in documents]
    assert masks == [None, None, *[[False, False, True, True]] * 3]


# -- which tokens count ------------------------------------------------------------------------------------------------


TEMPLATES = files("trl") / "chat_templates"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>"]
SPECIAL += ["<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|eot_id|>", "<|start_header_id|>", "<|call|>"]
SPECIAL += ["<|end_header_id|>", "<|begin_of_text|>", "<｜Assistant｜>", "<｜User｜>", "<｜end▁of▁sentence｜>"]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CONVERSATION = [
    {"role": "user", "content": "Hi thére"},
    {"role": "assistant", "content": "Öne."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "Two, three"},
]
TOOLS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "f", "content": "5"},
    {"role": "assistant", "content": "Five"},
]


def byte_tokenizer(template: str) -> Any:
    """Bytes, the special tokens of many chat templates, and a template of TRL's collection, which has the originals."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    backend.train_from_iterator(
        ["Two, three, and one"] * 3,
        trainers.BpeTrainer(
            special_tokens=["<s>", "</s>", *SPECIAL],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=text)


def counted_text(rows: list[Any], tokenizer: Any, **options: Any) -> list[str]:
    """The text of all documents, with what counts in ‹›."""
    found = []
    for document in DocumentReader(_Rows(rows), tokenizer, max_tokens=4096, id_limit=1 << 20, **options):
        mask = np.ones(len(document.input_ids), bool) if document.loss_mask is None else document.loss_mask
        groups = groupby(zip(document.input_ids.tolist(), mask, strict=True), lambda pair: pair[1])
        texts = [(counts, tokenizer.decode([token for token, _ in group])) for counts, group in groups]
        found.append("".join(f"‹{text}›" if counts else text for counts, text in texts))
    return found


# Templates that do not mark the assistant's turns. Those of thinking models write a turn in another way once others
# follow, phi3 ends the conversation with a token of its own, deepseek opens an answer with more than it keeps.
TURNS = {
    "qwen2_5": (
        TOOLS,
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        '‹<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>\n›'
        "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n‹Five<|im_end|>\n›",
    ),
    "qwen3": (
        CONVERSATION,
        "<|im_start|>user\nHi thére<|im_end|>\n<|im_start|>assistant\n‹Öne.<|im_end|>\n›"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n‹<think>\n\n</think>\n\nTwo, three<|im_end|>\n›",
    ),
    "phi3": (
        CONVERSATION,
        "<|user|>\nHi thére<|end|>\n<|assistant|>\n‹Öne.<|end|>\n›<|user|>\nAnd?<|end|>\n<|assistant|>\n"
        "‹Two, three<|end|>\n</s>›",
    ),
    "deepseek_r1_distill": (
        CONVERSATION,
        "<s><｜User｜>Hi thére<｜Assistant｜>‹Öne.<｜end▁of▁sentence｜>›<｜User｜>And?<｜Assistant｜>"
        "‹Two, three<｜end▁of▁sentence｜>›",
    ),
}


def test_the_assistants_turns_of_templates_without_marks() -> None:
    for template, (messages, expected) in TURNS.items():
        found = counted_text([{"messages": messages}], byte_tokenizer(template), loss_on="assistant")
        assert found == [expected], template


def test_turns_are_what_a_marked_template_marks() -> None:
    """TRL's variants of these templates mark the assistant's turns and render the same text.

    Some have no tools, and Nemotron's variants mark what the prompt opens.
    """
    reasoning = [{**CONVERSATION[0]}, {**CONVERSATION[1], "reasoning_content": "Hm"}, *CONVERSATION[2:]]
    templates = {
        **dict.fromkeys(("lfm2", "llama3", "qwen2_5_vl"), (CONVERSATION,)),
        **dict.fromkeys(
            ("qwen3_instruct_2507", "nemotron_3_nano", "nemotron_3_ultra"), (CONVERSATION, TOOLS, reasoning)
        ),
    }
    for template, conversations in templates.items():
        plain, marked = byte_tokenizer(template), byte_tokenizer(f"{template}_training")
        for messages in conversations:
            expected = marked.apply_chat_template(
                messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            for tokenizer in (plain, marked):
                (document,) = DocumentReader(
                    _Rows([{"messages": messages}]), tokenizer, max_tokens=4096, id_limit=1 << 20, loss_on="assistant"
                )
                assert document.input_ids.tolist() == expected["input_ids"], template
                assert document.loss_mask is not None
                assert document.loss_mask.astype(int).tolist() == expected["assistant_masks"], template


SYSTEM_OF_GPT_OSS = "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
THOUGHT, THINKING = (
    [{**message, **({name: "Hm"} if message["role"] == "assistant" else {})} for message in CONVERSATION]
    for name in ("reasoning_content", "thinking")
)
# Templates whose variants render other text, or mark the header of a turn, too.
LATER_TURNS = {
    # It reads this name only; later releases of Transformers pass others on by it.
    "gptoss": (
        THINKING,
        "<|start|>user<|message|>Hi thére<|end|><|start|>assistant‹<|channel|>final<|message|>Öne.<|end|>›"
        "<|start|>user<|message|>And?<|end|><|start|>assistant‹<|channel|>analysis<|message|>Hm<|end|><|start|>assistant"
        "<|channel|>final<|message|>Two, three<|return|>›",
    ),
    "glm4moe": (
        THOUGHT,
        "[gMASK]<sop><|user|>\nHi thére<|assistant|>‹\n<think></think>\nÖne.›<|user|>\nAnd?"
        "<|assistant|>‹\n<think>Hm</think>\nTwo, three›",
    ),
    **dict.fromkeys(
        ("qwen3_5_think", "qwen3_6"),
        (
            [*TOOLS, *CONVERSATION[2:3], *TOOLS[1:]],
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
            "‹<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call><|im_end|>\n›"
            "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n‹Five<|im_end|>\n›"
            "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n<think>\n‹\n</think>\n\n"
            "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call><|im_end|>\n›"
            "<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n‹\n</think>"
            "\n\nFive<|im_end|>\n›",
        ),
    ),
}


def test_turns_of_templates_that_write_earlier_ones_differently() -> None:
    for template, (messages, expected) in LATER_TURNS.items():
        (found,) = counted_text([{"messages": messages}], byte_tokenizer(template), loss_on="assistant")
        assert found.partition(SYSTEM_OF_GPT_OSS)[2 if template == "gptoss" else 0] == expected, template


@pytest.mark.parametrize("columns", [("prompt", "response"), ("prompt", "completion")])
def test_prompt_and_response(columns: tuple[str, str]) -> None:
    """As the trainer tokenises them; the loss is on the response."""
    tokenizer = byte_tokenizer("qwen3")
    plain = dict(zip(columns, ("Two, thr", "ee, and Öne"), strict=True))
    # A token that joins prompt and response counts: some of it is to be predicted.
    assert counted_text([plain], tokenizer) == ["<s>Two,‹ three, and Öne</s>›"]

    chat = dict(zip(columns, (CONVERSATION[:3], CONVERSATION[3:]), strict=True))
    prompt, last = TURNS["qwen3"][1].split("‹")[1:]
    first = TURNS["qwen3"][1].split("‹")[0]
    assert counted_text([chat], tokenizer) == [first + prompt.replace("›", "") + "‹" + last]
    assert counted_text([chat], tokenizer, loss_on="assistant") == [TURNS["qwen3"][1]]
    assert "‹" not in counted_text([chat], tokenizer, loss_on="all")[0][1:]

    rows = [{"prompt": row["prompt"], "completion": row[columns[1]]} for row in (plain, chat)]
    reader = RowReader(tokenizer, training_policy(tokenizer, TextOptions()), 1 << 20)
    trained = reader([(str(index), row) for index, row in enumerate(rows)])
    captured = DocumentReader(_Rows([plain, chat]), tokenizer, max_tokens=4096, id_limit=1 << 20)
    for document, [tokens] in zip(captured, trained, strict=True):
        np.testing.assert_array_equal(document.input_ids, tokens.input_ids)
        np.testing.assert_array_equal(document.loss_mask, tokens.loss_mask)


def test_masks_of_token_ids() -> None:
    def masks(row: dict[str, Any], **options: Any) -> list[Any]:
        documents = DocumentReader(_Rows([row]), None, max_tokens=100, id_limit=20, **options)
        return [None if d.loss_mask is None else d.loss_mask.astype(int).tolist() for d in documents]

    ids = {"input_ids": [8, 9, 10, 11]}
    assert masks({**ids, "loss_mask": [0, 1, 0, 1]}) == [[0, 1, 0, 1]]
    assert masks({**ids, "labels": [-100, 9, -100, 11]}) == [[0, 1, 0, 1]]
    assert masks({**ids, "loss_mask": [0, 1, 1, 1]}) == [None], "the first token is predicted by nothing"
    assert masks({**ids, "loss_mask": [0, 1, 0, 1]}, loss_on="all") == [None]
    assert masks({**ids, "loss_mask": [1, 1, 1, 0], "assistant_masks": [1, 1, 0, 1]}) == [[1, 1, 0, 0]]
    assert masks({**ids, "completion_mask": [0, 0, 1, 1], "labels": None}, loss_on="completion") == [[0, 0, 1, 1]]
    packed = {"input_ids": [8, 9, 10, 11, 12, 0], "attention_mask": [1, 1, 2, 2, 2, 0]}
    assert masks({**packed, "loss_mask": [0, 1, 1, 0, 1, 0]}) == [None, [1, 0, 1]]
    assert masks({**ids, "loss_mask": [1, 0, 0, 0]}) == [], "nothing of it counts"

    with refused(InputError, "0", "labels", "input_ids"):
        masks({**ids, "labels": [8, 9, 10, 12]})
    with refused(InputError, "0", "loss_mask", "(1,)", "input_ids", "(4,)"):
        masks({**ids, "loss_mask": [1]})
    with refused(ConfigError, "loss_on", "assistant", "0", "input_ids"):
        masks(ids, loss_on="assistant")


def test_losses_that_rows_do_not_allow() -> None:
    tokenizer = byte_tokenizer("gptoss")

    def check(error: type[Exception], row: Any, loss_on: str, facts: list[str], tokenizer: Any = tokenizer) -> None:
        with refused(error, "0", *facts):
            counted_text([row], tokenizer, loss_on=loss_on)

    chat = {"messages": CONVERSATION}
    check(ConfigError, {"text": "a"}, "assistant", ["loss_on", "assistant", "text"])
    check(ConfigError, {"prompt": "a", "response": "b"}, "assistant", ["loss_on", "assistant"])
    check(ConfigError, chat, "completion", ["loss_on", "completion", "prompt", "messages"])
    gemma = [*TOOLS, {"role": "user", "content": "And?"}, {**TOOLS[1], "content": "So"}, *TOOLS[2:]]
    check(InputError, {"messages": gemma}, "assistant", ["5", "--loss-on all"], byte_tokenizer("gemma4"))

    class Slow:
        is_fast = False
        chat_template = "x"

    check(ConfigError, chat, "assistant", [], Slow())
    # Nobody's turn: nothing to learn.
    reader = DocumentReader(
        _Rows([{"messages": CONVERSATION[:1]}]), tokenizer, max_tokens=100, id_limit=999, loss_on="assistant"
    )
    assert list(reader) == []
    assert reader.counts["documents_without_a_counted_token"] == 1


# -- which rows, and what they bring -----------------------------------------------------------------------------------


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


NUMBERED = [{"input_ids": [8, 9 + i % 4, 8 + i], "number": i, "lang": "en" if i % 3 else "de"} for i in range(300)]


def make_source(kind: str, folder: Path) -> Path:
    if kind == "several":
        for part in range(3):
            write_rows(
                folder / "several" / f"{part}.{'jsonl' if part else 'parquet'}", NUMBERED[part * 100 : part * 100 + 100]
            )
        return folder / "several"
    if kind == "saved":
        datasets.Dataset.from_list(NUMBERED).save_to_disk(folder / "saved")
        return folder / "saved"
    return write_rows(folder / f"rows.{kind}", NUMBERED)


def test_rows_in_a_random_order(tmp_path: Path) -> None:
    (tmp_path / "several").mkdir()
    for kind in ("jsonl", "json", "parquet", "saved", "several"):
        source = open_source(str(make_source(kind, tmp_path)))

        def read(source: Any = source, **options: Any) -> list[tuple[int, str]]:
            documents = DocumentReader(source, None, max_tokens=100, id_limit=1000, **options)
            return [(int(document.input_ids[2]) - 8, document.source) for document in documents]

        everything = read()
        assert [number for number, _ in everything] == list(range(300))
        shuffled = read(shuffle=True)
        assert shuffled == read(shuffle=True) != everything
        assert sorted(shuffled) == everything, "the same rows from the same places"
        assert read(shuffle=True, seed=1) != shuffled
        sample = read(shuffle=True, samples=20)
        assert sample != sorted(sample)
        assert sorted(sample) == read(samples=20)


def test_filters_and_duplicates(tmp_path: Path) -> None:
    rows = [
        *({"input_ids": list(range(length)), "lang": "en", "good": True} for length in (2, 3, 4, 5, 4)),
        {"input_ids": [0, 1, 2, 3], "loss_mask": [0, 0, 0, 1], "lang": "en", "good": True},
        {"input_ids": [0, 1, 2, 3], "lang": "de", "good": True},
        {"input_ids": [0, 1, 3, 2], "lang": "en", "good": None},
        {"input_ids": [0, 1, 3, 2]},
    ]

    def read(**options: Any) -> tuple[list[int], dict[str, int]]:
        found = DocumentReader(_Rows(rows), None, max_tokens=100, id_limit=1000, **options)
        numbers = [int(document.source) for document in found]
        return numbers, {name: count for name, count in found.counts.items() if count and name != "rows"}

    assert read() == ([0, 1, 2, 3, 5, 7], {"duplicate_documents": 3})
    assert read(drop_duplicates=False) == (list(range(9)), {})
    assert read(shortest=3, longest=4, drop_duplicates=False)[0] == [1, 2, 4, 5, 6, 7, 8]
    assert read(shortest=3, longest=4)[1] == {"documents_left_out_by_length": 2, "duplicate_documents": 3}
    conditions = [("lang", "en"), ("good", "true")]
    assert read(where=conditions, drop_duplicates=False) == ([0, 1, 2, 3, 4, 5], {"rows_left_out_by_where": 3})
    assert read(where=[("good", "null")])[0] == [7]
    with refused(ConfigError, "where", "langs"):
        read(where=[("langs", "en")])


def test_columns_that_are_kept(tmp_path: Path) -> None:
    for kind in ("jsonl", "parquet", "saved"):
        source = open_source(str(make_source(kind, tmp_path)))

        def kept(columns: Any, source: Any = source) -> DocumentReader:
            return DocumentReader(source, None, max_tokens=2, id_limit=1000, keep_columns=columns, overlap=1)

        assert kept("none").kept == pyarrow.schema([])
        assert all(document.columns is None for document in kept("none"))
        assert kept("lang").kept == pyarrow.schema([("lang", pyarrow.string())])
        both = pyarrow.schema([("number", pyarrow.int64()), ("lang", pyarrow.string())])
        assert kept("all").kept == both, "the ids are there anyway"
        # Every piece of a row brings the row's columns; rows that are equal stay.
        documents = list(kept(("number", "lang")))
        assert [d.columns for d in documents] == [
            {"number": row["number"], "lang": row["lang"]} for row in NUMBERED for _ in range(2)
        ]
        with refused(ConfigError, "keep_columns", "numbers", "input_ids, number, lang"):
            list(kept("lang,numbers"))
        with refused(ConfigError, "keep_columns", "input_ids", "doc_id"):
            list(kept("input_ids"))


def test_types_of_json_columns_are_those_of_all_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": "a", "meta": {"a": 1}, "score": 1, "mixed": 1, "none": None}] * 2000
    rows += [{"text": "b", "meta": {"b": ["x"]}, "score": 0.5, "mixed": "x", "late": True}]
    source = open_source(str(write_rows(tmp_path / "rows.jsonl", rows)))
    schema = kept_schema(source, "meta, score,none,late")
    assert schema.names == ["meta", "score", "none", "late"]
    meta = pyarrow.struct([("a", pyarrow.int64()), ("b", pyarrow.list_(pyarrow.string()))])
    assert schema.types == [meta, pyarrow.float64(), pyarrow.null(), pyarrow.bool_()]
    with refused(ConfigError, "keep_columns", "mixed", "rows.jsonl"):
        kept_schema(source, "all")


# -- sources -----------------------------------------------------------------------------------------------------------

ROWS = [{"text": "a b"}, {"text": "c d"}, {"text": "e a"}]
EXPECTED = ["<bos> a b", "<bos> c d", "<bos> e a"]


def documents_of(dataset: Any, tokenizer: Any, split: str = "train") -> list[str]:
    source = open_source(str(dataset), split=split)
    found = [words(d.input_ids) for d in DocumentReader(source, tokenizer, max_tokens=100, id_limit=len(WORDS))]
    assert source.num_rows == len(found)
    return found


def test_files(tmp_path: Path, tokenizer: Any) -> None:
    for suffix in (".jsonl", ".json", ".parquet"):
        assert documents_of(write_rows(tmp_path / f"rows{suffix}", ROWS), tokenizer) == EXPECTED
    lines = write_rows(tmp_path / "lines.jsonl", ROWS).rename(tmp_path / "lines.json")
    assert documents_of(lines, tokenizer) == EXPECTED


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
    with refused(ConfigError, "'test'", "train, validation"):
        open_source(str(tmp_path), split="test")


def test_save_to_disk_folders(tmp_path: Path, tokenizer: Any) -> None:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "splits")

    assert documents_of(tmp_path / "plain", tokenizer) == EXPECTED
    assert documents_of(tmp_path / "splits", tokenizer) == EXPECTED
    assert documents_of(tmp_path / "splits", tokenizer, split="test") == EXPECTED[1:2]
    with refused(ConfigError, "'dev'", "train, test"):
        open_source(str(tmp_path / "splits"), split="dev")


def test_urls(tmp_path: Path) -> None:
    (tmp_path / "several").mkdir()
    memory = fsspec.filesystem("memory")
    for kind in ("jsonl", "saved", "several"):
        path = make_source(kind, tmp_path)
        memory.put(str(path), f"/bucket/{path.name}", recursive=True)
        source, local = open_source(f"memory://bucket/{path.name}"), open_source(str(path))
        assert (source.description, source.fingerprint) == (local.description, local.fingerprint)
        assert list(source.rows()) == list(local.rows())
    for url in ("memory://bucket/none", "nowhere://a"):
        with refused(ConfigError, url):
            open_source(url)


def test_what_can_not_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused(ConfigError, str(tmp_path / "missing.jsonl")):
        open_source(str(tmp_path / "missing.jsonl"))
    (tmp_path / "data.xlsx").write_text("a")
    suffixes = ".jsonl, .ndjson, .json, .csv, .tsv, .txt, .parquet"
    with refused(ConfigError, suffixes, "'.xlsx'"):
        open_source(str(tmp_path / "data.xlsx"))
    with refused(ConfigError, str(tmp_path), suffixes):
        open_source(str(tmp_path))
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *args, **kwargs: (_ for _ in ()).throw(FileNotFoundError("nothing there"))
    )
    with refused(ConfigError, "'some/name'", "nothing there"):
        open_source("some/name")


def test_damaged_files_are_named(tmp_path: Path, tokenizer: Any) -> None:
    for name, content, facts in (
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["a.jsonl, line 2"]),
        ("a.json", b'[{"text": "a"}', ["a.json"]),
        ("a.txt", b"\xff\xfe", ["a.txt"]),
        ("a.parquet", b"PAR1", ["a.parquet"]),
    ):
        (tmp_path / name).write_bytes(content)
        with refused(InputError, *facts):
            list(reader(tmp_path / name, tokenizer))

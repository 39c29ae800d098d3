"""Rows become the text that they mean, whatever file they are in and whatever form a chat template takes; what a
template would leave out is refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import pickle
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import transformers

from distillkit.errors import ConfigError, CorruptDataError, InputError
from distillkit.text.documents import DocumentReader
from distillkit.text.policy import TextOptions, capture_policy, training_policy
from distillkit.text.rows import RowReader
from distillkit.text.sources import open_source
from support.refusals import refused
from support.tokenizers import byte_tokenizer


def read(tokenizer: Any, *rows: Any, **options: Any) -> list[Any]:
    reader = RowReader(tokenizer, capture_policy(options.pop("loss_on", "auto"), **options), 1 << 20)
    return [
        document for documents in reader([(f"row {n}", row) for n, row in enumerate(rows)]) for document in documents
    ]


def texts(tokenizer: Any, *rows: Any, **options: Any) -> list[str]:
    """The text of each document."""
    return [tokenizer.decode(document.input_ids) for document in read(tokenizer, *rows, **options)]


def counted(tokenizer: Any, row: Any, **options: Any) -> str:
    """A row's text that counts, parts separated by |."""
    [document] = read(tokenizer, row, **options)
    mask = np.ones(len(document.input_ids), bool) if document.loss_mask is None else document.loss_mask
    parts = np.split(np.arange(len(mask)), np.flatnonzero(np.diff(mask)) + 1)
    return "|".join(tokenizer.decode(document.input_ids[part]) for part in parts if len(part) and mask[part[0]])


# -- tables ------------------------------------------------------------------------------------------------------------

TO_JSON = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% endfor %}"


def call(name: str = "f", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool_rows(*arguments: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows whose calls and tools have different keys at several depths."""
    return [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "", "tool_calls": [call(**given)]},
                {"role": "tool", "content": "r", "name": "f"},
            ],
            "tools": [
                {"type": "function", "function": {"name": "f", "parameters": {key: {"a": key} for key in given}}}
            ],
            "chat_template_kwargs": {"x": dict.fromkeys(given, 1)},
        }
        for given in arguments
    ]


# What rows of one schema can hold, and what has no common type: there datasets makes columns of JSON.
SAME_TYPES = tool_rows(
    {"city": "Oslo", "n": {"m": {"k": 1}, "l": [{"a": 1}, {"b": 2}]}}, {"n": {"o": ["x", None]}}, {"z": 2}
)
OTHER_TYPES = tool_rows({"a": "x", "n": {"m": None}}, {"a": 3, "l": [1, "y", None]}, {"b": {"c": None}})


def tables(rows: list[Any], folder: Path) -> dict[str, Path]:
    """The same rows as JSON lines, and as tables of several makers."""
    lines, made = folder / "rows.jsonl", {}
    lines.write_text("\n".join(map(json.dumps, rows)))
    loaded = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(folder / "cache"))
    loaded.to_parquet(folder / "datasets.parquet")
    loaded.save_to_disk(folder / "saved")
    made |= {"datasets.parquet": folder / "datasets.parquet", "saved": folder / "saved"}
    # Older releases of pyarrow sort the fields that they find.
    if rows is SAME_TYPES and pa.array([{"b": 1, "a": 1}]).type.field(0).name == "b":
        table = pa.Table.from_pylist(rows)
        pa.parquet.write_table(table, folder / "arrow.parquet")
        datasets.Dataset(table).save_to_disk(folder / "arrow")
        made |= {"arrow.parquet": folder / "arrow.parquet", "arrow": folder / "arrow"}
    return {"lines": lines, **made}


@pytest.mark.parametrize("rows", [SAME_TYPES, OTHER_TYPES], ids=["structures", "json"])
def test_tables_render_as_json_lines(rows: list[Any], tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(TO_JSON + "{{ x | tojson }}")
    found = {
        name: texts(tokenizer, *(row for _, row in open_source(str(path)).rows()))
        for name, path in tables(rows, tmp_path).items()
    }
    assert '"arguments"' in found["lines"][0]
    for name, rendered in found.items():
        assert rendered == found["lines"], name
    shuffled = open_source(str(tmp_path / "datasets.parquet")).rows(np.array([2, 0]))
    assert texts(tokenizer, *(row for _, row in shuffled)) == [found["lines"][2], found["lines"][0]]


def test_maps_and_json_of_older_files(tmp_path: Path) -> None:
    """A map is an object; PyArrow releases that do not know the type JSON keep its name beside the column."""
    mapped = pa.array([[("b", None), ("a", 1)]], pa.map_(pa.string(), pa.int64()))
    named = pa.field("m", pa.string(), metadata={"ARROW:extension:name": "arrow.json"})
    inner = pa.array([[{"a": None, "j": "[1]"}]], pa.list_(pa.struct([("a", pa.int64()), named.with_name("j")])))
    schema = pa.schema([("text", pa.string()), ("p", mapped.type), named, ("s", inner.type)])
    table = pa.table([pa.array(["t"]), mapped, pa.array(['{"x": [null]}']), inner], schema=schema)
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    source = open_source(str(tmp_path / "a.parquet"))
    [(_, row)] = source.rows()
    assert row == {"text": "t", "p": {"b": None, "a": 1}, "m": {"x": [None]}, "s": [{"j": [1]}]}
    # Kept, they are what they were.
    reader = DocumentReader(source, byte_tokenizer(), max_tokens=9, id_limit=999, keep_columns="p,m,s")
    [document] = reader
    for field in reader.kept:
        stored = pa.array([document.columns[field.name]], field.type)
        assert stored.to_pylist() == table.column(field.name).to_pylist(), field


def test_damaged_tables_are_refused_before_they_are_read(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["abc", "def"]}).save_to_disk(tmp_path / "saved")
    [file] = (tmp_path / "saved").glob("*.arrow")
    data = file.read_bytes()
    offsets = np.array([0, 3, 6], "<i4").tobytes()
    assert data.count(offsets) == 1
    # The second text would be at 2 GB.
    file.write_bytes(data.replace(offsets, np.array([0, 2**31 - 9, 6], "<i4").tobytes()))
    with refused(CorruptDataError, "saved"):
        list(open_source(str(tmp_path / "saved")).rows())
    # The description of the columns, which datasets parses.
    damaged = data.replace(b'"features": {', b'"features":1{')
    assert damaged != data
    for content, error in ((damaged, InputError), (data[:200], CorruptDataError)):
        file.write_bytes(content)
        with refused(error, "saved"):
            list(open_source(str(tmp_path / "saved")).rows())


# -- what templates take -----------------------------------------------------------------------------------------------

STRINGS = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"
PRINTS = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
    "{% endfor %}"
)
BOTH = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}[{{ p.text }}]{% endfor %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [(STRINGS, "<user>a b<assistant>c"), (PRINTS, "<user>a b<assistant>c"), (PARTS, "<user>a b<assistant>c"),
     (BOTH, "<user>a b<assistant>c")],
    ids=["concatenates", "prints", "loops", "both"],
)  # fmt: skip
def test_content_in_parts(template: str, expected: str) -> None:
    parts = [{"type": "text", "text": "a ", "image": None}, {"type": "text", "text": "b"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "c"}]
    assert texts(byte_tokenizer(template), {"messages": messages}) == [expected]


@pytest.mark.parametrize(
    ("template", "expected"),
    [(STRINGS, '<tool>{"a": "é"}'), (PRINTS, '<tool>{"a": "é"}'), ("<{{ messages[0].content.a }}>", "<é>")],
)
def test_what_a_tool_answers_may_be_an_object(template: str, expected: str) -> None:
    assert texts(byte_tokenizer(template), {"messages": [{"role": "tool", "content": {"a": "é"}}]}) == [expected]


def test_times_in_tables_are_refused(tmp_path: Path) -> None:
    """Readers of JSON lines take text that looks like a time for one, and forget how it was written."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [*QA, {"role": "tool", "content": "2024-05-06"}]}))
    assert texts(byte_tokenizer(TO_JSON), json.loads((tmp_path / "rows.jsonl").read_text()))[0].count('"2024-05-06"')
    kind = pa.list_(pa.struct([("role", pa.string()), ("content", pa.timestamp("s"))]))
    table = pa.table({"messages": pa.array([[{"role": "tool", "content": datetime(2024, 5, 6)}]], kind)})
    pa.parquet.write_table(table, tmp_path / "rows.parquet")
    documents = DocumentReader(
        open_source(str(tmp_path / "rows.parquet")), byte_tokenizer(TO_JSON), max_tokens=99, id_limit=999
    )
    with refused(InputError, "rows.parquet, row 0", "messages", "datetime"):
        list(documents)


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_what_is_not_text_is_refused_by_name(kind: str) -> None:
    content = [{"type": "text", "text": "a"}, {"type": kind, kind: "x"}]
    with refused(InputError, "row 0", "messages[0]", "content[1]", kind):
        texts(byte_tokenizer(PARTS), {"messages": [{"role": "user", "content": content}]})


def calling(content: str, written: str) -> str:
    """A template that writes calls."""
    calls = f"{{% for c in m.tool_calls or [] %}}({written}){{% endfor %}}"
    return f"{{% for m in messages %}}<{{{{ m.role }}}}>{content}{calls}{{% endfor %}}"


NAME, ARGUMENTS = "{{ c.function.name }}", "c.function.arguments"
TOOL_TEMPLATES = {
    "a mapping": (calling("{{ m.content }}", f"{NAME}{{{{ {ARGUMENTS} | tojson }}}}"), '(f{"x": 1})'),
    "text": (calling("{{ m.content }}", f"{{{{ c.function.name + {ARGUMENTS} }}}}"), '(f{"x": 1})'),
    "printed": (calling("{{ m.content }}", f"{NAME}{{{{ {ARGUMENTS} }}}}"), '(f{"x": 1})'),
    "content concatenated": (calling("{{ '' + m.content }}", NAME), "(f)"),
    "content printed": (calling("{{ m.content }}", NAME), "(f)"),
    "null": (
        "{% for m in messages %}<{{ m.role }}>{% if m['content'] is none %}({{ m.tool_calls[0].function.name }})"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}",
        "(f)",
    ),
    "absent": (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is defined %}{{ m.content }}"
        "{% else %}({{ m.tool_calls[0].function.name }}){% endif %}{% endfor %}",
        "(f)",
    ),
    "no null": (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}"
        "{% for c in m.tool_calls or [] %}({{ c.function.name }}){% endfor %}{% endif %}{% endfor %}",
        "(f)",
    ),
}


@pytest.mark.parametrize(("template", "expected"), TOOL_TEMPLATES.values(), ids=TOOL_TEMPLATES)
@pytest.mark.parametrize("content", [None, "", "absent"])
@pytest.mark.parametrize("arguments", [{"x": 1}, '{"x": 1}'], ids=["mapping", "text"])
def test_tool_calls_are_written_whatever_their_form(template: str, expected: str, content: Any, arguments: Any) -> None:
    answer = {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
    }
    if content == "absent":
        del answer["content"]
    row = {"messages": [{"role": "user", "content": "q"}, answer]}
    for policy in (capture_policy("auto"), training_policy(None, TextOptions())):
        tokenizer = byte_tokenizer(template)
        [[document]] = RowReader(tokenizer, policy, 1 << 20)([("row", row)])
        assert tokenizer.decode(document.input_ids) == f"<user>q<assistant>{expected}"


FIRST = "{{ m.tool_calls[0].function.name if m.tool_calls }}"


@pytest.mark.parametrize(
    ("template", "calls", "lost"),
    [
        (PRINTS, ["get"], "get"),
        # The tools name it, too; a call is still not written.
        ("{{ tools | tojson }}" + PRINTS, ["get"], "get"),
        (PRINTS.replace("{{ m.content", f"{FIRST}{{{{ m.content"), ["a", "b"], "b"),
        (TOOL_TEMPLATES["null"][0], ["first", "second"], "second"),
    ],
)  # fmt: skip
def test_calls_that_a_template_leaves_out_are_refused(template: str, calls: list[str], lost: str) -> None:
    answer = {"role": "assistant", "content": "", "tool_calls": [call(name) for name in calls]}
    row = {"messages": [{"role": "user", "content": "q"}, answer], "tools": [{"name": name} for name in calls]}
    with refused(InputError, "row 1", "message 1", repr(lost)):
        try:
            texts(byte_tokenizer(template), {"text": "fine"}, row)
        except InputError as error:  # it may come from another process
            raise pickle.loads(pickle.dumps(error)) from None


def test_whatever_a_template_raises_names_the_row(tmp_path: Path) -> None:
    failing = ["{{ 1 // (messages | length - 1) }}", "{{ messages[0].content + 1 }}", "{{ [].pop() }}", "{{ x.y.z }}"]
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"messages": [{"role": "user", "content": "q"}]}\n')
    for template in failing:
        reader = DocumentReader(
            open_source(str(tmp_path / "rows.jsonl")), byte_tokenizer(template), max_tokens=9, id_limit=999
        )
        with refused(InputError, "rows.jsonl, line 2"):
            list(reader)


# -- columns and keys --------------------------------------------------------------------------------------------------

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def said(*turns: tuple[str, str]) -> str:
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


SYSTEM, PAIRS = {"system": "s"}, {"history": [["q", "r"]]}
QA = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
BEFORE, AFTER = [("system", "s"), ("user", "q"), ("assistant", "r")], [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"instruction": "a", "output": "b", **SYSTEM, **PAIRS}, BEFORE + AFTER),
        ({"instruction": "a", "input": "", "output": "b", "system": "", "history": None}, AFTER),
        ({"inputs": "a", "targets": "b", **SYSTEM}, [BEFORE[0], *AFTER]),
        ({"messages": QA, **SYSTEM}, [BEFORE[0], *AFTER]),
        ({"messages": [{"role": "system", "content": "s"}, *QA], **SYSTEM}, [BEFORE[0], *AFTER]),
        ({"prompt": QA[:1], "completion": QA[1:], **SYSTEM}, [BEFORE[0], *AFTER]),
        ({"conversations": [{"from": "model", "value": "b"}]}, AFTER[1:]),
        ({"messages": [{"role": "function", "content": "r"}, {"role": "observation", "content": "t"}]},
         [("tool", "r"), ("tool", "t")]),
        ({"messages": [{"role": "ipython", "content": "r"}, {"from": "bot", "content": "b"}]},
         [("tool", "r"), ("assistant", "b")]),
        ({"messages": [{"role": "user", "value": "a"}, {"from": "gpt", "value": "b"}]}, AFTER),
        ({"messages": json.dumps(QA), "history": json.dumps([["q", "r"]])}, [*BEFORE[1:], *AFTER]),
        ({"messages": [{"role": "system", "content": [{"type": "text", "text": "s"}]}, *QA], "system": "s\n"},
         [BEFORE[0], *AFTER]),
        ({"instruction": "", "input": "a", "output": "b"}, AFTER),
    ],
)  # fmt: skip
def test_columns_and_roles(row: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert texts(byte_tokenizer(TURNS), row) == [said(*expected)]


def test_columns_that_have_no_place_are_refused() -> None:
    tokenizer = byte_tokenizer(TURNS)
    for row, facts in (
        ({"prompt": "a", "response": "b", "system": "s"}, ["system", "prompt + response"]),
        ({"messages": [{"role": "system", "content": "t"}, *QA], "system": "s"}, ["system"]),
        ({"instruction": "a", "output": "b", "history": ["q"]}, ["history[0]", "'q'"]),
        ({"messages": [{"role": "user", "text": "a"}, QA[1]]}, ["messages[0]", "'text'"]),
    ):
        with refused(InputError, "row 0", *facts):
            texts(tokenizer, row)


def test_calls_as_messages_of_their_own() -> None:
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": ""}]
    turns = [{"from": "function_call", "value": json.dumps(each)} for each in calls]
    expected = said(("assistant", '{"name": "f", "arguments": {"x": 1}}{"name": "g", "arguments": {}}'), ("tool", "r"))
    rest = {"from": "observation", "value": "r"}
    for messages in (
        [*turns, rest],
        [{"from": "function_call", "value": json.dumps(calls)}, rest],
        [{"role": "tool_call", "content": turn["value"]} for turn in turns]
        + [{"role": "tool_response", "content": "r"}],
    ):
        assert texts(byte_tokenizer(TURNS), {"conversations": messages}) == [expected]
    [only] = texts(byte_tokenizer(TURNS), {"messages": [{"role": "assistant", "function_call": calls[0]}]})
    assert only == said(("assistant", '{"name": "f", "arguments": {"x": 1}}'))
    with refused(InputError, "row 0", "conversations[0]", "function_call"):
        texts(byte_tokenizer(TURNS), {"conversations": [{"from": "function_call", "value": "f of x"}]})


@pytest.mark.parametrize(
    ("given", "expected"),
    [({"parameters": {"x": 1}}, {"x": 1}), *(({"arguments": nothing}, {}) for nothing in (None, "", " ", "null"))],
)
def test_arguments_of_a_call_are_a_mapping(given: dict[str, Any], expected: dict[str, Any]) -> None:
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.tool_calls[0].function | tojson }}{% endfor %}")
    message = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", **given}]}
    [text] = texts(tokenizer, {"messages": [message]})
    assert json.loads(text)["arguments"] == expected


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools_are_none(tools: Any) -> None:
    """Templates such as Llama 3.1's write more where there is a list, even an empty one."""
    tokenizer = byte_tokenizer("{{ tools is none }}{% for m in messages %}{{ m.content }}{% endfor %}")
    assert texts(tokenizer, {"messages": QA, "tools": tools}) == ["Trueab"]


def test_keys_of_a_call_reach_the_template() -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages %}{{ m.tool_calls[0].id }}{{ m.tool_calls[0].function.name }}{% endfor %}"
    )
    for given in ({"id": "c1", **call("f")}, {"id": "c1", "name": "f", "arguments": {}}):
        assert texts(tokenizer, {"messages": [{"role": "assistant", "content": "", "tool_calls": [given]}]}) == ["c1f"]


def test_options_of_the_template() -> None:
    tokenizer = byte_tokenizer("{{ mood }}{{ messages[0].content }}")
    row = {"messages": [{"role": "user", "content": "q"}]}
    for given in ({"mood": "x"}, '{"mood": "x"}'):
        assert texts(tokenizer, {**row, "chat_template_kwargs": given}) == ["xq"]
    for given, facts in (
        ({"tokenize": True, "a": 1}, ["tokenize"]),
        ({"messages": []}, ["messages"]),
        ({"add_generation_prompt": True}, ["add_generation_prompt"]),
        ("x", []),
        ([1], ["list"]),
    ):
        with refused(InputError, "row 0", "chat_template_kwargs", *facts):
            texts(tokenizer, {**row, "chat_template_kwargs": given})


def test_several_chat_templates() -> None:
    row = {"messages": [{"role": "user", "content": "q"}]}
    named = {"tool_use": "T{{ messages[0].content }}", "rag": "R"}
    assert texts(byte_tokenizer({**named, "default": "D{{ messages[0].content }}"}), row) == ["Dq"]
    assert texts(byte_tokenizer(named), {**row, "tools": [{"name": "f"}]}) == ["Tq"]
    with refused(ConfigError, "row 0", "tool_use, rag", "--tokenizer"):
        texts(byte_tokenizer(named), row)
    with refused(ConfigError, "training_args.assistant_only_loss", "tool_use, rag"):
        training_policy(byte_tokenizer(named), TextOptions(assistant_only=True))


def test_text_or_messages(caplog: pytest.LogCaptureFixture) -> None:
    """Captures and training read the same of a row that has both, say so once, and the user chooses."""
    tokenizer = byte_tokenizer(TURNS)
    row = {"text": "plain", "messages": QA, "code": "x = 1"}
    chat = said(*AFTER)
    assert texts(tokenizer, row, row) == [chat, chat]
    assert len(caplog.records) == 1
    assert "--read-columns" in caplog.text
    assert texts(tokenizer, row, columns=("text",)) == ["<s>plain"]
    assert texts(tokenizer, row, columns=("code",)) == ["<s>x = 1"]
    assert texts(tokenizer, {**row, "messages": []}) == ["<s>plain"]
    with refused(ConfigError, "read_columns", "text + code"):
        texts(tokenizer, row, columns=("text", "code"))

    def trained(**options: Any) -> str:
        [[document]] = RowReader(tokenizer, training_policy(tokenizer, TextOptions(**options)), 1 << 20)([("row", row)])
        return str(tokenizer.decode(document.input_ids))

    assert trained() == chat
    assert trained(text_first=True) == "<s>plain</s>"


def test_where_text_begins_and_ends() -> None:
    tokenizer = byte_tokenizer(TURNS)
    for given in ("a b", "<s>a b"):
        assert texts(tokenizer, {"text": given}) == ["<s>a b"], "one token begins it"
        assert texts(tokenizer, {"text": given}, append_eos=True) == ["<s>a b</s>"]
    assert texts(tokenizer, {"text": "<s><s>a"}) == ["<s><s>a"], "the text's own second one stays"
    assert texts(tokenizer, {"text": "a</s>"}, append_eos=True) == ["<s>a</s>"]
    assert counted(tokenizer, {"prompt": "<s>a", "response": "b"}) == "b</s>"
    assert texts(tokenizer, {"messages": QA}, append_eos=True) == [said(*AFTER)], "templates end chats"
    tokenizer.eos_token = None
    with refused(ConfigError, "--append-eos"):
        texts(tokenizer, {"text": "a"}, append_eos=True)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "ab\ud800c"},
        {"messages": [{"role": "user", "content": "\udc00"}]},
        {"prompt": "\ud83d", "response": "a"},
    ],
)
def test_halves_of_surrogate_pairs(row: dict[str, Any]) -> None:
    with refused(InputError, "row 1"):
        texts(byte_tokenizer(TURNS), {"text": "fine \U0001f600"}, row)


# -- which tokens count ------------------------------------------------------------------------------------------------


# transformers 5.23 leaves out the white space itself.
@pytest.mark.parametrize("trim_offsets", [False, True] if transformers.__version__ >= "5.24" else [False])
def test_white_space_of_an_answer_counts(trim_offsets: bool) -> None:
    """As transformers masks it, in captures and in training, with marks and without."""
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>\n{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [QA[0], {"role": "assistant", "content": "  if x:\n\n    return  y \n"}, *QA]
    tokenizer, plain = (byte_tokenizer(template, trim_offsets=trim_offsets) for template in (marked, TURNS))
    expected = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    for reads, policy in (
        (tokenizer, capture_policy("assistant")),
        (plain, capture_policy("assistant")),
        (tokenizer, training_policy(tokenizer, TextOptions(assistant_only=True))),
    ):
        [[document]] = RowReader(reads, policy, 1 << 20)([("row", {"messages": messages})])
        assert document.input_ids.tolist() == expected["input_ids"]
        assert document.loss_mask.astype(int).tolist() == expected["assistant_masks"]


# Templates in which a turn looks different once others follow, each with the answer's text in ‹›. Marks are made of it.
HARD = {
    # Earlier reasoning is replaced by an empty block, while the prompt opens one for the answer.
    "empty thoughts": """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% if m.thinking and loop.last %}<think>
‹{{ m.thinking }}</think>{{ m.content }}<|im_end|>
›{% else %}‹<think></think>{{ m.content }}<|im_end|>
›{% endif %}{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}""",
    # Blocks have headers of their own, the last one another end, and reasoning before the last answer is dropped.
    "channels": """{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant‹{%
if m.thinking and loop.last %}<|message|>{{ m.thinking }}<|end|><|start|>assistant{% endif %}<|message|>{{ m.content
}}{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}›{% else %}<|start|>{{ m.role }}<|message|>{{ m.content
}}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}""",
    # No token ends a turn; what was thought before the last question is dropped.
    "no end": """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user'
%}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{% if m.role == 'assistant'
%}<|a|>‹{{ '\n' }}{% if m.thinking and loop.index0 > ns.last %}<think>{{ m.thinking }}</think>{% else
%}<think></think>{% endif %}
{{ m.content }}{% for c in m.tool_calls or [] %}
<call>{{ c.function.name }}</call>{% endfor %}›{% else %}<|{{ m.role }}|>
{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}""",
    # Thoughts are kept from the last question on, over calls and answers of tools.
    "thoughts over tools": """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user'
%}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}‹{% if loop.index0 > ns.last %}<think>{{ m.thinking or '' }}</think>{% endif
%}{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>
›{% else %}{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
    # The loop is over numbers.
    "numbers": """{% for n in range(messages | length) %}<|im_start|>{{ messages[n].role }}
{% if messages[n].role == 'assistant' %}‹{% if messages[n].thinking and loop.last %}<think>{{ messages[n].thinking
}}</think>{% endif %}{{ messages[n].content }}<|im_end|>
›{% else %}{{ messages[n].content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}""",
}
THOUGHT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "ok", "thinking": "first"},
    {"role": "user", "content": "ok"},
    {"role": "assistant", "content": "ok", "thinking": "second"},
]
CALLING = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "", "thinking": "t", "tool_calls": [call("f"), call("g")]},
    {"role": "tool", "content": "5"},
    {"role": "tool", "content": "f"},
    {"role": "assistant", "content": "six", "thinking": "u"},
    *THOUGHT,
    {"role": "assistant", "content": "", "tool_calls": [call("f")]},
    {"role": "tool", "content": "7"},
    {"role": "assistant", "content": "end"},
]


@pytest.mark.parametrize("name", HARD)
def test_turns_that_look_different_once_others_follow(name: str) -> None:
    """What Transformers masks where a twin of the template marks the same turns."""
    plain = byte_tokenizer(HARD[name].replace("‹", "").replace("›", ""))
    twin = byte_tokenizer(HARD[name].replace("‹", "{% generation %}").replace("›", "{% endgeneration %}"))
    conversations = [THOUGHT, THOUGHT[:3], [{"role": "system", "content": "s"}, *THOUGHT]]
    for messages in conversations + ([CALLING] if "<call>" in HARD[name] else []):
        expected = twin.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        [document] = read(plain, {"messages": messages}, loss_on="assistant")
        assert document.input_ids.tolist() == expected["input_ids"]
        assert document.loss_mask.astype(int).tolist() == expected["assistant_masks"]


def test_turns_that_are_not_written_directly() -> None:
    """Transformers' own mask does not know where the output of a macro comes to stand."""
    loop = "{% for m in messages %}" + TURNS.removeprefix("{% for m in messages %}").partition("{% if add")[0]
    prompt = TURNS.removeprefix(loop)
    macro = "{% macro chat(messages) %}" + loop + "{% endmacro %}{{ chat(messages) }}" + prompt
    variable = "{% set text %}" + loop + "{% endset %}{{ text }}" + prompt
    for template in (TURNS, macro, variable):
        row = {"messages": [*QA, *QA[:1], {"role": "assistant", "content": "c"}]}
        assert counted(byte_tokenizer(template), row, loss_on="assistant") == "b<|im_end|>\n|c<|im_end|>\n"


@pytest.mark.parametrize(
    "first",
    ["<s>", "<|im_start|>system\nBe kind.<|im_end|>\n"],
)
@pytest.mark.parametrize("prompt", ["", "<think>\n"])
def test_what_a_template_writes_before_a_first_answer_does_not_count(first: str, prompt: str) -> None:
    """Many write the beginning of the text, or a default system prompt, while they are at the first message."""
    template = "{% for m in messages %}{% if loop.first %}" + first + "{% endif %}" + TURNS.partition("%}")[2]
    tokenizer = byte_tokenizer(template.replace("assistant\n{% endif %}", f"assistant\n{prompt}{{% endif %}}"))
    for messages in (QA[1:], [QA[1], *QA]):
        expected = "|".join("b<|im_end|>\n" for message in messages if message["role"] == "assistant")
        assert counted(tokenizer, {"messages": messages}, loss_on="assistant") == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}{{ messages[1].content }}",  # no loop
        "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content %}{% endfor %}{{ ns.t }}",
        "{% for m in messages %}{{ m.content }}{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ loop.length }}"
        "{{ loop.nextitem.content if loop.nextitem }}{% elif loop.first %}{{ m.content }}{% endif %}{% endfor %}",
    ],
)
def test_turns_that_stay_unclear_are_refused(template: str) -> None:
    with refused(InputError, "row 0", "--tokenizer", "--loss-on all"):
        read(byte_tokenizer(template), {"messages": THOUGHT}, loss_on="assistant")


def test_weights_of_messages() -> None:
    """A turn that is switched off does not count; templates that mark turns and others agree."""
    marked = TURNS.replace("{{ m.content }}", "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}", 1)
    ends = "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor"
    marked = marked.replace("<|im_end|>\n{% endfor", f"<|im_end|>\n{ends}")
    turns = [*QA, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    assert texts(byte_tokenizer(marked), {"messages": turns}) == texts(byte_tokenizer(TURNS), {"messages": turns})
    for template in (TURNS, marked):
        tokenizer = byte_tokenizer(template)
        for key, values in (
            ("weight", (0, 1)),
            ("train", (False, True)),
            ("weight", (0.0, 1.0)),
            ("train", (False, None)),
            ("loss", (False, True)),
            ("training", (False, True)),
        ):
            off, on = ({key: value} for value in values)
            row = {"messages": [turns[0], {**turns[1], **off}, turns[2], {**turns[3], **on}]}
            assert counted(tokenizer, row) == "d<|im_end|>\n"
            assert counted(tokenizer, row, loss_on="assistant") == "d<|im_end|>\n"
            assert counted(tokenizer, row, loss_on="all") == tokenizer.decode(read(tokenizer, row)[0].input_ids)
            [[trained]] = RowReader(tokenizer, training_policy(tokenizer, TextOptions()), 1 << 20)([("row", row)])
            assert trained.loss_mask.tolist() == read(tokenizer, row)[0].loss_mask.tolist()
    with refused(InputError, "row 0", "message 1", "0.5"):
        read(byte_tokenizer(TURNS), {"messages": [turns[0], {**turns[1], "weight": 0.5}]})


@pytest.mark.parametrize(
    ("columns", "facts"),
    [
        ({"loss_mask": [0, 0.5, 1]}, ["loss_mask", "0.5"]),
        ({"loss_mask": [0, float("nan"), 1]}, ["loss_mask", "nan"]),
        ({"loss_mask": [0, 2, 1]}, ["loss_mask", "2"]),
        ({"attention_mask": [1, float("nan"), 1]}, ["attention_mask", "nan"]),
        ({"attention_mask": [-1, 1, 1]}, ["attention_mask"]),
    ],
)
def test_masks_that_are_none(columns: dict[str, Any], facts: list[str]) -> None:
    with refused(InputError, "row 0", *facts):
        read(None, {"input_ids": [1, 2, 3], **columns})


# -- documents and files -----------------------------------------------------------------------------------------------


class Rows:
    """Rows in memory as a source."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows, self.num_rows = rows, len(rows)

    def schema(self, columns: Any = None) -> pa.Schema:
        return pa.schema([])

    def rows(self, order: Any = None) -> Any:
        return ((str(index), row) for index, row in enumerate(self._rows))


def test_pieces_that_are_alike_are_no_duplicates() -> None:
    log = {"input_ids": [1, 2, 3, 4] * 25}
    other = {"input_ids": [1, 2, 3, 4] * 10 + [5]}
    source = Rows([log, other, log, {**other, "loss_mask": [1] * 41}, {**other, "loss_mask": [0] + [1] * 40}])
    documents = DocumentReader(source, None, max_tokens=16, id_limit=9, overlap=4)
    counted = sum(15 if d.loss_mask is None else int(d.loss_mask[1:].sum()) for d in documents if True)
    lengths = [len(d.input_ids) - 1 if d.loss_mask is None else int(d.loss_mask[1:].sum()) for d in documents]
    assert counted
    assert sum(lengths) == 99 + 40, "every token but the first of each has one distribution"
    assert documents.counts["duplicate_documents"] == 3


def test_rows_that_cannot_be_rendered_may_be_left_out() -> None:
    bad = {"messages": [{"role": "robot", "content": "a"}]}
    rows = Rows([{"text": "a"}, bad, {"text": "b"}, bad, {"text": "c"}])
    documents = DocumentReader(rows, byte_tokenizer(TURNS), max_tokens=9, id_limit=999, skip_bad=2)
    for _ in range(2):
        assert [d.source for d in documents] == ["0", "2", "4"]
        assert (documents.counts["rows_that_cannot_be_used"], documents.rows) == (2, 5)
    documents.skip_bad = 1
    with refused(InputError, "3", "'robot'", "--skip-bad-documents"):
        list(documents)


BAD_LINES = [
    *(b"{x", b'{"text": "\xe9"}', b"[1]", b"null", b'{"n": ' + b"9" * 5000 + b"}", b'{"text": "a\\ud800"}'),
    b'{"text": "x", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet", "saved"])
def test_rows_that_cannot_be_read_may_be_left_out(tmp_path: Path, name: str, shuffle: bool) -> None:
    file, unit = tmp_path / name, "line" if "jsonl" in name else "row"
    if unit == "line":
        lines = b"\n".join([b'{"text": "a"}', *BAD_LINES, b'{"text": "b"}'])
        file.write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
    else:
        messages = [json.dumps([{"role": "user", "content": text}]) for text in "ab"]
        texts = pa.array([messages[0], *["{x"] * len(BAD_LINES), messages[1]])
        table = pa.table({"messages": pa.ExtensionArray.from_storage(pa.json_(), texts)})
        if name == "saved":
            datasets.Dataset(table).save_to_disk(file)
        else:
            pa.parquet.write_table(table, file)
    options = {"max_tokens": 99, "id_limit": 999, "shuffle": shuffle, "append_eos": False}
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}</s>")
    documents = DocumentReader(open_source(str(file)), tokenizer, skip_bad=len(BAD_LINES), **options)
    assert sorted(tokenizer.decode(d.input_ids, skip_special_tokens=True) for d in documents) == ["a", "b"]
    assert documents.counts["rows_that_cannot_be_used"] == len(BAD_LINES)
    with refused(InputError, name, unit):
        list(DocumentReader(open_source(str(file)), tokenizer, **options))


def test_compressed_and_other_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    line = b'{"text": "%d"}\n'
    for number, (name, pack) in enumerate(
        [("a.jsonl.gz", gzip.compress), ("b.ndjson", bytes), ("c.JSONL", bytes), ("d.json.bz2", bz2.compress)]
    ):
        (tmp_path / name).write_bytes(pack(line % number))
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf4"))
    (tmp_path / "f.json").write_bytes(b'\xef\xbb\xbf[{"text": "5"}]')
    (tmp_path / "g.txt").write_bytes(b"\xef\xbb\xbf6")
    (tmp_path / "README.md").write_text("x")
    (tmp_path / "more.xlsx").write_text("text\nx")
    source = open_source(str(tmp_path))
    assert [row["text"] for _, row in source.rows()] == list("0123456")
    assert [row["text"] for _, row in source.rows(np.array([3, 0, 6]))] == list("306")
    assert source.num_rows == 7
    assert "more.xlsx" in caplog.text
    assert "README" not in caplog.text
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 99)[:-9])
    with refused(InputError, "a.jsonl.gz"):
        list(source.rows())


def test_columns_in_the_names_of_folders(tmp_path: Path) -> None:
    for folder in ("lang=en/year=2024", "lang=n%20o/year=2023", "lang=__HIVE_DEFAULT_PARTITION__/year=1"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "part-0.jsonl").write_text('{"text": "a"}\n')
    source = open_source(str(tmp_path))
    assert [(row["lang"], row["year"]) for _, row in source.rows()] == [(None, 1), ("en", 2024), ("n o", 2023)]
    assert source.schema(["lang", "year"]).types == [pa.string(), pa.int64()]
    found = DocumentReader(
        source, byte_tokenizer(), max_tokens=9, id_limit=999, where=[("lang", "en")], keep_columns="year"
    )
    assert [d.columns for d in found] == [{"year": 2024}]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("latest_dev_notes.txt", "train"),
        ("unit_test_docs.jsonl", "train"),
        ("dev.jsonl", "validation"),
        ("data-validation-00000-of-00002-0a1b2c3d4e5f6a7b.jsonl", "validation"),
        ("squad_val_v2.jsonl.gz", "validation"),
        ("test/part-0.jsonl", "test"),
        ("split=eval/0.jsonl", "test"),
    ],
)
def test_splits_by_name(name: str, split: str, tmp_path: Path) -> None:
    for file in ("train.jsonl", "validation_0.jsonl", "test_0.jsonl", name):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        content = b'{"text": "a"}\n'
        (tmp_path / file).write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
    for each in ("train", "validation", "test"):
        places = [place for place, _ in open_source(str(tmp_path), split=each).rows()]
        assert any(place.startswith(name) for place in places) == (each == split)


def test_urls_that_cannot_be_reached() -> None:
    for url in ("http://127.0.0.1:9/rows.jsonl?token=secret", "http://127.0.0.1:9/folder"):
        with pytest.raises(ConfigError) as caught:
            open_source(url)
        message = str(caught.value)
        assert "127.0.0.1:9" in message
        assert "contains no" not in message
        assert "secret" not in message


# -- comma- and tab-separated values, and compressed files -------------------------------------------------------------

TABLE_ROWS = [
    {"prompt": 'He said "no, never",\nand left.', "response": "x\ty", "n": "01"},
    {"prompt": "", "response": "\u20ac \U0001f642", "n": ""},
    {"prompt": "a\r\nb", "response": "'", "n": "None"},
]


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
        return bytes(sink.getvalue())
    packers = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    return packers[suffix](content)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
def test_tables_of_text_are_read_as_text(tmp_path: Path, name: str, suffix: str) -> None:
    sink = io.StringIO()
    writer = csv.DictWriter(sink, list(TABLE_ROWS[0]), delimiter="," if name.endswith("csv") else "\t")
    writer.writeheader()
    writer.writerows(TABLE_ROWS)
    file = tmp_path / f"{name}{suffix}"
    file.write_bytes(compressed(b"\xef\xbb\xbf" + sink.getvalue().encode() + b"\r\n", suffix))
    source = open_source(str(file))
    assert [row for _, row in source.rows()] == TABLE_ROWS
    assert [row for _, row in source.rows(np.array([2, 0]))] == [TABLE_ROWS[2], TABLE_ROWS[0]]
    assert source.num_rows == 3
    assert source.schema(["n"]).types == [pa.string()]
    with refused(ConfigError, "language", "prompt"):
        source.schema(["language"])


def test_a_table_with_a_long_cell_and_a_row_of_another_length(tmp_path: Path) -> None:
    file, long = tmp_path / "rows.csv", "x" * 300_000
    file.write_text(f'text,id\n"{long}",1\none\n"two\nlines",2\n')
    tokenizer = byte_tokenizer()
    documents = DocumentReader(
        open_source(str(file)), tokenizer, max_tokens=1 << 20, id_limit=999, skip_bad=1, append_eos=False
    )
    assert [tokenizer.decode(each.input_ids, skip_special_tokens=True) for each in documents] == [long, "two\nlines"]
    with refused(InputError, "rows.csv", "line 3", "1", "2", "text"):
        list(DocumentReader(open_source(str(file)), tokenizer, max_tokens=1 << 20, id_limit=999))


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"", ["nothing"]),
        (b"text,,id\n1,2,3", ["''"]),
        (b"text,id,text\n1,2,3", ["'text'"]),
        (b'text\nfine\n"not closed\n', ["rows.csv", "line 3"]),
        (b'text\n"a"b\n', ["line 2"]),
        (b"text\n\xff\n", ["UTF-8"]),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: bytes, facts: list[str]) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with refused(InputError, "rows.csv", *facts):
        list(open_source(str(tmp_path / "rows.csv")).rows())


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt", "rows.csv"])
def test_compressed_files_are_read_within_limits(
    tmp_path: Path, name: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"text\nx" if name == "rows.csv" else b'{"text": "x"}\n'
    file = tmp_path / f"{name}{suffix}"
    file.write_bytes(compressed(content, suffix))
    assert len(list(open_source(str(file)).rows())) == 1
    file.write_bytes(compressed(content * 5000, suffix)[:-9])
    with refused(InputError, file.name):
        list(open_source(str(file)).rows())
    file.write_bytes(b"not compressed")
    with refused(InputError, file.name):
        list(open_source(str(file)).rows())
    # The limits of the package are too large for a quick test.
    monkeypatch.setattr("distillkit.text.file_formats._ALLOWED_BYTES", 1 << 16)
    bomb = compressed(content + b"x" * (1 << 22), suffix)
    file.write_bytes(bomb)
    with refused(InputError, file.name, f"{len(bomb):,}"):
        list(open_source(str(file)).rows())

"""Text, chat and token ids for a live teacher: the tokens and masks of TRL's trainer, kept and found again."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import ByteLevel as ByteLevelOffsets
from tokenizers.processors import Sequence, TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from trl import SFTTrainer

from distillkit.errors import ConfigError, CorruptDataError, InputError, MismatchError
from distillkit.shards import Dataset
from distillkit.text.policy import TextOptions, capture_policy, training_policy
from distillkit.text.rows import RowReader
from distillkit.text.sources import open_local
from distillkit.text.tokenizer import fingerprint, vocab_size
from distillkit.training.config.arguments import training_arguments
from distillkit.training.config.file import parse_config
from distillkit.training.config.schema import DatasetEntry, RunConfig
from distillkit.training.data.documents import cache_folder, open_documents, training_dataset
from distillkit.training.data.prepared import PreparedDataset, prepare
from distillkit.training.data.stored import Sample
from distillkit.training.run import train
from distillkit.training.special_tokens import configure_model, configure_tokenizer
from support.refusals import check_names, refused
from support.training import random_documents, run_config, tiny_model, tiny_tokenizer, write_dataset

pytestmark = pytest.mark.usefixtures("without_plots")

WORDS = ["<unk>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>", "<end>", *"abcdefgh"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> "
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }} <end>{% endgeneration %}"
    "{% else %}{{ m.content }} <end>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE
    )


CHAT = [
    {"role": "user", "content": "a b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "e f"},
]
LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "text": [{"text": "a b c"}, {"text": "d e <eos>"}],
    "messages": [{"messages": CHAT}, {"messages": CHAT[:2]}],
    "conversations": [{"conversations": [{"from": m["role"], "value": m["content"]} for m in CHAT]}],
    "completion": [{"prompt": "a b", "completion": " c d"}, {"prompt": "a", "completion": " e <eos>"}],
    "chat completion": [{"prompt": CHAT[:1], "completion": CHAT[1:2]}, {"prompt": CHAT[:3], "completion": CHAT[3:]}],
    "input_ids": [{"input_ids": [7, 8, 9]}, {"input_ids": [10, 11]}],
    "labels": [{"input_ids": [7, 8, 9], "labels": [-100, 8, -100]}],
    "completion_mask": [{"input_ids": [7, 8, 9], "completion_mask": [0, 0, 1]}],
}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row_reader(tokenizer: Any, options: TextOptions) -> RowReader:
    return RowReader(tokenizer, training_policy(tokenizer, options), vocab_size(tokenizer))


def prepared(path: Path, tokenizer: Any, **settings: Any) -> PreparedDataset:
    options = settings.pop("options", TextOptions())
    sample = Sample(settings.pop("samples", None), settings.pop("seed", None))
    cache = path.parent / "cache"
    return prepare(open_local(str(path)), row_reader(tokenizer, options), cache, key="dataset", sample=sample)


def from_trl(rows: list[dict[str, Any]], tokenizer: Any, options: TextOptions) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of SFTTrainer's own preparation."""
    completion = options.completion_only
    trainer = SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=None,
        completion_only_loss="prompt" in rows[0] if completion is None else completion,
    )
    arguments = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field=options.text_column,
        assistant_only_loss=options.assistant_only,
        max_length=None,
        shuffle_dataset=False,
    )
    if "completion_mask" in rows[0] and completion is None:
        trainer.completion_only_loss = True
    data = datasets.Dataset.from_list(rows)
    made = SFTTrainer._prepare_dataset(trainer, data, tokenizer, arguments, False, None, "train")
    return [(row["input_ids"], row["labels"]) for row in made]


def test_tokens_and_masks_are_those_of_trl(tmp_path: Path, tokenizer: Any) -> None:
    for number, (layout, options) in enumerate(
        [
            *[(layout, TextOptions()) for layout in LAYOUTS],
            *[(layout, TextOptions(completion_only=False)) for layout in ("completion", "chat completion")],
            *[(layout, TextOptions(assistant_only=True)) for layout in ("messages", "conversations")],
            ("chat completion", TextOptions(assistant_only=True)),
            ("chat completion", TextOptions(assistant_only=True, completion_only=False)),
        ]
    ):
        path = write_rows(tmp_path / f"{number}.jsonl", LAYOUTS[layout])
        dataset = prepared(path, tokenizer, options=options)
        expected = from_trl(LAYOUTS[layout], tokenizer, options)
        assert len(dataset) == len(expected)
        for document, (ids, labels) in zip((dataset[i] for i in range(len(dataset))), expected, strict=True):
            assert document.input_ids.tolist() == ids, (layout, options)
            mask = np.ones(len(ids), bool) if document.loss_mask is None else document.loss_mask
            assert np.where(mask, ids, -100).tolist() == labels, (layout, options)
            assert (document.teacher, document.num_rows) == (b"", len(ids) - 1)
        assert dataset.lengths().tolist() == [len(ids) for ids, _ in expected]


def trimming_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and pairs of them; spaces are in no token's offsets, as with RoBERTa's, and text ends with a token."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    around = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    backend.post_processor = Sequence([ByteLevelOffsets(trim_offsets=True), around])
    special = ["<s>", "</s>", "<user>", "<assistant>", "<end>"]
    trainer = BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=ByteLevel.alphabet())
    backend.train_from_iterator(["        x    = abcd" * 9], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=TEMPLATE.replace("}} <end>", "}}<end>"),
    )


def test_tokens_without_characters_and_joined_tokens_are_those_of_trl(tmp_path: Path) -> None:
    tokenizer = trimming_tokenizer()
    indented = [*CHAT[:3], {"role": "assistant", "content": "if x:\n        x\n\n    ☃"}]
    cases = [
        ([{"messages": indented}], TextOptions(assistant_only=True)),
        ([{"prompt": indented[:3], "completion": indented[3:]}], TextOptions(assistant_only=True)),
        # Prompt and completion share a token, or are separated by one that the prompt alone does not end with.
        ([{"prompt": "x    = ab", "completion": "cd x"}, {"prompt": "x    ", "completion": "    = a"}], TextOptions()),
    ]
    for number, (rows, options) in enumerate(cases):
        dataset = prepared(write_rows(tmp_path / f"{number}.jsonl", rows), tokenizer, options=options)
        for document, (ids, labels) in zip(
            (dataset[i] for i in range(len(dataset))), from_trl(rows, tokenizer, options), strict=True
        ):
            assert document.input_ids.tolist() == ids
            assert document.loss_mask is not None
            assert np.where(document.loss_mask, ids, -100).tolist() == labels
    # A capture counts the same tokens.
    [captured], [trained] = (
        RowReader(tokenizer, policy, 1000)([("row", {"messages": indented})])[0]
        for policy in (capture_policy("assistant"), training_policy(tokenizer, TextOptions(assistant_only=True)))
    )
    assert captured.input_ids.tolist() == trained.input_ids.tolist()
    assert captured.loss_mask.tolist() == trained.loss_mask.tolist()


def test_another_column_may_hold_the_text(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"body": "a b", "messages": CHAT}])
    document = prepared(path, tokenizer, options=TextOptions(text_column="body"))[0]
    assert [WORDS[i] for i in document.input_ids] == ["<bos>", "a", "b", "<eos>"]


def test_packed_rows_of_ids_stay_packed_and_lose_their_padding(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        {"input_ids": [7, 8, 9, 10, 0], "attention_mask": [1, 1, 2, 2, 0], "labels": [-100, 8, 9, 10, -100]},
        {"input_ids": [7, 8, 9], "attention_mask": [1, 1, 1]},
    ]
    first, second = (prepared(write_rows(tmp_path / "rows.jsonl", rows), tokenizer)[i] for i in range(2))
    assert (first.input_ids.tolist(), first.segments().tolist()) == ([7, 8, 9, 10], [2, 2])
    assert first.loss_mask is not None
    assert first.loss_mask.tolist() == [False, True, True, True]
    assert (second.segments().tolist(), second.segment_lengths) == ([3], None)


def test_what_gives_no_document_is_left_out_and_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"text": " "},
        {"text": None},
        {"input_ids": [7]},
        {"input_ids": [7, 8], "labels": [7, -100]},
        {"input_ids": [7, 8]},
    ]
    dataset = prepared(write_rows(tmp_path / "rows.jsonl", rows), tokenizer)
    assert len(dataset) == 1
    counts = {name: dataset.description[name] for name in ("rows", "empty", "short", "masked", "tokens")}
    assert counts == {"rows": 5, "empty": 2, "short": 1, "masked": 1, "tokens": 2}
    with refused(ConfigError, "dataset", "1", "0"):
        prepared(write_rows(tmp_path / "none.jsonl", rows[2:3]), tokenizer)


def test_several_processes_make_the_same(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": " ".join(np.random.default_rng(i).choice(list("abcdefgh"), 5))} for i in range(300)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    alone = prepared(path, tokenizer, samples=200, seed=1)
    tokens = [alone[i].input_ids.tolist() for i in range(len(alone))]
    assert len(tokens) == 200
    several = prepare(
        open_local(str(path)), row_reader(tokenizer, TextOptions()), tmp_path / "other", key="dataset",
        sample=Sample(200, 1), processes=2,
    )  # fmt: skip
    assert [several[i].input_ids.tolist() for i in range(len(several))] == tokens
    assert pickle.loads(pickle.dumps(several))[7].input_ids.tolist() == tokens[7]
    with refused(InputError, "rows.jsonl", "line 301", "text"):
        prepare(
            open_local(str(write_rows(path, [*rows, {"text": 3}]))), row_reader(tokenizer, TextOptions()),
            tmp_path / "other", key="dataset", processes=2,
        )  # fmt: skip
    assert not list((tmp_path / "other").glob(".incomplete-*"))


def test_prepared_data_are_used_again_unless_something_else_decides(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": CHAT}] * 3)
    first = prepared(path, tokenizer)
    # What an interrupted run left is removed, and a finished one is not touched.
    (tmp_path / "cache" / f".incomplete-{first.folder.name}").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(RowReader, "__call__", lambda *_: pytest.fail("it was prepared before"))
        assert prepared(path, tokenizer).folder == first.folder

    folders = {first.folder}
    folders.add(prepared(path, tokenizer, options=TextOptions(assistant_only=True)).folder)
    folders.add(prepared(path, tokenizer, samples=2, seed=1).folder)
    folders.add(prepared(path, tokenizer, samples=2, seed=2).folder)
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>", eos_token="<end>")
    other.chat_template = TEMPLATE
    folders.add(prepared(path, other).folder)
    other.chat_template = TEMPLATE + "h"
    folders.add(prepared(path, other).folder)
    write_rows(path, [{"messages": CHAT}] * 4)
    last = prepared(path, tokenizer)
    folders.add(last.folder)
    assert len(folders) == 7
    assert (len(first), len(last)) == (3, 4)


def test_a_damaged_cache_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a b"}])
    file = prepared(path, tokenizer).folder / "input_ids"
    file.write_bytes(file.read_bytes()[:-4])
    with refused(CorruptDataError, str(file.parent)):
        prepared(path, tokenizer)


MISFITS: list[tuple[type[Exception], list[dict[str, Any]], TextOptions, list[str]]] = [
    (InputError, [{"body": "a"}], TextOptions(), ["line 1", "body", "text", "input_ids"]),
    (InputError, [{"prompt": "a"}], TextOptions(), ["line 1", "prompt", "completion"]),
    (ConfigError, [{"text": "a"}], TextOptions(tokenised=True), ["skip_prepare_dataset", "text"]),
    (ConfigError, [{"text": "a"}], TextOptions(assistant_only=True), ["assistant_only_loss"]),
    (ConfigError, LAYOUTS["completion"], TextOptions(assistant_only=True), ["assistant_only_loss"]),
    (ConfigError, [{"text": "a"}], TextOptions(completion_only=True), ["completion_only_loss", "prompt"]),
    (ConfigError, LAYOUTS["input_ids"], TextOptions(completion_only=True), ["labels", "completion_mask"]),
    (InputError, [{"input_ids": [7, 15]}], TextOptions(), ["input_ids", "15", "0…14"]),
    (InputError, [{"input_ids": [7, 8], "labels": [7, 9]}], TextOptions(), ["labels", "input_ids"]),
    (InputError, [{"input_ids": [7, 8], "labels": [7]}], TextOptions(), ["labels", "(1,)"]),
    (InputError, [{"messages": [{"role": "robot", "content": "a"}]}], TextOptions(), ["'robot'"]),
]


def test_rows_and_options_that_do_not_fit(tmp_path: Path, tokenizer: Any) -> None:
    for error, rows, options, facts in MISFITS:
        with pytest.raises(error) as caught:
            prepared(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, options=options)
        check_names(str(caught.value), *facts)
        assert "\n" not in str(caught.value)


def test_tokenizers_that_lack_something(tmp_path: Path, tokenizer: Any) -> None:
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, unk_token="<unk>")
    with refused(ConfigError, "training_args.eos_token"):
        prepared(write_rows(tmp_path / "text.jsonl", LAYOUTS["text"]), bare)
    chat = write_rows(tmp_path / "chat.jsonl", LAYOUTS["messages"])
    with refused(ConfigError, "chat_template_path"):
        prepared(chat, bare)
    marked = TextOptions(assistant_only=True)
    with refused(ConfigError, "assistant_only_loss"):
        prepared(chat, bare, options=marked)
    bare.chat_template = "{{ messages[0].content }}"
    with refused(ConfigError, "assistant_only_loss"):
        prepared(chat, bare, options=marked)
    bare.chat_template = "{{ raise_exception('no such turn') }}"
    with refused(InputError, "chat.jsonl", "line 1", "no such turn"):
        prepared(chat, bare)


# -- from a configuration ----------------------------------------------------------------------------------------------


def trained(config: RunConfig) -> DatasetEntry:
    """The dataset that a run is trained on."""
    [entry] = config.dataset.entries("train")
    return entry


def live_config(tmp_path: Path, train: Path | str, **settings: Any) -> RunConfig:
    """A configuration with a live teacher."""
    dataset = {"train_dataset": {"disk_path": str(train)}, "prepared_dataset_path": str(tmp_path / "cache")}
    return parse_config(
        {
            "model": "student",
            "output_path": str(tmp_path / "out"),
            "sequence_length": 8,
            "teacher": {"kind": "hf", "path": "teacher"},
            **settings,
            "dataset": {**dataset, **settings.get("dataset", {})},
        }
    )


class NoTeacher:
    def take(self, document: Any, positions: Any) -> dict[str, Any]:
        return {}

    def empty_targets(self) -> dict[str, Any]:
        return {}

    def targets(self, batch: Any) -> Any:
        raise NotImplementedError


def test_a_configuration_finds_prepares_and_packs_text(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"text": " ".join("abcdefgh"[: 1 + i % 4])} for i in range(20)]
    table = datasets.Dataset.from_list(rows)
    files, saved = tmp_path / "files", tmp_path / "saved"
    files.mkdir()
    table.to_parquet(files / "train-00000.parquet")
    table.select([0]).to_parquet(files / "test-00000.parquet")
    datasets.DatasetDict({"train": table}).save_to_disk(saved)
    for path in (write_rows(tmp_path / "data.jsonl", rows), files, saved):
        config = live_config(
            tmp_path, path, dataset={"num_samples": 15}, training_args={"packing": True, "dataset_num_proc": 1}
        )
        arguments = training_arguments(config)
        documents = open_documents(config, trained(config), tokenizer, arguments)
        assert isinstance(documents, PreparedDataset)
        assert len(documents) == 15
        data = training_dataset(config, trained(config), documents, NoTeacher(), arguments)
        assert len(data) < 15
        found = [data[row] for row in range(len(data))]
        lengths = sorted(int(n) for example in found for n in example.segment_lengths)
        assert lengths == sorted(documents.lengths().tolist())
        assert all(len(example.input_ids) <= 8 for example in found)
        assert config.dataset.entries("eval") == []


@pytest.mark.parametrize("packing", [False, True])
def test_long_text_is_cut_split_or_left_out_as_asked(tmp_path: Path, tokenizer: Any, packing: bool) -> None:
    """Text ends with the tokenizer's end of sequence, which a split document keeps and a cut one loses."""
    words = ["a b c d e f g h a b c d", "a b", "h g f e d c b a h g f"]
    path = write_rows(tmp_path / "data.jsonl", [{"text": text} for text in words])

    def read(overflow: str | None) -> list[list[int]]:
        config = live_config(tmp_path, path, dataset={"overflow": overflow}, training_args={"packing": packing})
        arguments = training_arguments(config)
        documents = open_documents(config, trained(config), tokenizer, arguments)
        assert documents is not None
        data = training_dataset(config, trained(config), documents, NoTeacher(), arguments)
        found = [data[row] for row in range(len(data))]
        assert all(len(example.input_ids) <= 8 for example in found)
        return sorted(example.input_ids[example.positions + 1].tolist() for example in found)

    config = live_config(tmp_path, path, dataset={"overflow": "cut"})
    documents = open_documents(config, trained(config), tokenizer, training_arguments(config))
    assert documents is not None
    whole = [documents[number].input_ids.tolist() for number in range(3)]
    assert [len(tokens) for tokens in whole] == [14, 4, 13]
    for overflow, parts in (
        ("cut", [tokens[1:8] for tokens in whole]),
        ("split", [part for tokens in whole for part in (tokens[1:8], tokens[8:]) if part]),
        ("drop", [whole[1][1:]]),
    ):
        flat = sorted(token for part in parts for token in part)
        assert sorted(token for row in read(overflow) for token in row) == flat
        if not packing:
            assert read(overflow) == sorted(parts)
    with refused(ConfigError, "dataset.train_dataset", "2 of 3", f"{11 / 31:.1%}", "dataset.overflow", "8"):
        read(None)


def test_captured_data_serve_a_live_teacher(tmp_path: Path) -> None:
    path = write_dataset(tmp_path / "captured", random_documents(5))
    config = live_config(tmp_path, path, dataset={"overflow": "cut"})
    arguments = training_arguments(config)
    documents = open_documents(config, trained(config), tiny_tokenizer(), arguments)
    assert isinstance(documents, Dataset)
    assert training_dataset(config, trained(config), documents, NoTeacher(), arguments)[0].teacher == {}
    with refused(MismatchError, "dataset.train_dataset", fingerprint(tiny_tokenizer(prefix="other"))):
        open_documents(config, trained(config), tiny_tokenizer(prefix="other"), arguments)


def test_published_data_serve_a_live_teacher_without_their_distributions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = Path(__file__).parent / "golden" / "upstream_v1"
    monkeypatch.setattr("distillkit.training.data.documents.vocab_size", lambda tokenizer: 49152)
    config = live_config(tmp_path, golden, dataset={"overflow": "cut"})
    documents = open_documents(config, trained(config), tiny_tokenizer(), training_arguments(config))
    assert isinstance(documents, PreparedDataset)
    assert documents.lengths().tolist() == [len(document.input_ids) for document in Dataset.open(str(golden))]


def test_data_that_are_not_there(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    data = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict({"a": data, "b": data}).save_to_disk(tmp_path / "splits")
    monkeypatch.chdir(tmp_path)
    for source, section, facts in (
        ({"disk_path": "nowhere"}, "train", ["nowhere"]),
        ({"disk_path": "splits"}, "train", ["'train'", "a, b"]),
        ({"disk_path": "splits", "split": "c"}, "train", ["'c'", "a, b"]),
        ({"disk_path": "splits"}, "eval", ["a, b", "split"]),
    ):
        config = live_config(tmp_path, "unused", dataset={"train_dataset": source, "eval_dataset": source})
        with refused(ConfigError, f"dataset.{section}_dataset", *facts):
            open_documents(config, *config.dataset.entries(section), tokenizer, training_arguments(config))


@pytest.mark.slow
def test_text_trains_beside_a_live_teacher_packed_or_padded_and_resumes(tmp_path: Path, tokenizer: Any) -> None:
    """Steps over everything have one loss and gradient; a run that goes on takes the prepared data and the rest."""
    for name, seed in (("student", 1), ("teacher", 7)):
        tiny_model(seed, vocabulary=len(WORDS)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    generator = np.random.default_rng(0)

    def said() -> str:
        return " ".join(generator.choice(list("abcdefgh"), generator.integers(1, 9)))

    rows = [
        {"messages": [{"role": "user", "content": said()}, {"role": "assistant", "content": said()}]} for _ in range(24)
    ]
    data = str(write_rows(tmp_path / "rows.jsonl", rows))

    def run(output: str, **arguments: Any) -> dict[int, float]:
        train(
            run_config(
                str(tmp_path / "student"),
                tmp_path / output,
                data,
                sequence_length=64,
                teacher={"kind": "hf", "path": str(tmp_path / "teacher")},
                dataset={"prepared_dataset_path": str(tmp_path / "cache")},
                training_args={"assistant_only_loss": True, "optim": "sgd", **arguments},
            )
        )
        logs = map(json.loads, (tmp_path / output / "metrics.jsonl").read_text().splitlines())
        return {entry["step"]: entry["loss"] for entry in logs if "loss" in entry}

    padded = run("padded", max_steps=2, per_device_train_batch_size=24)
    rows_needed = -(-sum(PreparedDataset(next((tmp_path / "cache").glob("prepared-*[0-9a-f]"))).lengths()) // 64)
    packed = run("packed", max_steps=2, per_device_train_batch_size=int(rows_needed), packing=True)
    assert packed == pytest.approx(padded, rel=1e-6)

    small = {"packing": True, "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 3}
    whole = run("whole", max_steps=8, **small)
    resumed = run("resumed", max_steps=8, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"), **small)
    assert resumed == {step: loss for step, loss in whole.items() if step > 3}


# -- the tokenizer's settings ------------------------------------------------------------------------------------------


def test_special_tokens_and_template_come_from_the_configuration(tmp_path: Path) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model(0)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    arguments = SimpleNamespace(eos_token="t5", pad_token="t6", chat_template_path=str(tmp_path / "chat.jinja"))
    configure_tokenizer(tokenizer, arguments)  # type: ignore[arg-type]
    configure_model(model, tokenizer, arguments)  # type: ignore[arg-type]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.chat_template) == (5, 6, "{{ messages }}")
    assert model.config.eos_token_id == 5
    assert model.generation_config.eos_token_id == [5, 2]

    other = tiny_tokenizer(prefix="x")
    other.add_special_tokens({"additional_special_tokens": ["<odd>"]})
    other.chat_template = "<odd>{{ messages }}"
    other.save_pretrained(tmp_path / "other")
    arguments = SimpleNamespace(eos_token=None, pad_token=None, chat_template_path=str(tmp_path / "other"))
    with refused(ConfigError, "training_args.chat_template_path", "<odd>"):
        configure_tokenizer(tokenizer, arguments)  # type: ignore[arg-type]
    other.chat_template = "{{ messages[0] }}"
    other.save_pretrained(tmp_path / "other")
    configure_tokenizer(tokenizer, arguments)  # type: ignore[arg-type]
    assert tokenizer.chat_template == "{{ messages[0] }}"


def test_settings_the_tokenizer_can_not_follow() -> None:
    for name, value in (("eos_token", "<none>"), ("pad_token", "<none>"), ("chat_template_path", "none.jinja")):
        arguments = SimpleNamespace(**{"eos_token": None, "pad_token": None, "chat_template_path": None, name: value})
        with refused(ConfigError, f"training_args.{name}", value):
            configure_tokenizer(tiny_tokenizer(), arguments)  # type: ignore[arg-type]


def test_where_prepared_data_are_kept(tmp_path: Path) -> None:
    config = live_config(tmp_path, "data", dataset={"prepared_dataset_path": None})
    assert cache_folder(config).name == "distillkit"

"""The campaigns of test_attacks.py: what is damaged or crafted, and who reads it. See `support.attacks`."""

from __future__ import annotations

import copy
import json
import math
import random
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import yaml

from distillkit.capture.kept_rows import KeptRows, read_rows, write_rows
from distillkit.capture.settings_file import load_captures
from distillkit.capture.shard_plan import ShardReceipt, make_plan, read_plan
from distillkit.capture.summary import ShardSummary
from distillkit.capture.teachers.base import RejectedDocument, ScoredDocument
from distillkit.codec import Codec, CompactConfig, LearnedConfig, Prior, SampledConfig, draws_from_logits, uniforms
from distillkit.errors import ConfigError, CorruptDataError
from distillkit.reports.inspection import inspect_dataset
from distillkit.reports.run_record import read_run
from distillkit.shards import Dataset, ShardWriter, convert, verify_dataset
from distillkit.shards.json_text import canonical_json
from distillkit.shards.storage import Folder
from distillkit.text.policy import capture_policy
from distillkit.text.rows import RowReader
from distillkit.text.sources import open_local
from distillkit.training.config.file import load_config
from distillkit.types import SparseLogprobs, TokenDocument
from support.attacks import Campaign
from support.bombs import write_arrow
from support.golden import GOLDEN, published
from support.shards import HEADER, VOCAB, files, make_documents, write

DEEP = "@deep@"
"""Stands for a list in a list in a list …, which no serializer of Python writes."""
HUGE = "@huge@"
"""Stands for an integer of 5,000 digits."""
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**32 + 1, 2**63, 2**70, HUGE, 0.5, 1e308, math.nan, math.inf, -math.inf),
    *(
        "",
        "x",
        "7",
        "x" * 5000,
        "\ud800",
        "\x00",
        "\x1b]0;x\x07",
        "../../../etc/passwd",
        "/dev/zero",
        "file:///dev/zero",
    ),
    *(
        "s3://nowhere/x",
        "::",
        "data-*.parquet",
        "2026-99-99",
        [],
        {},
        [[]],
        [None],
        [0] * 2000,
        {"": {}},
        {"a": 1},
        DEEP,
    ),
)


def edited(data: bytes, seed: int) -> bytes:
    """A file with a few bytes changed, doubled, removed, overwritten or moved, or with numbers such as its offsets
    replaced."""
    rng = random.Random(seed)
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at, length = rng.randrange(len(result)), rng.choice((1, 2, 4, 8, 64))
        kind = rng.randrange(7)
        if kind == 0:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            result[at : at + length] = rng.randbytes(len(result[at : at + length]))
        elif kind == 2:
            del result[at : at + length]
        elif kind == 3:
            result[at:at] = result[at : at + length]
        elif kind == 4:
            result[at : at + length] = rng.choice((b"\0", b"\xff", b"\x7f")) * len(result[at : at + length])
        elif kind == 5:
            start = rng.randrange(len(result))
            result[at : at + length] = result[start : start + length]
        else:
            width, form = rng.choice(((4, "<i"), (8, "<q")))
            number = rng.choice((0, -1, 2 ** (8 * width - 1) - 1, 1 << 30, rng.randrange(1 << 20)))
            at -= at % width
            result[at : at + width] = struct.pack(form, number)[: len(result[at : at + width])]
        if not result:
            return b"\0"
    return bytes(result)


def crafted(value: Any, seed: int) -> Any:
    """A document of JSON or YAML with a part replaced, removed or added."""
    rng = random.Random(seed)
    root = [copy.deepcopy(value)]
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = rng.choice(list(_places(root)))
        kind = rng.randrange(8)
        if kind == 0 and holder is not root:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("x", "", 5, "../x", "\ud800", "version"))] = copy.deepcopy(rng.choice(HOSTILE))
        elif kind == 2 and isinstance(holder, list) and holder is not root:
            holder.append(copy.deepcopy(holder[key]))
        else:
            holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    return root[0]


def _places(holder: Any) -> Any:
    """Every key of every mapping and list in a value, with what holds it."""
    for key in holder if isinstance(holder, dict) else range(len(holder)):
        yield holder, key
        if isinstance(holder[key], dict | list) and holder[key]:
            yield from _places(holder[key])


def json_text(value: Any) -> str:
    """JSON with the stand-ins replaced."""
    text = json.dumps(value, sort_keys=False, default=str)
    return text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{HUGE}"', "9" * 5000)


def yaml_text(value: Any) -> str:
    """YAML with the stand-ins replaced: JSON is YAML, save for surrogates and special numbers."""
    text = json_text(value).replace("NaN", ".nan").replace("Infinity", ".inf")
    return text.replace("\\ud800", "\\uFFFE")


class ShardBits:
    """Every bit of a shard that is opened alone, and every prefix of it: noticed, or the same data."""

    def __init__(self, folder: Path) -> None:
        write(folder / "small", make_documents(2))
        self._path = folder / "small" / "data-00000.parquet"
        (folder / "small" / "manifest.json").unlink()
        self._data = self._path.read_bytes()
        self._expected = content(self._path)
        self.seeds = 9 * len(self._data)

    def attempt(self, seed: int) -> None:
        self._path.write_bytes(flipped_or_cut(self._data, seed))
        assert content(self._path) == self._expected, "other data, without an error"
        assert seed < 8 * len(self._data), "a part of a file is accepted"


class ManifestBits:
    """Every bit and prefix of a manifest."""

    def __init__(self, folder: Path) -> None:
        write(folder / "set", make_documents(4))
        self._folder, self._path = folder / "set", folder / "set" / "manifest.json"
        self._data = self._path.read_bytes()
        self._expected = content(self._folder)
        self.seeds = 9 * len(self._data)

    def attempt(self, seed: int) -> None:
        self._path.write_bytes(flipped_or_cut(self._data, seed))
        assert content(self._folder) == self._expected, "other data, without an error"


class ShardBytes:
    """A dataset with bytes of a shard or of its manifest changed: noticed, or the same data."""

    seeds = 20_000

    def __init__(self, folder: Path) -> None:
        write(folder / "set", make_documents(6))
        self._folder = folder / "set"
        self._files = files(self._folder)
        self._expected = content(self._folder)

    def attempt(self, seed: int) -> None:
        name = sorted(self._files)[seed % len(self._files)]
        (self._folder / name).write_bytes(edited(self._files[name], seed))
        try:
            assert content(self._folder) == self._expected, "other data, without an error"
        finally:
            (self._folder / name).write_bytes(self._files[name])


class CompactBytes(ShardBytes):
    """A dataset in the compact format with bytes of a shard, the manifest or the prior changed."""

    def __init__(self, folder: Path) -> None:
        codec, documents = learned_codec(), make_documents(6)
        with ShardWriter(folder / "set", replace(HEADER, codec=codec.to_dict()), prior=codec.prior) as writer:
            for ids, rows, extra in documents:
                writer.write(ids, rows, **extra)
        self._folder = folder / "set"
        self._files = files(self._folder)
        self._expected = content(self._folder)


class CompactCodes:
    """A document in the compact format, or the prior that it is decoded with, with bytes changed."""

    seeds = 40_000

    def __init__(self, folder: Path) -> None:
        self._prepare(learned_codec(), make_documents(4)[3][1])

    def _prepare(self, codec: Codec, rows: SparseLogprobs) -> None:
        self._codec = codec
        self._rows = len(rows.ids)
        self._data = self._codec.encode_document(rows)
        self._expected = self._codec.decode_document(self._data, self._rows)

    def attempt(self, seed: int) -> None:
        if seed % 2:
            found = self._codec.decode_document(edited(self._data, seed), self._rows)
            assert np.array_equal(found.ids, self._expected.ids), "other ids, without an error"
            assert np.array_equal(found.logprobs, self._expected.logprobs), "other values, without an error"
            return
        prior = self._codec.prior
        assert prior is not None
        config = self._codec.config
        assert isinstance(config, LearnedConfig)
        codec = Codec(config.without_prior(), prior=Prior(edited(prior.data, seed)))
        found = codec.decode_document(self._data, self._rows)
        # The prior's hash comes before; without it, other data are possible, though only sound ones.
        ids, logprobs = np.asarray(found.ids), np.asarray(found.logprobs)
        there = logprobs > -np.inf
        assert 0 <= ids.min() <= ids.max() < codec.vocab_size, "an id outside the vocabulary"
        assert all(len({*ids[row][there[row]]}) == there[row].sum() > 0 for row in range(len(ids))), "a repeated id"
        assert (np.exp(logprobs.astype(np.float64)).sum(-1) < 1 + 1e-4).all(), "a row of more than 1"
        assert (np.diff(np.where(there, logprobs, -np.float32(100))) <= 0).all(), "values that are not in order"


class SampledCodes(CompactCodes):
    """The same with a document of draws."""

    def __init__(self, folder: Path) -> None:
        config = SampledConfig(vocab_size=VOCAB, draws=9)
        logits = np.random.default_rng(0).normal(size=(300, VOCAB)).astype(np.float32) * 2
        rows = draws_from_logits(logits, uniforms([1], 300, 9))
        few = SparseLogprobs(rows.ids[:40], rows.logprobs[:40], rows.draws)
        self._prepare(Codec(config, prior=Prior.learn(config, rows)), few)


class ShardMetadata:
    """A shard whose header or list of groups says something else, with the hashes of what it says."""

    seeds = 20_000

    def __init__(self, folder: Path) -> None:
        write(folder / "set", make_documents(4), shard_tokens=10_000)
        (folder / "set" / "manifest.json").unlink()
        self._path = folder / "set" / "data-00000.parquet"
        self._table = pq.read_table(self._path)
        metadata = pq.read_metadata(self._path).metadata
        self._metadata = {key: value for key, value in metadata.items() if key.startswith(b"distillkit.")}
        self._keys = sorted(key for key in self._metadata if key + b".xxh3" in self._metadata)
        content(self._path)

    def attempt(self, seed: int) -> None:
        key = self._keys[seed % len(self._keys)]
        text = json_text(crafted(json.loads(self._metadata[key]), seed)).encode()
        changed = {key: text, key + b".xxh3": xxhash.xxh3_128_hexdigest(text).encode()}
        with pq.ParquetWriter(self._path, self._table.schema, write_page_checksum=True) as writer:
            writer.write_table(self._table)
            writer.add_key_value_metadata({**self._metadata, **changed})
        content(self._path)
        verify_dataset(self._path)


class Manifests:
    """A manifest that says something else, with the hash of what it says."""

    seeds = 20_000

    def __init__(self, folder: Path) -> None:
        write(folder / "set", make_documents(4))
        self._folder, self._path = folder / "set", folder / "set" / "manifest.json"
        self._manifest = json.loads(self._path.read_text())
        verify_dataset(self._folder)

    def attempt(self, seed: int) -> None:
        self._path.write_text(hashed(crafted(self._manifest, seed), "xxh3"))
        content(self._folder)
        verify_dataset(self._folder)


class CapturePlans:
    """A plan, its receipts, its documents or rows that are kept, with bytes changed, or crafted with their hashes."""

    seeds = 20_000

    def __init__(self, folder: Path) -> None:
        write(folder / "set", make_documents(4), shard_tokens=10_000)
        self._folder = folder / "set"
        dataset = Dataset.open(self._folder)
        info = dataset.shards[0]
        documents = [
            TokenDocument(
                d.input_ids, f"row {row}", loss_mask=d.loss_mask, columns={"a": 1}, segment_lengths=d.segment_lengths
            )
            for row, d in enumerate(dataset)
        ]
        (self._folder / "manifest.json").unlink()
        kept = pa.schema([pa.field("a", pa.int64())])
        plan = make_plan(
            Folder(self._folder),
            HEADER,
            documents,
            10_000,
            source={"rows": 9},
            kept=kept,
            counts=lambda: {"rows": 9},
            sampled_rows=1000,
            sample_k=3,
        )
        plan.write_receipt(0, ShardReceipt(info, HEADER, ShardSummary()))
        rows = SparseLogprobs(np.arange(30).reshape(10, 3), -np.ones((10, 3), np.float32))
        scored = [ScoredDocument(index, rows, rows.logprobs[:, 0]) for index in range(plan.sample[0])]
        write_rows(plan, 0, KeptRows(HEADER, (RejectedDocument(0, "odd"), *scored[1:])))
        self._inside = self._folder / ".capture"
        self._files = {name: data for name, data in files(self._inside).items() if not name.startswith(".")}
        self._read()
        assert self.receipts == 1, "the receipt does not fit"
        assert self.kept is not None, "the rows do not fit"

    def _read(self) -> None:
        plan = read_plan(Folder(self._folder))
        assert plan is not None, "the plan is passed over"
        self.receipts = len(plan.receipts())
        self.kept = read_rows(plan, 0)
        for number in range(len(plan.shards)):
            plan.read(number)

    def attempt(self, seed: int) -> None:
        name = sorted(self._files)[seed % len(self._files)]
        data = self._files[name]
        if name.endswith(".json") and seed // len(self._files) % 4:
            path, changed = self._inside / name, hashed(crafted(json.loads(data), seed), "xxh3").encode()
        else:
            path, changed = self._inside / name, edited(data, seed)
        path.write_bytes(changed)
        try:
            self._read()
        finally:
            path.write_bytes(data)


class Published:
    """A published dataset with one file changed; it has no checksums, so it may give other data, but nothing worse."""

    seeds = 40_000
    container, layout = "parquet", "quantized"

    def __init__(self, folder: Path) -> None:
        self._folder, self._out = folder / "set", folder / "out"
        self._path = published(self._folder, self.container, self.layout)
        if self.container == "arrow":
            # As `save_to_disk` writes it.
            state = {"_data_files": [{"filename": self._path.name}], "_indices_files": None, "_split": "train"}
            (self._folder / "state.json").write_text(json.dumps(state))
            (self._folder / "dataset_info.json").write_text("{}")
        self._files = files(self._folder)
        self._read("")

    def _read(self, name: str) -> None:
        shutil.rmtree(self._out, ignore_errors=True)
        try:
            dataset = Dataset.open(self._folder)
            dataset.lengths()
            inspect_dataset(dataset)
            for _, rows in dataset.decoded():
                assert np.isfinite(rows.logprobs).all(), "a log-probability that is not finite"
            convert(dataset, self._out)
        except CorruptDataError as error:
            # A changed configuration shows in the rows.
            if name not in str(error) and self._path.name not in str(error):
                raise AssertionError(f"no file is named: {error}") from error
            raise

    def attempt(self, seed: int) -> None:
        name = sorted(self._files)[seed % len(self._files)]
        data = self._files[name]
        structured = name.endswith((".json", ".yaml")) and seed // len(self._files) % 4
        self._try(name, self._crafted(name, seed) if structured else edited(data, seed))

    def _try(self, name: str, changed: bytes) -> None:
        path = self._folder / name
        path.write_bytes(changed)
        try:
            self._read(name)
        finally:
            path.write_bytes(self._files[name])

    def _crafted(self, name: str, seed: int) -> bytes:
        value = crafted(yaml.safe_load(self._files[name]), seed)
        return (yaml_text(value) if name.endswith(".yaml") else json_text(value)).encode()


class PublishedLegacy(Published):
    layout = "legacy"


class PublishedArrow(Published):
    container = "arrow"


class PublishedLegacyArrow(PublishedArrow):
    layout = "legacy"


class PublishedArrowBits(PublishedArrow):
    """Every bit of the Arrow file, and every prefix."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._data = self._path.read_bytes()
        self.seeds = 9 * len(self._data)

    def attempt(self, seed: int) -> None:
        self._try(self._path.name, flipped_or_cut(self._data, seed))


class PublishedArrowLists(PublishedArrow):
    """Each list of the Arrow file ends before it begins."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._data = self._path.read_bytes()
        table = pa.ipc.open_stream(self._data).read_all()
        lists = [table[name][0] for name in table.column_names]
        lists += [outer[0] for outer in lists if pa.types.is_list(outer.type.value_type)]
        starts = {bytes(4) + struct.pack("<i", len(inner)) for inner in lists}
        self._places = [at for at in range(0, len(self._data) - 7, 4) if self._data[at : at + 8] in starts]
        self.seeds = len(self._places)

    def attempt(self, seed: int) -> None:
        at = self._places[seed] + 4
        self._try(self._path.name, self._data[:at] + struct.pack("<i", -5) + self._data[at + 4 :])


class Bombs:
    """Files of a few kilobytes that take hundreds of megabytes to read, see `support.bombs`."""

    most = 200_000
    """Kilobytes."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "support.bombs", str(folder)], check=True)
        self._bombs = sorted(folder.iterdir())
        self.seeds = len(self._bombs)
        Published(folder / "harmless")

    def attempt(self, seed: int) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # Forgets the peak.
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            self._read(self._bombs[seed])
        finally:
            taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            assert taken < self.most, f"{taken:,} kB for {self._bombs[seed].name}"

    def _read(self, bomb: Path) -> None:
        if bomb.name.startswith(("published", "shard")):
            content(bomb if bomb.name.startswith("published") else bomb / "data-00000.parquet")
        else:
            list(open_local(str(bomb)).rows())


CHATS = [
    {"messages": [{"role": "user", "content": f"How far is {n}?"}, {"role": "assistant", "content": "Two miles."}]}
    for n in range(3)
]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


def tokenizer() -> Any:
    """Words and bytes, with a chat template."""
    from support.training import tiny_tokenizer

    result = tiny_tokenizer()
    result.chat_template = TEMPLATE
    return result


class Sources:
    """Files of text and chats, in every format, with bytes changed, read into token documents."""

    seeds = 20_000

    def __init__(self, folder: Path) -> None:
        table = pa.Table.from_pylist(CHATS)
        self._folder = folder / "rows"
        self._folder.mkdir()
        (self._folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
        (self._folder / "rows.json").write_text(json.dumps(CHATS))
        (self._folder / "rows.txt").write_text("first\n\nsecond\nthird\n")
        pq.write_table(table, self._folder / "rows.parquet")
        saved = self._folder / "saved"
        saved.mkdir()
        write_arrow(saved / "data-00000-of-00001.arrow", table)
        state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_fingerprint": "0", "_split": "train"}
        state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
        (saved / "state.json").write_text(json.dumps(state))
        (saved / "dataset_info.json").write_text("{}")
        self._files = {path: path.read_bytes() for path in sorted(self._folder.rglob("*")) if path.is_file()}
        self._reader = RowReader(tokenizer(), capture_policy("all"), 10_000)
        for path in self._files:
            self._read(path)

    def _read(self, path: Path) -> None:
        source = open_local(str(path.parent if path.parent.name == "saved" else path))
        self._reader(list(source.rows()))

    def attempt(self, seed: int) -> None:
        path = list(self._files)[seed % len(self._files)]
        path.write_bytes(edited(self._files[path], seed))
        try:
            self._read(path)
        finally:
            path.write_bytes(self._files[path])


class Rows:
    """Rows of every layout with hostile values in them."""

    seeds = 40_000
    _rows = (
        CHATS[0],
        {"text": "Some text."},
        {"prompt": "A question", "completion": "An answer"},
        {"instruction": "Do", "input": "this", "output": "done"},
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi"}]},
        {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
        {"prompt": CHATS[0]["messages"][:1], "completion": CHATS[0]["messages"][1:]},
        {"inputs": "A question", "targets": "An answer"},
        {
            "messages": [
                {"role": "user", "content": "Weather?"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
                },
                {"role": "tool", "content": "sun", "name": "f"},
                {"role": "assistant", "content": "It shines."},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        },
    )

    def __init__(self, folder: Path) -> None:
        self._path = folder / "rows.jsonl"
        self._reader = RowReader(tokenizer(), capture_policy("all"), 10_000)
        for row in self._rows[:2]:
            self._read(row)

    def _read(self, row: Any) -> None:
        self._path.write_text(json_text(row) + "\n")
        self._reader(list(open_local(str(self._path)).rows()))

    def attempt(self, seed: int) -> None:
        self._read(crafted(self._rows[seed % len(self._rows)], seed))


class Configurations:
    """The three kinds of YAML files, crafted or with bytes changed."""

    seeds = 40_000

    def __init__(self, folder: Path) -> None:
        self._path = folder / "config.yaml"
        codec = yaml.safe_load((GOLDEN / "upstream_v1" / "compression_config.yaml").read_text())
        train = {
            "project_name": "p",
            "model": "./student",
            "output_path": "./out",
            "sequence_length": 128,
            "dataset": {"train_dataset": {"disk_path": "./captured"}, "packing": True, "seed": 1},
            "teacher": {"kind": "dataset", "logprob_compressor": codec},
            "loss_functions": [
                {"function": "cross_entropy", "weight": 0.1},
                {"function": "kl", "weight": 0.9, "temperature": 1.0, "missing_probability_handling": "zero"},
            ],
            "peft": {"r": 8, "target_modules": ["q_proj"]},
            "model_kwargs": {"dtype": "float32"},
            "training_args": {"num_train_epochs": 1, "learning_rate": 1e-4, "report_to": "none"},
        }
        captures = {
            "model": "./teacher",
            "dataset": "./rows.jsonl",
            "preset": "recommended",
            "captures": [{"output": "a"}, {"output": "b", "engine": "hf", "hf": {"batch_tokens": 512}}],
        }
        readers: list[tuple[Any, Callable[[Path], object]]] = [
            (train, load_config),
            (captures, load_captures),
            (codec, lambda path: Dataset.open(GOLDEN / "upstream_v1", config=path)),
        ]
        self._readers = readers
        # Imports what is imported once, and lets Arrow reserve its gigabyte of addresses.
        for value, read in (
            ({**train, "training_args": {"report_to": "none", "optim": "nothing"}}, load_config),
            *readers,
        ):
            self._path.write_text(yaml.safe_dump(value))
            with suppress(ConfigError):
                read(self._path)

    def attempt(self, seed: int) -> None:
        value, read = self._readers[seed % len(self._readers)]
        if seed // len(self._readers) % 4:
            data = yaml_text(crafted(value, seed)).encode()
        else:
            data = edited(yaml.safe_dump(value, sort_keys=False).encode(), seed)
        self._path.write_bytes(data)
        read(self._path)


class RunRecords:
    """The metrics and the summary of a run."""

    seeds = 10_000

    def __init__(self, folder: Path) -> None:
        entries = [
            {"step": 1, "loss": 2.0, "learning_rate": 0.1, "kl": 1.0},
            {"step": 2, "loss": 1.0, "learning_rate": 0.1, "kl": 0.5},
            {"step": 2, "eval_kl": 1.0, "eval_cross_entropy": 2.0, "eval_perplexity": 7.4},
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        (folder / "summary.json").write_text(json.dumps({"steps": 2, "seconds": 1.0, "metrics": {}}))
        self._folder = folder
        self._files = files(folder)

    def attempt(self, seed: int) -> None:
        name = sorted(self._files)[seed % 2]
        path, data = self._folder / name, self._files[name]
        lines = data.decode().splitlines()
        if seed // 2 % 4:
            line = random.Random(seed).randrange(len(lines))
            lines[line] = json_text(crafted(json.loads(lines[line]), seed))
            path.write_text("\n".join(lines))
        else:
            path.write_bytes(edited(data, seed))
        try:
            read_run(self._folder)
        finally:
            path.write_bytes(data)


def flipped_or_cut(data: bytes, seed: int) -> bytes:
    """A file with one of its bits changed or, for seeds from their number on, a prefix of it: 9 for each byte."""
    bits = 8 * len(data)
    if seed >= bits:
        return data[: seed - bits]
    result = bytearray(data)
    result[seed // 8] ^= 1 << seed % 8
    return bytes(result)


def learned_config() -> CompactConfig:
    """A small compact configuration."""
    return CompactConfig(vocab_size=VOCAB, k=6, threshold=0.001, step=0.01)


@cache
def learned_codec() -> Codec:
    """A codec of it, with a prior learned from a few documents."""
    documents = [rows for _, rows, _ in make_documents(40, seed=1)]
    ids, logprobs = (np.concatenate([getattr(rows, name) for rows in documents]) for name in ("ids", "logprobs"))
    config = learned_config()
    return Codec(config, prior=Prior.learn(config, SparseLogprobs(ids, logprobs)))


def hashed(value: Any, key: str) -> str:
    """JSON with the hash of its content, if it has one."""
    if isinstance(value, dict):
        rest = {name: item for name, item in value.items() if name != key}
        with suppress(TypeError, ValueError, UnicodeEncodeError, RecursionError):
            value = {**rest, key: xxhash.xxh3_128_hexdigest(canonical_json(rest).encode())}
    return json_text(value)


def content(path: Path) -> Any:
    """All that a reader could be told."""
    dataset = Dataset.open(path)
    documents = [
        (d.doc_id, d.input_ids.tolist(), bytes(d.teacher), _list(d.loss_mask), _list(d.segment_lengths))
        for d in dataset
    ]
    return dataset.header.to_dict(), documents


def _list(array: Any) -> Any:
    return None if array is None else array.tolist()


CAMPAIGNS: dict[str, Callable[[Path], Campaign]] = {
    "shard_bits": ShardBits,
    "shard_bytes": ShardBytes,
    "compact_bytes": CompactBytes,
    "compact_codes": CompactCodes,
    "sampled_codes": SampledCodes,
    "shard_metadata": ShardMetadata,
    "manifest_bits": ManifestBits,
    "manifests": Manifests,
    "capture_plans": CapturePlans,
    "published": Published,
    "published_legacy": PublishedLegacy,
    "published_arrow": PublishedArrow,
    "published_legacy_arrow": PublishedLegacyArrow,
    "published_arrow_bits": PublishedArrowBits,
    "published_arrow_lists": PublishedArrowLists,
    "bombs": Bombs,
    "sources": Sources,
    "rows": Rows,
    "configurations": Configurations,
    "run_records": RunRecords,
}

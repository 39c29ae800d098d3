"""Packing: nothing is lost, no row is too long, tokens keep their teacher rows, and training does not notice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from hypothesis import example, given
from hypothesis import strategies as st

from distillkit.errors import CorruptDataError
from distillkit.shards import Dataset
from distillkit.shards.overflow import Pieces, default_overlap, windows
from distillkit.shards.packing import pack
from distillkit.training.config.arguments import training_arguments
from distillkit.training.config.schema import RunConfig
from distillkit.training.data.documents import document_lengths, is_packed
from distillkit.training.data.examples import BLANK, Collator, DistillationDataset, DocumentOrder, Example
from distillkit.training.signals.stored import OfflineSignal
from distillkit.types import Document, SparseLogprobs
from support.training import VOCABULARY, exact_codec, random_documents, run_config, write_dataset


@example([2, 2], 3, None)  # one token too little room for the second
@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 30), st.none() | st.integers(0, 3))
def test_packing_loses_nothing_and_keeps_to_the_length(sizes: list[int], capacity: int, seed: int | None) -> None:
    lengths = np.array(sizes, dtype=np.int64)
    packing = pack(lengths, capacity, seed=seed)
    rows = [packing[row].tolist() for row in range(len(packing))]
    assert sorted(index for row in rows for index in row) == np.flatnonzero(lengths).tolist()
    assert all(row == sorted(row) for row in rows)
    assert rows == sorted(rows, key=lambda row: row[0])
    filled = [int(np.minimum(lengths[row], capacity).sum()) for row in rows]
    assert all(0 < tokens <= capacity for tokens in filled)
    assert packing.tokens == sum(filled)
    # Best fit: no document of a row would have fitted beside another row's.
    if len(filled) > 1:
        assert sum(sorted(filled)[:2]) > capacity


def realistic_lengths(count: int) -> np.ndarray:
    """Lengths of documents as web text has them: log-normal, a median of 330 tokens, a mean of 540."""
    return np.random.default_rng(0).lognormal(5.8, 1.0, count).astype(np.int64) + 2


def test_rows_are_full() -> None:
    for capacity in (1024, 8192, 16384):
        assert pack(realistic_lengths(5_000), capacity, seed=1).fill > 0.98, capacity


def test_a_million_documents_are_packed_as_the_seed_decides() -> None:
    lengths = realistic_lengths(1_000_000)
    packing = pack(lengths, 8192, seed=1)
    assert packing.fill > 0.999
    again, other = pack(lengths, 8192, seed=1), pack(lengths, 8192, seed=2)
    assert np.array_equal(again.documents, packing.documents)
    assert np.array_equal(again.ends, packing.ends)
    assert not np.array_equal(other.documents, packing.documents)


class Sources:
    """Documents in memory."""

    def __init__(self, documents: list[Document]) -> None:
        self.documents = documents

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Document:
        return self.documents[index]

    def lengths(self) -> np.ndarray:
        return np.array([len(document.input_ids) for document in self.documents])


def some_documents(rows: str) -> list[Document]:
    """Documents with masks, packed ones among them, some longer than a row of 24; first ids tell rows apart."""
    generator, codec = np.random.default_rng(3), exact_codec()
    documents = []
    for number in range(40):
        length = int(generator.integers(1, 34))
        count = length if rows == "L" else length - 1
        first = (np.arange(count) + number) % VOCABULARY
        ids = (first[:, None] + np.arange(codec.k)) % VOCABULARY
        logprobs = np.tile(np.log(np.linspace(0.2, 0.01, codec.k)), (count, 1)).astype(np.float32)
        teacher = codec.encode_document(SparseLogprobs(ids.astype(np.int64), logprobs)) if count else b""
        mask = generator.random(length) < 0.7 if number % 3 == 0 else None
        segments = np.array([2, length - 2], dtype=np.int32) if number % 5 == 0 and length > 2 else None
        tokens = generator.integers(0, VOCABULARY, length).astype(np.int32)
        documents.append(Document(str(number), tokens, teacher, count, mask, segments))
    return documents


@pytest.mark.parametrize("rows", ["L", "L-1"])
def test_documents_keep_their_tokens_and_teacher_rows(rows: str) -> None:
    source = Sources(some_documents(rows))
    indices = np.arange(1, 40)
    packing = pack(source.lengths()[indices], 24, seed=0)
    for on_device in (False, True):
        signal = OfflineSignal(exact_codec(), VOCABULARY, on_device=on_device)
        alone = DistillationDataset(source, signal, 24, indices)
        packed = DistillationDataset(source, signal, 24, indices, packing=packing)
        assert len(packed) < len(alone)
        for row in range(len(packed)):
            check_joined(packed[row], [alone[int(document)] for document in packing[row]])
        assert len(packed[BLANK].input_ids) == 0


@given(st.lists(st.integers(0, 60), max_size=20), st.integers(2, 20))
def test_the_pieces_of_a_document_are_its_windows(sizes: list[int], limit: int) -> None:
    pieces = Pieces.of(np.array(sizes, dtype=np.int64), limit, "split")
    expected = [
        (number, start, stop)
        for number, size in enumerate(sizes)
        for start, stop in windows(size, limit, default_overlap(limit))
    ]
    found = [pieces[piece] for piece in range(len(pieces))]
    assert [(number, start, stop) for number, start, stop, _ in found] == expected
    assert pieces.lengths.tolist() == [stop - start for _, start, stop in expected]
    new = [(number, token) for number, _, stop, first in found for token in range(first, stop)]
    assert new == [(number, token) for number, size in enumerate(sizes) for token in range(size)]


@pytest.mark.parametrize("rows", ["L", "L-1"])
@pytest.mark.parametrize("limit", [2, 9, 24])
@pytest.mark.parametrize("packed", [False, True])
def test_split_documents_train_each_counted_position_once_with_its_row(rows: str, limit: int, packed: bool) -> None:
    """Whatever masks and boundaries they have; only the overlap is read twice."""
    documents = [
        replace(document, input_ids=(1000 * number + np.arange(len(document.input_ids))).astype(np.int32))
        for number, document in enumerate(some_documents(rows))
    ]
    source, signal = Sources(documents), OfflineSignal(exact_codec(), 100_000)
    indices = np.arange(3, 40)
    whole = DistillationDataset(source, signal, 1000, indices)
    pieces = Pieces.of(source.lengths()[indices], limit, "split")
    packing = pack(pieces.lengths, limit, seed=0) if packed else None
    split = DistillationDataset(source, signal, limit, indices, pieces=pieces, packing=packing)
    trained = []
    for data in (whole, split):
        found = []
        for part in (data[index] for index in range(len(data))):
            assert part.segment_lengths.sum() == len(part.input_ids) <= data.sequence_length
            assert part.cut_tokens == 0
            teacher = [tuple(values) for values in part.teacher["ids"].tolist()]
            context, labels = (part.input_ids[part.positions + by].tolist() for by in (0, 1))
            found += zip(context, labels, teacher, strict=True)
        trained.append(sorted(found))
    assert trained[0] == trained[1]
    assert split.documents == len(indices)


def check_joined(example: Example, parts: list[Example]) -> None:
    """An example is these documents, one after the other."""
    assert example.segment_lengths.tolist() == [length for part in parts for length in part.segment_lengths]
    assert example.cut_tokens == sum(part.cut_tokens for part in parts)
    start = 0
    for part in parts:
        stop = start + len(part.input_ids)
        assert example.input_ids[start:stop].tolist() == part.input_ids.tolist()
        inside = (example.positions >= start) & (example.positions < stop)
        assert (example.positions[inside] - start).tolist() == part.positions.tolist()
        for name, values in part.teacher.items():
            assert np.array_equal(example.teacher[name][inside], values)
        start = stop


def test_position_ids_restart_and_flash_attention_gets_the_bounds() -> None:
    def joined(*lengths: int) -> Example:
        total = sum(lengths)
        return Example(np.zeros(total, np.int32), np.array(lengths), np.empty(0, np.int64), {})

    batch = Collator(flash_attention=True)([joined(3, 1, 2), joined(2, 2)])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 3]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 4, 6, 8, 12]
    assert batch["max_length_q"] == 4


def test_data_that_changed_under_a_packing_are_refused() -> None:
    source = Sources(some_documents("L"))
    packing = pack(np.ones(40, np.int64), 24)
    data = DistillationDataset(source, OfflineSignal(exact_codec(), VOCABULARY), 24, packing=packing)
    with pytest.raises(CorruptDataError):
        data[0]


# -- lengths -----------------------------------------------------------------------------------------------------------


def test_lengths_are_read_from_the_token_column_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents(30)
    dataset = Dataset.open(write_dataset(tmp_path / "data", documents))
    monkeypatch.setattr(Dataset, "__getitem__", lambda *_: pytest.fail("no document is read"))
    assert document_lengths(dataset, tmp_path / "cache").tolist() == [len(document) for document in documents]
    assert not (tmp_path / "cache").exists(), "that was quick"
    monkeypatch.setattr("distillkit.training.data.documents.SLOW_SECONDS", 0.0)
    kept = document_lengths(dataset, tmp_path / "cache")
    monkeypatch.setattr(Dataset, "lengths", lambda *_: pytest.fail("they are kept"))
    assert np.array_equal(document_lengths(dataset, tmp_path / "cache"), kept)


def test_lengths_of_published_datasets() -> None:
    for name in ("upstream_v1", "upstream_legacy"):
        dataset = Dataset.open(str(Path(__file__).parent / "golden" / name))
        assert dataset.lengths().tolist() == [len(document.input_ids) for document in dataset], name


# -- what a configuration asks for -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "train", "evaluate"),
    [
        ({}, False, False),
        ({"training_args": {"packing": True}}, True, True),
        ({"training_args": {"packing": True, "eval_packing": False}}, True, False),
        ({"training_args": {"eval_packing": True}}, False, True),
        ({"functionary_packing": True}, True, True),
        ({"functionary_packing": True, "dataset": {"prepacked": True}}, False, False),
        ({"training_args": {"packing": True}, "dataset": {"prepacked": True}}, False, False),
    ],
)
def test_who_is_packed(settings: dict[str, Any], train: bool, evaluate: bool, tmp_path: Path) -> None:
    config: RunConfig = run_config("student", tmp_path, "data", "held out", **settings)
    arguments = training_arguments(config)
    assert (is_packed(config, arguments, "train"), is_packed(config, arguments, "eval")) == (train, evaluate)


# -- going on ----------------------------------------------------------------------------------------------------------


class Untouched(Sources):
    """A million documents, which remember who was read."""

    def __init__(self) -> None:
        self.sizes = realistic_lengths(1_000_000)
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> Document:
        self.read.append(index)
        length = int(self.sizes[index])
        return Document("", np.full(length, index % 64, np.int32), b"", length - 1)

    def lengths(self) -> np.ndarray:
        return self.sizes


class NoTeacher:
    """A signal that takes nothing of a document, as a live teacher's."""

    def take(self, document: Document, positions: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def empty_targets(self) -> dict[str, np.ndarray]:
        return {}

    def targets(self, batch: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("packed", [False, True])
def test_a_million_documents_are_skipped_without_reading_one(packed: bool) -> None:
    """What a resumed run does: the plan, the order of the epoch, and batches skipped by accelerate."""
    source = Untouched()
    packing = pack(source.lengths(), 4096, seed=42) if packed else None
    data = DistillationDataset(source, NoTeacher(), 4096, packing=packing)
    order = DocumentOrder(len(data), seed=42)
    order.set_epoch(3)
    done = len(data) // 4 - 1
    loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=order, collate_fn=Collator())
    batch = next(iter(skip_first_batches(loader, done)))
    expected = np.array(list(order))[done * 4 : (done + 1) * 4]
    documents = expected if packing is None else np.concatenate([packing[row] for row in expected])
    assert source.read == documents.tolist()
    assert batch["counts"][0] == np.minimum(source.sizes[documents], 4096).sum()

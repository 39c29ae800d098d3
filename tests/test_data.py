"""From documents to batches: what counts, cutting, padding, packed rows, order, and datasets that don't fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distillkit.codec import Codec, DistributionQuantizationConfig
from distillkit.errors import ConfigError, MismatchError
from distillkit.shards import Dataset, ShardWriter
from distillkit.shards.alignment import ShiftRates, shift_rates
from distillkit.text.tokenizer import fingerprint
from distillkit.training.config.schema import DatasetSource, StoredTeacherConfig
from distillkit.training.data.examples import (
    BLANK,
    IGNORED,
    Collator,
    DistillationDataset,
    DocumentOrder,
    Example,
    counted_positions,
)
from distillkit.training.data.stored import Sample, check_dataset, check_tokenizer, open_dataset
from distillkit.training.signals.stored import OfflineSignal
from distillkit.types import Document, SparseLogprobs
from support.refusals import refused
from support.training import (
    VOCABULARY,
    exact_codec,
    header_for,
    random_documents,
    teacher_rows,
    tiny_model,
    tiny_tokenizer,
    write_dataset,
)


def lengths(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_a_position_counts_if_its_next_token_does() -> None:
    for segments, mask, expected in (
        (lengths(5), None, [0, 1, 2, 3]),
        (lengths(1), None, []),
        (lengths(3, 1, 2), None, [0, 1, 4]),
        # The mask says which tokens are predicted: token t + 1 decides about position t.
        (lengths(5), [True, False, True, True, False], [1, 2]),
        (lengths(2, 3), [True, True, True, False, True], [0, 3]),
        (lengths(4), [False] * 4, []),
    ):
        positions = counted_positions(segments, None if mask is None else np.array(mask))
        assert positions.tolist() == expected


def stored(length: int, rows: int, segments: np.ndarray | None = None, mask: np.ndarray | None = None) -> Document:
    """A document whose row t holds id t first, so that rows can be told apart."""
    ids = (np.arange(rows)[:, None] + np.arange(8)) % VOCABULARY
    logprobs = np.tile(np.log(np.linspace(0.2, 0.01, 8)), (rows, 1)).astype(np.float32)
    teacher = exact_codec().encode_document(SparseLogprobs(ids.astype(np.int64), logprobs))
    return Document("id", np.arange(length, dtype=np.int32) + 7, teacher, rows, mask, segments)


def dataset_of(*documents: Document, sequence_length: int = 64, on_device: bool = False) -> DistillationDataset:
    signal = OfflineSignal(exact_codec(), VOCABULARY, on_device=on_device)
    return DistillationDataset(documents, signal, sequence_length)  # type: ignore[arg-type]


def test_a_long_document_is_cut_together_with_its_rows() -> None:
    for rows in (9, 10):  # with and without one after the last token
        example = dataset_of(stored(10, rows), sequence_length=6)[0]
        assert example.input_ids.tolist() == [7, 8, 9, 10, 11, 12]
        assert example.cut_tokens == 4
        assert example.positions.tolist() == [0, 1, 2, 3, 4]
        assert example.teacher["ids"][:, 0].tolist() == [0, 1, 2, 3, 4]


def test_packed_documents_are_cut_and_masked() -> None:
    mask = np.ones(10, dtype=bool)
    mask[1] = False
    document = stored(10, 10, np.array([4, 3, 3], dtype=np.int32), mask)
    example = dataset_of(document, sequence_length=6)[0]
    assert example.segment_lengths.tolist() == [4, 2]
    assert example.positions.tolist() == [1, 2, 4]
    assert example.teacher["ids"][:, 0].tolist() == [1, 2, 4]


def test_a_batch_is_padded_and_its_documents_are_told_apart() -> None:
    data = dataset_of(stored(6, 5), stored(5, 5, np.array([2, 3], dtype=np.int32)))
    batch = Collator(pad_id=9, pad_to_multiple_of=4)([data[0], data[1], data[BLANK]])
    assert batch["input_ids"].tolist() == [
        [7, 8, 9, 10, 11, 12, 9, 9],
        [7, 8, 9, 10, 11, 9, 9, 9],
        [9] * 8,
    ]
    assert batch["position_ids"].tolist() == [list(range(8)), [0, 1, 0, 1, 2, 3, 4, 5], list(range(8))]
    assert batch["labels"].tolist() == [
        [IGNORED, 8, 9, 10, 11, 12, IGNORED, IGNORED],
        [IGNORED, 8, IGNORED, 10, 11, IGNORED, IGNORED, IGNORED],
        [IGNORED] * 8,
    ]
    assert batch["rows"].tolist() == [0, 1, 2, 3, 4, 8, 10, 11]
    assert batch["teacher_ids"][:, 0].tolist() == [0, 1, 2, 3, 4, 0, 2, 3]
    assert (batch["labels"].flatten()[batch["rows"] + 1] != IGNORED).all()
    assert batch["counts"].tolist() == [11, 0, 0]
    assert "cu_seq_lens_q" not in batch


def test_flash_attention_gets_the_boundaries_of_the_flattened_batch() -> None:
    data = dataset_of(stored(6, 5), stored(5, 5, np.array([2, 3], dtype=np.int32)))
    batch = Collator(flash_attention=True)([data[0], data[1]])
    assert batch["cu_seq_lens_q"].tolist() == [0, 6, 8, 12]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_k"] == 6
    assert "cu_seq_lens_q" not in Collator(flash_attention=True)([data[0]]), "nothing is packed there"


def test_bytes_decoded_on_the_device_are_the_same_targets() -> None:
    document = stored(9, 8)
    batches = [Collator()([dataset_of(document, on_device=on_device)[0]]) for on_device in (False, True)]
    assert batches[1]["teacher_bytes"].dtype == torch.uint8
    signals = [OfflineSignal(exact_codec(), VOCABULARY, on_device=on_device) for on_device in (False, True)]
    labels = torch.zeros(len(batches[0]["rows"]), dtype=torch.int64)
    decoded, raw = (signal.targets(batch, labels).teacher for signal, batch in zip(signals, batches, strict=True))
    assert torch.equal(decoded.ids, raw.ids)
    assert torch.equal(decoded.logprobs, raw.logprobs)


def test_label_logprobs_stay_beside_their_rows() -> None:
    known = -np.arange(1, 10, dtype=np.float32)
    mask = np.ones(10, dtype=bool)
    mask[[1, 4]] = False
    documents = [
        replace(stored(10, 9, mask=mask), label_logprobs=known),
        stored(5, 4),  # has none
        replace(stored(6, 5, np.array([2, 4], dtype=np.int32)), label_logprobs=known[:5]),
    ]
    collator = Collator(eos_labels=[14], eos_id=3)  # the token at position 7 becomes another label
    for on_device in (False, True):
        signal = OfflineSignal(exact_codec(), VOCABULARY, on_device=on_device, label_logprobs=True)
        data = DistillationDataset(documents, signal, 8)  # type: ignore[arg-type]
        batch = collator([data[0], data[1], data[2], data[BLANK]])
        labels = batch["labels"].flatten()[batch["rows"] + 1]
        found = signal.targets(batch, labels).label_logprobs
        assert found is not None
        expected = [-2, -3, -5, -6, np.nan, *[np.nan] * 4, -1, -3, -4, -5]
        np.testing.assert_array_equal(found.numpy(), np.array(expected, dtype=np.float32))
        blank = signal.targets(collator([data[BLANK]]), labels[:0]).label_logprobs
        assert blank is not None
        assert blank.shape == (0,)


def test_ids_beyond_a_narrower_head_become_missing_mass() -> None:
    signal = OfflineSignal(exact_codec(), head_size=5)
    ids = torch.tensor([[1, 7, 2, 4, 60, 0, 3, 9], [8, 1, 2, 3, 4, 0, 6, 5]])
    logprobs = torch.log(torch.linspace(0.3, 0.01, 8)).repeat(2, 1)
    batch = {"teacher_ids": ids, "teacher_logprobs": logprobs}
    targets = signal.targets(batch, torch.zeros(2, dtype=torch.int64)).teacher
    assert targets.ids.tolist() == [[1, 1, 2, 4, 1, 0, 3, 1], [1, 1, 2, 3, 4, 0, 1, 1]]
    assert torch.isinf(targets.logprobs).tolist() == (ids >= 5).tolist()


def test_order_depends_on_seed_and_epoch_alone() -> None:
    order = DocumentOrder(10, seed=3, multiple=4)
    first = list(order)
    assert sorted(first) == [BLANK, BLANK, *range(10)]
    assert first[10:] == [BLANK, BLANK]
    assert list(order) == first
    assert list(DocumentOrder(10, seed=3))[:10] == first[:10], "whatever the batches"
    order.set_epoch(1)
    second = list(order)
    assert second != first
    again = DocumentOrder(10, seed=3)
    again.set_epoch(1)
    assert list(again) == second[:10]
    assert list(DocumentOrder(3, seed=None)) == [0, 1, 2]
    assert list(DocumentOrder(10, seed=4))[:10] != first[:10]


def test_samples_are_chosen_by_the_seed() -> None:
    chosen = Sample(10, 42, "dataset.num_samples").choose(100)
    assert chosen is not None
    assert len(set(chosen.tolist())) == 10
    assert chosen.tolist() == Sample(10, 42, "x").choose(100).tolist()  # type: ignore[union-attr]
    assert chosen.tolist() != Sample(10, 43, "x").choose(100).tolist()  # type: ignore[union-attr]
    assert Sample(3, None, "x").choose(100).tolist() == [0, 1, 2]  # type: ignore[union-attr]
    assert Sample(None, 1, "x").choose(100) is None
    with refused(ConfigError, "dataset.num_samples", "101", "100"):
        Sample(101, 1, "dataset.num_samples").choose(100)


def test_a_batch_without_any_counted_position_is_whole() -> None:
    batch = Collator()([dataset_of()[BLANK]])
    assert batch["input_ids"].tolist() == [[0]]
    assert batch["rows"].tolist() == []
    assert batch["teacher_ids"].shape == (0, 8)
    assert isinstance(dataset_of()[BLANK], Example)


# -- does it fit -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("captured")
    write_dataset(folder / "data", greedy_documents())
    return folder / "data"


def greedy_documents(count: int = 8, length: int = 24) -> list[np.ndarray]:
    """Text that the teacher of `write_dataset` finds likely: its own choices, with some noise."""
    teacher, generator = tiny_model(7), torch.Generator().manual_seed(0)
    documents = []
    for _ in range(count):
        ids = torch.randint(VOCABULARY, (1, 1), generator=generator)
        for _ in range(length - 1):
            with torch.no_grad():
                scores = teacher(ids, use_cache=False).logits[:, -1]
            noise = torch.rand(scores.shape, generator=generator).log().neg().log().neg()
            ids = torch.cat([ids, (scores + noise).argmax(-1, keepdim=True)], dim=1)
        documents.append(ids[0].numpy().astype(np.int32))
    return documents


def rates_of(dataset: Dataset) -> ShiftRates:
    return shift_rates((dataset[i] for i in range(len(dataset))), dataset.codec)


def test_rows_shifted_by_one_are_refused_with_the_three_rates(captured: Path, tmp_path: Path) -> None:
    fits = Dataset.open(str(captured))
    check_dataset(fits, VOCABULARY, "data")
    assert rates_of(fits).shifted() is None
    for shift in (-1, 1):
        folder = write_dataset(tmp_path / f"shifted{shift}", greedy_documents(), shift=shift)
        dataset = Dataset.open(folder)
        rates = rates_of(dataset)
        with refused(
            MismatchError, "dataset.train_dataset", f"{shift:+d}", *(f"{rates.rate(step):.1%}" for step in (-1, 0, 1))
        ):
            check_dataset(dataset, VOCABULARY, "dataset.train_dataset")
        assert rates.rate(shift) > 2 * rates.rate(0)
        assert rates.rate(shift) == pytest.approx(rates_of(fits).rate(0), abs=0.05)


def test_random_text_proves_no_shift(tmp_path: Path) -> None:
    dataset = Dataset.open(write_dataset(tmp_path / "data", random_documents(8)))
    rates = rates_of(dataset)
    check_dataset(dataset, VOCABULARY, "data")
    assert rates.positions > 90
    assert max(rates.rate(shift) for shift in (-1, 0, 1)) < 0.1, "nothing fits anywhere"
    assert rates.shifted() is None


def test_alignment_never_looks_across_packed_documents() -> None:
    def first_ids(rows: list[int]) -> bytes:
        ids = np.array([[i, *(j for j in range(8) if j != i)][:8] for i in rows], dtype=np.int64)
        return exact_codec().encode_document(SparseLogprobs(ids, np.full((len(rows), 8), -3.0, np.float32)))

    # Two documents of three tokens: only the middle position of each has both neighbours in its document.
    document = Document("id", np.arange(6, dtype=np.int32), first_ids([1, 2, 3, 4, 5, 0]), 6, None, np.array([3, 3]))
    rates = shift_rates([document], exact_codec())
    assert (rates.positions, rates.hits) == (2, {-1: 0, 0: 2, 1: 0})


def test_another_tokenizer_is_refused_with_both_fingerprints(captured: Path) -> None:
    dataset, other = Dataset.open(str(captured)), tiny_tokenizer(prefix="other")
    assert dataset.header.tokenizer is not None
    assert dataset.header.tokenizer["fingerprint"] == fingerprint(tiny_tokenizer())
    check_tokenizer(dataset, tiny_tokenizer(), "some/student", "dataset.train_dataset")
    both = dataset.header.tokenizer["fingerprint"], fingerprint(other)
    with refused(MismatchError, "dataset.train_dataset", "some/student", *both):
        check_tokenizer(dataset, other, "some/student", "dataset.train_dataset")


def test_a_head_that_is_too_small_is_refused_with_both_sizes(captured: Path, tmp_path: Path) -> None:
    dataset = Dataset.open(str(captured))
    check_dataset(dataset, 64, "data")
    with refused(MismatchError, "data", "64", "63"):
        check_dataset(dataset, 63, "data")

    # A teacher's head that is padded to 80 rows is no wider vocabulary: the tokenizer has 64 ids.
    rows = teacher_rows(tiny_model(7, vocabulary=80), np.arange(20, dtype=np.int32))
    header = header_for(exact_codec(80), tiny_tokenizer(), vocab_size=64, head_size=80)
    with ShardWriter(tmp_path / "padded", header) as writer:
        writer.write(np.arange(20, dtype=np.int32), rows)
    padded = Dataset.open(str(tmp_path / "padded"))
    check_tokenizer(padded, tiny_tokenizer(), "student", "data")
    check_dataset(padded, 70, "data")
    with refused(MismatchError, "data", "64", "63"):
        check_dataset(padded, 63, "data")

    # As many ids in a row as the teacher's padded head is wide.
    many = exact_codec(80, k=72)
    header = header_for(many, tiny_tokenizer(), vocab_size=64, head_size=80)
    with ShardWriter(tmp_path / "many", header) as writer:
        writer.write(np.arange(20, dtype=np.int32), teacher_rows(tiny_model(7, vocabulary=80), np.arange(20), k=72))
    with refused(MismatchError, "data", "72", "70"):
        check_dataset(Dataset.open(str(tmp_path / "many")), 70, "data")
    check_dataset(Dataset.open(str(tmp_path / "many")), 72, "data")


def test_a_capture_at_another_temperature_is_refused(tmp_path: Path) -> None:
    rows = teacher_rows(tiny_model(7), np.arange(20, dtype=np.int32))
    with ShardWriter(tmp_path / "data", header_for(exact_codec(), tiny_tokenizer(), temperature=2.0)) as writer:
        writer.write(np.arange(20, dtype=np.int32), rows)
    with refused(MismatchError, "data", "temperature", "2"):
        check_dataset(Dataset.open(str(tmp_path / "data")), VOCABULARY, "data")


def source(path: Path, split: str | None = None) -> DatasetSource:
    return DatasetSource(disk_path=str(path), split=split)


def teacher_section(**fields: Any) -> StoredTeacherConfig:
    return StoredTeacherConfig(kind="dataset", **fields)


def test_the_codec_comes_from_the_header_and_may_be_repeated(captured: Path) -> None:
    codec = open_dataset(source(captured), teacher_section(), "data").codec
    assert codec == exact_codec()
    assert isinstance(codec.config, DistributionQuantizationConfig)
    again = teacher_section(logprob_compressor=codec.config.model_dump(), vocab_size=VOCABULARY)
    assert open_dataset(source(captured), again, "data").codec == codec


def test_a_codec_that_disagrees_with_the_header_is_refused_with_both_values(captured: Path) -> None:
    fields = {**exact_codec().config.model_dump(), "k": 16, "exact_k": 16}
    with refused(MismatchError, "dataset.train_dataset", "k", "16", "8"):
        open_dataset(source(captured), teacher_section(logprob_compressor=fields), "dataset.train_dataset")
    legacy = {"vocab_size": 64, "k": 8, "exact_k": 8, "polynomial_degree": 0}
    with refused(MismatchError, "dataset.train_dataset", "legacy"):
        open_dataset(source(captured), teacher_section(legacy_logit_compression=legacy), "dataset.train_dataset")


def test_a_vocabulary_size_that_disagrees_is_refused_with_both_values(captured: Path) -> None:
    with refused(MismatchError, "teacher.vocab_size", "1,000", "64"):
        open_dataset(source(captured), teacher_section(vocab_size=1000), "dataset.train_dataset")


def test_published_datasets_take_the_codec_beside_them_or_from_the_configuration() -> None:
    golden = Path(__file__).parent / "golden"
    beside = open_dataset(source(golden / "upstream_v1"), teacher_section(), "data")
    assert (beside.kind, beside.codec.k, len(beside)) == ("published", 64, 8)
    assert isinstance(beside.codec, Codec)
    given = teacher_section(logprob_compressor=beside.codec.config.model_dump())
    assert open_dataset(source(golden / "upstream_v1"), given, "data").codec == beside.codec
    check_dataset(beside, 49152, "data")
    rates = shift_rates((beside[i] for i in range(len(beside))), beside.codec)
    assert rates.rate(0) > 2 * max(rates.rate(-1), rates.rate(1)), "real text and its real teacher"


def test_plain_topk_data_take_their_vocabulary_size_from_the_teacher_section(tmp_path: Path) -> None:
    """Columns `token_ids` and `top_values` do not say it; `teacher.vocab_size` does."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = np.log(np.tile([0.5, 0.3], (9, 1))).astype(np.float32)
    columns = {
        "input_ids": pa.array([list(range(10))]),
        "token_ids": pa.array([np.tile([3, 4], (9, 1)).tolist()]),
        "top_values": pa.array([values.tolist()], pa.list_(pa.list_(pa.float32()))),
    }
    pq.write_table(pa.table(columns), tmp_path / "data_0.parquet")
    source = DatasetSource(disk_path=str(tmp_path))
    dataset = open_dataset(source, StoredTeacherConfig(kind="dataset", vocab_size=64), "dataset.train_dataset")
    np.testing.assert_array_equal(dataset.codec.decode_document(dataset[0].teacher, 9).logprobs, values)
    with refused(ConfigError, "vocab_size"):
        open_dataset(source, StoredTeacherConfig(kind="dataset"), "dataset.train_dataset")

"""Published datasets are read as they are, and converted without loss."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distillkit.codec import Codec
from distillkit.errors import ConfigError, CorruptDataError, InputError, MismatchError
from distillkit.shards import Dataset, convert, verify_dataset
from distillkit.types import SparseLogprobs
from support.refusals import refused
from support.shards import make_documents, write

GOLDEN = Path(__file__).parent / "golden"
PUBLISHED = ["upstream_v1", "upstream_legacy"]


def check_against_recording(dataset: Dataset, name: str) -> None:
    with np.load(GOLDEN / f"{name}_expected.npz") as recorded:
        ids, logprobs, lengths = recorded["ids"], recorded["logprobs"], recorded["lengths"]
    assert [len(document.input_ids) for document in dataset] == lengths.tolist()
    rows = [dataset.codec.decode_document(document.teacher, document.num_rows) for document in dataset]
    np.testing.assert_array_equal(np.concatenate([part.ids for part in rows]), ids)
    np.testing.assert_allclose(np.concatenate([part.logprobs for part in rows]), logprobs, atol=1e-4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_datasets_are_read_and_converted(name: str, tmp_path: Path) -> None:
    source = Dataset.open(GOLDEN / name)
    assert source.kind == "published"
    assert source.header.alignment["rows"] == "L-1"
    check_against_recording(source, name)
    manifest = convert(source, tmp_path / "shards", shard_tokens=500, teacher={"name": "t"})
    assert len(manifest.shards) == 2
    converted = Dataset.open(tmp_path / "shards")
    check_against_recording(converted, name)
    assert converted.header.fidelity is None
    assert converted.header.teacher == {"name": "t"}
    assert [d.teacher for d in converted] == [d.teacher for d in source]
    assert verify_dataset(tmp_path / "shards").ok
    with refused(InputError, str(tmp_path / "shards")):
        convert(source, tmp_path / "shards")


@pytest.mark.parametrize("splits", [False, True])
def test_save_to_disk_folders(splits: bool, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    files = [str(path) for path in sorted((GOLDEN / "upstream_v1").glob("*.parquet"))]
    loaded = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path / "cache"))
    config = GOLDEN / "upstream_v1" / "compression_config.yaml"
    folder = tmp_path / "saved"
    if splits:
        datasets.DatasetDict({"train": loaded, "test": loaded.select([1, 2]).flatten_indices()}).save_to_disk(folder)
        with refused(InputError, "train", "test"):
            Dataset.open(folder, config=config)
        assert len(Dataset.open(folder, config=config, split="test")) == 2
        check_against_recording(Dataset.open(folder, config=config, split="train"), "upstream_v1")
    else:
        loaded.save_to_disk(folder, num_shards=3)
        check_against_recording(Dataset.open(folder, config=config), "upstream_v1")


def packed(tmp_path: Path, mask: list[int] | pa.Array, cut: int = 1) -> Path:
    """A published row of several documents, `cut` tokens shorter than it was: as many rows as tokens."""
    folder = tmp_path / "packed"
    folder.mkdir()
    shutil.copy(GOLDEN / "upstream_v1" / "compression_config.yaml", folder)
    table = pq.read_table(GOLDEN / "upstream_v1" / "data_0.parquet").slice(0, 1)
    tokens = table.column("input_ids")[0].as_py()[: 160 - cut]
    columns = {name: table.column(name) for name in ("compressed_logprobs", "bytepacked_indices")}
    columns["input_ids"] = pa.array([tokens], pa.list_(pa.uint64()))
    columns["attention_mask"] = pa.array([mask], pa.list_(pa.int64())) if isinstance(mask, list) else mask
    pq.write_table(pa.table(columns), folder / "data_0.parquet")
    return folder


def test_packed_rows_with_numbered_masks(tmp_path: Path) -> None:
    dataset = Dataset.open(packed(tmp_path, [1] * 50 + [2] * 60 + [3] * 40 + [0] * 9))
    assert dataset.header.alignment["rows"] == "L"
    document = dataset[0]
    assert document.segment_lengths is not None
    assert document.segment_lengths.tolist() == [50, 60, 40]
    assert (len(document.input_ids), document.num_rows) == (150, 150)
    convert(dataset, tmp_path / "shards")
    again = Dataset.open(tmp_path / "shards")
    assert again.header.alignment["rows"] == "L"
    assert again[0].doc_id == document.doc_id
    assert again[0].teacher == document.teacher


@pytest.mark.parametrize("value", [-1, 0.5, float("nan"), float("inf")])
def test_masks_that_number_no_documents_are_refused(value: float, tmp_path: Path) -> None:
    with refused(CorruptDataError, "data_0.parquet, document 0", "attention_mask"):
        list(Dataset.open(packed(tmp_path, pa.array([[1.0] * 50 + [value] * 109]))))


def test_masks_may_be_of_any_kind_of_numbers(tmp_path: Path) -> None:
    for number, mask in enumerate(([True] * 100 + [False] * 59, [1.0] * 100 + [0.0] * 59)):
        (tmp_path / str(number)).mkdir()
        dataset = Dataset.open(packed(tmp_path / str(number), pa.array([mask])))
        assert (dataset.num_tokens, dataset[0].segment_lengths) == (100, None)


def test_padding_in_the_middle_is_refused(tmp_path: Path) -> None:
    with refused(CorruptDataError, "data_0.parquet, document 0", "attention_mask"):
        list(Dataset.open(packed(tmp_path, [1] * 50 + [0] * 60 + [1] * 49)))


@pytest.mark.parametrize(
    ("column", "value", "facts"),
    [
        ("input_ids", pa.array([[2**32 + 5] * 160], pa.list_(pa.uint64())), ["input_ids", str(2**32 + 5)]),
        ("input_ids", pa.array([[1.5] * 160]), ["input_ids", "float64"]),
        ("input_ids", pa.array([[1, None] * 80]), ["input_ids"]),
        ("compressed_logprobs", pa.array([[[256] * 56] * 159]), ["compressed_logprobs", "255"]),
        (
            "compressed_logprobs",
            pa.array([[[1] * 56] * 150], pa.list_(pa.list_(pa.uint8()))),
            ["150 rows", "160 tokens"],
        ),
        ("compressed_logprobs", pa.array([[[1] * 56] * 158 + [[1]]]), ["1", "56"]),
    ],
)
def test_values_that_do_not_fit_are_refused(column: str, value: Any, facts: list[str], tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "upstream_v1" / "compression_config.yaml", tmp_path)
    table = pq.read_table(GOLDEN / "upstream_v1" / "data_0.parquet").slice(0, 1)
    columns = {name: table.column(name) for name in ("input_ids", "compressed_logprobs", "bytepacked_indices")}
    pq.write_table(pa.table({**columns, column: value}), tmp_path / "data_0.parquet")
    with refused(CorruptDataError, "data_0.parquet, document 0", *facts):
        list(Dataset.open(tmp_path))


@pytest.mark.parametrize("kind", [pa.list_(pa.binary()), pa.binary()])
def test_columns_of_another_kind_are_refused(kind: pa.DataType, tmp_path: Path) -> None:
    value = [[b"ab"]] if pa.types.is_list(kind) else [b"ab"]
    columns = {"input_ids": pa.array([[1, 2]]), "compressed_logprobs": pa.array(value, kind)}
    pq.write_table(
        pa.table({**columns, "bytepacked_indices": columns["compressed_logprobs"]}), tmp_path / "data_0.parquet"
    )
    with refused(InputError, "data_0.parquet", "compressed_logprobs"):
        Dataset.open(tmp_path)


def test_plain_topk(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    ids = np.stack([generator.choice(500, 4, replace=False) for _ in range(9)])
    values = np.sort(np.log(generator.dirichlet(np.ones(5), 9)[:, :4]).astype(np.float32))[:, ::-1]
    columns = {
        "input_ids": pa.array([generator.integers(0, 500, 10).tolist()]),
        "token_ids": pa.array([ids.tolist()]),
        "top_values": pa.array([values.tolist()], pa.list_(pa.list_(pa.float32()))),
    }
    pq.write_table(pa.table(columns), tmp_path / "data_0.parquet")
    with refused(ConfigError, "vocab_size"):
        Dataset.open(tmp_path)
    dataset = Dataset.open(tmp_path, vocab_size=500)
    assert Dataset.open(tmp_path, config={"d": 500}).codec == dataset.codec
    rows = dataset.codec.decode_document(dataset[0].teacher, 9)
    np.testing.assert_array_equal(rows.ids, ids)
    np.testing.assert_array_equal(rows.logprobs, values)
    convert(dataset, tmp_path / "shards")
    assert Dataset.open(tmp_path / "shards")[0].teacher == dataset[0].teacher


@pytest.mark.parametrize("signed", [False, True])
def test_legacy_words_that_use_all_their_bits(signed: bool, tmp_path: Path) -> None:
    """Four 16-bit ids fill a word: a signed column then holds negative numbers."""
    codec = Codec({"vocab_size": 50_257, "k": 4, "exact_k": 4, "polynomial_degree": 0})
    rows = SparseLogprobs(
        np.array([[50_256, 40_000, 33_000, 65], [1, 2, 3, 50_000]]),
        np.log(np.array([[0.4, 0.3, 0.2, 0.05]] * 2, np.float32)),
    )
    columns = codec.to_published(codec.document_rows(codec.encode_document(rows), 2))
    words = columns["packed_indices"].view(np.int64) if signed else columns["packed_indices"]
    assert not signed or (words < 0).any()
    arrays = {
        "input_ids": pa.array([[1, 2, 3]]),
        "packed_indices": pa.array([words.tolist()], pa.list_(pa.list_(pa.int64() if signed else pa.uint64()))),
        "exact_values": pa.array([columns["exact_values"].tolist()], pa.list_(pa.list_(pa.float32()))),
        "coeffs": pa.array([columns["coeffs"].tolist()], pa.list_(pa.list_(pa.float32()))),
    }
    pq.write_table(pa.table(arrays), tmp_path / "data_0.parquet")
    dataset = Dataset.open(tmp_path, config=codec.config)
    np.testing.assert_array_equal(codec.decode_document(dataset[0].teacher, 2).ids, rows.ids)


def test_a_wrong_configuration_is_refused(tmp_path: Path) -> None:
    config = Dataset.open(GOLDEN / "upstream_v1").codec.config.model_dump()
    with refused(MismatchError, "quantized", "legacy"):
        Dataset.open(GOLDEN / "upstream_v1", config=GOLDEN / "upstream_legacy" / "compression_config.yaml")
    with refused(MismatchError, "compression_config.yaml", "exact_k", "16", "17"):
        Dataset.open(GOLDEN / "upstream_v1", config={**config, "exact_k": 17})
    with refused(ConfigError, str(tmp_path / "none.yaml")):
        Dataset.open(GOLDEN / "upstream_v1", config=tmp_path / "none.yaml")
    shutil.copy(GOLDEN / "upstream_v1" / "data_0.parquet", tmp_path)
    with refused(ConfigError, str(tmp_path), "compression_config.yaml"):
        Dataset.open(tmp_path)
    with refused(ConfigError, "quantized", "legacy"):
        Dataset.open(tmp_path, config=GOLDEN / "upstream_legacy" / "compression_config.yaml")
    with refused(CorruptDataError, "data_0.parquet, document 0", "56", "58"):
        list(Dataset.open(tmp_path, config={**config, "exact_k": 17}))
    with refused(CorruptDataError, "data_0.parquet, document 1", "33000"):
        list(Dataset.open(tmp_path, config={**config, "d": 33_000}))


def test_other_files_are_refused_with_what_was_found(tmp_path: Path) -> None:
    pq.write_table(pa.table({"value": ["a"]}), tmp_path / "data_0.parquet")
    with refused(InputError, "data_0.parquet", "value", "input_ids", "compressed_logprobs"):
        Dataset.open(tmp_path)
    (tmp_path / "empty").mkdir()
    with refused(InputError, str(tmp_path / "empty")):
        Dataset.open(tmp_path / "empty")


def test_resumed_conversion_of_something_else_is_refused(tmp_path: Path) -> None:
    def interrupted(tokens: int) -> Any:
        raise KeyboardInterrupt

    source = Dataset.open(GOLDEN / "upstream_v1")
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "shards", shard_tokens=100, progress=interrupted)
    with refused(MismatchError, "teacher"):
        convert(source, tmp_path / "shards", shard_tokens=100, teacher={"name": "another"})
    convert(source, tmp_path / "shards", shard_tokens=100)
    check_against_recording(Dataset.open(tmp_path / "shards"), "upstream_v1")


def test_a_conversion_is_not_resumed_with_other_documents(tmp_path: Path) -> None:
    """Of the same codec, tokenizer and teacher: only the documents tell."""

    def interrupted(tokens: int) -> Any:
        seen.append(tokens)
        if len(seen) == 4:
            raise KeyboardInterrupt

    seen, documents = list[int](), make_documents(6)
    write(tmp_path / "one", documents)
    write(tmp_path / "other", [documents[0], *make_documents(5, seed=5)])
    with pytest.raises(KeyboardInterrupt):
        convert(Dataset.open(tmp_path / "one"), tmp_path / "out", shard_tokens=1, progress=interrupted)
    with refused(MismatchError, str(tmp_path / "out"), str(tmp_path / "other"), "document 1"):
        convert(Dataset.open(tmp_path / "other"), tmp_path / "out", shard_tokens=1)
    # The same tokens and rows, of which others count; or only the first ones.
    masked = [(ids, rows, {**extra, "loss_mask": np.zeros(len(ids), bool)}) for ids, rows, extra in documents]
    write(tmp_path / "masked", masked)
    known = [(ids, rows, {**extra, "label_logprobs": np.full(len(ids) - 1, -1.0)}) for ids, rows, extra in documents]
    write(tmp_path / "known", known)
    write(tmp_path / "fewer", documents[:2])
    for changed, fact in (("masked", "document 0"), ("known", "document 0"), ("fewer", "2")):
        with refused(MismatchError, str(tmp_path / "out"), str(tmp_path / changed), fact):
            convert(Dataset.open(tmp_path / changed), tmp_path / "out", shard_tokens=1)
        assert not (tmp_path / "out" / "manifest.json").exists()
    manifest = convert(Dataset.open(tmp_path / "one"), tmp_path / "out", shard_tokens=1)
    assert [shard.documents for shard in manifest.shards] == [1] * 6
    assert [d.doc_id for d in Dataset.open(tmp_path / "out")] == [d.doc_id for d in Dataset.open(tmp_path / "one")]

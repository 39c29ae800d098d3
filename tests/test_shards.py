"""Shards: what is written is read back, and nothing damaged is read as if it were whole."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from distillkit.errors import (
    CorruptDataError,
    DistillKitError,
    InputError,
    MismatchError,
    TruncatedDataError,
    UnsupportedVersionError,
)
from distillkit.shards import Dataset, Header, ShardWriter, read_manifest, verify_dataset, whole_shards
from distillkit.shards.lock import FolderLock
from distillkit.shards.storage import Folder
from distillkit.shards.table import SCHEMA, GroupDigest
from distillkit.shards.writer import NewShard, is_dataset_file, make_document
from distillkit.types import SparseLogprobs
from support import reference
from support.refusals import check_names, refused
from support.shards import CODEC, HEADER, VOCAB, Written, files, make_documents, write


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Written]:
    folder, documents = tmp_path_factory.mktemp("captured"), make_documents(12)
    write(folder, documents)
    return folder, documents


@pytest.fixture
def folder(written: tuple[Path, Written], tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(written[0], tmp_path / "copy"))


def test_documents_come_back(written: tuple[Path, Written]) -> None:
    folder, documents = written
    dataset = Dataset.open(folder)
    assert len(dataset) == 12
    assert len(dataset.shards) > 2
    assert dataset.num_tokens == sum(len(ids) for ids, _, _ in documents)
    assert dataset.num_rows == dataset.num_tokens - 12
    for index in np.random.default_rng(1).permutation(12):
        ids, rows, extra = documents[index]
        document = dataset[int(index)]
        np.testing.assert_array_equal(document.input_ids, ids)
        decoded = dataset.codec.decode_document(document.teacher, document.num_rows)
        np.testing.assert_array_equal(decoded.ids, rows.ids)
        for name in ("loss_mask", "segment_lengths"):
            found = getattr(document, name)
            assert (found is None) == (name not in extra)
            np.testing.assert_array_equal(found if found is not None else [], extra.get(name, []))
    assert [document.doc_id for document in dataset] == [dataset[i].doc_id for i in range(12)]
    assert dataset[-1].doc_id == dataset[11].doc_id
    with pytest.raises(IndexError):
        dataset[12]


def test_fidelity_is_measured_while_writing(written: tuple[Path, Written]) -> None:
    folder, documents = written
    dataset = Dataset.open(folder)
    kl = np.concatenate(
        [
            reference.kl_with_missing(
                rows.logprobs, dataset.codec.decode_document(document.teacher, document.num_rows).logprobs
            )
            for (_, rows, _), document in zip(documents, dataset, strict=True)
        ]
    )
    recorded = dataset.header.fidelity
    assert recorded is not None
    assert recorded["rows"] == len(kl)
    np.testing.assert_allclose([recorded["kl_mean"], recorded["kl_max"]], [kl.mean(), kl.max()], rtol=1e-9)
    assert np.quantile(kl, 0.99, method="lower") <= recorded["kl_p99"] <= kl.max()


def test_any_parquet_tool_reads_them(written: tuple[Path, Written]) -> None:
    datasets = pytest.importorskip("datasets")
    folder, documents = written
    paths = sorted(str(path) for path in folder.glob("*.parquet"))
    assert pq.read_table(paths[0]).column("doc_id")[0].as_py() == Dataset.open(folder)[0].doc_id
    loaded = datasets.load_dataset("parquet", data_files=paths, split="train", cache_dir=str(folder.parent / "cache"))
    assert loaded[3]["input_ids"] == documents[3][0].tolist()
    assert loaded[3]["teacher"] == Dataset.open(folder)[3].teacher


def test_equal_input_gives_equal_files(written: tuple[Path, Written], tmp_path: Path) -> None:
    write(tmp_path / "again", written[1])
    assert files(tmp_path / "again") == files(written[0])


def test_one_shard_and_urls_open_too(written: tuple[Path, Written]) -> None:
    folder, _ = written
    shard = Dataset.open(folder / "data-00001.parquet")
    assert shard.kind == "distillkit"
    assert shard.num_rows == shard.num_tokens - len(shard)
    assert len(Dataset.open(f"file://{folder}")) == 12
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, data in files(folder).items():
        memory.pipe_file(f"/captured/{name}", data)
    assert [document.doc_id for document in Dataset.open("memory://captured")] == [
        d.doc_id for d in Dataset.open(folder)
    ]


def _doc_id(job: tuple[Dataset, int]) -> str:
    return job[0][job[1]].doc_id


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_too(written: tuple[Path, Written], method: str) -> None:
    dataset = Dataset.open(written[0])
    expected = [document.doc_id for document in dataset]
    assert pickle.loads(pickle.dumps(dataset))[5].doc_id == expected[5]
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.map_async(_doc_id, [(dataset, i) for i in range(12)]).get(timeout=120) == expected


# -- many documents at once --------------------------------------------------------------------------------------------


def assert_read_alike(dataset: Dataset, documents: Written) -> None:
    """By index, in order, in blocks, decoded, and decoded by torch: the same documents and rows."""
    one_by_one = [dataset[i] for i in range(len(dataset))]
    expected = [dataset.codec.decode_document(document.teacher, document.num_rows) for document in one_by_one]
    assert len(one_by_one) == len(documents)
    read, seen = [*dataset.decoded()], 0
    for block in dataset.blocks():
        rows = block.decode()
        tensor = block.tensor()
        assert tensor.data_ptr() == block.rows.ctypes.data
        np.testing.assert_array_equal(dataset.codec.decode_torch(tensor)[1].numpy(), rows.logprobs)
        for document, end in zip(block.documents, block.ends, strict=True):
            assert bytes(document.teacher) == one_by_one[seen].teacher
            np.testing.assert_array_equal(rows.ids[end - document.num_rows : end], expected[seen].ids)
            seen += 1
    assert seen == len(documents)
    for (ids, original, extra), document, other, (decoded, rows), wanted in zip(
        documents, one_by_one, dataset, read, expected, strict=True
    ):
        assert isinstance(document.teacher, bytes)
        assert document.teacher == other.teacher == bytes(decoded.teacher)
        np.testing.assert_array_equal(rows.ids, original.ids)
        np.testing.assert_array_equal(rows.logprobs, wanted.logprobs)
        for found in (document, other, decoded):
            np.testing.assert_array_equal(found.input_ids, ids)
            for name in ("loss_mask", "segment_lengths"):
                np.testing.assert_array_equal(getattr(found, name), extra.get(name))


def stored_otherwise(path: Path, **options: Any) -> None:
    """Writes a shard as another writer might: same columns, groups and metadata."""
    with pq.ParquetFile(path) as parquet:
        groups = [parquet.read_row_group(i) for i in range(parquet.num_row_groups)]
        metadata = parquet.metadata.metadata
    with pq.ParquetWriter(path, groups[0].schema, **options) as writer:
        for group in groups:
            writer.write_table(group)
        writer.add_key_value_metadata({key: value for key, value in metadata.items() if key != b"ARROW:schema"})


@pytest.mark.parametrize(
    "options",
    [
        None,
        {"compression": "zstd"},
        {"compression": "none", "use_dictionary": True},
        {"compression": "none", "use_dictionary": False, "data_page_size": 100, "write_batch_size": 1},
        {"compression": "none", "use_dictionary": False, "data_page_version": "2.0"},
        {"compression": "none", "use_dictionary": False, "column_encoding": {"teacher": "DELTA_LENGTH_BYTE_ARRAY"}},
    ],
)
def test_every_way_of_reading_gives_the_same(
    options: dict[str, Any] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several row groups a shard, some of a single document, and pages as other writers make them."""
    monkeypatch.setattr("distillkit.shards.writer._ROW_GROUP_BYTES", 500)
    monkeypatch.setattr("distillkit.shards.reader._GROUPS_AT_A_TIME", 3)
    documents = make_documents(40)
    ids, rows, _ = documents[7]
    documents[7] = (ids[:1], SparseLogprobs(rows.ids[:0], rows.logprobs[:0]), {})
    write(tmp_path / "data", documents, shard_tokens=10**9)
    path = tmp_path / "data" / "data-00000.parquet"
    if options is not None:
        stored_otherwise(path, **options)
    dataset = Dataset.open(path)
    assert len(dataset.files[0].groups) > 7
    assert_read_alike(dataset, documents)
    import fsspec

    fsspec.filesystem("memory").pipe_file("/alone/data-00000.parquet", path.read_bytes())
    assert_read_alike(Dataset.open("memory://alone/data-00000.parquet"), documents)


def test_published_datasets_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillkit.shards.published._BLOCK_ROWS", 300)
    dataset = Dataset.open(Path(__file__).parent / "golden" / "upstream_v1")
    assert len(list(dataset.blocks())) > 1
    rows = [dataset.codec.decode_document(document.teacher, document.num_rows) for document in dataset]
    extra = [{"loss_mask": d.loss_mask, "segment_lengths": d.segment_lengths} for d in dataset]
    assert_read_alike(dataset, [(d.input_ids, r, e) for d, r, e in zip(dataset, rows, extra, strict=True)])


def test_damage_is_noticed_in_blocks(folder: Path) -> None:
    path = folder / "data-00001.parquet"
    teacher = Dataset.open(path)[1].teacher
    data = path.read_bytes()
    assert data.count(teacher) == 1
    at = data.index(teacher)
    for position in (at - 4, at, at + len(teacher) - 1):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        for read in (Dataset.blocks, Dataset.decoded, Dataset.__iter__):
            with pytest.raises(CorruptDataError, match=r"data-00001\.parquet"):
                list(read(Dataset.open(folder)))
    path.write_bytes(data)
    dataset = Dataset.open(folder)
    path.write_bytes(data[:at])  # cut off only after it was opened
    with pytest.raises(CorruptDataError, match=r"data-00001\.parquet"):
        list(dataset.blocks())


def test_rows_that_do_not_decode_name_their_documents(tmp_path: Path) -> None:
    ids, rows, _ = make_documents(1)[0]
    bad = np.full((len(ids) - 1, CODEC.bytes_per_token), 0xFF, np.uint8)
    with ShardWriter(tmp_path / "bad", HEADER) as writer:
        writer.write(ids, rows)
        writer.write(ids, bad.tobytes())
    with pytest.raises(CorruptDataError, match=r"data-00000.parquet, documents 0 to 1: row \d+: "):
        list(Dataset.open(tmp_path / "bad").decoded())


# -- interruption ------------------------------------------------------------------------------------------------------


def test_an_exception_leaves_whole_shards_and_nothing_else(written: tuple[Path, Written], tmp_path: Path) -> None:
    folder, documents = tmp_path / "interrupted", written[1]

    def interrupted() -> None:
        with ShardWriter(folder, HEADER, shard_tokens=60) as writer:
            for ids, rows, extra in documents[:9]:
                writer.write(ids, rows, **extra)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    complete = files(written[0])
    assert files(folder).keys() < complete.keys()
    assert all(complete[name] == data for name, data in files(folder).items())
    with refused(InputError, str(folder), "manifest.json"):
        Dataset.open(folder)
    with refused(InputError, str(folder), f"{len(files(folder))} shards"):
        ShardWriter(folder, HEADER)
    (folder / ".incomplete-data-00099.parquet").write_bytes(b"what a killed process leaves")
    write(folder, documents, resume=True)
    assert files(folder) == complete
    with refused(InputError, str(folder)):
        ShardWriter(folder, HEADER, resume=True)


def test_the_manifest_comes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is stopped before the end leaves none: with it, shards that are not there yet would be lost."""
    named, rename = list[str](), os.replace

    def recorded(source: Path, target: Path) -> None:
        named.append(Path(target).name)
        rename(source, target)

    monkeypatch.setattr("os.replace", recorded)
    write(tmp_path / "data", make_documents(12))
    assert len(named) > 2
    assert named == [*sorted(files(tmp_path / "data").keys() - {"manifest.json"}), "manifest.json"]


def test_resuming_something_else_is_refused(written: tuple[Path, Written], folder: Path) -> None:
    (folder / "manifest.json").unlink()
    other = replace(HEADER, capture={"seed": 43})
    with refused(MismatchError, "data-00000.parquet", "capture.seed", "42", "43"):
        ShardWriter(folder, other, resume=True)
    path = folder / "data-00001.parquet"
    data, teacher = path.read_bytes(), Dataset.open(path)[0].teacher
    path.write_bytes(data.replace(teacher, bytes([teacher[0] ^ 1]) + teacher[1:]))
    with refused(CorruptDataError, "data-00001.parquet"):
        ShardWriter(folder, HEADER, resume=True)
    path.unlink()
    with refused(CorruptDataError, "data-00001.parquet", "data-00002.parquet"):
        whole_shards(folder)


def test_a_full_disk_says_so_and_keeps_whole_shards(written: tuple[Path, Written], tmp_path: Path) -> None:
    """The limit on file sizes stands in for a full disk: writes fail in the middle of the second shard."""
    script = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from support import shards as t
documents = t.make_documents(12)
writer = t.ShardWriter({str(tmp_path / "full")!r}, t.HEADER, shard_tokens=60)
for ids, rows, extra in documents[:4]:
    writer.write(ids, rows, **extra)
writer.finish_shard()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    for ids, rows, extra in documents[4:]:
        writer.write(ids, rows, **extra)
except OSError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "File too large" in run.stdout
    assert "data-0000" in run.stdout
    names = [path.name for path in (tmp_path / "full").iterdir()]
    assert names
    assert all(name.startswith("data-") for name in names)


def test_a_writer_that_failed_writes_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are lost with the shard that could not be written: a manifest over the rest would hide that."""
    documents = make_documents(4)
    writer = ShardWriter(tmp_path / "failing", HEADER, shard_tokens=10**9)
    for ids, rows, extra in documents[:2]:
        writer.write(ids, rows, **extra)

    def no_room(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_room)
        with pytest.raises(OSError, match=r"No space left on device.*data-00000\.parquet"):
            writer.finish_shard()
    for action in (writer.finish_shard, writer.close, lambda: writer.write(*documents[2][:2])):
        with refused(InputError, "failing", "resume=True"):
            action()
    assert list((tmp_path / "failing").iterdir()) == []


def test_more_shards_than_open_files(tmp_path: Path) -> None:
    script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from distillkit.shards import Dataset
from support import shards as t
t.write({str(tmp_path / "many")!r}, t.make_documents(60), shard_tokens=1)
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
dataset = Dataset.open({str(tmp_path / "many")!r})
print(len(dataset.shards), len(list(dataset)))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["60", "60"]


def test_masks_of_numbers_and_bytes_of_any_kind_are_taken(tmp_path: Path) -> None:
    ids, rows, _ = make_documents(1)[0]
    with ShardWriter(tmp_path / "kinds", HEADER) as writer:
        writer.write(ids, bytearray(CODEC.encode_document(rows)), loss_mask=np.ones(len(ids), int))
    document = Dataset.open(tmp_path / "kinds")[0]
    assert document.loss_mask is not None
    assert document.loss_mask.all()
    with ShardWriter(tmp_path / "bad", HEADER) as writer:
        with refused(InputError, "loss_mask", "bool", "int64"):
            writer.write(ids, rows, loss_mask=np.full(len(ids), 2))
        writer.write(ids, rows)


IDS, ROWS, _ = make_documents(1)[0]


@pytest.mark.parametrize(
    ("ids", "rows", "facts"),
    [
        (IDS[:-1], ROWS, [f"{len(IDS) - 1} tokens", f"{len(IDS) - 2} rows", "L-1", str(len(IDS) - 1)]),
        (IDS + VOCAB, ROWS, [str(IDS.max() + VOCAB), str(VOCAB)]),
        (IDS + 2**32, ROWS, ["input_ids", str(IDS.max() + 2**32)]),
        (IDS + 0.5, ROWS, ["input_ids", "float64"]),
        (IDS, SparseLogprobs(ROWS.ids, ROWS.logprobs * np.float32(np.nan)), ["row 0", "NaN"]),
        (IDS, SparseLogprobs(ROWS.ids + VOCAB, ROWS.logprobs), ["row 0", str(VOCAB)]),
        (IDS, CODEC.encode_document(ROWS)[:-1], [str((len(IDS) - 1) * CODEC.bytes_per_token)]),
    ],
    ids=["a row more", "an id too large", "an id beyond 32 bits", "floats", "NaN", "a teacher's id", "a byte less"],
)
def test_bad_documents_are_refused(ids: Any, rows: Any, facts: list[str], tmp_path: Path) -> None:
    with refused(InputError, *facts), ShardWriter(tmp_path / "bad", HEADER) as writer:
        writer.write(ids, rows)
    assert list((tmp_path / "bad").iterdir()) == []


# -- damage ------------------------------------------------------------------------------------------------------------


def save_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with a hash that fits, as a forger would."""
    rest = {key: value for key, value in manifest.items() if key != "xxh3"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = xxhash.xxh3_128_hexdigest(text.encode(errors="surrogatepass"))
    (folder / "manifest.json").write_text(json.dumps({**rest, "xxh3": digest}))


def save_metadata(shard: Path, table: pa.Table, metadata: dict[bytes, bytes], key: bytes, text: bytes) -> None:
    """Write a shard again with other metadata under a key, and a hash that fits."""
    kept = {name: value for name, value in metadata.items() if name != b"ARROW:schema"}
    forged = {key: text, key + b".xxh3": xxhash.xxh3_128_hexdigest(text).encode()}
    with pq.ParquetWriter(shard, table.schema.remove_metadata()) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({**kept, **forged})


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def test_forged_manifests_are_refused(folder: Path, subtests: pytest.Subtests) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    first, header = manifest["shards"][0], manifest["header"]
    save_manifest(folder, manifest)
    Dataset.open(folder)

    def with_first(**fields: Any) -> dict[str, Any]:
        return {"shards": [{**first, **fields}, *manifest["shards"][1:]]}

    forged: list[tuple[dict[str, Any], list[str]]] = [
        (with_first(file=7), ["shards[0]", "file"]),
        (with_first(file="../data-00000.parquet"), ["shards[0]", "../data-00000.parquet"]),
        (with_first(rows=None), ["shards[0]", "rows"]),
        (with_first(bytes=True), ["shards[0]", "bytes"]),
        (with_first(tokens=-1), ["shards[0]", "tokens", "-1"]),
        (with_first(documents=1.0), ["shards[0]", "documents"]),
        (with_first(color="red"), ["shards[0]", "color"]),
        ({"shards": [first["file"]]}, ["shards[0]"]),
        ({"shards": {"0": first}}, ["shards"]),
        ({"shards": [first, *manifest["shards"]]}, []),
        ({"capture": [1]}, ["capture"]),
        ({"capture": nested(200)}, []),
        ({"capture": {"mass": float("nan")}}, ["NaN"]),
        ({"capture": {"mass": float("inf")}}, ["Infinity"]),
        ({"capture": {"name": "\ud800"}}, []),
        ({"version": True}, ["version"]),
        ({"version": 0}, ["version", "0"]),
        ({"header": {**header, "tokenizer": {"name": "tiny"}}}, ["tokenizer", "fingerprint"]),
        ({"header": {**header, "teacher": {"name": 7}}}, ["teacher"]),
        ({"header": {**header, "fidelity": {"rows": 3}}}, ["fidelity"]),
        ({"capture": {"passed_over": {"rows": "3"}}}, ["capture"]),
        ({"header": None}, []),
    ]
    for change, facts in forged:
        with subtests.test(**{key: repr(value)[:80] for key, value in change.items()}):
            save_manifest(folder, {**manifest, **change})
            with refused(CorruptDataError, "manifest.json", *facts):
                Dataset.open(folder)


ODD_VALUES = [None, True, -1, 1.5, 10**30, "../x", [], {}, [[1]]]


def changed_somewhere(value: Any) -> Iterator[Any]:
    """JSON with one part of it, however deep, replaced by something else or left out."""
    yield from ODD_VALUES
    parts: Any = ()
    if isinstance(value, dict):
        parts = value
        yield from ({key: rest for key, rest in value.items() if key != left_out} for left_out in value)
    elif isinstance(value, list):
        parts = range(min(len(value), 2))
    for key in parts:
        for other in changed_somewhere(value[key]):
            copied = value.copy()
            copied[key] = other
            yield copied


@pytest.mark.slow
def test_no_field_of_ours_gives_a_raw_error(folder: Path) -> None:
    """Each field of manifest, header and groups, changed under a hash that fits."""

    def read(path: Path) -> None:
        with contextlib.suppress(DistillKitError):
            dataset = Dataset.open(path)
            assert len([*dataset.decoded()]) == len(dataset)

    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["xxh3"]
    for forged in changed_somewhere(manifest):
        if isinstance(forged, dict):
            save_manifest(folder, forged)
            read(folder)
    shard = folder / "data-00000.parquet"
    table, metadata = pq.read_table(shard), pq.ParquetFile(shard).metadata.metadata
    for key in (b"distillkit.header", b"distillkit.groups"):
        for forged in changed_somewhere(json.loads(metadata[key])):
            save_metadata(shard, table, metadata, key, json.dumps(forged).encode())
            read(shard)


UNREADABLE = [
    b"",
    b"{",
    b"\xff\xfe{\x00}\x00",
    b"[" * 100_000,
    b'{"format":' + b"[" * 100 + b"]" * 100 + b"}",
    b'{"format": 1e999}',
    b'{"format": NaN}',
    b'{"format": "\\ud800"}',
    b'{"format": ' + b"9" * 5000 + b"}",
]


@pytest.mark.parametrize("key", ["distillkit.header", "distillkit.groups"])
def test_json_that_is_none_is_refused_everywhere(folder: Path, key: str, subtests: pytest.Subtests) -> None:
    """In the manifest and, under a hash that fits, in a shard's metadata."""
    shard, manifest = folder / "data-00000.parquet", folder / "manifest.json"
    table, metadata = pq.read_table(shard), pq.ParquetFile(shard).metadata.metadata
    for data in UNREADABLE:
        with subtests.test(data=data[:40]):
            manifest.write_bytes(data)
            with refused(CorruptDataError, str(manifest)):
                Dataset.open(folder)
            save_metadata(shard, table, metadata, key.encode(), data)
            with refused(CorruptDataError, str(shard), key):
                Dataset.open(shard)


def test_what_is_no_regular_file_is_not_read(folder: Path, subtests: pytest.Subtests) -> None:
    """Reading a pipe would wait for ever, and a device would fill the memory."""
    kinds: dict[str, Callable[[Path], None]] = {
        "pipe": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "folder": os.mkdir,
    }
    for name in ("manifest.json", "data-00000.parquet"):
        for kind, make in kinds.items():
            with subtests.test(name=name, kind=kind):
                (folder / name).rename(folder / "aside")
                make(folder / name)
                with refused(DistillKitError, name):
                    Dataset.open(folder)
                (folder / name).rmdir() if kind == "folder" else (folder / name).unlink()
                (folder / "aside").rename(folder / name)
    assert verify_dataset(folder).ok


# -- sizes -------------------------------------------------------------------------------------------------------------


def crafted(path: Path, table: pa.Table, groups: int = 1) -> Dataset:
    """A shard of equal row groups whose metadata fits."""
    schema = pa.schema([SCHEMA.field(name) for name in table.column_names])
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for _ in range(groups):
            writer.write_table(table.cast(schema), row_group_size=len(table))
        digests = GroupDigest.to_metadata([GroupDigest.of(table)] * groups)
        writer.add_key_value_metadata({**HEADER.to_metadata(), **digests})
    return Dataset.open(path)


def test_a_few_bytes_that_stand_for_many_are_not_read(tmp_path: Path) -> None:
    """Shards of some kB that would take more than 80 MB in memory before anything in them could be compared."""
    repeated, many = pa.array([bytes(20_000)] * 64, pa.large_binary()), 8192
    ids = pa.ListArray.from_arrays([0, 2], pa.array([1, 2], pa.int32()))
    tables = {
        "repeated": {
            "input_ids": pa.concat_arrays([ids] * many),
            "teacher": pa.chunked_array([repeated] * (many // 64)),
        },
        "long": {
            "input_ids": pa.ListArray.from_arrays([0, 20_000_000], np.ones(20_000_000, np.int32)),
            "teacher": pa.array([b""], pa.large_binary()),
        },
    }
    for name, columns in tables.items():
        count, path = len(columns["teacher"]), tmp_path / f"{name}.parquet"
        fixed = {"doc_id": pa.repeat("0" * 32, count), "checksum": pa.repeat(0, count)}
        dataset = crafted(path, pa.table({**columns, **fixed}))
        assert path.stat().st_size < 200_000
        before = pa.total_allocated_bytes()
        for read in (lambda dataset: dataset[0], Dataset.lengths, lambda dataset: next(dataset.blocks())):
            with refused(CorruptDataError, str(path)):
                read(dataset)
        assert pa.total_allocated_bytes() == before


def test_lengths_are_read_in_parts(tmp_path: Path) -> None:
    """Row groups each of which is small enough, but not all of them together."""
    table = pa.table(
        {
            "doc_id": ["0" * 32],
            "input_ids": pa.ListArray.from_arrays([0, 12_000_000], np.ones(12_000_000, np.int32)),
            "teacher": pa.array([b""], pa.large_binary()),
            "checksum": [0],
        }
    )
    dataset, pool = crafted(tmp_path / "shard.parquet", table, groups=5), pa.proxy_memory_pool(pa.system_memory_pool())
    before = pa.default_memory_pool()
    pa.set_memory_pool(pool)
    try:
        assert dataset.lengths().tolist() == [12_000_000] * 5
    finally:
        pa.set_memory_pool(before)
    assert 48_000_000 <= (pool.max_memory() or 0) < 5 * 48_000_000


def test_an_id_that_is_no_text_is_damage(tmp_path: Path) -> None:
    table = pa.table(
        {
            "doc_id": pa.array([b"\xff" * 32], pa.binary()).view(pa.string()),
            "input_ids": pa.array([[1]], pa.list_(pa.int32())),
            "teacher": pa.array([b""], pa.large_binary()),
            "checksum": [0],
        }
    )
    with refused(CorruptDataError, "shard.parquet, documents 0 to 0"):
        crafted(tmp_path / "shard.parquet", table)[0]


def test_kept_columns_count_in_the_size_of_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrow cannot read nested columns of more than 2 GB in a row group back."""
    monkeypatch.setattr("distillkit.shards.writer._ROW_GROUP_BYTES", 10_000)
    kept = pa.schema([pa.field("pages", pa.list_(pa.struct([pa.field("text", pa.string())])))])
    shard = NewShard(Folder(tmp_path), "data-00000.parquet", kept)
    for ids, rows, _ in make_documents(12):
        document = make_document(ids, CODEC.encode_document(rows), HEADER, CODEC)
        shard.add(document, None, {"pages": [{"text": "a" * 1000}] * 4})
    shard.finish(HEADER)
    metadata = pq.ParquetFile(tmp_path / "data-00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [3, 3, 3, 3]


@pytest.mark.parametrize("kind", [pa.map_(pa.string(), pa.struct([])), pa.month_day_nano_interval()])
def test_columns_that_parquet_cannot_store_are_refused(kind: pa.DataType, tmp_path: Path) -> None:
    with refused(InputError, "column odd", str(kind), "keep_columns"):
        NewShard(Folder(tmp_path), "data-00000.parquet", pa.schema([("plain", pa.int64()), ("odd", kind)]))
    assert list(tmp_path.iterdir()) == []


# -- places ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["qwen::v1", "file::x", "s3::bucket", "a*b[1]", "what?", "~x", "a b#c%20", "{x}", "\udcff"]
)
def test_a_folder_may_have_any_name(
    name: str, written: tuple[Path, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also beside folders that it would mean as a pattern or as a chain of URLs."""
    monkeypatch.chdir(tmp_path)
    decoys = [Path(decoy) for decoy in ("aXb1", "whatX", "qwen", "v1", "x", "bucket")]
    for decoy in (*decoys, *(Path("runs") / decoy for decoy in decoys)):
        decoy.mkdir(parents=True)
        (decoy / "data-00000.parquet").write_text("someone else's")
    for place in (Path(name), Path("runs") / name):
        write(place, written[1])
        assert files(tmp_path / place) == files(written[0])
        assert_read_alike(Dataset.open(place), written[1])
        assert len(Dataset.open(place / "data-00001.parquet")) > 0
        assert verify_dataset(place).ok
        (place / "manifest.json").unlink()
        with refused(InputError, "manifest.json"):
            Dataset.open(place)
        assert len(whole_shards(place)) == len(files(place))
    for decoy in (*decoys, *(Path("runs") / decoy for decoy in decoys)):
        assert files(decoy) == {"data-00000.parquet": b"someone else's"}


def test_a_root_is_a_folder_like_any_other(
    written: tuple[Path, Written], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slash at the end is one too many, unless there is nothing else."""
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for place in ("~/", "memory://"):
        write(place, written[1])
        assert_read_alike(Dataset.open(place), written[1])
        assert verify_dataset(place).ok
    assert files(tmp_path / "home") == files(written[0])
    assert list(tmp_path.iterdir()) == [tmp_path / "home"]
    assert Folder("/").url == "/"
    assert Folder("/").of("a") == "/a"
    Folder("memory://").remove_files(is_dataset_file)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with refused(InputError, repr(name)):
        Dataset.open(name)
    with refused(InputError, repr(name)):
        ShardWriter(name, HEADER)


def test_names_in_storage_elsewhere_are_taken_as_they_are(written: tuple[Path, Written]) -> None:
    url, other = f"memory://{os.getpid()}/a*b::v[1]", Folder(f"memory://{os.getpid()}/aXb::v1")
    other.write("data-00000.parquet", b"someone else's")
    with ShardWriter(url, HEADER, shard_tokens=60) as writer:
        for ids, rows, extra in written[1]:
            writer.write(ids, rows, **extra)
    assert_read_alike(Dataset.open(url), written[1])
    Folder(url).remove_files(lambda name: name.startswith("data-"))
    assert Folder(url).names() == ["manifest.json"]
    assert other.names() == ["data-00000.parquet"]
    for refused_url in ("simplecache::memory://x", "nothing://x", "github://x"):
        with refused(InputError, refused_url):
            Dataset.open(refused_url)


# -- two writers -------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_until_the_first_one_ends(written: tuple[Path, Written], tmp_path: Path) -> None:
    folder, documents = tmp_path / "data", written[1]
    with ShardWriter(folder, HEADER, shard_tokens=60) as writer:
        for number, (ids, rows, extra) in enumerate(documents):
            writer.write(ids, rows, **extra)
            if number in (1, 9):
                with refused(InputError, str(folder), str(os.getpid()), socket.gethostname()):
                    ShardWriter(folder, HEADER, resume=True)
    assert files(folder) == files(written[0])
    forgotten = ShardWriter(tmp_path / "other", HEADER)
    del forgotten
    write(tmp_path / "other", documents)
    assert files(tmp_path / "other") == files(written[0])


def test_many_writers_come_and_go(tmp_path: Path) -> None:
    """Whoever leaves last removes what another one is about to open."""
    folder, children = Folder(tmp_path / "data"), []
    for number in range(6):
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                for _ in range(60):
                    FolderLock(folder, range(number, number + 1)).release()
                os._exit(0)
            os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    assert not [*tmp_path.rglob("*")] or [*tmp_path.rglob("*")] == [tmp_path / "data"]


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"shards": 3}', '{"shards": [1], "process": 1, "host": "a", "since": ""}']
)
def test_a_damaged_lock_is_told(content: str, tmp_path: Path) -> None:
    """While it is locked, nobody may write; otherwise it is left over."""
    lock = FolderLock(Folder(tmp_path / "data"))
    (path,) = (tmp_path / "data" / ".capture").glob("writer-*.json")
    path.write_text(content)
    with refused(CorruptDataError, str(path)):
        FolderLock(Folder(tmp_path / "data"))
    lock.release()
    FolderLock(Folder(tmp_path / "data")).release()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Also where that process leaves a fork behind, which shares its open files."""
    folder = Folder(tmp_path / "data")
    read_end, write_end = os.pipe()
    holder = os.fork()
    if holder == 0:
        lock = FolderLock(folder, range(2, 4))
        child = os.fork()
        if child:
            os.write(write_end, str(child).encode())
        signal.pause()
        lock.release()
    child = int(os.read(read_end, 100))
    try:
        for shards in (None, range(3, 9), range(3)):
            with refused(InputError, str(folder), str(holder), socket.gethostname(), "2:4"):
                FolderLock(folder, shards)
        for shards in (range(4, 9), range(2), range(0)):
            FolderLock(folder, shards).release()
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        FolderLock(folder).release()
    finally:
        os.kill(child, signal.SIGKILL)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize("column", ["doc_id", "input_ids", "teacher", "checksum", "loss_mask", "segment_lengths"])
def test_a_flipped_byte_in_a_column_names_the_file(folder: Path, column: str) -> None:
    path = folder / "data-00000.parquet"
    group = pq.ParquetFile(path).metadata.row_group(0)
    part = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema.startswith(column))
    data = bytearray(path.read_bytes())
    data[part.data_page_offset + part.total_compressed_size - 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CorruptDataError, match=r"data-00000\.parquet"):
        list(Dataset.open(folder))
    report = verify_dataset(folder)
    assert not report.ok
    assert "data-00000.parquet" in report.problems[0]


def rewrite(path: Path, change: Any) -> None:
    """Writes a shard again with a changed table, checksums of pages and all: only the row checksum can tell."""
    table, metadata = change(pq.read_table(path)), pq.ParquetFile(path).metadata.metadata
    with pq.ParquetWriter(path, table.schema, write_page_checksum=True) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({key: value for key, value in metadata.items() if key != b"ARROW:schema"})


def test_a_changed_value_under_a_valid_page_checksum_names_the_document(folder: Path) -> None:
    path = folder / "data-00000.parquet"

    def swap_teachers(table: Any) -> Any:
        column = table.column("teacher").to_pylist()
        column[0] = bytes([column[0][0] ^ 1]) + column[0][1:]
        return table.set_column(2, table.schema.field("teacher"), pa.array(column, pa.large_binary()))

    rewrite(path, swap_teachers)
    with refused(CorruptDataError, "data-00000.parquet, document 0", "checksum"):
        Dataset.open(path)[0]


def test_a_document_in_the_place_of_another_is_noticed(folder: Path) -> None:
    path = folder / "data-00000.parquet"
    rewrite(path, lambda table: table.take([1, 1, *range(2, table.num_rows)]))
    with refused(CorruptDataError, "data-00000.parquet"):
        list(Dataset.open(path))
    rewrite(path, lambda table: table.slice(0, 1))
    with refused(CorruptDataError, "data-00000.parquet", "[1]"):
        Dataset.open(path)


def test_a_changed_header_is_noticed(folder: Path) -> None:
    path = folder / "data-00000.parquet"
    text = path.read_bytes()
    path.write_bytes(text.replace(b'"head_size":300', b'"head_size":301'))
    with refused(CorruptDataError, "data-00000.parquet", "distillkit.header"):
        Dataset.open(folder)
    path.write_bytes(text.replace(b"distillkit.header", b"distillkit.hender"))
    with pytest.raises(DistillKitError):
        Dataset.open(folder)


def test_a_file_of_another_kind_is_not_called_truncated(folder: Path) -> None:
    path = folder / "data-00000.parquet"
    for data in (b"model: teacher\n", b"PK\x03\x04" * 99):
        path.write_bytes(data)
        with pytest.raises(CorruptDataError) as caught:
            Dataset.open(path)
        assert not isinstance(caught.value, TruncatedDataError)
        check_names(str(caught.value), "data-00000.parquet", "PAR1")


def test_every_truncation_is_noticed(folder: Path) -> None:
    path = folder / "data-00000.parquet"
    data = path.read_bytes()
    for length in [*range(0, 64), *range(64, len(data), 37), len(data) - 1]:
        path.write_bytes(data[:length])
        with refused(TruncatedDataError, "data-00000.parquet", f"{length} bytes"):
            Dataset.open(folder)


def test_the_manifest_must_fit_the_files(written: tuple[Path, Written], folder: Path, tmp_path: Path) -> None:
    last = sorted(folder.glob("*.parquet"))[-1]
    saved = last.read_bytes()
    last.unlink()
    with refused(MismatchError, "manifest.json", last.name):
        Dataset.open(folder)
    last.write_bytes(saved)
    extra = folder / "data-00077.parquet"
    extra.write_bytes(saved)
    with refused(MismatchError, "manifest.json", "data-00077.parquet"):
        Dataset.open(folder)
    extra.unlink()
    # The manifest of another capture of the same shape.
    write(tmp_path / "other", make_documents(12, seed=5))
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text((tmp_path / "other" / "manifest.json").read_text())
    with refused(MismatchError, "manifest.json", "data-00000.parquet"):
        Dataset.open(folder)
    (folder / "manifest.json").write_text(manifest.replace('"tokens": ', '"tokens": 1'))
    with refused(CorruptDataError, "manifest.json"):
        Dataset.open(folder)
    (folder / "manifest.json").write_text(manifest)
    assert verify_dataset(folder).ok


@pytest.mark.parametrize("change", [{"xxh3_128": "0" * 32}, {"tokens": 7}], ids=str)
def test_verify_holds_the_manifest_against_the_files(folder: Path, change: dict[str, Any]) -> None:
    """A manifest that is sound by itself, of files that look right from outside."""
    manifest = read_manifest(folder)
    assert manifest is not None
    replace(manifest, shards=(replace(manifest.shards[0], **change), *manifest.shards[1:])).write(Folder(folder))
    Dataset.open(folder)
    (problem,) = verify_dataset(folder).problems
    check_names(problem, "data-00000.parquet", *map(str, change.values()))


def test_a_report_is_not_taken_for_its_verdict(written: tuple[Path, Written]) -> None:
    """An object is true by itself: `assert verify_dataset(path)` would hold whatever is wrong."""
    report = verify_dataset(written[0])
    assert report.ok
    with refused(TypeError, "VerifyReport", "ok"):
        bool(report)


def same_size(folder: Path) -> list[Path]:
    """A dataset whose shards differ in their token ids, and in nothing that a size or a count tells."""
    teacher = CODEC.encode_document(make_documents(1)[0][1])
    with ShardWriter(folder, HEADER, shard_tokens=1) as writer:
        for token in (5, 6, 7):
            writer.write(np.full(len(make_documents(1)[0][0]), token), teacher)
    paths = sorted(folder.glob("*.parquet"))
    assert len({path.stat().st_size for path in paths}) == 1
    return paths


def test_shards_exchanged_or_doubled_do_not_open(tmp_path: Path) -> None:
    first, second, _ = same_size(tmp_path / "data")
    one, two = first.read_bytes(), second.read_bytes()
    second.write_bytes(one)
    with refused(MismatchError, str(second), "manifest.json"):
        Dataset.open(tmp_path / "data")
    first.write_bytes(two)
    with refused(MismatchError, str(first), "manifest.json"):
        Dataset.open(tmp_path / "data")
    second.write_bytes(two)
    first.write_bytes(one)
    assert [document.input_ids[0] for document in Dataset.open(tmp_path / "data")] == [5, 6, 7]


def test_a_document_id_must_be_that_of_its_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All checksums hold, as the writer took them over the wrong id."""
    monkeypatch.setattr("distillkit.shards.writer.document_id", lambda *fields: "0" * 32)
    write(tmp_path / "data", make_documents(1))
    place = str(tmp_path / "data" / "data-00000.parquet")
    with refused(CorruptDataError, place, "document 0", "doc_id", "0" * 32):
        Dataset.open(tmp_path / "data")[0]
    (problem,) = verify_dataset(tmp_path / "data").problems
    check_names(problem, place, "doc_id")


def test_verify_names_every_problem(folder: Path) -> None:
    for name in ("data-00000.parquet", "data-00002.parquet"):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 4] ^= 1
        (folder / name).write_bytes(data)
    report = verify_dataset(folder)
    assert [name for name in files(folder) if any(name in problem for problem in report.problems)] == [
        "data-00000.parquet",
        "data-00002.parquet",
    ]
    assert 0 < report.documents < 12


def test_impossible_headers_are_refused(subtests: pytest.Subtests) -> None:
    impossible = [
        ("alignment", {"row": "t predicts t", "rows": "L-1"}),
        ("alignment", {}),
        ("vocab_size", VOCAB + 1),
        ("head_size", "300"),
        ("temperature", -1.0),
        ("codec", None),
        ("teacher", "a name"),
    ]
    for field, value in impossible:
        with subtests.test(field=field, value=value):
            with refused(InputError, field):
                replace(HEADER, **{field: value})
            with refused(CorruptDataError, "here", field):
                Header.from_dict({**HEADER.to_dict(), field: value}, where="here")


def test_a_newer_version_says_so(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 3}))
    with refused(UnsupportedVersionError, "manifest.json", "3", "2"):
        Dataset.open(folder)


def test_manifests_of_version_1_are_read(written: tuple[Path, Written], folder: Path) -> None:
    """Those of distillkit 0.1 have no hashes of row groups."""
    manifest = json.loads((folder / "manifest.json").read_text())
    older = {**manifest, "version": 1, "shards": [dict(shard) for shard in manifest["shards"]]}
    for shard in older["shards"]:
        del shard["groups_xxh3"]
    save_manifest(folder, older)
    assert_read_alike(Dataset.open(folder), written[1])
    assert verify_dataset(folder).ok
    save_manifest(folder, {**older, "version": 2})
    with refused(CorruptDataError, "manifest.json", "shards[0]", "groups_xxh3"):
        Dataset.open(folder)


def test_a_codec_given_must_agree(written: tuple[Path, Written]) -> None:
    config = CODEC.config.model_copy(update={"exact_k": 3})
    with refused(MismatchError, "exact_k", "2", "3"):
        Dataset.open(written[0], config=config)
    assert Dataset.open(written[0], config={"logprob_compressor": CODEC.config.model_dump()}).codec == CODEC


def test_nothing_there() -> None:
    with pytest.raises(FileNotFoundError):
        Dataset.open("/no/such/folder")

"""Files that others wrote: damaged or crafted ones are refused in our words, and read nothing else and no more."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from distillkit.bench.published import published_codec
from distillkit.bench.sample import bundled_sample
from distillkit.capture.settings import CaptureSettings
from distillkit.codec import Codec, CodecConfig, DistributionQuantizationConfig, codec_config, preset
from distillkit.codec.presets import FIXED_PRESETS
from distillkit.configuration.yaml_file import read_yaml
from distillkit.errors import ConfigError, CorruptDataError, InputError, MismatchError
from distillkit.reports.inspection import inspect_dataset
from distillkit.shards import Dataset, ShardWriter, convert
from distillkit.shards.alignment import counted_positions
from distillkit.shards.plausibility import Plausibility
from distillkit.shards.published import load_codec_config
from distillkit.shards.repack import pack_dataset
from distillkit.shards.storage import Folder
from distillkit.text.sources import open_local
from distillkit.training.config.schema import DatasetSource, StoredTeacherConfig
from distillkit.training.data.examples import Collator, DistillationDataset
from distillkit.training.data.stored import check_dataset, open_dataset
from distillkit.training.signals.live import OnlineSignal
from distillkit.training.signals.stored import OfflineSignal
from distillkit.types import Document, SparseLogprobs
from support.bombs import write_arrow
from support.golden import CASES, GOLDEN, published
from support.refusals import refused
from support.shards import CODEC, HEADER, VOCAB
from support.training import tiny_model

# -- damaged Arrow and Parquet files -----------------------------------------------------------------------------------


def test_a_few_bytes_that_decode_to_gigabytes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Judged with a lower limit, so that the file is quickly made."""
    monkeypatch.setattr("distillkit.shards.parquet._ALLOWED_BYTES", 1 << 20)
    rows = pa.array([[[0] * 70]], pa.list_(pa.list_(pa.uint8())))
    values = pa.array(np.zeros(1_000_000, np.uint8))
    inner = pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)
    huge = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), inner)
    table = pa.table({"input_ids": [[1, 2]], "compressed_logprobs": huge, "bytepacked_indices": rows})
    pq.write_table(table, tmp_path / "data_0.parquet")
    assert (tmp_path / "data_0.parquet").stat().st_size < 4000
    with refused(CorruptDataError, str(tmp_path / "data_0.parquet"), "row group 0"):
        Dataset.open(tmp_path, config=preset("budget", vocab_size=1000))
    with refused(InputError, str(tmp_path / "data_0.parquet"), "row group 0"):
        list(open_local(str(tmp_path)).rows())
    # Padding may repeat as often as it likes beside distributions.
    table = pa.table({"input_ids": pa.array([[0] * 100_000]), "x": [np.random.default_rng(0).bytes(100_000)]})
    pq.write_table(table, tmp_path / "data_0.parquet")
    with refused(InputError, "data_0.parquet", "x", "compressed_logprobs"):
        Dataset.open(tmp_path)


@pytest.mark.parametrize("column", ["input_ids", "bytepacked_indices"])
@pytest.mark.parametrize("container", ["parquet", "arrow"])
def test_a_name_that_several_columns_have_is_refused(column: str, container: str, tmp_path: Path) -> None:
    path = published(tmp_path / "data", "parquet", "quantized")
    table = pq.read_table(path)
    doubled = table.append_column(column, table[column])
    path.unlink()
    if container == "parquet":
        pq.write_table(doubled, path)
    else:
        write_arrow(path.with_suffix(".arrow"), doubled)
    with refused(CorruptDataError, f"data_0.{container}", "2", column):
        Dataset.open(tmp_path / "data")


def test_a_text_column_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    """Either could be meant."""
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "rows.parquet")
    with refused(InputError, str(tmp_path / "rows.parquet"), "text"):
        list(open_local(str(tmp_path / "rows.parquet")).rows())


def test_arrow_files_elsewhere_are_read_there(tmp_path: Path) -> None:
    """Not those of the same name on the local disk."""
    path = published(tmp_path / "data", "arrow", "quantized")
    folder = Folder(f"memory://{tmp_path}/elsewhere")
    for file in path.parent.iterdir():
        folder.write(file.name, file.read_bytes())
    assert [d.doc_id for d in Dataset.open(folder.url)] == [d.doc_id for d in Dataset.open(path.parent)]


# -- names in what `save_to_disk` wrote --------------------------------------------------------------------------------


def saved(folder: Path, name: Any = "data_0.arrow") -> Path:
    """A folder as `save_to_disk` writes it, whose file has this name."""
    published(folder, "arrow", "quantized")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}], "_fingerprint": "0"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.mark.parametrize("name", ["../victim/data_0.arrow", "{0}/victim/data_0.arrow", "x::file", "..", "", None, 3])
def test_state_json_names_files_beside_it(name: Any, tmp_path: Path) -> None:
    saved(tmp_path / "victim")
    folder = saved(tmp_path / "data", name.format(tmp_path) if isinstance(name, str) else name)
    for opened in (Dataset.open, open_local):
        with refused(CorruptDataError, str(folder / "state.json")):
            opened(folder)


@pytest.mark.parametrize(
    "content", ["{}", "[]", "3", '{"_data_files": 3}', '{"_data_files": [3]}', "[" * 9999, "\udcff"]
)
def test_state_json_without_its_keys(content: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "data")
    (folder / "state.json").write_bytes(content.encode(errors="surrogateescape"))
    for opened in (Dataset.open, open_local):
        with refused(CorruptDataError, str(folder / "state.json")):
            opened(folder)


def test_splits_are_folders_beside_their_index(tmp_path: Path) -> None:
    saved(tmp_path / "victim")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["../victim"]}')
    for opened in (Dataset.open, open_local):
        with refused(CorruptDataError, str(tmp_path / "data" / "dataset_dict.json"), "../victim"):
            opened(tmp_path / "data")


def test_links_lead_out_of_a_folder_only_in_the_hubs_cache(tmp_path: Path) -> None:
    target = published(tmp_path / "victim", "arrow", "quantized")
    folder = saved(tmp_path / "data")
    (folder / "data_0.arrow").unlink()
    (folder / "data_0.arrow").symlink_to(target)
    with refused(CorruptDataError, str(folder / "state.json"), "data_0.arrow", str(target)):
        Dataset.open(folder)
    cached = saved(tmp_path / "datasets--a--b" / "snapshots" / "0123")
    (tmp_path / "datasets--a--b" / "blobs").mkdir()
    (cached / "data_0.arrow").rename(tmp_path / "datasets--a--b" / "blobs" / "4567")
    (cached / "data_0.arrow").symlink_to("../../blobs/4567")
    assert len(Dataset.open(cached)) == 2


# -- labels ------------------------------------------------------------------------------------------------------------


def with_columns(folder: Path, **columns: Any) -> Path:
    """A published document of 160 tokens with more columns, each given for this document."""
    folder.mkdir()
    shutil.copy(GOLDEN / "upstream_v1" / "compression_config.yaml", folder)
    table = pq.read_table(GOLDEN / "upstream_v1" / "data_0.parquet").slice(0, 1)
    for name, values in columns.items():
        table = table.append_column(name, pa.array([values]))
    pq.write_table(table, folder / "data_0.parquet")
    return folder


IDS: list[int] = pq.read_table(GOLDEN / "upstream_v1" / "data_0.parquet")["input_ids"][0].as_py()
COUNTED = [False] * 50 + [True] * 60 + [False] * 20 + [True] * 30
LABELS = [token if counted else -100 for token, counted in zip(IDS, COUNTED, strict=True)]


@pytest.mark.parametrize(
    "columns",
    [
        {"labels": LABELS},
        {"loss_mask": [int(counted) for counted in COUNTED]},
        {"loss_mask": COUNTED, "labels": LABELS},
        {"labels": LABELS, "attention_mask": [1] * 160},
    ],
)
def test_labels_of_published_datasets_are_their_loss_mask(columns: dict[str, Any], tmp_path: Path) -> None:
    """Read, converted and packed; what is trained on are the 90 labels, each predicted by the token before it."""
    dataset = Dataset.open(with_columns(tmp_path / "data", **columns))
    convert(dataset, tmp_path / "shards")
    pack_dataset(dataset, tmp_path / "packed", 160)
    for opened in (dataset, Dataset.open(tmp_path / "shards"), Dataset.open(tmp_path / "packed")):
        document = opened[0]
        assert document.loss_mask is not None
        assert document.loss_mask.tolist() == COUNTED
        examples = DistillationDataset(opened, OfflineSignal(opened.codec, 49_152), 160)
        positions = examples[0].positions
        assert positions.tolist() == [t - 1 for t, label in enumerate(LABELS) if label != -100]
        assert len(positions) == 90


def test_labels_of_every_token_are_no_mask(tmp_path: Path) -> None:
    """Padding is not text, whatever label it has."""
    mask = [1] * 100 + [0] * 60
    folder = with_columns(tmp_path / "data", labels=IDS, attention_mask=mask)
    assert Dataset.open(folder)[0].loss_mask is None
    assert len(Dataset.open(folder)[0].input_ids) == 100


@pytest.mark.parametrize(
    ("columns", "facts"),
    [
        ({"labels": [*IDS[1:], -100]}, ["token 0", str(IDS[0]), str(IDS[1]), "shifted"]),
        ({"labels": [*LABELS[:70], 7, *LABELS[71:]]}, ["token 70", "7", str(IDS[70])]),
        ({"labels": [-1, *LABELS[1:]]}, ["token 0", "-1"]),
        ({"labels": LABELS[:-1]}, ["labels", "159", "160"]),
        ({"labels": [None, *LABELS[1:]]}, ["labels"]),
        ({"labels": LABELS, "loss_mask": [1] * 160}, ["labels", "loss_mask", "token 1"]),
        ({"loss_mask": [2] * 160}, ["loss_mask"]),
    ],
)
def test_labels_that_contradict_are_refused(columns: dict[str, Any], facts: list[str], tmp_path: Path) -> None:
    dataset = Dataset.open(with_columns(tmp_path / "data", **columns))
    with refused(CorruptDataError, "data_0.parquet, document 0", *facts):
        dataset[0]


@pytest.mark.parametrize("name", ["labels", "loss_mask"])
def test_labels_of_another_type_are_refused(name: str, tmp_path: Path) -> None:
    with refused(InputError, "data_0.parquet", name):
        Dataset.open(with_columns(tmp_path / "data", **{name: "1" * 160}))


# -- codecs ------------------------------------------------------------------------------------------------------------

SAMPLE = bundled_sample()


def right_codecs() -> dict[str, CodecConfig]:
    """The presets and every recorded configuration that the sample's rows suffice for, in the sample's vocabulary."""
    found: dict[str, CodecConfig] = {name: preset(name, vocab_size=SAMPLE.vocab_size) for name in FIXED_PRESETS}
    for name, case in CASES.items():
        size = {"vocab_size" if case["format"] == "legacy" else "d": SAMPLE.vocab_size}
        if case["config"]["k"] <= SAMPLE.k:
            found[name] = codec_config({**case["config"], **size})
    return found


def shown(config: CodecConfig, ids: Any, logprobs: Any) -> Plausibility:
    """What rows show over tokens that were drawn from the original distributions."""
    original = np.exp(SAMPLE.logprobs.astype(np.float64))
    drawn = (np.random.default_rng(0).random((len(original), 1)) > original.cumsum(1)).sum(1)
    following = np.where(drawn < SAMPLE.k, np.take_along_axis(SAMPLE.ids, np.minimum(drawn, 127)[:, None], 1)[:, 0], 0)
    found = Plausibility(config.exact_k)
    tokens = np.concatenate([[0], following]).astype(np.int32)
    found.add(Document("", tokens, b"", len(ids)), SparseLogprobs(ids, logprobs))
    return found


@pytest.mark.parametrize("encoder", ["ours", "published"])
def test_no_right_codec_is_doubted(encoder: str) -> None:
    for name, config in right_codecs().items():
        codec = Codec(config)
        ids, logprobs = SAMPLE.top(codec.k, codec.vocab_size)
        if encoder == "ours":
            data = codec.encode(ids, logprobs)
        else:
            data = published_codec(config).encode(torch.from_numpy(ids), torch.from_numpy(logprobs)).numpy()
        found = shown(config, *codec.decode(data))
        assert (found.impossible(), found.doubts()) == ([], []), name


WRONG = [
    ("upstream_v1", {"delta_encoding": True}),
    ("upstream_v1", {"exact_dtype": "float16"}),
    ("upstream_v1", {"normalize_t": False}),
    ("upstream_v1", {"polynomial_terms": ["sqrt", 4, 3, 2, 1, 0]}),
    ("upstream_v1", {"polynomial_terms": [0, 1, 2, 3, 4, 5], "normalize_t": False}),
    ("upstream_v1", {"exact_k": 18, "polynomial_terms": [0, 1, 2, 3, 4]}),
    ("upstream_legacy", {"invert_polynomial": False}),
]


@pytest.mark.parametrize(("name", "changed"), WRONG)
def test_a_wrong_codec_is_refused_wherever_data_are_opened(name: str, changed: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(GOLDEN / name / "data_0.parquet", folder)
    config = {**yaml.safe_load((GOLDEN / name / "compression_config.yaml").read_text()), **changed}
    dataset = Dataset.open(folder, config=config)
    # Bytes that are no numbers are damage, as far as a reader can tell.
    either = (MismatchError, CorruptDataError)
    with pytest.raises(either, match="data"):
        inspect_dataset(dataset).check()
    with pytest.raises(either, match="data"):
        convert(dataset, tmp_path / "shards")
    with pytest.raises(either, match="data"):
        pack_dataset(dataset, tmp_path / "packed", 160)
    with pytest.raises(either, match=r"dataset\.train_dataset|data_0\.parquet, document"):
        check_dataset(dataset, 200_000, "dataset.train_dataset")
    assert not (tmp_path / "shards").exists()
    assert not (tmp_path / "packed").exists()


def quantized(**fields: Any) -> Codec:
    plain = {"residual_bins": [], "delta_encoding": False, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1]}
    return Codec(DistributionQuantizationConfig(d=SAMPLE.vocab_size, **{**plain, **fields}))


@pytest.mark.parametrize(
    ("written", "read", "said"),
    [
        ({"k": 32, "exact_k": 32}, {"delta_encoding": True}, "delta_encoding"),
        ({"k": 32, "exact_k": 32, "delta_encoding": True}, {"delta_encoding": False}, "descending"),
        ({"k": 32, "exact_k": 32}, {"exact_dtype": "float16"}, "more than 1"),
        ({"k": 32, "exact_k": 32, "exact_dtype": "float16"}, {"exact_dtype": "bfloat16"}, "more than 1"),
        ({"k": 32, "exact_k": 12, "normalize_t": True}, {"polynomial_terms": [1, 0]}, "exceeds"),
    ],
)
def test_what_a_wrong_codec_shows_is_said(written: dict[str, Any], read: dict[str, Any], said: str) -> None:
    writer, reader = quantized(**written), quantized(**{**written, **read})
    found = shown(reader.config, *reader.decode(writer.encode(*SAMPLE.top(writer.k, writer.vocab_size))))
    assert any(said in finding for finding in found.impossible()), found


@pytest.mark.parametrize(
    ("written", "read", "said"),
    [
        ({"k": 32, "exact_k": 12, "normalize_t": True}, {"normalize_t": False}, "rank 12"),
        ({"k": 32, "exact_k": 1}, {"exact_dtype": "float16"}, "next token"),
    ],
)
def test_what_is_only_unlikely_is_said_and_trained_on(written: dict[str, Any], read: dict[str, Any], said: str) -> None:
    writer, reader = quantized(**written), quantized(**{**written, **read})
    found = shown(reader.config, *reader.decode(writer.encode(*SAMPLE.top(writer.k, writer.vocab_size))))
    assert found.impossible() == []
    assert any(said in doubt for doubt in found.doubts()), found


def legacy_with(folder: Path, value: float) -> Dataset:
    """A published dataset one of whose exact log-probabilities is another value."""
    folder.mkdir()
    source = GOLDEN / "upstream_legacy"
    shutil.copy(source / "compression_config.yaml", folder)
    table = pq.read_table(source / "data_0.parquet")
    values = table["exact_values"].to_pylist()
    values[1][3][0] = value
    at = table.schema.get_field_index("exact_values")
    changed = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    pq.write_table(changed, folder / "data_0.parquet")
    return Dataset.open(folder)


@pytest.mark.parametrize("value", [0.25, 80.0, float("nan"), float("inf")])
@pytest.mark.parametrize("on_device", [False, True])
def test_one_value_that_is_no_log_probability_is_not_trained_on(value: float, on_device: bool, tmp_path: Path) -> None:
    dataset = legacy_with(tmp_path / "data", value)
    with pytest.raises((MismatchError, CorruptDataError), match=r"data_0\.parquet, document 1: row 3"):
        check_dataset(dataset, 200_000, "data")
    signal = OfflineSignal(dataset.codec, 200_000, on_device=on_device)
    examples = DistillationDataset(dataset, signal, 200)
    assert examples[0].positions.size
    if not on_device:
        with refused(CorruptDataError, "data_0.parquet, document 1", "row 3", "rank 0"):
            examples[1]
    elif value != 0.25:  # on a device, only values that no rank can have are noticed
        batch = Collator()([examples[1]])
        with refused(CorruptDataError, "verify"):
            signal.targets(batch, torch.zeros(len(batch["rows"]), dtype=torch.int64))


# -- documents ---------------------------------------------------------------------------------------------------------


def test_documents_of_no_tokens_are_documents(tmp_path: Path) -> None:
    nothing = SparseLogprobs(np.zeros((0, CODEC.k), np.int64), np.zeros((0, CODEC.k), np.float32))
    rows = SparseLogprobs(np.tile(np.arange(CODEC.k), (4, 1)), np.tile(np.float32([-1, -2, -3, -4, -5, -6]), (4, 1)))
    with ShardWriter(tmp_path / "data", HEADER) as writer:
        writer.write(np.empty(0, np.int32), nothing)
        writer.write(np.arange(5), rows)
        writer.write(np.empty(0, np.int32), nothing)
    dataset = Dataset.open(tmp_path / "data")
    assert inspect_dataset(dataset).rows == 4
    check_dataset(dataset, VOCAB, "data")
    convert(dataset, tmp_path / "again")
    assert dataset.lengths().tolist() == [0, 5, 0]
    examples = DistillationDataset(dataset, OfflineSignal(dataset.codec, VOCAB), 8)
    batch = Collator()([examples[0], examples[1], examples[2]])
    assert batch["rows"].tolist() == [5, 6, 7, 8]
    assert counted_positions(np.array([0, 3, 0, 2, 0])).tolist() == [0, 1, 3]


def test_a_published_row_of_padding_alone_is_a_document_of_no_tokens(tmp_path: Path) -> None:
    folder = with_columns(tmp_path / "data", attention_mask=[0] * 160)
    dataset = Dataset.open(folder)
    assert dataset.lengths().tolist() == [0]
    assert inspect_dataset(dataset).rows == 0
    assert len(DistillationDataset(dataset, OfflineSignal(dataset.codec, 49_152), 8)[0].positions) == 0


def test_an_id_beyond_the_students_head_is_refused_where_it_is_read(tmp_path: Path) -> None:
    """It is within the dataset's head, and in a document that was not sampled."""
    rows = SparseLogprobs(np.tile(np.arange(CODEC.k), (4, 1)), np.tile(np.float32([-1, -2, -3, -4, -5, -6]), (4, 1)))
    with ShardWriter(tmp_path / "data", HEADER, shard_tokens=5) as writer:
        for document in range(130):
            writer.write(np.full(5, 295 if document == 1 else 3), rows)
    dataset = Dataset.open(tmp_path / "data")
    check_dataset(dataset, 292, "data")
    examples = DistillationDataset(dataset, OfflineSignal(dataset.codec, 292), 8)
    assert len(examples[0].positions) == 4
    with refused(MismatchError, f"{tmp_path}/data/data-00001.parquet, document 0", "295", "292"):
        examples[1]


@pytest.mark.parametrize(("teacher", "head_size"), [(64, 60), (60, 64)])
def test_an_id_beyond_a_live_teachers_or_its_students_head(teacher: int, head_size: int) -> None:
    signal = OnlineSignal(tiny_model(vocabulary=teacher), head_size=head_size)
    assert signal.take(Document("", np.int32([59]), b"", 0), np.empty(0, np.int64)) == {}
    with refused(MismatchError, "rows, document 7", "60"):
        signal.take(Document("", np.int32([3, 60]), b"", 1, place="rows, document 7"), np.empty(0, np.int64))


NO_DISTRIBUTIONS = {
    "rows.parquet": {"text": ["a"]},
    "questions.parquet": {"question": ["a"], "answer": ["b"]},
    "ids.parquet": {"input_ids": [[1, 2]], "labels": [[1, 2]]},
}


@pytest.mark.parametrize(
    "name", ["documents.jsonl", "documents.JSONL.gz", "documents.ndjson", "folder", *NO_DISTRIBUTIONS]
)
def test_text_where_distributions_are_expected(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        (path / "a.jsonl").write_text('{"text": "a"}\n')
    elif name in NO_DISTRIBUTIONS:
        pq.write_table(pa.table(NO_DISTRIBUTIONS[name]), path)
    else:
        path.write_text('{"text": "a"}\n')
    with refused(InputError, "dataset.train_dataset", str(path), "distillkit capture", "teacher.kind: hf"):
        open_dataset(DatasetSource(disk_path=str(path)), StoredTeacherConfig(kind="dataset"), "dataset.train_dataset")


def test_what_is_no_parquet_file_is_not_called_truncated(tmp_path: Path) -> None:
    for name, content in (("a.parquet", b"PK\3\4" + bytes(50)), ("notes", b"hello")):
        (tmp_path / name).write_bytes(content)
        with refused(CorruptDataError, str(tmp_path / name), repr(content[:4])):
            Dataset.open(tmp_path / name)


# -- YAML --------------------------------------------------------------------------------------------------------------


def laughs(levels: int, value: str = "x") -> str:
    """Aliases of aliases: 9 ** levels values in a few lines."""
    lines = [f"a0: &a0 {value}"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels + 1)]
    return "\n".join(lines)


def merged(levels: int) -> str:
    """The same by merging mappings."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, levels + 1)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (laughs(9), ["aliases"]),
        (laughs(2, "y" * 100_000), ["aliases"]),
        (merged(9), ["aliases"]),
        ("a: &a [*a]", ["alias"]),
        ("[" * 70, ["64"]),
        ("a: " + "{a: " * 3000, ["64"]),
        ("#" * (1 << 18) + "\na: 1", ["262,144"]),
        ("a: 2024-13-45", ["2024-13-45", "line 1"]),
        ("b: 1\na: " + "9" * 5000, ["int", "line 2"]),
        ("a: 0x" + "f" * 5000, ["int"]),
        ("a: 1" + ":59" * 80_000, ["int", "line 1"]),
        ("a: 1" + ":59" * 80_000 + ".5", ["float", "line 1"]),
        ("a: !" + "x" * 200_000, ["tag"]),
        ("a: !!bool maybe", ["bool", "maybe"]),
        ("a: !!python/object/apply:os.system [ls]", ["python/object/apply:os.system"]),
        ("b: {c: 1}\nb: 2", ["b", "line 1", "line 2"]),
        ("!!map [1]", ["mapping"]),
        ('a: "\\ud800"', ["str"]),
        ('a: "\\U00110000"', []),
        ('a: "\\Uffffffff"', []),
        ('a: "x\\0y"', ["str", "NUL"]),
        ("a: \udcff", ["UTF-8"]),
    ],
)
def test_yaml_beyond_its_limits_is_refused(content: str, facts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    message = str(caught.value)
    assert all(fact in message for fact in (str(path), *facts))
    assert len(message) < 800


def test_aliases_within_the_limits_are_values(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("base: &base {a: 1}\nlist: [*base, *base]\nmore: {<<: *base, b: 2}\n")
    assert read_yaml(path) == {"base": {"a": 1}, "list": [{"a": 1}, {"a": 1}], "more": {"a": 1, "b": 2}}


@pytest.mark.parametrize(
    "content",
    [
        *("", "[1]", "3", "a: 1", "d: 5\n1: 3", "d: 5\nk: 2\nk: 3", "logprob_compressor: {1: 2}", "d: x"),
        *("logprob_compressor: 3", "d: 100\nk: 5\nexact_k: 9\nresidual_bins: []", laughs(4) + "\nd: *a4"),
        "vocab_size: 100\nk: 200\nexact_k: 3\npolynomial_degree: 2",
    ],
)
def test_refused_codec_files_are_named(content: str, tmp_path: Path) -> None:
    path = tmp_path / "codec.yaml"
    path.write_text(content)
    capture = CaptureSettings(model="m", dataset="d", output="o", compression_config=str(path))
    for read in (lambda: load_codec_config(path), capture.read_compression_config):
        with refused(ConfigError, str(path)):
            read()

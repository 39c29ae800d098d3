"""The compact format in everything that is done with datasets, on real rows of a teacher and on small ones."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distillkit.bench.sample import bundled_sample
from distillkit.codec import Codec, CompactConfig, Prior, codec_config, preset
from distillkit.codec.fidelity import FidelityStats, kl_rows, values_of
from distillkit.codec.presets import COMPACT_PRESETS, FORMER_PRESETS
from distillkit.errors import ConfigError, CorruptDataError, DistillKitError, InputError, MismatchError
from distillkit.reports.inspection import inspect_dataset
from distillkit.reports.token_view import view_document
from distillkit.shards import Dataset, Header, ShardWriter, convert, load_prior, verify_dataset
from distillkit.shards.convert import target_codec
from distillkit.shards.repack import pack_dataset
from distillkit.types import SparseLogprobs
from support.cli import run_here
from support.reference import kl_with_missing
from support.refusals import check_names, refused

SAMPLE = bundled_sample()
LENGTHS = (1, 40, 2, 120, 37)
LEARNED = 300
NAMES = ("compact-50", "compact-adaptive")


def config(name: str = "compact-50", **fields: Any) -> CompactConfig:
    most = {"k": min(SAMPLE.k, COMPACT_PRESETS[name]["k"])}
    return CompactConfig(vocab_size=SAMPLE.vocab_size, **{**COMPACT_PRESETS[name], **most, **fields})


def rows(first: int, count: int) -> SparseLogprobs:
    return SparseLogprobs(SAMPLE.ids[first : first + count], SAMPLE.logprobs[first : first + count])


@pytest.fixture(scope="module")
def prior() -> Prior:
    return Prior.learn(config(), rows(0, LEARNED))


def documents() -> list[tuple[npt.NDArray[np.int32], SparseLogprobs]]:
    """Token ids that are often the first id of the row before, as a teacher's text has them, and their rows."""
    found, first = [], LEARNED
    for length in LENGTHS:
        part = rows(first, length)
        found.append((np.append(0, part.ids[:, 0]).astype(np.int32), part))
        first += length
    return found


def write(folder: Path, codec: Codec, **options: Any) -> Dataset:
    size = SAMPLE.vocab_size
    header = Header(codec=codec.to_dict(), vocab_size=size, head_size=size)
    with ShardWriter(folder, header, shard_tokens=60, prior=codec.prior, **options) as writer:
        for ids, part in documents():
            writer.write(ids, SparseLogprobs(part.ids[:, : codec.k], part.logprobs[:, : codec.k]))
    return Dataset.open(folder)


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory, prior: Prior) -> Path:
    folder = tmp_path_factory.mktemp("compact") / "dataset"
    write(folder, Codec(config(), prior=prior))
    return folder


def missing(logprobs: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.asarray(1 - np.exp(logprobs.astype(np.float64)).sum(-1))


# -- the codec ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", COMPACT_PRESETS)
def test_what_is_decoded_is_what_the_configuration_promises(name: str, learned: bool) -> None:
    wanted, given = config(name), rows(LEARNED, 200)
    codec = Codec(wanted, prior=Prior.learn(wanted, rows(0, LEARNED)) if learned else None)
    data = codec.encode_document(given)
    found = codec.decode_document(data, 200)
    ids, logprobs = np.asarray(found.ids), np.asarray(found.logprobs)
    there = logprobs > -np.inf
    # By definition: those of at least the threshold and always the first, at most k.
    wanted_ids = np.broadcast_to(np.arange(given.k) < wanted.k, given.ids.shape).copy()
    if wanted.threshold is not None:
        wanted_ids = wanted_ids & (np.exp(given.logprobs) >= wanted.threshold)
    wanted_ids[:, 0] = True
    for row in range(200):
        assert {*ids[row][there[row]]} == {*given.ids[row][wanted_ids[row]]}
        assert there[row].sum() == wanted_ids[row].sum()
    assert (ids[~there] == np.broadcast_to(ids[:, :1], ids.shape)[~there]).all()
    assert (ids[:, 0] == given.ids[:, 0]).all()
    assert (np.diff(np.where(there, logprobs, -99.0)) <= 0).all()
    assert (missing(logprobs) > -1e-5).all()
    original, whole = values_of(given, found)
    assert whole.all()
    assert np.abs(missing(logprobs) - missing(original)).mean() < 2e-3
    # Twice what the presets are made for: few rows to learn from.
    assert kl_rows(original, logprobs).mean() < {"compact-adaptive": 2e-3}.get(name, 4e-4)
    assert sum(codec.sizes(data, 200).values()) == pytest.approx(len(data), abs=1)


def test_divergence_of_rows_with_fewer_ids_is_by_definition() -> None:
    before = np.log(np.array([[0.5, 0.3, 0.1], [0.9, 1e-9, 1e-9]]))
    after = np.log(np.array([[0.4, 0.35, 0.1], [0.8, 1e-9, 1e-9]]))
    before[1, 1:] = after[1, 1:] = -np.inf
    expected = [kl_with_missing(before[:1], after[:1])[0], kl_with_missing(before[1:, :1], after[1:, :1])[0]]
    np.testing.assert_allclose(kl_rows(before, after), expected, rtol=1e-12)


def test_figures_by_rank_are_of_the_rows_that_have_it() -> None:
    before = np.log(np.array([[0.5, 0.3], [0.9, 1.0], [0.8, 0.1]], np.float32))
    after = np.log(np.array([[0.4, 0.35], [0.8, 1.0], [0.7, 0.2]], np.float32))
    before[1, 1] = after[1, 1] = -np.inf
    ids = np.array([[1, 2], [3, 3], [5, 6]])
    total = FidelityStats()
    for row in range(3):
        part = FidelityStats()
        part.update(*(SparseLogprobs(ids[[row]], values[[row]]) for values in (before, after)))
        total.merge(FidelityStats.from_dict(json.loads(json.dumps(part.to_dict()))))
    found = total.by_rank()
    np.testing.assert_allclose(found["mean"], [before[:, 0].mean(), before[[0, 2], 1].mean()], rtol=1e-6)
    errors = [np.sqrt((part**2).mean()) for part in (after[:, 0] - before[:, 0], after[[0, 2], 1] - before[[0, 2], 1])]
    np.testing.assert_allclose(found["rms_error"], errors, rtol=1e-6)
    assert total.worst_error == pytest.approx(np.log(2), rel=1e-6)


def test_what_only_fixed_formats_have_says_what_to_do(compact: Path) -> None:
    import torch

    dataset = Dataset.open(compact)
    codec, document = dataset.codec, dataset[0]
    logits = np.zeros((1, codec.vocab_size), np.float32)
    for use, instead in (
        (lambda: codec.bytes_per_token, "sizes"),
        (lambda: codec.encode(SAMPLE.ids[:1, :50], SAMPLE.logprobs[:1, :50]), "encode_document"),
        (lambda: codec.decode(np.zeros((1, 50), np.uint8)), "decode_document"),
        (lambda: codec.decode_torch(torch.zeros(1, 50, dtype=torch.uint8)), "dataloader_num_workers"),
        (lambda: codec.encode_logits(logits), "encode_document"),
        (lambda: codec.document_rows(document.teacher, document.num_rows), "decode_document"),
        (lambda: codec.to_published(np.zeros((1, 50), np.uint8)), "distillkit-codec convert"),
        (lambda: codec.from_published({}), "distillkit-codec convert"),
        (lambda: next(dataset.blocks()).tensor(), "decode_document"),
    ):
        with refused(InputError, "compact", instead):
            use()


def test_a_codec_is_passed_to_other_processes_with_its_prior(compact: Path) -> None:
    dataset = Dataset.open(compact)
    for copied in (pickle.loads(pickle.dumps(dataset.codec)), pickle.loads(pickle.dumps(dataset)).codec):
        assert copied == dataset.codec
        assert copied.prior == dataset.codec.prior is not None
    named = codec_config({"compact": {**json.loads(config().model_dump_json()), "step": "5e-3"}})
    assert isinstance(named, CompactConfig)
    assert named.step == 0.005, "YAML reads 5e-3 as text"
    with refused(ConfigError, "prior", str(dataset.codec.prior.hash if dataset.codec.prior else "")):
        Codec(dataset.codec.config)


def test_the_former_preset_is_what_it_was(caplog: pytest.LogCaptureFixture) -> None:
    fields = preset("compact", vocab_size=1000).model_dump()
    assert {key: fields[key] for key in FORMER_PRESETS["compact"]} == FORMER_PRESETS["compact"]
    check_names(caplog.text, "compact-50")


# -- datasets ----------------------------------------------------------------------------------------------------------


def test_every_way_to_read_a_dataset_gives_the_same_rows(compact: Path) -> None:
    dataset = Dataset.open(compact)
    assert verify_dataset(compact).ok
    blocks = [block.decode() for block in dataset.blocks()]
    ids, logprobs = (np.concatenate([getattr(part, name) for part in blocks]) for name in ("ids", "logprobs"))
    start = 0
    for document, (tokens, _), (_, by_block) in zip(dataset, documents(), dataset.decoded(), strict=True):
        found = dataset.codec.decode_document(document.teacher, document.num_rows)
        part = slice(start, start := start + document.num_rows)
        for other in (by_block, SparseLogprobs(ids[part], logprobs[part])):
            assert np.array_equal(found.ids, other.ids)
            assert np.array_equal(found.logprobs, other.logprobs)
        assert np.array_equal(document.input_ids, tokens)
    table = pq.read_table(compact / "data-00000.parquet")
    assert table.column("teacher")[0].as_py() == bytes(dataset[0].teacher), "anything that reads Parquet reads shards"


def test_rows_are_decoded_where_documents_are_read(compact: Path) -> None:
    from distillkit.training.signals.stored import OfflineSignal

    dataset = Dataset.open(compact)
    signal = OfflineSignal(dataset.codec, SAMPLE.vocab_size, on_device=True)
    taken = signal.take(dataset[1], np.array([0, 5]))
    assert {name: array.shape for name, array in taken.items()} == {"ids": (2, 50), "logprobs": (2, 50)}


def test_a_prior_that_is_missing_other_or_damaged(compact: Path, prior: Prior, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(compact, folder)
    place, whole = folder / "prior.bin", (folder / "prior.bin").read_bytes()
    assert whole == prior.data
    place.unlink()
    for path in (folder, folder / "data-00000.parquet"):
        with refused(CorruptDataError, str(place), prior.hash, "copy"):
            Dataset.open(path)
    with refused(InputError, "prior.bin"):
        load_prior(tmp_path)
    other = Prior.learn(config(), rows(0, 200))
    for data in (other.data, whole[:-1], bytes([*whole[:40], whole[40] ^ 1, *whole[41:]])):
        place.write_bytes(data)
        with refused(CorruptDataError, str(place), Prior(data).hash, prior.hash):
            Dataset.open(folder)
    place.write_bytes(whole)
    assert load_prior(folder) == load_prior(folder / "data-00000.parquet") == load_prior(place) == prior
    with refused(DistillKitError, "nowhere"):
        Codec(config(), prior=Prior(whole[: len(whole) // 2], "nowhere/prior.bin"))


def test_a_view_of_rows_with_fewer_ids(tmp_path: Path) -> None:
    source = write(tmp_path / "adaptive", Codec(config("compact-adaptive")))
    logprobs = np.asarray(source.decode(3).logprobs)
    row = int((logprobs > -np.inf).sum(-1).argmin())
    count = int((logprobs[row] > -np.inf).sum())
    assert count < 20
    assert len(view_document(source, 3, best=20)[row + 1].best) == count


def test_shards_that_stand_alone(compact: Path, prior: Prior, tmp_path: Path) -> None:
    codec = Codec(config(), prior=prior)
    write(tmp_path / "whole", codec, standalone=True)
    alone = tmp_path / "alone.parquet"
    shutil.copy(tmp_path / "whole" / "data-00000.parquet", alone)
    assert load_prior(alone) == prior
    stored = write("memory://compact", codec)  # type: ignore[arg-type]
    assert stored.codec.prior == load_prior("memory://compact") == prior
    found, expected = Dataset.open(alone), Dataset.open(compact)
    assert bytes(found[0].teacher) == bytes(expected[0].teacher)
    assert verify_dataset(alone).ok


def test_a_writer_needs_the_prior_and_keeps_it(prior: Prior, tmp_path: Path) -> None:
    codec = Codec(config(), prior=prior)
    header = Header(codec=codec.to_dict(), vocab_size=SAMPLE.vocab_size, head_size=SAMPLE.vocab_size)
    with refused(InputError, prior.hash):
        ShardWriter(tmp_path / "none", header)
    writer = ShardWriter(tmp_path / "some", header, prior=prior, shard_tokens=1)
    writer.write(*documents()[1])
    writer.abort()
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["data-00000.parquet", "prior.bin"]
    with ShardWriter(tmp_path / "some", header, resume=True) as writer:
        writer.write(*documents()[3])
    assert len(Dataset.open(tmp_path / "some")) == 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "prior.bin").write_bytes(prior.data + b"x")
    with refused(CorruptDataError, prior.hash):
        ShardWriter(tmp_path / "other", header, prior=prior)


# -- conversion --------------------------------------------------------------------------------------------------------


def test_conversion_there_and_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exact = {"d": SAMPLE.vocab_size, "k": 128, "exact_k": 128, "residual_bins": [], "delta_encoding": False}
    source = write(tmp_path / "exact", Codec(exact))
    there = tmp_path / "compact"
    codec = target_codec(source, config("compact-128"), folder=there, prior_rows=150)
    convert(source, there, codec=codec, shard_tokens=60)
    found = Dataset.open(there)
    assert found.codec.prior is not None
    # The recorded fidelity is against the source's rows; a second way to it.
    kls = []
    for (_, before), (_, after) in zip(source.decoded(), found.decoded(), strict=True):
        original, whole = values_of(before, after)
        assert whole.all()
        kls.append(kl_rows(original, np.asarray(after.logprobs)))
    recorded = found.header.fidelity or {}
    assert recorded["kl_mean"] == pytest.approx(np.concatenate(kls).mean(), rel=1e-6)
    assert found.header.capture["converted"]["source_codec"] == source.codec.to_dict()

    # Fewer ids: the first of them, and what the others had is missing.
    smaller = tmp_path / "smaller"
    convert(found, smaller, codec=target_codec(found, config(), folder=smaller, prior_rows=150))
    for (_, before), (_, after) in zip(found.decoded(), Dataset.open(smaller).decoded(), strict=True):
        kept = np.asarray(before.logprobs)[:, :50]
        for row in range(len(kept)):
            assert {*after.ids[row]} == {*before.ids[row][:50]}
        assert np.abs(missing(np.asarray(after.logprobs)) - missing(kept)).max() < 0.02

    # More ids than there are: a fixed format cannot, a compact one stores those that there are.
    small = Dataset.open(smaller)
    with refused(InputError, "50", "128"):
        target_codec(small, preset("recommended", vocab_size=SAMPLE.vocab_size), folder=tmp_path / "x")
    assert target_codec(small, config("compact-128"), folder=tmp_path / "x", prior_rows=150).k == 50
    with refused(MismatchError, "1,000"):
        target_codec(small, preset("budget", vocab_size=1000), folder=tmp_path / "x")
    back = tmp_path / "back"
    convert(small, back, codec=target_codec(small, preset("budget", vocab_size=SAMPLE.vocab_size), folder=back))
    assert Dataset.open(back).codec.is_fixed
    assert verify_dataset(back).ok


def test_a_conversion_keeps_masks_labels_and_columns(tmp_path: Path) -> None:
    codec = Codec(preset("recommended", vocab_size=SAMPLE.vocab_size))
    header = Header(codec=codec.to_dict(), vocab_size=SAMPLE.vocab_size, head_size=SAMPLE.vocab_size)
    kept = pa.schema([pa.field("title", pa.string())])
    ids, part = documents()[1]
    extra: dict[str, Any] = {
        "loss_mask": np.arange(len(ids)) % 2 == 0,
        "segment_lengths": np.array([5, len(ids) - 5]),
        "label_logprobs": np.full(len(ids) - 1, -2.5, np.float32),
    }
    with ShardWriter(tmp_path / "source", header, kept=kept) as writer:
        writer.write(ids, part, columns={"title": "a"}, **extra)
    source = Dataset.open(tmp_path / "source")
    convert(source, tmp_path / "out", codec=Codec(config()))
    [document] = Dataset.open(tmp_path / "out")
    assert document.doc_id == source[0].doc_id
    assert {name: np.array_equal(getattr(document, name), extra[name]) for name in extra} == dict.fromkeys(extra, True)
    assert dict(document.columns or {}) == {"title": "a"}


def test_rows_with_fewer_ids_do_not_fit_a_fixed_format(prior: Prior, tmp_path: Path) -> None:
    source = write(tmp_path / "adaptive", Codec(config("compact-adaptive")))
    counts = inspect_dataset(source).ids_per_row
    assert counts[:-1].sum() > 0
    with refused(InputError, "ids", "compact"):
        convert(source, tmp_path / "fixed", codec=Codec(preset("budget", vocab_size=SAMPLE.vocab_size)))


def test_an_interrupted_conversion_goes_on(compact: Path, tmp_path: Path) -> None:
    source = Dataset.open(compact)
    codec = target_codec(source, config(step=0.01), folder=tmp_path, prior_rows=150)
    convert(source, tmp_path / "whole", codec=codec, shard_tokens=50)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    again = tmp_path / "again"
    again.mkdir()
    for name in ("prior.bin", "data-00000.parquet"):
        (again / name).write_bytes(whole[name])
    # The prior that is there is used, not another learned from other rows.
    resumed = target_codec(source, config(step=0.01), folder=again, prior_rows=100)
    convert(source, again, codec=resumed, shard_tokens=50)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == whole


def test_a_prior_of_another_configuration_is_adapted(compact: Path, prior: Prior) -> None:
    source = Dataset.open(compact)
    same = target_codec(source, config(), folder="x", prior=prior)
    assert same.prior == prior
    adapted = target_codec(source, config(step=0.01), folder="x", prior=prior)
    assert adapted.prior is not None
    assert adapted.prior.config == config(step=0.01)


def test_the_commands(compact: Path, tmp_path: Path) -> None:
    write(tmp_path / "source", Codec(preset("recommended", vocab_size=SAMPLE.vocab_size)))
    arguments = ["--preset", "compact-50", "--prior", compact]
    result = run_here("convert", tmp_path / "source", tmp_path / "out", *arguments)
    assert result.returncode == 0, result.stderr
    check_names(result.stderr + result.stdout, "prior.bin", "not the teacher's own", "KL")
    assert run_here("verify", tmp_path / "out").returncode == 0
    found = json.loads(run_here("inspect", tmp_path / "out", "--json").stdout)
    parts = found["bytes_per_token"]
    assert {"ids", "values", "head", "framing", "prior", "overhead"} < {*parts}
    assert parts["total"] == pytest.approx(sum(parts[name] for name in parts if name not in ("codec", "total")))
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.parquet"))
    prior = (tmp_path / "out" / "prior.bin").stat().st_size
    assert parts["total"] * found["rows"] == pytest.approx(size + prior, rel=0.01)
    assert found["codec"]["preset"] == "compact-50"
    check_names(found["fidelity"]["source"], "converted")
    table = run_here("inspect", tmp_path / "out", "--plot", tmp_path / "plot.png")
    check_names(table.stdout, "head", "prior", "published layout", "by entropy")
    wrong = run_here("convert", compact, tmp_path / "x", "--prior", compact)
    assert wrong.returncode == 2
    check_names(wrong.stderr, "--preset")


# -- packing and training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_packed_rows_are_those_of_the_documents(name: str, tmp_path: Path) -> None:
    source = write(tmp_path / "source", Codec(config(name)))
    # Reads everything back and compares it, row by row.
    report = pack_dataset(source, tmp_path / "packed", 100, overflow="split")
    assert report.documents == len(LENGTHS)
    assert report.split == 1
    assert verify_dataset(tmp_path / "packed").ok


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_the_loader_decode(start: str, tmp_path: Path) -> None:
    from torch.utils.data import DataLoader

    from distillkit.training.data.examples import Collator, DistillationDataset
    from distillkit.training.signals.stored import OfflineSignal

    wanted = config("compact-adaptive")
    source = write(tmp_path / "source", Codec(wanted, prior=Prior.learn(wanted, rows(0, LEARNED))))
    data = DistillationDataset(source, OfflineSignal(source.codec, SAMPLE.vocab_size, on_device=True), 64)
    loader = DataLoader(data, batch_size=5, num_workers=1, collate_fn=Collator(), multiprocessing_context=start)
    [batch] = loader
    expected = Collator()([data[index] for index in range(len(data))])
    for name in ("teacher_ids", "teacher_logprobs"):
        assert batch[name].equal(expected[name])


def test_a_threshold_with_zero_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from distillkit.losses.config import LossConfig
    from distillkit.training.run import _tell_dropped_mass

    adaptive, fixed = write(tmp_path / "a", Codec(config("compact-adaptive"))), write(tmp_path / "b", Codec(config()))
    for source, handling, warned in (
        (adaptive, "zero", True),
        (adaptive, None, True),
        (adaptive, "uniform", False),
        (fixed, "zero", False),
    ):
        caplog.clear()
        losses = [LossConfig(function="kl", weight=1.0, missing_probability_handling=handling)]  # type: ignore[arg-type]
        run = type("Run", (), {"loss_functions": losses})()
        with caplog.at_level(logging.WARNING):
            _tell_dropped_mass(run, source)  # type: ignore[arg-type]
        assert ("0.85" in caplog.text) is warned, (handling, caplog.text)

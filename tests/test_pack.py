"""Packed datasets on disk: every document is there with its own rows, however the run went."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from distillkit.cli.compat import pack_logits
from distillkit.cli.main import cli
from distillkit.errors import ConfigError, CorruptDataError, InputError, MismatchError
from distillkit.shards import Dataset, ShardWriter, verify_dataset
from distillkit.shards.overflow import Pieces
from distillkit.shards.repack import pack_dataset
from distillkit.training.data.examples import DistillationDataset
from distillkit.training.signals.stored import OfflineSignal
from distillkit.types import Overflow
from support.refusals import check_names, refused
from support.training import VOCABULARY, exact_codec, header_for, random_documents, teacher_rows, tiny_model

MAX_LEN = 32
DOCUMENTS = [*random_documents(40, seed=2), np.array([5], dtype=np.int32)]


def write(folder: Path, rows: str) -> Dataset:
    """Documents with masks, some longer than a row, one of a single token, one that is packed already."""
    teacher, generator = tiny_model(7), np.random.default_rng(0)
    header = header_for(exact_codec(), alignment={"row": "t predicts t+1", "rows": rows})
    with ShardWriter(folder, header) as writer:
        for number, ids in enumerate(DOCUMENTS):
            mask = generator.random(len(ids)) < 0.6 if number % 4 == 0 else None
            segments = [1, len(ids) - 1] if number == 3 else None
            taught = teacher_rows(teacher, ids, rows=len(ids) if rows == "L" else None)
            writer.write(ids, taught, loss_mask=mask, segment_lengths=None if segments is None else np.array(segments))
    return Dataset.open(folder)


def examples(dataset: Dataset, overflow: Overflow = "cut") -> list[tuple[Any, ...]]:
    """What is trained on, position by position: the context, the token to predict, the teacher's ids and values."""
    signal = OfflineSignal(exact_codec(), VOCABULARY)
    data = DistillationDataset(dataset, signal, MAX_LEN, pieces=Pieces.of(dataset.lengths(), MAX_LEN, overflow))
    found = []
    for index in range(len(data)):
        example = data[index]
        starts = np.repeat(
            np.cumsum(example.segment_lengths) - example.segment_lengths, example.segment_lengths
        ).tolist()
        for place, t in enumerate(example.positions.tolist()):
            tokens = tuple(example.input_ids[starts[t] : t + 2].tolist())
            found.append((tokens, *(example.teacher[name][place].tobytes() for name in ("ids", "logprobs"))))
    return sorted(found)


@pytest.mark.parametrize(
    ("rows", "seed", "overflow"),
    [("L-1", None, "cut"), ("L", 7, "cut"), ("L-1", 7, "split"), ("L", None, "split"), ("L-1", None, "drop")],
)
def test_everything_that_is_trained_on_is_in_the_packed_rows(
    rows: str, seed: int | None, overflow: Overflow, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", rows)
    progress: list[tuple[int, int]] = []
    report = pack_dataset(
        source,
        tmp_path / "packed",
        MAX_LEN,
        overflow=overflow,
        seed=seed,
        window=15,
        progress=lambda *state: progress.append(state),
    )
    packed = Dataset.open(tmp_path / "packed")
    assert examples(packed) == examples(source, overflow)
    assert verify_dataset(tmp_path / "packed").ok
    assert packed.header.alignment == source.header.alignment
    assert packed.header.capture["packed"]["max_len"] == MAX_LEN
    kept = np.array([len(ids) for ids in DOCUMENTS if len(ids) > 1])
    long = kept > MAX_LEN
    assert (report.left_out, report.rows, report.tokens) == (1, len(packed), packed.num_tokens)
    assert report.documents == (~long).sum() if overflow == "drop" else len(kept)
    assert (report.dropped, report.split, report.cut_documents) == tuple(
        long.sum() if overflow == name else 0 for name in ("drop", "split", "cut")
    )
    assert report.cut_tokens == (np.maximum(kept - MAX_LEN, 0).sum() if overflow == "cut" else 0)
    if overflow != "split":
        assert report.tokens == np.minimum(kept, MAX_LEN)[~long | (overflow == "cut")].sum()
    assert report.fill > 0.8
    assert progress[-1][0] == progress[-1][1] > 0


def test_labels_stay_beside_their_tokens(tmp_path: Path) -> None:
    """Each label's log-probability names its token, so that it can be told from any other."""
    teacher = tiny_model(7)
    with ShardWriter(tmp_path / "source", header_for(exact_codec())) as writer:
        for ids in DOCUMENTS:
            writer.write(ids, teacher_rows(teacher, ids), label_logprobs=-ids[1:].astype(np.float32))
    pack_dataset(Dataset.open(tmp_path / "source"), tmp_path / "packed", MAX_LEN)
    counted = 0
    for document in Dataset.open(tmp_path / "packed"):
        assert document.label_logprobs is not None
        inside = np.ones(len(document.input_ids), bool)
        inside[np.cumsum(document.segments()) - 1] = False
        np.testing.assert_array_equal(document.label_logprobs[inside[:-1]], -document.input_ids[1:][inside[:-1]])
        counted += int(inside.sum())
    assert counted == sum(max(min(len(ids), MAX_LEN) - 1, 0) for ids in DOCUMENTS)


def test_an_interrupted_run_goes_on_and_ends_with_the_same_files(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "L-1")

    def run(folder: Path, interrupt: Callable[[int, int], None] = lambda *_: None) -> Any:
        return pack_dataset(source, folder, MAX_LEN, window=9, shard_tokens=100, progress=interrupt)

    def after_some(done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "packed", after_some)
    assert not (tmp_path / "packed" / "manifest.json").exists()
    report = run(tmp_path / "packed")
    assert 0 < report.resumed_rows < report.rows == whole.rows
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "packed").iterdir())
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes() for name in names)
    with refused(InputError, str(tmp_path / "packed")):
        run(tmp_path / "packed")


def test_an_interrupted_run_does_not_go_on_with_other_documents(tmp_path: Path) -> None:
    """Of the same number and lengths: what is stored tells, before there is a dataset of it."""
    source = write(tmp_path / "source", "L-1")
    with ShardWriter(tmp_path / "masked", replace(source.header, fidelity=None)) as writer:
        for document in source:
            mask = np.zeros(len(document.input_ids), bool)
            writer.write(document.input_ids, document.teacher, loss_mask=mask)

    def interrupt(done: int, total: int) -> None:
        if done > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_dataset(source, tmp_path / "packed", MAX_LEN, window=9, shard_tokens=100, progress=interrupt)
    with refused(CorruptDataError, str(tmp_path / "packed"), str(tmp_path / "masked")):
        pack_dataset(Dataset.open(tmp_path / "masked"), tmp_path / "packed", MAX_LEN, window=9, shard_tokens=100)
    assert not (tmp_path / "packed" / "manifest.json").exists()


def test_another_packing_is_not_mixed_in(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "L-1")

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_dataset(source, tmp_path / "packed", MAX_LEN, shard_tokens=100, progress=stop)
    with refused(MismatchError, "capture.packed.max_len", "32", "16"):
        pack_dataset(source, tmp_path / "packed", 16, overflow="cut")
    with refused(MismatchError, "capture.packed.overflow", "'split'"):
        pack_dataset(source, tmp_path / "packed", MAX_LEN, overflow="split")


def test_what_was_not_written_as_it_was_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "source", "L-1")
    honest = ShardWriter.write

    def careless(self: ShardWriter, input_ids: Any, teacher: Any, **rest: Any) -> None:
        honest(self, input_ids, bytes(teacher[-64:]) + bytes(teacher[:-64]), **rest)

    monkeypatch.setattr(ShardWriter, "write", careless)
    with pytest.raises(CorruptDataError, match=r"packed.*\bdocument \d+ .*source"):
        pack_dataset(source, tmp_path / "packed", MAX_LEN)


def test_nothing_to_pack(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "source", header_for(exact_codec())) as writer:
        writer.write(np.array([5]), b"")
    source = Dataset.open(tmp_path / "source")
    with refused(InputError, str(tmp_path / "source"), "1"):
        pack_dataset(source, tmp_path / "packed", 8)
    with refused(InputError, "max_len", "1", "2"):
        pack_dataset(source, tmp_path / "packed", 1)


GOLDEN = Path(__file__).parent / "golden" / "upstream_v1"


def test_the_command_and_its_published_name_do_the_same(tmp_path: Path) -> None:
    runner = CliRunner()
    command = ["pack", str(GOLDEN), str(tmp_path / "a"), "--max-len", "64", "--json"]
    refusal = runner.invoke(cli, command)
    assert isinstance(refusal.exception, ConfigError)
    check_names(str(refusal.exception), str(GOLDEN), "8 of 8", "60.0%", "160", "--overflow", "split", "cut", "drop")
    ours = runner.invoke(cli, [*command, "--overflow", "cut"])
    assert ours.exit_code == 0, ours.output
    assert json.loads(ours.stdout)["documents"] == 8
    options = "--max-len 64 --num-proc 2 --max-iters 10 --batch-size 10000 --remove-columns text"
    theirs = runner.invoke(
        pack_logits.main, ["--dataset", str(GOLDEN), "--output", str(tmp_path / "b"), *options.split()]
    )
    assert theirs.exit_code == 0, theirs.output
    for name in ("manifest.json", "data-00000.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    shuffled = ["--dataset", str(GOLDEN), "--output", str(tmp_path / "c"), "--max-len", "64", "--shuffle-seed", "1"]
    assert runner.invoke(pack_logits.main, shuffled).exit_code == 0
    assert len(Dataset.open(tmp_path / "c")) == len(Dataset.open(tmp_path / "a"))
    manifests = [(tmp_path / name / "manifest.json").read_bytes() for name in "ac"]
    assert manifests[0] != manifests[1]

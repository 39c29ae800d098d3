"""Captures written to storage elsewhere, and shared out over a Ray cluster: the same bytes as in a local folder."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import torch
from fsspec import AbstractFileSystem
from fsspec.asyn import AsyncFileSystem

from distillkit.capture.shard_plan import read_plan
from distillkit.errors import CaptureError, InputError
from distillkit.shards import Dataset, read_manifest, verify_dataset
from distillkit.shards.storage import Folder
from support.capturing import files, run
from support.refusals import refused
from support.teachers import HEAD


def contents(url: str) -> dict[str, bytes]:
    """All files under a URL by their path in it."""
    filesystem, root = fsspec.core.url_to_fs(url)
    filesystem.invalidate_cache()
    paths = filesystem.find(root)
    return {path.split(root.strip("/") + "/", 1)[-1]: filesystem.cat_file(path) for path in paths}


@pytest.fixture(scope="module")
def whole(teacher: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An uninterrupted capture in a local folder, with one thread as Ray's workers have."""
    folder = tmp_path_factory.mktemp("captured") / "whole"
    run(teacher, text, folder)
    return files(folder)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An S3 server on loopback, with a bucket."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    variables = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "the-key",
        "AWS_SECRET_ACCESS_KEY": "the-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket/captures"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.mark.parametrize("storage", ["memory", pytest.param("s3", marks=pytest.mark.slow)])
def test_storage_elsewhere(
    storage: str, teacher: Path, text: Path, whole: dict[str, bytes], request: pytest.FixtureRequest, caplog: Any
) -> None:
    url = f"memory://{os.getpid()}/captured" if storage == "memory" else request.getfixturevalue("s3") + "/one"
    with caplog.at_level("DEBUG", logger="distillkit"):
        part = run(teacher, text, url, shard_range="0:2")
        assert part.unfinished_shards > 0
        assert read_manifest(url) is None
        report = run(teacher, text, url)
    assert 0 < report.resumed_documents < report.documents
    assert contents(url) == whole
    dataset = Dataset.open(url)
    assert (len(dataset), dataset.num_tokens) == (report.documents, report.tokens)
    assert verify_dataset(url).ok
    assert "the-secret" not in caplog.text
    assert b"the-secret" not in b"".join(contents(url).values())


@pytest.mark.slow
def test_no_half_shard_is_ever_visible(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large file goes up in parts; nobody sees it before the last one, nor after an upload that failed."""
    import s3fs

    folder, seen = Folder(f"{s3}/parts"), []
    folder.make()
    honest = s3fs.S3FileSystem._call_s3

    async def watched(self: Any, method: str, *args: Any, **kwargs: Any) -> Any:
        if method == "upload_part":
            listing = await honest(self, "list_objects_v2", Bucket="bucket", Prefix="captures/parts/")
            seen.append([entry["Key"] for entry in listing.get("Contents", [])])
            if failing and len(seen) > 1:
                raise OSError(5, "the network is gone")
        return await honest(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", watched)
    for failing in (True, False):
        seen.clear()
        with folder.new_file("data-00000.parquet") as file:
            for _ in range(120):
                file.stream.write(os.urandom(1 << 20))
            if failing:
                with refused(OSError, "the network is gone"):
                    file.publish()
            else:
                file.publish()
        assert len(seen) > 1, "it was uploaded in parts"
        assert not any(seen)
        assert folder.names() == ([] if failing else ["data-00000.parquet"])
    assert folder.size("data-00000.parquet") == 120 << 20


def test_a_file_that_arrives_in_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(f"memory://{os.getpid()}/cut")
    folder.make()

    def put_part(self: Any, local: str, remote: str, **options: Any) -> None:
        self.pipe_file(remote, Path(local).read_bytes()[:-1])

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "put_file", put_part)
    with folder.new_file("data-00000.parquet") as file:
        file.stream.write(bytes(1000))
        with refused(OSError, "999", "1000"):
            file.publish()


class Silent(AsyncFileSystem):
    """Takes connections, and never answers."""

    protocol = "silent"

    async def _put_file(self, lpath: str, rpath: str, mode: str = "overwrite", **options: Any) -> None:
        await asyncio.sleep(3600)

    async def _info(self, path: str, **options: Any) -> None:
        await asyncio.sleep(3600)


def test_storage_that_does_not_answer_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("silent", Silent, clobber=True)
    monkeypatch.setattr("distillkit.shards.storage._ANSWER_SECONDS", 0.1)
    folder = Folder("silent://bucket/data")
    with refused(TimeoutError, "silent://bucket/data/manifest.json", "put_file"):
        folder.write("manifest.json", b"{}")
    with refused(TimeoutError, "silent://bucket/data", "info"):
        read_manifest("silent://bucket/data")


class Locked(AbstractFileSystem):
    """A storage whose library has errors of its own."""

    protocol = "locked"

    def info(self, path: str, **options: Any) -> None:
        raise LookupError("no credentials")

    makedirs = info


def test_errors_of_storage_are_those_of_files() -> None:
    fsspec.register_implementation("locked", Locked, clobber=True)
    for attempt in (lambda: Folder("locked://bucket/data").make(), lambda: read_manifest("locked://bucket/data")):
        with refused(OSError, "locked://bucket/data", "no credentials"):
            attempt()


@pytest.mark.parametrize("place", ["", "s3://", "http://", "file://"])
def test_a_place_that_is_none_is_refused(place: str) -> None:
    """Such as of a variable that is not set: not the current folder, or one of the protocol's name."""
    for attempt in (Folder, Dataset.open):
        with refused(InputError, f"'{place}'" if place else "''"):
            attempt(place)


def test_a_second_capture_elsewhere_that_replaced_a_finished_one_says_so(
    teacher: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There are no locks there: both capture everything, and their bytes differ."""
    url = f"memory://{os.getpid()}/twice"
    options = {"samples": 10, "shard_tokens": 10**6}
    from distillkit.capture import pipeline

    honest, started = pipeline.encode_rows, []

    def other(codec: Any, rows: Any) -> Any:
        if not started:
            started.append(0)
            run(teacher, text, url, **options)
        data, *measured = honest(codec, rows)
        return data[::-1], *measured

    monkeypatch.setattr(pipeline, "encode_rows", lambda *given: (honest if started else other)(*given))
    with refused(CaptureError, url, "data-00000.parquet"):
        run(teacher, text, url, **options)


# -- Ray ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of this machine."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("PYTHONPATH", os.pathsep.join(["python", os.environ.get("PYTHONPATH", "")]))
        ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_workers_one_of_which_is_killed(cluster: None, teacher: Path, text: Path, tmp_path: Path) -> None:
    """Ray's own warnings are none of ours. Workers have one thread each, whatever their number.

    They also score what the prior is learned from.
    """
    compact = {"compression_config": {"vocab_size": HEAD, "k": 16, "step": 0.003}, "prior_rows": 2000}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run(teacher, text, tmp_path / "one", shard_tokens=200, **compact)
    torch.set_num_threads(threads)
    expected = files(tmp_path / "one")

    out, killed = tmp_path / "two", []

    def kill_a_worker() -> None:
        """Once a shard is done, one of the workers goes."""
        while not list(out.glob(".capture/data-*.json")):
            time.sleep(0.001)
        workers = [process for process in psutil.process_iter() if "MapBatches(_ShardWorker)" in process.name()]
        workers[0].kill()
        killed.append(len(list(out.glob(".capture/data-*.json"))))

    killer = threading.Thread(target=kill_a_worker)
    killer.start()
    report = run(teacher, text, out, shard_tokens=200, workers="ray", num_workers=2, **compact)
    killer.join()
    assert report.unfinished_shards == 0
    assert 0 < killed[0] < report.shards, "shards that were done when a worker was killed"
    assert {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} == set(expected)
    assert files(out) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_stops_a_ray_worker_is_said(cluster: None, teacher: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"input_ids": [5, 6, 7]}\n{"input_ids": [5, 8, 7, 9]}\n')
    out = tmp_path / "out"
    run(teacher, rows, out, shard_range="0:0", shard_tokens=1)
    plan = read_plan(Folder(out))
    assert plan is not None
    damaged = out / ".capture" / "documents-00001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-5])
    with refused(CaptureError, "documents-00001.parquet"):
        run(teacher, rows, out, shard_tokens=1, workers="ray", num_workers=1)
    assert [path.name for path in out.glob("*.parquet")] in ([], ["data-00000.parquet"])

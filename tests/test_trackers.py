"""Experiment trackers with the real packages, kept on this machine: what they get, and that nothing leaves it."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from distillkit.errors import ConfigError, DistillKitError
from distillkit.training.run import train
from distillkit.training.trackers import tracking
from support.refusals import refused
from support.training import run_config

LOSSES = [{"function": "cross_entropy", "weight": 1}, {"function": "kl", "weight": 1}, {"function": "kl", "weight": 1}]


def config_for(parts: dict[str, str], output: Path, **arguments: Any) -> Any:
    merged = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "run_name": "first", **arguments}
    return run_config(
        parts["student"],
        output,
        parts["train"],
        parts["eval"],
        project_name="my-project",
        loss_functions=LOSSES,
        training_args=merged,
    )


@pytest.fixture
def outside() -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that everything HTTP would go through; it notes who comes, and turns them away."""
    came: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(2)
                came.append(connection.recv(200))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", came
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    thread.join(5)


def launch(config: Any, folder: Path, proxy: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    """Run `distillkit CONFIG --json` in a folder, with the trackers kept offline and everything else behind the
    proxy."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "TRACKIO"))}
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"), proxy)
    environment |= {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost", "OMP_NUM_THREADS": "1"}
    environment |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    result = subprocess.run(
        [sys.executable, "-m", *launcher, "distillkit", "--json", str(path)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result


def wandb_records(folder: Path) -> list[Any]:
    """The records of the one offline run in a folder (a LevelDB log of protocol buffers)."""
    from wandb.proto import wandb_internal_pb2

    (path,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    content, at, whole, records = path.read_bytes(), 7, b"", []
    assert content.startswith(b":W&B")
    while at + 7 <= len(content):
        left = 32_768 - at % 32_768
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last of several parts
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            records.append(record)
            whole = b""
    return records


def wandb_logs(records: list[Any]) -> list[dict[str, float]]:
    return [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


def trackio_rows(folder: Path, table: str, column: str) -> list[dict[str, Any]]:
    with sqlite3.connect(folder / "trackio" / "my-project.db") as database:
        rows = database.execute(f"select {column} from {table} order by id").fetchall()
    database.close()
    return [json.loads(row[0]) for row in rows]


@pytest.mark.slow
def test_trackers_get_every_metric_once_and_send_nothing(
    parts: dict[str, str], tmp_path: Path, outside: tuple[str, list[bytes]]
) -> None:
    """Two processes, of which the first one tells the trackers."""
    proxy, came = outside
    config = config_for(
        parts, tmp_path / "out", report_to=["wandb", "trackio", "tensorboard"], per_device_train_batch_size=2
    )
    launcher = ("torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m")
    result = launch(config, tmp_path, proxy, *launcher)
    assert json.loads(result.stdout)["steps"] == 4, "stdout has the summary alone"
    assert came == []

    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval_loss" in line]
    assert (len(trained), len(held_out)) == (4, 2)
    names = {"train/loss", "train/cross_entropy", "train/kl", "train/kl@2", "train/top1_agreement"}
    names |= {"train/tokens_per_second", "train/data_wait", "train/teacher_mass", "train/student_mass"}
    records = wandb_records(tmp_path)
    for logs in (wandb_logs(records), trackio_rows(tmp_path, "metrics", "metrics")):
        theirs = [log for log in logs if "train/loss" in log]
        assert names <= set(theirs[0])
        for log, ours in zip(theirs, trained, strict=True):
            for name, value in ours.items():
                if name != "step":
                    assert log[f"train/{name}"] == pytest.approx(value), name
        assert [log["eval/kl"] for log in logs if "eval/kl" in log] == pytest.approx([e["eval_kl"] for e in held_out])

    run = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (run.project, run.display_name) == ("my-project", "first")
    (settings,) = trackio_rows(tmp_path, "configs", "config")
    assert settings["distillkit"]["student"]["path"] == parts["student"]
    assert [loss["name"] for loss in settings["distillkit"]["losses"]] == ["cross_entropy", "kl", "kl@2"]
    assert len(list((tmp_path / "out" / "runs").glob("*/events.out.tfevents.*"))) == 1


def test_a_tracker_that_is_missing_is_one_message_before_any_model_loads(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "distillkit.text.tokenizer.load_tokenizer", lambda *_, **__: pytest.fail("it has begun to load")
    )
    # What is found here depends on what is installed: it is asked for, and must not be there.
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard"])
    with refused(ConfigError, "training_args.report_to", "'mlflow'", "tensorboard"):
        train(config_for(parts, tmp_path, report_to=["tensorboard", "mlflow"]))


class FakeWandb:
    """As much of wandb as closing its run needs."""

    class errors:  # noqa: N801 - as it is named there
        class Error(Exception):
            pass

    def __init__(self) -> None:
        self.run: object | None = None
        self.finished: list[int] = []

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)
        self.run = None


def test_a_run_of_wandb_ends_with_the_training(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    config = config_for(parts, tmp_path)
    with tracking(config):
        fake.run = object()
        assert os.environ["WANDB_PROJECT"] == "my-project"
    assert os.environ["WANDB_PROJECT"] == "mine"
    fake.run = None

    def ending_with(error: BaseException) -> None:
        with tracking(config):
            fake.run = object()
            raise error

    with pytest.raises(KeyboardInterrupt):
        ending_with(KeyboardInterrupt())
    assert fake.finished == [0, 1]
    with refused(DistillKitError, "wandb", "api_key not configured"):
        ending_with(fake.errors.Error("api_key not configured"))
    # One that was there before is somebody else's.
    fake.run = object()
    with tracking(config):
        pass
    assert fake.run is not None

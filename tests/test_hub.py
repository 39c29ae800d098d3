"""Captures and students on the hub, tried on a stand-in of its API: pushing, resuming, refusals, cards, and reading by
ranges."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from distillkit.bench.sample import bundled_sample
from distillkit.cli.main import cli
from distillkit.codec import Codec, CompactConfig, Prior
from distillkit.codec.presets import COMPACT_PRESETS
from distillkit.errors import CorruptDataError, DistillKitError, InputError, MismatchError
from distillkit.hub import push
from distillkit.hub.pushing import _Repository
from distillkit.shards import Dataset, Header, ShardWriter, verify_dataset
from distillkit.types import SparseLogprobs
from support.hub import TOKEN, Hub, running_hub, using
from support.refusals import refused
from support.shards import files, make_documents, write
from support.training import run_config

NAME = "datasets/me/captured"
# huggingface_hub's own way to send a file, with its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of several shards, above the size at which the stand-in stores a file by LFS."""
    folder = tmp_path_factory.mktemp("hub") / "captured"
    write(folder, make_documents(120), shard_tokens=500)
    assert len(list(folder.glob("data-*.parquet"))) > 2
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub() as running, using(running, tmp_path / "cache", monkeypatch):
        yield running


def front_matter(card: str) -> dict[str, Any]:
    _, header, _ = card.split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(header)
    return found


def test_a_pushed_capture_is_the_same_and_only_what_is_used_is_read(hub: Hub, captured: Path) -> None:
    report = push(captured, "me/captured", license="apache-2.0")
    there = hub.repositories[NAME]
    assert there.private
    assert report.private
    assert {name: there.files[name] for name in files(captured)} == files(captured)
    assert report.uploaded == len(there.files) == len(files(captured)) + 1
    # The manifest makes the dataset readable, and comes last.
    assert there.commits[-1] == "Manifest and card"

    hub.requests.clear()
    local = Dataset.open(captured)
    dataset = Dataset.open("hf://datasets/me/captured")
    assert (len(dataset), dataset.num_tokens) == (len(local), local.num_tokens)
    assert hub.read("data-") == 0  # nothing of any shard to open it
    document = dataset[len(dataset) - 1]
    assert document.teacher == local[-1].teacher
    assert np.array_equal(document.input_ids, local[-1].input_ids)
    touched = local.shards[-1]
    # Its footer several times, and the rest once.
    assert hub.read("data-") == hub.read(touched.file) < 3 * touched.bytes
    rows, expected = dataset.decode(0), local.decode(0)
    assert np.array_equal(rows.ids, expected.ids)
    assert np.array_equal(rows.logprobs, expected.logprobs)
    assert verify_dataset("hf://datasets/me/captured@main").ok


def test_the_card_is_made_from_the_header(hub: Hub, captured: Path) -> None:
    push(captured, "captured", license="mit")
    card = hub.repositories[NAME].files["README.md"].decode()
    fields = front_matter(card)
    assert "distillkit" in fields["tags"]
    assert (fields["license"], fields["size_categories"]) == ("mit", ["n<1K"])
    assert fields["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "data-*.parquet"}]}
    ]
    local = Dataset.open(captured)
    for fact in (f"{len(local):,}", f"{local.num_tokens:,}", "`a teacher`", "`tiny`", "hf://datasets/me/captured"):
        assert fact in card
    # Cards of ours are rewritten; a card that someone edited is kept.
    assert push(captured, "captured", license="mit").card == "unchanged"
    assert push(captured, "captured").card == "written"
    hub.repositories[NAME].files["README.md"] = b"# my own words\n"
    assert push(captured, "captured").card == "kept"
    assert hub.repositories[NAME].files["README.md"] == b"# my own words\n"


def test_an_interrupted_push_goes_on(hub: Hub, captured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distillkit.hub.pushing._COMMIT_FILES", 1)
    shards = len(Dataset.open(captured).shards)
    commits = iter([_Repository._commit] * 2)

    def stop(self: _Repository, *arguments: Any) -> None:
        commit = next(commits, None)
        if commit is None:
            raise KeyboardInterrupt
        commit(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(_Repository, "_commit", stop)
        with pytest.raises(KeyboardInterrupt):
            push(captured, "me/captured", verify=False)
    assert sorted(hub.repositories[NAME].files) == ["data-00000.parquet", "data-00001.parquet"]
    with refused(InputError, "hf://datasets/me/captured"):
        Dataset.open("hf://datasets/me/captured")
    resumed = push(captured, "me/captured", verify=False)
    assert (resumed.already_there, resumed.uploaded) == (2, shards - 2 + 2)
    assert files(captured).items() <= hub.repositories[NAME].files.items()
    again = push(captured, "me/captured")
    assert (again.uploaded, again.card) == (0, "unchanged")


def test_a_compact_dataset_takes_its_prior_along(hub: Hub, tmp_path: Path) -> None:
    sample = bundled_sample()
    k = COMPACT_PRESETS["compact-50"]["k"]
    rows = SparseLogprobs(sample.ids[:120, :k], sample.logprobs[:120, :k])
    config = CompactConfig(vocab_size=sample.vocab_size, **COMPACT_PRESETS["compact-50"])
    codec = Codec(config, prior=Prior.learn(config, rows))
    header = Header(codec=codec.to_dict(), vocab_size=sample.vocab_size, head_size=sample.vocab_size)
    with ShardWriter(tmp_path / "compact", header, prior=codec.prior) as writer:
        writer.write(np.append(0, rows.ids[:, 0]), rows)
    report = push(tmp_path / "compact", "me/compact")
    assert hub.repositories["datasets/me/compact"].files.keys() > files(tmp_path / "compact").keys() > {"prior.bin"}
    card = hub.repositories["datasets/me/compact"].files["README.md"].decode()
    sizes = sum(len(data) for name, data in files(tmp_path / "compact").items() if name != "manifest.json")
    assert f"{sizes / Dataset.open(tmp_path / 'compact').num_rows:,.1f} bytes with all else" in card
    assert "compact-50" in card
    found, expected = (Dataset.open(place).decode(0) for place in ("hf://datasets/me/compact", tmp_path / "compact"))
    assert np.array_equal(found.ids, expected.ids)
    assert np.array_equal(found.logprobs, expected.logprobs)
    assert push(tmp_path / "compact", report.repo).uploaded == 0


def test_what_must_not_be_pushed_is_refused(hub: Hub, captured: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(captured, tmp_path / "damaged")
    shard = damaged / "data-00001.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 255
    shard.write_bytes(content)
    with refused(CorruptDataError, "data-00001.parquet"):
        push(damaged, "me/captured")
    unfinished = shutil.copytree(captured, tmp_path / "unfinished", ignore=shutil.ignore_patterns("manifest.json"))
    with refused(InputError, "manifest.json", "unfinished"):
        push(unfinished, "me/captured")
    with refused(InputError, "data-00000.parquet"):
        push(captured / "data-00000.parquet", "me/captured")
    published = Path(__file__).parent / "golden" / "upstream_v1"
    with refused(InputError, "convert"):
        push(published, "me/captured")
    assert hub.repositories == {}  # none of these was a reason to ask the hub for anything


def test_other_content_is_left_alone(hub: Hub, captured: Path, tmp_path: Path) -> None:
    write(tmp_path / "other", make_documents(10, seed=5))
    push(tmp_path / "other", "me/captured")
    before = dict(hub.repositories[NAME].files)
    with refused(MismatchError, "me/captured", "manifest.json"):
        push(captured, "me/captured")
    hub.repositories[NAME].files.pop("manifest.json")
    with refused(MismatchError, "me/captured", "data-00000.parquet"):
        push(captured, "me/captured")  # a push of the other that was interrupted
    hub.repositories[NAME].files = {"train.csv": b"a,b\n"}
    with refused(MismatchError, "me/captured", "train.csv"):
        push(captured, "me/captured")
    assert before["manifest.json"] == files(tmp_path / "other")["manifest.json"]
    assert hub.repositories[NAME].files == {"train.csv": b"a,b\n"}


def test_refusals_of_the_hub_say_what_to_do(
    hub: Hub, captured: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    messages = []

    def message(repo: str = "me/captured", **options: Any) -> str:
        with pytest.raises(DistillKitError) as caught:
            push(captured, repo, verify=False, **options)
        messages.append(str(caught.value))
        return messages[-1]

    assert "write access" in message("team/captured")
    assert "OWNER/NAME" in message("a/b/c")
    hub.failing["POST", "/api/repos/create"] = (401, 1)
    assert "hf auth login" in message()
    hub.failing["POST", "/commit/"] = (403, 1)
    assert "write access" in message()
    with refused(DistillKitError, "hf://datasets/me/nowhere", "404"):
        Dataset.open("hf://datasets/me/nowhere")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in message()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "HTTPS_PROXY" in message()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in message()
    assert all(TOKEN not in text for text in [*messages, caplog.text])


def test_the_page_about_the_hub_is_true(
    hub: Hub, captured: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(captured.parent)
    page = (Path(__file__).parents[1] / "docs" / "hub.md").read_text(encoding="utf-8")
    commands = re.findall(r"^distillkit (push .*)$", page, flags=re.MULTILINE)
    for command in commands:
        result = CliRunner().invoke(cli, shlex.split(command))
        assert result.exit_code == 0, result.output
    assert [there.private for there in hub.repositories.values()] == [True, False]
    for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(snippet, {})
    assert "captured dataset hf://datasets/me/captured" in capsys.readouterr().out


def test_the_command_pushes_and_reports(hub: Hub, captured: Path) -> None:
    result = CliRunner().invoke(cli, ["push", str(captured), "me/captured", "--public", "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["repo"], report["private"], report["already_there"]) == ("me/captured", False, 0)
    # What is to be private does not go to a public repository.
    refusal = CliRunner().invoke(cli, ["push", str(captured), "me/captured"])
    assert "--public" in str(refusal.exception)
    again = CliRunner().invoke(cli, ["push", str(captured), "me/captured", "--public"])
    assert "public" in again.stdout
    assert "hf://datasets/me/captured" in again.stdout


def test_a_dry_run_reads_a_capture_on_the_hub_without_downloading_it(
    hub: Hub, parts: dict[str, str], tmp_path: Path
) -> None:
    from distillkit.training.dry_run import dry_run

    push(parts["train"], "me/train")
    config = run_config(parts["student"], tmp_path / "trained", parts["train"])
    content = config.model_dump(mode="json", exclude_unset=True)
    content["dataset"]["train_dataset"] = {"repo_id": "me/train", "revision": "main"}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    checked = dry_run(tmp_path / "train.yaml")
    assert checked.ok, [check for check in checked.checks if check.status == "failed"]
    assert hub.read("data-") > 0
    assert not list((tmp_path / "cache").rglob("data-*"))


@pytest.mark.usefixtures("without_plots")
def test_a_student_and_its_card_are_pushed(hub: Hub, parts: dict[str, str], tmp_path: Path) -> None:
    """Trained on a capture on the hub; the card says from what, with which losses, and how well."""
    from transformers import AutoModelForCausalLM

    from distillkit.training.distillation import DistillationTrainer

    for name in ("train", "eval"):
        push(parts[name], f"me/{name}")
    args = {"max_steps": 2, "eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1, "disable_tqdm": True}
    args |= {"output_dir": str(tmp_path / "student"), "report_to": "none", "gradient_checkpointing": False}
    trainer = DistillationTrainer(
        parts["student"],
        args,
        train_dataset="hf://datasets/me/train",
        eval_dataset="me/eval",  # downloaded
        sequence_length=64,
        loss_functions=[{"function": "kl", "weight": 1.0}],
    )
    trainer.train()
    trainer.push_to_hub()
    there = hub.repositories["models/me/student"]
    card = there.files["README.md"].decode()
    fields = front_matter(card)
    assert fields["datasets"] == ["me/eval", "me/train"]
    assert "base_model" not in fields
    assert "1 kl" in card
    assert "from_pretrained('me/student')" in card
    assert "KL(teacher ‖ student)" in card
    assert str(tmp_path) not in card
    assert trainer.summary is not None
    assert f"{trainer.summary['eval_last']['eval_kl']:.4f}" in card
    assert TOKEN.encode() not in b"".join(there.files.values())
    pulled = AutoModelForCausalLM.from_pretrained("me/student")
    assert pulled.config.vocab_size == trainer.model.config.vocab_size

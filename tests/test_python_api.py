"""The Python way: `import distillkit` is light, its names work, results print well, and `DistillationTrainer` is a
transformers Trainer that does what a YAML file does."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

import distillkit
from distillkit.capture.engine_settings import ENGINES
from distillkit.capture.options import CaptureOptions
from distillkit.capture.settings import CaptureSettings
from distillkit.console import progress_bar
from distillkit.errors import ConfigError, MismatchError
from distillkit.reports.model_card import CARD_MARK
from distillkit.shards import Dataset
from distillkit.training.config.objects import TrainerSettings
from distillkit.training.config.schema import DatasetSection, RunConfig
from distillkit.training.distillation import DistillationTrainer
from distillkit.training.run import train
from support.refusals import refused
from support.training import losses_of, random_documents, run_config, save_student

LOSSES: list[dict[str, Any]] = [
    {"function": "cross_entropy", "weight": 0.25},
    {"function": "kl", "weight": 0.75},
]


def arguments(folder: Path, **settings: Any) -> transformers.TrainingArguments:
    """Those of `run_config`, as an object."""
    return transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "max_steps": 4,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        },
    )


class Steps(transformers.TrainerCallback):  # type: ignore[misc]
    """Counts steps."""

    def __init__(self) -> None:
        self.count = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1


@pytest.mark.usefixtures("without_plots")
def test_objects_train_the_student_that_a_yaml_file_trains(parts: dict[str, str], tmp_path: Path) -> None:
    """Model, tokenizer, datasets and arguments as objects: the same losses in every step, and the same weights."""
    train(run_config(parts["student"], tmp_path / "yaml", parts["train"], parts["eval"]))
    steps = Steps()
    trainer = DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(parts["student"]),
        arguments(tmp_path / "python"),
        train_dataset=Dataset.open(parts["train"]),
        eval_dataset=Dataset.open(parts["eval"]),
        processing_class=AutoTokenizer.from_pretrained(parts["student"]),
        callbacks=[steps],
        loss_functions=LOSSES,
        sequence_length=64,
    )
    before = trainer.evaluate()["eval_kl"]
    assert not (tmp_path / "python" / "metrics.jsonl").exists()  # which may be that of an earlier run
    assert trainer.train().global_step == steps.count == 4
    trainer.save_model()
    after = trainer.evaluate()["eval_kl"]
    assert after < before
    # By name: other documents have another KL, the same have the same, and neither is part of the record.
    recorded = (tmp_path / "python" / "metrics.jsonl").read_text()
    assert trainer.evaluate(parts["train"])["eval_kl"] != after
    assert trainer.evaluate(parts["eval"])["eval_kl"] == after
    assert (tmp_path / "python" / "metrics.jsonl").read_text() == recorded
    with refused(ConfigError, "nowhere"):
        trainer.evaluate("nowhere")
    assert losses_of(tmp_path / "python") == losses_of(tmp_path / "yaml")
    weights = [AutoModelForCausalLM.from_pretrained(tmp_path / way).state_dict() for way in ("yaml", "python")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert all(CARD_MARK in (tmp_path / way / "README.md").read_text(encoding="utf-8") for way in ("yaml", "python"))
    assert trainer.summary is not None
    assert trainer.summary == json.loads((tmp_path / "python" / "summary.json").read_text())


@pytest.mark.usefixtures("without_plots")
def test_names_are_enough_and_a_stopped_run_resumes(parts: dict[str, str], tmp_path: Path) -> None:
    """Five lines; a checkpoint of another run is refused as with YAML."""

    def trainer(**settings: Any) -> DistillationTrainer:
        args = {"learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "report_to": "none", "disable_tqdm": True}
        args |= {"lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "out")}
        args |= {"max_steps": settings.pop("steps"), "gradient_checkpointing": False}
        return DistillationTrainer(parts["student"], args, train_dataset=parts["train"], **settings)

    trainer(steps=2).train()
    with refused(ConfigError, str(tmp_path / "nowhere")):
        trainer(steps=4).train(resume_from_checkpoint=tmp_path / "nowhere")
    with refused(MismatchError, "loss_functions"):
        trainer(steps=4, loss_functions=LOSSES).train(resume_from_checkpoint=True)
    resumed = trainer(steps=4)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4
    assert sorted(losses_of(tmp_path / "out")) == [1, 2, 3, 4]


def test_what_does_not_fit_is_refused_as_in_a_yaml_file(parts: dict[str, str], tmp_path: Path) -> None:
    args, data = arguments(tmp_path, label_smoothing_factor=0.1, eval_strategy="epoch"), parts["train"]
    with refused(ConfigError, "label_smoothing_factor", "eval_strategy"):
        DistillationTrainer(parts["student"], args, train_dataset=data)
    with refused(ConfigError, "overflwo", "overflow"):
        DistillationTrainer(parts["student"], args, train_dataset=data, overflwo="cut")  # type: ignore[call-arg]
    with refused(ConfigError, "train_dataset[1]", "int"):
        DistillationTrainer(parts["student"], {}, train_dataset=[data, 1])  # type: ignore[arg-type]
    with refused(ConfigError, "args", "int"):
        DistillationTrainer(parts["student"], 3, train_dataset=data)  # type: ignore[arg-type]
    with refused(ConfigError, "capturd"):
        DistillationTrainer(parts["student"], {}, train_dataset="capturd")
    with refused(ConfigError, "studnet"):
        DistillationTrainer("./studnet", {}, train_dataset=data)
    other = AutoTokenizer.from_pretrained(parts["other"])
    with refused(MismatchError, "tokenizer"):
        DistillationTrainer(parts["student"], {}, train_dataset=Dataset.open(data), processing_class=other)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
def test_a_model_with_adapters_is_trained_in_them(parts: dict[str, str], tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    def adapted() -> PeftModel:
        base = AutoModelForCausalLM.from_pretrained(parts["student"])
        return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))

    args = arguments(tmp_path / "out", max_steps=1)
    trainer = DistillationTrainer(adapted(), args, train_dataset=parts["train"], sequence_length=64)
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert "in LoRA adapters" in card
    saved = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(parts["student"]), tmp_path / "out")
    changed = [name for name, value in saved.named_parameters() if "lora_B" in name and value.abs().sum() > 0]
    assert changed
    # Another adapter on top is refused; a card that was edited is kept.
    with refused(ConfigError, "peft"):
        DistillationTrainer(adapted(), args, train_dataset=parts["train"], sequence_length=64, peft={"r": 2})
    (tmp_path / "out" / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    trainer.save_model()
    assert "# mine" in (tmp_path / "out" / "README.md").read_text()


def test_tokens_are_not_saved(parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "before")
    args = arguments(tmp_path, hub_token="hf_aaaabbbbccccddddeeee")
    trainer = DistillationTrainer(parts["student"], args, train_dataset=parts["train"], sequence_length=64)
    assert b"hf_aaaabbbb" not in pickle.dumps(trainer.args)


def test_every_setting_is_typed() -> None:
    parameters = {"model", "dataset", "output", "preset", "compression_config"}
    engines = {name for part in ENGINES.values() for name in part.model_fields}
    assert {*CaptureOptions.__annotations__} == {*CaptureSettings.model_fields, *engines} - parameters
    elsewhere = {"model", "output_path", "dataset", "training_args", "train_dataset", "eval_dataset"}
    assert {*TrainerSettings.__annotations__} == {*RunConfig.model_fields, *DatasetSection.model_fields} - elsewhere


def test_the_package_is_light_and_has_its_names() -> None:
    """In a process of its own: the names are there before they are imported, and `capture` is a package, too."""
    code = """
import sys, distillkit
heavy = {"torch", "numpy", "pyarrow", "transformers", "pydantic", "rich"} & {*sys.modules}
assert not heavy, heavy
assert {*distillkit.__all__} <= {*dir(distillkit)}
import distillkit.capture
assert callable(distillkit.capture) and callable(distillkit.forecast) and distillkit.capture.capture
assert distillkit.inspect and distillkit.train and distillkit.push and distillkit.verify
assert distillkit.Codec(distillkit.preset("budget", vocab_size=100)) and distillkit.Dataset.open
assert not {"torch", "transformers"} & {*sys.modules}
try:
    distillkit.captur
except AttributeError:
    pass
else:
    raise SystemExit("captur")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def snippets() -> list[str]:
    page = (Path(__file__).parents[1] / "docs" / "python.md").read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.usefixtures("without_plots")
def test_the_page_about_python_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of its code, one block after the other, with a small teacher and student; and what the results print."""
    monkeypatch.chdir(tmp_path)
    sizes = {"vocabulary": 160, "max_position_embeddings": 1024}
    save_student(tmp_path / "teacher", seed=0, **sizes)
    save_student(tmp_path / "student", seed=1, **sizes)
    rows = [{"input_ids": ids.tolist(), "name": f"<b>{n}</b>"} for n, ids in enumerate(random_documents(12))]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names: dict[str, Any] = {}
    for code in snippets():
        exec(code, names)
    printed = capsys.readouterr().out
    for fact in ("forecast: captured", "captured dataset captured", "{'name': '<b>0</b>'}", "trained: trained_live"):
        assert fact in printed
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "trained").config.vocab_size == 160
    assert "knowledge-distillation" in (tmp_path / "trained" / "README.md").read_text()

    document = names["document"]
    assert document.columns["name"] == "<b>0</b>"
    assert pickle.loads(pickle.dumps(document.columns)) == document.columns
    assert repr(document) == (
        f"<Document {document.doc_id}: {len(document.input_ids)} tokens, {document.num_rows} rows in "
        f"{len(document.teacher):,} bytes, columns name>"
    )
    for result, fact in (
        (names["forecast"], "recommended"),
        (names["report"], f"{names['report'].tokens:,}"),
        (distillkit.inspect("captured", progress=False), "alignment"),
        (distillkit.verify("captured"), "valid"),
        (names["trainer"].summary, "steps"),
    ):
        assert fact in repr(result)
        assert fact in result._repr_html_()
        assert max(map(len, repr(result).splitlines())) < 200


def test_names_from_data_are_escaped_in_notebooks(parts: dict[str, str]) -> None:
    dataset = Dataset.open(parts["train"])
    dataset.path = "<script>\x1b[2J"
    assert "&lt;script&gt;" in dataset._repr_html_()
    assert "<script>" not in dataset._repr_html_()
    assert "\x1b" not in repr(dataset) + dataset._repr_html_()


def test_bars_in_notebooks_need_no_widgets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What a kernel's IPython is asked to display: HTML, which replaces itself and is removed at the end."""
    shown: list[str] = []

    class Handle:
        def update(self, content: str) -> None:
            shown.append(content)

    def display(content: str, display_id: bool) -> Handle:
        assert display_id
        shown.append(content)
        return Handle()

    ipython = types.ModuleType("IPython")
    vars(ipython).update(
        get_ipython=lambda: types.SimpleNamespace(kernel=object()),
        display=types.SimpleNamespace(display=display, HTML=str),
    )
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setattr("distillkit.console._NotebookProgress._SECONDS", 0.0)
    with progress_bar("<reading>") as advance:
        advance(3, 10)
    assert any(
        "&lt;reading&gt;" in content and "value='3'" in content and "max='10'" in content and "3/10" in content
        for content in shown
    )
    assert shown[-1] == ""
    with progress_bar("hidden", shown=False) as advance:
        advance(1, 1)
    assert shown[-1] == ""
    assert capsys.readouterr().err == ""

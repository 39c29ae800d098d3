"""What is seen of a training run: the console, waiting for data, report.md and its plots, runs side by side."""

from __future__ import annotations

import io
import json
import logging
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from markdown_it import MarkdownIt
from rich.console import Console

from distillkit.cli.main import cli
from distillkit.console import duration, figure, quiet_libraries
from distillkit.errors import CorruptDataError, InputError
from distillkit.reports import run_plots as training_plots
from distillkit.reports.inspection_plots import plot_text
from distillkit.reports.run_record import RunRecord, read_metrics, read_run
from distillkit.reports.run_report import comparison, markdown, write_report
from distillkit.shards import Dataset
from distillkit.training.callbacks import ConsoleProgress
from distillkit.training.data.examples import DistillationDataset
from distillkit.training.run import Run, train
from distillkit.training.trainer import SignalTrainer
from support.refusals import check_names, refused
from support.runs import write_run
from support.training import random_documents, run_config, tiny_model

PNG = b"\x89PNG"
LOSSES = [
    {"function": "cross_entropy", "weight": 1},
    {"function": "kl", "weight": 2},
    {"function": "kl", "weight": 1, "temperature": 2.0},
]


def config_for(parts: dict[str, str], output: Path, **arguments: Any) -> Any:
    merged = {
        "max_steps": 6,
        "eval_on_start": True,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 3,
        **arguments,
    }
    return run_config(
        parts["student"], output, parts["train"], parts["eval"], loss_functions=LOSSES, training_args=merged
    )


@pytest.fixture(scope="module")
def trained(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with evaluations and checkpoints."""
    output = tmp_path_factory.mktemp("trained") / "run"
    train(config_for(parts, output))
    return output


# -- the report --------------------------------------------------------------------------------------------------------


def test_the_metrics_say_what_was_trained(parts: dict[str, str], trained: Path) -> None:
    first = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    run = first["run"]
    assert run["student"]["path"] == parts["student"]
    assert run["data"]["train"] == {
        "path": parts["train"],
        "documents": 24,
        "tokens": sum(len(document) for document in random_documents(24)),
        "rows": None,
    }
    assert [(loss["name"], loss["weight"]) for loss in run["losses"]] == [
        ("cross_entropy", 0.25),
        ("kl", 0.5),
        ("kl@2", 0.25),
    ]
    assert (run["max_steps"], run["settings"]["batch"], run["teacher"]["k"]) == (6, 4, 8)
    logs = [entry for entry in read_metrics(trained / "metrics.jsonl") if "loss" in entry]
    for log in logs:
        # The names above are those of the logs, and the weights make the loss of its parts.
        total = sum(loss["weight"] * log[loss["name"]] for loss in run["losses"])
        assert log["loss"] == pytest.approx(total, rel=1e-5)
        assert 0.0 <= log["data_wait"] <= 1.0
        assert log["peak_memory_gb"] > 0.1


def test_the_report_has_the_figures_and_its_links_lead_somewhere(trained: Path) -> None:
    text = (trained / "report.md").read_text(encoding="utf-8")
    summary = json.loads((trained / "summary.json").read_text())
    first, last = summary["eval_first"], summary["eval_last"]
    change = last["eval_kl"] / first["eval_kl"] - 1
    row = f" nats | {first['eval_kl']:.4f} | {last['eval_kl']:.4f} | {change:+.1%} |"
    assert row in text
    check_names(text, "6 of 6")
    assert "0.25 cross_entropy + 0.5 kl + 0.25 kl@2 (temperature 2.0)" in text
    assert f" | {summary['data_wait']:.1%} |" in text
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert {"report-quality.png", "report-speed.png", "metrics.jsonl", "summary.json", "checkpoint-3"} <= set(links)
    assert all((trained / link).exists() for link in links)
    for name in ("report-quality.png", "report-speed.png"):
        assert (trained / name).read_bytes().startswith(PNG)


def test_what_a_killed_run_left_is_enough(trained: Path, tmp_path: Path) -> None:
    """No summary, and the last line of the metrics half written."""
    folder = tmp_path / "killed"
    shutil.copytree(trained, folder)
    (folder / "summary.json").unlink()
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text + '{"step": 6, "lo')
    (folder / "report.md").unlink()
    result = CliRunner().invoke(cli, ["report", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = (folder / "report.md").read_text(encoding="utf-8")
    check_names(report, "6 of 6")
    record = read_run(folder)
    assert record.tokens_per_second is not None
    assert record.peak_memory is not None
    (folder / "metrics.jsonl").write_text('{"loss"\n' + text)
    with refused(CorruptDataError, "metrics.jsonl", "line 1"):
        read_run(folder)


@pytest.mark.slow
def test_a_run_that_is_interrupted_has_its_report(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of an earlier run in the folder is left to be taken for this one's."""
    for name in ("summary.json", "report-speed.png"):
        (tmp_path / name).write_text("{}")
    step = SignalTrainer.training_step

    def interrupted(self: Any, *arguments: Any) -> Any:
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        return step(self, *arguments)

    monkeypatch.setattr(SignalTrainer, "training_step", interrupted)
    monkeypatch.setattr("distillkit.reports.run_report._PATIENCE", 0)
    with pytest.raises(KeyboardInterrupt):
        train(config_for(parts, tmp_path))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    check_names(report, "3 of 6")
    assert "| step 0 | step 3 |" in report
    assert not (tmp_path / "summary.json").exists()
    assert (tmp_path / "report-speed.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_a_picture_never_ends_a_run(
    parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no ink")

    monkeypatch.setattr(training_plots, "plot_quality", broken)
    with caplog.at_level(logging.WARNING, logger="distillkit"):
        assert train(config_for(parts, tmp_path, save_strategy="no"))["steps"] == 6
    assert any("no ink" in record.message for record in caplog.records)


def test_without_matplotlib_the_report_says_so(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(trained / "metrics.jsonl", tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert [path.name for path in write_report(read_run(tmp_path))] == ["report.md"]
    check_names((tmp_path / "report.md").read_text(encoding="utf-8"), "matplotlib")


def test_runs_without_evaluations_or_description(tmp_path: Path) -> None:
    """As an earlier release has written them."""
    logs = [{"step": step, "loss": 9.0 / step, "kl": 8.0 / step, "grad_norm": float("nan")} for step in range(1, 100)]
    record = RunRecord(tmp_path, {}, logs, [], None)
    assert list(record.parts) == ["kl"]
    assert record.series("grad_norm") == ([], [])
    training_plots.plot_quality(record, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(PNG)
    with refused(InputError):
        training_plots.plot_speed(record, tmp_path / "speed.png")
    text = markdown(record, [])
    check_names(text, "99")
    assert "nats" not in text, "nothing was evaluated"


def test_runs_side_by_side(parts: dict[str, str], trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(config_for(parts, other, max_steps=3, learning_rate=1e-3))
    rows = dict(comparison([read_run(trained), read_run(other)]))
    assert rows["steps"] == ["6", "3"]
    assert "learning rate 0.001" in rows["optimiser"][1]
    assert "student" not in rows, "what is the same is left out"
    output = tmp_path / "both"
    arguments = ["report", str(trained), str(other), "-o", str(output)]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    check_names(result.output, "KL(teacher ‖ student)")
    assert (output / "comparison.png").read_bytes().startswith(PNG)
    assert "| steps | 6 | 3 |" in (output / "comparison.md").read_text(encoding="utf-8")

    result = CliRunner().invoke(cli, ["report", "--json", str(trained), str(other)], catch_exceptions=False)
    figures = json.loads(result.stdout)
    assert figures["other"]["step"] == 3
    assert figures["run"]["eval_last"]["eval_kl"] < figures["run"]["eval_first"]["eval_kl"]


def test_the_command_needs_no_torch_and_refuses_other_folders(tmp_path: Path) -> None:
    code = (
        "import sys; from distillkit.cli.main import main; sys.argv = ['distillkit', 'report', sys.argv[1]]\n"
        "try: main()\nfinally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 1
    check_names(" ".join(result.stderr.split()), "metrics.jsonl", str(tmp_path))
    assert "Traceback" not in result.stderr


# -- where student and teacher differ ----------------------------------------------------------------------------------


def kl_of(logits: torch.Tensor, ids: Any, logprobs: Any) -> float:
    """KL over the stored ids and the rest, by its definition, in float64."""
    q = logits.double().softmax(-1)[torch.as_tensor(ids)]
    p = torch.as_tensor(logprobs).double().exp()
    rest_p, rest_q = 1 - p.sum(), 1 - q.sum()
    return float((p * (p / q).log()).sum() + rest_p * (rest_p / rest_q).log())


@pytest.mark.parametrize("arguments", [{}, {"packing": True, "per_device_eval_batch_size": 3}])
def test_the_largest_differences_are_kept(parts: dict[str, str], tmp_path: Path, arguments: dict[str, Any]) -> None:
    trainer = Run(config_for(parts, tmp_path, **arguments)).trainer
    metrics = trainer.evaluate()
    found = trainer.differences
    assert found is not None
    dataset, model = Dataset.open(parts["eval"]), tiny_model(1)
    expected: dict[int, list[float]] = {}
    logits = {}
    for number, document in enumerate(dataset):
        rows = dataset.codec.decode_document(document.teacher, document.num_rows)
        with torch.no_grad():
            logits[number] = model(torch.tensor(document.input_ids.tolist())[None]).logits[0]
        expected[number] = [kl_of(logits[number][t], rows.ids[t], rows.logprobs[t]) for t in range(document.num_rows)]
    largest = sorted(
        ((kl, number, t) for number, kls in expected.items() for t, kl in enumerate(kls) if kl >= sorted(kls)[-3:][0]),
        reverse=True,
    )
    positions = found["positions"]
    assert [(each["document"], each["position"]) for each in positions] == [(number, t) for _, number, t in largest]
    assert [each["kl"] for each in positions] == pytest.approx([kl for kl, _, _ in largest], rel=1e-4)
    for each in positions:
        document, t = dataset[each["document"]], each["position"]
        words = [f"t{token}" for token in document.input_ids.tolist()]
        assert each["before"].split() == words[max(0, t - 31) : t + 1]
        assert each["next"]["text"] == words[t + 1]
        rows = dataset.codec.decode_document(document.teacher, document.num_rows)
        q = logits[each["document"]][t].double().softmax(-1)
        assert [token["id"] for token in each["teacher"]] == np.asarray(rows.ids)[t, :5].tolist()
        assert [token["p"] for token in each["teacher"]] == pytest.approx(
            np.exp(rows.logprobs[t, :5]).tolist(), rel=1e-4
        )
        for token in each["teacher"]:
            assert token["student_p"] == pytest.approx(float(q[token["id"]]), rel=1e-3)
        best = q.topk(5)
        assert [token["id"] for token in each["student"]] == best.indices.tolist()
        assert [token["p"] for token in each["student"]] == pytest.approx(best.values.tolist(), rel=1e-3)
    means = sorted(((sum(kls) / len(kls), number) for number, kls in expected.items()), reverse=True)
    assert [each["document"] for each in found["documents"]] == [number for _, number in means]
    assert [each["kl"] for each in found["documents"]] == pytest.approx([kl for kl, _ in means], rel=1e-4)
    agreeing = sum(each["top1_agreement"] * each["positions"] for each in found["documents"])
    assert agreeing / metrics["eval_positions"] == pytest.approx(metrics["eval_top1_agreement"])


def test_they_are_in_the_folder_of_the_run_and_not_pushed_with_it(trained: Path) -> None:
    record = read_run(trained)
    assert record.differences is not None
    assert record.differences["step"] == 6
    mean = sum(each["kl"] * each["positions"] for each in record.differences["documents"])
    last = record.evaluations[-1]
    assert mean / last["eval_positions"] == pytest.approx(last["eval_kl_with_rest"], rel=1e-5)
    assert (trained / "_differences.json").exists(), "transformers pushes no file whose name begins with _"


# -- waiting for data --------------------------------------------------------------------------------------------------


def test_waiting_for_data_is_measured(parts: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a document takes 25 ms here and a step one second: all reading is seen, but for that of evaluations."""
    now = [0.0]
    read, step = DistillationDataset.__getitem__, SignalTrainer.training_step

    def slow_read(self: DistillationDataset, index: int) -> Any:
        now[0] += 0.025 if len(self) == 24 else 10.0
        return read(self, index)

    def slow_step(self: SignalTrainer, *arguments: Any) -> Any:
        now[0] += 1.0
        return step(self, *arguments)

    monkeypatch.setattr(DistillationDataset, "__getitem__", slow_read)
    monkeypatch.setattr(SignalTrainer, "training_step", slow_step)
    monkeypatch.setattr("distillkit.training.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))
    trainer = Run(config_for(parts, tmp_path, save_strategy="no")).trainer
    trainer.train()
    assert trainer.waiting_seconds == pytest.approx(24 * 0.025)
    assert trainer.training_seconds == pytest.approx(24 * 0.025 + 6)
    logged = [entry["data_wait"] for entry in read_metrics(tmp_path / "metrics.jsonl") if "loss" in entry]
    assert len(logged) == 6
    # A batch is read ahead, so the first log has two batches' reading, and the last has none.
    assert logged == pytest.approx([0.2 / 1.2, *[0.1 / 1.1] * 4, 0.0])


# -- the console -------------------------------------------------------------------------------------------------------


def shown(console: Console) -> str:
    """What a run of 400 steps, at its 100th, shows: the file of the console."""
    progress = ConsoleProgress(("cross_entropy", "kl", "kl@2"), console)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=400)
    progress.on_train_begin(None, state, None)
    progress._began = (0, time.monotonic() - 50.0)
    state.global_step = 100
    progress.on_step_end(None, state, None)
    log = {
        "loss": 3.25,
        "cross_entropy": 4.0,
        "kl": 3.0,
        "kl@2": 2.0,
        "top1_agreement": 0.271,
        "learning_rate": 1e-4,
        "tokens_per_second": 1234.5,
        "data_wait": 0.021,
    }
    progress.on_log(None, state, None, log)
    progress.on_log(None, state, None, {"eval_loss": 3.5, "eval_kl": 3.1, "eval_cross_entropy": 4.2})
    progress.on_log(None, state, None, {"train_runtime": 12.0})
    if progress.progress is not None:
        progress.progress.refresh()
    progress.close()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_file_gets_one_plain_line_a_log() -> None:
    training, held_out = shown(Console(file=io.StringIO(), width=80)).splitlines()
    check_names(
        training, "100/400", "3.2500", "CE 4.0000", "KL 3.0000", "kl@2 2.0000", "27.1%", "1.00e-04", "1,234", "2%"
    )
    check_names(held_out, "100/400", "3.5000", "KL 3.1000", "CE 4.2000")
    for line in (training, held_out):
        check_names(line, "2:30")


def test_lines_on_a_narrow_terminal_break_between_figures() -> None:
    log = {
        "loss": 3.25,
        "cross_entropy": 4.0,
        "kl": 3.0,
        "top1_agreement": 0.271,
        "learning_rate": 1e-4,
        "data_wait": 0,
    }
    state = SimpleNamespace(is_world_process_zero=True, global_step=400, max_steps=400)
    texts = {}
    for width in (50, 300):
        console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        ConsoleProgress(("cross_entropy", "kl"), console).on_log(None, state, None, log)
        assert isinstance(console.file, io.StringIO)
        texts[width] = console.file.getvalue()
    lines = texts[50].splitlines()
    assert len(lines) == 3
    assert max(map(len, lines)) <= 50
    assert texts[50].split() == texts[300].split()
    # Two spaces are between figures, and one within.
    assert [part for line in lines for part in re.split("  +", line.strip())] == re.split("  +", texts[300].strip())


def test_figures_beyond_reading_are_powers_of_ten() -> None:
    found = [figure(value, "{:,.2f}") for value in (64_639_090_098_375_943_344_095_232.0, 1234.567, 1e7, 9_999_999.0)]
    assert found == ["6.46e25", "1,234.57", "1.00e7", "9,999,999.00"]


def test_a_terminal_gets_a_bar_with_the_time_left_and_no_colour_where_none_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for wanted in (True, False):
        if not wanted:
            monkeypatch.setenv("NO_COLOR", "1")
        text = shown(Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard"))
        coloured = re.search(r"\x1b\[[0-9;]*3[0-7][0-9;]*m", text) is not None
        assert coloured is wanted
        plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        assert re.search(r"training .*100/400 .*2:30 left", plain)


def test_times_are_readable() -> None:
    assert [duration(seconds) for seconds in (0, 7.4, 725, 11_045, 360_000)] == [
        "0:00",
        "0:07",
        "12:05",
        "3:04:05",
        "100:00:00",
    ]


# What a name may do to a terminal, to Markdown (also within a table, where a bar ends the cell), and to a formula.
EVIL = (
    "\x1b]8;;http://evil\x1b\\\x9b31m\u202e",
    "x\n# heading\n\n<script>alert(1)</script>\n\n![i](http://evil/i.png)",
    "a\\|<img src=http://evil>|b`|<b>|``` c",
    "[l](http://evil) <http://evil> http://evil www.evil.org $x_1$ ~~s~~ **b** &lt;",
    "_$\\frac{1}{2}$ [red]x[/red] :boom:",
)


def html_of(text: str) -> str:
    """Markdown with GitHub's tables, as HTML; raw HTML would stay as it is."""
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


def shape(html: str) -> list[str]:
    """The tags of a page, with their links."""
    return re.findall(r"<[^>]+>", html)


def test_names_can_do_nothing_in_a_report_a_plot_or_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [write_run(tmp_path / f"run{number}", name) for number, name in enumerate(EVIL)]
    harmless = write_run(tmp_path / "run", "plain")
    pictures = [("report-quality.png", "Losses")]
    monkeypatch.setenv("FORCE_COLOR", "1")
    for run, name in zip(runs, EVIL, strict=True):
        text = markdown(run, pictures)
        expected = shape(html_of(markdown(harmless, pictures)))
        # The only difference are marks of code around what was plain.
        found = [tag for tag in shape(html_of(text)) if tag not in ("<code>", "</code>")]
        assert found == [tag for tag in expected if tag not in ("<code>", "</code>")], name
        assert "http" not in re.sub(r"<code>.*?</code>", "", html_of(text)), "would become a link"
        result = CliRunner().invoke(
            cli, ["report", str(run.folder), str(harmless.folder)], catch_exceptions=False, color=True
        )
        assert result.exit_code == 0
        # Colours are rich's own; nothing else may begin with an escape character.
        for control in re.findall("\x1b[^m]*m?", result.output):
            assert re.fullmatch(r"\x1b\[[\d;]*m", control), control
        assert re.sub("\x1b\\[[\\d;]*m|\n", "", result.output).isprintable()
    assert (tmp_path / "run0" / "report.md").exists() is False
    names = [f"${name}$_" for name in EVIL]
    training_plots.plot_comparison(runs, names, tmp_path / "comparison.png")
    for run in runs:
        training_plots.plot_quality(run, tmp_path / "quality.png")
    assert (tmp_path / "quality.png").read_bytes().startswith(PNG)


def test_a_name_in_a_plot_is_shown_as_it_is() -> None:
    from matplotlib.cbook import is_math_text

    for name in ("$x$", "a$b", r"\$1$", "$$"):
        shown = plot_text(name)
        assert not is_math_text(shown)
        assert shown.replace(r"\$", "$") == name
    assert not plot_text("_hidden").startswith("_")
    assert len(plot_text("n" * 500)) < 100


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.jsonl", "[" * 100_000 + "\n{}\n"),
        ("metrics.jsonl", '{"step": 1, "loss": 1' + "0" * 5000 + "}\n{}\n"),
        ("metrics.jsonl", '{"step": 0, "run": {"student": 5}}\n'),
        ("metrics.jsonl", '{"step": 0, "run": {"data": {}, "losses": 3}}\n'),
        ("metrics.jsonl", '{"step": "1"}\n'),
        ("metrics.jsonl", '\x00\xff\n{"step": 1}\n'),
        ("summary.json", "[1]"),
        ("summary.json", "{}"),
        ("summary.json", "[" * 100_000),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (tmp_path / file).write_bytes(content.encode("latin-1"))
    with refused(CorruptDataError, str(tmp_path / file)):
        write_report(read_run(tmp_path))


def test_advice_to_install_kernels_for_gpus_is_only_for_those_who_have_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.integrations import hub_kernels

    quiet_libraries()
    advice = "`f` is falling back to its reference PyTorch implementation because `x` is not installed."
    for cuda in (True, False):
        monkeypatch.setattr("torch.cuda.is_available", lambda cuda=cuda: cuda)
        caplog.clear()
        hub_kernels.logger.warning(advice)
        hub_kernels.logger.warning("another warning")
        assert (advice in caplog.text, "another warning" in caplog.text) == (cuda, True)

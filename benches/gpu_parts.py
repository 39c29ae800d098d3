"""The parts of `benches/gpu.py`: `python gpu_parts.py PART FOLDER FIGURES [--tiny]` writes a JSON object to FIGURES.

FOLDER is shared by the parts of a run. Times are medians of several passes, after one that is not counted, measured
between synchronisations with the device.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Record = Callable[[str, dict[str, Any]], None]
"""Takes down what was measured: its name, and figures by their units."""


@dataclass(frozen=True)
class Sizes:
    """What the parts work on.

    Attributes:
        rows: rows that are decoded, over the vocabulary of the losses.
        copied: bytes of the copy that decoding is compared with.
        vocabulary, hidden, positions, k: of the losses.
        model: the random student and teacher, settings of a Llama; its vocabulary is its own.
        length, batch, steps: of training.
        captured: documents of `length` tokens that are captured.
        documents: lengths of the documents that are packed.
        passes: how often everything is timed.
    """

    rows: int
    copied: int
    vocabulary: int
    hidden: int
    positions: int
    k: int
    model: dict[str, int]
    length: int
    batch: int
    steps: int
    captured: int
    documents: tuple[int, ...]
    passes: int


# The shape of Llama-3.2-1B, and the vocabulary of Qwen3.
WHOLE = Sizes(
    rows=65_536,
    copied=2**32,
    vocabulary=151_936,
    hidden=4096,
    positions=8192,
    k=128,
    model={
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    length=2048,
    batch=8,
    steps=14,
    captured=256,
    documents=(128, 900, 2048, 300, 720),
    passes=7,
)
TINY = Sizes(
    rows=64,
    copied=2**16,
    vocabulary=1000,
    hidden=32,
    positions=48,
    k=8,
    model={
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    length=32,
    batch=2,
    steps=5,
    captured=6,
    documents=(5, 20, 32, 9),
    passes=2,
)


def decode(sizes: Sizes, folder: Path, record: Record) -> None:
    """`Codec.decode_torch`, eager and compiled, against the same rows decoded by Rust and the speed of a copy.

    Ids and exact values must have equal bits. The others may differ where the device adds and multiplies in one
    rounding. Bytes are those of a row and of what it decodes to.
    """
    from distillkit import __version__
    from distillkit.codec import Codec, preset

    versions = {"torch": torch.__version__, "transformers": version("transformers"), "distillkit": __version__}
    record(torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU", versions)
    source = torch.empty(sizes.copied, dtype=torch.uint8, device=DEVICE)
    copied = 2 * sizes.copied / timed(source.clone, sizes.passes)
    del source
    record("a copy", {"GB/s": copied / 1e9})
    # Inductor compiles for a CPU in minutes.
    compiled = functools.partial(torch.compile, backend="inductor" if DEVICE.type == "cuda" else "eager")
    for how, prepared in (("eager", lambda function: function), ("compiled", compiled)):
        for name in ("recommended", "faithful", "budget"):
            codec = Codec(preset(name, vocab_size=sizes.vocabulary))
            data = codec.encode(*random_rows(sizes.rows, sizes.vocabulary, codec.k))
            rows, function = torch.from_numpy(data).to(DEVICE), prepared(codec.decode_torch)
            difference = difference_from_rust(codec, data, function(rows))
            seconds = timed(functools.partial(function, rows), sizes.passes)
            moved = sizes.rows * (codec.bytes_per_token + codec.k * 12) / seconds
            record(
                f"{name}, {how}",
                {
                    "tokens/s": sizes.rows / seconds,
                    "GB/s": moved / 1e9,
                    "of the copy's speed": moved / copied,
                    "largest difference of approximated values": difference,
                },
            )


def difference_from_rust(codec: Any, data: Any, decoded: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Check ids and exact values; returns the largest difference of the other values."""
    (ids, logprobs), exact = (part.cpu() for part in decoded), codec.config.exact_k
    expected_ids, expected = (torch.from_numpy(part) for part in codec.decode(data))
    check(torch.equal(ids, expected_ids), f"{codec!r}: ids differ")
    check(torch.equal(bits(logprobs[:, :exact]), bits(expected[:, :exact])), f"{codec!r}: exact values differ")
    return float((logprobs - expected).abs().max())


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


def loss(sizes: Sizes, folder: Path, record: Record) -> None:
    """Cross-entropy and KL in one pass by chunks, against losses of whole logits; KL alone against Liger's.

    Errors are relative, of the gradients of hidden states and of the head's weight, against those of whole logits in
    float32. Memory is the peak during the pass, above the inputs.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    states, weight, targets = loss_problem(sizes)
    for name, sides in loss_sides(sizes, targets).items():
        exact = gradients(functools.partial(whole_losses, targets=targets, name=name), states.float(), weight.float())
        for side, function in sides.items():
            measured = functools.partial(gradients, function, states, weight)
            errors = [float((found - best).norm() / best.norm()) for found, best in zip(measured(), exact, strict=True)]
            figures = {"error of states' gradient": errors[0], "error of weight's gradient": errors[1]}
            figures["ms"] = timed(measured, sizes.passes) * 1e3
            if DEVICE.type == "cuda":
                figures["GB at most"] = peak_of(measured) / 1e9
            record(f"{name}, {side}", figures)
    if "Liger" not in sides:
        record("KL, Liger", {"": "not installed, or no GPU"})


def gradients(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A forward and a backward pass."""
    leaves = [part.detach().requires_grad_() for part in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def loss_problem(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Hidden states, a head's weight, and targets."""
    from distillkit.losses.positions import Targets
    from distillkit.types import SparseLogprobs

    generator = torch.Generator(DEVICE).manual_seed(0)
    states = torch.randn(sizes.positions, sizes.hidden, generator=generator, device=DEVICE).bfloat16()
    weight = torch.randn(sizes.vocabulary, sizes.hidden, generator=generator, device=DEVICE) / sizes.hidden**0.5
    ids, logprobs = (
        torch.from_numpy(part).to(DEVICE) for part in random_rows(sizes.positions, sizes.vocabulary, sizes.k)
    )
    return states, weight.bfloat16(), Targets(ids[:, 0], SparseLogprobs(ids, logprobs))


def loss_sides(sizes: Sizes, targets: Any) -> dict[str, dict[str, Callable[..., torch.Tensor]]]:
    """What is measured, by the losses and by who computes them."""
    from losses import Head

    from distillkit.losses.config import LossConfig
    from distillkit.losses.fused import Objective

    def ours(names: dict[str, float]) -> Callable[..., torch.Tensor]:
        objective = Objective.training([LossConfig(function=name, weight=weight) for name, weight in names.items()])
        return lambda states, weight: objective(Head(weight), states, targets).loss

    def whole(name: str) -> Callable[..., torch.Tensor]:
        return lambda states, weight: whole_losses(states, weight, targets, name)

    both = {"distillkit": ours({"cross_entropy": 0.5, "kl": 0.5}), "whole logits": whole("CE + KL")}
    alone = {"distillkit": ours({"kl": 1.0}), "whole logits": whole("KL")}
    if DEVICE.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

        fused = LigerFusedLinearKLDivLoss(reduction="sum", accum_dtype=torch.float32)
        # It takes the teacher's probabilities of all ids, which are not counted as part of its memory.
        dense = torch.zeros(sizes.positions, sizes.vocabulary, device=DEVICE)
        dense.scatter_(1, targets.teacher.ids, targets.teacher.logprobs.softmax(-1))
        alone["Liger"] = lambda states, weight: fused(states, weight, dense)
    return {"CE + KL": both, "KL": alone}


def whole_losses(states: torch.Tensor, weight: torch.Tensor, targets: Any, name: str) -> torch.Tensor:
    logits = F.linear(states, weight).float()
    target = targets.teacher.logprobs.log_softmax(-1)
    student = logits.log_softmax(-1).gather(-1, targets.teacher.ids)
    divergence = (target.exp() * (target - student)).sum()
    if name == "KL":
        return divergence
    return 0.5 * F.cross_entropy(logits, targets.labels, reduction="sum") + 0.5 * divergence


def packing(sizes: Sizes, folder: Path, record: Record) -> None:
    """Hidden states of documents that share a row, or a padded batch, against those of each alone.

    Differences are relative and the largest of any position. `as one document` is what a model that does not tell the
    documents apart would give; packed ones must be closer by far.
    """
    from transformers import LlamaConfig, LlamaModel

    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(sizes.model["vocab_size"], (length,), generator=generator) for length in sizes.documents]
    ids = torch.cat(documents)[None].to(DEVICE)
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None].to(DEVICE)
    padded = torch.nn.utils.rnn.pad_sequence(documents, batch_first=True).to(DEVICE)
    lengths = torch.tensor(sizes.documents, device=DEVICE)[:, None]
    mask = torch.arange(padded.shape[1], device=DEVICE) < lengths
    for attention in ("sdpa", "flash_attention_2"):
        if attention != "sdpa" and not (DEVICE.type == "cuda" and importlib.util.find_spec("flash_attn")):
            record(attention, {"": "not installed, or no GPU"})
            continue
        torch.manual_seed(0)
        config = LlamaConfig(**sizes.model, max_position_embeddings=8192, attn_implementation=attention)
        with DEVICE:
            model = LlamaModel(config).to(torch.bfloat16).eval()

        @torch.no_grad()
        def states(model: Any = model, **inputs: torch.Tensor) -> torch.Tensor:
            return model(use_cache=False, **inputs).last_hidden_state

        alone = torch.cat([states(input_ids=document[None].to(DEVICE))[0] for document in documents])
        ways: dict[str, Callable[[], torch.Tensor]] = {
            "packed": lambda states=states: states(input_ids=ids, position_ids=positions)[0],
            "padded": lambda states=states: states(input_ids=padded, attention_mask=mask)[mask],
            "as one document": lambda states=states: states(input_ids=ids)[0],
        }
        differences = {}
        for name, way in ways.items():
            change = (way().float() - alone.float()).norm(dim=-1) / alone.float().norm(dim=-1)
            differences[name] = float(change.max())
            speed = ids.shape[1] / timed(way, sizes.passes)
            record(f"{attention}, {name}", {"tokens/s": speed, "largest difference": differences[name]})
        kept_apart = differences["packed"] < differences["as one document"] / 5
        check(kept_apart, f"{attention}: packed documents are not those of each alone")


def inputs(sizes: Sizes, folder: Path, record: Record) -> None:
    """A random model with a tokenizer, documents for it, and a capture with made-up rows for training."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from distillkit.codec import Codec, preset
    from distillkit.shards import Header, ShardWriter
    from distillkit.text.tokenizer import fingerprint
    from distillkit.types import SparseLogprobs

    vocabulary = sizes.model["vocab_size"]
    torch.manual_seed(0)
    with DEVICE:
        config = LlamaConfig(**sizes.model, max_position_embeddings=8192, tie_word_embeddings=True)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder / "model")
    words = WordLevel({f"t{number}": number for number in range(vocabulary)}, unk_token="t0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="t0", eos_token="t1", pad_token="t2"
    )
    tokenizer.save_pretrained(folder / "model")

    generator = np.random.default_rng(0)
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(sizes.captured):
            file.write(json.dumps({"input_ids": generator.integers(3, vocabulary, sizes.length).tolist()}) + "\n")
    codec = Codec(preset("recommended", vocab_size=vocabulary))
    header = Header(
        codec=codec.to_dict(),
        vocab_size=vocabulary,
        head_size=vocabulary,
        tokenizer={"name": "made up", "fingerprint": fingerprint(tokenizer)},
    )
    started = time.perf_counter()
    with ShardWriter(folder / "made-up", header) as writer:
        for _ in range(sizes.batch * sizes.steps):
            ids = generator.integers(3, vocabulary, sizes.length).astype(np.int32)
            rows = SparseLogprobs(*random_rows(sizes.length - 1, vocabulary, codec.k, first=ids[1:]))
            writer.write(ids, rows)
    tokens = sizes.batch * sizes.steps * sizes.length
    parameters = sum(part.numel() for part in model.parameters())
    record("the model", {"parameters": parameters})
    record("rows made up and encoded", {"tokens/s": tokens / (time.perf_counter() - started)})


def training_plain(sizes: Sizes, folder: Path, record: Record) -> None:
    """Cross-entropy alone by transformers' Trainer, in float32 with bf16 autocast; the median of a step."""
    import transformers

    tokens = sizes.batch * sizes.length
    generator = np.random.default_rng(0)
    rows = [generator.integers(3, sizes.model["vocab_size"], sizes.length) for _ in range(sizes.batch * sizes.steps)]
    ends: list[float] = []

    class Clock(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **others: Any) -> None:
            synchronise()
            ends.append(time.perf_counter())

    trainer = transformers.Trainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation="sdpa"
        ),
        args=transformers.TrainingArguments(output_dir=str(folder / "plain"), **training_arguments(sizes)),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[Clock()],
    )
    trainer.train()
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    record("CE", {"tokens/s": tokens / statistics.median(seconds[1:]), **peak_memory()})


def training_ours(sizes: Sizes, folder: Path, record: Record) -> None:
    """Cross-entropy and KL from a capture with 128 ids a token, with the same settings; the median of a step."""
    from distillkit.config import parse_config
    from distillkit.training.run import train

    config = {
        "model": str(folder / "model"),
        "output_path": str(folder / "ours"),
        "sequence_length": sizes.length,
        "teacher": {"kind": "dataset"},
        "dataset": {"train_dataset": {"disk_path": str(folder / "made-up")}},
        "loss_functions": [{"function": "cross_entropy", "weight": 0.5}, {"function": "kl", "weight": 0.5}],
        "use_flash_attention": False,
        "model_kwargs": {"dtype": "float32"},
        # As transformers has it by default.
        "training_args": {**training_arguments(sizes), "gradient_checkpointing": False},
    }
    train(parse_config(config))
    entries = [json.loads(line) for line in (folder / "ours" / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if "tokens_per_second" in entry]
    speed, waited = (statistics.median(step[name] for step in steps[2:]) for name in ("tokens_per_second", "data_wait"))
    record("CE + KL", {"tokens/s": speed, "of the time spent waiting for data": waited, **peak_memory()})


def training_arguments(sizes: Sizes) -> dict[str, Any]:
    return {
        "max_steps": sizes.steps,
        "per_device_train_batch_size": sizes.batch,
        "learning_rate": 1e-5,
        "optim": "adamw_torch_fused",
        "bf16": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": DEVICE.type == "cpu",
    }


def capture(sizes: Sizes, folder: Path, record: Record) -> None:
    """A capture with transformers, against the model's bare forward pass over the same documents, in bf16.

    Both run twice, and the second run counts.
    """
    from transformers import AutoModelForCausalLM

    from distillkit.capture import capture as run_capture

    for attempt in ("warm-up", "captured"):
        report = run_capture(
            model=str(folder / "model"),
            dataset=str(folder / "documents.jsonl"),
            output=str(folder / attempt),
            max_seq_len=sizes.length,
            dtype="bfloat16",
            preset="recommended",
            progress=False,
        )
    lines = (folder / "documents.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["input_ids"] for line in lines]
    batches = torch.tensor(rows, device=DEVICE).split(max(1, 16_384 // sizes.length))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).to(DEVICE).eval()

    @torch.no_grad()
    def forward() -> None:
        for batch in batches:
            model(input_ids=batch, use_cache=False)

    bare = sum(map(len, rows)) / timed(forward, 1)
    record("forward alone", {"tokens/s": bare})
    figures = {
        "tokens/s": report.tokens_per_second,
        "more time than the forward alone": bare / report.tokens_per_second - 1,
        "of the time spent waiting for the encoder": report.blocked_seconds / report.seconds,
        "nats mean KL of the stored rows": report.kl_mean,
    }
    record("capture", {**figures, **peak_memory()})


def tests(sizes: Sizes, folder: Path, record: Record) -> None:
    """The tests that need a CUDA device."""
    files = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider"]
    ended = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, cwd=ROOT)
    print(ended.stdout, ended.stderr)
    check(ended.returncode == 0, f"pytest ended with status {ended.returncode}")
    counts = re.findall(r"(\d+) (passed|skipped|failed)", ended.stdout.splitlines()[-1])
    record("tests", {name: int(count) for count, name in counts})


def random_rows(rows: int, vocabulary: int, k: int, first: Any = None) -> tuple[Any, Any]:
    """Ids (rows, k) int64 and log-probabilities of as many rows, most probable first; the first id may be given."""
    generator = np.random.default_rng(0)
    steps = generator.integers(1, vocabulary // k, (rows, k))
    # Distinct ids: from the first on, steps that never come round.
    steps[:, 0] = generator.integers(vocabulary, size=rows) if first is None else first
    logits = -np.sort(generator.exponential(2.0, (rows, k)), axis=-1).cumsum(-1) / k**0.5
    mass = np.exp(logits).sum(-1, keepdims=True)
    return steps.cumsum(-1) % vocabulary, (logits - np.log(mass) - 0.05).astype(np.float32)


def timed(action: Callable[[], Any], passes: int) -> float:
    """The median time of an action, seconds."""
    action()
    seconds = []
    for _ in range(passes):
        synchronise()
        started = time.perf_counter()
        action()
        synchronise()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def peak_of(action: Callable[[], Any]) -> float:
    """The most memory that an action takes on the GPU, bytes."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    action()
    synchronise()
    return float(torch.cuda.max_memory_allocated() - before)


def peak_memory() -> dict[str, float]:
    return {"GB at most": torch.cuda.max_memory_allocated() / 1e9} if DEVICE.type == "cuda" else {}


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(f"FAILED: {otherwise}")


def main() -> None:
    parts = {
        "decode": decode,
        "loss": loss,
        "packing": packing,
        "inputs": inputs,
        "training-plain": training_plain,
        "training-ours": training_ours,
        "capture": capture,
        "tests": tests,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=parts)
    parser.add_argument("folder", type=Path)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}

    def record(name: str, figures: dict[str, Any]) -> None:
        found[name] = figures
        arguments.figures.write_text(json.dumps(found), encoding="utf-8")
        print(f"{name}: {figures}", flush=True)

    parts[arguments.part](TINY if arguments.tiny else WHOLE, arguments.folder, record)


if __name__ == "__main__":
    main()

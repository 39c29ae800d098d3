"""Completions by the real vLLM, in the process that trains: `make test-vllm`."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from distillkit.errors import DistillKitError
from distillkit.models.adapters import LoraSection, add_adapters
from distillkit.text.tokenizer import load_tokenizer
from distillkit.training.config.schema import RunConfig
from distillkit.training.rollouts.engine import HfEngine, Prompt, Sampling, Student
from distillkit.training.run import train
from support.refusals import refused
from support.rollouts import on_policy, recorded, written
from support.teachers import HEAD, write_llama, write_text
from support.training import losses_of

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.usefixtures("without_plots"),
    # Of importing vLLM, which imports torch's compiler, and of what it calls.
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.distributed.reduce_op` is deprecated:FutureWarning"),
    # TRL names the versions that it has been tested with.
    pytest.mark.filterwarnings("ignore:TRL currently supports vLLM versions:UserWarning"),
]

STOP = frozenset({1, 5})
GENERATOR = np.random.default_rng(0)
PROMPTS = [
    Prompt(100 + number, GENERATOR.integers(6, 100, length).astype(np.int32))
    for number, length in enumerate((1, 5, 30, 200, 7, 9))
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A student whose heads are wide enough for vLLM's kernels, its teacher, and prompts."""
    folder = tmp_path_factory.mktemp("models")
    write_llama(folder / "student", hidden_size=128)
    write_llama(folder / "tied", hidden_size=128, tie_word_embeddings=True)
    write_llama(folder / "teacher", hidden_size=64)
    write_text(folder / "all.jsonl", 12)
    rows = [json.loads(line) for line in (folder / "all.jsonl").read_text().splitlines()]
    prompts = [{"prompt": " ".join(row["text"].split()[:4])} for row in rows]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    return {name: str(folder / name) for name in ("student", "tied", "teacher", "prompts.jsonl")}


@pytest.fixture(scope="module", autouse=True)
def _small_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        yield


def randomness() -> list[Any]:
    return [torch.rand(2).tolist(), np.random.rand(), random.random(), torch.get_num_threads()]


def seed() -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)


def test_it_writes_what_the_student_does_as_its_weights_change(folders: dict[str, str]) -> None:
    """One engine throughout: started, given other weights, and adapters. Its head is the embedding, too."""
    from distillkit.training.rollouts.vllm import VLLMEngine

    model = AutoModelForCausalLM.from_pretrained(folders["tied"])
    tokenizer = load_tokenizer(folders["tied"])
    engine = VLLMEngine(
        Student(model, tokenizer, torch.float32, STOP, PROMPTS[2].ids, 260),
        Sampling(40, 0.0),
        batch_size=4,
        gpu_memory_utilization=0.3,
    )

    def both(model: Any, sampling: Sampling) -> tuple[list[list[int]], list[list[int]]]:
        engine.student = Student(model, tokenizer, torch.float32, STOP, PROMPTS[2].ids, 260)
        engine.sampling = sampling
        engine.synchronise()
        own = HfEngine(model, sampling, stop=STOP, pad_id=2)
        one, other = (each.write(PROMPTS, lambda done, total: None) for each in (own, engine))
        return [ids.tolist() for ids in one], [ids.tolist() for ids in other]

    seed()
    before = randomness()
    seed()
    first, found = both(model, Sampling(40, 0.0))
    assert found == first
    assert {len(ids) for ids in first} > {40}, "some have ended"
    assert randomness() == before, "training's own random numbers and threads are left alone"

    generator = torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.02
    changed, found = both(model, Sampling(40, 0.0))
    assert found == changed != first

    # Drawn by the seed and the number of each completion, whatever else is written.
    _, drawn = both(model, Sampling(40, 0.9, 0.95, seed=3))
    engine.batch_size = 2
    again = engine.write(PROMPTS[::-1], lambda done, total: None)[::-1]
    assert [ids.tolist() for ids in again] == drawn != changed
    assert all(max(ids) < HEAD and not STOP.intersection(ids[:-1]) for ids in drawn)
    _, others = both(model, Sampling(40, 0.9, 0.95, seed=4))
    assert others != drawn

    wrapped = add_adapters(model, LoraSection(r=4), frozenset())
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    adapted, found = both(wrapped, Sampling(40, 0.0))
    assert found == adapted != changed

    with pytest.MonkeyPatch.context() as patch, refused(DistillKitError, "rollouts.engine", "vllm"):
        patch.setattr("distillkit.training.rollouts.vllm.checkpoint_weights", lambda model: {})
        model.get_output_embeddings().weight.data.neg_()
        engine.synchronise()
    engine.close()


def config(folders: dict[str, str], output: Path, engine: str, **arguments: Any) -> RunConfig:
    rollouts = {"engine": engine, "temperature": 0.0, "every": 2, "max_new_tokens": 12}
    return on_policy(
        folders, output, rollouts=rollouts, training_args={"max_steps": 4, "learning_rate": 2e-3, **arguments}
    )


def test_training_with_it_learns_the_same(folders: dict[str, str], tmp_path: Path) -> None:
    rounds: dict[str, Any] = {}
    for engine in ("hf", "vllm"):
        with pytest.MonkeyPatch.context() as patch:
            found = recorded(patch)
            train(config(folders, tmp_path / engine, engine))
            rounds[engine] = written(found)
    assert rounds["vllm"] == rounds["hf"]
    assert losses_of(tmp_path / "vllm") == pytest.approx(losses_of(tmp_path / "hf"), rel=1e-5)

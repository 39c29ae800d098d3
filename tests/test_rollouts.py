"""On-policy training: which rows the student writes, how it draws tokens, what is learned from them, and resuming."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from distillkit.errors import CaptureError, ConfigError, DistillKitError, MismatchError
from distillkit.models.adapters import LoraSection, add_adapters
from distillkit.reports.run_page import run_page
from distillkit.reports.run_record import read_run
from distillkit.training.config.arguments import training_arguments
from distillkit.training.config.schema import RolloutServerConfig, RunConfig
from distillkit.training.config.surroundings import check_surroundings
from distillkit.training.dry_run import dry_run
from distillkit.training.rollouts.engine import HfEngine, Prompt, Sampling, Student, draw
from distillkit.training.rollouts.order import MixedOrder, Slot, WithSlots
from distillkit.training.rollouts.rounds import COMPLETIONS, Completion, Round, repeated
from distillkit.training.rollouts.weights import check_weights, checkpoint_weights
from distillkit.training.run import Run, train
from support.processes import Processes
from support.refusals import check_names, refused
from support.rollouts import SAVING, on_policy, recorded, written
from support.served import Reply, Writer, answering, ok, serving
from support.training import VOCABULARY, losses_of, metrics_of, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("without_plots")

# Before 5.23, transformers calls it gradient checkpointing.
KIND = "activation" if hasattr(PreTrainedModel, "activation_checkpointing_enable") else "gradient"
STOP = 1  # the tokenizer's end of sequence
TEMPLATE = "{% for m in messages %}t3 {{ m.content }} {% endfor %}{% if add_generation_prompt %}t4{% endif %}"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A student and its teacher whose tokenizer splits text into words, and prompts for them."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.chat_template = TEMPLATE
    for name, seed in (("student", 1), ("teacher", 7)):
        tiny_model(seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    generator = np.random.default_rng(0)
    texts = [" ".join(f"t{i}" for i in generator.integers(30, VOCABULARY, length)) for length in (1, 2, 5, 9, 3, 7, 4)]
    rows = [{"prompt": text} for text in texts[:4]]
    rows += [{"prompt": [{"role": "user", "content": texts[4]}]}]
    rows += [{"messages": [{"role": "user", "content": texts[5]}, {"role": "assistant", "content": "t9 t9"}]}]
    rows += [{"text": texts[6]}]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "documents.jsonl").write_text(
        "".join(json.dumps({"text": f"t{n} t5 t6 t7"}) + "\n" for n in range(30, 40))
    )
    return {name: str(folder / name) for name in ("student", "teacher", "prompts.jsonl", "documents.jsonl")}


# -- which rows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "batch", "accumulation"), [(0.3, 2, 5), (0.5, 1, 4), (1.0, 4, 2), (0.99, 3, 1)])
def test_every_step_has_its_share_of_slots(share: float, batch: int, accumulation: int) -> None:
    documents, step = 23, batch * accumulation
    order = MixedOrder(documents, share, seed=5, batch=batch, step=step, fill=True)
    others = MixedOrder(documents, share, seed=5, batch=batch, step=step, fill=True)
    rows = WithSlots(list(range(documents)))  # type: ignore[arg-type]
    slots, seen = 0, []
    for epoch in range(2):
        order.set_epoch(epoch)
        others.set_epoch(epoch)
        indices = list(order)
        assert indices == list(others)
        assert len(indices) % batch == 0
        assert len(indices) == len(order)
        given = [rows[index] for index in indices if index != -1]
        assert sorted(row for row in given if not isinstance(row, Slot)) == ([] if share == 1 else list(range(23)))
        for number in range(order.steps):
            here = [row.number for row in given[number * step : (number + 1) * step] if isinstance(row, Slot)]
            # Known before the rows are read, and numbered on and on.
            assert here == list(order.slots(range(epoch * order.steps + number, epoch * order.steps + number + 1)))
            assert here == list(range(slots, slots + len(here)))
            slots += len(here)
            if number < order.steps - 1:
                assert abs(len(here) - share * step) < 1
        seen.append([isinstance(row, Slot) for row in given])
    if share < 1:
        assert seen[0] != seen[1]


# -- how tokens are drawn ----------------------------------------------------------------------------------------------


def test_tokens_are_drawn_by_their_probabilities() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    uniforms = torch.cat([torch.rand(20_000, generator=torch.manual_seed(0)), torch.tensor([0.0, 1 - 2**-24, 1.0])])
    drawn = draw(probabilities.log().expand(len(uniforms), -1), uniforms)
    assert drawn[-3:].tolist() == [1, 4, 4]
    shares = torch.bincount(drawn, minlength=6) / len(drawn)
    torch.testing.assert_close(shares, probabilities, atol=0.02, rtol=0)
    assert shares[[0, 2, 5]].tolist() == [0, 0, 0]


@torch.no_grad()
def definition(model: Any, prompt: Prompt, sampling: Sampling) -> list[int]:
    """A completion token by token, without a cache, in float64."""
    ids, written = torch.from_numpy(prompt.ids).long(), []
    for uniform in sampling.uniforms(prompt.number):
        logits = model(ids.unsqueeze(0), use_cache=False).logits[0, -1].double()
        if not sampling.temperature:
            token = int(logits.argmax())
        else:
            p, order = (logits / sampling.temperature).softmax(-1).sort(descending=True)
            p[(p.cumsum(-1) - p) >= sampling.top_p] = 0
            p = torch.zeros_like(p).scatter_(0, order, p / p.sum())
            token = int((p.cumsum(-1) <= float(uniform)).sum())
        written.append(token)
        ids = torch.cat([ids, torch.tensor([token])])
        if token == STOP:
            break
    return written


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.6), (0.0, 1.0)])
def test_completions_are_the_students_own(temperature: float, top_p: float) -> None:
    """In batches or alone, padded on the left, with a cache; dropout and the model's own generation settings off."""
    generator = np.random.default_rng(3)
    lengths = [1, 7, 3, 3, 12, 5]
    prompts = [
        Prompt(40 + n, generator.integers(2, VOCABULARY, length).astype(np.int32)) for n, length in enumerate(lengths)
    ]
    sampling = Sampling(10, temperature, top_p, seed=9)
    model = tiny_model(1, attention_dropout=0.5)
    expected = [definition(model, prompt, sampling) for prompt in prompts]
    assert temperature < 1 or {len(each) < 10 for each in expected} == {True, False}  # some have ended
    model.generation_config = own = GenerationConfig(repetition_penalty=1.9, eos_token_id=5)
    model.train()
    getattr(model, f"{KIND}_checkpointing_enable")()
    for size in (1, 4):
        engine = HfEngine(model, sampling, stop=frozenset({STOP}), pad_id=2, batch_size=size)
        assert [each.tolist() for each in engine.write(prompts, lambda done, total: None)] == expected
    assert model.training
    assert model.generation_config is own
    assert all(parameter.grad is None for parameter in model.parameters())


# -- what is learned ---------------------------------------------------------------------------------------------------


def given_completions(trainer: Any) -> Round:
    """Completions that nobody wrote, for the first step."""
    generator = np.random.default_rng(8)
    made = []
    for length, new in ((1, 8), (6, 3), (2, 5), (4, 1)):
        ids = generator.integers(3, VOCABULARY, length + new).astype(np.int32)
        ids[-1] = STOP
        made.append(Completion(ids, length, 0))
    trainer.get_train_dataloader()
    trainer.rollouts.current = Round(range(1), 0, made)
    return trainer.rollouts.current


@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_are_those_of_trls_trainer(words: dict[str, str], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    arguments = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = Run(on_policy(words, tmp_path / "ours", training_args=arguments)).trainer
    completions = given_completions(trainer).completions
    trainer.start_epoch(0)
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
    trainer.model.eval()  # no dropout
    losses = [trainer.compute_loss(trainer.model, batch, num_items_in_batch=count) for batch in batches]
    sum(losses).backward()
    ours = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}

    student, teacher = (AutoModelForCausalLM.from_pretrained(words[name]).eval() for name in ("student", "teacher"))
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    settings = DistillationConfig(str(tmp_path / "trl"), beta=1.0, use_cpu=True, report_to="none", bf16=False)
    other = DistillationTrainer(
        student, teacher, settings, Dataset.from_dict({"prompt": ["t5"]}), processing_class=tokenizer
    )
    before, after = (
        max(map(len, part)) for part in zip(*((c.ids[: c.start], c.written) for c in completions), strict=True)
    )
    inputs = {
        **{f"{part}_ids": torch.full((4, size), 2) for part, size in (("prompt", before), ("completion", after))},
        **{
            f"{part}_mask": torch.zeros(4, size, dtype=torch.long)
            for part, size in (("prompt", before), ("completion", after))
        },
    }
    for row, completion in enumerate(completions):
        for name, where, ids in (
            ("prompt", slice(before - completion.start, before), completion.ids[: completion.start]),
            ("completion", slice(0, len(completion.written)), completion.written),
        ):
            inputs[f"{name}_ids"][row, where] = torch.from_numpy(ids).long()
            inputs[f"{name}_mask"][row, where] = 1
    loss = other.compute_loss(student, inputs, num_items_in_batch=None)
    loss.backward()
    assert int(count) == sum(len(completion.written) for completion in completions)
    assert float(sum(losses)) == pytest.approx(float(loss), rel=1e-5)
    for name, parameter in student.named_parameters():
        assert ((ours[name] - parameter.grad).norm() / parameter.grad.norm()).item() < 1e-5, name


@torch.no_grad()
def divergence_of(words: dict[str, str], completions: list[Completion], student: str | None = None) -> float:
    """KL(student ‖ teacher) over the student's tokens, in float64."""
    models = [
        AutoModelForCausalLM.from_pretrained(each).eval() for each in (student or words["student"], words["teacher"])
    ]
    values = []
    for completion in completions:
        ids = torch.from_numpy(completion.ids).long().unsqueeze(0)
        q, p = (model(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1) for model in models)
        values.append((q.exp() * (q - p)).sum(-1)[completion.start - 1 :])
    return float(torch.cat(values).mean())


@pytest.fixture(scope="module")
def whole(words: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Round]]:
    """An uninterrupted run with a checkpoint after each step, and its rounds."""
    with pytest.MonkeyPatch.context() as patch:
        rounds = recorded(patch)
        for name in ("plot_quality", "plot_speed"):
            patch.setattr(f"distillkit.reports.run_plots.{name}", lambda run, path: None)
        output = tmp_path_factory.mktemp("rollouts") / "whole"
        train(on_policy(words, output, training_args={"max_steps": 5, **SAVING}))
    return output, rounds


def test_rounds_are_measured_before_and_after(words: dict[str, str], whole: tuple[Path, list[Round]]) -> None:
    output, rounds = whole
    assert [(each.steps, each.first, len(each)) for each in rounds] == [(range(3), 0, 11), (range(3, 5), 11, 7)]
    entries = [entry for entry in metrics_of(output) if "rollout_length" in entry or "rollout_kl_after" in entry]
    assert [(entry["step"], "rollout_kl" in entry) for entry in entries] == [
        (0, True),
        (3, False),
        (3, True),
        (5, False),
    ]
    first, after = entries[:2]
    tokens = [completion.written.tolist() for completion in rounds[0].completions]
    assert first["rollout_length"] == pytest.approx(np.mean([len(each) for each in tokens]))
    # The model's generation config has another end than the tokenizer: 2.
    assert first["rollout_ended"] == pytest.approx(np.mean([each[-1] in (STOP, 2) for each in tokens]))
    assert first["rollout_kl"] == pytest.approx(divergence_of(words, rounds[0].completions), rel=1e-5)
    then = divergence_of(words, rounds[0].completions, str(output / "checkpoint-3"))
    assert after["rollout_kl_after"] == pytest.approx(then, rel=1e-5)
    assert after["rollout_kl_after"] < first["rollout_kl"]
    # Every prompt once before any comes again, and with other words then.
    prompts = [completion.prompt for each in rounds for completion in each.completions]
    assert sorted(prompts[:7]) == sorted(prompts[7:14]) == list(range(7))
    assert len({tuple(ids) for _, ids in written(rounds)}) == 18
    training = [entry for entry in metrics_of(output) if "loss" in entry]
    assert len(training) == 5
    assert all(entry["scoring_tokens_per_second"] > 0 for entry in training)
    for page in ((output / "report.md").read_text(), (output / "README.md").read_text(), run_page([read_run(output)])):
        check_names(page, "KL(student ‖ teacher)", "ended by the student", f"{first['rollout_kl']:.4f}")


@pytest.mark.parametrize("step", [2, 3], ids=["in a round", "between rounds"])
def test_a_resumed_run_writes_and_learns_the_same(
    words: dict[str, str], whole: tuple[Path, list[Round]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    output, expected = whole
    assert (output / f"checkpoint-{step}" / COMPLETIONS).exists() == (step == 2)
    rounds = recorded(monkeypatch)
    arguments = {"max_steps": 5, **SAVING, "resume_from_checkpoint": str(output / f"checkpoint-{step}")}
    arguments |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2} if step == 2 else {}
    train(on_policy(words, tmp_path / "resumed", training_args=arguments))
    assert written(rounds) == written(expected)[11 if step == 3 else 0 :]
    later = {number: loss for number, loss in losses_of(output).items() if number > step}
    assert losses_of(tmp_path / "resumed") == pytest.approx(later, rel=1e-6)


def test_another_run_is_not_resumed(words: dict[str, str], whole: tuple[Path, list[Round]], tmp_path: Path) -> None:
    arguments = {"max_steps": 5, **SAVING, "resume_from_checkpoint": str(whole[0] / "checkpoint-2")}
    with refused(MismatchError, "rollouts.temperature", "1.0", "0.5"):
        train(on_policy(words, tmp_path / "resumed", training_args=arguments, rollouts={"temperature": 0.5}))


def test_a_served_teacher_scores_as_a_live_one(
    words: dict[str, str], whole: tuple[Path, list[Round]], tmp_path: Path
) -> None:
    pytest.importorskip("openai")
    teacher = {"kind": "server", "model": words["teacher"], "top_k": VOCABULARY, "max_retries": 0}
    with answering(tiny_model(7)) as (url, _):
        arguments = {**SAVING, "max_steps": 2, "save_strategy": "no"}
        train(on_policy(words, tmp_path / "served", teacher={**teacher, "base_url": url}, training_args=arguments))
    expected = losses_of(whole[0])
    assert losses_of(tmp_path / "served") == pytest.approx({step: expected[step] for step in (1, 2)}, rel=1e-4)
    waits = [entry["teacher_wait"] for entry in metrics_of(tmp_path / "served") if "loss" in entry]
    assert all(0 < wait <= 1 for wait in waits), "the time of measuring the divergence is no training time"


@pytest.mark.slow
def test_two_processes_write_and_learn_what_one_does(
    words: dict[str, str], tmp_path: Path, processes: Processes
) -> None:
    settings: dict[str, Any] = {"rollouts": {"fraction": 0.6}, "dataset": {"train_dataset": words["documents.jsonl"]}}
    for name, count in (("one", 1), ("two", 2)):
        arguments = {"max_steps": 5, "per_device_train_batch_size": 4 // count}
        config = on_policy(words, tmp_path / name, training_args=arguments, **json.loads(json.dumps(settings)))
        train(config) if count == 1 else processes.train(config, tmp_path, count=2)
    one, two = (
        {
            (entry["step"], key): value
            for entry in metrics_of(tmp_path / name)
            for key, value in entry.items()
            if key in ("loss", "rollout_length", "rollout_ended", "rollout_repeated", "rollout_kl", "rollout_kl_after")
        }
        for name in ("one", "two")
    )
    assert len(one) == 5 + 2 * 5
    assert two == pytest.approx(one, rel=1e-4)


# -- engines with a copy of the student -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "adapters",
    [
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["v_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["o_proj"], "trainable_token_indices": [3, 7]},
    ],
    ids=["rslora", "dora", "modules_to_save", "tokens"],
)
def test_a_copy_has_the_adapters_merged_and_the_student_stays_as_it_is(adapters: dict[str, Any]) -> None:
    student = add_adapters(tiny_model(1), LoraSection(r=3, **adapters), frozenset())
    generator = torch.manual_seed(0)
    for name, parameter in student.named_parameters():
        if parameter.requires_grad and not name.endswith("magnitude_vector.default.weight"):
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    found = checkpoint_weights(student)
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    ids = torch.arange(3, 20).unsqueeze(0)
    torch.testing.assert_close(student(ids).logits, copy.deepcopy(student)(ids).logits, rtol=0, atol=0)
    expected = copy.deepcopy(student).merge_and_unload(safe_merge=True).state_dict()
    assert found.keys() == expected.keys()
    torch.testing.assert_close(found, dict(expected), rtol=1e-6, atol=1e-7)


def test_a_copy_has_the_names_of_checkpoints(tmp_path: Path) -> None:
    tied = tiny_model(1, tie_word_embeddings=True)
    tied.save_pretrained(tmp_path)
    assert checkpoint_weights(tied).keys() == load_file(tmp_path / "model.safetensors").keys()


def student_of(model: Any) -> Student:
    probe = np.array([9, 5, 30], np.int32)
    return Student(model, tiny_tokenizer(), torch.float32, frozenset({STOP, 2}), probe, longest=40)


def test_other_weights_are_noticed() -> None:
    ids = np.array([40, 41, 42], np.int32)
    row = tiny_model(1)(torch.tensor([[9, 5, 30, *ids]])).logits[0, 2:-1].double().log_softmax(-1)
    own = row.gather(1, torch.from_numpy(ids).long().unsqueeze(1)).squeeze(1).tolist()
    assert check_weights(student_of(tiny_model(1)), ids, own, engine="vllm") < 1e-6
    with refused(DistillKitError, "rollouts.engine", "vllm", f"{own[0]:.4f}"):
        check_weights(student_of(tiny_model(2)), ids, own, engine="vllm")
    with refused(DistillKitError, "nan"):
        check_weights(student_of(tiny_model(1)), ids, [float("nan")] * 3, engine="vllm")


def greedy(words: dict[str, str], output: Path, url: str | None = None, **settings: Any) -> RunConfig:
    """3 steps in 2 rounds."""
    rollouts: dict[str, Any] = {"temperature": 0.0, "every": 2}
    if url is not None:
        rollouts |= {"engine": "server", "server": {"base_url": url, "max_retries": 0}}
    arguments = {**SAVING, "max_steps": 3, "save_strategy": "no", **settings.pop("training_args", {})}
    return on_policy(words, output, rollouts=rollouts, training_args=arguments, **settings)


@pytest.fixture(scope="module")
def alone(words: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of greedy completions by transformers."""
    output = tmp_path_factory.mktemp("greedy") / "out"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("plot_quality", "plot_speed"):
            patch.setattr(f"distillkit.reports.run_plots.{name}", lambda run, path: None)
        train(greedy(words, output))
    return losses_of(output)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_with_the_students_weights_writes_what_it_would(
    words: dict[str, str], alone: dict[int, float], tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("openai")
    writer = Writer(tiny_model(3), kind)
    with serving(writer) as (url, requests):
        train(greedy(words, tmp_path / "out", url))
    assert writer.loaded == 2
    assert losses_of(tmp_path / "out") == pytest.approx(alone, rel=1e-6)
    assert not (tmp_path / "out" / "rollouts_student").exists()
    assert ("/generate" in {request["path"] for request in requests}) == (kind == "sglang")


def test_the_dry_run_has_the_server_write(words: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("openai")
    writer = Writer(tiny_model(3))
    with serving(writer) as (url, requests):
        config = greedy(words, tmp_path / "out", url)
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
        result = dry_run(path)
    assert result.ok, [check for check in result.checks if check.status == "failed"]
    assert writer.loaded == 1
    memory = next(check for check in result.checks if check.name == "memory")
    assert (memory.figures["engine_bytes"], memory.figures["cache_bytes"]) == (0, 0), "the server's"
    [folder] = {r["kwargs"]["weights_path"] for r in requests if r["path"] == "/collective_rpc"}
    assert not Path(folder).exists()


def test_vllm_is_for_one_process(words: dict[str, str], tmp_path: Path) -> None:
    rollouts = Run(on_policy(words, tmp_path / "out", rollouts={"engine": "vllm"})).rollouts
    assert rollouts is not None
    rollouts._trainer = SimpleNamespace(args=SimpleNamespace(world_size=2))
    with refused(ConfigError, "rollouts.engine", "vllm", "2", "engine: server"):
        rollouts._engine(Sampling(8))


@pytest.mark.slow
def test_one_of_two_processes_gives_the_server_the_weights(
    words: dict[str, str], alone: dict[int, float], tmp_path: Path, processes: Processes
) -> None:
    writer = Writer(tiny_model(3))
    with serving(writer) as (url, _):
        config = greedy(words, tmp_path / "out", url, training_args={"per_device_train_batch_size": 2})
        processes.train(config, tmp_path, count=2)
    assert writer.loaded == 2
    assert losses_of(tmp_path / "out") == pytest.approx(alone, rel=1e-4)


def answer_of(change: Any) -> Any:
    """A server whose answers are changed."""

    def make(writer: Writer) -> Any:
        def answer(path: str, body: Any) -> Reply:
            status, found = writer(path, body)
            return change(path, status, found)

        return answer

    return make


def without_loading(path: str, status: int, found: Any) -> Reply:
    return (status, found) if path == "/v1/models" else (404, {"detail": "Not Found"})


def that_fails_to_load(path: str, status: int, found: Any) -> Reply:
    return (500, {"message": "no such folder"}) if path == "/collective_rpc" and status == 200 else (status, found)


def that_keeps_its_cache(path: str, status: int, found: Any) -> Reply:
    return (status, {"success": False}) if path == "/reset_prefix_cache" else (status, found)


def that_refuses_access(path: str, status: int, found: Any) -> Reply:
    return (status, found) if path == "/v1/models" else (401, {"message": "Unauthorized"})


def that_writes(**choice: Any) -> Any:
    def change(path: str, status: int, found: Any) -> Reply:
        return ok({**found["choices"][0], **choice}) if path == "/v1/completions" else (status, found)

    return change


@pytest.mark.parametrize(
    ("change", "error", "facts"),
    [
        (without_loading, ConfigError, ["/collective_rpc", "/update_weights_from_disk", "VLLM_SERVER_DEV_MODE=1"]),
        (that_fails_to_load, ConfigError, ["no such folder", "rollouts_student", "rollouts.server.folder"]),
        (that_keeps_its_cache, ConfigError, ["/reset_prefix_cache", "False"]),
        (that_refuses_access, ConfigError, ["DISTILLKIT_API_KEY", "Unauthorized"]),
        (that_writes(token_ids=None), CaptureError, ["vLLM", "NoneType"]),
        (that_writes(token_ids=[VOCABULARY]), CaptureError, [str(VOCABULARY), "rows"]),
        (that_writes(token_ids=[STOP, 7]), CaptureError, ["2 tokens", "16", "[0]"]),
        (that_writes(token_ids=[7]), CaptureError, ["1 tokens", "16"]),
        (that_writes(logprobs={"token_logprobs": [-9.0] * 16}), DistillKitError, ["-9.0000", "vLLM at 127.0.0.1"]),
    ],
)
def test_what_a_server_does_wrong_is_named(
    tmp_path: Path, change: Any, error: type[DistillKitError], facts: list[str]
) -> None:
    pytest.importorskip("openai")
    from distillkit.training.rollouts.server import ServerEngine

    with serving(answer_of(change)(Writer(tiny_model(3)))) as (url, _), refused(error, *facts):
        settings = RolloutServerConfig(base_url=url, max_retries=0)
        folder = tmp_path / "rollouts_student"
        engine = ServerEngine(student_of(tiny_model(1)), Sampling(8), settings, folder, batch_size=2, leads=True)
        engine.synchronise()


def test_a_server_that_stops_or_serves_something_else_is_named(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    from distillkit.training.rollouts.server import ServerEngine

    def connect(url: str, **settings: Any) -> ServerEngine:
        given = RolloutServerConfig(base_url=url, max_retries=0, **settings)
        student = dataclasses.replace(student_of(tiny_model(1)), longest=66)
        return ServerEngine(student, Sampling(8, 0.0), given, tmp_path / "w", batch_size=2, leads=True)

    with serving(Writer(tiny_model(3))) as (url, _):
        with refused(ConfigError, "65", "sequence_length"):
            connect(url)
        with refused(ConfigError, "rollouts.server.served_model", "tiny", "'large'"):
            connect(url, served_model="large")
    # It was never there as far as this run knows.
    with refused(CaptureError, "127.0.0.1", "rollouts.server.base_url"):
        connect(url)


def test_only_its_own_folder_is_overwritten_and_removed(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    from distillkit.training.rollouts.server import ServerEngine

    (tmp_path / "model.safetensors").write_text("the user's")
    with serving(Writer(tiny_model(3))) as (url, _):

        def engine(folder: Path) -> ServerEngine:
            settings = RolloutServerConfig(base_url=url, max_retries=0)
            return ServerEngine(student_of(tiny_model(1)), Sampling(8), settings, folder, batch_size=2, leads=True)

        with refused(ConfigError, "rollouts.server.folder", str(tmp_path), "model.safetensors"):
            engine(tmp_path).synchronise()
        engine(tmp_path / "new").synchronise()  # of a run that was killed
        again = engine(tmp_path / "new")
        again.synchronise()
        again.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_an_engine_needs_is_named_if_it_is_missing(
    words: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillkit.training.config.surroundings.find_spec", lambda name: None)
    server = {"engine": "server", "server": {"base_url": "http://localhost:1/v1"}}
    for engine, package in (({"engine": "vllm"}, "distillkit[train,vllm]"), (server, "distillkit[openai]")):
        with refused(ConfigError, "rollouts.engine", f"pip install '{package}'"):
            check_surroundings(on_policy(words, tmp_path / "out", rollouts=engine))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "settings", "facts"),
    [
        ([{"prompt": "t5 t6"}, {"prompt": "  "}], {}, ["line 2", "prompt"]),
        ([{"prompt": "t5 t6"}, {"input_ids": [4, 5]}], {}, ["line 2", "input_ids", "messages"]),
        ([{"messages": [{"role": "assistant", "content": "t5"}]}], {}, ["line 1", "messages"]),
        ([{"prompt": "t5 " * 60}], {}, ["rollouts.prompts", "1 of 1", "56", "60", "max_new_tokens"]),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(
    words: dict[str, str], tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], facts: list[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(on_policy(words, tmp_path / "out", rollouts={"prompts": {"disk_path": str(path)}, **settings}))
    with refused(DistillKitError, *facts):
        _ = run.prompts


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"teacher": {"kind": "dataset"}}, ["rollouts", "teacher.kind: hf or server"]),
        ({"rollouts": {"engine": "server"}}, ["rollouts.server", "base_url"]),
        ({"rollouts": {"server": {"base_url": "http://host/v1"}}}, ["rollouts.server", "engine: hf"]),
        ({"rollouts": {"engine": "server", "server": {"base_url": "host"}}}, ["rollouts.server.base_url", "'host'"]),
        (
            {"rollouts": {"engine": "vllm"}, "model_kwargs": {"load_in_4bit": True}, "peft": {"r": 4}},
            ["rollouts.engine", "vllm", "model_kwargs.load_in_4bit", "engine: hf"],
        ),
        ({"rollouts": {"max_new_tokens": 64}}, ["rollouts.max_new_tokens", "64", "sequence_length"]),
        ({"dataset": {"train_dataset": "documents.jsonl"}}, ["dataset.train_dataset", "rollouts.fraction"]),
        ({"rollouts": {"fraction": 0}}, ["rollouts.fraction", "0"]),
        ({"training_args": {"deepspeed": {}, "fsdp": True}}, ["rollouts", "training_args.fsdp"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    words: dict[str, str], tmp_path: Path, settings: dict[str, Any], facts: list[str]
) -> None:
    with refused(ConfigError, *facts):
        on_policy(words, tmp_path / "out", **settings)


@pytest.mark.parametrize("launched", ["FSDP", "DEEPSPEED"])
def test_a_student_that_accelerate_shards_is_refused(
    words: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: str
) -> None:
    own = {"kind": "hf", "path": words["student"]}
    config = on_policy(words, tmp_path / "out", teacher=own, peft={"r": 2, "merge_on_save": True})
    monkeypatch.setenv(f"ACCELERATE_USE_{launched}", "true")
    with refused(ConfigError, "rollouts", "teacher.path", "peft.merge_on_save"):
        training_arguments(config)


def test_repeated_sequences_are_counted() -> None:
    assert repeated(np.array([5, 5, 5, 5, 5, 5, 5], np.int32)) == pytest.approx(3 / 4)
    assert repeated(np.arange(9, dtype=np.int32)) == 0
    assert repeated(np.array([1, 1, 1, 1], np.int32)) == 0

"""Losses: against float64 oracles written from the definitions, fused against plain, and on the inputs where logarithms
go wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

import reference
from distillkit.errors import ConfigError
from distillkit.lm_head import LMHead, lm_head_of
from distillkit.losses.config import LATER_LOSSES, LOSS_NAMES, LossConfig
from distillkit.losses.fused import Objective
from distillkit.losses.sparse import StudentLogits, cross_entropy, kl
from distillkit.losses.table import LOSSES, Targets
from distillkit.topk import sparse_from_logits
from distillkit.types import SparseLogprobs

MISSING = ["zero", "uniform"]


def teacher_rows(positions: int, vocabulary: int, k: int, seed: int = 0, spread: float = 2.0) -> SparseLogprobs:
    generator = torch.Generator().manual_seed(seed)
    return sparse_from_logits(torch.randn(positions, vocabulary, generator=generator) * spread, k)


def student_logits(positions: int, vocabulary: int, seed: int = 1, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def oracle_kl(logits: np.ndarray, teacher: SparseLogprobs, temperature: float, missing: str) -> float:
    rows = zip(logits, teacher.ids.tolist(), teacher.logprobs.tolist(), strict=True)
    return sum(reference.kl_at(row, ids, logprobs, temperature, missing) for row, ids, logprobs in rows)


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize(
    ("positions", "vocabulary", "k", "temperature"),
    [
        (3, 37, 5, 1.0),
        (2, 37, 5, 2.5),
        (2, 37, 5, 0.5),
        (3, 11, 1, 1.0),
        (2, 11, 1, 3.0),
        (2, 11, 10, 2.0),
        (1, 7, 7, 1.0),
        (2, 7, 7, 2.0),
    ],
)
def test_kl_has_the_value_and_gradient_of_its_definition(
    positions: int, vocabulary: int, k: int, temperature: float, missing: Any
) -> None:
    teacher = teacher_rows(positions, vocabulary, k)
    logits = student_logits(positions, vocabulary).requires_grad_()
    value = kl(StudentLogits(logits), teacher, temperature=temperature, missing=missing)
    value.backward()
    exact = logits.detach().double().numpy()
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(oracle_kl(exact, teacher, temperature, missing), rel=2e-6, abs=1e-6)
    expected = reference.gradient(lambda z: oracle_kl(z, teacher, temperature, missing), exact)
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-4, atol=2e-6)


def test_cross_entropy_has_the_value_and_gradient_of_its_definition() -> None:
    logits, labels = student_logits(4, 19).requires_grad_(), torch.tensor([0, 18, 7, 7])
    cross_entropy(StudentLogits(logits), labels).backward()

    def oracle(z: np.ndarray) -> float:
        return sum(reference.cross_entropy_at(row, int(label)) for row, label in zip(z, labels, strict=True))

    exact = logits.detach().double().numpy()
    assert cross_entropy(StudentLogits(logits), labels).item() == pytest.approx(oracle(exact), rel=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), reference.gradient(oracle, exact), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("missing", MISSING)
def test_a_bfloat16_student_is_computed_in_float32(missing: Any) -> None:
    teacher = teacher_rows(5, 64, 8)
    logits = student_logits(5, 64).bfloat16().requires_grad_()
    value = kl(StudentLogits(logits), teacher, temperature=2.0, missing=missing)
    value.backward()
    assert value.item() == pytest.approx(oracle_kl(logits.detach().double().numpy(), teacher, 2.0, missing), rel=2e-6)
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_storing_every_id_is_the_dense_divergence(missing: Any, temperature: float) -> None:
    dense_teacher, dense_student = student_logits(6, 23, seed=5), student_logits(6, 23, seed=6)
    value = kl(
        StudentLogits(dense_student), sparse_from_logits(dense_teacher, 23), temperature=temperature, missing=missing
    )
    log_p = (dense_teacher.double() / temperature).log_softmax(-1)
    log_q = (dense_student.double() / temperature).log_softmax(-1)
    assert value.item() == pytest.approx(temperature**2 * (log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-5)


@pytest.mark.parametrize("missing", MISSING)
def test_a_student_equal_to_the_teacher_has_no_divergence(missing: Any) -> None:
    logits = student_logits(4, 30, seed=9)
    # Within `zero`, equal means: everything outside the stored ids has no probability.
    outside = torch.ones_like(logits, dtype=torch.bool).scatter(1, sparse_from_logits(logits, 6).ids, False)
    student = logits.masked_fill(outside, -80.0) if missing == "zero" else logits
    assert kl(StudentLogits(student), sparse_from_logits(logits, 6), missing=missing).item() == pytest.approx(
        0, abs=2e-6
    )


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_certainty_and_zero_probabilities_give_no_nan_or_infinity(missing: Any, temperature: float) -> None:
    vocabulary, k = 12, 4
    certain_inside, certain_outside, flat = (torch.full((vocabulary,), fill) for fill in (-500.0, -500.0, 0.0))
    certain_inside[2], certain_outside[9] = 500.0, 500.0
    ids = torch.tensor([2, 0, 1, 3])
    targets = [
        [0.0, -200.0, -1e4, -float("inf")],  # a certain teacher: nothing is missing, and some probabilities are 0
        [np.log(0.25)] * 4,  # exactly nothing missing
        [np.log(0.25) + 1e-3] * 4,  # rounding of a codec: more than everything is stored
        [-20.0, -25.0, -30.0, -60.0],  # almost everything is missing
        [-float("inf")] * 4,  # no mass at all
    ]
    for row in (certain_inside, certain_outside, flat):
        for target in targets:
            logits = row.unsqueeze(0).clone().requires_grad_()
            teacher = SparseLogprobs(ids.unsqueeze(0), torch.tensor([target], dtype=torch.float32))
            value = kl(StudentLogits(logits), teacher, temperature=temperature, missing=missing)
            value.backward()
            assert torch.isfinite(value), (row, target)
            assert torch.isfinite(logits.grad).all(), (row, target)
            assert value.item() >= -1e-5
    assert k == len(ids)


def test_a_certain_student_still_feels_the_missing_mass() -> None:
    """The gradient on the remainder must survive where 1 − Σ q is rounding noise in float32."""
    logits = torch.full((1, 50), -40.0)
    logits[0, 0] = 0.0
    logits.requires_grad_()
    teacher = SparseLogprobs(torch.tensor([[0]]), torch.tensor([[np.log(0.9)]], dtype=torch.float32))
    value = kl(StudentLogits(logits), teacher, missing="uniform")
    value.backward()
    assert value.item() == pytest.approx(oracle_kl(logits.detach().double().numpy(), teacher, 1.0, "uniform"), rel=1e-5)
    assert logits.grad[0, 1:].sum().item() == pytest.approx(-0.1, rel=1e-4)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_divergences_are_never_negative(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, vocabulary))
    seed, spread = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0]))
    student_spread = data.draw(st.sampled_from([0.0, 0.1, 1.0, 5.0, 50.0]))
    temperature = data.draw(st.sampled_from([0.3, 1.0, 1.7, 8.0]))
    # Codecs change log-probabilities a little: the stored mass may exceed 1.
    noise = data.draw(st.sampled_from([0.0, 1e-3, 0.1]))
    teacher = teacher_rows(3, vocabulary, k, seed, spread)
    teacher = SparseLogprobs(teacher.ids, teacher.logprobs + noise)
    student = StudentLogits(student_logits(3, vocabulary, seed + 1, student_spread))
    for missing in MISSING:
        value = kl(student, teacher, temperature=temperature, missing=missing).item()
        # Rounding of logits of this size, in float32.
        assert value >= -1e-6 * (1 + student_spread) * max(temperature, 1.0) ** 2


def test_names_in_the_configuration_and_the_table_agree() -> None:
    assert tuple(LOSSES) == LOSS_NAMES
    published = {"kl", "jsd", "tvd", "hinge", "logistic_ranking", "hs_mse", "hs_cosine", "cross_entropy"}
    assert set(LOSS_NAMES) | set(LATER_LOSSES) == published


# -- the fused pass ----------------------------------------------------------------------------------------------------


def tiny_head(vocabulary: int = 97, dtype: torch.dtype = torch.float32, softcap: float | None = None) -> LMHead:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).to(dtype)
    return LMHead(lm_head_of(model).model, scale=0.7, softcap=softcap)


def problem(positions: int, vocabulary: int = 97, k: int = 7) -> Targets:
    labels = torch.randint(vocabulary, (positions,), generator=torch.Generator().manual_seed(3))
    return Targets(labels, teacher_rows(positions, vocabulary, k))


def objective(chunk: int | None = 4) -> Objective:
    return Objective.training(
        [
            LossConfig(function="cross_entropy", weight=1.0),
            LossConfig(
                function="kl",
                weight=2.0,
                temperature=2.0,
                missing_probability_handling="uniform",
                sparse_chunk_length=chunk,
            ),
            LossConfig(function="kl", weight=1.0),
            LossConfig(function="kl", weight=0.0, temperature=3.0),
        ]
    )


def plain_loss(head: LMHead, hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
    """The same total from whole logits, by autograd."""
    student = StudentLogits(head(hidden))
    parts = (
        cross_entropy(student, targets.labels),
        2 * kl(student, targets.teacher, temperature=2.0, missing="uniform"),
        kl(student, targets.teacher),
    )
    return torch.stack(parts).sum() / 4


@pytest.mark.parametrize("positions", [1, 4, 11])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_fused_pass_equals_losses_of_whole_logits(positions: int, softcap: float | None) -> None:
    head, targets = tiny_head(softcap=softcap), problem(positions)
    weight = head.model.lm_head.weight
    hidden = torch.randn(positions, 16, generator=torch.Generator().manual_seed(4)).requires_grad_()
    (plain_loss(head, hidden, targets) * 0.3).backward()
    expected = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None

    result = objective()(head, hidden, targets)
    (result.loss * 0.3).backward()
    assert result.loss.item() == pytest.approx(plain_loss(head, hidden, targets).item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, expected[0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(weight.grad, expected[1], rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        assert objective()(head, hidden, targets).loss.item() == pytest.approx(result.loss.item(), rel=1e-6)


def test_the_fused_pass_counts_what_it_says() -> None:
    head, targets, hidden = tiny_head(), problem(9), torch.randn(9, 16, generator=torch.Generator().manual_seed(4))
    goal = objective().evaluation()
    statistics = dict(zip(goal.names, goal(head, hidden, targets).statistics.tolist(), strict=True))
    probabilities = head(hidden).softmax(-1)
    ids = targets.teacher.ids
    own = probabilities.topk(7).indices
    overlap = np.mean([[int(i in set(a)) for i in b] for a, b in zip(own.tolist(), ids.tolist(), strict=True)], axis=1)
    expected = {
        "positions": 9,
        "teacher_mass": targets.teacher.logprobs.exp().sum().item(),
        "student_mass": probabilities.gather(1, ids).sum().item(),
        "top1_agreement": (probabilities.argmax(-1) == ids[:, 0]).sum().item(),
        "topk_overlap": overlap.sum(),
        "eval:cross_entropy": -probabilities.log()[torch.arange(9), targets.labels].sum().item(),
        "eval:kl": kl(StudentLogits(head(hidden)), targets.teacher).item(),
        "kl@2": kl(StudentLogits(head(hidden)), targets.teacher).item(),
        "kl@3": kl(StudentLogits(head(hidden)), targets.teacher, temperature=3.0).item(),
    }
    for name, value in expected.items():
        assert statistics[name] == pytest.approx(value, rel=1e-5), name


def test_an_id_without_probability_is_in_no_count() -> None:
    head, hidden, targets = tiny_head(), torch.zeros(1, 16), problem(1, k=2)
    masked = SparseLogprobs(targets.teacher.ids[:, [0, 0]], torch.tensor([[-0.5, -torch.inf]]))
    statistics = dict(
        zip(
            objective().names,
            objective()(head, hidden, Targets(targets.labels, masked)).statistics.tolist(),
            strict=True,
        )
    )
    assert statistics["student_mass"] == pytest.approx(1 / 97, rel=1e-5)
    assert statistics["teacher_mass"] == pytest.approx(np.exp(-0.5), rel=1e-5)


def test_no_counted_position_reaches_every_parameter_with_a_zero_gradient() -> None:
    head = tiny_head()
    hidden = torch.randn(0, 16).requires_grad_()
    result = objective()(head, hidden, problem(0))
    result.loss.backward()
    assert result.loss.item() == 0
    assert head.model.lm_head.weight.grad.abs().sum() == 0


def test_a_frozen_head_and_bfloat16_weights() -> None:
    head, targets = tiny_head(dtype=torch.bfloat16), problem(6)
    hidden = torch.randn(6, 16, generator=torch.Generator().manual_seed(4), dtype=torch.bfloat16).requires_grad_()
    objective()(head, hidden, targets).loss.backward()
    expected = hidden.grad.clone()
    assert head.model.lm_head.weight.grad.dtype == torch.bfloat16
    plain = hidden.detach().requires_grad_()
    plain_loss(head, plain, targets).backward()
    torch.testing.assert_close(expected, plain.grad, rtol=2e-2, atol=1e-3)
    head.model.lm_head.weight.requires_grad_(False)
    hidden.grad = head.model.lm_head.weight.grad = None
    objective()(head, hidden, targets).loss.backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert head.model.lm_head.weight.grad is None


def test_under_autocast_chunks_share_the_cast_weight() -> None:
    head, targets = tiny_head(), problem(11)
    hidden = torch.randn(11, 16, generator=torch.Generator().manual_seed(4)).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        objective()(head, hidden, targets).loss.backward()
    fused = head.model.lm_head.weight.grad.clone()
    head.model.lm_head.weight.grad = None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain_loss(head, hidden, targets).backward()
    torch.testing.assert_close(fused, head.model.lm_head.weight.grad, rtol=2e-2, atol=2e-2)


def test_no_array_of_all_logits_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    head, targets, sizes = tiny_head(), problem(40), []
    original = LMHead.__call__

    def recorded(self: LMHead, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = original(self, *args, **kwargs)
        sizes.append(logits.shape[0])
        return logits

    monkeypatch.setattr(LMHead, "__call__", recorded)
    objective(chunk=16)(head, torch.randn(40, 16), targets)
    assert sizes == [14, 14, 12]


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(ConfigError, match="weights sum to 0"):
        Objective.training([LossConfig(function="kl", weight=0)])

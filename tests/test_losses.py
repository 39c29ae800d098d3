"""Losses: against float64 oracles written from the definitions, fused against plain, and on the inputs where logarithms
go wrong."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from distillkit.codec.topk import sparse_from_logits
from distillkit.errors import ConfigError
from distillkit.losses.config import LOSS_NAMES, LossConfig
from distillkit.losses.fused import Objective
from distillkit.losses.positions import Positions, Targets, TeacherLogits
from distillkit.losses.registry import HIDDEN, LOSSES, kl_with_rest_of, loss
from distillkit.models.head import LMHead, lm_head_of
from distillkit.types import SparseLogprobs
from support import reference
from support.pairwise import pairwise
from support.refusals import refused

MISSING = ["zero", "uniform", "label"]
DIVERGENCES = ["kl", "reverse_kl", "jsd", "tvd", "skewed_kl", "skewed_reverse_kl", "adaptive_kl"]
RANKING = ["hinge", "logistic_ranking"]
EVERY_LOSS = pytest.mark.parametrize("name", [*DIVERGENCES, *RANKING])


def teacher_rows(positions: int, vocabulary: int, k: int, seed: int = 0, spread: float = 2.0) -> SparseLogprobs:
    generator = torch.Generator().manual_seed(seed)
    return sparse_from_logits(torch.randn(positions, vocabulary, generator=generator) * spread, k)


def student_logits(positions: int, vocabulary: int, seed: int = 1, spread: float = 2.0) -> torch.Tensor:
    return torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread


def some_labels(positions: int, vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (positions,), generator=torch.Generator().manual_seed(3))


def value_of(name: str, logits: torch.Tensor, targets: Targets, **settings: Any) -> torch.Tensor:
    return loss(name, **settings)(Positions(logits, targets)).sum()


def value_and_gradient(
    name: str, logits: torch.Tensor, targets: Targets, temperature: float, missing: Any, **settings: Any
) -> tuple[float, torch.Tensor]:
    logits = logits.clone().requires_grad_()
    value = value_of(name, logits, targets, temperature=temperature, missing_probability_handling=missing, **settings)
    value.backward()
    assert logits.grad is not None
    return value.item(), logits.grad


def oracle(
    name: str, targets: Targets, at: np.ndarray, temperature: float = 1.0, missing: str = "zero", **settings: Any
) -> Callable[[np.ndarray], float]:
    """The loss as a function of the logits; weights that carry no gradient are those of the logits `at`."""
    published = bool(settings.pop("published_temperature", False))

    def rows(logits: np.ndarray) -> list[tuple[reference.Outcomes, tuple[float, float] | None]]:
        if isinstance(targets.teacher, TeacherLogits):
            pairs = zip(logits, targets.teacher.logits.double().numpy(), strict=True)
            return [reference.dense_outcomes_at(row, teacher, temperature) for row, teacher in pairs]
        stored = (targets.teacher.ids.tolist(), targets.teacher.logprobs.tolist(), targets.labels.tolist())
        known = [np.nan] * len(targets) if targets.label_logprobs is None else targets.label_logprobs.tolist()
        return [
            reference.outcomes_at(row, *each, temperature, missing, label, published=published)
            for row, label, *each in zip(logits, known, *stored, strict=True)
        ]

    shares = [reference.adaptive_share(*row) for row in rows(at)]

    def total(logits: np.ndarray) -> float:
        return temperature**2 * sum(
            reference.measure_of(name, *row, share=share, **settings)
            for row, share in zip(rows(logits), shares, strict=True)
        )

    return total


def check(name: str, logits: torch.Tensor, targets: Targets, temperature: float, missing: Any, **settings: Any) -> None:
    """Compare a loss and its gradient with the oracle's."""
    logits = logits.clone().requires_grad_()
    kinds = {} if name == "cross_entropy" else {"temperature": temperature, "missing_probability_handling": missing}
    value = value_of(name, logits, targets, **kinds, **settings)
    value.backward()
    exact = logits.detach().double().numpy()
    expected = oracle(name, targets, exact, temperature, missing, **settings)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(expected(exact), rel=3e-6, abs=2e-6)
    np.testing.assert_allclose(logits.grad.float().numpy(), reference.gradient(expected, exact), rtol=3e-4, atol=5e-6)


# Positions, vocabulary, k and temperature.
SIZES = [(3, 37, 5, 1.0), (2, 23, 5, 2.5), (2, 23, 5, 0.5), (3, 11, 1, 1.0), (2, 11, 10, 2.0), (2, 7, 7, 2.0)]


@pytest.mark.parametrize(
    ("name", "sizes", "missing", "published"),
    pairwise([*DIVERGENCES, *RANKING], SIZES, MISSING, [False, True]),
    ids=str,
)
def test_a_loss_has_the_value_and_gradient_of_its_definition(
    name: str, sizes: tuple[int, int, int, float], missing: Any, published: bool
) -> None:
    positions, vocabulary, k, temperature = sizes
    targets = Targets(some_labels(positions, vocabulary), teacher_rows(positions, vocabulary, k))
    settings = {"published_temperature": published}
    check(name, student_logits(positions, vocabulary), targets, temperature, missing, **settings)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("known", [False, True])
def test_the_teacher_itself_is_the_optimum_at_every_temperature(name: str, known: bool) -> None:
    """With its whole distribution (`uniform`) or with what the handling makes of it: no loss, no gradient, and any
    other student is worse. The published arithmetic has another optimum."""
    targets, logits = with_label_logprobs(6, 200, 8)
    targets = targets if known else Targets(targets.labels, targets.teacher)
    outside = torch.ones_like(logits, dtype=torch.bool).scatter(1, targets.teacher.ids, False)
    alone, rows = logits.log_softmax(-1).masked_fill(outside, -80.0), torch.arange(6)
    all_missing = alone.clone()
    left = torch.as_tensor(targets.teacher.missing_mass()).log()
    all_missing[rows, targets.labels] = torch.logaddexp(alone[rows, targets.labels], left)
    for missing, student in {"zero": alone, "uniform": logits, "label": all_missing}.items():
        for temperature in (0.5, 2.0, 5.0):
            value, gradient = value_and_gradient(name, student, targets, temperature, missing)
            case = (missing, temperature)
            assert value == pytest.approx(0, abs=2e-5 * temperature**2), case
            assert name == "tvd" or gradient.abs().max() < 2e-3, case  # it has a corner there
            other = student + 0.3 * student_logits(6, 200, seed=5)
            assert value_and_gradient(name, other, targets, temperature, missing)[0] > 1e-3, case
    published = value_and_gradient(name, logits, targets, 2.0, "uniform", published_temperature=True)
    assert published[0] > 0.1


@pytest.mark.parametrize(
    ("name", "settings"),
    [("hinge", {"margin": 0.3}), ("skewed_kl", {"alpha": 0.4}), ("skewed_reverse_kl", {"alpha": 0.4})],
)
def test_settings_of_a_loss(name: str, settings: dict[str, Any]) -> None:
    check(name, student_logits(3, 17), Targets(some_labels(3, 17), teacher_rows(3, 17, 6)), 1.0, "zero", **settings)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_label_takes_what_is_missing_wherever_it_is(name: str) -> None:
    teacher = teacher_rows(3, 17, 4)
    others = torch.tensor([next(i for i in range(17) if i not in row) for row in teacher.ids.tolist()])
    for labels in (teacher.ids[:, 1], others):
        check(name, student_logits(3, 17), Targets(labels, teacher), 1.7, "label")


def with_label_logprobs(positions: int, vocabulary: int, k: int, seed: int = 0) -> tuple[Targets, torch.Tensor]:
    """Targets whose labels' log-probabilities are known, labels inside and outside of the k in turn; and the logits."""
    logits = student_logits(positions, vocabulary, seed)
    stored = sparse_from_logits(logits, k)
    order = logits.argsort(-1, descending=True)
    ranks = torch.tensor([min(k + row, vocabulary - 1) if row % 2 else row % k for row in range(positions)])
    labels = order.gather(1, ranks.unsqueeze(-1)).squeeze(-1)
    known = logits.log_softmax(-1).gather(1, labels.unsqueeze(-1)).squeeze(-1)
    return Targets(labels, stored, label_logprobs=known), logits


@EVERY_LOSS
def test_a_label_whose_probability_is_known_is_an_outcome_of_its_own(name: str, subtests: pytest.Subtests) -> None:
    sizes = [(23, 5, 1.0), (23, 5, 2.5), (11, 1, 0.5), (11, 10, 2.0), (7, 7, 1.0)]
    for (vocabulary, k, temperature), missing, all_known in pairwise(sizes, MISSING, [True, False]):
        targets, _ = with_label_logprobs(4, vocabulary, k)
        assert targets.label_logprobs is not None
        if not all_known:
            targets.label_logprobs[3] = torch.nan
        with subtests.test(vocabulary=vocabulary, k=k, temperature=temperature, missing=missing, all_known=all_known):
            check(name, student_logits(4, vocabulary), targets, temperature, missing)


@EVERY_LOSS
def test_a_label_among_the_stored_ids_or_zero_changes_nothing(name: str) -> None:
    targets, _ = with_label_logprobs(6, 40, 5)
    assert targets.label_logprobs is not None
    for missing in MISSING:
        rows = slice(None) if missing == "zero" else slice(0, None, 2)
        stored = SparseLogprobs(targets.teacher.ids[rows], targets.teacher.logprobs[rows])
        labels, results = targets.labels[rows], []
        # Whatever was stored of it.
        for known in (None, targets.label_logprobs[rows], targets.label_logprobs[rows] - 1, labels * torch.nan):
            changed = Targets(labels, stored, label_logprobs=known)
            results.append(value_and_gradient(name, student_logits(len(labels), 40), changed, 1.7, missing))
        for value, gradient in results[1:]:
            assert value == results[0][0], missing
            assert torch.equal(gradient, results[0][1]), missing


@given(st.integers(0, 2**31), st.integers(2, 40), st.data())
def test_known_labels_bring_kl_nearer_to_the_whole_teachers(seed: int, vocabulary: int, data: st.DataObject) -> None:
    """What is compared apart can only add to a divergence: coarse ≤ with the label ≤ all ids."""
    k = data.draw(st.integers(1, vocabulary // 2))  # of more, what is missing is little but rounding
    targets, teacher = with_label_logprobs(5, vocabulary, k, seed)
    student = student_logits(5, vocabulary, seed + 1)
    for name in ("kl", "reverse_kl", "jsd", "tvd"):
        coarse, fine, whole = (
            value_of(name, student, goal, missing_probability_handling="uniform").item()
            for goal in (
                Targets(targets.labels, targets.teacher),
                targets,
                Targets(targets.labels, TeacherLogits(teacher)),
            )
        )
        assert coarse <= fine * (1 + 1e-5) + 1e-5
        assert fine <= whole * (1 + 1e-5) + 1e-5


@EVERY_LOSS
def test_a_dense_teacher(name: str, subtests: pytest.Subtests) -> None:
    """Heads of equal width, a wider student and a wider teacher."""
    for widths in ((13, 13), (13, 11), (11, 13)):
        student, teacher = (student_logits(3, width, seed) for width, seed in zip(widths, (1, 2), strict=True))
        targets = Targets(some_labels(3, min(widths)), TeacherLogits(teacher))
        for temperature in (1.0, 2.0):
            with subtests.test(widths=widths, temperature=temperature):
                if name in RANKING:
                    value = value_of(name, student, targets, top_k=5, temperature=temperature)
                    assert value.item() == pytest.approx(
                        ranking_of_first(name, student, teacher, temperature), rel=1e-5
                    )
                else:
                    check(name, student, targets, temperature, "zero")


def ranking_of_first(name: str, student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> float:
    """A ranking loss over a dense teacher's five most probable ids, as far as both heads have them."""
    width = min(student.shape[-1], teacher.shape[-1])
    p = (teacher[:, :width].double() / temperature).softmax(-1).tolist()
    q = (student.double() / temperature).softmax(-1)[:, :width].tolist()
    outcomes = [sorted(zip(*rows, strict=True), reverse=True)[:5] for rows in zip(p, q, strict=True)]
    return temperature**2 * sum(reference.measure_of(name, row, None) for row in outcomes)


@EVERY_LOSS
def test_storing_every_id_is_the_dense_loss(name: str) -> None:
    teacher, student, labels = student_logits(6, 23, seed=5), student_logits(6, 23, seed=6), some_labels(6, 23)
    stored, dense = Targets(labels, sparse_from_logits(teacher, 23)), Targets(labels, TeacherLogits(teacher))
    for temperature, missing in product((1.0, 2.0), MISSING):
        value, gradient = value_and_gradient(name, student, stored, temperature, missing)
        expected, expected_gradient = value_and_gradient(name, student, dense, temperature, missing)
        assert value == pytest.approx(expected, rel=1e-5), (temperature, missing)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("probabilities", [[0.25] * 4, [0.2, 0.3, 0.5], [0.6, 0.4], [0.4, 0.35, 0.25], [0.1] * 10])
def test_the_head_of_adaptive_kl_is_that_of_its_authors(probabilities: list[float]) -> None:
    """The first id, and the next ones as long as the sum with their own is at most one half."""
    teacher = torch.tensor([probabilities])
    logits = student_logits(1, len(probabilities))
    p, order = torch.sort(teacher, dim=-1, descending=True, stable=True)
    tail = p.double().cumsum(-1) > 0.5 + 1e-7
    tail[:, 0] = False
    gap = (p - logits.softmax(-1).gather(-1, order)).abs()
    share = (gap * ~tail).sum() / gap.sum()
    targets = Targets(torch.tensor([0]), TeacherLogits(teacher.log()))
    kl, reverse_kl = (value_of(name, logits, targets) for name in ("kl", "reverse_kl"))
    expected = share * kl + (1 - share) * reverse_kl
    assert value_of("adaptive_kl", logits, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_cross_entropy_has_the_value_and_gradient_of_its_definition() -> None:
    labels = torch.tensor([0, 18, 7, 7])
    logits = student_logits(4, 19).requires_grad_()
    value = value_of("cross_entropy", logits, Targets(labels, teacher_rows(4, 19, 3)))
    value.backward()

    def expected(z: np.ndarray) -> float:
        return sum(reference.cross_entropy_at(row, int(label)) for row, label in zip(z, labels, strict=True))

    exact = logits.detach().double().numpy()
    assert value.item() == pytest.approx(expected(exact), rel=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), reference.gradient(expected, exact), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_bfloat16_student_is_computed_in_float32(name: str) -> None:
    targets = Targets(some_labels(5, 64), teacher_rows(5, 64, 8))
    logits = student_logits(5, 64).bfloat16().requires_grad_()
    value = value_of(name, logits, targets, temperature=2.0, missing_probability_handling="uniform")
    value.backward()
    exact = logits.detach().double().numpy()
    assert value.item() == pytest.approx(oracle(name, targets, exact, 2.0, "uniform")(exact), rel=3e-6)
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_equal_to_the_target_has_no_divergence(name: str) -> None:
    """What is outside has no probability, or all that is missing, or the label has it."""
    logits, labels = student_logits(4, 30, seed=9), some_labels(4, 30)
    teacher = sparse_from_logits(logits, 6)
    outside = torch.ones_like(logits, dtype=torch.bool).scatter(1, teacher.ids, False)
    alone = logits.log_softmax(-1).masked_fill(outside, -80.0)
    with_label, rows = alone.clone(), torch.arange(4)
    left = torch.as_tensor(teacher.missing_mass()).log()
    with_label[rows, labels] = torch.logaddexp(alone[rows, labels], left)
    for missing, student in {"zero": alone, "uniform": logits, "label": with_label}.items():
        value = value_of(name, student, Targets(labels, teacher), missing_probability_handling=missing)
        assert value.item() == pytest.approx(0, abs=3e-6), missing


CERTAIN_INSIDE, CERTAIN_OUTSIDE, FLAT = (torch.full((1, 12), fill) for fill in (-500.0, -500.0, 0.0))
CERTAIN_INSIDE[0, 2], CERTAIN_OUTSIDE[0, 9] = 500.0, 500.0
EXTREME_TEACHERS = [
    [0.0, -200.0, -1e4, -float("inf")],  # a certain teacher: nothing is missing, and some probabilities are 0
    [np.log(0.25)] * 4,  # exactly nothing missing
    [np.log(0.25) + 1e-3] * 4,  # rounding of a codec: more than everything is stored
    [-20.0, -25.0, -30.0, -60.0],  # almost everything is missing
    [-float("inf")] * 4,  # no mass at all
]


@EVERY_LOSS
def test_certainty_and_zero_probabilities_give_no_nan_or_infinity(name: str) -> None:
    ids = torch.tensor([[2, 0, 1, 3]])
    for missing, temperature in product(MISSING, (0.5, 1.0, 4.0)):
        for row, logprobs, label in product((CERTAIN_INSIDE, CERTAIN_OUTSIDE, FLAT), EXTREME_TEACHERS, (0, 9)):
            targets = Targets(torch.tensor([label]), SparseLogprobs(ids, torch.tensor([logprobs], dtype=torch.float32)))
            value, gradient = value_and_gradient(name, row, targets, temperature, missing)
            case = (missing, temperature, row, logprobs, label)
            assert np.isfinite(value), case
            assert torch.isfinite(gradient).all(), case
            assert value >= -1e-5, case


def test_a_certain_student_still_feels_the_missing_mass() -> None:
    """The gradient on the remainder must survive where 1 − Σ q is rounding noise in float32."""
    logits = torch.full((1, 50), -40.0)
    logits[0, 0] = 0.0
    logits.requires_grad_()
    teacher = SparseLogprobs(torch.tensor([[0]]), torch.tensor([[np.log(0.9)]], dtype=torch.float32))
    targets = Targets(torch.tensor([3]), teacher)
    value = value_of("kl", logits, targets, missing_probability_handling="uniform")
    value.backward()
    exact = logits.detach().double().numpy()
    assert value.item() == pytest.approx(oracle("kl", targets, exact, 1.0, "uniform")(exact), rel=1e-5)
    assert logits.grad[0, 1:].sum().item() == pytest.approx(-0.1, rel=1e-4)


def test_an_id_stored_without_probability_is_not_stored() -> None:
    """It may stand for an id outside the student's head, under the name of another one."""
    teacher = SparseLogprobs(torch.tensor([[4, 2, 4]]), torch.tensor([[-0.5, -1.5, -torch.inf]]))
    plain = SparseLogprobs(teacher.ids[:, :2], teacher.logprobs[:, :2])
    for name in [*DIVERGENCES, *RANKING]:
        for missing in MISSING:
            results = []
            for stored in (teacher, plain):
                logits = student_logits(1, 9).requires_grad_()
                value = value_of(name, logits, Targets(torch.tensor([4]), stored), missing_probability_handling=missing)
                value.backward()
                results.append((value.item(), logits.grad))
            assert results[0][0] == pytest.approx(results[1][0], rel=1e-6), (name, missing)
            torch.testing.assert_close(results[0][1], results[1][1])


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
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, vocabulary, 3))
    positions = Positions(student_logits(3, vocabulary, seed + 1, student_spread), Targets(labels, teacher))
    for name in DIVERGENCES:
        for missing in MISSING:
            value = loss(name, temperature=temperature, missing_probability_handling=missing)(positions).sum().item()
            # Rounding of logits of this size, in float32.
            assert value >= -2e-6 * (1 + student_spread + spread) * max(temperature, 1.0) ** 2, (name, missing)


def test_ranking_losses_of_many_positions_are_tiled(monkeypatch: pytest.MonkeyPatch) -> None:
    targets = Targets(some_labels(11, 40), teacher_rows(11, 40, 9))
    whole = {name: value_of(name, student_logits(11, 40), targets).item() for name in RANKING}
    monkeypatch.setattr("distillkit.losses.ranking._TILE_ELEMENTS", 3 * 10**2)
    for name in RANKING:
        check(name, student_logits(11, 40), targets, 1.0, "zero")
        assert value_of(name, student_logits(11, 40), targets).item() == pytest.approx(whole[name], rel=1e-6)


def test_hidden_losses_have_the_values_of_their_definitions() -> None:
    student, teacher = student_logits(4, 6, seed=1).double(), student_logits(4, 6, seed=2).double()
    a, b = student.numpy(), teacher.numpy()
    np.testing.assert_allclose(HIDDEN["hs_mse"](student, teacher), ((a - b) ** 2).mean(1), rtol=1e-6)
    cosine = (a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1))
    np.testing.assert_allclose(HIDDEN["hs_cosine"](student, teacher), 1 - cosine, rtol=1e-5)
    assert torch.isfinite(HIDDEN["hs_cosine"](torch.zeros(1, 6), torch.zeros(1, 6))).all()


def test_names_in_the_configuration_and_the_tables_agree() -> None:
    assert {*LOSSES, *HIDDEN} == set(LOSS_NAMES)
    published = {"kl", "jsd", "tvd", "hinge", "logistic_ranking", "hs_mse", "hs_cosine", "cross_entropy"}
    assert published <= set(LOSS_NAMES)


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
    return Targets(some_labels(positions, vocabulary), teacher_rows(positions, vocabulary, k))


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
    positions = Positions(head(hidden), targets)
    parts = (
        loss("cross_entropy")(positions).sum(),
        2 * loss("kl", temperature=2.0, missing_probability_handling="uniform")(positions).sum(),
        loss("kl")(positions).sum(),
    )
    return torch.stack(parts).sum() / 4


# Chunks are of 4 positions at most: one block, or blocks of 3 and 1.
@pytest.mark.parametrize(("positions", "softcap", "block"), pairwise([1, 4, 11], [None, 5.0], [100, 3]))
def test_the_fused_pass_equals_losses_of_whole_logits(
    positions: int, softcap: float | None, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distillkit.losses.fused._block_elements", lambda device: block * 97)
    head, targets = tiny_head(softcap=softcap), with_label_logprobs(positions, 97, 7)[0]
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
    statistics = dict(zip(goal.names, goal(head, hidden, targets).statistics[0].tolist(), strict=True))
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
        "eval:kl": value_of("kl", head(hidden), targets).item(),
        "eval:kl_with_rest": value_of("kl", head(hidden), targets, missing_probability_handling="uniform").item(),
        "kl@2": value_of("kl", head(hidden), targets).item(),
        "kl@3": value_of("kl", head(hidden), targets, temperature=3.0).item(),
    }
    for name, value in expected.items():
        assert statistics[name] == pytest.approx(value, rel=1e-5), name


def test_kl_with_rest_is_over_the_stored_ids_and_the_rest_and_0_for_the_teacher() -> None:
    """Also where the label's probability is known, of a teacher with all ids, and of rows without any mass."""
    targets, logits = with_label_logprobs(6, 60, 5)
    plain = Targets(targets.labels, targets.teacher)
    student = student_logits(6, 60, seed=8)
    rows = zip(targets.teacher.ids.tolist(), targets.teacher.logprobs.tolist(), strict=True)
    outcomes = [reference.outcomes_at(z, *row, 0, 1.0, "uniform") for z, row in zip(student.numpy(), rows, strict=True)]
    expected = sum(reference.measure_of("kl", *each) for each in outcomes)
    for goal in (targets, plain):
        assert kl_with_rest_of(Positions(student, goal)).sum().item() == pytest.approx(expected, rel=1e-5)
        assert kl_with_rest_of(Positions(logits, goal)).sum().item() == pytest.approx(0, abs=1e-5)
    dense = Targets(targets.labels, TeacherLogits(logits))
    assert kl_with_rest_of(Positions(student, dense)).sum().item() == pytest.approx(
        value_of("kl", student, dense).item()
    )
    nothing = SparseLogprobs(targets.teacher.ids, torch.full_like(targets.teacher.logprobs, -torch.inf))
    assert kl_with_rest_of(Positions(student, Targets(targets.labels, nothing))).sum().item() == pytest.approx(
        0, abs=1e-5
    )


def test_an_id_without_probability_is_in_no_count() -> None:
    head, hidden, targets = tiny_head(), torch.zeros(1, 16), problem(1, k=2)
    masked = SparseLogprobs(targets.teacher.ids[:, [0, 0]], torch.tensor([[-0.5, -torch.inf]]))
    statistics = dict(
        zip(
            objective().names,
            objective()(head, hidden, Targets(targets.labels, masked)).statistics[0].tolist(),
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
    original = LMHead.product

    def recorded(self: LMHead, *args: Any, **kwargs: Any) -> torch.Tensor:
        logits = original(self, *args, **kwargs)
        sizes.append(logits.shape[0])
        return logits

    monkeypatch.setattr(LMHead, "product", recorded)
    objective(chunk=16)(head, torch.randn(40, 16), targets)
    assert sizes == [14, 14, 12]


def test_what_a_pass_needs_is_freed_at_once() -> None:
    """Not when the garbage is next collected: the logits would pile up."""
    gc.disable()
    try:
        positions = Positions(student_logits(5, 30), Targets(some_labels(5, 30), teacher_rows(5, 30, 4)))
        for name in [*DIVERGENCES, *RANKING]:
            loss(name, missing_probability_handling="uniform")(positions)
        alive = weakref.ref(positions)
        del positions
        assert alive() is None
    finally:
        gc.enable()


def test_weights_that_sum_to_zero_are_refused() -> None:
    with refused(ConfigError, "0"):
        Objective.training([LossConfig(function="kl", weight=0)])

"""Top-k log-probabilities against the definition in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distillkit.codec.topk import _topk_on_device, sparse_from_logits
from distillkit.errors import InputError
from support.refusals import refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equals_the_definition(dtype: torch.dtype) -> None:
    for shape, k in [((3, 47), 1), ((3, 47), 47), ((2, 5, 1031), 128), ((0, 9), 3)]:
        logits = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 6).to(dtype)
        exact = torch.log_softmax(logits.double(), -1)
        for sparse in (sparse_from_logits(logits, k), _topk_on_device(logits, k)):
            torch.testing.assert_close(exact.gather(-1, sparse.ids).float(), sparse.logprobs, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(sparse.logprobs, exact.topk(k).values.float(), rtol=1e-5, atol=1e-5)
        if dtype != torch.bfloat16:
            array = sparse_from_logits(logits.numpy(), k)
            np.testing.assert_array_equal(array.ids, sparse_from_logits(logits, k).ids.numpy())


def test_equal_logits_come_in_order_of_their_ids() -> None:
    assert sparse_from_logits(np.zeros((1, 1000), np.float32), 300).ids.tolist() == [list(range(300))]


def test_strides_and_offsets_do_not_matter() -> None:
    logits = torch.randn(8, 200, generator=torch.Generator().manual_seed(2))
    expected = sparse_from_logits(logits[1::2, 3:150].clone(), 7)
    torch.testing.assert_close(sparse_from_logits(logits[1::2, 3:150], 7).ids, expected.ids)


def test_masked_logits_are_allowed_while_enough_are_left() -> None:
    logits = np.full((1, 6), -np.inf, np.float32)
    logits[0, [1, 4]] = 2.0
    assert sparse_from_logits(logits, 2).ids.tolist() == [[1, 4]]
    with refused(InputError, "2", "k = 3"):
        sparse_from_logits(logits, 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_logits_are_refused(bad: float) -> None:
    logits = np.zeros((3, 6), np.float32)
    logits[2, 1] = bad
    with refused(InputError, "row 2"):
        sparse_from_logits(logits, 2)
    with refused(InputError, "NaN"):
        _topk_on_device(torch.from_numpy(logits), 2)


def test_wrong_arguments() -> None:
    with refused(InputError, "k = 7"):
        sparse_from_logits(np.zeros((1, 6), np.float32), 7)
    with refused(InputError, "float64"):
        sparse_from_logits(np.zeros((1, 6)), 2)

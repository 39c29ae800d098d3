"""What arrays and tensors the codec takes: any layout of the right values, and nothing else without a word.

Every test holds for both formats. More refusals are in tests/test_codec.py; those of any row in
rust/codec/tests/properties.rs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from distillkit.codec import Codec
from distillkit.errors import InputError, TruncatedDataError
from distillkit.types import SparseLogprobs
from support.refusals import refused

Array = npt.NDArray[Any]

D, K, ROWS = 300, 12, 70
QUANTIZED = Codec(
    {
        "d": D,
        "k": K,
        "exact_k": 3,
        "polynomial_terms": [0, 1, "sqrt"],
        "residual_bins": [{"scale_dtype": "float16", "element_bits": 5, "num_elements": 4}],
    }
)
LEGACY = Codec({"vocab_size": D, "k": K, "exact_k": 3, "polynomial_degree": 2})
BOTH = (QUANTIZED, LEGACY)


def rows(count: int = ROWS) -> tuple[Array, Array]:
    """ids (count, K) int64 and logprobs (count, K) float32 that float16 and bfloat16 hold, descending."""
    generator = np.random.default_rng(count)
    ids = np.stack([generator.permutation(D)[:K] for _ in range(count)]) if count else np.zeros((0, K), np.int64)
    steps = generator.integers(1, 6, (count, K)).cumsum(-1)
    return ids.astype(np.int64), (-2 - steps / 4).astype(np.float32)


def misaligned(array: Array) -> Array:
    """The same values at an address that is no multiple of the items' size."""
    raw = np.zeros(array.nbytes + 1, np.uint8)
    view = raw[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


def read_only(array: Array) -> Array:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "fortran": np.asfortranarray,
    "every other row": lambda a: np.repeat(a, 2, axis=0)[::2],
    "every other column": lambda a: np.repeat(a, 2, axis=1)[:, ::2],
    "negative strides": lambda a: a[::-1, ::-1].copy()[::-1, ::-1],
    "a window": lambda a: np.pad(a, ((1, 2), (3, 1)))[1:-2, 3:-1],
    "misaligned": misaligned,
    "read-only": read_only,
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "a list": lambda a: a.tolist(),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_do_not_change_bytes(layout: str) -> None:
    ids, logprobs = rows()
    change = LAYOUTS[layout]
    for codec in BOTH:
        expected = codec.encode(ids, logprobs)
        np.testing.assert_array_equal(codec.encode(change(ids), logprobs), expected)
        np.testing.assert_array_equal(codec.encode(change(ids), change(logprobs)), expected)
        if layout != "a list":
            for found, value in zip(codec.decode(change(expected)), codec.decode(expected), strict=True):
                np.testing.assert_array_equal(found, value)


def test_strides_of_tensors_do_not_change_bytes() -> None:
    ids, logprobs = (torch.from_numpy(array) for array in rows())
    for codec in BOTH:
        expected = codec.encode(ids, logprobs)
        strided = codec.encode(ids.T.contiguous().T, logprobs.repeat_interleave(2, 1)[:, ::2].requires_grad_())
        assert torch.equal(strided, expected)
        assert torch.equal(codec.encode(ids.expand(2, -1, -1), logprobs.expand(2, -1, -1)), expected.expand(2, -1, -1))
        whole, (exact_ids, exact) = expected.T.contiguous().T, codec.decode(expected)
        for found_ids, found in (codec.decode(whole), codec.decode_torch(whole)):
            assert torch.equal(found_ids, exact_ids)
            torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)


def test_ids_of_any_integer_type() -> None:
    ids, logprobs = rows()
    for codec, dtype in product(BOTH, ("int16", "int32", "uint16", "uint32", "uint64", ">u4")):
        np.testing.assert_array_equal(codec.encode(ids.astype(dtype), logprobs), codec.encode(ids, logprobs), dtype)


def test_log_probabilities_of_any_float_type() -> None:
    ids, logprobs = rows()
    for codec, dtype in product(BOTH, ("float16", "float64", "longdouble", ">f2", ">f8")):
        np.testing.assert_array_equal(codec.encode(ids, logprobs.astype(dtype)), codec.encode(ids, logprobs), dtype)


def test_tensors_of_any_type() -> None:
    ids, logprobs = (torch.from_numpy(array) for array in rows())
    types = product((torch.int16, torch.int32), (torch.float16, torch.bfloat16, torch.float64))
    for codec, (id_dtype, dtype) in product(BOTH, types):
        assert torch.equal(codec.encode(ids.to(id_dtype), logprobs.to(dtype)), codec.encode(ids, logprobs)), dtype


def test_unsorted_rows_have_the_bytes_of_sorted_ones() -> None:
    ids, logprobs = rows()
    logprobs[:, 4:8] = logprobs[:, 4:5]  # equal ones stay in the order they came in
    generator = np.random.default_rng(5)
    shuffled = np.argsort(generator.random(ids.shape), axis=1)
    mixed_ids, mixed = np.take_along_axis(ids, shuffled, 1), np.take_along_axis(logprobs, shuffled, 1)
    order = np.argsort(-mixed, axis=1, kind="stable")
    assert not (mixed[:, 1:] <= mixed[:, :-1]).all(axis=1).any()
    for codec in BOTH:
        expected = codec.encode(np.take_along_axis(mixed_ids, order, 1), logprobs)
        np.testing.assert_array_equal(codec.encode(mixed_ids, mixed), expected)


@pytest.mark.parametrize("leading", [(0,), (3, 0), (0, 2), ()])
def test_empty_batches_and_single_rows(leading: tuple[int, ...]) -> None:
    ids, logprobs = (np.broadcast_to(array[0], (*leading, K)) for array in rows(1))
    for codec in BOTH:
        data = codec.encode(ids, logprobs)
        assert data.shape == (*leading, codec.bytes_per_token)
        assert [array.shape for array in codec.decode(data)] == [ids.shape, ids.shape]
        assert [tensor.shape for tensor in codec.decode_torch(torch.from_numpy(data))] == [ids.shape, ids.shape]
        assert codec.encode_logits(np.zeros((*leading, D), np.float32)).shape == data.shape
        if leading:
            assert codec.encode_document(SparseLogprobs(ids, logprobs)) == b""


WRONG_ARRAYS: dict[str, tuple[Callable[[Array, Array], tuple[Any, Any]], str, str]] = {
    "one column less": (lambda ids, lp: (ids[:, :-1], lp[:, :-1]), "(70, 11)", "12"),
    "one column more": (lambda ids, lp: (np.c_[ids, ids[:, :1]], np.c_[lp, lp[:, :1]]), "(70, 13)", "12"),
    "another number of rows": (lambda ids, lp: (ids[:-1], lp), "(69, 12)", "(70, 12)"),
    "transposed": (lambda ids, lp: (ids.T, lp.T), "(12, 70)", "12"),
    "flat": (lambda ids, lp: (ids.ravel(), lp.ravel()), "(840,)", "12"),
    "numbers": (lambda ids, lp: (ids[0, 0], lp[0, 0]), "()", "12"),
    "floats as ids": (lambda ids, lp: (ids.astype(np.float64), lp), "float64", "ids"),
    "truth values as ids": (lambda ids, lp: (ids > 0, lp), "bool", "ids"),
    "objects as ids": (lambda ids, lp: (ids.astype(object), lp), "object", "ids"),
    "strings as ids": (lambda ids, lp: (ids.astype(str), lp), "<U21", "ids"),
    "integers as log-probabilities": (lambda ids, lp: (ids, lp.astype(np.int32)), "int32", "logprobs"),
    "complex log-probabilities": (lambda ids, lp: (ids, lp.astype(np.complex64)), "complex64", "logprobs"),
    "swapped": (lambda ids, lp: (lp, ids), "float32", "ids"),
    "one tensor": (lambda ids, lp: (torch.from_numpy(ids), lp), "Tensor", "ndarray"),
    "the other a tensor": (lambda ids, lp: (ids, torch.from_numpy(lp)), "Tensor", "ndarray"),
}


@pytest.mark.parametrize("what", WRONG_ARRAYS)
def test_wrong_arrays_are_named(what: str) -> None:
    change, found, expected = WRONG_ARRAYS[what]
    for codec in BOTH:
        with refused(InputError, found, expected):
            codec.encode(*change(*rows()))


WRONG_TENSORS: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]], str, str]] = {
    "one column less": (lambda ids, lp: (ids[:, :-1], lp[:, :-1]), "(70, 11)", "12"),
    "floats as ids": (lambda ids, lp: (ids.float(), lp), "float32", "ids"),
    "bfloat16 as ids": (lambda ids, lp: (ids.bfloat16(), lp), "bfloat16", "ids"),
    "integers as log-probabilities": (lambda ids, lp: (ids, lp.int()), "int32", "logprobs"),
    "truth values as log-probabilities": (lambda ids, lp: (ids, lp > 0), "bool", "logprobs"),
}


@pytest.mark.parametrize("what", WRONG_TENSORS)
def test_wrong_tensors_are_named(what: str) -> None:
    change, found, expected = WRONG_TENSORS[what]
    ids, logprobs = (torch.from_numpy(array) for array in rows())
    for codec in BOTH:
        with refused(InputError, found, expected):
            codec.encode(*change(ids, logprobs))


# What is put into row 41, and what a message names besides that row.
VALUES: list[tuple[str, str, Any, list[str]]] = [
    ("logprobs", "float32", np.inf, ["row 41", "inf", "rank 5"]),
    ("logprobs", "float32", np.nan, ["row 41", "NaN", "rank 5"]),
    ("logprobs", "float16", -np.inf, ["row 41", "-inf", "rank 5"]),
    ("logprobs", "float32", 2**-5, ["row 41", "0.03125"]),
    ("logprobs", "float64", -1e300, ["row 41", "-inf", "rank 5"]),
    ("ids", "uint16", D, ["row 41", "id 300", "rank 5"]),
    ("ids", "int32", -(2**31), ["row 41", "id -2147483648", "rank 5", "300"]),
    ("ids", "int64", -1, ["row 41", "id -1", "rank 5", "300"]),
    ("ids", "uint64", 2**64 - 1, ["rank 5", "300"]),
]


@pytest.mark.parametrize(("name", "dtype", "value", "facts"), VALUES)
def test_wrong_values_are_named(name: str, dtype: str, value: Any, facts: list[str]) -> None:
    arrays = dict(zip(("ids", "logprobs"), rows(), strict=True))
    arrays[name] = arrays[name].astype(dtype)
    arrays[name][41, 5] = value
    for codec in BOTH:
        with refused(InputError, *facts):
            codec.encode(*arrays.values())
        with refused(InputError, *facts):
            codec.encode(*map(torch.from_numpy, arrays.values()))


def test_more_probability_than_there_is_is_named() -> None:
    ids, logprobs = rows()
    logprobs[3] = np.log(1.02 / K)
    logprobs[2] = np.log(1.005 / K)  # the rounding of a low-precision teacher
    with refused(InputError, "row 3", "1.0200"):
        QUANTIZED.encode(ids, logprobs)
    QUANTIZED.encode(ids[:3], logprobs[:3])


WRONG_DATA: dict[str, tuple[Callable[[Array], Any], type[Exception], str]] = {
    "int8": (lambda data: data.view(np.int8), InputError, "int8"),
    "int64": (lambda data: data.astype(np.int64), InputError, "int64"),
    "float32": (lambda data: data.astype(np.float32), InputError, "float32"),
    "truth values": (lambda data: data > 0, InputError, "bool"),
    "a byte less": (lambda data: data[:, :-1], TruncatedDataError, "(70, {less})"),
    "a byte more": (lambda data: np.pad(data, ((0, 0), (0, 1))), TruncatedDataError, "(70, {more})"),
    "flat": (lambda data: data.ravel(), TruncatedDataError, "({flat},)"),
    "no columns": (lambda data: data[:, :0], TruncatedDataError, "(70, 0)"),
    "a number": (lambda data: data[0, 0], TruncatedDataError, "()"),
}


@pytest.mark.parametrize("what", WRONG_DATA)
def test_wrong_data_are_named(what: str) -> None:
    change, error, found = WRONG_DATA[what]
    for codec in BOTH:
        width = codec.bytes_per_token
        data = change(codec.encode(*rows()))
        tensor = torch.from_numpy(np.asarray(data))
        facts = [found.format(less=width - 1, more=width + 1, flat=ROWS * width)]
        facts.append("uint8" if error is InputError else str(width))
        for decode, argument in ((codec.decode, data), (codec.decode, tensor), (codec.decode_torch, tensor)):
            with refused(error, *facts):
                decode(argument)


WRONG_LOGITS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str, str]] = {
    "a column less": (lambda logits: logits[..., :-1], "(5, 299)", "300"),
    "transposed": (lambda logits: logits.T, "(300, 5)", "300"),
    "a number": (lambda logits: logits[0, 0], "()", "300"),
    "float64": (lambda logits: logits.double(), "float64", "bfloat16"),
    "integers": (lambda logits: logits.int(), "int32", "bfloat16"),
}


@pytest.mark.parametrize("what", WRONG_LOGITS)
def test_wrong_logits_are_named(what: str) -> None:
    change, found, expected = WRONG_LOGITS[what]
    logits = change(torch.zeros(5, D))
    for codec, argument in product(BOTH, (logits, logits.numpy())):
        with refused(InputError, found, expected):
            codec.encode_logits(argument)


@pytest.mark.parametrize(("value", "facts"), [(np.nan, ["NaN"]), (np.inf, ["NaN"]), (None, ["11", "12"])])
def test_wrong_values_of_logits_are_named(value: float | None, facts: list[str]) -> None:
    """None: too few logits are finite."""
    logits = torch.randn(9, D, generator=torch.Generator().manual_seed(3))
    logits[7, 100] = 0.0 if value is None else value
    if value is None:
        logits[7, 11:] = -torch.inf
    for codec, argument in product(BOTH, (logits, logits.numpy(), logits.half(), logits.bfloat16())):
        with refused(InputError, "row 7", *facts):
            codec.encode_logits(argument)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layouts_of_logits_do_not_change_bytes(dtype: torch.dtype) -> None:
    logits = torch.randn(9, D, generator=torch.Generator().manual_seed(4)).to(dtype)
    others = [logits.T.contiguous().T, logits.repeat_interleave(2, 1)[:, ::2], logits.clone().requires_grad_()]
    for codec in BOTH:
        expected = codec.encode_logits(logits)
        for other in others:
            assert torch.equal(codec.encode_logits(other), expected)
        if dtype == torch.bfloat16:
            continue
        for layout in LAYOUTS.keys() - {"a list", "big-endian"}:
            found = codec.encode_logits(LAYOUTS[layout](logits.numpy()))
            np.testing.assert_array_equal(found, expected.numpy(), err_msg=layout)
        with refused(InputError, LAYOUTS["big-endian"](logits.numpy()).dtype.str):
            codec.encode_logits(LAYOUTS["big-endian"](logits.numpy()))

"""The bit packer against the published vectors; tests/test_torch_decode.py holds the one in torch against this one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distillkit.codec import bits
from distillkit.errors import CorruptDataError, InputError, TruncatedDataError


def test_published_vectors() -> None:
    with np.load(Path(__file__).parent / "golden" / "bitpack.npz") as arrays:
        for width in range(1, 65):
            values, data = arrays[f"w{width}_values"], arrays[f"w{width}_bytes"]
            np.testing.assert_array_equal(bits.pack(values, width), data, err_msg=f"width {width}")
            unpacked = bits.unpack(data, width, values.shape[1])
            np.testing.assert_array_equal(unpacked, values.view(np.uint64), err_msg=f"width {width}")


def test_shapes() -> None:
    assert bits.pack(np.zeros((2, 3, 5), np.int32), 7).shape == (2, 3, bits.packed_len(5, 7))
    assert bits.pack(np.zeros((0, 5), np.int32), 7).shape == (0, 5)
    assert bits.pack([1, 0, 1], 1).tolist() == [0b1010_0000]
    assert bits.unpack(np.zeros((4, 0), np.uint8), 7, 0).shape == (4, 0)


@pytest.mark.parametrize(
    ("values", "width", "found"),
    [([1], 65, "65"), ([4], 2, r"\b4\b.*\b2 bits"), ([-1], 8, r"-1\b.*\b8 bits"), ([0.5], 8, "float64")],
)
def test_refusals(values: list[float], width: int, found: str) -> None:
    with pytest.raises(InputError, match=found):
        bits.pack(values, width)


def test_refusals_of_bytes() -> None:
    with pytest.raises(TruncatedDataError, match=r"2 bytes.*\b1\b"):
        bits.unpack(np.zeros(1, np.uint8), 9, 1)
    with pytest.raises(CorruptDataError, match="padding"):
        bits.unpack(np.array([1], np.uint8), 2, 1)

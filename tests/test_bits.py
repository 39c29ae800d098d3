"""The bit packer against the published vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from distillkit.codec import bits
from distillkit.codec.torch_decode import unpack_bits
from distillkit.errors import CorruptDataError, InputError, TruncatedDataError


@pytest.mark.parametrize("width", range(1, 65))
def test_published_vectors(width: int) -> None:
    with np.load(Path(__file__).parent / "golden" / "bitpack.npz") as arrays:
        values, data = arrays[f"w{width}_values"], arrays[f"w{width}_bytes"]
    np.testing.assert_array_equal(bits.pack(values, width), data)
    np.testing.assert_array_equal(bits.unpack(data, width, values.shape[1]), values.view(np.uint64))
    np.testing.assert_array_equal(unpack_bits(torch.from_numpy(data), width, values.shape[1]).numpy(), values)


def test_shapes() -> None:
    assert bits.pack(np.zeros((2, 3, 5), np.int32), 7).shape == (2, 3, bits.packed_len(5, 7))
    assert bits.pack(np.zeros((0, 5), np.int32), 7).shape == (0, 5)
    assert bits.pack([1, 0, 1], 1).tolist() == [0b1010_0000]
    assert bits.unpack(np.zeros((4, 0), np.uint8), 7, 0).shape == (4, 0)


def test_refusals() -> None:
    with pytest.raises(InputError, match="width 65"):
        bits.pack([1], 65)
    with pytest.raises(InputError, match="does not fit into 2 bits"):
        bits.pack([4], 2)
    with pytest.raises(InputError, match="negative"):
        bits.pack([-1], 8)
    with pytest.raises(InputError, match="integer"):
        bits.pack([0.5], 8)
    with pytest.raises(TruncatedDataError, match="need 2 bytes, found 1"):
        bits.unpack(np.zeros(1, np.uint8), 9, 1)
    with pytest.raises(CorruptDataError, match="padding"):
        bits.unpack(np.array([1], np.uint8), 2, 1)

"""The decoder in torch: the native one's results, in little memory, wherever torch runs it."""

from __future__ import annotations

import weakref
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distillkit.codec import Codec, bits, preset, torch_decode
from distillkit.errors import InputError, TruncatedDataError
from support.golden import CASES, golden


def recommended(rows: int, vocab_size: int = 151_936) -> tuple[Codec, torch.Tensor]:
    """Codec and rows of the recommended preset, values falling with the logarithm of the rank."""
    codec = Codec(preset("recommended", vocab_size=vocab_size))
    generator = np.random.default_rng(0)
    ids = (np.arange(codec.k) * 383 + generator.integers(0, vocab_size, (rows, 1))) % vocab_size
    values = -(1 + generator.random((rows, 1))) * np.log(np.arange(1, codec.k + 1))
    logprobs = values - np.log(np.exp(values).sum(1, keepdims=True)) - 0.1
    return codec, torch.from_numpy(codec.encode(ids, logprobs.astype(np.float32)))


def assert_decodes(codec: Codec, data: torch.Tensor, found: tuple[torch.Tensor, torch.Tensor]) -> None:
    ids, logprobs = codec.decode(data.numpy())
    np.testing.assert_array_equal(found[0].numpy(), ids)
    np.testing.assert_array_equal(found[1].numpy(), logprobs)


def test_every_width_unpacks_as_natively() -> None:
    for width, count in product(range(1, 65), (0, 1, 2, 7, 31, 64, 129)):
        generator = np.random.default_rng(width)
        values = generator.integers(0, 2**64, (3, count), dtype=np.uint64) >> np.uint64(64 - width)
        data = bits.pack(values, width)
        found = torch_decode.unpack_bits(torch.from_numpy(data), width, count).numpy().view(np.uint64)
        np.testing.assert_array_equal(found, bits.unpack(data, width, count), f"{count} values of {width} bits")


def test_rows_of_any_layout() -> None:
    codec, data = recommended(12)
    wide = torch.zeros((12, codec.bytes_per_token + 3), dtype=torch.uint8)
    wide[:, 1:-2] = data
    for same in (wide[:, 1:-2], data.t().contiguous().t(), data.view(3, 4, -1), data[::2], data[3], data[:0]):
        assert_decodes(codec, same, codec.decode_torch(same))


def test_chunks_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, data = recommended(50)
    for values in (1, 7 * codec.k, 1 << 30):
        monkeypatch.setattr(torch_decode, "_CHUNK_VALUES", values)
        assert_decodes(codec, data, codec.decode_torch(data))


def test_outputs_can_be_given() -> None:
    codec, data = recommended(12)
    out = torch.empty((3, 4, codec.k), dtype=torch.int64), torch.empty((3, 4, codec.k))
    found = codec.decode_torch(data.view(3, 4, -1), out=out)
    assert found[0] is out[0]
    assert found[1] is out[1]
    assert_decodes(codec, data.view(3, 4, -1), out)
    for bad in ((out[0], out[1].double()), (out[0].int(), out[1]), (out[0][:2], out[1]), (out[0], out[1].mT)):
        with pytest.raises(InputError, match=r"out\b.*\b(ids|logprobs)\b"):
            codec.decode_torch(data.view(3, 4, -1), out=bad)


def test_wrong_bytes_are_refused() -> None:
    codec, data = recommended(2)
    with pytest.raises(TruncatedDataError, match=r"\b344\b.*\b343\b"):
        codec.decode_torch(data[:, :-1])
    with pytest.raises(InputError, match=r"uint8\b.*\bint16\b"):
        codec.decode_torch(data.short())


COMPILED = ["q_recommended", "q_readme_bins", "q_delta_ed", "q_wide_vocab_262k", "legacy_readme"]


# The backend "eager" runs the graph as it was traced, "aot_eager" without its changes in place.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "backend"), [("q_recommended", "eager"), *product(COMPILED, ["aot_eager"])])
def test_compiles_into_one_graph(name: str, backend: str) -> None:
    codec, _, rows = golden(name)
    data = torch.from_numpy(rows)
    torch._dynamo.reset()
    torch_decode._DECODERS.clear()  # the first call of a process may be a compiled one
    compiled: Any = torch.compile(codec.decode_torch, fullgraph=True, backend=backend)
    assert_decodes(codec, data, compiled(data))
    assert_decodes(codec, data, codec.decode_torch(data))


def test_inference_mode_leaves_nothing_behind(subtests: pytest.Subtests) -> None:
    """What is kept from call to call serves in every mode."""
    torch_decode._DECODERS.clear()
    for name in CASES:
        with subtests.test(case=name):
            codec, _, rows = golden(name)
            data = torch.from_numpy(rows)
            with torch.inference_mode():
                assert codec.decode_torch(data)[1].is_inference()
            found = codec.decode_torch(data)
            assert_decodes(codec, data, found)
            scale = torch.ones((), requires_grad=True)
            (found[1] * scale).sum().backward()
            assert scale.grad is not None


class LiveMemory(TorchDispatchMode):
    """The most bytes that tensors made in it held at a time, views of what was there before left out."""

    def __init__(self, before: torch.Tensor) -> None:
        super().__init__()
        self._before = before.untyped_storage().data_ptr()
        self.peak = 0
        self._live: list[tuple[weakref.ref[torch.Tensor], int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._live.append((weakref.ref(tensor), storage.data_ptr(), storage.nbytes()))
        self._live = [entry for entry in self._live if entry[0]() is not None]
        self.peak = max(self.peak, sum({at: size for _, at, size in self._live if at != self._before}.values()))
        return result


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("vocab_size", [49_152, 151_936])
def test_extra_memory_is_bounded(vocab_size: int, chunked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond input and outputs. One int64 a bit of a 16-bit id would take 128 bytes a value: a tenth of that where rows
    are decoded all at once, and on a CPU only for the rows of a chunk."""
    rows, threads = 16_384, torch.get_num_threads()
    codec, data = recommended(256, vocab_size)
    data = data.repeat(rows // 256, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: min(threads, 2))
    if not chunked:
        monkeypatch.setattr(torch_decode, "_CHUNK_VALUES", 1 << 30)
    codec.decode_torch(data[:1])
    with LiveMemory(data) as memory:
        ids, logprobs = codec.decode_torch(data)
    extra = memory.peak - ids.nbytes - logprobs.nbytes
    assert 0 < extra <= 12 * codec.k * (4096 if chunked else rows)
    assert_decodes(codec, data, (ids, logprobs))

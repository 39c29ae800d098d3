"""Dense logits → the k most probable ids and their log-probabilities, on the logits' own device.

Shape legend: V vocabulary size (columns of the logits).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import numpy.typing as npt

from distillkit import _native
from distillkit.errors import InputError
from distillkit.types import Array, SparseLogprobs

if TYPE_CHECKING:
    import torch

__all__ = ["sparse_from_logits"]


def sparse_from_logits(logits: Array, k: int) -> SparseLogprobs:
    """The k most probable ids of each row, with their log-probabilities under the full softmax.

    numpy arrays and CPU tensors are passed to the native code without a copy if they are contiguous; other tensors stay
    on their device. On the CPU, equal logits are ordered by id; on other devices, their order is up to the device.

    Args:
        logits: (..., V) float32 or float16 array, or float32, bfloat16 or float16 tensor.
        k: 1 … V.

    Returns:
        ids (..., k) int64 and logprobs (..., k) float32, descending; numpy or torch like the logits.

    Raises:
        InputError: wrong dtype or k, NaN or +∞ in a row, or fewer than k finite logits in a row.
    """
    if logits.ndim == 0 or not 1 <= k <= logits.shape[-1]:
        raise InputError(
            f"k = {k} does not fit logits of shape {tuple(logits.shape)}: it must be between 1 and the last axis's size"
        )
    if is_tensor(logits) and logits.device.type != "cpu":
        return _topk_on_device(logits, k)
    rows, bfloat16 = native_logits(logits)
    ids, logprobs, _ = _native.topk(rows, k, bfloat16)
    shape = (*logits.shape[:-1], k)
    ids, logprobs = ids.reshape(shape), logprobs.reshape(shape)
    if is_tensor(logits):
        import torch

        return SparseLogprobs(torch.from_numpy(ids), torch.from_numpy(logprobs))
    return SparseLogprobs(ids, logprobs)


def is_tensor(value: Any) -> TypeGuard[torch.Tensor]:
    """Whether `value` is a torch tensor, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def native_logits(logits: Array) -> tuple[npt.NDArray[Any], bool]:
    """CPU logits in the form that the native code takes: (rows, V) float32, or 16-bit floats as uint16 bit patterns.

    Returns:
        The array, and whether its bit patterns are bfloat16.
    """
    if is_tensor(logits):
        return _native_tensor(logits)
    array = np.asarray(logits)
    if array.dtype not in (np.float16, np.float32):
        raise InputError(f"logits must be float32, float16 or bfloat16, got {array.dtype}")
    rows = np.require(array, requirements=["C", "A"]).reshape(-1, array.shape[-1])
    return (rows.view(np.uint16) if rows.dtype == np.float16 else rows), False


def _native_tensor(logits: torch.Tensor) -> tuple[npt.NDArray[Any], bool]:
    import torch

    rows = logits.detach().reshape(-1, logits.shape[-1]).contiguous()
    if rows.dtype == torch.float32:
        return rows.numpy(), False
    if rows.dtype in (torch.float16, torch.bfloat16):
        # numpy has no bfloat16, so both 16-bit types are passed as bit patterns.
        bits: npt.NDArray[Any] = rows.view(torch.int16).numpy().view(np.uint16)
        return bits, rows.dtype == torch.bfloat16
    raise InputError(f"logits must be float32, float16 or bfloat16, got {rows.dtype}")


def _topk_on_device(logits: torch.Tensor, k: int) -> SparseLogprobs:
    import torch

    if logits.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise InputError(f"logits must be float32, float16 or bfloat16, got {logits.dtype}")
    logits_RV = logits.detach().float()
    values, ids = logits_RV.topk(k, dim=-1)
    logprobs = values - logits_RV.logsumexp(dim=-1, keepdim=True)
    if not torch.isfinite(logprobs).all():
        raise InputError(f"a row has NaN or infinite logits, or fewer than k = {k} finite ones")
    return SparseLogprobs(ids, logprobs)

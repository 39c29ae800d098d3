"""Draws with replacement from a teacher's distributions: softmax(logits / temperature).

A draw is a uniform number u and the first id, in the order of ids, up to which the probabilities add up to more than u.
The numbers of a row depend on a seed, the document's token ids and the position alone (`Uniforms`), so neither the
other documents of a batch nor its padding nor the number of processes changes which draws a row gets. (What they change
is the last bits of the logits; a draw differs where its number is that near to the border between two ids.)

On the CPU, draws are made natively; on other devices in torch, with the same numbers.

Shape legend: R rows (positions), N draws per row, V width of the logits, k ids per row, min(N, V).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from distillkit import _native
from distillkit.codec.topk import is_tensor, native_logits
from distillkit.errors import InputError
from distillkit.types import Array, Draws, SparseLogprobs

if TYPE_CHECKING:
    import torch

__all__ = ["draws_from_logits", "uniforms"]

_BLOCK = 256
"""Ids whose probabilities are added up together."""


def uniforms(input_ids: npt.ArrayLike, positions: int, draws: int, *, seed: int = 0) -> npt.NDArray[np.float64]:
    """The uniform numbers of a document's first positions.

    Args:
        input_ids: the document's token ids.
        positions: R.
        draws: N.
        seed: another seed gives other numbers; 0 … 2⁵³ − 1.

    Returns:
        (R, N) in [0, 1), each row ascending.

    Raises:
        InputError: the seed is out of range.

    Example:
        >>> from distillkit.codec import uniforms
        >>> numbers = uniforms([5, 7, 9], 2, 50)
        >>> numbers.shape, bool((numbers[:1] == uniforms([5, 7, 9], 1, 50)).all())
        ((2, 50), True)
    """
    if not 0 <= seed < 2**53:
        raise InputError(f"seed must be 0 … 2⁵³ − 1, found {seed}")
    document = xxhash.xxh3_64_intdigest(np.ascontiguousarray(input_ids, dtype="<i4").tobytes())
    return _native.uniforms(seed, document, 0, positions, draws)


def draws_from_logits(logits: Array, numbers: npt.NDArray[np.float64], *, temperature: float = 1.0) -> SparseLogprobs:
    """Draws from softmax(logits / temperature).

    Args:
        logits: (R, V) float32 or float16 array, or float32, bfloat16 or float16 tensor.
        numbers: (R, N) uniform numbers, each row ascending; see `uniforms`.
        temperature: positive.

    Returns:
        (R, k) the ids that were drawn and the logarithms of their shares of the draws, by falling share, equal ones by
        ascending id; then, at places without an id, the row's first id and −inf. numpy or torch like the logits.

    Raises:
        InputError: wrong shapes or dtypes, or a row has NaN, +∞ or no finite logit.

    Example:
        >>> import numpy as np
        >>> from distillkit.codec import draws_from_logits, uniforms
        >>> rows = draws_from_logits(np.log(np.array([[0.9, 0.1, 0.0]], np.float32) + 1e-30), uniforms([5, 7], 1, 50))
        >>> rows.ids.tolist(), (50 * np.exp(rows.logprobs)).round().tolist(), rows.draws
        ([[0, 1, 0]], [[44.0, 6.0, 0.0]], Draws(number=50, temperature=1.0))
    """
    if logits.ndim != 2 or numbers.ndim != 2 or logits.shape[0] != numbers.shape[0] or 0 in logits.shape[1:]:
        raise InputError(f"expected logits (R, V) and numbers (R, N), got {tuple(logits.shape)} and {numbers.shape}")
    drawn = Draws(int(numbers.shape[1]), float(temperature))
    if is_tensor(logits) and logits.device.type != "cpu":
        return _on_device(logits, numbers, drawn)
    rows, bfloat16 = native_logits(logits)
    ids, logprobs = _native.draw(rows, drawn.temperature, np.ascontiguousarray(numbers, np.float64), bfloat16)
    if is_tensor(logits):
        import torch

        return SparseLogprobs(torch.from_numpy(ids), torch.from_numpy(logprobs), drawn)
    return SparseLogprobs(ids, logprobs, drawn)


def _on_device(logits: torch.Tensor, numbers: npt.NDArray[np.float64], drawn: Draws) -> SparseLogprobs:
    """The same on the logits' device: weights in float32, sums in float64, of blocks first and then within them."""
    import torch

    highest_R1 = logits.amax(-1, keepdim=True).float()
    if not torch.isfinite(highest_R1).all():
        raise InputError("a row has logits that are NaN or infinite, or none that is finite")
    weights_RV = ((logits.float() - highest_R1) / drawn.temperature).exp()
    width = weights_RV.shape[-1]
    weights_RBb = torch.nn.functional.pad(weights_RV, (0, -width % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    sums_RB = weights_RBb.sum(-1, dtype=torch.float64).cumsum(-1)
    targets_RN = torch.from_numpy(numbers).to(logits.device) * sums_RB[:, -1:]
    blocks_RN = torch.searchsorted(sums_RB, targets_RN, right=True).clamp_max(sums_RB.shape[-1] - 1)
    before_RN = sums_RB.gather(-1, (blocks_RN - 1).clamp_min(0)).where(blocks_RN > 0, 0.0)
    within_RNb = weights_RBb.gather(1, blocks_RN.unsqueeze(-1).expand(-1, -1, _BLOCK)).double()
    beyond_RNb = within_RNb.cumsum(-1) + before_RN.unsqueeze(-1) > targets_RN.unsqueeze(-1)
    places_RN = beyond_RNb.int().argmax(-1)
    # Where rounding leaves a number beyond its block, the block's last id with a probability is meant.
    last_RN = (within_RNb > 0).int().mul(torch.arange(1, _BLOCK + 1, device=logits.device)).argmax(-1)
    ids_RN = blocks_RN * _BLOCK + torch.where(beyond_RNb.any(-1), places_RN, last_RN)
    return _ranked(ids_RN.cpu().numpy(), width, drawn, logits.device)


def _ranked(ids_RN: npt.NDArray[np.int64], width: int, drawn: Draws, device: Any) -> SparseLogprobs:
    """Drawn ids (R, N), ascending, as ids and the logarithms of their shares on a device."""
    import torch

    rows, k = len(ids_RN), min(drawn.number, width)
    starts_RN = np.diff(ids_RN, axis=-1, prepend=-1) != 0
    row_D, at_D = np.nonzero(starts_RN)
    ends_D = np.append(at_D[1:], 0)
    ends_D[np.append(row_D[1:] != row_D[:-1], True)] = drawn.number
    counts_D, ids_D = ends_D - at_D, ids_RN[row_D, at_D]
    order_D = np.lexsort((ids_D, -counts_D, row_D))
    first_R = np.searchsorted(row_D, np.arange(rows))
    place_D = np.arange(len(row_D)) - first_R[row_D]
    ids = np.zeros((rows, k), np.int64)
    logprobs = np.full((rows, k), -np.inf, np.float32)
    ids[row_D, place_D], logprobs[row_D, place_D] = ids_D[order_D], np.log(counts_D[order_D] / drawn.number)
    ids = np.where(np.isneginf(logprobs), ids[:, :1], ids)
    return SparseLogprobs(torch.from_numpy(ids).to(device), torch.from_numpy(logprobs).to(device), drawn)

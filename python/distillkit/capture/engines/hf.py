"""A transformers model as the teacher.

Shape legend: B documents of a batch, S longest of them, N positions of a batch that have a next token, H hidden size, V
width of the head, k kept ids.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from distillkit.capture.text import TokenDocument
from distillkit.errors import CaptureError, ConfigError, InputError
from distillkit.lm_head import backbone_hidden, check_lm_head
from distillkit.topk import sparse_from_logits
from distillkit.types import SparseLogprobs

__all__ = ["HFTeacher", "length_batches", "load_config", "resolve_device", "resolve_dtype"]

logger = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}
# Placements that accelerate spreads a model by, over all visible devices.
_PLACEMENTS = ("balanced", "balanced_low_0", "sequential")
_SAMPLED_VALUES = 256


class HFTeacher:
    """A causal LM of transformers, run without a cache, its head applied to a slice of positions at a time.

    Args:
        model: folder or hub id.
        dtype: "auto" or a dtype's name, see `resolve_dtype`.
        device: "auto", a torch device, or a placement over several devices ("balanced", "sequential").
        batch_tokens: tokens of a forward, padding included; a longer document is a batch of its own.
        head_rows: positions whose logits exist at a time: head_rows × V × 4 bytes.
        head_dtype: "float32" multiplies by the head in float32 whatever the model's dtype is, "auto" in the model's
            own.
        trust_remote_code: run the model's own code.

    Raises:
        ConfigError: the model, dtype or device can't be had.
        DistillKitError: the model's head can't be applied by itself (see `distillkit.lm_head.check_lm_head`).
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        batch_tokens: int,
        head_rows: int,
        head_dtype: str = "float32",
        trust_remote_code: bool = False,
    ) -> None:
        from transformers import AutoModelForCausalLM

        config = load_config(model, trust_remote_code=trust_remote_code)
        device = resolve_device(device)
        try:
            self._model = AutoModelForCausalLM.from_pretrained(
                model,
                dtype=_DTYPES[resolve_dtype(dtype, config, device)],
                device_map=device,
                trust_remote_code=trust_remote_code,
            ).eval()
        except (OSError, ValueError) as error:
            raise ConfigError(f"model: {model!r} could not be loaded as a causal language model: {error}") from error
        self._head = check_lm_head(self._model)
        self._batch_tokens = batch_tokens
        self._head_rows = head_rows
        self._float32_head = head_dtype == "float32"
        self._name = Path(model).name if Path(model).exists() else model

    @property
    def head_size(self) -> int:
        """V."""
        return self._head.size

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self._model.config.get_text_config().hidden_size)

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(parameter.numel() * parameter.element_size() for parameter in self._model.parameters())

    @property
    def identity(self) -> dict[str, Any]:
        """Name, revision (the hub's commit, or a hash over a sample of the weights for a local folder) and dtype."""
        revision = getattr(self._model.config, "_commit_hash", None) or self._weights_hash()
        return {"name": self._name, "revision": revision, "dtype": str(self._model.dtype).removeprefix("torch.")}

    def _weights_hash(self) -> str:
        """Hash a few values of every weight: two checkpoints of one model differ in them."""
        digest = xxhash.xxh3_64()
        for name, parameter in self._model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().flatten()[:_SAMPLED_VALUES].float().cpu().numpy().tobytes())
        return f"sample-xxh3-64:{digest.hexdigest()}"

    @torch.inference_mode()
    def score(self, documents: Sequence[TokenDocument], k: int) -> Iterator[tuple[int, SparseLogprobs]]:
        """Yield (index, rows (L − 1, k)) for every document; see `Teacher.score`."""
        weights = self._head.weights()
        for batch in length_batches([len(document.input_ids) for document in documents], self._batch_tokens):
            members = [documents[index] for index in batch]
            try:
                hidden_NH = self._hidden(members)
                parts = [
                    self._slice(hidden_NH, weights, k, start, members)
                    for start in range(0, hidden_NH.shape[0], self._head_rows)
                ]
            except torch.OutOfMemoryError as error:
                raise CaptureError(
                    f"out of memory in a batch of {len(members)} documents × {len(members[0].input_ids)} tokens with "
                    f"{self._head_rows} × "
                    f"{self.head_size} logits at a time: lower --batch-tokens (now {self._batch_tokens}) or "
                    f"--head-rows (now {self._head_rows}). {error}"
                ) from error
            ids = np.concatenate([part.ids for part in parts])
            logprobs = np.concatenate([part.logprobs for part in parts])
            start = 0
            for index, document in zip(batch, members, strict=True):
                stop = start + len(document.input_ids) - 1
                yield index, SparseLogprobs(ids[start:stop], logprobs[start:stop])
                start = stop

    def _hidden(self, documents: Sequence[TokenDocument]) -> torch.Tensor:
        """Run the backbone on a batch: (N, H) states of the positions that have a next token, document by document."""
        lengths = torch.tensor([len(document.input_ids) for document in documents])
        # Padding stands on the right: the positions before it are the same with or without.
        ids_BS = torch.zeros(len(documents), int(lengths.max()), dtype=torch.long)
        for row, document in enumerate(documents):
            ids_BS[row, : lengths[row]] = torch.from_numpy(document.input_ids.astype(np.int64))
        positions = torch.arange(ids_BS.shape[1])
        mask_BS = (positions < lengths[:, None]).long()
        device = self._model.get_input_embeddings().weight.device
        hidden_BSH = backbone_hidden(self._model, input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device))
        return hidden_BSH[(positions < lengths[:, None] - 1).to(hidden_BSH.device)]

    def _slice(
        self,
        hidden_NH: torch.Tensor,
        weights: tuple[torch.Tensor, torch.Tensor | None],
        k: int,
        start: int,
        documents: Sequence[TokenDocument],
    ) -> SparseLogprobs:
        """Head and top-k of the positions from `start`, as numpy."""
        logits_nV = self._head(hidden_NH[start : start + self._head_rows], weights, float32_product=self._float32_head)
        try:
            sparse = sparse_from_logits(logits_nV, k)
        except InputError as error:
            raise CaptureError(self._name_bad_position(logits_nV, k, start, documents)) from error
        ids, logprobs = (torch.as_tensor(array).cpu().numpy() for array in (sparse.ids, sparse.logprobs))
        return SparseLogprobs(ids, logprobs)

    def _name_bad_position(
        self, logits_nV: torch.Tensor, k: int, start: int, documents: Sequence[TokenDocument]
    ) -> str:
        """Say which document and position has logits that are no distribution over k ids."""
        finite = torch.isfinite(logits_nV).sum(-1)
        bad = torch.isnan(logits_nV).any(-1) | torch.isposinf(logits_nV).any(-1) | (finite < k)
        row = int(bad.nonzero()[0, 0]) if bad.any() else 0
        position = start + row
        for document in documents:
            rows = len(document.input_ids) - 1
            if position < rows:
                break
            position -= rows
        dtype = self.identity["dtype"]
        advice = "float16 overflows easily: try --dtype bfloat16" if dtype == "float16" else "is the checkpoint whole?"
        return (
            f"{document.source}: after token {position} of {len(document.input_ids)} (id "
            f"{document.input_ids[position]}) the "
            f"teacher gives {int(finite[row])} finite logits of {self.head_size} in {dtype} (k = {k}); {advice}"
        )


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group documents of like length, the longest first, so that a batch with its padding stays within `batch_tokens`.

    Returns:
        The indices of each batch; a document longer than `batch_tokens` is a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def load_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """Load a model's config, without its weights.

    Raises:
        ConfigError: there is none at that path.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model: no model config could be loaded from {model!r} (a folder or a hub id is expected): {error}"
        ) from error


def resolve_device(device: str) -> str:
    """Return the device to run on; "auto" is the first CUDA device, or the CPU.

    Raises:
        ConfigError: it is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device in _PLACEMENTS:
        return device
    try:
        return str(torch.device(device))
    except RuntimeError as error:
        raise ConfigError(
            f"device: {device!r} is none; auto, cpu, cuda, cuda:1, … or one of {', '.join(_PLACEMENTS)} is understood"
        ) from error


def resolve_dtype(dtype: str, config: Any, device: str) -> str:
    """Return the name of the dtype to run in.

    "auto" is the checkpoint's own on an accelerator. On a CPU it is float32: few CPUs are fast in 16 bits, and the
    distributions get more exact.

    Raises:
        ConfigError: it is none.
    """
    if dtype == "auto":
        own = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
        return "float32" if device == "cpu" or own is None else str(own).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is not known; auto, {', '.join(_DTYPES)} are")
    return str(_DTYPES[dtype]).removeprefix("torch.")

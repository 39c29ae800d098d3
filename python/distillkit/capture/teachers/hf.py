"""A transformers model as the teacher.

Shape legend: B documents per batch, S length of the longest, N scored positions of a batch, H hidden size, V width of
the head, k kept ids per position, D draws per position.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from distillkit.capture.engine_settings import HFSettings
from distillkit.capture.teachers.base import RejectedDocument, RowRequest, ScoredDocument, keep_ids, refusal
from distillkit.codec import draws_from_logits, sparse_from_logits, uniforms
from distillkit.configuration.places import folder_name
from distillkit.errors import CaptureError, ConfigError
from distillkit.models.head import backbone_hidden, check_lm_head
from distillkit.models.rope import choose_frequencies_by_document, frequencies_change_after
from distillkit.models.separation import separation_of
from distillkit.models.weights import loading_errors, loading_reason, model_problem
from distillkit.types import SparseLogprobs, TokenDocument

__all__ = ["HFTeacher", "length_batches", "load_config", "resolve_device", "resolve_dtype"]

logger = logging.getLogger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "float": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "half": torch.float16,
}
# accelerate's strategies for distributing a model over all visible devices.
_PLACEMENTS = ("balanced", "balanced_low_0", "sequential")
_SAMPLED_VALUES = 256


class HFTeacher:
    """A transformers causal LM, run without a cache; its head is applied to one slice of positions at a time.

    Args:
        model: folder or hub id.
        settings: the engine's settings. A document longer than `batch_tokens` becomes a batch of its own.
        trust_remote_code: run the model's own code.

    Raises:
        ConfigError: the model cannot be loaded, or the dtype or device does not exist.
        DistillKitError: the model's head cannot be applied by itself (see `distillkit.models.head.check_lm_head`), or
            padding changes its distributions.
    """

    def __init__(self, model: str, settings: HFSettings, *, trust_remote_code: bool = False) -> None:
        from transformers import AutoModelForCausalLM

        config = load_config(model, trust_remote_code=trust_remote_code)
        device = resolve_device(settings.device)
        try:
            self._model = AutoModelForCausalLM.from_pretrained(
                model,
                dtype=_DTYPES[resolve_dtype(settings.dtype, config, device)],
                device_map=device,
                trust_remote_code=trust_remote_code,
            ).eval()
        except loading_errors() as error:
            raise ConfigError(
                f"model: {model!r} could not be loaded as a causal language model: {loading_reason(error)}"
            ) from error
        choose_frequencies_by_document(self._model)
        self._frequencies_differ = frequencies_change_after(self._model) is not None
        self._head = check_lm_head(self._model)
        separation_of(
            self._model, lambda rows: self._inputs([row[0].cpu().numpy() for row in rows]), packs=False
        ).check_padding()
        self._batch_tokens = settings.forward_tokens
        self._head_rows = settings.head_rows
        self._float32_head = settings.head_dtype == "float32"
        self._name = folder_name(model)

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
        """Hash the first values of every weight, which differ between checkpoints of the same model."""
        digest = xxhash.xxh3_64()
        for name, parameter in self._model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().flatten()[:_SAMPLED_VALUES].float().cpu().numpy().tobytes())
        return f"sample-xxh3-64:{digest.hexdigest()}"

    @torch.inference_mode()
    def score(
        self, documents: Sequence[TokenDocument], request: RowRequest
    ) -> Iterator[ScoredDocument | RejectedDocument]:
        """Yield every document's distributions; see `Teacher.score`.

        A batch that does not fit in memory is halved, and later batches are no larger than its halves.
        """
        weights = self._head.weights()
        lengths = [len(document.input_ids) for document in documents]
        batches = deque(length_batches(lengths, self._batch_tokens))
        while batches:
            batch = batches.popleft()
            try:
                scored = self._score_batch([documents[index] for index in batch], weights, request)
            except torch.OutOfMemoryError as error:
                batches.extendleft(reversed(self._smaller(batch, lengths, error)))
                continue
            for index, rows in zip(batch, scored, strict=True):
                yield replace(rows, index=index)

    def _smaller(self, batch: list[int], lengths: Sequence[int], error: torch.OutOfMemoryError) -> list[list[int]]:
        """Split a batch that ran out of memory: into fewer documents, then fewer positions under the head at a time.

        Raises:
            CaptureError: the batch is already a single document with one position at a time.
        """
        tokens = len(batch) * max(lengths[index] for index in batch)
        if len(batch) > 1:
            self._batch_tokens = max(tokens // 2, 1)
            middle = len(batch) // 2
            pieces = [batch[:middle], batch[middle:]]
        elif self._head_rows > 1:
            self._head_rows //= 2
            pieces = [batch]
        else:
            raise CaptureError(
                f"out of memory with a single document of {tokens} tokens and one position × {self.head_size} logits "
                f"at a time: try a shorter --max-seq-len, a smaller --dtype or more devices. {error}"
            ) from error
        torch.cuda.empty_cache()
        logger.warning(
            "out of memory in a batch of %d documents × %d tokens: continuing with %d tokens and %d positions under "
            "the head at a time (--batch-tokens, --head-rows)",
            len(batch),
            tokens // len(batch),
            self._batch_tokens,
            self._head_rows,
        )
        return pieces

    def _score_batch(
        self,
        documents: Sequence[TokenDocument],
        weights: tuple[torch.Tensor, torch.Tensor | None],
        request: RowRequest,
    ) -> list[ScoredDocument | RejectedDocument]:
        """Score documents in a single forward pass; indices are relative to `documents`."""
        counts = [len(document.input_ids) - (not request.last_row) for document in documents]
        hidden_NH = self._hidden(documents, counts)
        labels_N = torch.from_numpy(np.concatenate([_labels(document, request) for document in documents]))
        numbers_ND = np.concatenate(
            [_numbers(document, count, request) for document, count in zip(documents, counts, strict=True)]
        )
        slices = [
            self._slice(hidden_NH[start:stop], labels_N[start:stop], numbers_ND[start:stop], weights, request)
            for start, stop in _slices(hidden_NH.shape[0], self._head_rows)
        ]
        ids, logprobs, label_logprobs, likely = (np.concatenate(parts) for parts in zip(*slices, strict=True))
        scored: list[ScoredDocument | RejectedDocument] = []
        for index, (document, stop) in enumerate(zip(documents, np.cumsum(counts).tolist(), strict=True)):
            start = stop - counts[index]
            rows = SparseLogprobs(ids[start:stop], logprobs[start:stop], request.draws)
            labels = label_logprobs[start : start + len(document.input_ids) - 1] if request.label_logprobs else None
            reason = refusal(document, rows)
            most = likely[start:stop] if request.likely else None
            scored.append(
                ScoredDocument(index, rows, labels, most) if reason is None else RejectedDocument(index, reason)
            )
        return scored

    def _hidden(self, documents: Sequence[TokenDocument], counts: Sequence[int]) -> torch.Tensor:
        """Run the backbone on a batch; return the states of each document's first `counts` positions, (N, H)."""
        inputs = self._inputs([document.input_ids for document in documents])
        hidden_BSH = backbone_hidden(self._model, **inputs)
        positions = torch.arange(hidden_BSH.shape[1])
        return hidden_BSH[(positions < torch.tensor(counts)[:, None]).to(hidden_BSH.device)]

    def _inputs(self, documents: Sequence[npt.NDArray[Any]]) -> dict[str, torch.Tensor]:
        """Make the model's inputs of documents' token ids."""
        lengths = torch.tensor([len(ids) for ids in documents])
        # Padding is on the right, so it does not affect the positions before it.
        ids_BS = torch.zeros(len(documents), int(lengths.max()), dtype=torch.long)
        for row, ids in enumerate(documents):
            ids_BS[row, : lengths[row]] = torch.from_numpy(ids.astype(np.int64))
        positions = torch.arange(ids_BS.shape[1])
        mask_BS = (positions < lengths[:, None]).long()
        inputs = {"input_ids": ids_BS, "attention_mask": mask_BS}
        if self._frequencies_differ:
            inputs["position_ids"] = positions * mask_BS  # padding does not make a document longer
        device = self._model.get_input_embeddings().weight.device
        return {name: value.to(device) for name, value in inputs.items()}

    def _slice(
        self,
        hidden_nH: torch.Tensor,
        labels_n: torch.Tensor,
        numbers_nD: npt.NDArray[np.float64],
        weights: tuple[torch.Tensor, torch.Tensor | None],
        request: RowRequest,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Apply the head to some positions: ids (n, k), log-probs (n, k), log-probs of the labels (n,), and with draws
        the most probable ids (n, any number), as numpy.

        Log-probs are NaN at positions with NaN or +∞ logits, or fewer than k finite ones; of draws, one is enough.
        """
        needed = request.k if request.draws is None else max(1, request.likely)
        logits_nV = self._head(hidden_nH, weights, float32_product=self._float32_head)
        finite_nV = torch.isfinite(logits_nV)
        bad_n = (torch.isnan(logits_nV) | torch.isposinf(logits_nV)).any(-1) | (finite_nV.sum(-1) < needed)
        if bad_n.any():
            logits_nV = torch.where(bad_n[:, None], torch.zeros_like(logits_nV), logits_nV)
        ids_nk, logprobs_nk = sparse_from_logits(logits_nV, needed).tensors()
        # log p(id) = logit − logsumexp, where logsumexp is the most probable id's logit minus its log-prob.
        first_n1 = logits_nV.gather(1, ids_nk[:, :1]).float() - logprobs_nk[:, :1]

        def logprobs_of(ids: torch.Tensor) -> npt.NDArray[np.float32]:
            values: npt.NDArray[np.float32] = (
                (logits_nV.gather(1, ids.to(logits_nV.device)).float() - first_n1).cpu().numpy()
            )
            return values

        likely = ids_nk.cpu().numpy()
        if request.draws is not None:
            drawn = draws_from_logits(logits_nV, numbers_nD, temperature=request.draws.temperature)
            ids_nk, logprobs_nk = drawn.tensors()
        sparse = SparseLogprobs(ids_nk.cpu().numpy(), logprobs_nk.cpu().numpy())
        if request.keep_ids:
            kept = np.asarray(request.keep_ids, dtype=np.int64)
            sparse = keep_ids(sparse, kept, logprobs_of(torch.from_numpy(kept).expand(len(logits_nV), -1)))
        bad = bad_n.cpu().numpy()
        logprobs = np.where(bad[:, None], np.float32(np.nan), sparse.logprobs)
        label_logprobs = np.where(bad, np.float32(np.nan), np.minimum(logprobs_of(labels_n[:, None])[:, 0], 0))
        return np.asarray(sparse.ids), logprobs, label_logprobs, likely


def _labels(document: TokenDocument, request: RowRequest) -> npt.NDArray[np.int64]:
    """The next token of each scored position; an arbitrary one after the last token, which has none."""
    labels = document.input_ids[1:].astype(np.int64)
    return np.append(labels, labels[-1]) if request.last_row else labels


def _numbers(document: TokenDocument, count: int, request: RowRequest) -> npt.NDArray[np.float64]:
    """The uniform numbers of the draws of a document's scored positions, (count, draws); none without draws."""
    number = 0 if request.draws is None else request.draws.number
    return uniforms(document.input_ids, count, number, seed=request.seed)


def _slices(length: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, length)) for start in range(0, length, size))


def length_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group documents of similar length, longest first, so that a batch with padding stays within `batch_tokens`.

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
        ConfigError: no config could be loaded from `model`.
    """
    problem = model_problem(model)
    if problem is not None:
        raise ConfigError(f"model: {problem}")
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    # The checks of each model's config raise their own errors.
    except Exception as error:
        raise ConfigError(
            f"model: no model config could be loaded from {model!r} (expected a folder or a hub id): {error}"
        ) from error


def resolve_device(device: str) -> str:
    """Return the device to run on; "auto" is the first CUDA device, or the CPU.

    Raises:
        ConfigError: `device` is not a torch device or a placement, or this machine does not have it.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device in _PLACEMENTS:
        return device
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(
            f"device: {device!r} is not a torch device; expected auto, cpu, cuda, cuda:1, … or one of "
            f"{', '.join(_PLACEMENTS)}"
        ) from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device: {device!r}, but torch finds {torch.cuda.device_count()} CUDA GPUs on this machine (see "
            "`nvidia-smi`); cpu runs without one"
        )
    try:
        # A type that torch knows may not be there, or have no memory, as meta.
        torch.ones(1, device=found).item()
    except (RuntimeError, AssertionError, NotImplementedError, ModuleNotFoundError) as error:
        reason = str(error).partition(". ")[0].partition("\n")[0]
        raise ConfigError(f"device: {device!r} cannot be used on this machine: {reason}") from error
    return str(found)


def resolve_dtype(dtype: str, config: Any, device: str) -> str:
    """Return the name of the dtype to run in.

    "auto" is the checkpoint's own dtype on an accelerator. On a CPU it is float32: few CPUs are fast in 16 bits, and
    the distributions become more exact.

    Raises:
        ConfigError: `dtype` is not a supported dtype.
    """
    if dtype == "auto":
        own = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
        return "float32" if device == "cpu" or own is None else str(own).removeprefix("torch.")
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype: must be auto, {', '.join(_DTYPES)}, found {dtype!r}")
    return str(_DTYPES[dtype]).removeprefix("torch.")

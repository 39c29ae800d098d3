"""The settings of a capture as keyword arguments, for type checkers and editors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

__all__ = ["CaptureOptions"]


class CaptureOptions(TypedDict, total=False):
    """The fields of `CaptureSettings` that `capture` has no parameters for, and those of its engines, flat or nested.
    What they mean is described in docs/settings.md.
    """

    prior: str | Path | None
    prior_rows: int
    dataset_configuration: str | None
    split: str
    samples: int | None
    seed: int
    shuffle: bool
    where: Sequence[str] | str
    min_tokens: int | None
    max_tokens: int | None
    drop_duplicates: bool | None
    read_columns: Sequence[str] | str
    append_eos: bool | None
    keep_columns: Sequence[str] | str
    tokenizer: str | None
    apply_chat_template: bool
    max_seq_len: int
    overflow: Literal["window", "truncate", "skip"]
    overlap: int | None
    loss_on: Literal["auto", "all", "assistant", "completion"]
    keep_ids: Sequence[int | str] | str
    label_logprobs: bool
    last_row: bool
    trust_remote_code: bool
    shard_tokens: int
    shard_range: str | None
    skip_bad_documents: int
    workers: Literal["ray"] | None
    num_workers: int | None
    worker_cpus: int
    engine: Literal["hf", "vllm", "openai"]
    hf: Mapping[str, Any]
    vllm: Mapping[str, Any]
    openai: Mapping[str, Any]
    # Of the engines hf and vllm.
    dtype: Literal["auto", "float32", "float", "bfloat16", "float16", "half"]
    batch_tokens: int | None
    # Of the engine hf.
    device: str
    head_dtype: Literal["float32", "auto"]
    head_rows: int
    # Of the engine vllm.
    max_model_len: int | None
    tensor_parallel_size: int
    pipeline_parallel_size: int
    enable_expert_parallel: bool
    quantization: str | None
    gpu_memory_utilization: float
    # Of the engine openai.
    base_url: str | None
    served_model: str | None
    concurrency: int
    max_retries: int
    request_timeout: float

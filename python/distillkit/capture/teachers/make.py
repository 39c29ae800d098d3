"""Starts the teacher that a capture's settings name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillkit.capture.teachers.base import Teacher

if TYPE_CHECKING:
    from distillkit.capture.settings import CaptureSettings

__all__ = ["make_teacher"]


def make_teacher(settings: CaptureSettings) -> Teacher:
    """Start the teacher that the settings name.

    Raises:
        ConfigError: the engine is not installed, or does not take a setting.
        MismatchError: the codec is for another vocabulary than the teacher's.
        CaptureError: it does not start, or a server does not answer.
    """
    from distillkit.capture.teachers.hf import HFTeacher, load_config

    trust = settings.trust_remote_code
    if settings.engine == "hf":
        return HFTeacher(
            settings.model,
            dtype=settings.dtype,
            device=settings.device,
            batch_tokens=settings.forward_tokens,
            head_rows=settings.head_rows,
            head_dtype=settings.head_dtype,
            trust_remote_code=trust,
        )
    head_size = int(load_config(settings.config_source, trust_remote_code=trust).get_text_config().vocab_size)
    k = settings.codec(head_size).k
    if settings.engine == "vllm":
        from distillkit.capture.teachers.vllm import VLLMTeacher

        return VLLMTeacher(
            settings.model,
            k=k,
            max_seq_len=settings.max_seq_len,
            tokenizer=settings.tokenizer,
            dtype=settings.dtype,
            batch_tokens=settings.batch_tokens,
            max_model_len=settings.max_model_len,
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=settings.pipeline_parallel_size,
            enable_expert_parallel=settings.enable_expert_parallel,
            quantization=settings.quantization,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            trust_remote_code=trust,
        )
    from distillkit.capture.teachers.openai import OpenAITeacher

    assert settings.base_url is not None, "CaptureSettings has checked it"
    return OpenAITeacher(
        settings.base_url,
        head_size=head_size,
        k=k,
        max_seq_len=settings.max_seq_len,
        served_model=settings.served_model,
        concurrency=settings.concurrency,
        max_retries=settings.max_retries,
        timeout=settings.request_timeout,
    )

"""Creates the teacher for a capture's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distillkit.capture.teachers.base import Teacher
from distillkit.errors import ConfigError

if TYPE_CHECKING:
    from distillkit.capture.settings import CaptureSettings

__all__ = ["make_teacher"]


def make_teacher(settings: CaptureSettings) -> Teacher:
    """Start the teacher for a capture's settings.

    Raises:
        ConfigError: the engine is not installed, or rejects a setting.
        MismatchError: the codec is for another vocabulary than the teacher's.
        CaptureError: the engine does not start, or the server does not answer.
    """
    from distillkit.capture.teachers.hf import HFTeacher, load_config

    trust = settings.trust_remote_code
    if settings.engine == "hf":
        return HFTeacher(settings.model, settings.hf, trust_remote_code=trust)
    head_size = int(load_config(settings.config_source, trust_remote_code=trust).get_text_config().vocab_size)
    k = settings.codec(head_size).k
    if settings.engine == "vllm":
        from distillkit.capture.teachers.vllm import VLLMTeacher

        return VLLMTeacher(
            settings.model,
            settings.vllm,
            k=k,
            max_seq_len=settings.max_seq_len,
            tokenizer=settings.tokenizer,
            trust_remote_code=trust,
        )
    if settings.engine == "openai":
        from distillkit.capture.teachers.openai import OpenAITeacher

        return OpenAITeacher(settings.openai, head_size=head_size, k=k, max_seq_len=settings.max_seq_len)
    raise ConfigError(f"engine: {settings.engine!r} has no teacher in capture/teachers/make.py")

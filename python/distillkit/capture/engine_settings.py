"""The settings that only some engines have, and their two spellings: nested in the engine's section, or flat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator

from distillkit.configuration.problems import InvalidSettingsError, Problem
from distillkit.configuration.secrets import redacted

__all__ = ["ENGINES", "HFSettings", "OpenAISettings", "VLLMSettings", "engines_with", "nest_settings", "web_address"]


DEFAULT_BATCH_TOKENS = 4096


def web_address(value: str) -> str:
    """Return the URL of a server.

    Raises:
        ValueError: it is not one.
    """
    try:
        url = urlsplit(value)
        usable = url.scheme in ("http", "https") and url.hostname and (url.port is None or url.port > 0)
    except ValueError:
        usable = False
    if not usable or not value.isascii() or not value.isprintable() or " " in value:
        raise ValueError(f"must be a URL such as http://localhost:8000/v1, found {redacted(value)!r}")
    return value


class _EngineSettings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class _LocalEngineSettings(_EngineSettings):
    dtype: Literal["auto", "float32", "float", "bfloat16", "float16", "half"] = Field(
        default="auto",
        description="Data type of the weights: float32, bfloat16, float16, or auto (the checkpoint's own; float32 on a "
        "CPU).",
    )
    batch_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Tokens per forward pass, padding included; by default 4096 with hf, and as many as fit in "
        "memory with vllm.",
    )


class HFSettings(_LocalEngineSettings):
    """Settings of the engine hf."""

    device: str = Field(
        default="auto",
        description="Torch device, such as cpu or cuda:1; auto: the first GPU, or else the CPU; balanced or "
        "sequential: spread over all GPUs.",
    )
    head_dtype: Literal["float32", "auto"] = Field(
        default="float32",
        description="Data type of the product with the language-model head: float32 is exact; auto is the model's own, "
        "faster and less exact.",
    )
    head_rows: int = Field(
        default=512,
        ge=1,
        description="Number of positions whose logits are in memory at once; each takes 4 bytes × vocabulary size.",
    )

    @property
    def forward_tokens(self) -> int:
        """Tokens per forward pass, padding included."""
        return self.batch_tokens or DEFAULT_BATCH_TOKENS


class VLLMSettings(_LocalEngineSettings):
    """Settings of the engine vllm."""

    max_model_len: int | None = Field(
        default=None, ge=1, description="Context length that vLLM plans for; `max_seq_len` + 1 by default."
    )
    tensor_parallel_size: int = Field(default=1, ge=1, description="GPUs that each layer is split across.")
    pipeline_parallel_size: int = Field(default=1, ge=1, description="Pipeline stages that the layers are split into.")
    enable_expert_parallel: bool = Field(
        default=False, description="Distribute complete experts over the GPUs instead of a slice of every expert."
    )
    quantization: str | None = Field(
        default=None, description="vLLM's name of the quantization method; by default the checkpoint's own."
    )
    gpu_memory_utilization: float = Field(
        default=0.9,
        gt=0,
        lt=1,
        description="Fraction of each GPU's memory for vLLM; the log-probabilities of a batch must fit in the rest.",
    )


class OpenAISettings(_EngineSettings):
    """Settings of the engine openai."""

    base_url: str | None = Field(
        default=None,
        description="URL of the server, such as http://localhost:8000/v1; its key is read from DISTILLKIT_API_KEY or "
        "OPENAI_API_KEY.",
    )
    served_model: str | None = Field(
        default=None, description="The server's name for the teacher; only needed if it serves several models."
    )
    concurrency: int = Field(default=16, ge=1, le=4096, description="Maximum number of concurrent requests.")
    max_retries: int = Field(default=8, ge=0, description="How often a failed request is retried, with growing pauses.")
    request_timeout: float = Field(
        default=600.0,
        gt=0,
        le=604_800,
        description="Seconds that a whole answer may take; after that, the request counts as failed.",
    )

    @field_validator("base_url")
    @classmethod
    def _a_web_address(cls, value: str | None) -> str | None:
        return value if value is None else web_address(value)


ENGINES: dict[str, type[_EngineSettings]] = {"hf": HFSettings, "vllm": VLLMSettings, "openai": OpenAISettings}


def engines_with(name: str) -> tuple[str, ...]:
    """Return the engines that have a setting; empty for settings that all captures share, and for unknown ones."""
    return tuple(engine for engine, part in ENGINES.items() if name in part.model_fields)


def nest_settings(
    settings: Mapping[Any, Any], engine: object, place: str = ""
) -> tuple[dict[str, Any], dict[str, str]]:
    """Move flat engine settings into their engine's section.

    Args:
        settings: flat, nested or both.
        engine: the chosen engine, which gets a flat setting that several engines have; a setting that it does not have
            goes to the first engine that does.
        place: prefix of these settings in the file, such as `captures.0.`.

    Returns:
        The nested settings, and a map from each dotted path to how it was written, for messages.

    Raises:
        ConfigError: a setting is given both flat and nested.
    """
    nested, written, twice = dict[str, Any](), dict[str, str](), []
    for name, value in settings.items():
        if not engines_with(str(name)):
            nested[str(name)], written[str(name)] = value, f"{place}{name}"
    for part in ENGINES.keys() & nested.keys():
        if nested[part] is None or isinstance(nested[part], (Mapping, BaseModel)):
            nested[part] = {str(name): value for name, value in dict(nested[part] or {}).items()}
            written |= {f"{part}.{name}": f"{place}{part}.{name}" for name in nested[part]}
    for name, value in settings.items():
        engines = engines_with(str(name))
        part = str(engine) if engine in engines else next(iter(engines), "")
        content = nested.setdefault(part, {}) if engines else None
        if not isinstance(content, dict):
            continue
        if name in content:
            twice.append(Problem(f"{place}{name}", f"is also set as {place}{part}.{name}; set only one"))
        content[name], written[f"{part}.{name}"] = value, f"{place}{name}"
    if twice:
        raise InvalidSettingsError(twice)
    return nested, written

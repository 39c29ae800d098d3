"""Quantised students: their settings, and whether bitsandbytes can run here."""

from __future__ import annotations

import importlib.util
import inspect
from typing import TYPE_CHECKING, Any

from distillkit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from distillkit.training.config.schema import RunConfig

__all__ = ["bitsandbytes_problem"]


def quantization_config_of(config: RunConfig, arguments: dict[str, Any]) -> Any:
    """Remove the quantisation settings from the arguments, and return them as a transformers object.

    Raises:
        ConfigError: a setting is unknown or invalid, or a package is missing.
    """
    import transformers
    from transformers.quantizers.auto import AutoQuantizationConfig

    if config.quantised is None:
        return None
    allowed = [name for name in inspect.signature(transformers.BitsAndBytesConfig).parameters if name != "kwargs"]
    nested = config.quantised == "quantization_config"
    path = f"{config.source}: model_kwargs" + (".quantization_config" if nested else "")
    settings = arguments.pop("quantization_config", None) or {
        name: arguments.pop(name) for name in allowed if name in arguments
    }
    method = settings.get("quant_method", "bitsandbytes")
    try:
        if method != "bitsandbytes":
            return AutoQuantizationConfig.from_dict(settings)
        unknown = next((name for name in settings if name not in (*allowed, "quant_method")), None)
        if unknown is not None:
            raise ConfigError(f"{path}.{unknown}: unknown key{nearest(unknown, allowed)}")
        if not settings.get("load_in_4bit") and not settings.get("load_in_8bit"):
            raise ConfigError(f"{path}: load_in_4bit: true or load_in_8bit: true is missing")
        problem = bitsandbytes_problem()
        if problem is not None:
            key = "load_in_4bit" if settings.get("load_in_4bit") else "load_in_8bit"
            raise ConfigError(f"{path}.{key}: weights cannot be quantised: {problem}")
        return transformers.BitsAndBytesConfig(**{k: v for k, v in settings.items() if k != "quant_method"})
    except (ValueError, TypeError, ImportError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: {error}") from error


def missing_package(module: str, package: str) -> str | None:
    """Return a message if a package is not installed, else None."""
    if importlib.util.find_spec(module) is not None:
        return None
    return f"the package {package} is not installed: pip install {package}"


def bitsandbytes_problem() -> str | None:
    """Return why bitsandbytes cannot be used here, or None if it can."""
    problem = missing_package("bitsandbytes", "bitsandbytes")
    if problem is not None:
        return problem
    import bitsandbytes
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = "cpu" if accelerator is None else accelerator.type
    supported = getattr(bitsandbytes, "supported_torch_devices", {"cuda"})
    if device in supported:
        return None
    return f"the installed bitsandbytes runs on {', '.join(sorted(supported))}, not on {device}"

"""The base of the sections of a training configuration."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

__all__ = ["Section", "refuse_flag"]


class Section(BaseModel):
    """A section: unknown keys are refused, and nothing can be changed later."""

    # The published keys model_kwargs and model_auto_class begin with pydantic's reserved prefix.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


def refuse_flag(value: Any) -> Any:
    """Validate a number before pydantic does: it takes true as 1.

    Strict types are no way out, since YAML reads 1e-4 as text.
    """
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value

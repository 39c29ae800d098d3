"""LoRA adapters on the student: the `peft` section of the configuration, and what it does to the model.

Only adapters are trained and kept in checkpoints; the base weights stay as they are, quantised ones too (QLoRA).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Set
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator, model_validator

from distillkit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["LoraSection", "add_adapters"]

_INITIALISATIONS = "true, false, 'gaussian', 'orthogonal', 'olora', 'pissa', 'pissa_niter_N'"

# What each may be is checked below, with one message where pydantic's own for a union are several.
Names = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})]
LayerNumbers = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}, {"type": "null"}]}),
]


class LoraSection(BaseModel):
    """LoRA adapters: fields of `peft.LoraConfig` under their own names, and what is saved at the end."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    r: int = Field(default=16, ge=1, description="Rank of the adapters.")
    lora_alpha: float = Field(
        default=32,
        gt=0,
        allow_inf_nan=False,
        description="The output of the adapters is scaled by lora_alpha / r (lora_alpha / √r with `use_rslora`).",
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the input of the adapters.")
    target_modules: Names = Field(
        default="all-linear",
        description="Layers to adapt: their names or ends of names, a regular expression for whole names, or "
        "all-linear (every linear layer but the head).",
    )
    exclude_modules: Names | None = Field(
        default=None,
        description="Names, ends of names or a regular expression of layers without an adapter. Layers frozen by "
        "`frozen_modules` or `frozen_res` have none anyway.",
    )
    modules_to_save: list[str] | None = Field(
        default=None, description="Modules that are trained whole and saved with the adapters."
    )
    use_rslora: bool = Field(default=False, description="Rank-stabilised scaling; see `lora_alpha`.")
    use_dora: bool = Field(default=False, description="Train magnitude and direction of weights apart (DoRA).")
    init_lora_weights: Any = Field(default=True, description=f"Initialisation of the adapters: {_INITIALISATIONS}.")
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Which of the model's biases are trained."
    )
    lora_bias: bool = Field(default=False, description="Give the adapters a bias.")
    layers_to_transform: LayerNumbers = Field(
        default=None, description="Adapt these layers only: a number or a list of numbers."
    )
    layers_pattern: Names | None = Field(
        default=None, description="Name of the module list that `layers_to_transform` counts in."
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict, description="Other values of `r`, by the name or regular expression of layers."
    )
    alpha_pattern: dict[str, float] = Field(
        default_factory=dict, description="Other values of `lora_alpha`, by the name or regular expression of layers."
    )
    trainable_token_indices: list[int] | None = Field(
        default=None, description="Token ids whose embeddings are trained."
    )
    ensure_weight_tying: bool = Field(default=False, description="Train one copy where embedding and head are tied.")
    merge_on_save: bool = Field(
        default=False,
        description="Save the trained student as a whole model, with its adapters merged into the weights, instead of "
        "as adapters for the base model. Checkpoints always hold adapters.",
    )

    @field_validator("target_modules", "exclude_modules", "layers_pattern")
    @classmethod
    def _names(cls, value: Any, info: Any) -> Any:
        """Names as a list, or one expression: pydantic's own message for such a union is two."""
        if value is None and info.field_name != "target_modules":
            return None
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is not a regular expression: {error}") from None
            return value
        if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
            raise ValueError(f"must be a list of names or a regular expression, found {value!r}")
        return value

    @field_validator("layers_to_transform")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        layers = value if isinstance(value, list) else [value]
        if value is not None and not all(type(layer) is int and layer >= 0 for layer in layers):
            raise ValueError(f"must be the number of a layer or a list of numbers, found {value!r}")
        return value

    @field_validator("init_lora_weights")
    @classmethod
    def _initialisation(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and re.fullmatch(r"gaussian|orthogonal|olora|pissa|pissa_niter_\d+", value):
            return value
        raise ValueError(f"{value!r} is not allowed; allowed: {_INITIALISATIONS}")

    @model_validator(mode="after")
    def _layers_need_names(self) -> LoraSection:
        names = self.target_modules
        if self.layers_to_transform is not None and isinstance(names, str) and names != "all-linear":
            raise ValueError(
                "layers_to_transform: requires target_modules to be a list, not a regular expression; select the "
                "layers in the expression instead"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern: has no meaning without layers_to_transform")
        return self

    @property
    def changes_base_weights(self) -> bool:
        """Whether the model with its adapters switched off is something else than the model that was loaded."""
        return self.bias != "none" or (
            isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora"))
        )


def add_adapters(model: PreTrainedModel, section: LoraSection, frozen: Set[str]) -> PeftModel:
    """Put adapters on a student. Its own weights are frozen then.

    Args:
        model: the bare student.
        section: the `peft` section.
        frozen: names of parameters that the configuration freezes; layers with such a weight get no adapter.

    Raises:
        ConfigError: PEFT is not installed, or the section does not fit the model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(f"peft: the package peft is not installed: pip install peft ({error})") from error

    _check_saved_modules(model, section, frozen)
    settings = section.model_dump(exclude={"merge_on_save"}, exclude_none=True)
    layers = [name.removesuffix(".weight") for name in sorted(frozen) if name.endswith(".weight")]
    if layers:
        settings["exclude_modules"] = _expression(section.exclude_modules, layers)
    causal = type(model).__name__.endswith("ForCausalLM")
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers for a property by its older name.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM" if causal else None, **settings))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"peft: these settings do not fit {type(model).__name__}: {error}") from error


def _expression(excluded: Any, frozen: list[str]) -> str:
    """Join what the user excludes and what is frozen into one expression for whole names, as PEFT matches them."""
    parts = [re.escape(name) for name in frozen]
    if isinstance(excluded, str):
        parts.append(f"(?:{excluded})")
    elif excluded:
        parts += [rf"(?:.*\.)?{re.escape(name)}" for name in excluded]
    return "|".join(parts)


def _check_saved_modules(model: PreTrainedModel, section: LoraSection, frozen: Set[str]) -> None:
    """Refuse modules to save that are not there, are frozen, or would come apart from what they are tied to."""
    modules = dict(model.named_modules())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding.weight is head.weight
    for wanted in section.modules_to_save or ():
        named = {name: module for name, module in modules.items() if name == wanted or name.endswith(f".{wanted}")}
        if not named:
            raise ConfigError(f"peft.modules_to_save: the student has no module {wanted!r}{nearest(wanted, modules)}")
        for name, module in named.items():
            parameters = [f"{name}.{parameter}" for parameter, _ in module.named_parameters()]
            if parameters and frozen >= set(parameters):
                raise ConfigError(
                    f"peft.modules_to_save: {name!r} is frozen by frozen_modules or frozen_res, so it cannot be trained"
                )
            if tied and (module is embedding or module is head) and not section.ensure_weight_tying:
                raise ConfigError(
                    f"peft.modules_to_save: {name!r} is both embedding and head in this student "
                    "(tie_word_embeddings), and a trained copy would diverge from it; to train one copy for both, set "
                    "peft.ensure_weight_tying: true and name the embedding in modules_to_save"
                )

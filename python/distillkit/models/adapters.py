"""LoRA adapters on the student: the `peft` section of the configuration, and its application to the model.

Only the adapters are trained and saved in checkpoints; the base weights, quantised or not (QLoRA), stay unchanged.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Set
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from distillkit.configuration.problems import shown
from distillkit.configuration.section import Section, refuse_flag
from distillkit.errors import ConfigError, nearest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["LoraSection", "add_adapters", "check_merge"]

_INITIALISATIONS = "true, false, 'gaussian', 'orthogonal', 'olora', 'pissa', 'pissa_niter_N'"

# Validated below, since pydantic would report several messages for a union.
Names = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})]
LayerNumbers = Annotated[
    Any,
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}, {"type": "null"}]}),
]


class LoraSection(Section):
    """LoRA adapters: fields of `peft.LoraConfig` under their own names, and the format of the saved model."""

    r: int = Field(default=16, ge=1, description="Rank of the adapters.")
    lora_alpha: float = Field(
        default=32,
        gt=0,
        allow_inf_nan=False,
        description="Adapter outputs are scaled by lora_alpha / r (lora_alpha / √r with `use_rslora`).",
    )
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout on the adapters' inputs.")
    target_modules: Names = Field(
        default="all-linear",
        description="Layers to adapt: a list of names or name suffixes, a regular expression matching full names, or "
        "all-linear (every linear layer except the head).",
    )
    exclude_modules: Names | None = Field(
        default=None,
        description="Layers to leave without an adapter: a list of names or name suffixes, or a regular expression. "
        "Layers frozen by `frozen_modules` or `frozen_res` never get one.",
    )
    modules_to_save: list[str] | None = Field(
        default=None, description="Modules that are fully trained and saved with the adapters."
    )
    use_rslora: bool = Field(default=False, description="Rank-stabilised scaling; see `lora_alpha`.")
    use_dora: bool = Field(
        default=False,
        description="Train the magnitude and direction of weights separately (DoRA). Load such adapters with "
        "PeftModel, or merge them.",
    )
    init_lora_weights: Any = Field(default=True, description=f"Initialisation of the adapters: {_INITIALISATIONS}.")
    bias: Literal["none", "all", "lora_only"] = Field(
        default="none", description="Which biases of the model are trained."
    )
    lora_bias: bool = Field(default=False, description="Give the adapters a bias.")
    layers_to_transform: LayerNumbers = Field(
        default=None, description="Adapt only these layers: an index or a list of indices."
    )
    layers_pattern: Names | None = Field(
        default=None, description="Name of the module list that `layers_to_transform` indexes."
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict, description="Overrides of `r`, keyed by layer name or regular expression."
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict, description="Overrides of `lora_alpha`, keyed by layer name or regular expression."
    )
    trainable_token_indices: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="Token ids whose embeddings are trained."
    )
    ensure_weight_tying: bool = Field(
        default=False, description="Train a single shared copy if embedding and head are tied."
    )
    merge_on_save: bool = Field(
        default=False,
        description="Save the trained student as a full model, with the adapters merged into its weights, instead of "
        "as adapters for the base model. Checkpoints always contain adapters.",
    )

    _numbers = field_validator("r", "lora_alpha", "lora_dropout", mode="before")(refuse_flag)

    @field_validator("target_modules", "exclude_modules", "layers_pattern")
    @classmethod
    def _names(cls, value: Any, info: Any) -> Any:
        """Validates a list of names or a regular expression; for a union, pydantic would report two messages."""
        if value is None and info.field_name != "target_modules":
            return None
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"{value!r} is not a regular expression: {error}") from None
            return value
        if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
            raise ValueError(f"must be a list of names or a regular expression, found {shown(value)}")
        return value

    @field_validator("layers_to_transform")
    @classmethod
    def _layers(cls, value: Any) -> Any:
        layers = value if isinstance(value, list) else [value]
        if value is not None and not all(type(layer) is int and layer >= 0 for layer in layers):
            raise ValueError(f"must be a layer index or a list of layer indices, found {shown(value)}")
        return value

    @field_validator("init_lora_weights")
    @classmethod
    def _initialisation(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and re.fullmatch(r"gaussian|orthogonal|olora|pissa|pissa_niter_\d+", value):
            return value
        raise ValueError(f"{shown(value)} is not allowed; allowed: {_INITIALISATIONS}")

    @model_validator(mode="after")
    def _layers_need_names(self) -> LoraSection:
        names = self.target_modules
        if self.layers_to_transform is not None and isinstance(names, str) and names != "all-linear":
            raise ValueError(
                "layers_to_transform: requires target_modules to be a list, not a regular expression; select the "
                "layers in the expression instead"
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("layers_pattern: has no effect without layers_to_transform")
        return self

    @property
    def changes_base_weights(self) -> bool:
        """Whether the model with its adapters disabled differs from the model that was loaded."""
        return self.bias != "none" or (
            isinstance(self.init_lora_weights, str) and self.init_lora_weights.startswith(("pissa", "olora"))
        )


def add_adapters(model: PreTrainedModel, section: LoraSection, frozen: Set[str]) -> PeftModel:
    """Add adapters to a student and freeze its own weights.

    Args:
        model: the bare student.
        section: the `peft` section.
        frozen: names of parameters that the configuration freezes; layers whose weight is among them get no adapter.

    Raises:
        ConfigError: PEFT is not installed, or the section does not fit the model.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError(f"peft: the package peft is not installed: pip install peft ({error})") from error

    _check_saved_modules(model, section, frozen)
    if section.trainable_token_indices and _is_tied(model):
        raise ConfigError(
            "peft.trainable_token_indices: the embedding is also the head in this student (tie_word_embeddings), and "
            "single rows of a head cannot be trained here; to train all of it, set peft.ensure_weight_tying: true and "
            "name the embedding in peft.modules_to_save"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    beyond = [token for token in section.trainable_token_indices or () if token >= rows]
    if beyond:
        raise ConfigError(
            f"peft.trainable_token_indices: the student's embedding has {rows:,} rows, found token id {beyond[0]:,}"
        )
    settings = section.model_dump(exclude={"merge_on_save"}, exclude_none=True)
    layers = [name.removesuffix(".weight") for name in sorted(frozen) if name.endswith(".weight")]
    if layers:
        settings["exclude_modules"] = _expression(section.exclude_modules, layers)
    causal = type(model).__name__.endswith("ForCausalLM")
    try:
        with warnings.catch_warnings():
            # PEFT uses a deprecated name of a transformers property.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            if section.merge_on_save:  # refused below
                warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
                warnings.filterwarnings("ignore", "`lora_bias=True` was passed")
            wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM" if causal else None, **settings))
    except (ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"peft: these settings do not fit {type(model).__name__}: {error}") from error
    if section.merge_on_save:
        check_merge(
            wrapped,
            lora_bias=section.lora_bias,
            key="peft.merge_on_save",
            otherwise="save the adapters (peft.merge_on_save: false)",
        )
    return wrapped


def check_merge(wrapped: PeftModel, *, lora_bias: bool, key: str, otherwise: str) -> None:
    """Reject adapters that, merged into the weights, would give another model than the one that is trained.

    Args:
        wrapped: the student.
        lora_bias: whether the adapters have a bias.
        key: the setting that needs merged weights, for the message.
        otherwise: how to do without, for the message.

    Raises:
        ConfigError: there is such an adapter.
    """
    from peft.tuners.lora import LoraLayer

    bare = wrapped.get_base_model()
    embedding = bare.get_input_embeddings()
    for name, module in bare.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if module is embedding and _is_tied(bare):
            raise ConfigError(
                f"{key}: {name!r} is both embedding and head in this student (tie_word_embeddings). Its "
                "adapter changes the embedding only, but merged into the shared weight it would change the head, too. "
                f"Leave it out of peft.target_modules; or {otherwise}; or train one "
                "copy for both (peft.ensure_weight_tying: true, with the embedding in peft.modules_to_save)"
            )
        if lora_bias and getattr(module.get_base_layer(), "bias", None) is None:
            raise ConfigError(
                f"{key}: {name!r} has no bias that the adapter's could be merged into; set "
                f"peft.lora_bias: false, or {otherwise}"
            )


def _is_tied(model: Any) -> bool:
    """Whether embedding and head share their weight, with or without adapters on them."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [getattr(module, "base_layer", module).weight for module in (embedding, head) if module is not None]
    return len(weights) == 2 and weights[0] is weights[1]


def _expression(excluded: Any, frozen: list[str]) -> str:
    """Combine the user's exclusions and the frozen layers into one expression, which PEFT matches with full names."""
    parts = [re.escape(name) for name in frozen]
    if isinstance(excluded, str):
        parts.append(f"(?:{excluded})")
    elif excluded:
        parts += [rf"(?:.*\.)?{re.escape(name)}" for name in excluded]
    return "|".join(parts)


def _check_saved_modules(model: PreTrainedModel, section: LoraSection, frozen: Set[str]) -> None:
    """Reject modules to save that do not exist, are frozen, or would diverge from the module they are tied to."""
    modules = dict(model.named_modules())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = _is_tied(model)
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

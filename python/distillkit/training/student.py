"""Loads, checks and describes the student that a configuration specifies."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from distillkit.configuration.places import neighbour
from distillkit.configuration.secrets import redacted
from distillkit.errors import ConfigError, DistillKitError, nearest
from distillkit.models.adapters import add_adapters
from distillkit.models.head import bare_model, elements_of, lm_head_of, rows_of
from distillkit.models.layers import layer_pairs
from distillkit.models.rope import choose_frequencies_by_document
from distillkit.models.weights import loading_errors, loading_reason, model_problem
from distillkit.training.quantization import quantization_config_of

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from distillkit.training.config.schema import RunConfig

__all__ = [
    "attention_implementation",
    "check_student",
    "describe_student",
    "freeze",
    "load_student",
    "prepare_student",
    "student_outline",
    "widen_embeddings",
]

logger = logging.getLogger(__name__)

_FLASH = "flash_attention_2"


def check_student(config: RunConfig) -> PreTrainedModel | PeftModel:
    """Check everything about the student that can be checked without its weights.

    Builds the student from its config without allocating weights, and freezes parts and adds adapters on that.

    Returns:
        The student without weights, frozen and with adapters as it will be trained.

    Raises:
        ConfigError: a setting cannot be applied here, or does not fit the student.
    """
    _load_arguments(config)
    outline = student_outline(config, attention=config.model_kwargs.get("attn_implementation"))
    _check_layers(config, outline)
    with torch.device("meta"):
        return _prepared(outline, config)


def _check_layers(config: RunConfig, outline: PreTrainedModel) -> None:
    """Check `layer_mapping` with the models' configs."""
    if config.layer_mapping is None:
        return
    [(key, found)] = config.live_teachers.items()
    from transformers import AutoConfig

    try:
        teacher = AutoConfig.from_pretrained(found.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{config.source}: {key}.path: no model config could be loaded from {found.path!r}: {error}"
        ) from error
    try:
        layer_pairs(config.layer_mapping, outline.config.get_text_config(), teacher.get_text_config())
    except ConfigError as error:
        raise ConfigError(f"{config.source}: {error}") from error


def student_outline(config: RunConfig, attention: str | None = None) -> PreTrainedModel:
    """Build the student without weights: every parameter has its name and shape, but is on the meta device.

    Args:
        config: the run's configuration.
        attention: an attention implementation that the student must support.

    Raises:
        ConfigError: there is no such model, or the auto class does not support it.
    """
    arguments = {} if attention is None else {"attn_implementation": attention}
    student = _student_config(config)
    with _loading(config, arguments or "its config"), torch.device("meta"):
        return _auto_class(config).from_config(student, trust_remote_code=config.trust_remote_code, **arguments)


def _student_config(config: RunConfig) -> Any:
    import transformers

    with _loading(config, "its config"):
        return transformers.AutoConfig.from_pretrained(config.model, trust_remote_code=config.trust_remote_code)


def load_student(config: RunConfig, vocab_size: int, *, checkpointing: bool = False) -> PreTrainedModel | PeftModel:
    """Load the student as configured.

    Unless `model_kwargs.dtype` is set, weights are bfloat16 with FlashAttention (which needs 16 bits) and for the
    unquantised parts of a quantised student, and float32 otherwise.

    Args:
        config: the run's configuration.
        vocab_size: number of ids that the tokenizer can produce.
        checkpointing: whether activations will be recomputed in the backward pass.

    Returns:
        The model, with `requires_grad` set on the trained parameters; a `PeftModel` if there is a `peft` section.

    Raises:
        ConfigError: the student cannot be loaded, or a setting does not fit it.
    """
    arguments = _load_arguments(config)
    with _loading(config, arguments):
        bare = _auto_class(config).from_pretrained(
            config.model, trust_remote_code=config.trust_remote_code, **arguments
        )
    if config.use_flash_attention is None and "attn_implementation" not in arguments:
        logger.info(
            "not using FlashAttention (%s), but what transformers uses for %s by default: %s attention",
            _why_no_flash_attention(config),
            type(bare).__name__,
            bare.config._attn_implementation,
        )
    return prepare_student(bare, config, vocab_size, checkpointing=checkpointing)


def prepare_student(
    bare: PreTrainedModel | PeftModel, config: RunConfig, vocab_size: int, *, checkpointing: bool = False
) -> PreTrainedModel | PeftModel:
    """Widen embeddings, freeze parts and add adapters of a loaded student, as configured; see `load_student`.

    Raises:
        ConfigError: a setting does not fit it.
    """
    choose_frequencies_by_document(bare_model(bare))
    before = rows_of(bare.get_input_embeddings().weight)
    if config.resize_embeddings_to_multiple_of is not None:
        widen_embeddings(bare, vocab_size, config.resize_embeddings_to_multiple_of)
    rows = rows_of(bare.get_input_embeddings().weight)
    if rows < vocab_size:
        raise ConfigError(
            f"{config.source}: model: {config.model} has embeddings for {rows:,} ids, but its tokenizer produces "
            f"{vocab_size:,}; set resize_embeddings_to_multiple_of to widen them"
        )
    if config.peft is not None and not config.peft.merge_on_save and rows != before:
        raise ConfigError(
            f"{config.source}: resize_embeddings_to_multiple_of: the embeddings grow from {before:,} to {rows:,} "
            "rows, and adapters alone would then not load on the base model; set peft.merge_on_save: true"
        )
    model = _prepared(bare, config)
    if checkpointing and not bare.get_input_embeddings().weight.requires_grad:
        # Reentrant checkpointing gives no gradients to a layer unless one of its inputs requires a gradient.
        bare.enable_input_require_grads()
    _describe(model, config)
    return model


def _prepared(bare: PreTrainedModel | PeftModel, config: RunConfig) -> PreTrainedModel | PeftModel:
    """Freeze parts as configured, add adapters if there is a `peft` section, and check that the head can be used."""
    try:
        frozen = freeze(bare, config.frozen_modules, config.frozen_res)
        adapted = hasattr(bare, "peft_config")
        if adapted and config.peft is not None:
            raise ConfigError("peft: the model already has adapters; omit this, or give the model without them")
        if config.peft is None and not adapted and getattr(bare, "quantization_method", None) is not None:
            raise ConfigError(
                f"model: the weights of {config.model} are quantised ({bare.quantization_method}), and cannot be "
                "trained; add a peft section to train LoRA adapters on them"
            )
        model = bare if config.peft is None else add_adapters(bare, config.peft, frozen)
        lm_head_of(model)
    except DistillKitError as error:
        raise ConfigError(f"{config.source}: {error}") from error
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"{config.source}: frozen_modules and frozen_res leave nothing to train")
    return model


def _describe(model: PreTrainedModel | PeftModel, config: RunConfig) -> None:
    """Log a description of the student, and warn about what may be unexpected."""
    student = describe_student(config, model)
    logger.info(
        "student %s: %s, %s parameters (%s trained%s), %s, %s attention",
        student["path"],
        student["class"],
        f"{student['parameters']:,}",
        f"{student['trained']:,}",
        " in LoRA adapters" if student["adapters"] else "",
        student["dtype"],
        student["attention"],
    )


def _auto_class(config: RunConfig) -> Any:
    import transformers

    return getattr(transformers, config.model_auto_class)


@contextmanager
def _loading(config: RunConfig, what: object) -> Iterator[None]:
    """Turn the errors that transformers raises while loading into one message."""
    try:
        yield
    except loading_errors() as error:
        problem = model_problem(config.model)
        if problem is not None:
            raise ConfigError(f"{config.source}: model: {problem}") from error
        raise ConfigError(
            f"{config.source}: model: {config.model!r} cannot be loaded by {config.model_auto_class} with "
            f"{redacted(str(what))}: {redacted(loading_reason(error))}{neighbour(config.model)}"
        ) from error


def _load_arguments(config: RunConfig) -> dict[str, Any]:
    """Return the arguments for `from_pretrained`, checked as far as possible without the model.

    Raises:
        ConfigError: a value is not allowed, or requires something that is not available.
    """
    arguments = dict(config.model_kwargs)
    attention = attention_implementation(config)
    if attention is not None:
        arguments["attn_implementation"] = attention
    quantisation = quantization_config_of(config, arguments)
    if quantisation is not None:
        arguments["quantization_config"] = quantisation
        if torch.cuda.is_available():
            arguments.setdefault("device_map", {"": int(os.environ.get("LOCAL_RANK", "0"))})
    arguments.setdefault("dtype", "bfloat16" if attention == _FLASH or quantisation is not None else "float32")
    return arguments


def attention_implementation(config: RunConfig) -> str | None:
    """Choose the student's attention implementation.

    Returns:
        A name for `attn_implementation`, or None to leave the choice to `model_kwargs`, and without one there to
        transformers, which knows what each model supports.

    Raises:
        ConfigError: FlashAttention is required but cannot run here, or two settings contradict each other.
    """
    wanted, named = config.use_flash_attention, config.model_kwargs.get("attn_implementation")
    if named is not None and wanted is not None and wanted != str(named).startswith("flash"):
        raise ConfigError(
            f"{config.source}: use_flash_attention: {str(wanted).lower()} contradicts "
            f"model_kwargs.attn_implementation: {named!r}; set only one"
        )
    if named is not None or wanted is False:
        return None
    missing = _why_no_flash_attention(config)
    if missing is None:
        return _FLASH
    if wanted:
        raise ConfigError(
            f"{config.source}: use_flash_attention: true, but {missing}. FlashAttention needs a CUDA GPU, the package "
            "flash-attn (`pip install flash-attn --no-build-isolation`) and a model that supports it; otherwise set "
            "use_flash_attention: false, for what transformers uses for the model by default"
        )
    return None


def _why_no_flash_attention(config: RunConfig) -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "the package flash-attn is not installed"
    # Unknown for a model with code of its own: transformers refuses where it is not supported.
    found = _auto_class(config)._model_mapping.get(type(_student_config(config)), None)
    for each in found if isinstance(found, tuple) else (found,):
        if each is not None and not each._supports_flash_attn:
            return f"{each.__name__} does not support it"
    return None


def widen_embeddings(model: PreTrainedModel, vocab_size: int, multiple: int) -> None:
    """Widen embeddings and head to the next multiple of `multiple` with room for `vocab_size` ids; never narrow them.

    A checkpoint's padded head is often wider than the tokenizer's vocabulary, and a teacher may have assigned
    probability to the padding rows.
    """
    size = rows_of(model.get_input_embeddings().weight)
    wanted = -(-max(size, vocab_size) // multiple) * multiple
    if wanted != size:
        model.resize_token_embeddings(wanted)
        logger.info("embeddings and head widened from %s to %s rows", f"{size:,}", f"{wanted:,}")


def freeze(model: torch.nn.Module, modules: list[str], expressions: list[str]) -> set[str]:
    """Freeze parameters.

    Args:
        model: the student.
        modules: exact names of modules, as in `named_modules`.
        expressions: regular expressions, searched in the names of parameters.

    Returns:
        The names of the frozen parameters; both names of tied ones.

    Raises:
        ConfigError: there is no such module, or an expression matches nothing.
    """
    known = dict(model.named_modules())
    # Tied parameters have two names, of which named_parameters would only return the first.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen: list[torch.nn.Parameter] = []
    for name in modules:
        if name not in known or not name:
            raise ConfigError(f"frozen_modules: the student has no module {name!r}{nearest(name, known)}")
        chosen += known[name].parameters()
    for expression in expressions:
        matched = [parameter for name, parameter in parameters.items() if re.search(expression, name)]
        if not matched:
            example = next(iter(parameters), "none")
            raise ConfigError(f"frozen_res: {expression!r} matches no parameter's name (they look like {example!r})")
        chosen += matched
    for parameter in chosen:
        parameter.requires_grad_(False)
    identities = {id(parameter) for parameter in chosen}
    return {name for name, parameter in parameters.items() if id(parameter) in identities}


def describe_student(config: RunConfig, model: PreTrainedModel | PeftModel) -> dict[str, Any]:
    """Describe the student: `path`, `class`, `parameters`, `trained`, `adapters`, `dtype`, `attention`."""
    bare = bare_model(model)
    sizes = [(elements_of(part), part.requires_grad) for part in bare.parameters()]
    return {
        "path": config.model,
        "class": type(bare).__name__,
        "parameters": sum(size for size, _ in sizes),
        "trained": sum(size for size, trained in sizes if trained),
        "adapters": hasattr(model, "peft_config"),
        "dtype": str(bare.dtype).removeprefix("torch."),
        "attention": bare.config._attn_implementation,
    }

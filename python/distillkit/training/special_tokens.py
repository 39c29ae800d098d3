"""Special tokens of student and tokenizer, and end-of-sequence labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillkit.errors import ConfigError
from distillkit.text import tokenizer as tokenizers

if TYPE_CHECKING:
    from trl import SFTConfig

    from distillkit.training.config.schema import RunConfig

__all__ = ["check_eos_labels", "configure_model", "configure_tokenizer"]


def configure_tokenizer(tokenizer: Any, arguments: SFTConfig) -> None:
    """Give the student's tokenizer the special tokens and the chat template that `training_args` name.

    Raises:
        ConfigError: a token is not in its vocabulary, or the template cannot be loaded or used.
    """
    for name in ("eos_token", "pad_token"):
        token = getattr(arguments, name)
        if token is None:
            continue
        if token not in tokenizer.get_vocab():
            raise ConfigError(f"training_args.{name}: {token!r} is not in the student's vocabulary")
        setattr(tokenizer, name, token)
    path = arguments.chat_template_path
    if path is None:
        return
    if path.endswith((".jinja", ".j2")):
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"training_args.chat_template_path: {path} cannot be read: {error}") from error
        return
    other = tokenizers.load_tokenizer(path)
    if not other.chat_template:
        raise ConfigError(f"training_args.chat_template_path: the tokenizer in {path} has no chat template")
    template = other.get_chat_template()
    ours = tokenizer.get_vocab()
    strange = sorted(token for token in other.added_tokens_encoder if token in template and token not in ours)
    if strange:
        raise ConfigError(
            f"training_args.chat_template_path: the template in {path} writes {', '.join(strange)}, which the "
            "student's vocabulary lacks: add them to the student first, or use another template"
        )
    tokenizer.chat_template = template


def check_eos_labels(config: RunConfig, tokenizer: Any) -> list[int]:
    """Return the ids that become the end-of-sequence id in the labels (`dataset.eos_label_token_ids`).

    Raises:
        ConfigError: an id is not in the student's vocabulary, or its tokenizer has no end-of-sequence token.
    """
    ids = config.dataset.eos_label_token_ids or []
    size = tokenizers.vocab_size(tokenizer)
    for token in ids:
        if token >= size:
            raise ConfigError(
                f"dataset.eos_label_token_ids: {token:,} is not a token of the student, whose ids end at {size - 1:,}"
            )
    if ids and tokenizer.eos_token_id is None:
        raise ConfigError(
            "dataset.eos_label_token_ids: the student's tokenizer has no end-of-sequence token to replace them with; "
            "name one of its tokens as training_args.eos_token"
        )
    return ids


def configure_model(model: Any, tokenizer: Any, arguments: SFTConfig) -> None:
    """Give the student the tokenizer's end-of-sequence token, if `training_args.eos_token` changed it."""
    if arguments.eos_token is None:
        return
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if tokenizer.eos_token_id not in known:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *known]

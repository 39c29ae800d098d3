"""The tokenizers on both sides of a retokenisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distillkit.errors import ConfigError, MismatchError
from distillkit.shards import Dataset
from distillkit.text.tokenizer import fingerprint, load_tokenizer

__all__ = ["head_size", "teacher_tokenizer"]


def teacher_tokenizer(dataset: Dataset, name: str | None, *, trust_remote_code: bool = False) -> Any:
    """Loads the tokenizer of a dataset's token ids.

    Args:
        dataset: a captured or published dataset.
        name: a folder or hub id; None: the one in the dataset's header, as a folder in the working folder or beside
            the dataset, or on the hub.
        trust_remote_code: whether it may run code of its own.

    Raises:
        ConfigError: none is recorded, or it cannot be loaded.
        MismatchError: it has other tokens than the dataset's.
    """
    recorded = dataset.header.tokenizer
    if name is None and recorded is None:
        raise ConfigError(
            f"{dataset.path} does not record its tokenizer, without which its ids are no text: name its folder "
            "or hub id (--tokenizer)"
        )
    if name is None:
        name = str((recorded or {})["name"])
        beside = Path(dataset.path).parent / name
        name = str(beside) if not Path(name).exists() and beside.is_dir() else name
        try:
            tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        except ConfigError as error:
            raise ConfigError(
                f"{error}. It is the tokenizer of {dataset.path}: name its folder (--tokenizer)"
            ) from error
    else:
        tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    found = fingerprint(tokenizer)
    if recorded is not None and found != recorded["fingerprint"]:
        raise MismatchError(
            f"{name}: its tokens ({found}) are not those of {dataset.path} ({recorded['name']}, "
            f"{recorded['fingerprint']}): name the teacher's own tokenizer (--tokenizer)"
        )
    return tokenizer


def head_size(model: str, known: int) -> int:
    """The width of a student's logits, by its config; the number of its tokenizer's ids if it has none.

    Raises:
        MismatchError: the tokenizer has more ids than that.
    """
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").exists():
        return known
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError):
        # A tokenizer by itself, on the hub.
        return known
    width = int(config.get_text_config().vocab_size)
    if width < known:
        raise MismatchError(
            f"{model}: its tokenizer has {known:,} ids, but its logits are only {width:,} wide: tokenizer and model do "
            "not match"
        )
    return width

"""A fingerprint tells tokenizers apart by what their ids mean, and by nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from distillkit.errors import ConfigError
from distillkit.text.tokenizer import fingerprint, load_tokenizer, vocab_size
from support.refusals import refused

WORDS = ["<unk>", "<eos>", "the", "cat", "sat", "Ġé", "on"]


def tokenizer_of(words: list[str], **roles: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", **roles)


def test_the_value_is_pinned() -> None:
    """Datasets carry it: it must not change from release to release."""
    assert fingerprint(tokenizer_of(WORDS)) == "xxh3-128:1e4ccb79a0262c9df340f95f41cdfa2c"


def test_equal_maps_have_equal_fingerprints(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(WORDS)
    expected = fingerprint(tokenizer)

    tokenizer.save_pretrained(tmp_path)
    assert fingerprint(load_tokenizer(str(tmp_path))) == expected
    # Another token for padding, when it is special already, is another role and no other id.
    assert fingerprint(tokenizer_of(WORDS, pad_token="<eos>")) == expected


@pytest.mark.parametrize(
    "words",
    [
        pytest.param([*WORDS[:-2], WORDS[-1], WORDS[-2]], id="two ids swapped"),
        pytest.param([*WORDS, "mat"], id="one token more"),
        pytest.param([*WORDS[:-2], "Ġ", "éon"], id="the same bytes, cut elsewhere"),
    ],
)
def test_other_maps_have_other_fingerprints(words: list[str]) -> None:
    assert fingerprint(tokenizer_of(words)) != fingerprint(tokenizer_of(WORDS))


def test_special_tokens_count() -> None:
    tokenizer = tokenizer_of(WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": ["cat"]})
    assert fingerprint(tokenizer) != fingerprint(tokenizer_of(WORDS))
    assert vocab_size(tokenizer) == len(WORDS)


def test_vocab_size_counts_added_tokens() -> None:
    tokenizer = tokenizer_of(WORDS)
    assert vocab_size(tokenizer) == 7
    tokenizer.add_tokens(["dog", "cow"])
    assert vocab_size(tokenizer) == 9


def test_no_tokenizer(tmp_path: Path) -> None:
    with refused(ConfigError, str(tmp_path / "nothing")):
        load_tokenizer(str(tmp_path / "nothing"))

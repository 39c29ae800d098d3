"""Writes real tokenizers, which packages ship in formats of their own, as folders that transformers loads.

    pip install --no-deps mistral-common dashscope
    python benches/real_tokenizers.py OUT [tekken mistral qwen]

| folder | from | |
|---|---|---|
| tekken | mistral-common | byte-level BPE of 131,072 ids, as of Mistral Nemo |
| mistral | mistral-common | SentencePiece BPE with byte fallback, 32,768 ids, as of Mistral 7B v0.3 |
| qwen | dashscope | byte-level BPE of 151,851 ids, as of Qwen; normalises to NFC |
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

__all__ = ["TOKENIZERS", "write_tokenizer"]

_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_INST = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + '[/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)


def package_file(package: str, name: str) -> Path:
    """A file of an installed package; the package itself is not imported, as it needs others."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install --no-deps {package.replace('_', '-')}")
    return Path(found.submodule_search_locations[0]) / name


def tekken() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer of mistral-common."""
    content = json.loads(package_file("mistral_common", "data/tekken_240911.json").read_text(encoding="utf-8"))
    config, special = content["config"], [f"<SPECIAL_{number}>" for number in range(1000)]
    special[:5] = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    count = config["default_vocab_size"] - config["default_num_special_tokens"]
    ranks = {base64.b64decode(each["token_bytes"]): each["rank"] + len(special) for each in content["vocab"][:count]}
    backend = _byte_level(ranks, config["pattern"], dict(zip(special, range(len(special)), strict=True)))
    return _with_beginning(backend, _INST)


def qwen() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer of dashscope."""
    lines = package_file("dashscope", "resources/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line.strip())}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]
    backend = _byte_level(ranks, _QWEN, {name: len(ranks) + number for number, name in enumerate(special)})
    backend.normalizer = normalizers.NFC()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=_CHATML
    )


def mistral() -> PreTrainedTokenizerFast:
    """The SentencePiece tokenizer of mistral-common."""
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    proto.ParseFromString(
        package_file("mistral_common", "data/mistral_instruct_tokenizer_240323.model.v3").read_bytes()
    )
    vocabulary = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    normal = {piece.piece: -piece.score for piece in proto.pieces if piece.type == 1}
    merges = [
        (cost, token[:cut], token[cut:])
        for token, cost in normal.items()
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    merges.sort(key=lambda merge: (merge[0], vocabulary[merge[1]]))
    pairs = [(left, right) for _, left, right in merges]
    backend = Tokenizer(BPE(vocabulary, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens(
        [AddedToken(piece.piece, normalized=False, special=True) for piece in proto.pieces if piece.type in (2, 3)]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_beginning(backend, _INST)


TOKENIZERS: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {"tekken": tekken, "mistral": mistral, "qwen": qwen}
"""Name → what makes it."""


def write_tokenizer(name: str, folder: Path) -> Path:
    """Writes one of the tokenizers to a folder of its name, unless it is there. Returns that folder."""
    written = folder / name
    if not (written / "tokenizer.json").exists():
        TOKENIZERS[name]().save_pretrained(written)
    return written


def _byte_level(ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int]) -> Tokenizer:
    """A BPE tokenizer of byte strings with ids in the order of their merges."""
    characters = _byte_characters()
    names = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges: list[tuple[int, int, str, str]] = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], names[left], names[right]))
    merges.sort(key=lambda merge: merge[:2])
    vocabulary = {names[token]: rank for token, rank in ranks.items()} | dict(special)
    backend = Tokenizer(BPE(vocabulary, [(left, right) for *_, left, right in merges], ignore_merges=True))
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in special])
    parts: Sequence[Any] = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(list(parts))
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_beginning(backend: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts <s> before a text."""
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=template
    )


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def main() -> None:
    """Writes the tokenizers that are named, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(TOKENIZERS))
    args = parser.parse_args()
    for name in args.names or TOKENIZERS:
        print(write_tokenizer(name, args.out))


if __name__ == "__main__":
    main()

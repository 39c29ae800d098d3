"""The header of a shard: how to interpret its bytes, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import xxhash

from distillkit import __version__
from distillkit.codec import Codec, CodecConfig, CompactConfig, Prior, SampledConfig
from distillkit.codec.fidelity import FidelityStats
from distillkit.errors import ConfigError, CorruptDataError, InputError, MismatchError, UnsupportedVersionError
from distillkit.shards.json_text import canonical_json, parse_json

__all__ = ["Header", "check_codec", "hashed_metadata", "read_hashed_metadata"]

FORMAT = "distillkit-shard"
VERSION = 1
HEADER_KEY = b"distillkit.header"

MEASURED = "measured"
"""The part of `capture` with figures of the shard's own documents; the manifest has those of all."""

LOGPROBS = "log_softmax of the raw logits over head_size, float32"
DRAWN = "shares of draws from the softmax of the raw logits / temperature over head_size"


def alignment(rows: Literal["L-1", "L"]) -> dict[str, str]:
    """The `alignment` field of a header: row t predicts token t + 1; a document of L tokens has L − 1 or L rows."""
    return {"row": "t predicts t+1", "rows": rows}


@dataclass(frozen=True, kw_only=True)
class Header:
    """The metadata of a shard.

    Attributes:
        codec: format, version and configuration (`Codec.to_dict`).
        vocab_size: number of ids in the tokenizer's vocabulary.
        head_size: number of logits per position; at least `vocab_size`.
        tokenizer: `name` and `fingerprint`, or None if unknown (published datasets).
        teacher: `name`, `revision`, `dtype`, or None if unknown.
        temperature: the temperature by which the logits were divided; 1, except for draws.
        logprobs: how the log-probabilities were computed.
        alignment: `row` "t predicts t+1"; `rows` "L-1" or "L", the number of rows of a document of L tokens.
        capture: the settings that determine the bytes; empty for converted datasets.
        fidelity: `FidelityStats.to_dict`, measured while writing; None if the originals were not available.
        distillkit_version: the release that wrote the shard.

    Raises:
        InputError: a field has an invalid value.
    """

    codec: Mapping[str, Any]
    vocab_size: int
    head_size: int
    tokenizer: Mapping[str, Any] | None = None
    teacher: Mapping[str, Any] | None = None
    temperature: float = 1.0
    logprobs: str = LOGPROBS
    alignment: Mapping[str, str] = field(default_factory=lambda: alignment("L-1"))
    capture: Mapping[str, Any] = field(default_factory=dict)
    fidelity: Mapping[str, Any] | None = None
    distillkit_version: str = __version__
    format: str = FORMAT
    version: int = VERSION

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.head_size)
        for name, ok, expected in (
            ("version", type(self.version) is int and self.version == VERSION, str(VERSION)),
            ("codec", isinstance(self.codec, Mapping), "a mapping"),
            ("vocab_size", all(type(size) is int for size in sizes), "an integer, like head_size"),
            ("temperature", _is_number(self.temperature) and self.temperature > 0, "a positive number"),
            ("logprobs", isinstance(self.logprobs, str), "text"),
            ("distillkit_version", isinstance(self.distillkit_version, str), "text"),
            ("alignment", self.alignment in (alignment("L-1"), alignment("L")), f"{alignment('L-1')} or rows 'L'"),
            ("capture", isinstance(self.capture, Mapping), "a mapping"),
            ("tokenizer", _names(self.tokenizer, "name", "fingerprint"), "null, or a name and a fingerprint"),
            ("teacher", _names(self.teacher, "name"), "null, or at least a name"),
            ("fidelity", isinstance(self.fidelity, (Mapping, type(None))), "a mapping or null"),
        ):
            if not ok:
                raise InputError(f"the header's {name} is {getattr(self, name)!r:.200}, expected {expected}")
        if not 0 < self.vocab_size <= self.head_size:
            raise InputError(f"the header's vocab_size is {self.vocab_size}, expected 1 … head_size = {self.head_size}")

    @property
    def prior(self) -> str | None:
        """The hash of the prior that the rows were encoded with (`Prior.hash`), if the codec has one."""
        config = self.codec.get("config")
        if not isinstance(config, Mapping) or self.codec.get("format") not in ("compact", "sampled"):
            return None
        named = config.get("prior")
        return named if isinstance(named, str) else None

    @property
    def changes(self) -> dict[str, str]:
        """What became of the capture since the teacher ran, in words, by key of `capture`; the last change is last.

        Example:
            >>> from distillkit.shards import Dataset
            >>> Dataset.open("captured").header.changes
            {}
        """
        about = {"merged": _merged, "retokenized": _retokenized, "converted": _converted}
        return {key: describe(_mapping(self.capture[key])) for key, describe in about.items() if key in self.capture}

    def make_codec(self, prior: Prior | None = None) -> Codec:
        """The codec that reads the shard's rows.

        Args:
            prior: the one that `prior` names.

        Raises:
            UnsupportedVersionError: this release does not support the format or its version.
            CorruptDataError: the field does not describe a codec, its ids go beyond the head, or the prior is missing,
                another one, or damaged.
        """
        try:
            codec = Codec.from_dict(self.codec, prior)
        except (ConfigError, TypeError) as error:
            raise CorruptDataError(f"the header's codec is invalid: {error}") from error
        if codec.vocab_size > self.head_size:
            raise CorruptDataError(f"the codec has {codec.vocab_size} ids, but the head has {self.head_size} entries")
        return codec

    def rows_of(self, tokens: int) -> int:
        """Number of rows of a document of `tokens` tokens."""
        return tokens if self.alignment["rows"] == "L" else max(tokens - 1, 0)

    def to_dict(self) -> dict[str, Any]:
        """All fields as a JSON-serialisable mapping."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The fields that all shards of a dataset share: everything except `fidelity`, `distillkit_version` and what
        was measured while writing."""
        shared = {key: value for key, value in self.to_dict().items() if key not in ("fidelity", "distillkit_version")}
        shared["capture"] = {key: value for key, value in shared["capture"].items() if key != MEASURED}
        return shared

    def check_same(self, other: Header, *, where: str) -> None:
        """Checks that a header belongs to the same dataset.

        Raises:
            MismatchError: a field differs; the message names it and both values.
        """
        ours, theirs = _flat(self.identity()), _flat(other.identity())
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                raise MismatchError(
                    f"{where}: {key} is {theirs.get(key)!r}, expected {ours.get(key)!r}: these do not belong to the "
                    "same dataset"
                )

    def to_metadata(self) -> dict[bytes, bytes]:
        """Key-value metadata of the Parquet file: the header and its hash."""
        return hashed_metadata(HEADER_KEY, self.to_dict())

    @staticmethod
    def from_metadata(metadata: Mapping[bytes, bytes] | None, *, where: str) -> Header:
        """Reads and checks the header in a Parquet file's metadata.

        Raises:
            CorruptDataError: it is missing, its hash differs, or fields are missing, unknown or invalid.
            UnsupportedVersionError: its version is newer than this release supports.
        """
        return Header.from_dict(read_hashed_metadata(metadata, HEADER_KEY, where=where), where=where)

    @staticmethod
    def from_dict(description: Any, *, where: str) -> Header:
        """Recreates a header from the result of `to_dict`.

        Raises:
            CorruptDataError: fields are missing, unknown or invalid.
            UnsupportedVersionError: its version is newer than this release supports.
        """
        if not isinstance(description, Mapping) or description.get("format") != FORMAT:
            raise CorruptDataError(f"{where}: not a header of format {FORMAT!r}: {description!r:.200}")
        version = description.get("version")
        if isinstance(version, int) and version > VERSION:
            raise UnsupportedVersionError(
                f"{where}: shard format version {version} is newer than {VERSION}, the latest that this release "
                "reads; update distillkit"
            )
        known = {item.name for item in fields(Header)}
        if set(description) != known:
            odd = sorted(set(description) ^ known)
            raise CorruptDataError(f"{where}: the header's fields {', '.join(odd)} are missing or unknown")
        try:
            header = Header(**description)
            if header.fidelity is not None:
                FidelityStats.from_dict(header.fidelity)
        except (InputError, CorruptDataError) as error:
            raise CorruptDataError(f"{where}: {error}") from error
        return header


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    """A value of `capture`, which headers of others may have made anything."""
    return value if isinstance(value, Mapping) else {}


def _merged(about: Mapping[str, Any]) -> str:
    sources = about.get("sources")
    names = [str(_mapping(source).get("name")) for source in sources] if isinstance(sources, list) else []
    return f"merged from {' and '.join(names) or 'others'}"


def _retokenized(about: Mapping[str, Any]) -> str:
    source, tokenizer = (_mapping(about.get(key)).get("name") for key in ("source", "tokenizer"))
    return f"retokenized from {source}, whose tokens are those of {tokenizer}"


def _converted(about: Mapping[str, Any]) -> str:
    return f"converted from the format {_mapping(about.get('source_codec')).get('format')}"


def _names(value: object, *required: str) -> bool:
    """Whether a field is null or a mapping of texts, with those that are required."""
    if value is None:
        return True
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in required)


def hashed_metadata(key: bytes, value: Any) -> dict[bytes, bytes]:
    """Key-value metadata of a Parquet file: a value as JSON, and its XXH3-128 under the same key plus `.xxh3`."""
    text = canonical_json(value).encode()
    return {key: text, key + b".xxh3": xxhash.xxh3_128_hexdigest(text).encode()}


def read_hashed_metadata(metadata: Mapping[bytes, bytes] | None, key: bytes, *, where: str) -> Any:
    """Reads a value written by `hashed_metadata`.

    Raises:
        CorruptDataError: it is missing, or its hash differs.
    """
    text, expected = (metadata or {}).get(key), (metadata or {}).get(key + b".xxh3")
    if text is None or expected is None:
        raise CorruptDataError(f"{where}: no {key.decode()} in the file's metadata: not a shard, or damaged")
    found = xxhash.xxh3_128_hexdigest(text)
    if found.encode() != expected:
        raise CorruptDataError(
            f"{where}: the hash of {key.decode()} is {found}, expected {expected.decode(errors='replace')}: it was "
            "modified"
        )
    return parse_json(text, where=f"{where}: {key.decode()}")


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaf values by dotted path."""
    if isinstance(value, Mapping):
        leaves: dict[str, Any] = {}
        for key, item in value.items():
            leaves.update(_flat(item, f"{path}.{key}" if path else str(key)))
        return leaves
    return {path: list(value) if isinstance(value, tuple) else value}


def check_codec(given: CodecConfig, own: Codec, name: str, what: str) -> None:
    """Checks that a codec configuration equals the dataset's own; which prior it has need not be given.

    Raises:
        MismatchError: they differ; the message names the fields and both values.
    """
    if given.format != own.format:
        raise MismatchError(
            f"{name}: {what} is {own.format}, but the configuration given is {given.format}; omit it, since the "
            "dataset has its own"
        )
    theirs = own.to_dict()["config"]
    if isinstance(given, (CompactConfig, SampledConfig)):
        ours = {**Codec(given.without_prior()).to_dict()["config"], "prior": given.prior or theirs["prior"]}
    else:
        ours = Codec(given).to_dict()["config"]
    odd = [f"{key} {theirs[key]!r} (given: {ours[key]!r})" for key in theirs if ours[key] != theirs[key]]
    if odd:
        raise MismatchError(
            f"{name}: {what} has {', '.join(odd)}; omit the configuration, since the dataset has its own"
        )

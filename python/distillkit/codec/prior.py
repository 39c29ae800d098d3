"""What the formats compact and sampled learn from rows of a teacher, to code others of its rows (rust/codec/FORMAT.md
§4 and §5)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from distillkit import _native
from distillkit.codec.config import CodecConfig, CompactConfig, SampledConfig, codec_config
from distillkit.errors import ConfigError, CorruptDataError
from distillkit.types import SparseLogprobs

__all__ = ["Prior"]

_SAMPLED = b"DKDRAWS1"
"""The first bytes of a prior of the format sampled."""


@dataclass(frozen=True, eq=False)
class Prior:
    """Which ids a teacher's rows have in common, and how often which values occur: the tables of the formats compact
    and sampled.

    A dataset stores its prior once, as `prior.bin`; rows can only be decoded with the one they were encoded with.
    `distillkit.shards.load_prior` reads that of a dataset.

    Attributes:
        data: the bytes of `prior.bin`.
        source: where it comes from, for messages.
        hash: XXH3-128 of `data`, 32 hexadecimal digits, by which configurations and headers name it.

    Example:
        >>> import numpy as np
        >>> from distillkit.codec import Codec, Prior, preset, sparse_from_logits
        >>> rows = sparse_from_logits(np.random.default_rng(0).standard_normal((64, 1000), dtype=np.float32), 50)
        >>> config = preset("compact-50", vocab_size=1000)
        >>> codec = Codec(config, prior=Prior.learn(config, rows))
        >>> data = codec.encode_document(rows)
        >>> bool((codec.decode_document(data, 64).ids[:, 0] == rows.ids[:, 0]).all())
        True
    """

    data: bytes = field(repr=False)
    source: str = "a prior"
    hash: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "hash", xxhash.xxh3_128_hexdigest(self.data))

    @cached_property
    def config(self) -> CompactConfig | SampledConfig:
        """What it was learned for (`LearnedConfig.for_prior`).

        Raises:
            CorruptDataError: it is damaged.
        """
        try:
            if self.data.startswith(_SAMPLED):
                return SampledConfig(**json.loads(_native.sampled_prior_config(self.data)))
            return CompactConfig(**json.loads(_native.prior_config(self.data)))
        except CorruptDataError as error:
            raise CorruptDataError(f"{self.source}: {error}") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prior) and self.hash == other.hash

    def __hash__(self) -> int:
        return hash(self.hash)

    @staticmethod
    def learn(
        config: CodecConfig | Mapping[str, Any],
        rows: SparseLogprobs,
        *,
        base: Prior | None = None,
        likely: npt.NDArray[np.int64] | None = None,
        source: str = "a prior learned from rows",
    ) -> Prior:
        """Learns a prior from rows of a teacher. The same rows give the same bytes on every machine.

        More rows make a better one: with 20,000, other rows take 6% more bytes than with 123,000; 225,000 save 0.3%.

        Args:
            config: the configuration that it is for.
            rows: numpy (N, K) ids and log-probabilities, with K ≥ the configuration's k, or shares of draws.
            base: another prior of the same vocabulary, of either format. Its lists of likely ids are kept, and only the
                tables of codes are learned anew, for another k, threshold, step or number of draws. A compact prior
                cannot have one of the format sampled as its base.
            likely: for the format sampled, (N, any number) the most probable ids of each row, if they are known: which
                rows are alike shows better in them than in draws.
            source: where the rows come from, for messages.

        Raises:
            ConfigError: the configuration is invalid or of another format.
            InputError: the rows are invalid, or fewer than are needed.
            CorruptDataError: `base` is damaged.
        """
        parsed = codec_config(config)
        if not isinstance(parsed, (CompactConfig, SampledConfig)):
            raise ConfigError(
                f"only the formats compact and sampled have a prior; the configuration is for {parsed.format}"
            )
        config_json, known = parsed.without_prior().model_dump_json(), None if base is None else base.data
        ids = np.ascontiguousarray(rows.ids, dtype=np.int64)
        logprobs = np.ascontiguousarray(rows.logprobs, dtype=np.float32)
        if isinstance(parsed, CompactConfig):
            return Prior(_native.learn_prior(config_json, ids, logprobs, known), source)
        wide = None if likely is None else np.ascontiguousarray(likely, dtype=np.int64)
        return Prior(_native.learn_sampled_prior(config_json, ids, logprobs, wide, known), source)

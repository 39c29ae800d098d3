"""What a capture is told, and what it reports."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from distillkit.codec import Codec, CodecConfig, preset
from distillkit.errors import ConfigError, MismatchError

__all__ = ["CaptureReport", "CaptureSettings"]

DEFAULT_PRESET = "recommended"
_RANGE = re.compile(r"\d+:\d+")


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """Everything a capture with transformers can be told. Names are those of the command's options.

    Attributes:
        model: the teacher: a folder or a hub id.
        dataset: text, chat or token ids: a `.jsonl`, `.json`, `.txt` or `.parquet` file, a folder of them, a
            `save_to_disk` folder or a hub id.
        output: the folder for the captured dataset.
        preset: name of a codec configuration; "recommended" if neither this nor `compression_config` is given.
        compression_config: a codec configuration: a YAML file (a published `compression_config.yaml` too), a mapping or
            a config object. Its vocabulary size must be the width of the teacher's logits.
        dataset_configuration: configuration of a hub dataset.
        split: split of the dataset.
        samples: capture a random sample of this many rows, in the dataset's order; None: all.
        seed: decides the sample.
        tokenizer: a folder or hub id; the teacher's own if not given.
        apply_chat_template: render chat rows with the tokenizer's chat template; if not, chat rows are refused.
        max_seq_len: longer documents are split in pieces of this many tokens.
        dtype: the teacher's dtype: float32, bfloat16, float16, or "auto": the checkpoint's own, float32 on a CPU.
        head_dtype: "float32" multiplies by the teacher's head in float32 whatever its dtype is, "auto" in its own
            (faster in 16 bits, less exact).
        device: "auto" (the first CUDA device, else the CPU), a torch device, or "balanced" or "sequential" over all
            devices.
        trust_remote_code: run code that comes with the model or tokenizer.
        batch_tokens: tokens of one forward, padding included.
        head_rows: positions whose logits exist at a time.
        shard_tokens: a shard is finished once it has this many tokens; a capture that was interrupted starts again
            after the last whole one.
        shard_range: capture only the shards FIRST:END of the plan (END not included), for jobs that share the work;
            None: all.
        skip_bad_documents: leave out up to this many documents that the teacher gives no distributions for.
        workers: "ray" shares the shards out over a Ray cluster; None: this process does all.
        num_workers: how many Ray workers; None: as many as the cluster's GPUs hold, without GPUs one a node.
        worker_cpus: CPUs of a Ray worker.

    Raises:
        ConfigError: a value is not allowed; the message names it.
    """

    model: str
    dataset: str
    output: str | Path
    preset: str | None = None
    compression_config: str | Path | Mapping[str, Any] | CodecConfig | None = None
    dataset_configuration: str | None = None
    split: str = "train"
    samples: int | None = None
    seed: int = 42
    tokenizer: str | None = None
    apply_chat_template: bool = True
    max_seq_len: int = 1024
    dtype: str = "auto"
    head_dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    batch_tokens: int = 4096
    head_rows: int = 512
    shard_tokens: int = 262_144
    shard_range: str | None = None
    skip_bad_documents: int = 0
    workers: str | None = None
    num_workers: int | None = None
    worker_cpus: int = 1

    def __post_init__(self) -> None:
        if self.preset is not None and self.compression_config is not None:
            raise ConfigError(
                f"preset and compression_config: give one of the two, not both (found {self.preset!r} and "
                f"{self.compression_config!r})"
            )
        if self.head_dtype not in ("float32", "auto"):
            raise ConfigError(f"head_dtype: must be float32 or auto, found {self.head_dtype!r}")
        # Three tokens are the least that any document can be cut to without a piece of one token.
        for name, least in (
            ("max_seq_len", 3),
            ("batch_tokens", 1),
            ("head_rows", 1),
            ("shard_tokens", 1),
            ("samples", 1),
            ("seed", 0),
            ("skip_bad_documents", 0),
            ("num_workers", 1),
            ("worker_cpus", 1),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{name}: must be a whole number of at least {least}, found {value!r}")

        if self.shard_range is not None and not _RANGE.fullmatch(self.shard_range):
            raise ConfigError(f"shard_range: must be FIRST:END, such as 0:8, found {self.shard_range!r}")

        if self.workers not in (None, "ray"):
            raise ConfigError(f"workers: must be ray, or not given, found {self.workers!r}")

    @property
    def gpus_per_worker(self) -> int:
        """GPUs that one engine runs on, where there are any."""
        return 1

    def shard_numbers(self, shards: int) -> range:
        """Return which of a plan's shards to capture.

        Raises:
            ConfigError: the range begins after the last one.
        """
        if self.shard_range is None:
            return range(shards)
        first, end = map(int, self.shard_range.split(":"))
        if first > shards or end < first:
            raise ConfigError(f"shard_range: {self.shard_range} of {shards} shards, numbered from 0")
        return range(first, min(end, shards))

    @classmethod
    def of(cls, **options: Any) -> CaptureSettings:
        """Make settings from names and values.

        Raises:
            ConfigError: a name is not known, with the nearest that is; or a value is not allowed.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
                raise ConfigError(f"capture has no setting {name!r}{hint}")
        return cls(**options)

    def codec(self, head_size: int) -> Codec:
        """Make the codec for a teacher whose logits are `head_size` wide.

        Raises:
            ConfigError: there is no such preset or file, or its content is no codec configuration.
            MismatchError: the configuration is for another vocabulary size.
        """
        if self.compression_config is None:
            return Codec(preset(self.preset or DEFAULT_PRESET, vocab_size=head_size))
        where = "compression_config"
        config: Any = self.compression_config
        if isinstance(config, (str, Path)):
            where, config = str(config), _read_yaml(Path(config))
        codec = Codec(config)
        if codec.vocab_size != head_size:
            field = "d" if codec.format == "quantized" else "vocab_size"
            raise MismatchError(
                f"{where}: {field} is {codec.vocab_size}, the teacher's logits are {head_size} wide (the tokenizer may "
                "know fewer ids): "
                f"set {field}: {head_size}"
            )
        return codec

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide the bytes besides teacher, tokenizer, codec and dataset, for the header."""
        names = ("max_seq_len", "apply_chat_template", "head_dtype", "batch_tokens", "head_rows", "shard_tokens")
        sample = {} if self.samples is None else {"samples": self.samples, "seed": self.seed}
        return {**{name: getattr(self, name) for name in names}, **sample}


@dataclass(frozen=True, kw_only=True)
class CaptureReport:
    """What a capture made. Counts are those of the whole dataset, also where an earlier run wrote part of it.

    Attributes:
        output: the dataset's folder.
        documents, tokens, rows, shards: its size; a document of L tokens has L − 1 rows, or L with the last one.
        unfinished_shards: shards that this run was not to do, and nobody has done yet; without them no manifest.
        bytes_per_token: the codec's bytes a row, ids and values.
        disk_bytes: size of the shards.
        kl_mean, kl_p99: KL(teacher's top k ‖ decoded) in nats a row, as measured while writing; None if there are no
            rows.
        mass_mean: mean probability of the stored ids of a row; None if it is not known.
        mass_quantiles: that probability, not exceeded by this share of the rows.
        next_token_rates: how often the teacher's first id is the next token, with rows at their place ("0") and one
            off; at its place it should be far more often.
        shifted: −1 or +1 if rows fit the tokens better one off, beyond chance; else None.
        resumed_documents: how many documents an earlier run had written.
        already_complete: the whole dataset was there, nothing was captured.
        passed_over: rows of the source, and what of it is not in the dataset, by reason.
        skipped: documents that the teacher gave no distributions for: where they are from, and why.
        seconds: time of this run's scoring and writing, without loading.
        new_tokens, tokens_per_second: tokens this run captured, and how fast.
        teacher_seconds, blocked_seconds: this run's time waiting for the teacher, and that the teacher waited for the
            encoder.
        encode_seconds, write_seconds: of the encoder's thread, beside the teacher.
        peak_rss_bytes: largest resident memory of the process so far.
        peak_cuda_bytes: largest memory on the first CUDA device; 0 without one.
    """

    output: str
    documents: int
    tokens: int
    rows: int
    shards: int
    unfinished_shards: int
    bytes_per_token: float
    disk_bytes: int
    kl_mean: float | None
    kl_p99: float | None
    mass_mean: float | None
    mass_quantiles: dict[str, float | None]
    next_token_rates: dict[str, float]
    shifted: int | None
    resumed_documents: int
    already_complete: bool
    passed_over: dict[str, int]
    skipped: list[list[str]]
    seconds: float
    new_tokens: int
    tokens_per_second: float
    teacher_seconds: float
    blocked_seconds: float
    encode_seconds: float
    write_seconds: float
    peak_rss_bytes: int
    peak_cuda_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able mapping."""
        return asdict(self)


def default_of(name: str) -> Any:
    """Return the default of a setting, for the command's options."""
    return next(field.default for field in fields(CaptureSettings) if field.name == name)


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"compression_config: {path} can not be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"compression_config: {path} is not YAML: {error}") from error

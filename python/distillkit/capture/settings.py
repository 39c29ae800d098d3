"""What a capture is told, and what it reports."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Union

import yaml

from distillkit.codec import Codec, CodecConfig, codec_config, preset
from distillkit.errors import ConfigError, MismatchError

__all__ = ["CaptureReport", "CaptureSettings"]

DEFAULT_PRESET = "recommended"
DEFAULT_BATCH_TOKENS = 4096

# Settings that only these engines know.
_ENGINE_SETTINGS = {
    **dict.fromkeys(("head_dtype", "device", "head_rows"), ("hf",)),
    **dict.fromkeys(("dtype", "batch_tokens"), ("hf", "vllm")),
    **dict.fromkeys(
        (
            "max_model_len",
            "tensor_parallel_size",
            "pipeline_parallel_size",
            "enable_expert_parallel",
            "quantization",
            "gpu_memory_utilization",
        ),
        ("vllm",),
    ),
    **dict.fromkeys(("base_url", "served_model", "concurrency", "max_retries", "request_timeout"), ("openai",)),
}


@dataclass(frozen=True, kw_only=True)
class CaptureSettings:
    """Everything a capture can be told. Names are those of the command's options.

    Attributes:
        model: the teacher: a folder or a hub id. For a server's: where its config and tokenizer are.
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
        batch_tokens: tokens of one forward, padding included; None: 4096, with vLLM as many as memory has room for.
        head_rows: positions whose logits exist at a time.
        shard_tokens: a shard is finished once it has this many tokens; a capture that was interrupted starts again
            after the last whole one.
        engine: what runs the teacher: "hf" (transformers), "vllm", or "openai": a running server.
        max_model_len: positions that vLLM plans with; None: `max_seq_len` + 1.
        tensor_parallel_size, pipeline_parallel_size, enable_expert_parallel: how vLLM spreads the teacher over GPUs.
        quantization: vLLM's; None: as the checkpoint says.
        gpu_memory_utilization: share of a GPU's memory for vLLM; the log-probabilities of a batch need some beside it.
        base_url: the server, with its `/v1`. Its key comes from the environment: `DISTILLKIT_API_KEY` or
            `OPENAI_API_KEY`.
        served_model: the server's name for the teacher; None: that of the only one it serves.
        concurrency: requests to the server at a time.
        max_retries: how often a failed request is tried again, with growing pauses.
        request_timeout: seconds until a request has failed.

    Raises:
        ConfigError: a value is not allowed, or not with this engine; the message names it.
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
    batch_tokens: int | None = None
    head_rows: int = 512
    shard_tokens: int = 262_144
    engine: str = "hf"
    max_model_len: int | None = None
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    enable_expert_parallel: bool = False
    quantization: str | None = None
    gpu_memory_utilization: float = 0.9
    base_url: str | None = None
    served_model: str | None = None
    concurrency: int = 16
    max_retries: int = 8
    request_timeout: float = 600.0

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
            ("max_model_len", 1),
            ("tensor_parallel_size", 1),
            ("pipeline_parallel_size", 1),
            ("concurrency", 1),
            ("max_retries", 0),
        ):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < least):
                raise ConfigError(f"{name}: must be a whole number of at least {least}, found {value!r}")
        self._check_engine()

    def _check_engine(self) -> None:
        """Refuse settings that the engine does not know or that it needs and has not.

        Raises:
            ConfigError: names the setting.
        """
        if self.engine not in ("hf", "vllm", "openai"):
            raise ConfigError(f"engine: must be hf, vllm or openai, found {self.engine!r}")
        for name, engines in _ENGINE_SETTINGS.items():
            if self.engine not in engines and getattr(self, name) != default_of(name):
                raise ConfigError(
                    f"{name}: {getattr(self, name)!r} is given, but it is for the engine {' or '.join(engines)}, and "
                    f"this capture is with {self.engine}"
                )
        if not 0 < self.gpu_memory_utilization < 1:
            raise ConfigError(
                f"gpu_memory_utilization: must be above 0 and below 1 (the log-probabilities of a batch need memory "
                f"beside it), found {self.gpu_memory_utilization!r}"
            )
        if self.request_timeout <= 0:
            raise ConfigError(f"request_timeout: must be above 0, found {self.request_timeout!r}")
        if self.engine == "openai" and self.base_url is None:
            raise ConfigError("base_url: the engine openai needs the server's, such as http://localhost:8000/v1")

    @property
    def forward_tokens(self) -> int:
        """Tokens of one forward of transformers."""
        return self.batch_tokens or DEFAULT_BATCH_TOKENS

    @property
    def config_source(self) -> str:
        """Where the teacher's config is: a server's may have another name than any folder, the tokenizer's has one."""
        return self.tokenizer or self.model if self.engine == "openai" else self.model

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

    def read_compression_config(self) -> CodecConfig:
        """Read `compression_config`, which must be given.

        Raises:
            ConfigError: there is no such file, or its content is no codec configuration.
        """
        config: Any = self.compression_config
        return codec_config(_read_yaml(Path(config)) if isinstance(config, (str, Path)) else config)

    def codec(self, head_size: int) -> Codec:
        """Make the codec for a teacher whose logits are `head_size` wide.

        Raises:
            ConfigError: there is no such preset or file, or its content is no codec configuration.
            MismatchError: the configuration is for another vocabulary size.
        """
        if self.compression_config is None:
            return Codec(preset(self.preset or DEFAULT_PRESET, vocab_size=head_size))
        codec = Codec(self.read_compression_config())
        if codec.vocab_size != head_size:
            given = self.compression_config
            where = str(given) if isinstance(given, (str, Path)) else "compression_config"
            field = "d" if codec.format == "quantized" else "vocab_size"
            raise MismatchError(
                f"{where}: {field} is {codec.vocab_size}, the teacher's logits are {head_size} wide (the tokenizer may "
                "know fewer ids): "
                f"set {field}: {head_size}"
            )
        return codec

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide the bytes besides teacher, tokenizer, codec and dataset, for the header."""
        names: tuple[str, ...] = ("max_seq_len", "apply_chat_template", "shard_tokens")
        options = {name: getattr(self, name) for name in names}
        if self.engine == "hf":
            # Which documents share a forward, and how its products are summed, changes last bits.
            options |= {"head_dtype": self.head_dtype, "batch_tokens": self.forward_tokens, "head_rows": self.head_rows}
        else:
            # These batch by themselves; what they give is the same within their noise only.
            options |= {"engine": self.engine}
        if self.quantization is not None:
            options |= {"quantization": self.quantization}
        if self.samples is not None:
            options |= {"samples": self.samples, "seed": self.seed}
        return options


@dataclass(frozen=True, kw_only=True)
class CaptureReport:
    """What a capture made. Counts are those of the whole dataset, also where an earlier run wrote part of it.

    Attributes:
        output: the dataset's folder.
        documents, tokens, rows, shards: its size; a document of L tokens has L − 1 rows.
        bytes_per_token: the codec's bytes a row, ids and values.
        disk_bytes: size of the shards.
        kl_mean, kl_p99: KL(teacher's top k ‖ decoded) in nats a row, as measured while writing; None if there are no
            rows.
        resumed_documents: how many documents an earlier run had written.
        already_complete: the whole dataset was there, nothing was done.
        empty_rows: rows of the source without content; None if nothing was read.
        short_documents: documents of one token, which have no next token to predict; None if nothing was read.
        seconds: time of this run's scoring and writing, without loading.
        new_tokens, tokens_per_second: tokens this run captured, and how fast.
        peak_rss_bytes: largest resident memory of the process so far.
        peak_cuda_bytes: largest memory on the first CUDA device; 0 without one.
    """

    output: str
    documents: int
    tokens: int
    rows: int
    shards: int
    bytes_per_token: float
    disk_bytes: int
    kl_mean: float | None
    kl_p99: float | None
    resumed_documents: int
    already_complete: bool
    empty_rows: int | None
    short_documents: int | None
    seconds: float
    new_tokens: int
    tokens_per_second: float
    peak_rss_bytes: int
    peak_cuda_bytes: int

    def to_dict(self) -> dict[str, Union[str, int, float, None]]:
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

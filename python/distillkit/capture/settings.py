"""What a capture is told, and what it reports."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from distillkit.codec import Codec, CodecConfig, codec_config, preset
from distillkit.errors import ConfigError, MismatchError
from distillkit.text.documents import LOSS_ON, OVERFLOWS, default_overlap

__all__ = ["CaptureSettings"]

DEFAULT_PRESET = "recommended"
_RANGE = re.compile(r"\d+:\d+")
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
        seed: decides the sample and the shuffled order.
        shuffle: capture rows in a random order.
        where: capture only rows in which these "column=value" hold, all of them; values that are not text are given as
            JSON.
        min_tokens, max_tokens: leave out documents of fewer or more tokens.
        drop_duplicates: leave out documents that were there before, with equal ids and loss mask; None: not if
            columns are kept.
        keep_columns: columns of the dataset that the capture has as well, by name; "all", or "none".
        tokenizer: a folder or hub id; the teacher's own if not given.
        apply_chat_template: render chat rows with the tokenizer's chat template; if not, chat rows are refused.
        max_seq_len: tokens of a stored document, at most.
        overflow: of longer documents: "window" captures them in pieces, in which each token counts once, "truncate"
            captures their beginning, "skip" leaves them out.
        overlap: tokens that a piece repeats of the one before it, as context; None: an eighth of max_seq_len.
        loss_on: which tokens count in a loss. "auto": of prompt and response the response, of token ids what their
            own loss_mask or labels say, else all; "all": all, whatever rows say; "assistant": the assistant's turns,
            the token that ends them included; "completion": the response.
        keep_ids: ids, or tokens of the tokenizer, that are stored in every row whatever their rank.
        label_logprobs: also store the teacher's log-probability of each next token, whatever its rank.
        last_row: also store the distribution after a document's last token.
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
        shard_range: capture only the shards FIRST:END of the plan (END not included), for jobs that share the work;
            None: all.
        skip_bad_documents: leave out up to this many documents that the teacher gives no distributions for.
        workers: "ray" shares the shards out over a Ray cluster; None: this process does all.
        num_workers: how many Ray workers; None: as many as the cluster's GPUs hold, without GPUs one a node.
        worker_cpus: CPUs of a Ray worker.
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
    shuffle: bool = False
    where: str | Sequence[str] = ()
    min_tokens: int | None = None
    max_tokens: int | None = None
    drop_duplicates: bool | None = None
    keep_columns: str | Sequence[str] = "none"
    tokenizer: str | None = None
    apply_chat_template: bool = True
    max_seq_len: int = 1024
    overflow: str = "window"
    overlap: int | None = None
    loss_on: str = "auto"
    keep_ids: str | Sequence[int | str] = ""
    label_logprobs: bool = False
    last_row: bool = False
    dtype: str = "auto"
    head_dtype: str = "float32"
    device: str = "auto"
    trust_remote_code: bool = False
    batch_tokens: int | None = None
    head_rows: int = 512
    shard_tokens: int = 262_144
    shard_range: str | None = None
    skip_bad_documents: int = 0
    workers: str | None = None
    num_workers: int | None = None
    worker_cpus: int = 1
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
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: must be {_one_of(allowed)}, found {getattr(self, name)!r}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                raise ConfigError(f"{name}: must be a whole number of at least {least}, found {value!r}")
        for name in ("apply_chat_template", "trust_remote_code", "shuffle", "label_logprobs", "last_row"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}: must be true or false, found {getattr(self, name)!r}")
        if self.shard_range is not None and not _RANGE.fullmatch(self.shard_range):
            raise ConfigError(f"shard_range: must be FIRST:END, such as 0:8, found {self.shard_range!r}")
        self._check_lengths()
        for name in _LISTS:
            object.__setattr__(self, name, _list_setting(name, getattr(self, name)))
        for condition in self.where:
            if not isinstance(condition, str) or "=" not in condition:
                raise ConfigError(f"where: must be column=value, found {condition!r}")
        self._check_engine()

    def _check_lengths(self) -> None:
        if self.overlap is not None and self.overflow != "window":
            raise ConfigError(f"overlap: belongs to overflow window; it is {self.overflow}")
        if self.overlap is not None and not 1 <= self.overlap <= self.max_seq_len // 2:
            raise ConfigError(
                f"overlap: must be 1…{self.max_seq_len // 2}, half of max_seq_len, found {self.overlap}. Without any, "
                "the token at a border would have no distribution"
            )
        if None not in (self.min_tokens, self.max_tokens) and self.min_tokens > self.max_tokens:  # type: ignore[operator]
            raise ConfigError(
                f"min_tokens and max_tokens: no document has at least {self.min_tokens} and at most {self.max_tokens}"
            )

    @property
    def row_filters(self) -> tuple[tuple[str, str], ...]:
        """The (column, value) pairs of `where`."""
        pairs = (str(condition).partition("=") for condition in self.where)
        return tuple((column.strip(), value.strip()) for column, _, value in pairs)

    def token_ids(self, tokenizer: Any, k: int) -> tuple[int, ...]:
        """Return the ids of `keep_ids`, ascending.

        Args:
            tokenizer: knows the tokens.
            k: ids a row has.

        Raises:
            ConfigError: the tokenizer has no such token, or there are k of them.
        """
        vocabulary = tokenizer.get_vocab()
        ids = set()
        for token in self.keep_ids:
            if isinstance(token, str) and token not in vocabulary:
                near = difflib.get_close_matches(token, vocabulary, n=3)
                raise ConfigError(
                    f"keep_ids: {token!r} is no token of the tokenizer's"
                    + (f"; there are {', '.join(map(repr, near))}" if near else "")
                )
            number = vocabulary[token] if isinstance(token, str) else token
            if not 0 <= number <= max(vocabulary.values()):
                raise ConfigError(
                    f"keep_ids: {number} is no id of the tokenizer's, whose ids are 0…{max(vocabulary.values())}"
                )
            ids.add(int(number))
        if len(ids) >= k:
            raise ConfigError(f"keep_ids: {len(ids)} ids, but a row has k = {k}: give fewer than that")
        return tuple(sorted(ids))

    @property
    def gpus_per_worker(self) -> int:
        """GPUs that one engine runs on, where there are any."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

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

    def _check_engine(self) -> None:
        """Refuse settings that the engine does not know or that it needs and has not.

        Raises:
            ConfigError: names the setting.
        """
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
        return codec_config(read_yaml(Path(config)) if isinstance(config, (str, Path)) else config)

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

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide the bytes besides teacher, tokenizer, codec and dataset, for the header."""
        identity = {name: getattr(self, name) for name in _DECIDING}
        if self.engine == "hf":
            # Which documents share a forward, and how its products are summed, changes last bits.
            identity |= {name: getattr(self, name) for name in ("head_dtype", "head_rows")}
            identity["batch_tokens"] = self.forward_tokens
        else:
            # These batch by themselves; what they give is the same within their noise only.
            identity["engine"] = self.engine
        if self.overflow == "window":
            identity["overlap"] = self.overlap or default_overlap(self.max_seq_len)
        if self.samples is not None or self.shuffle:
            identity["seed"] = self.seed
        if self.drop_duplicates is None:
            identity["drop_duplicates"] = self.keep_columns == ("none",)
        for name in _DECIDING_IF_SET:
            value, default = getattr(self, name), default_of(name)
            if value != (_list_setting(name, default) if name in _LISTS else default):
                identity[name] = list(value) if isinstance(value, tuple) else value
        return identity


_CHOICES: dict[str, tuple[Any, ...]] = {
    "workers": ("ray", None),
    "engine": ("hf", "vllm", "openai"),
    "overflow": OVERFLOWS,
    "loss_on": LOSS_ON,
    "head_dtype": ("float32", "auto"),
    "drop_duplicates": (True, False, None),
}
_LEAST = {
    "max_seq_len": 2,
    "batch_tokens": 1,
    "head_rows": 1,
    "shard_tokens": 1,
    "samples": 1,
    "seed": 0,
    "skip_bad_documents": 0,
    "min_tokens": 1,
    "max_tokens": 2,
    "overlap": 0,
    "num_workers": 1,
    "worker_cpus": 1,
    "max_model_len": 1,
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "concurrency": 1,
    "max_retries": 0,
}
_LISTS = ("where", "keep_ids", "keep_columns")
_DECIDING = ("max_seq_len", "apply_chat_template", "shard_tokens", "overflow", "loss_on")
_DECIDING_IF_SET = (
    *("samples", "shuffle", "where", "min_tokens", "max_tokens", "drop_duplicates", "keep_columns", "keep_ids"),
    *("label_logprobs", "last_row", "quantization"),
)


def _one_of(values: Sequence[Any]) -> str:
    """Write choices for a person."""
    names = [
        "true" if value is True else "false" if value is False else str(value) for value in values if value is not None
    ]
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _list_setting(name: str, value: Any) -> tuple[Any, ...]:
    """Return a setting of several values, which may be given as a list or as text with commas, as a tuple.

    In the text of `keep_ids` a number is an id, anything else a token; a list may have tokens with commas.
    """
    if isinstance(value, str):
        parts = [part.strip() for part in value.split(",")] if name != "where" else [value]
        parts = [part for part in parts if part]
        return tuple(int(part) if name == "keep_ids" and part.isdecimal() else part for part in parts)
    kinds = (int, str) if name == "keep_ids" else (str,)
    if value is None:
        return ()
    if not isinstance(value, Sequence) or any(isinstance(part, bool) or not isinstance(part, kinds) for part in value):
        raise ConfigError(f"{name}: must be a list, or text with commas between, found {value!r}")
    return tuple(value)


def setting_names() -> tuple[str, ...]:
    return tuple(field.name for field in fields(CaptureSettings))


def check_names(given: Mapping[Any, Any], where: str, known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{where}{name} is no setting of a capture; {hint}")


def default_of(name: str) -> Any:
    """Return the default of a setting, for the command's options."""
    return next(field.default for field in fields(CaptureSettings) if field.name == name)


def read_yaml(path: Path, what: str = "compression_config") -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{what}: {path} can not be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{what}: {path} is not YAML: {error}") from error

"""The settings of a capture: each one once, with its type, bounds, default and help text.

Command-line options, the tables of docs/settings.md and the JSON schema are generated from these fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from distillkit.capture.engine_settings import (
    ENGINES,
    HFSettings,
    OpenAISettings,
    VLLMSettings,
    engines_with,
    nest_settings,
)
from distillkit.codec import Codec, CodecConfig, CompactConfig, LearnedConfig, SampledConfig, codec_config, preset
from distillkit.codec.presets import SAMPLED_PRESETS, PresetName
from distillkit.configuration.problems import InvalidSettingsError, Problem, find_problems, refusals
from distillkit.errors import ConfigError, MismatchError, nearest

__all__ = ["CaptureSettings"]

DEFAULT_PRESET = "compact-128"

_Part = TypeVar("_Part", bound=BaseModel)


def _plain_text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _listed(value: object) -> tuple[Any, ...]:
    """Return the values of a setting, a list or comma-separated text, as a tuple."""
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(part for part in map(str.strip, value.split(",")) if part)
    if not isinstance(value, Sequence) or any(isinstance(part, bool) for part in value):
        raise ValueError(f"must be a list, or text separated by commas, found {value!r}")
    return tuple(value)


def _conditions(value: object) -> tuple[Any, ...]:
    """Return conditions as a tuple. Text is a single condition, whose value may contain commas."""
    conditions = (value,) if isinstance(value, str) and value else _listed(value)
    for condition in conditions:
        if not isinstance(condition, str) or "=" not in condition:
            raise ValueError(f"must be COLUMN=VALUE, found {condition!r}")
    return conditions


def _tokens(value: object) -> tuple[int | str, ...]:
    """Return ids and tokens as a tuple. In text, numbers are ids; in a list, tokens may contain commas."""
    parts = _listed(value)
    if not all(isinstance(part, (int, str)) for part in parts):
        raise ValueError(f"must be ids or tokens, found {value!r}")
    return tuple(int(part) if isinstance(value, str) and part.isdecimal() else part for part in parts)


def _list_schema(*types: str) -> WithJsonSchema:
    item = {"type": types[0] if len(types) == 1 else list(types)}
    return WithJsonSchema({"anyOf": [{"type": "array", "items": item}, {"type": "string"}]})


Text = Annotated[str, BeforeValidator(_plain_text)]
Conditions = Annotated[tuple[str, ...], BeforeValidator(_conditions), _list_schema("string")]
Names = Annotated[tuple[str, ...], BeforeValidator(_listed), _list_schema("string")]
Tokens = Annotated[tuple[int | str, ...], BeforeValidator(_tokens), _list_schema("integer", "string")]
# A file, a mapping or a CodecConfig, typed as Any so that pydantic does not convert one into another.
CodecSource = Annotated[Any, WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object"}, {"type": "null"}]})]


class CaptureSettings(BaseModel):
    """The settings of a capture.

    Engine settings are nested in the engine's section (`vllm={"tensor_parallel_size": 4}`) or flat
    (`tensor_parallel_size=4`).

    Raises:
        ConfigError: settings are unknown, missing or not allowed, or belong to another engine; reports all problems,
            each with its dotted path.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    model: Text = Field(
        min_length=1,
        description="Teacher model: a folder or a Hugging Face hub id. With a server: where the model's config and "
        "tokenizer are.",
    )
    dataset: Text = Field(
        min_length=1,
        description="Text to run the teacher over: a .jsonl (.ndjson), .json, .csv, .tsv, .txt or .parquet file, also "
        "compressed (.gz, .bz2, .xz, .zst), a folder of them, a save_to_disk folder, a URL of any of these, or a hub "
        "id. Rows have text; messages; conversations; instruction (+ input, system, history) + output; inputs + "
        "targets; tools + turns; prompt + response or completion; or input_ids.",
    )
    output: Text = Field(min_length=1, description="Folder or storage URL for the captured dataset.")
    preset: PresetName | None = Field(
        default=None,
        description="Codec configuration by name; compact-128 if no codec is chosen. sampled-50 draws ids instead of "
        "keeping the most probable ones, which needs the engine hf. compact is a layout of earlier "
        "releases, to resume their captures; compact-50 replaces it.",
    )
    compression_config: CodecSource = Field(
        default=None,
        description="Codec configuration from a YAML file, such as the compression_config.yaml of a published dataset, "
        "or one with the number of draws under `sampled`.",
    )
    prior: Text | None = Field(
        default=None,
        description="Of a preset compact-… or sampled-…: the prior of another capture of the same teacher, as its "
        "prior.bin, its folder or one of its shards. By default it is learned from this capture's own text.",
    )
    prior_rows: int = Field(
        default=131_072,
        ge=0,
        description="Of a preset compact-… or sampled-…: from about how many distributions the prior is learned, "
        "evenly spread over the text. They are scored first and kept on disk, 8 bytes per id, until their shards are "
        "complete; 0 learns none, and takes the built-in one.",
    )
    dataset_configuration: str | None = Field(default=None, description="Configuration of a hub dataset.")
    split: str = Field(
        default="train",
        description="Split of the dataset; in a folder of files, those whose names begin or end with the split's, or "
        "that are in a folder of that name.",
    )
    samples: int | None = Field(
        default=None, ge=1, description="Capture only a random sample of this many rows, kept in the dataset's order."
    )
    seed: int = Field(default=42, ge=0, description="Seed for `samples` and `shuffle`.")
    shuffle: bool = Field(default=False, description="Capture rows in random order.")
    where: Conditions = Field(
        default=(),
        description="Conditions of the form column=value: capture only rows whose column has this value; several "
        "conditions must all hold. A value that is not text is written as JSON.",
    )
    min_tokens: int | None = Field(default=None, ge=1, description="Leave out documents with fewer tokens.")
    max_tokens: int | None = Field(default=None, ge=2, description="Leave out documents with more tokens.")
    drop_duplicates: bool | None = Field(
        default=None,
        description="Leave out documents that repeat an earlier one as a whole; on by default unless `keep_columns` is "
        "used.",
    )
    read_columns: Names = Field(
        default=(),
        description="Columns to read rows by, such as text, or prompt,completion. By default prompts and responses "
        "come before chats, and chats before text. A single column of another name has text.",
    )
    append_eos: bool | None = Field(
        default=None,
        description="End plain text with the end-of-sequence token, from which students learn to stop; on by default "
        "if the tokenizer has one, as in training with a live teacher.",
    )
    keep_columns: Names = Field(
        default=("none",),
        description="Columns of the dataset to copy into the capture: names separated by commas, all or none.",
    )
    tokenizer: Text | None = Field(default=None, description="Tokenizer folder or hub id, if not the teacher's own.")
    apply_chat_template: bool = Field(
        default=True, description="Render chat rows with the chat template; if off, chat rows are an error."
    )
    max_seq_len: int = Field(default=1024, ge=2, description="Maximum number of tokens in a stored document.")
    overflow: Literal["window", "truncate", "skip"] = Field(
        default="window",
        description="What to do with longer documents: window captures them in overlapping pieces, truncate captures "
        "their beginning, skip leaves them out.",
    )
    overlap: int | None = Field(
        default=None,
        ge=1,
        description="Tokens that each piece repeats from the previous one as context; an eighth of `max_seq_len` by "
        "default.",
    )
    loss_on: Literal["auto", "all", "assistant", "completion"] = Field(
        default="auto",
        description="Which tokens count in the loss. assistant: the assistant's turns; completion: the response; all: "
        "every token; auto: the response if rows have prompt and response, what loss_mask or labels say if rows are "
        "token ids, the assistant's turns of weight 1 if messages have weight or train, otherwise all.",
    )
    keep_ids: Tokens = Field(
        default=(),
        description="Tokens or ids that every row stores whatever their rank, separated by commas: end of turn, tool "
        "calls, …",
    )
    label_logprobs: bool = Field(
        default=False, description="Also store the log-probability of each next token, whatever its rank."
    )
    last_row: bool = Field(default=False, description="Also store the distribution after a document's last token.")
    trust_remote_code: bool = Field(default=False, description="Run code that comes with the model or tokenizer.")
    shard_tokens: int = Field(
        default=262_144,
        ge=1,
        description="Tokens per shard; an interrupted capture resumes after its last complete shard.",
    )
    shard_range: str | None = Field(
        default=None,
        description="Capture only these shards of the plan, in the form FIRST:END (numbered from 0, END excluded), so "
        "that several jobs can share the work.",
    )
    skip_bad_documents: int = Field(
        default=0,
        ge=0,
        description="Leave out up to this many rows that cannot be read, understood or rendered, and up to "
        "as many documents that the teacher cannot score.",
    )
    workers: Literal["ray"] | None = Field(default=None, description="Distribute the shards over a Ray cluster.")
    num_workers: int | None = Field(
        default=None,
        ge=1,
        description="Number of Ray workers, each with its own engine; by default as many as the GPUs allow, or one per "
        "node without GPUs.",
    )
    worker_cpus: int = Field(default=1, ge=1, description="CPUs per Ray worker.")
    engine: Literal["hf", "vllm", "openai"] = Field(
        default="hf",
        description="What runs the teacher: hf (Transformers, in this process), vllm, or openai (a running server with "
        "an OpenAI-compatible API).",
    )
    hf: HFSettings = Field(default_factory=HFSettings, description="Settings that only apply to the engine hf.")
    vllm: VLLMSettings = Field(default_factory=VLLMSettings, description="Settings that only apply to the engine vllm.")
    openai: OpenAISettings = Field(
        default_factory=OpenAISettings,
        validate_default=True,
        description="Settings that only apply to the engine openai.",
    )

    def __init__(self, /, **settings: Any) -> None:
        nested, written = nest_settings(settings, settings.get("engine", "hf"))
        try:
            super().__init__(**nested)
        except ValidationError as error:
            flat = [name for part in ENGINES.values() for name in part.model_fields]
            problems = find_problems(error, CaptureSettings, "capture setting", flat)
            raise InvalidSettingsError(
                [Problem(written.get(each.path, each.path), each.message) for each in problems]
            ) from None

    # -- settings that must agree: each is checked against earlier ones, so that all problems are reported at once

    @field_validator("compression_config")
    @classmethod
    def _one_codec(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("preset") is not None:
            raise ValueError(f"set this or preset, not both (found {value!r} and {info.data['preset']!r})")
        if isinstance(value, Mapping):
            try:
                codec_config(value)
            except ConfigError as error:
                # "SomeConfig: field: reason" becomes "field: reason", to which the dotted path is prefixed.
                raise ValueError(re.sub(r"^\w+Config: ", "", str(error))) from None
        elif value is not None and not isinstance(value, (str, Path, BaseModel)):
            raise ValueError(f"must be a YAML file or a mapping, found {value!r}")
        return value

    @field_validator("max_tokens")
    @classmethod
    def _some_length(cls, value: int | None, info: ValidationInfo) -> int | None:
        least = info.data.get("min_tokens")
        if value is not None and least is not None and value < least:
            raise ValueError(f"must be at least min_tokens, which is {least}, found {value}")
        return value

    @field_validator("overlap")
    @classmethod
    def _fits_in_a_piece(cls, value: int | None, info: ValidationInfo) -> int | None:
        overflow, longest = info.data.get("overflow"), info.data.get("max_seq_len")
        if value is not None and overflow not in (None, "window"):
            raise ValueError(f"is only for overflow: window, but overflow is {overflow} (found {value})")
        if value is not None and longest is not None and value > longest // 2:
            raise ValueError(f"must be between 1 and {longest // 2}, half of max_seq_len, found {value}")
        return value

    @field_validator("shard_range")
    @classmethod
    def _two_numbers(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+:\d+", value):
            raise ValueError(f"must be FIRST:END, such as 0:8, found {value!r}")
        return value

    @field_validator("hf", "vllm", "openai")
    @classmethod
    def _for_this_engine(cls, part: _Part, info: ValidationInfo) -> _Part:
        engine, defaults = info.data.get("engine"), type(part)()
        if engine == "openai" and isinstance(part, OpenAISettings) and part.base_url is None:
            raise refusals(part, {"base_url": "is required by the engine openai, such as http://localhost:8000/v1"})
        if engine in (None, info.field_name):
            return part
        misplaced = {
            name: f"is for engine {' or '.join(engines_with(name))}, but this capture uses {engine} (found {value!r})"
            for name, value in part
            if value != getattr(defaults, name)
        }
        if misplaced:
            raise refusals(part, misplaced)
        return part

    # -- derived values

    @property
    def row_filters(self) -> tuple[tuple[str, str], ...]:
        """The (column, value) pairs of `where`."""
        pairs = (condition.partition("=") for condition in self.where)
        return tuple((column.strip(), value.strip()) for column, _, value in pairs)

    @property
    def dtype(self) -> str:
        """The dtype setting of the chosen engine; "auto" for a server, which has none."""
        return {"hf": self.hf.dtype, "vllm": self.vllm.dtype}.get(self.engine, "auto")

    @property
    def gpus_per_worker(self) -> int:
        """GPUs that one engine uses, if there are any."""
        return self.vllm.tensor_parallel_size * self.vllm.pipeline_parallel_size

    @property
    def config_source(self) -> str:
        """Where to load the teacher's config from; with a server, `tokenizer` takes precedence over `model`."""
        return self.tokenizer or self.model if self.engine == "openai" else self.model

    def token_ids(self, tokenizer: Any, k: int) -> tuple[int, ...]:
        """Return the ids of `keep_ids`, ascending.

        Args:
            tokenizer: the tokenizer whose ids are stored.
            k: number of ids per row.

        Raises:
            ConfigError: the tokenizer has no such token, or there are k ids or more.
        """
        vocabulary = tokenizer.get_vocab()
        largest, ids = max(vocabulary.values()), set()
        for token in self.keep_ids:
            if isinstance(token, str) and token not in vocabulary:
                raise ConfigError(f"keep_ids: the tokenizer has no token {token!r}{nearest(token, vocabulary)}")
            number = vocabulary[token] if isinstance(token, str) else token
            if not 0 <= number <= largest:
                raise ConfigError(f"keep_ids: the tokenizer's ids are 0…{largest}, found {number}")
            ids.add(int(number))
        if len(ids) >= k:
            raise ConfigError(f"keep_ids: must be fewer than the k = {k} ids of a row, found {len(ids)}")
        return tuple(sorted(ids))

    def shard_numbers(self, shards: int) -> range:
        """Return which of a plan's shards to capture.

        Raises:
            ConfigError: the range begins after the last shard, or ends before it begins.
        """
        if self.shard_range is None:
            return range(shards)
        first, end = map(int, self.shard_range.split(":"))
        if first > shards or end < first:
            raise ConfigError(
                f"shard_range: {self.shard_range} is outside the plan's {shards} shards, which are numbered from 0"
            )
        return range(first, min(end, shards))

    def read_compression_config(self) -> CodecConfig:
        """Read `compression_config`, which must be set.

        Raises:
            ConfigError: there is no such file, or its content is not a valid codec configuration.
        """
        from distillkit.shards.published import load_codec_config

        config: Any = self.compression_config
        try:
            return load_codec_config(config)
        except ConfigError as error:
            # As in `_one_codec`; errors of reading the file name it already.
            reason = re.sub(r"(^|: )\w+Config: ", r"\1", str(error))
            where = f"{config}: " if isinstance(config, (str, Path)) and not reason.startswith(str(config)) else ""
            raise ConfigError(f"compression_config: {where}{reason}") from error

    @property
    def prior_hash(self) -> str | None:
        """The hash of the prior that `compression_config` names, if it names one."""
        config = None if self.compression_config is None else self.read_compression_config()
        return config.prior if isinstance(config, LearnedConfig) else None

    def codec(self, head_size: int) -> Codec:
        """Make the codec for a teacher whose logits are `head_size` wide.

        Raises:
            ConfigError: there is no such file, its content is not a valid codec configuration, or it does not go with
                `keep_ids`.
            MismatchError: the configuration is for another vocabulary size.
        """
        codec = self._codec(head_size)
        if self.keep_ids and isinstance(codec.config, CompactConfig) and codec.config.adaptive:
            raise ConfigError(
                "keep_ids: rows of this codec end where probabilities are small (threshold or mass), whatever ids are "
                "to be kept: choose a codec with a fixed k, such as compact-128, or leave keep_ids out"
            )
        if codec.draws is not None:
            self.check_draws()
        return codec

    @property
    def draws(self) -> bool:
        """Whether the codec stores draws.

        Raises:
            ConfigError: as for `read_compression_config`.
        """
        if self.compression_config is None:
            return self.preset in SAMPLED_PRESETS
        return isinstance(self.read_compression_config(), SampledConfig)

    def check_draws(self) -> None:
        """Refuse settings that do not go with draws.

        Raises:
            ConfigError: names the setting.
        """
        if self.engine != "hf":
            raise ConfigError(
                f"engine: the format sampled draws from all logits of a position, of which the engine {self.engine} "
                "only returns the most probable: use the engine hf, or another format, such as --preset compact-50"
            )
        if self.keep_ids:
            raise ConfigError(
                "keep_ids: rows of the format sampled have the ids that were drawn, and none besides: leave keep_ids "
                "out, or choose a codec with a fixed k, such as compact-128"
            )

    def _codec(self, head_size: int) -> Codec:
        if self.compression_config is None:
            return Codec(preset(self.preset or DEFAULT_PRESET, vocab_size=head_size))
        config = self.read_compression_config()
        if isinstance(config, LearnedConfig):
            # The prior itself is given by `prior`.
            config = config.without_prior()
        codec = Codec(config)
        if codec.vocab_size != head_size:
            given = self.compression_config
            where = str(given) if isinstance(given, (str, Path)) else "compression_config"
            field = "d" if codec.format == "quantized" else "vocab_size"
            raise MismatchError(
                f"{where}: {field} is {codec.vocab_size}, but the teacher's logits are {head_size} wide (the "
                f"tokenizer may have fewer ids): set {field}: {head_size}"
            )
        return codec

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine the bytes (besides teacher, tokenizer, codec, dataset), for the header."""
        identity: dict[str, Any] = {name: getattr(self, name) for name in _DECIDING}
        if self.engine == "hf":
            # Which documents share a forward pass, and how its products are summed, changes the last bits.
            identity |= {"head_dtype": self.hf.head_dtype, "head_rows": self.hf.head_rows}
            identity["batch_tokens"] = self.hf.forward_tokens
        else:
            # These engines choose their own batches; their results are reproducible only within their noise.
            identity["engine"] = self.engine
        if self.overflow == "window":
            # Imports pyarrow, which a mistyped setting need not wait for.
            from distillkit.shards.overflow import default_overlap

            identity["overlap"] = self.overlap or default_overlap(self.max_seq_len)
        if self.samples is not None or self.shuffle:
            identity["seed"] = self.seed
        if self.drop_duplicates is None:
            identity["drop_duplicates"] = self.keep_columns == ("none",)
        for name in _DECIDING_IF_SET:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                identity[name] = list(value) if isinstance(value, tuple) else value
        if self.vllm.quantization is not None:
            identity["quantization"] = self.vllm.quantization
        return identity


_DECIDING = ("max_seq_len", "apply_chat_template", "shard_tokens", "overflow", "loss_on")
_DECIDING_IF_SET = (
    *("samples", "shuffle", "where", "min_tokens", "max_tokens", "drop_duplicates", "keep_columns", "keep_ids"),
    *("read_columns", "label_logprobs", "last_row"),
)

"""The training configuration: a YAML file, checked completely before anything is loaded.

Everything in the published configuration is supported or refused. All problems are reported at once, each with its
dotted path: unknown keys with the nearest known one, invalid values with the allowed ones, and settings whose feature
does not exist yet. Nothing is ignored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from distillkit.capture.engine_settings import OpenAISettings, web_address
from distillkit.codec import CodecConfig, codec_config
from distillkit.codec.config import CODEC_KEYS
from distillkit.configuration.places import is_path
from distillkit.configuration.problems import cut, refusals, shown
from distillkit.configuration.section import Section, refuse_flag
from distillkit.errors import ConfigError, nearest
from distillkit.losses.config import LossConfig, named_losses
from distillkit.models.adapters import LoraSection
from distillkit.types import Overflow

__all__ = [
    "PARTS",
    "DatasetEntry",
    "DatasetSource",
    "ListedLiveTeacherConfig",
    "ListedServedTeacherConfig",
    "ListedTeacherConfig",
    "LiveTeacherConfig",
    "RolloutsConfig",
    "RunConfig",
    "ServedTeacherConfig",
    "StoredTeacherConfig",
    "alone_problem",
    "source_names",
]


# A key without a value means an empty mapping or list.
Arguments = Annotated[
    dict[str, Any],
    BeforeValidator(lambda value: {} if value is None else value),
    WithJsonSchema({"type": ["object", "null"]}),
]
Names = Annotated[
    list[str],
    BeforeValidator(lambda value: [] if value is None else value),
    WithJsonSchema({"type": ["array", "null"], "items": {"type": "string"}}),
]
# `~` is the home folder, as in a shell; names without it, also hub ids, are left as they are.
Place = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]


class DatasetSource(Section):
    """A dataset: a hub repository (`repo_id`), or a folder or file (`disk_path`)."""

    repo_id: str | None = Field(default=None, min_length=1, description="Dataset on the Hugging Face hub.")
    revision: str | None = Field(default=None, min_length=1, description="Branch, tag or commit of the hub dataset.")
    config_name: str | None = Field(default=None, min_length=1, description="Configuration of the hub dataset.")
    disk_path: Place | None = Field(
        default=None,
        description="Folder of captured shards, or a published dataset (Parquet files or a save_to_disk folder). With "
        "a live or served teacher also text, chat or token ids: .jsonl, .json, .csv, .tsv, .txt or .parquet files, or "
        "a save_to_disk folder.",
    )
    split: str | None = Field(default=None, min_length=1, description="Split, if the dataset has splits.")
    name: str | None = Field(
        default=None,
        pattern=r"^[\w.\-]+$",
        description="In a list: the name under which its metrics are logged; by default the last part of its path.",
    )
    weight: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="In a list: its share of the tokens of an epoch, relative to the weights of the others; 1 if "
        "another dataset has one. The epoch is then as long as one pass over all datasets.",
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        allow_inf_nan=False,
        description="In a list: how often an epoch passes over this dataset, 1 by default; 0.5 is another half of it "
        "in every epoch.",
    )
    num_samples: int | None = Field(
        default=None,
        ge=1,
        description="In a list: number of its documents to use; all of them by default.",
    )

    _numbers = field_validator("weight", "epochs", "num_samples", mode="before")(refuse_flag)

    @model_validator(mode="after")
    def _one_place(self) -> DatasetSource:
        if (self.repo_id is None) == (self.disk_path is None):
            found = "both" if self.repo_id is not None else "neither"
            raise ValueError(f"set one of repo_id (a hub dataset) and disk_path (a folder), found {found}")
        if self.disk_path is not None:
            for name in ("revision", "config_name"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: applies to a hub dataset (repo_id), not to a folder (disk_path)")
        if self.split is not None and not re.fullmatch(r"[\w.\-]+", self.split):
            raise ValueError(
                f"split: {self.split!r} is not the name of a split; for part of a split use dataset.num_samples"
            )
        return self


# The tags are the names that pydantic gives plain members of unions, so that they are left out of dotted paths.
DatasetSources = Annotated[
    Union[
        Annotated[DatasetSource, Tag("dict")],
        Annotated[list[DatasetSource], Field(min_length=1), Tag("list")],
    ],
    Discriminator(lambda value: "list" if isinstance(value, list) else "dict"),
]

_IN_LISTS = ("name", "weight", "epochs", "num_samples")


@dataclass(frozen=True)
class DatasetEntry:
    """One of the datasets of a configuration.

    Attributes:
        part: what it is used for.
        key: its dotted path.
        name: what its metrics are named by.
        source: the dataset.
    """

    part: Literal["train", "eval"]
    key: str
    name: str
    source: DatasetSource


class DatasetSection(Section):
    """The documents to use."""

    train_dataset: DatasetSources = Field(
        description="Documents to train on: a dataset, or a list of several, which are mixed."
    )
    eval_dataset: DatasetSources | None = Field(
        default=None, description="Documents to evaluate on: a dataset, or a list, with metrics of each."
    )
    seed: int | None = Field(
        default=42,
        ge=0,
        description="Seed for choosing documents and for their order; null uses the first documents, and "
        "`training_args.seed` for the order.",
    )
    num_samples: int | None = Field(
        default=None, ge=1, description="Number of documents to train on; all of them by default."
    )
    num_eval_samples: int | None = Field(
        default=None, ge=1, description="Number of documents to evaluate on; all of them by default."
    )
    eos_label_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None, description="Token ids that become the tokenizer's end-of-sequence id, in the labels only."
    )
    prepared_dataset_path: Place | None = Field(
        default=None,
        description="Folder for tokenised text, which later runs with the same data, tokenizer and settings reuse; by "
        "default the cache of the datasets library. Captured datasets need no preparation.",
    )
    packing: Literal["auto"] | bool | None = Field(
        default=None,
        description="Pack whole documents into rows of up to `sequence_length` tokens: true, false, or auto, which "
        "packs if the student and a live teacher keep the documents of a row apart. By default as "
        "`training_args.packing` says; with true, models that do not keep them apart are refused.",
    )
    overflow: Overflow | None = Field(
        default=None,
        description="What to do with documents of more than `sequence_length` tokens. cut keeps the beginning; split "
        "makes pieces of them, which repeat an eighth of the tokens before them as context, so that each token counts "
        "in one piece; drop leaves these documents out. By default they are cut, if that takes at most 5% of all "
        "tokens; otherwise the run is refused.",
    )
    prepacked: bool = Field(
        default=False,
        description="The documents are already packed rows, to be used unchanged whatever `training_args.packing` "
        "says.",
    )

    _numbers = field_validator("seed", "num_samples", "num_eval_samples", mode="before")(refuse_flag)

    @field_validator("train_dataset", "eval_dataset", mode="before")
    @classmethod
    def _a_section(cls, value: object) -> object:
        several = isinstance(value, list)
        for number, each in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(each, str):
                key, place = "disk_path" if is_path(each) else "repo_id", f"{number}: " if several else ""
                raise ValueError(f"{place}must be a section such as {{{key}: {cut(each)}}}, found {shown(each)}")
        return value

    @model_validator(mode="after")
    def _shares(self) -> DatasetSection:
        for part in PARTS:
            found = getattr(self, f"{part}_dataset")
            problem = alone_problem(found) if isinstance(found, DatasetSource) else _list_problem(found or [], part)
            if problem is not None:
                raise ValueError(f"{part}_dataset.{problem}")
        for part, setting in (("train", "num_samples"), ("eval", "num_eval_samples")):
            if isinstance(getattr(self, f"{part}_dataset"), list) and getattr(self, setting) is not None:
                raise ValueError(
                    f"{setting}: does not say of which dataset of {part}_dataset; set num_samples in its entries"
                )
        return self

    def entries(self, part: Literal["train", "eval"]) -> list[DatasetEntry]:
        """Return the datasets that are used for training or evaluation, each with its key and name."""
        found, key = getattr(self, f"{part}_dataset"), f"dataset.{part}_dataset"
        if isinstance(found, DatasetSource):
            return [DatasetEntry(part, key, source_names([dict(found)])[0], found)]
        names = source_names([dict(source) for source in found or []])
        return [
            DatasetEntry(part, f"{key}.{number}", name, source)
            for number, (name, source) in enumerate(zip(names, found or [], strict=True))
        ]


PARTS: tuple[Literal["train"], Literal["eval"]] = ("train", "eval")


def source_names(sources: Sequence[Any]) -> list[str]:
    """Return the names of datasets as they are written in a list, which need not be valid: those that they are given,
    or the last parts of their paths; repeated ones are numbered (`chat`, `chat@2`)."""
    found: list[str] = []
    for source in sources:
        section = source if isinstance(source, Mapping) else {}
        path = str(section.get("disk_path") or section.get("repo_id") or "").rstrip("/\\")
        last = re.sub(r"[^\w.\-]+", "-", re.split(r"[/\\]", path)[-1])
        name = str(section.get("name") or last or "data")
        same = sum(each.partition("@")[0] == name for each in found)
        found.append(f"{name}@{same + 1}" if same else name)
    return found


def alone_problem(source: DatasetSource) -> str | None:
    """Describe a setting that only a dataset of a list can have."""
    given = [name for name in _IN_LISTS if getattr(source, name) is not None]
    if not given:
        return None
    instead = "set dataset.num_samples" if given[0] == "num_samples" else "with one dataset, remove it"
    return f"{given[0]}: is for the datasets of a list; {instead}"


def _list_problem(sources: list[DatasetSource], part: str) -> str | None:
    """Describe the first contradiction between the datasets of a list."""
    names = [source.name for source in sources]
    for number, source in enumerate(sources):
        if part == "eval":
            given = [name for name in ("weight", "epochs") if getattr(source, name) is not None]
            if given:
                return f"{number}.{given[0]}: is for training; an evaluation reads every document once"
        if source.name is not None and names.index(source.name) < number:
            return f"{number}.name: {source.name!r} is also the name of entry {names.index(source.name)}"
    weighted = [number for number, source in enumerate(sources) if source.weight is not None]
    counted = [number for number, source in enumerate(sources) if source.epochs is not None]
    if weighted and counted:
        return (
            f"{counted[0]}.epochs: entry {weighted[0]} has a weight, which decides how often all others are used; set "
            "only weights or only epochs"
        )
    return None


_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def _one_dtype(arguments: dict[str, Any]) -> dict[str, Any]:
    """Rename `torch_dtype`, as in older configurations, to `dtype`, and check its value."""
    if "torch_dtype" in arguments and "dtype" in arguments:
        raise ValueError(
            f"dtype: {shown(arguments['dtype'])} and torch_dtype: {shown(arguments['torch_dtype'])} are the same "
            "setting; use dtype"
        )
    arguments = {("dtype" if key == "torch_dtype" else key): value for key, value in arguments.items()}
    dtype = arguments.get("dtype")
    if isinstance(dtype, str):
        dtype = arguments["dtype"] = dtype.removeprefix("torch.")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype: {shown(dtype)} is not allowed; allowed: {', '.join(_DTYPES)}")
    return arguments


class LiveTeacherConfig(Section):
    """A live teacher, which runs next to the student (`kind: hf`)."""

    kind: Literal["hf"] = Field(description="A live model.")
    path: Place = Field(
        description="Folder or hub id of the model. With `peft`, the student's own base model means the student with "
        "its adapters disabled, which takes no extra memory.",
    )
    kwargs: Arguments = Field(
        default_factory=dict,
        description="Arguments for loading the model (dtype, device_map, attn_implementation, …); the dtype is the "
        "checkpoint's by default.",
    )
    top_k: int | None = Field(
        default=None,
        ge=1,
        description="Train on the teacher's k most probable tokens only, as if they had been captured; by default on "
        "its full distribution.",
    )

    _numbers = field_validator("top_k", mode="before")(refuse_flag)

    @field_validator("kwargs")
    @classmethod
    def _dtype_has_one_name(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _one_dtype(value)


class StoredTeacherConfig(Section):
    """A teacher whose distributions are stored in the dataset (`kind: dataset`)."""

    kind: Literal["dataset"] = Field(description="Stored distributions.")
    logprob_compressor: dict[str, Any] | None = Field(
        default=None,
        description="Codec of a published dataset (distribution quantization). For captured shards, which specify "
        "their own, it must match if set.",
    )
    legacy_logit_compression: dict[str, Any] | None = Field(
        default=None, description="Codec of a published dataset in the legacy format."
    )
    compact: dict[str, Any] | None = Field(
        default=None,
        description="Codec of captured shards in the compact format, which specify their own; it must match if set.",
    )
    sampled: dict[str, Any] | None = Field(
        default=None,
        description="Codec of captured shards in the format sampled, which specify their own; it must match if set.",
    )
    vocab_size: int | None = Field(
        default=None, ge=1, description="Vocabulary size; checked against the dataset's if set."
    )

    _numbers = field_validator("vocab_size", mode="before")(refuse_flag)

    @model_validator(mode="after")
    def _one_codec(self) -> StoredTeacherConfig:
        given = [key for key in CODEC_KEYS if getattr(self, key) is not None]
        if len(given) > 1:
            raise ValueError(f"set one of {', '.join(CODEC_KEYS)}, found {' and '.join(given)}")
        self.codec()
        return self

    def codec(self) -> CodecConfig | None:
        """Build the configured codec's configuration, if there is one."""
        for key in CODEC_KEYS:
            fields = getattr(self, key)
            if fields is not None:
                try:
                    return codec_config({key: fields})
                except ConfigError as error:
                    # "SomeConfig: field: reason" becomes "key.field: reason", to which the dotted path is prefixed.
                    raise ConfigError(f"{key}.{str(error).partition(': ')[2]}") from None
        return None


_SERVER = OpenAISettings()  # the defaults of captures


def _server_url(value: str) -> str:
    if "@" in urlsplit(web_address(value)).netloc:
        raise ValueError(
            "must not contain a user or password, since configurations are copied to the output folder; set "
            "DISTILLKIT_API_KEY"
        )
    return value


# What all servers have, with the defaults and limits of captures.
ServerUrl = Annotated[str, AfterValidator(_server_url)]
Retries = Annotated[
    int,
    Field(ge=0, description="How often a failed request is retried, with growing pauses."),
    BeforeValidator(refuse_flag),
]
Timeout = Annotated[float, Field(gt=0, le=604_800), BeforeValidator(refuse_flag)]


class RolloutServerConfig(Section):
    """A server that writes the completions (`rollouts.engine: server`)."""

    base_url: ServerUrl = Field(
        description="URL of the server, such as http://localhost:8000/v1; its key is read from DISTILLKIT_API_KEY or "
        "OPENAI_API_KEY. vLLM must be started with VLLM_SERVER_DEV_MODE=1.",
    )
    served_model: str | None = Field(
        default=None,
        min_length=1,
        description="The server's name for the student; only needed if it serves several models.",
    )
    folder: Place | None = Field(
        default=None,
        description="Empty or new folder where the student's weights are written for the server, which must see it "
        "under the same path; by default `rollouts_student` in the output folder. Removed when training ends.",
    )
    max_retries: Retries = _SERVER.max_retries
    request_timeout: Timeout = Field(
        default=_SERVER.request_timeout,
        description="Seconds that loading the weights, or a completion, may take; after that, the request counts as "
        "failed.",
    )


class RolloutsConfig(Section):
    """Training on what the student itself writes (on-policy)."""

    prompts: DatasetSource = Field(
        description="What the student continues: rows with `prompt` (text or messages), with chats, whose last "
        "assistant turn is left out, or with `text`. Files, folders and hub datasets, as for text.",
    )
    fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the training rows that are completions by the student. The others are documents of "
        "`dataset.train_dataset`; with 1, leave that out.",
    )
    every: int = Field(
        default=64,
        ge=1,
        description="Optimiser steps in a round, at whose beginning the student writes the completions of all of them.",
    )
    max_new_tokens: int = Field(default=512, ge=1, description="Longest completion in tokens.")
    temperature: float = Field(
        default=1.0,
        ge=0,
        le=1000,
        allow_inf_nan=False,
        description="Softens the distribution that the student's tokens are drawn from; 0 takes the most probable.",
    )
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="Draw from the most probable tokens up to this total probability only."
    )
    engine: Literal["hf", "vllm", "server"] = Field(
        default="hf",
        description="What generates: hf, transformers with the very weights that are being trained; vllm, in the same "
        "process; or server, a running vLLM or SGLang. The latter two get the student's weights before each round.",
    )
    batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Completions that a process writes at the same time; by default as many as it has rows in an "
        "optimiser step with hf, 256 with vllm, and 64 with a server.",
    )
    gpu_memory_utilization: float = Field(
        default=0.3,
        gt=0,
        le=1,
        description="With engine: vllm on a GPU, the share of its memory for vLLM's copy of the student, activations, "
        "keys and values.",
    )
    server: RolloutServerConfig | None = Field(default=None, description="The server; required with engine: server.")

    _numbers = field_validator(
        *("fraction", "every", "max_new_tokens", "temperature", "top_p", "batch_size", "gpu_memory_utilization"),
        mode="before",
    )(refuse_flag)

    @model_validator(mode="after")
    def _server_if_needed(self) -> RolloutsConfig:
        if (self.engine == "server") != (self.server is not None):
            raise ValueError(
                "server: missing; engine: server needs server.base_url"
                if self.server is None
                else f"server: only used with engine: server, found engine: {self.engine}"
            )
        return self


Concurrency = Annotated[int, Field(ge=1, le=4096)]


class ServedTeacherConfig(Section):
    """A teacher behind an OpenAI-compatible server, asked while the student trains (`kind: server`)."""

    kind: Literal["server"] = Field(description="A running server.")
    base_url: ServerUrl = Field(
        description="URL of the server, such as http://localhost:8000/v1; its key is read from DISTILLKIT_API_KEY or "
        "OPENAI_API_KEY.",
    )
    model: Place = Field(
        description="Folder or hub id of the teacher: its config and tokenizer are read, not its weights.",
    )
    served_model: str | None = Field(
        default=None,
        min_length=1,
        description="The server's name for the teacher; only needed if it serves several models, none of them under "
        "the name in `model`.",
    )
    top_k: int = Field(
        ge=1,
        description="Number of the teacher's most probable tokens to train on. The server must allow as many: vLLM "
        "does up to its --max-logprobs, which is 20 unless it is set.",
    )
    label_logprobs: bool = Field(
        default=False, description="Also use the teacher's log-probability of each next token, whatever its rank."
    )
    concurrency: Concurrency = Field(
        default=_SERVER.concurrency,
        description="Maximum number of concurrent requests of each process. Twice as many documents are asked about "
        "ahead.",
    )
    max_retries: Retries = _SERVER.max_retries
    request_timeout: Timeout = Field(
        default=_SERVER.request_timeout,
        description="Seconds that a whole answer may take; after that, the request counts as failed.",
    )
    cache: Place | None = Field(
        default=None,
        description="Folder that keeps the answers, as datasets, so that a later epoch or run does not ask for them "
        "again; by default nothing is kept.",
    )

    _numbers = field_validator("top_k", "concurrency", mode="before")(refuse_flag)


Scalar = Union[bool, int, float, str]


class _Listed(Section):
    """What a teacher has in a list of several."""

    weight: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Its share where several teachers match a row, relative to the weights of the others: their "
        "probabilities are averaged.",
    )
    where: dict[str, Scalar | list[Scalar]] = Field(
        default_factory=dict,
        description="Which rows it teaches: those that have this value, or one of a list of values, in each of these "
        "columns; all rows by default. Captured datasets have the columns that they were captured with (keep_columns).",
    )

    _weights = field_validator("weight", mode="before")(refuse_flag)

    def matches(self, columns: Mapping[str, Any]) -> bool:
        """Whether it teaches a row with these values. Text equals a number or true and false that is written so."""
        return all(
            any(_same_value(columns.get(name), each) for each in (value if isinstance(value, list) else [value]))
            for name, value in self.where.items()
        )


def _same_value(found: Any, wanted: Scalar) -> bool:
    if isinstance(found, bool) or isinstance(wanted, bool):
        return str(found).lower() == str(wanted).lower()
    return bool(found == wanted) or (isinstance(found, str) and found == str(wanted))


class ListedLiveTeacherConfig(_Listed, LiveTeacherConfig):
    """A live teacher in a list of several."""


class ListedServedTeacherConfig(_Listed, ServedTeacherConfig):
    """A served teacher in a list of several."""

    concurrency: Concurrency = Field(
        default=_SERVER.concurrency,
        description="Maximum number of concurrent requests of each process. Twice as many documents as the "
        "`concurrency` of all served teachers together are asked about ahead.",
    )


ListedTeacherConfig = Annotated[Union[ListedLiveTeacherConfig, ListedServedTeacherConfig], Field(discriminator="kind")]


TeacherConfig = Annotated[
    Union[LiveTeacherConfig, StoredTeacherConfig, ServedTeacherConfig], Field(discriminator="kind")
]

# Transformers' classes for models with a language-model head, named here so that transformers need not be imported.
# Code that comes with a model may give it to AutoModel.
AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForPreTraining",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
)


def _layers(value: object) -> object:
    """Refuse invalid layer pairs with one message; pydantic would report one for each member of the union."""
    pairs = isinstance(value, list) and all(
        isinstance(pair, (list, tuple)) and [type(layer) for layer in pair] == [int, int] for pair in value
    )
    if value is None or value == "all" or pairs:
        return value
    raise ValueError(f"must be 'all' or pairs of [student layer, teacher layer], found {shown(value)}")


LayerMapping = Annotated[Union[list[tuple[int, int]], Literal["all"], None], BeforeValidator(_layers)]


def _default_losses() -> list[LossConfig]:
    # The best row in docs/losses.md.
    return [
        LossConfig(function="cross_entropy", weight=0.1),
        LossConfig(function="kl", weight=0.9, temperature=1.0, missing_probability_handling="uniform"),
    ]


def _top_k_problem(teachers: Sequence[ListedLiveTeacherConfig | ListedServedTeacherConfig]) -> str | None:
    """Describe the first live teacher of a list whose rows would have other ids than those of the others."""
    live = [(number, each) for number, each in enumerate(teachers) if isinstance(each, LiveTeacherConfig)]
    served = [number for number, each in enumerate(teachers) if not isinstance(each, LiveTeacherConfig)]
    for number, teacher in live:
        if served and teacher.top_k is None:
            return (
                f"teachers.{number}.top_k: is required beside a served teacher (teachers.{served[0]}), of which only "
                "the most probable ids are known; set how many of this one to use, too"
            )
        if teacher.top_k != live[0][1].top_k:
            return (
                f"teachers.{number}.top_k: {teacher.top_k}, but teachers.{live[0][0]} has {live[0][1].top_k}; it says "
                "how many ids of the live teachers' average to use, so they all have the same"
            )
    return None


_ROLLOUT_LOSS = {"function": "reverse_kl", "weight": 1.0, "missing_probability_handling": "uniform"}


class RunConfig(Section):
    """A training run."""

    project_name: str = Field(default="distillkit", description="Project that wandb and trackio log the run under.")
    model: Place = Field(description="Student model: a folder or a Hugging Face hub id.")
    output_path: Place = Field(description="Folder for checkpoints, metrics and the trained student.")
    sequence_length: int = Field(
        ge=2,
        description="Maximum number of tokens in a training row; `dataset.overflow` says what to do with longer "
        "documents.",
    )
    dataset: DatasetSection = Field(description="What the student is trained and evaluated on.")
    # Set to the first of `teachers` if these are several.
    teacher: TeacherConfig = Field(
        default=None,  # type: ignore[assignment]
        description="Where the teacher's distributions come from; required unless there are `teachers`.",
    )
    teachers: list[ListedTeacherConfig] | None = Field(
        default=None,
        min_length=1,
        max_length=63,  # a batch has the teachers of each position as bits of an int64
        description="Several live and served teachers in place of one: each teaches the rows that it matches; where "
        "several match a row, their probabilities are averaged.",
    )
    loss_functions: list[LossConfig] = Field(
        default_factory=_default_losses,
        min_length=1,
        description="Losses in the weighted sum; 0.1 cross_entropy + 0.9 kl (missing probability: uniform) by default, "
        "with `rollouts` reverse_kl alone (uniform).",
    )
    rollouts: RolloutsConfig | None = Field(
        default=None, description="Train on completions that the student writes, scored by a live or a served teacher."
    )
    layer_mapping: LayerMapping = Field(
        default=None,
        description="Hidden states to compare in hs_mse and hs_cosine: pairs of [student layer, teacher layer], or "
        "all, for models of equal depth. 0 is the output of the embeddings, n that of the n-th layer, −1 that of the "
        "last.",
    )
    force_hidden_state_projection: bool = Field(
        default=False,
        description="Project the student's hidden states even if they have the same size as the teacher's.",
    )
    resize_embeddings_to_multiple_of: int | None = Field(
        default=None, ge=1, description="Widen embeddings and head to a multiple of this; they never shrink."
    )
    use_flash_attention: bool | None = Field(
        default=None,
        description="true requires FlashAttention, false never uses it; by default it is used if it can run and the "
        "student supports it. Otherwise the student gets transformers' default, or `model_kwargs.attn_implementation`.",
    )
    functionary_packing: bool = Field(
        default=False,
        description="The published switch for packing without attention between documents; the same as "
        "`training_args.packing`, which always keeps them apart.",
    )
    model_kwargs: Arguments = Field(
        default_factory=dict,
        description="Arguments for loading the student (dtype, attn_implementation, …). To load it quantised: "
        "quantization_config, or load_in_4bit or load_in_8bit with other settings of BitsAndBytesConfig.",
    )
    model_auto_class: Annotated[str, WithJsonSchema({"type": ["string", "null"]})] = Field(
        default="AutoModelForCausalLM",
        description="Transformers class that loads the student with a language-model head, such as "
        "AutoModelForImageTextToText for a vision-language model.",
    )
    trust_remote_code: bool = Field(default=False, description="Run code that comes with the student.")
    frozen_modules: Names = Field(default_factory=list, description="Exact names of modules that are not trained.")
    frozen_res: Names = Field(
        default_factory=list,
        description="Regular expressions, searched in parameter names; parameters that match are not trained.",
    )
    peft: LoraSection | None = Field(
        default=None, description="Train LoRA adapters instead of the student's own weights."
    )
    training_args: Arguments = Field(
        default_factory=dict, description="Arguments of TRL's SFTConfig, under their own names."
    )

    _source: str = PrivateAttr(default="config")
    _overrides: dict[str, Any] = PrivateAttr(default_factory=dict)

    _numbers = field_validator("sequence_length", "resize_embeddings_to_multiple_of", mode="before")(refuse_flag)

    @model_validator(mode="before")
    @classmethod
    def _what_rollouts_imply(cls, content: Any) -> Any:
        """Without other documents, the prompts are the training data; and completions have losses of their own."""
        rollouts = content.get("rollouts") if isinstance(content, dict) else None
        if not isinstance(rollouts, dict):
            return content
        content = {"loss_functions": [dict(_ROLLOUT_LOSS)], **content}
        dataset = content.get("dataset") or {}
        alone = rollouts.get("fraction", 1.0) == 1.0 and isinstance(rollouts.get("prompts"), dict)
        if alone and isinstance(dataset, dict) and "train_dataset" not in dataset:
            content["dataset"] = {**dataset, "train_dataset": rollouts["prompts"]}
        return content

    @field_validator("model_kwargs")
    @classmethod
    def _one_quantisation(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "trust_remote_code" in value:
            raise ValueError("trust_remote_code: put it at the top level")
        if value.get("quantization_config") is not None and not isinstance(value["quantization_config"], dict):
            raise ValueError(f"quantization_config: must be a mapping, found {shown(value['quantization_config'])}")
        given = [name for name in ("quantization_config", "load_in_4bit", "load_in_8bit") if value.get(name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]}: and {given[1]} both quantise; set only one")
        return value

    @field_validator("model_auto_class", mode="before")
    @classmethod
    def _auto_class(cls, value: object) -> object:
        if value is None or value == "AutoModelForCausalLM":
            return "AutoModelForCausalLM"
        if isinstance(value, str) and value not in AUTO_CLASSES:
            raise ValueError(
                f"{shown(value)} is not allowed{nearest(value, AUTO_CLASSES)}; allowed: {', '.join(AUTO_CLASSES)}"
            )
        return value

    @field_validator("teacher", mode="before")
    @classmethod
    def _a_section(cls, value: object) -> object:
        if isinstance(value, str):
            known = f"{{kind: {value}}}" if value == "dataset" else f"{{kind: hf, path: {cut(value)}}}"
            raise ValueError(f"must be a section such as {known}, found {shown(value)}")
        return value

    @model_validator(mode="after")
    def _taught(self) -> RunConfig:
        if self.teachers is None:
            if self.teacher is None:
                raise refusals(self, {"teacher": "is required and missing"})
            return self
        if "teacher" in self.model_fields_set:
            raise ValueError("teachers: teacher is set, too; list all teachers in teachers")
        problem = _top_k_problem(self.teachers)
        if problem is not None:
            raise ValueError(problem)
        self.__dict__["teacher"] = self.teachers[0]
        return self

    @field_validator("loss_functions")
    @classmethod
    def _some_weight(cls, value: list[LossConfig]) -> list[LossConfig]:
        if not any(loss.weight for loss in value):
            raise ValueError("all weights are 0; at least one must be positive")
        named_losses(value)  # raises if their sum is not finite
        return value

    @field_validator("frozen_res")
    @classmethod
    def _expressions(cls, value: list[str]) -> list[str]:
        for expression in value:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{expression!r} is not a regular expression: {error}") from None
        return value

    @field_validator("model_kwargs")
    @classmethod
    def _dtype_has_one_name(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _one_dtype(value)

    @property
    def teachers_by_key(self) -> dict[str, LiveTeacherConfig | ServedTeacherConfig]:
        """The live and served teachers by their keys, `teacher` or `teachers.0`, …; empty with stored distributions."""
        if self.teachers is not None:
            return {f"teachers.{number}": teacher for number, teacher in enumerate(self.teachers)}
        return {} if isinstance(self.teacher, StoredTeacherConfig) else {"teacher": self.teacher}

    @property
    def live_teachers(self) -> dict[str, LiveTeacherConfig]:
        """The live teachers by their keys."""
        return {key: each for key, each in self.teachers_by_key.items() if isinstance(each, LiveTeacherConfig)}

    @property
    def served_teachers(self) -> dict[str, ServedTeacherConfig]:
        """The served teachers by their keys."""
        return {key: each for key, each in self.teachers_by_key.items() if isinstance(each, ServedTeacherConfig)}

    @property
    def own_teachers(self) -> list[str]:
        """The keys of live teachers that are the student without its adapters: the same model, and no `kwargs`."""
        if self.peft is None:
            return []
        return [key for key, each in self.live_teachers.items() if each.path == self.model and not each.kwargs]

    @property
    def only_rollouts(self) -> bool:
        """Whether all training rows are completions by the student."""
        return self.rollouts is not None and self.rollouts.fraction == 1.0

    @property
    def quantised(self) -> str | None:
        """The key of `model_kwargs` that asks for quantised weights, or None."""
        keys = ("quantization_config", "load_in_4bit", "load_in_8bit")
        return next((key for key in keys if self.model_kwargs.get(key)), None)

    @property
    def source(self) -> str:
        """Where the configuration came from, for messages."""
        return self._source

    @property
    def overrides(self) -> dict[str, Any]:
        """What the command line set in place of the file's values, by dotted path."""
        return self._overrides

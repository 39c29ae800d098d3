"""The training configuration: a YAML file, read whole and checked before anything is loaded.

Everything the published configuration has is known here. What is wrong is reported all at once, each problem by its
dotted path: unknown keys with the nearest known one, values that are not allowed with those that are, and settings
whose feature does not exist yet. Nothing is ignored.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, field_validator, model_validator

from distillkit.codec import Codec
from distillkit.errors import ConfigError, nearest
from distillkit.losses.config import LossConfig
from distillkit.models.adapters import LoraSection

__all__ = ["DatasetSource", "LiveTeacherConfig", "RunConfig", "StoredTeacherConfig"]


class _Model(BaseModel):
    # The published keys model_kwargs and model_auto_class begin with pydantic's reserved prefix.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class DatasetSource(_Model):
    """Where a dataset lies: a hub repository, or a folder or file.

    Attributes:
        repo_id, revision, config_name: a dataset on the Hugging Face hub, and what to take of it.
        disk_path: a folder of shards, or a published dataset (Parquet files, or written by `save_to_disk`). For a live
            teacher also text, chat or token ids: `.parquet`, `.json`, `.jsonl` or `.txt` files, or a `save_to_disk`
            folder.
        split: of a dataset that has splits.
    """

    repo_id: str | None = None
    revision: str | None = None
    config_name: str | None = None
    disk_path: str | None = None
    split: str | None = None

    @model_validator(mode="after")
    def _one_place(self) -> DatasetSource:
        if (self.repo_id is None) == (self.disk_path is None):
            found = "both" if self.repo_id is not None else "neither"
            raise ValueError(f"give one of repo_id (a hub dataset) and disk_path (a folder), found {found}")
        if self.disk_path is not None:
            for name in ("revision", "config_name"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: belongs to a hub dataset (repo_id), not to a folder (disk_path)")
        if self.split is not None and not re.fullmatch(r"[\w.\-]+", self.split):
            raise ValueError(f"split: {self.split!r} is not a split's name; for a part of one use dataset.num_samples")
        return self


class DatasetSection(_Model):
    """The `dataset` section.

    Attributes:
        train_dataset, eval_dataset: where the data lies.
        seed: of the choice of samples and of their order; null takes the first samples, and orders by
            `training_args.seed`.
        num_samples, num_eval_samples: how many documents to take; all if not given.
        prepacked: the documents are packed rows, and stay as they are whatever `training_args.packing` says. Where one
            of their documents ends, datasets say themselves (numbered attention masks, segment lengths).
        eos_label_token_ids: these ids become the tokenizer's end of sequence in the labels, and nowhere else.
        prepared_dataset_path: folder for what is made of text once and used again by every run with the same data,
            tokenizer and settings; the cache of the datasets library if not given. Captured datasets need no preparing.
    """

    train_dataset: DatasetSource
    eval_dataset: DatasetSource | None = None
    seed: int | None = Field(default=42, ge=0)
    num_samples: int | None = Field(default=None, ge=1)
    num_eval_samples: int | None = Field(default=None, ge=1)
    eos_label_token_ids: list[Annotated[int, Field(ge=0)]] | None = None
    prepared_dataset_path: str | None = Field(default=None, min_length=1)
    prepacked: bool = False


_DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def _one_dtype(arguments: dict[str, Any]) -> dict[str, Any]:
    """Call `dtype` what older configurations call `torch_dtype`, and check its value."""
    if "torch_dtype" in arguments and "dtype" in arguments:
        raise ValueError(
            f"dtype: {arguments['dtype']!r} and torch_dtype: {arguments['torch_dtype']!r} are one setting; give dtype"
        )
    arguments = {("dtype" if key == "torch_dtype" else key): value for key, value in arguments.items()}
    dtype = arguments.get("dtype")
    if isinstance(dtype, str):
        dtype = arguments["dtype"] = dtype.removeprefix("torch.")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype: {dtype!r} is not allowed; allowed: {', '.join(_DTYPES)}")
    return arguments


class LiveTeacherConfig(_Model):
    """A live teacher (`kind: hf`), run beside the student.

    Attributes:
        path: a folder or a hub id. The student's own base model together with `peft` means: the student without its
            adapters, which takes no memory of its own.
        kwargs: passed on when it is loaded (`dtype`, `device_map`, `attn_implementation`, …; `torch_dtype` is taken for
            `dtype`). Without a `dtype` it has its checkpoint's.
        top_k: train from its k most probable ids only, as if they had been captured; from its whole distribution if not
            given.
    """

    kind: Literal["hf"]
    path: str = Field(min_length=1)
    kwargs: dict[str, Any] = Field(default_factory=dict)
    top_k: int | None = Field(default=None, ge=1)

    @field_validator("kwargs", mode="before")
    @classmethod
    def _null_is_empty(cls, value: object) -> object:
        return {} if value is None else value

    @field_validator("kwargs")
    @classmethod
    def _dtype_has_one_name(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _one_dtype(value)


class StoredTeacherConfig(_Model):
    """A teacher whose distributions are stored in the dataset (`kind: dataset`).

    Attributes:
        logprob_compressor, legacy_logit_compression: the codec of a published dataset. Our own shards name theirs; one
            given here must agree.
        vocab_size: if given, checked against the dataset's.
    """

    kind: Literal["dataset"]
    logprob_compressor: dict[str, Any] | None = None
    legacy_logit_compression: dict[str, Any] | None = None
    vocab_size: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_codec(self) -> StoredTeacherConfig:
        if self.logprob_compressor is not None and self.legacy_logit_compression is not None:
            raise ValueError("give logprob_compressor or legacy_logit_compression, found both")
        self.codec()
        return self

    def codec(self) -> Codec | None:
        """Build the codec that the configuration names, if it names one."""
        for key in ("logprob_compressor", "legacy_logit_compression"):
            fields = getattr(self, key)
            if fields is not None:
                try:
                    return Codec({key: fields})
                except ConfigError as error:
                    # "SomeConfig: field: why" becomes "key.field: why", to which the dotted path is prefixed.
                    raise ConfigError(f"{key}.{str(error).partition(': ')[2]}") from None
        return None


TeacherConfig = Annotated[Union[LiveTeacherConfig, StoredTeacherConfig], Field(discriminator="kind")]


def _default_losses() -> list[LossConfig]:
    # The row that won in docs/losses.md.
    return [
        LossConfig(function="cross_entropy", weight=0.1),
        LossConfig(function="kl", weight=0.9, temperature=1.0, missing_probability_handling="uniform"),
    ]


class RunConfig(_Model):
    """A training run.

    Attributes:
        project_name: names the run's project for wandb and trackio.
        model: the student, a folder or a hub id.
        output_path: folder for checkpoints, metrics and the trained student.
        sequence_length: longest training row in tokens; longer documents are cut, together with the teacher's rows.
        dataset, teacher, loss_functions: see their classes. Without loss_functions: 0.1 cross_entropy + 0.9 kl with
            missing probability as `uniform` (published: 0.5 + 0.5, `zero`).
        training_args: arguments of `trl.SFTConfig`; see `distillkit.training_args`.
        use_flash_attention: true demands FlashAttention, false never uses it, unset uses it where it can run.
        model_auto_class: the transformers class that loads it, one with a language-model head; for example
            `AutoModelForImageTextToText` for a vision-language model.
        model_kwargs: passed on when the student is loaded (`dtype`, `attn_implementation`, …; `torch_dtype` is taken
            for `dtype`). `quantization_config`, or `load_in_4bit` and `load_in_8bit` with the settings of
            `transformers.BitsAndBytesConfig`, load it quantised.
        peft: train LoRA adapters instead of the student's weights; see `distillkit.adapters.LoraSection`.
        trust_remote_code: run the code in the student's repository.
        frozen_modules: exact names of modules that are not trained.
        frozen_res: regular expressions; parameters whose names they match anywhere are not trained.
        resize_embeddings_to_multiple_of: widen embeddings and head to a multiple of this; they never shrink.
        functionary_packing: the published switch for packing with documents kept apart. They always are, so it means
            `training_args.packing: true`.
        layer_mapping: which hidden states of student and teacher are compared, for hs_mse and hs_cosine: pairs of
            [student layer, teacher layer], or `all`. 0 is the embeddings' output, n the n-th layer's, −1 the last.
        force_hidden_state_projection: project the student's hidden states also where their size is the teacher's.
    """

    project_name: str = "distillkit"
    model: str = Field(min_length=1)
    output_path: str = Field(min_length=1)
    sequence_length: int = Field(ge=2)
    dataset: DatasetSection
    teacher: TeacherConfig
    loss_functions: list[LossConfig] = Field(default_factory=_default_losses, min_length=1)
    layer_mapping: list[tuple[int, int]] | Literal["all"] | None = None
    force_hidden_state_projection: bool = False
    resize_embeddings_to_multiple_of: int | None = Field(default=None, ge=1)
    use_flash_attention: bool | None = None
    functionary_packing: bool = False
    model_kwargs: dict[str, Any] = Field(default_factory=dict)
    model_auto_class: str = "AutoModelForCausalLM"
    trust_remote_code: bool = False
    frozen_modules: list[str] = Field(default_factory=list)
    frozen_res: list[str] = Field(default_factory=list)
    peft: LoraSection | None = None
    training_args: dict[str, Any] = Field(default_factory=dict)

    _source: str = PrivateAttr(default="config")

    @field_validator("frozen_modules", "frozen_res", "model_kwargs", "training_args", mode="before")
    @classmethod
    def _null_is_empty(cls, value: object, info: Any) -> object:
        if value is None:
            return [] if info.field_name.startswith("frozen") else {}
        return value

    @field_validator("model_kwargs")
    @classmethod
    def _one_quantisation(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "trust_remote_code" in value:
            raise ValueError("trust_remote_code: put it at the top level")
        if value.get("quantization_config") is not None and not isinstance(value["quantization_config"], dict):
            raise ValueError(f"quantization_config: a mapping is expected, found {value['quantization_config']!r}")
        given = [name for name in ("quantization_config", "load_in_4bit", "load_in_8bit") if value.get(name)]
        if len(given) > 1:
            raise ValueError(f"{given[0]}: and {given[1]} are two ways to quantise; give one")
        return value

    @field_validator("model_auto_class", mode="before")
    @classmethod
    def _auto_class(cls, value: object) -> object:
        if value is None or value == "AutoModelForCausalLM":
            return "AutoModelForCausalLM"
        if not isinstance(value, str):
            return value
        import transformers

        known = [name for name in dir(transformers) if name.startswith("AutoModel")]
        if value not in known:
            raise ValueError(f"transformers has no auto class {value!r}{nearest(value, known)}")
        return value

    @field_validator("loss_functions")
    @classmethod
    def _some_weight(cls, value: list[LossConfig]) -> list[LossConfig]:
        if not any(loss.weight for loss in value):
            raise ValueError("all weights are 0; at least one must be positive")
        return value

    @field_validator("frozen_res")
    @classmethod
    def _expressions(cls, value: list[str]) -> list[str]:
        for expression in value:
            try:
                re.compile(expression)
            except re.error as error:  # noqa: PERF203 - each expression is named
                raise ValueError(f"{expression!r} is not a regular expression: {error}") from None
        return value

    @field_validator("model_kwargs")
    @classmethod
    def _dtype_has_one_name(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _one_dtype(value)

    @property
    def teaches_itself(self) -> bool:
        """Whether the live teacher is the student without its adapters: the same model, with no settings of its own."""
        teacher = self.teacher
        return (
            self.peft is not None
            and isinstance(teacher, LiveTeacherConfig)
            and teacher.path == self.model
            and not teacher.kwargs
        )

    @property
    def quantised(self) -> str | None:
        """Return the key of `model_kwargs` that asks for quantised weights, if one does."""
        keys = ("quantization_config", "load_in_4bit", "load_in_8bit")
        return next((key for key in keys if self.model_kwargs.get(key)), None)

    @property
    def source(self) -> str:
        """Return where the configuration came from, for messages."""
        return self._source

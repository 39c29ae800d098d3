"""The arguments of `training_args`: their types and limits, and which of them a resumed run may change.

They are those of `trl.SFTConfig`, written down here so that a configuration is checked without importing trl, which
takes ten seconds, and where it is not installed. `tests/test_config.py` compares the table with the installed trl.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

__all__ = ["ARGUMENTS", "CHECKPOINTING", "DEPENDS_ON_EVALUATION", "FREE", "LAST_STEP", "ROWS", "SCHEDULES_WITHOUT_END"]


def _whole_steps(value: float | None) -> float | None:
    if value is not None and value >= 1 and value != int(value):
        raise ValueError("must be a whole number of steps, or a fraction of all steps below 1")
    return value


def _limit(value: int) -> int:
    if value != -1 and value < 1:
        raise ValueError("must be a number of steps, at least 1, or -1 to train for num_train_epochs")
    return value


def _switch_off(value: object) -> object:
    # YAML reads an unquoted `no` as false.
    return "no" if value is False else value


Count = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Every = Annotated[float, Field(gt=0, allow_inf_nan=False), AfterValidator(_whole_steps)]
Warmup = Annotated[float, Field(ge=0, allow_inf_nan=False), AfterValidator(_whole_steps)]
Mapping = dict[str, Any]
Path = str
Interval = Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_switch_off)]
Saving = Annotated[Literal["no", "steps", "epoch", "best"], BeforeValidator(_switch_off)]
LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]
Scheduler = Literal[
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "greedy",
]
Optimizer = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adafactor",
    "adamw_anyprecision",
    "adamw_torch_4bit",
    "adamw_torch_8bit",
    "ademamix",
    "sgd",
    "adagrad",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "ademamix_8bit",
    "lion_8bit",
    "lion_32bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "lomo",
    "adalomo",
    "grokadamw",
    "schedule_free_radam",
    "schedule_free_adamw",
    "schedule_free_sgd",
    "apollo_adamw",
    "apollo_adamw_layerwise",
    "stable_adamw",
]

# Whatever is in none of the groups further below must stay the same when a run is resumed.
_FIXED: dict[str, Any] = {
    "accelerator_config": Mapping | Path | None,
    "adam_beta1": Beta,
    "adam_beta2": Beta,
    "adam_epsilon": Positive,
    "assistant_only_loss": bool,
    "auto_find_batch_size": bool,
    "average_tokens_across_devices": bool,
    "bf16": bool | None,
    "bf16_full_eval": bool,
    "chat_template_path": Path | None,
    "completion_only_loss": bool | None,
    "data_seed": Annotated[int, Field(ge=0, lt=2**63)] | None,
    "dataloader_drop_last": bool,
    "dataloader_in_order": bool,
    "dataset_kwargs": Mapping | Path | None,
    "dataset_text_field": str,
    "ddp_broadcast_buffers": bool | None,
    "deepspeed": Mapping | Path | None,
    "eos_token": str | None,
    "fp16": bool,
    "fp16_full_eval": bool,
    "fsdp": str | bool | None,
    "fsdp_config": Mapping | Path | None,
    "full_determinism": bool,
    "greater_is_better": bool | None,
    "ignore_data_skip": bool,
    "label_names": list[str] | None,
    "label_smoothing_factor": NotNegative,
    "learning_rate": NotNegative,
    "length_column_name": str,
    "liger_kernel_config": dict[str, bool] | None,
    "load_best_model_at_end": bool,
    "loss_type": str,
    "lr_scheduler_kwargs": Mapping | Path | None,
    "lr_scheduler_type": Scheduler,
    "max_grad_norm": NotNegative,
    "max_length": Count | None,
    "metric_for_best_model": str | None,
    "model_init_kwargs": Mapping | Path | None,
    "neftune_noise_alpha": NotNegative | None,
    "optim": Optimizer,
    "optim_args": str | None,
    "optim_target_modules": str | list[str] | None,
    "packing": bool,
    "packing_strategy": str,
    "pad_to_multiple_of": Count | Literal["auto"] | None,
    "pad_token": str | None,
    "padding_free": bool,
    "parallelism_config": Any,
    "remove_unused_columns": bool,
    "router_aux_loss_coef": NotNegative | None,
    "seed": Annotated[int, Field(ge=0, lt=2**32)],
    "shuffle_dataset": bool,
    "tf32": bool | None,
    "torch_compile": bool,
    "torch_compile_backend": str | None,
    "torch_compile_mode": str | None,
    "train_sampling_strategy": str,
    "truncation_mode": str,
    "trust_remote_code": bool,
    "use_cache": bool,
    "use_liger_kernel": bool,
    "warmup_steps": Warmup,
    "weight_decay": NotNegative,
}

# Together with the number of processes, these are the rows of a step, which must stay the same.
_ROWS: dict[str, Any] = {
    "gradient_accumulation_steps": Count,
    "per_device_train_batch_size": Count,
}

# Where a run ends. It may be extended if the learning rate does not depend on it.
_LAST_STEP: dict[str, Any] = {
    "max_steps": Annotated[int, AfterValidator(_limit)],
    "num_train_epochs": Positive,
}

# These decide which student is the best, and change nothing where that is not asked.
_EVALUATION: dict[str, Any] = {
    "eval_delay": NotNegative,
    "eval_packing": bool | None,
    "eval_steps": Every | None,
    "eval_strategy": Interval,
    "save_steps": Every,
    "save_strategy": Saving,
}

# These change what is shown or kept, or how fast a run is, but not the student.
_FREE: dict[str, Any] = {
    "activation_checkpointing": bool | None,
    "activation_checkpointing_kwargs": Mapping | Path | None,
    "activation_offloading": bool,
    "batch_eval_metrics": bool,
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
    "dataloader_num_workers": Number,
    "dataloader_persistent_workers": bool,
    "dataloader_pin_memory": bool,
    "dataloader_prefetch_factor": Count | None,
    "dataset_num_proc": Count | None,
    "ddp_backend": str | None,
    "ddp_bucket_cap_mb": Count | None,
    "ddp_find_unused_parameters": bool | None,
    "ddp_static_graph": bool | None,
    "ddp_timeout": Count,
    "debug": str | list[Literal["underflow_overflow", "tpu_metrics_debug"]],
    "disable_tqdm": bool | None,
    "do_eval": bool,
    "do_predict": bool,
    "do_train": bool,
    "enable_jit_checkpoint": bool,
    "eval_accumulation_steps": Count | None,
    "eval_do_concat_batches": bool,
    "eval_on_start": bool,
    "eval_use_gather_object": bool,
    "gradient_checkpointing": bool,
    "gradient_checkpointing_kwargs": Mapping | Path | None,
    "hub_always_push": bool,
    "hub_model_id": str | None,
    "hub_private_repo": bool | None,
    "hub_revision": str | None,
    "hub_strategy": Literal["end", "every_save", "checkpoint", "all_checkpoints"],
    "hub_token": str | None,
    "include_for_metrics": list[str],
    "include_num_input_tokens_seen": bool | Literal["all", "non_padding", "no"],
    "local_rank": Annotated[int, Field(ge=-1)],
    "log_level": LogLevel,
    "log_level_replica": LogLevel,
    "log_on_each_node": bool,
    "logging_first_step": bool,
    "logging_nan_inf_filter": bool,
    "logging_steps": Every,
    "logging_strategy": Interval,
    "output_dir": Path | None,
    "per_device_eval_batch_size": Count,
    "prediction_loss_only": bool,
    "project": str,
    "push_to_hub": bool,
    "report_to": str | list[str] | None,
    "restore_callback_states_from_checkpoint": bool,
    "resume_from_checkpoint": bool | Path | None,
    "run_name": str | None,
    "save_on_each_node": bool,
    "save_only_model": bool,
    "save_total_limit": Count | None,
    "skip_memory_metrics": bool,
    "torch_empty_cache_steps": Count | None,
    "trackio_bucket_id": str | None,
    "trackio_space_id": str | None,
    "trackio_static_space_id": str | Literal[False] | None,
    "use_cpu": bool,
}

ARGUMENTS: dict[str, Any] = {**_FIXED, **_ROWS, **_LAST_STEP, **_EVALUATION, **_FREE}
"""The type of each argument, with its limits."""

CHECKPOINTING: dict[str, Any] = {
    "debug": bool,
    "determinism_check": Literal["default", "none"],
    "early_stop": bool,
    "every_n_layers": Count,
    "offload": bool,
    "preserve_rng_state": bool,
    "use_reentrant": bool,
}
"""The keys of `activation_checkpointing_kwargs`: transformers' own, and arguments of torch.utils.checkpoint."""

ROWS = frozenset(_ROWS)
LAST_STEP = frozenset(_LAST_STEP)
DEPENDS_ON_EVALUATION = frozenset(_EVALUATION)
FREE = frozenset(_FREE)

SCHEDULES_WITHOUT_END = ("constant", "constant_with_warmup", "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
"""Schedules of the learning rate that do not depend on when the run ends."""

"""A training run's YAML file: read, checked as a whole, every problem reported at once."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from distillkit.errors import ConfigError, nearest
from distillkit.losses.config import HIDDEN_LOSSES, LossConfig
from distillkit.models.adapters import LoraSection
from distillkit.training.config.schema import (
    DatasetSection,
    DatasetSource,
    LiveTeacherConfig,
    RunConfig,
    StoredTeacherConfig,
)

__all__ = ["load_config", "parse_config"]


def load_config(path: str | Path) -> RunConfig:
    """Read and check a training configuration.

    Args:
        path: a YAML file.

    Raises:
        ConfigError: there is no such file, it is not YAML, or something in it is wrong; all problems, each by its
            dotted path.

    Example:
        >>> config = load_config("train.yaml")
        >>> config.teacher.kind, [loss.function for loss in config.loss_functions]
        ('dataset', ['cross_entropy', 'kl'])
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: the configuration can not be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the configuration is not UTF-8 text: {error}") from error
    try:
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    return parse_config(content, source=str(path))


def parse_config(content: object, *, source: str = "config") -> RunConfig:
    """Check a training configuration that has been read already.

    Args:
        content: the mapping a YAML file holds.
        source: where it came from, for messages.

    Raises:
        ConfigError: as `load_config`.
    """
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{source}: a mapping of settings is expected, found "
            f"{'nothing' if content is None else type(content).__name__}"
        )
    problems: list[str] = []
    config = None
    try:
        config = RunConfig.model_validate(content)
    except ValidationError as error:
        problems += [_problem(item) for item in error.errors()]
    if config is not None:
        problems += _disagreements(config) + _student_problems(config)
    arguments = content.get("training_args")
    if isinstance(arguments, Mapping):
        from distillkit.training.config.argument_rules import argument_problems

        problems += argument_problems(content)
    if problems:
        raise ConfigError(_report(source, problems))
    assert config is not None
    config._source = source
    return config


def _report(source: str, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return "\n".join([f"{source}: {len(problems)} problems", *(f"  {problem}" for problem in problems)])


_SECTIONS: dict[str, type[BaseModel]] = {
    "": RunConfig,
    "dataset": DatasetSection,
    "dataset.train_dataset": DatasetSource,
    "dataset.eval_dataset": DatasetSource,
    "loss_functions": LossConfig,
    "peft": LoraSection,
}

_TEACHERS: dict[str, type[BaseModel]] = {"hf": LiveTeacherConfig, "dataset": StoredTeacherConfig}


def _problem(error: Any) -> str:
    """Describe one pydantic error by its dotted path, what was found and what is allowed."""
    location = list(error["loc"])
    section = _SECTIONS.get(".".join(str(part) for part in location[:-1] if not isinstance(part, int)))
    if location[0] == "teacher" and len(location) > 1 and location[1] in _TEACHERS:
        # pydantic puts the discriminator's value in the path.
        section = _TEACHERS[location.pop(1)]
    path = ".".join(str(part) for part in location)
    kind, found = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"{path}: unknown key{nearest(location[-1], section.model_fields if section else ())}"
    if kind == "missing":
        return f"{path}: is required and missing"
    if kind == "union_tag_not_found":
        return f"{path}.kind: is required and missing; allowed: 'dataset' (stored distributions), 'hf' (a live model)"
    if kind == "union_tag_invalid":
        hint = nearest(found.get("kind"), _TEACHERS)
        return f"{path}.kind: {found.get('kind')!r} is not allowed; allowed: 'dataset', 'hf'{hint}"
    if kind == "literal_error":
        allowed = error["ctx"]["expected"]
        hint = nearest(found, re.findall(r"'(\w+)'", allowed))
        return f"{path}: {found!r} is not allowed; allowed: {allowed}{hint}"
    if kind == "value_error":
        cause = error["ctx"]["error"]
        # A message of ours begins with the key below this path, if it is about one.
        return f"{path}.{cause}" if re.match(r"[\w.]+: ", str(cause)) else f"{path}: {cause}"
    return f"{path}: {error['msg'].removeprefix('Value error, ')} (found {found!r})"


def _disagreements(config: RunConfig) -> list[str]:
    """Describe sections that contradict each other."""
    found: list[str] = []
    hidden = [loss.function for loss in config.loss_functions if loss.function in HIDDEN_LOSSES]
    if hidden and config.layer_mapping is None:
        found.append(
            f"layer_mapping: is missing, and {hidden[0]} needs it: 'all', or pairs of [student layer, teacher layer]"
        )
    if hidden and config.teacher.kind != "hf":
        found.append(
            f"loss_functions: {hidden[0]} compares hidden states, which a dataset of stored distributions does not "
            "have; use a live teacher (teacher.kind: hf)"
        )
    if not hidden and config.layer_mapping is not None:
        found.append(f"layer_mapping: only {' and '.join(HIDDEN_LOSSES)} use it, and loss_functions has neither")
    if not hidden and config.force_hidden_state_projection:
        found.append(
            f"force_hidden_state_projection: only {' and '.join(HIDDEN_LOSSES)} use it, and loss_functions has neither"
        )
    return found


def _student_problems(config: RunConfig) -> list[str]:
    """Describe settings of the student that contradict each other."""
    found: list[str] = []
    sharding = [name for name in ("fsdp", "deepspeed") if config.training_args.get(name)]
    own = "teacher.path: is the student itself, which teaches with its adapters switched off"
    remedy = "give teacher.kwargs (a dtype, say) to load the teacher apart from it"
    if config.teaches_itself and config.peft is not None and config.peft.changes_base_weights:
        found.append(f"{own}, but peft.bias or peft.init_lora_weights change its own weights too; {remedy}")
    if config.teaches_itself and sharding:
        found.append(f"{own}; it can't under training_args.{sharding[0]}; {remedy}")
    if config.quantised is not None and config.peft is None:
        found.append(
            f"model_kwargs.{config.quantised}: quantised weights are not trained themselves; add a peft section to "
            "train LoRA adapters on them (QLoRA)"
        )
    if config.peft is not None and config.peft.merge_on_save:
        if config.quantised is not None:
            found.append(
                f"peft.merge_on_save: merging into quantised weights (model_kwargs.{config.quantised}) would round the "
                "adapters away; save them as they are and merge into the unquantised model"
            )
        if sharding:
            found.append(
                f"peft.merge_on_save: no process holds whole weights under training_args.{sharding[0]}; save the "
                "adapters and merge them afterwards"
            )
    return found


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key given twice, where YAML's own loader would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[object, yaml.Mark] = {}
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"the key '{key}' is given twice, first on line {seen[key].line + 1}",
                    key_node.start_mark,
                )
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep=deep)

"""Makes a student from a teacher: some of its layers, other sizes, or new weights, with the teacher's tokenizer."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from distillkit.configuration.problems import shown
from distillkit.configuration.secrets import redacted
from distillkit.errors import ConfigError, nearest
from distillkit.models.depth import Layers, evenly_spread, with_layers
from distillkit.models.weights import loading_errors, loading_reason, model_problem
from distillkit.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["NewStudent", "make_student"]


@dataclass(frozen=True)
class NewStudent:
    """A student that was made.

    Attributes:
        output: its folder.
        layers: the teacher's layers that it has, by index.
        teacher_layers: the teacher's number of layers.
        parameters, teacher_parameters: their sizes; tied parameters count once.
        copied: how many of the student's parameters are the teacher's; the others are random.
        new: names of the random ones, in the student.
        dtype: of the weights.
        vocab_size: width of the head.
    """

    output: str
    layers: list[int]
    teacher_layers: int
    parameters: int
    teacher_parameters: int
    copied: int
    new: list[str]
    dtype: str
    vocab_size: int

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able mapping."""
        return asdict(self)


def make_student(
    teacher: str,
    output: str | os.PathLike[str],
    layers: int | Sequence[int] | None = None,
    *,
    sizes: Mapping[str, Any] | None = None,
    from_scratch: bool = False,
    seed: int = 42,
    trust_remote_code: bool = False,
) -> NewStudent:
    """Make a student with the teacher's vocabulary and tokenizer, and write it to a folder.

    The student's config is the teacher's, with fewer layers and with `sizes`. Parameters with the same shape in both
    are copied, layer by layer; all others are initialised as transformers does. The tokenizer, its chat template and
    the generation config are the teacher's. The same arguments give the same weights.

    Args:
        teacher: folder or hub id of a causal language model.
        output: folder for the student; must not exist, or be empty.
        layers: how many of the teacher's layers, evenly spread with the first and the last among them; or their
            indices, ascending. All of them by default.
        sizes: settings of the teacher's config to change, such as {"intermediate_size": 1024}.
        from_scratch: initialise all parameters.
        seed: of random parameters.
        trust_remote_code: run code that comes with the teacher.

    Raises:
        ConfigError: the teacher cannot be loaded; its layers cannot be told apart, or compute something else in
            another place; a setting is unknown, or does not fit the others.
        FileExistsError: there is something in `output`.

    Example:
        >>> student = make_student("teacher", "small", layers=1)
        >>> student.layers, student.new
        ([0], [])
    """
    problem = model_problem(teacher)
    if problem is not None:
        raise ConfigError(f"teacher: {problem}")
    folder = Path(output).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, "exists already; choose another folder", str(output))
    tokenizer = load_tokenizer(teacher, trust_remote_code=trust_remote_code)
    plan = _Plan.of(teacher, layers, sizes or {}, trust_remote_code)
    model = plan.load_teacher()
    student, new = plan.build(model, from_scratch, seed)
    with _complete_folder(folder) as unfinished:
        student.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    values = dict(student.named_parameters())
    parameters = sum(value.numel() for value in values.values())
    return NewStudent(
        output=str(output),
        layers=plan.layers.kept,
        teacher_layers=plan.layers.depth,
        parameters=parameters,
        teacher_parameters=model.num_parameters(),
        copied=parameters - sum(values[name].numel() for name in new),
        new=new,
        dtype=str(student.dtype).removeprefix("torch."),
        vocab_size=int(student.config.get_text_config().vocab_size),
    )


@dataclass(frozen=True)
class _Plan:
    """What is decided before the teacher's weights are loaded.

    Attributes:
        teacher: folder or hub id.
        trust: whether to run the teacher's own code.
        layers: where the teacher's layers are, and which of them the student has.
        config: the student's.
    """

    teacher: str
    trust: bool
    layers: Layers
    config: Any

    @staticmethod
    def of(teacher: str, layers: int | Sequence[int] | None, sizes: Mapping[str, Any], trust: bool) -> _Plan:
        """Choose layers and config, and compare the layers on models without weights."""
        import transformers

        with _loading(teacher):
            config = transformers.AutoConfig.from_pretrained(teacher, trust_remote_code=trust)
        depth = _depth(config, teacher)
        kept = list(range(depth)) if layers is None else _chosen(layers, depth)
        with _loading(teacher, "with fewer layers "):
            small = with_layers(config, kept)
            large_outline, outline = (_outline(each, trust) for each in (config, small))
        found = Layers(large_outline, outline, depth, kept)
        with _loading(teacher, f"with {shown(dict(sizes))} " if sizes else "with fewer layers "):
            _resize(small, sizes)
            _check_reading(small)
            _outline(small, trust)
        return _Plan(teacher, trust, found, small)

    def load_teacher(self) -> PreTrainedModel:
        """Load the teacher in the dtype of its weights."""
        import transformers

        with _loading(self.teacher):
            return transformers.AutoModelForCausalLM.from_pretrained(
                self.teacher, dtype="auto", trust_remote_code=self.trust
            )

    def build(self, teacher: PreTrainedModel, from_scratch: bool, seed: int) -> tuple[PreTrainedModel, list[str]]:
        """Return the student, and the names of its parameters that are not the teacher's."""
        import transformers

        with _loading(self.teacher, "with the student's config "), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            student = transformers.AutoModelForCausalLM.from_config(
                self.config, dtype=teacher.dtype, trust_remote_code=self.trust
            )
        student.generation_config = teacher.generation_config
        if from_scratch:
            return student, [name for name, _ in student.named_parameters()]
        values, copied = teacher.state_dict(), {}
        for name, value in student.state_dict().items():
            source = values.get(self.layers.original_name(name))
            part = None if source is None else self.layers.original_value(source, value.shape)
            if part is not None:
                copied[name] = part
        student.load_state_dict(copied, strict=False)
        return student, [name for name, _ in student.named_parameters() if name not in copied]


def _outline(config: Any, trust: bool) -> PreTrainedModel:
    """Build a model without memory for its weights."""
    import transformers

    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def _check_reading(config: Any) -> None:
    """Write and read a config: transformers checks more of it than when its settings are changed."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        type(config).from_pretrained(folder)


def _depth(config: Any, teacher: str) -> int:
    """Return a teacher's number of layers.

    Raises:
        ConfigError: no student can be made of this teacher.
    """
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if config.is_encoder_decoder:
        raise ConfigError(f"teacher: {teacher} has an encoder and a decoder ({config.model_type}); only decoders work")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"teacher: the weights of {teacher} are quantised, and a student needs them in full; give the checkpoint "
            "that they were made from"
        )
    if not isinstance(depth, int) or depth < 1:
        raise ConfigError(f"teacher: the config of {teacher} ({config.model_type}) has no number of layers")
    return depth


def _chosen(layers: int | Sequence[int], depth: int) -> list[int]:
    """Return the indices of the student's layers."""
    if isinstance(layers, int):
        if not 1 <= layers <= depth:
            raise ConfigError(f"layers: must be 1 … {depth}, the teacher's number of layers, found {layers}")
        return evenly_spread(layers, depth)
    kept = list(layers)
    if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < depth:
        raise ConfigError(
            f"layers: must be indices of the teacher's {depth} layers, ascending from 0 … {depth - 1}, found "
            f"{', '.join(map(str, kept)) or 'none'}"
        )
    return kept


def _resize(config: Any, sizes: Mapping[str, Any]) -> None:
    """Change settings of the (text) model's config.

    Raises:
        ConfigError: the config has no such setting, or it is the vocabulary or the number of layers.
    """
    text = config.get_text_config()
    known = [*text.to_dict(), *text.attribute_map]
    for name, value in sizes.items():
        if name in ("vocab_size", "num_hidden_layers") or text.attribute_map.get("num_hidden_layers") == name:
            other = "--layers chooses the layers" if name != "vocab_size" else "the student shares its tokenizer"
            raise ConfigError(f"{name}: is the teacher's: {other}")
        if name not in known:
            raise ConfigError(
                f"{name}: unknown setting of the model's config ({text.model_type}){nearest(name, known)}"
            )
        setattr(text, name, value)


@contextmanager
def _loading(teacher: str, how: str = "") -> Iterator[None]:
    """Turn the errors that transformers raises while loading or building a model into one message."""
    try:
        yield
    except ConfigError:
        raise
    except loading_errors() as error:
        raise ConfigError(
            f"teacher: {teacher!r} {how}cannot be used by AutoModelForCausalLM: {redacted(loading_reason(error))}"
        ) from error


@contextmanager
def _complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a folder next to this one, which takes its place when the block has ended without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=".incomplete-student-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o777 & ~_umask())
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

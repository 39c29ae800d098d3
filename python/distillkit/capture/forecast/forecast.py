"""What a capture will take, before it is run: tokens from a sample of rows, bytes of every codec, time and memory.

Shape legend: R rows (positions), k ids of a row, V width of the logits.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distillkit.capture.forecast.totals import Amount, TextForecast, read_totals
from distillkit.capture.forecast.trial import Trial, try_teacher
from distillkit.capture.inputs import CaptureInputs, stored_bytes_per_token
from distillkit.capture.pipeline import BYTES_A_VALUE, queue_bytes
from distillkit.capture.settings import DEFAULT_PRESET, CaptureSettings
from distillkit.capture.teachers.hf import load_config
from distillkit.codec import PRESETS, Codec, CodecConfig, preset
from distillkit.console import human_bytes
from distillkit.errors import ConfigError, DistillKitError
from distillkit.memory import available_memory, peak_memory
from distillkit.shards.storage import Folder
from distillkit.shards.writer import encode_rows
from distillkit.types import SparseLogprobs, TokenDocument

__all__ = ["CodecForecast", "Forecast", "MemoryForecast", "SpeedForecast", "compared_codecs", "forecast"]

logger = logging.getLogger(__name__)

COMPARED_K = (32, 64, 128, 256)
_PLAN_BYTES = 4
"""Bytes a token that the plan takes until the dataset is whole: it holds the ids, too."""
_DUPLICATE_BYTES = 120
"""Memory a document while duplicates are looked for."""


@dataclass(frozen=True)
class CodecForecast:
    """What a codec would take, and what it would keep of this text's distributions.

    Attributes:
        name: a preset's, or the chosen configuration's with another k.
        chosen: whether it is the one that the settings name.
        k, bytes_per_token: of a row.
        left_bytes: of what this run would capture, its plan included.
        fits: whether they fit on the disk; None if what is free there is not known.
        positions: that the other figures are of; 0 if there are none.
        mass_mean: mean probability of the stored ids.
        kl_mean, kl_p99: KL(top k ‖ decoded) in nats a row.
        note: why there are no figures.
    """

    name: str
    chosen: bool
    k: int
    bytes_per_token: int
    left_bytes: Amount
    fits: bool | None
    positions: int = 0
    mass_mean: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    note: str = ""


@dataclass(frozen=True)
class SpeedForecast:
    """How long it takes, by a short run of the teacher here.

    Attributes:
        tokens, seconds: of the short run.
        load_seconds: until the teacher was ready.
        teacher: tokens a second that it scored.
        encoder: tokens a second that the encoder's thread does alone; None if there was nothing to encode.
        workers: how many such processes share the work; None: as many as a cluster will have.
        tokens_per_second: of one process with both.
        left_seconds: for what this run would capture, of all workers together; of one if it is not known how many.
        finish: when that would be, beginning now: ISO 8601.
    """

    tokens: int
    seconds: float
    load_seconds: float
    teacher: float
    encoder: float | None
    workers: int | None
    tokens_per_second: float
    left_seconds: Amount
    finish: str


@dataclass(frozen=True)
class MemoryForecast:
    """What memory it takes.

    Attributes:
        device: where the teacher is: "cpu", "cuda:0", …, or "server".
        teacher: bytes by what they are for, as far as they are known without loading it: weights, logits, …
        free_bytes: of the device; None if it is not this machine's.
        queue_bytes: of distributions that wait for the encoder, at most, in this machine's memory.
        duplicates_bytes: of what is remembered of documents to find duplicates, in this machine's memory.
        peak_rss_bytes, peak_cuda_bytes: this process's after the short run; None without one.
    """

    device: str
    teacher: dict[str, int]
    free_bytes: int | None
    queue_bytes: int
    duplicates_bytes: int
    peak_rss_bytes: int | None = None
    peak_cuda_bytes: int | None = None

    @property
    def least(self) -> int:
        """What the teacher takes at least."""
        return sum(self.teacher.values())

    @property
    def fits(self) -> bool | None:
        """Whether that is there; None if it is not known."""
        return None if self.free_bytes is None or not self.teacher else self.least <= self.free_bytes


@dataclass(frozen=True)
class Forecast:
    """All of it.

    Attributes:
        model, dataset, output: the settings'.
        text, codecs, memory: see there.
        left_out: codecs that can't be had here, and why.
        free_bytes: of the output's disk; None where it is not known.
        reserved_bytes: of these, what captures planned before this one take.
        speed: None without a short run.
        problems: why the capture can't be run as it is, and what would do; none if it can.
    """

    model: str
    dataset: str
    output: str
    text: TextForecast
    codecs: list[CodecForecast]
    left_out: dict[str, str]
    memory: MemoryForecast
    free_bytes: int | None
    reserved_bytes: int
    speed: SpeedForecast | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> CodecForecast:
        """The codec that the settings name."""
        return next(codec for codec in self.codecs if codec.chosen)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-able mapping."""
        return {**asdict(self), "fits": not self.problems}


def forecast(
    captures: Sequence[CaptureSettings],
    *,
    seconds: float = 10.0,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> list[Forecast]:
    """Say what captures that are run one after the other will take, without writing anything.

    Args:
        captures: their settings.
        seconds: how long each teacher is run; 0: not at all.
        progress: told of the seconds that a teacher has run, and how many it will.

    Raises:
        ConfigError, InputError, MismatchError: as `capture`.
    """
    reserved: dict[int, int] = {}
    forecasts = []
    for settings in captures:
        disk = _disk(Folder(settings.output))
        found = _forecast_one(settings, seconds, reserved.get(disk, 0) if disk is not None else 0, progress)
        if disk is not None:
            reserved[disk] = reserved.get(disk, 0) + found.chosen.left_bytes.value
        forecasts.append(found)
    return forecasts


def _forecast_one(
    settings: CaptureSettings, seconds: float, reserved: int, progress: Callable[[float, float], None]
) -> Forecast:
    inputs, folder = CaptureInputs.load(settings), Folder(settings.output)
    request = inputs.request
    text, documents = read_totals(inputs, folder)
    configs, left_out = compared_codecs(inputs)
    free = folder.free_bytes()
    room = None if free is None else free - reserved
    result = Forecast(
        settings.model,
        settings.dataset,
        str(folder),
        text,
        [_sized(settings, name, Codec(config), text, room) for name, config in configs.items()],
        left_out,
        _memory(inputs, text, request.k),
        free,
        reserved,
    )
    problems = [*_disk_problems(result), *_memory_problems(result)]
    # A teacher that does not fit would take the machine down with it.
    if seconds and documents and result.memory.fits is not False:
        try:
            result = _with_run(result, inputs, configs, documents, seconds, progress)
        except (DistillKitError, MemoryError, torch.OutOfMemoryError) as error:
            problems.append(f"{settings.model}: the teacher could not be run: {error}")
    return replace(result, problems=problems)


def _disk(folder: Folder) -> int | None:
    """The number of the disk that a local folder is or will be on."""
    if not folder.is_local:
        return None
    path = Path(folder.url.removeprefix("file://")).absolute()
    while not path.exists():
        path = path.parent
    return os.stat(path).st_dev


# -- codecs ------------------------------------------------------------------------------------------------------------


def compared_codecs(inputs: CaptureInputs) -> tuple[dict[str, CodecConfig], dict[str, str]]:
    """Return the chosen configuration by its name, the presets, and the chosen layout with other k; and why some are
    not there."""
    settings, chosen = inputs.settings, inputs.codec
    name = settings.preset or DEFAULT_PRESET
    if settings.compression_config is not None:
        given = settings.compression_config
        name = Path(given).name if isinstance(given, (str, Path)) else "compression_config"
    makers: dict[str, Callable[[], CodecConfig]] = {
        other: lambda other=other: preset(other, vocab_size=inputs.head_size)  # type: ignore[misc]
        for other in PRESETS
    }
    fields = chosen.config.model_dump()
    for k in COMPARED_K:
        makers[f"{name}, k = {k}"] = lambda k=k: type(chosen.config)(**{**fields, "k": k})  # type: ignore[misc]
    configs: dict[str, CodecConfig] = {name: chosen.config}
    left_out: dict[str, str] = {}
    for other, make in makers.items():
        try:
            config = make()
            settings.token_ids(inputs.tokenizer, config.k)
        except ConfigError as error:
            left_out[other] = str(error)
            continue
        if config not in configs.values():
            configs[other] = config
    return configs, left_out


def _sized(settings: CaptureSettings, name: str, codec: Codec, text: TextForecast, room: int | None) -> CodecForecast:
    plan = _PLAN_BYTES if text.sampled_rows else 0
    left = text.left_tokens.times(stored_bytes_per_token(codec, settings) + plan)
    return CodecForecast(
        name=name,
        chosen=codec == settings.codec(codec.vocab_size),
        k=codec.k,
        bytes_per_token=codec.bytes_per_token,
        left_bytes=left,
        fits=None if room is None else left.value <= room,
    )


def _with_figures(
    codec: CodecForecast, config: CodecConfig, scored: Sequence[SparseLogprobs]
) -> tuple[CodecForecast, float]:
    """A codec with what it keeps of some distributions; and how many seconds encoding them took."""
    if not scored:
        return codec, 0.0
    if scored[0].k < config.k:
        return replace(codec, note=f"this engine was started for {scored[0].k} ids a row"), 0.0
    encoder, mass, took = Codec(config), 0.0, 0.0
    stats = []
    for rows in scored:
        kept = SparseLogprobs(
            np.ascontiguousarray(rows.ids[:, : config.k]), np.ascontiguousarray(rows.logprobs[:, : config.k])
        )
        clock = time.perf_counter()
        stats.append(encode_rows(encoder, kept)[1])
        took += time.perf_counter() - clock
        mass += float(np.exp(np.asarray(kept.logprobs, dtype=np.float64)).sum())
    whole = stats[0]
    for part in stats[1:]:
        whole.merge(part)
    found = replace(
        codec, positions=whole.rows, kl_mean=whole.kl_mean, kl_p99=whole.kl_p99, mass_mean=mass / whole.rows
    )
    return found, took


# -- the short run -----------------------------------------------------------------------------------------------------


def _with_run(
    result: Forecast,
    inputs: CaptureInputs,
    configs: Mapping[str, CodecConfig],
    documents: Sequence[TokenDocument],
    seconds: float,
    progress: Callable[[float, float], None],
) -> Forecast:
    """Run the teacher for some seconds, and add what that shows."""
    settings, request = inputs.settings, inputs.request
    if settings.engine == "hf":
        # One run for all codecs. Ids that are kept whatever their rank would be in the way of smaller k.
        request = replace(request, k=max(config.k for config in configs.values()), keep_ids=())
    logger.info("%s: running the teacher for %g seconds", settings.model, seconds)
    clock = time.perf_counter()
    teacher: Any = inputs.teacher()
    load_seconds = time.perf_counter() - clock
    try:
        run = try_teacher(teacher, documents, request, settings, seconds, progress)
    finally:
        if hasattr(teacher, "close"):
            teacher.close()
    peak = peak_memory()
    codecs, encode_seconds = [], 0.0
    for codec in result.codecs:
        found, encoding = _with_figures(codec, configs[codec.name], run.scored)
        codecs.append(found)
        encode_seconds += encoding if codec.chosen else 0.0
    encoder = run.positions / encode_seconds if encode_seconds else math.inf
    speed = _speed(inputs, result.text, run, encoder, load_seconds)
    memory = replace(result.memory, peak_rss_bytes=peak["peak_rss_bytes"], peak_cuda_bytes=peak["peak_cuda_bytes"])
    return replace(result, codecs=codecs, speed=speed, memory=memory)


def _speed(inputs: CaptureInputs, text: TextForecast, run: Trial, encoder: float, load_seconds: float) -> SpeedForecast:
    settings, teacher = inputs.settings, run.tokens / run.seconds
    # On a CPU both share the cores; beside an accelerator they work at the same time.
    both = 1 / (1 / teacher + 1 / encoder) if inputs.device == "cpu" else min(teacher, encoder)
    workers = settings.num_workers if settings.workers == "ray" else 1
    left = text.left_tokens.times(1 / (both * (workers or 1)))
    finish = datetime.datetime.now().astimezone() + datetime.timedelta(seconds=left.value)
    return SpeedForecast(
        tokens=run.tokens,
        seconds=run.seconds,
        load_seconds=load_seconds,
        teacher=teacher,
        encoder=None if math.isinf(encoder) else encoder,
        workers=workers,
        tokens_per_second=both,
        left_seconds=left,
        finish=finish.isoformat(timespec="seconds"),
    )


# -- memory and room ---------------------------------------------------------------------------------------------------


def _memory(inputs: CaptureInputs, text: TextForecast, k: int) -> MemoryForecast:
    settings, device = inputs.settings, inputs.device
    remembered = text.documents.value * _DUPLICATE_BYTES if settings.identity()["drop_duplicates"] else 0
    known = _teacher_bytes(inputs) if settings.engine == "hf" else {}
    return MemoryForecast(
        device=device,
        teacher=known,
        free_bytes=_free_bytes(device) if settings.engine == "hf" else None,
        queue_bytes=min(queue_bytes(settings.max_seq_len, k), text.left_tokens.high * k * BYTES_A_VALUE),
        duplicates_bytes=remembered,
    )


def _free_bytes(device: str) -> int | None:
    """Bytes that are free on the teacher's devices now."""
    if device == "cpu" or device.startswith("cuda"):
        return available_memory(torch.device(device))
    if not torch.cuda.is_available():
        return None
    return sum(available_memory(torch.device("cuda", number)) for number in range(torch.cuda.device_count()))


def _teacher_bytes(inputs: CaptureInputs) -> dict[str, int]:
    """What transformers will take for sure; activations come on top."""
    settings = inputs.settings
    config = load_config(settings.model, trust_remote_code=settings.trust_remote_code)
    size = torch.empty(0, dtype=getattr(torch, inputs.dtype)).element_size()
    parts = {"logits": 4 * settings.hf.head_rows * inputs.head_size}
    if settings.hf.head_dtype == "float32" and size < 4:
        parts["head in float32"] = 4 * inputs.head_size * int(config.get_text_config().hidden_size)
    count = _parameters(config, settings.trust_remote_code)
    return parts if count is None else {"weights": count * size, **parts}


def _parameters(config: Any, trust_remote_code: bool) -> int | None:
    """How many weights a model has, by making it without memory; None for one that can't be made so."""
    from transformers import AutoModelForCausalLM

    if getattr(config, "quantization_config", None) is not None:
        return None
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, NotImplementedError):
        return None
    return sum(int(parameter.numel()) for parameter in model.parameters())


def _disk_problems(result: Forecast) -> list[str]:
    """Say that the capture does not fit on the disk, and what would."""
    chosen, free = result.chosen, result.free_bytes
    if chosen.fits is not False or free is None:
        return []
    remedies = []
    # A capture that was begun goes on with its own settings only.
    if result.text.sampled_rows:
        others = [
            f"{codec.name} ({codec.bytes_per_token} bytes a token, {human_bytes(codec.left_bytes.value)})"
            for codec in result.codecs
            if codec.fits
        ]
        remedies += [f"a smaller codec: {', '.join(others)}"] if others else []
        rows = int(result.text.rows * max(free - result.reserved_bytes, 0) / chosen.left_bytes.value)
        remedies += [f"--samples {rows} or fewer"] if rows else []
    before = f", and captures before this one take {human_bytes(result.reserved_bytes)} of them"
    return [
        f"{result.output}: {chosen.name} takes {human_bytes(chosen.left_bytes.value)} for "
        f"{result.text.left_tokens.value:,} tokens, but only {human_bytes(free)} are free there"
        f"{before if result.reserved_bytes else ''}. Try: {'; '.join([*remedies, 'an output with more free space'])}"
    ]


def _memory_problems(result: Forecast) -> list[str]:
    """Say that the teacher does not fit in memory, and what would."""
    memory = result.memory
    if memory.fits is not False or memory.free_bytes is None:
        return []
    parts = ", ".join(f"{name} {human_bytes(count)}" for name, count in memory.teacher.items())
    remedies = (
        "a smaller --dtype, fewer --head-rows, --device balanced over several GPUs, --engine vllm with "
        "--tensor-parallel-size, or a smaller teacher"
    )
    return [
        f"{result.model}: the teacher takes at least {human_bytes(memory.least)} ({parts}), but {memory.device} has "
        f"only {human_bytes(memory.free_bytes)} free. Try: {remedies}"
    ]

"""Estimates what a capture will cost: tokens from a sample of rows, disk space by codec, time and memory.

Shape legend: R rows (positions), k ids per row, V width of the logits.
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

from distillkit.capture.forecasting.totals import Amount, TextForecast, read_totals
from distillkit.capture.forecasting.trial import Trial, try_teacher
from distillkit.capture.inputs import CaptureInputs, stored_bytes_per_token
from distillkit.capture.kept_rows import BYTES_A_VALUE as KEPT_BYTES_A_VALUE
from distillkit.capture.pipeline import BYTES_A_VALUE, queue_bytes
from distillkit.capture.settings import DEFAULT_PRESET, CaptureSettings
from distillkit.capture.shard_plan import PRIOR_RECEIPT
from distillkit.capture.teachers.hf import load_config
from distillkit.codec import PRESETS, Codec, CodecConfig, Prior, SampledConfig, preset
from distillkit.console import duration, human_bytes, number_of
from distillkit.errors import ConfigError, DistillKitError
from distillkit.memory import available_memory, peak_memory
from distillkit.shards.lock import CAPTURE_FOLDER
from distillkit.shards.storage import Folder
from distillkit.shards.writer import encode_rows
from distillkit.types import Facts, Shown, SparseLogprobs, TokenDocument

__all__ = ["CodecForecast", "Forecast", "MemoryForecast", "SpeedForecast", "compared_codecs", "forecast_captures"]

logger = logging.getLogger(__name__)

COMPARED_K = (32, 64, 128, 256)
_COMPARED_DRAWS = (12, 25, 50, 100)
_PLAN_BYTES = 4
"""Bytes per token that the plan takes until the dataset is complete, since it also stores the ids."""
_DUPLICATE_BYTES = 120
"""Bytes of memory per document for finding duplicates."""


@dataclass(frozen=True)
class CodecForecast:
    """Disk space that a codec would take, and how much it would keep of this text's distributions.

    Attributes:
        name: name of a preset, or of the chosen configuration, possibly with another k.
        chosen: whether the settings choose this codec.
        k, bytes_per_token: ids and bytes per row; of the compact format, at most so many ids, and about so many bytes.
        estimated: whether the bytes are an estimate (`distillkit.codec.presets.expected_bytes`).
        left_bytes: disk space for what is left to capture, including the plan.
        kept_bytes: disk space, beside that, of the distributions that a prior is learned from, until their shards are
            complete.
        fits: whether both fit on the disk; None if the free space is unknown.
        positions: number of positions that the figures below were measured on; 0 if they were not measured.
        mass_mean: mean total probability of a row's stored ids.
        kl_mean, kl_p99: KL(teacher ‖ decoded) over K ∪ {R} in nats per row.
        note: why the figures were not measured.
    """

    name: str
    chosen: bool
    k: int
    bytes_per_token: int
    estimated: bool
    left_bytes: Amount
    kept_bytes: int
    fits: bool | None
    positions: int = 0
    mass_mean: float | None = None
    kl_mean: float | None = None
    kl_p99: float | None = None
    note: str = ""


@dataclass(frozen=True)
class SpeedForecast:
    """Time that the capture will take, measured in a short run of the teacher on this machine.

    Attributes:
        tokens, seconds: tokens and duration of the short run.
        load_seconds: time to load the teacher.
        teacher: tokens per second of the teacher alone.
        encoder: tokens per second of the encoder thread alone; None if there was nothing to encode.
        workers: number of processes that share the work; None: depends on the cluster.
        tokens_per_second: throughput of one process, teacher and encoder together.
        left_seconds: time for what is left to capture, with all workers; with one worker if their number is unknown.
            Learning a prior is included.
        finish: when a capture started now would finish, in ISO 8601.
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
class LearningForecast:
    """What it takes to learn the chosen codec's prior, before the first shard is written.

    Attributes:
        rows: from how many distributions it is learned, about. The teacher scores them once, like all others.
        seconds: about how long that takes on this machine once they are scored; None without a short run.
    """

    rows: int
    seconds: float | None = None


@dataclass(frozen=True)
class MemoryForecast:
    """Memory that the capture will take.

    Attributes:
        device: where the teacher runs: "cpu", "cuda:0", …, or "server".
        teacher: bytes by purpose (weights, logits, …), as far as they are known without loading the teacher.
        free_bytes: free memory of the device; None if the engine manages it or it is not on this machine.
        queue_bytes: maximum size of the distributions waiting for the encoder, in main memory.
        duplicates_bytes: size of the hashes kept to find duplicates, in main memory.
        peak_rss_bytes, peak_cuda_bytes: peak memory of this process after the short run; None without a run.
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
        """The least memory that the teacher needs."""
        return sum(self.teacher.values())

    @property
    def fits(self) -> bool | None:
        """Whether that much memory is free; None if unknown."""
        return None if self.free_bytes is None or not self.teacher else self.least <= self.free_bytes


@dataclass(frozen=True, repr=False)
class Forecast(Shown):
    """The forecast of a capture.

    Attributes:
        model, dataset, output: from the settings.
        text, codecs, memory: the partial forecasts.
        left_out: codecs that are not possible here, with the reason.
        free_bytes: free space on the output's disk; None if unknown.
        reserved_bytes: the part of it that earlier captures in the same forecast will take.
        speed: None without a short run.
        learning: None if the chosen codec has no prior to be learned.
        problems: why the capture cannot run with these settings, and what to change; empty if it can.
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
    learning: LearningForecast | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def chosen(self) -> CodecForecast:
        """The codec that the settings choose."""
        return next(codec for codec in self.codecs if codec.chosen)

    def facts(self) -> Facts:
        tokens = self.text.left_tokens
        about = "" if tokens.exact else "about "
        rows = [("tokens", f"{about}{tokens.value:,} in {about}{self.text.documents.value:,} documents")]
        for codec in self.codecs:
            known = "" if codec.mass_mean is None else f", {codec.mass_mean:.2%} of the mass"
            known += "" if codec.kl_mean is None else f", KL {codec.kl_mean:.1e} nats"
            fits = "" if codec.fits is not False else ", DOES NOT FIT"
            ids = "" if codec.name.endswith(f"k = {codec.k}") else f", k = {codec.k}"
            label = f"{'→ ' if codec.chosen else ''}{codec.name}{ids}"
            rows.append((label, f"{human_bytes(codec.left_bytes.value)}{known}{fits}"))
        if self.learning is not None:
            rows.append(("prior", f"learned from {number_of(self.learning.rows, 'distribution')}"))
        if self.memory.teacher:
            rows.append(("memory", f"{human_bytes(self.memory.least)} on {self.memory.device}"))
        if self.speed is not None:
            speed, left = self.speed.tokens_per_second, self.speed.left_seconds.value
            rows.append(("time", f"{duration(left)} at {speed:,.0f} tokens per second"))
        rows += [("problem", problem) for problem in self.problems]
        return f"forecast: {self.output}", rows

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-able mapping."""
        return {**asdict(self), "fits": not self.problems}


def forecast_captures(
    captures: Sequence[CaptureSettings],
    *,
    seconds: float = 10.0,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> list[Forecast]:
    """Estimate what captures that are run one after the other will cost, without writing anything.

    Args:
        captures: the settings of each capture.
        seconds: how long to run each teacher; 0: not at all.
        progress: called with the seconds that a teacher has run, and the seconds it will run in total.

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
    rows = _rows_to_learn_from(settings, folder, text)
    result = Forecast(
        settings.model,
        settings.dataset,
        str(folder),
        text,
        [_sized(inputs, name, Codec(config), text, rows, room) for name, config in configs.items()],
        left_out,
        _memory(inputs, text, request.k),
        free,
        reserved,
        learning=LearningForecast(rows) if rows and inputs.sampled_rows else None,
    )
    problems = [*_disk_problems(result), *_memory_problems(result)]
    # A teacher that does not fit could bring down the machine.
    if seconds and documents and result.memory.fits is not False:
        try:
            result = _with_run(result, inputs, configs, documents, seconds, progress)
        except (DistillKitError, MemoryError, torch.OutOfMemoryError) as error:
            problems.append(f"{settings.model}: the teacher could not be run: {error}")
    return replace(result, problems=problems)


def _disk(folder: Folder) -> int | None:
    """The device number of the disk that a local folder is or will be on."""
    path = folder.local_path
    if path is None:
        return None
    while not path.exists():
        path = path.parent
    return os.stat(path).st_dev


# -- codecs ------------------------------------------------------------------------------------------------------------


def compared_codecs(inputs: CaptureInputs) -> tuple[dict[str, CodecConfig], dict[str, str]]:
    """Return the chosen configuration, the presets and the chosen layout with other k, by name; and why some are
    left out."""
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
    if isinstance(chosen.config, SampledConfig):
        for draws in _COMPARED_DRAWS:
            makers[f"{name}, {draws} draws"] = lambda draws=draws: SampledConfig(**{**fields, "draws": draws})  # type: ignore[misc]
    for k in COMPARED_K if chosen.draws is None else ():
        makers[f"{name}, k = {k}"] = lambda k=k: type(chosen.config)(**{**fields, "k": k})  # type: ignore[misc]
    configs: dict[str, CodecConfig] = {name: chosen.config}
    left_out: dict[str, str] = {}
    for other, make in makers.items():
        try:
            config = make()
            settings.token_ids(inputs.tokenizer, config.k)
            if isinstance(config, SampledConfig):
                settings.check_draws()
        except ConfigError as error:
            left_out[other] = str(error)
            continue
        if config not in configs.values():
            configs[other] = config
    return configs, left_out


def _rows_to_learn_from(settings: CaptureSettings, folder: Folder, text: TextForecast) -> int:
    """From about how many distributions a compact codec's prior would now be learned."""
    learned = folder.inner(CAPTURE_FOLDER).size(PRIOR_RECEIPT) is not None
    if settings.prior is not None or learned or not text.left_tokens.value:
        return 0
    return min(settings.prior_rows, text.tokens.value)


def _sized(
    inputs: CaptureInputs, name: str, codec: Codec, text: TextForecast, rows: int, room: int | None
) -> CodecForecast:
    """The disk space of a codec, whose prior is learned from so many rows if it has one."""
    settings, plan = inputs.settings, _PLAN_BYTES if text.sampled_rows else 0
    kept = 0 if codec.is_fixed else rows * inputs.sample_k(codec.k) * KEPT_BYTES_A_VALUE
    left = text.left_tokens.times(stored_bytes_per_token(codec, settings) + plan)
    return CodecForecast(
        name=name,
        chosen=codec == settings.codec(codec.vocab_size),
        k=codec.k,
        bytes_per_token=codec.expected_bytes_per_token,
        estimated=not codec.is_fixed,
        left_bytes=left,
        kept_bytes=kept,
        fits=None if room is None else left.value + kept <= room,
    )


def _with_figures(
    codec: CodecForecast, config: CodecConfig, scored: Sequence[SparseLogprobs]
) -> tuple[CodecForecast, float]:
    """Add the fidelity measured on some distributions to a codec; also return the seconds that encoding them took."""
    if not scored:
        return codec, 0.0
    if scored[0].draws is None and scored[0].k < config.k:
        return replace(codec, note=f"this engine was started for {scored[0].k} ids per row"), 0.0
    drawn = scored[0].draws
    if drawn != Codec(config).draws:
        kinds = ("most probable ids", "draws")
        found, needed = kinds if drawn is None else reversed(kinds)
        return replace(codec, note=f"not measured: this run has the teacher's {found}, not {needed}"), 0.0
    # Of the compact format, the built-in prior tells how faithful values are, though not how many bytes they take.
    encoder, mass, took = Codec(config), 0.0, 0.0
    stats = []
    for rows in scored:
        kept = SparseLogprobs(
            np.ascontiguousarray(rows.ids[:, : config.k]), np.ascontiguousarray(rows.logprobs[:, : config.k]), drawn
        )
        clock = time.perf_counter()
        _, stored, fidelity = encode_rows(encoder, kept)
        took += time.perf_counter() - clock
        stats.append(fidelity)
        mass += float(np.exp(np.asarray(stored.logprobs, dtype=np.float64)).sum())
    if drawn is not None:
        return replace(codec, note="draws are stored as they are"), took
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
    """Run the teacher for some seconds, and add the measured speed, fidelity and memory."""
    settings, request = inputs.settings, inputs.request
    if settings.engine == "hf":
        # One run for all codecs, whose rows are cut to smaller k; ids kept whatever their rank would displace others.
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
    learning = result.learning
    if learning is not None and run.scored:
        learning = _timed_learning(learning, inputs, run.scored)
    speed = _speed(inputs, result.text, run, encoder, load_seconds, (learning and learning.seconds) or 0.0)
    memory = replace(result.memory, peak_rss_bytes=peak["peak_rss_bytes"], peak_cuda_bytes=peak["peak_cuda_bytes"])
    return replace(result, codecs=codecs, speed=speed, memory=memory, learning=learning)


def _timed_learning(
    learning: LearningForecast, inputs: CaptureInputs, scored: Sequence[SparseLogprobs]
) -> LearningForecast:
    """Add how long learning takes, from the time that it takes with the rows of the short run."""
    k = inputs.sample_k(inputs.codec.k)
    ids, logprobs = (np.concatenate([getattr(rows, name)[:, :k] for rows in scored]) for name in ("ids", "logprobs"))
    clock = time.perf_counter()
    Prior.learn(inputs.codec.config, SparseLogprobs(ids, logprobs, scored[0].draws))
    return replace(learning, seconds=(time.perf_counter() - clock) * learning.rows / len(ids))


def _speed(
    inputs: CaptureInputs, text: TextForecast, run: Trial, encoder: float, load_seconds: float, learn_seconds: float
) -> SpeedForecast:
    settings, teacher = inputs.settings, run.tokens / run.seconds
    # On a CPU both share the cores; with an accelerator they run in parallel.
    both = 1 / (1 / teacher + 1 / encoder) if inputs.device == "cpu" else min(teacher, encoder)
    workers = settings.num_workers if settings.workers == "ray" else 1
    left = text.left_tokens.times(1 / (both * (workers or 1))).plus(math.ceil(learn_seconds))
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


# -- memory and disk space ---------------------------------------------------------------------------------------------


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
    """Bytes currently free on the teacher's devices."""
    if device == "cpu" or device.startswith("cuda"):
        return available_memory(torch.device(device))
    if not torch.cuda.is_available():
        return None
    return sum(available_memory(torch.device("cuda", number)) for number in range(torch.cuda.device_count()))


def _teacher_bytes(inputs: CaptureInputs) -> dict[str, int]:
    """The memory that transformers is certain to need, by purpose; activations are not included."""
    settings = inputs.settings
    config = load_config(settings.model, trust_remote_code=settings.trust_remote_code)
    size = torch.empty(0, dtype=getattr(torch, inputs.dtype)).element_size()
    parts = {"logits": 4 * settings.hf.head_rows * inputs.head_size}
    if settings.hf.head_dtype == "float32" and size < 4:
        parts["head in float32"] = 4 * inputs.head_size * int(config.get_text_config().hidden_size)
    count = _parameters(config, settings.trust_remote_code)
    return parts if count is None else {"weights": count * size, **parts}


def _parameters(config: Any, trust_remote_code: bool) -> int | None:
    """Number of a model's parameters, counted without allocating them; None if that is not possible."""
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
    """Describe why the capture does not fit on the disk, and what would fit."""
    chosen, free = result.chosen, result.free_bytes
    if chosen.fits is not False or free is None:
        return []
    remedies = []
    # An interrupted capture can only be resumed with its own settings.
    if result.text.sampled_rows:
        others = [
            f"{codec.name} ({codec.bytes_per_token} bytes per token, "
            f"{human_bytes(codec.left_bytes.value + codec.kept_bytes)})"
            for codec in result.codecs
            if codec.fits
        ]
        remedies += [f"a smaller codec: {', '.join(others)}"] if others else []
        room = max(free - result.reserved_bytes - chosen.kept_bytes, 0)
        rows = int(result.text.rows * room / chosen.left_bytes.value)
        remedies += [f"--samples {rows} or fewer"] if rows else []
    kept = f" and {human_bytes(chosen.kept_bytes)} for what its prior is learned from" if chosen.kept_bytes else ""
    before = f", and captures before this one take {human_bytes(result.reserved_bytes)} of them"
    return [
        f"{result.output}: {chosen.name} takes {human_bytes(chosen.left_bytes.value)} for "
        f"{result.text.left_tokens.value:,} tokens{kept}, but only {human_bytes(free)} are free there"
        f"{before if result.reserved_bytes else ''}. Try: {'; '.join([*remedies, 'an output with more free space'])}"
    ]


def _memory_problems(result: Forecast) -> list[str]:
    """Describe why the teacher does not fit in memory, and what would fit."""
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

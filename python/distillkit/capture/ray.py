"""Distributes shards over a Ray cluster: one actor per worker, each with its own engine, writing from its own node.

The plan decides which documents are in which shard, so the dataset is the same for any number of workers; if a worker
is lost, another repeats its shards.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from distillkit.capture.inputs import sampled_tokens
from distillkit.capture.pipeline import StageTimes, capture_shards
from distillkit.capture.progress import CaptureProgress
from distillkit.capture.settings import CaptureSettings
from distillkit.capture.shard_plan import ShardPlan, read_plan
from distillkit.errors import CaptureError, ConfigError, DistillKitError
from distillkit.shards.storage import Folder

__all__ = ["capture_with_ray"]

logger = logging.getLogger(__name__)


def capture_with_ray(
    settings: CaptureSettings,
    plan: ShardPlan,
    numbers: Sequence[int],
    progress: CaptureProgress,
    *,
    sample: bool = False,
) -> StageTimes:
    """Capture some shards of a plan on the Ray cluster that this process is connected to, or on one that it starts.

    Args:
        settings: `num_workers`, `worker_gpus` and `worker_cpus` say how many actors, and what each takes.
        plan: the plan, in a folder that all nodes can reach.
        numbers: which shards.
        progress: updated with each completed shard.
        sample: only score the documents of these shards that the prior is learned from, and keep their rows.

    Returns:
        The sums of the workers' times, except for `wall`.

    Raises:
        ConfigError: no node has enough GPUs for a worker.
        CaptureError: as `capture_shards`, in any worker.
    """
    import ray
    import ray.exceptions

    if not ray.is_initialized():
        # Connects to RAY_ADDRESS or to a cluster running on this node; otherwise starts one for this process.
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    count = min(_worker_count(settings, ray.nodes()), len(numbers))
    logger.info("%d Ray workers on %d nodes", count, len([node for node in ray.nodes() if node["Alive"]]))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    tasks = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
    results = tasks.map_batches(
        _ShardWorker,
        fn_constructor_args=(settings, sample),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=settings.worker_cpus,
        num_gpus=_gpus(settings, ray.cluster_resources()),
    )
    times = StageTimes()
    try:
        for result in results.iter_rows():
            number, problem = int(result.pop("number")), result.pop("problem")
            if problem:
                raise CaptureError(f"a worker stopped: {problem}")
            for name, value in result.items():
                setattr(times, name, getattr(times, name) + value)
            progress.scored(sampled_tokens(plan, number) if sample else plan.shards[number].tokens, 0, 0)
            progress.finished_shard()
    except ray.exceptions.RayError as error:
        raise CaptureError(f"the Ray workers stopped: {error}") from error
    return times


def _worker_count(settings: CaptureSettings, nodes: Sequence[Mapping[str, Any]]) -> int:
    """Number of workers: `num_workers` if set, else as many as the cluster's GPUs allow, or one per node without GPUs.

    Raises:
        ConfigError: no node has enough GPUs for a worker.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = [int(node.get("GPU", 0)) for node in resources]
    each = settings.gpus_per_worker
    fitting = sum(count // each for count in gpus) if any(gpus) else len(resources)
    if fitting == 0:
        raise ConfigError(f"workers: a worker needs {each} GPUs on one node, but the nodes have {gpus}")
    return settings.num_workers or fitting


def _gpus(settings: CaptureSettings, cluster: Mapping[str, float]) -> int:
    return settings.gpus_per_worker if cluster.get("GPU") else 0


class _ShardWorker:
    """Runs in an actor; loads its engine with the first shard."""

    def __init__(self, settings: CaptureSettings, sample: bool) -> None:
        self._settings, self._sample = settings, sample
        self._capture: Callable[[int], StageTimes] | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Capture a shard. Expected errors are returned as text, so that they are reported without Ray's traceback."""
        (number,) = batch["number"].tolist()
        times, problem = StageTimes(), ""
        try:
            if self._capture is None:
                self._capture = self._load()
            times = self._capture(number)
        except (DistillKitError, OSError) as error:
            problem = str(error)
        return {"number": [number], "problem": [problem], **{name: [value] for name, value in vars(times).items()}}

    def _load(self) -> Callable[[int], StageTimes]:
        """Load the plan and the engine."""
        from distillkit.capture.inputs import CaptureInputs
        from distillkit.capture.learning import score_sample, with_learned_prior

        settings = self._settings
        planned = read_plan(Folder(settings.output))
        if planned is None:
            raise CaptureError(
                f"{settings.output}: this node cannot see the plan of the capture: the output must be storage that "
                "all nodes can reach, such as s3:// or a shared folder"
            )
        inputs = CaptureInputs.load(settings)
        teacher = inputs.teacher()
        request, skip_bad = inputs.request, settings.skip_bad_documents
        if self._sample:
            own = inputs.complete_header(planned, teacher, {})
            return lambda number: score_sample(teacher, planned, number, own, request, skip_bad=skip_bad)
        plan = with_learned_prior(planned)
        if plan is None:
            raise CaptureError(f"{settings.output}: its prior was removed; run the command again")
        header = inputs.complete_header(plan, teacher, plan.receipts(trusted=range(len(plan.shards))))

        def capture(number: int) -> StageTimes:
            # A lost worker may have completed its last shard.
            if plan.is_done(number):
                return StageTimes()
            return capture_shards(teacher, plan, header, [number], request, skip_bad=skip_bad)

        return capture

"""Fidelity of the codec on given rows, compared with the published encoder and with the limits of the layouts.

A row's original log-probabilities, in descending order, are compared with those decoded from its bytes. All bytes are
decoded by the same decoder, `Codec.decode`. The published encoder and the limits need torch, our own figures do not.

Shape legend: N rows, k stored ids per row, n approximated ranks, m terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from distillkit.bench.sample import Sample
from distillkit.codec import Codec, DistributionQuantizationConfig
from distillkit.codec.config import FixedConfig
from distillkit.codec.fidelity import kl_rows
from distillkit.errors import CorruptDataError, DistillKitError

if TYPE_CHECKING:
    import torch

    from distillkit.bench.published import PublishedCodec

__all__ = [
    "FidelityRow",
    "Figures",
    "PublishedSpread",
    "compare",
    "figures",
    "least_squares",
    "measure_fidelity",
    "optimum",
    "orthonormal_terms",
]

F64 = npt.NDArray[np.float64]

LIKELY = 1e-6
"""Ids with a probability above this count in `worst_likely`."""
_CHUNK = 4096
_ORDERS = 50
"""Number of orders of the ranks over which the published encoder's spread is measured."""
_HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-24}
"""Half a unit in the last place, relative. Decoded values are at most float32."""


@dataclass(frozen=True)
class Figures:
    """Statistics of decoded against original log-probabilities.

    Attributes:
        kl_mean, kl_p99, kl_max: KL(original ‖ decoded) of a row over K ∪ {R} in nats: the stored ids, and all others
            together as one more outcome.
        mass_error: mean |Σ p̂ − Σ p| over the stored ids.
        mass_above_one: fraction of rows whose decoded probabilities sum to more than 1 + 1e-6.
        top1_agreement: fraction of rows whose most probable id is still the most probable after decoding.
        worst_error: largest |log p̂ − log p|, nats.
        worst_likely: the same over ids with p > 1e-6.
        increasing: fraction of rows where a decoded value is more than 1e-6 above the one before it.
    """

    kl_mean: float
    kl_p99: float
    kl_max: float
    mass_error: float
    mass_above_one: float
    top1_agreement: float
    worst_error: float
    worst_likely: float
    increasing: float


def figures(original: npt.NDArray[Any], decoded: npt.NDArray[Any]) -> Figures:
    """Statistics of (N, k) decoded against original log-probabilities, which are descending; both are −inf at places
    without an id, if rows may have fewer."""
    before, after = original.astype(np.float64), decoded.astype(np.float64)
    kl_N, mass_N = kl_rows(before, after), np.exp(after).sum(-1)
    with np.errstate(invalid="ignore"):
        errors = np.where(before > -np.inf, np.abs(after - before), 0.0)
        rising = np.diff(after, axis=-1) > 1e-6
    return Figures(
        kl_mean=float(kl_N.mean()),
        kl_p99=float(np.quantile(kl_N, 0.99)),
        kl_max=float(kl_N.max()),
        mass_error=float(np.abs(mass_N - np.exp(before).sum(-1)).mean()),
        mass_above_one=float((mass_N > 1 + 1e-6).mean()),
        top1_agreement=float((after.argmax(-1) == before.argmax(-1)).mean()),
        worst_error=float(errors.max()),
        worst_likely=float(errors[before > np.log(LIKELY)].max(initial=0.0)),
        increasing=float(rising.any(-1).mean()),
    )


# -- limits of a layout ------------------------------------------------------------------------------------------------


def orthonormal_terms(config: FixedConfig) -> F64:
    """(n, m') orthonormal columns that span the terms."""
    from distillkit.bench.published import term_matrix

    terms_mn = term_matrix(config).numpy()
    scaled = terms_mn.T / np.linalg.norm(terms_mn, axis=1)
    u, singular, _ = np.linalg.svd(scaled, full_matrices=False)
    return np.ascontiguousarray(u[:, singular > 1e-12 * singular[0]])


def least_squares(config: FixedConfig, original: npt.NDArray[Any]) -> F64:
    """Approximates rows by an unweighted least-squares fit in float64; exact ranks stay unchanged.

    Args:
        original: (N, k) log-probabilities, descending.

    Returns:
        (N, k), without any rounding.
    """
    basis, values = orthonormal_terms(config), original.astype(np.float64)
    rest = values[:, config.exact_k :]
    return np.concatenate([values[:, : config.exact_k], rest @ basis @ basis.T], axis=-1)


def optimum(config: FixedConfig, original: npt.NDArray[Any]) -> F64:
    """Approximates rows with the least KL that the terms allow, in float64 without rounding or bounds; exact ranks stay
    unchanged.

    Minimises Σ exp(ŷ) − p·ŷ over the approximated ranks, which is convex in the coefficients, by Newton's method. If
    the terms include a constant, the minimum preserves the mass, and also minimises the KL over K ∪ {R}.

    Args:
        original: (N, k) log-probabilities, descending.

    Returns:
        (N, k).
    """
    basis, result = orthonormal_terms(config), original.astype(np.float64)
    for start in range(0, len(result), _CHUNK):
        rest = result[start : start + _CHUNK, config.exact_k :]
        rest[:] = _minimise(basis, rest, np.exp(result[start : start + _CHUNK]).sum(-1))
    return result


def _minimise(basis_nm: F64, values_Nn: F64, mass_N: F64) -> F64:
    """`optimum` for the approximated ranks only; `mass_N` is the mass of the full rows, over which KL is measured."""
    p_Nn = np.exp(values_Nn)
    x_Nm = _best_start(basis_nm, values_Nn, p_Nn)
    active = np.arange(len(x_Nm))
    for _ in range(200):
        x, p = x_Nm[active], p_Nn[active]
        fitted = np.exp(_bounded(x @ basis_nm.T))
        gradient = (fitted - p) @ basis_nm
        step = _solve(basis_nm, fitted, gradient)
        gain = (gradient * step).sum(-1)
        going = gain > 1e-9 * mass_N[active]
        active = active[going]
        if not len(active):
            break
        x_Nm[active] = _line_search(basis_nm, x[going], p[going], step[going])
    return np.asarray(x_Nm @ basis_nm.T)


def _bounded(values: F64) -> F64:
    """Keeps exp finite. No log-probability comes near the bound, and the line search rejects steps that do."""
    return np.minimum(values, 50.0)


def _objective(basis_nm: F64, x_Nm: F64, p_Nn: F64) -> F64:
    values = x_Nm @ basis_nm.T
    return np.asarray((np.exp(_bounded(values)) - p_Nn * values).sum(-1))


def _best_start(basis_nm: F64, values_Nn: F64, p_Nn: F64) -> F64:
    """Coefficients of the fit weighted by p, √p or 1, whichever has the lowest objective for each row."""
    best, least = np.zeros((len(values_Nn), basis_nm.shape[1])), np.full(len(values_Nn), np.inf)
    for weights in (p_Nn, np.sqrt(p_Nn), np.ones_like(p_Nn)):
        x = _solve(basis_nm, weights, (weights * values_Nn) @ basis_nm)
        found = _objective(basis_nm, x, p_Nn)
        better = found < least
        best[better], least[better] = x[better], found[better]
    return best


def _solve(basis_nm: F64, weights_Nn: F64, right_Nm: F64) -> F64:
    """Solves (Bᵀ diag(w) B + εI) x = r for each row, where ε, tiny relative to the trace, keeps the matrix regular."""
    size = basis_nm.shape[1]
    pairs = (basis_nm[:, :, None] * basis_nm[:, None, :]).reshape(len(basis_nm), size * size)
    matrix = (weights_Nn @ pairs).reshape(-1, size, size)
    ridge = 1e-13 * np.trace(matrix, axis1=1, axis2=2) + 1e-300
    matrix += ridge[:, None, None] * np.eye(size)
    return np.asarray(np.linalg.solve(matrix, right_Nm[:, :, None])[:, :, 0])


def _line_search(basis_nm: F64, x_Nm: F64, p_Nn: F64, step_Nm: F64) -> F64:
    """x − step, with the step halved per row until the objective does not increase."""
    before, result = _objective(basis_nm, x_Nm, p_Nn), x_Nm.copy()
    waiting, length = np.arange(len(x_Nm)), 1.0
    for _ in range(40):
        tried = x_Nm[waiting] - length * step_Nm[waiting]
        fell = _objective(basis_nm, tried, p_Nn[waiting]) <= before[waiting]
        result[waiting[fell]] = tried[fell]
        waiting, length = waiting[~fell], length / 2
        if not len(waiting):
            break
    return result


# -- the table ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublishedSpread:
    """Mean KL of the published encoder under settings that are equivalent in exact arithmetic.

    They differ by rounding errors if float32 does not resolve the terms (see `is_resolved`).

    Attributes:
        one_thread, all_threads: with one torch thread, and with torch's default number of threads.
        threads: that default number.
        orders: number of orders of the ranks that were tried, with one thread.
        least, most: minimum and maximum over all these settings.
        normalized: for the same configuration with `normalize_t`, whose terms float32 does resolve; None if the format
            has no such field, or if it does not help.
    """

    one_thread: float
    all_threads: float
    threads: int
    orders: int
    least: float
    most: float
    normalized: float | None


@dataclass(frozen=True)
class FidelityRow:
    """The results for one configuration.

    Attributes:
        config: its name.
        bytes_per_token: size of a row, the same for both encoders; a mean in the compact format.
        rows: number of rows compared.
        ours: our encoder.
        published: the published encoder, with one thread; None if it fails.
        published_spread: spread of its mean KL; None if float32 resolves the terms.
        least_squares, optimum: limits of the layout (see the functions); None if they are meaningless because of delta
            encoding, residual bins, or no approximated ranks; the optimum also if no term is constant.
        note: why a result is missing, or why the configuration was skipped.
        skipped: whether the configuration was skipped.
    """

    config: str
    bytes_per_token: float
    rows: int = 0
    ours: Figures | None = None
    published: Figures | None = None
    least_squares: Figures | None = None
    optimum: Figures | None = None
    published_spread: PublishedSpread | None = None
    note: str = ""
    skipped: bool = False

    @property
    def over_optimum(self) -> float | None:
        """Our mean KL relative to the least possible one."""
        return None if self.ours is None or self.optimum is None else self.ours.kl_mean / self.optimum.kl_mean

    def to_dict(self) -> dict[str, Any]:
        """All fields and derived values, JSON-serialisable."""
        return {**asdict(self), "over_optimum": self.over_optimum}


def measure_fidelity(
    sample: Sample,
    configs: Mapping[str, FixedConfig],
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    ours_only: bool = False,
) -> Iterator[FidelityRow]:
    """Yields one table row per configuration.

    Configurations that store more ids than the sample has are skipped, with the reason. With `ours_only`, there are
    neither the published encoder's figures nor the limits, and torch is not needed.

    Raises:
        DistillKitError: the published decoder reads other values from our bytes, which is a bug.
    """
    for done, (name, config) in enumerate(configs.items()):
        progress(done, len(configs))
        yield compare(name, config, sample, ours_only=ours_only)
    progress(len(configs), len(configs))


def compare(name: str, config: FixedConfig, sample: Sample, *, ours_only: bool = False) -> FidelityRow:
    """Compares one configuration on the first k ids of the sample's rows; `ours_only` as in `measure_fidelity`."""
    codec = Codec(config)
    if config.k > sample.k or config.k > codec.vocab_size:
        note = f"stores {config.k} ids per row, but the sample has {sample.k}"
        return FidelityRow(name, codec.bytes_per_token, note=note, skipped=True)
    ids, original = sample.top(config.k, codec.vocab_size)
    data = codec.encode(ids, original)
    decoded_ids, decoded = codec.decode(data)
    if not np.array_equal(decoded_ids, ids):
        raise DistillKitError(f"{name}: the decoded ids are not those that were encoded; this is a bug")
    ours = figures(original, decoded)
    if ours_only:
        return FidelityRow(name, codec.bytes_per_token, rows=len(ids), ours=ours)
    from distillkit.bench.published import published_codec

    _check_readable(name, codec, published_codec(config), data, decoded)
    published, spread, note = _published(codec, ids, original)
    limited = _has_limits(config)
    return FidelityRow(
        name,
        codec.bytes_per_token,
        rows=len(ids),
        ours=ours,
        published=published,
        least_squares=figures(original, least_squares(config, original)) if limited else None,
        optimum=figures(original, optimum(config, original)) if limited and _has_constant(config) else None,
        published_spread=spread,
        note=note,
    )


def _published(
    codec: Codec, ids: npt.NDArray[np.int64], original: npt.NDArray[np.float32]
) -> tuple[Figures | None, PublishedSpread | None, str]:
    """Statistics of the published encoder and their spread, or the reason why it failed."""
    from distillkit.bench.published import is_resolved

    try:
        with _threads(1):
            found = _published_figures(codec, ids, original)
        spread = None if is_resolved(codec.fixed_config) else _published_spread(codec, ids, original, found.kl_mean)
        return found, spread, ""
    except CorruptDataError as error:
        return None, None, f"published encoder: {error}"


def _published_figures(
    codec: Codec,
    ids: npt.NDArray[np.int64],
    original: npt.NDArray[np.float32],
    order_n: torch.Tensor | None = None,
) -> Figures:
    import torch

    from distillkit.bench.published import published_codec

    data = published_codec(codec.fixed_config, order_n).encode(torch.from_numpy(ids), torch.from_numpy(original))
    return figures(original, codec.decode(data.numpy())[1])


def _published_spread(
    codec: Codec, ids: npt.NDArray[np.int64], original: npt.NDArray[np.float32], one_thread: float
) -> PublishedSpread:
    import torch

    from distillkit.bench.published import is_resolved

    config, threads = codec.fixed_config, torch.get_num_threads()
    all_threads = _published_figures(codec, ids, original).kl_mean
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(config.k - config.exact_k, generator=generator) for _ in range(_ORDERS)]
    with _threads(1):
        losses = [_published_figures(codec, ids, original, order_n).kl_mean for order_n in orders]
        normalized = None
        if isinstance(config, DistributionQuantizationConfig):
            better = config.model_copy(update={"normalize_t": True})
            if is_resolved(better):
                normalized = _published_figures(Codec(better), ids, original).kl_mean
    losses += [one_thread, all_threads]
    return PublishedSpread(one_thread, all_threads, threads, _ORDERS, min(losses), max(losses), normalized)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Limits torch to `count` threads within the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_readable(
    name: str, codec: Codec, baseline: PublishedCodec, data: npt.NDArray[np.uint8], decoded: npt.NDArray[np.float32]
) -> None:
    """Checks that the published decoder reads our bytes as `decoded`, up to its own rounding."""
    import torch

    ids, values = baseline.decode(torch.from_numpy(data))
    if not np.array_equal(ids.numpy(), codec.decode(data)[0]):
        raise DistillKitError(f"{name}: the published decoder reads other ids from our bytes; this is a bug")
    difference = np.abs(values.numpy().astype(np.float64) - decoded)
    excess = difference - published_tolerance(codec.fixed_config, decoded)
    if not (excess <= 0).all():
        row, rank = np.unravel_index(int(np.nanargmax(excess)), excess.shape)
        raise DistillKitError(
            f"{name}: the published decoder reads {values[row, rank]:.6g} at row {row}, rank {rank} where ours reads "
            f"{decoded[row, rank]:.6g}; rounding does not explain the difference; this is a bug"
        )


def published_tolerance(config: FixedConfig, decoded: npt.NDArray[np.float32]) -> F64:
    """(N, k): bound on the effect of the published decoder's rounding (rust/codec/FORMAT.md §2.3) on each value.

    If terms are much larger than their sum, the sum's float32 error is the rounding error of the largest term.
    """
    largest = np.abs(decoded).astype(np.float64).max(-1, keepdims=True)
    tolerance = np.zeros(decoded.shape)
    rest = tolerance[:, config.exact_k :]
    rest += _largest_sum(config, decoded) * 2.0**-21 + 1e-6
    if config.term_dtype in ("float16", "bfloat16"):
        rest += _largest_sum(config, decoded) * 4 * _HALF_ULP[config.term_dtype]
    if isinstance(config, DistributionQuantizationConfig):
        half_ulp = _HALF_ULP[config.exact_dtype]
        if config.residual_bins:
            rest += 2.02 * half_ulp * largest
        if config.delta_encoding:
            # Every difference has its own rounding error, and the sum is rounded again.
            tolerance[:] = np.cumsum(tolerance, axis=-1) + 1.01 * half_ulp * np.abs(decoded) + 2.0**-22 * largest
    return tolerance


def _largest_sum(config: FixedConfig, decoded: npt.NDArray[np.float32]) -> F64:
    """(N, n) Σ |coefficient · term| for fits to the decoded values."""
    from distillkit.bench.published import term_matrix

    terms_mn = term_matrix(config).numpy()
    values = decoded.astype(np.float64)
    if isinstance(config, DistributionQuantizationConfig) and config.delta_encoding:
        values = np.diff(values, axis=-1, prepend=0.0)
    if not terms_mn.size:
        return np.zeros(values[:, config.exact_k :].shape)
    coefficients = values[:, config.exact_k :] @ np.linalg.pinv(terms_mn)
    return np.asarray(np.abs(coefficients) @ np.abs(terms_mn))


def _has_limits(config: FixedConfig) -> bool:
    if config.exact_k == config.k:
        return False
    if isinstance(config, DistributionQuantizationConfig):
        return bool(config.polynomial_terms) and not config.residual_bins and not config.delta_encoding
    return True


def _has_constant(config: FixedConfig) -> bool:
    return not isinstance(config, DistributionQuantizationConfig) or 0 in (config.polynomial_terms or ())

"""What the order of the values costs: the least KL that decoded rows can have if no value exceeds the one before.

    python benches/order.py [CONFIGURATION ...]

For presets and recorded configurations with the terms 0 and 1, without residuals and differences; in float64 and in
units of the least KL without roundings and bounds (`optimum`): the rounding of the exact values to nearest alone; then
with the approximated values in order, too, below the last exact value, which is rounded to nearest or to the neighbour
above, whichever is better in the row; and what our encoder reaches. Without arguments the figures of `recommended` and
`budget` also go to benches/results/. Coefficients are not rounded and errors not bounded: no encoder that rounds the
other exact values to nearest and keeps order gets below the second (ours rounds them together). Every fourth row of the
benchmark's sample.

Shape legend: N rows, n approximated ranks, m coefficients.
"""

from __future__ import annotations

import datetime
import platform
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from bench import ROOT, configurations
from sample import benchmark_sample

from distillkit.bench.fidelity import optimum, orthonormal_terms
from distillkit.bench.machine import machine
from distillkit.bench.tables import write_csv
from distillkit.codec import Codec, DistributionQuantizationConfig
from distillkit.codec.fidelity import kl_rows

RESULTS = ROOT / "benches" / "results"
F64 = npt.NDArray[np.float64]
BARRIERS = 10.0 ** np.arange(-3, -11.5, -0.5)
"""Weights of the barrier, in turn: the last moves KL by n · 3e-12."""
STEPS, HALVINGS = 6, 30
EVERY = 4


def in_order(basis_nm: F64, values_Nn: F64, ceiling_N: F64) -> F64:
    """(N, n) values of the least Σ exp(ŷ) − p·ŷ that do not increase and do not exceed the ceiling.

    By Newton's method on the sum with a logarithmic barrier before every bound (Boyd and Vandenberghe 2004, §11.3).
    """
    p_Nn, n = np.exp(values_Nn), len(basis_nm)
    steps_nm = np.diff(basis_nm, axis=0, prepend=0.0)
    pairs, step_pairs = ((b[:, :, None] * b[:, None, :]).reshape(n, -1) for b in (basis_nm, steps_nm))

    def room(x_Nm: F64) -> F64:
        below = -(x_Nm @ steps_nm.T)
        below[:, 0] += ceiling_N
        return below

    def objective(x_Nm: F64, barrier: float) -> F64:
        values, below = x_Nm @ basis_nm.T, room(x_Nm)
        logs = np.log(np.where(below > 0, below, np.finfo(float).tiny)).sum(-1)
        found = (np.exp(np.minimum(values, 50)) - p_Nn * values).sum(-1) - barrier * logs
        return np.asarray(np.where((below > 0).all(-1), found, np.inf))

    x_Nm = _line_below(basis_nm, values_Nn, ceiling_N)
    for barrier in BARRIERS:
        for _ in range(STEPS):
            fitted, below = np.exp(np.minimum(x_Nm @ basis_nm.T, 50)), room(x_Nm)
            gradient = (fitted - p_Nn) @ basis_nm + (barrier / below) @ steps_nm
            hessian = (fitted @ pairs + (barrier / below**2) @ step_pairs).reshape(-1, *[x_Nm.shape[1]] * 2)
            hessian += 1e-14 * np.trace(hessian, axis1=1, axis2=2)[:, None, None] * np.eye(x_Nm.shape[1])
            step, before = np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0], objective(x_Nm, barrier)
            # The longest of the halved steps that does not go up; none if all do.
            length_N = np.ones(len(x_Nm))
            for _ in range(HALVINGS):
                up = objective(x_Nm - length_N[:, None] * step, barrier) > before
                if not up.any():
                    break
                length_N[up] /= 2
            x_Nm -= np.where(up, 0.0, length_N)[:, None] * step
    return np.asarray(x_Nm @ basis_nm.T)


def _line_below(basis_nm: F64, values_Nn: F64, ceiling_N: F64) -> F64:
    """Coefficients of falling lines within all bounds; the terms 0 and 1 span them."""
    n = len(basis_nm)
    start_N = np.minimum(ceiling_N, values_Nn[:, 0]) - 0.01
    slope_N = np.maximum((start_N - values_Nn[:, -1]) / n, 1e-3)
    return np.asarray((start_N[:, None] - slope_N[:, None] * np.arange(n)) @ basis_nm)


def costs(
    config: DistributionQuantizationConfig, ids: npt.NDArray[Any], logprobs: npt.NDArray[Any]
) -> dict[str, float]:
    """Mean KL in units of the least possible, by what is asked of the decoded rows."""
    original, exact_k = logprobs.astype(np.float64), config.exact_k
    exact, rest = original[:, :exact_k], original[:, exact_k:]
    least = optimum(config, original)
    unit, basis_nm = kl_rows(original, least).mean(), orthonormal_terms(config)
    stored = torch.from_numpy(exact).to(getattr(torch, config.exact_dtype))
    above = torch.nextafter(stored[:, -1], torch.zeros_like(stored[:, -1])).double().numpy()
    rounded = stored.double().numpy()
    lifted = rounded.copy()
    lifted[:, -1] = np.minimum(above, rounded[:, -2]) if exact_k > 1 else above
    ordered = [
        kl_rows(original, np.concatenate([values, in_order(basis_nm, rest, values[:, -1])], axis=-1))
        for values in (rounded, lifted)
    ]
    codec = Codec(config)
    ours = codec.decode(codec.encode(ids, logprobs))[1]
    found = {
        "exact values rounded to nearest": kl_rows(original, np.concatenate([rounded, least[:, exact_k:]], axis=-1)),
        "and in order, at least": np.minimum(*ordered),
        "ours": kl_rows(original, np.asarray(ours)),
    }
    return {name: float(kl_N.mean() / unit) for name, kl_N in found.items()}


def main() -> None:
    sample = benchmark_sample()
    known = configurations(sample.vocab_size)
    lines: list[dict[str, Any]] = []
    for name in sys.argv[1:] or ("recommended", "budget"):
        config = known.get(name)
        if not isinstance(config, DistributionQuantizationConfig):
            sys.exit(f"there is no configuration '{name}' of this kind; there are {', '.join(known)}")
        ids, logprobs = sample.top(config.k, config.d)
        for what, ratio in costs(config, ids[::EVERY].copy(), logprobs[::EVERY].copy()).items():
            print(f"{name}: {what}: {ratio:.4f}")
            lines.append({"config": name, "what": what, "ratio": f"{ratio:.6g}", "machine": machine()})
    if not sys.argv[1:]:
        write_csv(RESULTS / f"{datetime.date.today()}-{platform.machine()}-order.csv", lines)


if __name__ == "__main__":
    main()

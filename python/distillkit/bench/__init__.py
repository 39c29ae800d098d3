"""Benchmarks of the codec's fidelity and speed against the published algorithm.

Used by `distillkit-codec bench` and `tune`, and by `benches/bench.py`. All modules except `sample`, `tune` and
`tune_report` need torch, for the baseline.
"""

from __future__ import annotations

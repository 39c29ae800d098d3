"""Benchmarks of the codec's fidelity and speed against the published algorithm.

Used by `distillkit-codec bench` and `benches/bench.py`. All modules except `sample` need torch, for the baseline.
"""

from __future__ import annotations

"""Fidelity and speed of the codec, measured beside the published algorithm.

`distillkit-codec bench` and `benches/bench.py` both show what is measured here. Everything but `sample` needs torch,
for the baseline.
"""

from __future__ import annotations

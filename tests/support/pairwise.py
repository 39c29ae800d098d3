"""Fewer combinations than the full product, with every pair of values still among them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return combinations of the axes' values in which each pair of values of each two axes occurs.

    Most faults depend on one value or on two together; about as many combinations as the two longest axes have pairs
    find those. The same axes always give the same combinations.
    """
    uncovered = {
        frozenset({(i, a), (j, b)})
        for i, j in combinations(range(len(axes)), 2)
        for a, b in product(range(len(axes[i])), range(len(axes[j])))
    }
    rows = []
    while uncovered:
        row = dict(min(uncovered, key=sorted))
        for axis, values in enumerate(axes):
            if axis not in row:
                row[axis] = max(range(len(values)), key=partial(_gain, uncovered, row, axis))
        uncovered -= {frozenset(pair) for pair in combinations(row.items(), 2)}
        rows.append(tuple(values[row[axis]] for axis, values in enumerate(axes)))
    return rows


def _gain(uncovered: set[frozenset[tuple[int, int]]], row: dict[int, int], axis: int, value: int) -> int:
    """Count the pairs that a value would cover, beside those that are chosen already."""
    return sum(frozenset({(axis, value), chosen}) in uncovered for chosen in row.items())

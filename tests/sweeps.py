"""For ``pytest.mark.parametrize``: wide sweeps, of which a few are run every time, the others if slow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import pytest


def each_once(*factors: Sequence[Any]) -> list[Any]:
    """All combinations of one of each, of which a few are fast, with each value in one of them."""
    needed = [tuple(f[i % len(f)] for f in factors) for i in range(max(map(len, factors)))]
    return [
        pytest.param(*chosen, marks=[] if chosen in needed else pytest.mark.slow)
        for chosen in product(*factors)
    ]


def sweep(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """The first ``fast`` values as they are, the others marked slow."""

    def slow(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if i < fast else slow(value) for i, value in enumerate(values)]

"""Parameters of which a few run always, and all of them in the slow tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(values: Iterable[Any], fast: int = 1) -> list[Any]:
    """For ``pytest.mark.parametrize``: the first ``fast`` values as they are, the others marked slow."""

    def slow(value: Any) -> Any:
        return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)

    return [value if i < fast else slow(value) for i, value in enumerate(values)]

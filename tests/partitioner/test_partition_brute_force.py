"""`partition` against every contiguous partition of thousands of small random graphs."""

from __future__ import annotations

import math
import random
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dtrp.errors import InfeasiblePlanError
from dtrp.partitioner import Partition, partition
from tests.sweeps import sweep

from .oracle import Case, assignments, max_load, max_memory, random_case, violations


def check(case: Case, time_limit: float = 30) -> str:
    """Solve a case both ways and compare; says which kind of case it was."""
    every = list(assignments(case))
    best = min((max_load(case, a) for a in every), default=math.inf)

    def solve() -> Partition:
        return partition(case.graph, case.n_stages, time_limit=time_limit, **case.kwargs)

    if math.isfinite(best):
        result = solve()
        assert not violations(case, dict(result.stage_of))
        assert max_load(case, dict(result.stage_of)) == pytest.approx(result.max_load, rel=1e-9, abs=1e-12)
        assert result.max_load == pytest.approx(best, rel=1e-9, abs=1e-12)
        assert result.lower_bound <= best * (1 + 1e-9) + 1e-12
        assert result.optimal
        return "feasible"
    with pytest.raises((InfeasiblePlanError, ValueError)) as caught:
        solve()
    if isinstance(caught.value, ValueError):
        assert not every
        assert "non-empty stages" in str(caught.value)
        return "too few"
    if not every:
        assert re.search("pinned", str(caught.value))
        return "contradiction"
    assert "memory limit" in str(caught.value) or "bytes per stage" in str(caught.value)
    limit = caught.value.smallest_limit
    if limit is not None and not any(m.memory_limit for m in case.kwargs.get("stage_models", ())):
        assert limit == pytest.approx(min(max_memory(case, a) for a in every), rel=1e-6)
        assert "smallest limit that can be met" in str(caught.value)
    return "infeasible"


@pytest.mark.parametrize("block", sweep(range(10)))
def test_agrees_with_brute_force(block: int) -> None:
    rng = random.Random(block)
    seen = [check(random_case(rng)) for _ in range(150)]
    assert set(seen) == {"feasible", "infeasible", "too few", "contradiction"}


@pytest.mark.slow
@pytest.mark.parametrize("block", range(40))
def test_agrees_with_brute_force_up_to_nine_nodes(block: int) -> None:
    rng = random.Random(1000 + block)
    for _ in range(100):
        check(random_case(rng, max_nodes=9))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 2**32), st.integers(2, 9))
def test_agrees_on_drawn_cases(seed: int, nodes: int) -> None:
    check(random_case(random.Random(seed), max_nodes=nodes))


@pytest.mark.parametrize("block", sweep(range(3)))
def test_detours_for_large_graphs_agree_with_brute_force(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduction, cores, local search and growing wanted loads, which small graphs do not need otherwise."""
    monkeypatch.setattr("dtrp.partitioner.solvers.engine._SMALL", 0)
    monkeypatch.setattr("dtrp.partitioner.solvers.exact._FEW", -8)
    monkeypatch.setattr("dtrp.partitioner.solvers.exact.LEVELS", ((0.0, 0.3), (0.0, 0.6)))
    monkeypatch.setattr("dtrp.partitioner.solvers.relax.LEVELS", ((0.0, 0.3), (0.0, 0.6)))
    monkeypatch.setattr("dtrp.partitioner.solvers.engine._FIRST_ORDERS", 1)
    rng = random.Random(500 + block)
    seen = [check(random_case(rng), time_limit=5) for _ in range(40)]
    assert set(seen) >= {"feasible", "infeasible"}

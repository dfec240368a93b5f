"""Stages of several devices: the best partition and numbers of devices, against every one of both."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from dtrp.errors import InfeasiblePlanError
from dtrp.partitioner import DeviceClass, StageModel, StageOption, partition

from .oracle import Case, assignments, max_load, random_case, violations


def offer(rng: random.Random, n_stages: int, devices: int, speed: float) -> tuple[StageModel, ...]:
    """What stages offer on ``devices``: their work is shared out, averaging gradients is not free."""
    limit = rng.choice([None, None, 4.0, 8.0])
    work, average = 1 / speed / devices, 0.3 * (1 - 1 / devices)
    return tuple(
        StageModel(
            (
                StageOption("keep", {"time": work, "extra": average}, {"memory": 0.3 * (n_stages - k) + 0.5}),
                StageOption("again", {"time": 1.4 * work, "extra": average}, {"memory": 0.5}, 0.2, 0.1),
            ),
            limit,
        )
        for k in range(n_stages)
    )


def check(rng: random.Random, max_nodes: int, kinds: int) -> bool:
    """One random problem both ways; whether it had a solution."""
    case = random_case(rng, max_nodes)
    k = case.n_stages
    for name in ("stage_models", "memory_limit"):
        case.kwargs.pop(name, None)
    counts = [rng.randint(1, 3 if kinds > 1 else 6) for _ in range(kinds)]
    if sum(counts) < k or max(counts) == 1:
        return False
    classes = []
    for count in counts:
        speed = rng.choice([0.5, 1.0, 2.0])
        more = {r: offer(rng, k, r, speed) for r in range(2, count + 1)}
        classes.append(DeviceClass(count, offer(rng, k, 1, speed), more))
    ways = [(c, r) for c, each in enumerate(classes) for r in (1, *each.replicas)]
    chosen = [
        ways_of
        for ways_of in itertools.product(ways, repeat=k)
        if all(sum(r for c, r in ways_of if c == kind) <= count for kind, count in enumerate(counts))
    ]

    def load(stage_of: dict[Any, int], ways_of: tuple[tuple[int, int], ...]) -> float:
        models = [
            (classes[c].replicas[r] if r > 1 else classes[c].stages)[s] for s, (c, r) in enumerate(ways_of)
        ]
        described = Case(case.graph, k, {**case.kwargs, "stage_models": models})
        return max_load(described, stage_of, [r for _, r in ways_of])

    best = min((load(a, w) for a in assignments(case) for w in chosen), default=math.inf)
    try:
        found = partition(case.graph, k, classes=classes, **case.kwargs)
    except (InfeasiblePlanError, ValueError):
        assert best == math.inf
        return False
    assert not violations(case, dict(found.stage_of))
    ways_of = tuple(zip(found.class_of, found.replicas, strict=True))
    assert ways_of in chosen
    assert load(dict(found.stage_of), ways_of) == pytest.approx(found.max_load, rel=1e-9, abs=1e-12)
    assert found.max_load == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert found.optimal
    return True


@pytest.mark.parametrize("block", range(4))
def test_agrees_with_brute_force(block: int) -> None:
    """The best of all partitions and all numbers of devices, of one or two kinds, with proof."""
    rng = random.Random(4000 + block)
    assert sum(check(rng, 5, rng.choice([1, 1, 2])) for _ in range(15)) > 3


@pytest.mark.slow
@pytest.mark.parametrize("block", range(30))
def test_agrees_with_brute_force_on_thousands(block: int) -> None:
    rng = random.Random(20_000 + block)
    for _ in range(100):
        check(rng, 6, rng.choice([1, 1, 2]))

"""Unequal devices: the best order of devices and partition, against every one of both."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn

import dtrp
from dtrp.errors import InfeasiblePlanError
from dtrp.partitioner import DeviceClass, StageModel, StageOption, partition
from dtrp.partitioner.compiler import compile_model
from tests.sweeps import sweep

from .oracle import Case, assignments, max_load, random_case, violations


def offer(rng: random.Random, n_stages: int, speed: float) -> tuple[StageModel, ...]:
    """What stages offer on a device; by position, as depths in flight are."""
    limit = rng.choice([None, None, 4.0, 8.0])
    return tuple(
        StageModel(
            (
                StageOption("keep", {"time": 1 / speed}, {"memory": 1.0 + 0.3 * (n_stages - k)}),
                StageOption("again", {"time": 1 / speed, "extra": 1 / speed}, {"memory": 0.5}, 0.2),
            ),
            limit,
        )
        for k in range(n_stages)
    )


def check(rng: random.Random, max_nodes: int) -> bool:
    """One random problem both ways; whether it had a solution."""
    case = random_case(rng, max_nodes)
    k = case.n_stages
    for name in ("stage_models", "memory_limit"):
        case.kwargs.pop(name, None)
    if k < 2:
        return False
    m = rng.randint(2, min(k, 4))
    cuts = [0, *sorted(rng.sample(range(1, k), m - 1)), k]
    counts = [b - a for a, b in itertools.pairwise(cuts)]
    classes = [DeviceClass(n, offer(rng, k, rng.choice([0.3, 0.5, 1.0, 2.0]))) for n in counts]
    every = list(assignments(case))
    orders = set(itertools.permutations([c for c, n in enumerate(counts) for _ in range(n)]))

    def load(stage_of: dict[Any, int], order: tuple[int, ...]) -> float:
        models = [classes[c].stages[s] for s, c in enumerate(order)]
        return max_load(Case(case.graph, k, {**case.kwargs, "stage_models": models}), stage_of)

    best = min((load(a, o) for a in every for o in orders), default=math.inf)
    try:
        found = partition(case.graph, k, classes=classes, **case.kwargs)
    except (InfeasiblePlanError, ValueError):
        assert best == math.inf
        return False
    assert not violations(case, dict(found.stage_of))
    assert found.class_of in orders
    assert load(dict(found.stage_of), found.class_of) == pytest.approx(found.max_load, rel=1e-9, abs=1e-12)
    assert found.max_load == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert found.optimal
    return True


@pytest.mark.parametrize("block", sweep(range(4)))
def test_agrees_with_brute_force(block: int) -> None:
    """The best of all partitions and all orders of up to four classes of devices, with proof."""
    rng = random.Random(9000 + block)
    assert sum(check(rng, 6) for _ in range(40)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("block", range(30))
def test_agrees_with_brute_force_on_thousands(block: int) -> None:
    rng = random.Random(10_000 + block)
    for _ in range(100):
        check(rng, 7)


def test_the_fast_device_gets_the_node_that_cannot_be_split() -> None:
    chain = nx.path_graph(4, create_using=nx.DiGraph)
    nx.set_node_attributes(chain, {0: 1.0, 1: 4.0, 2: 1.0, 3: 1.0}, "time")
    slow, fast = (
        tuple(StageModel((StageOption("run", {"time": 1 / speed}, {}),)) for _ in range(3))
        for speed in (1, 4)
    )
    found = partition(chain, 3, classes=[DeviceClass(2, slow), DeviceClass(1, fast)])
    assert found.class_of[found.stage_of[1]] == 1
    assert (found.max_load, found.optimal) == (1.25, True)


@pytest.mark.parametrize(
    ("counts", "text"), [((1, 1), r"1 \+ 1 devices for 3 stages"), ((3, 0), "at least 1; got 0")]
)
def test_classes_must_have_a_device_per_stage(counts: tuple[int, ...], text: str) -> None:
    chain = nx.path_graph(4, create_using=nx.DiGraph)
    nx.set_node_attributes(chain, 1.0, "time")
    models = (StageModel((StageOption("run", {"time": 1.0}, {}),)),) * 3
    with pytest.raises(ValueError, match=text):
        partition(chain, 3, classes=[DeviceClass(n, models) for n in counts])
    with pytest.raises(ValueError, match="not both"):
        partition(chain, 3, classes=[DeviceClass(3, models)], stage_models=models)


# --- In dtrp.compile --------------------------------------------------------------------------------------

X = torch.randn(64, 96)
SPEED = [0.4, 1.0, 0.7]


def chain() -> nn.Module:
    torch.manual_seed(0)
    widths = [96, 96, 512, 96, 96, 384, 96, 96]
    return nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))


def test_compile_finds_the_best_order_of_devices(tmp_path: Path) -> None:
    """As fast as the best of all orders, each planned as it stands; the order is saved with the plan, memory
    limits go with their devices, and what is computed does not depend on it."""
    limits = ["1GB", "2GB", "3GB"]
    pipe = dtrp.compile(chain(), 3, example_inputs=X, speed=SPEED, memory_limit=limits)
    fixed = {}
    for order in itertools.permutations(range(3)):
        request = replace(pipe._planning.request, speed=tuple(SPEED[i] for i in order), arranged=True)
        fixed[order] = compile_model(chain(), request, (X,), {}).report.tick_time
    placement = pipe.plan.placement
    assert pipe.report.tick_time == pytest.approx(min(fixed.values()), rel=1e-9)
    assert fixed[placement] == pytest.approx(pipe.report.tick_time, rel=1e-9)
    assert max(fixed.values()) > 1.1 * min(fixed.values())
    assert [s.memory_limit for s in pipe.report.stages] == [(i + 1) * 10**9 for i in placement]
    assert dtrp.simulate(pipe.plan).batch_time == pytest.approx(pipe.report.tick_time, rel=1e-6)
    assert "Devices are unequal; stages have them in this order" in str(pipe.report)
    pipe.plan.save(tmp_path / "plan.json")
    again = dtrp.compile(
        chain(), example_inputs=X, plan=tmp_path / "plan.json", speed=SPEED, memory_limit=limits
    )
    assert again.plan.placement == placement
    assert again.report.tick_time == pytest.approx(pipe.report.tick_time, rel=1e-9)
    torch.testing.assert_close(pipe(X), chain()(X))


def test_equal_devices_stay_in_order() -> None:
    pipe = dtrp.compile(chain(), 3, example_inputs=X, speed=[0.5] * 3)
    plain = dtrp.compile(chain(), 3, example_inputs=X)
    assert pipe.plan.placement == plain.plan.placement == ()
    total = [sum(s.forward_time for s in p.report.stages) for p in (pipe, plain)]
    assert total[0] == pytest.approx(2 * total[1])


@pytest.mark.parametrize("speed", [[1.0, 1.0], [1.0, 0.0, 1.0], ["1", 1, 1], 2.0, [1, 1, float("inf")]])
def test_speeds_are_numbers_one_for_each_device(speed: Any) -> None:
    with pytest.raises(ValueError, match=r"speed=.*: expected"):
        dtrp.compile(chain(), 3, speed=speed)

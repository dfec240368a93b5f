"""Stages in nodes, with slower links between nodes: against every partition with every choice of borders."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import networkx as nx
import pytest
import torch
from torch import nn

import dtrp
from dtrp.errors import InfeasiblePlanError
from dtrp.partitioner import partition

from .oracle import Case, assignments, limit_of, random_case, stage_costs, violations


def layouts(n_stages: int, nodes: int, per_node: int) -> list[list[int]]:
    """The node of every stage, in every way."""
    found = []
    for cuts in itertools.combinations(range(1, n_stages), nodes - 1):
        ends = [0, *cuts, n_stages]
        if all(b - a <= per_node for a, b in itertools.pairwise(ends)):
            found.append([sum(s >= c for c in cuts) for s in range(n_stages)])
    return found


def max_load(case: Case, stage_of: dict[Any, int], node_of: list[int]) -> float:
    """The objective by its definition."""
    graph = case.graph
    far = {
        u: max(
            [graph.nodes[u].get(name, 0) for name in ("transfer", "far")]
            + [graph.edges[u, v].get("transfer", 0) for v in graph.successors(u)]
        )
        for u in graph
    }
    near = {
        u: max([graph.nodes[u].get("transfer", 0)] + [graph.edges[u, v].get("transfer", 0) for v in graph[u]])
        for u in graph
    }
    worst = 0.0
    for stage in set(stage_of.values()):
        time_in = time_out = 0.0
        for u in graph:
            users = {stage_of[v] for v in graph.successors(u)} - {stage_of[u]}
            if stage_of[u] == stage and users:
                time_out += max(near[u] if node_of[j] == node_of[stage] else far[u] for j in users)
            elif stage in users:
                time_in += near[u] if node_of[stage_of[u]] == node_of[stage] else far[u]
        limit = limit_of(case, stage) * (1 + 1e-9)
        loads = [
            max(c, time_in, time_out) if case.kwargs.get("overlap", True) else c + time_in + time_out
            for c, _, _, m in stage_costs(case, stage_of, stage)
            if m <= limit
        ]
        worst = max(worst, min(loads, default=math.inf))
    return worst


def check(rng: random.Random, max_nodes: int = 6) -> bool:
    """One random problem both ways; whether it had a solution."""
    case = random_case(rng, max_nodes)
    if case.n_stages < 2:
        return False
    slow = rng.choice([1.0, 2.0, 5.0, 30.0])
    for u in case.graph:
        case.graph.nodes[u]["far"] = case.graph.nodes[u]["transfer"] * slow
    nodes = rng.randint(2, min(3, case.n_stages))
    per_node = rng.randint(math.ceil(case.n_stages / nodes), case.n_stages)
    choices = layouts(case.n_stages, nodes, per_node)
    every = list(assignments(case))
    best = min((max_load(case, a, c) for a in every for c in choices), default=math.inf)
    try:
        found = partition(case.graph, case.n_stages, nodes=nodes, per_node=per_node, **case.kwargs)
    except (InfeasiblePlanError, ValueError):
        assert best == math.inf
        return False
    assert not violations(case, dict(found.stage_of))
    assert list(found.node_of) in choices
    own = max_load(case, dict(found.stage_of), list(found.node_of))
    assert own == pytest.approx(found.max_load, rel=1e-9, abs=1e-12)
    assert found.max_load == pytest.approx(best, rel=1e-9, abs=1e-12)
    assert found.optimal
    return True


@pytest.mark.parametrize("block", range(4))
def test_agrees_with_brute_force(block: int) -> None:
    """The best of all partitions and all borders, with proof."""
    rng = random.Random(7000 + block)
    assert sum(check(rng) for _ in range(40)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("block", range(30))
def test_agrees_with_brute_force_on_thousands(block: int) -> None:
    rng = random.Random(8000 + block)
    for _ in range(100):
        check(rng, max_nodes=7)


# --- In dtrp.compile --------------------------------------------------------------------------------------


class Wide(nn.Module):
    """Equal layers with a wide value in the middle, where no border should fall."""

    def __init__(self) -> None:
        super().__init__()
        widths = [256, 256, 256, 1024, 256, 256, 256]
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


X = torch.randn(64, 256)
LINKS = {"node": "100GB", "net": "10MB", "per_node": 3}


def test_compile_puts_the_border_where_little_crosses(tmp_path: Any) -> None:
    """With a net that slow the border decides the tick: it is at a narrow value, as the report says, and the
    saved plan and the simulation know it."""
    pipe = dtrp.compile(Wide(), 4, example_inputs=X, bandwidth=LINKS)
    node_of = pipe.plan.node_of
    border = node_of.index(1)
    crossing = [c for c in pipe.report.cuts if c.source < border <= c.targets[0]]
    assert [c.bytes for c in crossing] == [64 * 256 * 4]
    slowest = max(s.time["transfer"] for s in pipe.report.stages)
    assert slowest == pytest.approx(2 * (64 * 256 * 4 / 10e6 + 1e-4), rel=0.02)
    assert "Stages of each node: " in str(pipe.report)
    pipe.plan.save(tmp_path / "plan.json")
    loaded = dtrp.Plan.load(tmp_path / "plan.json")
    assert loaded.node_of == node_of
    assert dtrp.simulate(loaded).batch_time == pytest.approx(pipe.report.tick_time, rel=1e-6)
    again = dtrp.compile(Wide(), example_inputs=X, bandwidth=LINKS, plan=loaded)
    assert again.plan.node_of == node_of
    plain = dtrp.compile(Wide(), example_inputs=X, plan=loaded)
    assert plain.plan.node_of == ()
    assert dtrp.compile(Wide(), example_inputs=X, plan=plain.plan, bandwidth=LINKS).plan.node_of == node_of


@pytest.mark.parametrize(
    ("bandwidth", "text"),
    [
        ({"node": 1e9}, "expected {'node': '300GB', 'net': '25GB'}"),
        ({"node": 1e9, "net": 1e8, "pernode": 2}, "perhaps 'nodes' or 'per_node'"),
        ({"node": 1e9, "net": 2e9}, "between nodes .* is faster than within one"),
        ({"node": "quick", "net": 2e9}, r"bandwidth\['node'\] must be bytes per second"),
        ({"node": 1e9, "net": 1e8, "nodes": 2, "per_node": 1}, "2 nodes of at most 1 stages cannot hold"),
        ({"node": 1e9, "net": 1e8, "nodes": 5}, "5 nodes cannot hold 4 stages, one each at least"),
        ({"node": 1e9, "net": 1e8, "per_node": 0}, "expected an int >= 1"),
        ({"node": 1e9, "net": 1e8, "nodes": "2"}, "expected an int >= 1"),
        (-1, "bandwidth must be bytes per second"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(bandwidth: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        dtrp.compile(Wide(), 4, bandwidth=bandwidth)


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        ({"nodes": 0}, "nodes must be 1 to 2"),
        ({"nodes": 3}, "nodes must be 1 to 2, the number of stages; got 3"),
        ({"nodes": 2, "per_node": 0.5}, "per_node must be a whole number"),
        ({"nodes": True}, "nodes must be a whole number"),
    ],
)
def test_the_partitioner_refuses_nodes_without_stages(kwargs: Any, text: str) -> None:
    chain = nx.path_graph(3, create_using=nx.DiGraph)
    nx.set_node_attributes(chain, 1.0, "time")
    with pytest.raises((ValueError, TypeError), match=text):
        partition(chain, 2, **kwargs)

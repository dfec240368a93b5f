"""Every solver against the definition in `loads.evaluate`, or against all partitions of a small problem."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest

from dtrp.partitioner import StageModel, StageOption
from dtrp.partitioner.solvers.bounds import simple_bound
from dtrp.partitioner.solvers.chains import ChainProgram
from dtrp.partitioner.solvers.clock import Clock
from dtrp.partitioner.solvers.downsets import enumerate_downsets
from dtrp.partitioner.solvers.intervals import IntervalProgram
from dtrp.partitioner.solvers.loads import evaluate
from dtrp.partitioner.solvers.orders import good_orders
from dtrp.partitioner.solvers.problem import Ints, Problem, compile_problem, product
from dtrp.partitioner.solvers.reduce import contract, merge_dear, reduce_problem
from dtrp.partitioner.solvers.relax import candidates, core, put_back
from dtrp.partitioner.solvers.search import boundaries, local_search, neighbourhood
from dtrp.partitioner.solvers.state import State
from dtrp.partitioner.solvers.windows import Windows

from .oracle import random_case

FOREVER = Clock(1e9)


def test_a_product_hands_on_no_warning_of_its_library() -> None:
    """Without it a plan may begin with "invalid value encountered in matmul" where all numbers are finite."""
    made = product(np.array([[np.inf, 1.0]], dtype=np.float32), np.zeros((2, 1), dtype=np.float32))
    assert np.isnan(made).all()
    assert made.dtype == np.float32


def random_problem(seed: int, *, nodes: int = 7, stages: int = 3, allow_empty: bool = True) -> Problem:
    """A small problem with free groups, backward values and options, without limits or pins."""
    rng = random.Random(seed)
    case = random_case(rng, max_nodes=nodes)
    while len(case.graph) < nodes:
        case = random_case(rng, max_nodes=nodes)
    models = [
        StageModel(
            (
                StageOption("keep", {"time": 1.0}, {"memory": 2.0, "extra": 1.0}),
                StageOption("recompute", {"time": 1.0, "extra": 0.5}, {"memory": 1.0}, 0.5, 0.05),
            )
        )
    ] * stages
    return compile_problem(
        case.graph,
        stages,
        models,
        limits=np.full(stages, rng.choice([np.inf, 6.0])),
        transfer="transfer",
        size="bytes",
        far="far",
        kind=rng.choice(["overlap", "sum"]),
        colocate=[],
        order=[],
        fixed={},
        allow_empty=allow_empty,
    )


def all_partitions(problem: Problem) -> list[Ints]:
    """Every assignment that keeps precedence (and non-empty stages where demanded)."""
    found = []
    for stages in itertools.product(range(problem.n_stages), repeat=problem.n):
        if any(stages[p] > stages[v] for v in range(problem.n) for p in problem.predecessors[v]):
            continue
        if problem.allow_empty or len(set(stages)) == problem.n_stages:
            found.append(np.array(stages))
    return found


def best_load(problem: Problem) -> float:
    return min((evaluate(problem, s).max_load for s in all_partitions(problem)), default=np.inf)


def downsets(problem: Problem) -> np.ndarray:
    sets = [
        inside
        for inside in itertools.product([False, True], repeat=problem.n)
        if all(inside[p] for v in range(problem.n) if inside[v] for p in problem.predecessors[v])
    ]
    return np.array(sets)


@pytest.mark.parametrize("seed", range(12))
def test_interval_program_is_exact_for_an_order(seed: int) -> None:
    problem = random_problem(seed, allow_empty=seed % 2 == 0)
    for order in itertools.islice(good_orders(problem, seed), 5):
        place = np.argsort(order)
        of_order = [s for s in all_partitions(problem) if np.all(np.diff(s[order]) >= 0)]
        best = min((evaluate(problem, s).max_load for s in of_order), default=np.inf)
        found = IntervalProgram(problem, order).solve(FOREVER)
        assert np.all(place[[p for v in problem.predecessors for p in v]] >= 0)
        if found is None:
            assert best == np.inf
        else:
            assert found[0] == pytest.approx(best)
            assert evaluate(problem, found[1]).max_load == pytest.approx(best)


@pytest.mark.parametrize("seed", range(10))
def test_orders_are_topological(seed: int) -> None:
    problem = random_problem(seed)
    for order in itertools.islice(good_orders(problem, seed), 9):
        place = np.argsort(order)
        assert sorted(order.tolist()) == list(range(problem.n))
        assert all(place[p] < place[v] for v in range(problem.n) for p in problem.predecessors[v])


@pytest.mark.parametrize("seed", range(12))
def test_pair_loads_agree_with_the_definition(seed: int) -> None:
    problem = replace(random_problem(seed), n_stages=3)
    program = ChainProgram(problem, Windows(problem), downsets(problem))
    member = program.family.member
    for stage in all_partitions(problem):
        bounds = boundaries(problem, stage)
        where = [int(np.flatnonzero((member == b).all(axis=1))[0]) for b in bounds]
        if where[0] == where[1]:
            continue
        loads = evaluate(problem, stage).load
        rows, columns = np.array([where[0]]), np.array([where[1]])
        reached, _ = program._extend(1, rows, np.zeros(1), columns, np.inf, FOREVER)
        assert reached[0] == pytest.approx(loads[1])


@pytest.mark.parametrize("seed", range(12))
def test_enumeration_finds_every_downset_that_is_admitted(seed: int) -> None:
    problem = random_problem(seed)
    windows = Windows(problem)
    every = downsets(problem)
    for wanted in (np.inf, best_load(problem)):
        found = enumerate_downsets(problem, windows, wanted, cap=10**6, clock=FOREVER)
        assert found is not None
        rows = {tuple(r) for r in found.tolist()}
        assert len(rows) == len(found)
        needed = every[windows.admitted(every, wanted).any(axis=0)]
        assert {tuple(r) for r in needed.tolist()} <= rows <= {tuple(r) for r in every.tolist()}


def test_enumeration_gives_up_at_its_cap() -> None:
    problem = random_problem(0)
    assert enumerate_downsets(problem, Windows(problem), np.inf, cap=2, clock=FOREVER) is None


@pytest.mark.parametrize("seed", range(12))
def test_windows_admit_the_boundaries_of_every_partition(seed: int) -> None:
    problem = random_problem(seed, allow_empty=seed % 2 == 0)
    windows = Windows(problem)
    for stage in all_partitions(problem):
        load = evaluate(problem, stage).max_load
        if np.isfinite(load):  # else it does not fit, and need not be admitted
            assert windows.admitted(boundaries(problem, stage), load).diagonal().all()


@pytest.mark.parametrize("seed", range(20))
def test_reduction_keeps_an_optimal_partition(seed: int) -> None:
    problem = random_problem(seed, nodes=6)
    reduced = reduce_problem(problem)
    best = best_load(problem)
    assert best_load(reduced.problem) == pytest.approx(best)
    if np.isfinite(best):
        stage = min(all_partitions(reduced.problem), key=lambda s: evaluate(reduced.problem, s).max_load)
        lifted = reduced.lift(stage)
        assert all(lifted[p] <= lifted[v] for v in range(problem.n) for p in problem.predecessors[v])
        assert evaluate(problem, lifted).max_load == pytest.approx(best)


def test_reduction_merges_and_eliminates() -> None:
    reduced = 0
    for seed in range(20):
        problem = random_problem(seed, nodes=6)
        reduced += problem.n - reduce_problem(problem).problem.n
    assert reduced >= 3


@pytest.mark.parametrize("seed", range(12))
def test_what_is_too_dear_to_cut_is_together_in_every_good_partition(seed: int) -> None:
    problem = random_problem(seed)
    best = best_load(problem)
    if np.isfinite(best):
        dear = merge_dear(problem, best)
        assert best_load(dear.problem) == pytest.approx(best)


def test_contraction_merges_cycles() -> None:
    graph = nx.DiGraph([(0, 1), (1, 2)])
    nx.set_node_attributes(graph, 1.0, "time")
    model = StageModel((StageOption("default", {"time": 1.0}, {}),))
    problem = compile_problem(
        graph,
        2,
        [model] * 2,
        limits=np.full(2, np.inf),
        transfer="transfer",
        size="bytes",
        far="far",
        kind="sum",
        colocate=[],
        order=[],
        fixed={},
        allow_empty=True,
    )
    assert contract(problem, np.array([0, 1, 0])).problem.n == 1
    bypassed = contract(problem, np.array([0, -1, 1])).problem
    assert bypassed.successors == ((1,), ())


@pytest.mark.parametrize("seed", range(12))
def test_bounds_hold(seed: int) -> None:
    problem = random_problem(seed)
    assert simple_bound(problem).value <= best_load(problem) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(15))
def test_a_core_bounds_its_problem_and_groups_can_be_put_back(seed: int) -> None:
    problem = random_problem(seed, nodes=6)
    for dropped in ([0], [2, 4], candidates(problem, 5)):
        reduced = core(problem, np.array(dropped, dtype=np.int64))
        assert best_load(reduced.problem) <= best_load(problem) * (1 + 1e-12)
        for stage in all_partitions(reduced.problem)[::7]:
            whole = put_back(reduced, stage)
            assert all(whole[p] <= whole[v] for v in range(problem.n) for p in problem.predecessors[v])


@pytest.mark.parametrize("seed", range(10))
def test_neighbours_are_downsets(seed: int) -> None:
    problem = random_problem(seed)
    stage = all_partitions(problem)[-5]
    found = neighbourhood(problem, boundaries(problem, stage))
    every = {tuple(r) for r in downsets(problem).tolist()}
    assert {tuple(r) for r in found.tolist()} <= every
    assert {tuple(r) for r in boundaries(problem, stage).tolist()} <= {tuple(r) for r in found.tolist()}


@pytest.mark.parametrize("seed", range(10))
def test_local_search_reaches_the_optimum_of_small_problems(seed: int) -> None:
    problem = random_problem(seed, nodes=6)
    best = best_load(problem)
    state = State(problem)
    state.offer(np.zeros(problem.n, dtype=np.int64), "start")
    if state.stage is None:  # everything on one stage does not fit
        return
    local_search(state, Windows(problem), FOREVER, seed, patience=40)
    assert state.load == pytest.approx(best)

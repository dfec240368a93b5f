"""Cut any weighted DAG into consecutive stages so that the slowest stage is as fast as can be.

The facade: checks what it is given, compiles it to arrays (`solvers.problem`), runs the engines in `solvers`
and says what came out of it, with a lower bound that no partition can beat.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import networkx as nx
import numpy as np

from .solvers.borders import Nodes, place
from .solvers.bounds import Bound
from .solvers.checks import (
    check_acyclic,
    check_arguments,
    check_classes,
    check_enough,
    check_models,
    check_nodes,
    check_nodes_of_stages,
    check_numbers,
    memory_limits,
)
from .solvers.clock import Clock
from .solvers.devices import Way, assign, in_order
from .solvers.engine import Solution, solve
from .solvers.explain import infeasible, reason
from .solvers.loads import evaluate
from .solvers.problem import compile_problem
from .solvers.state import TOLERANCE


@dataclass(frozen=True)
class StageOption:
    """One way to run a stage: what it costs is linear in sums over the stage's nodes.

    Parameters
    ----------
    label : str
        Its name in the result, e.g. ``"recompute"`` or ``"keep"``.
    time : mapping of str to float
        Node attribute -> weight. Seconds of compute are the weighted attributes, summed over the nodes.
    memory : mapping of str to float
        Node attribute -> weight. Bytes, summed likewise.
    input_memory : float
        Bytes of memory per byte of the stage's inputs (every value from outside counted once).
    fixed_time : float
        Seconds that the stage takes however little it holds.
    """

    label: str
    time: Mapping[str, float]
    memory: Mapping[str, float]
    input_memory: float = 0.0
    fixed_time: float = 0.0


@dataclass(frozen=True)
class StageModel:
    """What a stage offers: options to choose from, and its memory limit in bytes (None: no limit)."""

    options: tuple[StageOption, ...]
    memory_limit: float | None = None


@dataclass(frozen=True)
class DeviceClass:
    """Devices that are alike: how many there are, and what each of the K stages offers on one of them.

    ``replicas``: what each stage offers where it has so many of them, which share its batches out. Seconds
    and bytes are those of one device; of the values' seconds, each has its share.
    """

    count: int
    stages: tuple[StageModel, ...]
    replicas: Mapping[int, tuple[StageModel, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Partition:
    """A partition into stages, what it costs, and how far from the best it can be at most.

    Attributes
    ----------
    stage_of : mapping
        Stage (0-based) of every node.
    n_stages : int
    loads, compute, time_in, time_out : tuple of float
        Per stage, seconds: the load, and what it is made of.
    memory : tuple of float
        Per stage, bytes, with the chosen option.
    options : tuple of str
        Per stage, label of the option chosen.
    max_load : float
        Seconds of the slowest stage: what was minimised.
    lower_bound : float
        No partition has a smaller ``max_load``.
    engine : str
        Which engine found it.
    seconds : float
        Time that planning took.
    bottleneck : int
        The slowest stage.
    reason : str
        Why it is not faster, in a sentence.
    node_of : tuple of int
        Per stage, its node, where there are several.
    class_of : tuple of int
        Per stage, the class of its device, where there are several.
    replicas : tuple of int
        Per stage, how many devices it has, where it may have several.
    """

    stage_of: Mapping[Hashable, int] = field(repr=False)
    n_stages: int
    loads: tuple[float, ...]
    compute: tuple[float, ...]
    time_in: tuple[float, ...]
    time_out: tuple[float, ...]
    memory: tuple[float, ...]
    options: tuple[str, ...]
    max_load: float
    lower_bound: float
    engine: str
    seconds: float
    bottleneck: int
    reason: str
    node_of: tuple[int, ...] = ()
    class_of: tuple[int, ...] = ()
    replicas: tuple[int, ...] = ()

    @property
    def gap(self) -> float:
        """``max_load / lower_bound - 1``; 0 if optimal, inf if nothing is known."""
        if self.optimal:
            return 0.0
        return self.max_load / self.lower_bound - 1 if self.lower_bound > 0 else math.inf

    @property
    def optimal(self) -> bool:
        """Whether it is proven that no partition is better (up to rounding of sums)."""
        return self.max_load <= self.lower_bound * (1 + TOLERANCE)


def partition(
    graph: nx.DiGraph,
    n_stages: int,
    *,
    time: str = "time",
    memory: str = "memory",
    transfer: str = "transfer",
    size: str = "bytes",
    stage_models: Sequence[StageModel] | None = None,
    classes: Sequence[DeviceClass] | None = None,
    overlap: bool = True,
    memory_limit: float | Sequence[float | None] | None = None,
    colocate: Iterable[Collection[Hashable]] = (),
    order: Iterable[tuple[Hashable, Hashable]] = (),
    fixed: Mapping[Hashable, int] | None = None,
    allow_empty: bool = False,
    nodes: int = 1,
    per_node: int | None = None,
    far: str = "far",
    engine: str = "auto",
    time_limit: float = 10.0,
    seed: int = 0,
) -> Partition:
    """Cut a DAG into consecutive stages, minimising the load of the slowest.

    Parameters
    ----------
    graph : networkx.DiGraph
        Edges say who needs whose value. An edge with ``precedence=False`` carries a value and allows its
        consumer an earlier stage than its producer; all others demand ``stage(u) <= stage(v)``.
    n_stages : int
        Number of stages K.
    time, memory : str
        Node attributes (seconds, bytes) that a stage sums up; unused with ``stage_models``. Missing: 0.
    transfer, size : str
        Attributes of a producing node, or of its edges (the largest counts), for the seconds that moving
        its value takes and for its bytes. A value that leaves its stage is charged once to the sending stage
        and once to every receiving one, however many consumers it has there.
    stage_models : sequence of StageModel, optional
        What each stage offers. Default: one option for all, ``{time: 1}`` and ``{memory: 1}``.
    classes : sequence of DeviceClass, optional
        In place of ``stage_models``, where devices are unequal, or a stage may have several: which stage
        runs on how many devices of which class is part of the search. Without ``replicas`` each device has a
        stage; with them some may be left.
    overlap : bool
        Whether a stage computes while it communicates: load = max(compute, time in, time out). If not,
        load = compute + time in + time out.
    memory_limit : float or sequence of float, optional
        Bytes, for all stages or one each (None: no limit). The stage model's own limit holds as well.
    colocate : iterable of collections of nodes
        Each collection shares a stage.
    order : iterable of (node, node)
        Further precedence that carries no value.
    fixed : mapping of node to stage, optional
        Nodes pinned to a stage.
    allow_empty : bool
        Whether stages may stay empty; else all K hold something.
    nodes, per_node : int
        Consecutive stages lie in so many nodes, each with at least one stage and at most ``per_node``. Where
        the borders fall is part of the search.
    far : str
        Like ``transfer``, for values that go from one node to another: what the receiving stage takes for
        each, and the sending one, once, if any receiver is in another node. Never less than ``transfer``.
    engine : {"auto", "interval", "search", "downsets"}
        ``"interval"``: exact for the graph's own order only, fastest. ``"search"``: several orders, then
        local search. ``"downsets"``: several orders, then exact over down-sets as far as time allows.
        ``"auto"``: all of them, with bounds from smaller problems where there are too many down-sets.
    time_limit : float
        Seconds after which the best so far is returned with its bound.
    seed : int
        Of the search's random choices: same input and seed, same search (its length depends on the clock).

    Returns
    -------
    Partition

    Raises
    ------
    ValueError, TypeError
        A wrong argument: cyclic graph, more stages than nodes (or than groups that must stay together),
        unknown nodes, negative or non-finite numbers.
    InfeasiblePlanError
        No partition meets the memory limits (the message names the smallest that can be met, and where
        they are needed), or pins contradict colocation and precedence.

    Notes
    -----
    Minimising the bottleneck over all contiguous partitions of a DAG is NP-hard. For one topological order
    it takes O(K n^2) at most (`solvers.intervals`). The exact engine is polynomial in the number of down-sets
    near the best load (`solvers.windows`, `solvers.downsets`, `solvers.chains`): about n for a chain of
    blocks, exponential in the width in general. Safe merging (`solvers.reduce`) comes first. Where there are
    too many down-sets, cores without cheap groups that are unordered with most others (`solvers.relax`) give
    bounds and partitions, and local search (`solvers.search`) uses the time that is left.

    References
    ----------
    .. [1] J. Tarnawski, A. Phanishayee, N. Devanur, D. Mahajan, F. Nina Paravecino, "Efficient Algorithms for
       Device Placement of DNN Graph Operators", NeurIPS 2020 (dynamic programming over down-sets).
    .. [2] S. H. Bokhari, "Partitioning problems in parallel, pipelined, and distributed computing", IEEE
       Transactions on Computers 37(1), 1988 (chains).

    Examples
    --------
    >>> import networkx as nx
    >>> chain = nx.path_graph(6, create_using=nx.DiGraph)
    >>> nx.set_node_attributes(chain, {0: 1.0, 1: 1.0, 2: 2.0, 3: 1.0, 4: 1.0, 5: 2.0}, "time")
    >>> result = partition(chain, 3)
    >>> result.max_load, result.optimal
    (3.0, True)
    """
    check_arguments(graph, n_stages, engine, time_limit)
    clock = Clock(time_limit)
    fixed = dict(fixed or {})
    colocate = [list(alike) for alike in colocate]
    order = list(order)
    given = stage_models is not None or classes is not None
    if stage_models is not None and classes is not None:
        raise ValueError("give stage_models, or classes with stage models of their own, not both")
    if nodes > 1 and any(c.replicas for c in classes or ()):
        raise ValueError("stages of several devices are not searched for in several nodes: nodes must be 1")
    if stage_models is None:
        stage_models = [StageModel((StageOption("default", {time: 1.0}, {memory: 1.0}),))] * n_stages
    check_classes(n_stages, classes)
    offers: list[tuple[int, int, Sequence[StageModel]]] = [(0, 1, stage_models)]  # class, devices
    if classes is not None:
        offers = [(i, r, o) for i, c in enumerate(classes) for r, o in ((1, c.stages), *c.replicas.items())]
    for _, _, offer in offers:
        check_models(n_stages, offer)
    check_nodes(graph, n_stages, colocate, order, fixed)
    all_options = [o for _, _, offer in offers for m in offer for o in m.options]
    used = {a for o in all_options for weights in (o.time, o.memory) for a in weights}
    needed = used if given else used - {memory} if memory_limit is None else used
    check_nodes_of_stages(n_stages, nodes, per_node)
    sent = {transfer, size, far}
    check_numbers(graph, used | sent, sent, needed)
    check_acyclic(graph, order)
    ways = [
        Way(
            kind,
            devices,
            compile_problem(
                graph,
                n_stages,
                offer,
                limits=memory_limits(n_stages, offer, memory_limit),
                transfer=transfer,
                size=size,
                far=far,
                kind="overlap" if overlap else "sum",
                devices=devices,
                colocate=colocate,
                order=order,
                fixed=fixed,
                allow_empty=allow_empty,
            ),
        )
        for kind, devices, offer in offers
    ]
    problem = ways[0].problem
    class_of: tuple[int, ...] = ()
    replicas: tuple[int, ...] = ()
    check_enough(problem, len(graph))
    first = clock if nodes == 1 else clock.within(0.5)
    if classes is not None and len(ways) > 1:
        assigned = assign(ways, [c.count for c in classes], first, seed)
        problem = in_order(ways, assigned.way_of)
        class_of = tuple(ways[w].kind for w in assigned.way_of)
        replicas = tuple(ways[w].devices for w in assigned.way_of) if any(c.replicas for c in classes) else ()
        bound = Bound(assigned.bound, "devices")
        solution = Solution(assigned.stage, assigned.load, bound, "devices")
        if assigned.stage is None:
            solution = replace(solve(problem, engine=engine, clock=clock, seed=seed), bound=bound)
    else:
        solution = solve(problem, engine=engine, clock=first, seed=seed)
    stage, node_of = solution.stage, None
    if stage is None:
        raise infeasible(problem, solution)
    if nodes > 1:
        several, floor = Nodes(nodes, per_node or n_stages), solution.bound.value
        placed = place(problem, several, stage, clock, seed, floor=floor)
        stage, node_of = placed.stage, placed.node_of
        proven = placed.proven and not class_of  # else of this order of devices only
        bound = Bound(placed.load, "borders") if proven else solution.bound
        solution = Solution(stage, placed.load, bound, "borders")
    loads = evaluate(problem, stage, node_of)
    bottleneck = int(np.argmax(loads.load))
    stage_of = {u: int(s) for s, alike in zip(stage, problem.members, strict=True) for u in alike}
    return Partition(
        stage_of=MappingProxyType(stage_of),
        n_stages=problem.n_stages,
        loads=tuple(loads.load.tolist()),
        compute=tuple(loads.compute.tolist()),
        time_in=tuple(loads.time_in.tolist()),
        time_out=tuple(loads.time_out.tolist()),
        memory=tuple(loads.memory.tolist()),
        options=tuple(problem.options[s][max(int(o), 0)].label for s, o in enumerate(loads.option)),
        max_load=loads.max_load,
        lower_bound=min(solution.bound.value, loads.max_load),
        engine=solution.engine,
        seconds=clock.seconds,
        bottleneck=bottleneck,
        reason=reason(problem, solution, loads),
        node_of=() if node_of is None else tuple(node_of.tolist()),
        class_of=class_of,
        replicas=replicas,
    )

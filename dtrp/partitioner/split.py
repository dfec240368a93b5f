"""Plan and graph become stage modules, and the wiring that says how their values travel.

Any DAG can be cut: a value goes straight from the stage that makes it to each stage that uses it, also over
several stages; model inputs go straight from the caller to where they are used. A parameter that several
stages use appears in each of them under its original name. Containers stay where they are made (`hazards`).
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..errors import PlanMismatchError
from ..wiring import CALLER, Constant, Source, StageWires, Wiring
from .align import align
from .capture.graph import Captured, ModeGraph
from .capture.traced import assembled
from .hazards import Hazards
from .plan import Plan


@dataclass(frozen=True)
class SplitGraph:
    """The stages of one mode: a graph module each, and their wiring."""

    modules: tuple[fx.GraphModule, ...]
    wiring: Wiring

    def __call__(self, *inputs: Any) -> Any:
        """Run the stages one after the other in this process; differentiable."""
        made: list[tuple[Any, ...]] = []

        def fetch(source: Source) -> Any:
            return inputs[source.index] if source.stage == CALLER else made[source.stage][source.index]

        for module, wires in zip(self.modules, self.wiring.stages, strict=True):
            made.append(module.forward(*(fetch(s) for s in wires.inputs)))  # not a call: fx prints failures
        return self.wiring.unflatten(
            [leaf.value if isinstance(leaf, Constant) else fetch(leaf) for leaf in self.wiring.result]
        )


@dataclass(frozen=True)
class Split:
    """Both modes' stages. The two are one object where one graph serves both modes."""

    train: SplitGraph
    eval: SplitGraph

    def graph(self, training: bool) -> SplitGraph:
        return self.train if training else self.eval


def split(captured: Captured, plan: Plan, hazards: Hazards) -> Split:
    """Cut both modes' graphs of a captured model as the plan says.

    Raises
    ------
    PlanMismatchError
        The plan does not fit the graph: unknown or missing nodes, an edge that runs backwards, nodes apart
        that must share a stage.
    """
    stage_of = dict(plan.stage_of)
    _check(captured.train, stage_of, plan.n_stages, hazards)
    flows = hazards.differentiable & reached_by_training(captured.train)
    train = split_graph(captured.train, stage_of, plan.n_stages, flows)
    if captured.one_graph:
        return Split(train, train)
    eval_hazards = hazards.evaluate or hazards
    eval_stage_of = align(captured.train, captured.eval, stage_of, plan.n_stages, eval_hazards)
    return Split(train, split_graph(captured.eval, eval_stage_of, plan.n_stages, frozenset()))


def reached_by_training(graph: ModeGraph) -> frozenset[str]:
    """Nodes whose value depends on a parameter that is trained (``requires_grad``), as it stands now; by what
    was written into it later, too."""
    reached: set[str] = set()
    written: set[int] = set()  # storages, by nodes that are reached
    root = graph.module
    for access in graph.walk.accesses:
        node = access.node
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(root)
            trained = isinstance(value, torch.Tensor) and value.requires_grad
        elif node.op == "call_module":
            trained = any(p.requires_grad for p in root.get_submodule(str(node.target)).parameters())
        else:
            trained = False
        if trained or any(a.name in reached for a in node.all_input_nodes) or access.reads & written:
            reached.add(node.name)
            written |= access.writes
    return frozenset(reached.union(a.node.name for a in graph.walk.accesses if a.makes & written))


def split_graph(
    graph: ModeGraph,
    stage_of: Mapping[str, int],
    n_stages: int,
    differentiable: Collection[str],
) -> SplitGraph:
    """Cut one graph; ``stage_of`` covers its call nodes, legally. ``differentiable`` names the nodes through
    which gradient flows."""
    builders = [_StageBuilder(graph.module, k) for k in range(n_stages)]
    placeholders = {n: i for i, n in enumerate(graph.module.graph.find_nodes(op="placeholder"))}

    def value(node: fx.Node, stage: int) -> fx.Node:
        """``node``'s value as a node of stage ``stage``'s graph."""
        builder = builders[stage]
        if node in builder.here:
            return builder.here[node]
        if node.op == "get_attr":
            builder.here[node] = builder.copy(node, value)
        elif node.op == "placeholder":
            builder.here[node] = builder.argument(node, Source(CALLER, placeholders[node]))
        else:
            builder.here[node] = builder.argument(node, builders[stage_of[node.name]].give(node))
        return builder.here[node]

    for node in graph.module.graph.nodes:
        if node.op in ("call_function", "call_module", "call_method"):
            builder = builders[stage_of[node.name]]
            builder.here[node] = builder.copy(node, value)

    result: list[Source | Constant] = []
    (output,) = graph.module.graph.find_nodes(op="output")
    for leaf in output.args[0]:
        if not isinstance(leaf, fx.Node):
            result.append(Constant(leaf))
        elif leaf.op == "placeholder":
            result.append(Source(CALLER, placeholders[leaf]))
        else:
            # A parameter that is itself an output is given by the last stage.
            home = builders[stage_of[leaf.name] if leaf.op != "get_attr" else n_stages - 1]
            value(leaf, home.stage)
            result.append(home.give(leaf))
    finished = [builder.finish(differentiable) for builder in builders]
    return SplitGraph(
        tuple(module for module, _ in finished),
        Wiring(tuple(wires for _, wires in finished), tuple(result), graph.out_spec),
    )


class _StageBuilder:
    """One stage's graph while it grows."""

    def __init__(self, root: fx.GraphModule, stage: int) -> None:
        self.root = root
        self.stage = stage
        self.graph = fx.Graph()
        self.here: dict[fx.Node, fx.Node] = {}  # original node -> its value in this graph
        self.inputs: list[tuple[Source, fx.Node]] = []
        self.given: dict[fx.Node, Source] = {}
        self.outputs: list[tuple[fx.Node, fx.Node]] = []  # original, node here
        self.first: fx.Node | None = None

    def copy(self, node: fx.Node, value: Any) -> fx.Node:
        # Arguments first: a value from elsewhere adds its placeholder before the node is placed.
        arguments = {a: value(a, self.stage) for a in node.all_input_nodes}
        copied = self.graph.node_copy(node, lambda a: arguments[a])
        self.first = self.first or copied
        return copied

    def argument(self, node: fx.Node, source: Source) -> fx.Node:
        """A value that arrives from outside."""
        with self._front():
            placeholder = self.graph.placeholder(node.name)
        placeholder.meta = dict(node.meta)
        self.inputs.append((source, placeholder))
        return placeholder

    def _front(self) -> AbstractContextManager[Any]:
        return self.graph.inserting_before(self.first) if self.first else nullcontext()

    def give(self, node: fx.Node) -> Source:
        """The source under which this stage gives ``node``'s value; adds an output on first use."""
        if node not in self.given:
            self.given[node] = Source(self.stage, len(self.outputs))
            self.outputs.append((node, self.here[node]))
        return self.given[node]

    def finish(self, differentiable: Collection[str]) -> tuple[fx.GraphModule, StageWires]:
        self.graph.output(tuple(here for _, here in self.outputs))
        self.graph.lint()
        module = assembled(attributes(self.root, self.graph), self.graph, f"Stage{self.stage}")
        module.training = self.root.training
        order = {n: i for i, n in enumerate(self.graph.find_nodes(op="placeholder"))}
        inputs = sorted(self.inputs, key=lambda pair: order[pair[1]])
        return module, StageWires(
            inputs=tuple(source for source, _ in inputs),
            outputs=tuple(original.name for original, _ in self.outputs),
            differentiable=tuple(
                original.name in differentiable and _carries_gradient(here.meta.get("val"))
                for original, here in self.outputs
            ),
        )


def _carries_gradient(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def attributes(root: nn.Module, graph: fx.Graph) -> dict[str, Any]:
    """Modules, parameters and tensors that ``graph`` uses, by their original qualified names."""
    targets = {str(n.target) for n in graph.nodes if n.op in ("call_module", "get_attr")}
    return {t: operator.attrgetter(t)(root) for t in sorted(targets)}


def _check(graph: ModeGraph, stage_of: Mapping[str, int], n_stages: int, hazards: Hazards) -> None:
    """Every node once, no edge backwards, nothing cut that must stay together."""
    nodes = [n for n in graph.module.graph.nodes if n.op in ("call_function", "call_module", "call_method")]
    names = {n.name for n in nodes}
    if missing := sorted(names - stage_of.keys()):
        raise PlanMismatchError(f"the plan says nothing of node(s) {_list(missing)} of the captured graph")
    known = {n.name for n in graph.module.graph.nodes}
    if unknown := sorted(stage_of.keys() - known):
        raise PlanMismatchError(f"the plan names node(s) {_list(unknown)} that the captured graph lacks")
    for name in sorted(names):
        if not 0 <= stage_of[name] < n_stages:
            raise PlanMismatchError(
                f"node {name!r} is in stage {stage_of[name]}; stages go from 0 to {n_stages - 1}"
            )
    edges = [(a.name, n.name) for n in nodes for a in n.all_input_nodes if a.name in names]
    for u, v in [*edges, *hazards.order]:
        if u in names and v in names and stage_of[u] > stage_of[v]:
            raise PlanMismatchError(
                f"node {v!r} (stage {stage_of[v]}) needs node {u!r} of a later stage ({stage_of[u]}); "
                f"values only flow to the same or a later stage"
            )
    for group in hazards.groups:
        by_stage: dict[int, list[str]] = defaultdict(list)
        for name in sorted(group & names):
            by_stage[stage_of[name]].append(name)
        if len(by_stage) > 1:
            raise PlanMismatchError(
                f"nodes {_list(sorted(group & names))} must share a stage (one writes to the other's memory, "
                f"their value cannot travel, or evaluation uses them in another order); the plan puts them "
                f"in stages {sorted(by_stage)}"
            )


def _list(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    shown = ", ".join(repr(n) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"

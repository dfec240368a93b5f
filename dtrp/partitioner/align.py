"""Lays the eval graph over the train graph's stages.

A model whose code reads ``self.training`` has a graph per mode. The plan is made for the train graph; the
eval graph gets the same stages, so that each parameter is used where it is trained. Where parameters leave a
choice, a node that both graphs have (same operation, same place in the model, same occurrence) keeps its
stage if it can, and what only eval has goes to the earliest stage that its inputs allow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

import networkx as nx
from torch import fx

from ..errors import CaptureError
from .capture.graph import ModeGraph
from .eval_rules import keyed, state_of, units
from .hazards import Hazards


def align(
    train: ModeGraph, evaluate: ModeGraph, stage_of: Mapping[str, int], n_stages: int, hazards: Hazards
) -> dict[str, int]:
    """Stage of every call node of the eval graph; ``hazards`` are the eval graph's.

    Raises
    ------
    CaptureError
        A parameter would be used in a stage that does not train it.
    """
    nodes = {node.name: node for _, node in keyed(evaluate)}
    owners = _stages_of_state(train, stage_of)
    needs = units(evaluate, hazards.groups, hazards.order)
    order = list(nx.topological_sort(needs))
    members: dict[int, frozenset[str]] = {u: frozenset(needs.nodes[u]["members"]) for u in order}

    # The latest stage of each unit, given where the parameters of what follows it are: no choice that is
    # made below can then end in a stage behind a parameter.
    latest: dict[int, int] = {}
    allowed: dict[int, set[int]] = {}
    for unit in reversed(order):
        end = min((latest[u] for u in needs.successors(unit)), default=n_stages - 1)
        places = [owners[t] for name in members[unit] for t in state_of(nodes[name]) if t in owners]
        held = set(range(n_stages)).intersection(*places)
        allowed[unit] = {s for s in held if s <= end}
        if not allowed[unit]:
            raise _impossible([nodes[n] for n in members[unit]], owners, held, end)
        latest[unit] = max(allowed[unit])

    known = {key: stage_of[node.name] for key, node in keyed(train)}
    wishes = {node.name: known[key] for key, node in keyed(evaluate) if key in known}
    found: dict[int, int] = {}
    for unit in order:
        start = max((found[u] for u in needs.predecessors(unit)), default=0)
        wish = max((wishes[n] for n in members[unit] if n in wishes), default=start)
        found[unit] = min((s for s in allowed[unit] if s >= start), key=lambda s: (abs(s - wish), s))
    return {name: found[unit] for unit in order for name in members[unit]}


def _impossible(
    nodes: Collection[fx.Node], owners: Mapping[int, set[int]], held: Collection[int], end: int
) -> CaptureError:
    used = [(n, name, sorted(owners[t])) for n in nodes for t, name in state_of(n).items() if t in owners]
    node, first, _ = used[0]
    place = node.meta.get("location") or f"module {node.meta.get('module', '')!r}"
    stages = ", ".join(f"{name} {where}" for _, name, where in used[:6])
    why = f"what uses its result is in stage {end} or earlier" if held else "it needs them in one stage"
    return CaptureError(
        f"in eval mode, {place} uses {first!r} in another order than in training: the stages that train "
        f"what it uses are {stages}, but {why}. Use fewer stages, or call the layers in the same order in "
        "both modes."
    )


def _stages_of_state(graph: ModeGraph, stage_of: Mapping[str, int]) -> dict[int, set[int]]:
    owners: dict[int, set[int]] = defaultdict(set)
    for _, node in keyed(graph):
        for tensor in state_of(node):
            owners[tensor].add(stage_of[node.name])
    return owners

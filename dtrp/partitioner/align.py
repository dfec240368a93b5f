"""Lays the eval graph over the train graph's stages.

A model whose code reads ``self.training`` has a graph per mode. The plan is made for the train graph; the
eval graph gets the same stages, so that each parameter is used where it is trained. Nodes that both graphs
have (same operation, same place in the model, same occurrence) keep their stage; what only eval has goes to
the earliest stage that its inputs allow.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping
from itertools import chain

from torch import fx

from ..errors import CaptureError
from .capture.graph import ModeGraph


def align(train: ModeGraph, evaluate: ModeGraph, stage_of: Mapping[str, int]) -> dict[str, int]:
    """Stage of every call node of the eval graph.

    Raises
    ------
    CaptureError
        A parameter would be used in a stage that does not train it.
    """
    known = {key: stage_of[node.name] for key, node in _keyed(train)}
    owners = _stages_of_state(train, stage_of)
    found: dict[str, int] = {}
    for key, node in _keyed(evaluate):
        before = max((found[a.name] for a in node.all_input_nodes if a.name in found), default=0)
        state = _state(node)
        wanted = known.get(key, before)
        for name in state:
            if name in owners and wanted not in owners[name]:
                wanted = min((s for s in owners[name] if s >= before), default=wanted)
        stage = max(wanted, before)
        for name in state:
            if name in owners and stage not in owners[name]:
                raise CaptureError(
                    f"in eval mode, {node.format_node()} uses {name!r} after values of stage {before}, but "
                    f"training holds it in stage(s) {sorted(owners[name])}. Use fewer stages, or pin "
                    f"module {node.meta.get('module', '')!r} to a later stage."
                )
        found[node.name] = stage
    return found


def _keyed(graph: ModeGraph) -> Iterator[tuple[Hashable, fx.Node]]:
    seen: Counter[Hashable] = Counter()
    for node in graph.module.graph.nodes:
        if node.op in ("call_function", "call_module", "call_method"):
            key = (node.op, str(node.target), node.meta.get("module", ""))
            yield (*key, seen[key]), node
            seen[key] += 1


def _stages_of_state(graph: ModeGraph, stage_of: Mapping[str, int]) -> dict[str, set[int]]:
    owners: dict[str, set[int]] = defaultdict(set)
    for _, node in _keyed(graph):
        for name in _state(node):
            owners[name].add(stage_of[node.name])
    return owners


def _state(node: fx.Node) -> set[str]:
    """Attributes, and modules with parameters or buffers, that a node uses."""
    names = {str(a.target) for a in node.all_input_nodes if a.op == "get_attr"}
    if node.op == "call_module":
        root = node.graph.owning_module
        module = root.get_submodule(str(node.target)) if root is not None else None
        if module is not None and next(chain(module.parameters(), module.buffers()), None) is not None:
            names.add(str(node.target))
    return names

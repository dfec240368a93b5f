"""What a cut may not do: the rules that data edges alone do not show.

When the graph was compared with the model, every operator was seen (`capture.operators.Walk`): for each node,
which storages it reads, makes and writes, and whether it draws random numbers. From that follow

- **groups**: nodes that must share a stage. Between stages a value is a copy, so a tensor and everything
  that touches it up to the last in-place write to it stay together; so do all users of a buffer that is
  updated; and a value that cannot travel (anything but tensors and numbers) stays with its users.
- **order**: pairs ``(u, v)`` with stage(u) <= stage(v) beyond the data edges. Whoever reads a tensor after
  an in-place write comes after the writer; random operations keep the program's order, so that the stages,
  run one after the other, draw the same numbers as the model; and so do the users of one value through
  which gradient flows, since autograd adds up their gradients in the reverse of that order, and sums in
  another order differ in the last bit.
- what the eval graph needs, where it is another one (`eval_rules`), as groups and order.
- **differentiable**: the nodes through which gradient flows when every parameter is trainable.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn

from .capture.custom import same_form
from .capture.gradients import regions
from .capture.graph import Captured, ModeGraph
from .capture.leaves import has_hooks
from .capture.left import Left
from .capture.operators import Access
from .eval_rules import rules_of_eval, units, without_cycles

TRAVELS = (torch.Tensor, bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool, type(None))
"""What a link can carry from stage to stage."""

CALLS = ("call_function", "call_method", "call_module")

_LIBRARIES = ("torch", "builtins", "operator", "_operator", "math", "dtrp")


@dataclass(frozen=True)
class Hazards:
    """Rules for cutting one graph; nodes are given by name.

    Attributes
    ----------
    groups : tuple of frozenset of str
        Nodes that must share a stage; disjoint.
    order : tuple of (str, str)
        ``(u, v)``: stage(u) <= stage(v), though no data flows from u to v.
    differentiable : frozenset of str
        Nodes whose value requires gradient when all floating-point parameters do.
    written_inputs : frozenset of int
        Model inputs that the graph writes to in place.
    drawing : frozenset of str
        Nodes that may draw random numbers, in either mode.
    evaluate : Hazards, optional
        Of the eval graph, if there is one of its own; what it asks of a cut is part of the rules above.
    """

    groups: tuple[frozenset[str], ...]
    order: tuple[tuple[str, str], ...]
    differentiable: frozenset[str]
    written_inputs: frozenset[int]
    evaluate: Hazards | None = None
    drawing: frozenset[str] = frozenset()


def find_hazards(captured: Captured, graph: ModeGraph | None = None) -> Hazards:
    """The rules for cutting ``graph`` (default: the train graph). Nothing is computed."""
    graph = graph or captured.train
    gm, accesses = graph.module, graph.walk.accesses
    groups, order, written = _storage_rules(accesses, graph.walk.state)
    groups += _untransferable(gm)
    groups += [{n.name for n in region if n.op in CALLS} for region in regions(gm.graph)]
    random = [a.node.name for a in accesses if a.random]
    order += list(itertools.pairwise(random))
    order += _summing_order(accesses)
    order = [(u, v) for u, v in dict.fromkeys(order) if u != v]
    merged = _merge(groups)
    evaluate = None
    if graph is captured.train and not captured.one_graph:
        evaluate = find_hazards(captured, captured.eval)
        needs = units(captured.eval, evaluate.groups, evaluate.order)
        more, also = rules_of_eval(captured.train, captured.eval, needs)
        merged, order = without_cycles(captured.train, [*merged, *more], [*order, *also])
    return Hazards(
        groups=tuple(merged),
        order=tuple(order),
        differentiable=frozenset(a.node.name for a in accesses if a.differentiable),
        written_inputs=frozenset(written),
        evaluate=evaluate,
        drawing=frozenset(random) | _foreign(gm) | (evaluate.drawing if evaluate else frozenset()),
    )


def is_foreign(node: fx.Node, root: nn.Module) -> bool:
    """Whether a node runs code which is not torch's: it may draw from Python's and numpy's generators, or
    keep something in Python, unseen."""
    if node.op == "call_module":
        module = root.get_submodule(str(node.target))
        return type(module).__module__.split(".")[0] != "torch" or has_hooks(module)
    kind = getattr(node.target, "__module__", None) or type(node.target).__module__
    return node.op == "call_function" and str(kind).split(".")[0] not in _LIBRARIES


def _foreign(gm: fx.GraphModule) -> frozenset[str]:
    return frozenset(node.name for node in gm.graph.nodes if is_foreign(node, gm))


def _storage_rules(
    accesses: Sequence[Access], state: frozenset[int]
) -> tuple[list[set[str]], list[tuple[str, str]], set[int]]:
    """Groups and order that in-place writes ask for, and the model inputs that are written."""
    touching: dict[int, list[Access]] = defaultdict(list)
    for access in accesses:
        for storage in access.reads | access.makes | access.writes:
            touching[storage].append(access)
    placeholders = [a for a in accesses if a.node.op == "placeholder"]
    groups: list[set[str]] = []
    order: list[tuple[str, str]] = []
    written: set[int] = set()
    for storage, touches in touching.items():
        # A node that makes a storage and writes to it there and then is nobody else's business.
        writers = [i for i, a in enumerate(touches) if storage in a.writes and (i > 0 or storage in state)]
        if not writers:
            continue
        # State that a pass updates lives in one stage only; other tensors may leave after the last write.
        end = len(touches) if storage in state else writers[-1] + 1
        groups.append({a.node.name for a in touches[:end] if a.node.op not in ("placeholder", "get_attr")})
        order += [(touches[end - 1].node.name, a.node.name) for a in touches[end:]]
        written |= {i for i, p in enumerate(placeholders) if storage in p.makes}
    return groups, order, written


def _summing_order(accesses: Sequence[Access]) -> list[tuple[str, str]]:
    """Users of each value, and of each parameter, in the program's order."""
    flows = {a.node: None for a in accesses if a.differentiable}
    users: dict[object, list[str]] = defaultdict(list)
    for node in flows:
        sources: set[object] = {a for a in node.all_input_nodes if a in flows}
        if node.op == "call_module":
            sources.add(node.target)
        for source in sources:
            users[source].append(node.name)
    return [pair for names in users.values() for pair in itertools.pairwise(names)]


def _untransferable(gm: fx.GraphModule) -> list[set[str]]:
    """Groups that keep a value which cannot travel, or would have to be taken apart, beside its users."""
    groups = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        if not isinstance(node.meta.get("val"), TRAVELS):
            groups.append({node.name, *(u.name for u in node.users if u.op != "output")})
        checks = [u.name for u in node.users if u.target is same_form or isinstance(u.target, Left)]
        groups.append({node.name, *checks})
    return groups


def _merge(groups: Iterable[set[str]]) -> list[frozenset[str]]:
    """Overlapping groups become one (union-find by repeated lookup)."""
    home: dict[str, set[str]] = {}
    for group in groups:
        merged = set(group)
        for name in group:
            merged |= home.get(name, set())
        for name in merged:
            home[name] = merged
    unique = {id(g): g for g in home.values()}
    return [frozenset(g) for g in unique.values() if len(g) > 1]

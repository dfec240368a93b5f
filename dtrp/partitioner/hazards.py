"""What a cut may not do: the rules that data edges alone do not show.

Running the graph once on fake tensors while watching every operator tells, for each node, which storages
it reads, makes and writes, and whether it draws random numbers. From that follow

- **groups**: nodes that must share a stage. Between stages a value is a copy, so a tensor and everything
  that touches it up to the last in-place write to it stay together; so do all users of a buffer that is
  updated; and a value that cannot travel (anything but tensors, numbers and containers of them) stays with
  its users.
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
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .capture.custom import SameForm
from .capture.fakes import FakeWorld
from .capture.gradients import regions
from .capture.graph import Captured, ModeGraph
from .capture.modes import in_mode
from .capture.real import RealRuns
from .capture.snapshot import untouched
from .eval_rules import rules_of_eval, units, without_cycles

TRAVELS = (torch.Tensor, bool, int, float, torch.SymInt, torch.SymFloat, torch.SymBool, type(None))
"""Leaves that a link can carry from stage to stage."""

CALLS = ("call_function", "call_method", "call_module")


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
    evaluate : Hazards, optional
        Of the eval graph, if there is one of its own; what it asks of a cut is part of the rules above.
    """

    groups: tuple[frozenset[str], ...]
    order: tuple[tuple[str, str], ...]
    differentiable: frozenset[str]
    written_inputs: frozenset[int]
    evaluate: Hazards | None = None


def find_hazards(captured: Captured, graph: ModeGraph | None = None) -> Hazards:
    """The rules for cutting ``graph`` (default: the train graph). Nothing is computed."""
    gm = (graph or captured.train).module
    with in_mode(captured.model, captured.flags if gm is captured.train.module else None):
        accesses, state = _watch(gm, captured.runs)
    groups, order, written = _storage_rules(accesses, state)
    groups += _untransferable(gm)
    groups += [{n.name for n in region if n.op in CALLS} for region in regions(gm.graph)]
    random = [a.node.name for a in accesses if a.random]
    order += list(itertools.pairwise(random))
    order += _summing_order(accesses)
    order = [(u, v) for u, v in dict.fromkeys(order) if u != v]
    merged = _merge(groups)
    evaluate = None
    if gm is captured.train.module and not captured.one_graph:
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
    )


@dataclass
class _Access:
    """What one node did to storages when it ran."""

    node: fx.Node
    reads: set[int] = field(default_factory=set)
    makes: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)
    random: bool = False
    differentiable: bool = False


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes, for the node that is running, every operator's reads, writes and use of random numbers."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.access: _Access | None = None
        self.seen: list[Any] = []  # kept alive: a freed storage's number would come back as another's

    @staticmethod
    def storages(tree: Any) -> set[int]:
        tensors = [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]
        return {int(t.untyped_storage()._cdata) for t in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        access = self.access
        if access is not None:
            access.random |= torch.Tag.nondeterministic_seeded in func.tags
            for argument, value in _arguments(func, args, kwargs):
                storages = self.storages(value)
                access.reads |= storages
                if argument.alias_info is not None and argument.alias_info.is_write:
                    access.writes |= storages
        result = func(*args, **kwargs)
        self.seen.append((args, kwargs, result))
        return result


class _Runner(fx.Interpreter):
    """Runs the graph on fake tensors, one `_Access` per node."""

    def __init__(self, gm: fx.GraphModule, world: FakeWorld) -> None:
        super().__init__(gm, garbage_collect_values=False)  # storages' ids must stay unique
        self.world = world
        self.watch = _Watch()
        self.accesses: list[_Access] = []

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.world.twin(value) if isinstance(value, torch.Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(target, args, kwargs)
        except Exception as error:
            # A module that was kept whole because it decides by values cannot run on fake tensors.
            module = self.fetch_attr(target)
            try:
                value = self.world.really_run(module, args, kwargs)
            except Exception:
                raise error from None
            access = self.watch.access
            assert access is not None
            access.random = True  # unseen, so to be on the safe side
            access.writes |= self.watch.storages(list(module.buffers()))
            return value

    def run_node(self, n: fx.Node) -> Any:
        access = self.watch.access = _Access(n)
        value = super().run_node(n)
        self.watch.access = None
        if n.op != "output":
            access.reads |= self.watch.storages([self.env[a] for a in n.all_input_nodes])
            access.makes |= self.watch.storages(value)
            access.differentiable = any(
                isinstance(v, torch.Tensor) and v.requires_grad for v in pytree.tree_leaves(value)
            )
            self.accesses.append(access)
        return value


def _watch(gm: fx.GraphModule, runs: RealRuns) -> tuple[list[_Access], set[int]]:
    """What each node does, and the storages of parameters and buffers."""
    example = [n.meta["val"] for n in gm.graph.find_nodes(op="placeholder")]
    world = FakeWorld(next((v.fake_mode for v in example if isinstance(v, FakeTensor)), None), runs)
    runner = _Runner(gm, world)
    allowed, world.mode.allow_non_fake_inputs = world.mode.allow_non_fake_inputs, True
    try:
        with untouched(gm), world.inhabited_by(gm), all_trainable(gm), torch.enable_grad(), runner.watch:
            state = runner.watch.storages([*gm.parameters(), *gm.buffers()])
            runner.run(*(v.detach().clone() if isinstance(v, torch.Tensor) else v for v in example))
    finally:
        world.mode.allow_non_fake_inputs = allowed
    return runner.accesses, state


@contextmanager
def all_trainable(module: nn.Module) -> Iterator[None]:
    """Every floating-point parameter requires gradient inside; flags are as before afterwards."""
    frozen = [
        p for p in module.parameters() if not p.requires_grad and (p.is_floating_point() or p.is_complex())
    ]
    for p in frozen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _storage_rules(
    accesses: list[_Access], state: set[int]
) -> tuple[list[set[str]], list[tuple[str, str]], set[int]]:
    """Groups and order that in-place writes ask for, and the model inputs that are written."""
    touching: dict[int, list[_Access]] = defaultdict(list)
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


def _summing_order(accesses: list[_Access]) -> list[tuple[str, str]]:
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
    """Groups that keep a value which cannot travel, or is only taken apart, beside its users."""
    groups = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output", "get_attr"):
            continue
        leaves = pytree.tree_leaves(node.meta.get("val"))
        users = [u.name for u in node.users if u.op != "output"]
        if not all(isinstance(leaf, TRAVELS) for leaf in leaves):
            groups.append({node.name, *users})
        elif not isinstance(node.meta.get("val"), TRAVELS):
            items = [u.name for u in node.users if u.op == "call_function" and u.target is operator.getitem]
            groups.append({node.name, *items})
        checks = [u.name for u in node.users if isinstance(u.target, SameForm)]
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


def _arguments(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    for argument, value in itertools.zip_longest(func._schema.arguments, args):
        if argument is None:
            return
        yield argument, kwargs.get(argument.name, value)

"""A captured graph is accepted only if it performs the same operators as the model.

The model's own code and its graph run one after the other from the same state, on fake tensors, and their
lists of operators (`operators`) must agree to the last entry. So must what is behind them: the output's
structure, the buffers that were assigned, and the graph that autograd made for the backward pass, with what
custom functions do in it. A branch taken the other way, a custom backward or an autocast that was lost, a
number that was frozen: each shows in the list, at any size and on the meta device.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .custom import guard
from .fakes import FakeWorld, fake_inputs
from .leaves import entry
from .location import user_location
from .methods import VALUE_DEPENDENT, KeptCall, held_name, own_methods
from .operators import Access, Event, OperatorLog, Walk, join, storages_in
from .patches import Observer, observed
from .propagate import Runner
from .structure import flatten_output, map_tensors, mirror, mutable, tensors_in
from .targets import node_form
from .task import Task
from .traced import Traced

_CUSTOM: Any = torch.autograd.function.BackwardCFunction


class Unfaithful(Exception):
    """The graph does something else than the model."""

    place = ""


def verify(task: Task, traced: Traced, training: bool) -> Walk:
    """Run the model and its graph in one mode on fake tensors, and compare what they do.

    Returns
    -------
    Walk
        What each node of the graph did.

    Raises
    ------
    Unfaithful
        They differ; the message names the first operator that does, its module and its line.
    """
    expected = _events_of_model(task, traced, training)
    found, walk = _events_of_graph(task, traced, training)
    n = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a.key != b.key), None)
    if n is None and len(expected) == len(found):
        return walk
    n = min(len(expected), len(found)) if n is None else n
    mine = found[n] if n < len(found) else None
    theirs = _events_of_model(task, traced, training, watched=n)[n] if n < len(expected) else None
    raise _difference(theirs, mine)


def _difference(model: Event | None, graph: Event | None) -> Unfaithful:
    event = model or graph
    assert event is not None
    module = f"module {event.module!r}" if event.module else "the model itself"
    error = Unfaithful(
        f"in {module}{', at ' + event.place if event.place else ''} the model runs "
        f"{model.text if model else 'nothing more'} where its graph runs "
        f"{graph.text if graph else 'nothing more'}"
    )
    error.place = event.place
    error.__dict__["dtrp_module"] = event.module
    return error


def _events_of_model(task: Task, traced: Traced, training: bool, watched: int = -1) -> list[Event]:
    model = task.model
    world = task.world()
    watcher = _Watcher(model, world, traced, watched)
    with task.run(training), world.inhabited_by(model), torch.set_grad_enabled(task.grad):
        watcher.log = log = _started(model, world, watcher.where)
        inputs = _inputs(task, world, log)
        args, kwargs = task.signature.unflatten(inputs)
        watcher.found = dict(model.named_buffers())
        watcher.watch_methods(traced.held)
        asked = watcher if watcher.answers or watcher.calls else nullcontext()
        with torch.compiler.set_stance("force_eager"), asked, observed(watcher, model), log:
            _seed()
            output = entry(model)(*args, **kwargs)
            watcher.paused = True
            leaves, spec = flatten_output(output)
            watcher.module = ""
            updates = replaced_buffers(model, watcher.found)
            _finish(log, model, inputs, leaves, spec, updates)
    return log.events


def _events_of_graph(task: Task, traced: Traced, training: bool) -> tuple[list[Event], Walk]:
    model = task.model
    world = task.world()
    runner = _Runner(model, traced, world)
    with task.run(training), world.inhabited_by(model), torch.set_grad_enabled(task.grad):
        runner.log = log = _started(model, world, runner.where)
        inputs = _inputs(task, world, log)
        with torch.compiler.set_stance("force_eager"), observed(Observer(), model), log:
            _seed()
            found = dict(model.named_buffers())
            state = storages_in(_held_by(model, traced))
            before = {name: p._version for name, p in model.named_parameters()}
            leaves = list(runner.run(*inputs))
            written = frozenset(n for n, p in model.named_parameters() if p._version != before[n])
            # A module kept whole assigns to its buffers by itself.
            assigned = replaced_buffers(model, found)
            _finish(log, model, inputs, leaves, traced.out_spec, {**assigned, **runner.updates})
    return log.events, Walk(tuple(runner.accesses), frozenset(state), float(log.flops + world.flops), written)


def replaced_buffers(model: nn.Module, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Buffers that are others than those found before; one that was None is an attribute like any other."""
    return {n: b for n, b in model.named_buffers() if n in found and b is not found[n]}


def _held_by(model: nn.Module, traced: Traced) -> list[torch.Tensor]:
    """The parameters and buffers that a graph uses."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    held = [
        t for n in traced.graph.find_nodes(op="get_attr") if (t := tensors.get(str(n.target))) is not None
    ]
    for node in traced.graph.find_nodes(op="call_module"):
        module = traced.module(model, str(node.target))
        held += [*module.parameters(), *module.buffers()]
    return held


def _started(model: nn.Module, world: FakeWorld, where: Callable[[int], tuple[str, str]]) -> OperatorLog:
    log = OperatorLog(world, where)
    for p in model.parameters():  # fake ones; what is frozen now may be trained later
        if p.is_floating_point() or p.is_complex():
            p.requires_grad_(True)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        log.name(tensor, name)
    return log


def _inputs(task: Task, world: FakeWorld, log: OperatorLog) -> list[torch.Tensor]:
    inputs = fake_inputs(world, task.tensors)
    for name, tensor in zip(task.signature.tensor_names, inputs, strict=True):
        log.name(tensor, f"input {name}")
    return inputs


def _seed() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def _finish(
    log: OperatorLog,
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    leaves: Sequence[Any],
    spec: pytree.TreeSpec,
    updates: dict[str, torch.Tensor],
) -> None:
    """What is behind the forward pass: outputs, assigned buffers, and the way of gradients."""
    log.add("output", str(spec), *map(log.value, leaves), ())
    for name, value in sorted(updates.items()):
        log.add(f"buffer {name}", log.value(value), value.requires_grad, ())
    held = {name for name, b in model.named_buffers() if b.requires_grad and name not in updates}
    log.add("gradients flow to the buffers", *sorted(held), ())
    flows = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    log.add("gradients flow to", *(log.value(t) for t in flows), ())
    _autograd(log, [t.grad_fn if t.grad_fn is not None else t for t in flows])


def _autograd(log: OperatorLog, roots: Sequence[Any]) -> None:
    """An event for each node of the graph behind ``roots`` that autograd made of the forward pass.

    What a node does to a gradient follows from the operator that made it, which the list has already, and
    from the nodes that it hands gradients on to. Only a custom function's backward is code of its own: it
    runs.
    """
    numbers: dict[Any, int] = {}
    waiting: list[Any] = []

    def number(node: Any) -> Any:
        """What an edge leads to: an input or parameter, or another node; it is visited once."""
        variable = node.variable if isinstance(node, torch._C._functions.AccumulateGrad) else node
        if variable is None or isinstance(variable, torch.Tensor):
            return log.value(variable)
        if node not in numbers:
            numbers[node] = len(numbers)
            waiting.append(node)
        return numbers[node]

    for root in roots:
        number(root)
    while waiting:
        node = waiting.pop()
        custom = isinstance(node, _CUSTOM)  # a context in which its author stores what he likes
        after = _CUSTOM.next_functions.__get__(node) if custom else node.next_functions
        edges = [(number(source), place) for source, place in after]
        log.add(f"autograd {type(node).__name__}", *edges, numbers[node])
        if custom:
            _run_backward(log, node, numbers[node])


def _run_backward(log: OperatorLog, node: Any, number: int) -> None:
    with log.silent():
        forms = _CUSTOM._input_metadata.__get__(node)
        gradients = [torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in forms]
    for i, gradient in enumerate(gradients):
        log.name(gradient, f"gradient {i} of autograd node {number}")
    try:
        with torch.no_grad():
            back = _CUSTOM.apply(node, *gradients)
    except Exception as error:  # it decides by values, or asks which gradients there are
        log.add(f"{type(node).__name__} raises {type(error).__name__}", ())
    else:
        log.add(f"{type(node).__name__} gives", log.value(back), ())


class _Watcher(Observer, TorchFunctionMode):
    """Follows the model's own run: which module is running, which must really run, and what it decides by
    values, which the graph's guards say."""

    log: OperatorLog

    def __init__(self, model: nn.Module, world: FakeWorld, traced: Traced, watched: int) -> None:
        super().__init__()
        self.module = ""
        self.within = 0  # modules that are one node each, in which nothing is decided for the graph
        self._model, self._world, self._watched = model, world, watched
        self._names = {m: name for name, m in model.named_modules()}
        self._whole = {str(n.target) for n in traced.graph.find_nodes(op="call_module")}
        self.answers = [bool(n.args[1]) for n in traced.graph.find_nodes(op="call_function", target=guard)]
        self.calls = [(name, call) for name, call in traced.held.items() if isinstance(call, KeptCall)]
        self.found: dict[str, torch.Tensor] = {}

    def where(self, number: int) -> tuple[str, str]:
        return self.module, user_location() if number == self._watched else ""

    def on_module(self, module: nn.Module, proceed: Any, args: Any, kwargs: Any) -> Any:
        name = self._names.get(module)
        if name is None or self.paused:
            return proceed(module, *args, **kwargs)
        outer, self.module = self.module, name
        try:
            if name not in self._whole or self.within:  # as when it really runs
                return proceed(module, *args, **kwargs)
            run = lambda *a, **k: proceed(module, *a, **k)  # noqa: E731
            return self._as_one(name, module, run, args, kwargs)
        finally:
            self.module = outer

    def _as_one(self, name: str, module: nn.Module, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self.within += 1
        try:
            return whole(self.log, self._world, name, module, run, args, kwargs)
        finally:
            self.within -= 1

    def watch_methods(self, kept: Mapping[str, Any]) -> None:
        """Methods that are kept whole in the graph are so here too."""
        for path, module, name, method in own_methods(self._model) if kept else ():
            held = held_name(self._model, f"{path}.{name}".removeprefix("."))
            if held in kept:
                module.__dict__[name] = functools.partial(self._on_method, held, kept[held], method)

    def _on_method(self, held: str, kept: nn.Module, method: Any, *args: Any, **kwargs: Any) -> Any:
        if self.paused or self.module:
            return method(*args, **kwargs)
        return self._as_one(held, kept, method, args, kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        mark, kwargs = self.log.mark(), kwargs or {}
        try:
            return func(*args, **kwargs)
        except VALUE_DEPENDENT:
            if self.answers and not self.within and getattr(func, "__name__", "") == "__bool__":
                return self.answers.pop(0)
            if self.within or self.module or not self.calls:
                raise
        self.log.back_to(mark)
        name, kept = self.calls.pop(0)
        _, _, args, kwargs = node_form(func, args, kwargs)
        return self._as_one(name, kept, kept, args, kwargs)


class _Runner(Runner):
    """Runs the graph, and notes what each of its nodes does."""

    log: OperatorLog

    def __init__(self, model: nn.Module, traced: Traced, world: FakeWorld) -> None:
        super().__init__(model, traced.graph, world, traced.held)
        self.updates: dict[str, torch.Tensor] = {}
        self.accesses: list[Access] = []
        self.values: list[tuple[Access, list[torch.Tensor]]] = []

    def where(self, number: int) -> tuple[str, str]:
        meta = self.node.meta if self.node is not None else {}
        return str(meta.get("module", "")), str(meta.get("location", ""))

    def run_node(self, n: Node) -> Any:
        access = self.log.access = Access(n)
        try:
            value = self._value(n)
        finally:
            self.node = self.log.access = None
        if n.op != "output":
            access.reads |= storages_in([self.env[a] for a in n.all_input_nodes])
            access.makes |= storages_in(value)
            tensors = [v for v in pytree.tree_leaves(value) if isinstance(v, torch.Tensor)]
            self.accesses.append(access)
            self.values.append((access, tensors))
        else:  # a value may carry gradient since something was written into it
            for access, tensors in self.values:
                access.differentiable = any(v.requires_grad for v in tensors)
        return value

    def _value(self, n: Node) -> Any:
        if "copy" in n.meta:  # of a buffer that is assigned: the model reads it itself
            return self.env[n.all_input_nodes[0]]
        if "again" not in n.meta and "update" not in n.meta:
            return super().run_node(n)
        # What checkpointing does in the backward pass, which the model runs without here; and an assignment.
        with self.log.silent():
            value = super().run_node(n)
        if "update" in n.meta:
            buffer, assigned = (self.env[a] for a in n.all_input_nodes)
            if assigned is not buffer:  # `self.steps += 1` assigns what it has changed
                self.updates[self.log.known(buffer)] = assigned
        return value

    def whole(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        return whole(self.log, self.world, name, module, module, args, kwargs)


def whole(
    log: OperatorLog,
    world: FakeWorld,
    name: str,
    module: nn.Module,
    run: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> Any:
    """A module that stands in the graph as one node: on fake tensors if it can, else it really runs."""
    mark, found = log.mark(), mutable((args, kwargs))
    try:
        return run(*args, **kwargs)
    except Exception as error:
        log.back_to(mark)
        mirror((args, kwargs), found)
        try:
            with log.silent():
                inputs = [t for _, t in tensors_in((args, kwargs))]
                result = world.really_run(module, args, kwargs)
            if log.access is not None:
                log.access.random = True  # unseen, so to be on the safe side
                log.access.writes |= storages_in(list(module.buffers()))
        except Exception:
            raise error from None
        outputs = [t for _, t in tensors_in(result)]
        made = join(log, name, inputs, outputs)
        by_id = {id(t): m for t, m in zip(outputs, made, strict=True)}
        for container in (args, kwargs):  # it may have put its results into the caller's lists and dicts
            mirror(container, map_tensors(lambda t: by_id.get(id(t), t), container))
        return map_tensors(lambda t: by_id.get(id(t), t), result)

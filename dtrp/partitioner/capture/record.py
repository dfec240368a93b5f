"""The model's own code runs on fake tensors, once, and what it calls is recorded.

Sizes that it asks for are numbers that know where they come from (`sizes`), so the graph takes all sizes that
the code leaves open. Sizes that a module kept whole computes from values are only an example's: the graph
runs with others too, and where the code behind decides by one, a guard shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from .custom import OtherSizes, guard
from .fakes import FakeWorld, Sizes, fake_inputs, light
from .graph import KeptWhole
from .leaves import entry
from .methods import VALUE_DEPENDENT
from .modes import BothModes, Flags, flags_of
from .patches import ObservedFakeMode, observed
from .propagate import Runner
from .recorder import Recorder
from .snapshot import foreign_randomness
from .state import changes_of, content, frozen, reached_by_hooks, state_of, within
from .structure import flatten_output
from .task import Task
from .traced import Traced, same_graph
from .writer import Borrows, CannotKeep, CannotRecord


def record(task: Task) -> BothModes:
    """Record the model in both modes."""
    return BothModes.of(lambda training: _Recording(task, training)())


def record_fixed(task: Task) -> BothModes:
    """The same with the example's sizes as plain numbers, for code that takes no others; with guards."""
    return BothModes.of(lambda training: _Recording(task, training, sizes_open=False)())


@dataclass(frozen=True)
class _Found:
    """What one run of the model gave."""

    traced: Traced
    failures: dict[str, str]  # modules that were given up half-way, and why
    changes: dict[str, str]  # modules that change plain state, and which
    keeps: dict[str, str]  # modules that leave tensors in attributes, and which
    taken: list[tuple[str, str]]  # such attributes of what is kept whole, which other code may read
    sized_by_values: bool


class _RootDecides(CannotRecord):
    """By sizes that are made from values."""


class OtherModes(Exception):
    """The model leaves its parts in other modes than it was found in, and so finds them in its next call."""

    def __init__(self, flags: Flags) -> None:
        super().__init__("it changes its parts' modes while it runs")
        self.flags = flags


class _Switches(Exception):
    """The model calls a part in another mode, and switches back."""


class _Recording:
    """Records one mode, and keeps what it learns about the model on the way."""

    _KEPT = (
        "keeps the tensor {0} from one call to the next: make it a buffer (self.register_buffer), let "
        "forward return it, or move this code into a submodule, which is then kept whole"
    )
    _LEFT = ": let forward return it, or move this code into a submodule, which is then kept whole"

    def __init__(self, task: Task, training: bool, sizes_open: bool = True) -> None:
        self._task, self._training, self._sizes_open = task, training, sizes_open
        self._closed = dict(task.closed)
        self._by_methods = False  # methods that cannot be recorded are kept whole
        self._fixed_modes = not training or task.settled
        self._for_state: set[str] = set()  # closed because they change plain state, or leave tensors
        self._tries_again = False  # without closing these

    def __call__(self) -> Traced:
        """Record."""
        while True:  # each attempt closes at least one module more
            try:
                found = self._once()
                # Some modules may have been given up half-way and replaced by single nodes. Record again
                # with these closed from the start: their half-run code may have left something behind.
                failures = found.failures
                for sizes in ("other", "none") if found.sized_by_values else ():
                    failures = failures or self._other_course(found.traced, sizes)
            except (*VALUE_DEPENDENT, _RootDecides):
                if self._by_methods:
                    raise
                self._by_methods = True  # what decides may stand in a method
                continue
            except _Switches:
                self._fixed_modes = True
                continue
            except Borrows as error:  # its hooks' code, or its own, becomes part of the graph
                self._task = replace(self._task, opened=(*self._task.opened, error.module))
                continue
            except CannotRecord:
                if self._tries_again or not self._for_state:
                    raise
                self._tries_again = True  # what other code reads may be made anew in every call
                self._closed = {n: why for n, why in self._closed.items() if n not in self._for_state}
                continue
            if not failures:
                return found.traced
            self._closed.update(failures)

    def _other_course(self, traced: Traced, sizes: Sizes) -> dict[str, str]:
        """The module, if any, whose code takes another course with other sizes that are made from values."""
        text = "takes another course with another size, which is computed from values"
        if not self._sizes_open:
            raise CannotRecord(f"takes sizes as plain numbers alone, and perhaps {text}")
        model, world = self._task.model, FakeWorld(runs=self._task.runs)
        world.sizes = sizes
        runner = Runner(model, traced.graph, world, traced.held)
        run = self._task.run(self._training)
        with run, world.inhabited_by(model), torch.set_grad_enabled(self._task.grad):
            try:
                runner.run(*fake_inputs(world, self._task.tensors))
                return {}
            except Exception as failure:
                assert runner.node is not None
                takes_no = sizes == "none"  # some operator takes nothing that is empty, in the model neither
                if (takes_no or runner.fails_alone) and not isinstance(failure, OtherSizes):
                    return {}
                why = "" if isinstance(failure, OtherSizes) else f": {failure}"
        module, place = _caller(runner.node), str(runner.node.meta["location"])
        if module and module not in self._closed:
            return {module: f"{text}, at {place}{why}"}
        error = _RootDecides(f"{text}, at {place}{why}")
        error.place = place
        raise error

    def _once(self) -> _Found:
        mode = ObservedFakeMode()
        world = FakeWorld(mode, self._task.runs)
        run, model = self._task.run(self._training), self._task.model
        with run, world.inhabited_by(model), torch.set_grad_enabled(self._task.grad):
            found = self._recorded(world, mode)
            # What is not kept whole, whatever it does: calls of the graph do not repeat what it changes.
            own = [n for n in (*found.changes, *found.keeps) if n in ("", *self._task.opened)]
            asks = bool(own or self._tries_again or found.taken) and not self._by_methods
            left = [n for n in self._task.opened if n in found.keeps]  # for whoever reads it behind the call
            settled = asks and not left and self._settled(found, world, mode)
        if settled and (own or self._tries_again):
            notes = [
                f"it {change}, as its first call does; calls of the pipeline do not"
                for change in found.changes.values()
            ]
            notes += [
                f"it leaves the tensor {name} in an attribute; calls of the pipeline leave none there"
                for name in found.keeps.values()
            ]
            return replace(found, traced=replace(found.traced, notes=(*found.traced.notes, *notes)))
        kept = {p: f"keeps the tensor {name} from one call to the next" for p, name in found.keeps.items()}
        changes = {p: why for p, why in {**found.changes, **kept}.items() if p not in own}
        if own and not changes:  # else it may do the same in every call, but for what these parts do
            change = found.changes.get(own[0])
            raise CannotRecord(change + self._LEFT if change else self._KEPT.format(found.keeps[own[0]]))
        self._for_state |= changes.keys()
        failures = {**found.failures, **changes}
        if asks and not settled and not failures:
            name = ".".join(found.taken[0])
            raise CannotRecord(f"reads {name!r} before it is made anew, as an earlier call left it")
        return replace(found, failures=failures)

    def _settled(self, found: _Found, world: FakeWorld, mode: ObservedFakeMode) -> bool:
        """Whether a second call, after what the first one changed, changes nothing and does the same."""
        try:
            again = self._recorded(world, mode)
        except Exception:
            return False
        read = {str(node.target) for node in found.traced.graph.find_nodes(op="get_attr")}
        kept = read & found.traced.left.keys()  # what it reads as an earlier call left it
        return not kept and not again.changes and same_graph(found.traced, again.traced)

    def _recorded(self, world: FakeWorld, mode: ObservedFakeMode) -> _Found:
        task, model, closed = self._task, self._task.model, self._closed
        inputs = fake_inputs(world, task.tensors)
        recorder = Recorder(task, world, closed, inputs, self._sizes_open, self._fixed_modes)
        modes, parts = flags_of(model), dict(model.named_modules())
        args, kwargs = task.signature.unflatten(inputs)
        mode.observer = recorder
        if self._by_methods:
            recorder.watch_methods(model)
        state, states = state_of(model), foreign_randomness()
        hooked = {name: _hook_state(parts[name]) for name in task.opened if name in parts}
        with torch.compiler.set_stance("force_eager"), observed(recorder, model), recorder.all_seen(model):
            output = entry(model)(*args, **kwargs)
        if foreign_randomness() != states:
            raise CannotRecord("draws random numbers from Python's or numpy's generator")
        mode.observer, recorder.paused = None, True
        for name, before in hooked.items():
            if before != _hook_state(parts[name]):
                raise CannotRecord(f"has hooks on {name!r} that keep something of a call, for others to read")
        if made := [name for name, _ in model.named_modules() if name not in parts]:
            raise CannotKeep(f"makes the layer {made[0]!r} when it first runs")
        whole = {*closed, *recorder.failures}.difference(task.opened)
        changes = changes_of(model, state, whole, {*recorder.left, *recorder.taken})
        if not self._fixed_modes and flags_of(model) != modes:
            raise OtherModes(flags_of(model))
        if not self._fixed_modes and recorder.other_mode:
            raise _Switches
        for (name, module), before in zip(model.named_modules(), modes, strict=True):
            if module.training != before and not within(name, whole):
                changes[name.rpartition(".")[0]] = f"leaves {name!r} in another mode than it had"
        leaves, out_spec = flatten_output(output)
        recorder.finish(leaves)
        graph = recorder.writer.graph
        guards = graph.find_nodes(op="call_function", target=guard)
        checks = [f"the model's check at {n.args[2]} became a guard in the graph" for n in guards]
        sizes = recorder.sizes.pinned_inputs(task.signature.tensor_names)
        traced = Traced(
            graph,
            out_spec,
            tuple(
                KeptWhole(name, why)
                for name, why in closed.items()
                if name not in task.opened and not within(name, [c for c in closed if c != name])
            ),
            tuple(dict.fromkeys((*checks, *sizes))),
            asks_grad=recorder.asks_grad,
            asks_mode=recorder.asks_mode,
            left={f"{p}.{n}".removeprefix("."): light(t) for (p, n), t in recorder.left.items()},
            held=recorder.writer.held,
        )
        keeps = {p: why for p, why in recorder.keepers().items() if not within(p, whole)}
        return _Found(traced, recorder.failures, changes, keeps, recorder.taken, world.sized_by_values)


def _hook_state(module: nn.Module) -> Any:
    return frozen([content(place) for place in reached_by_hooks(module)])


def _caller(node: Node) -> str:
    """What made the node: a module (of a layer's node, the one that the layer is in), or a method."""
    module = str(node.meta["module"])
    if not module or (node.op == "call_module" and "." not in module):
        return str(node.meta.get("method", ""))
    return module.rpartition(".")[0] if node.op == "call_module" else module

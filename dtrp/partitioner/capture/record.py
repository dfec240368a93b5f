"""The model's own code runs on fake tensors, once, and what it calls is recorded.

Sizes that it asks for are numbers that know where they come from (`sizes`), so the graph takes all sizes that
the code leaves open. What code makes of sizes that a module kept whole computes from values is only seen by
running it with other ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from .decisions import Decisions
from .example_values import batch_of, repeated
from .fakes import FakeWorld, Sizes, fake_inputs
from .graph import KeptWhole
from .leaves import has_hooks
from .location import raised_at
from .modes import BothModes
from .patches import ObservedFakeMode, observed
from .recorder import VALUE_DEPENDENT, Recorder
from .snapshot import foreign_randomness
from .state import changes_of, state_of, within
from .structure import flatten_output
from .task import Task
from .traced import Traced, differs_at, same_graph
from .writer import CannotRecord


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
    decisions: Decisions
    sized_by_values: bool


class _Recording:
    """Records one mode, with any batch size, and keeps what it learns about the model on the way."""

    _LEFT = ": let forward return it, or move this code into a submodule, which is then kept whole"

    def __init__(self, task: Task, training: bool, sizes_open: bool = True) -> None:
        self._task, self._training, self._sizes_open = task, training, sizes_open
        self._closed = dict(task.closed)
        self._by_methods = False  # methods that cannot be recorded are kept whole
        self._decisions: Decisions | None = None  # the first recording's; later ones repeat them

    def __call__(self) -> Traced:
        """Record."""
        while True:  # each attempt closes at least one module more
            try:
                found = self._once()
            except VALUE_DEPENDENT:
                if self._by_methods:
                    raise
                self._by_methods = True  # the root itself decides by values: that may stand in a method
                continue
            # Some modules may have been given up half-way and replaced by single nodes. Record again with
            # these closed from the start: their half-run code may have left something behind.
            failures = found.failures or (self._other_course(found) if found.sized_by_values else {})
            if failures is None:
                self._by_methods = True
            elif not failures:
                return found.traced
            else:
                self._closed.update(failures)

    def _other_course(self, found: _Found) -> dict[str, str] | None:
        """Modules whose code takes another course with other sizes that are made from values, and why.

        Such sizes are only an example's. The code behind them runs again with others. None: what takes
        another course may be a method.
        """
        text = "takes another course with another size, which is computed from values"
        self._decisions = self._decisions or found.decisions
        try:
            others = [self._once("other")]
            try:
                others.append(self._once("none"))
            except VALUE_DEPENDENT:  # a module kept whole that takes nothing empty
                if self._same_sizes(found.traced, others[0].traced):
                    raise
        except Exception as failure:
            if isinstance(failure, VALUE_DEPENDENT) and not self._by_methods:
                return None
            error, place = CannotRecord(f"{text}: {failure}"), raised_at(failure)
        else:
            failures = {name: why for other in others for name, why in other.failures.items()}
            nodes = [differs_at(found.traced, other.traced) for other in others]
            node = next((n for n in nodes if n is not None), None)
            if failures or node is None:
                return failures
            module, place = _caller(node), node.meta["location"]
            if module and module not in self._closed:
                return {module: f"{text}, at {place}"}
            if not self._by_methods:
                return None
            error = CannotRecord(f"{text}: at {place} its graph is another one")
        error.place = place
        raise error

    @staticmethod
    def _same_sizes(a: Traced, b: Traced) -> bool:
        shapes = [
            [v.shape for n in t.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]
            for t in (a, b)
        ]
        return shapes[0] == shapes[1]

    def _once(self, sizes: Sizes = "found") -> _Found:
        mode = ObservedFakeMode()
        world = FakeWorld(mode, self._task.runs)
        world.sizes = sizes
        run, model = self._task.run(self._training), self._task.model
        with run, world.inhabited_by(model), torch.set_grad_enabled(self._task.grad):
            found = self._recorded(world, mode)
            change = found.changes.get("")
            if not change:
                return replace(found, failures={**found.failures, **found.changes})
            if self._by_methods or not self._settled(found, world, mode):
                raise CannotRecord(change + self._LEFT)
        note = f"it {change}, as its first call does; calls of the pipeline do not"
        return replace(found, traced=replace(found.traced, notes=(*found.traced.notes, note)))

    def _settled(self, found: _Found, world: FakeWorld, mode: ObservedFakeMode) -> bool:
        """Whether a second call, after what the first one changed, changes nothing and does the same."""
        try:
            again = self._recorded(world, mode)
        except Exception:
            return False
        return not again.changes and same_graph(found.traced, again.traced)

    def _recorded(self, world: FakeWorld, mode: ObservedFakeMode) -> _Found:
        model, tensors, closed = self._task.model, self._task.tensors, self._closed
        decisions = Decisions(model, world, tensors, self._decisions)
        recorder = Recorder(model, world, closed, self._task.opened, decisions, self._sizes_open)
        inputs = fake_inputs(world, tensors)
        for i, tensor in enumerate(inputs):
            recorder.placeholder(f"input_{i}", tensor)
        recorder.know_examples(model, _calls(tensors))
        if not self._sizes_open:
            recorder.fix_sizes()
        args, kwargs = self._task.signature.unflatten(inputs)
        mode.observer = recorder
        if self._by_methods:
            recorder.watch_methods(model)
        state, states = state_of(model), foreign_randomness()
        with torch.compiler.set_stance("force_eager"), observed(recorder, model), recorder.all_seen(model):
            output = (model if has_hooks(model) else model.forward)(*args, **kwargs)
        if foreign_randomness() != states:
            raise CannotRecord("draws random numbers from Python's or numpy's generator")
        mode.observer, recorder.paused = None, True
        whole = {*closed, *recorder.failures}
        changes = changes_of(model, state, whole, recorder.left)
        changes.update((p, why) for p, why in recorder.keepers().items() if not within(p, whole))
        leaves, out_spec = flatten_output(output)
        recorder.finish(leaves)
        checks = [f"the model's check at {p} became a guard in the graph" for p in decisions.places]
        sizes = recorder.sizes.pinned_inputs(self._task.signature.tensor_names)
        traced = Traced(
            recorder.writer.graph,
            out_spec,
            tuple(
                KeptWhole(name, why)
                for name, why in closed.items()
                if not within(name, [c for c in closed if c != name])
            ),
            tuple(dict.fromkeys((*checks, *sizes))),
            asks_grad=recorder.asks_grad,
            answers=tuple(decisions.made),
            constants=recorder.writer.constants,
            methods=recorder.writer.methods,
        )
        return _Found(traced, recorder.failures, changes, decisions, world.sized_by_values)


def _calls(example: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The example, and the same with its samples in another order or one for all."""
    size, batch = batch_of(example)
    last = size - 1
    orders = (range(size), range(last, -1, -1), [0] * size, [last] * size)
    with _disable_current_modes():
        return [repeated(example, batch, list(order)) for order in orders]


def _caller(node: Node) -> str:
    """What made the node: a module (of a layer's node, the one that the layer is in), or a method."""
    module = str(node.meta["module"])
    if not module or (node.op == "call_module" and "." not in module):
        return str(node.meta.get("method", ""))
    return module.rpartition(".")[0] if node.op == "call_module" else module

"""Second way: the model's own code runs on fake tensors, and what it calls is recorded.

Sizes are plain numbers while the model runs. To keep the batch size out of the graph, the model runs with
another batch size too, and numbers that changed are computed from tensors in the graph (`sizes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .decisions import Decisions
from .example_values import repeated
from .fakes import FakeWorld, Sizes, fake_inputs
from .graph import KeptWhole
from .leaves import has_hooks
from .location import raised_at
from .modes import BothModes
from .patches import ObservedFakeMode, observed
from .recorder import VALUE_DEPENDENT, Recorder
from .sizes import Differs, batch_of, free_the_batch, unify
from .snapshot import foreign_randomness
from .state import changes_of, state_of, within
from .structure import flatten_output
from .task import Task
from .traced import Traced
from .writer import CannotRecord


def record(task: Task) -> BothModes:
    """Record the model in both modes."""
    # What is kept whole in one mode need not be in the other.
    recordings = {training: _Recording(task, training) for training in (True, False)}
    both = BothModes.of(lambda training: recordings[training]())
    freed = {}
    for training, traced in both.each():
        run = recordings[training]
        closed = run.closed
        freed[training] = free_the_batch(traced, run, task, training)
        if run.closed != closed:  # with the other batch size it had to keep more whole than at first
            freed[training] = free_the_batch(run(), run, task, training)
    return BothModes(freed[True], freed.get(False, freed[True]))


@dataclass(frozen=True)
class _Found:
    """What one run of the model gave."""

    traced: Traced
    failures: dict[str, str]  # modules that were given up half-way, and why
    decisions: Decisions
    sized_by_values: bool


class _Recording:
    """Records one mode, with any batch size, and keeps what it learns about the model on the way."""

    _LEFT = ": let forward return it, or move this code into a submodule, which is then kept whole"

    def __init__(self, task: Task, training: bool) -> None:
        self._task, self._training = task, training
        self._closed = dict(task.closed)
        self._by_methods = False  # methods that cannot be recorded are kept whole
        self._decisions: Decisions | None = None  # the first recording's; later ones repeat them
        self._sized = False  # by values, as the example showed

    @property
    def closed(self) -> frozenset[str]:
        """What is kept whole by now."""
        return frozenset(self._closed)

    def __call__(self, batch: tuple[int, ...] = (), size: int = 0) -> Traced:
        """Record with ``size`` samples in the inputs ``batch``; as the example is if not given."""
        while True:  # each attempt closes at least one module more
            try:
                found = self._once(batch, size)
            except VALUE_DEPENDENT:
                if self._by_methods:
                    raise
                self._by_methods = True  # the root itself decides by values: that may stand in a method
                continue
            # Some modules may have been given up half-way and replaced by single nodes. Record again with
            # these closed from the start: their half-run code may have left something behind.
            self._sized |= found.sized_by_values
            failures = found.failures or (self._follow_sizes(found, batch, size) if self._sized else {})
            if failures is None:
                self._by_methods = True
            elif not failures:
                self._decisions = self._decisions or found.decisions
                return found.traced
            else:
                self._closed.update(failures)

    def apart(self, batch: tuple[int, ...], sizes: tuple[int, ...]) -> Traced:
        """Record with a size for each of the inputs ``batch``; all that is kept whole is so already."""
        found = self._once(batch, sizes)
        failures = found.failures or (self._follow_sizes(found, batch, sizes) if self._sized else {})
        if failures is None or failures:
            raise CannotRecord("more would have to be kept whole")
        return found.traced

    def _follow_sizes(
        self, found: _Found, batch: tuple[int, ...], size: int | tuple[int, ...]
    ) -> dict[str, str] | None:
        """Let the graph follow sizes that a module kept whole makes from values; or name what does not.

        Such sizes are only an example's. The code behind them runs again with others. None: what does not
        follow may be a method.
        """
        text = "takes another course with another size, which is computed from values"
        try:
            others = [self._once(batch, size, "other")]
            try:
                others.append(self._once(batch, size, "none"))
            except VALUE_DEPENDENT:  # a module kept whole that takes nothing empty
                if self._same_sizes(found.traced, others[0].traced):
                    raise
            failures = {name: why for other in others for name, why in other.failures.items()}
            if not failures:
                unify([found.traced, *(other.traced for other in others)], by_values=True)
            return failures
        except Differs as difference:
            if difference.module and difference.module not in self._closed:
                return {difference.module: f"{text} ({difference})"}
            if not self._by_methods:
                return None
            error, place = CannotRecord(f"{text}: {difference}"), difference.place
        except Exception as failure:
            if isinstance(failure, VALUE_DEPENDENT) and not self._by_methods:
                return None
            error, place = CannotRecord(f"{text}: {failure}"), raised_at(failure)
        error.place = place
        raise error

    @staticmethod
    def _same_sizes(a: Traced, b: Traced) -> bool:
        shapes = [
            [v.shape for n in t.graph.nodes if isinstance(v := n.meta.get("val"), torch.Tensor)]
            for t in (a, b)
        ]
        return shapes[0] == shapes[1]

    def _once(self, batch: tuple[int, ...], size: int | tuple[int, ...], sizes: Sizes = "found") -> _Found:
        model, tensors, closed = self._task.model, self._task.tensors, self._closed
        mode = ObservedFakeMode()
        world = FakeWorld(mode, self._task.runs)
        world.sizes, world.compares = sizes, not batch
        run = self._task.run(self._training)
        with run, world.inhabited_by(model), torch.set_grad_enabled(self._task.grad):
            decisions = Decisions(model, world, tensors, self._decisions)
            recorder = Recorder(model, world, closed, self._task.opened, decisions)
            inputs = fake_inputs(world, tensors, batch, size)
            for i, tensor in enumerate(inputs):
                recorder.placeholder(f"input_{i}", tensor)
            recorder.know_examples(model, _calls(tensors, inputs))
            args, kwargs = self._task.signature.unflatten(inputs)
            mode.observer = recorder
            if self._by_methods:
                recorder.watch_methods(model)
            state = state_of(model)
            with torch.compiler.set_stance("force_eager"), observed(recorder, model), recorder:
                states = foreign_randomness()
                output = (model if has_hooks(model) else model.forward)(*args, **kwargs)
                if foreign_randomness() != states:
                    raise CannotRecord("draws random numbers from Python's or numpy's generator")
            mode.observer = None
            whole = {*closed, *recorder.failures}
            changes = changes_of(model, state, whole, recorder.left)
            changes.update((p, why) for p, why in recorder.keepers().items() if not within(p, whole))
            if "" in changes:
                raise CannotRecord(changes[""] + self._LEFT)
            recorder.failures.update(changes)
            leaves, out_spec = flatten_output(output)
            recorder.finish(leaves)
        kept = tuple(
            KeptWhole(name, why)
            for name, why in closed.items()
            if not within(name, [c for c in closed if c != name])
        )
        traced = Traced(
            recorder.writer.graph,
            out_spec,
            kept,
            tuple(
                f"the model's check at {place} became a guard in the graph"
                for place in dict.fromkeys(decisions.places)
            ),
            asks_grad=recorder.asks_grad,
            answers=tuple(decisions.made),
            constants=recorder.writer.constants,
            methods=recorder.writer.methods,
        )
        return _Found(traced, recorder.failures, decisions, world.sized_by_values)


def _calls(example: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The example in the sizes of ``inputs``, and with its samples in another order or one for all."""
    size, batch = batch_of(inputs)
    last = size - 1
    orders = (range(size), range(last, -1, -1), [0] * size, [last] * size)
    with _disable_current_modes():
        return [repeated(example, batch, list(order)) for order in orders]

"""Writes down, as an fx graph, the torch functions and layers that a running model calls.

The model's own code runs, on fake tensors, and is not changed: it sees real Python values for everything that
it may ask of a tensor but its contents (shapes, lengths, dtypes, flags), so branches, loops, assertions,
caches, dataclasses and closures take their usual course and leave nothing in the graph. What does enter it:

- each call of a torch function that gives or changes a tensor (a `TorchFunctionMode` sees them all),
- each call of a leaf module, as one node, whatever happens inside,
- each custom autograd function, as one node that keeps its own backward,
- assignments to buffers, as an in-place copy at the end.

A tensor is known by its identity. One that appears out of nowhere (made by code that no torch function
passed through) stops the recording of the module in question, rather than being frozen into the graph.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor
from torch.overrides import TorchFunctionMode

from .assigned import Assigned
from .calls import Calls
from .checkpointed import Checkpointed, updates_buffers, versions
from .custom import GradientFunction, guard
from .decisions import decide
from .example_values import ExampleCalls
from .fakes import FakeWorld
from .leaves import borrowed, is_leaf, is_lent
from .left import attributes_of, forget_unread, take
from .location import user_location
from .methods import VALUE_DEPENDENT, KeptCall, KeptMethod, own_methods
from .patches import Observer
from .sizes import Sizes
from .snapshot import foreign_randomness, preserved_randomness
from .state import OWN, changeable
from .structure import mirror, mutable, tensors_in
from .targets import node_form, property_name
from .task import Task
from .writer import Borrows, CannotKeep, CannotRecord, GraphWriter, reason

# Tensor methods whose effect is not in their result, or which ask for data that fakes do not have.
_REFUSED = {
    "backward": "calls backward() inside forward",
    "register_hook": "registers a gradient hook on a tensor",
    "register_post_accumulate_grad_hook": "registers a gradient hook on a tensor",
    "retain_grad": "asks a tensor to retain its gradient",
}


class Recorder(TorchFunctionMode, Observer):
    """See the module's docstring; use through `record`."""

    def __init__(
        self,
        task: Task,
        world: FakeWorld,
        closed: Collection[str],
        inputs: Sequence[torch.Tensor],
        sizes_open: bool = True,
        fixed_modes: bool = False,
    ) -> None:
        super().__init__()
        model = self._model = task.model
        self.writer = GraphWriter(model, world)
        self.sizes = Sizes(self.writer, lambda: self.paused)
        self.failures: dict[str, str] = {}  # modules that could not be recorded, and why
        self.left: dict[tuple[str, str], torch.Tensor] = {}  # tensors assigned to attributes: module, name
        self.taken: list[tuple[str, str]] = []  # attributes in which modules kept whole leave tensors
        self.asks_grad = False  # the model's code asks whether gradients are enabled
        self.asks_mode = ""  # "code" or only "layers" ask for a module's mode
        self._world = world
        self._closed, self._opened = closed, {*task.opened, *task.divided}
        self._examples = ExampleCalls(model, world, self.writer, task.tensors)
        self._names = {m: name for name, m in model.named_modules()}
        self._own = {m: [*map(id, m._parameters.values())] for m in self._names}
        self._modes = {m: m.__dict__.get("training") for m in self._names}
        self._fixed_modes = fixed_modes
        self.other_mode = False  # something is called in another mode than it had when the call began
        self._checkpointed = Checkpointed()
        self._calls = Calls(self.writer, world, self.sizes, self._checkpointed, task.grad)
        self._assigned = Assigned(model, self.writer)
        for i, tensor in enumerate(inputs):
            self.writer.placeholder(f"input_{i}", tensor)
        if not sizes_open:
            self.sizes.fix()

    def keepers(self) -> dict[str, str]:
        """Modules that leave a tensor made from the inputs in an attribute, or in a container or object that
        they hold, for whoever reads it, and which.

        One that is made from sizes and constants alone is a cache: the graph makes it each time.
        """
        found = {key: [tensor] for key, tensor in self.left.items()}
        for module, path in self._names.items():
            for name, value in vars(module).items():
                if name not in OWN and (isinstance(value, tuple) or changeable(value)):
                    found[path, name] = [t for _, t in tensors_in(value) if self._made(t)]
        return {
            path: repr(f"{path}.{name}".removeprefix("."))
            for (path, name), tensors in found.items()
            if any(map(self.writer.depends_on_inputs, tensors))
        }

    def _made(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor was made while the model was recorded."""
        return isinstance(tensor, FakeTensor) and id(tensor) not in self._world.originals

    @contextmanager
    def all_seen(self, model: nn.Module) -> Iterator[None]:
        """Inside, what the model calls is recorded."""
        with self.sizes.followed(model), self:
            yield

    def finish(self, leaves: list[Any]) -> None:
        """Write the updates of buffers and the flat output."""
        self._assigned.write()
        self.asks_grad |= self._checkpointed.write(self.writer)
        self.writer.output(leaves)
        forget_unread(self.writer.graph)
        self.sizes.tidy()
        self._examples.forget()

    # What the model does

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        with self._pause():
            if name == "requires_grad_" or (name == "__set__" and property_name(func) == "requires_grad"):
                return self._calls.set_requires_grad(*args, **kwargs)
            if name == "__set__":
                raise CannotRecord(f"assigns to the attribute {property_name(func)!r} of a tensor")
            if name in _REFUSED:
                raise CannotRecord(_REFUSED[name])
            try:
                return self._calls(func, node_form, args, kwargs)
            except Exception as error:
                if name == "__bool__":
                    return self._decide(args[0], error)
                if not isinstance(error, VALUE_DEPENDENT) or self.writer.module or self.writer.method:
                    raise  # a module or method is kept whole
                return self._call_whole(func, args, kwargs, error)

    def on_gradient_function(
        self, function: type[torch.autograd.Function], proceed: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """A custom autograd function: one node with its own backward."""
        target = GradientFunction(function)
        with self._pause():
            if function.__module__ == "torch.utils.checkpoint":  # what it keeps for itself (torch 2.11)
                return proceed(*args, **kwargs)
            return self._calls(proceed, lambda _, a, k: ("call_function", target, a, k), args, kwargs)

    def on_operator(self, operator: Any, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """``torch.Tensor([1.0, 2.0])`` and arrays give constants, ``torch.Tensor(2, 3)`` an empty one."""
        aten = torch.ops.aten
        if operator is aten.lift_fresh.default:
            return self._world.constant(args[0].clone(), proceed(*args))
        if operator in (aten.empty.memory_format, aten._to_copy.default):
            return self._calls(proceed, lambda _, a, k: ("call_function", operator, a, k), args, kwargs)
        return proceed(*args, **kwargs)

    def on_module(self, module: nn.Module, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module: one node if it is a leaf (or nothing else works), else its insides."""
        name = self._names.get(module)
        if name is None or name == "":  # made on the way, or the root called by itself
            return proceed(module, *args, **kwargs)
        region = self._calls.region()
        if region and name in self._closed:
            raise CannotRecord(f"calls {name!r}, which is kept whole, inside a region of torch.autocast")
        whole = functools.partial(self._leaf, name, module, proceed, args, kwargs)
        lent = is_lent(module, self._own)
        if lent and name in self._closed:
            raise CannotRecord(f"calls {name!r}, which is kept whole, with other tensors as its parameters")
        if not (region or lent) and is_leaf(module, name, closed=self._closed, opened=self._opened):
            return whole()

        def inside() -> Any:
            states = foreign_randomness()
            modes = [(vars(m), vars(m).get("training")) for m in module.modules()]
            with preserved_randomness():
                try:
                    result = proceed(module, *args, **kwargs)
                except Exception:
                    for values, mode in modes:  # in which it may be kept whole
                        values.update({"training": mode} if mode is not None else {})
                    raise
                if foreign_randomness() != states:
                    raise CannotRecord("draws random numbers from Python's or numpy's generator")
            self.writer.check_known(result)
            return result

        outer, self.writer.module = self.writer.module, name
        try:
            if name in self._opened or region or lent:
                return inside()
            return self._try(name, inside, whole, (args, kwargs), outer)
        finally:
            self.writer.module = outer

    def _try(
        self,
        name: str,
        inside: Callable[[], Any],
        whole: Callable[[], Any],
        given: Any,
        outer: str = "",
        catches: Any = Exception,
    ) -> Any:
        """``inside()``; if it cannot be recorded ``whole()``, with nothing left of what was recorded."""
        mark, found = self.writer.mark(), mutable(given)
        assigned, regions = self._assigned.mark(), self._checkpointed.mark()
        try:
            return inside()
        except CannotKeep:
            raise
        except catches as error:
            self.writer.roll_back(mark)
            self._checkpointed.back_to(regions)
            self.writer.module = outer
            mirror(given, found)  # what it has put in so far is known no more
            self._assigned.back_to(assigned)
            try:
                result = whole()
            except Exception as failed:
                # What is wrong inside says more than what is wrong with the whole, which is told beside it.
                if catches is Exception and not hasattr(error, "dtrp_module"):
                    error.__dict__.update(dtrp_module=name, dtrp_whole=reason(failed))
                raise error from None
            self.failures[name] = reason(error)
            return result

    def _call_whole(self, func: Callable[..., Any], args: Any, kwargs: Any, error: Exception) -> Any:
        """A call in the root's code whose result has a shape that depends on values, as one node."""
        _, target, args, kwargs = node_form(func, args, kwargs)
        key = f"{getattr(func, '__name__', '').strip('_')}_{len(self.writer.held)}"
        try:
            result = self._as_node(key, KeptCall(target), args, kwargs)
        except Exception:
            raise error from None
        if not any(tensors_in(result)):  # a number, by which code decides
            raise error
        if not isinstance(error, DynamicOutputShapeException):  # which gives memory of its own
            self._calls.part((args, kwargs), result)
        return result

    def _as_node(self, key: str, kept: nn.Module, args: Any, kwargs: Any, named: str = "") -> Any:
        """What is kept whole and is none of the model's modules."""
        name = self.writer.hold(key, kept)
        with self._pause():
            return self._calls(
                lambda *a, **k: self._really_run(kept, a, k),
                lambda _, a, k: ("call_module", name, a, k),
                args,
                kwargs,
                kept=named,
            )

    def watch_methods(self, model: nn.Module) -> None:
        """From now on keep methods whole, as low as possible, that the root calls and cannot be recorded."""
        for path, module, name, method in own_methods(model):
            call = functools.partial(self._on_method, f"{path}.{name}".removeprefix("."), module, method)
            module.__dict__[name] = call  # the model's attributes are put back after the recording

    def _on_method(
        self, key: str, owner: nn.Module, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.paused or self.writer.module:
            return method(*args, **kwargs)
        kept = KeptMethod(owner, method.__name__, self._world.attributes)
        whole = functools.partial(self._as_node, key, kept, args, kwargs, named=key)
        if key in self._closed:
            return whole()
        outer, self.writer.method = self.writer.method, key
        try:
            return self._try(
                key, lambda: method(*args, **kwargs), whole, (args, kwargs), catches=VALUE_DEPENDENT
            )
        finally:
            self.writer.method = outer

    def on_write(self, module: nn.Module, name: str, value: Any) -> None:
        """An assignment to a module's attribute."""
        path = self._names.get(module)
        if path is None:
            return
        if name == "training":
            self.asks_mode = "code"
        full = f"{path}.{name}" if path else name
        if module._buffers.get(name) is not None and isinstance(value, torch.Tensor):
            # Other graphs, such as that of evaluation, would go on reading the tensor that was there before.
            self._checkpointed.refuse(full, CannotKeep)
            self._assigned.note(full, value)
        elif name in module._parameters:
            raise CannotRecord(f"replaces the parameter {full!r}")
        elif isinstance(value, torch.Tensor):
            self.left[path, name] = value

    def on_checkpoint(self) -> AbstractContextManager[None]:
        """A region of torch.utils.checkpoint."""
        return self._checkpointed.region() if torch.is_grad_enabled() else nullcontext()

    def on_reentrant(self, region: Callable[..., Any], inputs: Any) -> Any:
        """One whose result alone has gradients."""
        mark = self.writer.mark()
        result = super().on_reentrant(region, inputs)
        self.writer.seal(mark, result)
        return result

    def on_autocast(self, region: torch.autocast, entered: bool) -> None:
        """The model enters a region of torch.autocast, or leaves it."""
        # Checkpointing enters autocast just to repeat the outer state.
        if not entered:
            self._calls.regions.pop()
        elif sys._getframe(2).f_code.co_filename.endswith("checkpoint.py"):
            self._calls.regions.append(None)
        else:
            self._calls.regions.append(region.device)

    def on_question(self) -> None:
        """The model asks whether gradients are enabled."""
        self.asks_grad = True

    def on_mode(self, users: bool) -> None:
        """Something asks for a mode; what the user's code in a leaf (a hook) makes of it shows behind."""
        self.asks_mode = "code" if users or not self.paused else self.asks_mode or "layers"

    # One call

    def _decide(self, condition: torch.Tensor, error: Exception) -> bool:
        """What the example says of a condition in the root's code; a guard for other batches."""
        try:
            node, place = self.writer.argument(condition), user_location()
        except CannotRecord:
            raise error from None
        answer = decide(node, self._examples.exact.of)
        if answer is None:
            raise error from None
        self.writer.node("call_function", guard, (node, answer, place), {}, None)
        return answer

    def _leaf(self, name: str, module: nn.Module, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if any(m.__dict__.get("training") is not self._modes.get(m) for m in module.modules()):
            self.other_mode = True
            if self._fixed_modes:
                error = CannotRecord(f"calls {name!r} in another mode than it had when the call began")
                error.__dict__["dtrp_module"] = None  # what can be kept whole is who switches
                raise error
        before, held = versions(module), attributes_of(module, self._names)
        since = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        if name in self._closed and before and module.training:
            self._checkpointed.refuse(f"{name}.{next(iter(before))}")
        with self._pause(), preserved_randomness():  # what it draws is its own affair
            outer, self.writer.module = self.writer.module, name
            try:
                result = self._calls(
                    lambda *a, **k: self._run(module, proceed, a, k),
                    lambda _, a, k: ("call_module", name, a, k),
                    args,
                    kwargs,
                    kept=name if name in self._closed else "",
                )
                if other := borrowed(self._model, module, result, (args, kwargs), since):
                    error = Borrows(name, other)
                    raise CannotRecord(str(error)) if name in {*self._closed, *self._opened} else error
                found = attributes_of(module, self._names)
                taken = take(self.writer, name, {k: v for k, v in found.items() if held.get(k) is not v})
                self.taken += taken
                self.left |= {k: found[k] for k in taken if isinstance(found[k], torch.Tensor)}
            finally:
                self.writer.module = outer
        if self._checkpointed.inside and updates_buffers(module, before):
            if self._checkpointed.nested:
                self._checkpointed.refuse(f"{name}.{next(iter(before))}")
            self._checkpointed.updates(list(self.writer.graph.find_nodes(op="call_module", target=name))[-1])
        return result

    def _run(self, module: nn.Module, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        registries: Iterator[Any] = (t for m in module.modules() for t in (m._parameters, m._buffers))
        tables = [(table, dict(table)) for table in registries if isinstance(table, dict)]  # not torch.jit's
        found = mutable((args, kwargs))
        try:
            try:
                return proceed(module, *args, **kwargs)
            finally:  # what it replaces is its own affair
                for table, before in tables:
                    table.update(before)
        except Exception as error:
            mirror((args, kwargs), found)  # what it has taken out so far
            try:
                return self._really_run(module, args, kwargs)
            except Exception as real:
                error.__dict__.setdefault("dtrp_real", reason(real))
                raise error from None

    def _really_run(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        self._examples.meet((args, kwargs))
        return self._world.really_run(module, args, kwargs)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

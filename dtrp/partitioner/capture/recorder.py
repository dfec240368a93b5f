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
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
)
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from .checkpointed import Checkpointed, reentrant, updates_buffers, versions
from .custom import GradientFunction, SameForm, Under, same_size
from .decisions import Decisions, Undecided
from .example_values import ExampleCalls
from .fakes import FakeWorld, light
from .leaves import is_leaf
from .location import raised_at, user_location
from .methods import KeptMethod, own_methods
from .sizes import Sizes, plain
from .snapshot import foreign_randomness, preserved_randomness
from .structure import Step, mirror, mutable, replace_tensors, tensors_in
from .targets import is_property, node_form, property_name
from .writer import CannotKeep, CannotRecord, GraphWriter

# Tensor methods whose effect is not in their result, or which ask for data that fakes do not have.
_REFUSED = {
    "backward": "calls backward() inside forward",
    "register_hook": "registers a gradient hook on a tensor",
    "register_post_accumulate_grad_hook": "registers a gradient hook on a tensor",
    "retain_grad": "asks a tensor to retain its gradient",
}


# What stops code that decides by values, or whose shapes depend on values, on fake tensors.
VALUE_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


class Recorder(TorchFunctionMode):
    """See the module's docstring; use through `record`."""

    def __init__(
        self,
        model: nn.Module,
        world: FakeWorld,
        closed: Collection[str],
        opened: Collection[str],
        decisions: Decisions,
        sizes_open: bool = True,
    ) -> None:
        super().__init__()
        self.writer = GraphWriter(model, world)
        self.paused = False
        self.sizes = Sizes(self.writer, lambda: self.paused)
        self.sizes.finished = not sizes_open
        self.failures: dict[str, str] = {}  # modules that could not be recorded, and why
        self.left: dict[tuple[str, str], torch.Tensor] = {}  # tensors assigned to attributes: module, name
        self._world = world
        self._closed, self._opened = closed, opened
        self._decisions = decisions
        self._names = {m: name for name, m in model.named_modules()}
        self.asks_grad = False  # the model's code asks whether gradients are enabled
        self._checkpointed = Checkpointed()
        self._examples: ExampleCalls | None = None
        self._updates: dict[str, torch.Tensor] = {}
        self._regions: list[str | None] = []  # of torch.autocast, by device

    def placeholder(self, name: str, fake: torch.Tensor) -> None:
        """Make ``fake`` the graph's next input."""
        self.writer.placeholder(name, fake)

    def keepers(self) -> dict[str, str]:
        """Modules that leave a tensor made from the inputs in an attribute, for whoever reads it, and which.

        One that is made from sizes and constants alone is a cache: the graph makes it each time.
        """
        return {
            path: f"keeps the tensor {f'{path}.{name}'.removeprefix('.')!r} from one call to the next"
            for (path, name), tensor in self.left.items()
            if self.writer.depends_on_inputs(tensor)
        }

    def know_examples(self, model: nn.Module, calls: list[list[torch.Tensor]]) -> None:
        """The inputs' real tensors in the example's call, and in some others that the model may get."""
        self._examples = ExampleCalls(model, self._world, self.writer, calls)

    def fix_sizes(self) -> None:
        """Guard that the inputs' sizes are the example's."""
        for node in list(self.writer.graph.nodes):
            for d, size in enumerate(node.meta["val"].shape):
                found = self.writer.node("call_method", "size", (node, d), {}, size)
                self.writer.node("call_function", same_size, (found, size, ""), {}, None)

    @contextmanager
    def all_seen(self, model: nn.Module) -> Iterator[None]:
        """Inside, what the model calls is recorded."""
        with self.sizes.followed(model), self:
            yield

    def finish(self, leaves: list[Any]) -> None:
        """Write the updates of buffers and the flat output."""
        for name, value in self._updates.items():
            buffer = self.writer.node("get_attr", name, (), {}, self.writer.attribute(name))
            node = self.writer.node("call_method", "copy_", (buffer, self.writer.argument(value)), {}, value)
            node.meta["update"] = name
        self.asks_grad |= self._checkpointed.write(self.writer)
        self.writer.output(leaves)
        self.sizes.tidy()

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
        with self._pause():
            name = getattr(func, "__name__", "")
            if name == "requires_grad_" or (name == "__set__" and property_name(func) == "requires_grad"):
                return self._set_requires_grad(*args, **kwargs)
            self._refuse(func)
            try:
                return self._call(func, node_form, args, kwargs)
            except Exception as error:
                if getattr(func, "__name__", "") != "__bool__":
                    raise
                return self._decide(args[0], error)

    def on_gradient_function(
        self, function: type[torch.autograd.Function], proceed: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """A custom autograd function: one node with its own backward."""
        if function is torch.utils.checkpoint.CheckpointFunction:  # run its first argument, storing nothing
            flows, region, inputs = reentrant(args)
            with torch.set_grad_enabled(flows), self._checkpointed.region() if flows else nullcontext():
                return region(*inputs)
        target = GradientFunction(function)
        with self._pause():
            if function.__module__ == "torch.utils.checkpoint":  # what it keeps for itself (torch 2.11)
                return proceed(*args, **kwargs)
            return self._call(proceed, lambda _, a, k: ("call_function", target, a, k), args, kwargs)

    def on_module(self, module: nn.Module, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A module: one node if it is a leaf (or nothing else works), else its insides."""
        name = self._names.get(module)
        if name is None or name == "":  # made on the way, or the root called by itself
            return proceed(module, *args, **kwargs)
        region = self._region()
        if region and name in self._closed:
            raise CannotRecord(f"calls {name!r}, which is kept whole, inside a region of torch.autocast")
        if not region and is_leaf(module, name, closed=self._closed, opened=self._opened):
            return self._leaf(name, module, proceed, args, kwargs)
        mark, outer = self.writer.mark(), self.writer.module
        self.writer.module = name
        found = mutable((args, kwargs))
        states, decided = foreign_randomness(), len(self._decisions.made)
        try:
            with preserved_randomness():
                result = proceed(module, *args, **kwargs)
                if foreign_randomness() != states:
                    raise CannotRecord("draws random numbers from Python's or numpy's generator")
            return result
        except Exception as error:
            if name in self._opened or region or isinstance(error, CannotKeep):
                raise
            self.writer.roll_back(mark)
            self._decisions.back_to(decided)
            self.writer.module = outer
            mirror((args, kwargs), found, lambda x: x)  # what it has put in so far is known no more
            try:
                result = self._leaf(name, module, proceed, args, kwargs)
            except Exception as whole:
                # What is wrong inside says more than what is wrong with the leaf, which is told beside it.
                if not hasattr(error, "dtrp_module"):
                    error.__dict__.update(dtrp_module=name, dtrp_whole=reason(whole))
                raise error from None
            self.failures[name] = reason(error)
            return result
        finally:
            self.writer.module = outer

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
        if key in self._closed:
            return self._method_leaf(key, kept, args, kwargs)
        mark, outer = self.writer.mark(), self.writer.method
        self.writer.method = key
        found, decided = mutable((args, kwargs)), len(self._decisions.made)
        try:
            return method(*args, **kwargs)
        except VALUE_DEPENDENT as error:
            self.writer.roll_back(mark)
            self._decisions.back_to(decided)
            self.writer.module = ""
            mirror((args, kwargs), found, lambda x: x)
            try:
                result = self._method_leaf(key, kept, args, kwargs)
            except Exception:
                raise error from None
            self.failures[key] = reason(error)
            return result
        finally:
            self.writer.method = outer

    def _method_leaf(self, key: str, kept: KeptMethod, args: Any, kwargs: Any) -> Any:
        name = self.writer.hold(key, kept)
        with self._pause():
            return self._call(
                lambda *a, **k: self._really_run(kept, a, k),
                lambda _, a, k: ("call_module", name, a, k),
                args,
                kwargs,
                kept=key,
            )

    def on_write(self, module: nn.Module, name: str, value: Any) -> None:
        """An assignment to a module's attribute."""
        path = self._names.get(module)
        if path is None:
            return
        old = module.__dict__.get(name)
        full = f"{path}.{name}" if path else name
        if name in module._buffers and isinstance(value, torch.Tensor):
            twin = self.writer.attribute(full)
            # Other graphs, such as that of evaluation, would go on reading the tensor that was there before.
            self._checkpointed.refuse(full, CannotKeep)
            if twin.shape != value.shape or twin.dtype != value.dtype or value.requires_grad:
                raise CannotRecord(f"replaces the buffer {full!r} by another kind of tensor")
            self._updates[full] = value
        elif name in module._parameters:
            raise CannotRecord(f"replaces the parameter {full!r}")
        elif isinstance(old, torch.Tensor) and self.writer.uses_attribute(old):
            raise CannotRecord(f"keeps the tensor {full!r} from one call to the next")
        elif isinstance(value, torch.Tensor):
            self.left[path, name] = value

    def on_checkpoint(self) -> AbstractContextManager[None]:
        """A region of torch.utils.checkpoint."""
        return self._checkpointed.region() if torch.is_grad_enabled() else nullcontext()

    def on_autocast(self, region: torch.autocast, entered: bool) -> None:
        """The model enters a region of torch.autocast, or leaves it."""
        # Checkpointing enters autocast just to repeat the outer state.
        if not entered:
            self._regions.pop()
        elif sys._getframe(2).f_code.co_filename.endswith("checkpoint.py"):
            self._regions.append(None)
        else:
            self._regions.append(region.device)

    def on_question(self) -> None:
        """The model asks whether gradients are enabled."""
        self.asks_grad = True

    def _region(self) -> tuple[tuple[str, bool, torch.dtype], ...]:
        """What torch.autocast is in the regions that the model has entered."""
        devices = dict.fromkeys(d for d in self._regions if d is not None)
        return tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)

    # One call

    def _call(
        self, function: Callable[..., Any], form: Callable[..., Any], args: Any, kwargs: Any, kept: str = ""
    ) -> Any:
        """Run ``function`` on fakes and, if it gives or changes a tensor, make it a node.

        ``kept``: the name of what is kept whole because it could not be recorded.
        """
        given = args, kwargs
        args, kwargs = plain(self._fake(given))
        before = self._fake(given)
        inputs = [t for _, t in tensors_in(before)]
        versions = [_version(t) for t in inputs]
        result = function(*args, **kwargs)
        outputs = list(tensors_in(result))
        held = [t for _, t in tensors_in((args, kwargs))]
        if [id(t) for t in held] != [id(t) for t in inputs]:
            # Only what the node gives can be known by it; the caller's objects follow.
            if not {id(t) for t in held} <= {id(t) for t in inputs} | {id(t) for _, t in outputs}:
                raise CannotRecord("puts a tensor into an object that it is given, and does not return it")
            mirror(given, (args, kwargs), lambda x: x)
        args, kwargs = before
        changed = [t for t, v in zip(inputs, versions, strict=True) if _version(t) != v]
        name = property_name(function) if is_property(function) else getattr(function, "__name__", "")
        if not outputs and not changed:
            return self.sizes.answer(name, args, lambda: form(function, args, kwargs), result)
        for tensor in changed:
            if name := self.writer.attribute_name(tensor):
                self._checkpointed.refuse(name)
        node = self.writer.node(*self._written(form(function, args, kwargs), bool(changed)), result)
        self.sizes.parted(name, node, result)
        if kept:
            self.writer.node("call_function", SameForm.of(kept, result), (node,), {}, None)
        return self._learn_all(result, outputs, node, inputs, changed)

    def _decide(self, condition: torch.Tensor, error: Exception) -> bool:
        """What the example says of a condition in the root's code; a guard for other batches."""
        try:
            node, place = self.writer.argument(condition), user_location()
            answer, guard = self._decisions.decide(node, place)
        except (Undecided, CannotRecord):
            raise error from None
        self.writer.node("call_function", guard, (node, answer, place), {}, None)
        return answer

    def _set_requires_grad(self, tensor: torch.Tensor, requires_grad: bool = True) -> torch.Tensor:
        node = self.writer.node(
            "call_method", "requires_grad_", (self.writer.argument(tensor), requires_grad), {}, tensor
        )
        tensor.requires_grad = requires_grad
        node.meta["val"] = light(tensor)
        self.writer.learn(tensor, node)
        return tensor

    def _leaf(self, name: str, module: nn.Module, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        before = versions(module)
        if name in self._closed and before and module.training:
            self._checkpointed.refuse(f"{name}.{next(iter(before))}")
        with self._pause(), preserved_randomness():  # what it draws is its own affair
            outer, self.writer.module = self.writer.module, name
            try:
                result = self._call(
                    lambda *a, **k: self._run(module, proceed, a, k),
                    lambda _, a, k: ("call_module", name, a, k),
                    args,
                    kwargs,
                    kept=name if name in self._closed else "",
                )
            finally:
                self.writer.module = outer
        if self._checkpointed.inside and updates_buffers(module, before):
            if self._checkpointed.nested:
                self._checkpointed.refuse(f"{name}.{next(iter(before))}")
            self._checkpointed.updates(list(self.writer.graph.find_nodes(op="call_module", target=name))[-1])
        return result

    def _run(self, module: nn.Module, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return proceed(module, *args, **kwargs)
        except Exception as error:
            try:
                return self._really_run(module, args, kwargs)
            except Exception as real:
                error.__dict__.setdefault("dtrp_real", reason(real))
                raise error from None

    def _really_run(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self._examples is not None:
            self._examples.meet((args, kwargs))
        return self._world.really_run(module, args, kwargs)

    def _written(self, form: Any, changes: bool) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
        """The node's arguments. Where gradients are switched off, none must flow through it."""
        op, target, args, kwargs = form
        region = self._region()
        if region and op != "call_module":
            op, target = "call_function", Under(target, region)
        cut = op != "call_module" and not torch.is_grad_enabled()
        return op, target, self.writer.argument(args, cut), self.writer.argument(kwargs, cut)

    def _learn_all(
        self,
        result: Any,
        outputs: list[tuple[tuple[Step, ...], torch.Tensor]],
        node: Node,
        inputs: list[torch.Tensor],
        changed: list[torch.Tensor],
    ) -> Any:
        silent = not torch.is_grad_enabled()
        if silent and node.op == "call_module":
            # The layer's own parameters would still let gradients in: cut them off behind it.
            fresh = {id(t): t for _, t in outputs if not any(t is x for x in inputs)}
            for steps, tensor in outputs:
                if id(tensor) in fresh and (tensor.is_floating_point() or tensor.is_complex()):
                    cut = self.writer.node(
                        "call_method", "detach", (self.writer.reach(node, steps),), {}, tensor
                    )
                    self.writer.learn(tensor, cut)
                elif id(tensor) in fresh:
                    self.writer.learn(tensor, node, steps)
            return result
        replaced: dict[int, torch.Tensor] = {}
        for steps, tensor in outputs:
            is_input = any(tensor is x for x in inputs)
            is_changed = any(tensor is x for x in changed)
            if is_input and silent:
                # The tensor itself, through which gradients keep flowing, although none may flow through
                # this node.
                continue
            if is_input and not is_changed:
                # Given back as it came. On another device or under autocast it may be a new tensor: give
                # the model another object, which stands for this node.
                replaced[id(tensor)] = alias = tensor.view_as(tensor)
                self.writer.learn(alias, node, steps)
            else:
                self.writer.learn(tensor, node, steps)
        return replace_tensors(result, replaced) if replaced else result

    def _fake(self, value: Any) -> Any:
        """``value`` with real tensors replaced by their fake twins."""
        if isinstance(value, torch.Tensor):
            return value if isinstance(value, FakeTensor) else self._world.twin(value)
        if type(value) in (tuple, list):
            return type(value)(self._fake(x) for x in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((k, self._fake(v)) for k, v in value.items())
        return value

    def _refuse(self, function: Callable[..., Any]) -> None:
        name = getattr(function, "__name__", "")
        if name in _REFUSED:
            raise CannotRecord(_REFUSED[name])
        if name == "__set__":
            raise CannotRecord(f"assigns to the attribute {property_name(function)!r} of a tensor")

    @contextmanager
    def _pause(self) -> Iterator[None]:
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before


def reason(error: BaseException) -> str:
    """One line that says why a module could not be recorded, with the user's line."""
    if hasattr(error, "dtrp_real"):  # it could not even run on real tensors
        return str(error.dtrp_real)
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    place = raised_at(error)
    if not isinstance(error, CannotRecord):
        text = f"{type(error).__name__}: {text}"
    return f"{text} ({place})" if place else text


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version

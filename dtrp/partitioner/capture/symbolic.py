"""First way: torch.fx's symbolic tracing, down to the layers of torch.nn, by proxies that know their values.

Sizes stay open, so the graph takes any batch and any resolution that the model takes; where code needs a
true number, a guard stands in the graph (`valued`). What has effects besides values (regions of no_grad and
autocast, assigned attributes, modules that must be kept whole) is left to the recorder.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode

from .custom import GradientFunction, same_size
from .fakes import FakeWorld, fake_inputs, light
from .leaves import has_hooks, is_leaf
from .location import user_location
from .modes import BothModes
from .patches import observed
from .propagate import fold_constants, open_outputs, without_unused
from .snapshot import foreign_randomness, preserved_randomness
from .state import changes_of, state_of
from .structure import flatten_output, mutable
from .task import Task
from .traced import Traced
from .valued import Valued, followed, is_tensor, valued


def trace_symbolically(task: Task) -> BothModes:
    """Trace the model in both modes with proxies in place of the tensors."""
    model = task.model

    if has_hooks(model):
        raise TraceError("the model itself has hooks")

    def trace(training: bool) -> Traced:
        world = task.world()
        tracer = _ModuleTracer(task, world)
        with (
            task.run(training),
            world.inhabited_by(model),
            observed(_Follower(tracer), model),
            followed(tracer, model),
            _Guard(tracer),
        ):
            states, state = foreign_randomness(), state_of(model)
            graph = tracer.trace(model)
            if changes := changes_of(model, state, ()):
                raise TraceError(next(iter(changes.values())))
            if foreign_randomness() != states:
                raise TraceError("draws random numbers from Python's or numpy's generator")
        assert tracer.out_spec is not None
        without_unused(graph)
        fold_constants(graph)
        return Traced(graph, open_outputs(graph, tracer.out_spec))

    return BothModes.of(trace)


class _Follower:
    """What the model does besides calling torch functions: stops what no node would repeat."""

    def __init__(self, tracer: _ModuleTracer) -> None:
        self._tracer = tracer

    @property
    def paused(self) -> bool:
        return self._tracer.running

    def on_module(self, module: nn.Module, proceed: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return proceed(module, *args, **kwargs)

    def on_gradient_function(
        self, function: type[torch.autograd.Function], proceed: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        if function.__module__ == "torch.utils.checkpoint":
            self.on_checkpoint()
        return self._tracer.create_proxy("call_function", GradientFunction(function), args, kwargs)

    def on_autocast(self, region: torch.autocast, entered: bool) -> None:
        if entered:
            raise TraceError("enters torch.autocast inside forward")

    def on_checkpoint(self) -> AbstractContextManager[None]:
        raise TraceError("uses torch.utils.checkpoint")

    def on_question(self) -> None:
        raise TraceError("asks whether gradients are enabled")

    def on_write(self, module: nn.Module, name: str, value: Any) -> None:
        raise TraceError(f"sets the attribute {name!r} of a {type(module).__name__} inside forward")


class _Guard(TorchFunctionMode):
    """Stops where tracing would silently freeze or drop what the model does."""

    def __init__(self, tracer: _ModuleTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self._tracer.running:
            return func(*args, **(kwargs or {}))
        if name in ("_set_grad_enabled", "_enter_autocast", "set_autocast_enabled", "_enter_inference_mode"):
            raise TraceError(f"switches gradients or autocast inside forward ({name})")
        if func is torch.autograd.grad:
            raise TraceError("computes gradients inside forward")
        result = func(*args, **(kwargs or {}))
        if is_tensor(result) and name != "__get__":
            # All its arguments were constants: it would stand in the graph as data.
            raise TraceError(f"computes a tensor from constants ({name})")
        return result


class _ModuleTracer(Tracer):
    """fx's tracer with flat placeholders and outputs, and the user's module and line on every node."""

    # Buffers that forward uses or changes become nodes like parameters.
    proxy_buffer_attributes = True

    def __init__(self, task: Task, world: FakeWorld) -> None:
        # Plain Python functions of sizes (math.sqrt of a width) become nodes too.
        import math

        super().__init__(autowrap_modules=(math,))
        self._task, self._world, self._thread = task, world, threading.get_ident()
        self._signature = task.signature
        self._opened, self._closed = task.opened, task.closed
        self.out_spec: torch.utils._pytree.TreeSpec | None = None
        self.running = False  # a node's function, to learn its value
        self._inputs = iter(fake_inputs(world, task.tensors))
        self._pinned: set[Any] = set()
        self._values: dict[Node, Any] = {}  # with their history, unlike those that stay in the graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m, module_qualified_name, closed=self._closed, opened=self._opened)

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        names = (f"input_{i}" for i in range(len(self._signature.tensors)))
        proxies = [self.create_proxy("placeholder", name, (), {}) for name in names]

        def run(root: nn.Module, *tensors: Proxy) -> tuple[Any, ...]:
            args, kwargs = self._signature.unflatten(tensors)
            leaves, self.out_spec = flatten_output(root_fn(root, *args, **kwargs))
            return tuple(leaves)

        return run, [self.root, *proxies]

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> Node:
        if args[0] is torch.autograd.grad or args[0] in ("backward", "register_hook", "retain_grad"):
            raise TraceError("computes gradients inside forward")
        node = super().create_node(kind, *args, **kwargs)
        node.meta["module"] = str(node.target) if kind == "call_module" else self.scope.module_path
        node.meta["location"] = user_location() if kind.startswith("call") else ""
        if kind != "output":
            self._values[node] = self._value(node)
            node.meta["val"] = self._light(self._values[node])
        else:
            node.meta["val"] = torch.fx.map_arg(node.args[0], lambda n: n.meta["val"])
        return node

    def _light(self, value: Any) -> Any:
        self.running = True
        try:
            return light(value)
        finally:
            self.running = False

    def create_arg(self, a: Any) -> Any:
        return a.node if type(a) is Valued else super().create_arg(a)

    def proxy(self, node: Node) -> Any:
        return valued(self, node, node.meta["val"])

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self.unseen() else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self.unseen() else super().call_module(m, forward, args, kwargs)

    def unseen(self) -> bool:
        """Whether it is not the model's forward that runs: a node, to learn its value, or another thread."""
        return self.running or threading.get_ident() != self._thread

    def pin(self, proxy: Valued) -> None:
        """Put a guard into the graph that the proxy's value is what it is."""
        key = proxy.node, proxy.value
        if key not in self._pinned:
            self._pinned.add(key)
            self.create_node("call_function", same_size, (proxy.node, proxy.value, user_location()), {})

    def _value(self, node: Node) -> Any:
        """What a node gives on fake tensors."""
        args, kwargs = mutable(torch.fx.map_arg((node.args, node.kwargs), self._values.__getitem__))
        self.running = True
        try:
            match node.op:
                case "placeholder":
                    return next(self._inputs)
                case "get_attr":
                    return operator.attrgetter(str(node.target))(self.root)
                case "call_method":
                    return getattr(args[0], str(node.target))(*args[1:], **kwargs)
                case "call_module":
                    return self._module(str(node.target), args, kwargs)
                case _:
                    return node.target(*args, **kwargs)  # type: ignore[operator]
        finally:
            self.running = False

    def _module(self, name: str, args: Any, kwargs: Any) -> Any:
        module = self.root.get_submodule(name)
        with preserved_randomness():
            try:
                return module(*args, **kwargs)
            except Exception as error:
                try:
                    return self._world.really_run(module, args, kwargs)
                except Exception:
                    raise error from None

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        try:
            return super().trace(root, concrete_args)
        except BaseException as error:
            # The facade reports the module that was being traced.
            error.__dict__.setdefault("dtrp_module", self.scope.module_path)
            raise

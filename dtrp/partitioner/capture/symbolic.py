"""First way: torch.fx's symbolic tracing, down to the layers of torch.nn.

All sizes stay symbolic, so the graph takes any batch and any resolution that the model takes. Python code
that must know a value (a branch on a shape, ``len``, an assertion) cannot be followed.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node, Proxy, Tracer
from torch.fx.proxy import TraceError
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from .fakes import FakeWorld, fake_inputs
from .graph import Signature
from .leaves import has_hooks, is_leaf
from .location import is_users, user_location
from .modes import BothModes
from .patches import replaced
from .propagate import fold_constants, open_outputs, propagate
from .snapshot import foreign_randomness, untouched
from .state import changes_of, state_of
from .structure import flatten_output
from .task import Task
from .traced import Traced


def trace_symbolically(task: Task) -> BothModes:
    """Trace the model in both modes with proxies in place of the tensors."""
    model = task.model

    if has_hooks(model):
        raise TraceError("the model itself has hooks")

    def trace() -> Traced:
        tracer = _ModuleTracer(task.signature, task.opened, task.closed)
        with untouched(model), _no_side_effects(), replaced((torch, "is_grad_enabled", _asked)), _Guard():
            states, state = foreign_randomness(), state_of(model)
            graph = tracer.trace(model)
            if changes := changes_of(model, state, ()):
                raise TraceError(next(iter(changes.values())))
            if foreign_randomness() != states:
                raise TraceError("draws random numbers from Python's or numpy's generator")
        assert tracer.out_spec is not None
        world = FakeWorld()
        propagate(model, graph, world, fake_inputs(world, task.tensors))
        fold_constants(graph)
        return Traced(graph, open_outputs(graph, tracer.out_spec))

    return BothModes.of(model, task.flags, trace)


_is_grad_enabled = torch.is_grad_enabled


def _asked() -> bool:
    if is_users(sys._getframe(1).f_code.co_filename):
        raise TraceError("asks whether gradients are enabled")
    return _is_grad_enabled()


class _Guard(TorchFunctionMode):
    """Stops where symbolic tracing would silently freeze or drop what the model does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("_set_grad_enabled", "_enter_autocast", "set_autocast_enabled", "_enter_inference_mode"):
            raise TraceError(f"switches gradients or autocast inside forward ({name})")
        if func is torch.autograd.grad:
            raise TraceError("computes gradients inside forward")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and name not in ("__get__", "detach"):
            # All its arguments were constants: it would stand in the graph as data.
            raise TraceError(f"computes a tensor from constants ({name})")
        return result


@contextmanager
def _no_side_effects() -> Iterator[None]:
    """Assignments to modules inside forward, and regions that run twice, stop the tracing."""
    write, here = nn.Module.__setattr__, threading.get_ident()

    def refuse(module: nn.Module, name: str, value: Any) -> None:
        if threading.get_ident() != here:  # somebody who builds a model meanwhile
            return write(module, name, value)
        raise TraceError(f"sets the attribute {name!r} of a {type(module).__name__} inside forward")

    def twice(*_: Any) -> Any:
        raise TraceError("uses torch.utils.checkpoint inside forward")

    regions: Any = checkpoint
    hook = regions._checkpoint_hook
    try:
        nn.Module.__setattr__ = refuse  # type: ignore[method-assign,assignment]
        regions._checkpoint_hook = twice
        yield
    finally:
        nn.Module.__setattr__ = write  # type: ignore[method-assign]
        regions._checkpoint_hook = hook


class _ModuleTracer(Tracer):
    """fx's tracer with flat placeholders and outputs, and the user's module and line on every node."""

    # Buffers that forward uses or changes become nodes like parameters.
    proxy_buffer_attributes = True

    def __init__(self, signature: Signature, opened: Collection[str], closed: Collection[str]) -> None:
        # Plain Python functions of sizes (math.sqrt of a width) become nodes too.
        import math

        super().__init__(autowrap_modules=(math,))
        self._signature = signature
        self._opened, self._closed = opened, closed
        self.out_spec: torch.utils._pytree.TreeSpec | None = None
        self._thread = threading.get_ident()

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if threading.get_ident() != self._thread:  # somebody who runs a model meanwhile
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

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
        node = super().create_node(kind, *args, **kwargs)
        node.meta["module"] = str(node.target) if kind == "call_module" else self.scope.module_path
        node.meta["location"] = user_location() if kind.startswith("call") else ""
        return node

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> Graph:
        try:
            return super().trace(root, concrete_args)
        except BaseException as error:
            # The facade reports the module that was being traced.
            error.__dict__.setdefault("dtrp_module", self.scope.module_path)
            raise

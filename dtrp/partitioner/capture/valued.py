"""Proxies that know their value: a trace whose sizes stay open and whose code still takes its usual course.

Each proxy carries what its node gives on fake tensors. So the code may ask whatever it likes:

- what is the same for all sizes (number of dimensions, dtypes, devices) is answered by the plain value,
- a size is a proxy again; what is computed with it becomes nodes,
- where a true number or truth is needed (``if t > 10``, ``range(t)``), the value of the example is given, and
  the graph gets a guard that refuses other sizes with the line that asked.
"""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.fx.proxy import TraceError

from .patches import replaced
from .state import kinds_of

_PLAIN = (str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator)
FACTORIES = (
    "arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "tril_indices", "triu_indices", "zeros",
)  # fmt: skip


def valued(tracer: Any, node: Any, value: Any) -> Any:
    """``node`` as a proxy with its value; the value itself where it is the same for all sizes."""
    if isinstance(value, _PLAIN) or (isinstance(value, (bool, int)) and _fixed(node)):
        return value
    return Valued(node, tracer, value)


def _fixed(node: Any) -> bool:
    """Whether a number or truth is asked of a tensor, and is no size of it."""
    asked = node.args[0] if node.args else None
    if not isinstance(getattr(asked, "meta", {}).get("val"), torch.Tensor):
        return False
    name = str(node.args[1]) if node.target is getattr else getattr(node.target, "__name__", str(node.target))
    return name in ("dim", "ndim", "ndimension", "get_device") or isinstance(node.meta["val"], bool)


class Valued(Proxy):
    """See the module's docstring."""

    def __init__(self, node: Any, tracer: Any, value: Any) -> None:
        super().__init__(node, tracer)
        self.value = value

    def __repr__(self) -> str:
        return f"Valued({self.node.name})"

    def __getattr__(self, name: str) -> Any:
        value = self.__dict__["value"]
        if isinstance(value, dict) and name in ("keys", "items", "values"):
            pairs = {k: operator.getitem(self, k) for k in value}
            return getattr(pairs, name)
        if name.startswith("__") or not hasattr(value, name):
            raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
        if isinstance(value, torch.Tensor) and name in ("data", "grad", "grad_fn", "_version", "H"):
            raise TraceError(f"reads the attribute {name!r} of a tensor")
        if callable(getattr(value, name)):
            return lambda *a, **k: self.tracer.create_proxy("call_method", name, (self, *a), k)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad" and isinstance(self.value, torch.Tensor):
            self.tracer.create_proxy("call_method", "requires_grad_", (self, value), {})
            return
        if name not in ("node", "tracer", "value"):
            raise TraceError(f"assigns to the attribute {name!r} of a tensor")
        object.__setattr__(self, name, value)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TraceError("calls a value")

    # Where a true Python value is needed

    def pinned(self) -> Any:
        """The example's value, which the graph then is for."""
        value = self.value
        if not isinstance(value, (bool, int, float)):
            raise TraceError("decides by the values in a tensor")
        self.tracer.pin(self)  # type: ignore[attr-defined]
        return value

    def __bool__(self) -> bool:
        if isinstance(self.value, (tuple, list, dict)):
            return bool(self.value)
        return bool(self.pinned())

    def __index__(self) -> int:
        return operator.index(self.pinned())

    def __int__(self) -> int:
        return int(self.pinned())

    def __float__(self) -> float:
        return float(self.pinned())

    def __hash__(self) -> int:
        return hash(self.pinned()) if isinstance(self.value, (bool, int, float)) else id(self)

    def __len__(self) -> int:
        if isinstance(self.value, torch.Tensor):
            return int(self.size(0))
        return _length(self.value)

    def __contains__(self, item: Any) -> bool:
        if isinstance(self.value, dict):
            return item in self.value
        if isinstance(self.value, torch.Tensor):
            raise TraceError("decides by the values in a tensor")
        return any(bool(x is item or x == item) for x in self)

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.value, dict):
            return iter(list(self.value))
        parts = self.unbind(0) if isinstance(self.value, torch.Tensor) else self  # as a tensor does it
        return iter([operator.getitem(parts, i) for i in range(self.__len__())])


def _in_place(name: str) -> Any:
    change, make = getattr(operator, f"i{name}"), getattr(operator, name)

    def method(self: Valued, other: Any) -> Any:
        function = change if isinstance(self.value, torch.Tensor) else make
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "matmul"):
    setattr(Valued, f"__i{_name}__", _in_place(_name))


class _IntLike(type):
    """Stands for ``int`` in the model's files: ``int(x.shape[0])`` stays a size."""

    def __call__(cls, *args: Any) -> Any:
        if len(args) == 1 and type(args[0]) is Valued and isinstance(args[0].value, int):
            return args[0]
        return int(*args)

    def __instancecheck__(cls, value: Any) -> bool:
        return instance(value, int)

    def __eq__(cls, other: object) -> bool:
        return other is int or other is cls

    def __hash__(cls) -> int:
        return hash(int)


class Int(metaclass=_IntLike):
    """See `_IntLike`."""


def is_tensor(value: Any) -> bool:
    """Whether a value is a tensor, and no proxy of one."""
    return issubclass(type(value), torch.Tensor)


def instance(value: Any, kinds: Any) -> bool:
    """``isinstance``, of which a proxy is what its value is. (``__class__`` would mislead torch's C code.)"""
    if type(value) is Valued:
        kind = torch.Tensor if is_tensor(value.value) else type(value.value)
        return _isinstance(value, kinds) or issubclass(kind, _types(kinds))
    return _isinstance(value, kinds)


def _types(kinds: Any) -> Any:
    return tuple(map(_types, kinds)) if type(kinds) is tuple else int if kinds is Int else kinds


def length(value: Any) -> Any:
    """``len``, which for a tensor's proxy is a size."""
    if type(value) is Valued and isinstance(value.value, torch.Tensor):
        return value.tracer.create_proxy("call_method", "size", (value, 0), {})
    return _length(value)


_length, _isinstance = len, isinstance


@contextmanager
def followed(tracer: Any, model: nn.Module) -> Iterator[None]:
    """Inside, Python's and torch's functions that would ask a proxy for a number make nodes instead."""

    def made(function: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            if tracer.unseen():
                return function(*args, **kwargs)
            return tracer.create_proxy("call_function", function, args, kwargs)

        return make

    files = {kind.__module__ for kind in kinds_of(model.modules())}
    scopes = [vars(sys.modules[f]) for f in files if f in sys.modules and "int" not in vars(sys.modules[f])]
    with replaced(
        (builtins, "len", length),
        (builtins, "isinstance", instance),
        *((torch, name, made(getattr(torch, name))) for name in FACTORIES),
    ):
        for scope in scopes:
            scope["int"] = Int
        try:
            yield
        finally:
            for scope in scopes:
                del scope["int"]

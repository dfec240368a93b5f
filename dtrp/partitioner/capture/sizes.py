"""Sizes that know their value, and which node of the recording computes it.

The model's code gets them wherever it asks a tensor for its sizes. They pass for ``int`` (and torch takes
them for its own `torch.SymInt`), so the code takes its usual course:

- what is computed with a size is a size again, and nodes of the graph compute it,
- where a true number or truth is needed (``if t > 10``, ``range(t)``), it is the example's, and the graph
  gets a guard that refuses other sizes with the line that asked.

    y.view(n, t // 2, -1)        size_1 = y.size(1);  half = size_1 // 2;  y.view(size, half, -1)

Tensors themselves have the example's sizes throughout: nothing is solved for, and running costs no more.
"""

from __future__ import annotations

import builtins
import functools
import inspect
import math
import operator
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from .custom import same_size
from .decisions import is_told
from .location import user_location
from .patches import replaced
from .state import kinds_of
from .writer import GraphWriter

_ASKED = {"size", "shape", "numel", "nelement", "stride", "storage_offset", "nbytes", "__len__"}
_PARTED = {"unbind", "split", "unsafe_split", "__iter__"}  # give more tensors of larger ones
_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
_UNARY: dict[str, Callable[..., Any]] = {
    "neg": operator.neg, "pos": operator.pos, "abs": operator.abs,
    "ceil": math.ceil, "floor": math.floor, "trunc": math.trunc, "round": round,
}  # fmt: skip
_MATH = ("sqrt", "exp", "log", "log2", "log10", "pow")


_length = len


class _Node:
    """What torch's C++ code may ask a `torch.SymInt` for: its value, as a plain number."""

    def __init__(self, pinned: Callable[[], Any]) -> None:
        self.int_ = self.bool_ = pinned
        self.guard_int = self.guard_float = self.guard_size_oblivious = lambda *_: pinned()
        self.is_nested_int = self.is_bool = self.is_constant = self.is_symbolic = lambda: False
        self.maybe_as_int = self.maybe_as_float = lambda: None
        self.has_hint = lambda: True
        self.is_int = lambda: True
        self.is_float = lambda: False


class _Known:
    """A number that knows its value."""

    def __init__(self, sizes: Sizes, node: Node, value: Any) -> None:
        self.node: Any = _Node(self.pinned)
        self.sizes, self.source, self.value = sizes, node, value

    @property
    def __class__(self) -> type:  # so ``isinstance(size, int)`` is true
        return type(self.value)

    @__class__.setter
    def __class__(self, kind: type) -> None:
        raise TypeError("the class of a size is fixed")

    def pinned(self, *_: Any) -> Any:
        """The example's value, which the graph then is for."""
        return self.sizes.pin(self)

    def __getattr__(self, name: str) -> Any:
        if name in ("value", "sizes", "source") or not hasattr(self.value, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.pinned(), name)

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return type(self.value), (self.value,)

    def __repr__(self) -> str:
        # A text may be a key; but what is told to somebody decides nothing.
        return repr(self.value if is_told() else self.pinned())

    def __str__(self) -> str:
        return repr(self)

    def __format__(self, form: str) -> str:
        return format(self.value if is_told() else self.pinned(), form)

    def __bool__(self) -> bool:
        return bool(self.sizes.compute(operator.ne, (self, 0)))

    def __int__(self) -> int:
        return int(self.pinned())

    def __float__(self) -> float:
        return float(self.pinned())

    def __hash__(self) -> int:
        return hash(self.pinned())

    def __divmod__(self, other: Any) -> Any:
        return operator.floordiv(self, other), operator.mod(self, other)

    def __rdivmod__(self, other: Any) -> Any:
        return operator.floordiv(other, self), operator.mod(other, self)


class Size(_Known, torch.SymInt):
    """An ``int``."""

    def __index__(self) -> int:
        return operator.index(self.pinned())


class Ratio(_Known, torch.SymFloat):
    """A ``float``."""


def _method(function: Callable[..., Any], reflected: bool = False) -> Any:
    def method(self: _Known, *others: Any) -> Any:
        return self.sizes.compute(function, (*others, self) if reflected else (self, *others))

    return method


def _by_math(self: _Known, function: Callable[..., Any]) -> Any:
    return self.sizes.call(function, self)


for _kind in (Size, Ratio):
    for _name in (*_BINARY, *_COMPARED):
        setattr(_kind, f"__{_name}__", _method(getattr(operator, f"__{_name}__")))
    for _name in _BINARY:
        setattr(_kind, f"__r{_name}__", _method(getattr(operator, f"__{_name}__"), reflected=True))
    for _name, _function in _UNARY.items():
        setattr(_kind, f"__{_name}__", _method(_function))
    for _name in ("sqrt", "exp", "log", "log2", "log10"):  # numpy asks objects for these
        setattr(_kind, _name, functools.partialmethod(_by_math, getattr(math, _name)))


def is_size(value: Any) -> bool:
    """Whether it is a size that knows its value."""
    return type(value) is Size or type(value) is Ratio


def plain(value: Any) -> Any:
    """``value`` with plain numbers in place of sizes."""
    kind = type(value)
    if kind is Size or kind is Ratio:
        return value.value
    if kind is slice:
        return slice(plain(value.start), plain(value.stop), plain(value.step))
    if kind in (tuple, list, torch.Size):
        return kind(map(plain, value))
    if issubclass(kind, tuple) and hasattr(value, "_fields"):
        return kind(*map(plain, value))
    if kind is dict:
        return {k: plain(v) for k, v in value.items()}
    return value


def holds_sizes(value: Any) -> bool:
    """Whether there are sizes in a call's arguments."""
    kind = type(value)
    if kind is Size or kind is Ratio:
        return True
    if kind is slice:
        return holds_sizes((value.start, value.stop, value.step))
    if kind is dict:
        return any(map(holds_sizes, value.values()))
    return issubclass(kind, (tuple, list)) and any(map(holds_sizes, value))


class Sizes:
    """Gives the model's code sizes, and writes down what it does with them."""

    def __init__(self, writer: GraphWriter, asleep: Callable[[], bool]) -> None:
        """``asleep``: whether it is not the model's code that runs."""
        self._writer, self._asleep, self._thread = writer, asleep, threading.get_ident()
        self._made: dict[Any, Node] = {}
        self._guards: dict[Any, Node] = {}
        self.finished = False

    @property
    def _unseen(self) -> bool:
        return self.finished or self._asleep() or threading.get_ident() != self._thread

    def answer(self, name: str, given: tuple[Any, ...], form: Callable[[], Any], result: Any) -> Any:
        """What the model's code gets for a question (of that name, about ``given``) instead of ``result``."""
        if self.finished or name not in _ASKED or not isinstance(given[0], torch.Tensor):
            return result
        source = self._writer.argument(given[0])
        if not source.meta["open"]:
            return result
        kind, target, args, kwargs = form()
        if type(result) is torch.Size:
            return torch.Size(
                [self._size("call_method", "size", (source, d), n) for d, n in enumerate(result)]
            )
        if type(result) is tuple:  # strides
            return tuple(self._size(kind, target, (source, d), n) for d, n in enumerate(result))
        args = (source, *map(self._written, args[1:]), *map(self._written, kwargs.values()))
        return self._size(kind, target, args, result)

    def parted(self, name: str, node: Node, result: Any) -> None:
        """Guard how many tensors a node gives, as the code goes on for so many."""
        if not self.finished and name in _PARTED and type(result) in (tuple, list) and node.meta["open"]:
            self._guard(self._node("call_function", _length, (node,), _length(result)), _length(result))

    def compute(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """``function(*args)`` of numbers."""
        if not all(isinstance(a, (int, float)) for a in args):
            return NotImplemented
        value = function(*map(plain, args))
        if self._unseen:
            return value
        node = self._node("call_function", function, tuple(map(self._written, args)), value)
        if isinstance(value, bool):
            self._guard(node, value)
            return value
        return self._known(node, value)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """A plain function of numbers or shapes."""
        value = function(*plain(args))
        if self._unseen or not holds_sizes(args):
            return value
        node = self._node("call_function", function, tuple(map(self._written, args)), value)
        if type(value) is torch.Size:
            items = (self._size("call_function", operator.getitem, (node, i), n) for i, n in enumerate(value))
            return torch.Size(items)
        return self._known(node, value)

    def pin(self, number: _Known) -> Any:
        """The plain value, for which the graph is guarded."""
        if not self._unseen:
            self._guard(self._written(number), number.value)
        return number.value

    def pinned_inputs(self, names: Sequence[str]) -> tuple[str, ...]:
        """Notes of the sizes that are the example's for good, and where; of the inputs with these names."""
        inputs = self._writer.graph.find_nodes(op="placeholder")
        known = dict(zip(inputs, names, strict=True))
        found = {}
        for (node, _, value), guard in self._guards.items():
            asked = node.args[0] if node.target == "size" else None
            if asked in known and not guard._erased:
                text = f"size {node.args[1]} of {known[asked]!r} is fixed at {value}"
                found[node] = f"{text}: {guard.args[2]} needs it as a plain number"
        return tuple(found.values())

    def fix(self) -> None:
        """Guard that the inputs' sizes are the example's, which are plain numbers then."""
        self.finished = True
        for node in self._writer.graph.find_nodes(op="placeholder"):
            for d, size in enumerate(node.meta["val"].shape):
                found = self._writer.node("call_method", "size", (node, d), {}, size)
                self._writer.node("call_function", same_size, (found, size, ""), {}, None)

    def tidy(self) -> None:
        """Take out what was asked and not used; from now on sizes are plain numbers."""
        self.finished = True
        for node in reversed(self._made.values()):
            if not node._erased and not node.users:
                node.graph.erase_node(node)

    def _written(self, value: Any) -> Any:
        return self._writer.argument(value)

    def _size(self, op: str, target: Any, args: tuple[Any, ...], value: Any) -> Any:
        return self._known(self._node(op, target, args, value), value)

    def _known(self, node: Node, value: Any) -> Any:
        return (Ratio if isinstance(value, float) else Size)(self, node, value)

    def _node(self, op: str, target: Any, args: tuple[Any, ...], value: Any) -> Node:
        key = target, *((type(a), a) for a in args)
        node = self._made.get(key)
        if node is None or node._erased:
            node = self._made[key] = self._writer.node(op, target, args, {}, value)
        return node

    def _guard(self, node: Node, value: Any) -> None:
        key = node, type(value), value
        if key not in self._guards or self._guards[key]._erased:
            args = node, value, user_location()
            self._guards[key] = self._writer.node("call_function", same_size, args, {}, None)

    @contextmanager
    def followed(self, model: nn.Module) -> Iterator[None]:
        """Inside, Python's and torch's functions that would ask a size for its value make nodes instead."""

        def sized(value: Any) -> Any:
            if issubclass(type(value), torch.Tensor) and not self._unseen:
                return value.size(0)
            return _length(value)

        def made(function: Any) -> Any:
            return lambda *args: self.call(function, *args) if not self._unseen else function(*args)

        files = {kind.__module__ for kind in kinds_of(model.modules())} & sys.modules.keys()
        scopes = [vars(sys.modules[f]) for f in files if not self.finished and not _names_dtype(f)]
        scopes = [scope for scope in scopes if "int" not in scope]
        with replaced(
            (builtins, "len", sized),
            (torch, "broadcast_shapes", made(torch.broadcast_shapes)),
            *((math, name, made(getattr(math, name))) for name in _MATH),
        ):
            for scope in scopes:
                scope["int"] = Int
            try:
                yield
            finally:
                for scope in scopes:
                    del scope["int"]


@functools.cache
def _names_dtype(file: str) -> bool:
    """Whether a file has ``int`` for a dtype, which torch knows by identity: ``torch.ones(n, dtype=int)``.
    There, ``int(size)`` fixes the size."""
    try:
        text = inspect.getsource(sys.modules[file])
    except (OSError, TypeError):
        return False
    return re.search(r"dtype *= *int\b|\.(to|type|astype)\( *int *\)", text) is not None


class _IntLike(type):
    """Stands for ``int`` in the model's files: ``int(x.shape[0])`` stays a size."""

    def __call__(cls, *args: Any) -> Any:
        if len(args) == 1 and is_size(args[0]):
            return args[0] if type(args[0]) is Size else math.trunc(args[0])
        return int(*args)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, int)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, int)

    def __eq__(cls, other: object) -> bool:
        return other is int or other is cls

    def __hash__(cls) -> int:
        return hash(int)


class Int(metaclass=_IntLike):
    """See `_IntLike`."""

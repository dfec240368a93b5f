"""What a model, or its graph, does: the list of operators that it runs.

Both run on fake tensors under one dispatch mode, so the list costs no FLOPs and has no limit of size. A
tensor is known by its name (parameter, buffer, input) or by the order in which it appeared, so two lists
are equal only where the same operators took the same tensors and the same numbers:

    aten.addmm(bias, input 0, %0, beta=1) -> %1: float32 (4, 8)

``detach`` and its like make no entry: they give the tensor itself, and what they do to gradients is seen
in the graph that autograd makes, which the list ends with (`verify`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dtrp.memory import storage_of
from dtrp.partitioner.op_cost import op_flops

from .fakes import FakeWorld

_aten = torch.ops.aten
_SAME = {_aten.detach.default, _aten.alias.default, _aten.lift.default, _aten.lift_fresh.default}
_SMALL = 64  # constants of up to so many elements are known by their contents


@dataclass(frozen=True)
class Event:
    """One operator, or something else that counts (a buffer assigned, a module that really ran)."""

    key: tuple[Any, ...]
    module: str  # that was running
    place: str = ""  # the line, where it is known

    @property
    def text(self) -> str:
        """The operator as a reader would write it."""
        name, *arguments = self.key
        return f"{name}({', '.join(map(_shown, arguments[:-1]))}) -> {_shown(arguments[-1])}"


@dataclass
class Access:
    """What one node did to storages when it ran."""

    node: Node
    reads: set[int] = field(default_factory=set)
    makes: set[int] = field(default_factory=set)
    writes: set[int] = field(default_factory=set)
    random: bool = False
    differentiable: bool = False

    def note(self, func: Any, args: Any, kwargs: Any) -> None:
        """An operator that runs for it."""
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        for argument, value in itertools.zip_longest(func._schema.arguments, args):
            if argument is None:
                return
            storages = storages_in(kwargs.get(argument.name, value))
            self.reads |= storages
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.writes |= storages


@dataclass(frozen=True)
class Walk:
    """What the nodes of a graph did on fake tensors, with all parameters trainable."""

    accesses: tuple[Access, ...] = ()
    state: frozenset[int] = frozenset()  # storages of parameters and buffers
    flops: float = 0.0  # of the forward pass
    written: frozenset[str] = frozenset()  # parameters that the forward pass writes to


def storages_in(tree: Any) -> set[int]:
    """The storages of the tensors in a value; their numbers are good while the tensors live."""
    tensors = (tree,) if isinstance(tree, torch.Tensor) else pytree.tree_leaves(tree)
    return {storage_of(t) for t in tensors if isinstance(t, torch.Tensor)}


class OperatorLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes all operators that reach the fake tensors of ``world``."""

    def __init__(self, world: FakeWorld, where: Callable[[int], tuple[str, str]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[Event] = []
        self._world = world
        self._where = where  # module and place, for the event of that number
        self._numbers: dict[int, Any] = {}
        self._held: list[torch.Tensor] = []  # so that no id is given to another tensor
        self._fresh = 0
        self.access: Access | None = None  # of the node that is running
        self.flops = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing compiles here, and keeping it out costs more than an entry does

    def name(self, tensor: torch.Tensor, name: Any) -> None:
        """Know ``tensor`` by ``name``."""
        self._numbers[id(tensor)] = name
        self._held.append(tensor)

    def known(self, tensor: torch.Tensor) -> Any:
        """What ``tensor`` is known by."""
        if id(tensor) not in self._numbers:
            self.name(tensor, self._constant(tensor))
        return self._numbers[id(tensor)]

    def add(self, *key: Any) -> None:
        """An event."""
        self.events.append(Event(key, *self._where(len(self.events))))

    def mark(self) -> tuple[int, int, int]:
        """The present point."""
        return len(self.events), self._fresh, self.flops

    def back_to(self, mark: tuple[int, int, int]) -> None:
        """Forget what came after a point."""
        del self.events[mark[0] :]
        _, self._fresh, self.flops = mark

    def number(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Number what an operation gave, unless it is known already."""
        for tensor in tensors:
            if id(tensor) not in self._numbers:
                self.name(tensor, self._fresh)
                self._fresh += 1
        return [self._described(t) for t in tensors]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.access is not None:
            self.access.note(func, args, kwargs)
        given = [*map(self.value, args), *(self._keyword(k, v) for k, v in sorted(kwargs.items()))]
        result = _apart(func(*args, **kwargs))
        if func.namespace == "prim" or func is _aten._local_scalar_dense.default:
            return result  # a question; on fake tensors it has an answer for constants alone
        if func in _SAME:
            if id(result) not in self._numbers:
                self.name(result, self.known(args[0]))
            return result
        if func is _aten.empty.memory_format and not result.numel():
            # Holds nothing. torch 2.11's checkpointing makes some for itself, which are in no graph.
            self.name(result, ("empty", tuple(result.shape), result.dtype))
            return result
        made = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.add(func, *given, tuple(self.number(made)))
        self.flops += op_flops(func, args, kwargs, result)
        return result

    def value(self, value: Any) -> Any:
        """An argument as it stands in an event: comparable, and free of tensors."""
        if isinstance(value, torch.Tensor):
            return ("%", self.known(value))
        if isinstance(value, (list, tuple)):
            return ("[", *map(self.value, value))
        if isinstance(value, dict):
            return ("{", *(self._keyword(k, v) for k, v in value.items()))
        if isinstance(value, (bool, int, float, complex, str, type(None))):
            return type(value).__name__, repr(value)
        if isinstance(value, (torch.dtype, torch.device, torch.layout, torch.memory_format)):
            return repr(value)
        return type(value).__name__

    def _keyword(self, name: Any, value: Any) -> Any:
        return ("=", name, self.value(value))

    def _described(self, tensor: torch.Tensor) -> Any:
        return self.known(tensor), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)

    def _constant(self, tensor: torch.Tensor) -> Any:
        """What an unnamed tensor is known by: what it holds, if it is a real and small one."""
        tensor = self._world.originals.get(id(tensor), tensor)
        if isinstance(tensor, FakeTensor) or tensor.is_meta:
            return "unknown", tuple(tensor.shape), str(tensor.dtype)
        if tensor.numel() > _SMALL or tensor.layout != torch.strided:
            return "constant", tuple(tensor.shape), str(tensor.dtype)
        with torch.utils._python_dispatch._disable_current_modes():
            return "constant", str(tensor.dtype), repr(tensor.detach().tolist())

    @contextmanager
    def silent(self) -> Iterator[None]:
        """What happens inside makes no events."""
        mark = self.mark()
        try:
            yield
        finally:
            self.back_to(mark)


def _apart(result: Any) -> Any:
    """``result`` without the same tensor in two places, which only some fake kernels give."""
    if not isinstance(result, (tuple, list)):
        return result
    seen: set[int] = set()

    def own(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and id(x) in seen:
            return x.detach()
        seen.add(id(x))
        return x

    return type(result)(map(own, result))


class _Unseen(torch.autograd.Function):
    """Joins what a module gave that could not run on fake tensors to its inputs, in both directions."""

    @staticmethod
    def forward(ctx: Any, log: OperatorLog, n: int, *tensors: torch.Tensor) -> Any:
        with log.silent():
            return tuple(torch.empty_like(t) for t in tensors[:n])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Nothing: what the module does to gradients is the same for the model and its graph."""
        return (None,) * len(ctx.needs_input_grad)


def join(
    log: OperatorLog, name: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """An event for a module that really ran, and its outputs as functions of its inputs."""
    own = {id(t) for t in inputs}
    fresh = [t for t in outputs if id(t) not in own and t.requires_grad]
    made: dict[int, torch.Tensor] = {}
    if fresh and torch.is_grad_enabled():
        flows = [t for t in inputs if t.requires_grad]
        joined: Any = _Unseen.apply(log, len(fresh), *fresh, *flows)
        made = {id(t): j for t, j in zip(fresh, joined, strict=True)}
    result = [made.get(id(t), t) for t in outputs]
    log.add(f"module {name}", *map(log.value, inputs), tuple(log.number(result)))
    return result


def _shown(value: Any) -> str:
    match value:
        case ("%", int(number)):
            return f"%{number}"
        case ("%", name):
            return str(name)
        case ("[", *items):
            return f"[{', '.join(map(_shown, items))}]"
        case ("=", name, inner):
            return f"{name}={_shown(inner)}"
        case (str(kind), str(text)) if kind in ("bool", "int", "float", "complex", "str", "NoneType"):
            return text
        case (number, str(dtype), tuple(shape)):
            return f"{'%' if isinstance(number, int) else ''}{number}: {dtype} {shape}"
        case tuple(items):
            return ", ".join(map(_shown, items))
    return str(value)

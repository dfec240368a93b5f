"""What capturing gives: one flat fx graph per mode, and how a call's arguments become its placeholders.

The contract that every way of capturing keeps, and that costs, split and export rely on:

- Placeholders stand for the *tensor* leaves of ``(args, kwargs)``, in pytree order; all other leaves are
  constants of the capture (`Signature.constants`).
- ``output`` holds one flat tuple with a leaf of the model's output in each place (a node or a constant);
  ``ModeGraph.out_spec`` puts them together again.
- ``call_module`` and ``get_attr`` targets are the qualified names of the original model, whose modules and
  parameters the graph module shares (never copies).
- Every node carries ``meta["val"]`` (its value on fake tensors: a pytree of FakeTensors and Python scalars),
  ``meta["module"]`` (qualified name of the innermost original module that it comes from, ``""`` for the
  root) and ``meta["location"]`` (``"file.py:123"`` of the user's code, ``""`` if unknown).
- Both graphs have the same placeholders. They are one object where a single graph is right for both modes.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .operators import Walk
from .real import RealRuns
from .structure import hidden_tensors, opened


@dataclass(frozen=True)
class Signature:
    """Binds a call of the model to the tensors that its graph takes, and says what does not fit."""

    forward: inspect.Signature
    in_spec: pytree.TreeSpec
    names: tuple[str, ...]  # of each leaf, for messages: "x", "batch['mask']"
    tensors: tuple[int, ...]  # which leaves are placeholders, in order
    constants: Mapping[int, Any]  # the other leaves, baked into the graph
    plain: bool = False  # a call with so many tensors by position, and nothing else, is of this form

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Signature:
        """The signature of ``model(*args, **kwargs)``."""
        forward = inspect.signature(model.forward)
        leaves, names, spec = _bind(forward, args, kwargs)
        tensors = tuple(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
        for name, leaf in zip(names, leaves, strict=True):
            if not isinstance(leaf, torch.Tensor) and hidden_tensors(leaf):
                raise TypeError(
                    f"argument {name!r} is a {type(leaf).__name__}, which holds tensors where they cannot be "
                    f"seen: they would be frozen into the graph. Say what it is made of, by "
                    f"torch.utils._pytree.register_pytree_node({type(leaf).__name__}, ...), or pass its "
                    f"tensors to the model."
                )
        constants = {i: leaf for i, leaf in enumerate(leaves) if i not in set(tensors)}
        signature = cls(forward, spec, tuple(names), tensors, constants)
        try:
            alone = signature.flatten([leaves[i] for i in tensors], {})
        except (TypeError, ValueError):
            return signature
        return replace(signature, plain=all(a is leaves[i] for a, i in zip(alone, tensors, strict=True)))

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the placeholders' arguments, in order."""
        return tuple(self.names[i] for i in self.tensors)

    def flatten(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], unread: Collection[str] = ()
    ) -> list[torch.Tensor]:
        """The placeholders' tensors of one call; ``unread``: names of strings that may be any.

        Raises
        ------
        TypeError
            The arguments do not fit ``forward``, or have another structure than the example's.
        ValueError
            A non-tensor argument differs from the example's.
        """
        if (  # what a training loop does at every batch; defaults stand for the rest
            self.plain
            and not kwargs
            and len(args) == len(self.tensors)
            and all(type(a) is torch.Tensor for a in args)
        ):
            return list(args)
        leaves, names, spec = _bind(self.forward, args, kwargs)
        if spec != self.in_spec and _same_keys(spec, self.in_spec):  # dicts in another order
            by_name = dict(zip(names, leaves, strict=True))
            leaves = [by_name[name] for name in self.names]
        elif spec != self.in_spec:
            raise TypeError(
                f"the inputs have another structure than the example inputs that the model was compiled "
                f"with: got {_describe(names)}, expected {_describe(self.names)}. "
                f"Compile again with an example of this form."
            )
        for i, expected in self.constants.items():
            if isinstance(leaves[i], str) and self.names[i] in unread:
                continue
            if isinstance(leaves[i], torch.Tensor) or not _same(leaves[i], expected):
                raise ValueError(
                    f"argument {self.names[i]!r} was {expected!r} when the model was compiled and is "
                    f"{_short(leaves[i])} now. What changes between calls must be a tensor: give "
                    f"torch.tensor(...), or compile again with an example of this form."
                )
        for i in self.tensors:
            if not isinstance(leaves[i], torch.Tensor):
                raise TypeError(
                    f"argument {self.names[i]!r} was a tensor when the model was compiled and is "
                    f"{_short(leaves[i])} now. Give a tensor, or compile again with an example of this form"
                )
        return [leaves[i] for i in self.tensors]

    def fits(self, args: Sequence[Any], kwargs: Mapping[str, Any], unread: Collection[str] = ()) -> bool:
        """Whether a call is of this form."""
        try:
            self.flatten(args, kwargs, unread)
        except (TypeError, ValueError):
            return False
        return True

    def new_values(self, before: Signature) -> dict[str, Any]:
        """Plain values that are others than in ``before``, or not there, by name."""
        known = {before.names[i]: value for i, value in before.constants.items()}
        mine = {self.names[i]: value for i, value in self.constants.items()}
        return {name: v for name, v in mine.items() if not _same(v, known.get(name, known))}

    def unflatten(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """``(args, kwargs)`` with ``tensors`` in the placeholders' places."""
        leaves = [self.constants.get(i) for i in range(len(self.names))]
        for i, tensor in zip(self.tensors, tensors, strict=True):
            leaves[i] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.in_spec)
        return _optional_by_name(self.forward, args, kwargs)


def _same_keys(a: pytree.TreeSpec, b: pytree.TreeSpec) -> bool:
    """Whether two structures differ at most in the order of dicts' keys."""
    if a.type is not b.type or a.num_children != b.num_children:
        return False
    parts = [list(a.children()), list(b.children())]
    if a.type is dict:
        if set(a.context) != set(b.context):
            return False
        place = {key: i for i, key in enumerate(b.context)}
        parts[1] = [parts[1][place[key]] for key in a.context]
    elif a.context != b.context:
        return False
    return all(map(_same_keys, *parts))


@dataclass(frozen=True)
class ModeGraph:
    """The graph of one mode (train or eval)."""

    module: GraphModule
    out_spec: pytree.TreeSpec
    walk: Walk = field(default_factory=Walk)  # what each node did on fake tensors, in the graph's mode

    def __call__(self, *tensors: Any) -> Any:
        """Run it on placeholder tensors; gives the model's output in its own structure."""
        return pytree.tree_unflatten(list(self.module(*tensors)), self.out_spec)


@dataclass(frozen=True)
class KeptWhole:
    """A submodule that could not be traced into and stands in the graph as one node."""

    module: str
    reason: str


@dataclass(frozen=True)
class Captured:
    """A model as graphs: the first result of the compiler's pipe."""

    model: nn.Module
    signature: Signature
    train: ModeGraph
    eval: ModeGraph
    method: str  # name of the way that was accepted
    kept_whole: tuple[KeptWhole, ...] = ()
    notes: tuple[str, ...] = ()  # what a user should know, for the report
    opened: tuple[str, ...] = ()  # modules that were not to be kept whole
    divided: Mapping[str, int] = field(default_factory=dict)  # Linear layers that are computed in parts
    flags: tuple[bool, ...] = ()  # each module's ``training``, for the train graph
    asks_grad: bool = False  # its code asks whether gradients are enabled
    example: tuple[torch.Tensor, ...] = ()  # the call's tensors that it was captured for
    runs: RealRuns = field(default_factory=RealRuns)  # of what is kept whole
    left: Mapping[str, torch.Tensor] = field(default_factory=dict)  # by forward, in attributes; fake ones

    def graph(self, training: bool) -> ModeGraph:
        """The graph of a mode."""
        return self.train if training else self.eval

    @property
    def tensor_attributes(self) -> frozenset[str]:
        """Names of tensors that the graphs read as attributes."""
        graphs = (self.train.module.graph, self.eval.module.graph)
        return frozenset(str(n.target) for graph in graphs for n in graph.find_nodes(op="get_attr"))

    @property
    def one_graph(self) -> bool:
        """Whether one graph serves both modes."""
        return self.train is self.eval


def _bind(
    forward: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[Any], list[str], pytree.TreeSpec]:
    """Leaves, their names and the structure of a call, the same however its arguments were passed."""
    try:
        bound = forward.bind(*args, **kwargs)
    except TypeError as e:
        raise TypeError(f"the inputs do not fit the model's forward{forward}: {e}") from None
    bound.apply_defaults()
    args, named = opened((bound.args, dict(sorted(bound.kwargs.items()))))
    leaves, spec = pytree.tree_flatten((args, named))
    positional = [
        name
        for name, p in forward.parameters.items()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    positional += [f"args[{i}]" for i in range(len(positional), len(args))]
    names = [
        root + inner
        for root, value in (*zip(positional, args, strict=False), *named.items())
        for inner in _parts_of(value)
    ]
    return leaves, names, spec


def _parts_of(value: Any) -> Iterator[str]:
    """How each leaf of an argument is reached: ``"['mask']"``."""
    try:
        yield from [pytree.keystr(path) for path, _ in pytree.tree_leaves_with_path(value)]
    except ValueError:  # a class that was registered without names for its parts
        yield from [f"[{i}]" for i in range(len(pytree.tree_leaves(value)))]


def _optional_by_name(
    forward: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with arguments that have defaults given by name, as users give them.

    Decorators around a forward (as transformers has them) add keyword arguments of their own, which must
    not meet the same arguments given by position.
    """
    parameters = list(forward.parameters.values())[: len(args)]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) or len(parameters) < len(args):
        return args, kwargs
    first = next(
        (i for i, p in enumerate(parameters) if p.default is not p.empty and p.kind is not p.POSITIONAL_ONLY),
        len(args),
    )
    named = {p.name: value for p, value in zip(parameters[first:], args[first:], strict=True)}
    return args[:first], {**named, **kwargs}


def _same(a: Any, b: Any) -> bool:
    if a is b or (isinstance(a, weakref.ref) and isinstance(b, weakref.ref)):  # to what holds the argument
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:
        return False


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _describe(names: Sequence[str]) -> str:
    return (
        f"({', '.join(names)})" if len(names) <= 12 else f"({', '.join(names[:3])}, ... {len(names)} values)"
    )

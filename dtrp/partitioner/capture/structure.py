"""Tensors inside values: a model's output as flat leaves and back, and the way to each part of a value."""

from __future__ import annotations

import copy
import dataclasses
import enum
import gc
import operator
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.fx.immutable_collections import immutable_dict, immutable_list
from torch.fx.node import base_types
from torch.utils import _pytree as pytree

# One step into a value, as the fx function that makes it: (operator.getitem, key) or (getattr, name).
Step = tuple[Callable[..., Any], Any]
Classes = tuple[tuple[str, Any], ...]

_CODE = (type, FunctionType, MethodType, ModuleType, partial, nn.Module, torch.SymInt, torch.SymFloat)
PLAIN = (*base_types, enum.Enum, range, type(None), type(...))  # values that a graph holds as they are
_DEPTH = 8  # how far objects are opened; what holds its parent is not followed for ever
_MANY = 10_000  # parts of an object that are looked at


class Rebuilt:
    """Stands in an output's structure for an object that pytree does not know (such as a dataclass).

    `pytree.tree_unflatten` gives the object itself: an instance of the same class with the same attributes,
    the tensors among them replaced.
    """

    def __init__(self, kind: type, names: tuple[str, ...], parts: list[Any], classes: Classes) -> None:
        self.kind, self.names, self.parts, self.classes = kind, names, parts, classes


def rebuilt(kind: Any, names: tuple[Any, ...], parts: Iterable[Any], classes: Classes) -> Any:
    """An object of a class with these attributes, made without calling it; or a dict or list with these
    items, made as its class makes an empty one."""
    if issubclass(kind, (dict, list)):
        return _refilled(kind, names, parts, classes)
    try:
        value = object.__new__(kind)
    except TypeError:  # it is made in C
        value = kind.__new__(kind)
    for name, part in (*zip(names, parts, strict=True), *classes):
        object.__setattr__(value, name, part)  # also where the class is frozen
        for key, held in vars(part).items() if hasattr(part, "__dict__") else ():
            if isinstance(held, weakref.ref) and isinstance(held(), (kind, type(None))):
                object.__setattr__(part, key, weakref.ref(value))  # a part that knows its owner
    return value


def _refilled(kind: Any, keys: tuple[Any, ...], parts: Iterable[Any], classes: Classes) -> Any:
    try:
        value = kind()
    except TypeError:  # it asks for more
        value = kind.__new__(kind)
    for name, held in classes:
        setattr(value, name, held)
    for key, part in zip(keys, parts, strict=True):
        if issubclass(kind, dict):
            value[key] = part
        else:
            value.append(part)
    return value


def _flatten_with_keys(value: Rebuilt) -> tuple[list[Any], Any]:
    keys = [pytree.GetAttrKey(name) for name in value.names]
    return list(zip(keys, value.parts, strict=True)), (value.kind, value.names, value.classes)


pytree.register_pytree_node(
    Rebuilt,
    lambda value: (value.parts, (value.kind, value.names, value.classes)),
    lambda parts, context: rebuilt(context[0], context[1], parts, context[2]),
    flatten_with_keys_fn=_flatten_with_keys,
)


def flatten_output(output: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Leaves of ``output`` and the spec that puts them together again.

    Objects that pytree does not know are opened along their attributes if they hold tensors, or nothing but
    plain values: each call gives one of its own (a cache that is still empty).
    """

    def holds(x: Any, depth: int) -> bool:
        known = isinstance(x, (*PLAIN, dict, tuple, list))
        return _holds_tensors(x, depth) or (not known and _is_data(x, depth))

    return pytree.tree_flatten(opened(output, holds=holds))


def hidden_tensors(value: Any, depth: int = _DEPTH) -> bool:
    """Whether an object that `opened` leaves as it is holds tensors somewhere all the same."""
    waiting, seen = [(value, depth)], {id(value)}
    while waiting and len(seen) < _MANY:
        held, left = waiting.pop()
        if isinstance(held, torch.Tensor):
            return True
        for part in gc.get_referents(held) if left and not isinstance(held, _CODE) else ():
            if id(part) not in seen:
                seen.add(id(part))
                waiting.append((part, left - 1))
    return False


def opened(value: Any, depth: int = _DEPTH, holds: Callable[[Any, int], bool] | None = None) -> Any:
    """``value`` with a `Rebuilt` in place of each object that pytree does not know and that holds tensors
    (or what ``holds`` says)."""

    def open_object(x: Any) -> Any:
        if depth == 0 or isinstance(x, torch.Tensor) or not (holds or _holds_tensors)(x, depth):
            return x
        steps = list(parts_of(x))
        names = tuple(name for (_, name), _ in steps)
        return Rebuilt(type(x), names, [opened(part, depth - 1, holds) for _, part in steps], classes_in(x))

    return pytree.tree_map(open_object, value)


def tensors_in(value: Any, depth: int = _DEPTH) -> Iterator[tuple[tuple[Step, ...], torch.Tensor]]:
    """All tensors in ``value``, each with the steps that lead to it."""
    if isinstance(value, torch.Tensor):
        yield (), value
    elif depth > 0:
        for step, part in parts_of(value):
            for path, tensor in tensors_in(part, depth - 1):
                yield (step, *path), tensor


def opened_object(value: Any) -> tuple[tuple[Any, ...], list[Any]] | None:
    """Names and values of the attributes of an object that holds tensors (or its keys and items, if it is a
    dict or list of a class of its own); None if it is another value."""
    if isinstance(value, (torch.Tensor, tuple)):
        return None
    if not isinstance(value, (dict, list)) and not _holds_tensors(value, _DEPTH):
        return None
    pairs = list(parts_of(value))
    return tuple(name for (_, name), _ in pairs), [part for _, part in pairs]


def map_tensors(function: Callable[[Any], Any], value: Any, depth: int = _DEPTH) -> Any:
    """A copy of ``value`` with ``function`` applied to its tensors, also those inside unknown objects."""

    def visit(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return function(x)
        if depth == 0 or not _holds_tensors(x, depth):
            return x
        if isinstance(x, (dict, list)):  # of a class of its own
            steps = list(parts_of(x))
            parts = [map_tensors(function, part, depth - 1) for _, part in steps]
            return rebuilt(type(x), tuple(key for (_, key), _ in steps), parts, classes_in(x))
        copied = copy.copy(x)
        for (_, name), part in list(parts_of(x)):
            object.__setattr__(copied, name, map_tensors(function, part, depth - 1))
        return copied

    return pytree.tree_map(visit, value)


def mutable(value: Any) -> Any:
    """``value`` with new lists and dicts, also in place of the immutable ones that fx hands to nodes."""
    if isinstance(value, immutable_list) or type(value) is list:
        return [mutable(x) for x in value]
    if isinstance(value, immutable_dict) or type(value) in (dict, OrderedDict):
        kind = OrderedDict if type(value) is OrderedDict else dict
        return kind((k, mutable(v)) for k, v in value.items())
    return tuple(mutable(x) for x in value) if type(value) is tuple else value


def mirror(ours: Any, theirs: Any, convert: Callable[[Any], Any] = lambda x: x) -> Any:
    """Change lists and dicts in ``ours`` as their counterparts in ``theirs`` were; the result is ``ours``.

    What has no counterpart is taken from ``theirs``, converted.
    """
    if type(ours) in (dict, OrderedDict) and isinstance(theirs, dict):
        items = {k: mirror(ours.get(k), v, convert) for k, v in theirs.items()}
        ours.clear()
        ours.update(items)
        return ours
    if type(ours) is list and isinstance(theirs, list):
        beside = ours + [None] * (len(theirs) - len(ours))
        ours[:] = [mirror(a, b, convert) for a, b in zip(beside, theirs, strict=False)]
        return ours
    if isinstance(ours, tuple) and isinstance(theirs, tuple):
        for a, b in zip(ours, theirs, strict=True):
            mirror(a, b, convert)
        return ours
    return convert(theirs)


def _holds_tensors(value: Any, depth: int) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    return depth > 0 and any(_holds_tensors(part, depth - 1) for _, part in parts_of(value))


def parts_of(value: Any) -> Iterator[tuple[Step, Any]]:
    """The direct parts of a value, each with the step that leads to it."""
    if isinstance(value, dict):
        yield from (((operator.getitem, k), v) for k, v in value.items())
    elif isinstance(value, (tuple, list)):
        yield from (((operator.getitem, i), v) for i, v in enumerate(value))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        names += [k for k in getattr(value, "__dict__", ()) if k not in names]
        yield from _attributes(value, [k for k in names if hasattr(value, k)])
    elif _is_plain_object(value):
        yield from _attributes(value, attributes_of(value))


def _attributes(value: Any, names: list[str]) -> Iterator[tuple[Step, Any]]:
    found = [(k, getattr(value, k)) for k in names]
    return (((getattr, k), part) for k, part in found if not isinstance(part, type))


def classes_in(value: Any) -> Classes:
    """An object's attributes that are classes (what a cache makes its layers of), or what a defaultdict makes
    its items of: they stay as they are."""
    if isinstance(value, defaultdict):
        return (("default_factory", value.default_factory),)
    found = [(k, getattr(value, k)) for k in attributes_of(value)]
    return tuple((k, part) for k, part in found if isinstance(part, type))


def _is_data(value: Any, depth: int = _DEPTH) -> bool:
    """Whether it is made of plain values alone, all the way down."""
    if isinstance(value, PLAIN):
        return True
    known = isinstance(value, (dict, tuple, list)) or _is_plain_object(value)
    return known and depth > 0 and all(_is_data(part, depth - 1) for _, part in parts_of(value))


def attributes_of(value: Any) -> list[str]:
    """Names of an object's own attributes that have a value, those in ``__slots__`` included."""
    slots = [vars(kind).get("__slots__", ()) for kind in reversed(type(value).__mro__)]
    names = [n for kind in slots for n in ((kind,) if isinstance(kind, str) else kind)]
    found = [n for n in names if not n.startswith("__") and _has(value, n)]
    return list(dict.fromkeys([*found, *getattr(value, "__dict__", ())]))


def _has(value: Any, name: str) -> bool:
    try:
        object.__getattribute__(value, name)  # not what its own __getattr__ would make up
    except AttributeError:
        return False
    return True


def _is_plain_object(value: Any) -> bool:
    home = type(value).__module__
    return (
        (hasattr(value, "__dict__") or hasattr(type(value), "__slots__"))
        and not isinstance(value, _CODE)
        and (
            home.split(".")[0] not in ("builtins", "torch", "numpy", "logging", "typing")
            or home.startswith("torch.distributions.")  # they are a few tensors and methods
        )
    )

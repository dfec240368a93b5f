"""What of a model its graphs depend on, apart from values of tensors: noticed when the script changes it."""

from __future__ import annotations

import dis
import functools
import inspect
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from .state import HOOKS, LIBRARIES, OWN, SIMPLE, kinds_of, within
from .structure import attributes_of

_FEW = 4096  # bytes of an array that are looked at
_MANY = 1000  # parts of a container that are looked at: it is done in every batch
_GIVEN = (torch.Tensor, nn.Module, type, types.ModuleType, types.FunctionType)  # stand for themselves
_OPAQUE = {"torch", "logging", "typing", "lightning", "pytorch_lightning", "builtins", "_thread", "threading"}
_SAME = (*SIMPLE, *_GIVEN, tuple)
_CALLED = ("forward", "__call__", "__getitem__", "__iter__", "__len__", "__getattr__")  # without being named
_INSTALLED = tuple({*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))})


class Watch:
    """Tells what of a model was changed since.

    ``whole``: modules that really run in the graphs, and so follow their own attributes. ``called``: modules
    that the graphs call, whose hooks, and their parts', run. ``tensors``: names of tensor attributes that the
    graphs use though they are no parameters or buffers.
    """

    def __init__(
        self,
        model: nn.Module,
        whole: Collection[str] = (),
        tensors: Collection[str] = (),
        called: Collection[str] = (),
    ) -> None:
        self._model, self._whole, self._tensors = model, frozenset(whole), frozenset(tensors)
        # What modules that really run do to globals and class attributes is theirs.
        followed = [m for name, m in model.named_modules() if not within(name, self._whole)]
        self._named = dict(named_by(followed))
        self._called = {id(m) for name, m in model.named_modules() if within(name, called)}
        self._quick = self._pointers()
        self._full = self._details()

    def changed(self) -> str:
        """What is not as it was, ``""`` if all is."""
        quick = self._pointers()
        if quick == self._quick:
            return ""
        now = self._details()
        for key in {**self._full, **now}:
            if self._full.get(key) != now.get(key):
                return str(key)
        self._quick = quick
        return ""

    def _pointers(self) -> list[Any]:
        """Cheap to make; equal only if nothing has changed."""
        made: list[Any] = []
        modules, seen = [self._model], {self._model}
        for module in modules:  # in every batch: without the recursion of model.modules()
            new = [m for m in module._modules.values() if m is not None and m not in seen]
            seen.update(new)
            modules += new
            values = vars(module)
            made += (id(module), type(module))
            for p in values["_parameters"].values():
                made += (id(p), None if p is None else p.dtype)
            if id(module) not in self._called:
                made += [tuple(map(id, values[hooks].values())) for hooks in HOOKS if values[hooks]]
            for name, value in values.items():
                if name not in OWN:
                    made += (name, _pointer(value))
        made += [_pointer(look()) for look in self._named.values()]
        return made

    def _details(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, module in self._model.named_modules(remove_duplicate=False):
            name = path or type(module).__name__
            found[f"the module {name!r}"] = id(module), type(module)
            if id(module) not in self._called:
                found[f"the hooks of module {name!r}"] = [
                    tuple(map(id, vars(module)[hooks].values())) for hooks in HOOKS
                ]
            for own, p in module._parameters.items():
                full = f"{path}.{own}".removeprefix(".")
                found[f"the parameter {full!r}"] = (
                    id(p),
                    p is not None and (p.requires_grad, p.shape, p.dtype),
                )
            if within(path, self._whole):
                continue
            for own, value in vars(module).items():
                full = f"{path}.{own}".removeprefix(".")
                if own not in OWN and (not isinstance(value, torch.Tensor) or full in self._tensors):
                    found[f"the attribute {full!r}"] = contents(value)
        return found | {label: contents(look()) for label, look in self._named.items()}


def _pointer(value: Any) -> Any:
    """The same only for what is the same, and holds the same."""
    return id(value) if isinstance(value, _SAME) else contents(value)


def contents(value: Any, tensors: list[torch.Tensor] | None = None) -> tuple[Any, ...]:
    """All that code may read of a value, in a row; equal only where code could tell no difference.

    Tensors, modules, classes and what libraries make stand for themselves. Where ``tensors`` is given,
    modules are opened, and all tensors are added to it.
    """
    found: list[Any] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, SIMPLE):
            found.append((type(one), repr(one)))
        elif isinstance(one, (dict, list, tuple, set, frozenset, deque)):
            found.append((type(one), len(one)))
            if id(one) not in seen and len(one) <= _MANY:
                waiting += [part for item in one.items() for part in item] if isinstance(one, dict) else one
        elif isinstance(one, functools.partial):
            waiting += [one.func, one.args, one.keywords]
        elif isinstance(one, np.ndarray) and one.nbytes <= _FEW:
            found.append((one.shape, one.tobytes()))
        else:
            found.append(id(one))
            if id(one) not in seen:
                waiting += _parts(one)
            if tensors is not None and isinstance(one, torch.Tensor):
                tensors.append(one)
            elif tensors is not None and isinstance(one, nn.Module) and id(one) not in seen:
                found.append(one.training)
                tensors += [t for t in (*one._parameters.values(), *one._buffers.values()) if t is not None]
                waiting += one._modules.values()
                if type(one).__module__.split(".")[0] not in LIBRARIES:
                    waiting += [v for name, v in vars(one).items() if name not in OWN]
        seen.add(id(one))
    return tuple(found)


def _parts(value: Any) -> list[Any]:
    """What an object is made of, if it is of the user's making."""
    if isinstance(value, types.MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, _GIVEN) or type(value).__module__.split(".")[0] in _OPAQUE:
        return []
    # In a row: a container made here would be gone before the next one is made, perhaps with the same id.
    return [x for name in attributes_of(value) for x in (name, object.__getattribute__(value, name))]


def _enclosed(function: types.FunctionType) -> dict[str, Any]:
    """Variables of the functions around it, by name."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if _filled(cell)}


def _filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


def named_by(modules: Iterable[nn.Module]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What ``forward`` of these modules names, beyond what hangs on them: a label, and how to look there.

    That is globals, what they take from modules of the user's, class attributes and methods, and variables of
    enclosing functions; likewise of the functions that are named so.
    """
    modules = list(modules)
    kinds = kinds_of(modules)
    followed = {kind.__module__ for kind in kinds}
    waiting: list[Any] = [value for m in modules for name, value in vars(m).items() if name not in OWN]
    named: set[tuple[type, str]] = set()
    seen: set[types.CodeType] = set()

    def of_classes(names: Collection[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
        for kind in kinds:
            for name in names & vars(kind).keys():
                if (kind, name) not in named:
                    named.add((kind, name))
                    waiting.append(vars(kind)[name])
                    yield f"{name!r} of class {kind.__qualname__}", functools.partial(vars(kind).get, name)

    yield from of_classes({name for kind in kinds for name in vars(kind) if name in _CALLED})
    while waiting:
        function = _function(waiting.pop())
        if function is None or function.__code__ in seen:
            continue
        if function.__module__ not in followed and _is_installed(function.__code__.co_filename):
            continue
        seen.add(function.__code__)
        asked, read = names_in(function.__code__)
        yield from of_classes(read)
        for name, value in _enclosed(function).items():
            waiting.append(value)
            yield f"{name!r} around {function.__qualname__}", functools.partial(_variable, function, name)
        for name in asked & function.__globals__.keys():
            value = function.__globals__[name]
            waiting.append(value)
            label = f"{name!r} of {function.__module__}"
            yield label, functools.partial(function.__globals__.get, name)
            inside = _namespace(value)
            for own in read & inside.keys():
                waiting.append(inside[own])
                yield f"{own!r} of {name}", functools.partial(inside.get, own)
    for kind in kinds:  # what is defined anew may stand before what was read
        yield f"class {kind.__qualname__}", functools.partial(_n_defined, kind)


def _n_defined(kind: type) -> int:
    return len(vars(kind).keys() - {"__slotnames__"})  # which copying an object leaves there


def _variable(function: types.FunctionType, name: str) -> Any:
    return _enclosed(function).get(name)


def _namespace(value: Any) -> Any:
    """Of a module or class of the user's: what is in it."""
    if isinstance(value, types.ModuleType) and not _is_installed(getattr(value, "__file__", None) or ""):
        return vars(value) if value.__name__.split(".")[0] not in sys.builtin_module_names else {}
    if isinstance(value, type) and value.__module__.split(".")[0] not in LIBRARIES:
        return vars(value)
    return {}


def _function(value: Any) -> types.FunctionType | None:
    """The Python function behind a method, property, partial or decorator."""
    if isinstance(value, property):
        value = value.fget
    elif isinstance(value, (functools.partial, functools.cached_property)):
        value = value.func
    elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
        value = value.__func__
    if callable(value) and not isinstance(value, (type, nn.Module)):
        value = inspect.unwrap(value)
    return value if isinstance(value, types.FunctionType) else None


@functools.cache
def names_in(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """Globals and attributes that a function reads, those within it included."""
    asked, read = set(), set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            asked.add(str(step.argval))
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            read.add(str(step.argval))
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            more, further = names_in(inner)
            asked |= more
            read |= further
    return frozenset(asked), frozenset(read)


def _is_installed(file: str) -> bool:
    """Whether a file belongs to Python or an installed package, not to the user."""
    return file.startswith(_INSTALLED) or "site-packages" in file

"""Python state of a model: what its code may read and change that is no tensor.

A graph repeats what the code did when it was captured. So what ``forward`` itself changes (a flag, a counter,
an entry of a dict, a global) must make its module run for real (`changes_of`), and what the user changes
later (a new head, another temperature, a hook) must be noticed (watch.py).
"""

from __future__ import annotations

import dis
import functools
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

REGISTRIES = ("_parameters", "_buffers", "_modules")
SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, range)
_CONTAINERS = (OrderedDict, dict, list, set, deque)
LIBRARIES = ("torch", "builtins", "typing", "abc")
_DEPTH = 5
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What torch keeps in each module, and transformers: whether its hooks for hidden states are there already.
OWN = {*vars(nn.Module()), *REGISTRIES, "_output_capturing_hooks_installed"}
_MISSING = "no value"


def frozen(value: Any, depth: int = _DEPTH) -> Any:
    """A value that equals another's only if code could not tell the two from each other.

    Tensors stand for themselves by their shape, other objects by identity and their attributes.
    """
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, SIMPLE):
        return value.__class__.__name__, repr(value)
    if depth and isinstance(value, (dict, OrderedDict)):
        return "{", *((_key(k), frozen(v, depth - 1)) for k, v in value.items())
    if depth and isinstance(value, (set, frozenset)):
        return "{", *sorted(map(repr, value))
    if depth and isinstance(value, (list, tuple, deque)):
        return type(value).__name__, *(frozen(v, depth - 1) for v in value)
    if isinstance(value, nn.Module) or not depth or not _is_plain(value):
        return "object", id(value)
    return "object", id(value), *((k, frozen(v, depth - 1)) for k, v in vars(value).items())


def _key(key: Any) -> Any:
    return repr(key) if isinstance(key, SIMPLE) else id(key)


# Whose objects stand for themselves; a LightningModule's trainer counts batches.
_OTHERS = ("torch", "numpy", "logging", "typing", "builtins", "lightning", "pytorch_lightning")


def _is_plain(value: Any) -> bool:
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (type, types.ModuleType))
        and not callable(value)
        and type(value).__module__.split(".")[0] not in _OTHERS
    )


def changeable(value: Any) -> bool:
    """Whether the value itself may change without being replaced."""
    return isinstance(value, (dict, list, set, deque)) or (
        not isinstance(value, nn.Module) and _is_plain(value)
    )


class Held:
    """What mutable values hold, all the way down, to be put back; ``tensors``: what is in tensors and in
    modules' buffers, too."""

    def __init__(self, values: Iterable[Any], *, tensors: bool = False) -> None:
        self._found: dict[int, tuple[Any, Any]] = {}
        self._tensors: list[tuple[torch.Tensor, int, torch.Tensor]] | None = [] if tensors else None
        for value in values:
            self._look(value, _DEPTH)

    def _look(self, value: Any, depth: int) -> None:
        if self._tensors is not None and isinstance(value, (torch.Tensor, nn.Module)):
            written = value.buffers() if isinstance(value, nn.Module) else (value,)
            self._tensors += [(t, t._version, t.detach().clone()) for t in written if not t.is_inference()]
        if not depth or id(value) in self._found or isinstance(value, (torch.Tensor, nn.Module)):
            return
        if isinstance(value, tuple):
            parts: Iterable[Any] = value
        elif isinstance(value, _CONTAINERS):
            self._found[id(value)] = value, _copied(value)
            parts = value.values() if isinstance(value, dict) else value
        elif _is_plain(value):
            self._found[id(value)] = value, dict(vars(value))
            parts = vars(value).values()
        else:
            return
        for part in list(parts):
            self._look(part, depth - 1)

    def put_back(self) -> None:
        """As it was."""
        with torch.no_grad():
            for tensor, version, before in self._tensors or ():
                if tensor._version != version:
                    tensor.copy_(before)
        for value, saved in self._found.values():
            now = value if isinstance(value, _CONTAINERS) else vars(value)
            if _items(now) != _items(saved):
                _fill(now, saved)


def _kind(value: Any) -> Any:
    """The built-in container that ``value`` is one of. Its methods are called, not those of a user's class:
    they may make something else of what goes in or out (a default, keys turned into names)."""
    return next(kind for kind in _CONTAINERS if isinstance(value, kind))


def _copied(value: Any) -> Any:
    """A built-in container with the same contents."""
    kind = _kind(value)
    return kind(kind.items(value) if issubclass(kind, dict) else kind.__iter__(value))


def _fill(value: Any, contents: Any) -> None:
    """Make ``contents`` all that is in ``value``."""
    kind = _kind(value)
    kind.clear(value)
    if issubclass(kind, dict):
        for key, item in contents.items():
            kind.__setitem__(value, key, item)
    else:
        (kind.update if kind is set else kind.extend)(value, contents)


def _items(value: Any) -> Any:
    """What is in a container, by identity, in order where there is one."""
    kind = _kind(value)
    if issubclass(kind, dict):
        return [(id(key), id(item)) for key, item in kind.items(value)]
    found = map(id, kind.__iter__(value))
    return set(found) if kind is set else list(found)


def reached_by_hooks(module: nn.Module) -> Iterator[Any]:
    """What a module's hooks may change besides modules: variables around them (cells), globals that they
    name, the attributes of objects that they are, or are methods of."""
    for hook in [hook for registry in HOOKS for hook in (vars(module).get(registry) or {}).values()]:
        while isinstance(hook, functools.partial):
            hook = hook.func
        function = getattr(hook, "__func__", hook)
        if isinstance(function, types.FunctionType):
            yield from function.__closure__ or ()
            names = [n for n in function.__code__.co_names if changeable(function.__globals__.get(n))]
            yield {name: function.__globals__[name] for name in names}
        holder = getattr(hook, "__self__", hook)
        if not isinstance(holder, (types.FunctionType, types.ModuleType, nn.Module)):
            yield getattr(holder, "__dict__", {})


def content(cell: Any) -> Any:
    """What is in a variable around a function, or what `reached_by_hooks` gives besides."""
    if not isinstance(cell, types.CellType):
        return cell
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return _MISSING


class Shared:
    """Class attributes and globals that a model's code names, and what its hooks reach, to be put back."""

    def __init__(self, model: nn.Module) -> None:
        self._kinds = kinds_of(model.modules())
        reached = [(place, content(place)) for m in model.modules() for place in reached_by_hooks(m)]
        self._cells = [(p, value) for p, value in reached if isinstance(p, types.CellType)]
        self._around = Held(value for _, value in reached)
        self._found = {
            (id(owner), name): (owner, name, vars(owner)[name]) for _, owner, name in _shared_by(self._kinds)
        }
        self._held = Held(value for *_, value in self._found.values())

    def put_back(self) -> None:
        """As they were."""
        for _, owner, name in list(_shared_by(self._kinds)):
            if (id(owner), name) not in self._found:
                delattr(owner, name)
        for owner, name, value in self._found.values():
            if vars(owner).get(name, _MISSING) is not value:
                setattr(owner, name, value)
        for cell, value in self._cells:
            if content(cell) is not value:
                cell.cell_contents = value
                if value is _MISSING:
                    del cell.cell_contents
        self._around.put_back()
        self._held.put_back()


def state_of(model: nn.Module) -> dict[tuple[str, str], Any]:
    """All plain state: by owner (a module's name, or "file.py" or a class) and name."""
    found: dict[tuple[str, str], Any] = {}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name not in OWN:
                found[path, name] = frozen(value)
        for name, buffer in module._buffers.items():
            found[path, name] = frozen(None if buffer is None else buffer.shape)
    for label, owner, name in shared_names(model):
        found[label, name] = frozen(vars(owner)[name])
    return found


def shared_names(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Class attributes and globals that code of the model's authors names: label, owner and name."""
    return _shared_by(kinds_of(model.modules()))


def _shared_by(kinds: Iterable[type]) -> Iterator[tuple[str, Any, str]]:
    for kind in kinds:
        names = names_in(kind)
        owners = [(f"class {kind.__qualname__}", kind), (kind.__module__, sys.modules.get(kind.__module__))]
        for label, owner in owners:
            for name in names & vars(owner).keys() if owner is not None else ():
                if _may_change(vars(owner)[name]):
                    yield label, owner, name


def _may_change(value: Any) -> bool:
    return isinstance(value, SIMPLE) or changeable(value)


def kinds_of(modules: Iterable[nn.Module]) -> list[type]:
    """The classes of modules that are not torch's own."""
    return list(dict.fromkeys(kind for m in modules for kind in _kinds(m)))


@functools.cache
def names_in(kind: type) -> frozenset[str]:
    """Names that the functions of a class read or write: attributes and globals."""
    functions = [getattr(v, "__func__", v) for v in vars(kind).values()]
    codes = [f.__code__ for f in functions if isinstance(f, types.FunctionType)]
    names: set[str] = set()
    while codes:
        code = codes.pop()
        names.update(code.co_names)
        codes += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(names)


@functools.cache
def _read_elsewhere(kind: type) -> frozenset[str]:
    """Attributes that the functions of a class read of other objects than ``self``."""
    found = set()
    for function in (getattr(v, "__func__", v) for v in vars(kind).values()):
        if not isinstance(function, types.FunctionType) or function.__name__ == "__init__":
            continue
        code = function.__code__
        own = code.co_varnames[:1]
        before = None
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_ATTR", "LOAD_METHOD") and not (
                before is not None and before.opname.startswith("LOAD_FAST") and (before.argval,) == own
            ):
                found.add(str(step.argval))
            before = step
    return frozenset(found)


def changes_of(
    model: nn.Module,
    before: dict[tuple[str, str], Any],
    whole: Collection[str],
    known: Collection[tuple[str, str]] = (),
) -> dict[str, str]:
    """Modules whose code changed plain state since ``before``, and what it changed.

    What modules that are kept ``whole`` change is their own affair, unless code outside reads it. ``known``:
    attributes that were followed otherwise. An object that modules have from one around them (its config) is
    that one's.
    """
    after = {key: value for key, value in state_of(model).items() if key not in known}
    before = {key: value for key, value in before.items() if key not in known}
    modules = dict(model.named_modules())
    found: dict[str, str] = {}
    changed = [k for k in {**before, **after} if before.get(k, _MISSING) != after.get(k, _MISSING)]
    holders: dict[Any, list[str]] = {}
    for key in changed:
        for held in _objects(after.get(key)) if key[0] in modules and _kinds(modules[key[0]]) else ():
            holders.setdefault(held, []).append(key[0])
    for owner, name in changed:
        old, new = before.get((owner, name), _MISSING), after.get((owner, name), _MISSING)
        same = new[1] if new[0] == "object" and new[:2] == old[:2] else None
        if any(_is_in(owner, other) for other in holders.get(same, ())):
            continue
        text = _told(owner, name, old, new)
        if owner not in modules:  # a class or a file
            found.update({p: text for p, m in modules.items() if any(name in names_in(k) for k in _kinds(m))})
        elif not within(owner, whole) and _kinds(modules[owner]):
            found[owner] = text
        elif within(owner, whole):
            text = f"reads {f'{owner}.{name}'!r}, which changes from call to call"
            readers = [p for p, m in modules.items() if any(name in _read_elsewhere(k) for k in _kinds(m))]
            found.update(dict.fromkeys(readers, text))
    return {path: text for path, text in found.items() if not within(path, whole)}


def _objects(value: Any) -> Iterator[int]:
    """The identities of the objects in what `frozen` gave."""
    if isinstance(value, tuple):
        if value[:1] == ("object",):
            yield value[1]
        for part in value:
            yield from _objects(part)


def _kinds(module: nn.Module) -> list[type]:
    """The classes of a module that are not torch's own."""
    return [k for k in type(module).__mro__ if k.__module__.split(".")[0] not in LIBRARIES]


def within(path: str, whole: Collection[str]) -> bool:
    """Whether a module is one of those named, or a part of one."""
    return any(path == name or path.startswith(name + ".") for name in whole)


def _is_in(path: str, other: str) -> bool:
    return path != other and (not other or within(path, (other,)))


def _told(owner: str, name: str, old: Any, new: Any) -> str:
    full = f"{owner}.{name}".removeprefix(".")
    if old == _MISSING:
        return f"makes the attribute {full!r} while it runs"
    if new == _MISSING:
        return f"deletes the attribute {full!r} while it runs"
    texts = [v[1] if len(v) == 2 and isinstance(v[1], str) else "" for v in (old, new)]
    return f"changes {full!r}{f' from {texts[0]} to {texts[1]}' if all(texts) else ''} while it runs"

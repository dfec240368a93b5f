"""Pickles that carry tensors as plain bytes: what the caller and its workers say to each other.

A tensor arrives as a copy with the same values, dtype and dimension order (channels_last stays so). Nothing
is shared between the processes, so nothing can leak. CUDA tensors travel through host memory.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS, CustomOpDef
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from ..exclusive import EXCLUSIVE
from .links import canonical, dense_order, flat_bytes

_OURS = __name__.partition(".")[0]
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_FEW = 1000  # parts of a value, or numbers in a tensor, that travel with a module


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.by_value: set[ModuleType] = set()  # modules that a worker could not import
        self.told: set[str] | None = None  # modules whose values travel too, so far; None: none do

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, (type, FunctionType, ModuleType)):
            name = obj.__name__ if isinstance(obj, ModuleType) else getattr(obj, "__module__", None)
            module = sys.modules.get(name or "__main__")
            known = name in (None, "__main__", *cloudpickle.list_registry_pickle_by_value())
            if module is not None and not known and not importable(name):
                cloudpickle.register_pickle_by_value(module)
                self.by_value.add(module)
            if type(obj) is not ModuleType and sys.modules.get(name or "") is obj:
                return import_module, (name,)  # torch.backends.cudnn and others are of classes of their own
            inside = "" if isinstance(obj, ModuleType) else obj.__qualname__
            if self.told is not None and _at(module, inside) is obj and (values := self._values(module)):
                return _imported, (name, inside, values)
            if (
                isinstance(obj, FunctionType)
                and "<locals>" in obj.__qualname__
                and _has_its_module(obj, module)
            ):
                # What it names there may be what cannot be sent, and must be the very object that others use.
                make, (code, _, *others), (state, slots), *rest = self._dynamic_function_reduce(obj)
                return (
                    make,
                    (code, _Globals(str(name)), *others),
                    (state, {**slots, "__globals__": {}}),
                    *rest,
                )
        if type(obj) is CustomOpDef and obj._qualname in OPDEFS:
            return _operator, (obj._qualname,)  # workers know it (registered.py)
        if type(obj) is Tensor and not obj.is_sparse and not obj.is_quantized and not obj.is_meta:
            plain = canonical(obj.detach().cpu())
            order = dense_order(plain)
            if order is not None:
                data = pickle.PickleBuffer(flat_bytes(plain).numpy().data)
                shape = tuple(plain.shape)
                return _rebuild, (data, plain.dtype, shape, order, obj.requires_grad)
        if isinstance(obj, nn.Module) and parametrize.is_parametrized(obj):
            kind = type(obj).__base__  # of a class that torch makes for it, and refuses to pickle
            return _parametrized, (kind, tuple(obj.parametrizations)), vars(obj)  # type: ignore[arg-type]
        if isinstance(obj, pytree.TreeSpec) and obj.is_leaf():
            return pytree.tree_structure, (None,)  # torch 2.11 warns whoever unpickles its class of leaves
        return super().reducer_override(obj)

    def _values(self, module: ModuleType | None) -> dict[str, dict[str, Any]]:
        """Plain values in a module of the user's, and in those that it names, which the script may have set
        since it was imported (a configuration); by module, each told once."""
        assert self.told is not None
        found, waiting = {}, [module]
        while waiting:
            one = waiting.pop()
            name = "" if one is None else one.__name__
            if one is None or name in self.told or not (is_local(name) and importable(name)):
                continue
            self.told.add(name)
            found[name] = {k: v for k, v in vars(one).items() if k[:2] != "__" and _is_data(v)}
            for value in vars(one).values():
                home = getattr(value, "__module__", None)
                inner = sys.modules.get(home) if isinstance(home, str) else None
                waiting.append(value if isinstance(value, ModuleType) else inner)
        return {name: values for name, values in found.items() if values}


class _Globals:
    """The namespace of a module that a worker imports."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return _namespace, (self._name,)


def _namespace(name: str) -> dict[str, Any]:
    return vars(import_module(name))


def _has_its_module(function: FunctionType, module: ModuleType | None) -> bool:
    """Whether a function made by another one is of an installed package, where a worker finds its globals."""
    if module is None or vars(module) is not function.__globals__:
        return False
    return importable(module.__name__) and not is_local(module.__name__)


def is_local(name: str) -> bool:
    """Whether a module has a file, and is neither installed nor a part of Python."""
    file, package = getattr(sys.modules.get(name), "__file__", None) or "", name.partition(".")[0]
    known = package in sys.stdlib_module_names or package in {"torch", _OURS}
    return bool(file) and not known and not {"site-packages", "dist-packages"} & set(Path(file).parts)


def _is_data(value: Any, depth: int = 5) -> bool:
    """Whether it is what a configuration is made of, and small."""
    if isinstance(value, _PLAIN):
        return True
    if isinstance(value, Tensor):
        return type(value) is Tensor and value.numel() <= _FEW
    if isinstance(value, (Namespace, SimpleNamespace)) or (
        is_dataclass(value) and not isinstance(value, type)
    ):
        value = _attributes(value)
    if not depth or not isinstance(value, (dict, list, tuple, set, frozenset)) or len(value) > _FEW:
        return False
    parts = [*value, *value.values()] if isinstance(value, dict) else value
    return all(_is_data(part, depth - 1) for part in parts)


def _at(module: Any, inside: str) -> Any:
    """What a module has under a dotted name; the module itself for none."""
    for name in inside.split(".") if inside else ():
        module = getattr(module, name, None)
    return module


def _imported(name: str, inside: str, values: Mapping[str, Mapping[str, Any]]) -> Any:
    module = import_module(name)
    for other in values.keys() & sys.modules.keys():
        space = vars(sys.modules[other])
        for key, value in values[other].items():
            _set(space, key, value)
    return _at(module, inside)


def _set(space: dict[str, Any], key: str, value: Any) -> None:
    """In place where it can be: other modules may hold the same object."""
    now: Any = space.get(key)
    attributes = None if isinstance(now, Tensor) else _attributes(now)
    if type(now) is not type(value) or (attributes is None and not isinstance(now, (dict, list))):
        space[key] = value
        return
    if isinstance(now, dict):
        dict.clear(now)
        dict.update(now, value)
    elif isinstance(now, list):
        now[:] = value
    if attributes is not None:
        attributes.update(vars(value))


def _attributes(value: Any) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = vars(value)
    except TypeError:  # it has none, or slots
        return None
    return found


def unsendable(named: Mapping[str, Any]) -> str:
    """Which of these objects cannot be pickled, for a message."""
    for name, value in named.items():
        try:
            dumps(value)
        except Exception:
            return f"{name} ({value!r})"
    return "a module that is kept whole in a stage"


def _rebuild(
    data: Any, dtype: torch.dtype, shape: tuple[int, ...], order: tuple[int, ...], requires_grad: bool
) -> Tensor:
    flat = torch.empty(len(data), dtype=torch.uint8, device="cpu")
    if len(data):
        flat.copy_(torch.frombuffer(data, dtype=torch.uint8))
    permuted = flat.view(dtype).view([shape[d] for d in order])
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return permuted.permute(inverse).requires_grad_(requires_grad)


def _parametrized(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    module = kind.__new__(kind)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


def _operator(name: str) -> Any:
    return OPDEFS[name]


def importable(name: str | None) -> bool:
    """Whether a fresh interpreter with this one's `sys.path` would import this very module by its name."""
    module = sys.modules.get(name or "")
    if name is None or module is None or name == "__main__":
        return False
    path = tuple(os.path.abspath(p) for p in sys.path if isinstance(p, str))
    return _finds(name, getattr(module, "__file__", None), path)


@cache
def _finds(name: str, file: str | None, path: tuple[str, ...]) -> bool:
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names:
        return True
    for finder in sys.meta_path:
        # Those of editable installs come with the installation; others may be the script's.
        module = getattr(finder, "__module__", None) or type(finder).__module__
        if finder in (BuiltinImporter, FrozenImporter, PathFinder) or module.startswith("__editable__"):
            spec: Any = finder.find_spec(top, path if finder is PathFinder else None)
            if spec is not None:
                break
    else:
        return False
    top_spec = spec
    for end in (i for i, c in enumerate(name + ".") if c == "." and i > len(top)):
        spec = PathFinder.find_spec(name[:end], spec.submodule_search_locations or [])
        if spec is None:
            # Installed packages make some modules themselves, when they are imported: torch.ops.
            installed = any(p in str(top_spec.origin) for p in ("site-packages", "dist-packages"))
            return installed and (file is None or getattr(sys.modules[name], "__spec__", None) is None)
    return file is None or spec.origin is None or os.path.realpath(spec.origin) == os.path.realpath(file)


def dumps(obj: Any, *, values: bool = False) -> bytes:
    """``obj`` as bytes; functions and classes of the user's script, and of modules that only this process can
    have, travel by value. ``values``: with those of the user's other modules travel the plain values that are
    in these modules now."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=5)
    pickler.told = set() if values else None
    with EXCLUSIVE:
        try:
            pickler.dump(obj)
        finally:
            for module in pickler.by_value:
                cloudpickle.unregister_pickle_by_value(module)
    return buffer.getvalue()


def loads(data: bytes | memoryview) -> Any:
    """What `dumps` was given. Only for bytes that came over a private channel: unpickling runs code."""
    return pickle.loads(data)

"""Pickles that carry tensors as plain bytes: what the caller and its workers say to each other.

A tensor arrives as a copy with the same values, dtype and dimension order (channels_last stays so). Nothing
is shared between the processes, so nothing can leak. CUDA tensors travel through host memory.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS, CustomOpDef
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from ..exclusive import EXCLUSIVE
from .links import canonical, dense_order, flat_bytes


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.by_value: set[ModuleType] = set()  # modules that a worker could not import

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


def dumps(obj: Any) -> bytes:
    """``obj`` as bytes; functions and classes of the user's script, and of modules that only this process can
    have, travel by value."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, protocol=5)
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

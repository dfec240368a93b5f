"""Operators and pytree nodes that the script has registered, for the workers to have them.

A worker does not run the script. What was registered in a module that it can import, it imports; what was
registered elsewhere (the script, a notebook) travels by value: operators made with `torch.library.custom_op`
and nodes of `torch.utils._pytree`. Of what `torch.library.define` and `impl` register, torch keeps no Python
function, so that it cannot travel.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._library.custom_ops import OPDEFS, CustomOpDef
from torch.utils import _pytree as pytree

from .transfer import dumps, importable, is_local, loads

TORCH = os.path.dirname(torch.__file__) + os.sep
# Tables that packages fill when a model is made, and not when one is read from bytes: without its entry a
# model of transformers gives no hidden states. (They may rename keys that are put in.)
TABLES = {"transformers.utils.output_capturing": "_CAN_RECORD_REGISTRY"}
BEHAVIOURS = ("_init_fn", "_abstract_fn", "_setup_context_fn", "_backward_fn")


class Operator(NamedTuple):
    """What has to be known before functions can be read that use it."""

    name: str
    schema: str
    mutates: tuple[str, ...]
    devices: tuple[str | None, ...]
    tags: tuple[torch.Tag, ...]

    @classmethod
    def of(cls, name: str, op: CustomOpDef) -> Operator:
        arguments = op._opoverload._schema.arguments
        mutates = tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
        return cls(name, op._schema, mutates, tuple(op._backend_fns), op._tags)

    def define(self) -> None:
        """Without functions, for now."""
        devices = None if self.devices == (None,) else list(self.devices)
        torch.library.custom_op(
            self.name,
            lambda *args, **kwargs: None,
            mutates_args=self.mutates,
            device_types=devices,  # type: ignore[arg-type]
            schema=self.schema,
            tags=self.tags,
        )


@dataclass(frozen=True)
class Registered:
    """What workers import, define, and fill in; in this order."""

    imports: tuple[str, ...]
    operators: tuple[Operator, ...]
    functions: bytes  # of the operators, nodes and tables: they may use the operators

    @classmethod
    def capture(cls, stages: Sequence[bytes]) -> Registered:
        """What this process has and ``stages``, pickled, may use.

        Raises
        ------
        TypeError
            An operator that a stage uses cannot travel.
        """
        imports: dict[str, None] = {}
        ours: dict[str, CustomOpDef] = {}
        for name, op in sorted(OPDEFS.items()):
            home = op._init_fn.__module__
            if not importable(home):
                ours[name] = op
            elif is_local(home) or (not home.startswith("torch.") and _used(name, stages)):
                imports[home] = None  # large libraries only if they are used
        for name, kernel in _low_level(stages):
            where = _home(name, kernel)
            if where is None or not importable(where):
                raise TypeError(
                    f"operator '{name}' is registered (torch.library.define, impl) where a worker process "
                    f"cannot import it: {where or 'in the script'}. Register it with "
                    f"torch.library.custom_op, or in a module of its own that the script imports, or use "
                    f"executor='inline'"
                )
            if where != "torch":
                imports[where] = None
        imports |= dict.fromkeys(_compiled(stages))
        try:
            made = [_functions(n, op) for n, op in ours.items()]
            functions = dumps((made, list(_nodes()), dict(_tables(stages))))
        except Exception as e:
            raise TypeError(
                f"an operator ({', '.join(ours)}) or pytree node that the script has registered cannot be "
                f"sent to a worker process: {e}. Register it in a module of its own that the script imports, "
                f"or use executor='inline'"
            ) from e
        return cls(tuple(imports), tuple(Operator.of(n, op) for n, op in ours.items()), functions)

    def apply(self) -> None:
        """In a worker."""
        for module in self.imports:
            if os.path.isabs(module):
                torch.ops.load_library(module)  # type: ignore[no-untyped-call]
            else:
                __import__(module)
        for operator in self.operators:
            operator.define()
        operators, nodes, tables = loads(self.functions)
        for home, entries in tables.items():
            dict.update(getattr(import_module(home), TABLES[home]), entries)
        for name, kernels, behaviours, vmap, autocast, rules in operators:
            op = OPDEFS[name]
            for attribute, value in zip(BEHAVIOURS, behaviours, strict=True):
                setattr(op, attribute, value)
            for device, kernel in kernels.items():
                op.register_kernel(device, kernel)
            if vmap is not None:
                op.register_vmap(vmap)
            for device, dtype in autocast.items():
                op.register_autocast(device, dtype)
            for kind, rule in rules.items():
                op.register_torch_dispatch(kind, rule)
        for cls, flatten, unflatten, with_keys in nodes:
            if cls not in pytree.SUPPORTED_NODES:
                pytree.register_pytree_node(cls, flatten, unflatten, flatten_with_keys_fn=with_keys)


def _functions(name: str, op: CustomOpDef) -> tuple[Any, ...]:
    kernels = {
        device: inspect.getclosurevars(inspect.unwrap(wrapped)).nonlocals["fn"]
        for device, wrapped in op._backend_fns.items()
    }
    behaviours = [getattr(op, attribute) for attribute in BEHAVIOURS]
    autocast = getattr(op, "_autocast_dtype", None)
    if autocast is None:  # torch 2.11 knows two kinds of device
        dtypes = ((device, getattr(op, f"_autocast_{device}_dtype", None)) for device in ("cuda", "cpu"))
        autocast = {device: dtype for device, dtype in dtypes if dtype is not None}
    return name, kernels, behaviours, op._vmap_fn, autocast, op._torch_dispatch_fns


def _nodes() -> Iterator[tuple[Any, ...]]:
    """Those that no library registers by itself."""
    for node in list(pytree.SUPPORTED_NODES.values()):
        homes = [
            getattr(f, "__module__", None) or "" for f in (node.type, node.flatten_fn, node.unflatten_fn)
        ]
        if any(not importable(home) or is_local(home) for home in homes):
            yield tuple(node)


def _tables(stages: Sequence[bytes]) -> Iterator[tuple[str, dict[Any, Any]]]:
    for home, name in TABLES.items():
        package = home.partition(".")[0].encode()
        if home in sys.modules and any(package in stage for stage in stages):
            yield home, dict(dict.items(getattr(sys.modules[home], name, {})))


def _low_level(stages: Sequence[bytes]) -> Iterator[tuple[str, str]]:
    """Operators defined or changed in Python otherwise, as far as stages use them; and which line of what
    torch knows of each says where."""
    for name in sorted(torch.library._defs):
        if name not in OPDEFS and _used(name, stages):
            yield name, "debug"
    for key in sorted(torch.library._impls):
        namespace, name, kernel = key.split("/")
        if namespace == "aten" and kernel != "Meta":
            yield f"aten::{name}", kernel or "CompositeImplicitAutograd"


def _compiled(stages: Sequence[bytes]) -> Iterator[str]:
    """Packages that brought libraries of operators in C++ along, and the files of others, if stages use any
    (torchvision's `deform_conv2d`)."""
    known = (name for name in torch._C._dispatch_get_all_op_names() if not name.startswith("aten::"))
    if not torch.ops.loaded_libraries or not any(_used(name, stages) for name in known):
        return
    packages = {
        os.path.join(path, ""): name
        for name, module in list(sys.modules.items())
        if "." not in name
        for path in getattr(module, "__path__", ())
    }
    for file in sorted(torch.ops.loaded_libraries):
        homes = (name for path, name in packages.items() if file.startswith(path) and importable(name))
        yield next(homes, file)


def _home(name: str, kernel: str) -> str | None:
    """The module that registers it, as far as can be known."""
    known = torch._C._dispatch_dump(name).splitlines()
    line = next((s for s in known if s.startswith((f"{kernel}:", f"{kernel}["))), "")
    file = line.partition("registered at ")[2].partition(" ::")[0].rpartition(":")[0]
    if file.startswith(TORCH) and file != torch.library.__file__:
        return "torch"
    for home, module in list(sys.modules.items()):
        path = getattr(module, "__file__", None)
        if path is None:
            continue
        if path == file or (file == torch.library.__file__ and is_local(home) and _mentions(path, name)):
            return home
    return None if file == torch.library.__file__ else file


def _mentions(path: str, name: str) -> bool:
    """The functions of torch.library leave no other trace of who has called them."""
    try:
        return path.endswith(".py") and name in Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False


def _used(name: str, stages: Sequence[bytes]) -> bool:
    """Whether both parts of an operator's name occur in a stage's code."""
    namespace, _, last = name.partition("::")
    parts = namespace.encode(), last.partition(".")[0].encode()
    return any(all(part in stage for part in parts) for stage in stages)

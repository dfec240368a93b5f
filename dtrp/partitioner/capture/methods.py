"""What the model's own code calls, and a graph can hold only as a whole, as it does modules.

A submodule that decides by values is kept whole where it is called. Code of the root cannot be; but where it
stands in a method of its own (``self.postprocess(detections)``, ``self.head.compute_loss(...)``), the
method can. It must use neither parameters nor buffers: those belong to modules. So can a call of torch's that
gives a tensor by looking at values (``x[mask]``, ``torch.arange(lengths.max())``), where the code behind
takes one course with all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from dtrp.memory import storage_of

from .structure import map_tensors, tensors_in

# What stops code that decides by values, or whose shapes depend on values, on fake tensors.
VALUE_DEPENDENT = (DataDependentOutputException, DynamicOutputShapeException)


class KeptMethod(nn.Module):
    """Calls a method of a module, of which it holds all but parameters, buffers and hooks."""

    def __init__(self, owner: nn.Module, method: str, attributes: Mapping[int, dict[str, Any]]) -> None:
        super().__init__()
        self._owner = (_bare(owner, attributes),)  # in a tuple: no submodule of this one
        self._method = method

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return getattr(self._owner[0], self._method)(*args, **kwargs)


class KeptCall(nn.Module):
    """Calls a function of torch's, or (by its name) a tensor's method; views of what it gets are copied."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self._target = target

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        function = getattr(type(args[0]), self._target) if isinstance(self._target, str) else self._target
        given = {storage_of(t) for _, t in tensors_in((args, kwargs))}
        result = function(*args, **kwargs)
        return map_tensors(lambda t: t.clone() if storage_of(t) in given else t, result)


def _bare(module: nn.Module, attributes: Mapping[int, dict[str, Any]]) -> nn.Module:
    """A copy of a module (with ``attributes``, by the modules' ids) that has no tensors."""
    copy: nn.Module = object.__new__(type(module))
    found = attributes.get(id(module), module.__dict__)
    copy.__dict__.update(found)
    for registry in ("_parameters", "_buffers"):
        copy.__dict__[registry] = {}
    children = found["_modules"].items()
    copy.__dict__["_modules"] = {k: m and _bare(m, attributes) for k, m in children}
    return copy


def own_methods(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Callable[..., Any]]]:
    """Methods that the authors of a model's modules wrote: owner's name, owner, method's name, method."""
    for path, module in model.named_modules():
        names = {
            name
            for kind in type(module).__mro__
            if not kind.__module__.startswith("torch.nn.") and kind is not object
            for name, value in vars(kind).items()
            if inspect.isfunction(value) and name != "forward" and not name.startswith("__")
        }
        for name in sorted(names):
            method = getattr(module, name)
            if inspect.ismethod(method):
                yield path, module, name, method


def held_name(model: nn.Module, key: str) -> str:
    """The name under which nodes call a method that is kept whole; another one in each mode."""
    return f"_{'train' if model.training else 'eval'}_{key.replace('.', '_')}"

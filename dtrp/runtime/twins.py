"""A second module beside a stage's own, for passes that must not touch what the optimizer steps.

    true     holds the weights that the optimizer steps, and the module state that counts
    ahead    parameters of its own, into which predictions are written; true's state
    first    ahead's parameters; state of its own, thrown away (the first forward leaves no trace)

A twin is made once and its tensors keep their addresses. Tensors are shared or copied when it is made; what
Python keeps outside tensors (a counter, a flag, a list of numbers on a module of the user's) is handed over
around each pass, and only where a module's code is not torch's own.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_COPYING = threading.Lock()  # trainers of other threads copy modules, too

# What every module has (a LightningModule also its trainer, which a copy lacks, and which hook is running);
# the rest is its own.
_MODULE = frozenset(nn.Module().__dict__) | {"_trainer", "_current_fx_name"}
_SCALAR = (bool, int, float, complex, str, type(None))
_SIMPLE = (*_SCALAR, bytes, Tensor, torch.dtype, torch.device, torch.Size)


class Twin:
    """A copy of ``true``, with some tensors shared and all others for itself.

    Parameters
    ----------
    true : nn.Module
    tensors : iterable of (Tensor, Tensor)
        Tensors of ``true``, and those that stand in their places here (often they themselves).
    traceless : bool
        Whether what a pass does to the module's state is thrown away; else it is ``true``'s afterwards.
    """

    def __init__(self, true: nn.Module, tensors: Iterable[tuple[Tensor, Tensor]], *, traceless: bool) -> None:
        self.module = private_copy(true, tensors)
        self.traceless = traceless
        pairs = list(zip(true.modules(), self.module.modules(), strict=True))
        self._own_code = [(t, m) for t, m in pairs if has_own_code(t)]
        self._buffered = [(t._buffers, m._buffers, dict(m._buffers)) for t, m in pairs if t._buffers]
        self._copied: dict[int, tuple[int, int]] = {}

    def begin(self) -> nn.Module:
        """To be called before a pass: the module that it runs on, in ``true``'s state."""
        if self.traceless and self._buffered:
            self._copy_buffers()
        elif not self.traceless:
            for held, kept, _ in self._buffered:
                kept.update(held)  # another twin may have assigned to them
        for true, mine in self._own_code:
            values = plain(true)
            _put(mine, {k: _fresh(v) for k, v in values.items()} if self.traceless else values)
        return self.module

    def end(self) -> None:
        """To be called after a pass: what it left behind is ``true``'s, or nobody's."""
        if self.traceless:
            return
        for true, mine in self._own_code:
            _put(true, plain(mine))
        for held, kept, _ in self._buffered:
            if any(kept[name] is not held.get(name) for name in kept):  # assigned, not filled
                held.update(kept)

    def _copy_buffers(self) -> None:
        """True values into this twin's own buffers, as far as either has changed since the last time."""
        for theirs, mine, first in self._buffered:
            for name, value in theirs.items():
                own = first.get(name)
                if value is None or own is None or own.shape != value.shape or own.dtype != value.dtype:
                    first[name] = own = None if value is None else value.detach().clone()
                elif self._copied.get(id(own)) != (value._version, own._version):
                    own.copy_(value)
                if own is not None and value is not None:
                    self._copied[id(own)] = value._version, own._version
            mine.clear()
            mine.update(first)


def private_copy(module: M, tensors: Iterable[tuple[Tensor, Tensor]]) -> M:
    """A deep copy in which the second of each pair stands in the place of the first.

    What a call has left on the module, wherever it is kept (a normalised weight, activations in a list),
    torch does not copy: it is copied without its gradient.
    """
    memo: dict[int, Any] = {id(theirs): mine for theirs, mine in tensors}
    with _COPYING:
        before = Tensor.__deepcopy__

        def copied(value: Tensor, memo: dict[int, Any]) -> Any:
            return before(value if value.is_leaf else value.detach(), memo)  # type: ignore[no-untyped-call]

        Tensor.__deepcopy__ = copied  # type: ignore[method-assign]
        try:
            return copy.deepcopy(module, memo)
        finally:
            Tensor.__deepcopy__ = before  # type: ignore[method-assign]


def has_own_code(module: nn.Module) -> bool:
    """Whether something other than torch's own code may keep Python state on ``module``."""
    own = not type(module).__module__.startswith(("torch.nn.", "dtrp."))
    return own or bool(module._forward_hooks or module._forward_pre_hooks)


def plain(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes that are plain data."""
    return {k: v for k, v in module.__dict__.items() if k not in _MODULE and is_plain(v)}


def is_plain(value: Any) -> bool:
    """Whether a value is data: a number, text, a tensor, or a built-in container of such."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(is_plain(v) for v in value)
    if isinstance(value, Mapping):
        return all(is_plain(k) and is_plain(v) for k, v in value.items())
    return isinstance(value, _SIMPLE) and not isinstance(value, nn.Parameter)


def _fresh(value: Any) -> Any:
    """A value that can be changed in place without the original noticing."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple, set):
        return type(value)(_fresh(v) for v in value)
    if type(value) is dict:
        return {k: _fresh(v) for k, v in value.items()}
    return copy.copy(value) if isinstance(value, (list, Mapping, set)) else value


def _put(module: nn.Module, values: Mapping[str, Any]) -> None:
    """Make ``values`` the module's plain attributes."""
    for name in plain(module).keys() - values.keys():
        del module.__dict__[name]
    module.__dict__.update(values)


def own_modules(module: nn.Module) -> dict[str, nn.Module]:
    """All modules in it whose code is not torch's own, by their names."""
    return {name: m for name, m in module.named_modules() if has_own_code(m)}


def scalars_of(module: nn.Module) -> dict[str, Any]:
    """A module's own numbers, flags and texts."""
    return {k: v for k, v in module.__dict__.items() if isinstance(v, _SCALAR) and k not in _MODULE}


def attributes_of(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, Any]]:
    """The plain attributes of modules, by their names."""
    named = {name: plain(m) for name, m in modules.items()}
    return {name: values for name, values in named.items() if values}


def set_attributes(modules: Mapping[str, nn.Module], attributes: Mapping[str, Mapping[str, Any]]) -> None:
    """Give modules the plain attributes that `attributes_of` gave; other names are passed over."""
    for name, values in attributes.items():
        if name in modules:
            _put(modules[name], values)


class Snapshot:
    """A module's state at a moment, to go back to: buffers, and plain attributes of the user's modules."""

    def __init__(self, module: nn.Module) -> None:
        self._buffers = [(m._buffers, dict(m._buffers)) for m in module.modules() if m._buffers]
        values = {id(b): b for _, held in self._buffers for b in held.values() if b is not None}
        self._values = [(b, b.detach().clone()) for b in values.values()]
        self._plain = [
            (m, {k: _fresh(v) for k, v in plain(m).items()}) for m in module.modules() if has_own_code(m)
        ]

    def restore(self) -> None:
        """Go back."""
        for held, before in self._buffers:
            held.update(before)
        with torch.no_grad():
            for buffer, value in self._values:
                buffer.copy_(value)
        for module, values in self._plain:
            _put(module, values)

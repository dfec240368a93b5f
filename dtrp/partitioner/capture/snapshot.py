"""Leaving a model exactly as it was found, whatever was run on it in between."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from ... import accelerators
from .ambient import ambient_state
from .state import Held, Shared


@contextmanager
def untouched(model: nn.Module, *, tensors: bool = False) -> Iterator[None]:
    """On leaving, put back every module's attributes and flags, and all random-number states.

    Parameters
    ----------
    model : nn.Module
        The model that may be traced or run inside.
    tensors : bool
        Also put back the *contents* of all parameters, buffers and tensor attributes (they are copied
        first); needed where the model really runs, not where it is only traced.
    """
    with Found(model).again(tensors=tensors):
        yield


class Found:
    """A model as it was found, to be put back after each of several runs."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._attributes = [dict(m.__dict__) for m in self._modules]
        self._held = Held(value for saved in self._attributes for value in saved.values())
        self._gradients = [(p, p.grad) for p in model.parameters()]
        self._shared = Shared(model)
        self._contents: list[Contents] | None = None

    @contextmanager
    def again(self, *, tensors: bool = False) -> Iterator[None]:
        """On leaving, put it back, and all random-number states; ``tensors``: as `untouched` has it."""
        if tensors and self._contents is None:
            self._contents = [Contents(t) for t in _tensors(self._modules)]
        with preserved_randomness():
            try:
                with ambient_state():
                    yield
            finally:
                self._put_back(self._contents or () if tensors else ())

    def _put_back(self, contents: Iterable[Contents]) -> None:
        for m, saved in zip(self._modules, self._attributes, strict=True):
            now = m.__dict__
            for key in now.keys() - saved.keys():
                del now[key]
            now.update(saved)
        self._held.put_back()
        self._shared.put_back()
        for p, gradient in self._gradients:
            if p.grad is not gradient:
                p.grad = gradient
        for content in contents:
            content.put_back()


class Contents:
    """What a tensor holds, and its form: code may have resized it, or given it other memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._value = tensor, tensor.detach().clone()
        self._storage = tensor.untyped_storage() if tensor.layout == torch.strided else None
        self._form = self._shape(tensor)
        # A graph that waits for its backward pass would take what was put back for something else.
        self._version: Any = nullcontext()
        self._was = 0 if tensor.is_inference() else tensor._version
        if not tensor.is_inference():
            self._version = _unsafe_preserve_version_counter(tensor)

    @staticmethod
    def _shape(tensor: torch.Tensor) -> Any:
        if tensor.layout != torch.strided:
            return tensor.shape
        return tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.untyped_storage()._cdata

    def put_back(self) -> None:
        """Make the tensor hold what it did, in the form that it had."""
        tensor = self._tensor
        with torch.no_grad():
            if self._storage is not None and self._shape(tensor) != self._form:
                tensor.data = torch.empty(0, dtype=self._value.dtype, device=self._value.device).set_(
                    self._storage, *self._form[:3]
                )
            with self._version:
                if not self._as_before(tensor.detach()):
                    tensor.detach().copy_(self._value)

    def _as_before(self, tensor: torch.Tensor) -> bool:
        if tensor.layout == torch.strided:
            return torch.equal(tensor, self._value)
        return tensor._version == self._was


@contextmanager
def preserved_randomness() -> Iterator[None]:
    """On leaving, put back the random state of torch (all devices in use), numpy and Python."""
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    devices = accelerators.random_states()
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)
        accelerators.set_random_states(devices)


def foreign_randomness() -> tuple[Any, ...]:
    """State of the generators that torch knows nothing of."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, np.asarray(keys).tobytes(), tuple(rest)


def _tensors(modules: list[nn.Module]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for m in modules:
        for registry in (m._parameters, m._buffers, m.__dict__):
            for value in registry.values():
                if isinstance(value, torch.Tensor) and not value.is_meta:
                    found[id(value)] = value
    return list(found.values())

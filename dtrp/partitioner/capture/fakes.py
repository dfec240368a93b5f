"""Fake tensors: a shape, dtype and device but no data, on which a model runs without computing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .snapshot import untouched
from .structure import map_tensors

_REGISTRIES = ("_parameters", "_buffers", "_modules")


class FakeWorld:
    """Fake twins of a model's tensors and inputs, all under one `FakeTensorMode`.

    Each tensor has exactly one twin, so tied parameters stay tied. A model on the meta device is imagined
    on the CPU: code that makes tensors without naming a device then sees no mixture of devices.
    """

    def __init__(self, mode: FakeTensorMode | None = None) -> None:
        # Tensors that no module registers (attributes, globals) may meet fake ones in the model's code.
        self.mode = mode if mode is not None else FakeTensorMode(allow_non_fake_inputs=True)
        self._twins: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._attributes: dict[int, dict[str, Any]] = {}  # of each module, as found
        self.originals: dict[int, torch.Tensor] = {}  # by the twin's id

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake tensor that stands for ``tensor``."""
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.mode:
            return tensor
        if id(tensor) not in self._twins:
            # The real tensor is kept beside its twin so that its id cannot be given to another.
            self._twins[id(tensor)] = (tensor, self._make(tensor))
            self.originals[id(self._twins[id(tensor)][1])] = tensor
        return self._twins[id(tensor)][1]

    def _make(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return self.mode.from_tensor(tensor)
        with self.mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)

    @contextmanager
    def inhabited_by(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model's parameters and buffers are their fake twins, and the mode is on."""
        swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        try:
            for module in model.modules():
                self._attributes[id(module)] = dict(module.__dict__)
                registries: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
                for registry in registries:
                    for name, tensor in registry.items():
                        if tensor is not None:
                            swapped.append((registry, name, tensor))
                            registry[name] = self.twin(tensor)
            with self.mode:
                yield
        finally:
            for registry, name, tensor in swapped:
                registry[name] = tensor

    def really_run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Fake tensors of the shapes that ``module`` gives for real random inputs.

        For a module that decides by values, or whose shapes depend on values, and that therefore cannot run
        on fake tensors. It runs with its real parameters (nothing of it is changed).

        Raises
        ------
        RuntimeError
            The module is on the meta device, or its inputs are.
        """
        given: dict[int, torch.Tensor] = {}
        back: dict[int, torch.Tensor] = {}  # inputs that come out again, by the real one's id

        def real(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            y = _random_like(x)
            back[id(y)], given[id(y)] = x, y
            return y

        def fake(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) in back:
                return back[id(x)]
            return self.mode.from_tensor(x.detach().clone()).requires_grad_(x.requires_grad)

        with _disable_current_modes(), self.left_by(module), untouched(module, tensors=True):
            if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
                raise RuntimeError("a module on the meta device cannot run on real inputs")
            inputs = map_tensors(real, (args, kwargs))
            versions = {key: _version(tensor) for key, tensor in given.items()}
            result = module(*inputs[0], **inputs[1])
            if any(_version(tensor) != versions[key] for key, tensor in given.items()):
                raise RuntimeError("the module changes its inputs in place")
            return map_tensors(fake, result)

    @contextmanager
    def left_by(self, module: nn.Module) -> Iterator[None]:
        """Inside, the parameters and buffers of ``module`` are the real ones again, and its attributes."""
        swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        changed: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for m in module.modules():
                before = self._attributes.get(id(m), {})
                for name, value in list(m.__dict__.items()):
                    # Whatever forward has stored so far, such as a cache, is fake.
                    if name not in _REGISTRIES and value is not before.get(name):
                        changed.append((m.__dict__, name, value))
                        if name in before:
                            m.__dict__[name] = before[name]
                        else:
                            del m.__dict__[name]
                registries: tuple[dict[str, Any], ...] = (m._parameters, m._buffers)
                for registry in registries:
                    for name, tensor in registry.items():
                        if tensor is not None and id(tensor) in self.originals:
                            swapped.append((registry, name, tensor))
                            registry[name] = self.originals[id(tensor)]
            yield
        finally:
            for registry, name, value in (*swapped, *changed):
                registry[name] = value


def _version(tensor: torch.Tensor) -> int:
    return int(tensor._version)


def _random_like(fake: torch.Tensor) -> torch.Tensor:
    """A real tensor such as a model might meet: normal, or zeros where it may be an index, or all true."""
    shape, dtype, device = tuple(fake.shape), fake.dtype, fake.device
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype, device=device)
    if not (dtype.is_floating_point or dtype.is_complex):
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype).requires_grad_(fake.requires_grad)


def fake_inputs(
    world: FakeWorld, tensors: Sequence[torch.Tensor], batch: tuple[int, ...] = (), size: int = 0
) -> list[torch.Tensor]:
    """Fake tensors like a call's; those at the indices in ``batch`` with ``size`` samples instead."""
    result = []
    with world.mode:
        for i, tensor in enumerate(tensors):
            shape, strides = list(tensor.shape), tensor.stride()
            if i in batch:
                shape[0] = size
            device = torch.device("cpu") if tensor.is_meta else tensor.device
            # New ones each: the same tensor may be given for two arguments, which are two placeholders.
            if i in batch and strides[0] < max(strides):
                fake = torch.empty(shape, dtype=tensor.dtype, device=device)
            else:
                fake = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=device)
            result.append(fake.requires_grad_(tensor.requires_grad))
    return result


def light(value: Any) -> Any:
    """``value`` with its tensors cut from the autograd graph that made them (requires_grad stays)."""

    def cut(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        return x.detach().requires_grad_(x.requires_grad)

    return pytree.tree_map(cut, value)

"""Fake tensors: a shape, dtype and device but no data, on which a model runs without computing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .real import Need, RealRun, RealRuns, plain_values
from .state import REGISTRIES, Held
from .structure import map_tensors, mirror, tensors_in

# Which sizes a tensor has that are computed from values: as found for one random input, for another, or 0.
Sizes = Literal["found", "other", "none"]


class FakeWorld:
    """Fake twins of a model's tensors and inputs, all under one `FakeTensorMode`.

    Each tensor has exactly one twin, so tied parameters stay tied. A model on the meta device is imagined
    on the CPU: code that makes tensors without naming a device then sees no mixture of devices.
    """

    def __init__(
        self,
        mode: FakeTensorMode | None = None,
        runs: RealRuns | None = None,
        earlier: FakeWorld | None = None,
    ) -> None:
        """``earlier``: another world, of whose twins those are taken over that nothing has changed."""
        mode = earlier.mode if earlier is not None else mode
        self.mode: FakeTensorMode
        # Tensors that no module registers (attributes, globals) may meet fake ones in the model's code.
        self.mode = mode if mode is not None else FakeTensorMode(allow_non_fake_inputs=True)
        self._twins: dict[int, _Twin] = {}
        self.attributes: dict[int, dict[str, Any]] = {}  # of each module, as found
        self._contents: dict[int, Held] = {}  # what the mutable ones among these hold
        self.originals: dict[int, torch.Tensor] = {}  # by the twin's id
        self._runs = runs if runs is not None else RealRuns()
        self._met: dict[int, Callable[[], Any]] = {}  # what each fake stands for, by its id
        # The same with other samples of the example in each: other values that modules can do with.
        self._others: list[dict[int, Callable[[], Any]]] = []
        self._held: list[torch.Tensor] = []  # these fakes, so that their ids are not given to others
        # Whether `really_run` met sizes that depend on values; and which `Sizes` to give instead of those
        # found, which shows whether the code behind them takes another course.
        self.sized_by_values = False
        self.flops = 0  # of what `really_run` ran
        self.sizes: Sizes = "found"
        self.compares = True  # whether sizes that depend on values are to be told from others
        for twin in earlier._twins.values() if earlier is not None else ():
            if twin.unchanged():
                self._twins[id(twin.original)] = twin
                self.originals[id(twin.fake)] = twin.original

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake tensor that stands for ``tensor``."""
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self.mode:
            return tensor
        if id(tensor) not in self._twins:
            self._twins[id(tensor)] = _Twin(tensor, self._make(tensor))
            self.originals[id(self._twins[id(tensor)].fake)] = tensor
        return self._twins[id(tensor)].fake

    def constant(self, tensor: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
        """From now on ``fake`` stands for ``tensor``, which code of the model has made of numbers."""
        self._twins[id(tensor)] = _Twin(tensor, fake)
        self.originals[id(fake)] = tensor
        return fake

    def _make(self, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return _unread(self.mode.from_tensor(tensor, static_shapes=True))
        with self.mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake.requires_grad_(tensor.requires_grad)

    def meet(
        self, fake: torch.Tensor, real: Callable[[], Any], others: Sequence[Callable[[], Any]] = ()
    ) -> None:
        """What ``fake`` stands for in the example, and in calls with other samples."""
        self._held.append(fake)
        self._met.setdefault(id(fake), real)
        self._others += [{} for _ in others[len(self._others) :]]
        for met, other in zip(self._others, others, strict=False):
            met[id(fake)] = other

    @contextmanager
    def inhabited_by(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model's parameters and buffers are their fake twins, and the mode is on."""
        swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        try:
            for module in model.modules():
                self.attributes[id(module)] = found = dict(module.__dict__)
                self._contents[id(module)] = Held(v for k, v in found.items() if k not in REGISTRIES)
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
        """Fake tensors of the shapes that ``module`` gives for real random inputs, the same in each call.

        For a module that decides by values, or whose shapes depend on values, and that therefore cannot run
        on fake tensors. It runs with its real parameters (nothing of it is changed), for two random inputs:
        sizes that differ between the two, or are 0, count as made from values.

        Raises
        ------
        RuntimeError
            The module is on the meta device, or its inputs are; it changes its inputs; or even the number
            of tensors that it gives depends on values.
        """
        with _disable_current_modes(), self.left_by(module):
            if any(t.is_meta for t in (*module.parameters(), *module.buffers())):
                raise RuntimeError("a module on the meta device cannot run on real inputs")
            need: Need = "second" if self.sizes == "other" else "both" if self.compares else "first"
            run = self._runs.of(module, args, kwargs, self._met, need, self._others)
            self.flops += run.first.flops
            inputs: list[torch.Tensor] = []
            map_tensors(inputs.append, (args, kwargs))
            back = {id(y): x for y, x in zip(run.first.inputs, inputs, strict=True)}
            result = self._imagined(run, back)
            left = [(m, name, map_tensors(self._stranger, value)) for m, name, value in run.first.left]
            if run.first.changed is not None:
                mirror((args, kwargs), run.first.changed, lambda x: map_tensors(lambda t: _known(t, back), x))
        for m, name, value in left:  # nobody must read there what stood there before
            m.__dict__[name] = value
        return result

    def _stranger(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor that no graph knows yet."""
        made = self._like(tensor)
        self._held.append(made)
        return made

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A new one; with gradient it is the result of an operation, which may be written to."""
        made = _unread(self.mode.from_tensor(tensor.detach().clone()))
        if not tensor.requires_grad:
            return made
        with self.mode, torch.enable_grad():
            return made.requires_grad_().clone()

    def _imagined(self, run: RealRun, back: dict[int, torch.Tensor]) -> Any:
        """The result of ``run`` on fake tensors; ``back``: fake ones by the real ones' ids, added to."""
        result, other = run.first.result, (run.second or run.first).result
        tensors, others = list(tensors_in(result)), list(tensors_in(other))
        if [steps for steps, _ in tensors] != [steps for steps, _ in others]:
            raise RuntimeError("how many tensors the module gives depends on values")
        if run.second is not None and run.first.held != run.second.held:
            raise RuntimeError("how it changes an object that it is given depends on values")
        if not tensors or plain_values(result) != plain_values(other):
            raise RuntimeError("it gives numbers or other Python values that it makes from tensors")
        second = {id(a): b for (_, a), (_, b) in zip(tensors, others, strict=True)}

        def fake(x: torch.Tensor) -> torch.Tensor:
            if id(x) in back:
                return back[id(x)]
            key, sizes, sizes_too = id(x), tuple(x.shape), tuple(second[id(x)].shape)
            if len(sizes) != len(sizes_too):
                raise RuntimeError("how many dimensions a tensor that the module gives has depends on values")
            if not all(sizes) or sizes != sizes_too:
                self.sized_by_values = True
                valued = [not a or a != b for a, b in zip(sizes, sizes_too, strict=True)]
                if self.sizes == "other":
                    x = second[id(x)] if all(sizes_too) else _part_of(x, [size or 1 for size in sizes_too])
                elif self.sizes == "none":
                    x = x.new_zeros([0 if v else size for size, v in zip(sizes, valued, strict=True)])
            made = self._like(x)
            self._met[id(made)] = partial(_itself, x)
            self._held.append(made)
            back[key] = made
            return made

        return map_tensors(fake, result)

    @contextmanager
    def left_by(self, module: nn.Module) -> Iterator[None]:
        """Inside, the parameters and buffers of ``module`` are the real ones again, and its attributes."""
        swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
        changed: list[tuple[dict[str, Any], str, Any]] = []
        filled: list[Held] = []
        try:
            for m in module.modules():
                before = self.attributes.get(id(m))
                if before is None:  # no part of the model
                    continue
                for name, value in list(m.__dict__.items()):
                    # Whatever forward has stored so far, such as a cache, is fake.
                    if name not in REGISTRIES and value is not before.get(name):
                        changed.append((m.__dict__, name, value))
                        if name in before:
                            m.__dict__[name] = before[name]
                        else:
                            del m.__dict__[name]
                filled.append(Held(v for k, v in before.items() if k not in REGISTRIES))
                self._contents[id(m)].put_back()
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
            for contents in filled:
                contents.put_back()


class _Twin:
    """A real tensor (so that its id is not given to another) and the fake one for it."""

    def __init__(self, original: torch.Tensor, fake: torch.Tensor) -> None:
        self.original, self.fake = original, fake
        self._form = self._now()

    def _now(self) -> Any:
        fake = self.fake
        version = -1 if fake.is_inference() else fake._version
        storage = fake.untyped_storage()._cdata if fake.layout == torch.strided else 0
        return version, fake.shape, fake.dtype, fake.is_leaf, storage

    def unchanged(self) -> bool:
        """Whether the fake one is as it was made, or can be made so again."""
        if self._now() != self._form:
            return False
        if self.fake.requires_grad != self.original.requires_grad:
            self.fake.requires_grad_(self.original.requires_grad)
        return True


def _part_of(tensor: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """The first rows of a tensor, which mean something to the code behind; zeros where it has too few."""
    part = tensor[tuple(slice(size) for size in sizes)]
    return part if list(part.shape) == list(sizes) else tensor.new_zeros(sizes)


def _with_data(tensor: torch.Tensor) -> torch.Tensor | None:
    return None if tensor.is_meta or isinstance(tensor, FakeTensor) else tensor


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _unread(fake: torch.Tensor) -> torch.Tensor:
    """The same without the number that torch remembers of a 0-dim one: the next call may find another."""
    fake.item_memo = None  # type: ignore[attr-defined]
    return fake


def _known(tensor: torch.Tensor, fakes: dict[int, torch.Tensor]) -> torch.Tensor:
    if id(tensor) not in fakes:
        raise RuntimeError("the module puts a tensor into an object that it is given, and does not return it")
    return fakes[id(tensor)]


def fake_inputs(world: FakeWorld, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fake tensors like a call's."""
    result = []
    with world.mode:
        for tensor in tensors:
            device = torch.device("cpu") if tensor.is_meta else tensor.device
            # New ones each: the same tensor may be given for two arguments, which are two placeholders.
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            result.append(fake.requires_grad_(tensor.requires_grad))
            world.meet(result[-1], partial(_with_data, tensor))
    return result


def light(value: Any) -> Any:
    """``value`` with its tensors cut from the autograd graph that made them (requires_grad stays)."""

    return pytree.tree_map_only(torch.Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), value)

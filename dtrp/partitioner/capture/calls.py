"""One call of a torch function or a layer: run on fake tensors, and written down as a node."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from dtrp.memory import storage_of

from .checkpointed import Checkpointed
from .custom import Under, form_of, same_form
from .fakes import FakeWorld, light
from .sizes import Sizes, plain
from .structure import Step, map_tensors, mirror, tensors_in
from .targets import is_property, property_name
from .writer import CannotRecord, GraphWriter


class Calls:
    """Writes calls."""

    def __init__(
        self, writer: GraphWriter, world: FakeWorld, sizes: Sizes, checkpointed: Checkpointed, grad: bool
    ) -> None:
        self._writer, self._world, self._sizes, self._checkpointed = writer, world, sizes, checkpointed
        self._grad = grad  # whether the graph is for calls with gradients
        self.regions: list[str | None] = []  # of torch.autocast that are entered, by device
        self._apart: list[torch.Tensor] = []  # see `part`

    def __call__(
        self, function: Callable[..., Any], form: Callable[..., Any], args: Any, kwargs: Any, kept: str = ""
    ) -> Any:
        """Run ``function`` on fakes and, if it gives or changes a tensor, make it a node.

        ``form``: gives the node's op, target and arguments; ``kept``: the name of what is kept whole because
        it could not be recorded.
        """
        given = args, kwargs
        args, kwargs = plain(self._fake(given))
        before = self._fake(given)
        inputs = [t for _, t in tensors_in(before)]
        versions = [_version(t) for t in inputs]
        result = function(*args, **kwargs)
        outputs = list(tensors_in(result))
        held = [t for _, t in tensors_in((args, kwargs))]
        if [id(t) for t in held] != [id(t) for t in inputs]:
            # Only what the node gives can be known by it; the caller's objects follow.
            if not {id(t) for t in held} <= {id(t) for t in inputs} | {id(t) for _, t in outputs}:
                raise CannotRecord("puts a tensor into an object that it is given, and does not return it")
            mirror(given, (args, kwargs))
        args, kwargs = before
        changed = [t for t, v in zip(inputs, versions, strict=True) if _version(t) != v]
        name = property_name(function) if is_property(function) else getattr(function, "__name__", "")
        if function is torch._assert_async:  # gives nothing, and may fail
            self._writer.node(*self._written(*form(function, args, kwargs)), result)
        if not outputs and not changed:
            return self._sizes.answer(name, args, lambda: form(function, args, kwargs), result)
        self._refuse_parted(changed)
        for tensor in changed:
            if attribute := self._writer.attribute_name(tensor):
                self._checkpointed.refuse(attribute)
                self._writer.refuse_loose(attribute)
        node = self._writer.node(*self._written(*form(function, args, kwargs)), result)
        self._sizes.parted(name, node, result)
        if kept:
            self._writer.node("call_function", same_form, (node, kept, *form_of(result)), {}, None)
        if node.op == "call_module" and self._cuts:
            self._cut_off(outputs, node, inputs)
            return result
        return self._learn_all(result, outputs, node, inputs, changed)

    def part(self, given: Any, result: Any) -> None:
        """What a call gave may be a view in the model and is a copy in the graph: nothing may write to either
        from now on."""
        self._apart += [t for _, t in tensors_in((self._fake(given), result))]

    def _refuse_parted(self, changed: list[torch.Tensor]) -> None:
        if {storage_of(t) for t in changed} & {storage_of(t) for t in self._apart}:
            raise CannotRecord("writes to a tensor of which a call took what values say, or to what it took")

    @property
    def _cuts(self) -> bool:
        """Whether the model has switched gradients off here."""
        return self._grad and not torch.is_grad_enabled()

    def region(self) -> tuple[tuple[str, bool, torch.dtype], ...]:
        """What torch.autocast is in the regions that the model has entered."""
        devices = dict.fromkeys(d for d in self.regions if d is not None)
        return tuple((d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)

    def set_requires_grad(self, tensor: torch.Tensor, requires_grad: bool = True) -> torch.Tensor:
        """``tensor.requires_grad_(...)``, however it is spelt."""
        source = self._writer.argument(tensor)
        node = self._writer.node("call_method", "requires_grad_", (source, requires_grad), {}, tensor)
        tensor.requires_grad = requires_grad
        node.meta["val"] = light(tensor)
        self._writer.learn(tensor, node)
        return tensor

    def _written(self, op: str, target: Any, args: Any, kwargs: Any) -> tuple[str, Any, Any, Any]:
        """The node's arguments. Where gradients are switched off, none must flow through it."""
        region = self.region()
        if region and op != "call_module":
            op, target = "call_function", Under(target, region)
        cut = op != "call_module" and self._cuts
        return op, target, self._writer.argument(args, cut), self._writer.argument(kwargs, cut)

    def _cut_off(
        self, outputs: list[tuple[tuple[Step, ...], torch.Tensor]], node: Node, inputs: list[torch.Tensor]
    ) -> None:
        """A layer's own parameters would still let gradients in: none get behind it."""
        for steps, tensor in outputs:
            if any(tensor is x for x in inputs):
                continue
            if tensor.is_floating_point() or tensor.is_complex():
                part = self._writer.reach(node, steps)
                self._writer.learn(tensor, self._writer.node("call_method", "detach", (part,), {}, tensor))
            else:
                self._writer.learn(tensor, node, steps)

    def _learn_all(
        self,
        result: Any,
        outputs: list[tuple[tuple[Step, ...], torch.Tensor]],
        node: Node,
        inputs: list[torch.Tensor],
        changed: list[torch.Tensor],
    ) -> Any:
        """Know what a call gave by its node; the result for the model."""
        replaced: dict[int, torch.Tensor] = {}
        for steps, tensor in outputs:
            if any(tensor is x for x in inputs):
                if not torch.is_grad_enabled():
                    # The tensor itself, through which gradients keep flowing, although none may flow
                    # through this node.
                    continue
                if not any(tensor is x for x in changed):
                    # Given back as it came. On another device or under autocast it may be a new tensor: give
                    # the model another object, which stands for this node.
                    replaced[id(tensor)] = tensor = tensor.view_as(tensor)
            self._writer.learn(tensor, node, steps)
        return map_tensors(lambda t: replaced.get(id(t), t), result) if replaced else result

    def _fake(self, value: Any) -> Any:
        """``value`` with real tensors replaced by their fake twins."""
        if isinstance(value, torch.Tensor):
            return value if isinstance(value, FakeTensor) else self._world.twin(value)
        if type(value) in (tuple, list):
            return type(value)(self._fake(x) for x in value)
        if type(value) in (dict, OrderedDict):
            return type(value)((k, self._fake(v)) for k, v in value.items())
        return value


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version

"""A graph while it is recorded: nodes, and which of them stands for which tensor."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, Node
from torch.fx.immutable_collections import immutable_dict, immutable_list

from .custom import Rebuild
from .fakes import FakeWorld, light
from .gradients import enclose
from .location import raised_at, user_location
from .methods import held_name
from .structure import PLAIN, Step, classes_in, opened_object, tensors_in

_UNSEEN = "it cannot be followed (TorchScript, torch.func, a C++ extension, another thread, an earlier call)"


_DTYPES = {int: torch.int64, float: torch.float64, complex: torch.complex128, bool: torch.bool}
"""What torch takes Python's kinds of numbers for, where it wants a dtype."""


class CannotRecord(Exception):
    """The running module does something that a graph cannot hold."""

    place = ""  # the user's line, where the traceback does not lead there


class CannotKeep(CannotRecord):
    """It does something for which keeping it whole would not help either."""


class Borrows(CannotKeep):
    """A module that stands as one node uses a parameter of another."""

    def __init__(self, module: str, parameter: str) -> None:
        super().__init__(f"its part {module!r} uses the parameter {parameter!r}, which is not its own")
        self.module = module


def reason(error: BaseException) -> str:
    """One line that says why a module could not be recorded, with the user's line."""
    if hasattr(error, "dtrp_real"):  # it could not even run on real tensors
        return str(error.dtrp_real)
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    place = raised_at(error)
    if not isinstance(error, CannotRecord):
        text = f"{type(error).__name__}: {text}"
    return f"{text} ({place})" if place else text


@dataclass
class _Known:
    """Where a tensor's value stands in the graph."""

    tensor: torch.Tensor  # held so that its id is not given to another
    node: Node
    steps: tuple[Step, ...] = ()  # into the node's value, not yet taken
    sealed: bool = False  # in the plain model it has no gradient, though it has one here


@dataclass(frozen=True)
class Mark:
    """A point in the recording that can be gone back to."""

    last: Node | None
    learned: int


class GraphWriter:
    """Makes nodes from tensors, each of which is known by its identity."""

    def __init__(self, model: nn.Module, world: FakeWorld) -> None:
        self.graph = Graph()
        self.module = ""  # qualified name of the module whose code is running
        self.method = ""  # the root's or a submodule's, of which the root's code is running
        # What is no part of the model, by the names that nodes give it: tensors, and methods kept whole.
        self.held: dict[str, torch.Tensor | nn.Module] = {}
        self._model = model
        self._world = world
        self._known: dict[int, _Known] = {}
        self._undo: list[tuple[int, _Known | None]] = []
        # The model's own tensors and their qualified names, by the ids of tensors and of their fake twins.
        self._attributes: dict[int, tuple[torch.Tensor, str]] = {}
        for prefix, module in model.named_modules():
            tables = module._parameters, module._buffers, vars(module)
            for name, value in itertools.chain.from_iterable(table.items() for table in tables):
                for tensor in (value, world.twin(value)) if isinstance(value, torch.Tensor) else ():
                    self._attributes.setdefault(id(tensor), (tensor, f"{prefix}.{name}".removeprefix(".")))

    # Nodes

    def placeholder(self, name: str, fake: torch.Tensor) -> None:
        """Make ``fake`` the graph's next input."""
        node = self.graph.placeholder(name)
        self._describe(node, fake)
        self.learn(fake, node)

    def node(self, op: Any, target: Any, args: Any, kwargs: Any, value: Any) -> Node:
        """A new node that gives ``value``; its arguments are arguments of nodes already."""
        node = self.graph.create_node(op, target, args, kwargs)
        self._describe(node, value)
        return node

    def hold(self, key: str, method: nn.Module) -> str:
        """The name under which nodes may call a method that is kept whole; another one in each mode."""
        name = held_name(self._model, key)
        self.held.setdefault(name, method)
        return name

    def output(self, leaves: Sequence[Any]) -> None:
        """End the graph with the flat output."""
        node = self.graph.output(tuple(self.argument(leaf) for leaf in leaves))
        self._describe(node, tuple(leaves))
        enclose(self.graph, self._model, self._describe)

    def _describe(self, node: Node, value: Any) -> None:
        node.meta["val"] = light(value)
        node.meta["open"] = node.op == "placeholder" or any(n.meta["open"] for n in node.all_input_nodes)
        node.meta["module"] = self.module
        node.meta["method"] = self.method
        node.meta["location"] = user_location() if node.op.startswith("call") else ""

    # Tensors

    def learn(self, tensor: torch.Tensor, node: Node, steps: tuple[Step, ...] = ()) -> None:
        """From now on ``tensor`` is the node's value, or the part of it that the steps lead to."""
        self._undo.append((id(tensor), self._known.get(id(tensor))))
        self._known[id(tensor)] = _Known(tensor, node, steps)

    def reach(self, node: Node, steps: tuple[Step, ...]) -> Node:
        """The node for a part of a node's value."""
        value = node.meta["val"]
        for function, key in steps:
            value = function(value, key)
            node = self.node("call_function", function, (node, key), {}, value)
        return node

    def source(self, tensor: torch.Tensor) -> tuple[Node, tuple[Step, ...]] | None:
        """The node that gives ``tensor``, and the steps into its value, if one does."""
        known = self._known.get(id(tensor))
        return None if known is None else (known.node, known.steps)

    def attribute(self, name: str) -> torch.Tensor:
        """The model's tensor with that qualified name."""
        return next(tensor for tensor, n in self._attributes.values() if n == name)

    def attribute_name(self, tensor: torch.Tensor) -> str:
        """The qualified name of one of the model's own tensors, ``""`` for another."""
        if id(tensor) in self._world.originals and id(tensor) not in self._attributes:
            self._constant(tensor)
        return self._attributes[id(tensor)][1] if id(tensor) in self._attributes else ""

    def _constant(self, tensor: torch.Tensor) -> None:
        """Hold what ``tensor`` stands for, which is no part of the model, under a name of its own."""
        name = f"_constant_{len(self.held)}"
        self.held[name] = self._world.originals[id(tensor)]
        self._attributes[id(tensor)] = (tensor, name)

    def refuse_loose(self, name: str) -> None:
        """Refuse that a tensor of the model is changed that it would not keep: no parameter, no buffer."""
        owner, _, own = name.rpartition(".")
        module = None if name in self.held else self._model.get_submodule(owner)
        if module is None or own not in {*module._parameters, *module._buffers}:
            raise CannotRecord(
                f"changes the tensor {name!r} in place, which is no buffer: make it one "
                "(self.register_buffer), or move this code into a submodule, which is then kept whole"
            )

    def depends_on_inputs(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is made from an input, from the model's own tensors, or by chance."""
        known = self._known.get(id(tensor))
        if known is None:
            return True
        waiting, seen = [known.node], set()
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            name = getattr(node.target, "__name__", str(node.target))
            if (
                (node.op != "call_function" and node.op != "call_method")
                or "rand" in name
                or "dropout" in name
            ):
                return True
            if any(tensors_in(node.meta["val"])) or not node.all_input_nodes:  # not what sizes alone are of
                waiting += node.all_input_nodes
        return False

    def argument(self, value: Any, cut: bool = False) -> Any:
        """``value`` as an argument of a node; ``cut``: without letting gradients through.

        Raises
        ------
        CannotRecord
            There is a tensor in it that the recording has not seen, or an object of another kind.
        """
        if isinstance(value, torch.Tensor):
            node = self._tensor_node(value)
            if cut and (value.is_floating_point() or value.is_complex()):
                return self.node("call_method", "detach", (node,), {}, value.detach())
            return node
        if isinstance(value, type) and value in _DTYPES:
            return _DTYPES[value]
        if isinstance(value, tuple):
            items = [self.argument(x, cut) for x in value]
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if type(value) in (list, immutable_list):
            return [self.argument(x, cut) for x in value]
        if type(value) in (dict, immutable_dict):
            return {k: self.argument(v, cut) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self.argument(x, cut) for x in (value.start, value.stop, value.step)))
        if isinstance(value, np.generic):
            return value.item()
        if issubclass(type(value), (torch.SymInt, torch.SymFloat)):
            return self._size_node(value)
        if isinstance(value, PLAIN):
            return value
        attributes = opened_object(value)
        if attributes is None:
            raise CannotRecord(
                f"hands an object of type {type(value).__name__} to a torch function or layer, or returns it"
            )
        names, parts = attributes
        arguments = tuple(self.argument(part, cut) for part in parts)
        return self.node(
            "call_function", Rebuild(type(value), names, classes_in(value)), arguments, {}, value
        )

    def _size_node(self, size: Any) -> Any:
        if size.source.graph is not self.graph:  # kept by user code from an earlier recording
            return size.value
        if size.source._erased:
            raise CannotRecord("uses a size that is known only inside a module that is kept whole")
        return size.source

    def _tensor_node(self, tensor: torch.Tensor) -> Node:
        known = self._known.get(id(tensor))
        if known is not None:
            if known.sealed and tensor.requires_grad:
                raise CannotRecord(
                    "uses a tensor that code under checkpoint(use_reentrant=True) made and did not return"
                )
            if known.steps:
                self.learn(tensor, self.reach(known.node, known.steps))
            return self._known[id(tensor)].node
        name = self.attribute_name(tensor)
        if not name:
            raise CannotRecord(f"uses a tensor that was made where {_UNSEEN}")
        # A node for each use: parameters are at hand in every stage and need not travel between them.
        return self.node("get_attr", name, (), {}, tensor)

    def seal(self, mark: Mark, result: Any) -> None:
        """Let code use nothing that was made since ``mark``, except ``result``, if it asks for gradients."""
        given = {id(tensor) for _, tensor in tensors_in(result)}
        for key, before in self._undo[mark.learned :]:
            if before is None and key not in given:
                self._undo.append((key, self._known[key]))
                self._known[key] = replace(self._known[key], sealed=True)

    def is_new(self, tensor: torch.Tensor) -> bool:
        """Whether nothing is known of a tensor."""
        known = self._known, self._attributes, self._world.originals
        return isinstance(tensor, FakeTensor) and not any(id(tensor) in names for names in known)

    def check_known(self, result: Any) -> None:
        """Whether all tensors that a module gives are known: else it is kept whole, and not who uses them."""
        if any(self.is_new(tensor) for _, tensor in tensors_in(result)):
            raise CannotRecord(f"gives a tensor that was made where {_UNSEEN}")

    # Going back

    def mark(self) -> Mark:
        """The present point."""
        return Mark(next(iter(reversed(self.graph.nodes)), None), len(self._undo))

    def roll_back(self, mark: Mark) -> None:
        """Forget all nodes and tensors since ``mark``."""
        for node in reversed(self.graph.nodes):
            if node is mark.last:
                break
            self.graph.erase_node(node)
        while len(self._undo) > mark.learned:
            key, before = self._undo.pop()
            if before is None:
                del self._known[key]
            else:
                self._known[key] = before

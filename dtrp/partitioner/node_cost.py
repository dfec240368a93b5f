"""What one node of a graph costs: run alone on fake tensors, forward and backward.

Nothing is computed and nothing is allocated. The node's inputs are fresh fake tensors of the right shapes,
detached from everything before it; a dispatch mode sees each operator that the node and its backward reduce
to, and torch's saved-tensor hooks see what autograd keeps in between. Two nodes with the same code,
settings and input shapes cost the same, so each such kind runs once: a model of thousands of nodes takes
seconds.

A module that decides by values cannot run on fake tensors. It runs on random real ones, without its heavy
products (`Sketch`); what it costs is what these numbers make it cost.

The fake tensors pretend to be on the CPU whatever the model's device is (also meta). There, attention takes
the fused kernel, as it does on GPUs, while on meta it would be spelled out with its quadratic intermediate
result."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from dtrp.memory import bytes_of, storage_of, strides_of
from dtrp.partitioner.capture.real import random_tensor
from dtrp.partitioner.capture.snapshot import untouched
from dtrp.partitioner.capture.structure import mutable
from dtrp.partitioner.live_bytes import LiveBytes
from dtrp.partitioner.node_key import TensorSpec, call_key, module_key
from dtrp.partitioner.op_cost import OpCost, op_cost
from dtrp.partitioner.sketch import Sketch

_DEVICE = torch.device("cpu")


@dataclass(frozen=True)
class OutputSpec:
    """A tensor among a node's outputs, and whose memory it lies in: an input's, a parameter's, or new."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    alias_of: int | str | None  # index of an input, name of a parameter or buffer; None: new memory
    fresh: int  # index into NodeCost.fresh where alias_of is None, else -1


@dataclass(frozen=True)
class NodeCost:
    """What a node does and keeps.

    Attributes
    ----------
    forward, backward : tuple[OpCost, ...]
        The operators of each pass.
    fresh : tuple[int, ...]
        Bytes of each new storage that outputs lie in.
    saved_inputs, saved_fresh : tuple[int, ...]
        Which inputs and which of ``fresh`` autograd saves for the backward pass.
    saved_inside : int
        Bytes of what it saves besides: dropout masks, statistics, values between a module's operators.
    grad_inputs : tuple[int, ...]
        Inputs that an in-place operation made to require a gradient.
    outputs : Any
        The node's value: a pytree with an `OutputSpec` for each tensor.
    forward_peak, backward_peak : int
        Bytes of new storages that are alive at once in each pass, results included; in the backward pass also
        what is left of ``saved_inside``.
    exact : bool
        False if the node could not be run alone: then only its outputs' sizes are known.
    sampled : bool
        Whether it ran on random real tensors.
    """

    forward: tuple[OpCost, ...]
    backward: tuple[OpCost, ...]
    fresh: tuple[int, ...]
    saved_inputs: tuple[int, ...]
    saved_fresh: tuple[int, ...]
    saved_inside: int
    grad_inputs: tuple[int, ...]
    outputs: Any
    forward_peak: int = 0
    backward_peak: int = 0
    exact: bool = True
    sampled: bool = False


class NodeRunner:
    """Runs nodes of one model on fake tensors and remembers what they cost.

    Parameters
    ----------
    dtype
        Run under autocast to this dtype; ``None``: in the model's own dtypes.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._dtype = dtype
        self._memory: dict[Hashable, NodeCost] = {}

    def function(
        self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: Hashable = None
    ) -> NodeCost:
        """The cost of ``target(*args, **kwargs)``, where `TensorSpec` stands for tensors."""
        kwargs = _on_cpu(kwargs)
        key = call_key(name or target, _on_cpu(args), kwargs)
        return self._remember(key, lambda: self._run(target, _on_cpu(args), kwargs, {}))

    def module(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> NodeCost:
        """The cost of ``module(*args, **kwargs)``, its parameters and buffers being fake as well."""
        state = {
            name: TensorSpec(tuple(t.shape), strides_of(t), t.dtype, t.requires_grad, -1)
            for name, t in [*module.named_parameters(), *module.named_buffers()]
        }
        config = module_key(module)
        key = None if config is None else call_key(config, args, kwargs)

        def target(*a: Any, **k: Any) -> Any:
            with untouched(module):
                return torch.func.functional_call(module, self._state, a, k, tie_weights=True)

        return self._remember(key, lambda: self._run(target, args, kwargs, state))

    def module_on_samples(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        made: NodeCost,
        samples: Sequence[torch.Tensor] = (),
    ) -> NodeCost:
        """The cost of a module that cannot run on fake tensors, on real ones, with its own parameters.

        These are ``samples``, in the order of its arguments' tensors, or random where they do not fit.

        ``made`` says what it gives: its sizes in this run depend on the numbers.
        """
        state = dict([*module.named_parameters(), *module.named_buffers()])
        if any(t.is_meta for t in state.values()):
            raise RuntimeError("a module on the meta device cannot run on real tensors")
        with untouched(module, tensors=True):
            torch.manual_seed(0)
            ran = self._run(module, args, kwargs, state, samples)
        inside = ran.saved_inside + sum(ran.fresh[i] for i in ran.saved_fresh)
        return replace(
            made,
            forward=ran.forward,
            backward=ran.backward,
            saved_inputs=ran.saved_inputs,
            saved_inside=inside,
            forward_peak=ran.forward_peak,
            backward_peak=ran.backward_peak,
            exact=True,
            sampled=True,
        )

    def _remember(self, key: Hashable, run: Callable[[], NodeCost]) -> NodeCost:
        if key is None:
            return run()
        if key not in self._memory:
            self._memory[key] = run()
        return self._memory[key]

    def _run(
        self,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        state: Mapping[str, TensorSpec | torch.Tensor],
        samples: Sequence[torch.Tensor] | None = None,
    ) -> NodeCost:
        """Run on fake tensors, or on real ``samples``; a module's ``state`` may be real tensors."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        saved: list[torch.Tensor] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved.append(tensor)
            return tensor

        autocast = nullcontext() if self._dtype is None else torch.autocast(_DEVICE.type, dtype=self._dtype)
        make = _fake if samples is None else partial(_sample, _by_spec(leaves, samples))
        with nullcontext() if samples is not None else self._mode, torch.enable_grad():
            self._state = {n: t if isinstance(t, torch.Tensor) else make(t) for n, t in state.items()}
            # One value passed twice is one tensor: attention modules ask whether key *is* query.
            made: dict[int, torch.Tensor] = {}
            for leaf in leaves:
                if isinstance(leaf, TensorSpec) and id(leaf) not in made:
                    made[id(leaf)] = make(leaf)
            # A node may work in place, which autograd forbids on leaves: it gets a copy that is not one.
            copies = {i: root.clone() for i, root in made.items()}
            roots = [made.get(id(leaf)) for leaf in leaves]
            inputs = [copies.get(id(leaf), leaf) for leaf in leaves]
            wanted = [
                inp.requires_grad if root is not None else False
                for root, inp in zip(roots, inputs, strict=True)
            ]
            call_args, call_kwargs = mutable(pytree.tree_unflatten(inputs, structure))
            forward = _Operators(inputs, self._state)
            sketch = Sketch() if samples is not None else nullcontext()
            with sketch, forward, torch.autograd.graph.saved_tensors_hooks(pack, _unpack), autocast:
                value = target(*call_args, **call_kwargs)
            out_leaves, out_structure = pytree.tree_flatten(value)
            tensors = [leaf for leaf in out_leaves if isinstance(leaf, torch.Tensor)]
            results = [t for t in tensors if t.requires_grad]
            results += [
                t
                for t, before in zip(inputs, wanted, strict=True)
                if isinstance(t, torch.Tensor) and t.requires_grad and not before
            ]
            sources = [r for r in made.values() if r.requires_grad]
            sources += [t for t in self._state.values() if t.requires_grad]
            gradients = [torch.ones_like(t) for t in results]
            backward = _Operators(inputs, self._state, value, gradients)
            backward.note(saved)  # what is kept inside goes away while gradients come
            kept = [(storage_of(t), bytes_of(t)) for t in saved]
            saved.clear()  # from here on autograd alone holds it
            if results and sources:
                with sketch, backward:
                    torch.autograd.grad(results, sources, gradients, allow_unused=True)
        return _summary(forward, backward, inputs, wanted, self._state, kept, out_leaves, out_structure)


def _summary(
    forward: _Operators,
    backward: _Operators,
    inputs: Sequence[Any],
    wanted: Sequence[bool],
    state: Mapping[str, torch.Tensor],
    saved: Sequence[tuple[int, int]],
    out_leaves: Sequence[Any],
    out_structure: pytree.TreeSpec,
) -> NodeCost:
    """Sorts every storage that was met by whose it is: parameter, input, output or neither."""
    owner: dict[int, int | str] = {storage_of(t): name for name, t in state.items()}
    owner |= {storage_of(t): i for i, t in enumerate(inputs) if isinstance(t, torch.Tensor)}
    fresh: dict[int, tuple[int, int]] = {}  # storage -> (index, bytes)
    outputs: list[Any] = []
    for leaf in out_leaves:
        if not isinstance(leaf, torch.Tensor):
            outputs.append(leaf)
            continue
        storage = storage_of(leaf)
        alias = owner.get(storage)
        if alias is None and storage not in fresh:
            fresh[storage] = (len(fresh), bytes_of(leaf))
        index = fresh[storage][0] if alias is None else -1
        outputs.append(
            OutputSpec(tuple(leaf.shape), strides_of(leaf), leaf.dtype, leaf.requires_grad, alias, index)
        )
    saved_inputs, saved_fresh, inside = set(), set(), {}
    for storage, size in saved:
        alias = owner.get(storage)
        if isinstance(alias, int):
            saved_inputs.add(alias)
        elif alias is None and storage in fresh:
            saved_fresh.add(fresh[storage][0])
        elif alias is None:
            inside[storage] = size
    return NodeCost(
        forward=tuple(forward.seen),
        backward=tuple(backward.seen),
        fresh=tuple(size for _, size in fresh.values()),
        saved_inputs=tuple(sorted(saved_inputs)),
        saved_fresh=tuple(sorted(saved_fresh)),
        saved_inside=sum(inside.values()),
        grad_inputs=tuple(
            i
            for i, (t, before) in enumerate(zip(inputs, wanted, strict=True))
            if isinstance(t, torch.Tensor) and t.requires_grad and not before
        ),
        outputs=pytree.tree_unflatten(outputs, out_structure),
        forward_peak=forward.peak,
        backward_peak=backward.peak,
    )


class _Operators(LiveBytes):  # type: ignore[no-untyped-call]
    """Notes the cost of each operator that runs under it, and how much they have alive."""

    def __init__(self, *known: Any) -> None:
        super().__init__(*known)
        self.seen: list[OpCost] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.note(out)
        cost = op_cost(func, args, kwargs, out)
        if cost is not None:
            self.seen.append(cost)
        return out


def _fake(spec: TensorSpec) -> torch.Tensor:
    return torch.empty_strided(
        spec.shape, spec.stride, dtype=spec.dtype, device=_DEVICE, requires_grad=spec.requires_grad
    )


def _by_spec(leaves: Sequence[Any], samples: Sequence[torch.Tensor]) -> dict[int, torch.Tensor]:
    """Samples by the ids of the leaves that they are for."""
    specs = [leaf for leaf in leaves if isinstance(leaf, TensorSpec)]
    if len(specs) != len(samples):
        return {}
    pairs = zip(specs, samples, strict=True)
    return {id(s): t for s, t in pairs if (tuple(t.shape), t.dtype) == (s.shape, s.dtype)}


def _sample(known: Mapping[int, torch.Tensor], spec: TensorSpec) -> torch.Tensor:
    if id(spec) in known:
        return known[id(spec)].detach().to(_DEVICE).clone().requires_grad_(spec.requires_grad)
    return random_tensor(spec.shape, spec.dtype, _DEVICE).requires_grad_(spec.requires_grad)


def _unpack(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _on_cpu(arguments: Any) -> Any:
    """Devices among the arguments (of factories, of ``to``) become the fakes' device."""
    if isinstance(arguments, dict) and "device" in arguments and arguments["device"] is not None:
        arguments = arguments | {"device": _DEVICE}
    return pytree.tree_map_only(torch.device, lambda _: _DEVICE, arguments)

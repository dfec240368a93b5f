"""From a captured graph to the cost graph: what each node computes, keeps, sends, and how long that takes.

The nodes are the calls and attributes of the train graph; its placeholders are not nodes, because a model
input goes straight from the caller to each stage that reads it: each node says which ones it reads.

Who pays for saved memory ------------------------- Autograd saves tensors, many of them twice (a ReLU saves
its result, the convolution behind it saves the same tensor as its input). Each storage counts once, at the
node that makes it, if any node saves it: so the sum over any set of nodes is what a stage of these nodes
keeps, *besides* its inputs, which it stashes anyway. What autograd saves of the model's own inputs has no
maker; it counts at the first node that saves it, in ``activation_bytes`` but not in ``kept_bytes``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import networkx as nx
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from dtrp.partitioner.capture.graph import Captured
from dtrp.partitioner.devices import DeviceSpec
from dtrp.partitioner.measured import measure_nodes
from dtrp.partitioner.node_cost import NodeCost, NodeRunner, OutputSpec, TensorSpec
from dtrp.partitioner.op_cost import OpCost
from dtrp.partitioner.peak import NodeMemory

log = logging.getLogger(__name__)

COMPUTED = ("call_function", "call_method", "call_module", "get_attr")


def cost_graph(
    captured: Captured,
    *,
    device: DeviceSpec | Sequence[DeviceSpec],
    bandwidth: float | None = None,
    mode: str = "analytic",
    dtype: torch.dtype | None = None,
) -> nx.DiGraph:
    """The weighted graph that planning works on.

    Parameters
    ----------
    captured
        The model as graphs; nothing of it is computed, parameters may be on the meta device.
    device
        What the stages run on. Several: times are given for each (see Notes).
    bandwidth
        Bytes per second between stages; default: the device's own.
    mode
        ``"analytic"``: FLOPs and bytes moved through the device's roofline. ``"measured"``: each node timed
        on the device at hand. ``"auto"``: analytic.
    dtype
        The autocast dtype that training will use, if any.

    Returns
    -------
    networkx.DiGraph
        In topological order. Attributes of each node:

        - ``flops``, ``backward_flops``: of the forward and of the backward pass.
        - ``forward_time``, ``backward_time``: seconds. ``sweep_time``: to read or write once what trains.
        - ``params_bytes``: of the parameters that it is the first to use; ``gradient_bytes``: of those of
          them that train; ``buffer_bytes``: buffers, likewise. ``params``: names of all that it uses.
        - ``activation_bytes``: saved for backward, as autograd keeps it, each storage once;
          ``kept_bytes``: the same without model inputs.
        - ``output_bytes``: of the tensors that it gives, ``shapes`` of these (and dtypes).
          ``transfer_bytes``, ``transfer_time``: to have them in another stage (none for parameters, which
          stages share); ``differentiable``: whether gradients come back; ``exchange_time``: with these. Of
          several devices, the slowest link counts.
        - ``model_inputs``: bytes of the model inputs that it reads, by placeholder;
          ``first_input_bytes``: of those that no node before it reads.
        - ``kind`` (as in fx), ``op``, ``module``, ``location``: what it is, and where in the user's code.
        - ``memory``: a `NodeMemory`, from which peaks are simulated.
        - ``exact``: False if it could not be run alone (see `NodeCost`).
        - ``stage``: ``None`` until planned.

        ``graph.graph`` holds ``specs`` (the devices), ``mode``, ``params`` (elements and bytes by name),
        ``trainable`` (the names that train), ``storages`` (bytes) and ``results`` (the nodes that the model
        returns).

    Raises
    ------
    ValueError
        Unknown ``mode``, or a bandwidth that is not positive.

    Notes
    -----
    Time of a node: the sum over its aten operators of max(FLOPs / peak, bytes / bandwidth) + launch overhead.
    With several different devices, times for device i > 0 are in ``forward_time@i`` and so on.
    """
    if mode not in ("analytic", "measured", "auto"):
        raise ValueError(f"costs must be 'analytic', 'measured' or 'auto'; got {mode!r}")
    if bandwidth is not None and not bandwidth > 0:
        raise ValueError(f"bandwidth must be a positive number of bytes per second; got {bandwidth!r}")
    specs: list[DeviceSpec] = []
    for spec in [device] if isinstance(device, DeviceSpec) else device:
        if spec.with_link(bandwidth) not in specs:
            specs.append(spec.with_link(bandwidth))
    graph = _Walk(captured, dtype).graph(specs)
    graph.graph.update(mode="analytic" if mode == "auto" else mode)
    if mode == "measured":
        if len(specs) > 1:
            raise ValueError(
                f"costs='measured' needs stages on one kind of device; got {', '.join(s.name for s in specs)}"
            )
        measure_nodes(captured, graph, specs[0], dtype)
    return graph


class _Walk:
    """One pass over the nodes in order: values as `TensorSpec`, costs by node, and who made which storage."""

    def __init__(self, captured: Captured, dtype: torch.dtype | None) -> None:
        self.captured = captured
        self.module = captured.train.module
        self.runner = NodeRunner(dtype)
        self.values: dict[fx.Node, Any] = {}
        self.costs: dict[fx.Node, NodeCost] = {}
        self.saves: dict[fx.Node, list[int]] = {}  # which storages of others, or of its outputs, a node saves
        self.maker: list[fx.Node | None] = []  # of each storage; None: a parameter's or buffer's
        self.size: list[int] = []  # bytes of each storage
        self.of_tensor: dict[int, int] = {}  # id of a parameter or buffer -> its storage
        self.failed: list[tuple[fx.Node, Exception]] = []  # nodes that could not be run alone
        self.names: dict[int, str] = {}  # id of a parameter or buffer -> its first name in the model
        for name, tensor in [*captured.model.named_parameters(), *captured.model.named_buffers()]:
            self.names.setdefault(id(tensor), name)

    def graph(self, specs: Sequence[DeviceSpec]) -> nx.DiGraph:
        """The cost graph, with times for each of ``specs``."""
        with _training(self.captured.model):
            for node in self.module.graph.nodes:
                if node.op == "placeholder":
                    self.values[node] = self._given(node.meta.get("val"), node, requires_grad=False)
                elif node.op == "get_attr":
                    self.values[node] = self._attribute(node)
                elif node.op in COMPUTED:
                    self._call(node)
        if self.failed:
            node, e = self.failed[0]
            where = node.meta.get("location") or node.meta.get("module") or "no location"
            log.warning("%d nodes count as free, such as %s (%s): %s", len(self.failed), node.name, where, e)
        return self._assemble(specs)

    def _call(self, node: fx.Node) -> None:
        args = fx.node.map_arg(node.args, self.values.__getitem__)
        kwargs = dict(fx.node.map_arg(node.kwargs, self.values.__getitem__))
        try:
            if node.op == "call_module":
                cost = self.runner.module(self.module.get_submodule(str(node.target)), args, kwargs)
            elif node.op == "call_method":
                name = str(node.target)
                cost = self.runner.function(_Method(name), args, kwargs)
            else:
                cost = self.runner.function(node.target, args, kwargs)  # type: ignore[arg-type]
        except Exception as e:  # whatever the user's code raises on fakes: planning goes on without its cost
            self.failed.append((node, e))
            cost = self._unknown(node, args, kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        first = len(self.maker)
        for size in cost.fresh:
            self._storage(node, size)

        def place(out: OutputSpec) -> TensorSpec:
            if isinstance(out.alias_of, int):
                storage = leaves[out.alias_of].storage
            elif out.alias_of is not None:
                storage = self._tensor(self._state(node)[out.alias_of])
            else:
                storage = first + out.fresh
            return TensorSpec(out.shape, out.stride, out.dtype, out.requires_grad, storage)

        self.values[node] = pytree.tree_map_only(OutputSpec, place, cost.outputs)
        self.costs[node] = cost
        self.saves[node] = [leaves[i].storage for i in cost.saved_inputs]
        self.saves[node] += [first + i for i in cost.saved_fresh]
        if cost.grad_inputs:
            self._now_differentiable({leaves[i].storage for i in cost.grad_inputs})

    def _now_differentiable(self, storages: set[int]) -> None:
        """After ``x[:, 0] = y`` every name of x's memory stands for a value that requires a gradient."""

        def mark(spec: TensorSpec) -> TensorSpec:
            grows = spec.storage in storages and spec.dtype.is_floating_point
            return replace(spec, requires_grad=True) if grows else spec

        for node, value in self.values.items():
            self.values[node] = pytree.tree_map_only(TensorSpec, mark, value)

    def _unknown(self, node: fx.Node, args: Any, kwargs: Any) -> NodeCost:
        grad = any(isinstance(t, TensorSpec) and t.requires_grad for t in pytree.tree_leaves((args, kwargs)))
        leaves, structure = pytree.tree_flatten(node.meta.get("val"))
        fresh: list[int] = []
        outputs: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                outputs.append(
                    OutputSpec(
                        tuple(leaf.shape), leaf.stride(), leaf.dtype, grad and leaf.is_floating_point(),
                        None, len(fresh),
                    )
                )  # fmt: skip
                fresh.append(leaf.numel() * leaf.element_size())
            else:
                outputs.append(leaf)
        value = pytree.tree_unflatten(outputs, structure)
        return NodeCost((), (), tuple(fresh), (), (), 0, (), value, exact=False)

    def _attribute(self, node: fx.Node) -> Any:
        value: Any = self.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        self.costs[node] = NodeCost((), (), (), (), (), 0, (), None)
        self.saves[node] = []
        if not isinstance(value, torch.Tensor):
            return value
        return _spec(value, value.requires_grad, self._tensor(value))

    def _given(self, value: Any, node: fx.Node, *, requires_grad: bool) -> Any:
        def place(tensor: torch.Tensor) -> TensorSpec:
            return _spec(tensor, requires_grad, self._storage(node, tensor.numel() * tensor.element_size()))

        return pytree.tree_map_only(torch.Tensor, place, value)

    def _state(self, node: fx.Node) -> dict[str, torch.Tensor]:
        """Parameters and buffers that a node uses, by the name that its module has for them."""
        if node.op == "get_attr":
            value: Any = self.module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            return {str(node.target): value} if isinstance(value, torch.Tensor) else {}
        if node.op != "call_module":
            return {}
        module = self.module.get_submodule(str(node.target))
        return dict([*module.named_parameters(), *module.named_buffers()])

    def _used(self, node: fx.Node) -> dict[str, torch.Tensor]:
        """Parameters and buffers that a node uses, also those that it gets from attribute nodes."""
        used = {f"{node.target}.{name}": tensor for name, tensor in self._state(node).items()}
        for source in node.all_input_nodes:
            if source.op == "get_attr":
                used |= self._state(source)
        return used

    def _tensor(self, tensor: torch.Tensor) -> int:
        if id(tensor) not in self.of_tensor:
            self.of_tensor[id(tensor)] = self._storage(None, _nbytes(tensor))
        return self.of_tensor[id(tensor)]

    def _storage(self, maker: fx.Node | None, size: int) -> int:
        self.maker.append(maker)
        self.size.append(size)
        return len(self.maker) - 1

    def _activations(self) -> tuple[dict[fx.Node, int], dict[fx.Node, int]]:
        """Saved bytes at their maker, and saved bytes of model inputs at the first that saves them."""
        kept = {node: cost.saved_inside for node, cost in self.costs.items()}
        inputs = dict.fromkeys(self.costs, 0)
        seen: set[int] = set()
        for node, storages in self.saves.items():
            for storage in storages:
                maker = self.maker[storage]
                if maker is None or storage in seen:
                    continue
                seen.add(storage)
                if maker.op == "placeholder":
                    inputs[node] += self.size[storage]
                else:
                    kept[maker] += self.size[storage]
        return kept, inputs

    def _memory(self, node: fx.Node, cost: NodeCost) -> NodeMemory:
        reads = {t.storage for n in node.all_input_nodes for t in self._tensors(n)}
        gives = {t.storage for t in self._tensors(node)}
        return NodeMemory(
            reads=tuple(sorted(reads)),
            makes=tuple(sorted(s for s in gives if self.maker[s] is node)),
            saves=tuple(dict.fromkeys(self.saves[node])),
            gives=tuple(sorted(gives)),
            inside=cost.saved_inside,
            forward_peak=cost.forward_peak,
            backward_peak=cost.backward_peak,
        )

    def _tensors(self, node: fx.Node) -> list[TensorSpec]:
        return [t for t in pytree.tree_leaves(self.values[node]) if isinstance(t, TensorSpec)]

    def _assemble(self, specs: Sequence[DeviceSpec]) -> nx.DiGraph:
        graph = nx.DiGraph()
        kept, kept_inputs = self._activations()
        counted: set[int] = set()  # parameters and buffers that a node before has used
        read: set[str] = set()  # model inputs, likewise
        all_params: dict[str, tuple[int, int]] = {}
        trainable: set[str] = set()
        times: dict[tuple[int, int], float] = {}  # repeated nodes share their operators: time them once

        def seconds(ops: tuple[OpCost, ...], i: int) -> float:
            key = (id(ops), i)
            if key not in times:
                times[key] = sum(specs[i].op_time(op.flops, op.moved_bytes, op.dtype) for op in ops)
            return times[key]

        for node, cost in self.costs.items():
            params: list[str] = []
            sizes = {"params_bytes": 0, "gradient_bytes": 0, "buffer_bytes": 0}
            tensors = 0
            for local, tensor in self._used(node).items():
                name = self.names.get(id(tensor), local)
                if isinstance(tensor, nn.Parameter):
                    params.append(name)
                    all_params[name] = (tensor.numel(), _nbytes(tensor))
                if id(tensor) in counted:
                    continue
                counted.add(id(tensor))
                if not isinstance(tensor, nn.Parameter):
                    sizes["buffer_bytes"] += _nbytes(tensor)
                    continue
                sizes["params_bytes"] += _nbytes(tensor)
                if tensor.requires_grad:
                    trainable.add(name)
                    sizes["gradient_bytes"] += _nbytes(tensor)
                    tensors += 1
            out = self._tensors(node)
            # A parameter that the graph reads by name is no activation: stages share it.
            output_bytes = 0 if node.op == "get_attr" else sum(t.nbytes for t in out)
            returns = any(t.requires_grad for t in out)
            inputs = {
                n.name: sum(t.nbytes for t in self._tensors(n))
                for n in node.all_input_nodes
                if n.op == "placeholder"
            }
            graph.add_node(
                node.name,
                op=_what(node),
                kind=node.op,
                module=str(node.meta.get("module", "")),
                location=str(node.meta.get("location", "")),
                flops=sum(op.flops for op in cost.forward),
                backward_flops=sum(op.flops for op in cost.backward),
                params=tuple(params),
                **sizes,
                activation_bytes=kept[node] + kept_inputs[node],
                kept_bytes=kept[node],
                output_bytes=output_bytes,
                shapes=tuple((tuple(t.shape), str(t.dtype).removeprefix("torch.")) for t in out),
                differentiable=returns,
                transfer_bytes=output_bytes,
                transfer_time=max(spec.transfer_time(output_bytes) for spec in specs),
                exchange_time=max(spec.exchange_time(output_bytes, returns=returns) for spec in specs),
                model_inputs=inputs,
                first_input_bytes=sum(size for name, size in inputs.items() if name not in read),
                exact=cost.exact,
                memory=self._memory(node, cost),
                stage=None,
            )
            read |= inputs.keys()
            for i, spec in enumerate(specs):
                suffix = f"@{i}" if i else ""
                per_tensor = spec.launch_overhead * tensors if spec.kind == "cpu" else 0.0  # fused on GPUs
                graph.nodes[node.name].update(
                    {
                        f"forward_time{suffix}": seconds(cost.forward, i),
                        f"backward_time{suffix}": seconds(cost.backward, i),
                        f"sweep_time{suffix}": sizes["gradient_bytes"] / spec.memory_bandwidth + per_tensor,
                    }
                )
        for node in self.costs:
            for source in node.all_input_nodes:
                if source in self.costs:
                    # Any stage can hold a parameter: it does not have to come from a stage before.
                    graph.add_edge(source.name, node.name, precedence=source.op != "get_attr")
        graph.graph.update(
            specs=tuple(specs),
            params=all_params,
            trainable=frozenset(trainable),
            storages=dict(enumerate(self.size)),
            results=frozenset(n.name for n in self.module.graph.output_node().all_input_nodes),
        )
        return graph


class _Method:
    """``x.name(...)`` as a function; equal for equal names, so that repeated calls are recognised."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, this: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(this, self.name)(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Method) and other.name == self.name

    def __hash__(self) -> int:
        return hash((_Method, self.name))


def _spec(tensor: torch.Tensor, requires_grad: bool, storage: int) -> TensorSpec:
    return TensorSpec(tuple(tensor.shape), tensor.stride(), tensor.dtype, requires_grad, storage)


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _what(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """The model as it trains, frozen parts included (they override ``train``); afterwards as it was."""
    before = [(m, m.training) for m in model.modules()]
    model.train()
    try:
        yield
    finally:
        for m, flag in before:
            m.training = flag

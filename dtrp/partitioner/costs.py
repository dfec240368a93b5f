"""From a captured graph to the cost graph: what each node computes, keeps, sends, and how long that takes.

The nodes are the calls and attributes of the train graph; its placeholders are not nodes, because a model
input goes straight from the caller to each stage that reads it: each node says which ones it reads.

Who pays for saved memory: autograd saves tensors, many of them twice (a ReLU saves its result, the
convolution behind it saves the same tensor as its input). Each storage counts once, at the node that makes
it, if any node saves it: so the sum over any set of nodes is what a stage of these nodes keeps, *besides* its
inputs, which it stashes anyway. What autograd saves of the model's own inputs has no maker; it counts at the
first node that saves it, in ``activation_bytes`` but not in ``kept_bytes``.
"""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
import torch
from torch import fx, nn

from dtrp.partitioner.capture.graph import Captured
from dtrp.partitioner.cost_walk import CostWalk, nbytes
from dtrp.partitioner.devices import DeviceSpec
from dtrp.partitioner.links import Links
from dtrp.partitioner.measured import measure_nodes
from dtrp.partitioner.op_cost import OpCost


def cost_graph(
    captured: Captured,
    *,
    device: DeviceSpec | Sequence[DeviceSpec],
    bandwidth: float | Links | None = None,
    mode: str = "analytic",
    dtype: torch.dtype | None = None,
    inputs: Sequence[torch.Tensor] | None = None,
) -> nx.DiGraph:
    """The weighted graph that planning works on.

    Parameters
    ----------
    captured
        The model as graphs; nothing of it is computed, parameters may be on the meta device.
    device
        What the stages run on. Several: times are given for each (see Notes).
    bandwidth
        Bytes per second between stages; default: the device's own. `Links`: within nodes and between them.
    mode
        ``"analytic"``: FLOPs and bytes moved through the device's roofline. ``"measured"``: each node timed
        on the device at hand. ``"auto"``: analytic.
    dtype
        The autocast dtype that training will use, if any.
    inputs
        Tensors (on the meta device) of the sizes to price. Default: the example's.

    Returns
    -------
    networkx.DiGraph
        In topological order. Attributes of each node:

        - ``flops``, ``backward_flops``: of the forward and of the backward pass; ``forward_ops``,
          ``backward_ops``: how many operators they are.
        - ``forward_time``, ``backward_time``: seconds. ``sweep_time``: to read or write once what trains.
        - ``params_bytes``: of the parameters that it is the first to use; ``gradient_bytes``: of those of
          them that train; ``buffer_bytes``: buffers, likewise. ``params``: names of all that it uses.
        - ``activation_bytes``: saved for backward, as autograd keeps it, each storage once;
          ``kept_bytes``: the same without model inputs.
        - ``output_bytes``: of the tensors that it gives, ``shapes`` of these (and dtypes).
          ``transfer_bytes``, ``transfer_time``: to have them in another stage (none for parameters, which
          stages share); ``differentiable``: whether gradients come back; ``exchange_time``: with these. Of
          several devices, the slowest link counts. ``net_transfer_time``, ``net_exchange_time``: between
          nodes, where there are any.
        - ``model_inputs``: bytes of the model inputs that it reads, by placeholder;
          ``first_input_bytes``: of those that no node before it reads.
        - ``kind`` (as in fx), ``op``, ``module``, ``location``: what it is, and where in the user's code.
        - ``memory``: a `NodeMemory`, from which peaks are simulated.
        - ``exact``: False if it could not be run alone, ``sampled``: whether it ran on random numbers (see
          `NodeCost`).
        - ``stage``: ``None`` until planned.

        ``graph.graph`` holds ``specs`` (the devices), ``links``, ``mode``, ``params`` (elements and bytes by
        name), ``trainable`` (the names that train), ``storages`` (bytes) and ``results`` (the nodes that the
        model returns).

    Raises
    ------
    ValueError
        Unknown ``mode``, or a bandwidth that is not positive; a node cannot run with sizes other than the
        example's.

    Notes
    -----
    Time of a node: the sum over its aten operators of max(FLOPs / peak, bytes / bandwidth) + launch overhead.
    With several different devices, times for device i > 0 are in ``forward_time@i`` and so on.
    """
    if mode not in ("analytic", "measured", "auto"):
        raise ValueError(f"costs must be 'analytic', 'measured' or 'auto'; got {mode!r}")
    links = bandwidth if isinstance(bandwidth, Links) else Links(bandwidth)
    if links.node is not None and not links.node > 0:
        raise ValueError(f"bandwidth must be a positive number of bytes per second; got {bandwidth!r}")
    specs: list[DeviceSpec] = []
    for spec in [device] if isinstance(device, DeviceSpec) else device:
        if spec.with_link(links.node) not in specs:
            specs.append(spec.with_link(links.node))
    graph = _assemble(CostWalk(captured, dtype, inputs).run(), specs)
    graph.graph.update(mode="analytic" if mode == "auto" else mode, links=links)
    if links.net is not None:
        far = [spec.with_link(links.net) for spec in specs]
        for data in graph.nodes.values():
            size, returns = data["transfer_bytes"], data["differentiable"]
            data["net_transfer_time"] = max(spec.transfer_time(size) for spec in far)
            data["net_exchange_time"] = max(spec.exchange_time(size, returns=returns) for spec in far)
    if mode == "measured":
        bare = {spec.with_speed(1 / spec.speed).name: spec.with_speed(1 / spec.speed) for spec in specs}
        if len(bare) > 1:
            raise ValueError(
                f"costs='measured' needs stages on one kind of device; got {', '.join(s.name for s in specs)}"
            )
        measure_nodes(captured, graph, next(iter(bare.values())), dtype)
        for data in graph.nodes.values():
            for name in ("backward_time", "forward_time"):
                seconds = data[name]
                data |= {f"{name}@{i}" if i else name: seconds / spec.speed for i, spec in enumerate(specs)}
    return graph


def _assemble(walk: CostWalk, specs: Sequence[DeviceSpec]) -> nx.DiGraph:
    graph = nx.DiGraph()
    kept, kept_inputs = walk.activations()
    counted: set[int] = set()  # parameters and buffers that a node before has used
    read: set[str] = set()  # model inputs, likewise
    all_params: dict[str, tuple[int, int]] = {}
    trainable: set[str] = set()
    times: dict[tuple[int, int], float] = {}  # repeated nodes share their operators: time them once

    def seconds(ops: tuple[OpCost, ...], i: int) -> float:
        key = (id(ops), i)
        if key not in times:
            times[key] = sum(
                specs[i].op_time(
                    op.flops, op.moved_bytes, op.dtype, kernel=op.kernel, width=op.width, calls=op.calls
                )
                for op in ops
            )
        return times[key]

    for node, cost in walk.costs.items():
        params: list[str] = []
        sizes = {"params_bytes": 0, "gradient_bytes": 0, "buffer_bytes": 0}
        tensors = 0
        for local, tensor in walk.used(node).items():
            name = walk.names.get(id(tensor), local)
            if isinstance(tensor, nn.Parameter):
                params.append(name)
                all_params[name] = (tensor.numel(), nbytes(tensor))
            if id(tensor) in counted:
                continue
            counted.add(id(tensor))
            if not isinstance(tensor, nn.Parameter):
                sizes["buffer_bytes"] += nbytes(tensor)
                continue
            sizes["params_bytes"] += nbytes(tensor)
            if tensor.requires_grad:
                trainable.add(name)
                sizes["gradient_bytes"] += nbytes(tensor)
                tensors += 1
        out = walk.tensors(node)
        # A parameter that the graph reads by name is no activation: stages share it.
        output_bytes = 0 if node.op == "get_attr" else sum(t.nbytes for t in out)
        returns = any(t.requires_grad for t in out)
        inputs = {
            n.name: sum(t.nbytes for t in walk.tensors(n))
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
            forward_ops=len(cost.forward),
            backward_ops=len(cost.backward),
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
            sampled=cost.sampled,
            memory=walk.memory(node, cost),
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
    for node in walk.costs:
        for source in node.all_input_nodes:
            if source in walk.costs:
                # Any stage can hold a parameter: it does not have to come from a stage before.
                graph.add_edge(source.name, node.name, precedence=source.op != "get_attr")
    graph.graph.update(
        specs=tuple(specs),
        params=all_params,
        trainable=frozenset(trainable),
        storages=dict(enumerate(walk.size)),
        results=frozenset(n.name for n in walk.module.graph.output_node().all_input_nodes),
    )
    return graph


def _what(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))

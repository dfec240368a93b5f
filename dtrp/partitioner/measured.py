"""Node times by the clock: the model runs on the device, node by node, a few times.

The whole train graph runs forward, then backward, in its usual order and on live values, so that each node
finds caches and memory as it will in training. Every node has an autograd graph of its own (its inputs are
cut off from what made them), which is what lets its backward be timed alone. Of several repetitions the
fastest counts: whatever else the machine does only ever adds. What it costs to time (entering autograd once
per node) is measured on a node that does nothing, and taken off.

The model's buffers, modes and random state are as before afterwards; no gradient is left on its parameters.
"""

from __future__ import annotations

import copy
import logging
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import networkx as nx
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from dtrp import accelerators
from dtrp.partitioner.calibration import best_time, clock, identity, read_cache, using_threads, write_cache
from dtrp.partitioner.capture.gradients import is_gradient, region_of
from dtrp.partitioner.capture.graph import Captured
from dtrp.partitioner.capture.modes import in_mode
from dtrp.partitioner.capture.snapshot import untouched
from dtrp.partitioner.devices import DeviceSpec
from dtrp.partitioner.plan import fingerprint

log = logging.getLogger(__name__)

BUDGET = 6.0
"""Seconds that measuring may take, once a first run has warmed up."""

_LEAST, _MOST = 3, 40  # repetitions


def measure_nodes(
    captured: Captured,
    graph: nx.DiGraph,
    spec: DeviceSpec,
    dtype: torch.dtype | None = None,
    *,
    budget: float | None = None,
) -> None:
    """Replaces the times in a cost graph (of its first device) by measured ones.

    Parameters
    ----------
    captured
        The model; its parameters must hold numbers.
    graph
        From `cost_graph`; ``forward_time``, ``backward_time`` and ``sweep_time`` are set.
    spec
        The device; it must be here.
    dtype
        The autocast dtype, if any.
    budget
        Seconds, about; default: `BUDGET`.

    Raises
    ------
    ValueError
        The model is on the meta device, or the device is not here.
    """
    device = _place(spec)
    if any(t.is_meta for t in [*captured.model.parameters(), *captured.model.buffers()]):
        raise ValueError(
            "costs='measured' runs the model, and its parameters are on the meta device, without numbers; "
            "use costs='analytic', or a model with real parameters"
        )
    key = f"{fingerprint(captured)}|{identity(device, spec.threads)}|{dtype}"
    times = read_cache("measured", key)
    if times is None or set(times) != {*graph, "sweep"}:
        with using_threads(spec.threads):
            times = _Clock(captured, graph, device, dtype).run(BUDGET if budget is None else budget)
        accelerators.give_back(device)
        write_cache("measured", key, times)
    for node, data in graph.nodes(data=True):
        data["forward_time"], backward = times[node]
        # The gradient of ``x[i] = y`` finds no way back from node to node: what lies behind stays estimated.
        data["backward_time"] = backward or data["backward_time"]
        data["sweep_time"] = times["sweep"] * data["gradient_bytes"]


class _Clock:
    """Runs the graph node by node and keeps each node's least time, forward and backward."""

    def __init__(
        self, captured: Captured, graph: nx.DiGraph, device: torch.device, dtype: torch.dtype | None
    ) -> None:
        self.captured = captured
        self.costs = graph
        self.device = device
        self.clock = clock(torch.get_num_threads()) if device.type == "cpu" else time.perf_counter
        self.autocast: Callable[[], Any] = nullcontext
        if dtype is not None:
            self.autocast = lambda: torch.autocast(device.type, dtype=dtype)
        self.module: nn.Module = captured.train.module
        here = next((p.device for p in self.module.parameters()), device)
        if here != device and not (here.type == device.type == "cpu"):
            with in_mode(captured.model, captured.flags):
                self.module = copy.deepcopy(captured.train.module).to(device)
        self.nodes = list(captured.train.module.graph.nodes)
        placeholders = [n for n in self.nodes if n.op == "placeholder"]
        self.examples = dict(zip(placeholders, captured.example, strict=False))
        # Nodes that write to their inputs get copies; until these nodes are known, all do.
        self.writers: set[fx.Node] = set()
        self.in_place: set[fx.Node] | None = None
        self.spans: list[tuple[str, int, Any, Any]] = []

    def run(self, budget: float) -> dict[str, Any]:
        model, flags = self.captured.model, self.captured.flags
        with _as_it_was(model), in_mode(model, flags), torch.enable_grad():
            inputs = [self._example(n) for n in self.nodes if n.op == "placeholder"]
            self._once(inputs)  # warms up, and finds out which nodes work in place
            self.in_place = self.writers
            end = time.perf_counter() + budget
            runs: list[dict[str, list[float]]] = []
            while len(runs) < _LEAST or (len(runs) < _MOST and time.perf_counter() < end):
                self._once(inputs)
                runs.append(self._times())
            overhead = self._overhead()
            sweep = self._sweep()
        times: dict[str, Any] = {"sweep": sweep}
        forward, backward = (_least(runs, which, overhead * which) for which in (0, 1))
        for node in filter(is_gradient, self.nodes):  # it is the backward pass of others, and its own theirs
            region = region_of(node, model)
            inside = [n.name for n in region if n.name in self.costs and n is not node]
            forward[node.name] = sum(backward[n] for n in inside)
            backward[node.name] = sum(forward[n] + backward[n] for n in inside)
        for node in self.costs:
            times[node] = [forward[node], backward[node]]
        return times

    def _times(self) -> dict[str, list[float]]:
        """Seconds of each node in the last run, forward and backward."""
        if accelerators.is_one(self.device):
            accelerators.wait(self.device)
        times: dict[str, list[float]] = {n: [0.0, 0.0] for n in self.costs}
        for node, which, start, stop in self.spans:
            times[node][which] += self._seconds(start, stop)
        return times

    def _seconds(self, start: Any, stop: Any) -> float:
        on_device = accelerators.is_one(self.device)
        return accelerators.seconds(start, stop) if on_device else float(stop - start)

    def _once(self, inputs: Sequence[Any]) -> None:
        """One forward and one backward of the whole graph, node by node."""
        self.spans.clear()
        given = iter(inputs)
        values: dict[fx.Node, Any] = {}
        tape: list[tuple[fx.Node, list[tuple[fx.Node, int, torch.Tensor]], list[torch.Tensor], Any]] = []
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(str(node.target))(self.module)
            elif is_gradient(node):  # what it differentiates has been cut into nodes
                values[node] = pytree.tree_map_only(torch.Tensor, self._like, node.meta["val"])
                tape.append((node, [], [], None))
            elif node.op != "output":
                values[node] = self._forward(node, values, tape)
        gradients: dict[tuple[fx.Node, int], torch.Tensor] = {}
        for output in (n for n in self.nodes if n.op == "output"):
            for source in output.all_input_nodes:
                for i, leaf in enumerate(pytree.tree_leaves(values[source])):
                    if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                        gradients[source, i] = torch.ones_like(leaf)
        for node, sources, parameters, outputs in reversed(tape):
            if is_gradient(node):
                for source in node.all_input_nodes:
                    if values[source].requires_grad:
                        gradients.setdefault((source, 0), torch.ones_like(values[source]))
                continue
            self._backward(node, sources, parameters, outputs, gradients)

    def _forward(self, node: fx.Node, values: dict[fx.Node, Any], tape: list[Any]) -> Any:
        sources: list[tuple[fx.Node, int, torch.Tensor]] = []
        parameters: list[torch.Tensor] = []

        def take(source: fx.Node) -> Any:
            if source.op == "get_attr":
                value = values[source]
                if isinstance(value, torch.Tensor) and value.requires_grad:
                    parameters.append(value)
                return value
            leaves, structure = pytree.tree_flatten(values[source])
            taken = []
            for i, leaf in enumerate(leaves):
                if isinstance(leaf, torch.Tensor):
                    wants = leaf.requires_grad
                    leaf = leaf.detach()
                    if wants:
                        sources.append((source, i, leaf.requires_grad_()))
                    if self.in_place is None or node in self.in_place:
                        leaf = leaf.clone()
                taken.append(leaf)
            return pytree.tree_unflatten(taken, structure)

        arguments: dict[fx.Node, Any] = {}
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs),
            lambda n: arguments[n] if n in arguments else arguments.setdefault(n, take(n)),
        )
        args, kwargs = self._on_device(args), self._on_device(dict(kwargs))
        versions = [
            (t, t._version) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)
        ]
        target: Callable[..., Any]
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            parameters += [p for p in module.parameters() if p.requires_grad]
            target = module
        elif node.op == "call_method":
            this, *args = args
            target = getattr(this, str(node.target))
        else:
            target = node.target  # type: ignore[assignment]
        with self._timed(node.name, 0), self.autocast():
            value = target(*args, **kwargs)
        if self.in_place is None and any(t._version != version for t, version in versions):
            self.writers.add(node)
        tape.append((node, sources, parameters, value))
        return pytree.tree_map_only(torch.Tensor, _cut_off, value)

    def _backward(
        self,
        node: fx.Node,
        sources: Sequence[tuple[fx.Node, int, torch.Tensor]],
        parameters: Sequence[torch.Tensor],
        value: Any,
        gradients: dict[tuple[fx.Node, int], torch.Tensor],
    ) -> None:
        pairs = [
            (leaf, gradients.pop((node, i)))
            for i, leaf in enumerate(pytree.tree_leaves(value))
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad and (node, i) in gradients
        ]
        wanted = [leaf for _, _, leaf in sources] + list(parameters)
        if not pairs or not wanted:
            return
        with self._timed(node.name, 1):
            found: Sequence[torch.Tensor | None] = torch.autograd.grad(
                [leaf for leaf, _ in pairs], wanted, [gradient for _, gradient in pairs], allow_unused=True
            )
        for (source, i, _), gradient in zip(sources, found, strict=False):
            if gradient is None:
                continue
            if (source, i) in gradients:
                with self._timed(source.name, 1) if source.name in self.costs else nullcontext():
                    gradients[source, i] = gradients[source, i] + gradient
            else:
                gradients[source, i] = gradient

    @contextmanager
    def _timed(self, node: str, which: int) -> Iterator[None]:
        if accelerators.is_one(self.device):
            start = accelerators.mark(self.device, timed=True)
            yield
            self.spans.append((node, which, start, accelerators.mark(self.device, timed=True)))
        else:
            begun = self.clock()
            yield
            self.spans.append((node, which, begun, self.clock()))

    def _overhead(self) -> float:
        """Seconds that entering autograd for one node takes, on a node that does nothing."""
        leaf = torch.ones(1, device=self.device, requires_grad=True)
        gradient = torch.ones(1, device=self.device)
        least = float("inf")
        for _ in range(200):
            same = leaf.view_as(leaf)
            self.spans.clear()
            with self._timed("", 1):
                torch.autograd.grad([same], [leaf], [gradient], allow_unused=True)
            if accelerators.is_one(self.device):
                accelerators.wait(self.device)
            _, _, start, stop = self.spans[0]
            least = min(least, self._seconds(start, stop))
        return least

    def _sweep(self) -> float:
        """Seconds per byte to read or write what trains, of an in-place update over all parameters."""
        trained = [p.detach() for p in self.module.parameters() if p.requires_grad and p.is_floating_point()]
        if not trained:
            return 0.0
        gradients = [torch.zeros_like(p) for p in trained]
        n_bytes = sum(p.numel() * p.element_size() for p in trained)

        def update() -> None:
            torch._foreach_add_(trained, gradients)  # reads two, writes one

        with torch.no_grad():
            return best_time(update, self.device, budget=0.2) / (3 * n_bytes)

    def _on_device(self, arguments: Any) -> Any:
        return pytree.tree_map_only(torch.device, lambda _: self.device, arguments)

    def _example(self, node: fx.Node) -> Any:
        """The example's numbers for a model input; on the meta device normal ones, or zeros."""

        given = self.examples.get(node)
        if given is not None and not given.is_meta:
            return given.detach().to(self.device, copy=True)
        return pytree.tree_map_only(torch.Tensor, self._like, node.meta["val"])

    def _like(self, fake: torch.Tensor) -> torch.Tensor:
        made = torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype, device=self.device)
        made = made.normal_() if fake.is_floating_point() else made.zero_()
        return made.requires_grad_(fake.requires_grad)


def _least(runs: Sequence[dict[str, list[float]]], which: int, overhead: float) -> dict[str, float]:
    """Seconds of each node that add up to those of the fastest run.

    The least times of many nodes come from different moments, and no run is lucky everywhere: their sum would
    be too small. They say how the fastest run's time is shared out.
    """

    def clean(seconds: float) -> float:
        return max(seconds - overhead, 0.2 * seconds)

    least = {node: clean(min(run[node][which] for run in runs)) for node in runs[0]}
    fastest = min(sum(clean(times[which]) for times in run.values()) for run in runs)
    scale = fastest / sum(least.values()) if any(least.values()) else 0.0
    return {node: seconds * scale for node, seconds in least.items()}


def _cut_off(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory without its history; what gradient it wants is remembered."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Buffers, modes, random state: nothing that running the model changes stays changed."""
    with untouched(model):
        buffers = [(b, b.detach().clone()) for b in model.buffers()]
        try:
            yield
        finally:
            for buffer, before in buffers:
                buffer.detach().copy_(before)


def _place(spec: DeviceSpec) -> torch.device:
    if spec.kind == "cpu":
        return torch.device("cpu")
    for device in accelerators.here():
        if accelerators.name(device) == spec.name:
            return device
    raise ValueError(
        f"costs='measured' runs the model on the device, and there is no {spec.name} here; use "
        f"costs='analytic' to plan for a device that is not at hand"
    )

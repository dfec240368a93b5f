"""How good plans are: certified gaps over a zoo of models, and what simpler ways of cutting give.

    python benchmarks/plan_quality.py [--models resnet50 gpt ...] [--stages 2 4 8] [--device A100-80GB]

For each model and number of stages: the plan's gap to its lower bound, the seconds that planning took (after
capture and costs), and the tick time of four other contiguous partitions of the same graph, under the same
costs, relative to the plan's: stages of equal parameters, of equal FLOPs, of equal numbers of layers, and the
best cut between the model's blocks for equal time (as torchgpipe's ``balance_by_time`` does it: Barany and
Grolmusz's block partition, here by dynamic programming). Models are built on the meta device if they can be.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial

import networkx as nx
import torch
from decoder import GPT
from torch import nn

from dtrp.partitioner.capture import capture
from dtrp.partitioner.costs import cost_graph
from dtrp.partitioner.devices import device_spec
from dtrp.partitioner.hazards import find_hazards
from dtrp.partitioner.planner import make_plan
from dtrp.partitioner.report import PartitionReport
from dtrp.partitioner.stage_cost import stage_costs

TRANSFORMERS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "gpt (12 x 768)": lambda: (GPT(768, 12, 12, 50304), torch.zeros(4, 512, dtype=torch.int64)),
    "gpt (24 x 1024)": lambda: (GPT(1024, 24, 16, 50304), torch.zeros(4, 512, dtype=torch.int64)),
    "gpt (8 x 4096)": lambda: (GPT(4096, 8, 32, 50304), torch.zeros(4, 512, dtype=torch.int64)),
    "gpt (96 x 512)": lambda: (GPT(512, 96, 8, 50304), torch.zeros(4, 512, dtype=torch.int64)),
}
BASELINES = ("parameters", "FLOPs", "layers", "blocks")


def vision(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model of torchvision with a batch of 16 images."""
    import torchvision

    size = 299 if "inception" in name else 224
    kwargs = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, **kwargs), torch.zeros(16, 3, size, size)


def models(names: Sequence[str]) -> dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]]:
    """The models to plan: the whole zoo unless names are given."""
    import torchvision

    zoo: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = dict(TRANSFORMERS)
    zoo |= {n: partial(vision, n) for n in torchvision.models.list_models(module=torchvision.models)}
    unknown = set(names) - set(zoo)
    if unknown:
        sys.exit(f"unknown models: {', '.join(sorted(unknown))}; known: {', '.join(zoo)}")
    return {n: zoo[n] for n in names} if names else zoo


def legal_cuts(graph: nx.DiGraph, groups: Collection[Collection[str]]) -> list[int]:
    """Positions in the graph's order where a cut splits no group."""
    position = {n: i for i, n in enumerate(graph)}
    inside = [0] * (len(graph) + 1)
    for group in groups:
        at = [position[n] for n in group]
        for i in range(min(at) + 1, max(at) + 1):
            inside[i] = 1
    return [i for i in range(1, len(graph)) if not inside[i]]


def equal_shares(graph: nx.DiGraph, weight: dict[str, float], cuts: Sequence[int], k: int) -> dict[str, int]:
    """Cut where the running sum comes closest to each k-th of the whole."""
    sums = [0.0]
    for n in graph:
        sums.append(sums[-1] + weight[n])
    chosen: list[int] = []
    for j in range(1, k):
        left = [c for c in cuts if not chosen or c > chosen[-1]]
        left = left[: len(left) - (k - 1 - j)]  # later stages need cuts too
        chosen.append(min(left, key=lambda c: abs(sums[c] - j * sums[-1] / k)))
    return _assignment(graph, chosen)


def block_partition(
    graph: nx.DiGraph, weight: dict[str, float], cuts: Sequence[int], k: int
) -> dict[str, int]:
    """The cut between blocks (modules two levels down) that minimises the largest sum of weights."""
    nodes = list(graph)
    block = [".".join(graph.nodes[n]["module"].split(".")[:2]) for n in nodes]
    borders = [0, *(c for c in cuts if block[c] != block[c - 1]), len(nodes)]
    if len(borders) - 1 < k:
        borders = [0, *cuts, len(nodes)]
    sums = [0.0]
    for n in nodes:
        sums.append(sums[-1] + weight[n])
    at = [sums[b] for b in borders]
    n = len(borders) - 1
    best = [[float("inf")] * (n + 1) for _ in range(k + 1)]
    back = [[0] * (n + 1) for _ in range(k + 1)]
    best[0][0] = 0.0
    for j in range(1, k + 1):
        for end in range(j, n + 1):
            for start in range(j - 1, end):
                value = max(best[j - 1][start], at[end] - at[start])
                if value < best[j][end]:
                    best[j][end], back[j][end] = value, start
    chosen, end = [], n
    for j in range(k, 1, -1):
        end = back[j][end]
        chosen.append(borders[end])
    return _assignment(graph, chosen[::-1])


def _assignment(graph: nx.DiGraph, cuts: Sequence[int]) -> dict[str, int]:
    return {n: sum(i >= c for c in cuts) for i, n in enumerate(graph)}


def baselines(graph: nx.DiGraph, cuts: Sequence[int], k: int) -> dict[str, float]:
    """Tick time of each of the simpler partitions."""
    data = dict(graph.nodes(data=True))
    weights = {
        "parameters": {n: float(d["params_bytes"]) for n, d in data.items()},
        "FLOPs": {n: float(d["flops"] + d["backward_flops"]) for n, d in data.items()},
        "layers": {n: float(d["kind"] == "call_module") for n, d in data.items()},
    }
    spent = {n: d["forward_time"] + d["backward_time"] for n, d in data.items()}
    assigned = {name: equal_shares(graph, weight, cuts, k) for name, weight in weights.items()}
    assigned["blocks"] = block_partition(graph, spent, cuts, k)
    return {name: max(c.tick for c in stage_costs(graph, s, (False,) * k)) for name, s in assigned.items()}


def main() -> None:
    """Prints a table and its summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=[])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--device", default="A100-80GB")
    parser.add_argument("--time-limit", type=float, default=5.0, help="seconds of planning for each")
    args = parser.parse_args()
    spec = device_spec(args.device)
    gaps: dict[int, list[float]] = {k: [] for k in args.stages}
    times: dict[int, list[float]] = {k: [] for k in args.stages}
    worse: dict[str, list[float]] = {name: [] for name in BASELINES}
    heads = " ".join(f"{name:>10}" for name in BASELINES)
    print(f"{'model':22} {'K':>2} {'tick ms':>9} {'gap':>7} {'balance':>7} {'seconds':>7}  {heads}")
    for name, make in models(args.models).items():
        try:
            with torch.device("meta"):
                model, x = make()
        except (NotImplementedError, RuntimeError):  # its constructor needs numbers
            model, x = make()
        captured = capture(model, (x,))
        graph, hazards = cost_graph(captured, device=spec), find_hazards(captured)
        for k in args.stages:
            start = time.perf_counter()
            try:
                plan = make_plan(captured, graph, hazards, k, recompute=False, time_limit=args.time_limit)
            except ValueError as e:
                print(f"{name:22} {k:2} {e}")
                continue
            seconds = time.perf_counter() - start
            report = PartitionReport.of(captured, graph, plan)
            others = baselines(graph, legal_cuts(graph, plan.groups), k)
            ratios = {other: tick / report.tick_time for other, tick in others.items()}
            gaps[k].append(report.gap)
            times[k].append(seconds)
            for other, ratio in ratios.items():
                worse[other].append(ratio)
            shown = " ".join(f"{ratios[other]:9.2f}x" for other in BASELINES)
            print(
                f"{name:22} {k:2} {report.tick_time * 1e3:9.2f} {report.gap:7.2%} {report.balance:7.3f} "
                f"{seconds:7.2f}  {shown}"
            )
            if report.gap > 0.1:
                print(f"{'':25} {report.reason}")
            sys.stdout.flush()
    for k in args.stages:
        if gaps[k]:
            ninetieth = sorted(gaps[k])[int(0.9 * (len(gaps[k]) - 1))]
            print(f"K = {k}: {len(gaps[k])} models", end=", ")
            print(f"gap median {statistics.median(gaps[k]):.2%}, 90th percentile {ninetieth:.2%}", end="; ")
            print(f"seconds median {statistics.median(times[k]):.1f}, most {max(times[k]):.1f}")
    for name, ratios_of in worse.items():
        if ratios_of:
            middle, most = statistics.median(ratios_of), max(ratios_of)
            print(f"equal {name}: median {middle:.2f} times our tick, most {most:.2f}")


if __name__ == "__main__":
    main()

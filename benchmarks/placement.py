"""Published device-placement problems solved by `dtrp.partitioner.partition`, beside the best known results.

    python benchmarks/placement.py GRAPH.json... --out DIR [--time-limit S]

The files are the workloads of Tarnawski, Phanishayee, Devanur, Mahajan, Nina Paravecino, "Efficient
Algorithms for Device Placement of DNN Graph Operators" (NeurIPS 2020): ``maxFPGAs`` accelerators of
``maxSizePerFPGA`` bytes; nodes with ``fpgaLatency``, ``size``, ``isBackwardNode`` and ``colorClass`` (nodes
of one class share a device); edges with a ``cost`` that is paid once by the device that sends a node's result
and once by every device that receives it. The load of a device is the sum of its latencies and of what it
pays; the largest is minimised. Forward nodes must be split contiguously; backward nodes go where their colour
class goes.

For every graph DIR/<name>.json holds ``max_load`` (computed here from the assignment, by this definition),
``lower_bound``, ``seconds`` and ``stage`` (node id -> accelerator).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import networkx as nx
from rich.console import Console
from rich.table import Table

from dtrp.partitioner import Partition, partition

# (best known with accelerators only, whether it was found by an exact method, human experts' split)
BEST_KNOWN: Mapping[str, tuple[float, bool, float | None]] = {
    "layer_bert24_training": (41.7458, True, 49.405),
    "layer_resnet50_training": (80.4549, True, 112.108),
    "layer_gnmt_inference": (32.9107, True, 46.209),
    "layer_inceptionv3_inference": (52.4185, False, 102.482),
    "operator_bert_l-3_training": (65.3031, True, None),
    "operator_resnet50_inference": (128.0735, True, None),
}


def read_graph(data: Mapping[str, Any]) -> tuple[nx.DiGraph, list[list[Any]]]:
    """The graph of a problem, and its colour classes."""
    graph: nx.DiGraph = nx.DiGraph()
    classes: dict[Any, list[Any]] = defaultdict(list)
    for node in data["nodes"]:
        graph.add_node(node["id"], time=node["fpgaLatency"], memory=node["size"])
        if node.get("colorClass") is not None:
            classes[node["colorClass"]].append(node["id"])
    backward = {node["id"] for node in data["nodes"] if node.get("isBackwardNode")}
    for edge in data["edges"]:
        u, v = edge["sourceId"], edge["destId"]
        graph.add_edge(u, v, transfer=edge["cost"], precedence=u not in backward and v not in backward)
    return graph, [alike for alike in classes.values() if len(alike) > 1]


def solve(data: Mapping[str, Any], *, time_limit: float) -> Partition:
    """The best partition found within the time limit."""
    graph, classes = read_graph(data)
    return partition(
        graph,
        data["maxFPGAs"],
        overlap=False,
        memory_limit=data["maxSizePerFPGA"],
        colocate=classes,
        allow_empty=True,
        time_limit=time_limit,
    )


def max_load(data: Mapping[str, Any], stage: Mapping[Any, int]) -> float:
    """The largest load of an assignment, straight from the problem's definition."""
    load: dict[int, float] = defaultdict(float)
    for node in data["nodes"]:
        load[stage[node["id"]]] += node["fpgaLatency"]
    cost: dict[Any, float] = defaultdict(float)
    receivers: dict[Any, set[int]] = defaultdict(set)
    for edge in data["edges"]:
        u, v = edge["sourceId"], edge["destId"]
        cost[u] = max(cost[u], edge["cost"])
        if stage[u] != stage[v]:
            receivers[u].add(stage[v])
    for u, stages in receivers.items():
        for device in (stage[u], *stages):
            load[device] += cost[u]
    return max(load.values())


def run(path: Path, out: Path, time_limit: float) -> dict[str, Any]:
    """Solve one file and write its result."""
    data = json.loads(path.read_text())
    start = time.perf_counter()
    found = solve(data, time_limit=time_limit)
    seconds = time.perf_counter() - start
    load = max_load(data, found.stage_of)
    result = {
        "max_load": load,
        "lower_bound": min(found.lower_bound, load),  # the same sum in another order may be larger
        "seconds": seconds,
        "stage": {str(node): stage for node, stage in found.stage_of.items()},
    }
    (out / path.name).write_text(json.dumps(result, indent=1))
    return {**result, "nodes": len(data["nodes"]), "stages": data["maxFPGAs"], "engine": found.engine}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("graphs", nargs="+", type=Path, metavar="GRAPH.json")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the results go")
    parser.add_argument("--time-limit", type=float, default=16.0, metavar="S", help="seconds per graph")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    table = Table(title="Largest load (smaller is better)")
    for name in ("graph", "nodes", "stages", "ours", "lower bound", "gap", "best known", "human", "seconds"):
        table.add_column(name, justify="left" if name == "graph" else "right", no_wrap=True)
    for path in args.graphs:
        result = run(path, args.out, args.time_limit)
        load, bound = result["max_load"], result["lower_bound"]
        best, exact, human = BEST_KNOWN.get(path.stem, (None, True, None))
        table.add_row(
            path.stem,
            str(result["nodes"]),
            str(result["stages"]),
            f"{load:.4f}",
            f"{bound:.4f}",
            f"{load / bound - 1:.2%}" if bound else "-",
            "-" if best is None else f"{best:.4f}{'' if exact else ' ~'} ({load / best - 1:+.2%})",
            "-" if human is None else f"{human:.3f}",
            f"{result['seconds']:.1f}",
        )
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table)
    console.print("~ best known by a method that is not exact")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What ``dtrp plan`` says of training on a cluster that is not here."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrp.partitioner.report import PartitionReport
    from dtrp.simulation.cluster import Cluster
    from dtrp.simulation.result import Simulation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that simulate."""
    parser.add_argument(
        "--cluster", metavar="FILE", help="plan for the links of a JSON file, and simulate training there"
    )
    parser.add_argument(
        "--schedule", choices=("fig1", "lean", "1f1b", "gpipe", "bp"), help="its order (default: fig1)"
    )
    parser.add_argument("--micro-batches", type=int, metavar="M", help="parts of each batch (default: 1)")
    parser.add_argument(
        "--figure", metavar="FILE", help="draw simulated throughput over the numbers of --compare-k"
    )


def cluster(args: argparse.Namespace) -> Cluster | None:
    """What was given; ``None``: nothing is to be simulated.

    Raises
    ------
    ValueError
        There is no such file, or it describes no cluster; options that need one.
    """
    from dtrp.simulation.cluster import Cluster

    if args.cluster is None:
        for name in ("schedule", "micro_batches", "figure"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name.replace('_', '-')} simulates: say on what, --cluster FILE")
        return None
    try:
        return Cluster.load(args.cluster)
    except OSError as e:
        raise ValueError(f"--cluster: {args.cluster} cannot be read: {e.strerror}") from None


def links(on: Cluster | None) -> dict[str, float | int] | None:
    """What to plan for where the command line says nothing of links: those of the cluster."""
    if on is None or on.node is None:
        return None
    if on.net is None or on.per_node is None or on.net.bandwidth > on.node.bandwidth:
        return {"node": on.node.bandwidth, "net": on.node.bandwidth, "nodes": 1}
    return {"node": on.node.bandwidth, "net": on.net.bandwidth, "per_node": on.per_node}


def run(report: PartitionReport, on: Cluster, args: argparse.Namespace, ks: Sequence[int]) -> Simulation:
    """Simulate, and draw if asked to."""
    from dtrp.simulation.run import simulate

    found = simulate(report, on, schedule=args.schedule, micro_batches=args.micro_batches)
    if args.figure is not None:
        found.plot(args.figure, **({"ks": ks} if ks else {}))
    return found

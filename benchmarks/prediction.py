"""Predicted against measured: tick time of each stage, balance, and peak memory, on this machine's CPU.

    python benchmarks/prediction.py [--models resnet50 ...] [--stages 2 4] [--costs measured]

Each model is planned with measured costs, then trained for a few batches, stage after stage in this process
with one thread (so that the stages do not disturb each other), and each stage's time per tick is compared
with the prediction for the optimizer that is used.

Times are the thread's own, which stop while others have the core; a loaded machine still disturbs them
through its caches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from decoder import GPT
from torch import nn
from torch.nn import functional as F

import dtrp
from dtrp.partitioner.stage_cost import StageCost, stage_costs
from dtrp.runtime import meter

OPTIMIZER_BYTES = 1.0  # SGD with momentum, below
BATCHES = 6


def _vision(name: str, batch: int, size: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    import torchvision

    return (
        getattr(torchvision.models, name)(),
        torch.randn(batch, 3, size, size),
        torch.randint(1000, (batch,)),
    )


def _gpt() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    tokens = torch.randint(8192, (2, 256))
    return GPT(), tokens, tokens


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor, torch.Tensor]]] = {
    "resnet50": partial(_vision, "resnet50", 4, 224),
    "mobilenet_v3_large": partial(_vision, "mobilenet_v3_large", 8, 224),
    "vit_b_16": partial(_vision, "vit_b_16", 2, 224),
    "gpt": _gpt,
}


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy over the last dimension."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


def run(name: str, n_stages: int, costs: str, recompute: bool | str) -> list[tuple[StageCost, float]]:
    """Each stage's predicted costs and its measured seconds per tick."""
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    pipe = dtrp.compile(
        model, n_stages, example_inputs=x, devices=["cpu"] * n_stages, costs=costs, recompute=recompute
    )
    predicted = stage_costs(
        pipe.graph, pipe.plan.stage_of, pipe.plan.recompute, optimizer_bytes=OPTIMIZER_BYTES
    )
    optimizer = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
    spent: dict[tuple[int, int], float] = {}
    # The stages run one after the other in this thread: its own clock leaves out what else the machine does.
    with (
        mock.patch.object(meter.time, "perf_counter", time.thread_time),
        pipe.trainer(loss, optimizer, executor="inline", record=True) as trainer,
    ):
        for _ in range(2 * n_stages + BATCHES):
            trainer.step(x, y)
        trainer.flush()
        for event in trainer.events:
            if event.kind != "wait":
                key = (event.stage, event.tick)
                spent[key] = spent.get(key, 0.0) + event.end - event.start
    # Only ticks with the pipeline full: both a forward and a backward part.
    full = range(2 * n_stages - 2, 2 * n_stages + BATCHES)
    return [(p, statistics.median(spent[p.stage, t] for t in full)) for p in predicted]


def main() -> None:
    """Prints a table and the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--costs", choices=("analytic", "measured"), default="measured")
    parser.add_argument("--recompute", choices=("auto", "yes", "no"), default="yes")
    args = parser.parse_args()
    recompute = "auto" if args.recompute == "auto" else args.recompute == "yes"
    torch.set_num_threads(1)
    errors = []
    print(f"{'model':20} {'K':>2}  {'predicted s':30} {'measured s':30} {'median error':>12} {'balance':>8}")
    for name in args.models:
        for n_stages in args.stages:
            pairs = run(name, n_stages, args.costs, recompute)
            error = [abs(p.compute / measured - 1) for p, measured in pairs]
            errors += error
            ticks = [measured for _, measured in pairs]
            balance = sum(ticks) / len(ticks) / max(ticks)
            print(
                f"{name:20} {n_stages:2}  {' '.join(f'{p.compute:.3f}' for p, _ in pairs):30} "
                f"{' '.join(f'{t:.3f}' for t in ticks):30} {statistics.median(error):12.1%} {balance:8.3f}"
            )
            sys.stdout.flush()
    print(f"median error over all stages {statistics.median(errors):.1%}")


if __name__ == "__main__":
    main()

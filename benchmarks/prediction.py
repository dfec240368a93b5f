"""Predicted against measured: tick time of each stage, balance, and peak memory, on this machine's CPU.

    python benchmarks/prediction.py [--models resnet50 ...] [--stages 2 4] [--costs measured]

Each model is planned with measured costs, then trained for a few batches, stage after stage in this process
with one thread (so that the stages do not disturb each other), and each stage's time per tick is compared
with the prediction for the optimizer that is used.

    python benchmarks/prediction.py --workers [--models resnet20 ...] [--stages 1 2 4] [--rounds 3]

With worker processes: the time per batch of the whole pipeline, predicted when the model was planned,
against the clock (the median batch); and each stage's tick against the processor time that it took, which
other work on the machine hardly touches. The models are those of peers.py, and those above. Each row is
planned and run several times (--rounds), all rows once before any a second time, as the speed of a shared
machine wanders for minutes; its error is that of the median round, with the least and the most beside it.
Each round tries its stages anew: of earlier ones only the costs of single nodes are kept.

Times are the thread's own, which stop while others have the core; a loaded machine still disturbs them
through its caches. Peak memory is that of every allocation the profiler sees (see allocations.py).
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from allocations import peaks
from decoder import GPT
from peers import CASES
from peers import loss as of_tokens
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import dtrp
from dtrp.partitioner.calibration import cache_directory
from dtrp.partitioner.stage_cost import StageCost, stage_costs
from dtrp.partitioner.training import Training
from dtrp.runtime import meter
from dtrp.runtime.stage import Stage

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests say how to look inside a trainer

from tests.runtime.inside import stages

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
    "densenet121": partial(_vision, "densenet121", 4, 224),
    "efficientnet_b0": partial(_vision, "efficientnet_b0", 8, 224),
    "convnext_tiny": partial(_vision, "convnext_tiny", 4, 224),
    "gpt": _gpt,
}


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy over the last dimension."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


class Measured(NamedTuple):
    """One stage: what was predicted of it, and what it took."""

    predicted: StageCost
    seconds: float  # computing, per tick
    peak: int  # bytes


def run(name: str, n_stages: int, costs: str, recompute: bool | str) -> list[Measured]:
    """Each stage's predicted costs, its measured seconds per tick and its measured peak."""
    torch.manual_seed(0)
    model, x, y = MODELS[name]()
    pipe = dtrp.compile(
        model, n_stages, example_inputs=x, devices=["cpu"] * n_stages, costs=costs, recompute=recompute
    )
    predicted = stage_costs(pipe.graph, pipe.plan.stage_of, pipe.plan.recompute, training=Training(1.0))
    optimizer = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
    spent: dict[tuple[int, int], float] = {}
    # The stages run one after the other in this thread: its own clock leaves out what else the machine does.
    with (
        mock.patch.object(meter.time, "perf_counter", time.thread_time),
        pipe.trainer(loss, optimizer, executor="inline", threads=1, record=True) as trainer,
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
    seconds = [statistics.median(spent[stage, t] for t in full) for stage in range(n_stages)]

    with pipe.trainer(loss, optimizer, executor="inline", threads=1) as trainer:

        def train() -> Sequence[Stage]:
            for _ in range(2 * n_stages + 1):
                trainer.step(x, y)
            trainer.flush()
            return stages(trainer)

        peak = peaks(train)
    return [Measured(*of_stage) for of_stage in zip(predicted, seconds, peak, strict=True)]


class Round(NamedTuple):
    """One run on worker processes, in seconds."""

    predicted: float  # per batch
    seconds: float
    ticks: list[float]  # of each stage, predicted
    spent: list[float]  # processor time of each


def throughput(name: str, n_stages: int, costs: str) -> Round:
    """Plans a model anew, and trains it for a while."""
    for tried in cache_directory().glob("trial-*"):
        tried.unlink()
    torch.manual_seed(0)
    if name in CASES:
        model, (x, y), criterion = CASES[name].model(), CASES[name].batches()[0], of_tokens
    else:
        model, x, y = MODELS[name]()
        criterion = loss
    pipe = dtrp.compile(model, n_stages, example_inputs=x, devices=["cpu"] * n_stages, costs=costs)
    optimizer = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
    fill = 2 * n_stages
    with pipe.trainer(
        criterion, optimizer, executor="workers", seed=0, rebalance=False, record=True
    ) as trainer:
        for _ in range(fill + 2):
            trainer.step(x, y)
        trainer.flush()
        before, start, done = trainer.stats, time.perf_counter(), 0
        while done < fill + 8 or (time.perf_counter() - start < 4 and done < 300):
            trainer.step(x, y)
            done += 1
        trainer.flush()
        # From one update of the first stage to another, while the pipeline was full.
        ends = [e.end for e in trainer.events if e.stage == 0 and e.kind == "step"][fill + 2 :]
        full = ends[1 : len(ends) - fill + 2]
        seconds = statistics.median(b - a for a, b in itertools.pairwise(full))  # bursts of others left out
        window = [now.since(then) for now, then in zip(trainer.stats, before, strict=True)]
        parts = trainer.config.micro_batches
        assert isinstance(parts, int)
        spent = [s.cpu_time / s.counts["forward"] * parts for s in window]
        report = trainer.report
        return Round(report.predicted_time, seconds, [s.predicted_tick for s in report.stages], spent)


def print_throughput(models: Sequence[str], stages: Sequence[int], costs: str, rounds: int) -> None:
    """A row for each model and number of stages, then the errors."""
    found: dict[tuple[str, int], list[Round]] = {row: [] for row in itertools.product(models, stages)}
    for turn in range(rounds):
        for row in tqdm(found, desc=f"round {turn + 1} of {rounds}", disable=None):
            found[row].append(throughput(*row, costs))
    heads = ("model", "K", "ms per batch, predicted", "clock", "error", "rounds", "ticks, predicted", "spent")
    print(f"| {' | '.join(heads)} |\n|---|{'--:|' * (len(heads) - 1)}")
    clock, processor = [], []
    for (name, n_stages), runs in found.items():
        errors = sorted(r.predicted / r.seconds - 1 for r in runs)
        clock.append(abs(statistics.median(errors)))
        pairs = [list(zip(r.ticks, r.spent, strict=True)) for r in runs]
        of_stages = list(zip(*pairs, strict=True))
        processor += [abs(statistics.median(tick / spent - 1 for tick, spent in of)) for of in of_stages]
        cells = (
            name,
            str(n_stages),
            f"{statistics.median(r.predicted for r in runs) * 1e3:.1f}",
            f"{statistics.median(r.seconds for r in runs) * 1e3:.1f}",
            f"{clock[-1]:.1%}",
            f"{errors[0]:+.0%} to {errors[-1]:+.0%}",
            *(
                " ".join(f"{statistics.median(p[i] for p in of) * 1e3:.1f}" for of in of_stages)
                for i in (0, 1)
            ),
        )
        print(f"| {' | '.join(cells)} |", flush=True)
    for what, values in (("time per batch", clock), ("processor time of a stage", processor)):
        print(f"\n{what}: median error {statistics.median(values):.1%}, most {max(values):.1%}")


def main() -> None:
    """Prints a table and the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=[*MODELS, *CASES], default=list(MODELS))
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--workers", action="store_true", help="throughput on worker processes")
    parser.add_argument("--rounds", type=int, default=3, help="with --workers: runs of each row")
    parser.add_argument("--costs", choices=("analytic", "measured"), default="measured")
    parser.add_argument("--recompute", choices=("auto", "yes", "no"), default="auto")
    args = parser.parse_args()
    recompute = "auto" if args.recompute == "auto" else args.recompute == "yes"
    torch.set_num_threads(1)
    if args.workers:
        with tempfile.TemporaryDirectory() as cache:  # nothing that was measured before counts
            os.environ["XDG_CACHE_HOME"] = cache
            print_throughput(args.models, args.stages, args.costs, args.rounds)
        return
    heads = ("ms, predicted", "ms, measured", "error", "balance", "MB, predicted", "MB, measured", "error")
    print("| model | K | " + " | ".join(heads) + " |\n|---|--:|" + "--:|" * len(heads))
    errors: dict[str, list[float]] = {"time": [], "memory": []}
    for name in args.models:
        for n_stages in args.stages:
            stages = run(name, n_stages, args.costs, recompute)
            time_error = [abs(s.predicted.compute / s.seconds - 1) for s in stages]
            memory_error = [abs(s.predicted.peak / s.peak - 1) for s in stages]
            errors["time"] += time_error
            errors["memory"] += memory_error
            ticks = [s.seconds for s in stages]
            cells = (
                name,
                str(n_stages),
                " ".join(f"{s.predicted.compute * 1e3:.0f}" for s in stages),
                " ".join(f"{t * 1e3:.0f}" for t in ticks),
                f"{statistics.median(time_error):.1%}",
                f"{sum(ticks) / len(ticks) / max(ticks):.3f}",
                " ".join(f"{s.predicted.peak / 1e6:.0f}" for s in stages),
                " ".join(f"{s.peak / 1e6:.0f}" for s in stages),
                f"{statistics.median(memory_error):.1%}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)
    for what, values in errors.items():
        print(
            f"\n{what}: median error over all stages {statistics.median(values):.1%}, most {max(values):.1%}"
        )


if __name__ == "__main__":
    main()

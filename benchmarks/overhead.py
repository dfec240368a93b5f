"""What the runtime itself costs: time above the plain loop where stages have next to nothing to compute.

    python benchmarks/overhead.py [--rounds 7] [--batches 300] [--parts inline workers mlp] [--json F]
    python benchmarks/overhead.py --parts inline --gate 7     # exit code 1 above 7 times the plain loop's CPU

- inline: K linear layers of 8x8, one per stage, batch 4, all stages in this process. CPU time of the process
  per batch, less the plain loop's, over K. The scheme itself costs something: a second forward pass in every
  stage but the last, an optimizer and a backward call per stage. So there is also a loop by hand that does
  just this, one batch at a time, without prediction: what no runtime can go below by much.
- workers: the same stages, each in a process of its own. Wall time per batch above the plain loop.
- mlp: 50 layers of 256 with ReLU at batch 64 on two workers, cut after 21 layers: throughput over the plain
  loop's. With backward = 2 forward the slower stage does 87/150 of the plain loop's work.

The plain loop has the same model, optimizer and batches, one thread, and the allocator settings that workers
get. It and the pipeline take turns, and the pipeline is filled and drained within its turn, which is compared
with the plain loop's of the same round. Only the public interface is used, so that the same file measures
other versions. CPU times hardly feel what else the machine does; wall times need free cores.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # before torch is loaded; processes that are started here inherit it
    # The allocator's are those of dtrp's workers, written out: every version meets the same plain loop.
    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
    settings |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.environ.update(settings)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # glibc reads them when a process starts

import argparse
import inspect
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp

Batch = tuple[Tensor, Tensor]
OPTIMIZER = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
STAGES = (1, 2, 4)
TINY, TINY_BATCH = 8, 4
LAYERS, WIDTH, WIDE_BATCH, CUT = 50, 256, 64, 21
WARM_UP = 30  # batches
PARTS = ("inline", "workers", "mlp")


class Spent(NamedTuple):
    """Seconds per batch, of the clock and of this process."""

    wall: float
    cpu: float


class Row(NamedTuple):
    """One figure, round after round."""

    part: str
    stages: int
    what: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.values)


def tiny(layers: int) -> nn.Sequential:
    """Linear layers of 8x8."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(TINY, TINY) for _ in range(layers)))


def wide() -> nn.Sequential:
    """50 layers of 256 with ReLU, whose gradients neither vanish nor become denormal numbers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(LAYERS):
        linear = nn.Linear(WIDTH, WIDTH)
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers)


def random_batches(size: int, width: int) -> list[Batch]:
    """Vectors and classes."""
    g = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, width, generator=g), torch.randint(width, (size,), generator=g)) for _ in range(8)
    ]


def timed(
    work: Callable[[Tensor, Tensor], object], end: Callable[[], object], turn: Sequence[Batch]
) -> Spent:
    """Give ``work`` the batches of a turn, then ``end`` it."""
    wall, cpu = time.perf_counter(), time.process_time()
    for x, y in turn:
        work(x, y)
    end()
    return Spent((time.perf_counter() - wall) / len(turn), (time.process_time() - cpu) / len(turn))


def nothing() -> None:
    """The end of a loop that leaves nothing in flight."""


def plain_loop(model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """One batch of the plain loop."""
    optimizer = OPTIMIZER(model.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def by_hand(model: nn.Sequential) -> Callable[[Tensor, Tensor], None]:
    """One batch of what every runtime of this scheme must do, a stage per layer."""
    optimizers = [OPTIMIZER(layer.parameters()) for layer in model]

    def step(x: Tensor, y: Tensor) -> None:
        inputs = [x]
        with torch.no_grad():
            for layer in model[:-1]:
                inputs.append(layer(inputs[-1]))
        gradient = None
        for k in reversed(range(len(model))):
            given = inputs[k].requires_grad_(k > 0)
            output = model[k](given)
            if gradient is None:
                output = F.cross_entropy(output, y)
            output.backward(gradient)
            gradient, given.grad = given.grad, None
            optimizers[k].step()
            optimizers[k].zero_grad()

    return step


def start(pipe: dtrp.Pipeline, executor: str, schedule: str) -> dtrp.Trainer:
    """A trainer in one order; arguments that this version does not have are left out."""
    wanted: dict[str, Any] = {"schedule": schedule, "micro_batches": 1, "rebalance": False}
    known = inspect.signature(pipe.trainer).parameters
    options = {name: value for name, value in wanted.items() if name in known}
    return pipe.trainer(F.cross_entropy, OPTIMIZER, executor=executor, seed=0, threads=1, **options)


def compiled(model: nn.Module, stages: int, batch: Batch, plan: dtrp.Plan | None = None) -> dtrp.Pipeline:
    """The model in so many stages, which recompute."""
    return dtrp.compile(
        model,
        n_gpus=stages,
        devices=["cpu"] * stages,
        example_inputs=batch[0],
        recompute=True,
        costs="analytic",
        plan=plan,
    )


def wide_pipeline(batch: Batch) -> dtrp.Pipeline:
    """The 50 layers, cut after 21 of them, whatever the planner says."""
    model = wide()
    plan = compiled(model, 2, batch).plan
    plan = plan.pin(str(2 * CUT - 1), 0).pin(str(2 * CUT), 1)
    return compiled(model, 2, batch, plan)


class Contest:
    """The plain loop and what is compared with it, taking turns."""

    def __init__(self, plain: nn.Module, batches: list[Batch], count: int) -> None:
        self.turn = [batches[i % len(batches)] for i in range(count)]
        self.plain = plain_loop(plain)

    def rounds(
        self, n: int, work: Callable[[Tensor, Tensor], object], end: Callable[[], object]
    ) -> list[tuple[Spent, Spent]]:
        """Per round what the plain loop spent and what the other did."""
        timed(self.plain, nothing, self.turn[:WARM_UP])
        timed(work, end, self.turn[:WARM_UP])
        return [(timed(self.plain, nothing, self.turn), timed(work, end, self.turn)) for _ in range(n)]


def tiny_rows(executor: str, rounds: int, count: int, schedule: str) -> list[Row]:
    """Stages with nothing to compute."""
    rows = []
    batches = random_batches(TINY_BATCH, TINY)
    for stages in STAGES:
        contest = Contest(tiny(stages), batches, count)
        pipe = compiled(tiny(stages), stages, batches[0])
        with start(pipe, executor, schedule) as trainer:
            seen = contest.rounds(rounds, trainer.step, trainer.flush)
        if executor == "workers":
            above = [(ours.wall - plain.wall) * 1e3 for plain, ours in seen]
            plains = [plain.wall * 1e3 for plain, _ in seen]
            rows += [
                Row(executor, stages, "wall above plain", "ms per batch", above),
                Row(executor, stages, "plain, wall", "ms per batch", plains),
            ]
            continue
        hand = contest.rounds(rounds, by_hand(tiny(stages)), nothing)
        rows += [
            Row(executor, stages, what, "ms per stage-tick", [_above(*pair) / stages for pair in pairs])
            for what, pairs in (("CPU above plain", seen), ("by hand above plain", hand))
        ]
        plains = [plain.cpu * 1e3 for plain, _ in seen]
        rows += [
            Row(executor, stages, "plain, CPU", "ms per batch", plains),
            Row(executor, stages, "CPU over plain", "times", [ours.cpu / plain.cpu for plain, ours in seen]),
        ]
    return rows


def _above(plain: Spent, ours: Spent) -> float:
    return (ours.cpu - plain.cpu) * 1e3


def wide_rows(rounds: int, count: int, schedule: str) -> list[Row]:
    """Stages with something to compute, on two workers."""
    batches = random_batches(WIDE_BATCH, WIDTH)
    contest = Contest(wide(), batches, count)
    with start(wide_pipeline(batches[0]), "workers", schedule) as trainer:
        seen = contest.rounds(rounds, trainer.step, trainer.flush)
    return [
        Row("mlp", 2, "throughput over plain", "times", [plain.wall / ours.wall for plain, ours in seen]),
        Row("mlp", 2, "plain, wall", "ms per batch", [plain.wall * 1e3 for plain, _ in seen]),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each")
    parser.add_argument("--batches", type=int, default=300, help="per turn (mlp: a third)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--schedule", default="fig1", help="where the version has a choice")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--gate", type=float, metavar="TIMES", help="most of inline's CPU time over plain")
    args = parser.parse_args()
    if args.gate is not None and "inline" not in args.parts:
        parser.error("--gate judges the part inline")

    torch.set_num_threads(1)
    load = os.getloadavg()
    print(
        f"load average {load[0]:.1f}, {load[1]:.1f}, {load[2]:.1f} on {os.cpu_count()} cores before starting"
    )
    print(f"{'part':8} {'K':>2} {'what':24} {'median':>9}   {'least':>9} to {'most':>9}")
    rows: list[Row] = []
    for part in args.parts:
        if part == "mlp":
            found = wide_rows(args.rounds, max(1, args.batches // 3), args.schedule)
        else:
            found = tiny_rows(part, args.rounds, args.batches, args.schedule)
        rows += found
        for row in found:
            print(
                f"{row.part:8} {row.stages:2} {row.what:24} {row.median:9.3f}   {min(row.values):9.3f} to "
                f"{max(row.values):9.3f} {row.unit}",
                flush=True,
            )
    if args.json is not None:
        about = {
            "rounds": args.rounds,
            "batches": args.batches,
            "schedule": args.schedule,
            "dtrp": dtrp.__version__,
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "load_average": load,
        }
        numbers = [{**row._asdict(), "median": row.median} for row in rows]
        args.json.write_text(json.dumps({**about, "rows": numbers}, indent=1) + "\n")
    if args.gate is None:
        return 0
    # The least of the rounds: what else runs on the machine can only add to it, and adds to both.
    most = max(min(row.values) for row in rows if row.what == "CPU over plain")
    verdict = "above" if most > args.gate else "within"
    print(f"gate: {most:.2f} times the plain loop's CPU time, {verdict} {args.gate:g}")
    return int(most > args.gate)


if __name__ == "__main__":
    sys.exit(main())

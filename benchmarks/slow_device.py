"""A stage's core gets a busy neighbour in the middle of a run: are its cuts moved, and what does that give?

    python benchmarks/slow_device.py [--model thin] [--batches 100] [--look 20]

Two worker processes, pinned to a core each. After a third of the batches, a process that computes for ever is
pinned to the core of stage 1, whose ticks then take about twice as long; after another third it ends. Printed
are the milliseconds per batch of each part of the run, with ``rebalance=False`` and with it, and the moves.
Wants two cores without other work.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import dtrp
from dtrp.runtime import rebalance

sys.path.insert(0, str(Path(__file__).parent))
from peers import CASES, OPTIMIZER, Case, loss

SECTIONS = 12


def run(case: Case, batches: int, look: int | bool) -> tuple[list[float], dtrp.TrainingReport]:
    """Seconds per batch of each part of the run, and its report."""
    data = case.batches()
    pipe = dtrp.compile(
        case.model(), 2, example_inputs=data[0][0], devices=["cpu"] * 2, costs="measured", recompute=True
    )
    neighbour: subprocess.Popen[bytes] | None = None
    found = []
    options: dict[str, Any] = {"rebalance": look, "micro_batches": 1, "executor": "workers", "seed": 0}
    with pipe.trainer(loss, OPTIMIZER, threads=1, **options) as trainer:
        trainer._rebalancer._cost = 0.0  # runs that matter are longer than this one
        trainer.step(*data[0])
        crew: Any = trainer._run.executor
        for k, process in enumerate(crew.crew.processes):
            os.sched_setaffinity(process.pid, {sorted(os.sched_getaffinity(0))[k]})
        for part in range(SECTIONS):
            if part == SECTIONS // 3:
                neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                os.sched_setaffinity(neighbour.pid, {sorted(os.sched_getaffinity(0))[1]})
            if part == 2 * SECTIONS // 3 and neighbour is not None:
                neighbour.kill()
                neighbour.wait()
            start = time.perf_counter()
            for i in range(batches):
                trainer.step(*data[i % len(data)])
            trainer.flush()
            found.append((time.perf_counter() - start) / batches)
        return found, trainer.report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=CASES, default="thin")
    parser.add_argument("--batches", type=int, default=100, help="in each of the parts of a run")
    parser.add_argument("--look", type=int, default=20, help="rebalance=")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rebalance.A_MOVE = 0.0
    print(
        f"load average {os.getloadavg()[0]:.1f}, a neighbour in parts {SECTIONS // 3 + 1} to "
        f"{2 * SECTIONS // 3} of {SECTIONS}"
    )
    for name, look in (("fixed", False), ("moved", args.look)):
        seconds, report = run(CASES[args.model], args.batches, look)
        print(f"{name}: {' '.join(f'{s * 1e3:.1f}' for s in seconds)} ms per batch")
        for move in report.moves:
            print(f"  {move}")


if __name__ == "__main__":
    main()

"""Simulated against measured throughput: two stages in worker processes, every order.

Each model is planned once (``costs="measured"``), then trained with each order, in turns. Seconds per batch
are those between the first stage's updates, filling and draining left out, compared with `dtrp.simulate`

- of the plan, before anything has run: the simulator's error and that of the plan's times together;
- of the work that the stages themselves have measured in the same run (`Trainer.stats`): what is left is the
  simulator's own, that is, whether it waits where stages wait.

    python benchmarks/simulator.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp
from dtrp.partitioner.profile import Profile, StageProfile
from dtrp.runtime.stats import StageStats

sys.path.insert(0, str(Path(__file__).parent))
from decoder import GPT
from throughput import cifar_model

ORDERS: dict[str, dict[str, Any]] = {
    "fig1": {"schedule": "fig1"},
    "lean": {"schedule": "lean"},
    "lean, 4 parts": {"schedule": "lean", "micro_batches": 4},
    "1f1b, 4 parts": {"method": "1f1b", "micro_batches": 4},
    "gpipe, 4 parts": {"method": "gpipe", "micro_batches": 4},
}
OPTIMIZER = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
WARM = 6  # batches before anything is measured


@dataclass(frozen=True)
class Case:
    """A model and its batches."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy


def _of_tokens(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def _tokens() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 8192, (4, 257))
    return tokens[:, :-1], tokens[:, 1:].contiguous()


CASES = (
    Case(
        "ResNet-20, batch 128",
        partial(cifar_model, "resnet20"),
        lambda: (torch.randn(128, 3, 32, 32), torch.randint(0, 10, (128,))),
    ),
    Case("GPT, 6 layers of 384, batch 4 of 256", partial(GPT, layers=6), _tokens, _of_tokens),
)


def measured_profile(planned: Profile, stats: Sequence[StageStats], parts: int) -> Profile:
    """What stages have measured, in the terms of a plan; what they spend on messages is in their own time."""
    stages = []
    for k, one in enumerate(stats):
        batches = one.counts["forward"] / parts
        each = {kind: seconds / batches for kind, seconds in one.seconds.items()}
        passes = 2 if each.get("recompute", 0.0) else 1
        beside = sum(each.get(kind, 0.0) for kind in ("send", "receive", "loop"))
        stages.append(
            StageProfile(
                forward=(each["forward"] + each.get("recompute", 0.0)) / passes,
                backward=each["backward"],
                sweep=each["step"] / 3,
                loop=beside / parts,
                inputs=planned.stages[k].inputs,
            )
        )
    return Profile(tuple(stages), planned.messages, overlaps=False)


def train(
    case: Case, pipe: dtrp.Pipeline, knobs: dict[str, Any], batches: int
) -> tuple[float, list[StageStats]]:
    """Seconds per batch between the first stage's updates, and what stages measured meanwhile."""
    data = [case.batch() for _ in range(4)]
    with pipe.trainer(case.loss, OPTIMIZER, executor="workers", seed=0, record=True, **knobs) as trainer:
        for i in range(WARM):
            trainer.step(*data[i % 4])
        trainer.flush()
        before = trainer.stats
        for i in range(batches):
            trainer.step(*data[i % 4])
        trainer.flush()
        work = [after.since(early) for after, early in zip(trainer.stats, before, strict=True)]
        ends = [e.end for e in trainer.events if e.stage == 0 and e.kind == "step"][WARM:]
    steady = ends[1:-2]
    return (steady[-1] - steady[0]) / (len(steady) - 1), work


def compare(case: Case, rounds: int, batches: int) -> list[dict[str, Any]]:
    """A row per order."""
    torch.manual_seed(0)
    pipe = dtrp.compile(
        case.model(), 2, example_inputs=case.batch()[0], devices=["cpu"] * 2, costs="measured", recompute=True
    )
    print(pipe.report, flush=True)
    plan = pipe.plan
    assert plan.profile is not None
    rows: dict[str, dict[str, Any]] = {
        name: {"model": case.name, "order": name, "measured": [], "own": [], "plan": []} for name in ORDERS
    }
    for _ in range(rounds):
        for name, knobs in ORDERS.items():
            how = {
                "schedule": knobs.get("method", knobs.get("schedule")),
                "micro_batches": knobs.get("micro_batches", 1),
            }
            seconds, stats = train(case, pipe, {"micro_batches": 1, **knobs}, batches)
            own = dtrp.simulate(
                measured_profile(plan.profile, stats, how["micro_batches"]),
                **how,
                optimizer_bytes=0.0,
                predicts=False,
            )
            row = rows[name]
            row["measured"].append(seconds)
            row["own"].append(own.batch_time)
            row["plan"].append(dtrp.simulate(plan, **how, optimizer_bytes=1.0).batch_time)
            print(
                f"{case.name}, {name}: {seconds * 1e3:.1f} ms, of own work {own.batch_time * 1e3:.1f}",
                flush=True,
            )
    return list(rows.values())


def show(rows: Sequence[dict[str, Any]]) -> None:
    """As a table: medians, and the median of the errors of each turn."""
    print(
        "\n| model | order | ms per batch, measured | simulated, of the stages' own work | error "
        "| of the plan | error |"
    )
    print("|---|---|--:|--:|--:|--:|--:|")
    for row in rows:
        line = f"| {row['model']} | {row['order']} | {statistics.median(row['measured']) * 1e3:.0f} "
        for kind in ("own", "plan"):
            errors = [a / b - 1 for a, b in zip(row[kind], row["measured"], strict=True)]
            line += f"| {statistics.median(row[kind]) * 1e3:.0f} | {statistics.median(errors):+.1%} "
        print(line + "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each order")
    parser.add_argument("--batches", type=int, default=24, help="per turn")
    parser.add_argument("--only", help="models whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for case in CASES
        if args.only is None or args.only in case.name
        for row in compare(case, args.rounds, args.batches)
    ]
    show(rows)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""Seconds until back-propagation's loss: plain loop, 1F1B, GPipe and dtrp on worker processes, in one run.

    python benchmarks/study/clock.py --images FOLDER [--epochs 4] [--out docs/results/clock]

All train ResNet-8 with GroupNorm in two stages (no statistics over a batch: exact orders train what the plain
loop does) from the same weights on the same batches, an epoch each in turn, so that a machine that becomes
slower becomes so for all. The plain loop has one thread, as each stage has. Seconds are of the wall clock,
from an epoch's first batch until its last one is trained; starting the workers is in them, compiling is not.
Needs two free cores.
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # as workers' are, for all alike; before torch is loaded
    import sys

    settings = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.environ.update(settings)
        os.execv(sys.executable, [sys.executable, *sys.argv])

import argparse
import csv
import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import optimizers
import torch
from run import ROOT, data_of, model_of, rate_of, where
from runs import Run, images
from torch.optim.lr_scheduler import LambdaLR

import dtrp

WAYS: dict[str, dict[str, Any]] = {
    "1f1b, 4 parts": {"method": "1f1b", "micro_batches": 4},
    "gpipe, 4 parts": {"method": "gpipe", "micro_batches": 4},
    "default": {},
}

Epoch = Callable[[int], list[float]]
"""Trains one, and gives its losses."""


def plain(run: Run, batches_of: Any, loss_fn: Any) -> Epoch:
    """The loop that everybody writes."""
    model = model_of(run)
    optimizer = optimizers.BY_NAME[run.optimizer](model.parameters())
    scheduler = LambdaLR(optimizer, rate_of(run))

    def epoch_of(epoch: int) -> list[float]:
        losses = []
        for x, y in batches_of(epoch):
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.item())
        return losses

    return epoch_of


def piped(trainer: dtrp.Trainer, batches_of: Any) -> Epoch:
    """A pipeline's."""

    def epoch_of(epoch: int) -> list[float]:
        before = len(trainer.losses)
        for batch in batches_of(epoch):
            trainer.step(*batch)
        trainer.flush()
        return trainer.losses[before:]

    return epoch_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", help="folder with CIFAR-10")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "clock")
    args = parser.parse_args()
    torch.set_num_threads(1)
    run = replace(images("resnet-8-gn", 2), label="clock", epochs=args.epochs)
    batches_of, _, loss_fn = data_of(run, args.images)
    rows = []
    with ExitStack() as stack:
        ways = {"plain": plain(run, batches_of, loss_fn)}
        for way, options in WAYS.items():
            pipe = dtrp.compile(
                model_of(run), devices=["cpu"] * run.stages, example_inputs=next(iter(batches_of(0)))[0]
            )
            trainer = pipe.trainer(
                loss_fn,
                optimizers.BY_NAME[run.optimizer],
                lr_scheduler=partial(LambdaLR, lr_lambda=rate_of(run)),
                executor="workers",
                threads=1,
                seed=run.seed,
                **options,
            )
            ways[way] = piped(stack.enter_context(trainer), batches_of)
        seconds = dict.fromkeys(ways, 0.0)
        for epoch in range(run.epochs):
            for way, epoch_of in ways.items():
                started = time.perf_counter()
                losses = epoch_of(epoch)
                seconds[way] += time.perf_counter() - started
                loss = math.fsum(losses) / len(losses)
                rows.append({"way": way, "epoch": epoch + 1, "seconds": round(seconds[way], 2), "loss": loss})
                print(rows[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / f"{run.group}.csv").open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {json.dumps({'run': asdict(run), 'where': where()})}\n")
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

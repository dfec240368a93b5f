"""A long run, and many short ones of random operations, on worker processes.

    python benchmarks/soak.py --ticks 10000 --interleavings 300 [--markdown docs/soak.md]

The long run: a small model on four workers. Resident memory and descriptors of every process are read every
500 ticks; after a warm-up of 1,000 they must be flat (within 2 %, and not one descriptor more). Each batch's
loss must come once and in order: the loss function returns the batch's number.

The short ones: sequences of step, evaluate, flush, save, load, train() and eval(), drawn at random, are done
on worker processes and inline; after each sequence weights, buffers, losses and results must be equal.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests say how to look inside a trainer

from tests.runtime.inside import processes

WARM = 1000
EVERY = 500
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def make_model(norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [
            nn.Linear(32, 32),
            nn.BatchNorm1d(32) if norm else nn.Identity(),
            nn.Tanh(),
            nn.Dropout(0.1),
        ]
    return nn.Sequential(*layers, nn.Linear(32, 4))


def number_of(output: Tensor, target: Tensor) -> Tensor:
    """The batch's number, with the gradient of a square error."""
    error = (output - target[:, 1:]).square().mean()
    return error + (target[0, 0] - error).detach()


def long_run(ticks: int) -> list[str]:
    """The rows of a table; raises where something grows or is lost."""
    model = make_model(norm=False).double()
    x = torch.randn(16, 32, dtype=torch.double)
    pipe = dtrp.compile(model, n_gpus=4, example_inputs=x)
    seen: dict[str, list[tuple[int, int]]] = {}
    begun = time.perf_counter()
    with pipe.trainer(number_of, SGD, executor="workers", seed=0, threads=1) as trainer:
        reported = 0
        for tick in range(ticks):
            target = torch.zeros(16, 5, dtype=torch.double)
            target[:, 0] = tick
            trainer.step(x, target)
            new = trainer.losses[reported:]
            assert new == [float(b) for b in range(reported, reported + len(new))], "a loss out of order"
            reported += len(new)
            if tick == 0:
                workers = [psutil.Process(pid) for pid in processes(trainer)]
                watched = {"caller": psutil.Process(), **{f"stage {k}": p for k, p in enumerate(workers)}}
            if tick + 1 >= WARM and (tick + 1) % EVERY == 0:
                for name, process in watched.items():
                    seen.setdefault(name, []).append((process.memory_info().rss, process.num_fds()))
                print(f"{tick + 1:6d} ticks, {time.perf_counter() - begun:6.0f} s", flush=True)
        trainer.flush()
        assert trainer.losses == [float(b) for b in range(ticks)], "a loss is missing"
    rows = [
        "| process | MB after warm-up | MB at the end | largest change | descriptors, first and last |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, samples in seen.items():
        (first, descriptors), (last, descriptors_last) = samples[0], samples[-1]
        change = max(abs(rss - first) for rss, _ in samples) / first
        size = f"{first / 1e6:.1f} | {last / 1e6:.1f} | {change:.2%}"
        rows.append(f"| {name} | {size} | {descriptors}, {descriptors_last} |")
        assert change <= 0.02, f"{name}'s memory is not flat: {samples}"
        assert descriptors_last <= descriptors, f"{name} has more descriptors: {samples}"
    return [
        *rows,
        "",
        f"{ticks:,} ticks in {time.perf_counter() - begun:.0f} s; each loss came once, in order.",
    ]


class Actor:
    """One trainer and its model, told what to do."""

    def __init__(self, executor: str, folder: Path) -> None:
        self.model = make_model()
        self.pipe = dtrp.compile(self.model, n_gpus=3, example_inputs=torch.randn(8, 32))
        self.trainer = self.pipe.trainer(F.cross_entropy, SGD, executor=executor, seed=0, threads=1)
        self.path = folder / f"{executor}.ckpt"

    def do(self, what: str, draw: int) -> Any:
        g = torch.Generator().manual_seed(draw)

        def batch(size: int) -> tuple[Tensor, Tensor]:
            return torch.randn(size, 32, generator=g), torch.randint(0, 4, (size,), generator=g)

        match what:
            case "step":
                self.trainer.step(*batch(2 + draw % 8))
            case "evaluate":
                return self.trainer.evaluate([batch(4), batch(3)])
            case "flush":
                self.trainer.flush()
                return list(self.trainer.losses)
            case "save":
                self.trainer.save(self.path)
            case "load":
                if self.path.exists():
                    self.trainer.load(self.path)
                    return list(self.trainer.losses)
            case "train":
                self.pipe.train()
            case "eval":
                self.pipe.eval()
        return None


def interleavings(count: int, seed: int = 0) -> str:
    """Raises at the first difference."""
    rng = random.Random(seed)
    operations = ["step"] * 8 + ["evaluate", "flush", "save", "load", "train", "eval"]
    done: dict[str, int] = {}
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        actors = [Actor(kind, Path(folder)) for kind in ("workers", "inline")]
        with actors[0].trainer, actors[1].trainer:
            for i in range(count):
                for _ in range(rng.randint(4, 16)):
                    what, draw = rng.choice(operations), rng.randrange(2**31)
                    done[what] = done.get(what, 0) + 1
                    results = [actor.do(what, draw) for actor in actors]
                    assert results[0] == results[1], (i, what, results)
                for actor in actors:
                    actor.trainer.sync()
                states = [actor.model.state_dict() for actor in actors]
                for name, value in states[0].items():
                    assert torch.equal(value, states[1][name]), (i, name)
                if (i + 1) % 50 == 0:
                    print(f"{i + 1:6d} interleavings, {time.perf_counter() - begun:6.0f} s", flush=True)
            for actor in actors:
                actor.trainer.flush()
            assert actors[0].trainer.losses == actors[1].trainer.losses
    what = ", ".join(f"{n} {name}" for name, n in sorted(done.items()))
    return f"{count} random interleavings ({what}): workers and inline equal, bit for bit, after each."


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ticks", type=int, default=10_000)
    parser.add_argument("--interleavings", type=int, default=300)
    parser.add_argument("--markdown", type=Path, help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = []
    if args.interleavings:
        parts.append(interleavings(args.interleavings))
        print(parts[-1], flush=True)
    if args.ticks:
        parts.append("\n".join(long_run(args.ticks)))
        print(parts[-1], flush=True)
    if args.markdown:
        hardware = f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
        parts.append(f"`python {' '.join(sys.argv)}` on {hardware}, other work going on beside it.")
        args.markdown.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

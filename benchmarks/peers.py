"""dtrp against its peers on one machine's cores: the same model, batches and optimizer, in turns.

    python benchmarks/peers.py [--models resnet20 gpt] [--rounds 5] [--seconds 6] [--json F]
    python benchmarks/peers.py --quick          # a minute or two: does it run?

Contestants, all with the allocator settings of dtrp's workers and one thread per process, on two cores:

- plain, 1 and 2 threads: the loop that everybody writes, in one process.
- DDP: DistributedDataParallel over gloo, two processes, each with half of every batch.
- GPipe, 1F1B: torch.distributed.pipelining, two processes. Cuts and numbers of micro-batches are tried first,
  and the fastest of each schedule takes part.
- dtrp: as `pipe.trainer` chooses by itself, with costs="measured"; the same with re-computation in every
  stage (the paper's way); and the first with its cuts moved by what its stages take (rebalance=).

Each contestant lives in processes of its own that do nothing while it is not their turn. Turns alternate, so
that all meet the machine in the same state; a turn fills and drains its pipeline. What counts is the time of
a contestant's turn against plain training's with one thread in the same round: median, least and most of the
rounds. BatchNorm sees the samples that a contestant's parts have: DDP's halves, the pipelines' micro-batches.
"""

from __future__ import annotations

import os
import sys

from dtrp.runtime.processes import KEEP_FREED_MEMORY

if __name__ == "__main__":  # before torch is loaded; processes that are started here inherit it
    settings = {**KEEP_FREED_MEMORY, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.environ.update(settings)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # glibc reads them when a process starts

import argparse
import contextlib
import json
import multiprocessing
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp
from dtrp.runtime import rebalance

sys.path.insert(0, str(Path(__file__).parent))
from decoder import Block
from throughput import cifar_model

OPTIMIZER = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
Batch = tuple[Tensor, Tensor]
BATCHES = 4  # different ones
PARTS = (2, 4, 8)
WARM_UP = 4


class Positions(nn.Module):
    """Tokens and their places."""

    def __init__(self, words: int, width: int) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(words, width), nn.Embedding(512, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens) + self.position(torch.arange(tokens.shape[1]))


class Laid(nn.Module):
    """The same values in another layout."""

    def __init__(self, layout: torch.memory_format) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and x.is_leaf:  # as a stage receives it: the gradient goes back through gloo
            x.register_hook(Tensor.contiguous)
        return x.contiguous(memory_format=self.layout)


class Flat(nn.Module):
    """A row per token, for the loss."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if x.dim() == 3 else x


def _resnet(name: str) -> list[nn.Module]:
    model: Any = cifar_model(name)
    blocks = [nn.Sequential(model.conv, model.bn, nn.ReLU()), *model.layers]
    return [*blocks, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head)]


def _mobilenet() -> list[nn.Module]:
    from torchvision.models import mobilenet_v3_large

    model = mobilenet_v3_large()
    return [*model.features, nn.Sequential(model.avgpool, nn.Flatten(), model.classifier)]


def _gpt(width: int = 384, layers: int = 12, words: int = 8192) -> list[nn.Module]:
    blocks = [Block(width, width // 64) for _ in range(layers)]
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, words, bias=False), Flat())
    return [Positions(words, width), *blocks, head]


def _thin(layers: int = 50, width: int = 256) -> list[nn.Module]:
    return [*(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(layers)), nn.Linear(width, 10)]


def _images(batch: int, size: int, classes: int, generator: torch.Generator) -> Batch:
    return (
        torch.randn(batch, 3, size, size, generator=generator),
        torch.randint(classes, (batch,), generator=generator),
    )


def _tokens(batch: int, length: int, words: int, generator: torch.Generator) -> Batch:
    tokens = torch.randint(words, (batch, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _vectors(batch: int, width: int, generator: torch.Generator) -> Batch:
    return torch.randn(batch, width, generator=generator), torch.randint(10, (batch,), generator=generator)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy over samples or tokens."""
    return F.cross_entropy(output, target.flatten())


@dataclass(frozen=True)
class Case:
    """A model as consecutive blocks, and its batches; importable by name in every process."""

    name: str
    blocks: Callable[[], list[nn.Module]]
    batch: Callable[[torch.Generator], Batch]
    channels_last: bool = False

    def model(self) -> nn.Sequential:
        """The same weights in every process."""
        torch.manual_seed(0)
        model = nn.Sequential(*self.blocks())
        return model.to(memory_format=torch.channels_last) if self.channels_last else model

    def batches(self) -> list[Batch]:
        """The same in every process."""
        generator = torch.Generator().manual_seed(0)
        made = [self.batch(generator) for _ in range(BATCHES)]
        if not self.channels_last:
            return made
        return [(x.to(memory_format=torch.channels_last), y) for x, y in made]


def _cifar(name: str, *, last: bool, batch: int = 128) -> Case:
    images = partial(_images, batch, 32, 10)
    return Case(f"{name}{', channels_last' if last else ''}", partial(_resnet, name), images, last)


CASES = {
    "resnet20": _cifar("resnet20", last=False),
    "resnet20-last": _cifar("resnet20", last=True),
    "resnet56": _cifar("resnet56", last=False),
    "resnet56-last": _cifar("resnet56", last=True),
    "mobilenet": Case("MobileNetV3-large", _mobilenet, partial(_images, 16, 128, 1000)),
    "gpt": Case("GPT, 12 x 384", _gpt, partial(_tokens, 8, 128, 8192)),
    "thin": Case("50 thin layers", _thin, partial(_vectors, 64, 256)),
    "tiny": Case("8 thin layers", partial(_thin, 8, 64), partial(_vectors, 32, 64)),
}


class Contestant(Protocol):
    """Somebody who trains."""

    name: str

    def turn(self, batches: int) -> float:
        """Seconds per batch."""
        ...

    def close(self) -> None: ...


# ---- in processes of their own ---------------------------------------------------------------------------


Step = Callable[[Tensor, Tensor], object]


def plain(case: Case, threads: int) -> Step:
    """The plain loop."""
    torch.set_num_threads(threads)
    model = case.model()
    return _loop(model, OPTIMIZER(model.parameters()))


def _loop(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return step


def ddp(case: Case) -> Step:
    """Data parallel: every rank has its share of each batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model = nn.parallel.DistributedDataParallel(case.model())
    step = _loop(model, OPTIMIZER(model.parameters()))
    return lambda x, y: step(x.chunk(size)[rank], y.chunk(size)[rank])


def core(case: Case, schedule: str, cut: int, parts: int) -> Step:
    """torch.distributed.pipelining: a stage per rank, cut before block ``cut``."""
    from torch.distributed import pipelining

    rank, size = dist.get_rank(), dist.get_world_size()
    blocks = list(case.model())
    mine = blocks[:cut] if rank == 0 else blocks[cut:]
    if case.channels_last:  # gloo sends nothing else than contiguous tensors
        mine = [*mine, Laid(torch.contiguous_format)] if rank == 0 else [Laid(torch.channels_last), *mine]
    module = nn.Sequential(*mine)
    stage = pipelining.PipelineStage(module, rank, size, torch.device("cpu"))
    kind = getattr(pipelining, f"Schedule{schedule}")
    run = kind(stage, parts, loss_fn=loss)
    optimizer = OPTIMIZER(module.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        if rank == 0:
            run.step(x)
        else:
            run.step(target=y)
        optimizer.step()

    return step


def serve(connection: Connection, rank: int, size: int, port: int, case: Case) -> None:
    """A process of a contestant: makes what it is told to, then trains so many batches whenever asked."""
    torch.set_num_threads(1)
    if size > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        patience = timedelta(minutes=5)  # where one of them has failed
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=patience)
    batches, step = case.batches(), None
    while (message := connection.recv()) is not None:
        what, *arguments = message
        try:
            if what == "make":
                make, *arguments = arguments
                step = make(case, *arguments)
                answer: Any = 0.0
            else:
                assert step is not None
                answer = _timed(step, batches, arguments[0], together=size > 1)
        except Exception as e:
            answer = f"{type(e).__name__}: {e}"
        connection.send(answer)
    if size > 1:
        dist.destroy_process_group()


def _timed(step: Step, batches: Sequence[Batch], count: int, *, together: bool) -> float:
    if together:
        dist.barrier()
    start = time.perf_counter()
    for i in range(count):
        step(*batches[i % len(batches)])
    if together:
        dist.barrier()
    return (time.perf_counter() - start) / count


class Processes:
    """A contestant in ``size`` processes."""

    def __init__(self, name: str, case: Case, size: int, make: Callable[..., Step], *arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.connections, self.processes = [], []
        for rank in range(size):
            mine, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, rank, size, port, case), daemon=True)
            process.start()
            self.connections.append(mine)
            self.processes.append(process)
        self.make(make, *arguments)

    def make(self, make: Callable[..., Step], *arguments: Any) -> None:
        """Begin with other settings."""
        self._ask("make", make, *arguments)

    def turn(self, batches: int) -> float:
        return max(self._ask("run", batches))

    def _ask(self, *message: Any) -> list[float]:
        for connection in self.connections:
            connection.send(message)
        answers = []
        while len(answers) < len(self.connections):  # one that failed leaves the others waiting for it
            for ready in wait(self.connections):
                assert isinstance(ready, Connection)
                answers.append(ready.recv())
                if isinstance(answers[-1], str):
                    self.kill()
                    raise RuntimeError(f"{self.name}: {answers[-1]}")
        return answers

    def kill(self) -> None:
        """End all of its processes now."""
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(10)
        self.kill()


def best_of(schedule: str, case: Case, cuts: Sequence[int], parts: Sequence[int], tries: int) -> Processes:
    """The fastest cut and number of micro-batches of one of torch's schedules."""
    batch = len(case.batches()[0][0])
    choices = [(cut, m) for cut in cuts for m in parts if m <= batch]
    found = Processes(schedule, case, 2, core, schedule, *choices[0])
    times = {}
    for choice in choices:
        found.make(core, schedule, *choice)
        found.turn(1)
        times[choice] = found.turn(tries)
    cut, m = min(times, key=lambda choice: times[choice])
    found.make(core, schedule, cut, m)
    found.name = f"{schedule}, cut at {cut}, {m} parts"
    return found


# ---- dtrp ------------------------------------------------------------------------------------------------


class Ours:
    """dtrp on two worker processes."""

    def __init__(self, name: str, case: Case, recompute: bool | str, costs: str, moves: int = 0) -> None:
        self.name, self.batches = name, case.batches()
        self.pipe = dtrp.compile(
            case.model(),
            2,
            example_inputs=self.batches[0][0],
            devices=["cpu"] * 2,
            recompute=recompute,
            costs=costs,
        )
        self.trainer = self.pipe.trainer(
            loss, OPTIMIZER, executor="workers", seed=0, threads=1, rebalance=moves or False
        )
        if moves:  # what a move costs is paid back in any run that is worth a benchmark's name
            rebalance.A_MOVE = 0.0
            self.trainer._rebalancer._cost = 0.0
            self.turn(4 * moves)
            self.trainer._rebalancer.when = False

    def turn(self, batches: int) -> float:
        start = time.perf_counter()
        for i in range(batches):
            self.trainer.step(*self.batches[i % len(self.batches)])
        self.trainer.flush()
        return (time.perf_counter() - start) / batches

    def close(self) -> None:
        self.trainer.close()


# ---- the contest -----------------------------------------------------------------------------------------


def cut_candidates(case: Case, around: int) -> list[int]:
    """Blocks before which a pipeline without re-computation is about even, by the clock of each block."""
    model, (x, _) = case.model(), case.batches()[0]
    seconds = []
    for block in model:
        best = float("inf")
        for _ in range(3):
            given = x.detach().requires_grad_(x.is_floating_point())
            start = time.perf_counter()
            out = block(given)
            out.backward(torch.ones_like(out))
            best = min(best, time.perf_counter() - start)
        seconds.append(best)
        x = out
    total, before = sum(seconds), [sum(seconds[:i]) for i in range(len(seconds) + 1)]
    even = min(range(1, len(seconds)), key=lambda i: abs(before[i] - total / 2))
    return [i for i in range(even - around, even + around + 1) if 0 < i < len(seconds)]


@contextlib.contextmanager
def contestants(case: Case, args: argparse.Namespace) -> Iterator[list[Contestant]]:
    """All of them, ready; those that cannot take part are told."""
    cuts = cut_candidates(case, 0 if args.quick else 1)
    parts, tries, moves = (PARTS[:1], 2, 8) if args.quick else (PARTS, args.tries, 30)
    makers: list[Callable[[], Contestant]] = [
        lambda: Processes("plain, 1 thread", case, 1, plain, 1),
        lambda: Processes("plain, 2 threads", case, 1, plain, 2),
        lambda: Processes("DDP", case, 2, ddp),
        lambda: best_of("GPipe", case, cuts, parts, tries),
        lambda: best_of("1F1B", case, cuts, parts, tries),
        lambda: Ours("dtrp", case, "auto", args.costs),
        lambda: Ours("dtrp, recompute", case, True, args.costs),
        lambda: Ours("dtrp, rebalanced", case, "auto", args.costs, moves),
    ]
    made: list[Contestant] = []
    try:
        for make in makers:
            start = time.perf_counter()
            try:
                made.append(make())
                print(f"  ready in {time.perf_counter() - start:4.0f} s: {made[-1].name}", flush=True)
            except Exception as e:
                print(f"  not in it: {e}", flush=True)
        yield made
    finally:
        for one in made:
            one.close()


def contest(case: Case, args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per contestant."""
    print(f"\n{case.name}", flush=True)
    with contestants(case, args) as ready:
        for one in ready:
            one.turn(WARM_UP)
        count = max(8, round(args.seconds / ready[0].turn(WARM_UP)))
        times: list[list[float]] = [[] for _ in ready]
        for _ in range(args.rounds):
            for one, own in zip(ready, times, strict=True):
                own.append(one.turn(count))
        reports = [str(one.trainer.report) if isinstance(one, Ours) else "" for one in ready]
    rows = []
    for one, own, report in zip(ready, times, reports, strict=True):
        ratios = [alone / mine for alone, mine in zip(times[0], own, strict=True)]
        row = {"case": case.name, "contestant": one.name, "batches": count, "seconds": own, "ratios": ratios}
        rows.append(row)
        print(
            f"  {one.name:26} {statistics.median(own) * 1e3:9.2f} ms per batch   "
            f"{statistics.median(ratios):5.2f} times plain   ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )
        if report and args.reports:
            print("\n".join(f"      {line}" for line in report.splitlines()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=CASES, default=[name for name in CASES if name != "tiny"]
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--seconds", type=float, default=6.0, help="of plain training's turn")
    parser.add_argument(
        "--tries", type=int, default=6, help="batches to try a cut of the core schedules with"
    )
    parser.add_argument("--costs", choices=["analytic", "measured"], default="measured")
    parser.add_argument("--reports", action="store_true", help="print trainer.report of each of dtrp's runs")
    parser.add_argument("--quick", action="store_true", help="a small model, two rounds")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()
    if args.quick:
        args.models, args.rounds, args.seconds = ["tiny"], 2, 0.2
    torch.set_num_threads(1)
    load = os.getloadavg()
    cores = len(os.sched_getaffinity(0))
    print(
        f"load average {', '.join(f'{one:.1f}' for one in load)} on {cores} cores; torch {torch.__version__}"
    )
    rows = [row for name in args.models for row in contest(CASES[name], args)]
    if args.json is not None:
        about = {
            "cores": cores,
            "load_average": load,
            "torch": str(torch.__version__),
            "dtrp": dtrp.__version__,
            "python": platform.python_version(),
            "rows": rows,
        }
        args.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Throughput of a two-stage pipeline on two processes against plain training in one, on the CPU.

CIFAR ResNet-20 (He et al. 2016), batch 128, SGD with momentum. Plain training runs in one process with one
thread, the pipeline on worker processes of one thread each; every stage but the last recomputes. They take
turns in one run, so that all meet the machine in the same state, and each turn of the pipeline counts from
an empty pipeline to an empty pipeline.

Workers tell glibc to keep the memory that it would hand back to the system after each operator, which alone
makes CPU training faster. So plain training runs twice: as a user starts it, and with the workers' allocator
settings, where all that is left of the ratio comes from the pipeline. Besides the two ratios it prints

- the bound for the plan that was used: seconds of one plain step over the tick time of the slowest stage,
  each measured alone under the workers' allocator settings (stage k < K: forward twice, backward, update;
  stage K: once each), that is, the ratio if communication and the filling of the pipeline took no time;
- how near the run comes to it.

    python benchmarks/throughput.py --rounds 5
"""

from __future__ import annotations

import os
import sys

from dtrp.runtime.processes import KEEP_FREED_MEMORY

if __name__ == "__main__":  # before torch starts its threads; processes that are started here inherit it
    os.environ["OMP_NUM_THREADS"] = "1"
    if any(os.environ.get(name) != value for name, value in KEEP_FREED_MEMORY.items()):
        os.environ.update(KEEP_FREED_MEMORY)
        os.execv(sys.executable, [sys.executable, *sys.argv])  # glibc reads them when a process starts

import argparse
import importlib.util
import json
import multiprocessing
import platform
import statistics
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp

Batch = tuple[Tensor, Tensor]
OPTIMIZER = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)


def cifar_model(name: str) -> nn.Module:
    """A network of examples/cifar10.py."""
    path = Path(__file__).parents[1] / "examples" / "cifar10.py"
    spec = importlib.util.spec_from_file_location("cifar10", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MODELS[name]()


def random_batches(count: int, batch_size: int) -> list[Batch]:
    """Random images and classes: the arithmetic is the same as on real ones."""
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(batch_size, 3, 32, 32, generator=generator),
            torch.randint(0, 10, (batch_size,), generator=generator),
        )
        for _ in range(count)
    ]


class Plain:
    """The plain loop."""

    def __init__(self, name: str, batch_size: int) -> None:
        torch.set_num_threads(1)
        self.model = cifar_model(name).train()
        self.optimizer = OPTIMIZER(self.model.parameters())
        self.batches = random_batches(8, batch_size)

    def round(self, count: int) -> float:
        """Seconds per batch."""
        start = time.perf_counter()
        for i in range(count):
            x, y = self.batches[i % len(self.batches)]
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
        return (time.perf_counter() - start) / count


class DefaultPlain:
    """The plain loop in a process with the allocator's default settings."""

    def __init__(self, name: str, batch_size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        settings = {name: os.environ.pop(name) for name in KEEP_FREED_MEMORY}
        context.Process(target=_serve, args=(theirs, name, batch_size), daemon=True).start()
        os.environ.update(settings)

    def round(self, count: int) -> float:
        """Seconds per batch."""
        self.connection.send(count)
        seconds: float = self.connection.recv()
        return seconds


def _serve(connection: Connection, name: str, batch_size: int) -> None:
    plain = Plain(name, batch_size)
    while (count := connection.recv()) is not None:
        connection.send(plain.round(count))


def pipeline_round(trainer: dtrp.Trainer, batches: list[Batch]) -> float:
    """Seconds per batch through the pipeline, filling and draining included."""
    start = time.perf_counter()
    for x, y in batches:
        trainer.step(x, y)
    trainer.flush()
    return (time.perf_counter() - start) / len(batches)


class LoneStages:
    """The plan's stages, each run alone in this process, as the workers run them: what computing takes.

    They belong to a copy of the model of their own, whose pipeline is called once so that hooks can note
    what each stage is given.
    """

    def __init__(self, model: nn.Module, plan: dtrp.Plan, batch: Batch) -> None:
        images, self.target = batch
        pipe = dtrp.compile(
            model.train(),
            n_gpus=plan.n_stages,
            example_inputs=images,
            devices=["cpu"] * plan.n_stages,
            plan=plan,
        )
        self.modules = [stage.module for stage in pipe.stages]
        self.inputs: list[tuple[Tensor, ...]] = []
        handles = [
            module.register_forward_pre_hook(
                lambda _, given: self.inputs.append(tuple(t.detach() for t in given))
            )
            for module in self.modules
        ]
        pipe(images)
        for handle in handles:
            handle.remove()
        self.optimizers = [OPTIMIZER(module.parameters()) for module in self.modules]

    def tick(self, k: int) -> float:
        """Seconds of stage k's tick: forward twice (the last stage: once), backward, update."""
        last = k == len(self.modules) - 1
        module, optimizer = self.modules[k], self.optimizers[k]
        inputs = [t.requires_grad_(k > 0) for t in self.inputs[k]]
        start = time.perf_counter()
        if not last:
            with torch.no_grad():
                module(*inputs)
        output = module(*inputs)
        outputs = [t for t in (output if isinstance(output, tuple | list) else [output]) if t.requires_grad]
        if last:
            F.cross_entropy(outputs[0], self.target).backward()
        else:
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        optimizer.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - start
        for t in inputs:
            t.grad = None
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="resnet20", help="of examples/cifar10.py")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=100, help="per turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--costs", choices=["auto", "analytic", "measured"], default="measured")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    batches = random_batches(8, args.batch_size)
    turn = [batches[i % len(batches)] for i in range(args.batches)]

    default = DefaultPlain(args.model, args.batch_size)
    plain = Plain(args.model, args.batch_size)
    pipe = dtrp.compile(
        cifar_model(args.model),
        n_gpus=args.stages,
        example_inputs=batches[0][0],
        devices=["cpu"] * args.stages,
        recompute=True,
        costs=args.costs,
    )
    print(pipe.report)
    lone = LoneStages(cifar_model(args.model), pipe.plan, batches[0])

    default_times, plain_times, pipeline_times, tick_times = [], [], [], []
    with pipe.trainer(loss_fn=F.cross_entropy, optimizer=OPTIMIZER, executor="workers", seed=0) as trainer:
        default.round(8)
        plain.round(8)
        pipeline_round(trainer, turn[:8])
        for number in range(1, args.rounds + 1):
            default_times.append(default.round(args.batches))
            pipeline_times.append(pipeline_round(trainer, turn))
            plain_times.append(plain.round(args.batches))
            repeats = [[lone.tick(k) for k in range(args.stages)] for _ in range(max(3, args.batches // 4))]
            tick_times.append([statistics.median(series) for series in zip(*repeats, strict=True)])
            print(
                f"round {number}: plain {default_times[-1] * 1e3:.1f} ms, with the workers' allocator "
                f"{plain_times[-1] * 1e3:.1f} ms, pipeline {pipeline_times[-1] * 1e3:.1f} ms per batch"
            )

    default.connection.send(None)

    # Ratios of neighbours in time, so that what else the machine does falls on both alike.
    ratios = [a / b for a, b in zip(default_times, pipeline_times, strict=True)]
    even_ratios = [a / b for a, b in zip(plain_times, pipeline_times, strict=True)]
    bounds = [a / max(b) for a, b in zip(plain_times, tick_times, strict=True)]
    ratio, even_ratio = statistics.median(ratios), statistics.median(even_ratios)
    bound = statistics.median(bounds)
    ticks = [statistics.median(series) for series in zip(*tick_times, strict=True)]
    filled = args.batches / (args.batches + 2 * args.stages - 2)
    print(
        f"\n{args.model}, batch {args.batch_size}, {args.stages} stages, "
        f"{args.rounds} rounds of {args.batches} batches; medians, per batch"
    )
    print(f"plain training, one process, one thread   {statistics.median(default_times) * 1e3:7.1f} ms")
    print(f"  with the workers' allocator settings    {statistics.median(plain_times) * 1e3:7.1f} ms")
    print(f"pipeline, one thread per stage            {statistics.median(pipeline_times) * 1e3:7.1f} ms")
    print(f"stages' ticks alone                         {', '.join(f'{t * 1e3:.1f} ms' for t in ticks)}")
    print(f"ratio to plain training  {ratio:.2f}   ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"  under equal settings   {even_ratio:.2f}   ({min(even_ratios):.2f} to {max(even_ratios):.2f})")
    print(f"  bound for this plan    {bound:.2f}   ({bound * filled:.2f} filling and draining included)")
    print(f"  reached                {even_ratio / bound:.0%} of the bound")
    if args.json is not None:
        args.json.write_text(
            json.dumps(
                {
                    "model": args.model,
                    "batch_size": args.batch_size,
                    "stages": args.stages,
                    "batches_per_turn": args.batches,
                    "plain_seconds": default_times,
                    "plain_seconds_under_equal_settings": plain_times,
                    "pipeline_seconds": pipeline_times,
                    "stage_tick_seconds": tick_times,
                    "ratio": ratio,
                    "ratio_under_equal_settings": even_ratio,
                    "bound": bound,
                    "reached": even_ratio / bound,
                    "torch": torch.__version__,
                    "python": sys.version.split()[0],
                    "machine": platform.machine(),
                    "cores": os.cpu_count(),
                },
                indent=2,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()

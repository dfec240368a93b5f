"""Throughput of a two-stage pipeline on two processes against plain training in one, on the CPU.

CIFAR ResNet-20 (He et al. 2016), batch 128, SGD with momentum. Plain training runs in this process with
one thread, the pipeline on worker processes of one thread each; every stage but the last recomputes. The
two take turns in one run, so that both meet the machine in the same state, and each turn of the pipeline
counts from an empty pipeline to an empty pipeline. Besides the measured ratio it prints

- the bound for the plan that was used: seconds of one plain step over the tick time of the slowest stage,
  each measured alone in this process (stage k < K: forward twice, backward, update; stage K: once each),
  that is, the ratio if communication and the filling of the pipeline took no time at all;
- how near the run comes to it.

    python benchmarks/throughput.py --rounds 5
"""

from __future__ import annotations

import os

if __name__ == "__main__":  # before torch starts its threads; worker processes inherit it
    os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import importlib.util
import json
import platform
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

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


def plain_round(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Batch]) -> float:
    """Seconds per batch of the plain loop."""
    start = time.perf_counter()
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return (time.perf_counter() - start) / len(batches)


def pipeline_round(trainer: dtrp.Trainer, batches: list[Batch]) -> float:
    """Seconds per batch through the pipeline, filling and draining included."""
    start = time.perf_counter()
    for x, y in batches:
        trainer.step(x, y)
    trainer.flush()
    return (time.perf_counter() - start) / len(batches)


def stage_ticks(model_name: str, plan: dtrp.Plan, batch: Batch, repeats: int) -> list[float]:
    """Seconds of each stage's tick, measured alone in this process: what computing alone takes.

    ``pipe(x)`` runs all stages one after the other; hooks on the stages' modules read the clock in
    between, so the numbers come from the very modules that the workers run.
    """
    pipe = dtrp.compile(
        cifar_model(model_name),
        n_gpus=plan.n_stages,
        example_inputs=batch[0],
        devices=["cpu"] * plan.n_stages,
        plan=plan,
    )
    pipe.train()
    optimizer = OPTIMIZER(pipe.parameters())
    x, y = batch
    forward, backward, update = ([[] for _ in pipe.stages] for _ in range(3))  # type: ignore[var-annotated]
    boundaries: list[tuple[Tensor, ...]] = []

    def clock(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        boundaries.append(tuple(t for t in inputs if isinstance(t, torch.Tensor)))

    handles = [stage.module.register_forward_pre_hook(clock) for stage in pipe.stages]
    pipe(x)  # learns what each stage takes
    for handle in handles:
        handle.remove()
    inputs = [tuple(t.detach() for t in taken) for taken in boundaries]
    for _ in range(repeats):
        for k, stage in enumerate(pipe.stages):
            taken = [t.requires_grad_(k > 0 and t.is_floating_point()) for t in inputs[k]]
            stage_optimizer = optimizer if len(pipe.stages) == 1 else OPTIMIZER(stage.module.parameters())
            start = time.perf_counter()
            if k < len(pipe.stages) - 1:
                with torch.no_grad():
                    stage.module(*taken)
            output = stage.module(*taken)
            forward[k].append(time.perf_counter() - start)
            outputs = [
                t for t in (output if isinstance(output, tuple | list) else [output]) if t.requires_grad
            ]
            start = time.perf_counter()
            if k == len(pipe.stages) - 1:
                F.cross_entropy(outputs[0], y).backward()
            else:
                torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
            backward[k].append(time.perf_counter() - start)
            start = time.perf_counter()
            stage_optimizer.step()
            stage_optimizer.zero_grad()
            update[k].append(time.perf_counter() - start)
            for t in taken:
                t.grad = None
    return [
        sum(statistics.median(series[k]) for series in (forward, backward, update))
        for k in range(len(pipe.stages))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="resnet20", help="of examples/cifar10.py")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=40, help="per turn")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--costs", choices=["auto", "analytic", "measured"], default="measured")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    batches = random_batches(8, args.batch_size)
    turn = [batches[i % len(batches)] for i in range(args.batches)]

    plain = cifar_model(args.model).train()
    plain_optimizer = OPTIMIZER(plain.parameters())
    pipe = dtrp.compile(
        cifar_model(args.model),
        n_gpus=args.stages,
        example_inputs=batches[0][0],
        devices=["cpu"] * args.stages,
        recompute=True,
        costs=args.costs,
    )
    print(pipe.report)
    ticks = stage_ticks(args.model, pipe.plan, batches[0], repeats=10)

    plain_times, pipeline_times = [], []
    with pipe.trainer(loss_fn=F.cross_entropy, optimizer=OPTIMIZER, executor="workers", seed=0) as trainer:
        plain_round(plain, plain_optimizer, turn[:8])
        pipeline_round(trainer, turn[:8])
        for number in range(1, args.rounds + 1):
            plain_times.append(plain_round(plain, plain_optimizer, turn))
            pipeline_times.append(pipeline_round(trainer, turn))
            alone, piped = plain_times[-1], pipeline_times[-1]
            print(
                f"round {number}: plain {alone * 1e3:.1f} ms, pipeline {piped * 1e3:.1f} ms per batch, "
                f"ratio {alone / piped:.2f}"
            )

    plain_time, pipeline_time = statistics.median(plain_times), statistics.median(pipeline_times)
    ratios = [a / b for a, b in zip(plain_times, pipeline_times, strict=True)]
    ratio = statistics.median(ratios)
    bound = plain_time / max(ticks)
    filled = args.batches / (args.batches + 2 * args.stages - 2)
    print(
        f"\n{args.model}, batch {args.batch_size}, {args.stages} stages, "
        f"{args.rounds} rounds of {args.batches} batches"
    )
    print(f"plain training, one process, one thread   {plain_time * 1e3:7.1f} ms per batch")
    print(f"pipeline, one thread per stage            {pipeline_time * 1e3:7.1f} ms per batch")
    print(
        f"stages' ticks alone (recompute: all but the last)  {', '.join(f'{t * 1e3:.1f} ms' for t in ticks)}"
    )
    print(f"ratio                {ratio:.2f}   (median; {min(ratios):.2f} to {max(ratios):.2f})")
    print(
        f"bound for this plan  {bound:.2f}   ({bound * filled:.2f} with filling and draining once per turn)"
    )
    print(f"reached              {ratio / bound:.0%} of the bound")
    if args.json is not None:
        args.json.write_text(
            json.dumps(
                {
                    "model": args.model,
                    "batch_size": args.batch_size,
                    "stages": args.stages,
                    "batches_per_turn": args.batches,
                    "plain_seconds": plain_times,
                    "pipeline_seconds": pipeline_times,
                    "stage_tick_seconds": ticks,
                    "ratio": ratio,
                    "bound": bound,
                    "reached": ratio / bound,
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

"""Memory of each stage, measured tensor by tensor, for back-propagation, FDG and DTRP at several K.

    python benchmarks/memory.py [--models resnet56,transformer] [--stages 1,2,4,8] [--markdown docs/memory.md]
    python benchmarks/memory.py --models resnet1202 --stages 8 --steps 50 --lr 0.001   # very deep
    python benchmarks/memory.py --models wrn-28-10 --stages 4 --steps 50               # very wide

The stages run inline, one after the other. Counted are the storages that are alive, each once:

- weights: parameters, gradients, optimizer state, and one predicted copy where a stage predicts;
- stash: inputs of batches in flight (with FDG: their outputs, too) and stashed weight versions;
- activations: what autograd keeps for the backward passes to come, weights left out.

The total is the largest sum of the three at one moment; the peak that was planned for dtrp stands beside it.
The losses told are means over the first and the last ten batches (the same four over and over). bp is exact
back-propagation through the same stages, one batch at a time: what the model needs without decoupling.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Generator, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from throughput import cifar_model
from torch import Tensor, nn

import dtrp
from dtrp.runtime.stage import Stage

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests say how to look inside a trainer

from tests.runtime.inside import stages

METHODS = ("bp", "fdg", "dtrp")
MB = 1e6


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (
            self.qkv(self.norm1(x)).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind()
        )
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer(layers: int = 24, width: int = 128, heads: int = 4) -> nn.Module:
    return nn.Sequential(*(Block(width, heads) for _ in range(layers)))


class Subject(NamedTuple):
    """A model to measure."""

    title: str
    make: Callable[[], nn.Module]
    batch: Callable[[], tuple[Tensor, Tensor]]
    loss_fn: Callable[[Tensor, Tensor], Tensor]


def images(model: str, size: int, title: str) -> Subject:
    """A network of examples/cifar10.py on random images."""
    return Subject(
        f"{title} (CIFAR), batch {size}",
        partial(cifar_model, model),
        lambda: (torch.randn(size, 3, 32, 32), torch.randint(0, 10, (size,))),
        F.cross_entropy,
    )


SUBJECTS = {
    "resnet56": images("resnet56", 16, "ResNet-56"),
    "transformer": Subject(
        "24 transformer blocks, width 128, batch 4 of 64 tokens",
        transformer,
        lambda: (torch.randn(4, 64, 128), torch.randn(4, 64, 128)),
        F.mse_loss,
    ),
    "resnet1202": images("resnet1202", 4, "ResNet-1202"),
    "wrn-28-10": images("wrn-28-10", 4, "WRN-28-10"),
}
USUAL = ("resnet56", "transformer")


class Ledger:
    """Live bytes of one stage."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.weights: set[int] = set()
        self.held: dict[int, int] = {}  # storage -> how often autograd keeps it
        self.live = self.stash = 0
        self.most_live = self.most_stash = self.most = 0

    def pack(self, tensor: Tensor) -> Any:
        key, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if key in self.weights:
            return tensor
        if key not in self.held:
            self.live += size
            self.most_live = max(self.most_live, self.live)
            self.most = max(self.most, self.live + self.stash)
        self.held[key] = self.held.get(key, 0) + 1
        return _Kept(self, tensor, key, size)

    def unpack(self, kept: Any) -> Tensor:
        return kept.tensor if isinstance(kept, _Kept) else kept

    def release(self, key: int, size: int) -> None:
        self.held[key] -= 1
        if self.held[key] == 0:
            del self.held[key]
            self.live -= size

    def look(self) -> None:
        """Count what is in flight."""
        flights = self.stage.in_flight.values()
        values = [v for f in flights for v in (*f.arrivals.values(), *(f.outputs or ()))]
        if not (self.stage.recomputes or self.stage.program.is_last):
            values += [p for f in flights if f.twin is not None for p in f.twin.module.parameters()]
        sizes = storages(v for v in values if isinstance(v, Tensor))
        own = storages(self.stage.module.parameters())
        self.stash = sum(size for key, size in sizes.items() if key not in self.held and key not in own)
        self.weights |= own.keys()
        self.most_stash = max(self.most_stash, self.stash)
        self.most = max(self.most, self.live + self.stash)

    @property
    def fixed(self) -> int:
        """Weights, gradients, optimizer state, predicted copy."""
        total = 0
        for parameters in self.stage.weights.sets:
            own = sum(storages(parameters.names.values()).values())
            state = storages(
                v
                for p in parameters.names.values()
                for v in parameters.optimizer.state.get(p, {}).values()
                if isinstance(v, Tensor)
            )
            total += own + own + sum(state.values())
            total += own if self.stage.config.predicts and self.stage.n_stages > 1 else 0
        return total


class _Kept:
    """A tensor that autograd keeps."""

    def __init__(self, ledger: Ledger, tensor: Tensor, key: int, size: int) -> None:
        self.ledger, self.tensor, self.key, self.size = ledger, tensor, key, size

    def __del__(self) -> None:
        self.ledger.release(self.key, self.size)


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def measured(stage: Stage) -> Ledger:
    """Watch a stage from now on."""
    ledger = Ledger(stage)
    ledger.look()
    for name in ("first", "ahead", "version"):
        setattr(stage.weights, name, _known(ledger, getattr(stage.weights, name)))
    for name in ("_forward", "_last_forward", "_recompute", "_backward"):
        setattr(stage, name, _watched(ledger, getattr(stage, name)))
    return ledger


def _known(ledger: Ledger, method: Callable[..., Any]) -> Callable[..., Any]:
    """Weights on which a pass runs are counted as such, not as activations."""

    def call(*args: Any) -> Any:
        twin = method(*args)
        if twin is not None:
            ledger.weights |= storages(twin.module.parameters()).keys()
        return twin

    return call


def _watched(ledger: Ledger, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Generator[None, None, None]:
        steps = method(*args)
        done = False
        while not done:
            ledger.look()
            with torch.autograd.graph.saved_tensors_hooks(ledger.pack, ledger.unpack):
                done = next(steps, steps) is steps
            ledger.look()
            if not done:
                yield

    return call


class Row(NamedTuple):
    """One stage's measurements and planned peak, in bytes."""

    stash: int
    live: int
    total: int
    planned: int


def compiled(subject: Subject, n_stages: int) -> dtrp.Pipeline:
    torch.manual_seed(0)
    return dtrp.compile(subject.make(), n_gpus=n_stages, example_inputs=subject.batch()[0], recompute=True)


def measure(subject: Subject, pipe: dtrp.Pipeline, method: str, steps: int, optimizer: Any) -> list[Row]:
    """Of so many batches; before the pipeline is full nothing is at its peak."""
    torch.manual_seed(0)
    batches = [subject.batch() for _ in range(4)]
    with pipe.trainer(
        subject.loss_fn, optimizer, method=method, micro_batches=1, executor="inline", seed=0, threads=1
    ) as trainer:
        ledgers: list[Ledger] = []
        for step in range(max(steps, 2 * pipe.n_stages + 2)):
            trainer.step(*batches[step % len(batches)])
            if not ledgers:
                ledgers = [measured(stage) for stage in stages(trainer)]
        trainer.flush()
        first, last = (sum(trainer.losses[at]) / 10 for at in (slice(10), slice(-10, None)))
        print(f"{method}: loss {first:.3f} -> {last:.3f} in {len(trainer.losses)} batches", flush=True)
        planned = [stage.predicted_bytes for stage in trainer.report.stages]
        return [
            Row(g.most_stash, g.most_live, g.fixed + g.most, p) for g, p in zip(ledgers, planned, strict=True)
        ]


def table(subject: Subject, found: dict[tuple[str, int], list[Row]], counts: list[int]) -> str:
    lines = [f"### {subject.title}", "", "Sum over stages, MB:", ""]
    lines += ["| K | " + " | ".join(f"{m}: total" for m in METHODS) + " | fdg / bp | dtrp / bp |"]
    lines += ["|--:|" + "--:|" * (len(METHODS) + 2)]
    for k in counts:
        total = {m: sum(r.total for r in found[m, k]) for m in METHODS}
        cells = " | ".join(f"{total[m] / MB:.1f}" for m in METHODS)
        lines.append(
            f"| {k} | {cells} | {total['fdg'] / total['bp']:.2f} | {total['dtrp'] / total['bp']:.2f} |"
        )
    lines += ["", "Per stage, MB (stash + activations; total with weights):", ""]
    lines += [
        "| K | stage | " + " | ".join(METHODS) + " | dtrp, planned |",
        "|--:|--:|" + "---|" * len(METHODS) + "--:|",
    ]
    for k in counts:
        for stage in range(k):
            cells = []
            for m in METHODS:
                r = found[m, k][stage]
                cells.append(f"{r.stash / MB:.1f} + {r.live / MB:.1f}; {r.total / MB:.1f}")
            planned = found["dtrp", k][stage].planned / MB
            lines.append(f"| {k} | {stage} | " + " | ".join(cells) + f" | {planned:.1f} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(USUAL), help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--stages", default="1,2,4,8")
    parser.add_argument("--steps", type=int, default=0, help="batches; at least 2 K + 2")
    parser.add_argument("--lr", type=float, default=0.01, help="of SGD with momentum 0.9")
    parser.add_argument("--markdown", type=Path, help="write the tables there")
    args = parser.parse_args()
    counts = [int(k) for k in args.stages.split(",")]
    optimizer = partial(torch.optim.SGD, lr=args.lr, momentum=0.9)
    parts, fine = [], True
    for name in args.models.split(","):
        found = {}
        for k in counts:
            pipe = compiled(SUBJECTS[name], k)
            start = {name: value.clone() for name, value in pipe.state_dict().items()}
            for method in METHODS:
                pipe.load_state_dict(start)
                found[method, k] = measure(SUBJECTS[name], pipe, method, args.steps, optimizer)
                total = sum(r.total for r in found[method, k]) / MB
                print(f"{name:<12} K={k}  {method:<5} {total:8.1f} MB", flush=True)
            if k == 4:
                sums = {m: sum(r.total for r in found[m, 4]) for m in METHODS}
                fine &= sums["dtrp"] <= 1.35 * sums["bp"]
        parts.append(table(SUBJECTS[name], found, counts))
        print("\n" + parts[-1] + "\n", flush=True)
    if args.markdown:
        hardware = f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
        parts.append(f"`python {' '.join(sys.argv)}` on {hardware}.")
        args.markdown.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    print(f"dtrp at K = 4 at most 1.35 times bp: {'yes' if fine else 'NO'}")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())

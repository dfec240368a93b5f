"""Small models and losses that tests of the running trainer share; importable by worker processes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01)
cross_entropy = F.cross_entropy


def mlp(depth: int = 5, *, dropout: float = 0.1, norm: bool = True, seed: int = 0) -> nn.Sequential:
    """Linear layers with all that makes a pass more than a function: BatchNorm and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [
                nn.Linear(8, 8),
                nn.BatchNorm1d(8) if norm else nn.Identity(),
                nn.Tanh(),
                nn.Dropout(dropout),
            ]
        return nn.Sequential(*layers, nn.Linear(8, 3))


class Tied(nn.Module):
    """A weight that the first stage and a later one hold, and a value that skips what is between them."""

    def __init__(self, norm: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.c.weight = self.a.weight
        self.norms = nn.ModuleList(nn.Identity() if norm is None else norm(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.norms[0](self.a(x)))
        y: Tensor = self.head(self.norms[1](self.c(torch.tanh(self.b(first)))) + first)
        return y


def batches(n: int, size: int = 4, *, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 8, generator=g), torch.randint(0, 3, (size,), generator=g)) for _ in range(n)]


def compiled(model: nn.Module | None = None, n_stages: int = 2, **options: Any) -> dtrp.Pipeline:
    model = mlp() if model is None else model
    return dtrp.compile(model, n_gpus=n_stages, example_inputs=torch.randn(4, 8), **options)


def trainer(pipe: dtrp.Pipeline, executor: str = "inline", loss_fn: Any = cross_entropy, **knobs: Any) -> Any:
    """A trainer in the paper's order, unless another is asked for."""
    knobs = {"seed": 0, "schedule": "fig1", "micro_batches": 1, **knobs}
    return pipe.trainer(loss_fn, knobs.pop("optimizer", SGD), executor=executor, **knobs)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

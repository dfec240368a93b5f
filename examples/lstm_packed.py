"""Train an LSTM on packed sequences of different lengths.

How long a packed batch is depends on the lengths, which are values: no graph can say it. A submodule that
packs for itself is kept whole, as one node, and takes what comes. The task: names of Python's standard
library, letter by letter; which of them are of functions?

    python examples/lstm_packed.py
"""

from __future__ import annotations

import argparse
import builtins
import inspect
import math as mathematics
import os
import string
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import dtrp

LETTERS = "\0" + string.ascii_letters + string.digits + "_"


class PackedLSTM(nn.LSTM):
    """The last states of both directions, ``(batch, 2 * width)``, without a look at the padding."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        _, (hidden, _) = super().forward(packed)
        return torch.cat([hidden[-2], hidden[-1]], 1)


class NameReader(nn.Module):
    """Two classes out of letters ``(batch, longest)`` and lengths ``(batch,)``."""

    def __init__(self, width: int = 64, classes: int = 2) -> None:
        super().__init__()
        self.letters = nn.Embedding(len(LETTERS), width)
        self.lstm = PackedLSTM(width, width, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, classes))

    def forward(self, names: Tensor, lengths: Tensor) -> Tensor:
        return self.head(self.lstm(self.letters(names), lengths))


def names() -> list[tuple[str, int]]:
    """Names, and whether each is a function's."""
    found: dict[str, int] = {}
    for module in (builtins, inspect, mathematics, os, torch):
        for name in dir(module):
            if set(name) <= set(LETTERS[1:]):
                found[name] = int(inspect.isroutine(getattr(module, name)))
    return sorted(found.items())


def batches(rows: list[tuple[str, int]], size: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Letters, lengths and classes."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    made = []
    for start in range(0, len(rows) - size + 1, size):
        chosen = [rows[i] for i in order[start : start + size]]
        longest = max(len(name) for name, _ in chosen)
        letters = torch.tensor([[LETTERS.index(c) for c in name.ljust(longest, "\0")] for name, _ in chosen])
        lengths = torch.tensor([len(name) for name, _ in chosen])
        made.append((letters, lengths, torch.tensor([kind for _, kind in chosen])))
    return made


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--executor", default="auto", choices=["auto", "inline", "workers"])
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = NameReader(args.width)
    made = batches(names(), 32, seed=0)
    train, test = made[len(made) // 5 :], made[: len(made) // 5]
    pipe = dtrp.compile(model, devices=["cpu"] * args.stages, example_inputs=train[0][:2])
    print(pipe.report)
    optimizer = partial(torch.optim.AdamW, lr=3e-3)
    with pipe.trainer(F.cross_entropy, optimizer, executor=args.executor, seed=0, progress=True) as trainer:
        *_, last = trainer.fit(train, args.epochs, test)
    print(f"test accuracy {last['accuracy']:.1%}")
    return last


if __name__ == "__main__":
    main()

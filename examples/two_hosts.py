"""Train over several processes or hosts with torchrun: one stage per process, the same script everywhere.

On one machine:

    torchrun --nproc-per-node 2 examples/two_hosts.py

On two hosts, the same line on both but for --node-rank (0 on the first, whose address is 10.0.0.1):

    torchrun --nnodes 2 --nproc-per-node 1 --node-rank 0 --master-addr 10.0.0.1 --master-port 29500 \\
             examples/two_hosts.py --save /shared/digits.ckpt

Started again, it goes on from what is saved. Without torchrun it trains on worker processes of this machine.
docs/cluster.md has Slurm, Kubernetes, restarts and what breaks.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import dtrp


def digits() -> tuple[DataLoader, DataLoader]:
    """Images of 64 numbers and their labels, to train on and to test with; the same on every rank."""
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32).flatten(1) / 16
    whole = TensorDataset(images, torch.as_tensor(data.target))
    train, test = random_split(whole, [1437, 360], generator=torch.Generator().manual_seed(0))
    order = torch.Generator().manual_seed(0)  # all stages must be given the same batches
    return DataLoader(train, 32, shuffle=True, generator=order), DataLoader(test, 360)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", type=int, help="default: as many as processes; fewer make replicas")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--save", metavar="PATH", help="on a disk that all hosts see")
    parser.add_argument("--executor", default="auto", choices=["auto", "inline", "workers"])
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    layers = [nn.Linear(64, args.width), nn.ReLU()]
    for _ in range(3):
        layers += [nn.Linear(args.width, args.width), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(args.width, 10))

    train, test = digits()
    pipe = dtrp.compile(model, n_gpus=args.stages)  # planned by rank 0, at the first batch
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    with pipe.trainer(F.cross_entropy, optimizer, executor=args.executor, seed=0, progress=True) as trainer:
        *_, last = trainer.fit(train, args.epochs, test, resume=args.save)
    if os.environ.get("RANK", "0") == "0":
        print(f"test accuracy {last['accuracy']:.1%}")
    return last


if __name__ == "__main__":
    main()

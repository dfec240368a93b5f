"""Fine-tune a timm model whose backbone is frozen: only the head is trained, BatchNorm keeps its statistics.

Stages with nothing to train run their part forward once, without recomputing it, and wait for no gradient.
`backbone.eval()` inside `model.train()` counts as you set it. `--pretrained` downloads weights; without it
they are random, and there is little that a head can learn from them.

    python examples/finetune_timm.py --pretrained
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import dtrp


def digits(batch_size: int, size: int) -> tuple[DataLoader, DataLoader]:
    """Loaders of ``(batch, 3, size, size)`` images and labels, to train on and to test with."""
    data = load_digits()
    images = torch.as_tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
    whole = TensorDataset(images, torch.as_tensor(data.target))
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist()
    train, test = (torch.utils.data.Subset(whole, part) for part in (order[360:], order[:360]))
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, batch_size)


def main(arguments: Sequence[str] | None = None) -> torch.nn.Module:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--pretrained", action="store_true", help="weights from the hub")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="of the images")
    parser.add_argument("--executor", default="auto", choices=["auto", "inline", "workers"])
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=10)
    head = model.get_classifier()
    model.requires_grad_(False)
    head.requires_grad_(True)
    model.eval()  # BatchNorm's statistics stay as they are ...
    model.training = True  # ... while the model as a whole is trained
    head.train()

    train, test = digits(64, args.size)
    pipe = dtrp.compile(
        model, devices=["cpu"] * args.stages, example_inputs=torch.randn(64, 3, args.size, args.size)
    )
    print(pipe.report)
    optimizer = partial(torch.optim.AdamW, lr=3e-3)
    with pipe.trainer(F.cross_entropy, optimizer, executor=args.executor, seed=0, progress=True) as trainer:
        *_, last = trainer.fit(train, args.epochs, test)
    print(f"test accuracy {last['accuracy']:.1%}")
    if not args.pretrained:
        print("A frozen backbone of random weights tells a head next to nothing: try --pretrained.")
    return model


if __name__ == "__main__":
    main()

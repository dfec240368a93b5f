"""The main job, end to end: a real model, trained on real data, by a decoupled pipeline of worker processes.

The data are the 1,797 handwritten digits that scikit-learn brings along (8 x 8 pixels). The model is an
ordinary ``nn.Module`` with a skip connection from its first layers to its last ones, so that it spans
stages. It is trained twice from the same weights on the same batches: once by plain back-propagation in
this process, with one thread, once by DTRP on two CPU worker processes, with one thread each.

    python examples/quickstart.py
    python examples/quickstart.py --stages 4 --recompute   # the memory of one graph per stage, whatever K is
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

import dtrp

BATCH_SIZE = 32
LEARNING_RATE = 0.05
WARM_UP_EPOCHS = 2


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )


class DigitsNet(nn.Module):
    """A small CNN whose head sees the deep features and, by a long skip, the shallow ones."""

    def __init__(self, width: int = 48, classes: int = 10) -> None:
        super().__init__()
        self.stem = ConvBlock(1, width)
        self.low = nn.Sequential(ConvBlock(width, width), ConvBlock(width, width))
        self.high = ConvBlock(width, 2 * width)
        self.join = ConvBlock(3 * width, 2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        shallow = self.stem(images)
        deep = self.high(F.max_pool2d(self.low(shallow), 2))
        joined = self.join(torch.cat([deep, F.max_pool2d(shallow, 2)], dim=1))
        return self.head(joined.mean(dim=(2, 3)))


def digits(batch_size: int, seed: int) -> tuple[DataLoader, DataLoader]:
    """Loaders of 1,437 training and 360 test images, pixels in 0..1, shuffled the same for each seed."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    train, test = train_test_split(range(len(labels)), test_size=360, random_state=0, stratify=bunch.target)
    return (
        DataLoader(
            TensorDataset(images[train], labels[train]),
            batch_size,
            shuffle=True,
            generator=torch.Generator().manual_seed(seed),
        ),
        DataLoader(TensorDataset(images[test], labels[test]), 512),
    )


def warm_up_then_cosine(optimizer: torch.optim.Optimizer, warm_up: int, total: int) -> LambdaLR:
    """A linear warm-up over ``warm_up`` updates, then half a cosine down to 0 at ``total``."""

    def factor(update: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(update, total) / total))
        return min(1.0, (update + 1) / warm_up) * cosine

    return LambdaLR(optimizer, factor)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader) -> float:
    """Share of right answers of the plain model, in eval mode."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in loader)
    return right / len(loader.dataset)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--recompute", action="store_true", help="in all stages, not where the plan says so")
    parser.add_argument("--width", type=int, default=48, help="of the model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--require-accuracy", type=float, help="fail below this, or a point below plain training"
    )
    args = parser.parse_args()

    torch.set_num_threads(1)  # as each worker has; more only get in each other's way on images this small
    loader, test_loader = digits(BATCH_SIZE, args.seed)
    updates = args.epochs * len(loader)
    optimizer = partial(torch.optim.SGD, lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
    scheduler = partial(warm_up_then_cosine, warm_up=WARM_UP_EPOCHS * len(loader), total=updates)

    # Plain PyTorch: what the pipeline has to match.
    torch.manual_seed(args.seed)
    plain = DigitsNet(args.width)
    start = time.perf_counter()
    plain_optimizer = optimizer(plain.parameters())
    plain_scheduler = scheduler(plain_optimizer)
    for _ in tqdm(range(args.epochs), desc="plain back-propagation", unit="epoch"):
        for x, y in loader:
            plain_optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            plain_optimizer.step()
            plain_scheduler.step()
    plain_seconds = (time.perf_counter() - start) / updates

    # The same model, the same batches, through a pipeline of stages.
    torch.manual_seed(args.seed)
    model = DigitsNet(args.width)
    pipe = dtrp.compile(
        model,
        n_gpus=args.stages,
        example_inputs=next(iter(loader))[0],
        devices=["cpu"] * args.stages,  # a worker process each
        recompute=args.recompute or "auto",
        costs="measured",  # on this machine, in a few seconds, once: what the report predicts comes true
    )
    print(pipe.report)

    loader, test_loader = digits(BATCH_SIZE, args.seed)  # anew: the same batches as above
    with pipe.trainer(
        loss_fn=F.cross_entropy, optimizer=optimizer, lr_scheduler=scheduler, seed=args.seed, progress=True
    ) as trainer:
        start = time.perf_counter()
        trainer.evaluate(test_loader)  # starts the workers
        started = time.perf_counter()
        trainer.fit(loader, epochs=args.epochs)
        seconds = (time.perf_counter() - started) / updates
        result = trainer.evaluate(test_loader)
        print(trainer.report)  # predicted beside measured, stage by stage

    print(f"\n{updates} updates on {len(loader.dataset)} images, tested on {len(test_loader.dataset)} others")
    for name, share, each in (
        ("plain back-propagation", accuracy(plain, test_loader), plain_seconds),
        (f"DTRP, {args.stages} stages", result["accuracy"], seconds),
    ):
        print(f"  {name:24} {share:7.2%}  {each * 1e3:6.1f} ms per batch")
    # The trained weights lie in the model itself, under its own names: no pipeline needed to use them.
    print(f"  the model after training {accuracy(model, test_loader):7.2%}")
    print(
        f"The pipeline is {plain_seconds / seconds:.2f} times as fast; predicted: {pipe.report.speedup:.2f}. "
        f"Starting its processes took {started - start:.1f} s, once."
    )
    if seconds > plain_seconds:
        print(
            "So plain training is the better choice here: the model is too small, or this machine has fewer "
            "cores than the pipeline has stages, or others use them."
        )

    if args.require_accuracy is not None:
        needed = max(args.require_accuracy, accuracy(plain, test_loader) - 0.01)
        if result["accuracy"] < needed:
            raise SystemExit(f"test accuracy {result['accuracy']:.2%} is below the required {needed:.2%}")


if __name__ == "__main__":
    main()

"""CIFAR-10 with the networks of the decoupled-training literature, any method, any number of stages.

``--data`` is a folder with ``train/<class>/*`` and ``test/<class>/*`` images (what torchvision's
``ImageFolder`` reads), or one in which torchvision's ``CIFAR10`` already lies; nothing is downloaded.

    python examples/cifar10.py --data DIR --model resnet20 --stages 2 --epochs 30
    python examples/cifar10.py --data DIR --model resnet56 --stages 8 --method dtr --csv runs.csv
    python examples/cifar10.py --data DIR --model resnet110 --checkpoint run/   # again: goes on there

With ``--checkpoint`` the run saves after each epoch; the same command resumes it. Batches and
augmentation depend on seed and epoch alone, so that a resumed run sees what it would have seen.
"""

from __future__ import annotations

import argparse
import csv
import math
import re
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchvision import datasets
from torchvision.models import resnet18
from tqdm import tqdm

import dtrp

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training images, per channel
METHODS = ("dtrp", "dtr", "fdg", "adl", "bp", "1f1b", "gpipe")
RECOMPUTE = {"yes": True, "no": False, "auto": "auto"}


# ------------------------------------------------------------------------------------------- networks


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.extra = outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.extra:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return F.relu(x + y)


class CifarResNet(nn.Module):
    """The CIFAR variant of He et al. 2016: 6n + 2 layers in three groups of n blocks, 16 to 64 wide."""

    def __init__(self, depth: int, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth is 6n + 2 with n >= 1 (8, 14, 20, 56, 110, 1202), not {depth}")
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        layers = []
        width = 16
        for outputs in (16, 32, 64):
            for _ in range(blocks):
                layers.append(BasicBlock(width, outputs, stride=2 if outputs > width else 1))
                width = outputs
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(64, classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(F.relu(self.bn(self.conv(x))))
        return self.head(x.mean(dim=(2, 3)))


class WideBlock(nn.Module):
    """Pre-activation block of a wide residual network."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(y))))


class WideResNet(nn.Module):
    """WRN-depth-width of Zagoruyko and Komodakis 2016, without dropout."""

    def __init__(self, depth: int = 28, width: int = 10, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth is 6n + 4 with n >= 1 (10, 16, 22, 28, 40), not {depth}")
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        layers = []
        for group in range(3):
            for block in range(blocks):
                first = block == 0
                layers.append(
                    WideBlock(
                        widths[group] if first else widths[group + 1],
                        widths[group + 1],
                        stride=2 if first and group else 1,
                    )
                )
        self.layers = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(widths[-1])
        self.head = nn.Linear(widths[-1], classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.layers(self.conv(x))))
        return self.head(x.mean(dim=(2, 3)))


def initialise(model: nn.Module) -> None:
    """He initialisation of the convolutions, as both papers have it."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def cifar_resnet18(classes: int = 10) -> nn.Module:
    """ResNet-18 (11.2 M parameters) with the stem for 32 x 32 images: 3 x 3, stride 1, no pooling."""
    model = resnet18(num_classes=classes)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


MODELS = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110, 1202)},
    "resnet18": cifar_resnet18,
    "wrn-28-10": partial(WideResNet, 28, 10),
}


# ----------------------------------------------------------------------------------------------- data


def load(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images as uint8 ``(N, 3, 32, 32)`` and their classes, all in memory."""
    folder = root / ("train" if train else "test")
    if folder.is_dir():
        dataset = datasets.ImageFolder(folder)
        what = f"reading {folder}"
        images = np.stack([np.asarray(image) for image, _ in tqdm(dataset, desc=what, unit="image")])
        labels = torch.tensor(dataset.targets)
    else:
        try:
            original = datasets.CIFAR10(str(root), train=train, download=False)
        except RuntimeError as e:
            raise SystemExit(
                f"{root} holds neither train/ and test/ folders of images nor torchvision's CIFAR10: {e}"
            ) from None
        images, labels = original.data, torch.tensor(original.targets)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels


def normalise(images: Tensor) -> Tensor:
    """uint8 to float with mean 0 and deviation 1 per channel."""
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Pad by 4, crop 32 x 32 at random, flip half of the images: the literature's standard."""
    count, _, height, width = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, count, 1), generator=generator)
    rows = (top + torch.arange(height)).view(count, 1, height, 1)
    flip = torch.rand(count, 1, generator=generator) < 0.5
    across = torch.arange(width).expand(count, width)
    columns = (left + torch.where(flip, across.flip(1), across)).view(count, 1, 1, width)
    return padded[torch.arange(count).view(count, 1, 1, 1), torch.arange(3).view(1, 3, 1, 1), rows, columns]


class Batches:
    """One epoch of shuffled, augmented batches; the same ones for the same seed and epoch."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, seed: int, epoch: int) -> None:
        self.images, self.labels, self.batch_size = images, labels, batch_size
        self.generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in torch.randperm(len(self.labels), generator=self.generator).split(self.batch_size):
            yield normalise(augment(self.images[chosen], self.generator)), self.labels[chosen]


# ------------------------------------------------------------------------------------------- schedule


def rate(update: int, *, schedule: str, warm_up: int, total: int) -> float:
    """Learning-rate factor: linear warm-up, then steps (a tenth at 1/2 and at 3/4) or half a cosine."""
    if update < warm_up:
        return (update + 1) / warm_up
    if schedule == "step":
        return 0.1 ** ((update >= 0.5 * total) + (update >= 0.75 * total))
    done = (update - warm_up) / max(1, total - warm_up)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


# ---------------------------------------------------------------------------------------- checkpoints


def newest_checkpoint(folder: Path) -> tuple[int, Path | None]:
    """Epochs done and where they are saved: the name says the epoch, so that one rename says it all."""
    found = {
        int(match[1]): path
        for path in folder.glob("epoch-*")
        if (match := re.fullmatch(r"epoch-(\d+)\.ckpt", path.name))
    }
    done = max(found, default=0)
    return done, found.get(done)


def save_checkpoint(trainer: dtrp.Trainer, folder: Path, done: int) -> None:
    """Save as ``epoch-<done>.ckpt`` and only then drop the older ones."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = folder / f"epoch-{done}.ckpt"
    trainer.save(newest)
    for path in folder.glob("epoch-*.ckpt"):
        if path != newest:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_row(path: Path, row: dict[str, object]) -> None:
    """Append a row of results; the header stands above the first one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


# ----------------------------------------------------------------------------------------------- main


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=MODELS, default="resnet20")
    parser.add_argument("--method", choices=METHODS, default="dtrp")
    parser.add_argument("-K", "--stages", type=int, default=2)
    parser.add_argument("--predictor", default="auto")
    parser.add_argument("--horizon", choices=["common", "stage"], default="common")
    parser.add_argument("--horizon-scale", type=float, default=1.0)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument(
        "--recompute",
        choices=RECOMPUTE,
        default="yes",
        help="as DTRP does it (default), or auto: where memory asks for it",
    )
    parser.add_argument("--executor", choices=["auto", "inline", "workers"], default="auto")
    parser.add_argument("--device", help="of all stages, for example cpu or cuda:0 (default: dtrp's choice)")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=5e-4)
    parser.add_argument("--warm-up", type=float, default=1.0, help="epochs (default: 1)")
    parser.add_argument("--schedule", choices=["step", "cosine"], default="cosine")
    parser.add_argument("--subset", type=int, help="train on the first N images of a seeded shuffle")
    parser.add_argument("--test-subset", type=int, help="test on the first N images of a seeded shuffle")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="append one row per epoch here")
    parser.add_argument("--checkpoint", type=Path, help="folder to save to after each epoch and resume from")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    images, labels = load(args.data, train=True)
    test_images, test_labels = load(args.data, train=False)
    # The subsets' seed is fixed: runs with different seeds are to be compared on the same images.
    order, test_order = (
        torch.randperm(len(y), generator=torch.Generator().manual_seed(0)) for y in (labels, test_labels)
    )
    images, labels = images[order[: args.subset]], labels[order[: args.subset]]
    test_chosen = test_order[: args.test_subset]
    test_set = torch.utils.data.TensorDataset(normalise(test_images[test_chosen]), test_labels[test_chosen])
    test_loader = torch.utils.data.DataLoader(test_set, batch_size=500)

    torch.manual_seed(args.seed)
    model = MODELS[args.model]()
    example = normalise(images[: args.batch_size])
    pipe = dtrp.compile(
        model,
        n_gpus=args.stages,
        example_inputs=example,
        recompute=RECOMPUTE[args.recompute],
        devices=None if args.device is None else [args.device] * args.stages,
    )
    print(pipe.report)

    per_epoch = math.ceil(len(labels) / args.batch_size) / args.accumulate  # updates
    factor = partial(
        rate,
        schedule=args.schedule,
        warm_up=math.ceil(args.warm_up * per_epoch),
        total=math.ceil(args.epochs * per_epoch),
    )
    with pipe.trainer(
        loss_fn=F.cross_entropy,
        optimizer=partial(torch.optim.SGD, lr=args.lr, momentum=0.9, weight_decay=args.weight_decay),
        lr_scheduler=partial(LambdaLR, lr_lambda=factor),
        method=args.method,
        predictor=args.predictor,
        horizon=args.horizon,
        horizon_scale=args.horizon_scale,
        accumulate=args.accumulate,
        executor=args.executor,
        seed=args.seed,
    ) as trainer:
        done = 0
        if args.checkpoint is not None:
            done, saved = newest_checkpoint(args.checkpoint)
            if saved is not None:
                trainer.load(saved)
                print(f"going on after epoch {done} from {saved}")
        for epoch in range(done + 1, args.epochs + 1):
            start = time.perf_counter()
            first = len(trainer.losses)
            batches = Batches(images, labels, args.batch_size, args.seed, epoch)
            for x, y in (progress := tqdm(batches, desc=f"epoch {epoch}/{args.epochs}", unit="batch")):
                loss = trainer.step(x, y)
                if loss is not None:
                    progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
            seconds = time.perf_counter() - start
            result = trainer.evaluate(test_loader)  # drains first: every batch has its loss now
            losses = trainer.losses[first:]
            row = {
                "model": args.model,
                "method": args.method,
                "stages": args.stages,
                "predictor": args.predictor,
                "horizon": args.horizon,
                "horizon_scale": args.horizon_scale,
                "seed": args.seed,
                "images": len(labels),
                "epoch": epoch,
                "train_loss": round(sum(losses) / max(1, len(losses)), 5),
                "test_loss": round(float(result["loss"]), 5),
                "test_accuracy": round(float(result["accuracy"]), 5),
                "seconds": round(seconds, 1),
            }
            print(
                f"epoch {epoch}: train loss {row['train_loss']:.4f}, test loss {row['test_loss']:.4f}, "
                f"test accuracy {row['test_accuracy']:.2%}, {seconds:.1f} s"
            )
            if args.csv is not None:
                write_row(args.csv, row)  # before saving: a crash in between repeats a row, and loses none
            if args.checkpoint is not None:
                save_checkpoint(trainer, args.checkpoint, epoch)


if __name__ == "__main__":
    main()

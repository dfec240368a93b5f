"""Bring your own architecture: a U-Net with four long skips, split into stages without touching its code.

Each skip connects a level of the way down with the same level of the way up, so whatever the cut, tensors
made by an early stage are needed by a late one. They are sent straight there. The example prints the
partition report, shows that the stages compute exactly what the model computes, and trains the pipeline
for a moment on synthetic images: discs, squares and triangles on a noisy ground, to be segmented.

    python examples/custom_architecture.py
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import dtrp

CLASSES = ("ground", "disc", "square", "triangle")


class DoubleConv(nn.Sequential):
    """Two convolutions with batch normalisation and ReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class UNet(nn.Module):
    """Ronneberger et al. 2015, with padded convolutions and batch normalisation."""

    def __init__(self, classes: int = len(CLASSES), width: int = 8, depth: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in pairwise([3, *widths]))
        self.up = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, stride=2) for a, b in pairwise(widths))
        self.merge = nn.ModuleList(DoubleConv(2 * w, w) for w in widths[:-1])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        skips = []
        x = image
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.max_pool2d(x, 2))
            skips.append(x)
        skips.pop()  # the bottom has no way around it
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x)


def shapes(batch: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``(batch, 3, size, size)`` of one to three shapes each, and their classes per pixel."""
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = torch.rand(batch, 3, size, size, generator=generator) * 0.5
    classes = torch.zeros(batch, size, size, dtype=torch.long)
    for image, label in zip(images, classes, strict=True):
        for _ in range(int(torch.randint(1, 4, (), generator=generator))):
            kind = int(torch.randint(1, len(CLASSES), (), generator=generator))
            radius = int(torch.randint(size // 8, size // 4, (), generator=generator))
            y, x = (int(v) for v in torch.randint(radius, size - radius, (2,), generator=generator))
            dy, dx = rows - y, columns - x
            inside = {
                "disc": dy**2 + dx**2 <= radius**2,
                "square": (dy.abs() <= radius) & (dx.abs() <= radius),
                "triangle": (dy.abs() <= radius) & (2 * dx.abs() <= dy + radius),
            }[CLASSES[kind]]
            label[inside] = kind
            colour = torch.rand(3, 1, generator=generator)
            image[:, inside] = 0.7 * colour + 0.3 * torch.rand(3, int(inside.sum()), generator=generator)
    return images, classes


@torch.no_grad()
def mean_iou(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Intersection over union, averaged over the classes, of the model in eval mode."""
    model.eval()
    predicted = model(images).argmax(1)
    scores = []
    for kind in range(len(CLASSES)):
        union = ((predicted == kind) | (labels == kind)).sum()
        scores.append(float(((predicted == kind) & (labels == kind)).sum() / union.clamp(min=1)))
    return sum(scores) / len(scores)


def identical(pipe: dtrp.Pipeline, model: nn.Module, x: Tensor) -> bool:
    """Whether the stages, run one after the other, give the model's very bits, and its gradients."""
    same = True
    for training in (False, True):
        model.train(training)
        pipe.train(training)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        results = []
        for network in (model, pipe):
            model.load_state_dict(before, strict=False)  # train mode moves the running statistics
            model.zero_grad()
            output = network(x)
            output.square().mean().backward()
            results.append([output, *(p.grad for p in model.parameters())])
        same &= all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        model.load_state_dict(before, strict=False)
        model.zero_grad()
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--size", type=int, default=48, help="pixels per side, a multiple of 16")
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()

    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = UNet()
    test_images, test_labels = shapes(64, args.size, generator)

    pipe = dtrp.compile(
        model,
        n_gpus=args.stages,
        example_inputs=test_images[: args.batch_size],
        devices=["cpu"] * args.stages,  # a worker process each
        recompute=True,  # as DTRP does it; "auto" would trade memory for time where memory allows
    )
    print(pipe.report)
    for stage in pipe.stages:
        print(f"stage {stage.index}: takes {', '.join(map(str, stage.inputs))}")
    print(f"pipe(x) and its gradients are model(x)'s, bit for bit: {identical(pipe, model, test_images[:4])}")

    print(f"mean IoU before training: {mean_iou(model, test_images, test_labels):.3f}")
    with pipe.trainer(
        loss_fn=F.cross_entropy, optimizer=partial(torch.optim.AdamW, lr=3e-3), seed=0
    ) as trainer:
        for _ in tqdm(range(args.steps), desc=f"{args.stages} stages", unit="step"):
            trainer.step(*shapes(args.batch_size, args.size, generator))
    print(f"mean IoU after {args.steps} steps: {mean_iou(model, test_images, test_labels):.3f}")


if __name__ == "__main__":
    main()

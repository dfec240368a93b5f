"""Train a small diffusion model: a U-Net that gets the time by an embedding, on handwritten digits.

The model has two inputs, the noisy image and the time, and the time's embedding goes into every level:
wherever the cuts are, the stages that need it get it. The target is the noise (Ho et al. 2020). After
training, the plain model draws digits.

    python examples/diffusion.py --draw digits.png
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import dtrp

STEPS = 200
KEPT = torch.cumprod(1 - torch.linspace(1e-4, 0.04, STEPS), 0)
"""The share of the image that is left, by time."""


class Block(nn.Module):
    """Two convolutions; the time shifts the channels in between."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm = nn.GroupNorm(4, outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = F.silu(self.first(x)) + self.time(time)[:, :, None, None]
        return F.silu(self.second(self.norm(x)))


class TimeUNet(nn.Module):
    """Predicts the noise in images ``(batch, 1, 8, 8)`` at times ``(batch,)``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        sizes = [(1, width), (width, 2 * width), (2 * width, 2 * width)]
        self.down = nn.ModuleList(Block(a, b, 2 * width) for a, b in sizes)
        self.up = nn.ModuleList(Block(a, b, 2 * width) for a, b in [(4 * width, width), (2 * width, width)])
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(0, self.width, 2, device=t.device) * (-math.log(1e4) / self.width))
        angles = t[:, None] * rates
        time = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        high = self.down[0](x, time)
        middle = self.down[1](F.avg_pool2d(high, 2), time)
        low = self.down[2](F.avg_pool2d(middle, 2), time)
        x = self.up[0](torch.cat([middle, F.interpolate(low, scale_factor=2.0)], 1), time)
        return self.head(self.up[1](torch.cat([high, F.interpolate(x, scale_factor=2.0)], 1), time))


def batches(count: int, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Noisy digits, their times, and the noise."""
    images = torch.as_tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = images[torch.randint(len(images), (size,), generator=generator)]
        t = torch.randint(STEPS, (size,), generator=generator)
        noise = torch.randn(x.shape, generator=generator)
        kept = KEPT[t][:, None, None, None]
        yield kept.sqrt() * x + (1 - kept).sqrt() * noise, t, noise


@torch.no_grad()
def draw(model: nn.Module, count: int) -> Tensor:
    """Digits out of noise, by the plain model."""
    model.eval()
    x = torch.randn(count, 1, 8, 8)
    for t in reversed(range(STEPS)):
        kept, before = KEPT[t], KEPT[t - 1] if t else torch.tensor(1.0)
        share = kept / before
        noise = model(x, torch.full((count,), t))
        x = (x - (1 - share) / (1 - kept).sqrt() * noise) / share.sqrt()
        if t:
            x = x + ((1 - before) / (1 - kept) * (1 - share)).sqrt() * torch.randn_like(x)
    return x


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--executor", default="auto", choices=["auto", "inline", "workers"])
    parser.add_argument("--draw", metavar="FILE", help="draw digits into this image (needs torchvision)")
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = TimeUNet(args.width)
    ((x, t, _),) = batches(1, 64, seed=1)
    pipe = dtrp.compile(model, devices=["cpu"] * args.stages, example_inputs=(x, t))
    print(pipe.report)
    optimizer = partial(torch.optim.AdamW, lr=2e-3)
    with pipe.trainer(F.mse_loss, optimizer, executor=args.executor, seed=0, progress=True) as trainer:
        trainer.fit(batches(args.steps, 64, seed=0), epochs=1)
    print(
        f"squared error of the noise: {trainer.losses[0]:.3f} at first, {trainer.losses[-1]:.3f} at the end"
    )
    if args.draw:
        from torchvision.utils import save_image

        save_image(draw(model, 64) / 2 + 0.5, args.draw)
    return trainer.losses


if __name__ == "__main__":
    main()

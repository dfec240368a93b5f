"""Small deterministic models that between them hold what a pipeline can get wrong, each with its batches.

| name | what it is there for |
|---|---|
| `mlp` | dropout: both passes over a batch must draw the same masks |
| `flat_cnn` | BatchNorm in a flat `nn.Sequential`: cuts may fall between any two layers |
| `resnet` | ResNet-20's shape (He et al. 2016), narrow: BatchNorm, and sums of two paths |
| `unet` | long skips: values that a stage far downstream needs |
| `gpt` | integer inputs, tied embedding and head, dropout, values of no gradient |
| `handed` | skips again, but of steps in a row, each of which can be run on its own |
| `two_heads` | several inputs, one of which a late stage needs; several outputs, a target of several parts |

All are float64, so that a difference in kind stands out from a difference in rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Batch:
    """One call of the model and what the loss compares its output with."""

    args: tuple[Tensor, ...]
    target: Any


@dataclass(frozen=True)
class Case:
    """A model, its loss and its batches, all made anew and alike at each call."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator, int], Batch]
    loss_fn: Callable[[Any, Any], Tensor]
    batch_size: int = 4

    def make(self, seed: int = 0) -> nn.Module:
        """The model, in training mode."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.model().double().train()

    def batches(self, n: int, *, last: int | None = None, seed: int = 1) -> list[Batch]:
        """n batches; the last one may have another size."""
        g = torch.Generator().manual_seed(seed)
        sizes = [self.batch_size] * n
        if last is not None:
            sizes[-1] = last
        return [self.batch(g, size) for size in sizes]

    def __str__(self) -> str:
        return self.name


# --- Flat models: a cut may fall between any two layers -------------------------------------------------


def mlp(depth: int = 4, width: int = 8, dropout: float = 0.2) -> nn.Sequential:
    """Linear, tanh, dropout, over and over."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def flat_cnn(width: int = 4) -> nn.Sequential:
    """Convolutions and BatchNorm in a row."""
    layers: list[nn.Module] = [nn.Conv2d(2, width, 3, padding=1)]
    for _ in range(4):
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3))


# --- ResNet ---------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which a 1x1 convolution adapts where shapes change."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Three groups of ``blocks`` blocks; 3 gives ResNet-20's depth, 1 ResNet-8's."""

    def __init__(self, blocks: int = 1, width: int = 2, n_classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        groups, inputs = [], width
        for i in range(3):
            outputs = width * 2**i
            group = []
            for j in range(blocks):
                group.append(BasicBlock(inputs, outputs, 2 if i > 0 and j == 0 else 1))
                inputs = outputs
            groups.append(nn.Sequential(*group))
        self.groups = nn.Sequential(*groups)
        self.head = nn.Linear(inputs, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(self.stem(x))
        return self.head(x.mean(dim=(2, 3)))


# --- U-Net ----------------------------------------------------------------------------------------------


class DoubleConv(nn.Sequential):
    """Two 3x3 convolutions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.ReLU(),
        )


class UNet(nn.Module):
    """Ronneberger et al. 2015 in miniature: each level's output skips to its mirror image."""

    def __init__(self, levels: int = 3, width: int = 2, n_classes: int = 3) -> None:
        super().__init__()
        channels = [width * 2**i for i in range(levels + 1)]
        self.stem = DoubleConv(2, width)
        self.down = nn.ModuleList(DoubleConv(a, b) for a, b in pairwise(channels))
        self.raise_ = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2) for a, b in pairwise(channels))
        self.up = nn.ModuleList(DoubleConv(2 * a, a) for a in channels[:-1])
        self.head = nn.Conv2d(width, n_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(F.max_pool2d(x, 2))
        for raise_, up in zip(reversed(self.raise_), reversed(self.up), strict=True):
            x = up(torch.cat([skips.pop(), raise_(x)], dim=1))
        return self.head(x)


# --- Skips handed from step to step ---------------------------------------------------------------------


class Step(nn.Module):
    """One layer on the first of several values; may set its output aside, or take in what was set aside."""

    def __init__(self, layer: nn.Module, *, push: bool = False, pop: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.push, self.pop = push, pop

    def forward(self, values: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *aside = values
        if self.pop:
            x = torch.cat([x, aside.pop()], dim=1)
        x = self.layer(x)
        return (x, *aside, x) if self.push else (x, *aside)


class Handed(nn.Module):
    """Two long skips, written as steps in a row."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.steps = nn.ModuleList(
            [
                Step(nn.Linear(8, width)),
                Step(nn.Tanh(), push=True),
                Step(nn.Linear(width, width)),
                Step(nn.Tanh(), push=True),
                Step(nn.Dropout(0.1)),
                Step(nn.Linear(width, width)),
                Step(nn.BatchNorm1d(width)),
                Step(nn.Tanh()),
                Step(nn.Linear(2 * width, width), pop=True),
                Step(nn.Tanh()),
                Step(nn.Linear(2 * width, width), pop=True),
                Step(nn.Tanh()),
                Step(nn.Linear(width, 3)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        values: tuple[Tensor, ...] = (x,)
        for step in self.steps:
            values = step(values)
        return values[0]


# --- GPT ------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.reshape(shape).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A decoder whose head is its embedding (Press and Wolf 2017)."""

    def __init__(
        self, vocabulary: int = 11, width: int = 8, heads: int = 2, depth: int = 3, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(16, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def token_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy per token."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


# --- Several inputs, several outputs --------------------------------------------------------------------


class TwoHeads(nn.Module):
    """An image and a vector in, classes and a value out; the vector joins only after the trunk."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(2, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
        )
        self.embed = nn.Linear(3, width)
        self.join = nn.Linear(2 * width, width)
        self.classes = nn.Linear(width, 3)
        self.value = nn.Linear(width, 1)

    def forward(self, image: Tensor, features: Tensor) -> dict[str, Tensor]:
        x = self.trunk(image).mean(dim=(2, 3))
        x = torch.tanh(self.join(torch.cat([x, torch.tanh(self.embed(features))], dim=1)))
        return {"classes": self.classes(x), "value": self.value(x).squeeze(1)}


def two_heads_loss(output: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
    """Classification plus regression."""
    return F.cross_entropy(output["classes"], target["classes"]) + F.mse_loss(
        output["value"], target["value"]
    )


# --- Batches --------------------------------------------------------------------------------------------


def _vectors(g: torch.Generator, n: int) -> Batch:
    return Batch((torch.randn(n, 8, generator=g, dtype=torch.double),), torch.randint(3, (n,), generator=g))


def _images(g: torch.Generator, n: int) -> Batch:
    return Batch(
        (torch.randn(n, 2, 8, 8, generator=g, dtype=torch.double),), torch.randint(3, (n,), generator=g)
    )


def _pixels(g: torch.Generator, n: int) -> Batch:
    return Batch(
        (torch.randn(n, 2, 8, 8, generator=g, dtype=torch.double),), torch.randint(3, (n, 8, 8), generator=g)
    )


def _text(g: torch.Generator, n: int) -> Batch:
    text = torch.randint(11, (n, 7), generator=g)
    return Batch((text[:, :-1].contiguous(),), text[:, 1:].contiguous())


def _two_heads(g: torch.Generator, n: int) -> Batch:
    image = torch.randn(n, 2, 6, 6, generator=g, dtype=torch.double)
    features = torch.randn(n, 3, generator=g, dtype=torch.double)
    target = {
        "classes": torch.randint(3, (n,), generator=g),
        "value": torch.randn(n, generator=g, dtype=torch.double),
    }
    return Batch((image, features), target)


MLP = Case("mlp", mlp, _vectors, F.cross_entropy)
FLAT_CNN = Case("flat_cnn", flat_cnn, _images, F.cross_entropy)
RESNET = Case("resnet", ResNet, _images, F.cross_entropy)
RESNET20 = Case("resnet20", lambda: ResNet(blocks=3), _images, F.cross_entropy)
UNET = Case("unet", UNet, _pixels, F.cross_entropy)
HANDED = Case("handed", Handed, _vectors, F.cross_entropy)
GPT_TIED = Case("gpt", GPT, _text, token_loss)
TWO_HEADS = Case("two_heads", TwoHeads, _two_heads, two_heads_loss)

CASES = {case.name: case for case in (MLP, FLAT_CNN, RESNET, RESNET20, UNET, HANDED, GPT_TIED, TWO_HEADS)}

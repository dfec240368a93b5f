"""Small float32 models that between them hold what an export can get wrong, each with an example call.

float32, because onnxruntime's CPU kernels leave out much of float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Skips(nn.Module):
    """A value made first and needed last, BatchNorm's buffers, in-place ReLUs, a size that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Dropout(0.2)
            )
            for _ in range(4)
        )
        self.head = nn.Linear(6, 5)
        for block in self.blocks:  # running statistics that are not the initial ones
            block[1].running_mean.normal_()
            block[1].running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        first, n = x, x.shape[0]
        for block in self.blocks:
            x = block(x) + x
        x = (x * first).view(n, 6, -1).mean(-1)
        return self.head(x)


class TiedText(nn.Module):
    """Integer inputs, a mask in a buffer, embedding and head of one weight."""

    def __init__(self, vocabulary: int = 40, width: int = 16, length: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(length, width))
        self.layer = nn.TransformerEncoderLayer(width, 2, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.triu(torch.full((length, length), float("-inf")), 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        return self.head(self.layer(x, src_mask=self.mask))


class ManyEnds(nn.Module):
    """Inputs in a dict, one by keyword that only the end needs; outputs of several kinds, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 8), nn.Linear(3, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 2)
        self.register_buffer("scale", torch.rand(8) + 0.5)

    def forward(self, batch: Mapping[str, Tensor], *, late: Tensor) -> dict[str, Any]:
        hidden = [self.left(batch["left side"]) + self.right(batch["right"])]
        for layer in self.layers:
            hidden.append(torch.tanh(layer(hidden[-1])) * self.scale)
        return {
            "out": self.head(hidden[-1] + hidden[1]) * late,
            "hidden": tuple(hidden[1:3]),
            "best": hidden[-1].argmax(1),
            "more": [batch["right"], 3, None],
            "scale": self.scale,
        }


class Windows(nn.Module):
    """Attention in windows: what crosses stages has 4 times the batch as its first size; a number crosses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(4, 4), nn.Tanh())))
        self.outer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, h, w, c = x.shape
        y = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, c)
        y = self.inner(y)
        y = y.view(b, h // 2, w // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        return self.outer(y) / b, x.new_ones(b)


class Writes(nn.Module):
    """Writes to values that earlier stages made, and gives one value out twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kept = x
        for i, layer in enumerate(self.layers):
            x = F.relu_(layer(x).add_(1))
            if i == 1:
                kept = x.clone()
                kept[:, 0] = 0
        return x, kept, F.dropout(x, training=self.training)


@dataclass(frozen=True)
class Case:
    """A model and a call of it with a given number of samples."""

    model: Callable[[], nn.Module]
    call: Callable[[int], tuple[tuple[Any, ...], dict[str, Any]]]
    stages: int = 3
    options: dict[str, Any] = field(default_factory=dict)

    def make(self) -> nn.Module:
        """The model, in train mode, its weights drawn with a fixed seed."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.model()


CASES = {
    "skips": Case(Skips, lambda n: ((torch.randn(n, 3, 8, 8),), {}), 4),
    "tied text": Case(TiedText, lambda n: ((torch.randint(0, 40, (n, 8)),), {}), 2),
    "many ends": Case(
        ManyEnds,
        lambda n: (
            ({"left side": torch.randn(n, 4), "right": torch.randn(n, 3)},),
            {"late": torch.randn(n, 2)},
        ),
        3,
    ),
    "windows": Case(Windows, lambda n: ((torch.randn(n, 4, 4, 4),), {}), 3),
    "writes": Case(Writes, lambda n: ((torch.randn(n, 6),), {}), 3),
}

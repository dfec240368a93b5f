"""Small models, each with one thing that makes cutting hard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class InPlace(nn.Module):
    """In-place operations on values that several others read."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        before = h.sum(dim=1, keepdim=True)  # reads h before it is written
        view = h.view(-1, 2, 4)
        self.relu(h)  # writes what `view` shows
        h = h + self.b(view.flatten(1))
        h.mul_(2)
        return self.c(h) + before


class SkipsOverStages(nn.Module):
    """A value and a model input that are used much later."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))

    def forward(self, x: Tensor, late: Tensor, *, scale: Tensor) -> Tensor:
        early = h = self.layers[0](x)
        for layer in self.layers[1:]:
            h = torch.tanh(layer(h))
        return (h + early) * scale + late


class Tied(nn.Module):
    """An embedding that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens)))


class ContainersAndNumbers(nn.Module):
    """A recurrent layer's tuple, sizes and a split, all of which may have to travel."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(4, 6, batch_first=True)
        self.again = nn.LSTM(6, 6, batch_first=True)
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        batch, length, _ = x.shape
        y, state = self.rnn(x)
        y, (hidden, _) = self.again(y, state)
        first, second = y.split([1, length - 1], dim=1)
        merged = torch.cat([second, first], dim=1)
        return {"y": self.out(merged).view(batch, length * 3), "hidden": hidden.transpose(0, 1)}


class ByMode(nn.Module):
    """Other outputs in training than in evaluation, and functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.aux, self.c = (nn.Linear(8, 8) for _ in range(4))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        h = self.norm(F.relu(self.a(x)))
        aux = self.aux(h) if self.training else None
        h = F.dropout(self.b(h), 0.5, self.training)
        out = self.c(F.dropout(h, 0.2, self.training))
        return (out, aux) if aux is not None else out


class SharedNorm(nn.Module):
    """One BatchNorm used twice: its running statistics cannot live in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.layers[0](x))
        h = self.layers[1](h).tanh()
        h = self.norm(self.layers[2](h))
        return self.layers[3](h).tanh()


class Constants(nn.Module):
    """An input that is an output, a parameter that is an output, and integers."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int, None]:
        h = self.b(torch.tanh(self.a(x)))
        return x, self.scale, (h * self.scale).argmax(dim=1), 3, None


@dataclass
class Encoded:
    """A container that pytree opens, as libraries register theirs."""

    h: Tensor
    rest: Tensor


pytree.register_pytree_node(Encoded, lambda e: ([e.h, e.rest], None), lambda parts, _: Encoded(*parts))


class Reader(nn.Module):
    """Takes the container as one, and is kept whole: data decides in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, encoded: Encoded) -> Tensor:
        if encoded.h.detach().sum() > 1e9:
            return encoded.rest
        return self.linear(encoded.h) + encoded.rest


class OneContainerForSeveral(nn.Module):
    """Parts that are far apart take the same container."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.near, self.between, self.far = nn.Linear(8, 8), Reader(), nn.Linear(8, 8), Reader()

    def forward(self, x: Tensor) -> Tensor:
        encoded = Encoded(self.first(x), x * 2)
        return self.between(self.near(encoded)) + self.far(encoded)


CASES = {
    "in_place": (InPlace, lambda: ((torch.randn(3, 8),), {})),
    "skips": (
        SkipsOverStages,
        lambda: ((torch.randn(3, 8), torch.randn(3, 8)), {"scale": torch.randn(3, 1)}),
    ),
    "tied": (Tied, lambda: ((torch.randint(11, (3, 5)),), {})),
    "containers": (ContainersAndNumbers, lambda: ((torch.randn(3, 5, 4),), {})),
    "by_mode": (ByMode, lambda: ((torch.randn(5, 8),), {})),
    "shared_norm": (SharedNorm, lambda: ((torch.randn(5, 8),), {})),
    "one_container": (OneContainerForSeveral, lambda: ((torch.randn(3, 8),), {})),
    "constants": (Constants, lambda: ((torch.randn(5, 8),), {})),
}

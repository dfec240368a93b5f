"""Calls in the model's own code whose results have shapes that depend on values are nodes of their own."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp
from dtrp.errors import CaptureError

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Model(nn.Module):
    """Two layers, and between them what a test is about, in the root's own code."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))


class Rows(Model):
    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        chosen = hidden[hidden.sum(-1) > 0].sum(0, keepdim=True)
        out: Tensor = self.head(torch.tanh(self.b(hidden)) + chosen)
        return out


class Experts(Model):
    def forward(self, x: Tensor) -> Tensor:
        weights, which = self.a(x).softmax(-1).topk(2, -1)
        total = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows, place = (which == k).nonzero(as_tuple=True)
            total = total.index_add(0, rows, expert(x[rows]) * weights[rows, place, None])
        out: Tensor = self.head(torch.tanh(self.b(x + total)))
        return out


class ExpertsInPlace(Model):
    """Several values by one mask: their sizes are the same for whatever values the code is tried with."""

    def forward(self, x: Tensor) -> Tensor:
        weight, which = self.a(x).softmax(-1).max(-1)
        total = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            mask = which == k
            total[mask] = expert(x[mask]) * weight[mask].unsqueeze(-1)
        out: Tensor = self.head(torch.tanh(self.b(x + total)))
        return out


class Graph(Model):
    """As many nodes as there are; edges are drawn from x, so that a call has one argument."""

    def forward(self, x: Tensor) -> Tensor:
        source, target = (x[:, :2].t() * 100).long().abs() % x.size(0)
        for layer in (self.a, self.b):
            x = layer(x)
            sums = torch.zeros_like(x).index_add(0, target, x[source])
            x = torch.tanh(x + sums / torch.bincount(target, minlength=x.size(0)).clamp(min=1)[:, None])
        out: Tensor = self.head(x)
        return out


class Groups(Model):
    def forward(self, x: Tensor) -> Tensor:
        found, group = torch.unique((x[:, 0] > 0).long(), return_inverse=True)
        means = torch.zeros(found.size(0), 8).index_add(0, group, torch.tanh(self.a(x)))
        out: Tensor = self.head(torch.tanh(self.b(means))[group])
        return out


class Repeated(Model):
    def forward(self, x: Tensor) -> Tensor:
        counts = 1 + (x[:, 0] > 0).long()
        many = torch.repeat_interleave(torch.tanh(self.a(x)), counts, dim=0)
        first = counts.cumsum(0) - 1
        out: Tensor = self.head(torch.tanh(self.b(many))[first])
        return out


class Picked(Model):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.a(x)
        positive = hidden.masked_select(hidden > 0).sum() / hidden.numel()
        out: Tensor = self.head(torch.tanh(self.b(hidden)) * positive)
        return out


class Lengths(Model):
    """A mask as long as the longest sequence."""

    def forward(self, x: Tensor) -> Tensor:
        lengths = 1 + (x[:, 0].abs() * 3).long().clamp(max=7)
        mask = torch.arange(lengths.max(), device=x.device) < lengths[:, None]
        hidden = torch.tanh(self.a(x))[:, : mask.size(1)] * mask
        out: Tensor = self.head(torch.tanh(self.b(x)) + hidden.sum(1, keepdim=True))
        return out


class Classes(Model):
    def forward(self, x: Tensor) -> Tensor:
        share = F.one_hot((x[:, 0] > 0).long()).float().mean(0)[:1]
        out: Tensor = self.head(torch.tanh(self.b(torch.tanh(self.a(x)) * share)))
        return out


class Best(Model):
    """One row, by a number that is a tensor, and a constant by another."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.a(x))
        best = hidden[hidden.sum(1).argmax()]
        out: Tensor = self.head(torch.tanh(self.b(hidden + best)) + torch.full((8,), x.max()))
        return out


MODELS = [Rows, Experts, ExpertsInPlace, Graph, Groups, Repeated, Picked, Lengths, Classes, Best]


def data(n: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of different sizes."""
    generator = torch.Generator().manual_seed(1)
    sizes = [6 + i for i in range(n)]
    return [
        (torch.randn(s, 8, generator=generator), torch.randint(0, 3, (s,), generator=generator))
        for s in sizes
    ]


def trained(model: nn.Module, executor: str, **options: Any) -> list[float]:
    batches = data(5)
    pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=batches[0][0])
    with pipe.trainer(F.cross_entropy, SGD, executor=executor, seed=0, **options) as trainer:
        for x, y in batches:
            trainer.step(x, y)
    return trainer.losses


@pytest.mark.parametrize("make", MODELS)
def test_training_is_that_of_the_plain_loop(make: type[Model]) -> None:
    """With other sizes in each batch, of the batch and of what is picked from it."""
    model = make()
    plain, losses = copy.deepcopy(model), []
    optimizer = SGD(plain.parameters())
    for x, y in data(5):
        loss = F.cross_entropy(plain(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert trained(model, "inline", method="bp") == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_workers_take_them() -> None:
    a, b = Experts(), Experts()
    assert trained(a, "workers") == trained(b, "inline")
    for name, value in a.state_dict().items():
        assert torch.equal(value, b.state_dict()[name]), name


class Asks(Model):
    """The experts that nobody chose are left out by an if."""

    def forward(self, x: Tensor) -> Tensor:
        which = self.a(x).argmax(-1)
        total = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (which == k).nonzero()[:, 0]
            if len(rows) > 0:
                total = total.index_add(0, rows, expert(x[rows]))
        out: Tensor = self.head(self.b(x + total))
        return out


def test_code_that_decides_by_such_a_size_is_refused() -> None:
    """Neither course is frozen into the graph; in a submodule it works."""
    x = data(1)[0][0]
    with pytest.raises(CaptureError, match="code decides by it") as error:
        dtrp.compile(Asks(), devices=["cpu"] * 2, example_inputs=x)
    assert "test_kept_calls.py" in str(error.value)
    assert "move this code into a submodule" in str(error.value)
    assert dtrp.compile(nn.Sequential(nn.Linear(8, 8), Asks()), devices=["cpu"] * 2, example_inputs=x)


class Speech(Model):
    """As Wav2Vec2ForCTC: labels that are none are left out, and torch is told how many there are."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scores = self.head(torch.tanh(self.b(torch.tanh(self.a(x))))).log_softmax(-1)
        mask = labels > 0
        lengths = torch.ones_like(x[:, :, 0], dtype=torch.long).sum(-1)
        loss: Tensor = F.ctc_loss(
            scores.transpose(0, 1), labels.masked_select(mask), lengths, mask.sum(-1), reduction="sum"
        )
        return loss


def test_a_loss_that_takes_only_what_belongs_together() -> None:
    """How many labels are left is made up where the code is tried with other numbers: it refused these, and
    the model was refused for it, and then for batches of other lengths."""
    model, generator = Speech(), torch.Generator().manual_seed(1)
    plain, losses = copy.deepcopy(model), []
    batches = [
        (torch.randn(3, n, 8, generator=generator), torch.randint(0, 3, (3, n // 3), generator=generator))
        for n in (12, 15, 18)
    ]
    pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=batches[0])
    sgd = partial(torch.optim.SGD, lr=0.01)
    with pipe.trainer(None, sgd, method="bp", executor="inline") as trainer:
        for x, labels in batches:
            trainer.step(x, labels)
    optimizer = sgd(plain.parameters())
    for x, labels in batches:
        loss = plain(x, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert trainer.losses == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize("what", ["view", "base", "view of the base"])
def test_writing_to_what_values_took_a_view_of_is_refused(what: str) -> None:
    """The graph has a copy of it, which would not follow."""

    class Writes(Model):
        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.a(x)).clone()
            flat = hidden.view(-1)
            best = hidden[hidden.sum(1).argmax()]
            written = {"view": best, "base": hidden, "view of the base": flat}[what]
            written += 1.0
            out: Tensor = self.head(torch.tanh(self.b(hidden)) + best)
            return out

    with pytest.raises(CaptureError, match="writes to a tensor of which a call took what values say"):
        dtrp.compile(Writes(), 2, example_inputs=torch.randn(6, 8))


def test_an_answer_by_values_is_no_tensor() -> None:
    class Equal(Model):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            out: Tensor = self.head(self.b(hidden) if torch.equal(x, x.abs()) else hidden)
            return out

    with pytest.raises(CaptureError, match="decides something by the values"):
        dtrp.compile(Equal(), 2, example_inputs=torch.randn(6, 8))

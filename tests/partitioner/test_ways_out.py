"""What used to be refused for no good reason: it works like the plain model, or the error names a way out."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dtrp
from dtrp.errors import CaptureError
from dtrp.partitioner.capture import capture
from tests.sweeps import sweep

from .test_capture import assert_faithful


class Packed(nn.Module):
    def __init__(self, kind, clamp, total):
        super().__init__()
        self.rnn, self.clamp, self.total = kind(4, 4, batch_first=True), clamp, total

    def forward(self, x, lengths):
        if self.clamp:
            lengths = lengths.clamp(min=1)
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        total = x.shape[1] if self.total else None
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=total)[0]


class Tagger(nn.Module):
    def __init__(self, *options):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(30, 4), Packed(*options), Packed(*options)
        self.head = nn.Linear(4, 3)

    def forward(self, ids, lengths):
        return self.head(self.b(self.a(self.embed(ids), lengths), lengths).mean(1))


@pytest.mark.parametrize("kind", sweep([nn.LSTM, nn.GRU, nn.RNN]))
@pytest.mark.parametrize(
    ("clamp", "total"), sweep([(True, True), (False, True), (True, False), (False, False)])
)
def test_packed_sequences(kind, clamp, total):
    torch.manual_seed(0)
    ids, lengths = torch.randint(0, 30, (4, 7)), torch.tensor([7, 3, 5, 1])
    pipe = dtrp.compile(
        Tagger(kind, clamp, total), n_gpus=2, devices=["cpu"] * 2, example_inputs=(ids, lengths)
    )
    for n in (lengths, torch.tensor([2, 7, 7, 4])):
        torch.testing.assert_close(pipe(ids, n), pipe.model(ids, n))
    ids = torch.randint(0, 30, (3, 9))
    lengths = torch.tensor([9, 3, 4])
    torch.testing.assert_close(pipe(ids, lengths), pipe.model(ids, lengths))


class PackedInTheRoot(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(self.rnn(packed)[1][0][-1])


def test_packed_sequences_of_the_root_are_named():
    """What torch says there is of an item() that the user's code does not call."""
    args = torch.randn(4, 6, 4), torch.tensor([6, 5, 3, 2])
    with pytest.raises(dtrp.CaptureError, match="how long a packed sequence is") as caught:
        dtrp.compile(PackedInTheRoot(), n_gpus=2, devices=["cpu"] * 2, example_inputs=args)
    assert "Pack, run the layer and unpack in a submodule of its own" in str(caught.value)


class Split(nn.Module):
    def forward(self, x, sizes):
        return torch.stack([part.mean(0) for part in x.split(sizes.tolist())])


@pytest.mark.parametrize("sizes", [[2, 3, 1], [4, 2], [1, 1, 1, 3]])
def test_split_sizes(sizes):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.split, self.b = nn.Linear(4, 4), Split(), nn.Linear(4, 2)

        def forward(self, x, sizes):
            return self.b(self.split(self.a(x), sizes))

    args = torch.randn(6, 4), torch.tensor(sizes)
    assert_faithful(Model(), args)


def power(x):
    return x**2


def power_in_place(x):
    x = x + 1
    x **= 2
    return x


def reflected(x):
    return 2**x


@pytest.mark.parametrize("function", [power, power_in_place, reflected, lambda x: x ** x.abs()])
def test_powers_are_recorded(function):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.register_buffer("n", torch.zeros(1))

        def forward(self, x):
            y = function(torch.sigmoid(self.a(x)))
            with torch.no_grad():
                self.n.add_(1)
            return self.b(y)

    captured = assert_faithful(Model(), (torch.randn(3, 4),))
    assert captured.method == "record"


class Sampler(nn.Module):
    def __init__(self, draw):
        super().__init__()
        self.a, self.b, self.draw = nn.Linear(4, 8), nn.Linear(4, 2), draw

    def forward(self, x):
        mean, scale = self.a(x).chunk(2, -1)
        return self.b(self.draw(mean, F.softplus(scale) + 1e-3))


def normal(mean, scale):
    return torch.distributions.Normal(mean, scale).rsample()


def uniform(mean, scale):
    return torch.distributions.Uniform(mean, mean + scale).rsample()


def divergence(mean, scale):
    prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(scale))
    return torch.distributions.kl_divergence(torch.distributions.Normal(mean, scale), prior)


@pytest.mark.parametrize("draw", [normal, uniform, divergence])
def test_distributions(draw):
    assert_faithful(Sampler(draw), (torch.randn(3, 4),))


@pytest.mark.parametrize(
    "first",
    [
        lambda: nn.EmbeddingBag(50, 4, mode="sum", sparse=True),
        lambda: nn.Sequential(nn.Embedding(50, 4, sparse=True), nn.Flatten(), nn.Linear(20, 4)),
        lambda: nn.EmbeddingBag(50, 4, mode="mean", sparse=True),
    ],
)
def test_sparse_embeddings(first):
    torch.manual_seed(0)
    model = nn.Sequential(first(), nn.ReLU(), nn.Linear(4, 1))
    x = torch.randint(0, 50, (8, 5))
    plain = copy.deepcopy(model)
    pipe = dtrp.compile(model, n_gpus=1, devices=["cpu"], example_inputs=x)
    for call in (plain, pipe):
        call(x).sum().backward()
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad.to_dense(), q.grad.to_dense())


class Energy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


class ByBackward(Energy):
    def forward(self, x):
        x = x.detach().requires_grad_(True)
        self.net(x).sum().backward()
        return x.grad


class Inside(Energy):
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            return -torch.autograd.grad(self.net(x).sum(), x, create_graph=True)[0]


def test_backward_inside_forward_is_refused():
    with pytest.raises(CaptureError, match=r"under torch\.enable_grad\(\) and from a detached input"):
        capture(ByBackward(), (torch.randn(5, 3),))


@pytest.mark.parametrize("executor", sweep(["inline", "workers"]))
@pytest.mark.parametrize("method", ["bp", "dtrp"])
def test_the_way_out_for_gradients_inside_forward(executor, method):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.scale = Inside(), nn.Linear(3, 3)

        def forward(self, x):
            return self.scale(self.inner(x))

    torch.manual_seed(0)
    model, x, y = Model(), torch.randn(5, 3), torch.randn(5, 3)
    plain = copy.deepcopy(model)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    torch.testing.assert_close(pipe(x), model(x))
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(plain(x), y).backward()
        optimizer.step()
    with pipe.trainer(
        F.mse_loss, lambda p: torch.optim.SGD(p, lr=0.1), method=method, executor=executor
    ) as trainer:
        for _ in range(3):
            trainer.step(x, y)
    if method == "bp":
        for k, v in plain.state_dict().items():
            torch.testing.assert_close(model.state_dict()[k], v)

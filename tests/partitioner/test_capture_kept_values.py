"""Modules that are kept whole run on the example's own numbers when the model is captured."""

import gc

import pytest
import torch
from torch import nn
from torch.distributions import Bernoulli, Categorical
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import dtrp
from dtrp.memory import bytes_of, storage_of
from dtrp.partitioner.capture import capture
from tests.sweeps import sweep

from .test_capture import assert_faithful


class Packed(nn.Module):
    """A recurrent layer over sequences of different lengths."""

    def __init__(self, kind, width, total=True, **options):
        super().__init__()
        self.rnn = kind(width, 6, batch_first=True, **options)
        self.total = total

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        total = x.shape[1] if self.total else None
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=total)[0]


class Tagger(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.words = nn.Embedding(30, 5)
        self.layers = nn.ModuleList(layers)
        self.head = nn.LazyLinear(3)

    def forward(self, ids, lengths):
        x = self.words(ids)
        for layer in self.layers:
            x = layer(x, lengths)
        return self.head(x)


PACKED = {
    "LSTM": lambda: Tagger(Packed(nn.LSTM, 5)),
    "GRU, both directions, twice": lambda: Tagger(
        Packed(nn.GRU, 5, bidirectional=True), Packed(nn.GRU, 12, bidirectional=True)
    ),
    "as long as the longest": lambda: Tagger(Packed(nn.RNN, 5, total=False)),
    "several layers": lambda: Tagger(Packed(nn.LSTM, 5, num_layers=2), Packed(nn.LSTM, 6)),
}


@pytest.mark.parametrize("make", sweep(PACKED.values()), ids=PACKED)
def test_packed_sequences(make):
    torch.manual_seed(0)
    model, ids, lengths = make(), torch.randint(0, 30, (4, 7)), torch.tensor([7, 2, 5, 1])
    model(ids, lengths)
    captured = assert_faithful(model, (ids, lengths))
    assert [k.module for k in captured.kept_whole] == [f"layers.{i}" for i in range(len(model.layers))]
    other = torch.tensor([3, 4, 7, 7])
    for training in (True, False):
        assert torch.equal(captured.graph(training)(ids, other), model.train(training)(ids, other))
    for costs in ("analytic", "measured"):
        pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=(ids, lengths), costs=costs)
        assert torch.equal(pipe(ids, other), model(ids, other))


class Part(nn.Module):
    """``inner`` has the forward that is given, and is kept whole."""

    def __init__(self, function, inner=None):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.function = function
        if inner is not None:
            self.inner = Part(inner)

    def forward(self, *args):
        return self.function(self, *args)


def split_and_pool(m, x, lengths):
    return torch.stack([part.mean(0) for part in torch.split(x, lengths.tolist())])


def repeat_rows(m, x, lengths):
    return torch.cat([row.expand(n, -1) for row, n in zip(x, lengths.tolist(), strict=True)])


def rows_by_index(m, x, indices):
    assert indices.min() > 0, "counted from one"
    return m.a(torch.stack([x[int(i) - 1] for i in indices]))


def longest_first(m, x, lengths):
    if (lengths < 1).any():
        raise ValueError("a length below one")
    return x[lengths.argsort(descending=True)] / lengths.tolist()[0]


VALUES = {
    "split sizes": (split_and_pool, torch.randn(9, 4), torch.tensor([2, 3, 4])),
    "repetitions": (repeat_rows, torch.randn(3, 4), torch.tensor([2, 1, 4])),
    "indices": (rows_by_index, torch.randn(3, 4), torch.tensor([2, 1, 3])),
    "lengths in a check": (longest_first, torch.randn(3, 4), torch.tensor([2, 1, 4])),
}


@pytest.mark.parametrize(("inner", "x", "numbers"), VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("computed", sweep([True, False]), ids=["computed", "given"])
def test_numbers_from_the_example(inner, x, numbers, computed):
    """Also where the model's own code computes them from what it is given."""

    def use(m, x, numbers):
        return m.b(m.inner(m.a(x), (numbers * 2).roll(1).roll(-1) // 2 if computed else numbers))

    model = Part(use, inner)
    captured = assert_faithful(model, (x, numbers))
    assert [k.module for k in captured.kept_whole] == ["inner"]
    other = numbers.flip(0)
    for training in (True, False):
        assert torch.equal(captured.graph(training)(x, other), model.train(training)(x, other))
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=(x, numbers))
    assert torch.equal(pipe(x, other), model(x, other))


def choose(m, p):
    if m.training:
        return p[torch.arange(len(p)), Categorical(p).sample()]
    return p.max(-1).values if Categorical(p).entropy().mean() > 0 else p[:, 0]


def drop(m, p):
    kept = Bernoulli(p).sample().bool()
    return torch.stack([row[mask].sum() for row, mask in zip(p, kept, strict=True)])


def mix(m, p):
    return torch.multinomial(p, 2).float() * (p.sum(-1, keepdim=True) if p.sum() > 0 else 0)


@pytest.mark.parametrize("inner", [choose, drop, mix])
@pytest.mark.parametrize("given", sweep([False, True]), ids=["computed by layers", "given"])
def test_probabilities(inner, given):
    torch.manual_seed(0)

    def use(m, x):
        return m.inner(x if given else m.b(m.a(x)).softmax(-1))

    x = torch.randn(3, 4).softmax(-1)
    captured = assert_faithful(Part(use, inner), (x,))
    assert [k.module for k in captured.kept_whole] == ["inner"]


def test_a_method_of_the_root():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def pool(self, x, lengths):
            return torch.stack([part.mean(0) for part in torch.split(x, lengths.tolist())])

        def forward(self, x, lengths):
            return self.pool(self.a(x), lengths)

    captured = assert_faithful(Model(), (torch.randn(9, 4), torch.tensor([2, 3, 4])))
    assert [k.module for k in captured.kept_whole] == ["pool"]


def test_numbers_that_no_call_changes_are_not_touched():
    """Computing what the example holds must leave buffers and the example as they were."""

    def use(m, x, lengths):
        m.norm(x)
        lengths += 1
        return m.b(m.inner(m.norm(m.a(x)), lengths))

    model = Part(use, repeat_rows)
    model.norm = nn.BatchNorm1d(4)
    x, lengths = torch.randn(3, 4), torch.tensor([2, 1, 4])
    capture(model, (x, lengths), run=False)
    assert lengths.tolist() == [2, 1, 4]
    assert model.norm.num_batches_tracked == 0
    assert model.norm.running_mean.abs().sum() == 0


class Chosen(nn.Module):
    """Rows that fulfil something: kept whole."""

    def forward(self, x):
        return x[torch.nonzero(x[:, 0] > -9).flatten()]


def test_large_layers_and_what_leads_to_them_are_not_computed(monkeypatch):
    """A detector's backbone would be, for five calls, and its feature maps kept: 20 GB for two images."""
    real = []
    forward = nn.Linear.forward

    def watched(self, x):
        real.append(type(x) is torch.Tensor)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", watched)
    width = 1100  # times 4,000 rows: more than is computed
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, width), nn.ReLU(), Chosen(), nn.Flatten())
    captured = capture(model, (torch.randn(4000, 4),), run=False)
    assert [k.module for k in captured.kept_whole] == ["3"]
    assert real
    assert not any(real)


@pytest.mark.parametrize("sized", [False, True])
def test_nothing_large_is_kept_after_capturing(sized):
    """What kept modules gave for real, and the example's values on the way to them."""

    class Boxed:
        def __init__(self, x):
            self.x, self.size = x, x.shape[0] if sized else 0

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rows = nn.Linear(4, 300), Chosen()

        def forward(self, x):
            boxed = Boxed(self.first(x))
            return self.rows(boxed.x * 2) if not sized else self.rows(boxed.x * boxed.size)

    def alive():
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) is torch.Tensor and not t.is_meta]
        return sum({storage_of(t): bytes_of(t) for t in tensors}.values())

    model, x = Model(), torch.randn(2000, 4)
    before = alive()
    captured = capture(model, (x,))
    assert captured.kept_whole
    assert alive() - before < 2.5 * 2000 * 300 * 4  # the kept module's own inputs, for planning

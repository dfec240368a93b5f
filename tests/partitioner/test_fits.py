"""Calls of other shapes than the example's are right, or refused with the shapes."""

import copy
import math

import pytest
import torch
from torch import nn

import dtrp
from dtrp.partitioner.capture import capture
from dtrp.partitioner.capture.fits import Fits
from tests.sweeps import sweep


class Model(nn.Module):
    """``forward`` is given; a branch on a size stands in it."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.function = function

    def forward(self, *args, **kwargs):
        if len(args[0]) > 100:
            raise ValueError("too many")
        return self.function(self, *args, **kwargs)


def compiled(function, *example):
    return dtrp.compile(Model(function), n_gpus=2, devices=["cpu"] * 2, example_inputs=example)


def mean_by_size(m, x):
    return m.b(m.a(x).sum(1) / x.shape[1])


def test_a_size_that_the_code_computes_with_is_free():
    pipe = compiled(mean_by_size, torch.randn(2, 5, 4))
    for shape in [(7, 5, 4), (2, 10, 4), (1, 1, 4)]:
        x = torch.randn(shape)
        assert torch.equal(pipe(x), pipe.model(x))


def masks_by_factories(m, x):
    t, d = x.shape[1:]
    mask = torch.ones(t, t).tril() + torch.zeros((t, t)) + torch.full((t, t), 0.5) + torch.eye(t)
    return m.b(mask @ m.a(x)) + torch.arange(t)[:, None] + x.new_ones(t, d)


def positions(m, x):
    steps = [torch.arange(len(x)), torch.linspace(0, 1, int(x.size(0)))]
    return m.b(m.a(x)) * (1 / math.sqrt(x.size(1))) + sum(steps)[:, None, None]


def heads(m, x):
    n, t, d = x.size()
    y = m.a(x).view(n, t, 2, d // 2).transpose(1, 2)
    y = (y @ y.mT / t).softmax(-1) @ y
    return m.b(y.transpose(1, 2).reshape(n, -1, d))


def gathered(m, x):
    nodes = m.a(x).flatten(0, 1)
    edges = torch.arange(nodes.shape[0]) % x.shape[0]
    return m.b(torch.zeros(x.shape[0], nodes.size(1)).index_add_(0, edges, nodes))


def padded(m, x):
    extra = -x.shape[1] % 4
    y = nn.functional.pad(x, (0, 0, 0, extra))
    return m.b(m.a(y))[:, : x.shape[1]]


def rows(m, x):
    q, k = torch.stack([m.a(x), m.b(x)])  # a tensor, taken apart
    return torch.cat([row * k.mean() for row in q.unbind(0)])


def asked_for_gradients(m, x):
    y = x[:, :, None]
    y.requires_grad = True  # as models of transformers do it before they checkpoint
    return m.b(m.a(y.flatten(2)))


OPEN = [masks_by_factories, positions, heads, gathered, padded, asked_for_gradients]


@pytest.mark.parametrize("function", OPEN)
@pytest.mark.parametrize("training", [True, False])
def test_all_sizes_that_the_code_leaves_open_are_open(function, training):
    pipe = compiled(function, torch.randn(2, 5, 4))
    pipe.train(training)
    for shape in [(2, 5, 4), (3, 9, 4), (4, 1, 4), (1, 30, 4)]:
        x = torch.randn(shape)
        assert torch.equal(pipe(x), pipe.model(x))


def test_a_tensor_is_taken_apart_as_torch_does_it():
    """As unbind, not row by row; else the check by operators would refuse it."""
    pipe = compiled(rows, torch.randn(2, 5, 4))
    assert pipe.report.method == "record"
    for t in (5, 9):
        x = torch.randn(2, t, 4)
        assert torch.equal(pipe(x), pipe.model(x))


def by_length(m, x):
    if x.shape[1] > 8:
        return m.a(x)
    return m.b(x)


def by_loop(m, x):
    for i in range(x.shape[1]):
        x = x + m.a(x[:, i : i + 1])
    return x


def by_table(m, x):
    return m.b(x) * {5: 1.0, 6: 2.0}.get(x.shape[1], 3.0)


@pytest.mark.parametrize("function", [by_length, by_loop, by_table])
def test_a_size_that_decides_is_refused_with_its_line(function):
    pipe = compiled(function, torch.randn(2, 5, 4))
    for n in (2, 3):
        x = torch.randn(n, 5, 4)
        assert torch.equal(pipe(x), pipe.model(x))
    text = r"args\[0\]' is float32 of shape \(2, 9, 4\) now.*test_fits\.py:\d+ needs a plain Python value"
    with pytest.raises(ValueError, match=text):
        pipe(torch.randn(2, 9, 4))


@pytest.mark.parametrize("executor", sweep(["inline", "workers"]))
def test_other_lengths_in_every_batch_train_like_the_plain_loop(executor):
    torch.manual_seed(0)
    pipe = compiled(heads, torch.randn(2, 5, 4))
    plain = copy.deepcopy(pipe.model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    with pipe.trainer(
        nn.functional.mse_loss, lambda p: torch.optim.SGD(p, lr=0.1), method="bp", executor=executor
    ) as trainer:
        for t in (5, 9, 3, 12, 5, 1):
            x, y = torch.randn(2, t, 4), torch.randn(2, t, 4)
            trainer.step(x, y)
            optimizer.zero_grad()
            nn.functional.mse_loss(plain(x), y).backward()
            optimizer.step()
    for k, v in plain.state_dict().items():
        torch.testing.assert_close(pipe.model.state_dict()[k], v)


def test_a_size_that_the_code_does_not_look_at_is_free():
    pipe = compiled(lambda m, x: m.b(torch.relu(m.a(x))), torch.randn(2, 5, 4))
    for shape in [(2, 9, 4), (3, 9, 4), (6, 1, 4)]:
        x = torch.randn(shape)
        assert torch.equal(pipe(x), pipe.model(x))


def test_layers_keep_all_sizes_open():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2))
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=torch.randn(2, 1, 8, 8))
    x = torch.randn(3, 1, 12, 10)
    assert torch.equal(pipe(x), model(x))


def rows_one_by_one(m, x):
    return m.b(torch.stack([m.a(row) for row in x]))


def test_a_fixed_batch_refuses_another():
    """Rows would be lost without a word."""
    pipe = compiled(rows_one_by_one, torch.randn(3, 4))
    x = torch.randn(3, 4)
    assert torch.equal(pipe(x), pipe.model(x))
    with pytest.raises(ValueError, match=r"test_fits\.py:\d+ needs a plain Python value"):
        pipe(torch.randn(5, 4))
    trainer = pipe.trainer(nn.functional.mse_loss, torch.optim.SGD, executor="inline")
    with trainer, pytest.raises(ValueError, match=r"test_fits\.py:\d+ needs a plain Python value"):
        trainer.step(torch.randn(5, 4), torch.randn(5, 4))


def test_another_dtype_or_number_of_dimensions_is_checked():
    def by_dtype(m, x, y):
        return m.b(m.a(x)) * (2 if y.dtype == torch.long else 3)

    pipe = compiled(by_dtype, torch.randn(2, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"'args\[1\]' is float32 of shape \(2,\) now and was int64"):
        pipe(torch.randn(2, 4), torch.zeros(2))


def test_sizes_that_were_equal_by_chance():
    """Each number follows the tensor that it came from."""

    def two(m, x, memory):
        return m.b(m.a(x)).reshape(x.shape[0] * 2, 2), m.a(memory).reshape(memory.shape[0] * 2, 2)

    pipe = compiled(two, torch.randn(3, 4), torch.randn(3, 4))
    for rows in (5, 7, 1):
        x, memory = torch.randn(5, 4), torch.randn(rows, 4)
        assert all(torch.equal(a, b) for a, b in zip(pipe(x, memory), pipe.model(x, memory), strict=True))


def test_sizes_that_must_be_equal():
    def masked(m, x, mask):
        y = m.b(m.a(x) * mask[:, None])
        return y.reshape(x.shape[0] * 2, 2)

    pipe = compiled(masked, torch.randn(3, 4), torch.ones(3))
    x = torch.randn(5, 4)
    assert torch.equal(pipe(x, torch.ones(5)), pipe.model(x, torch.ones(5)))
    with pytest.raises(ValueError, match="and fails with these sizes"):
        pipe(x, torch.ones(4))


def test_shapes_that_were_found_right_are_not_looked_at_again(monkeypatch):
    x = torch.randn(2, 5, 4)
    captured = capture(Model(lambda m, x: m.b(m.a(x))), (x,))
    fits = Fits(captured)
    longer = torch.randn(2, 6, 4)
    fits.check([longer], True)
    monkeypatch.setattr("dtrp.partitioner.capture.fits.Runner", None)
    fits.check([longer], True)
    fits.check([x], True)


def test_an_empty_batch_may_take_another_course():
    def forward(m, x):
        return m.b(m.a(x)) if len(x) else torch.zeros(0, 7)

    pipe = compiled(forward, torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"of shape \(0, 4\) now"):
        pipe(torch.randn(0, 4))
    pipe = compiled(lambda m, x: m.b(m.a(x)), torch.randn(3, 4))
    assert pipe(torch.randn(0, 4)).shape == (0, 4)

"""Calls of other shapes than the example's are right, or refused with the shapes."""

import pytest
import torch
from torch import nn

import dtrp
from dtrp.partitioner.capture import capture
from dtrp.partitioner.capture.fits import Fits


class Model(nn.Module):
    """``forward`` is given; a branch on a size makes fx's own tracer give up."""

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


def test_a_size_that_the_code_computes_with_is_refused():
    """It stands in the graph as a number: another length would be divided by the example's."""
    pipe = compiled(mean_by_size, torch.randn(2, 5, 4))
    x = torch.randn(7, 5, 4)
    assert torch.equal(pipe(x), pipe.model(x)), "any batch size"
    with pytest.raises(ValueError, match=r"'args\[0\]' is float32 of shape \(2, 10, 4\) now") as error:
        pipe(torch.randn(2, 10, 4))
    assert "(2, 5, 4) when the model was compiled" in str(error.value)
    assert "any batch size" in str(error.value)


def test_a_size_that_the_code_does_not_look_at_is_free():
    pipe = compiled(lambda m, x: m.b(torch.relu(m.a(x))), torch.randn(2, 5, 4))
    for shape in [(2, 9, 4), (3, 9, 4), (6, 1, 4)]:
        x = torch.randn(shape)
        assert torch.equal(pipe(x), pipe.model(x))


def test_fx_keeps_all_sizes_open():
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
    with pytest.raises(ValueError, match=r"for that batch size alone"):
        pipe(torch.randn(5, 4))
    trainer = pipe.trainer(nn.functional.mse_loss, torch.optim.SGD, executor="inline")
    with trainer, pytest.raises(ValueError, match=r"for that batch size alone"):
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
    with pytest.raises(ValueError, match="as capturing it for the new ones fails"):
        pipe(x, torch.ones(4))


def test_shapes_that_were_found_right_are_not_captured_again(monkeypatch):
    x = torch.randn(2, 5, 4)
    captured = capture(Model(lambda m, x: m.b(m.a(x))), (x,))
    assert captured.method == "record"
    fits = Fits(captured)
    longer = torch.randn(2, 6, 4)
    fits.check([longer], (longer,), {}, True)
    monkeypatch.setattr("dtrp.partitioner.capture.fits.capture", None)
    fits.check([longer], (longer,), {}, True)
    fits.check([x], (x,), {}, True)


def test_an_empty_batch_may_take_another_course():
    def forward(m, x):
        return m.b(m.a(x)) if len(x) else torch.zeros(0, 7)

    pipe = compiled(forward, torch.randn(3, 4))
    with pytest.raises(ValueError, match=r"of shape \(0, 4\) now"):
        pipe(torch.randn(0, 4))
    pipe = compiled(lambda m, x: m.b(m.a(x)), torch.randn(3, 4))
    assert pipe(torch.randn(0, 4)).shape == (0, 4)

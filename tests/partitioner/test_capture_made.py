"""Tensors that forward makes of numbers without a torch function: legacy constructors, arrays of numpy."""

import numpy as np
import pytest
import torch
from torch import nn

import dtrp
from dtrp.errors import CaptureError
from dtrp.partitioner.capture import capture

from .test_capture import assert_faithful
from .test_capture_habits import Model

TABLE = np.linspace(-1, 1, 4)

MADE = {
    "Tensor of a list": lambda h: h * torch.Tensor([1e10, 2, 3, 4]).reciprocal(),
    "Tensor of sizes": lambda h: h + torch.Tensor(1, 4).fill_(2),
    "empty": lambda h: torch.cat([torch.Tensor(), h.flatten()]).view_as(h),
    "FloatTensor": lambda h: h + torch.FloatTensor([[0.5], [1.0], [2.0]]).sum(0),
    "LongTensor": lambda h: h[:, torch.LongTensor([0, 3, 3, 1])],
    "BoolTensor": lambda h: h.masked_fill(torch.BoolTensor([True, False, False, True]), 0.0),
    "array": lambda h: h * torch.Tensor(TABLE),
    "from_numpy": lambda h: h + torch.from_numpy(np.arange(4.0)).to(h),
    "numpy table of many": lambda h: h + torch.from_numpy(np.outer(TABLE, np.arange(100.0))).float().sum(1),
    "Parameter": lambda h: h + nn.Parameter(torch.Tensor([1.0, 2.0, 3.0, 4.0]), requires_grad=False),
    "its value": lambda h: h * torch.Tensor([3.0]).item(),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_tensors_made_without_a_torch_function(make):
    torch.manual_seed(0)
    x, model = torch.randn(3, 4), Model(lambda m, x: m.b(make(m.a(x))))
    assert not assert_faithful(model, (x,)).kept_whole
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=x)
    for given in (x, x, torch.randn(5, 4)):
        torch.testing.assert_close(pipe(given), model(given))


def test_a_constant_that_is_written_to_is_made_for_each_call():
    """Held in the graph it would be another at the next call."""

    def adds(m, x):
        offset = torch.Tensor([1.0, 2.0, 3.0, 4.0])
        offset *= 2
        return m.a(x) + offset

    x = torch.randn(3, 4)
    model = Model(lambda m, x: m.b(m.inner(x)), adds)
    assert [k.module for k in assert_faithful(model, (x,)).kept_whole] == ["inner"]
    with pytest.raises(CaptureError, match=r"changes the tensor '_constant_0' in place"):
        capture(Model(lambda m, x: m.b(adds(m, x))), (x,))


def makes_its_head(m, x):
    if not hasattr(m, "head"):
        m.head = nn.Linear(x.shape[-1], 2)
    return m.head(m.a(x))


def by_a_list(m, x):
    if not hasattr(m, "more"):
        m.more = nn.ModuleList()
    if len(m.more) < 1:
        m.more.append(nn.Linear(4, 4))
    return m.more[0](m.a(x))


@pytest.mark.parametrize("inside", [False, True], ids=["root", "submodule"])
@pytest.mark.parametrize("forward", [makes_its_head, by_a_list])
def test_layers_that_forward_makes_when_it_first_runs(forward, inside):
    """Their parameters would be those of no optimizer; once they are there, all is well."""
    x = torch.randn(3, 4)
    model = Model(lambda m, x: m.inner(x), forward) if inside else Model(forward)
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(CaptureError, match=r"makes the layer '.*(head|more)") as e:
        capture(model, (x,))
    assert "Call the model once on an example" in str(e.value)
    assert [name for name, _ in model.named_modules()] == names
    model(x)
    assert not assert_faithful(model, (x,)).kept_whole

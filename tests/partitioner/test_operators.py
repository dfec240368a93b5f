"""The check by operators finds what is wrong with a graph, at any size, without computing anything."""

import dataclasses
import functools
import operator
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Graph, Node

from dtrp.partitioner.capture import capture
from dtrp.partitioner.capture.graph import Signature
from dtrp.partitioner.capture.modes import BothModes
from dtrp.partitioner.capture.record import record
from dtrp.partitioner.capture.task import Task
from dtrp.partitioner.capture.verify import Unfaithful, verify
from tests.sweeps import sweep


class Attention(nn.Module):
    def __init__(self, d=8):
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.norm = nn.LayerNorm(d)
        self.register_buffer("seen", torch.zeros(d))

    def forward(self, x):
        q = self.q(x) * 0.5
        k, v = self.kv(x).chunk(2, -1)
        weights = torch.softmax(q @ k.transpose(1, 2) - 0.1, -1)
        y = F.dropout(weights @ v, 0.1, self.training)
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * y.detach().mean((0, 1))
        return self.norm(x + self.out(y) - self.seen)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn, self.head = nn.BatchNorm2d(4), nn.Linear(4, 3)

    def forward(self, x):
        y = F.relu(self.bn(self.a(x)))
        z = self.b(y).div(2.0) + y
        z = z + torch.cat([z[:, 1:], torch.sigmoid(z[:, :1])], 1) ** 2
        return {"y": self.head(z.mean((2, 3)).clamp(min=-1)), "z": z.flatten(1).sub(y.flatten(1), alpha=2)}


MODELS = {
    "attention": lambda: (nn.Sequential(Attention(), Attention()), torch.randn(2, 5, 8)),
    "convolution": lambda: (Convolution(), torch.randn(2, 3, 6, 6)),
}


def traced(model, x, way):
    task = Task(model, Signature.of(model, (x,), {}), (x,))
    both: BothModes = way(task)
    return task, both.train


def floats(node):
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def follow(node, function, *args):
    """Put a function behind a node, in front of all its users."""
    with node.graph.inserting_after(node):
        made = node.graph.call_function(function, (node, *args))
    node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
    made.args = (node, *args)


def drop(node, draw):
    if not floats(node) or not node.users:
        return False
    same = [a for a in node.all_input_nodes if floats(a) and a.meta["val"].shape == node.meta["val"].shape]
    if not same:
        return False
    node.replace_all_uses_with(same[0])
    node.graph.erase_node(node)
    return True


def swap(node, draw):
    args = list(node.args)
    places = [i for i, a in enumerate(args) if isinstance(a, Node) and floats(a)]
    if len(places) < 2 or args[places[0]] is args[places[1]]:
        return False
    i, j = places[:2]
    args[i], args[j] = args[j], args[i]
    node.args = tuple(args)
    return True


def change_number(node, draw):
    places = [i for i, a in enumerate(node.args) if type(a) in (int, float)]
    keys = [k for k, a in node.kwargs.items() if type(a) in (int, float)]
    if not places and not keys:
        return False
    if places:
        i = draw.choice(places)
        node.args = tuple(a + 1 if n == i else a for n, a in enumerate(node.args))
    else:
        node.kwargs = {**node.kwargs, keys[0]: node.kwargs[keys[0]] + 1}
    return True


def detach(node, draw):
    if not floats(node) or not node.meta["val"].requires_grad or not node.users:
        return False
    follow(node, torch.detach)
    return True


def other_dtype(node, draw):
    if not floats(node) or not node.users:
        return False
    follow(node, torch.Tensor.double)
    return True


def scale(node, draw):
    if not floats(node) or not node.users:
        return False
    follow(node, operator.mul, 1.0)
    return True


def other_tensor(node, draw):
    inputs = [a for a in node.all_input_nodes if floats(a)]
    before = []
    for earlier in node.graph.nodes:
        if earlier is node:
            break
        before.append(earlier)
    alike = [
        (a, b) for a in inputs for b in before
        if b is not a and floats(b) and b.meta["val"].shape == a.meta["val"].shape
    ]  # fmt: skip
    if not alike:
        return False
    a, b = draw.choice(alike)
    node.replace_input_with(a, b)
    return True


FAULTS = [drop, swap, change_number, detach, other_dtype, scale, other_tensor]


TRACED = [("attention", record), ("convolution", record)]


def copied(traced):
    """The same with a graph of its own, to be changed."""
    graph = Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    graph.output_node().meta.update(traced.graph.output_node().meta)
    return dataclasses.replace(traced, graph=graph)


@functools.cache
def correct(name, way):
    """A model's graph, checked."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    task, good = traced(model, x, way)
    verify(task, good, True)
    return task, good


@pytest.mark.parametrize("most", [3, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "way"), sweep(TRACED, 2))
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found(fault, name, way, most):
    """``most``: how many places are tried, drawn from all."""
    task, good = correct(name, way)
    calls = [n.name for n in good.graph.nodes if n.op.startswith("call")]
    draw, made = random.Random(0), 0
    draw.shuffle(calls)
    for target in calls:
        if made == most:
            break
        bad = copied(good)
        nodes = {n.name: n for n in bad.graph.nodes}
        for old in good.graph.nodes:
            nodes[old.name].meta = dict(old.meta)
        if not fault(nodes[target], draw):
            continue
        made += 1
        try:
            verify(task, bad, True)
        except Unfaithful:
            continue
        except Exception:
            continue  # it does not even run
        pytest.fail(f"{fault.__name__} at {target} was not found:\n{bad.graph}")
    assert made >= 2


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


def by_type(x):
    return torch.tanh(x) if isinstance(x, torch.Tensor) else x


def in_half(x):
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ x.transpose(-1, -2)).float()


class Big(nn.Module):
    """Of a size at which nothing could be computed."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Linear(64, 4096), nn.Linear(4096, 64)
        self.function = function

    def forward(self, x):
        return self.b(self.function(torch.relu(self.a(x))))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("function", [Reverse.apply, by_type, torch.is_tensor, in_half])
def test_custom_backwards_and_autocast_are_right_at_any_size(function, device):
    if function is torch.is_tensor:

        def function(x):
            return x.exp() if torch.is_tensor(x) else x

    with torch.device(device):
        shape = (4096, 4096, 64) if device == "meta" else (2, 4096, 64)
        model, x = Big(function), torch.randn(shape)
    if function is in_half:
        model.b = nn.Linear(x.shape[1], 64, device=device)
    captured = capture(model, (x,))
    code = captured.train.module.code
    names = {Reverse.apply: "Reverse(", by_type: "tanh(", in_half: "_matmul("}
    assert names.get(function, "exp(") in code


def test_the_first_operator_that_differs_is_named():
    task, good = traced(Big(by_type), torch.randn(4, 64), record)
    bad = copied(good)
    for node in bad.graph.nodes:
        if node.target is torch.tanh:
            node.target = torch.sin
    text = r"the model runs aten\.tanh\.default\(%\d+\).* where its graph runs aten\.sin"
    with pytest.raises(Unfaithful, match=text) as error:
        verify(task, bad, True)
    assert "test_operators.py:" in str(error.value)

"""Random modules: whatever is drawn, the captured graphs do what the module does."""

import os

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import dtrp
from dtrp.partitioner.capture import capture

from .test_capture import assert_faithful

WIDTH = 4


class Node(nn.Module):
    """Runs a list of drawn steps, each on some of the values so far."""

    def __init__(self, steps, children):
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.parts = nn.ModuleList(children)
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x):
        values = [x]
        for kind, i, j in self.steps:
            values.append(self.step(kind, values[i % len(values)], values[j % len(values)], j))
        return values[-1] + values[len(values) // 2], values[-1]

    def step(self, kind, a, b, k):
        match kind:
            case "layer":
                return self.layers[k % 2](a)
            case "norm":
                return self.norm(a)
            case "part":
                return self.parts[k % len(self.parts)](a)[k % 2] if len(self.parts) else torch.tanh(a)
            case "add":
                return a + 0.5 * b
            case "in place":
                return (a * 1.5).clone().add_(b).mul_(0.5)
            case "view":
                y = a.clone()
                y[:, : WIDTH // 2].mul_(2)
                y[0] = b[-1]
                return y
            case "dropout":
                return F.dropout(a, 0.4, self.training)
            case "mode":
                return torch.tanh(a) if self.training else torch.relu(b) + a
            case "buffer":
                if self.training:
                    self.seen.mul_(0.9).add_(a.detach().mean(0), alpha=0.1)
                return a - self.seen
            case "shape":
                return a.reshape(len(a) * 2, -1).reshape(a.shape[0], WIDTH) + b.size(0)
            case "noise":
                return a + torch.rand(a.shape[0], 1) * b
            case "tied":
                return F.linear(a, self.layers[0].weight.t(), self.layers[1].bias)
        raise AssertionError(kind)


KINDS = [
    "layer",
    "norm",
    "part",
    "add",
    "in place",
    "view",
    "dropout",
    "mode",
    "buffer",
    "shape",
    "noise",
    "tied",
]
STEPS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=7
)


@st.composite
def modules(draw, depth=2):
    children = []
    if depth:
        children = draw(st.lists(modules(depth=depth - 1), max_size=2))
        if children and draw(st.booleans()):
            children.append(children[0])  # the same module again
    return Node(draw(STEPS), children)


class Outputs(nn.Module):
    """Several outputs in a dict, one of them constant."""

    def __init__(self, node):
        super().__init__()
        self.node = node
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x, y):
        a, b = self.node(x + y)
        return {"head": self.head(a), "rest": (b, None, 3)}


def drawn(node, seed):
    """The model for a drawn node, and an example call."""
    torch.manual_seed(seed)
    model = Outputs(node)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    return model, (torch.randn(3, WIDTH), torch.randn(3, WIDTH))


# DTRP_EXAMPLES=500 for a thorough run.
thorough = settings(
    max_examples=int(os.environ.get("DTRP_EXAMPLES", "5")),
    derandomize="DTRP_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@given(modules(), st.integers(0, 2**31 - 1), st.sampled_from(["record", "fixed sizes"]))
@thorough
def test_every_way_is_faithful(node, seed, way):
    model, args = drawn(node, seed)
    assert_faithful(model, args, captured=capture(model, args, ways=[way]))


@given(modules(), st.integers(0, 2**31 - 1), st.integers(1, 4))
@thorough
def test_pipelines_are_faithful(node, seed, n_gpus):
    model, args = drawn(node, seed)
    pipe = dtrp.compile(model, n_gpus=n_gpus, devices=["cpu"] * n_gpus, example_inputs=args)
    assert_faithful(model, args, function=pipe)

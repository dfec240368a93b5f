"""Batches that are objects: opened along their attributes, or refused with the way out."""

import copy
import dataclasses
import functools
import weakref
from collections import deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import dtrp
from dtrp.partitioner.capture import capture


class Plain:
    def __init__(self, x, scale=1.0):
        self.x, self.scale = x, scale


@dataclasses.dataclass
class Fields:
    x: torch.Tensor
    scale: float = 1.0


class Store:
    """As PyTorch Geometric's: attributes stand in a dict of a part that knows its owner."""

    def __init__(self, owner, **values):
        self.__dict__.update(_mapping=values, _parent=weakref.ref(owner))

    def __getattr__(self, name):
        try:
            return self.__dict__["_mapping"][name]
        except KeyError:
            raise AttributeError(name) from None


class Data:
    def __init__(self, x, scale=1.0):
        self.__dict__["_store"] = Store(self, x=x, scale=scale)

    def __getattr__(self, name):
        if "_store" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.__dict__["_store"], name)

    def __setattr__(self, name, value):
        self.__dict__["_store"]._mapping[name] = value

    def __call__(self):
        raise NotImplementedError

    @property
    def owner_of_store(self):
        return self.__dict__["_store"].__dict__["_parent"]()


class Registered:
    __slots__ = ("scale", "x")

    def __init__(self, x, scale=1.0):
        self.x, self.scale = x, scale


pytree.register_pytree_node(Registered, lambda b: ([b.x], b.scale), lambda x, s: Registered(x[0], s))


class Slots:
    __slots__ = ("scale", "x")

    def __init__(self, x, scale=1.0):
        self.x, self.scale = x, scale


class SlotsToo(Slots):
    def __init__(self, x, scale=1.0):
        super().__init__(x, scale)
        self.further = "in its __dict__"


class Hides:
    def __init__(self, x):
        self.parts = deque([x])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, batch):
        batch.x = torch.relu(self.a(batch.x)) * batch.scale
        return self.b(batch.x)


KINDS = [Plain, Fields, Data, Registered, Slots, SlotsToo, SimpleNamespace]


def made(kind, x, **options):
    return kind(x=x, scale=options.get("scale", 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_are_objects(kind):
    torch.manual_seed(0)
    model, x, y = Model(), torch.randn(4, 4), torch.randn(4, 4)
    batch = made(kind, x)
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=batch)
    assert batch.x is x, "capturing works on a copy"
    for given in (x, y):
        assert torch.equal(pipe(made(kind, given)), model(made(kind, given)))
    batch.x = y  # the same object with new contents
    assert torch.equal(pipe(batch), model(made(kind, y)))


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_batches_that_are_objects(kind):
    torch.manual_seed(0)
    model, batches = Model(), [torch.randn(4, 4) for _ in range(3)]
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        plain(made(kind, x)).pow(2).mean().backward()
        optimizer.step()
    pipe = dtrp.compile(model, n_gpus=2, devices=["cpu"] * 2, example_inputs=made(kind, batches[0]))
    make = functools.partial(torch.optim.SGD, lr=0.1)
    with pipe.trainer(lambda o, y: o.pow(2).mean(), make, method="bp", executor="inline") as trainer:
        for x in batches:
            trainer.step(made(kind, x), torch.zeros(4))
    for name, p in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), p), name


@pytest.mark.parametrize("kind", KINDS[:3])
def test_what_else_a_batch_holds_is_part_of_the_graph(kind):
    captured = capture(Model(), (made(kind, torch.randn(4, 4)),))
    with pytest.raises(
        (TypeError, ValueError), match=r"scale.* was 1\.0 when the model was compiled and is 2\.0"
    ):
        captured.signature.flatten((made(kind, torch.randn(4, 4), scale=2.0),), {})
    with pytest.raises(TypeError, match="another structure"):
        captured.signature.flatten((made(kind, [torch.randn(4, 4)]),), {})


def test_the_order_of_a_dicts_keys_does_not_matter():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, batch):
            return self.a(batch["x"]) - batch["more"]["y"] * batch["more"]["z"]

    x, y, z = torch.randn(3, 2, 4)
    captured = capture(Named(), ({"x": x, "more": {"y": y, "z": z}},))
    assert captured.signature.flatten(({"more": {"z": z, "y": y}, "x": x},), {}) == [x, y, z]
    with pytest.raises(TypeError, match="another structure"):
        captured.signature.flatten(({"more": {"z": z, "x": y}, "x": x},), {})


def test_a_part_that_knows_its_owner_knows_the_new_one():
    seen = []

    class Asks(Model):
        def forward(self, batch):
            seen.append(batch.owner_of_store)
            return self.b(self.a(batch.owner_of_store.x))

    batch = Data(torch.randn(4, 4))
    captured = capture(Asks(), (batch,), run=False)
    assert captured.train.module.graph.find_nodes(op="get_attr") == []
    assert all(owner is not batch for owner in seen)


@pytest.mark.parametrize("wrap", [lambda b: b, lambda b: [b], lambda b: {"inner": SimpleNamespace(b=b)}])
def test_a_batch_that_cannot_be_opened_is_refused(wrap):
    """Its tensors would be frozen: the graph would give the example's result for every batch."""
    with pytest.raises(
        TypeError,
        match=r"is a (Hides|SimpleNamespace), which holds tensors where they cannot be seen.*register_p",
    ):
        capture(Model(), (wrap(Hides(torch.randn(4, 4))),))

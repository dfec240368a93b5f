"""Messages arrive as they were sent: values, dtypes, shapes and the order of dimensions in memory."""

from __future__ import annotations

import os
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dtrp
from dtrp.runtime.executors import workers
from dtrp.runtime.links import Channel, InlineLinks, Message, canonical, channels, dense_order, expect
from dtrp.runtime.mailbox import Mailbox, open_mailboxes
from dtrp.runtime.mailbox import close_mailboxes as close
from dtrp.runtime.process_links import _DTYPES, decode, encode
from dtrp.runtime.program import Tie
from dtrp.runtime.transfer import dumps, loads
from dtrp.wiring import CALLER, Source, StageWires, Wiring


@st.composite
def tensors(draw: Any) -> Tensor:
    """Tensors of any dtype and up to 5 dimensions, permuted, sliced, expanded, empty."""
    dtype = draw(st.sampled_from(_DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
    if shape:
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
        if draw(st.booleans()):
            tensor = tensor[..., draw(st.integers(0, 1)) :: draw(st.integers(1, 2))]
        if draw(st.booleans()):
            tensor = tensor.unsqueeze(0).expand(2, *tensor.shape)
    return tensor


def over_the_wire(values: tuple[Any, ...], mailbox: bool = False) -> tuple[Any, ...]:
    """What the receiving end makes of the header and the bytes that the sending end makes."""
    header, sent = encode(Message(3, values, skip=True), len(values))
    message, empty, shared = decode(header)
    assert (message.slot, message.skip, shared) == (3, True, False)
    assert [flat.numel() for flat in empty] == [flat.numel() for flat in sent]
    if mailbox:
        sender, receiver = ends()
        assert sender.put(sent)
        receiver.take(empty)
    else:
        for there, here in zip(empty, sent, strict=True):
            there.copy_(here)
    return message.values


def ends() -> tuple[Mailbox, Mailbox]:
    """Both ends of a mailbox, as two processes have them: each with a mapping of its own."""
    (descriptor,) = open_mailboxes([Channel("forward", 0, 1)]).values()
    two = Mailbox(descriptor), Mailbox(os.dup(descriptor))
    for end in two:
        weakref.finalize(end, os.close, end.descriptor)
    return two


has_mailboxes = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no anonymous shared memory here")


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_tensors_survive_the_wire(tensor: Tensor) -> None:
    (arrived,) = over_the_wire((tensor,))
    assert arrived.dtype == tensor.dtype
    assert torch.equal(arrived, tensor)
    assert arrived.stride() == canonical(tensor).stride() or tensor.numel() <= 1 or 1 in tensor.shape


@settings(max_examples=100, deadline=None)
@given(tensors())
def test_tensors_survive_the_private_channel(tensor: Tensor) -> None:
    arrived = loads(dumps(tensor))
    assert arrived.dtype == tensor.dtype
    assert torch.equal(arrived, tensor)


def test_structures_survive_the_private_channel() -> None:
    """Without a warning: torch 2.11 gives one to whoever unpickles a leaf as it pickles it."""
    for value in (1, {"a": 1, "b": (2, [3, None])}):
        structure = pytree.tree_structure(value)
        assert loads(dumps(structure)) == structure


@has_mailboxes
@settings(max_examples=100, deadline=None)
@given(st.lists(tensors(), max_size=3))
def test_tensors_survive_the_mailbox(sent: list[Tensor]) -> None:
    """Several values of odd sizes lie beside each other without touching."""
    arrived = over_the_wire(tuple(sent), mailbox=True)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(arrived, sent, strict=True))


@has_mailboxes
def test_a_mailbox_grows_and_refuses_while_it_is_full() -> None:
    """A message that the receiver has not taken yet is never overwritten, and no size is too large."""
    sender, receiver = ends()
    for size in (10, 5_000_000, 100):  # within the first page, beyond it, and smaller again
        sent = [torch.randint(0, 256, (size,), dtype=torch.uint8), torch.full((3,), 7, dtype=torch.uint8)]
        assert sender.put(sent)
        assert receiver.full
        assert not sender.put([torch.zeros(10, dtype=torch.uint8)])
        arrived = [torch.zeros_like(flat) for flat in sent]
        receiver.take(arrived)
        assert all(torch.equal(a, b) for a, b in zip(arrived, sent, strict=True))
        assert not sender.full


@pytest.mark.parametrize("mailboxes", [pytest.param(True, marks=has_mailboxes), False])
def test_large_values_reach_the_next_stage(mailboxes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through shared memory, and over sockets where the system has none: the weights of a run inline."""
    if not mailboxes:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    used = []
    monkeypatch.setattr(workers, "close_mailboxes", lambda found: used.append(len(found)) or close(found))
    states = []
    for executor in ("inline", "workers"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 4))
        x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))
        pipe = dtrp.compile(model, n_gpus=2, example_inputs=x, devices=["cpu"] * 2)
        optimizer = partial(torch.optim.SGD, lr=0.1)
        with pipe.trainer(F.cross_entropy, optimizer, executor=executor, seed=0) as trainer:
            for _ in range(20):
                trainer.step(x, y)
            trainer.flush()
        states.append(model.state_dict())
    assert used == [3 if mailboxes else 0], "one mailbox per channel: forward, backward, evaluate"
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_channels_last_stays_channels_last() -> None:
    image = torch.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    assert dense_order(image) == (0, 2, 3, 1)
    links = InlineLinks()
    channel = Channel("forward", 0, 1)
    links.send(channel, Message(0, (image,)))
    for arrived in (links.receive(channel, 0).values[0], over_the_wire((image,))[0], loads(dumps(image))):
        assert arrived.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(arrived, image)


def test_numbers_travel_in_the_header() -> None:
    values = (None, True, False, -3, 2**62, 1.5, float("inf"), torch.ones(2))
    arrived = over_the_wire(values)
    assert arrived[:-1] == values[:-1]
    assert [type(v) for v in arrived[:-1]] == [type(v) for v in values[:-1]]


def test_what_cannot_travel_is_refused() -> None:
    with pytest.raises(TypeError, match="a value of type str cannot travel between stages"):
        encode(Message(0, ("text",)), 1)
    with pytest.raises(TypeError, match="cannot travel between stages; dense tensors"):
        encode(Message(0, (torch.ones(3).to_sparse(),)), 1)


def test_a_slice_does_not_drag_its_storage_along() -> None:
    """A view of a large tensor is sent, and kept in a stash, as a tensor of its own."""
    part = torch.arange(1000.0)[:10]
    assert canonical(part).untyped_storage().nbytes() == 40


def test_messages_out_of_turn_are_noticed() -> None:
    with pytest.raises(RuntimeError, match="delivered slot 4 where slot 5 was due"):
        expect(Message(4, ()), Channel("forward", 0, 1), 5)


def test_every_channel_of_a_pipeline_is_known() -> None:
    wires = (
        StageWires((Source(CALLER, 0),), ("a", "n"), (True, False)),
        StageWires((Source(0, 0),), ("b",), (True,)),
        StageWires((Source(1, 0), Source(0, 0), Source(0, 1), Source(CALLER, 1)), ("c",), (True,)),
    )
    wiring = Wiring(wires, (Source(2, 0), Source(1, 0)), pytree.tree_structure((0, 0)))
    assert wiring.sends == {(0, 1): (0,), (0, 2): (0, 1), (1, 2): (0,)}
    assert wiring.gradients == {(0, 1): (0,), (0, 2): (0,), (1, 2): (0,)}
    assert [wiring.caller_inputs(k) for k in range(3)] == [(0,), (), (1,)]
    found = channels(wiring, wiring, [Tie(((0, "w"), (2, "v")))])
    assert found[Channel("forward", 0, 2)] == 2
    assert found[Channel("backward", 2, 0)] == 1
    assert found[Channel("tied-gradient", 2, 0)] == found[Channel("tied-sum", 0, 2)] == 1
    assert list(found) == sorted(found)

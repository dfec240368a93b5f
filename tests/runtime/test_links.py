"""Messages arrive as they were sent: values, dtypes, shapes and the order of dimensions in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from dtrp.runtime.links import Channel, InlineLinks, Message, canonical, channels, dense_order, expect
from dtrp.runtime.process_links import _DTYPES, _decode, encode
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


def over_the_wire(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the receiving end makes of the header and the bytes that the sending end makes."""
    header, payload = encode(Message(3, values), len(values))
    fields, rest, received = header.tolist(), iter(payload), []
    assert fields[0] == 3
    width = (len(fields) - 3) // max(1, len(values))
    for i in range(fields[2]):
        value, flat = _decode(fields[3 + i * width : 3 + (i + 1) * width])
        if flat is not None and flat.numel():
            flat.copy_(next(rest))
        received.append(value)
    assert next(rest, None) is None
    return tuple(received)


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

"""Messages arrive as they were sent: values, dtypes, shapes and the order of dimensions in memory."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import select
import subprocess
import sys
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import dtrp
from dtrp import accelerators
from dtrp.runtime.forms import (
    ALIGNMENT,
    Parcel,
    blanks,
    copy_rows,
    places,
    put_together,
    take_apart,
)
from dtrp.runtime.links import Channel, LostStage, Message, QueueLinks, canonical, dense_order
from dtrp.runtime.meter import Meter
from dtrp.runtime.ports import receive
from dtrp.runtime.processes import workers_environment
from dtrp.runtime.shared import MOST_BEHIND, SharedLinks, open_line
from dtrp.runtime.starting import warm
from dtrp.runtime.transfer import dumps, loads
from dtrp.wiring import CALLER, Source, StageWires, Wiring

from .inside import both_ends
from .toys import batches, compiled, same, trainer

DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip
FORWARD = Channel("forward", 0, 1)


@st.composite
def tensors(draw: Any) -> Tensor:
    """Tensors of any dtype and up to 5 dimensions, permuted, sliced, expanded, empty."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    tensor = torch.randint(0, 2, shape, generator=generator).to(dtype)
    if shape:
        tensor = tensor.permute(draw(st.permutations(range(len(shape)))))
        if draw(st.booleans()):
            tensor = tensor[..., draw(st.integers(0, 1)) :: draw(st.integers(1, 2))]
        if draw(st.booleans()):
            tensor = tensor.unsqueeze(0).expand(2, *tensor.shape)
    return tensor


anything = (
    tensors()
    | st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(2**63, 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def again(values: list[Any]) -> list[Any]:
    """What the receiving end makes of the bytes that the sending end makes."""
    parcel = take_apart(values)
    *starts, end = places(parcel.payload)
    packed = torch.zeros(end, dtype=torch.uint8)
    for start, row in zip(starts, parcel.payload, strict=True):
        assert start % ALIGNMENT == 0
        packed[start : start + row.numel()] = row

    form = pickle.loads(pickle.dumps(parcel.form))
    assert form == parcel.form
    tensors, rows = blanks(form)
    assert places(rows) == [*starts, end]
    copy_rows(rows, packed)
    return put_together(form, memoryview(parcel.rest + b"more"), tensors)


# --- Forms ------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(tensors())
def test_tensors_are_put_together_as_they_were(tensor: Tensor) -> None:
    (arrived,) = again([tensor])
    assert equal(arrived, tensor)
    assert arrived.stride() == canonical(tensor).stride() or tensor.numel() <= 1 or 1 in tensor.shape


@settings(max_examples=150, deadline=None)
@given(st.lists(anything, max_size=5))
def test_values_are_put_together_as_they_were(values: list[Any]) -> None:
    """Several of odd sizes lie beside each other without touching."""
    arrived = again(values)
    assert len(arrived) == len(values)
    assert all(equal(a, b) for a, b in zip(arrived, values, strict=True))


def test_a_number_is_told_from_what_is_like_it() -> None:
    values = [None, True, False, -3, 2**62, 2**80, 1.5, float("inf"), 1, 1.0, torch.ones(2)]
    arrived = again(values)
    assert arrived[:-1] == values[:-1]
    assert [type(v) for v in arrived] == [type(v) for v in values]


def test_values_of_one_form_differ_in_nothing_but_their_bytes() -> None:
    def form(*values: Any) -> Any:
        return take_apart(values).form

    one = form(torch.ones(2, 3), 4, 0.5, None, "a")
    assert form(torch.zeros(2, 3), 5, 1.5, None, {"b": 2}) == one
    other = [(torch.ones(3, 2), 4), (torch.ones(2, 3).double(), 4), (torch.ones(3, 2).T, 4)]
    assert len({one, *(form(*v) for v in other)}) == 4


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch 2.11, of any that is loaded
def test_what_is_no_dense_tensor_travels_as_a_pickle() -> None:
    (sparse,) = again([torch.eye(3).to_sparse()])
    assert sparse.layout is torch.sparse_coo
    assert torch.equal(sparse.to_dense(), torch.eye(3))


def test_numbers_need_no_payload() -> None:
    parcel = take_apart([1, 2.0, None, True])
    assert parcel == Parcel((None,) * 4, [], pickle.dumps([1, 2.0, None, True], 5))


@settings(max_examples=100, deadline=None)
@given(tensors())
def test_tensors_survive_the_private_channel(tensor: Tensor) -> None:
    assert equal(loads(dumps(tensor)), tensor)


def test_structures_survive_the_private_channel() -> None:
    """Without a warning: torch 2.11 gives one to whoever unpickles a leaf as it pickles it."""
    for value in (1, {"a": 1, "b": (2, [3, None])}):
        structure = pytree.tree_structure(value)
        assert loads(dumps(structure)) == structure


def test_channels_last_stays_channels_last() -> None:
    image = torch.randn(2, 3, 5, 4).contiguous(memory_format=torch.channels_last)
    assert dense_order(image) == (0, 2, 3, 1)
    queues: Any = defaultdict(deque)
    QueueLinks(0, queues).send(FORWARD, Message(0, [image]))
    queued = QueueLinks(1, queues).take(FORWARD)
    assert queued is not None
    for arrived in (queued.values[0], again([image])[0], loads(dumps(image))):
        assert arrived.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(arrived, image)


def test_a_slice_does_not_drag_its_storage_along() -> None:
    """A view of a large tensor is sent, and kept in a stash, as a tensor of its own."""
    part = torch.arange(1000.0)[:10]
    assert canonical(part).untyped_storage().nbytes() == 40
    assert take_apart([part]).payload[0].numel() == 40


# --- In one process ---------------------------------------------------------------------------------------


def test_queues_keep_order_and_tell_channels_apart() -> None:
    queues: Any = defaultdict(deque)
    sender, receiver = QueueLinks(0, queues), QueueLinks(1, queues)
    back = Channel("norm", 0, 1)
    for slot in range(3):
        sender.send(FORWARD, Message(slot, [slot]))
    sender.send(back, Message(7, [0.5], skip=True))
    assert (sender.waiting(), receiver.waiting()) == (0, 4)
    assert receiver.take(back) == Message(7, [0.5], skip=True)
    assert [receiver.take(FORWARD) for _ in range(4)] == [*(Message(s, [s]) for s in range(3)), None]
    assert receiver.waiting() == 0


def test_a_message_has_no_graph() -> None:
    queues: Any = defaultdict(deque)
    x = torch.ones(3, requires_grad=True)
    QueueLinks(0, queues).send(FORWARD, Message(0, [x * 2]))
    ((message,),) = queues.values()
    assert not message.values[0].requires_grad


def test_messages_out_of_turn_are_noticed() -> None:
    links, meter = QueueLinks(1, defaultdict(deque)), Meter(1, 2, torch.device("cpu"), record=False)
    waiting = receive(links, meter, FORWARD, 5)
    assert next(waiting) is None
    assert meter.phase == "waiting for stage 0 (forward)"
    links.send(FORWARD, Message(4, []))
    with pytest.raises(RuntimeError, match="delivered slot 4 where slot 5 was due"):
        next(waiting)


# --- Between processes ------------------------------------------------------------------------------------


class Mark:
    """Stands for an event of a device, made and waited for by turns: else one side would read what is not
    there yet, or write over what is still read."""

    def __init__(self) -> None:
        self.made = self.awaited = 0

    def record(self) -> None:
        assert self.awaited == self.made
        self.made += 1

    def wait(self) -> None:
        self.awaited += 1
        assert self.awaited == self.made

    def synchronize(self) -> None:
        self.wait()


class Lent(accelerators.Lent):
    """On the host, between two ends in one process."""

    handles: ClassVar[list[Lent]] = []

    @classmethod
    def make(cls, device: torch.device, size: int) -> Lent:
        return cls(torch.empty(size, dtype=torch.uint8), Mark(), Mark())

    def handle(self) -> bytes:
        self.handles.append(self)
        return pickle.dumps(_Handle(len(self.handles) - 1))


class _Handle:
    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _found, (self.number,)


def _found(number: int) -> tuple[Any, ...]:
    return tuple(Lent.handles[number])


def descriptors() -> set[tuple[int, int]]:
    """The files that this process has open (device and inode), without those of earlier tests that only wait
    to be collected."""
    gc.collect()
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            status = os.stat(int(number))
            found.add((status.st_dev, status.st_ino))
    return found


@pytest.fixture(params=["host", "device"])
def ends(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[SharedLinks, SharedLinks]]:
    """Both ends of a pair of lines, through the host's memory, and through a device's that both have; none of
    their descriptors is left after the test."""
    monkeypatch.setattr(accelerators, "Lent", Lent)
    monkeypatch.setattr(Lent, "handles", [])
    before = descriptors()
    two = both_ends(device=torch.device("cpu") if request.param == "device" else None)
    opened = descriptors() - before
    yield two
    for end in two:
        end.close()
    assert opened
    assert not opened & descriptors()


def large(value: float, n: int = MOST_BEHIND) -> Tensor:
    return torch.full((n,), value)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(anything, max_size=4), min_size=1, max_size=4))
def test_messages_survive_the_line(sent: list[list[Any]]) -> None:
    """Also the second time, when their form is known."""
    ends = both_ends()
    try:
        for slot, values in enumerate([*sent, *sent]):
            ends[0].send(FORWARD, Message(slot, values, skip=slot % 2 == 1))
            arrived = ends[1].take(FORWARD)
            assert (arrived.slot, arrived.skip) == (slot, slot % 2 == 1)
            assert all(equal(a, b) for a, b in zip(arrived.values, values, strict=True))
    finally:
        for end in ends:
            end.close()


def test_what_was_received_is_the_receivers(ends: tuple[SharedLinks, SharedLinks]) -> None:
    """Neither the sender's tensor nor the place in the ring is looked at again."""
    values = large(1.0)
    ends[0].send(FORWARD, Message(0, [values]))
    values.fill_(2.0)
    first = ends[1].take(FORWARD).values[0]
    for slot in range(1, 6):
        ends[0].send(FORWARD, Message(slot, [values]))
        assert torch.equal(ends[1].take(FORWARD).values[0], values)
    assert torch.equal(first, large(1.0))


def test_kinds_share_a_line_and_keep_apart(ends: tuple[SharedLinks, SharedLinks]) -> None:
    norm, back = Channel("norm", 0, 1), Channel("backward", 1, 0)
    assert ends[1].waiting() == 0
    ends[0].send(FORWARD, Message(0, [large(0.0)]))
    ends[0].send(norm, Message(4, [0.5]))
    ends[0].send(FORWARD, Message(1, [large(1.0)]))
    assert ends[1].waiting() == 1, "a line on which something can be read"
    assert ends[1].take(norm) == Message(4, [0.5])
    assert [ends[1].take(FORWARD).slot for _ in range(2)] == [0, 1]
    ends[1].send(back, Message(0, [large(3.0)]))
    assert torch.equal(ends[0].take(back).values[0], large(3.0))
    ends[0].send(norm, Message(5, [1.0]))
    assert ends[1].take_any(0) == (norm, Message(5, [1.0]))


def test_places_grow_and_are_used_again(ends: tuple[SharedLinks, SharedLinks]) -> None:
    """Within the first page, beyond it, smaller again: what is in memory never shrinks, and hardly grows."""
    sender = ends[0]._senders[1]
    sizes = [MOST_BEHIND, 5_000_000, MOST_BEHIND + 1, 5_000_000, 4_000_000]
    for round_ in range(4):
        for slot, size in enumerate(sizes):
            sent = torch.randint(0, 256, (size + 1,), dtype=torch.uint8)
            ends[0].send(FORWARD, Message(slot, [sent, torch.full((3,), 7.0)]))
            arrived = ends[1].take(FORWARD).values
            assert torch.equal(arrived[0], sent)
            assert arrived[1].tolist() == [7.0] * 3
        if round_ == 0:
            memory = list(sender.capacities), getattr(sender.places, "end", len(Lent.handles))
    assert memory == (sender.capacities, getattr(sender.places, "end", len(Lent.handles)))
    assert len(sender.capacities) <= 3


def test_marks_outlive_what_waits_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may be about to read a place that is made larger; an event that is gone may never come."""
    monkeypatch.setattr(accelerators, "Lent", Lent)
    monkeypatch.setattr(Lent, "handles", [])
    two = both_ends(most=1, device=torch.device("cpu"))
    for slot, size in enumerate((10, 20, 10_000, 30)):
        two[0].send(FORWARD, Message(slot, [large(slot, size)]))
        assert torch.equal(two[1].take(FORWARD).values[0], large(slot, size))
    small, larger = Lent.handles
    assert small.emptied.awaited == small.emptied.made == 2
    assert larger.emptied.awaited == larger.emptied.made - 1 == 1
    still = weakref.ref(larger.memory)
    for end in two:
        end.close()
    Lent.handles.clear()
    del small, larger, two, end
    assert still() is not None, "torch would give the memory back, which a device that has failed aborts"


def test_few_bytes_travel_with_the_note(ends: tuple[SharedLinks, SharedLinks]) -> None:
    """But not those of a device, for which its host would have to wait."""
    ends[0].send(FORWARD, Message(0, [torch.ones(MOST_BEHIND // 4)]))
    assert bool(ends[0]._senders[1].capacities) == bool(Lent.handles)
    assert torch.equal(ends[1].take(FORWARD).values[0], torch.ones(MOST_BEHIND // 4))


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_full_ring_throttles(most: int) -> None:
    """The sender goes on when the receiver has taken a message, and nothing is overwritten before."""
    waits: list[int] = []

    def wait(sock: Any, event: int) -> None:
        waits.append(sent)
        assert event == select.POLLIN
        assert ends[0].full == 1, "the watchdog takes it for work"
        taken.append(ends[1].take(FORWARD).values[0])

    ends = both_ends(most, wait)
    taken: list[Tensor] = []
    for sent in range(8):
        ends[0].send(FORWARD, Message(sent, [large(sent)]))
        assert ends[0].full is None
    assert waits == list(range(most, 8)), "as many messages as there are places go ahead"
    while len(taken) < 8:
        taken.append(ends[1].take(FORWARD).values[0])
    assert [int(t[0]) for t in taken] == list(range(8))
    assert all(torch.equal(t, large(i)) for i, t in enumerate(taken))
    for end in ends:
        end.close()


def until_ready(sock: Any, event: int) -> None:
    poll = select.poll()
    poll.register(sock, event)
    poll.poll()


@pytest.mark.parametrize("wait", [None, until_ready])
@pytest.mark.parametrize("doing", ["take", "send", "place"])
def test_a_closed_peer_wakes_who_waits_for_it(doing: str, wait: Any) -> None:
    """A reader; a writer of more than the socket holds; one that waits for a place. As in a worker, whose
    sockets block, and as in the caller, which listens meanwhile."""
    before = descriptors()
    ends = both_ends(1, wait, CALLER)
    opened = descriptors() - before
    closing = threading.Timer(0.2, ends[1].close)
    closing.start()

    def use() -> None:
        if doing == "take":
            ends[0].take(Channel("backward", 1, 0))
        for slot in range(10_000):
            values = ["x" * 4000] if doing == "send" else [large(0.0)]
            ends[0].send(FORWARD, Message(slot, values))

    with pytest.raises(LostStage, match="lost the connection to stage 1: ") as caught:
        use()
    closing.join()
    assert caught.value.peer == 1
    with pytest.raises(LostStage):
        ends[0].send(FORWARD, Message(0, [1]))
    ends[0].close()
    assert not opened & descriptors()


def test_a_closed_line_still_gives_what_was_sent(ends: tuple[SharedLinks, SharedLinks]) -> None:
    ends[0].send(FORWARD, Message(0, [1]))
    ends[0].close()
    assert ends[1].take(FORWARD) == Message(0, [1])
    with pytest.raises(LostStage, match="lost the connection to stage 0: it was closed"):
        ends[1].take(FORWARD)


def test_what_is_sent_to_a_stage_that_is_gone_is_dropped(ends: tuple[SharedLinks, SharedLinks]) -> None:
    """Else a stage would stop at another's failure sooner or later as the clock has it, rather than when it
    needs something of it."""
    ends[1].send(Channel("backward", 1, 0), Message(7, [2.0]))
    ends[1].close()
    for slot in range(5):
        ends[0].send(FORWARD, Message(slot, [large(0.0)]))
    assert ends[0].take(Channel("backward", 1, 0)) == Message(7, [2.0])
    with pytest.raises(LostStage):
        ends[0].take(Channel("backward", 1, 0))


def test_closing_can_spare_one_peer() -> None:
    lines = [open_line(0, 1), open_line(CALLER, 0)]
    links = SharedLinks(0, lines)
    links.close(but=CALLER)
    assert links._senders == {}
    assert list(links._receivers) == [CALLER]
    links.close()
    for descriptor in (lines[0].receives, lines[1].sends):
        os.close(descriptor)


PEER = """
import sys
import torch
from dtrp.runtime.links import Channel, Message
from dtrp.runtime.shared import Line, SharedLinks
lines = [Line(*map(int, line.split(","))) for line in sys.argv[1:]]
links = SharedLinks(1, lines)
for slot in range(20):
    message = links.take(Channel("forward", 0, 1))
    values = [v * 2 if isinstance(v, torch.Tensor) else v for v in message.values]
    links.send(Channel("backward", 1, 0), Message(message.slot, values, message.skip))
sys.exit(links.take(Channel("norm", 0, 1)).values[0])
"""


def test_two_processes() -> None:
    """Twenty messages of many sizes there and back; then the end of the other process is noticed."""
    before = descriptors()
    there, back = open_line(0, 1), open_line(1, 0)
    opened = descriptors() - before
    theirs = {there.receives, there.memory, back.sends, back.memory}
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    with subprocess.Popen(
        [sys.executable, "-c", PEER, *(",".join(map(str, line[:5])) for line in (there, back))],
        pass_fds=sorted(theirs),
        env={**os.environ, "PYTHONPATH": root},
    ) as process:
        os.close(there.receives)
        os.close(back.sends)
        links = SharedLinks(0, [there, back])
        for slot in range(20):
            sent = torch.randn(3, 50 * slot**2)
            links.send(FORWARD, Message(slot, [sent.T, None, slot, [slot]], skip=slot == 7))
            arrived = links.take(Channel("backward", 1, 0))
            assert torch.equal(arrived.values[0], sent.T * 2)
            assert arrived.values[0].stride() == sent.T.stride() or sent.numel() == 0
            assert (arrived.slot, arrived.skip, *arrived.values[1:]) == (slot, slot == 7, None, slot, [slot])
        links.send(Channel("norm", 0, 1), Message(0, [3]))
        with pytest.raises(LostStage):
            links.take(Channel("backward", 1, 0))
        links.close()
        assert process.wait(120) == 3
    assert not opened & descriptors()


@pytest.mark.parametrize("memfd", [True, False])
def test_large_values_reach_the_next_stage(memfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through anonymous memory, and through a file without a name where the system has none."""
    if not memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    warm(workers_environment(1))  # one, which stays
    before = descriptors()
    states = []
    for executor in ("inline", "workers"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 4))
        x, y = torch.randn(64, 8), torch.randint(0, 4, (64,))
        pipe = dtrp.compile(model, n_gpus=2, example_inputs=x, devices=["cpu"] * 2)
        optimizer = partial(torch.optim.SGD, lr=0.1)
        with pipe.trainer(F.cross_entropy, optimizer, executor=executor, seed=0) as t:
            for _ in range(20):
                t.step(x, y)
        states.append(model.state_dict())
    assert same(*states)
    assert descriptors() <= before


class WideTied(nn.Module):
    """Tied weights, and values between stages, that do not travel with the note."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 64, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.inner(self.table(x))))
        return logits


def test_a_question_is_answered_with_sums_of_tied_weights_on_their_way() -> None:
    """Both kinds of messages need places: else the first stage waits for the second one to take something,
    which waits for the next batch, and the caller for the first stage's answer, till the watchdog ends it."""
    states = []
    for executor in ("inline", "workers"):
        torch.manual_seed(0)
        model, x = WideTied(), torch.randint(0, 64, (32,))
        pipe = dtrp.compile(model, n_gpus=2, example_inputs=x)
        with trainer(pipe, executor, schedule="lean", watchdog=15) as t:
            for step in range(1, 9):
                t.step(x, x)
                assert [s.ticks for s in t.stats] == [step, max(0, step - 2)]
        states.append(model.state_dict())
    assert same(*states)


# --- Wiring -----------------------------------------------------------------------------------------------


def wires() -> tuple[StageWires, ...]:
    return (
        StageWires((Source(CALLER, 0),), ("a", "n"), (True, False)),
        StageWires((Source(0, 0),), ("b",), (True,)),
        StageWires((Source(1, 0), Source(0, 0), Source(0, 1), Source(CALLER, 1)), ("c",), (True,)),
    )


def test_who_sends_what_to_whom() -> None:
    wiring = Wiring(wires(), (Source(2, 0), Source(1, 0)), pytree.tree_structure((0, 0)))
    assert wiring.sends == {(0, 1): (0,), (0, 2): (0, 1), (1, 2): (0,)}
    assert wiring.gradients == {(0, 1): (0,), (0, 2): (0,), (1, 2): (0,)}
    assert wiring.trained == {0, 1, 2}
    assert [wiring.caller_inputs(k) for k in range(3)] == [(0,), (), (1,)]


def test_a_stage_without_gradient_sends_none() -> None:
    """Stage 1 gives indices: what it gets from stage 0 brings no gradient back, though it could."""
    first, middle, last = wires()
    indices = StageWires(middle.inputs, ("b",), (False,))
    wiring = Wiring((first, indices, last), (Source(2, 0),), pytree.tree_structure(0))
    assert wiring.gradients == {(0, 2): (0,)}
    assert wiring.trained == {0, 2}
    frozen = StageWires(first.inputs, first.outputs, (False, False))
    wiring = Wiring((frozen, middle, last), (Source(2, 0),), pytree.tree_structure(0))
    assert wiring.gradients == {(1, 2): (0,)}
    assert wiring.trained == {1, 2}


def test_a_run_is_counted_by_what_waits() -> None:
    with trainer(compiled(n_stages=3)) as t:
        for x, y in batches(6):
            t.step(x, y)
        t.flush()
        assert all(s.queue_depth >= 0 for s in t.stats)
        assert t.stats[1].queue_depth > 0


def test_tensors_that_are_only_marked_as_conjugate_or_negative() -> None:
    """Their bytes are not their values."""
    z = torch.randn(3, 4, dtype=torch.complex64)
    for value in (z.conj(), z.conj().imag, z.conj().T, torch.view_as_real(z)):
        (arrived,) = again([value])
        assert torch.equal(arrived, value)

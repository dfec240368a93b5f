"""Links between processes of one host: notes over a socket pair, payloads through a ring of memory that both
have (places.py).

    sender                                                          receiver
    [1] a free place in the ring; wait for an acknowledgement
        if there is none
    [2] copy the tensors' bytes in
    [3] note (slot, form, place)  ------ socket pair ------------>  [4] copy the bytes out
    [6] the place is free again   <----- one byte ----------------  [5] acknowledge

Both the sockets and the host's memory are inherited as descriptors and have no names: no other process can
open them, and they are gone with the last process that holds them, however that one ends. A process that dies
closes its ends, which wakes whoever waits for it. On a device [2] and [4] are queued, and wait for each other
there.

A line has as many places as the schedule says (`Schedule.places`): with fewer, a stage could not run
as far ahead of another as the order has it, over a skip, or both would wait for each other.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import select
import socket
import tempfile
from collections import defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple, cast, get_args

import torch

from .forms import (
    BEHIND,
    NOTE,
    SKIP,
    Note,
    Reader,
    Writer,
    blanks,
    copy_behind,
    put_together,
)
from .links import Channel, Kind, LostStage, Message
from .places import DevicePlaces, HostPlaces

KINDS: tuple[str, ...] = get_args(Kind)
MOST_BEHIND = 4096  # bytes of a payload that travel with the note; shared memory is no faster for so few
CALLER = -1
CHUNK = 1 << 16  # bytes read at once


class Line(NamedTuple):
    """One direction between two processes: descriptors of both socket ends and of the host's memory; a device
    that both have and whose memory they can share."""

    source: int
    target: int
    sends: int
    receives: int
    memory: int
    device: torch.device | None = None


def open_line(source: int, target: int, device: torch.device | None = None) -> Line:
    """A new line; its descriptors are to be inherited, and then closed here."""
    a, b = socket.socketpair()
    sends, receives = _high(a.detach()), _high(b.detach())
    if hasattr(os, "memfd_create"):
        memory = os.memfd_create("dtrp")
    else:
        with tempfile.TemporaryFile(prefix="dtrp-") as file:
            memory = os.dup(file.fileno())
    return Line(source, target, sends, receives, _high(memory), device)


def _high(descriptor: int) -> int:
    """The same file under a number that is nobody's stdin, stdout or stderr, also where those are closed."""
    if descriptor > 2:
        return descriptor
    high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    os.close(descriptor)
    return high


Wait = Callable[[socket.socket, int], None]


class _End:
    """One end of a line. Without ``wait`` its socket blocks; with it, ``wait`` is called instead."""

    def __init__(
        self, peer: int, descriptor: int, memory: int, device: torch.device | None, wait: Wait | None
    ) -> None:
        self.peer, self.wait = peer, wait
        self.places = HostPlaces(memory) if device is None else DevicePlaces(device, memory)
        self.socket = socket.socket(fileno=descriptor)
        self.socket.setblocking(wait is None)
        self.read = bytearray()  # and not used yet

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[self.socket.send(view) :]
            except BlockingIOError:
                assert self.wait is not None
                self.wait(self.socket, select.POLLOUT)
            except OSError as e:
                raise LostStage(self.peer, str(e)) from None

    def fetch(self, *, at_once: bool = False) -> bool:
        """Read what is there, at least something unless ``at_once``; whether anything was."""
        while True:
            try:
                data = self.socket.recv(CHUNK, socket.MSG_DONTWAIT if at_once else 0)
            except BlockingIOError:
                if at_once:
                    return False
                assert self.wait is not None
                self.wait(self.socket, select.POLLIN)
                continue
            except OSError as e:
                raise LostStage(self.peer, str(e)) from None
            if not data:
                raise LostStage(self.peer, "it was closed")
            self.read += data
            return True

    def close(self) -> None:
        self.socket.close()
        self.places.close()


class _Sender(_End):
    """The end that messages go in at."""

    def __init__(self, *args: Any, most: int) -> None:
        super().__init__(*args)
        self.most = most
        self.writer = Writer()
        self.free: list[int] = []  # places, by number
        self.capacities: list[int] = []  # of all, in bytes
        self.full = False

    def send(self, kind: int, message: Message) -> None:
        device = self.places.device
        written = self.writer.write(message, MOST_BEHIND, device, apart=self.places.apart)
        where, behind = BEHIND, written.behind
        if written.payload:
            place = self._place(written.size)
            at, told = self.places.fill(place, self.capacities[place], written.payload)
            where, behind = at << 8 | place, behind + told
        note = (kind, written.flags, written.form, message.slot, where, written.size, len(behind))
        self.write(NOTE.pack(*note, message.scale) + behind)

    def _place(self, size: int) -> int:
        """A place of at least so many bytes, which nobody reads any more."""
        self.full = not self.free and len(self.capacities) >= self.most
        while self.fetch(at_once=not self.full):
            self.free += self.read
            self.read.clear()
            self.full = False
        fitting = [p for p in self.free if self.capacities[p] >= size]
        if fitting:
            place = min(fitting, key=self.capacities.__getitem__)
            self.free.remove(place)
            return place
        if len(self.capacities) < self.most:
            place = len(self.capacities)
            self.capacities.append(0)
        else:
            place = self.free.pop()
        self.capacities[place] = (size * 5 // 4 // mmap.PAGESIZE + 1) * mmap.PAGESIZE
        return place


class _Receiver(_End):
    """The end that messages come out of."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.reader = Reader()
        self.poll = select.poll()
        self.poll.register(self.socket, select.POLLIN)

    def _next(self, size: int) -> bytearray:
        while len(self.read) < size:
            self.fetch()
        data = self.read[:size]
        del self.read[:size]
        return data

    def receive(self) -> tuple[int, Message]:
        note = Note._make(NOTE.unpack(self._next(NOTE.size)))
        behind = memoryview(self._next(note.behind))
        form, behind = self.reader.form(note, behind)
        tensors, rows = blanks(form, self.places.device)
        if note.place == BEHIND:
            copy_behind(rows, behind, note.size)
        else:
            self.places.empty(note.place & 0xFF, note.place >> 8, rows, behind)
        values = put_together(form, behind, tensors)
        if note.place != BEHIND:
            self.write(bytes([note.place & 0xFF]))
        return note.kind, Message(note.slot, values, bool(note.flags & SKIP), note.scale)


class SharedLinks:
    """One process's ends of its lines.

    Parameters
    ----------
    me : int
        The stage, or `CALLER`.
    lines : sequence of Line
        Those that begin or end here. Descriptors of the other ends are not open here.
    wait : callable, optional
        Waits for a socket, for whom it must not block.
    most : mapping of int to int, optional
        Places of the lines to these targets, where it is not the usual number.
    """

    def __init__(
        self,
        me: int,
        lines: list[Line],
        *,
        wait: Wait | None = None,
        most: int | None = None,
    ) -> None:
        self.me = me
        self._senders: dict[int, _Sender] = {}
        self._receivers: dict[int, _Receiver] = {}
        for line in lines:
            if line.source == me:
                places = min(most or abs(line.target - line.source) + 2, 255)
                end = (line.target, line.sends, line.memory, line.device, wait)
                self._senders[line.target] = _Sender(*end, most=places)
            else:
                end = (line.source, line.receives, line.memory, line.device, wait)
                self._receivers[line.source] = _Receiver(*end)
        self._inboxes: dict[Channel, deque[Message]] = defaultdict(deque)
        self._readable = select.poll()
        for source, receiver in self._receivers.items():
            if source != CALLER:
                self._readable.register(receiver.socket, select.POLLIN)

    @property
    def full(self) -> int | None:
        return next((target for target, sender in [*self._senders.items()] if sender.full), None)

    def allow(self, places: Callable[[int], int]) -> None:
        """How many places the line to each stage has."""
        for target, sender in self._senders.items():
            sender.most = places(target)

    def send(self, channel: Channel, message: Message) -> None:
        try:
            self._senders[channel.target].send(KINDS.index(channel.kind), message)
        except LostStage:
            if self.me == CALLER:
                raise
            # What a stage that failed has sent before still counts: the others go as far as they can with it,
            # as they do in one process. Who waits for it hears of its end.

    def take(self, channel: Channel, slot: int = -1) -> Message:
        """The next message on ``channel``; waits for it. What comes on the same line for other channels is
        kept for them."""
        inbox = self._inboxes[channel]
        while not inbox:
            self._read(channel.source)
        return inbox.popleft()

    def has(self, source: int) -> bool:
        """Whether something from ``source`` is there already."""
        receiver = self._receivers[source]
        return bool(receiver.read) or bool(receiver.poll.poll(0))

    def take_any(self, source: int) -> tuple[Channel, Message]:
        """The next message of whatever kind from ``source``."""
        kind, message = self._receivers[source].receive()
        return Channel(cast(Kind, KINDS[kind]), source, self.me), message

    def _read(self, source: int) -> None:
        channel, message = self.take_any(source)
        self._inboxes[channel].append(message)

    def waiting(self) -> int:
        kept = sum(map(len, self._inboxes.values())) + sum(bool(r.read) for r in self._receivers.values())
        return kept + len(self._readable.poll(0))

    def close(self, *, but: int | None = None) -> None:
        """Close all ends (``but`` those to one process): whoever waits for this process hears of it."""
        for ends in (self._senders, self._receivers):
            for peer in [p for p in ends if p != but]:
                ends.pop(peer).close()

"""Links between processes of a launcher: notes by gloo, payloads by the communicator that suits the device.

    sender                                              receiver
    [1] note: form, slot, sizes, news  --- tag 0 --->   receives of notes are always posted ahead
    [2] what the note had no room for  --- tag 1 --->   received when the note says so
    [3] each tensor's bytes  -------- tag 2 + form -->  posted ahead, where the last message had this form

A sender keeps the memory of what it has sent until the receiver has it. That is known from the receiver's own
notes, which say how many it has read [4]; without any, a send is waited for when as many messages are on
their way as the rings of shared.py have places. gloo matches messages by tag, so that a receive posted for a
form that does not come next waits for the next message of that form. A communicator without tags (NCCL)
matches by order: there nothing is posted before the note has come, which is early, since notes wait for no
device. Then it is posted beside what the device does, lest it wait behind all that is queued there; and the
sender queues [3] before it sends [1], so that whatever a note has announced comes to pass on the devices
alone, also while a host is held up.

Nothing here asks gloo whether something has arrived: it only ever waits. What wakes it when a peer is gone is
in peers.py.
"""

from __future__ import annotations

import struct
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .. import accelerators
from .forms import BEHIND, NOTE, SKIP, Note, Reader, Writer, blanks, copy_behind, put_together
from .links import Channel, Kind, LostStage, Message
from .news import News
from .shared import KINDS

LENGTH = 1024  # bytes of a note
_HEAD = struct.Struct("<HQ")  # bytes of news; messages of the receiver's that the sender has read [4]
ROOM = LENGTH - NOTE.size - _HEAD.size
REST, PAYLOAD = 1, 2  # tags
AHEAD = 4  # forms for which something may be posted that never comes

Work = Any  # torch's is not typed


class GroupLinks:
    """One process's ends.

    Parameters
    ----------
    process : int
        Its number in its pipeline.
    pairs : iterable of (int, int)
        Who sends to whom there.
    down, up : ProcessGroup
        gloo's, of the pipeline's processes: to those of later stages, and of earlier ones.
    payload : (ProcessGroup, ProcessGroup), optional
        Likewise, for payloads that stay on ``device``; without: payloads travel through host memory.
    carrying : collection of (int, int)
        Those of ``pairs`` that send tensors.
    """

    def __init__(
        self,
        process: int,
        pairs: Iterable[tuple[int, int]],
        down: dist.ProcessGroup,
        up: dist.ProcessGroup,
        *,
        payload: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None,
        carrying: Collection[tuple[int, int]] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.process, self.on_host = process, payload is None
        place = self._device = torch.device("cpu" if payload is None else device)
        self.news: News | None = None
        groups, payloads = (down, up), payload or (down, up)
        # One for all: nothing runs in it, and torch has 32 of them, of which each connection takes one, too.
        beside = accelerators.beside(place)
        self._senders: dict[int, _Sender] = {}
        self._receivers: dict[int, _Receiver] = {}
        for source, target in sorted(pairs):
            way = int(source > target)
            end = (groups[way], payloads[way], abs(source - target) + 2, place)
            if source == process:
                self._senders[target] = _Sender(target, *end, on_host=self.on_host)
            elif target == process:
                self._receivers[source] = _Receiver(source, *end, beside, on_host=self.on_host)
        if payload is not None:
            self._greet(sorted(carrying), payload)
        self._inboxes: dict[Channel, deque[tuple[Message, list[Work]]]] = defaultdict(deque)

    def _greet(
        self, pairs: Iterable[tuple[int, int]], payload: tuple[dist.ProcessGroup, dist.ProcessGroup]
    ) -> None:
        """The first message of a pair makes their connection, for which NCCL holds up both hosts: all do so
        now, in one order, rather than when others wait for them. What it refuses is to be read as it is."""
        for source, target in pairs:
            group, one = payload[int(source > target)], torch.zeros(1, device=self._device)
            if source == self.process:
                group.send([one], target, 0).wait()
            elif target == self.process:
                group.recv([one], source, 0).wait()

    @property
    def full(self) -> int | None:
        return next((target for target, sender in self._senders.items() if sender.full), None)

    def allow(self, places: Callable[[int], int]) -> None:
        """How many messages may be on their way to each of them."""
        for target, sender in self._senders.items():
            sender.most = places(target)

    def send(self, channel: Channel, message: Message) -> None:
        target = channel.target
        news = b"" if self.news is None else self.news.pack(target)
        read = self._receivers[target].read if target in self._receivers else 0
        self._senders[target].send(KINDS.index(channel.kind), message, _HEAD.pack(len(news), read) + news)

    def take(self, channel: Channel, slot: int = -1) -> Message:
        """The next message on ``channel``; waits for it. What comes on the same way for other channels is
        kept for them."""
        inbox, source = self._inboxes[channel], channel.source
        while not inbox:
            kind, message, works, news = self._receivers[source].receive(self._senders.get(source))
            found = Channel(cast(Kind, KINDS[kind]), source, self.process)
            self._inboxes[found].append((message, works))
            if self.news is not None:
                self.news.unpack(news)
        message, works = inbox.popleft()
        _wait(works, source)
        if works:
            for value in message.values:
                if isinstance(value, Tensor):
                    accelerators.used_here(value)
        return message

    def waiting(self) -> int:
        """Messages whose notes were read already."""
        return sum(map(len, self._inboxes.values()))

    def finish(self) -> None:
        """Until everything sent has been received."""
        for sender in self._senders.values():
            sender.make_room(0)
        accelerators.wait(self._device)


class _Sent(NamedTuple):
    """A message on its way: each part's send, and the memory that it reads."""

    notes: list[tuple[Work, Tensor]]
    payload: list[tuple[Work, Tensor]]


class _Sender:
    """The end that messages go in at."""

    def __init__(
        self,
        peer: int,
        notes: dist.ProcessGroup,
        payload: dist.ProcessGroup,
        most: int,
        device: torch.device,
        *,
        on_host: bool,
    ) -> None:
        self.peer, self.notes, self.payload, self.most = peer, notes, payload, most
        self.device, self.on_host = device, on_host
        self.writer = Writer()
        self.held: deque[_Sent] = deque()
        self.sent = 0  # messages
        self.full = False

    def send(self, kind: int, message: Message, head: bytes) -> None:
        self.make_room(self.most)
        written = self.writer.write(message, ROOM // 2, self.device, apart=not self.on_host)
        place = 0 if written.payload else BEHIND
        fixed = (kind, written.flags, written.form, message.slot, place, written.size, len(written.behind))
        whole = NOTE.pack(*fixed, message.scale) + head + written.behind
        note = torch.zeros(LENGTH, dtype=torch.uint8, device="cpu")
        first = torch.frombuffer(bytearray(whole[:LENGTH]), dtype=torch.uint8)
        note[: len(first)] = first
        notes = [(note, 0)]
        if len(whole) > LENGTH:
            notes.append((torch.frombuffer(bytearray(whole[LENGTH:]), dtype=torch.uint8), REST))
        payload = [(row, PAYLOAD + written.form) for row in written.payload if row.numel()]
        ahead = [] if self.on_host else self._post(self.payload, payload)
        told = self._post(self.notes, notes)
        self.held.append(_Sent(told, self._post(self.payload, payload) if self.on_host else ahead))
        self.sent += 1

    def _post(
        self, group: dist.ProcessGroup, parts: Iterable[tuple[Tensor, int]]
    ) -> list[tuple[Work, Tensor]]:
        """Send tensors, each with its tag."""
        try:
            return [(group.send([tensor], self.peer, tag), tensor) for tensor, tag in parts]
        except RuntimeError as e:
            raise LostStage(self.peer, str(e)) from None

    def make_room(self, most: int) -> None:
        """Wait until at most so many messages are on their way."""
        while len(self.held) > most:
            self.full = True
            self._let_go()
        self.full = False

    def heard(self, read: int) -> None:
        """The receiver has read so many messages, and receives what they announce: on the host that is over
        in a moment; a device is asked, as its own work would wait."""
        while len(self.held) > self.sent - read:
            if not self.on_host and not all(work.is_completed() for work, _ in self.held[0].payload):
                return
            self._let_go()

    def _let_go(self) -> None:
        _wait((work for parts in self.held[0] for work, _ in parts), self.peer)
        self.held.popleft()


class _Receiver:
    """The end that messages come out of."""

    def __init__(
        self,
        peer: int,
        notes: dist.ProcessGroup,
        payload: dist.ProcessGroup,
        ahead: int,
        device: torch.device,
        beside: AbstractContextManager[Any],
        *,
        on_host: bool,
    ) -> None:
        self.peer, self.notes, self.payload = peer, notes, payload
        self.device, self.tagged, self.beside = device, on_host, beside
        self.reader = Reader()
        self.posted: deque[tuple[Work, Tensor]] = deque(self._post_note() for _ in range(ahead))
        self.ahead: dict[int, tuple[list[Tensor], list[Work]]] = {}  # by form, for its next message
        self.last = -1  # the form of the last message with a payload
        self.read = 0  # messages

    def receive(self, back: _Sender | None) -> tuple[int, Message, list[Work], memoryview]:
        """The next message (its kind, itself, what its tensors wait for) and the news that came with it.
        ``back`` is the end of the way back."""
        work, tensor = self.posted.popleft()
        _wait([work], self.peer)
        data = bytearray(tensor.numpy().tobytes())
        self.posted.append(self._post_note())
        note = Note._make(NOTE.unpack_from(data))
        length, theirs = _HEAD.unpack_from(data, NOTE.size)
        if back is not None:  # before memory is taken for this message
            back.heard(theirs)
        start = NOTE.size + _HEAD.size
        end = start + length + note.behind
        if end > LENGTH:
            rest = torch.empty(end - LENGTH, dtype=torch.uint8, device="cpu")
            _wait([self._post(self.notes, rest, REST)], self.peer)
            data += rest.numpy().tobytes()
        whole = memoryview(data)
        form, behind = self.reader.form(note, whole[start + length : end])
        works: list[Work] = []
        if note.place == BEHIND:
            tensors, rows = blanks(form)
            copy_behind(rows, behind, note.size)
        else:
            posted = self.ahead.pop(note.form) if note.form in self.ahead else self._post_payload(note.form)
            tensors, works = posted
            # Gradients of tied weights are large and rare, and come with no room planned for a second one.
            tied = KINDS[note.kind].startswith("tied")
            if self.tagged and self.last == note.form and len(self.ahead) < AHEAD and not tied:
                self.ahead[note.form] = self._post_payload(note.form)
            self.last = note.form
        values = put_together(form, behind, tensors)
        message = Message(note.slot, values, bool(note.flags & SKIP), note.scale)
        self.read += 1
        return note.kind, message, works, whole[start : start + length]

    def _post_note(self) -> tuple[Work, Tensor]:
        tensor = torch.empty(LENGTH, dtype=torch.uint8, device="cpu")
        return self._post(self.notes, tensor, 0), tensor

    def _post_payload(self, form: int) -> tuple[list[Tensor], list[Work]]:
        with self.beside:
            tensors, rows = blanks(self.reader.forms[form], self.device)
            return tensors, [self._post(self.payload, row, PAYLOAD + form) for row in rows if row.numel()]

    def _post(self, group: dist.ProcessGroup, tensor: Tensor, tag: int) -> Work:
        try:
            return group.recv([tensor], self.peer, tag)
        except RuntimeError as e:
            raise LostStage(self.peer, str(e)) from None


def _wait(works: Iterable[Work], peer: int) -> None:
    for work in works:
        try:
            work.wait()
        except RuntimeError as e:
            raise LostStage(peer, str(e)) from None

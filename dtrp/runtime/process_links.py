"""Links between worker processes: torch.distributed's point-to-point messages over gloo.

Per incoming channel a thread receives ahead of need, and sends complete in the background, so that
receiving, computing and sending overlap. A message is a header of fixed length (slot, kind, shape and
dimension order of each value; numbers travel in it) and then the tensors' bytes, which on one machine lie in
shared memory if they are many (see `mailbox`). CUDA tensors are staged through host memory.
"""

from __future__ import annotations

import queue
import struct
import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .links import Channel, Message, canonical, dense_order, expect, flat_bytes
from .mailbox import Mailbox

_DTYPES: tuple[torch.dtype, ...] = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
    torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_MOST_DIMS = 12
_PER_VALUE = 3 + 2 * _MOST_DIMS
_TENSOR, _NONE, _INT, _FLOAT, _BOOL = range(5)
_FIXED, _SHARED = 4, 2  # a header's first fields: slot, skip, whether the bytes are shared, number of values
_LEAST_SHARED = 16 * 1024  # bytes; fewer travel as fast over a socket


class LostStage(ConnectionError):
    """The process at the other end of a channel is gone."""

    def __init__(self, stage: int, why: str) -> None:
        super().__init__(f"lost the connection to stage {stage}: {why}")
        self.stage = stage


class ProcessLinks:
    """This stage's ends of all channels.

    Parameters
    ----------
    stage : int
        This process's stage, and its rank.
    channels : mapping of Channel to int
        Every channel of the pipeline and the most values a message on it has; the same in each process.
    mailboxes : mapping of Channel to int
        Descriptors of the shared memory of this stage's channels, where there is some at both ends.
    """

    def __init__(
        self,
        stage: int,
        channels: Mapping[Channel, int],
        mailboxes: Mapping[Channel, int] | None = None,
        *,
        most_pending: int = 8,
    ) -> None:
        self.tags = {channel: tag for tag, channel in enumerate(channels)}
        self.widths = dict(channels)
        self.mailboxes = {channel: Mailbox(descriptor) for channel, descriptor in (mailboxes or {}).items()}
        self.most_pending = most_pending
        self.pending: dict[Channel, deque[list[tuple[Any, Tensor]]]] = {}
        self.inboxes: dict[Channel, queue.Queue[Message | Exception]] = {}
        for channel in channels:
            if channel.target == stage:
                self.inboxes[channel] = queue.Queue()
                name = f"dtrp-receive-{channel.kind}-{channel.source}"
                threading.Thread(target=self._receive_all, args=(channel,), name=name, daemon=True).start()

    def send(self, channel: Channel, message: Message) -> None:
        header, payload = encode(message, self.widths[channel])
        if sum(flat.numel() for flat in payload) >= _LEAST_SHARED and channel in self.mailboxes:
            header[_SHARED] = self.mailboxes[channel].put(payload)
        if header[_SHARED]:
            payload = []
        waiting = self.pending.setdefault(channel, deque())
        while waiting and (len(waiting) >= self.most_pending or all(w.is_completed() for w, _ in waiting[0])):
            for work, _ in waiting.popleft():
                self._finish(work, channel)
        try:
            waiting.append([(self._post(t, channel), t) for t in [header, *(p.cpu() for p in payload)]])
        except RuntimeError as e:
            raise LostStage(channel.target, str(e)) from None

    def receive(self, channel: Channel, slot: int) -> Message:
        message = self.inboxes[channel].get()
        if isinstance(message, Exception):
            raise message
        return expect(message, channel, slot)

    def depth(self, stage: int) -> int:
        return sum(inbox.qsize() for channel, inbox in self.inboxes.items() if channel.target == stage)

    def flush(self) -> None:
        """Wait until everything that was sent has left."""
        for channel, waiting in self.pending.items():
            while waiting:
                for work, _ in waiting.popleft():
                    self._finish(work, channel)

    def _post(self, tensor: Tensor, channel: Channel) -> Any:
        return dist.isend(tensor, dst=channel.target, tag=self.tags[channel])

    @staticmethod
    def _finish(work: Any, channel: Channel) -> None:
        try:
            work.wait()
        except RuntimeError as e:
            raise LostStage(channel.target, str(e)) from None

    def _receive_all(self, channel: Channel) -> None:
        """A receiving thread's life; it ends with the process, or by handing over why it cannot go on."""
        inbox, tag = self.inboxes[channel], self.tags[channel]
        try:
            while True:
                header = torch.empty(_header_length(self.widths[channel]), dtype=torch.int64)
                dist.recv(header, src=channel.source, tag=tag)
                message, payload, shared = decode(header)
                if shared:
                    self.mailboxes[channel].take(payload)
                else:
                    for flat in payload:
                        dist.recv(flat, src=channel.source, tag=tag)
                inbox.put(message)
        except RuntimeError as e:
            inbox.put(LostStage(channel.source, str(e)))
        except Exception as e:
            inbox.put(e)


def encode(message: Message, width: int) -> tuple[Tensor, list[Tensor]]:
    """Header and payload (flat byte tensors) of a message."""
    fields = [message.slot, int(message.skip), 0, len(message.values)]
    payload: list[Tensor] = []
    for value in message.values:
        fields += _encode(value, payload)
    fields += [0] * (_header_length(width) - len(fields))
    return torch.tensor(fields, dtype=torch.int64), payload


def _header_length(width: int) -> int:
    return _FIXED + width * _PER_VALUE


def _encode(value: Any, payload: list[Tensor]) -> list[int]:
    if isinstance(value, Tensor):
        plain = canonical(value)
        order = dense_order(plain)
        if order is None or plain.dim() > _MOST_DIMS or plain.dtype not in _DTYPES:
            raise TypeError(
                f"a tensor of shape {tuple(value.shape)}, dtype {value.dtype}, layout {value.layout} cannot "
                f"travel between stages; dense tensors of up to {_MOST_DIMS} dimensions and of the common "
                f"dtypes can"
            )
        flat = flat_bytes(plain)
        if flat.numel():
            payload.append(flat)
        pad = [0] * (_MOST_DIMS - plain.dim())
        return [_TENSOR, _DTYPES.index(plain.dtype), plain.dim(), *plain.shape, *pad, *order, *pad]
    kind, bits = _NONE, 0
    if isinstance(value, bool):
        kind, bits = _BOOL, int(value)
    elif isinstance(value, int):
        kind, bits = _INT, value
    elif isinstance(value, float):
        kind, bits = _FLOAT, struct.unpack("<q", struct.pack("<d", value))[0]
    elif value is not None:
        raise TypeError(f"a value of type {type(value).__name__} cannot travel between stages")
    return [kind, bits, 0, *[0] * (2 * _MOST_DIMS)]


def decode(header: Tensor) -> tuple[Message, list[Tensor], bool]:
    """A message, the flat bytes of its tensors, still to be filled in, and whether they lie in a mailbox."""
    fields = header.tolist()
    slot, skip, shared, count = fields[:_FIXED]
    payload: list[Tensor] = []
    starts = range(_FIXED, _FIXED + count * _PER_VALUE, _PER_VALUE)
    values = tuple(_decode(fields[at : at + _PER_VALUE], payload) for at in starts)
    return Message(slot, values, bool(skip)), payload, bool(shared)


def _decode(fields: list[int], payload: list[Tensor]) -> Any:
    kind, bits, dims = fields[:3]
    if kind == _TENSOR:
        dtype = _DTYPES[bits]
        shape = fields[3 : 3 + dims]
        order = fields[3 + _MOST_DIMS : 3 + _MOST_DIMS + dims]
        dense = torch.empty([shape[d] for d in order], dtype=dtype)
        inverse = sorted(range(dims), key=order.__getitem__)
        if dense.numel():
            payload.append(dense.reshape(-1).view(torch.uint8))
        return dense.permute(inverse)
    if kind == _FLOAT:
        return struct.unpack("<d", struct.pack("<q", bits))[0]
    return {_NONE: None, _INT: bits, _BOOL: bool(bits)}[kind]

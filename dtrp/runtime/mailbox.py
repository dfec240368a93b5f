"""Shared memory between two processes: how large messages skip the kernel's sockets.

The memory has no name (``memfd_create``, Linux): it is inherited as a file descriptor, no other process can
open it, and it is gone with the last process that holds it, however that one ends. Elsewhere there are no
mailboxes, and messages take the way that is always there.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .links import Channel

_ALIGNMENT = 64
_FIRST_SIZE = mmap.PAGESIZE


class Mailbox:
    """One end of a channel's shared memory, which holds one message's bytes at a time.

    The sender fills it and tells the receiver so by other means; the receiver empties it. A mailbox that is
    still full when the next message is due refuses that message, so that nobody ever waits for it.

    Parameters
    ----------
    descriptor : int
        The memory, from `open_mailboxes`; kept open.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._map()

    def put(self, payload: Sequence[Tensor]) -> bool:
        """Copy flat byte tensors in; ``False`` if the last message has not been taken yet."""
        if self.full:
            return False
        *starts, size = _places(payload)
        if size > self.memory.numel():
            os.ftruncate(self.descriptor, size)
            self._map()
        for start, flat in zip(starts, payload, strict=True):
            self.memory[start : start + flat.numel()].copy_(flat)
        self.full = True
        return True

    def take(self, payload: Sequence[Tensor]) -> None:
        """Copy out what `put` was given, into tensors of the same sizes."""
        *starts, size = _places(payload)
        if size > self.memory.numel():
            self._map()
        for start, flat in zip(starts, payload, strict=True):
            flat.copy_(self.memory[start : start + flat.numel()])
        self.full = False

    @property
    def full(self) -> bool:
        """Whether a message lies here."""
        return bool(self.memory[0])

    @full.setter
    def full(self, value: bool) -> None:
        self.memory[0] = value

    def _map(self) -> None:
        size = os.fstat(self.descriptor).st_size
        self.memory = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)


def _places(payload: Iterable[Tensor]) -> list[int]:
    """Where each part starts, behind the flag, and where the last one ends."""
    sizes = (-(-flat.numel() // _ALIGNMENT) * _ALIGNMENT for flat in payload)
    return list(accumulate(sizes, initial=_ALIGNMENT))


def open_mailboxes(channels: Iterable[Channel]) -> dict[Channel, int]:
    """Shared memory for each channel, as descriptors to inherit and then to close; none if there is none."""
    found: dict[Channel, int] = {}
    if hasattr(os, "memfd_create"):
        with contextlib.suppress(OSError):  # out of descriptors, or forbidden: the rest do without
            for channel in channels:
                found[channel] = os.memfd_create(f"dtrp-{channel.kind}")
                os.ftruncate(found[channel], _FIRST_SIZE)
    return found


def close_mailboxes(descriptors: Iterable[int]) -> None:
    """Give up descriptors; the memory stays with those who inherited them."""
    for descriptor in descriptors:
        os.close(descriptor)

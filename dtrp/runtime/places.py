"""Memory that two processes of a host have, in numbered places, each for one message's payload.

Who fills a place and who empties it take turns, by notes (shared.py). On a device what the notes announce may
be still to come: the copies wait for each other there.
"""

from __future__ import annotations

import mmap
import os
import pickle
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import accelerators
from .forms import copy_rows, places

_to_the_end: list[object] = []  # what this process keeps


class HostPlaces:
    """A file without a name that grows; places lie behind each other.

    ``apart``: whether also payloads of few bytes are to be put there.
    """

    device, apart = torch.device("cpu"), False

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.mapped = torch.empty(0, dtype=torch.uint8)
        self.where: dict[int, tuple[int, int]] = {}  # start and capacity of each place
        self.end = 0

    def fill(self, place: int, capacity: int, rows: Sequence[Tensor]) -> tuple[int, bytes]:
        """Copy rows of bytes into a place of so many; a number, and bytes, that `empty` is to be told."""
        if self.where.get(place, (0, 0))[1] != capacity:
            self.where[place] = self.end, capacity
            self.end += capacity
        start = self.where[place][0]
        _put(rows, self._map(start + capacity)[start:])
        return start, b""

    def empty(self, place: int, told: int, rows: Sequence[Tensor], behind: memoryview) -> None:
        """Copy a place's bytes into rows. ``behind`` ends in the bytes that `fill` told."""
        copy_rows(rows, self._map(told + places(rows)[-1])[told:])

    def _map(self, size: int) -> Tensor:
        """The memory, at least so many bytes of it."""
        if self.mapped.numel() < size:
            now = os.fstat(self.descriptor).st_size
            if now < size:
                now = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
                os.ftruncate(self.descriptor, now)
            self.mapped = torch.frombuffer(mmap.mmap(self.descriptor, now), dtype=torch.uint8)
        return self.mapped

    def close(self) -> None:
        os.close(self.descriptor)
        self.mapped = torch.empty(0, dtype=torch.uint8)  # a traceback may hold this end much longer


class DevicePlaces:
    """Memory of a device that both processes use; a place's handle travels with the first note of it."""

    apart = True

    def __init__(self, device: torch.device, descriptor: int) -> None:
        self.device, self.descriptor = device, descriptor
        self.lent: dict[int, accelerators.Lent] = {}

    def fill(self, place: int, capacity: int, rows: Sequence[Tensor]) -> tuple[int, bytes]:
        lent, handle = self.lent.get(place), b""
        if lent is not None and lent.memory.numel() == capacity:
            lent.emptied.wait()
        else:
            if lent is not None:  # rare; its marks must not go before what waits for them has passed
                lent.emptied.synchronize()
            lent = self.lent[place] = accelerators.Lent.make(self.device, capacity)
            handle = lent.handle()
        _put(rows, lent.memory)
        lent.filled.record()
        return len(handle), handle

    def empty(self, place: int, told: int, rows: Sequence[Tensor], behind: memoryview) -> None:
        if told:
            self.lent[place] = accelerators.Lent(*pickle.loads(behind[len(behind) - told :]))
        lent = self.lent[place]
        lent.filled.wait()
        copy_rows(rows, lent.memory)
        lent.emptied.record()

    def close(self) -> None:
        """The memory stays until the process ends: torch's giving back waits for the device, and aborts the
        process where that has failed."""
        os.close(self.descriptor)
        _to_the_end.append(self.lent)


def _put(rows: Sequence[Tensor], memory: Tensor) -> None:
    *starts, _ = places(rows)
    for start, row in zip(starts, rows, strict=True):
        memory[start : start + row.numel()].copy_(row)

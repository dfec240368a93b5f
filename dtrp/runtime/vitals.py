"""Signs of life of worker processes: a page of shared memory that a thread of each writes.

A thread, because the stage itself may compute for minutes. Two things are told apart: a process that shows no
sign of life (stopped, out of memory), and processes that are all alive and wait for each other for ever.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PACE = 0.25  # seconds between signs of life
SIZE = 256  # bytes for each process
HEAD = struct.Struct("<QQ?")  # beats, things done, whether it waits for another stage


@dataclass(frozen=True)
class Sign:
    """What one process said of itself a moment ago."""

    beats: int
    done: int
    waits: bool
    phase: str


class Page:
    """The page; ``descriptor`` is inherited by all."""

    def __init__(self, descriptor: int, n: int) -> None:
        if os.fstat(descriptor).st_size < n * SIZE:
            os.ftruncate(descriptor, n * SIZE)
        self.memory = mmap.mmap(descriptor, n * SIZE)

    def write(self, k: int, sign: Sign) -> None:
        data = HEAD.pack(sign.beats, sign.done, sign.waits) + sign.phase.encode()[: SIZE - HEAD.size]
        self.memory[k * SIZE : (k + 1) * SIZE] = data.ljust(SIZE, b"\0")

    def read(self, k: int) -> Sign:
        data = self.memory[k * SIZE : (k + 1) * SIZE]
        phase = data[HEAD.size :].rstrip(b"\0").decode(errors="replace")
        beats, done, waits = HEAD.unpack_from(data)
        return Sign(beats, done, waits, phase)


def show_life(
    page: Page, k: int, look: Callable[[], tuple[int, bool, str]], gone: Callable[[], None]
) -> None:
    """Start the thread; ``look`` says what to show, ``gone`` is called when the caller is no more."""
    parent = os.getppid()

    def live() -> None:
        beats = 0
        while True:
            beats += 1
            page.write(k, Sign(beats, *look()))
            if os.getppid() != parent:
                gone()
            time.sleep(PACE)

    threading.Thread(target=live, name="dtrp-vitals", daemon=True).start()


class Watch:
    """Notices, while somebody waits, who has been silent or has got nowhere for ``limit`` seconds."""

    def __init__(self, page: Page, n: int, limit: float) -> None:
        self.page, self.n, self.limit = page, n, limit
        self.looked = time.monotonic()
        self.signs: list[Sign] = [page.read(k) for k in range(n)]
        self.lived = [self.looked] * n  # when each last showed life
        self.moved = self.looked  # when any last did something

    def look(self) -> tuple[int, str] | None:
        """The stage that is to blame, and why; ``None`` while all is well."""
        now = time.monotonic()
        signs = [self.page.read(k) for k in range(self.n)]
        if now - self.looked > max(2.0, self.limit / 2):  # nobody looked, or this process was stopped, too
            self.lived, self.moved = [now] * self.n, now
        for k, (old, new) in enumerate(zip(self.signs, signs, strict=True)):
            if new.beats != old.beats:
                self.lived[k] = now
        if not _stuck(signs) or [s.done for s in signs] != [s.done for s in self.signs]:
            self.moved = now
        self.looked, self.signs = now, signs
        late = min(range(self.n), key=lambda k: self.lived[k])
        if now - self.lived[late] > self.limit:
            return late, (
                f"stage {late} has shown no sign of life for {now - self.lived[late]:.0f} s "
                f"(watchdog={self.limit:g} s); last heard of it: {signs[late].phase}. Its process may be "
                f"stopped or out of memory"
            )
        if now - self.moved > self.limit:
            first = next(k for k, s in enumerate(signs) if s.waits)
            phases = "; ".join(f"stage {k}: {s.phase}" for k, s in enumerate(signs))
            return first, (
                f"the stages have waited for each other for {now - self.moved:.0f} s (watchdog="
                f"{self.limit:g} s): {phases}"
            )
        return None


def _stuck(signs: Sequence[Sign]) -> bool:
    """Whether nobody works and somebody waits for another stage."""
    return any(s.waits for s in signs) and all(s.waits or s.phase == "idle" for s in signs)

"""Signs of life of worker processes: a page of shared memory that a thread of each writes.

A thread, because the stage itself may compute for minutes. Three things are told apart: a process that shows
no sign of life (stopped, out of memory); processes that are alive and wait for each other for ever; and one
that is alive and in the middle of its work, but waits for something else, since it takes no processor time (a
lock that nobody gives back, a connection).
"""

from __future__ import annotations

import mmap
import os
import select
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PACE = 0.25  # seconds between signs of life
SIZE = 256  # bytes for each process
HEAD = struct.Struct("<QQd?")  # beats, things done, processor time, whether it waits for another stage
WORKING = 0.01  # of a processor: who takes less does not compute
_CALLS = ". A script must make the same calls to its trainer, with as many batches, on every rank"
ASLEEP = 10  # times the limit: so long may a stage wait in the middle of its work (for a service, a device)


@dataclass(frozen=True)
class Sign:
    """What one process said of itself a moment ago."""

    beats: int
    done: int
    cpu: float  # seconds of processor time, without those of the thread that writes this
    waits: bool
    phase: str

    def pack(self) -> bytes:
        return (HEAD.pack(self.beats, self.done, self.cpu, self.waits) + self.phase.encode())[:SIZE]

    @classmethod
    def unpack(cls, data: bytes) -> Sign:
        phase = data[HEAD.size :].rstrip(b"\0").decode(errors="replace")
        beats, done, cpu, waits = HEAD.unpack_from(data)
        return cls(beats, done, cpu, waits, phase)


class Page:
    """The page; ``descriptor`` is inherited by all."""

    def __init__(self, descriptor: int, n: int) -> None:
        if os.fstat(descriptor).st_size < n * SIZE:
            os.ftruncate(descriptor, n * SIZE)
        self.memory = mmap.mmap(descriptor, n * SIZE)

    def write(self, k: int, sign: Sign) -> None:
        self.memory[k * SIZE : (k + 1) * SIZE] = sign.pack().ljust(SIZE, b"\0")

    def read(self, k: int) -> Sign:
        return Sign.unpack(self.memory[k * SIZE : (k + 1) * SIZE])


def show_life(
    page: Page, k: int, look: Callable[[], tuple[int, bool, str]], gone: Callable[[], None], caller: int
) -> None:
    """Start the thread; ``look`` says what to show, ``gone`` is called when the process ``caller`` is no
    more."""
    ended = _watching(caller)

    def live() -> None:
        beats = 0
        while True:
            beats += 1
            done, waits, phase = look()
            page.write(k, Sign(beats, done, time.process_time() - time.thread_time(), waits, phase))
            if ended():
                gone()
            time.sleep(PACE)

    threading.Thread(target=live, name="dtrp-vitals", daemon=True).start()


def _watching(caller: int) -> Callable[[], bool]:
    """Whether a process has ended, which need not be the parent (starting.py)."""
    if not hasattr(os, "pidfd_open"):
        parent = os.getppid()
        return lambda: os.getppid() != parent
    try:
        look = select.poll()
        look.register(os.pidfd_open(caller), select.POLLIN)
        return lambda: bool(look.poll(0))
    except ProcessLookupError:
        return lambda: True


class Watch:
    """Notices, while somebody waits, who has been silent or has got nowhere for ``limit`` seconds.

    Parameters
    ----------
    read : callable
        The newest sign of each process.
    names : sequence of str
        What to call them.
    limit : float
        Seconds.
    scripts : bool
        Whether they run a script of the user's between rounds: then one that is idle while others wait is
        busy there.
    """

    def __init__(
        self, read: Callable[[int], Sign], names: Sequence[str], limit: float, *, scripts: bool = False
    ) -> None:
        self.read, self.names, self.n, self.limit, self.scripts = read, names, len(names), limit, scripts
        self.looked = time.monotonic()
        self.signs: list[Sign] = [read(k) for k in range(self.n)]
        self.lived = [self.looked] * self.n  # when each last showed life
        self.moved = self.looked  # when any last did something, or none had anything to do
        self.then = self.signs  # what they said at that moment

    def look(self) -> tuple[int, str] | None:
        """The stage that is to blame, and why; ``None`` while all is well."""
        now = time.monotonic()
        signs = [self.read(k) for k in range(self.n)]
        if now - self.looked > max(2.0, self.limit / 2):  # nobody looked, or this process was stopped, too
            self.lived, self.moved, self.then = [now] * self.n, now, signs
        for k, (old, new) in enumerate(zip(self.signs, signs, strict=True)):
            if new.beats != old.beats:
                self.lived[k] = now
        idle = all(s.phase == "idle" for s in signs)
        if idle or [s.done for s in signs] != [s.done for s in self.then]:
            self.moved, self.then = now, signs
        self.looked, self.signs = now, signs
        late = min(range(self.n), key=lambda k: self.lived[k])
        if now - self.lived[late] > self.limit:
            return late, (
                f"{self.names[late]} has shown no sign of life for {now - self.lived[late]:.0f} s "
                f"(watchdog={self.limit:g} s); last heard of it: {signs[late].phase}. Its process may be "
                f"stopped or out of memory" + (", or its host cut off" if self.scripts else "")
            )
        late_by = now - self.moved
        if late_by > self.limit:
            if any(self._works(k, late_by) for k in range(self.n)):
                self.moved, self.then = now, signs
                return None
            phases = "; ".join(f"{name}: {s.phase}" for name, s in zip(self.names, signs, strict=True))
            busy = [k for k in range(self.n) if self._busy(k)]
            if busy and late_by <= ASLEEP * self.limit:
                return None
            if busy:
                return busy[0], (
                    f"{self.names[busy[0]]} has not computed for {late_by:.0f} s ({ASLEEP} times the "
                    f"watchdog's {self.limit:g} s), in the middle of its work: its code waits for something, "
                    f"a lock or a connection ({phases})"
                )
            return next(k for k, s in enumerate(signs) if s.waits), (
                f"the stages have waited for each other for {late_by:.0f} s (watchdog={self.limit:g} s): "
                f"{phases}" + (_CALLS if self.scripts else "")
            )
        return None

    def _works(self, k: int, seconds: float) -> bool:
        """Whether stage k has computed in the last so many seconds, in which it has finished nothing."""
        return self._busy(k) and self.signs[k].cpu - self.then[k].cpu > WORKING * seconds

    def _busy(self, k: int) -> bool:
        return not self.signs[k].waits and (self.scripts or self.signs[k].phase != "idle")

"""The worker processes: started, heard, ended.

Each has nothing of the script's (starting.py). What it needs of descriptors it is given: its ends of the
lines (shared.py), the socket that it speaks to (voice.py), the page on which it shows that it lives
(vitals.py).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from .. import accelerators
from ..errors import WorkerError
from .config import TrainConfig
from .program import StageProgram
from .shared import CALLER, SharedLinks, open_line
from .starting import Process, hold_standard_descriptors, start
from .vitals import Page
from .voice import LENGTH

# A tick allocates and frees the same large tensors again and again. glibc hands each back to the system,
# which clears its pages anew; kept, a stage runs about a fifth faster with the same peak. Set variables win.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}


class Processes:
    """The worker processes: started, heard, ended.

    Parameters
    ----------
    programs, config
        Of the stages, one for each process.
    pairs : set of (int, int)
        Processes of which the one sends to the other.
    wait : callable
        What a line does that cannot go on.
    """

    def __init__(
        self, programs: Sequence[StageProgram], config: TrainConfig, pairs: set[tuple[int, int]], wait: Any
    ) -> None:
        hold_standard_descriptors()
        n = len(programs)
        environment = workers_environment(config.threads)
        self.pairs = pairs
        ways = [(CALLER, k) for k in range(n)] + sorted(pairs)
        lines = [open_line(i, j, _together(programs, i, j)) for i, j in ways]
        board = open_line(CALLER, CALLER)  # of which only the memory is used
        self.page = Page(board.memory, n)
        self.processes: list[Process] = []
        self.sockets: list[socket.socket] = []
        self._buffers = [bytearray() for _ in range(n)]
        self._dead: set[int] = set()
        mine = [line for line in lines if line.source == CALLER]
        given: set[int] = {board.sends, board.receives, board.memory}
        try:
            for k in range(n):
                ours, theirs = socket.socketpair()
                self.sockets.append(ours)
                ends = {theirs.fileno(), board.memory}
                for line in lines:
                    if k in (line.source, line.target):
                        ends |= {line.memory, line.sends if line.source == k else line.receives}
                given |= ends
                boot = {
                    "number": k,
                    "n_processes": n,
                    "lines": [line for line in lines if k in (line.source, line.target)],
                    "given": sorted(ends),
                    "replies": theirs.detach(),
                    "page": board.memory,
                    "caller": os.getpid(),
                }
                self.processes.append(start(boot, sorted(ends), environment))
        except OSError as e:
            self._close(given - {line.memory for line in mine})
            self.kill()
            stage = programs[len(self.processes)].stage
            raise WorkerError(f"the process of stage {stage} cannot be started: {e}") from e
        self._close(given - {line.memory for line in mine})
        self.links = SharedLinks(CALLER, mine, wait=wait, most=(2 * n + 8) * config.parts)
        self._poll = select.poll()
        for sock in self.sockets:
            sock.setblocking(False)
            self._poll.register(sock, select.POLLIN)

    @staticmethod
    def _close(descriptors: Iterable[int]) -> None:
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def hear(self, seconds: float) -> list[tuple[int, tuple[Any, ...]]]:
        """What workers said, within so many seconds, in order; ``("died",)`` is the last word of each."""
        heard: list[tuple[int, tuple[Any, ...]]] = []
        ready = {fd for fd, _ in self._poll.poll(max(0.0, seconds) * 1e3)}
        for k, sock in enumerate(self.sockets):
            if k not in self._dead and sock.fileno() in ready:
                open_still = self._read(k)
                heard += [(k, message) for message in self._frames(k)]
                if not open_still:
                    self._dead.add(k)
                    self._poll.unregister(sock)
                    heard.append((k, ("died",)))
        return heard

    def _read(self, k: int) -> bool:
        """All that is there now; whether more may come."""
        while True:
            try:
                data = self.sockets[k].recv(1 << 20)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if not data:
                return False
            self._buffers[k] += data
            if len(data) < 1 << 16:
                return True

    def _frames(self, k: int) -> Iterator[tuple[Any, ...]]:
        buffer = self._buffers[k]
        while len(buffer) >= LENGTH.size:
            (length,) = LENGTH.unpack_from(buffer)
            if len(buffer) < LENGTH.size + length:
                return
            data = bytes(memoryview(buffer)[LENGTH.size : LENGTH.size + length])
            del buffer[: LENGTH.size + length]
            try:
                message = pickle.loads(data)
            except Exception as e:
                message = ("error", f"its answer cannot be read here: {e}", "", None)
            yield message

    def alive(self) -> set[int]:
        return {k for k, process in enumerate(self.processes) if process.poll() is None}

    def epitaph(self, k: int) -> str:
        """How a process ended."""
        try:
            code = self.processes[k].wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if code >= 0:
            return f"exit code {code}"
        names = {known.value: known.name for known in signal.Signals}
        name = names.get(-code, f"signal {-code}")
        hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
        return f"killed by {name}{hint}"

    def wait(self, seconds: float, meanwhile: Any) -> None:
        """Until all processes have ended by themselves, for so many seconds at most."""
        deadline = time.monotonic() + seconds
        while self.alive() and time.monotonic() < deadline:
            meanwhile()

    def kill_one(self, k: int) -> None:
        self.processes[k].kill()
        self.processes[k].wait()

    def kill(self) -> None:
        """End all processes now. May be called twice."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for sock in self.sockets:
            sock.close()
        if hasattr(self, "links"):
            self.links.close()


def _together(programs: Sequence[StageProgram], i: int, j: int) -> torch.device | None:
    """The device that both have, where they can have its memory together."""
    device = programs[j].device
    shared = i != CALLER and programs[i].device == device and accelerators.lends(device)
    return device if shared else None


def workers_environment(threads: int) -> dict[str, str]:
    """The variables that a worker process has."""
    return {
        **KEEP_FREED_MEMORY,
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
    }


def carrying(program: StageProgram) -> set[tuple[int, int]]:
    """Who sends tensors to whom in a pipeline."""
    train = program.train
    pairs = {*train.sends, *program.evaluate.sends, *((j, i) for i, j in train.gradients)}
    for tie in program.ties:
        for guest, _ in tie.holders[1:]:
            pairs |= {(guest, tie.owner), (tie.owner, guest)}
    return pairs


def talking(program: StageProgram, config: TrainConfig) -> set[tuple[int, int]]:
    """Who sends anything to whom."""
    pairs, n = carrying(program), program.n_stages
    if config.max_grad_norm is not None or config.gives_up:
        pairs |= {(i, j) for i in range(n) for j in range(n) if i != j}
    return pairs


def weak(method: Any) -> Any:
    """A method that does not keep its object: else a trainer that is dropped would never end its workers."""
    found = weakref.WeakMethod(method)

    def call(*arguments: Any) -> Any:
        bound = found()
        assert bound is not None
        return bound(*arguments)

    return call

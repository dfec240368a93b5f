"""The worker processes of a run: started, spoken to, ended.

Each process has a private socket pair to this one, and here two threads that write to it and read from it.
So an interrupt (Ctrl-C) cannot cut a message in half, and a worker that has stopped reading, or stopped in
the middle of a word, keeps nobody else waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from ...errors import WorkerError
from ..transfer import dumps, loads

BOOT = """\
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from dtrp.runtime.executors.worker import main
main(int(sys.argv[1]))
"""
# A tick allocates and frees the same large tensors again and again. glibc hands each back to the system,
# which clears its pages anew; kept, a stage runs about a fifth faster with the same peak. Set variables win.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
PATIENCE = 5.0  # seconds that a worker gets to end by itself

Inbox = queue.SimpleQueue[tuple[int, tuple[Any, ...]]]


class Crew:
    """The processes, their private channels and the threads that serve them.

    Parameters
    ----------
    n : int
        How many.
    threads : int
        CPU threads of each.
    inherited : sequence of sequences of int
        For each, descriptors that it gets under the same numbers; they stay open here.

    Attributes
    ----------
    inbox : queue of (worker, message)
        What the workers say, in the order of its arrival. ``("died",)`` is the last word of each.
    """

    def __init__(self, n: int, threads: int, inherited: Sequence[Sequence[int]]) -> None:
        self.inbox: Inbox = queue.SimpleQueue()
        self.members: list[_Member] = []
        environment = {
            **KEEP_FREED_MEMORY,
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        try:
            for k in range(n):
                self.members.append(_Member(k, self.inbox, environment, inherited[k]))
        except OSError as e:
            self.kill()
            raise WorkerError(f"the process of stage {len(self.members)} cannot be started: {e}") from e
        except BaseException:
            self.kill()
            raise

    def post(self, worker: int, data: bytes) -> None:
        """Hand a message to the writing thread."""
        self.members[worker].outbox.put(data)

    def epitaph(self, worker: int) -> str:
        """How a process ended."""
        try:
            code = self.members[worker].process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
        return f"killed by {name}{hint}"

    def stop(self) -> None:
        """End all processes, with a moment to end by themselves."""
        data = dumps(("stop",))
        for k in range(len(self.members)):
            self.post(k, data)
        deadline = time.monotonic() + PATIENCE
        for member in self.members:
            with contextlib.suppress(subprocess.TimeoutExpired):
                member.process.wait(timeout=max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End all processes now, and all threads. May be called twice."""
        for member in self.members:
            member.process.kill()
        for member in self.members:
            member.bury()


class _Member:
    """One process and this process's end of its channel."""

    def __init__(
        self, number: int, inbox: Inbox, environment: dict[str, str], inherited: Sequence[int]
    ) -> None:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                    pass_fds=[theirs.fileno(), *inherited],
                    stdin=subprocess.DEVNULL,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is this process's to handle
                )
        except BaseException:
            ours.close()
            raise
        self.socket = ours
        self.connection = Connection(os.dup(ours.fileno()))
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.threads = [
            threading.Thread(
                target=_write, args=(self.connection, self.outbox), name=f"dtrp-write-{number}", daemon=True
            ),
            threading.Thread(
                target=_read, args=(self.connection, number, inbox), name=f"dtrp-read-{number}", daemon=True
            ),
        ]
        for thread in self.threads:
            thread.start()

    def bury(self) -> None:
        """Wait for the (dying) process, end its threads, close its channel."""
        self.process.wait()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes threads whose process has left children behind
        self.outbox.put(None)
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join()
        self.connection.close()
        self.socket.close()


def _write(connection: Connection, outbox: queue.SimpleQueue[bytes | None]) -> None:
    while (data := outbox.get()) is not None:
        with contextlib.suppress(OSError, ValueError):  # a dead worker is the reading thread's news
            connection.send_bytes(data)


def _read(connection: Connection, number: int, inbox: Inbox) -> None:
    try:
        while True:
            data = connection.recv_bytes()
            try:
                inbox.put((number, loads(data)))
            except Exception as e:
                inbox.put((number, ("error", f"its answer cannot be read here: {e}", "", None)))
    except (EOFError, OSError):
        inbox.put((number, ("died",)))

"""A process per stage, started and watched from here.

Workers are fresh interpreters, so a script needs no ``if __name__ == "__main__"`` and notebooks work. Each
has a private socket pair to this process, over which it gets its stage and its batches; among themselves
they talk over torch.distributed on the loopback interface and find each other through a file in a private
folder. Two threads here write and read, so that an interrupt (Ctrl-C) cannot cut a message in half.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from ...errors import WorkerError
from ..batch import Feed
from ..config import TrainConfig
from ..program import StageProgram
from ..stage import Measure
from ..transfer import dumps, loads
from .base import Loss
from .worker import Order

BOOT = """\
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from dtrp.runtime.executors.worker import main
main(int(sys.argv[1]))
"""
GRACE = 1.5  # seconds in which the first cause of a failure may still come in behind its consequences
PATIENCE = 5.0  # seconds that a worker gets to end by itself


class WorkersExecutor:
    """Runs each stage in a process of its own.

    Parameters
    ----------
    programs, config, seed, record
        As for the inline executor.
    watchdog : float
        Seconds without any answer after which a worker counts as stuck, while somebody waits for it.
    """

    def __init__(
        self,
        programs: Sequence[StageProgram],
        config: TrainConfig,
        *,
        seed: int | None,
        record: bool = False,
        watchdog: float = 60.0,
    ) -> None:
        self.n_stages = len(programs)
        self.watchdog = watchdog
        self.finished: deque[Loss] = deque()
        self.replies: dict[tuple[int, int], Any] = {}
        self.calls = 0
        self.fed = self.done = 0  # batches whose loss is awaited, and those whose loss has come
        self.failure: WorkerError | None = None
        self.alive = [time.monotonic()] * self.n_stages  # when each was last heard of
        self.phases = ["starting"] * self.n_stages
        orders = self._pickled(programs, config, seed, record)
        self.crew = _Crew(self.n_stages, config.threads)
        self._shutdown = weakref.finalize(self, _Crew.kill, self.crew)
        try:
            for k, order in enumerate(orders):
                self.crew.post([(k, order)])
            started: set[int] = set()
            while len(started) < self.n_stages:
                started |= {k for k, message in self._receive() if message[0] == "ready"}
        except BaseException:
            self.crew.kill()
            raise

    def _pickled(
        self, programs: Sequence[StageProgram], config: TrainConfig, seed: int | None, record: bool
    ) -> list[bytes]:
        self.folder = tempfile.mkdtemp(prefix="dtrp-")
        self._cleanup = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        store = os.path.join(self.folder, "rendezvous")
        try:
            return [dumps(("start", Order(p, config, seed, record, store))) for p in programs]
        except Exception as e:
            self._cleanup()
            raise TypeError(
                f"a stage, loss_fn, optimizer or scheduler cannot be sent to a worker process: {e}. Avoid "
                f"open files, locks and generators in them, or use executor='inline'"
            ) from e

    # ---- the executor's interface ----------------------------------------------------------------------

    def tick(self, feeds: Sequence[Feed | None]) -> None:
        self._check()
        self.crew.post([(k, dumps(("tick", feed))) for k, feed in enumerate(feeds)])
        self.fed += feeds[-1] is not None
        # Let workers run ahead of the caller, and the caller a little ahead of the workers.
        while self.fed - self.done > self.n_stages + 2:
            self._receive()
        self._receive(block=False)

    def settle(self) -> None:
        self.call("settle")

    def losses(self) -> list[Loss]:
        self._receive(block=False)
        found = list(self.finished)
        self.finished.clear()
        return found

    def evaluate(self, batches: Any, measure: Measure | None) -> list[Any]:
        self.call("begin_evaluation", [(measure,)] * self.n_stages)
        last = self.n_stages - 1
        numbers: list[int] = []
        results: list[Any] = []
        try:
            for slot, feeds in enumerate(batches):
                self.calls += 1
                numbers.append(self.calls)
                self.crew.post([(k, dumps(("evaluate", self.calls, slot, f))) for k, f in enumerate(feeds)])
                if len(numbers) - len(results) > self.n_stages + 2:
                    results.append(self._await(last, numbers[len(results)]))
            while len(results) < len(numbers):
                results.append(self._await(last, numbers[len(results)]))
        finally:
            if self.failure is None:
                self.call("end_evaluation")
        return results

    def call(self, method: str, arguments: Sequence[tuple[Any, ...]] | None = None) -> list[Any]:
        self._check()
        self.calls += 1
        number = self.calls
        self.crew.post(
            [
                (k, dumps(("call", number, method, arguments[k] if arguments else ())))
                for k in range(self.n_stages)
            ]
        )
        return [self._await(k, number) for k in range(self.n_stages)]

    def close(self) -> None:
        if self._shutdown.alive:
            self._shutdown.detach()
            self.crew.stop(gently=self.failure is None)
        self._cleanup()

    # ---- listening -------------------------------------------------------------------------------------

    def _await(self, stage: int, number: int) -> Any:
        while (stage, number) not in self.replies:
            self._receive()
        return self.replies.pop((stage, number))

    def _receive(self, *, block: bool = True) -> list[tuple[int, tuple[Any, ...]]]:
        """Take in what the workers said; with ``block``, wait for at least something.

        Raises
        ------
        WorkerError
            A worker failed, died or stopped answering.
        """
        self._check()
        got: list[tuple[int, tuple[Any, ...]]] = []
        patience = time.monotonic()
        while True:
            try:
                stage, message = self.crew.inbox.get(timeout=1.0 if block and not got else 0.0)
            except queue.Empty:
                if got or not block:
                    return got
                patience = self._look_after(patience)
                continue
            if message[0] in ("error", "died"):
                self._fail(stage, message)
            self.alive[stage] = time.monotonic()
            self._note(stage, message)
            got.append((stage, message))

    def _note(self, stage: int, message: tuple[Any, ...]) -> None:
        if message[0] == "loss":
            self.finished.append(Loss(*message[1:]))
            self.done += 1
        elif message[0] == "reply":
            self.replies[stage, message[1]] = message[2]
        elif message[0] == "pong":
            self.phases[stage] = f"{message[2]}, tick {message[1]}"

    def _look_after(self, since: float) -> float:
        """Ask everybody for a sign of life; complain of whoever has given none for too long."""
        now = time.monotonic()
        if now - since > 10.0:  # this process itself was stopped: nobody is to blame
            self.alive = [now] * self.n_stages
        for k in range(self.n_stages):
            silent = now - self.alive[k]
            if silent > self.watchdog:
                self._fail(k, ("stuck", silent))
        self.crew.post([(k, dumps(("ping",))) for k in range(self.n_stages)])
        return now

    def _check(self) -> None:
        if self.failure is not None:
            raise WorkerError(
                f"this trainer has failed before and cannot go on: {self.failure.args[0].splitlines()[0]}",
                stage=self.failure.stage,
                remote_traceback=self.failure.remote_traceback,
            )

    def _fail(self, stage: int, message: tuple[Any, ...]) -> None:
        """Find the first cause, end all workers, raise."""
        seen = [(stage, message)]
        deadline = time.monotonic() + GRACE
        while _rank(seen[0][1]) > 0 and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                other = self.crew.inbox.get(timeout=left)
                if other[1][0] in ("error", "died"):
                    seen.append(other)
                    seen.sort(key=lambda s: _rank(s[1]))
                else:
                    self._note(*other)
        stage, message = seen[0]
        if message[0] == "error":
            text, trace = f"stage {stage} failed: {message[1]}", message[2]
        elif message[0] == "stuck":
            text = (
                f"stage {stage} has not answered for {message[1]:.0f} s (watchdog={self.watchdog:g} s); last "
                f"heard of it: {self.phases[stage]}. Its process may be stopped or out of memory"
            )
            trace = ""
        else:
            text, trace = f"stage {stage}'s process died: {self.crew.epitaph(stage)}", ""
        self.failure = WorkerError(text, stage=stage, remote_traceback=trace)
        self._shutdown.detach()
        self.crew.kill()
        self._cleanup()
        raise self.failure


def _rank(message: tuple[Any, ...]) -> int:
    """Causes before consequences: an exception, a death, a lost connection."""
    if message[0] == "error":
        return 0 if message[3] is None else 2
    return 0 if message[0] == "stuck" else 1


class _Crew:
    """The processes, their private channels and the two threads that serve them."""

    def __init__(self, n: int, threads: int) -> None:
        self.inbox: queue.Queue[tuple[int, tuple[Any, ...]]] = queue.Queue()
        self._outbox: queue.Queue[list[tuple[int, bytes]] | None] = queue.Queue()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.connections: list[Connection] = []
        self._closing = False
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        try:
            for _ in range(n):
                ours, theirs = socket.socketpair()
                with theirs:
                    process = subprocess.Popen(
                        [sys.executable, "-c", BOOT, str(theirs.fileno()), json.dumps(sys.path)],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        env=environment,
                        start_new_session=True,  # Ctrl-C is this process's to handle
                    )
                self.processes.append(process)
                self.connections.append(Connection(ours.detach()))
        except BaseException:
            self.kill()
            raise
        self._threads = [
            threading.Thread(target=target, name=f"dtrp-{target.__name__.strip('_')}", daemon=True)
            for target in (self._write, self._read)
        ]
        for thread in self._threads:
            thread.start()

    def post(self, messages: list[tuple[int, bytes]]) -> None:
        """Hand messages to the writing thread, all or none."""
        self._outbox.put(messages)

    def _write(self) -> None:
        while (messages := self._outbox.get()) is not None:
            for k, data in messages:
                with contextlib.suppress(OSError):  # a dead worker is the reading thread's news
                    self.connections[k].send_bytes(data)

    def _read(self) -> None:
        open_ = {connection: k for k, connection in enumerate(self.connections)}
        while open_ and not self._closing:
            for ready in wait(list(open_), timeout=0.2):
                assert isinstance(ready, Connection)
                k = open_[ready]
                try:
                    self.inbox.put((k, loads(ready.recv_bytes())))
                except (EOFError, OSError):
                    del open_[ready]
                    self.inbox.put((k, ("died",)))
                except Exception as e:
                    self.inbox.put((k, ("error", f"its answer cannot be read here: {e}", "", None)))

    def epitaph(self, stage: int) -> str:
        """How a process ended."""
        try:
            code = self.processes[stage].wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        hint = "; the system may have run out of memory" if -code == signal.SIGKILL else ""
        return f"killed by {name}{hint}"

    def stop(self, *, gently: bool) -> None:
        """End all processes, with a moment to end by themselves."""
        if gently:
            self.post([(k, dumps(("stop",))) for k in range(len(self.connections))])
            deadline = time.monotonic() + PATIENCE
            for process in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End all processes now, and both threads."""
        self._closing = True
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()
        self._outbox.put(None)
        for thread in getattr(self, "_threads", []):
            if thread is not threading.current_thread():
                thread.join()
        for connection in self.connections:
            connection.close()
        self.connections = []

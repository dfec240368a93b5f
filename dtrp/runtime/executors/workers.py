"""A process per stage, started and watched from here.

Workers are fresh interpreters, so a script needs no ``if __name__ == "__main__"`` and notebooks work. Each
has a private socket pair to this process (crew.py), over which it gets its stage and its batches; among
themselves they talk over shared memory and torch.distributed on the loopback interface, and find each other
through a file in a private folder, which is gone once they have.
"""

from __future__ import annotations

import logging
import os
import queue
import shutil
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

from ...errors import WorkerError
from .. import interrupts
from ..batch import Feed
from ..config import TrainConfig
from ..links import Channel, channels
from ..mailbox import close_mailboxes, open_mailboxes
from ..program import StageProgram
from ..random import random_state
from ..stage import Measure
from ..stats import StageStats
from ..transfer import dumps
from .base import Loss, again
from .crew import Crew
from .worker import Order

GRACE = 1.5  # seconds in which the first cause of a failure may still come in behind its consequences
STARTUP = 300.0  # seconds that a worker may take to import what it needs
GLANCE = 0.25  # seconds between looks at the clock, and at Ctrl-C, while waiting

Message = tuple[Any, ...]


class WorkersExecutor:
    """Runs each stage in a process of its own.

    Parameters
    ----------
    programs, config, seed, record
        As for the inline executor.
    watchdog : float
        Seconds that a worker may leave a question unanswered, while somebody waits for it, before it counts
        as stuck. Workers answer also while they compute.
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
        self.finished: deque[Loss] = deque()
        self.replies: dict[tuple[int, int], Any] = {}
        self.calls = 0
        self.fed = self.done = 0  # batches whose loss is awaited, and those whose loss has come
        self.failure: WorkerError | None = None
        self.snapshots: list[StageStats | None] = [None] * self.n_stages
        self.watch = _Watch(self.n_stages, max(watchdog, STARTUP))
        first = programs[0]
        mailboxes = open_mailboxes(channels(first.train, first.evaluate, first.ties))
        try:
            ends = [
                {c: m for c, m in mailboxes.items() if k in (c.source, c.target)}
                for k in range(self.n_stages)
            ]
            orders = self._pickled(programs, config, seed, record, ends)
            with interrupts.held():
                try:
                    self.crew = Crew(self.n_stages, config.threads, [list(end.values()) for end in ends])
                except BaseException:
                    self._cleanup()
                    raise
                self._shutdown = weakref.finalize(self, Crew.kill, self.crew)
        finally:
            close_mailboxes(mailboxes.values())
        try:
            for k, order in enumerate(orders):
                self.crew.post(k, order)
            self._started: set[int] = set()
            while len(self._started) < self.n_stages:
                self._receive()
        except BaseException:
            self._end()
            raise
        self.watch.limit = watchdog
        self._cleanup()  # they have met

    def _pickled(
        self,
        programs: Sequence[StageProgram],
        config: TrainConfig,
        seed: int | None,
        record: bool,
        mailboxes: Sequence[dict[Channel, int]],
    ) -> list[bytes]:
        self.folder = tempfile.mkdtemp(prefix="dtrp-")
        self._cleanup = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        store = os.path.join(self.folder, "rendezvous")
        ambient = random_state() if seed is None else None
        level = logging.getLogger("dtrp").getEffectiveLevel()
        try:
            return [
                dumps(("start", Order(p, config, seed, record, store, level, m, ambient)))
                for p, m in zip(programs, mailboxes, strict=True)
            ]
        except Exception as e:
            self._cleanup()
            raise TypeError(
                f"a stage, loss_fn, optimizer or scheduler cannot be sent to a worker process: {e}. Avoid "
                f"open files, locks and generators in them, or use executor='inline'"
            ) from e

    # ---- the executor's interface ----------------------------------------------------------------------

    def tick(self, feeds: Sequence[Feed | None]) -> None:
        self._check()
        self._post([("tick", feed) for feed in feeds])
        self.fed += feeds[-1] is not None

    def throttle(self) -> None:
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
                self._post([("evaluate", self.calls, slot, feed) for feed in feeds])
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
        self._post(
            [("call", number, method, arguments[k] if arguments else ()) for k in range(self.n_stages)]
        )
        return [self._await(k, number) for k in range(self.n_stages)]

    def glance(self) -> list[StageStats] | None:
        if self.failure is None:
            self.watch.look(time.monotonic(), self.crew)
        known = [s for s in self.snapshots if s is not None]
        return known if len(known) == self.n_stages else None

    def close(self) -> None:
        if self._shutdown.alive and self.failure is None:
            self._shutdown.detach()
            self.crew.stop()
        self._end()

    # ---- speaking and listening --------------------------------------------------------------------------

    def _post(self, messages: Sequence[Message]) -> None:
        """One message to each worker; to all or, interrupted or not to be pickled, to none."""
        pickled = [dumps(message) for message in messages]
        with interrupts.held():
            for k, data in enumerate(pickled):
                self.crew.post(k, data)

    def _await(self, stage: int, number: int) -> Any:
        while (stage, number) not in self.replies:
            self._receive()
        return self.replies.pop((stage, number))

    def _receive(self, *, block: bool = True) -> None:
        """Take in what the workers said; with ``block``, wait for at least something.

        Raises
        ------
        WorkerError
            A worker failed, died or stopped answering.
        """
        self._check()
        got = False
        while True:
            interrupts.check()
            with interrupts.held():
                try:
                    stage, message = self.crew.inbox.get(timeout=GLANCE if block and not got else 0.0)
                except queue.Empty:
                    if got or not block:
                        return
                    now = time.monotonic()
                    if (stuck := self.watch.look(now, self.crew)) is not None:
                        self._fail(stuck, ("stuck", self.watch.silence(stuck, now)))
                    continue
                got = True
                self.watch.heard(stage)
                if message[0] in ("error", "died"):
                    self._fail(stage, message)
                self._note(stage, message)

    def _note(self, stage: int, message: Message) -> None:
        if message[0] == "loss":
            self.finished.append(Loss(*message[1:]))
            self.done += 1
        elif message[0] == "reply":
            self.replies[stage, message[1]] = message[2]
        elif message[0] == "pong":
            self.watch.phases[stage], self.snapshots[stage] = message[1:]
        elif message[0] == "log":
            name, level, text = message[1:]
            logging.getLogger(name).log(level, "[stage %d] %s", stage, text)
        elif message[0] == "ready":
            self._started.add(stage)

    def _check(self) -> None:
        if self.failure is not None:
            raise again(self.failure)

    def _fail(self, stage: int, message: Message) -> None:
        """Find the first cause, end all workers, raise."""
        seen = [(stage, message)]
        deadline = time.monotonic() + GRACE
        while _rank(seen[0][1]) > 0 and (left := deadline - time.monotonic()) > 0:
            try:
                other = self.crew.inbox.get(timeout=left)
            except queue.Empty:
                break
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
                f"stage {stage} has not answered for {message[1]:.0f} s (watchdog={self.watch.limit:g} s); "
                f"last heard of it: {self.watch.phases[stage]}. Its process may be stopped or out of memory"
            )
            trace = ""
        else:
            text, trace = f"stage {stage}'s process died: {self.crew.epitaph(stage)}", ""
        self.failure = WorkerError(text, stage=stage, remote_traceback=trace)
        self._end()
        raise self.failure

    def _end(self) -> None:
        """No process, thread or file is left after this."""
        self._shutdown.detach()
        self.crew.kill()
        self._cleanup()


class _Watch:
    """Asks workers whether they are there, and knows since when one owes an answer."""

    def __init__(self, n_stages: int, limit: float) -> None:
        self.limit = limit
        self.phases = ["starting"] * n_stages
        self.asked: list[float | None] = [None] * n_stages  # the oldest question without an answer
        self.looked = time.monotonic()
        self.ping = dumps(("ping",))

    def heard(self, stage: int) -> None:
        """A worker said something."""
        self.asked[stage] = None

    def silence(self, stage: int, now: float) -> float:
        asked = self.asked[stage]
        return 0.0 if asked is None else now - asked

    def look(self, now: float, crew: Crew) -> int | None:
        """Ask whoever owes nothing; the worker that has been silent for too long, if there is one."""
        if now - self.looked > 10.0:  # nobody listened, or this process was stopped: nobody is to blame
            self.asked = [None] * len(self.asked)
        elif now - self.looked < min(1.0, self.limit / 4):
            return None
        self.looked = now
        for k, asked in enumerate(self.asked):
            if asked is None:
                self.asked[k] = now
                crew.post(k, self.ping)
        late = max(range(len(self.asked)), key=lambda k: self.silence(k, now))
        return late if self.silence(late, now) > self.limit else None


def _rank(message: Message) -> int:
    """Causes before consequences: an exception, a death, a lost connection."""
    if message[0] == "error":
        return 0 if message[3] is None else 2
    return 0 if message[0] == "stuck" else 1

"""A process per stage, or several, started and watched from here.

Workers are fresh interpreters, so a script needs no ``if __name__ == "__main__"`` and notebooks work. Batches
and commands go to each over a line (shared.py), in one order; what a worker has to say comes back over a
socket. Nothing here ever waits without an end: each wait looks at what all workers say, at their signs of
life, and at Ctrl-C.
"""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import WorkerError
from . import interrupts
from .batch import Feed, Loss, Skip
from .config import TrainConfig
from .environment import Environment
from .evaluation import Measure
from .inline import Results
from .links import Channel, LostStage, Message
from .processes import Processes, talking, weak
from .program import StageProgram
from .registered import Registered
from .routed import Seats
from .shared import CALLER
from .stats import StageStats
from .transfer import dumps
from .vitals import Watch
from .worker import pickled_setups

log = logging.getLogger("dtrp")

GRACE = 1.5  # seconds in which the first cause of a failure may still come in behind its consequences
PATIENCE = 5.0  # seconds that workers get to end by themselves, or to say what they have trained
STARTUP = 300.0  # seconds that a worker may take to import what it needs
GLANCE = 0.25  # seconds between looks at the clock, and at Ctrl-C, while waiting


class Workers:
    """Runs each stage in processes of its own.

    Parameters
    ----------
    programs, config, seed, record
        As for `Inline`.
    watchdog : float
        Seconds without a sign of life, or without anything done while all stages wait for each other, after
        which a run counts as stuck.
    """

    shares = False

    def __init__(
        self,
        programs: Sequence[StageProgram],
        config: TrainConfig,
        *,
        seed: int | None,
        record: bool = False,
        watchdog: float = 60.0,
    ) -> None:
        if all(p.device.type == "cpu" for p in programs):
            log.info("no CUDA devices are used: %d stages run on CPU worker processes", len(programs))
        self.n_stages = len(programs)
        self.seats = Seats(config.replicas or (1,) * self.n_stages)
        together = ((k, k) for k in range(self.n_stages))  # a stage's own processes
        pairs = self.seats.pairs({*talking(programs[0], config), *together})
        programs = [replace(p, device=device) for p in programs for device in p.devices or (p.device,)]
        self.n = len(programs)  # processes
        self._slots = 0  # that went in
        self.failure: WorkerError | None = None
        self._news: list[Loss | Skip] = []
        self._results: deque[Any] = deque()  # of evaluation
        self._replies: dict[tuple[int, int], Any] = {}
        self._calls = 0
        self._fed = self._finished = 0  # mini-batches
        self._structures: dict[pytree.TreeSpec, bytes] = {}  # of targets, pickled
        self._bad: list[tuple[int, tuple[Any, ...]]] = []  # failures and deaths, as they are heard of
        self._rescued: list[dict[str, Any]] = []
        self._stats: list[StageStats | None] = [None] * self.n_stages
        self._asked: set[int] = set()
        self._ready: set[int] = set()
        began = time.monotonic()
        environment = Environment.capture()
        with interrupts.held():
            self.crew = Processes(programs, config, pairs, weak(self._wait))
            self._kill = weakref.finalize(self, Processes.kill, self.crew)
        names = [self.seats.name(i) for i in range(self.n)]
        self._watch = Watch(self.crew.page.read, names, max(watchdog, STARTUP))
        try:
            # Pickled while the processes load torch.
            setups = pickled_setups(programs, config, seed, record)
            registered = Registered.capture(setups)
            for k, (program, setup) in enumerate(zip(programs, setups, strict=True)):
                self._command(k, dumps(("start", environment, registered, program.device, setup)))
            while len(self._ready) < self.n:
                self._listen()
        except BaseException:
            self._end()
            raise
        log.info("%d worker processes were ready after %.1f s", self.n, time.monotonic() - began)
        self._watch.limit = watchdog

    # ---- what a trainer asks for -------------------------------------------------------------------------

    def feed(self, feeds: Sequence[Feed]) -> None:
        """A slot goes in; ``feeds[k]`` is what stage k gets of it."""
        self._check()
        sent = []
        for i, k in enumerate(self.seats.stages):
            mine = i == self.seats.at(k, self._slots)
            sent.append((i, feeds[k] if mine else feeds[k]._replace(inputs=(), target=None)))
        self._send_feeds(sent, evaluates=False)
        self._slots += 1
        self._fed += feeds[-1].closes

    def drain(self, *, close_group: bool | str = False) -> None:
        """Until nothing is in flight; does not wait for it."""
        self._check()
        self._command_all("drain", close_group)
        self._slots += bool(close_group)  # as the stages count

    def throttle(self) -> None:
        """Wait until the stages have caught up far enough for the next batch."""
        # Let workers run ahead of the caller, and the caller a little ahead of the workers.
        while self._fed - self._finished > 2 * self.n_stages + 6:
            self._listen()
        self._listen(block=False)

    def news(self, *, wait: bool = False) -> list[Loss | Skip]:
        """What the stages say of finished batches since the last call; ``wait``: of all that went in."""
        if wait:
            self.call("news")  # which comes behind what there is to say
        else:
            self._listen(block=False)
        found, self._news = self._news, []
        return found

    def evaluate(self, batches: Iterable[Sequence[Feed]], measure: Measure | None) -> Results:
        """``measure`` of every batch, in order, then its totals; ``batches`` gives lists of feeds, one per
        stage."""
        self.call("begin_evaluation", measure)
        self._results.clear()
        awaited = 0
        try:
            for feeds in batches:
                self._check()
                self._send_feeds(list(zip(self.seats.firsts, feeds, strict=True)), evaluates=True)
                awaited += 1
                while awaited > self.n_stages + 2:
                    yield self._result()
                    awaited -= 1
            for _ in range(awaited):
                yield self._result()
            if measure is not None:
                yield self.call("totals")[-1]
        finally:
            if self.failure is None and self._kill.alive:  # a caller may leave it open, and close the trainer
                self.call("end_evaluation")

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """A method of every process's `Answers`, after all rounds so far; what each stage's first one says,
        in stage order."""
        self._check()
        self._calls += 1
        self._command_all("call", self._calls, method, arguments)
        questions = [(i, self._calls) for i in range(self.n)]
        while not self._replies.keys() >= set(questions):
            self._listen()
        replies = [self._replies.pop(question) for question in questions]
        return [replies[i] for i in self.seats.firsts]

    def states(self) -> Iterable[dict[str, Any]]:
        """Every stage's `Answers.state`."""
        return self.call("state")

    def glance(self) -> list[StageStats] | None:
        """The stages' latest known measurements; does not wait."""
        for k, i in enumerate(self.seats.firsts):
            if self.failure is None and i not in self._asked and (i, 0) not in self._replies:
                self._asked.add(i)
                self._command(i, dumps(("ask", 0, "stats", ())))
            if (i, 0) in self._replies:
                self._asked.discard(i)
                self._stats[k] = self._replies.pop((i, 0))
        known = [s for s in self._stats if s is not None]
        return known if len(known) == self.n_stages else None

    def rescued(self) -> tuple[list[Loss | Skip], list[dict[str, Any]]]:
        """After a failure: what stages whose processes lived on have said, and trained."""
        news, self._news = self._news, []
        return news, self._rescued

    def renew(
        self, programs: Sequence[StageProgram], config: TrainConfig, seed: int | None, record: bool
    ) -> bool:
        """With nothing in flight: the same processes go on with other stages, if their lines are enough."""
        if self.n > self.n_stages or not talking(programs[0], config) <= self.crew.pairs:
            return False
        for k, setup in enumerate(pickled_setups(programs, config, seed, record)):
            self._command(k, dumps(("renew", setup)))
        return True

    def close(self) -> None:
        """No process, thread or file is left after this; may be called twice."""
        if self._kill.alive and self.failure is None:
            with interrupts.held(), contextlib.suppress(WorkerError, LostStage):
                self._command_all("stop")
                self.crew.wait(PATIENCE, partial(self._take, 0.05))
        self._end()

    # ---- speaking ------------------------------------------------------------------------------------------

    def _send_feeds(self, feeds: Sequence[tuple[int, Feed]], *, evaluates: bool) -> None:
        """Each to its process."""
        messages = []
        for i, feed in feeds:
            leaves, structure = [feed.target], None
            if feed.target is not None and not isinstance(feed.target, Tensor):
                leaves, spec = pytree.tree_flatten(feed.target)
                structure = self._structures.get(spec)
                if structure is None:
                    structure = self._structures[spec] = dumps(spec)
            update = feed.update
            meta = [structure, evaluates, feed.part, feed.parts, feed.share, update.lr_scale, update.batches]
            messages.append((i, Message(feed.batch, [*meta, len(feed.inputs), *feed.inputs, *leaves])))
        with interrupts.held():
            for i, message in messages:
                self._post(Channel("feed", CALLER, i), message)

    def _command_all(self, verb: str, *arguments: Any) -> None:
        data = dumps((verb, *arguments), values=True)
        with interrupts.held():
            for i in range(self.n):
                self._command(i, data)

    def _command(self, i: int, pickled: bytes) -> None:
        self._post(Channel("command", CALLER, i), Message(0, [pickled]))

    def _post(self, channel: Channel, message: Message) -> None:
        try:
            self.crew.links.send(channel, message)
        except LostStage:
            self._listen()  # it has said why, or its death is news
            raise

    def _result(self) -> Any:
        while not self._results:
            self._listen()
        return self._results.popleft()

    # ---- listening -----------------------------------------------------------------------------------------

    def _wait(self, sock: socket.socket, event: int) -> None:
        """What a line does that cannot go on: listen meanwhile. Ctrl-C waits: others may have their half of
        what is being sent."""
        poll = select.poll()
        poll.register(sock, event)
        while not poll.poll(GLANCE * 1e3):
            self._take(0.0)
            if self._bad:
                self._fail()
            self._look()

    def _listen(self, *, block: bool = True) -> None:
        """Take in what the workers say; with ``block``, wait for at least something.

        Raises
        ------
        WorkerError
            A worker failed, died or is stuck.
        """
        self._check()
        while True:
            interrupts.check()
            with interrupts.held():
                heard = self._take(GLANCE if block else 0.0)
                if self._bad:
                    self._fail()
                if heard or not block:
                    return
                self._look()

    def _look(self) -> None:
        stuck = self._watch.look()
        if stuck is not None:
            self._bad.append((stuck[0], ("stuck", stuck[1])))
            self._fail()

    def _take(self, seconds: float) -> bool:
        """What is there within so many seconds; whether there was anything."""
        heard = self.crew.hear(seconds)
        for number, message in heard:
            self._note(number, message)
        return bool(heard)

    def _note(self, number: int, message: tuple[Any, ...]) -> None:
        match message:
            case ("news", items):
                self._news += items
                self._finished += sum(isinstance(item, Loss) for item in items)
            case ("reply", question, value):
                self._replies[number, question] = value
            case ("result", value):
                self._results.append(value)
            case ("print", name, text):
                lines = (f"[{self.seats.name(number)}] {line}" for line in text.splitlines(keepends=True))
                with contextlib.suppress(
                    AttributeError, OSError, ValueError
                ):  # there is none, or it is closed
                    stream = getattr(sys, name)
                    stream.write("".join(lines))
                    stream.flush()
            case ("log", name, level, text, file, line, function):
                logger = logging.getLogger(name)
                if logger.isEnabledFor(level):
                    text = f"[{self.seats.name(number)}] {text}"
                    logger.handle(logger.makeRecord(name, level, file, line, text, (), None, function))
            case ("error", *_) | ("died",):
                self._bad.append((number, message))
            case ("ready",):
                self._ready.add(number)

    # ---- failing and ending --------------------------------------------------------------------------------

    def _check(self) -> None:
        if self.failure is not None:
            raise self.failure.again()

    def _fail(self) -> None:
        """Find the first cause, ask the others what they have trained, end all workers, raise."""
        deadline = time.monotonic() + GRACE
        while min(map(_rank, self._bad)) > 0 and time.monotonic() < deadline:
            self._take(deadline - time.monotonic())  # the cause may come behind its consequences
        number, message = min(self._bad, key=_rank)
        trace, name = "", self.seats.name(number)
        if message[0] == "error":
            text, trace = f"{name} failed: {message[1]}", message[2]
        elif message[0] == "stuck":
            text = message[1]
            self.crew.kill_one(number)
        else:
            text = f"{name}'s process died: {self.crew.epitaph(number)}"
        self.failure = WorkerError(text, stage=self.seats.stages[number], remote_traceback=trace)
        self._rescue()
        self._end()
        raise self.failure

    def _rescue(self) -> None:
        """What the stages have trained, of as many as still answer: a failed one does, and its peers."""
        deadline = time.monotonic() + PATIENCE
        question = Message(0, [dumps(("ask", -1, "state", ()))])
        asked = []
        for k in self._ready & self.crew.alive():
            with contextlib.suppress(LostStage, WorkerError):
                self.crew.links.send(Channel("command", CALLER, k), question)
                asked.append(k)
        while (left := deadline - time.monotonic()) > 0:
            dead = {k for k, message in self._bad if message[0] == "died"}
            if all(k in dead or (k, -1) in self._replies for k in asked):
                break
            self._take(left)
        self._rescued = [self._replies.pop((k, -1)) for k in asked if (k, -1) in self._replies]

    def _end(self) -> None:
        self._kill.detach()
        self.crew.kill()


def _rank(said: tuple[int, tuple[Any, ...]]) -> int:
    """Causes before consequences: an exception, a death, a lost connection."""
    _, message = said
    if message[0] == "error":
        return 0 if message[3] is None else 2
    return 0 if message[0] == "stuck" else 1

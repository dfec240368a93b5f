"""Whether the other ranks live and go on: signs of life and last words, through the launcher's store.

Two threads, since the rank itself may compute for minutes, or wait in an operation that never ends. One tells
and hears: each rank writes a sign (vitals.py) to the store and reads the others'. It may hang, where the
store's host is gone. The other one only looks at the clock, and at what has been heard: when somebody is
gone, or all wait for each other, it fails the operations that this rank waits in (`Mesh.poison`), and `cause`
says why.

Whoever fails leaves a word first; the first word counts, for all ranks.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..errors import WorkerError
from .links import LostStage
from .mesh import Mesh
from .vitals import Sign, Watch

if TYPE_CHECKING:
    from .stage import Stage

GRACE = 1.0  # seconds in which the first cause of a failure may still be heard behind its consequences
FAILURE = "failure"


class Peers:
    """All ranks of a run, as this one sees them.

    Parameters
    ----------
    mesh : Mesh
    limit : float
        Seconds of silence after which a rank counts as gone (``watchdog``).

    Attributes
    ----------
    meter : Meter or None
        Of this rank's stage, once there is one.
    """

    def __init__(self, mesh: Mesh, limit: float) -> None:
        self.mesh, self.limit = mesh, limit
        self.stage: Stage | None = None
        self._doing = ""  # with all others; else the script goes on
        self._waits = False
        self._done = 0
        self.failure: WorkerError | None = None
        self.pace = min(limit / 8, 0.25 + mesh.size / 100)
        self._grace = max(GRACE, 4 * self.pace)
        self._store = mesh.store
        self._run = f"dtrp/{mesh.first('the start of a run', lambda: time.time_ns())}"
        self._keys = [f"{self._run}/{rank}" for rank in range(mesh.size)] + [f"{self._run}/{FAILURE}"]
        self._ended = threading.Event()
        self._to_tell: WorkerError | None = None
        self._tell = threading.Event()  # there is something to tell, at once
        self._failed = threading.Event()
        self._lost = False  # the connection to the store is broken
        self._beats = 0
        if mesh.rank == 0:
            self._store.set(self._keys[-1], b"")
        self._store.set(self._keys[mesh.rank], self._sign().pack())
        mesh.barrier()
        self._heard = time.monotonic()
        self._signs = [Sign.unpack(data) for data in self._store.multi_get(self._keys[:-1])]
        self._watch = Watch(self._signs.__getitem__, mesh.names(), limit, scripts=True)
        self._threads = [
            threading.Thread(target=target, name=f"dtrp-{target.__name__}", daemon=True)
            for target in (self._speak, self._guard)
        ]
        for thread in self._threads:
            thread.start()

    def _sign(self) -> Sign:
        self._beats += 1
        cpu = time.process_time() - time.thread_time()
        done = self._done if self.stage is None else self._done + self.stage.meter.done
        phase = "idle" if self.stage is None else self.stage.phase
        waits = bool(self._doing) and (self._waits or phase.startswith("waiting"))
        phase = phase if self._doing and phase != "idle" else self._doing or "idle"
        return Sign(self._beats, done, cpu, waits, phase)

    # ---- the threads ---------------------------------------------------------------------------------------

    def _speak(self) -> None:
        try:
            while not self._ended.is_set():
                if self._to_tell is not None:
                    told = pickle.dumps(self._to_tell)
                    self._store.compare_set(self._keys[-1], b"", told)
                    self._to_tell = None
                self._store.set(self._keys[self.mesh.rank], self._sign().pack())
                *signs, word = self._store.multi_get(self._keys)
                self._signs[:] = map(Sign.unpack, signs)
                self._heard = time.monotonic()
                if word:
                    self._fail(pickle.loads(word))
                self._tell.wait(self.pace)
                self._tell.clear()
        except RuntimeError:
            self._lost = True

    def _guard(self) -> None:
        while not self._ended.wait(self.pace):
            if self.failure is None and time.monotonic() - self._heard > self.limit:
                self._fail(self._cut_off())
            stuck = self._watch.look() if self.failure is None else None
            if stuck is not None:
                rank, text = stuck
                self.report(WorkerError(text, stage=self.mesh.stage_of(rank)))
            if self.failure is not None:
                self.mesh.poison()
                return

    def _cut_off(self) -> WorkerError:
        """The store does not answer: nor can those be reached who are where it is."""
        mesh, silence = self.mesh, time.monotonic() - self._heard
        with_store = [r for r in range(mesh.size) if mesh.addresses[r] == mesh.addresses[0]]
        gone = [0] if not mesh.by_agent else with_store if mesh.rank not in with_store else []
        whom = ", ".join(map(mesh.name, gone)) or "the launcher"
        text = (
            f"{whom} cannot be reached for {silence:.0f} s (watchdog={self.limit:g} s): the store at "
            f"{mesh.store_address} does not answer. Its process may be stopped, its host down, or the link "
            f"cut"
        )
        return WorkerError(text, stage=mesh.stage_of(gone[0]) if gone else None)

    def _fail(self, failure: WorkerError) -> None:
        if self.failure is None:
            self.failure = failure
        self._failed.set()

    # ---- what a rank asks ----------------------------------------------------------------------------------

    def report(self, failure: WorkerError) -> WorkerError:
        """This rank's last word, or whoever's came first; heard by all, as far as they can be reached."""
        self._to_tell = failure
        self._tell.set()
        self._failed.wait(self._grace)
        self._fail(failure)
        assert self.failure is not None
        return self.failure

    def cause(self, error: BaseException) -> WorkerError:
        """Why an operation with others failed: as the first says that gave a reason, or whose end it is."""
        rank = error.peer + self.mesh.rank - self.mesh.process if isinstance(error, LostStage) else None
        # Whose connection broke says the error; in an operation of all, the silence has to.
        if not self._failed.wait(self._grace if rank is not None else self.limit + self._grace):
            if self._lost:  # what has had the store is gone, before whoever noticed that
                self._fail(self._cut_off())
                return self._cut_off()
            whom = "another rank" if rank is None else self.mesh.name(rank)
            stage = None if rank is None else self.mesh.stage_of(rank)
            text = f"{whom} is gone: its process died, or the connection broke ({_first_line(error)})"
            return self.report(WorkerError(text, stage=stage))
        assert self.failure is not None
        return self.failure

    @contextlib.contextmanager
    def at(self, doing: str, *, waits: bool = True) -> Iterator[None]:
        """While something is done with all others; ``waits``: for them, as far as the meter knows no better.

        Raises
        ------
        WorkerError
            Somebody is gone.
        """
        outer, self._doing, self._waits = (self._doing, self._waits), doing, waits
        try:
            yield
        except Exception as e:
            if e is not self.failure and (self.failure or isinstance(e, LostStage) or _is_of_links(e)):
                raise self.cause(e) from e
            raise
        finally:
            self._doing, self._waits = outer
            self._done += 1

    def close(self) -> None:
        """Stop looking and telling."""
        if self.failure is not None and self.mesh.rank == 0 and not self.mesh.by_agent:
            time.sleep(2 * self.pace)  # others hear of it before the store goes with this process
        self._ended.set()
        self._tell.set()
        for thread in self._threads:
            thread.join(2 * self.pace)


def _is_of_links(error: Exception) -> bool:
    """Whether gloo or NCCL says it of others, rather than somebody's code."""
    words = (
        "gloo", "pair closure", "Connection closed by peer", "Connection reset by peer", "Broken pipe",
        "ncclRemoteError", "ncclSystemError", "NCCL communicator was aborted",
    )  # fmt: skip
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def _first_line(error: BaseException) -> str:
    """What gloo says, without where it says it and what it thinks of that."""
    text = re.sub(r"^.*?\[\S*/gloo/\S*\] ", "", str(error).strip())
    return text.splitlines()[0].split(". ")[0] if text else type(error).__name__

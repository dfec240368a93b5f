"""How worker processes come to life: forked off a warm parent.

Loading torch takes seconds; a worker that is forked off a process that has loaded it takes milliseconds. The
warm parent is one of Python's fork servers: a fresh interpreter with nothing of the script in it, which has
one thread, opens no device and runs no script's code. It is begun early (`warm`), serves all runs of this
process, and ends with it. It tells of each worker first its number, then its exit code.

What a fresh interpreter would inherit is sent along: stdout and stderr, environment, working directory,
limits, cores. Variables that libraries read when they are loaded decide which parent will do: after a change
of these there is a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from typing import Any

AT_LOADING = (
    "BLIS", "CUDA", "GLIBC", "GOMP", "KMP", "LD_", "MALLOC", "MKL", "NUMEXPR", "NVIDIA", "OMP_", "OPENBLAS",
    "PYTHON", "PYTORCH_", "ROC", "TORCH_", "VECLIB",
)  # fmt: skip
"""What variables begin with that libraries read when they are loaded."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Said to torch by each worker, whatever it was when torch was loaded."""
PATIENCE = 30.0  # seconds that the parent may take until it begins a worker that is to be ended already
NUMBER = struct.Struct("q")  # as fork servers tell

_lock = threading.RLock()
_parent: WarmParent | None = None
_is_worker = False


class WarmParent(forkserver.ForkServer):
    """The process that workers are forked off; they live on when it ends."""

    _forkserver_pid: int | None

    def __init__(self, key: tuple[Any, ...]) -> None:
        super().__init__()
        self.key = key
        self.set_forkserver_preload(["dtrp.runtime.preload"])

    @property
    def pid(self) -> int | None:
        return self._forkserver_pid


def warm(environment: Mapping[str, str]) -> WarmParent:
    """The warm parent, begun now if there is none that fits.

    Raises
    ------
    RuntimeError
        This is a worker: without end there would be more of them.
    """
    global _parent
    if _is_worker:
        raise RuntimeError(
            "a worker process must not start workers of its own. It imported a module of the script's that "
            "trains while it is imported: put what trains under if __name__ == '__main__', or in a function"
        )
    hold_standard_descriptors()
    with _lock, _told(environment):
        key = _key(environment)
        if _parent is not None and _parent.key != key:
            _end()
        _parent = _parent or WarmParent(key)
        try:
            _parent.ensure_running()
        except ChildProcessError:  # somebody else has waited for it
            _parent = WarmParent(key)
            _parent.ensure_running()
        return _parent


def start(boot: Mapping[str, Any], descriptors: Sequence[int], environment: Mapping[str, str]) -> Process:
    """Begin a worker process: `worker.main` with ``boot``, and with these descriptors of ours.

    Raises
    ------
    OSError
        The system refuses.
    """
    fork = _Fork(
        boot,
        _texts(sys.path),
        environment,
        os.getcwd(),
        [(kind, resource.getrlimit(kind)) for kind in _limits()],
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None,
    )
    try:
        status, tells = warm(environment).connect_to_new_process([*descriptors, 1, 2])
    except ValueError as e:
        raise OSError(f"{e}: there are more stages than one host takes, use executor='torchrun'") from None
    with os.fdopen(tells, "wb") as pipe, contextlib.suppress(BrokenPipeError):
        pipe.write(pickle.dumps({}) + pickle.dumps(fork))
    return Process(status)


@atexit.register
def _end() -> None:
    """The parent ends now, even while it loads."""
    global _parent
    ended, _parent = _parent, None
    if ended is not None and ended.pid is not None and ended.key[0] == os.getpid():
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(ended.pid, signal.SIGKILL)
            ended._stop()  # type: ignore[attr-defined]  # waits, and tidies up


def _key(environment: Mapping[str, str]) -> tuple[Any, ...]:
    mine = {k: v for k, v in environment.items() if k.startswith(AT_LOADING) and k not in THREADS}
    return os.getpid(), os.getpriority(os.PRIO_PROCESS, 0), sys.executable, tuple(sorted(mine.items()))


def _limits() -> set[int]:
    return {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}


@contextmanager
def _told(environment: Mapping[str, str]) -> Iterator[None]:
    """Inside, a process that is begun has these variables, and leaves Ctrl-C to the script."""
    changed = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    before, path = {name: os.environ[name] for name in changed if name in os.environ}, sys.path.copy()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    os.environ.update(changed)
    sys.path[:] = _texts(path)
    try:
        yield
    finally:
        sys.path[:] = path
        for name in changed:
            del os.environ[name]
        os.environ.update(before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _texts(path: Iterable[Any]) -> list[str]:
    return [p for p in path if isinstance(p, str)]  # Python ignores others


class Process:
    """A worker process, asked as a `subprocess.Popen` is. ``status``: where the parent tells of it."""

    def __init__(self, status: int) -> None:
        self._status = status
        self._poll = select.poll()
        self._poll.register(status, select.POLLIN)
        self._pid: int | None = None
        self.returncode: int | None = None

    @property
    def pid(self) -> int:
        while self._pid is None and self.returncode is None:
            self._hear(1.0)
        return -1 if self._pid is None else self._pid

    def poll(self) -> int | None:
        self._hear(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (1e9 if timeout is None else timeout)
        while self.returncode is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            self._hear(min(left, 1.0))
        return self.returncode

    def kill(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.poll() is None and self._pid is None:
            self._hear(0.1)
            if time.monotonic() > deadline:
                _end()  # then it will not be begun
        if self.returncode is None and self._pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)

    def _hear(self, seconds: float) -> None:
        """Take in what the parent says, within so many seconds."""
        if self.returncode is not None or not self._poll.poll(seconds * 1e3):
            return
        data = os.read(self._status, NUMBER.size)
        number = NUMBER.unpack(data)[0] if data else -signal.SIGKILL
        if data and self._pid is None:
            self._pid = number
        elif data or self._pid is None or not _exists(self._pid):  # without the parent nobody tells of an end
            self.returncode = number
            os.close(self._status)
        else:
            time.sleep(min(seconds, 0.01))


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def hold_standard_descriptors() -> None:
    """Where stdin, stdout or stderr are closed, as in daemons, they are the null device from now on: else the
    next file or memory that anybody opens is what libraries print into."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


@dataclass(frozen=True)
class _Fork:
    """What the fork is to become."""

    boot: Mapping[str, Any]
    path: list[str]
    environment: Mapping[str, str]
    folder: str
    limits: list[tuple[int, tuple[int, int]]]
    cores: set[int] | None

    def _bootstrap(self, sentinel: int) -> None:
        """Called in the new process: as a fresh interpreter would find things; does not return."""
        global _is_worker
        _is_worker = True
        try:
            *descriptors, out, err = forkserver.get_inherited_fds() or []
            os.dup2(out, 1)
            os.dup2(err, 2)
            for descriptor in (out, err, sentinel):
                os.close(descriptor)
            for descriptor in descriptors:
                os.set_inheritable(descriptor, False)
            os.setsid()  # Ctrl-C is the script's to handle
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            os.environ.clear()
            os.environ.update(self.environment)
            with contextlib.suppress(OSError):
                os.chdir(self.folder)
            for kind, limits in self.limits:
                with contextlib.suppress(OSError, ValueError):
                    resource.setrlimit(kind, limits)
            if self.cores is not None:
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(0, self.cores)
            sys.path[:] = self.path
            importlib.invalidate_caches()
            from .worker import main

            main(descriptors=descriptors, **self.boot)
        finally:
            os._exit(1)

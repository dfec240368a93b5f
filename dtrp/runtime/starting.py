"""How worker processes come to life: forked off a warm parent, or as fresh interpreters.

Loading torch takes seconds; a worker that is forked off a process that has loaded it takes milliseconds. The
warm parent is a fresh interpreter itself: nothing of the script is in it, it has one thread, opens no device
and runs no script's code. It is started early (`warm`), serves all runs of this process, and ends with it.

    script                              warm parent                        worker
      "fork": boot, settings, descriptors  ─►  fork  ───────────────►  settings, descriptors in their places,
      "pid"  ◄────────────────────────────                              then as a fresh interpreter (voice.py)
      "ended" ◄───────────────────────────  waitpid

What a fresh interpreter would inherit is sent along: descriptors (stdout and stderr included), environment,
working directory, limits, cores. Variables that libraries read when they are loaded decide which parent will
do: after a change of these there is a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from .voice import LENGTH

AT_LOADING = (
    "BLIS", "CUDA", "GLIBC", "GOMP", "KMP", "LD_", "MALLOC", "MKL", "NUMEXPR", "NVIDIA", "OMP_", "OPENBLAS",
    "PYTHON", "PYTORCH_", "ROC", "TORCH_", "VECLIB",
)  # fmt: skip
"""What variables begin with that libraries read when they are loaded."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Said to torch by each worker, whatever it was when torch was loaded."""
PATIENCE = 30.0  # seconds that the parent may take until it begins a worker that is to be ended already
MOST_DESCRIPTORS = 250  # that travel with one message
STAGE = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])["path"]
from dtrp.runtime.voice import main
main(sys.argv[1])
"""
PARENT = """\
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from dtrp.runtime.starting import main
main(int(sys.argv[2]))
"""


class Process(Protocol):
    """What is asked of a worker's process; a `subprocess.Popen` will do."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def kill(self) -> None: ...


def start(boot: Mapping[str, Any], descriptors: Sequence[int], environment: Mapping[str, str]) -> Process:
    """Begin a worker process, which has these descriptors under the same numbers.

    Raises
    ------
    OSError
        The system refuses.
    """
    parent = warm(environment)
    if parent is not None and len(descriptors) + 2 <= MOST_DESCRIPTORS:
        with contextlib.suppress(OSError):  # it has died: do without
            return parent.fork(boot, descriptors, environment)
    return _interpreter(STAGE, [json.dumps(boot)], descriptors, environment)


def warm(environment: Mapping[str, str]) -> WarmParent | None:
    """The warm parent, begun now if there is none that fits; ``None`` where processes cannot be forked so."""
    global _parent
    hold_standard_descriptors()
    if sys.platform != "linux" or not sys.executable:
        return None
    with _lock:
        key = _key(environment)
        if _parent is not None and (_parent.key != key or _parent.ended):
            _parent.end()
            _parent = None
        if _parent is None:
            with contextlib.suppress(OSError):
                _parent = WarmParent(key, environment)
        return _parent


def _key(environment: Mapping[str, str]) -> tuple[Any, ...]:
    mine = {k: v for k, v in environment.items() if k.startswith(AT_LOADING) and k not in THREADS}
    return os.getpid(), os.getpriority(os.PRIO_PROCESS, 0), sys.executable, tuple(sorted(mine.items()))


_lock = threading.RLock()


class WarmParent:
    """The script's side of a warm parent."""

    def __init__(self, key: tuple[Any, ...], environment: Mapping[str, str]) -> None:
        self.key, self.ended = key, False
        self.asked: deque[Forked] = deque()  # in this order the parent will answer
        self.children: dict[int, Forked] = {}
        ours, theirs = socket.socketpair()
        with theirs:
            told = [json.dumps(_path()), str(theirs.fileno())]
            self.process = _interpreter(PARENT, told, [theirs.fileno()], environment)
        self.socket = ours
        self.read = bytearray()

    def fork(
        self, boot: Mapping[str, Any], descriptors: Sequence[int], environment: Mapping[str, str]
    ) -> Forked:
        """Ask for a worker process; does not wait for it."""
        descriptors = [*descriptors, 1, 2]
        asked = {
            "boot": boot,
            "descriptors": descriptors,
            "environment": dict(environment),
            "folder": os.getcwd(),
            "limits": [(kind, resource.getrlimit(kind)) for kind in _limits()],
            "cores": sorted(os.sched_getaffinity(0)),
        }
        data = json.dumps(asked).encode()
        with _lock:
            socket.send_fds(self.socket, [LENGTH.pack(len(data))], descriptors)
            self.socket.sendall(data)
            child = Forked(self)
            self.asked.append(child)
        return child

    def listen(self, seconds: float) -> None:
        """Take in what the parent says, within so many seconds."""
        with _lock:
            if self.ended:
                return
            if select.select([self.socket], [], [], seconds)[0]:
                try:
                    data = self.socket.recv(1 << 16)
                except ConnectionResetError:  # it has not read what it was told last
                    data = b""
                self.read += data
                *lines, rest = bytes(self.read).split(b"\n")
                self.read[:] = rest
                for line in lines:
                    self._hear(*json.loads(line))
                if not data:
                    self._lost()

    def _hear(self, kind: str, pid: int, code: int) -> None:
        if kind == "pid":
            self.children[pid] = self.asked.popleft()
            self.children[pid].known = pid
        else:
            self.children.pop(pid).returncode = code

    def _lost(self) -> None:
        """The parent has ended: what was asked for will not come, and of the others nobody tells."""
        self.ended = True
        self.socket.close()
        self.process.kill()
        self.process.wait()
        for child in self.asked:
            child.returncode = -signal.SIGKILL
        self.asked.clear()

    def end(self) -> None:
        """End the parent; workers that it has begun live on."""
        with _lock:
            if not self.ended and self.key[0] == os.getpid():
                self.process.kill()
                while not self.ended:
                    self.listen(1.0)


class Forked:
    """A worker process that the warm parent has begun, or will begin."""

    def __init__(self, parent: WarmParent) -> None:
        self.parent = parent
        self.known: int | None = None
        self.returncode: int | None = None

    @property
    def pid(self) -> int:
        while self.known is None and self.returncode is None:
            self.parent.listen(1.0)
        return -1 if self.known is None else self.known

    def poll(self) -> int | None:
        self.parent.listen(0.0)
        if self.returncode is None and self.parent.ended and not os.path.exists(f"/proc/{self.known}"):
            self.returncode = -signal.SIGKILL  # so it is told of what nobody has seen end
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (timeout if timeout is not None else 1e9)
        while (code := self.poll()) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
            if self.parent.ended:
                time.sleep(0.01)
            self.parent.listen(min(left, 0.1))
        return code

    def kill(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while self.poll() is None and self.known is None and time.monotonic() < deadline:
            self.parent.listen(0.1)
        if self.returncode is None and self.known is None:
            self.parent.end()  # then it will not begin
        if self.known is not None and self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.known, signal.SIGKILL)


_parent: WarmParent | None = None


@atexit.register
def _end() -> None:
    if _parent is not None:
        _parent.end()


def _limits() -> set[int]:
    return {getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}


def _path() -> list[str]:
    return [p for p in sys.path if isinstance(p, str)]  # Python ignores others


def _interpreter(
    code: str, arguments: Sequence[str], descriptors: Sequence[int], environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # -O, -X dev, ...
    return subprocess.Popen(
        [sys.executable, *flags, "-c", code, *arguments],
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # Ctrl-C is the script's to handle
    )


def hold_standard_descriptors() -> None:
    """Where stdin, stdout or stderr are closed, as in daemons, they are the null device from now on: else the
    next file or memory that anybody opens is what libraries print into."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


# ---- in the warm parent ------------------------------------------------------------------------------------


def main(descriptor: int) -> None:
    """The warm parent: loads what workers need, then forks them."""
    commands = socket.socket(fileno=descriptor)
    os.set_inheritable(descriptor, False)
    _load()
    ends, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakes)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ready, _, _ = select.select([descriptor, ends], [], [])
        if ends in ready:
            os.read(ends, 1 << 10)
            _tell_ends(commands)
        if descriptor in ready:
            asked = _take(commands)
            if asked is None:
                os._exit(0)  # the script is gone
            told, received = asked
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _become_worker(told, received, [descriptor, ends, wakes])
            for held in received:
                os.close(held)
            _say(commands, "pid", pid, 0)


def _load() -> None:
    """What every worker imports sooner or later; making the first optimizer brings much along."""
    import torch

    importlib.import_module("dtrp.runtime.worker")
    torch.optim.SGD([torch.zeros(1)], lr=1.0)
    gc.collect()
    gc.freeze()  # what is shared stays so


def _take(commands: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    header, received, _, _ = socket.recv_fds(commands, LENGTH.size, MOST_DESCRIPTORS)
    data = bytearray()
    if header:
        (length,) = LENGTH.unpack(header)
        while len(data) < length and (more := commands.recv(length - len(data))):
            data += more
    return (json.loads(data), list(received)) if data else None


def _tell_ends(commands: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _say(commands, "ended", ended[0], os.waitstatus_to_exitcode(ended[1]))


def _say(commands: socket.socket, *message: Any) -> None:
    with contextlib.suppress(OSError):
        commands.sendall(json.dumps(message).encode() + b"\n")


def _become_worker(told: Mapping[str, Any], received: Sequence[int], mine: Sequence[int]) -> None:
    """In the new process: as a fresh interpreter would find things; does not return."""
    try:
        for descriptor in mine:
            os.close(descriptor)
        _put(received, told["descriptors"])
        os.setsid()
        os.environ.clear()
        os.environ.update(told["environment"])
        with contextlib.suppress(OSError):
            os.chdir(told["folder"])
        for kind, limits in told["limits"]:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(kind, limits)
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, told["cores"])
        sys.path[:] = told["boot"]["path"]
        importlib.invalidate_caches()
        from .voice import main

        main(json.dumps(told["boot"]))
    finally:
        os._exit(1)


def _put(received: Sequence[int], numbers: Sequence[int]) -> None:
    """Descriptors get the numbers that they have in the script."""
    above = max(*received, *numbers) + 1
    aside: list[int] = []
    for descriptor in received:
        os.set_inheritable(descriptor, False)
        aside.append(os.dup2(descriptor, above + len(aside), inheritable=False))
        os.close(descriptor)
    for descriptor, number in zip(aside, numbers, strict=True):
        os.dup2(descriptor, number, inheritable=True)
        os.close(descriptor)

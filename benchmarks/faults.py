"""Injects faults into running trainers at random ticks: how soon is it told, and what is left.

    python benchmarks/faults.py --count 200 [--kinds kill,stop] [--markdown docs/faults.md]

Each fault hits a pipeline of two worker processes at a random tick between 1 and 40. Measured: seconds from
the fault to the error in the caller (for a killed caller: to the end of the last worker), and what is still
there afterwards: processes, threads, descriptors, shared-memory segments, temporary folders.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import multiprocessing.util
import os
import platform
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests say how to look inside a trainer

from tests.runtime.inside import processes

WATCHDOG = 2.0
MOST_TICKS = 40


class Outcome(NamedTuple):
    """One injection."""

    kind: str
    tick: int
    seconds: float
    left: list[str]
    expected: bool


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(4)], nn.Linear(16, 3))


def batch(size: int = 8, width: int = 16) -> tuple[Tensor, Tensor]:
    return torch.randn(size, width), torch.zeros(size, dtype=torch.long)


class NoWayBack(torch.autograd.Function):
    """Fails on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise ArithmeticError("no way back")


def loss_fn(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy; the size of the batch says which fault to play."""
    loss = F.cross_entropy(output, target)
    match len(target):
        case 3:
            raise ArithmeticError("a loss that fails")
        case 4:
            return NoWayBack.apply(loss)  # type: ignore[no-any-return]
        case 5:
            return loss * float("nan")
        case 6:
            resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
            return loss + torch.ones(2**34).sum()
    return loss


class FailingSGD(torch.optim.SGD):
    """Fails at a given update."""

    def __init__(self, params: Any, fail_at: int) -> None:
        super().__init__(params, lr=0.01, momentum=0.9)
        self.left = fail_at

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.left -= 1
        if self.left == 0:
            raise ArithmeticError("an update that fails")
        super().step()


SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def start(**knobs: Any) -> tuple[nn.Module, Any]:
    model = make_model()
    pipe = dtrp.compile(model, n_gpus=2, example_inputs=batch()[0])
    made = pipe.trainer(
        loss_fn,
        knobs.pop("optimizer", SGD),
        executor="workers",
        seed=0,
        watchdog=WATCHDOG,
        threads=1,
        **knobs,
    )
    return model, made


# --- The faults: each gives (seconds until it was told, whether it was told as expected) ----


def told(trainer: Any, fault: Callable[[], Any], text: str) -> tuple[float, bool]:
    """Play the fault and train on until it is noticed."""
    begun = time.perf_counter()
    try:
        fault()
        while time.perf_counter() - begun < 60:
            trainer.step(*batch())
    except dtrp.WorkerError as e:
        return time.perf_counter() - begun, text in str(e)
    return time.perf_counter() - begun, False


def in_a_stage(fault: Callable[[Any], Any], text: str, tick: int, **knobs: Any) -> tuple[float, bool]:
    _, trainer = start(**knobs)
    with trainer:
        for _ in range(tick):
            trainer.step(*batch())
        seconds, expected = told(trainer, lambda: fault(trainer), text)
    return seconds, expected


def send_signal(trainer: Any, number: int) -> None:
    os.kill(random.choice(processes(trainer)), number)


def feed(trainer: Any, *shape: int) -> None:
    trainer.step(*batch(*shape))


def loader_fails(tick: int) -> tuple[float, bool]:
    def loader() -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(tick):
            yield batch()
        raise FileNotFoundError("a picture")

    _, trainer = start()
    with trainer:
        begun = time.perf_counter()
        expected = False
        try:
            trainer.fit(loader(), 1)
        except FileNotFoundError:
            begun = time.perf_counter()
            trainer.step(*batch())
            trainer.flush()
            expected = len(trainer.losses) == tick + 1
        seconds = time.perf_counter() - begun
    return seconds, expected


def skipped(tick: int) -> tuple[float, bool]:
    _, trainer = start(on_nonfinite="skip")
    with trainer:
        for _ in range(tick):
            trainer.step(*batch())
        begun = time.perf_counter()
        trainer.step(*batch(5))
        trainer.flush()
        seconds = time.perf_counter() - begun
        expected = trainer.skipped == 1 and len(trainer.losses) == tick + 1
    return seconds, expected


SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path[:0] = {path!r}
from faults import batch, processes, start
model, trainer = start()
try:
    with trainer:
        for _ in range({tick}):
            trainer.step(*batch())
        print(*processes(trainer), flush=True)
        while True:
            trainer.step(*batch())
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def caller(number: int, tick: int) -> tuple[float, bool]:
    """A signal to the process that trains: SIGKILL, or SIGINT as Ctrl-C sends it."""
    here = Path(__file__).resolve().parent
    text = SCRIPT.format(path=[str(here), str(here.parent)], tick=tick)
    with subprocess.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        workers = [int(p) for p in process.stdout.readline().split()]
        begun = time.perf_counter()
        process.send_signal(number)
        said = process.stdout.readline()
        process.wait()
        while any(running(p) for p in workers) and time.perf_counter() - begun < 60:
            time.sleep(0.01)
    seconds = time.perf_counter() - begun
    if number == signal.SIGINT:
        return seconds, said == "interrupted\n"
    return seconds, not any(running(p) for p in workers)


def running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


KINDS: dict[str, tuple[str, Callable[[int], tuple[float, bool]]]] = {
    "kill": (
        "worker killed (SIGKILL)",
        partial(in_a_stage, lambda t: send_signal(t, signal.SIGKILL), "killed by SIGKILL"),
    ),
    "stop": (
        f"worker stopped (SIGSTOP), watchdog {WATCHDOG:g} s",
        partial(in_a_stage, lambda t: send_signal(t, signal.SIGSTOP), "has shown no sign of life for"),
    ),
    "memory": ("worker out of memory (RLIMIT_AS)", partial(in_a_stage, lambda t: feed(t, 6), "memory")),
    "forward": (
        "exception in forward (a shape that does not fit)",
        partial(in_a_stage, lambda t: feed(t, 8, 17), "shapes cannot be multiplied"),
    ),
    "backward": ("exception in backward", partial(in_a_stage, lambda t: feed(t, 4), "no way back")),
    "loss": ("exception in the loss", partial(in_a_stage, lambda t: feed(t, 3), "a loss that fails")),
    "optimizer": (
        "exception in the optimizer",
        lambda tick: in_a_stage(
            lambda t: None, "an update that fails", 1, optimizer=partial(FailingSGD, fail_at=tick + 1)
        ),
    ),
    "nan": ("NaN loss, on_nonfinite='raise'", partial(in_a_stage, lambda t: feed(t, 5), "is nan")),
    "skip": ("NaN loss, on_nonfinite='skip'", skipped),
    "loader": ("exception in the user's loader", loader_fails),
    "orphan": ("caller killed (SIGKILL)", partial(caller, signal.SIGKILL)),
    "interrupt": (
        "Ctrl-C (SIGINT to the caller), to the end of its interpreter",
        partial(caller, signal.SIGINT),
    ),
}


SEGMENTS = Path("/dev/shm")


def held() -> set[str]:
    """What this process and its descendants hold, by name."""
    gc.collect()
    me = psutil.Process()
    return {
        *(f"process {p.pid}" for p in me.children(recursive=True)),
        *(f"thread {t.name}" for t in threading.enumerate()),
        *(f"descriptor {n}" for n in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{n}")),
        *(f"segment {p.name}" for p in SEGMENTS.glob("*")),
        *(f"folder {p.name}" for p in Path(tempfile.gettempdir()).iterdir()),
    }


def own_segments() -> bool:
    """Give this process and its children a /dev/shm of their own, where nobody else's segments lie.

    Linux allows it to root. Elsewhere the segments of other programs that come up meanwhile are counted, too.
    """
    if not SEGMENTS.exists():
        return True
    new_mounts = 0x00020000  # CLONE_NEWNS of sched.h
    commands = [["mount", "--make-rprivate", "/"], ["mount", "-t", "tmpfs", "tmpfs", str(SEGMENTS)]]
    return ctypes.CDLL(None).unshare(new_mounts) == 0 and all(
        subprocess.run(c, stderr=subprocess.DEVNULL).returncode == 0 for c in commands
    )


def inject(kind: str, tick: int) -> Outcome:
    before = held()
    seconds, expected = KINDS[kind][1](tick)
    return Outcome(kind, tick, seconds, sorted(held() - before), expected)


def table(outcomes: list[Outcome]) -> str:
    rows = [
        "| fault | injected | told as expected | seconds, median | seconds, worst | left behind |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for kind, (title, _) in KINDS.items():
        mine = [o for o in outcomes if o.kind == kind]
        if mine:
            times = [o.seconds for o in mine]
            rows.append(
                f"| {title} | {len(mine)} | {sum(o.expected for o in mine)} | {statistics.median(times):.2f} "
                f"| {max(times):.2f} | {sum(len(o.left) for o in mine)} |"
            )
    told_ones = sum(o.expected for o in outcomes)
    rows.append(f"| all | {len(outcomes)} | {told_ones} | | | {sum(len(o.left) for o in outcomes)} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="write the table there")
    args = parser.parse_args()
    if not own_segments():
        print("no /dev/shm of its own: segments of other programs are counted, too")
    random.seed(args.seed)
    torch.set_num_threads(1)
    folder = tempfile.tempdir = os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="faults-")
    # After multiprocessing has removed its own, which is in it.
    multiprocessing.util.Finalize(None, shutil.rmtree, args=[folder], exitpriority=-200)
    kinds = args.kinds.split(",")
    inject("loader", 1)  # what is loaded once and stays is not a leak, such as the thread of tqdm
    outcomes = []
    for i in range(args.count):
        outcome = inject(kinds[i % len(kinds)], random.randint(1, MOST_TICKS))
        outcomes.append(outcome)
        note = "" if outcome.expected else "  NOT AS EXPECTED"
        took = f"{outcome.seconds:6.2f} s  left {len(outcome.left)} {', '.join(outcome.left)}{note}"
        print(f"{i + 1:4d}  {outcome.kind:<10} tick {outcome.tick:2d}  {took}", flush=True)
    made = table(outcomes)
    print("\n" + made)
    if args.markdown:
        hardware = f"{os.cpu_count()} CPU cores ({platform.machine()}), torch {torch.__version__}"
        args.markdown.write_text(
            f"{made}\n\n`python {' '.join(sys.argv)}` on {hardware}, other work going on beside it.\n",
            encoding="utf-8",
        )
    return 0 if all(o.expected and not o.left for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

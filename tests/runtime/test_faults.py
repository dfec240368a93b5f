"""Faults of worker processes: an error that says which stage, within seconds, and nothing left behind."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dtrp
from dtrp.runtime.processes import workers_environment
from dtrp.runtime.starting import warm

from .inside import processes
from .toys import batches, compiled, mlp, same, trainer

SOON = 30.0  # seconds; generous, for a busy machine


def ours() -> tuple[set[int], set[str], int, set[str]]:
    """What this process holds: children, dtrp's threads, descriptors, temporary folders."""
    gc.collect()
    warm(workers_environment(1))  # one, which stays
    children = {p.pid for p in psutil.Process().children(recursive=True)}
    threads = {t.name for t in threading.enumerate() if t.name.startswith("dtrp")}
    folders = {p.name for p in Path(tempfile.gettempdir()).glob("dtrp-*") if _is_mine(p)}
    return children, threads, psutil.Process().num_fds(), folders


def _is_mine(path: Path) -> bool:
    return path.exists() and path.stat().st_mtime > psutil.Process().create_time()


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Nothing of what a test starts is there after it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = ours()
    yield
    assert ours() == before


def workers(**knobs: Any) -> Any:
    return trainer(compiled(mlp(3)), "workers", **knobs)


def feed_until_it_fails(t: Any, n: int = 400) -> None:
    for x, y in batches(n):
        t.step(x, y)
    t.flush()


def picky(output: Tensor, target: Tensor) -> Tensor:
    if len(target) == 3:
        raise ArithmeticError("three is a bad number")
    return F.cross_entropy(output, target)


def test_an_exception_and_then_another_run(nothing_left: None) -> None:
    model = mlp(3)
    pipe = compiled(model)
    start = model.state_dict()[next(iter(model.state_dict()))].clone()
    with trainer(pipe, "workers", picky) as t:
        t.step(*batches(1)[0])
        with pytest.raises(
            dtrp.WorkerError, match="stage 1 failed: ArithmeticError: three is a bad number"
        ) as caught:
            feed_until_it_fails_at_three(t)
        assert caught.value.stage == 1
        assert "in picky" in caught.value.remote_traceback
        with pytest.raises(dtrp.WorkerError, match="has failed before and cannot go on"):
            t.step(*batches(1)[0])
    with trainer(pipe, "workers", picky) as t:
        for x, y in batches(3):
            t.step(x, y)
        t.flush()
        assert len(t.losses) == 3
        t.close()
        t.close()
    assert not torch.equal(start, next(iter(model.state_dict().values())))


def feed_until_it_fails_at_three(t: Any) -> None:
    t.step(*batches(1, size=3)[0])
    feed_until_it_fails(t)


def test_killed(nothing_left: None) -> None:
    with workers() as t:
        t.step(*batches(1)[0])
        os.kill(processes(t)[0], signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(dtrp.WorkerError, match="stage 0's process died: killed by SIGKILL;") as caught:
            feed_until_it_fails(t)
        assert caught.value.stage == 0
        assert time.monotonic() - start < SOON


def test_stopped(nothing_left: None) -> None:
    """Not even a batch larger than any buffer, half written to the stopped worker, holds anything up."""
    with workers(watchdog=1.5) as t:
        t.step(*batches(1)[0])
        t.flush()
        os.kill(processes(t)[0], signal.SIGSTOP)
        with pytest.raises(
            dtrp.WorkerError,
            match=r"stage 0 has shown no sign of life for \d+ s \(watchdog=1.5 s\); last heard of it: ",
        ):
            feed_large(t)


def feed_large(t: Any) -> None:
    for _ in range(20):
        t.step(torch.randn(40_000, 8), torch.zeros(40_000, dtype=torch.long))
    t.flush()


def slow(output: Tensor, target: Tensor) -> Tensor:
    time.sleep(2.5)
    return F.cross_entropy(output, target)


def test_a_long_tick_is_no_silence(nothing_left: None) -> None:
    with workers(loss_fn=slow, watchdog=1.0) as t:
        t.step(*batches(1)[0])
        time.sleep(2.0)  # nor is a caller that was busy elsewhere a reason to complain
        t.flush()
        assert len(t.losses) == 1


def greedy(output: Tensor, target: Tensor) -> Tensor:
    if len(target) == 3:
        resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
        return output.sum() * torch.ones(2**33).sum()
    return F.cross_entropy(output, target)


def test_out_of_memory(nothing_left: None) -> None:
    with (
        workers(loss_fn=greedy) as t,
        pytest.raises(dtrp.WorkerError, match=r"stage 1 failed: RuntimeError: .*(allocate|memory)"),
    ):
        feed_until_it_fails_at_three(t)


def test_a_trainer_that_was_dropped(nothing_left: None) -> None:
    t = workers()
    t.step(*batches(1)[0])
    assert all(psutil.pid_exists(p) for p in processes(t))
    del t


@contextmanager
def script(text: str, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A user's script, in a session of its own, without a __main__ guard; ended at the end, come what may."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-u", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(root), "TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def gone(process_ids: list[int]) -> bool:
    def runs(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    deadline = time.monotonic() + SOON
    while any(runs(p) for p in process_ids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


FOREVER = """
    from tests.runtime.inside import entered, processes
    from tests.runtime.toys import batches, compiled, mlp, trainer
    import torch
    model = mlp(3)
    with trainer(compiled(model), "workers") as t:
        t.step(*batches(1)[0])
        print(*processes(t))
        while True:
            for x, y in batches(50):
                t.step(x, y)
    """


def test_the_caller_was_killed(tmp_path: Path) -> None:
    with script(FOREVER, tmp_path) as process:
        assert process.stdout is not None
        started = [int(p) for p in process.stdout.readline().split()]
        assert len(started) == 2
        time.sleep(0.5)
        process.kill()
        process.wait()
        assert gone(started)
        assert not list(tmp_path.glob("dtrp-*"))


INTERRUPTED = """
    import signal, sys
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    from tests.runtime.inside import entered, processes
    from tests.runtime.toys import batches, compiled, mlp, trainer
    import torch
    model = mlp(3)
    try:
        with trainer(compiled(model), "workers") as t:
            t.step(*batches(1)[0])
            print(*processes(t))
            while True:
                t.step(*batches(1)[0])
    except KeyboardInterrupt:
        seen = {"model": model.state_dict(), "batches": entered(t), "losses": t.losses}
        torch.save(seen, sys.argv[0] + ".pt")
        print("interrupted")
    """


# torch remembers sparse tensors that other tests unpickled, and tells so whoever loads next.
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_ctrl_c(tmp_path: Path) -> None:
    """Workers end; the model has the weights after the last tick that was begun, as an inline run shows."""
    with script(INTERRUPTED, tmp_path) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        started = [int(p) for p in process.stdout.readline().split()]
        time.sleep(0.7)
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "interrupted\n", process.stderr.read()
        assert process.wait(SOON) == 0
        assert gone(started)
        assert not list(tmp_path.glob("dtrp-*"))
    seen = torch.load(tmp_path / "script.py.pt", weights_only=True)
    model = mlp(3)
    with pytest.raises(KeyboardInterrupt), trainer(compiled(model), "inline") as t:
        feed_and_interrupt(t, seen["batches"])
    assert same(model.state_dict(), seen["model"])
    assert t.losses[: len(seen["losses"])] == seen["losses"]


def feed_and_interrupt(t: Any, n: int) -> None:
    for _ in range(n):
        t.step(*batches(1)[0])
    raise KeyboardInterrupt


# --- Ctrl-C at safe points ------------------------------------------------------------------------------


def test_an_interrupt_in_the_middle_of_a_tick_waits_for_its_end() -> None:
    def interrupting(output: Tensor, target: Tensor) -> Tensor:
        if len(target) == 3:
            signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(output, target)

    models = []
    for stop in (True, False):
        models.append(model := mlp(3))
        with trainer(compiled(model), "inline", interrupting if stop else F.cross_entropy) as t:
            if stop:
                with pytest.raises(KeyboardInterrupt):
                    feed_until_it_fails_at_three(t)
            else:
                t.step(*batches(1, size=3)[0])
                t.step(*batches(1)[0])
            # The tick was whole: the run can go on.
            for x, y in batches(5):
                t.step(x, y)
    assert same(models[0].state_dict(), models[1].state_dict())


def test_a_second_interrupt_does_not_wait() -> None:
    def interrupting(output: Tensor, target: Tensor) -> Tensor:
        if len(target) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not reached")
        return F.cross_entropy(output, target)

    with trainer(compiled(mlp(3)), "inline", interrupting) as t:
        t.step(*batches(1)[0])
        with pytest.raises(KeyboardInterrupt):
            feed_until_it_fails_at_three(t)
        with pytest.raises(dtrp.WorkerError, match="KeyboardInterrupt in the middle of a tick"):
            t.step(*batches(1)[0])

"""The warm parent that workers are forked off: one for all runs, as the script is now, and dispensable."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

import dtrp
from dtrp.runtime import starting
from dtrp.runtime.processes import workers_environment

from .inside import processes
from .toys import batches, compiled, mlp, trainer


def parent() -> int:
    """The number of its process."""
    pid = starting.warm(workers_environment(1)).pid
    assert pid is not None
    return pid


def test_workers_are_as_the_script_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables, working directory and session, although the parent was begun with others; one parent serves
    all runs."""
    first = parent()

    def metric(output: Tensor, target: Tensor) -> float:
        told = os.environ.get("DTRP_TEST_TOLD") == "now" and os.getcwd() == str(tmp_path)
        return float(told and os.getsid(0) == os.getpid() and torch.get_num_threads() == 2)

    monkeypatch.setenv("DTRP_TEST_TOLD", "now")
    monkeypatch.chdir(tmp_path)
    with trainer(compiled(mlp(2)), "workers", threads=2) as t:
        assert t.evaluate(batches(1), metric=metric)["metric"] == 1.0
        assert all(psutil.Process(pid).ppid() == first for pid in processes(t))
    assert parent() == first


def test_the_script_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the parent is begun with is not the script's afterwards; nor does Python's own way with a path
    that is no text end the parent."""
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere")])
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    before = dict(os.environ), list(sys.path), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with trainer(compiled(mlp(2)), "workers") as t:
        t.step(*batches(1)[0])
    assert (dict(os.environ), sys.path, signal.pthread_sigmask(signal.SIG_BLOCK, [])) == before


def test_variables_that_libraries_read_at_loading_want_a_new_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody reads them again in a fork."""
    gc.collect()  # of earlier tests
    first, descriptors = parent(), psutil.Process().num_fds()
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    assert parent() != first
    assert not psutil.pid_exists(first)
    assert psutil.Process().num_fds() <= descriptors


@pytest.mark.slow
def test_without_its_parent_a_run_goes_on() -> None:
    """The parent may be killed at any time: workers live on and are ended as ever, the next run has a new
    one."""
    first = parent()
    with trainer(compiled(mlp(2)), "workers") as t:
        t.step(*batches(1)[0])
        pids = processes(t)
        os.kill(first, signal.SIGKILL)
        t.fit(batches(4), 1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    with trainer(compiled(mlp(2)), "workers") as t:
        t.fit(batches(2), 1)


SCRIPT = """
import os, signal, tempfile
from dtrp.runtime.processes import workers_environment
from dtrp.runtime.starting import warm
print(warm(workers_environment(1)).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_of_a_killed_script_nothing_is_left(tmp_path: Path) -> None:
    """Neither the parent nor the folder in which it listens."""
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(dtrp.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, env=environment, check=False)
    psutil.wait_procs([p for p in psutil.process_iter() if p.pid == int(done.stdout)], timeout=60)
    assert not psutil.pid_exists(int(done.stdout))
    assert list(tmp_path.iterdir()) == []


UNGUARDED = """
import dtrp, torch
from functools import partial

def distance(output, target):
    return (output - target).pow(2).mean()

x = torch.randn(4, 2)
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
pipe = dtrp.compile(model, 2, example_inputs=x)
with pipe.trainer(distance, partial(torch.optim.SGD, lr=0.1), executor="workers") as trainer:
    trainer.step(x, x)
"""


def test_a_module_that_trains_while_it_is_imported_starts_no_workers_in_workers(tmp_path: Path) -> None:
    """Else each worker, which imports it for the loss, has workers, without end."""
    (tmp_path / "mine.py").write_text(UNGUARDED)
    path = os.pathsep.join([str(Path(dtrp.__file__).parents[1]), str(tmp_path)])
    command, environment = [sys.executable, "-c", "import mine"], {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1
    assert "WorkerError" in done.stderr
    assert "if __name__ == '__main__'" in done.stderr


def test_how_a_forked_worker_ended_is_known() -> None:
    """Exit code or signal, which the parent tells."""

    caller = os.getpid()

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        if os.getpid() != caller:
            os._exit(3)
        return output.sum()

    with (
        trainer(compiled(mlp(2)), "workers", loss_fn=loss_fn) as t,
        pytest.raises(dtrp.WorkerError, match="exit code 3"),
    ):
        t.fit(batches(4), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the devices are there")
def test_devices_that_are_not_here_are_told_when_planning() -> None:
    """Not when compile begins a parent for workers."""
    pipe = dtrp.compile(mlp(2), devices=["cuda:0", "cuda:1"])
    with pytest.raises(ValueError, match="device 'cuda:0' is not available here"):
        pipe(torch.randn(4, 8))

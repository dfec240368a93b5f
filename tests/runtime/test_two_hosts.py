"""Two network namespaces, joined by a veth pair, as two hosts with two ranks each (root and iproute2)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .ranks import ended, started, written

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root, and ip"),
]

ADDRESSES = ("10.77.0.1", "10.77.0.2")
WATCHDOG = 10.0

SCRIPT = f"""
    class Pace:
        def on_step(self, t, loss):
            time.sleep(0.02)
            if t._history.fed == 60:
                print("GOES", flush=True)

    def fitted(executor, resume=None, callbacks=()):
        model, data = mlp(8), batches(40)
        plan = "plan.json" if os.path.exists("plan.json") else None
        pipe = dtrp.compile(model, n_gpus=4, example_inputs=data[0][0], plan=plan)
        with trainer(pipe, executor, watchdog={WATCHDOG}) as t:
            if rank == 0 and plan is None:
                pipe.plan.save("plan.json")  # which counts, also after the restart
            t.fit(data, 3, resume=resume, callbacks=list(callbacks))
        return model.state_dict()

    try:
        there = fitted("auto", "run/", [Pace()])
    except dtrp.WorkerError as e:
        with open(f"told.{{rank}}", "w") as file:
            file.write(f"{{time.monotonic()}} {{str(e).splitlines()[0]}}")
        sys.exit(1)
    assert same(there, fitted("inline"))
    print("SAME", flush=True)
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """The namespaces' names."""
    names = tuple(f"dtrp{os.getpid()}{letter}" for letter in "ab")
    ends = tuple(f"v{os.getpid()}{letter}" for letter in "ab")
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", ends[0], "netns", names[0], "type", "veth", "peer", ends[1], "netns", names[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def launch(host: str, address: str, folder: Path) -> subprocess.Popen[str]:
    """torchrun on one of the two hosts."""
    options = ["--nnodes=2", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-id=test"]
    options += [f"--rdzv-endpoint={ADDRESSES[0]}:29500", f"--local-addr={address}"]
    options.append(f"--rdzv-conf=is_host={int(address == ADDRESSES[0])}")  # neither host has a name
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(folder / "script.py")]
    return started(["ip", "netns", "exec", host, *command], folder, {})


def test_a_link_that_is_cut_is_told_and_a_restart_goes_on(hosts: tuple[str, str], tmp_path: Path) -> None:
    """The oracle is the inline run, to the bit, after training over the link, a cut in the second epoch (all
    four ranks must name somebody beyond it, in time), and a restart that goes on from the first one's end."""
    written(tmp_path, SCRIPT)
    runs = [launch(host, address, tmp_path) for host, address in zip(hosts, ADDRESSES, strict=True)]
    assert runs[0].stdout is not None
    for line in runs[0].stdout:
        if "GOES" in line:
            break
    else:
        raise AssertionError([ended(process, 10.0) for process in runs])
    cut = time.monotonic()
    ip("-n", hosts[0], "link", "set", f"v{os.getpid()}a", "down")
    while len(list(tmp_path.glob("told.*"))) < 4 and time.monotonic() < cut + WATCHDOG + 30.0:
        time.sleep(0.1)
    time.sleep(0.5)
    ip("-n", hosts[0], "link", "set", f"v{os.getpid()}a", "up")  # else the launchers wait for each other
    said = [ended(process, 200.0)[1] for process in runs]
    told = {}
    for file in tmp_path.glob("told.*"):
        moment, _, text = file.read_text().partition(" ")
        told[int(file.suffix[1:])] = float(moment) - cut, text
    assert sorted(told) == [0, 1, 2, 3], said
    for rank, (seconds, text) in told.items():
        beyond = (2, 3) if rank < 2 else (0, 1)
        assert any(f"stage {k} (rank {k} on {ADDRESSES[k // 2]})" in text for k in beyond), (rank, text)
        assert seconds < WATCHDOG + 5.0, (rank, seconds)
    runs = [launch(host, address, tmp_path) for host, address in zip(hosts, ADDRESSES, strict=True)]
    ends = [ended(process, 300.0) for process in runs]
    assert [code for code, _ in ends] == [0, 0], ends
    assert sum(text.count("SAME") for _, text in ends) == 4

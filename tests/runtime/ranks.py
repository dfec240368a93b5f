"""Scripts run by several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOYS = "from tests.runtime.toys import *\nimport os, sys, time, torch, dtrp\nrank = int(os.environ['RANK'])\n"


class Ranks:
    """The processes of a script, without a launcher that ends the others when one has ended.

    Parameters
    ----------
    folder, n, script
        As for `Launch`.
    """

    def __init__(self, folder: Path, n: int, script: str) -> None:
        with socket.socket() as sock:
            sock.bind(("localhost", 0))
            port = sock.getsockname()[1]
        file = written(folder, script)
        self.processes = []
        for rank in range(n):
            place = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(n),
                "LOCAL_WORLD_SIZE": str(n),
            }
            place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            self.processes.append(started([sys.executable, str(file)], folder, place))

    def end(self, seconds: float = 200.0) -> list[tuple[int, str]]:
        """Each one's exit code, and all that it printed."""
        return [ended(process, seconds) for process in self.processes]

    def until(self, rank: int, word: str) -> float:
        """When a rank printed this."""
        stream = self.processes[rank].stdout
        assert stream is not None
        for line in stream:
            if word in line:
                return time.monotonic()
        raise AssertionError(f"rank {rank} never said {word!r}")


class Launch:
    """``python -m torch.distributed.run`` of a script.

    Parameters
    ----------
    folder : Path
        Where the script is written to, and runs.
    n : int
        Processes.
    script : str
        After imports of the toys, of torch, dtrp, os, sys, time; ``rank`` is known.
    """

    def __init__(self, folder: Path, n: int, script: str, *options: str) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
        self.process = started([*launcher, *options, str(written(folder, script))], folder, {})

    def end(self, seconds: float = 280.0) -> tuple[int, str]:
        """The exit code, and all that was printed."""
        return ended(self.process, seconds)


def run(folder: Path, n: int, script: str, *options: str) -> str:
    """What a script prints that must end well."""
    code, said = Launch(folder, n, script, *options).end()
    assert code == 0, said
    return said


def written(folder: Path, script: str) -> Path:
    file = folder / "script.py"
    file.write_text(TOYS + textwrap.dedent(script), encoding="utf-8")
    return file


def started(command: list[str], folder: Path, variables: dict[str, str]) -> subprocess.Popen[str]:
    fixed = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, **fixed, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        said, _ = process.communicate()
        raise AssertionError(f"it did not end within {seconds:g} s; it said:\n{said}") from None
    return process.returncode, said

"""Scripts run by several processes, as ``torchrun`` starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOYS = "from tests.runtime.toys import *\nimport os, sys, time, torch, dtrp\nrank = int(os.environ['RANK'])\n"


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
        file = folder / "script.py"
        file.write_text(TOYS + textwrap.dedent(script), encoding="utf-8")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"),
                *options,
                str(file),
            ],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def end(self, seconds: float = 120.0) -> tuple[int, str]:
        """The exit code, and all that was printed."""
        try:
            said, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, 9)
            said, _ = self.process.communicate()
            raise AssertionError(f"it did not end within {seconds:g} s; it said:\n{said}") from None
        return self.process.returncode, said


def run(folder: Path, n: int, script: str, *options: str) -> str:
    """What a script prints that must end well."""
    code, said = Launch(folder, n, script, *options).end()
    assert code == 0, said
    return said

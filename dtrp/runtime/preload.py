"""What every worker imports sooner or later: the warm parent loads it once for all (starting.py)."""

import atexit
import contextlib
import gc
import os
from multiprocessing import forkserver

import torch

from . import worker

__all__ = ["worker"]

torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the first optimizer brings much along
gc.collect()
gc.freeze()  # what is shared stays so


@atexit.register
def tidy_up() -> None:
    """Of a script that was killed, the parent removes what Python has put into the folder for such."""
    address: str = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
    with contextlib.suppress(OSError):
        os.unlink(address)
        os.rmdir(os.path.dirname(address))

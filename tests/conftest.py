"""One thread per process: several processes of several threads each fight over few cores, and the sums of two
runs that are compared to the bit must be split alike."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, here and in workers

import torch

torch.set_num_threads(1)

# A shell's background job ignores SIGINT, and so would every process that the tests start to interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

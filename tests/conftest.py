"""What must hold before torch is loaded, and a CPU that is the same wherever the tests run."""

import gc
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, here and in workers
os.environ["COLUMNS"] = "120"  # reports are as wide as the terminal, whichever that is

import pytest
import torch

from dtrp import loop_cost
from dtrp.partitioner import calibration
from dtrp.partitioner.devices import DeviceSpec

torch.set_num_threads(1)

# A shell's background job ignores SIGINT, and so would every process that the tests start to interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# FLOP/s, bytes per second of memory, seconds of a launch, bytes per second of a link. Tests must pass with
# each: DTRP_TEST_CPU chooses one.
CPUS = {
    "round": (50e9, 10e9, 5e-6, 4e9),
    "slow memory": (1e12, 1e9, 1e-6, 4e9),
    "slow arithmetic": (1e9, 1e11, 1e-6, 4e9),
    "slow launches": (1e12, 1e11, 1e-3, 4e9),
    "slow links": (50e9, 10e9, 5e-6, 1e6),
}


@pytest.fixture(autouse=True, scope="session")
def calibrate():
    """The real calibration; meanwhile plans come from fixed figures, and are the same on every machine."""
    flops, memory_bandwidth, overhead, link = CPUS[os.environ.get("DTRP_TEST_CPU", "round")]
    measure = calibration.calibrate

    def fixed(device, threads=None):
        if device.type != "cpu":
            return measure(device, threads)
        return DeviceSpec(
            name="CPU (fixed for tests)",
            flops={"float32": flops, "bfloat16": flops / 2, "float16": flops / 20, "float64": flops / 2},
            memory_bandwidth=memory_bandwidth,
            launch_overhead=overhead,
            memory_bytes=16e9,
            link_bandwidth=link,
            link_latency=1e-4,
            kind="cpu",
            threads=threads or torch.get_num_threads(),
        )

    gc.collect()
    gc.freeze()  # what is imported by now: it is not looked through each time that something is collected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "calibrate", fixed)
        patch.setattr(loop_cost, "loop_cost", lambda: None)
        yield measure

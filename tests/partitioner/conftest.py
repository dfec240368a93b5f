"""Shared by the compiler's tests."""

import pytest

from dtrp.partitioner.devices import DeviceSpec


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Measurements go to a directory of the test run, not to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def device():
    """A device with round figures: 1 GFLOP/s, 1 GB/s, no overheads."""
    return DeviceSpec(
        name="round",
        flops={"float32": 1e9},
        memory_bandwidth=1e9,
        launch_overhead=0.0,
        memory_bytes=1e15,
        link_bandwidth=1e9,
        link_latency=0.0,
    )

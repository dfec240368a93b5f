"""Measures once what the device at hand can do, and remembers it in the user's cache directory.

A fraction of a second: large matrix products for the peak rate of each dtype, an elementwise operator on more
than caches hold for the memory bandwidth, a tiny operator for the launch overhead, and on the CPU what a few
kernels take beyond that; the best of several repetitions each time, because interference only ever adds."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from dtrp import accelerators
from dtrp.files import write_text
from dtrp.partitioner.devices import GB, DeviceSpec, Kernels

_FORMAT = 2
# Bytes per second and direction, seconds per message. Between processes of one machine: copies through shared
# memory, as a running pipeline makes them (17 MB sent in 2 ms). Between GPUs: PCIe 4 x16; NVLink is faster,
# and `bandwidth=` says so.
_CPU_LINK = (8.0 * GB, 100e-6)
_CUDA_LINK = (25.0 * GB, 10e-6)


def cache_directory() -> Path:
    """Where dtrp keeps what it measured: ``$XDG_CACHE_HOME/dtrp``, else ``~/.cache/dtrp``."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "dtrp"


def calibrate(device: torch.device, threads: int | None = None) -> DeviceSpec:
    """The figures of ``device``, measured at the first call on this machine and read from the cache after.

    ``threads`` is what a stage on the CPU will have; default: what torch uses here.
    """
    threads = 0 if accelerators.is_one(device) else threads or torch.get_num_threads()
    return _calibrated(device, threads, identity(device, threads))


@functools.lru_cache(maxsize=32)
def _calibrated(device: torch.device, threads: int, key: str) -> DeviceSpec:
    # Not measured: not of the cache.
    cuda = accelerators.is_one(device)
    bandwidth, latency = _CUDA_LINK if cuda else _CPU_LINK
    known: dict[str, Any] = {"link_bandwidth": bandwidth, "link_latency": latency}
    if not cuda:  # the next process may be given less of the same machine
        known |= {"cores": available_cores(), "memory_bytes": float(_cpu_memory())}
    cached = read_cache("calibration", key)
    if cached is not None:
        with contextlib.suppress(TypeError, ValueError, KeyError):
            return replace(DeviceSpec.from_dict(cached), **known)
    if cuda:
        known["memory_bytes"] = float(accelerators.memory(device))
    with using_threads(threads):
        spec = _measure(device, known)
    accelerators.give_back(device)
    write_cache("calibration", key, spec.to_dict())
    return spec


def available_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_cache(kind: str, key: str) -> dict[str, Any] | None:
    """What was stored under ``key``; ``None`` if nothing was, or if the file cannot be trusted."""
    try:
        data = json.loads(_cache_file(kind, key).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # the last one: nobody's home
        return None
    if not isinstance(data, dict) or data.get("format") != _FORMAT or data.get("key") != key:
        return None
    value = data.get("value")
    return value if isinstance(value, dict) else None


def write_cache(kind: str, key: str, value: dict[str, Any]) -> None:
    """Stores ``value``; whole or not at all, and silently not where the directory cannot be written."""
    with contextlib.suppress(OSError, RuntimeError):
        write_text(_cache_file(kind, key), json.dumps({"format": _FORMAT, "key": key, "value": value}))


def _cache_file(kind: str, key: str) -> Path:
    return cache_directory() / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def identity(device: torch.device, threads: int) -> str:
    """What measurements hold for: the device, the threads and the torch that they were made with."""
    if accelerators.is_one(device):
        return f"{accelerators.name(device)}|torch {torch.__version__}"
    return f"{_cpu_name()}|{threads} threads|torch {torch.__version__}"


@contextlib.contextmanager
def using_threads(n: int) -> Iterator[None]:
    """Inside, torch computes with ``n`` CPU threads (0: as it is)."""
    before = torch.get_num_threads()
    if n:
        torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _measure(device: torch.device, known: Mapping[str, Any]) -> DeviceSpec:
    cuda = accelerators.is_one(device)
    flops: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        fast = dtype in (torch.float32, torch.bfloat16)  # some CPUs take ages for the others
        size = 4096 if cuda else 512 if fast else 192
        with contextlib.suppress(RuntimeError, TypeError):  # what a device cannot multiply has no figure
            a = torch.ones(size, size, dtype=dtype, device=device)
            out = torch.empty_like(a)
            seconds = best_time(functools.partial(torch.mm, a, a, out=out), device, budget=0.06)
            flops[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    tiny = torch.ones(8, device=device, requires_grad=True)

    def many() -> None:
        for _ in range(100):
            torch.relu(tiny)

    overhead = best_time(many, device, budget=0.02) / 100
    spec = DeviceSpec(
        name=accelerators.name(device) if cuda else f"CPU ({_cpu_name()})",
        flops=flops,
        memory_bandwidth=_memory_bandwidth(device),
        launch_overhead=overhead,
        kind="cuda" if cuda else "cpu",
        threads=0 if cuda else torch.get_num_threads(),
        **known,
    )
    return spec if cuda else replace(spec, kernels=_kernels(spec))


def _memory_bandwidth(device: torch.device) -> float:
    """Over more memory than a core's own caches hold, as training goes, which keeps what it computes. (Freed
    again, blocks of that size are from now on glibc's to keep, as in the workers, and not mapped anew.)"""
    cuda = accelerators.is_one(device)
    large = [torch.ones((256 if cuda else 8) * 2**20 // 4, device=device) for _ in range(2 if cuda else 16)]
    pairs = tuple(zip(large[::2], large[1::2], strict=True))
    seconds = best_time(lambda: [torch.add(x, 1.0, out=y) for x, y in pairs], device, budget=0.12)
    return len(large) * large[0].nbytes / seconds


def _kernels(spec: DeviceSpec) -> Kernels:
    """What convolutions and batch norms take on the CPU, by one of each kind."""
    cpu = torch.device("cpu")

    def seconds(function: Callable[[], Any]) -> float:
        return best_time(function, cpu, budget=0.08, least=40)

    x, narrow = torch.ones(32, 16, 32, 32), torch.ones(16, 16, 3, 3)  # no random number is drawn
    tiny, filters = torch.ones(4, 8, 8, 8), torch.ones(8, 8, 3, 3)
    launch = seconds(lambda: [functional.conv2d(tiny, filters, padding=1) for _ in range(10)]) / 10
    rate = 2 * x.numel() * 16 * 9 / (seconds(lambda: functional.conv2d(x, narrow, padding=1)) - launch)
    weight, bias = torch.ones(16), torch.zeros(16)

    def norm() -> torch.Tensor:
        return functional.batch_norm(x, None, None, weight, bias, training=True)

    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().requires_grad_()
        out, gradient = norm(), torch.ones_like(x)
        back = seconds(lambda: torch.autograd.grad(out, x, gradient, retain_graph=True))
    moved = x.numel() * 4 / spec.memory_bandwidth
    return Kernels(
        norm=max(1.0, seconds(norm) / (2 * moved)),
        norm_backward=max(1.0, back / (3 * moved)),
        convolution=max(0.0, launch - spec.launch_overhead),
        narrow=max(0.0, 16 * (spec.peak("float32") / rate - 1)),
    )


def best_time(
    function: Callable[[], Any], device: torch.device, *, budget: float, least: int = 3, warm_up: int = 1
) -> float:
    """Seconds of the fastest of several calls, within about ``budget`` seconds in all."""
    wait = functools.partial(accelerators.wait, device) if accelerators.is_one(device) else _nothing
    for _ in range(warm_up):
        function()
    wait()
    now = clock(torch.get_num_threads()) if device.type == "cpu" else time.perf_counter
    best, count, end = float("inf"), 0, time.perf_counter() + budget
    while count < least or time.perf_counter() < end:
        start = now()
        function()
        wait()
        best, count = min(best, now() - start), count + 1
    return best


def clock(threads: int) -> Callable[[], float]:
    """Seconds, to time CPU work with: one thread has its own, which stops while others have the core."""
    return time.thread_time if threads == 1 else time.perf_counter


def _nothing() -> None:
    return None


def _cpu_memory(limit: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """The machine's, or what a container may have of it."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # without one it says "max"
        there = min(there, int(limit.read_text(encoding="ascii")))
    return there

"""What a device can do: peak rates, bandwidths, memory.

A `DeviceSpec` is all that the cost model knows of hardware. It comes from three places: the table of
published figures below (``"A100-80GB"``: plan for a machine that is not here), a calibration of the device
at hand (``"cpu"``, ``"cuda:0"``; see `dtrp.partitioner.calibration`), or the user."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dtrp import accelerators

GB = 1e9
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class LoopCost(NamedTuple):
    """What the runtime takes on the CPU: seconds per stage and tick; of a message, on either side, seconds
    and bytes per second."""

    tick: float
    latency: float
    bandwidth: float


class Kernels(NamedTuple):
    """What operators take beyond the roofline, where a device has been measured (`calibration`).

    ``norm``, ``norm_backward``: of batch norms, which read their inputs several times, as multiples of the
    seconds that moving the bytes takes. ``convolution``: seconds to set one up. ``narrow``: channels of a
    group with which a convolution's products run at half the peak rate, which is that of long ones.
    """

    norm: float = 1.0
    norm_backward: float = 1.0
    convolution: float = 0.0
    narrow: float = 0.0


_PLAIN = Kernels()


@dataclass(frozen=True)
class DeviceSpec:
    """What a device can do, as far as planning is concerned.

    Attributes
    ----------
    name : str
        For people and for fingerprints.
    flops : Mapping[str, float]
        Attainable FLOP/s of large matrix products, by dtype (``"float32"``, ``"bfloat16"``, ...).
    memory_bandwidth : float
        Bytes per second that an elementwise kernel moves (reads and writes together).
    launch_overhead : float
        Seconds that an operator takes however small it is.
    memory_bytes : float
        Memory of the device.
    link_bandwidth : float
        Bytes per second to a neighbouring stage, in each direction.
    link_latency : float
        Seconds that a message takes however small it is.
    kind : str
        ``"cpu"`` or ``"cuda"``; see `overlaps`.
    threads : int
        CPU threads that a stage has (0: as many as torch uses, or no CPU).
    speed : float
        What the figures were multiplied with: relative to the device as it was measured or published.
    tick_overhead : float
        Seconds that a stage's loop takes in every tick, besides the operators.
    parts : int
        Micro-batches that a batch travelled in when its nodes were timed: what these cost is in their times,
        and a batch in fewer is taken to cost as much.
    cores : int
        CPU cores, or accelerators, that all stages together have (0: each has a device of its own).
    kernels : Kernels
        What some operators take beyond the roofline.
    """

    name: str
    flops: Mapping[str, float]
    memory_bandwidth: float
    launch_overhead: float
    memory_bytes: float
    link_bandwidth: float
    link_latency: float = 10e-6
    kind: str = "cuda"
    threads: int = 0
    tick_overhead: float = 0.0
    parts: int = 1
    speed: float = 1.0
    cores: int = 0
    kernels: Kernels = _PLAIN

    def __post_init__(self) -> None:
        if "float32" not in self.flops:
            raise ValueError(f"device {self.name!r} needs a float32 rate; got {sorted(self.flops)}")
        numbers = {"memory_bandwidth": self.memory_bandwidth, "link_bandwidth": self.link_bandwidth}
        numbers |= {f"flops[{dtype!r}]": rate for dtype, rate in self.flops.items()}
        for name, value in numbers.items():
            if not value > 0:
                raise ValueError(f"device {self.name!r}: {name} must be positive; got {value!r}")
        object.__setattr__(self, "flops", MappingProxyType(dict(self.flops)))

    def __reduce__(self) -> tuple[Any, ...]:
        return DeviceSpec.from_dict, (self.to_dict(),)

    @property
    def overlaps(self) -> bool:
        """Whether it sends and receives while it computes: on the CPU the cores that compute also copy."""
        return self.kind != "cpu"

    def peak(self, dtype: torch.dtype | str) -> float:
        """FLOP/s for operands of ``dtype``; a dtype without a figure counts as float32."""
        name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
        return self.flops.get(name, self.flops["float32"])

    def op_time(
        self,
        flops: float,
        moved_bytes: float,
        dtype: torch.dtype | str,
        *,
        kernel: str = "",
        width: int = 0,
        calls: int = 1,
    ) -> float:
        """Seconds of one operator: the roofline (Williams et al., CACM 52(4), 2009) plus its launch, and
        what its kernel is known to take besides (`OpCost`)."""
        computing, moving = flops / self.peak(dtype), moved_bytes / self.memory_bandwidth
        launch = self.launch_overhead
        if kernel == "convolution":
            computing *= 1 + self.kernels.narrow / max(1, width)
            launch += calls * self.kernels.convolution
        elif kernel:
            moving *= getattr(self.kernels, kernel)
        return max(computing, moving) + launch

    def transfer_time(self, n_bytes: float) -> float:
        """Seconds to send ``n_bytes`` to another stage; nothing to send takes no time."""
        return n_bytes / self.link_bandwidth + self.link_latency if n_bytes else 0.0

    def exchange_time(self, n_bytes: float, *, returns: bool) -> float:
        """Seconds to send ``n_bytes``, and to get as many back as their gradient if it ``returns``."""
        return self.transfer_time(n_bytes) * (2 if returns else 1)

    def with_link(self, bandwidth: float | None) -> DeviceSpec:
        """The same device behind another link (bytes per second); ``None`` changes nothing."""
        return self if bandwidth is None else replace(self, link_bandwidth=float(bandwidth))

    def with_speed(self, speed: float) -> DeviceSpec:
        """The same device, so many times as fast as it was."""
        return replace(
            self,
            name=self.name.partition(" at ")[0]
            + (f" at {self.speed * speed:g}" if self.speed * speed != 1 else ""),
            flops={dtype: rate * speed for dtype, rate in self.flops.items()},
            memory_bandwidth=self.memory_bandwidth * speed,
            launch_overhead=self.launch_overhead / speed,
            kernels=self.kernels._replace(convolution=self.kernels.convolution / speed),
            speed=self.speed * speed,
        )

    def shared(self, n_stages: int) -> float:
        """How many of ``n_stages`` stages compute at a time where they share cores; 0: all do."""
        return self.cores / max(1, self.threads) if self.cores < n_stages * max(1, self.threads) else 0.0

    def with_loop(self, cost: LoopCost | None) -> DeviceSpec:
        """The same device under the runtime; on a GPU the host's work goes on meanwhile."""
        if cost is None or self.kind != "cpu":
            return self
        return replace(
            self,
            tick_overhead=cost.tick,
            link_latency=cost.latency,
            link_bandwidth=cost.bandwidth,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = {"flops": dict(self.flops), "kernels": self.kernels._asdict()}
        return {f.name: getattr(self, f.name) for f in fields(self)} | plain

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DeviceSpec:
        """The inverse of `to_dict`."""
        return cls(**{**data, "kernels": Kernels(**data.get("kernels", {}))})


# Published peak figures: dense (no sparsity) TFLOP/s of 16-bit tensor cores, of float32 and of float64
# vector units, memory GB/s, memory GB, GB/s per direction of NVLink (or PCIe x16 where there is none).
# Sources: the vendors' data sheets (NVIDIA V100, T4, A10, A100, L4, L40S, H100, H200 and HGX B200; the
# GA102 and AD102 white papers for the GeForce cards; AMD Instinct MI300X).
_PUBLISHED = {
    "V100-16GB": (125.0, 15.7, 7.8, 900, 16, 150),
    "V100-32GB": (125.0, 15.7, 7.8, 900, 32, 150),
    "T4": (65.0, 8.1, 0.25, 320, 16, 16),
    "A10": (125.0, 31.2, 0.97, 600, 24, 32),
    "A100-40GB": (312.0, 19.5, 9.7, 1555, 40, 300),
    "A100-80GB": (312.0, 19.5, 9.7, 2039, 80, 300),
    "L4": (121.0, 30.3, 0.49, 300, 24, 32),
    "L40S": (362.0, 91.6, 1.4, 864, 48, 32),
    "H100-PCIE": (756.0, 51.0, 26.0, 2000, 80, 64),
    "H100-SXM": (989.0, 67.0, 34.0, 3350, 80, 450),
    "H200": (989.0, 67.0, 34.0, 4800, 141, 450),
    "B200": (2250.0, 75.0, 37.0, 8000, 180, 900),
    "RTX3090": (71.0, 35.6, 0.56, 936, 24, 32),
    "RTX4090": (165.0, 82.6, 1.3, 1008, 24, 32),
    "MI300X": (1307.0, 163.4, 81.7, 5300, 192, 64),
}
# The share of a published peak that large matrix products, plain copies and links reach in practice. A plan
# depends on ratios between operators, not on this level; calibrate the device itself for absolute times.
_ATTAINABLE = 0.7
_CUDA_LAUNCH = 5e-6  # an eager operator's kernel launch, about the same on all of them


def _published(name: str) -> DeviceSpec:
    half, single, double, bandwidth, memory, link = _PUBLISHED[name]
    flops = {"float16": half, "float32": single, "float64": double}
    if not name.startswith(("V100", "T4")):  # no bfloat16 tensor cores before Ampere
        flops["bfloat16"] = half
    return DeviceSpec(
        name=name,
        flops={dtype: rate * 1e12 * _ATTAINABLE for dtype, rate in flops.items()},
        memory_bandwidth=bandwidth * GB * _ATTAINABLE,
        launch_overhead=_CUDA_LAUNCH,
        memory_bytes=memory * GB,
        link_bandwidth=link * GB * _ATTAINABLE,
    )


def device_spec(device: str | torch.device | DeviceSpec, *, threads: int | None = None) -> DeviceSpec:
    """The figures of a device.

    Parameters
    ----------
    device
        ``"cpu"`` or ``"cuda:0"`` (calibrated once, then cached), the name of a known GPU such as
        ``"A100-80GB"``, or a `DeviceSpec`, which is returned as it is.
    threads
        How many CPU threads a stage has. Default: as many as torch uses here.

    Raises
    ------
    ValueError
        No such device, or the CUDA device is not there.
    """
    if isinstance(device, DeviceSpec):
        return device
    named = {_squash(name): name for name in _PUBLISHED}.get(_squash(str(device)))
    if named is not None:
        return _published(named)
    from dtrp.partitioner.calibration import calibrate

    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(
            f"unknown device {str(device)!r}: give 'cpu', 'cuda:<index>', a DeviceSpec, or one of "
            f"{', '.join(_PUBLISHED)}"
        ) from None
    if place.type == "meta":
        place = torch.device("cpu")
    if accelerators.is_one(place) and place.type not in {device.type for device in accelerators.here()}:
        raise ValueError(
            f"device {str(device)!r} is not available here; to plan for a GPU that is not at hand, name its "
            f"kind: one of {', '.join(_PUBLISHED)}"
        )
    return calibrate(place, threads)


def parse_bytes(value: float | str) -> int:
    """Bytes from a number or from text such as ``"16GB"``, ``"512 MiB"`` or ``"80g"``.

    Examples
    --------
    >>> parse_bytes("16GB"), parse_bytes("1.5 MiB"), parse_bytes(4096)
    (16000000000, 1572864, 4096)
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0 < value < float("inf"):
            raise ValueError(f"a number of bytes must be positive and finite; got {value!r}")
        return int(value)
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(value).upper())
    if isinstance(value, bool) or match is None or float(match[1]) == 0 or match[2] not in _UNITS:
        raise ValueError(f"not a number of bytes: {value!r}; write for example 16GB, 512MiB or 4096")
    return int(float(match[1]) * _UNITS[match[2]])


def _squash(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper())

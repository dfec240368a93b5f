"""What a pipeline is simulated on: devices in nodes, links within and between them, as a few numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dtrp.names import nearest
from dtrp.partitioner.devices import parse_bytes


@dataclass(frozen=True)
class Link:
    """What joins two devices, in each direction.

    Attributes
    ----------
    bandwidth : float
        Bytes per second; also text such as ``"25GB"``.
    latency : float
        Seconds that a message takes however small it is.
    jitter : float
        Seconds that a message takes longer on average, exponentially distributed.
    """

    bandwidth: float
    latency: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.bandwidth != math.inf:
            object.__setattr__(self, "bandwidth", float(parse_bytes(self.bandwidth)))
        number_of("latency", self.latency, low=0.0)
        number_of("jitter", self.jitter, low=0.0)


@dataclass(frozen=True)
class Cluster:
    """Devices and links for `dtrp.simulate`.

    Devices are numbered as torchrun's ranks are: stage k of replica r runs on device ``r * n_stages + k``,
    and each node has ``per_node`` devices in a row. Every pair of devices has a link of its own in each
    direction; where several pairs share a network card, give what one of them gets.

    Attributes
    ----------
    replicas : int
        Pipelines side by side, which average their gradients, stage by stage, before each update (a ring).
    per_node : int or None
        Devices per node. ``None``: all are in one.
    node, net : Link or None
        Between devices of one node, and of two. ``None``: as the plan was made for; ``net``: as ``node``.
    speed : mapping of int to float
        Device -> its speed, relative to the device that the plan was made for. Others: 1. A list names the
        first devices.
    jitter : float
        Standard deviation of what a pass takes, relative to its mean (log-normal).
    overhead : float
        Seconds that each slot costs a stage besides its passes, however small it is.
    memory : float or None
        Bytes that each device has; also text such as ``"80GB"``. ``None``: not compared.

    Examples
    --------
    >>> Cluster(per_node=8, node=Link("300GB"), net=Link("25GB", latency=1e-5), speed={3: 0.5}).speed[3]
    0.5
    """

    replicas: int = 1
    per_node: int | None = None
    node: Link | None = None
    net: Link | None = None
    speed: Mapping[int, float] = field(default_factory=dict)
    jitter: float = 0.0
    overhead: float = 0.0
    memory: float | None = None

    def __post_init__(self) -> None:
        count_of("replicas", self.replicas)
        if self.per_node is not None:
            count_of("per_node", self.per_node)
        for name in ("node", "net"):
            if not isinstance(getattr(self, name), Link | None):
                raise TypeError(f"{name}={getattr(self, name)!r}: expected a Link, such as Link('25GB')")
        given = self.speed if isinstance(self.speed, Mapping) else dict(enumerate(self.speed))
        try:
            speed = {int(device): value for device, value in given.items()}
        except ValueError as e:
            raise ValueError(f"speed must name devices by number, such as {{3: 0.5}}: {e}") from None
        for device, value in speed.items():
            number_of(f"speed[{device}]", value, above=0.0)
            if device < 0:
                raise ValueError(f"speed names device {device}: devices are numbered from 0")
        object.__setattr__(self, "speed", MappingProxyType(speed))
        number_of("jitter", self.jitter, low=0.0)
        number_of("overhead", self.overhead, low=0.0)
        if self.memory is not None:
            object.__setattr__(self, "memory", float(parse_bytes(self.memory)))

    def __reduce__(self) -> tuple[Any, ...]:
        return Cluster.from_dict, (self.to_dict(),)

    def link(self, a: int, b: int) -> Link | None:
        """What joins two devices; ``None``: what the plan was made for."""
        if self.per_node is not None and a // self.per_node != b // self.per_node and self.net is not None:
            return self.net
        return self.node

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        links = {name: None if plain[name] is None else vars(plain[name]) for name in ("node", "net")}
        return plain | links | {"speed": {str(device): value for device, value in self.speed.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cluster:
        """From plain data: attributes by name, links as ``{"bandwidth": "25GB", "latency": 1e-5}``.

        Raises
        ------
        ValueError, TypeError
            A name that there is not, or a value that makes no sense.
        """
        known = dict(data)
        _names("a cluster", known, cls)
        for name in ("node", "net"):
            if isinstance(known.get(name), Mapping):
                _names(f"the cluster's {name!r}", known[name], Link)
                if "bandwidth" not in known[name]:
                    raise ValueError(f"the cluster's {name!r} needs a bandwidth, such as '25GB'")
                known[name] = Link(**known[name])
        return cls(**known)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Cluster:
        """Reads a JSON file.

        Raises
        ------
        ValueError
            It is no JSON, or no cluster; the message names the file.
        OSError
            It cannot be read.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise ValueError(f"expected an object with {', '.join(_fields(cls))}; got {data!r}")
            return cls.from_dict(data)
        except (ValueError, TypeError) as e:
            raise ValueError(f"{path} describes no cluster: {e}") from None


def cluster_of(given: Cluster | Mapping[str, Any] | str | os.PathLike[str] | None) -> Cluster:
    """From what users say: one, plain data, the path of a file, or nothing."""
    if given is None or isinstance(given, Cluster):
        return given or Cluster()
    if isinstance(given, Mapping):
        return Cluster.from_dict(given)
    if isinstance(given, str | os.PathLike):
        return Cluster.load(given)
    raise TypeError(f"cluster must be a Cluster, a mapping or the path of a JSON file; got {given!r}")


def _fields(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind)]


def _names(what: str, data: Mapping[str, Any], kind: type) -> None:
    for name in data:
        if name not in _fields(kind):
            known = _fields(kind)
            raise ValueError(f"{what} has no {name!r}, only {', '.join(known)}{nearest(name, known)}")


def count_of(name: str, value: Any) -> int:
    """A setting that counts something, refused unless it does."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected an int >= 1")
    if value < 1:
        raise ValueError(f"{name}={value!r}: expected an int >= 1")
    return value


def number_of(name: str, value: Any, *, low: float | None = None, above: float | None = None) -> None:
    """Refuse a setting that is no number, or none in its range."""
    text = f">= {low:g}" if low is not None else f"> {above:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r}: expected a number {text}")
    if (
        not math.isfinite(value)
        or (low is not None and value < low)
        or (above is not None and value <= above)
    ):
        raise ValueError(f"{name}={value!r}: expected a finite number {text}")

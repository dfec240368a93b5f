"""What joins stages: one kind of link, or a fast one within nodes and a slower one between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .devices import parse_bytes

_KEYS = ("node", "net", "nodes", "per_node")


@dataclass(frozen=True)
class Links:
    """Bytes per second between stages, each way, and how stages lie in nodes.

    Attributes
    ----------
    node, net : float or None
        Within a node and between two; ``None``: the devices' own, and as ``node``.
    nodes : int
        How many nodes there are; each has a stage at least.
    per_node : int or None
        The most stages of a node; ``None``: any number.
    """

    node: float | None = None
    net: float | None = None
    nodes: int = 1
    per_node: int | None = None

    def count(self, n_stages: int) -> int:
        """Nodes of a pipeline of so many stages."""
        return 1 if self.net is None else min(self.nodes, n_stages)


def parse_links(bandwidth: Any, n_stages: int) -> Links:
    """What ``bandwidth=`` of `dtrp.compile` says.

    Parameters
    ----------
    bandwidth
        ``None``, a number, text such as ``"25GB"``, or a mapping: ``node`` and ``net`` (bytes per second),
        and ``nodes`` or ``per_node``, or both. With none of the two there are two nodes.
    n_stages
        K.

    Raises
    ------
    TypeError, ValueError
        It makes no sense; the message says what would.
    """
    if bandwidth is None:
        return Links()
    if not isinstance(bandwidth, Mapping):
        return Links(float(_rate("bandwidth", bandwidth)))
    unknown = [key for key in bandwidth if key not in _KEYS]
    if unknown or not {"node", "net"} <= bandwidth.keys():
        raise ValueError(
            f"bandwidth={dict(bandwidth)!r}: expected {{'node': '300GB', 'net': '25GB'}}, bytes per second "
            f"within and between nodes, and perhaps 'nodes' or 'per_node' (stages)"
        )
    node, net = (_rate(f"bandwidth[{key!r}]", bandwidth[key]) for key in ("node", "net"))
    if net > node:
        raise ValueError(
            f"bandwidth: between nodes ({net:g} bytes per second) is faster than within one ({node:g}); give "
            f"them the other way round, or one number for both"
        )
    per_node = _whole("per_node", bandwidth.get("per_node"))
    nodes = _whole("nodes", bandwidth.get("nodes"))
    if nodes is None:
        nodes = 2 if per_node is None else -(-n_stages // per_node)
    if nodes > n_stages or nodes * (per_node or n_stages) < n_stages:
        room = "" if per_node is None else f" of at most {per_node} stages"
        raise ValueError(f"bandwidth: {nodes} nodes{room} cannot hold {n_stages} stages, one each at least")
    return Links(float(node), float(net), nodes, per_node)


def _rate(name: str, value: Any) -> int:
    try:
        return parse_bytes(value)
    except ValueError as e:
        raise ValueError(f"{name} must be bytes per second: {e}") from None


def _whole(name: str, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"bandwidth[{name!r}]={value!r}: expected an int >= 1")
    if value < 1:
        raise ValueError(f"bandwidth[{name!r}]={value!r}: expected an int >= 1")
    return value

"""The immutable result of planning: which node in which stage, and which stages recompute.

A plan is saved as JSON and reused later, or on another machine. It carries a fingerprint of the graph and
its shapes, and is refused where it does not fit. It also carries the rules that any cut must keep (who must
come before whom, who must stay together), so that hand edits can be checked without the model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from dtrp.errors import PlanMismatchError
from dtrp.files import write_text
from dtrp.names import nearest
from dtrp.partitioner.capture.graph import Captured
from dtrp.partitioner.profile import Profile
from dtrp.partitioner.stage_cost import Recompute
from dtrp.version import __version__

FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """Which stage every node of the captured train graph belongs to, and which stages recompute.

    Attributes
    ----------
    n_stages : int
    stage_of : Mapping[str, int]
        Node name -> stage, 0-based; placeholders and output are not listed.
    recompute : tuple[bool or tuple[str, ...], ...]
        Per stage, whether it recomputes its forward pass, or the nodes of which alone it does so, while it
        keeps the graph of the others; the last never recomputes.
    fingerprint : str
        Of the graph and its shapes; see `fingerprint`.
    modules : Mapping[str, str]
        Node name -> the module of the model that it comes from.
    edges : tuple[tuple[str, str], ...]
        ``(u, v)``: stage(u) <= stage(v).
    groups : tuple[tuple[str, ...], ...]
        Nodes that share a stage.
    lower_bound : float
        Seconds; no partition into this many stages has a smaller tick time (0: nothing is known).
    engine, reason : str
        How the plan was found, and why it is not faster.
    costs : str
        Identifies the times that ``lower_bound`` holds for.
    edited : bool
        Whether it was changed by hand since.
    node_of : tuple[int, ...]
        Per stage, its node, where links between nodes are slower; else empty.
    placement : tuple[int, ...]
        Per stage, which of the devices that were given it has, where they are unequal; else empty: in order.
    replicas : tuple[int, ...]
        How many devices each stage has, where any has several; else empty: one each.
    layout : str
        Why they have so many, where that was left to the planner.
    opened : tuple[str, ...]
        Modules that could stand in the graph as one node each, and were opened for a better balance.
    divided : Mapping[str, int]
        Linear layers that are computed in parts, and in how many (``split_linear``).
    profile : Profile or None
        What its stages cost, for `dtrp.simulate`; not of plans that were edited by hand.
    """

    n_stages: int
    stage_of: Mapping[str, int] = field(repr=False)
    recompute: tuple[Recompute, ...]
    fingerprint: str = ""
    modules: Mapping[str, str] = field(default_factory=dict, repr=False)
    edges: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    groups: tuple[tuple[str, ...], ...] = field(default=(), repr=False)
    lower_bound: float = 0.0
    engine: str = ""
    reason: str = field(default="", repr=False)
    costs: str = field(default="", repr=False)
    edited: bool = False
    node_of: tuple[int, ...] = ()
    placement: tuple[int, ...] = ()
    replicas: tuple[int, ...] = ()
    layout: str = field(default="", repr=False)
    opened: tuple[str, ...] = ()
    divided: Mapping[str, int] = field(default_factory=dict)
    profile: Profile | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stage_of", MappingProxyType(dict(self.stage_of)))
        object.__setattr__(self, "modules", MappingProxyType(dict(self.modules)))
        object.__setattr__(
            self,
            "recompute",
            tuple(tuple(r) if isinstance(r, list | tuple) else bool(r) for r in self.recompute),
        )
        self._validate()

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.of_dict, (self.to_dict(),)

    @property
    def recomputes(self) -> tuple[bool, ...]:
        """Per stage, whether it recomputes all of its forward pass."""
        return tuple(again is True for again in self.recompute)

    def nodes(self, stage: int) -> tuple[str, ...]:
        """The nodes of a stage, in the graph's order."""
        return tuple(node for node, s in self.stage_of.items() if s == stage)

    def move(self, node: str, stage: int) -> Plan:
        """The plan with one node, and what must stay with it, in another stage.

        Raises
        ------
        ValueError
            No such node or stage, a stage would be empty, or the node would come before one whose value it
            uses; the message names the two nodes.
        """
        if node not in self.stage_of:
            raise ValueError(f"the plan has no node {node!r}{nearest(node, self.stage_of)}")
        self._check_stage(stage)
        return self._edit(dict.fromkeys(self._with_groups({node}), stage))

    def pin(self, module: str, stage: int) -> Plan:
        """The plan with all of a module in one stage; what comes before or after it follows where it must.

        Raises
        ------
        ValueError
            No node comes from such a module, no such stage, or a stage would be empty.
        """
        self._check_stage(stage)
        chosen = {n for n, m in self.modules.items() if m == module or m.startswith(f"{module}.")}
        if not chosen:
            raise ValueError(
                f"no node of the plan comes from a module {module!r}"
                f"{nearest(module, set(self.modules.values()))}"
            )
        assigned = dict(self.stage_of)
        before: dict[str, list[str]] = {}
        after: dict[str, list[str]] = {}
        for u, v in self.edges:
            before.setdefault(v, []).append(u)
            after.setdefault(u, []).append(v)
        todo = [(n, stage) for n in self._with_groups(chosen)]
        pinned = {n for n, _ in todo}
        for n, s in todo:
            assigned[n] = s
        while todo:
            n, s = todo.pop()
            follow = [u for u in before.get(n, ()) if assigned[u] > s]
            follow += [v for v in after.get(n, ()) if assigned[v] < s]
            for m in self._with_groups(set(follow)):
                if m not in pinned and assigned[m] != s:
                    assigned[m] = s
                    todo.append((m, s))
        return self._edit(assigned)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON; whole or not at all."""
        write_text(path, json.dumps(self.to_dict(), indent=1))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """Reads what `save` wrote.

        Raises
        ------
        PlanMismatchError
            The file is not a plan, or is of a format that this version does not know.
        OSError
            The file cannot be read.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as e:
            raise PlanMismatchError(
                f"{path} is not a plan: no valid JSON ({e}). Write one with plan.save."
            ) from e
        if not isinstance(data, dict) or "format" not in data:
            raise PlanMismatchError(f"{path} is JSON but not a plan. Write one with plan.save.")
        if data["format"] != FORMAT:
            raise PlanMismatchError(
                f"{path} has plan format {data['format']!r} (written by dtrp {data.get('dtrp', '?')}); "
                f"dtrp {__version__} reads format {FORMAT}. Plan again and save."
            )
        try:
            return Plan.of_dict(data)
        except (KeyError, TypeError, ValueError) as e:
            raise PlanMismatchError(f"{path} is a damaged plan: {e!r}. Plan again and save.") from e

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: dict(data[name]) for name in ("stage_of", "modules", "divided")}
        profile = None if self.profile is None else self.profile.to_dict()
        return {"format": FORMAT, "dtrp": __version__, **data, **plain, "profile": profile}

    def check(self, captured: Captured, n_stages: int | None = None) -> None:
        """That the plan belongs to this graph, these shapes and this number of stages.

        Raises
        ------
        PlanMismatchError
            It does not; the message says in what they differ.
        """
        if n_stages is not None and n_stages != self.n_stages:
            raise PlanMismatchError(
                f"the plan is for {self.n_stages} stages, not for {n_stages}. Plan again, or pass "
                f"n_gpus={self.n_stages}."
            )
        if self.fingerprint == fingerprint(captured):
            return
        graph = captured.train.module.graph
        here = [n.name for n in graph.nodes if n.op not in ("placeholder", "output")]
        unknown = [n for n in here if n not in self.stage_of]
        missing = sorted(set(self.stage_of) - set(here))
        if unknown or missing:
            what = f"{len(unknown)} of the model's {len(here)} nodes are not in it"
            what += f" (such as {unknown[0]!r})" if unknown else ""
            what += f", {len(missing)} of its nodes are not in the model"
            what += f" (such as {missing[0]!r})" if missing else ""
        else:
            what = "the nodes' names are the same, but their operations, shapes or dtypes are not"
        raise PlanMismatchError(
            f"the plan does not belong to this model and these example inputs: {what}. Plan again, or use "
            f"the model, shapes and dtypes that it was made for."
        )

    @staticmethod
    def of_dict(data: Mapping[str, Any]) -> Plan:
        """What `to_dict` gave."""
        given = {f.name: _tuples(data[f.name]) for f in fields(Plan) if f.name in data}
        if given.get("profile") is not None:
            given["profile"] = Profile.from_dict(given["profile"])
        return Plan(**given)

    def _edit(self, changes: Mapping[str, int]) -> Plan:
        return replace(self, stage_of=dict(self.stage_of) | dict(changes), edited=True, profile=None)

    def _with_groups(self, nodes: Iterable[str]) -> set[str]:
        found = set(nodes)
        for group in self.groups:  # disjoint
            if not found.isdisjoint(group):
                found.update(group)
        return found

    def _check_stage(self, stage: int) -> None:
        if isinstance(stage, bool) or not isinstance(stage, int) or not 0 <= stage < self.n_stages:
            raise ValueError(f"stage must be one of 0 to {self.n_stages - 1}; got {stage!r}")

    def _validate(self) -> None:
        if isinstance(self.n_stages, bool) or not isinstance(self.n_stages, int) or self.n_stages < 1:
            raise ValueError(f"a plan needs at least one stage; got n_stages={self.n_stages!r}")
        if len(self.recompute) != self.n_stages:
            raise ValueError(f"recompute has {len(self.recompute)} entries for {self.n_stages} stages")
        if len(self.replicas) not in (0, self.n_stages) or not all(r >= 1 for r in self.replicas):
            raise ValueError(
                f"replicas={self.replicas} for {self.n_stages} stages: expected one >= 1 for each"
            )
        for stage in self.stage_of.values():
            self._check_stage(stage)
        empty = sorted(set(range(self.n_stages)) - set(self.stage_of.values()))
        if empty:
            raise ValueError(f"stage {empty[0]} would be empty: every stage needs at least one node")
        for u, v in self.edges:
            if self.stage_of[u] > self.stage_of[v]:
                raise ValueError(
                    f"{v!r} (stage {self.stage_of[v]}) cannot come before {u!r} (stage {self.stage_of[u]}), "
                    f"whose value or effect it needs: move {u!r} to stage {self.stage_of[v]} or earlier "
                    f"first, or pin their module"
                )
        for group in self.groups:
            if len({self.stage_of[n] for n in group}) > 1:
                raise ValueError(f"these nodes must share a stage: {', '.join(sorted(group))}")


def fingerprint(captured: Captured) -> str:
    """A digest of the train graph: operations, settings, connections, shapes and dtypes; not of weights."""
    digest = hashlib.sha256()
    for node in captured.train.module.graph.nodes:
        target = node.target if isinstance(node.target, str) else _qualified(node.target)
        value = [_shape(leaf) for leaf in pytree.tree_leaves(node.meta.get("val"))]
        arguments = [_plain(leaf) for leaf in _leaves((node.args, node.kwargs))]
        digest.update(json.dumps([node.op, node.name, target, value, arguments]).encode())
    return digest.hexdigest()


def _leaves(arguments: Any) -> list[Any]:
    leaves: list[Any] = []
    fx.node.map_aggregate(arguments, lambda leaf: leaves.append(leaf))
    return leaves


def _plain(leaf: Any) -> str:
    if isinstance(leaf, fx.Node):
        return f"%{leaf.name}"
    if isinstance(leaf, (bool, int, float, complex, str, type(None), torch.dtype, torch.device)):
        return repr(leaf)
    return type(leaf).__qualname__  # a repr could hold an address


def _shape(leaf: Any) -> str:
    return f"{tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, torch.Tensor) else repr(leaf)


def _qualified(function: Any) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}"


def _tuples(value: Any) -> Any:
    """JSON's lists are what tuples were."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value

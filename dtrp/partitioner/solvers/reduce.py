"""Makes a problem smaller without losing a best partition.

Three kinds of steps, repeated until none applies; each keeps at least one optimal partition if stages may
stay empty (a stage may have held nothing but a merged group):

*Slack limits* that no set of groups can break are dropped.

*Elimination*: a group without work and without values only passes precedence on; its neighbours are linked
directly and it goes to the last stage of its predecessors in the end.

*Merging* v into a neighbour q, where moving v from its stage b to q's stage a never raises a load. Write

    E   values of q that v alone consumes       (a sends and b receives them, but for the move)
    Q   values of v that q consumes             (b sends and a receives them)
    S   values of v with a consumer besides q   (after the move a may send and b receive them)
    R   values of others that v consumes        (after the move a may receive and b send them)

by their transfer times. The move changes what a receives by at most R - Q, what it sends by S - E, what b
receives by S - E, what b sends by R - Q, and takes v's work from b to a. If computing overlaps with
communication, v must have no work, R <= Q and S <= E; if it does not, work + R + S <= Q + E is enough. All
other stages keep what they have. Precedence lets v follow q if q is its only direct predecessor or successor,
or it has neither.
The rules are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import networkx as nx
import numpy as np

from .problem import Bools, Floats, Ints, Option, Problem, Values, make_values, product


class Contradiction(Exception):
    """Groups that must be together are pinned apart."""


@dataclass(frozen=True, eq=False)
class Reduced:
    """A smaller problem and the way back."""

    problem: Problem
    original: Problem
    group: Ints  # original group -> group of the smaller problem, -1: eliminated

    def lift(self, stage: Ints) -> Ints:
        """The partition of the original problem that one of the smaller problem stands for."""
        out = np.where(self.group >= 0, stage[self.group], 0)
        for g in np.flatnonzero(self.group < 0):  # in topological order: predecessors are done
            out[g] = max((out[p] for p in self.original.predecessors[g]), default=0)
        return out

    def lift_downsets(self, member: Bools, share: float) -> Bools:
        """Down-sets of the original problem from those of the smaller one.

        A group that was left out is in if it has to be, or if it may be and at least ``share`` of the groups
        that it exchanges values with (by transfer) are.
        """
        problem, values = self.original, self.original.values
        out = np.zeros((len(member), problem.n), dtype=bool)
        kept = self.group >= 0
        out[:, kept] = member[:, self.group[kept]]
        source, price = values.producer[values.owner], values.transfer[values.owner]
        for g in np.flatnonzero(~kept):
            after = problem.descendants[g].copy()
            after[g] = False
            may = out[:, problem.predecessors[g]].all(axis=1)
            near = np.zeros(problem.n)
            np.add.at(near, values.consumer[source == g], price[source == g])
            np.add.at(near, source[values.consumer == g], price[values.consumer == g])
            around = np.flatnonzero(near)
            likes = product(out[:, around], near[around]) >= share * near.sum() if len(around) else ~may
            out[:, g] = out[:, after].any(axis=1) | (may & likes)
        return out


def reduce_problem(problem: Problem) -> Reduced:
    """Apply all rules until none fits."""
    current = drop_slack_limits(problem)
    group = np.arange(problem.n)
    while True:
        smaller = _eliminate(current)
        smaller = _merge(smaller.problem, smaller.group)
        if smaller.problem.n == current.n:
            return Reduced(current, problem, group)
        group = np.where(group >= 0, smaller.group[group], -1)
        current = smaller.problem


def merge_dear(problem: Problem, wanted: float) -> Reduced:
    """Merge what cannot be in different stages if no load may exceed ``wanted``.

    A value whose transfer alone, or together with the least work of its producer (or of a consumer), is
    more than that keeps them in one stage. `Contradiction`: nothing is within ``wanted``.
    """
    values, owner = problem.values, problem.values.owner
    graph = nx.Graph()
    graph.add_nodes_from(range(problem.n))
    if problem.kind != "memory" and len(values):
        price = values.transfer[owner]
        source, target = values.producer[owner], values.consumer
        if problem.kind == "sum":
            least, _ = _work_range(problem)
            price = price + np.maximum(least[source], least[target])
        for e in np.flatnonzero(price > wanted * (1 + 1e-9)):
            graph.add_edge(int(source[e]), int(target[e]))
    label = np.empty(problem.n, dtype=np.int64)
    for i, part in enumerate(nx.connected_components(graph)):
        label[list(part)] = i
    return contract(problem, label)


def drop_slack_limits(problem: Problem) -> Problem:
    """Without the memory limits that even everything together does not reach."""
    if problem.kind == "memory" or not np.isfinite(problem.limits).any():
        return problem
    everything = float(problem.values.size.sum())
    limits = problem.limits.copy()
    for s in np.flatnonzero(np.isfinite(limits)):
        most = max(float(o.memory.sum()) + o.input_memory * everything for o in problem.options[s])
        if most <= limits[s]:
            limits[s] = np.inf
    return replace(problem, limits=limits)


def contract(problem: Problem, label: Ints) -> Reduced:
    """Merge groups of equal label, and whatever cycles that makes.

    A label of -1 leaves a group out, with the values it makes and needs: its predecessors precede its
    successors directly.

    Raises
    ------
    Contradiction
        Groups pinned to different stages end up as one.
    """
    if np.all(label >= 0) and len(np.unique(label)) == problem.n:
        return Reduced(problem, problem, np.arange(problem.n))
    graph = nx.DiGraph()
    graph.add_nodes_from(int(x) for x in np.unique(label[label >= 0]))
    successors = _successors_without(problem, label)
    graph.add_edges_from(
        (int(label[u]), int(label[v])) for u in range(problem.n) if label[u] >= 0 for v in successors[u]
    )
    part_of: dict[int, int] = {}
    for i, part in enumerate(nx.strongly_connected_components(graph)):
        part_of.update(dict.fromkeys(part, i))
    part = np.array([part_of[int(x)] if x >= 0 else -1 for x in label], dtype=np.int64)
    quotient = nx.DiGraph()
    first: dict[int, int] = {}
    for g in range(problem.n):
        if part[g] >= 0:
            first.setdefault(int(part[g]), g)
    quotient.add_nodes_from(first)
    quotient.add_edges_from(
        (int(part[u]), int(part[v]))
        for u in range(problem.n)
        if part[u] >= 0
        for v in successors[u]
        if part[u] != part[v]
    )
    order = list(nx.lexicographical_topological_sort(quotient, key=first.__getitem__))
    number = {c: i for i, c in enumerate(order)}
    group = np.array([number[int(c)] if c >= 0 else -1 for c in part], dtype=np.int64)
    n = len(order)
    kept = np.flatnonzero(group >= 0)

    def total(column: Floats) -> Floats:
        return np.bincount(group[kept], weights=column[kept], minlength=n).astype(np.float64)

    pinned = np.full(n, -1, dtype=np.int64)
    for g in np.flatnonzero(problem.pinned >= 0).tolist():
        if pinned[group[g]] not in (-1, problem.pinned[g]):
            raise Contradiction
        pinned[group[g]] = problem.pinned[g]
    made: dict[int, tuple[Option, ...]] = {}
    for options in problem.options:
        if id(options) not in made:
            made[id(options)] = tuple(replace(o, time=total(o.time), memory=total(o.memory)) for o in options)
    members: list[tuple[object, ...]] = [()] * n
    for g in kept.tolist():
        members[group[g]] += problem.members[g]
    values = problem.values
    smaller = replace(
        problem,
        predecessors=tuple(tuple(sorted(number[p] for p in quotient.predecessors(c))) for c in order),
        successors=tuple(tuple(sorted(number[s] for s in quotient.successors(c))) for c in order),
        options=tuple(made[id(options)] for options in problem.options),
        values=make_values(
            (
                int(group[values.producer[i]]),
                [int(c) for c in group[values.consumers(i)] if c >= 0],
                float(values.transfer[i]),
                float(values.size[i]),
                float(values.transfer[i] if values.far is None else values.far[i]),
            )
            for i in range(len(values))
            if group[values.producer[i]] >= 0
        ),
        pinned=pinned,
        members=tuple(members),
    )
    return Reduced(smaller, problem, group)


def _successors_without(problem: Problem, label: Ints) -> list[set[int]]:
    """Direct successors once the groups of label -1 are taken out of every path."""
    successors: list[set[int]] = [set() for _ in range(problem.n)]
    for u in range(problem.n - 1, -1, -1):
        for v in problem.successors[u]:
            if label[v] >= 0:
                successors[u].add(v)
            else:
                successors[u] |= successors[v]
    return successors


def _work_range(problem: Problem) -> tuple[Floats, Floats]:
    """Least and most work of every group over stages and options."""
    columns = [column for alike in problem.stage_types for column, _ in problem.work(alike[0])]
    return np.min(columns, axis=0), np.max(columns, axis=0)


def _weightless(problem: Problem) -> Bools:
    """Groups whose memory cannot matter."""
    free = np.ones(problem.n, dtype=bool)
    for alike in problem.stage_types:
        if problem.kind == "memory" or np.isfinite(problem.limits[alike[0]]):
            for option in problem.options[alike[0]]:
                free &= option.memory == 0
    return free & (problem.pinned < 0)


def _eliminate(problem: Problem) -> Reduced:
    """Take out groups that cost nothing and neither make nor need a value."""
    _, most = _work_range(problem)
    idle = (most == 0) & _weightless(problem)
    idle[problem.values.producer] = False
    idle[problem.values.consumer] = False
    if idle.all():
        idle[0] = False  # a problem keeps at least one group
    return contract(problem, np.where(idle, -1, np.arange(problem.n)))


def _merge(problem: Problem, group: Ints) -> Reduced:
    """One round of merging; every group takes part in one merger at most, so that rules stay valid."""
    _, most = _work_range(problem)
    free = _weightless(problem)
    values = problem.values
    made: list[list[int]] = [[] for _ in range(problem.n)]
    used: list[list[int]] = [[] for _ in range(problem.n)]
    for i, p in enumerate(values.producer):
        made[int(p)].append(i)
    for i, c in zip(values.owner, values.consumer, strict=True):
        used[int(c)].append(int(i))
    label = np.arange(problem.n)
    touched = np.zeros(problem.n, dtype=bool)
    below = problem.descendants
    for v in range(problem.n):
        if touched[v] or not free[v]:
            continue
        if problem.kind == "overlap" and most[v] > 0:
            continue
        for q in _leaders(problem, below, made, used, v):
            if not touched[q] and _harmless(problem, values, made, used, v, q, float(most[v])):
                label[v] = q
                around = [v, q, *(int(values.producer[i]) for i in used[v])]
                around += [int(c) for i in made[v] for c in values.consumers(i)]
                touched[around] = True
                break
    merged = contract(problem, label)
    return replace(merged, group=np.where(group >= 0, merged.group[group], -1))


def _leaders(
    problem: Problem, below: Bools, made: list[list[int]], used: list[list[int]], v: int
) -> list[int]:
    """Groups whose stage precedence lets v follow."""
    before, after = problem.predecessors[v], problem.successors[v]
    if not before and not after:
        values = problem.values
        around = {int(values.producer[i]) for i in used[v]}
        around |= {int(c) for i in made[v] for c in values.consumers(i)}
        return sorted(around)
    direct = [p for p in before if not any(below[p, o] for o in before if o != p)]
    leaders = direct if len(direct) == 1 else []
    direct = [s for s in after if not any(below[o, s] for o in after if o != s)]
    return leaders + (direct if len(direct) == 1 else [])


def _harmless(
    problem: Problem,
    values: Values,
    made: list[list[int]],
    used: list[list[int]],
    v: int,
    q: int,
    work: float,
) -> bool:
    """Whether moving v to the stage of q raises no load; see the module's text for the letters."""
    weights = [values.size] if problem.kind == "memory" else [values.transfer]
    if problem.kind != "memory" and np.isfinite(problem.limits).any():
        weights.append(values.size)
    for weight in weights:
        e = sum(weight[i] for i in made[q] if values.consumers(i).tolist() == [v])
        mine = [(values.consumers(i), weight[i]) for i in made[v]]
        to_q = sum(w for consumers, w in mine if q in consumers)
        s = sum(w for consumers, w in mine if any(c != q for c in consumers))
        r = sum(weight[i] for i in used[v] if values.producer[i] != q)
        if problem.kind == "sum" and weight is values.transfer:
            if work + r + s > to_q + e:
                return False
        elif r > to_q or s > e:
            return False
    return True

"""Topological orders worth cutting: each keeps another kind of neighbours together."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

import numpy as np

from .problem import Floats, Ints, Problem


def topological_order(
    problem: Problem, priority: Callable[[int, int], float], *, backwards: bool = False
) -> Ints:
    """Kahn's order; among ready groups the one of least ``priority(group, step it became ready)`` is next.
    ``backwards``: found from the outputs on."""
    before, after = problem.predecessors, problem.successors
    if backwards:
        before, after = after, before
    waiting = np.array([len(b) for b in before], dtype=np.int64)
    ready = [(priority(int(g), 0), int(g)) for g in np.flatnonzero(waiting == 0)]
    heapq.heapify(ready)
    order = np.empty(problem.n, dtype=np.int64)
    for step in range(problem.n):
        _, g = heapq.heappop(ready)
        order[step] = g
        for follower in after[g]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heapq.heappush(ready, (priority(follower, step + 1), follower))
    return order[::-1].copy() if backwards else order


def live_order(problem: Problem, jitter: Floats) -> Ints:
    """Greedy order that keeps little in flight: next is the group that adds least to the values crossing.

    ``jitter`` (one positive factor per group) varies it.
    """
    values = problem.values
    weight = values.transfer if problem.kind != "memory" and values.transfer.any() else values.size
    made: list[list[int]] = [[] for _ in range(problem.n)]
    needs: list[list[int]] = [[] for _ in range(problem.n)]
    for i, p in enumerate(values.producer):
        made[int(p)].append(i)
    for i, c in zip(values.owner, values.consumer, strict=True):
        needs[int(c)].append(int(i))
    users = np.diff(values.start)
    waiting = [len(p) for p in problem.predecessors]
    ready = [g for g, w in enumerate(waiting) if w == 0]
    added = [sum(float(weight[i]) for i in mine) for mine in made]

    def growth(g: int) -> float:
        freed = sum(float(weight[i]) for i in needs[g] if users[i] == 1)
        return (added[g] - freed) * float(jitter[g])

    heap = [(growth(g), g) for g in ready]
    heapq.heapify(heap)
    order = []
    while heap:
        score, g = heapq.heappop(heap)
        now = growth(g)
        if now < score - 1e-18:  # fewer users are left than when it was queued: it has become better
            heapq.heappush(heap, (now, g))
            continue
        order.append(g)
        for i in needs[g]:
            users[i] -= 1
        for follower in problem.successors[g]:
            waiting[follower] -= 1
            if waiting[follower] == 0:
                heapq.heappush(heap, (growth(follower), follower))
    return np.array(order, dtype=np.int64)


def good_orders(problem: Problem, seed: int) -> Iterator[Ints]:
    """Topological orders without end: the given one, depth and breadth first, little in flight, random."""
    yield np.arange(problem.n)  # groups are numbered in a topological order near the graph's own
    if problem.n == 1:
        return
    yield topological_order(problem, lambda g, step: -step)  # depth first: follow what just became ready
    yield topological_order(problem, lambda g, step: -step, backwards=True)
    yield live_order(problem, np.ones(problem.n))
    yield topological_order(problem, lambda g, step: step)  # breadth first
    yield topological_order(problem, lambda g, step: step, backwards=True)
    random = np.random.default_rng(seed)
    while True:
        noise = random.random(problem.n) * 4

        def nearly_depth_first(g: int, step: int, noise: Floats = noise) -> float:
            return float(noise[g]) - step

        yield topological_order(problem, nearly_depth_first)
        yield topological_order(problem, nearly_depth_first, backwards=True)
        yield live_order(problem, np.exp(random.normal(0, 0.5, problem.n)))

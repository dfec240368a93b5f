"""Local search: all boundaries step to neighbours at once, and the chain program picks the best combination.

Neighbours of a down-set are what it becomes when one group is added with everything before it, or taken
out with everything after it. The neighbours of all boundaries of the best partition form a family
(see `chains`), on which the best chain is found exactly; that repeats while it improves. Then boundaries are
shaken, two random steps each, and it starts again from there, until the clock expires.

Complexity per round: that of the chain program for at most (K - 1) times 2 n down-sets.
"""

from __future__ import annotations

import numpy as np

from .chains import ChainProgram, OutOfTime
from .clock import Clock
from .problem import Bools, Ints, Problem, product
from .state import State
from .windows import Windows

_NEIGHBOURS = 400  # per boundary


def local_search(state: State, windows: Windows, clock: Clock, seed: int, *, patience: int) -> None:
    """Improve a partition until it is optimal, time is up or ``patience`` rounds were in vain."""
    problem = state.problem
    if state.stage is None or problem.n_stages == 1:
        return
    random = np.random.default_rng(seed)
    shaken, in_vain = None, 0
    while in_vain < patience and not state.optimal and not clock.expired:
        start = state.stage if shaken is None else shaken
        member = neighbourhood(problem, boundaries(problem, start))
        try:
            found = ChainProgram(problem, windows, member).solve(state.load * (1 - 1e-9), clock)
        except OutOfTime:
            return
        if found is not None and state.offer(found[1], "search"):
            shaken, in_vain = None, 0
        else:
            in_vain += 1
            shaken = shake(problem, state.stage, random)


def boundaries(problem: Problem, stage: Ints) -> Bools:
    """The down-sets between the stages of a partition; shape (K - 1, n)."""
    return stage[None, :] < np.arange(1, problem.n_stages)[:, None]


def neighbourhood(problem: Problem, member: Bools) -> Bools:
    """Some down-sets and their neighbours, each once."""
    below = problem.descendants
    work = np.max([c for alike in problem.stage_types for c, _ in problem.work(alike[0])], axis=0)
    family = [member]
    for inside in member:
        # Row g of below.T is what must not come after g. Groups far away in order would bring too much along.
        larger = inside[None, :] | below.T[np.flatnonzero(~inside)[: 2 * _NEIGHBOURS]]
        smaller = inside[None, :] & ~below[np.flatnonzero(inside)[-2 * _NEIGHBOURS :]]
        near = np.concatenate([larger, smaller])
        if len(near) > _NEIGHBOURS:
            step = np.abs(product(near, work) - inside @ work)
            near = near[np.argpartition(step, _NEIGHBOURS)[:_NEIGHBOURS]]
        family.append(near)
    return distinct(np.concatenate(family))


def distinct(member: Bools) -> Bools:
    """Every down-set once."""
    packed = np.packbits(member, axis=1)
    rows = np.unique(np.ascontiguousarray(packed).view(f"V{packed.shape[1]}").ravel())
    found = np.frombuffer(rows.tobytes(), dtype=np.uint8).reshape(len(rows), -1)
    return np.unpackbits(found, axis=1, count=member.shape[1]).astype(bool)


def shake(problem: Problem, stage: Ints, random: np.random.Generator) -> Ints:
    """A partition some random steps away."""
    stage = stage.copy()
    below = problem.descendants
    for _ in range(int(random.integers(1, 4))):
        g = int(random.integers(problem.n))
        if random.random() < 0.5 and stage[g] > 0:
            to = int(stage[g]) - 1
            stage[below[:, g] & (stage > to)] = to
        elif stage[g] < problem.n_stages - 1:
            to = int(stage[g]) + 1
            stage[below[g] & (stage < to)] = to
    return stage

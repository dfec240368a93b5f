"""Lower bounds on the slowest stage's load that hold for every partition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .problem import Floats, Problem


@dataclass(frozen=True)
class Bound:
    """A lower bound and where it comes from."""

    value: float
    kind: str  # "group": one group alone; "balance": all stages' work together; others name their engine
    group: int = -1  # the group, for kind "group"


def stage_work(problem: Problem) -> tuple[Floats, Floats]:
    """Least work of every group on every stage, and least fixed time of every stage.

    Returns
    -------
    work : array, shape (K, n)
        inf where the group may not be on the stage: pinned elsewhere, or over the memory limit by itself.
    fixed : array, shape (K,)
        0 for stages that may be empty.
    """
    k, n = problem.n_stages, problem.n
    work, fixed = np.empty((k, n)), np.zeros(k)
    for stages in problem.stage_types:
        s = stages[0]
        per_option = []
        for option, (column, _) in zip(problem.options[s], problem.work(s), strict=True):
            fits = problem.kind == "memory" or np.isinf(problem.limits[s])
            allowed = np.full(n, True) if fits else option.memory <= problem.limits[s] * (1 + 1e-9)
            per_option.append(np.where(allowed, column, np.inf))
        work[stages] = np.min(per_option, axis=0)
        if not problem.allow_empty:
            fixed[stages] = min(extra for _, extra in problem.work(s))
    pinned = np.flatnonzero(problem.pinned >= 0)
    for g in pinned:
        elsewhere = np.arange(k) != problem.pinned[g]
        work[elsewhere, g] = np.inf
    return work, fixed


def group_bound(work: Floats, fixed: Floats) -> Bound:
    """The heaviest group on the stage that suits it best."""
    alone = np.min(work + fixed[:, None], axis=0)
    g = int(np.argmax(alone))
    return Bound(float(alone[g]), "group", g)


def balance_bound(work: Floats, fixed: Floats) -> Bound:
    """What no distribution of the work over the stages can beat, precedence and traffic left out.

    For weights ``w >= 0`` of the stages, ``max load * sum w >= sum_k w_k load_k >= sum_v min_k w_k c_k(v)
    + sum_k w_k fixed_k``. Any weights give a valid bound; see `balance_weights` for good ones. With stages
    alike it is total / K.
    """
    if np.any(np.all(np.isinf(work), axis=0)):
        return Bound(np.inf, "balance")
    weights = balance_weights(work, fixed)
    total = float(np.min(weights[:, None] * work, axis=0).sum() + weights @ fixed)
    return Bound(total / float(weights.sum()), "balance")


def balance_weights(work: Floats, fixed: Floats, *, rounds: int = 150) -> Floats:
    """Positive weights of the stages for which the bound of `balance_bound` is high.

    The best ones solve the dual of scheduling on unrelated machines (Lenstra, Shmoys, Tardos, Math.
    Programming 46, 1990); multiplicative updates approach them: a stage that would be given too much
    becomes dearer.

    Parameters
    ----------
    work : array, shape (K, n)
        inf where a group may not be; groups that may be nowhere are left out.
    fixed : array, shape (K,)
    """
    kinds: dict[tuple[bytes, float], int] = {}
    inverse = np.array(
        [kinds.setdefault((w.tobytes(), f), len(kinds)) for w, f in zip(work, fixed, strict=True)]
    )
    if len(kinds) == 1:
        return np.ones(len(work))
    size = np.bincount(inverse).astype(np.float64)
    first = np.unique(inverse, return_index=True)[1]
    cost, extra = work[first], fixed[first]
    cost = cost[:, np.isfinite(cost).any(axis=0)]
    columns = np.arange(cost.shape[1])
    weight = best_weight = np.ones(len(kinds))
    best, step = -1.0, 0.5
    for _ in range(rounds):
        chosen = np.argmin(weight[:, None] * cost, axis=0)
        taken = cost[chosen, columns]
        total = float((weight[chosen] * taken).sum() + (size * weight * extra).sum())
        bound = total / float((size * weight).sum())
        if bound > best:
            best, best_weight = bound, weight
        load = np.bincount(chosen, weights=taken, minlength=len(kinds)) / size + extra
        weight = weight * np.exp(step * (load / max(bound, 1e-300) - 1).clip(-1, 1))
        weight = np.maximum(weight / weight.max(), 1e-6)
        step *= 0.97
    expanded: Floats = best_weight[inverse]
    return expanded


def simple_bound(problem: Problem) -> Bound:
    """The better of `group_bound` and `balance_bound`."""
    if problem.n == 0:
        return Bound(0.0, "balance")
    work, fixed = stage_work(problem)
    return max(group_bound(work, fixed), balance_bound(work, fixed), key=lambda b: b.value)

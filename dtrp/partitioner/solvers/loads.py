"""What a partition costs: the definition that every engine's tables must agree with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .problem import Floats, Ints, Problem

# Sums of the same numbers in another order differ in the last bits; a limit met up to that is met.
MEMORY_SLACK = 1e-9


@dataclass(frozen=True, eq=False)
class Loads:
    """Per stage: the load, what it is made of, and the option chosen (-1: none fits the limit)."""

    load: Floats
    compute: Floats
    time_in: Floats
    time_out: Floats
    memory: Floats
    option: Ints

    @property
    def max_load(self) -> float:
        """The objective; inf if a stage fits its memory with no option."""
        return float(self.load.max()) if len(self.load) else 0.0


def traffic(
    problem: Problem, stage: Ints, weight: Floats, far: Floats | None = None, node_of: Ints | None = None
) -> tuple[Floats, Floats]:
    """What each stage receives and sends: every value once per receiving stage, and once by its sender.

    ``node_of``: the node of each stage; between two of them a value weighs ``far``.
    """
    values, k = problem.values, problem.n_stages
    received, sent = np.zeros(k), np.zeros(k)
    if len(values) == 0:
        return received, sent
    owner = values.owner
    source, target = stage[values.producer[owner]], stage[values.consumer]
    crossing = source != target
    pairs = np.unique(owner[crossing] * k + target[crossing])  # a value counts once per receiving stage
    value, receiver = pairs // k, pairs % k
    sender = stage[values.producer[value]]
    price = weight[value]
    if node_of is not None and far is not None:
        price = np.where(node_of[sender] != node_of[receiver], far[value], price)
    np.add.at(received, receiver, price)
    dearest = np.zeros(len(values))
    np.maximum.at(dearest, value, price)
    np.add.at(sent, stage[values.producer], dearest)
    return received, sent


def option_loads(
    problem: Problem,
    stage: int,
    time: Sequence[Floats],
    memory: Sequence[Floats],
    time_in: Floats,
    time_out: Floats,
    bytes_in: Floats,
) -> list[Floats]:
    """Load of one stage with each of its options, for many node sets at once; inf where memory is short.

    ``time[o]`` (with the fixed part) and ``memory[o]`` (without inputs) are those of option ``o``; all
    arrays have one shape.
    """
    limit = problem.limits[stage]
    loads = []
    for option, seconds, held in zip(problem.options[stage], time, memory, strict=True):
        need = held + option.input_memory * bytes_in if option.input_memory else held
        if problem.kind == "memory":
            load = need / limit
        else:
            arrives, leaves = time_in * option.share, time_out * option.share
            if problem.kind == "overlap":
                load = np.maximum(np.maximum(arrives, leaves), seconds)
            else:
                load = arrives + leaves + seconds
            if np.isfinite(limit):
                load = np.where(need <= limit * (1 + MEMORY_SLACK), load, np.inf)
        loads.append(load)
    return loads


def evaluate(problem: Problem, stage: Ints, node_of: Ints | None = None) -> Loads:
    """Loads of a partition, with the best option per stage that fits its memory limit.

    Parameters
    ----------
    problem : Problem
    stage : array of int, shape (n,)
        Stage of every group.
    node_of : array of int, shape (n_stages,), optional
        Node of every stage; default: all are in one.

    Returns
    -------
    Loads
        ``load`` is inf, and ``option`` -1, for a stage that does not fit its limit; ``memory`` is then that
        of its smallest option. An empty stage has load 0. Among options of equal load, the one that
        computes less is chosen, then the first.
    """
    k = problem.n_stages
    bytes_in, _ = traffic(problem, stage, problem.values.size)
    time_in, time_out = traffic(problem, stage, problem.values.transfer, problem.values.far, node_of)
    load, compute, memory = np.zeros(k), np.zeros(k), np.zeros(k)
    chosen = np.zeros(k, dtype=np.int64)
    for s in range(k):
        mine = stage == s
        if not mine.any():
            continue
        options = problem.options[s]
        time = [o.time[mine].sum(keepdims=True) + o.fixed_time for o in options]
        held = [o.memory[mine].sum(keepdims=True) for o in options]
        loads = option_loads(problem, s, time, held, time_in[[s]], time_out[[s]], bytes_in[[s]])
        need = [float(m[0]) + o.input_memory * float(bytes_in[s]) for m, o in zip(held, options, strict=True)]
        best, seconds, i = min(
            (float(x[0]), float(t[0]), i) for i, (x, t) in enumerate(zip(loads, time, strict=True))
        )
        if np.isinf(best):
            i = int(np.argmin(need))
            seconds = float(time[i][0])
        load[s], compute[s], memory[s] = best, seconds, need[i]
        time_in[s], time_out[s] = time_in[s] * options[i].share, time_out[s] * options[i].share
        chosen[s] = -1 if np.isinf(best) else i
    return Loads(load, compute, time_in, time_out, memory, chosen)

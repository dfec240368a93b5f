"""All down-sets of a problem's precedence that can be a boundary of a good partition.

Groups are decided one by one in topological order: left out (then all that descends from them is out as
well) or taken in. Every partial decision extends to a down-set, so there are never more of them than
down-sets in the end, and one that can no longer become a boundary within the wanted load is dropped on the
way: what it has taken in is already too much for the stages before, or what it has left out too much for
those after. Near the best load that leaves a small part of the lattice.

Complexity: O(n * N) bit operations on machine words for N partial decisions; N is exponential in the
graph's width in the worst case and about n for chains of blocks, hence the cap.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .clock import Clock
from .problem import Bools, Problem
from .windows import Windows

Bytes = NDArray[np.uint8]


def enumerate_downsets(
    problem: Problem, windows: Windows, wanted: float, *, cap: int, clock: Clock
) -> Bools | None:
    """Every down-set that `Windows` admits to some boundary at a load of ``wanted``, and maybe some more.

    Returns
    -------
    array of bool, shape (N, n), or None
        Rows are distinct. None: more than ``cap`` partial decisions, or out of time.
    """
    n = problem.n
    below = np.packbits(problem.descendants, axis=1)
    width = below.shape[1]
    taken = np.zeros((1024, width), dtype=np.uint8)
    barred = np.zeros((1024, width), dtype=np.uint8)
    count, kept = 1, 1
    for step in range(n):
        byte, bit = step >> 3, np.uint8(0x80 >> (step & 7))
        free = np.flatnonzero((barred[:count, byte] & bit) == 0)
        more = len(free)
        if count + more > cap or clock.expired:
            return None
        if count + more > len(taken):
            taken = np.concatenate([taken, np.zeros((max(more, len(taken)), width), dtype=np.uint8)])
            barred = np.concatenate([barred, np.zeros((len(taken) - len(barred), width), dtype=np.uint8)])
        new = slice(count, count + more)
        taken[new], barred[new] = taken[free], barred[free]
        taken[new, byte] |= bit
        barred[free] |= below[step]
        count += more
        if count > 1.5 * kept + 64 or step == n - 1:
            keep = promising(problem, windows, taken[:count], barred[:count], wanted)
            kept = int(keep.sum())
            if kept < count:
                taken[:kept], barred[:kept] = taken[:count][keep], barred[:count][keep]
                count = kept

    return np.unpackbits(taken[:count], axis=1, count=n).astype(bool)


def promising(problem: Problem, windows: Windows, taken: Bytes, barred: Bytes, wanted: float) -> Bools:
    """Whether a partial decision can still become a boundary."""
    keep = np.zeros(len(taken), dtype=bool)
    step = max(1, (1 << 24) // problem.n)
    for i in range(0, len(taken), step):
        inside = np.unpackbits(taken[i : i + step], axis=1, count=problem.n).astype(bool)
        outside = np.unpackbits(barred[i : i + step], axis=1, count=problem.n).astype(bool)
        keep[i : i + step] = windows.reachable(inside, outside, wanted).any(axis=0)
    return keep

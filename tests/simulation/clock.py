"""A slow clock: each time by its definition, one action after the other. No code of the engine's."""

from __future__ import annotations

from dataclasses import dataclass, field

from dtrp.schedule import Schedule


@dataclass
class Line:
    """Messages of one kind from one stage to another."""

    source: int
    target: int
    kind: str  # after which it is sent, and before which it is needed
    seconds: float
    latency: float
    places: int
    arrives: list[float] = field(default_factory=list)
    taken: list[float] = field(default_factory=list)
    free: float = 0.0


def naive(
    schedule: Schedule, seconds: list[dict[str, float]], lines: list[Line], batches: int, overlaps: bool
) -> list[list[float]]:
    """When each stage has stepped after each mini-batch."""
    parts = schedule.parts
    segments = batches if schedule.exact else 1
    slots = parts if schedule.exact else parts * batches
    todo = [
        [(a.kind, a.slot) for _ in range(segments) for a in schedule.actions(k, slots)]
        for k in range(schedule.n_stages)
    ]
    now = [0.0] * schedule.n_stages
    computed = [False] * schedule.n_stages
    steps: list[list[float]] = [[] for _ in now]
    while any(todo):
        moved = False
        for k, actions in enumerate(todo):
            if not actions:
                continue
            kind, slot = actions[0]
            if not computed[k]:
                needed = [x for x in lines if x.target == k and x.kind == kind]
                if any(len(x.taken) == len(x.arrives) for x in needed):
                    continue
                now[k] = max([now[k], *(x.arrives[len(x.taken)] for x in needed)])
                now[k] += 0.0 if overlaps else sum(x.seconds for x in needed)
                for x in needed:
                    x.taken.append(now[k])
                if kind != "step" or slot % parts == parts - 1:
                    now[k] += seconds[k][kind]
                computed[k] = moved = True
            made = [x for x in lines if x.source == k and x.kind == kind]
            if any(len(x.arrives) - len(x.taken) == x.places for x in made):
                continue
            now[k] = max(
                [now[k], *(x.taken[len(x.arrives) - x.places] for x in made if len(x.arrives) >= x.places)]
            )
            now[k] += 0.0 if overlaps else sum(x.seconds for x in made)
            for x in made:
                x.free = max(x.free, now[k]) + x.seconds if overlaps else now[k]
                x.arrives.append(x.free + x.latency)
            actions.pop(0)
            computed[k], moved = False, True
            if kind == "step" and slot % parts == parts - 1:
                steps[k].append(now[k])
        assert moved, "a circle of waits"
    return steps

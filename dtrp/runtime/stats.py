"""What a stage measures of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

WORK = ("forward", "recompute", "backward", "step", "send", "receive")
"""Kinds of work. Besides, a stage waits for others, and ``loop`` is all else; a loss is part of a forward."""


@dataclass(frozen=True)
class StageStats:
    """One stage's measurements since training began (`Trainer.stats`).

    Attributes
    ----------
    stage, device
        Which, and where.
    ticks : int
        Ticks so far, filling and draining included.
    tick_time : float
        Seconds of work (passes, update, sending) per tick in which there was any. On CUDA the device's
        time of the passes and updates.
    busy : float
        Work as a share of the time since the first tick, 0 to 1.
    wait_time : float
        Seconds per tick spent waiting for values of other stages.
    peak_memory : int
        Bytes. CUDA: the most that the stage's process had allocated on its device. CPU: the most that its
        process held resident, the interpreter and torch included; inline, all stages share one process.
    queue_depth : float
        Messages that had arrived and waited when a tick began, on average.
    most_stashed, most_graphs : int
        The most batches whose inputs, and the most autograd graphs, that were held at once.
    seconds, counts : mapping
        By kind (`WORK`; ``wait`` for other stages; ``loop``, all else in a tick; ``loss``, a part of the last
        stage's ``forward``, on the CPU): seconds so far, and how often.
    cpu_time : float
        Seconds of processor time that its ticks took so far.
    memory_before : int
        Bytes that the process held before the stage was there (CUDA: 0).
    """

    stage: int
    device: str
    ticks: int
    tick_time: float
    busy: float
    wait_time: float
    peak_memory: int
    queue_depth: float
    most_stashed: int
    most_graphs: int
    seconds: Mapping[str, float]
    counts: Mapping[str, int]
    cpu_time: float
    memory_before: int

    def mean(self, kind: str) -> float:
        """Seconds of one piece of work of a kind."""
        return self.seconds.get(kind, 0.0) / max(1, self.counts.get(kind, 0))

    def since(self, earlier: StageStats) -> StageStats:
        """What was done after ``earlier``: of the fields that only grow, the difference."""
        return replace(
            self,
            ticks=self.ticks - earlier.ticks,
            seconds={k: v - earlier.seconds.get(k, 0.0) for k, v in self.seconds.items()},
            counts={k: n - earlier.counts.get(k, 0) for k, n in self.counts.items()},
            cpu_time=self.cpu_time - earlier.cpu_time,
        )


def balance(stats: list[StageStats]) -> float:
    """Mean over slowest of the stages' tick times: 1 is perfect (0 before the first tick)."""
    slowest = max((s.tick_time for s in stats), default=0.0)
    return sum(s.tick_time for s in stats) / len(stats) / slowest if slowest > 0 else 0.0

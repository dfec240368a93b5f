"""Batch compensation: consecutive batches travel as one (the DTRP paper names it; the rule is ours).

Small batches leave a device idle and pay the price of a tick, and of the delay, once per batch. With m
batches joined along their first dimension there are m times fewer ticks, and one update where there were m,
with the learning rate scaled as Goyal et al. (2017) do for large batches: linearly, warmed up.

    update u over c batches:  lr * (1 + (c - 1) * min(1, (u + 1) / warmup))

- The joint loss is a mean over all samples; it is reported for each of the c batches, in order.
- A group is closed early by a flush (the end of an epoch, evaluation, saving), or by a batch whose samples
  have another shape: then c < m, and the scale is that of c.
- A scheduler that steps per update takes c steps, so that a schedule written for single batches keeps its
  length in epochs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .batch import Update

log = logging.getLogger("dtrp")

WARMUP = 100  # updates

GAIN = 1.05  # a larger group must raise the throughput by this much to be taken
MOST = 32  # batches
TRIAL = 12  # joint batches that are timed per size


@dataclass(frozen=True)
class Joint:
    """Batches that travel as one."""

    tensors: tuple[Tensor, ...]
    target: Any
    update: Update


class Joiner:
    """Gathers batches until they are ``size``."""

    def __init__(self, size: int, warmup: int = WARMUP) -> None:
        self.size, self.warmup = size, warmup
        self.updates = 0
        self._waiting: list[tuple[tuple[Tensor, ...], Any]] = []

    def __len__(self) -> int:
        """Batches that wait for others."""
        return len(self._waiting)

    def add(self, tensors: Sequence[Tensor], target: Any) -> Joint | None:
        """Take in a batch; the joint batch that is ready now, if there is one."""
        batch = (tuple(tensors), target)
        if self._waiting and _form(batch) != _form(self._waiting[0]):
            joint = self.rest()
            self._waiting.append(batch)
            return joint
        self._waiting.append(batch)
        return self.rest() if len(self._waiting) >= self.size else None

    def rest(self) -> Joint | None:
        """What waits, as a smaller joint batch."""
        if not self._waiting:
            return None
        count = len(self._waiting)
        tensors, target = self._waiting[0] if count == 1 else _joined(self._waiting)
        self._waiting = []
        ramp = min(1.0, (self.updates + 1) / self.warmup)
        self.updates += 1
        return Joint(tensors, target, Update(1.0 + (count - 1) * ramp, count))


def _form(batch: Any) -> list[Any]:
    """What must agree for batches to be joined: all of a tensor but its first dimension, and other values."""
    leaves, spec = pytree.tree_flatten(batch)
    return [
        spec,
        *((v.shape[1:], v.dtype, v.device, v.dim()) if isinstance(v, Tensor) else v for v in leaves),
    ]


def _joined(batches: list[tuple[tuple[Tensor, ...], Any]]) -> tuple[tuple[Tensor, ...], Any]:
    """Tensors one after the other along their first dimension.

    Raises
    ------
    ValueError
        A tensor has no dimension along which to join, and differs between the batches.
    """
    flat = [pytree.tree_flatten(batch) for batch in batches]
    leaves = [_join([leaves[i] for leaves, _ in flat]) for i in range(len(flat[0][0]))]
    made: tuple[tuple[Tensor, ...], Any] = pytree.tree_unflatten(leaves, flat[0][1])
    return made


def _join(values: list[Any]) -> Any:
    first = values[0]
    if not isinstance(first, Tensor):
        return first
    if first.dim() > 0:
        return torch.cat(values)
    if all(torch.equal(first, v) for v in values):
        return first
    raise ValueError(
        "batch_compensation joins batches along their first dimension, but a tensor without dimensions "
        "differs between them; give it a batch dimension, or use batch_compensation=1"
    )


def check_compensation(size: Any, warmup: Any) -> None:
    """Refuse a size that is neither a count nor ``"auto"``, and a warm-up that is no count.

    Raises
    ------
    ValueError, TypeError
    """
    for name, value, others in (
        ("batch_compensation", size, " or 'auto'"),
        ("compensation_warmup", warmup, ""),
    ):
        if others and value == "auto":
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}: expected an int >= 1{others}")
        if value < 1:
            raise ValueError(f"{name}={value!r}: expected an int >= 1{others}")


@dataclass
class _Trial:
    """One size's measurement."""

    size: int
    seconds: float = 0.0
    samples: int = 0
    joints: int = 0

    @property
    def throughput(self) -> float:
        return self.samples / self.seconds if self.seconds > 0 else 0.0


class Tuner:
    """Finds the size for ``"auto"`` while training: doubles it for as long as that pays and fits.

    Each size trains `TRIAL` joint batches from an empty pipeline to an empty pipeline, after one such
    batch that warms caches and allocators up. The first size that raises the throughput by less than
    `GAIN`, or would exceed a stage's memory limit, ends the search; the best so far is kept.

    Parameters
    ----------
    limits : sequence of (int or None)
        Bytes that each stage may use; ``None``: no limit.
    """

    def __init__(self, limits: Sequence[int | None]) -> None:
        self.limits = limits
        self.best: _Trial | None = None
        self.trial = _Trial(1)
        self.why = ""
        self._warm = False
        self._started = 0.0
        self._memory: list[tuple[int, list[int]]] = []

    @property
    def size(self) -> int:
        """To be used now."""
        return self.trial.size

    def warmed_up(self) -> None:
        """The first joint batch of this size is through."""
        self._warm = True
        self._started = time.perf_counter()

    def entered(self, samples: int) -> Literal["go on", "warm up", "measure"]:
        """A joint batch went in: whether to drain the pipeline now, and what for."""
        if not self._warm:
            return "warm up"
        self.trial.joints += 1
        self.trial.samples += samples
        return "measure" if self.trial.joints >= TRIAL else "go on"

    def interrupted(self) -> None:
        """The pipeline was drained for another reason: measure this size again."""
        self.trial = _Trial(self.trial.size)
        self._warm = False

    def measured(self, peaks: Sequence[int]) -> bool:
        """The pipeline is empty again; whether the search is over."""
        trial = self.trial
        trial.seconds = time.perf_counter() - self._started
        self._memory.append((trial.size, list(peaks)))
        best = self.best
        log.info("batch compensation: %d batch(es) at once give %.1f samples/s", trial.size, trial.throughput)
        if best is not None and trial.throughput < GAIN * best.throughput:
            self.why = f"{trial.size} at once gave {trial.throughput:.1f} samples/s"
            return self._end()
        self.best = trial
        following = 2 * trial.size
        if following > MOST:
            self.why = f"larger sizes are not tried than {MOST}"
            return self._end()
        if (stage := self._too_large(following)) is not None:
            self.why = f"{following} at once would exceed the memory limit of stage {stage}"
            return self._end()
        self.trial, self._warm = _Trial(following), False
        return False

    def _too_large(self, size: int) -> int | None:
        """A stage whose peak, continued in a straight line, would exceed its limit."""
        if len(self._memory) < 2:
            (at, now), slope = self._memory[-1], [0.0] * len(self.limits)
        else:
            (before, then), (at, now) = self._memory[-2:]
            slope = [(b - a) / (at - before) for a, b in zip(then, now, strict=True)]
        for k, limit in enumerate(self.limits):
            if limit is not None and now[k] + slope[k] * (size - at) > limit:
                return k
        return None

    def _end(self) -> bool:
        assert self.best is not None
        self.trial = self.best
        log.warning(
            "batch compensation: %d batch(es) travel as one (%.1f samples/s); %s",
            self.best.size,
            self.best.throughput,
            self.why,
        )
        return True

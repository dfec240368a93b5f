"""Random numbers of a pass: a function of (seed, batch, stage), so that every executor draws the same.

A stage reseeds the generators before each pass over a batch that may draw (its program says so). The
recompute pass of a batch therefore draws the same dropout masks as its first forward without any stored
state, stages that share a process do not draw each other's masks, and a resumed run goes on as it would have.
Where stages run in the caller's process, its generators are put back (`preserved`).

With one stage there is nothing to repeat: the ambient generators are used as they are, and training is the
plain PyTorch loop.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from .. import accelerators


def pass_seed(seed: int, batch: int, stage: int, part: int = 0) -> int:
    """The 63-bit seed of a stage's passes over micro-batch ``part`` of batch ``batch`` (all from 0)."""
    entropy = (seed % 2**64, batch, stage, part) if part else (seed % 2**64, batch, stage)
    state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def seed_all(seed: int, device: torch.device) -> None:
    """Start torch's (CPU and ``device``), numpy's and Python's generators from ``seed``."""
    torch.default_generator.manual_seed(seed)
    if accelerators.is_one(device):
        accelerators.seed(device, seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def preserved(devices: Iterable[torch.device]) -> Iterator[None]:
    """All generators are as before afterwards."""
    python, numpy_state, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    states = [(d, accelerators.random_state(d)) for d in devices if accelerators.is_one(d)]
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        for device, state in states:
            accelerators.set_random_state(device, state)
        random.setstate(python)
        np.random.set_state(numpy_state)


def random_state() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators, as plain values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": accelerators.random_states(),
        "python": (version, internal, gauss),
        "numpy": (str(name), [int(k) for k in keys], int(position), int(has_gauss), float(cached)),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators to what `random_state` gave; accelerators' only where they are as many."""
    torch.set_rng_state(state["torch"])
    accelerators.set_random_states(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])

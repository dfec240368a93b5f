"""Random numbers of a pass: a function of (seed, batch, stage), so that every executor draws the same.

A stage reseeds the generators before each pass over a batch and puts them back afterwards. The recompute
pass of a batch therefore draws the same dropout masks as its first forward without any stored state, stages
that share a process do not draw each other's masks, and a resumed run goes on as it would have.

With one stage there is nothing to repeat: the ambient generators are used as they are, and training is the
plain PyTorch loop.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch


def pass_seed(seed: int, batch: int, stage: int) -> int:
    """The 63-bit seed of stage ``stage``'s passes over batch ``batch`` (both from 0)."""
    state = np.random.SeedSequence((seed % 2**64, batch, stage)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Inside, torch's (CPU and ``device``), numpy's and Python's generators start from ``seed``.

    Outside they are as before. ``None``: nothing is touched.
    """
    if seed is None:
        yield
        return
    python, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    fork: Any = torch.random.fork_rng(devices=devices) if devices else nullcontext()
    cpu = torch.get_rng_state()
    try:
        with fork:
            torch.default_generator.manual_seed(seed)
            if devices:
                torch.cuda.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy_state)


def random_state() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators, as plain values."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if _cuda_is_used() else [],
        "python": (version, internal, gauss),
        "numpy": (str(name), [int(k) for k in keys], int(position), int(has_gauss), float(cached)),
    }


def _cuda_is_used() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the generators to what `random_state` gave; CUDA's only where the devices are as many."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])

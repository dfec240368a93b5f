"""What the runtime itself costs on this machine's CPU, which planning has to add to what stages compute.

Measured once and then read from the cache, as the device's own figures are: two stages with next to
nothing to compute run for a fraction of a second, and messages go over a line of shared memory.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from .exclusive import EXCLUSIVE
from .partitioner.calibration import identity, read_cache, using_threads, write_cache
from .partitioner.compiler import Request
from .partitioner.devices import LoopCost
from .partitioner.links import Links
from .pipeline import Pipeline
from .runtime.links import Channel, Message
from .runtime.shared import SharedLinks, open_line

_TICKS, _WINDOWS, _MESSAGES = 15, 4, 30
_WIDTH = 8
_LARGE = 8 * 2**20  # bytes, of a message whose length counts


@functools.cache
def loop_cost() -> LoopCost:
    """Of stages on the CPU, one thread each."""
    key = identity(torch.device("cpu"), 1)
    cached = read_cache("loop", key)
    if cached is not None:
        with contextlib.suppress(TypeError, ValueError):
            return LoopCost(**{name: float(value) for name, value in cached.items()})
    with EXCLUSIVE, torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), using_threads(1):
        cost = _measure()
    write_cache("loop", key, cost._asdict())
    return cost


def _measure() -> LoopCost:
    small, large = _transfer(64), _transfer(_LARGE)
    return LoopCost(_tick(), small, _LARGE / max(large - small, 1e-9))


def _tick() -> float:
    """Processor seconds per stage and tick in which nothing much is computed."""
    layers = [nn.Linear(_WIDTH, _WIDTH, device="meta", dtype=torch.float32) for _ in range(2)]
    for layer in layers:  # no random number is drawn
        layer.to_empty(device="cpu")
        for p in layer.parameters():
            nn.init.zeros_(p)
    request = Request((torch.device("cpu"),) * 2, None, True, "analytic", Links(), None)
    pipe = Pipeline(nn.Sequential(*layers), request)
    x = torch.zeros(1, _WIDTH, dtype=torch.float32)
    optimizer = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    with pipe.trainer(nn.functional.mse_loss, optimizer, executor="inline", seed=0, threads=1) as trainer:
        looks = []
        for _ in range(_WINDOWS + 1):  # the first warms up
            for _ in range(_TICKS):
                trainer.step(x, x)
            looks.append(trainer.stats)
    spent = ([s.since(b) for s, b in zip(now, then, strict=True)] for then, now in itertools.pairwise(looks))
    return min(statistics.mean(s.cpu_time / s.ticks for s in window) for window in spent)


def _transfer(n_bytes: int) -> float:
    """Processor seconds that a message takes on either side."""
    line = open_line(0, 1)
    ours = line._replace(memory=os.dup(line.memory))
    sender, receiver = SharedLinks(0, [ours]), SharedLinks(1, [line])
    channel, payload = Channel("forward", 0, 1), torch.zeros(n_bytes, dtype=torch.uint8)

    def there() -> None:
        sender.send(channel, Message(0, [payload]))
        receiver.take(channel)

    try:
        return _median(there) / 2
    finally:
        sender.close()
        receiver.close()


def _median(function: Callable[[], None]) -> float:
    function()
    seconds = []
    for _ in range(_MESSAGES):
        start = time.thread_time()
        function()
        seconds.append(time.thread_time() - start)
    return statistics.median(seconds)

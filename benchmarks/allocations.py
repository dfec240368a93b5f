"""Peak memory of each stage on the CPU, from every allocation and release that torch's profiler sees.

The stages run inline, so that one process makes all allocations; each belongs to the stage that was running
when it was made, until it is released. What a stage gets from another is copied on arrival, as it is between
processes, and a value on its way belongs to nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils import _pytree as pytree

from dtrp.runtime.links import QueueLinks
from dtrp.runtime.ports import Ports
from dtrp.runtime.stage import Stage
from dtrp.wiring import CALLER

_OWNER = "owner "
_NOBODY = -1


def peaks(train: Callable[[], Sequence[Stage]]) -> list[int]:
    """Bytes that each stage had allocated at its fullest moment while ``train`` ran, weights included.

    ``train`` runs an inline trainer from its first batch on, and gives its stages.
    """
    patches = (
        (Stage, "run", _owned),
        (Stage, "drain", _owned),
        (Ports, "arrivals", _arrivals),
        (QueueLinks, "send", _send),
        (QueueLinks, "take", _take),
    )
    with ExitStack() as stack:
        for of, method, wrap in patches:
            stack.enter_context(mock.patch.object(of, method, wrap(getattr(of, method))))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            stages = train()
    owner: dict[int, int] = {}
    now = [_weights(stage) for stage in stages]
    most = list(now)
    for stage, pointer, size in sorted_allocations(profiler):
        if size > 0:
            owner[pointer] = stage
        else:
            stage = owner.pop(pointer, _NOBODY)
        if stage != _NOBODY:
            now[stage] += size
            most[stage] = max(most[stage], now[stage])
    return most


def sorted_allocations(profiler: Any) -> list[tuple[int, int, int]]:
    """Stage, address and bytes (negative: released) of each, in time order."""

    def walk(events: Sequence[Any], stage: int) -> Iterator[tuple[int, int, int, int]]:
        for event in events:
            if event.name == "[memory]":
                yield event.start_time_ns, stage, event.extra_fields.ptr, event.extra_fields.alloc_size
            inside = int(event.name.removeprefix(_OWNER)) if event.name.startswith(_OWNER) else stage
            yield from walk(event.children, inside)

    found = walk(profiler.profiler.kineto_results.experimental_event_tree(), _NOBODY)
    return [allocation[1:] for allocation in sorted(found, key=lambda allocation: allocation[0])]


def _owned(method: Callable[..., Any]) -> Callable[..., Any]:
    """A stage works step by step, and others work between its steps."""

    def wrapped(stage: Stage, *args: Any, **kwargs: Any) -> Generator[None, None, Any]:
        steps = method(stage, *args, **kwargs)
        while True:
            with record_function(f"{_OWNER}{stage.stage}"):
                try:
                    next(steps)
                except StopIteration as end:
                    return end.value
            yield

    return wrapped


def _send(send: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(links: QueueLinks, channel: Any, message: Any) -> None:
        with record_function(f"{_OWNER}{_NOBODY}"):
            send(links, channel, message._replace(values=_copied(message.values)))

    return wrapped


def _take(take: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any) -> Any:
        message = take(*args)
        return None if message is None else message._replace(values=_copied(message.values))

    return wrapped


def _arrivals(arrivals: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Generator[None, None, Any]:
        values = yield from arrivals(*args, **kwargs)  # those of other stages are copies already
        return {s: _copied(v) if s.stage == CALLER else v for s, v in values.items()}

    return wrapped


def _copied(values: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), values)


def _weights(stage: Stage) -> int:
    tensors = [*stage.module.parameters(), *stage.module.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

"""How a value gets from stage to stage.

A `Channel` is one direction between two stages for one purpose; messages on it keep their order. A
`Message` holds tensors, numbers or ``None``. Both kinds of links deliver tensors in a canonical form
(dense, owning their memory, the sender's dimension order kept, so that channels_last stays channels_last):
that is why executors can be bit-identical.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..wiring import Wiring
from .program import Tie

Kind = Literal["forward", "backward", "tied-gradient", "tied-sum", "evaluate"]


@dataclass(frozen=True, order=True)
class Channel:
    """One direction from ``source`` to ``target`` (stages) for one kind of message."""

    kind: Kind
    source: int
    target: int


@dataclass(frozen=True)
class Message:
    """The values of one batch on one channel."""

    slot: int
    values: tuple[Any, ...]
    skip: bool = False  # the batch was given up: consume it, compute nothing


class Links(Protocol):
    """What a stage sends to and receives from."""

    def send(self, channel: Channel, message: Message) -> None:
        """Hand a message over; returns before it has arrived."""
        ...

    def receive(self, channel: Channel, slot: int) -> Message:
        """The next message on ``channel``, which must belong to ``slot``; waits for it."""
        ...

    def depth(self, stage: int) -> int:
        """Messages that have arrived at ``stage`` and wait to be used."""
        ...


@dataclass
class InlineLinks:
    """Links between stages of one process: queues."""

    queues: dict[Channel, deque[Message]] = field(default_factory=dict)

    def send(self, channel: Channel, message: Message) -> None:
        values = tuple(canonical(v) for v in message.values)
        self.queues.setdefault(channel, deque()).append(Message(message.slot, values, message.skip))

    def receive(self, channel: Channel, slot: int) -> Message:
        return expect(self.queues[channel].popleft(), channel, slot)

    def depth(self, stage: int) -> int:
        return sum(len(waiting) for channel, waiting in self.queues.items() if channel.target == stage)

    def clear(self) -> None:
        """Drop what was never received (after a failure)."""
        self.queues.clear()


def expect(message: Message, channel: Channel, slot: int) -> Message:
    """``message``, after checking that it belongs to ``slot``."""
    if message.slot != slot:
        raise RuntimeError(f"{channel} delivered slot {message.slot} where slot {slot} was due")
    return message


def channels(train: Wiring, evaluate: Wiring, ties: Iterable[Tie]) -> dict[Channel, int]:
    """Every channel of a pipeline, with the largest number of values that a message on it has."""
    found: dict[Channel, int] = {}
    for (i, j), sent in train.sends.items():
        found[Channel("forward", i, j)] = len(sent)
    for (i, j), sent in train.gradients.items():
        found[Channel("backward", j, i)] = len(sent)
    for (i, j), sent in evaluate.sends.items():
        found[Channel("evaluate", i, j)] = len(sent)
    for tie in ties:
        for guest, _ in tie.holders[1:]:
            down, up = Channel("tied-gradient", guest, tie.owner), Channel("tied-sum", tie.owner, guest)
            found[down] = found[up] = found.get(down, 0) + 1
    return dict(sorted(found.items()))


def canonical(value: Any) -> Any:
    """A tensor that is dense, owns exactly its memory and carries no graph; other values as they are."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return value
    value = value.detach()
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    if whole and dense_order(value) is not None:
        return value
    return value.clone(memory_format=torch.preserve_format).resolve_conj().resolve_neg()


def dense_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimension order in which ``tensor`` is contiguous; ``None`` if there is none.

    ``(0, 2, 3, 1)`` for channels_last, ``(0, 1, ..., n-1)`` for an ordinary contiguous tensor.
    """
    if tensor.layout is not torch.strided:
        return None
    strides, shape = tensor.stride(), tensor.shape
    if tensor.numel() == 0:
        return tuple(range(tensor.dim()))
    order = tuple(sorted(range(tensor.dim()), key=lambda d: (-strides[d], shape[d] == 1, d)))
    expected = 1
    for d in reversed(order):
        if shape[d] != 1:
            if strides[d] != expected:
                return None
            expected *= shape[d]
    return order


def flat_bytes(tensor: Tensor) -> Tensor:
    """The memory of a `canonical` tensor as one row of bytes (a view)."""
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)

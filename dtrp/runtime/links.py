"""How a value gets from stage to stage: what every link promises, and links within one process.

A `Channel` is one direction between two stages for one purpose; messages on it keep their order. Whatever
the link, tensors arrive in a canonical form (dense, owning their memory, the sender's dimension order kept,
so that channels_last stays channels_last): that is why every executor gives the same bits.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Kind = Literal[
    "forward", "backward", "evaluate", "tied-gradient", "tied-sum", "norm", "sum", "feed", "command"
]


class Channel(NamedTuple):
    """One direction from ``source`` to ``target`` (stages) for one kind of message."""

    kind: Kind
    source: int
    target: int


class Message(NamedTuple):
    """The values of one slot on one channel: tensors, numbers or ``None``."""

    slot: int
    values: Sequence[Any]
    skip: bool = False  # the batch was given up: consume it, compute nothing
    scale: float = 0.0  # with gradients: of the loss; with values: one that has overflowed (scaling.py)


class LostStage(ConnectionError):
    """The process at the other end of a channel is gone: ``peer`` in its pipeline, called ``name``."""

    def __init__(self, peer: int, why: str, name: str = "") -> None:
        super().__init__(f"lost the connection to {name or f'stage {peer}'}: {why}")
        self.peer, self.why = peer, why


class Links(Protocol):
    """One stage's ends of all its channels."""

    @property
    def full(self) -> int | None:
        """The stage that `send` waits for, as too much is on its way there."""
        ...

    def send(self, channel: Channel, message: Message) -> None:
        """Hand a message over; it is the receiver's from now on, whatever happens to the tensors here."""
        ...

    def take(self, channel: Channel, slot: int) -> Message | None:
        """The next message on ``channel``, to be of ``slot``. Between processes this waits for it; in one
        process nothing comes while somebody waits, and the answer is ``None`` where there is none yet."""
        ...

    def waiting(self) -> int:
        """Messages that have arrived here and wait to be taken."""
        ...


class QueueLinks:
    """A stage's ends of channels within one process. ``queues`` is the same for all stages."""

    full: int | None = None

    def __init__(self, stage: int, queues: defaultdict[Channel, deque[Message]]) -> None:
        self.stage, self.queues = stage, queues

    def send(self, channel: Channel, message: Message) -> None:
        values = [canonical(v) for v in message.values]
        self.queues[channel].append(message._replace(values=values))

    def take(self, channel: Channel, slot: int = -1) -> Message | None:
        queue = self.queues[channel]
        return queue.popleft() if queue else None

    def waiting(self) -> int:
        mine = self.stage
        return sum(len(queue) for channel, queue in self.queues.items() if queue and channel[2] == mine)


def canonical(value: Any) -> Any:
    """A tensor that is dense, owns exactly its memory and carries no graph; other values as they are."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return value
    value = value.detach().resolve_conj().resolve_neg()
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    if whole and dense_order(value) is not None:
        return value
    return value.clone(memory_format=torch.preserve_format)


def dense_order(tensor: Tensor) -> tuple[int, ...] | None:
    """The dimension order in which ``tensor`` is contiguous; ``None`` if there is none.

    ``(0, 2, 3, 1)`` for channels_last, ``(0, 1, ..., n-1)`` for an ordinary contiguous tensor.
    """
    if tensor.layout is not torch.strided:
        return None
    strides, shape = tensor.stride(), tensor.shape
    if tensor.numel() == 0 or (1 not in shape and tensor.is_contiguous()):
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

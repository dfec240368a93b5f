"""One stage in several pipelines, or in several processes of one: their gradients, buffers and decisions made
one.

What is trained is what one pipeline would train on the joined batch. Each replica's loss is weighted by its
share of that batch, so that the sum of the replicas' gradients is the gradient of the joint mean, whatever
their sizes. The sum is taken once per update, in buckets (`_Bucket`), before norms and clipping; tied
parameters are summed at their owner, before guests hear of them. A batch that one replica gives up is given
up by all. Buffers (BatchNorm's statistics) are the first replica's whenever the pipeline is drained, as
DistributedDataParallel has them in every pass; so are gradients that wait for their update then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .links import Channel, Links, Message

if TYPE_CHECKING:
    from .meter import Meter

BYTES = 25 * 2**20  # of a bucket, as DistributedDataParallel has them


class Group:
    """Replicas as a process group of torch.distributed. ``overlaps``: sums go on beside other work."""

    def __init__(self, group: dist.ProcessGroup, *, overlaps: bool) -> None:
        self._group, self.rank, self.overlaps = group, group.rank(), overlaps

    def sum(self, tensor: Tensor) -> Any:
        """Each replica's, in place, once what is returned was waited for; in one order in all of them."""
        return dist.all_reduce(tensor, group=self._group, async_op=True)

    def spread(self, tensor: Tensor) -> None:
        """The first one's to all others, in place."""
        dist.broadcast(tensor, group=self._group, group_src=0)


class Linked:
    """Replicas that have lines to each other: ``links`` of a process to others of its stage, ``members``, in
    whose order all of them add up. Each adds up its own share of the numbers, and gives it to the others."""

    overlaps = False

    def __init__(self, links: Links, members: Sequence[int], me: int) -> None:
        self._links, self._members, self._me = links, members, me
        self.rank = members.index(me)
        self.meter: Meter | None = None  # which is told of waits
        self._done = 0

    def sum(self, tensor: Tensor) -> Any:
        shares = tensor.view(-1).tensor_split(len(self._members))
        for other, share in self._others(shares):
            self._send(other, share)
        total: Tensor | None = None
        for member in self._members:
            given = shares[self.rank] if member == self._me else self._take(member)
            total = given.clone() if total is None else total + given
        assert total is not None
        shares[self.rank].copy_(total)
        for other, _ in self._others(shares):
            self._send(other, total)
        for other, share in self._others(shares):
            share.copy_(self._take(other))
        self._done += 1
        return _Over()

    def spread(self, tensor: Tensor) -> None:
        if self.rank == 0:
            for other in self._members[1:]:
                self._send(other, tensor)
        else:
            tensor.copy_(self._take(self._members[0]))
        self._done += 1

    def _others(self, shares: Sequence[Tensor]) -> list[tuple[int, Tensor]]:
        return [(m, share) for m, share in zip(self._members, shares, strict=True) if m != self._me]

    def _send(self, other: int, tensor: Tensor) -> None:
        self._links.send(Channel("sum", self._me, other), Message(self._done, [tensor]))

    def _take(self, other: int) -> Tensor:
        meter = self.meter
        since = None if meter is None else meter.wait(Channel("sum", meter.stage, meter.stage))
        message = self._links.take(Channel("sum", other, self._me), self._done)
        if meter is not None and since is not None:
            meter.waited(since)
        assert message is not None
        given: Tensor = message.values[0]
        return given


class _Over:
    def wait(self) -> None:
        """What this stands for is done."""


class Replicas:
    """A stage's part in agreeing with the same stage elsewhere.

    Parameters
    ----------
    peers : Group or Linked
        This stage in all replicas, for what a pass asks for, in the order of its list, in host memory.
    sums : Group or Linked
        Likewise, for gradients, which come in an order of their own.
    device : torch.device or "cpu"
        From where ``sums`` takes them: from the stage's own, or from host memory.
    """

    def __init__(
        self, peers: Group | Linked, sums: Group | Linked, device: torch.device | str = "cpu"
    ) -> None:
        self.peers, self.sums, self.device = peers, sums, device
        # Makes the connections, which holds up the host: now rather than when others wait for it.
        sums.sum(torch.zeros(1, device=device)).wait()
        self._buckets: list[_Bucket] = []
        self._bucket_of: dict[Tensor, _Bucket] = {}
        self._open = False  # gradients that come now are those of the update

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        return self  # copies of a module agree with the same peers

    def sum(self, value: Tensor) -> Tensor:
        """Over all replicas."""
        total = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        self.peers.sum(total).wait()
        return total.to(value.device)

    def joint_loss(self, value: Tensor) -> Tensor:
        """Over all replicas; no host waits for a device. Comes before the gradients of its own pass, and
        behind those of the last, so that it can go their way. In float64: who has no part of a batch does
        not know in what the others' losses are."""
        total = value.detach().to(self.device, torch.float64, copy=True)
        self.sums.sum(total).wait()
        return total

    def any(self, answer: bool) -> bool:
        """Whether one of the replicas says yes."""
        return bool(self.sum(torch.tensor(float(answer), device="cpu")))

    def share(self, count: int) -> float:
        """This replica's share in what all have together."""
        return count / float(self.sum(torch.tensor(float(count), device="cpu", dtype=torch.float64)))

    # ---- gradients -----------------------------------------------------------------------------------------

    def watch(self, pairs: Iterable[tuple[nn.Parameter, Tensor]], without: Collection[nn.Parameter]) -> None:
        """Gradients that a backward pass leaves on the second of each pair are the first's: their sums may
        begin while the pass goes on; not ``without``'s, to which other stages add something."""
        if not self.sums.overlaps:
            return
        others = set(map(id, without))
        for own, target in pairs:
            if id(own) in others or not own.requires_grad:
                continue

            def arrived(target: Tensor, own: nn.Parameter = own) -> None:
                if self._open:
                    before = None if target is own else own.grad
                    assert target.grad is not None
                    self._bucket_of[own].add(own, target.grad, before)
                    self._launch()

            target.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]

    def begin(self, parameters: Collection[nn.Parameter]) -> None:
        """The backward pass that comes is the last one before the update of these."""
        if not self._buckets:
            self._buckets = list(_buckets(parameters, self.device))
            self._bucket_of = {p: bucket for bucket in self._buckets for p in bucket.places}
        self._open = True

    def add_gradients(self, parameters: Collection[nn.Parameter]) -> None:
        """Make every gradient the sum of all replicas'. One that no replica has stays none.

        Raises
        ------
        TypeError
            A gradient is sparse.
        """
        self.begin(parameters)
        self._open = False
        for bucket in self._buckets:
            for p in bucket.places:
                if p not in bucket.there:
                    bucket.add(p, p.grad, None)
        self._launch()
        owned = [p for bucket in self._buckets for p in bucket.places]
        given = self.sum(torch.tensor([float(p.grad is not None) for p in owned], device="cpu")).tolist()
        exist = {p for p, count in zip(owned, given, strict=True) if count}
        for bucket in self._buckets:
            bucket.finish(exist)

    def _launch(self) -> None:
        """Buckets that are complete go on their way; in their order, which is the same in all replicas."""
        for bucket in self._buckets:
            if len(bucket.there) < len(bucket.places):
                return
            if bucket.work is None:
                bucket.work = self.sums.sum(bucket.flat)

    # ---- between segments ----------------------------------------------------------------------------------

    def settle(self, buffers: Iterable[Tensor], waiting: Collection[nn.Parameter]) -> None:
        """Buffers become the first replica's; so do the gradients of parameters that wait for an update,
        which are then the sum of all replicas'."""
        for buffer in buffers:
            if buffer.numel():
                whole = buffer.detach().cpu().contiguous()
                self.peers.spread(whole)
                with torch.no_grad():
                    buffer.copy_(whole)
        if waiting:
            self.add_gradients(waiting)
            self.keep_first(waiting)

    def keep_first(self, waiting: Iterable[nn.Parameter]) -> None:
        """All other replicas begin with none."""
        for p in waiting if self.peers.rank else ():
            p.grad = None


class _Bucket:
    """Some parameters' gradients, one after the other in one buffer."""

    def __init__(self, parameters: Sequence[nn.Parameter], device: torch.device | str) -> None:
        ends = list(accumulate(p.numel() for p in parameters))
        self.places = dict(zip(parameters, pairwise([0, *ends]), strict=True))
        self.size, self.dtype, self.device = ends[-1], parameters[0].dtype, device
        self.there: set[Tensor] = set()
        self.work: Any = None
        self.flat = torch.empty(0)

    def add(self, parameter: nn.Parameter, gradient: Tensor | None, before: Tensor | None) -> None:
        """One gradient, and what earlier passes gave."""
        if parameter in self.there:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(parameter.shape)} came twice in one backward "
                f"pass, when its sum over replicas was on its way: use torch.utils.checkpoint with "
                f"use_reentrant=False"
            )
        if not self.there:
            self.flat = torch.zeros(self.size, dtype=self.dtype, device=self.device)
        self.there.add(parameter)
        if gradient is None:
            return
        if gradient.layout is not torch.strided:
            raise TypeError(
                f"a gradient of shape {tuple(parameter.shape)} is sparse, which replicas cannot add; use "
                f"sparse=False in the embedding"
            )
        part = self._part(parameter).copy_(gradient)
        if before is not None:
            part += before.to(part.device)

    def finish(self, exist: set[nn.Parameter]) -> None:
        """Wait for the sums, and put them in their places."""
        self.work.wait()
        for p in exist & self.places.keys():
            if p.grad is None:
                p.grad = torch.empty_like(p)
            p.grad.copy_(self._part(p))
        self.work, self.flat = None, torch.empty(0)
        self.there.clear()

    def _part(self, parameter: nn.Parameter) -> Tensor:
        start, end = self.places[parameter]
        return self.flat[start:end].view(parameter.shape)


def _buckets(parameters: Iterable[nn.Parameter], device: torch.device | str) -> Iterator[_Bucket]:
    """The last parameters, whose gradients come first, in the first ones; each of one dtype."""
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for p in reversed(list(parameters)):
        by_dtype.setdefault(p.dtype, []).append(p)
    for alike in by_dtype.values():
        some: list[nn.Parameter] = []
        for p in alike:
            if some and sum(q.nbytes for q in some) + p.nbytes > BYTES:
                yield _Bucket(some, device)
                some = []
            some.append(p)
        yield _Bucket(some, device)

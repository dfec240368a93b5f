"""One stage in several pipelines: their gradients, buffers and decisions made one.

What is trained is what one pipeline would train on the joined batch. Each replica's loss is weighted by its
share of that batch, so that the sum of the replicas' gradients is the gradient of the joint mean, whatever
their sizes. The sum is taken once per update, in one buffer for each dtype, before norms and clipping; tied
parameters are summed at their owner, before guests hear of them. A batch that one replica gives up is given
up by all. Buffers (BatchNorm's statistics) are the first replica's whenever the pipeline is drained, as
DistributedDataParallel has them in every pass.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Replicas:
    """A stage's part in agreeing with the same stage of other pipelines.

    Parameters
    ----------
    peers : ProcessGroup
        gloo's, of this stage in all replicas.
    """

    def __init__(self, peers: dist.ProcessGroup) -> None:
        self.peers = peers

    def sum(self, value: Tensor) -> Tensor:
        """Over all replicas."""
        total = value.detach().cpu().clone()
        dist.all_reduce(total, group=self.peers)
        return total.to(value.device)

    def any(self, answer: bool) -> bool:
        """Whether one of the replicas says yes."""
        return bool(self.sum(torch.tensor(float(answer), device="cpu")))

    def share(self, count: int) -> float:
        """This replica's share in what all have together."""
        return count / float(self.sum(torch.tensor(float(count), device="cpu", dtype=torch.float64)))

    def add_gradients(self, parameters: Collection[nn.Parameter]) -> None:
        """Make every gradient the sum of all replicas'. One that no replica has stays none.

        Raises
        ------
        TypeError
            A gradient is sparse.
        """
        for members in _alike(parameters):
            for p in members:
                if p.grad is not None and p.grad.layout is not torch.strided:
                    raise TypeError(
                        f"a gradient of shape {tuple(p.shape)} is sparse, which replicas cannot add; use "
                        f"sparse=False in the embedding"
                    )
            given = torch.tensor([float(p.grad is not None) for p in members], dtype=members[0].dtype)
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
            flat = torch.cat([*(g.detach().reshape(-1).cpu() for g in parts), given])
            dist.all_reduce(flat, group=self.peers)
            *sums, counts = torch.split(flat, [*(p.numel() for p in members), len(members)])
            for p, part, total, count in zip(members, parts, sums, counts.tolist(), strict=True):
                p.grad = part.copy_(total.view(p.shape)) if count else None

    def first(self, buffers: Iterable[Tensor]) -> None:
        """Make buffers the first replica's."""
        for buffer in buffers:
            if buffer.numel():
                whole = buffer.detach().cpu().contiguous()
                dist.broadcast(whole, group=self.peers, group_src=0)
                with torch.no_grad():
                    buffer.copy_(whole)


def _alike(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """By dtype."""
    groups: dict[torch.dtype, list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault(p.dtype, []).append(p)
    return list(groups.values())

"""Graph networks with a sparse adjacency, as an input or a buffer, train as in the plain loop."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
X, Y = torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3
EDGES = (torch.eye(12) + torch.eye(12).roll(3, 0) + torch.eye(12).roll(-5, 1)) / 3


class Graphs(nn.Module):
    """Two layers; every node hears its neighbours."""

    def __init__(self, edges: Tensor | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)
        self.register_buffer("edges", edges)

    def forward(self, x: Tensor, edges: Tensor | None = None) -> Tensor:
        edges = self.edges if edges is None else edges
        h = torch.sparse.mm(edges, self.first(x)).relu()
        return torch.sparse.mm(edges, self.last(h))


LAYOUTS: dict[str, Any] = {"coo": Tensor.to_sparse, "csr": Tensor.to_sparse_csr}


@pytest.mark.filterwarnings("ignore:Sparse (CSR|invariant)")
@pytest.mark.parametrize("executor", ["inline", "workers"])
@pytest.mark.parametrize("where", ["input coo", "buffer coo", "buffer csr"])
def test_a_sparse_adjacency(where: str, executor: Any, tmp_path: Path) -> None:
    place, layout = where.split()
    edges = LAYOUTS[layout](EDGES)
    model, plain = (Graphs(edges.clone() if place == "buffer" else None) for _ in range(2))
    inputs = (X, edges) if place == "input" else (X,)
    optimizer, expected = SGD(plain.parameters()), []
    for _ in range(6):
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(*inputs), Y)
        loss.backward()
        optimizer.step()
        expected.append(loss.item())
    pipe = dtrp.compile(model, n_gpus=2, example_inputs=inputs)
    with pipe.trainer(F.cross_entropy, SGD, method="bp", executor=executor) as trainer:
        for _ in range(3):
            trainer.step(*inputs, Y)
        trainer.save(tmp_path / "run.ckpt")
        trainer.step(*inputs, Y)
        trainer.load(tmp_path / "run.ckpt")
        for _ in range(3):
            trainer.step(*inputs, Y)
        trainer.flush()
        assert trainer.losses == pytest.approx(expected, abs=1e-6)
    for name, p in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), p, rtol=0, atol=1e-6)
    with pipe.trainer(F.cross_entropy, SGD, executor="inline") as trainer:  # nor is it cut into parts
        trainer.step(*inputs, Y)
    assert trainer.losses == pytest.approx([F.cross_entropy(plain(*inputs), Y).item()], abs=1e-5)

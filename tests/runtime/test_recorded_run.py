"""The published table and the memory that the scheme promises, read off recorded runs.

What the runtime says of itself (``record=True``, `Trainer.stats`) is checked against the schedule's formulas,
and against what can be seen from outside: weights that count their own updates, saved tensors and stage
inputs watched by weak references.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dtrp
from dtrp.runtime.events import Event
from tests.reference.test_dtrp_serial import PUBLISHED

KINDS = ("forward", "recompute", "backward")


class CountUp(torch.optim.Optimizer):
    """Each step sets every weight to the number of steps done, so a weight tells its own version."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})
        self.steps = 0
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.zero_()

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.fill_(float(self.steps))


def chain(depth: int, width: int = 1) -> nn.Sequential:
    """Equal layers in a row."""
    return nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(depth)]).double()


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).mean()


PAPER: dict[str, Any] = {"schedule": "fig1", "micro_batches": 1}


def batch(width: int = 1) -> tuple[Tensor, Tensor]:
    return torch.ones(2, width, dtype=torch.double), torch.zeros(2, width, dtype=torch.double)


def recorded(n_stages: int, n_batches: int, executor: str, **knobs: Any) -> list[Event]:
    """What was done when in a run."""
    pipe = dtrp.compile(chain(8), n_gpus=n_stages, example_inputs=batch()[0], recompute=True)
    with pipe.trainer(mean_loss, CountUp, executor=executor, record=True, seed=0, **PAPER | knobs) as trainer:
        for _ in range(n_batches):
            trainer.step(*batch())
        trainer.flush()
        return [e for e in trainer.events if e.kind in KINDS]


# --- Every cell of the table ----------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)])
def test_three_stages_as_published(executor: str) -> None:
    events = recorded(3, 6, executor, method="dtr")
    cells = {
        (e.tick + 1, e.stage + 1, e.kind): (e.batch + 1, e.version) for e in events if e.kind != "recompute"
    }
    assert {cell: cells[cell] for cell in PUBLISHED} == PUBLISHED
    assert {cell for cell in cells if cell[0] <= 6} == set(PUBLISHED)


@pytest.mark.parametrize("method", ["dtr", "dtrp", "fdg"])
@pytest.mark.parametrize("n_stages", [2, 3, 4, 8])
def test_every_cell(n_stages: int, method: str) -> None:
    n_batches = 2 * n_stages + 5
    events = recorded(n_stages, n_batches, "inline", method=method)
    assert len(events) == len({(e.stage, e.kind, e.batch) for e in events})
    at = {(e.batch + 1, e.stage + 1, e.kind): e for e in events}
    expected = set()
    for b in range(1, n_batches + 1):
        for k in range(1, n_stages + 1):
            forward, backward = at[b, k, "forward"], at[b, k, "backward"]
            expected |= {(b, k, "forward"), (b, k, "backward")}
            assert forward.tick + 1 == b + k - 1
            assert backward.tick + 1 == b + 2 * n_stages - k - 1
            # Local time tau = t - k + 1: backward uses W_tau, the forward part after it W_(tau + 1).
            assert backward.version == backward.tick + 1 - k + 1
            assert forward.version == forward.tick + 1 - k + 1 + (1 if k < n_stages else 0)
            assert backward.version - forward.version == (2 * (n_stages - k) - 1 if k < n_stages else 0)
            if k < n_stages and method != "fdg":
                recompute = at[b, k, "recompute"]
                expected.add((b, k, "recompute"))
                assert (recompute.tick, recompute.version) == (backward.tick, backward.version)
                assert recompute.end <= backward.start
            if k < n_stages and (b + 2 * (n_stages - k), k, "forward") in at:
                # In one tick the backward part comes first, then the forward part.
                later = at[b + 2 * (n_stages - k), k, "forward"]
                assert later.tick == backward.tick
                assert backward.end <= later.start
    assert set(at) == expected


@pytest.mark.parametrize("n_stages", [2, 3, 4, 8])
@pytest.mark.parametrize("method", ["dtr", "fdg"])
def test_weights_used_have_had_the_updates_that_the_table_says(method: str, n_stages: int) -> None:
    """Not what the runtime says of itself: the weights count, and a hook reads them during each pass."""
    n_batches = 2 * n_stages + 5
    model = chain(8)
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=batch()[0], recompute=True)
    seen: dict[str, list[int]] = defaultdict(list)
    for name, layer in model.named_children():
        layer.register_forward_hook(lambda m, _, __, at=seen[name]: at.append(int(m.weight.item())))
    with pipe.trainer(
        mean_loss, CountUp, method=method, executor="inline", record=True, seed=0, **PAPER
    ) as trainer:
        for _ in range(n_batches):
            trainer.step(*batch())
        trainer.flush()
        events = sorted((e for e in trainer.events if e.kind in KINDS), key=lambda e: e.start)
    for stage in pipe.stages:
        k = stage.index + 1
        passes = [e for e in events if e.stage == stage.index and e.kind != "backward"]
        updates = []
        for e in passes:
            b = e.batch + 1
            first = e.kind == "forward" and k < n_stages
            # A first forward sees the updates of all batches backwarded so far, its own tick's included.
            updates.append(max(0, b - 2 * (n_stages - k)) if first else b - 1)
        assert stage.submodules
        for name in stage.submodules:
            assert seen[name] == updates


# --- What is held ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["inline", pytest.param("workers", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["dtr", "dtrp"])
@pytest.mark.parametrize("n_stages", [2, 4, 8])
def test_stash_and_graphs_stay_bounded(n_stages: int, method: str, executor: str) -> None:
    events = recorded(n_stages, 30, executor, method=method)
    for k in range(1, n_stages + 1):
        own = [e for e in events if e.stage == k - 1]
        assert max(e.stashed for e in own) <= 2 * (n_stages - k) + 1
        assert max(e.graphs for e in own) == 1
        if k < n_stages:
            # The backward part pops one before the forward part adds one. An event is noted before its own
            # batch is put away, so the backward part sees the stash at its fullest.
            assert max(e.stashed for e in own) >= 2 * (n_stages - k) - 1


class Watch:
    """Counts, from outside, what a run keeps alive: stage inputs, and passes whose saved tensors live."""

    def __init__(self) -> None:
        self.stage = 0
        self.number = 0
        self.inputs: dict[int, weakref.WeakSet[Tensor]] = defaultdict(weakref.WeakSet)
        self.saved: dict[int, dict[int, weakref.WeakSet[Any]]] = defaultdict(
            lambda: defaultdict(weakref.WeakSet)
        )
        self.most_inputs: dict[int, int] = defaultdict(int)
        self.most_graphs: dict[int, int] = defaultdict(int)

    def begin(self, stage: int, x: Tensor) -> None:
        """A pass begins in ``stage``."""
        self.stage = stage
        self.number += 1
        if not torch.is_grad_enabled():
            self.inputs[stage].add(x)
            self.most_inputs[stage] = max(self.most_inputs[stage], len(self.inputs[stage]))

    @contextmanager
    def saving(self) -> Iterator[None]:
        class Packed:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor

        def pack(tensor: Tensor) -> Packed:
            packed = Packed(tensor)
            self.saved[self.stage][self.number].add(packed)
            live = sum(1 for kept in self.saved[self.stage].values() if len(kept))
            self.most_graphs[self.stage] = max(self.most_graphs[self.stage], live)
            return packed

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
            yield


@pytest.mark.parametrize("method", ["dtrp", "dtr", "fdg"])
@pytest.mark.parametrize("n_stages", [2, 4])
def test_what_is_alive_seen_from_outside(n_stages: int, method: str) -> None:
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)]).double()
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=batch(4)[0], recompute=True)
    watch = Watch()
    for stage in pipe.stages:
        first = model.get_submodule(stage.submodules[0])
        first.register_forward_pre_hook(lambda _, args, k=stage.index: watch.begin(k, args[0]))
    optimizer = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    with (
        watch.saving(),
        pipe.trainer(mean_loss, optimizer, method=method, executor="inline", seed=0, **PAPER) as trainer,
    ):
        for _ in range(20):
            trainer.step(*batch(4))
    for k in range(1, n_stages + 1):
        if method == "fdg":
            # "Memory explosion": a graph for every batch in flight.
            assert watch.most_graphs[k - 1] == max(1, 2 * (n_stages - k))
        else:
            assert watch.most_graphs[k - 1] == 1
            if k < n_stages:
                assert 2 * (n_stages - k) <= watch.most_inputs[k - 1] <= 2 * (n_stages - k) + 1

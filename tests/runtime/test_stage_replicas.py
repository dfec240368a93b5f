"""Stages of several processes: what they train is what one process of each trains in as many parts.

In float64, where sums in another order differ by far less than any mistake would. Inline each stage runs once
and follows the same list, so that it is the oracle; the exact orders' is the plain loop as well.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import dtrp
from dtrp.schedule import Schedule

from .inside import processes
from .toys import ADAMW, SGD, Tied, batches, mlp

CLOSE: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-13}


def data(n: int = 7) -> list[tuple[Tensor, Tensor]]:
    """The last batch has fewer samples than parts are asked for."""
    return [(x.double(), y) for x, y in batches(n, size=8) + batches(1, size=3, seed=3)]


PLAIN = partial(mlp, dropout=0.0, norm=False)


def pipeline(replicas: Any, make: Callable[[], nn.Module] = PLAIN, n_stages: int = 3, **options: Any) -> Any:
    torch.manual_seed(0)
    model = make().double()
    options = {"costs": "analytic", "recompute": True, **options}
    return dtrp.compile(model, n_stages, example_inputs=data(1)[0][0], replicas=replicas, **options)


def trainer(pipe: Any, executor: str, loss: Any = F.cross_entropy, **knobs: Any) -> Any:
    knobs = {"optimizer": SGD, "seed": 3, "micro_batches": 4, "schedule": "lean", **knobs}
    return pipe.trainer(loss, executor=executor, **knobs)


def train(pipe: Any, executor: str, *, load: Path | None = None, **knobs: Any) -> dict[str, Tensor]:
    """Weights, buffers and all that the trainer says."""
    with trainer(pipe, executor, **knobs) as t:
        if load is not None:
            t.load(load)
        for x, y in data():
            t.step(x, y)
        t.flush()
        said = [*t.losses, t.grad_norm, t.lr, t.updates, *t.evaluate(data(2)).values()]
    return {**pipe.model.state_dict(), "said": torch.tensor(said, dtype=torch.float64)}


def check(replicas: Any, make: Callable[[], nn.Module], **knobs: Any) -> None:
    there = train(pipeline(replicas, make), "workers", **knobs)
    here = train(pipeline(replicas, make), "inline", **knobs)
    torch.testing.assert_close(there, here, **CLOSE)


WAYS: dict[str, Any] = {
    "lean": {},
    "fig1": {"schedule": "fig1"},
    "1f1b": {"method": "1f1b"},
    "gpipe": {"method": "gpipe"},
    "graphs kept": {"method": "fdg"},
    "clipped": {"max_grad_norm": 0.1},
    "clipped with a lag": {"max_grad_norm": 0.1, "max_grad_norm_lag": True},
    "accumulated": {"accumulate": 3},
    "bad batches": {"on_nonfinite": "skip"},
    "Adam": {"optimizer": ADAMW},
}


@pytest.mark.parametrize("way", WAYS)
def test_processes_of_a_stage_train_as_one_does(way: str) -> None:
    """Unequal numbers, with a weight that the first stage owns and a later one has as a guest, and a skip."""
    check((2, 1, 3), Tied, **WAYS[way])


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [(1, 2, 1), (2, 2, 2), (3, 1, 1), (1, 1, 2), (1, 4, 3)])
@pytest.mark.parametrize("way", WAYS)
def test_any_numbers_of_processes(way: str, replicas: tuple[int, ...]) -> None:
    check(replicas, Tied, **WAYS[way])


def test_dropout_draws_as_in_one_process() -> None:
    """Numbers belong to slots, not to processes."""
    check((1, 2, 2), partial(mlp, norm=False, dropout=0.3))


def test_exact_orders_equal_the_plain_loop_and_one_stage_is_data_parallel() -> None:
    torch.manual_seed(0)
    model = PLAIN().double()
    optimizer = SGD(model.parameters())
    for x, y in data():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    for replicas, n_stages in (((1, 3, 2), 3), (2, 1)):
        found = train(pipeline(replicas, PLAIN, n_stages), "workers", method="1f1b")
        for name, value in model.state_dict().items():
            torch.testing.assert_close(found[name], value, **CLOSE)


def test_a_stage_shares_out_its_slots_and_batch_norm_is_the_first_ones() -> None:
    """Each of two processes does half of the passes; statistics and weights go into the model once, and
    settled: else evaluation would run on others."""
    pipe = pipeline((1, 2, 1), partial(mlp, dropout=0.0))
    with trainer(pipe, "auto") as t:
        for x, y in batches(6, size=8):
            t.step(x.double(), y)
        t.flush()
        counts = [stats.counts["forward"] for stats in t.stats]
        assert t.evaluate([(x, y) for x, y in data(2)])["loss"] < 10
    tracked = [v for n, v in pipe.model.state_dict().items() if n.endswith("num_batches_tracked")]
    assert {int(n) for n in tracked} == {12, 24}
    assert counts == [24, 12, 24]
    assert len(processes_of(pipe)) == 4
    assert pipe.report.stages[1].device == "cpu x 2"
    assert "cpu x 2" in str(pipe.report)


def test_batches_are_cut_for_all_processes_of_a_stage() -> None:
    """Also where BatchNorm would rather have larger parts: else some processes would never have a part."""
    with trainer(pipeline((1, 4, 1), partial(mlp, dropout=0.0)), "auto", micro_batches="auto") as t:
        for x, y in batches(3, size=32):
            t.step(x.double(), y)
        t.flush()
        first, second, _ = (stats.counts["forward"] for stats in t.stats)
    assert first == 4 * second
    assert second % 3 == 0


def processes_of(pipe: Any) -> list[int]:
    with trainer(pipe, "workers") as t:
        t.step(*data(1)[0])
        return processes(t)


class Meeting(torch.autograd.Function):
    """A backward pass that ends when another process has come to its own."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, folder: Path) -> Tensor:
        ctx.folder = folder
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (ctx.folder / str(os.getpid())).touch()
        deadline = time.monotonic() + 20
        while len(list(ctx.folder.iterdir())) < 2:
            if time.monotonic() > deadline:
                raise RuntimeError("nobody else came to a backward pass")
            time.sleep(0.01)
        return gradient, None


def meets(output: Tensor, target: Tensor, *, folder: Path, caller: int) -> Tensor:
    loss = F.cross_entropy(output, target)
    return loss if os.getpid() == caller else Meeting.apply(loss, folder)


@pytest.mark.parametrize(("replicas", "n_stages"), [((2,), 1), ((1, 2), 2)])
def test_processes_of_the_last_stage_go_backward_at_a_time(
    replicas: tuple[int, ...], n_stages: int, tmp_path: Path
) -> None:
    """Not one after the other, as when one that has the last slot asks for the others' losses first."""
    loss = partial(meets, folder=tmp_path, caller=os.getpid())
    with trainer(pipeline(replicas, PLAIN, n_stages), "workers", loss, micro_batches=2) as t:
        t.step(*data(1)[0])
        t.flush()
        assert len(t.losses) == 1


@pytest.mark.parametrize("replicas", [(2, 1, 3), (1, 2, 2)])
def test_saved_in_the_middle_of_a_group_and_loaded_in_another_layout(
    replicas: tuple[int, ...], tmp_path: Path
) -> None:
    """Gradients that wait for their update are in the file whole, and counted once, however many processes
    of a stage have a part of them."""
    found = []
    for executor in ("workers", "inline"):
        with trainer(pipeline((2, 1, 3), Tied), executor, accumulate=5) as t:
            for x, y in data()[:7]:
                t.step(x, y)
            t.save(tmp_path / executor)
        found.append(train(pipeline(replicas, Tied), executor, load=tmp_path / executor, accumulate=5))
    found.append(train(pipeline(replicas, Tied), "inline", load=tmp_path / "workers", accumulate=5))
    torch.testing.assert_close(found[0], found[1], **CLOSE)
    torch.testing.assert_close(found[0], found[2], **CLOSE)


NAMED = r"stage 1 \(2 of 2\)'s process died: killed by SIGKILL"


def test_a_death_names_the_process() -> None:
    """Within seconds, and nothing hangs that waits for sums with it."""
    pipe = pipeline((1, 2, 1))
    with trainer(pipe, "workers") as t:
        t.step(*data(1)[0])
        os.kill(processes(t)[2], signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(dtrp.WorkerError, match=NAMED) as told:
            t.flush()
    assert told.value.stage == 1
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"replicas": 0}, "expected an int >= 1, or one for each stage"),
        ({"replicas": 2.5}, "expected an int >= 1, or one for each stage"),
        ({"replicas": (1, 2)}, "one for each of the 3 stages"),
        ({"replicas": (1, True, 2)}, "expected an int >= 1"),
        ({"replicas": (1, 2, 1), "devices": ["cpu"] * 3}, r"3 devices for stages of 1 \+ 2 \+ 1"),
        ({"replicas": (1, 2, 1), "speed": [1, 1, 1]}, "replicas with speed"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        dtrp.compile(mlp(), 3, **options)


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"method": "bp", "micro_batches": "auto"}, "a method that cuts batches"),
        ({"micro_batches": 2}, "micro_batches of at least 3"),
        ({"autocast": torch.float16}, "use torch.bfloat16"),
    ],
)
def test_runs_that_processes_cannot_share_are_refused(knobs: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        trainer(pipeline((1, 3, 1)), "workers", **knobs)


def test_a_batch_that_cannot_be_cut_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """A loss that is no mean over samples trains something else in parts, and whole batches leave all but
    one process idle. With a number of parts it is what was asked for, and warned of."""

    def spread(output: Tensor, target: Tensor) -> Tensor:
        return output.std(0).sum()

    with (
        pytest.raises(ValueError, match="this one is not cut by itself"),
        trainer(pipeline((1, 2, 1)), "workers", spread, micro_batches="auto") as t,
    ):
        t.step(*data(1)[0])
    with trainer(pipeline((1, 2, 1)), "inline", spread, micro_batches=2) as t:
        t.step(*data(1)[0])
        t.flush()
    assert "micro_batches=2 may change what is trained" in caplog.text


LAYOUTS = st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple)


@given(LAYOUTS, st.sampled_from(["lean", "fig1", "1f1b", "gpipe"]), st.integers(1, 9), st.integers(1, 4))
def test_processes_never_wait_for_each_other_in_a_circle(
    replicas: tuple[int, ...], order: str, parts: int, minis: int
) -> None:
    """Each follows its stage's list as far as slots are its own, waits for values and gradients of other
    stages, and at the end of a mini-batch for all of its own stage."""
    n, slots = len(replicas), parts * (1 if order in ("1f1b", "gpipe") else minis)
    schedule = Schedule(order, n, parts, replicas)
    todo = {(k, i): schedule.actions(k, slots) for k in range(n) for i in range(replicas[k])}
    done: set[tuple[str, int, int]] = set()
    arrived: dict[tuple[int, int], set[int]] = {}
    moved = True
    while moved:
        moved = False
        for (k, i), actions in todo.items():
            while actions:
                kind, slot = actions[0]
                mine = slot % replicas[k] == i
                if kind == "step" and slot % parts == parts - 1:
                    together = arrived.setdefault((k, slot), set())
                    together.add(i)
                    if len(together) < replicas[k]:
                        break
                beside = {"forward": k - 1, "backward": k + 1}.get(kind, -1)
                if mine and beside in range(n) and (kind, beside, slot) not in done:
                    break
                if mine:
                    done.add((kind, k, slot))
                actions.pop(0)
                moved = True
    assert not any(todo.values())


@given(LAYOUTS, st.sampled_from(["lean", "fig1"]), st.integers(1, 3))
def test_the_delay_of_a_device_is_what_its_list_says(
    replicas: tuple[int, ...], order: str, rounds: int
) -> None:
    """Updates between a slot's two passes in one process: the report and the price of delay tell of them."""
    parts = rounds * math.lcm(*replicas)
    schedule = Schedule(order, len(replicas), parts, replicas)
    for k, devices in enumerate(replicas):
        updates, seen, delays = 0, {}, []
        for kind, slot in schedule.actions(k, parts * (4 + -(-schedule.depth(k) // parts))):
            if slot % devices:  # another one's
                continue
            if kind == "forward":
                seen[slot] = updates
            elif kind == "backward":
                delays.append(updates - seen[slot])
            elif kind == "step" and slot % parts == parts - devices:  # the last part of its mini-batch
                updates += 1
        assert max(delays) == schedule.staleness(k)

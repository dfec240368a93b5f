"""Stages of several ranks: what they train is what one process of each trains in as many parts.

Inline each stage runs once, so that it is the oracle, in float64 to 1e-11 (test_stage_replicas.py: the same
with worker processes).
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dtrp.runtime.mesh import check
from dtrp.runtime.routed import Seats

from .ranks import Ranks, run

TRAIN = """
    import torch.nn.functional as F
    from functools import partial

    # The last one is a part for one rank of a stage, and nothing for the others.
    data = [(x.double(), y) for x, y in batches(7, size=8) + batches(1, size=3, seed=3) + batches(1, size=1)]

    def trainer_of(replicas, executor, make=Tied, **knobs):
        torch.manual_seed(0)
        model = make().double()
        example = dict(example_inputs=data[0][0], costs="analytic", recompute=True)
        pipe = dtrp.compile(model, len(replicas), replicas=replicas, **example)
        knobs = dict(optimizer=SGD, seed=3, micro_batches=4, schedule="lean", watchdog=20.0) | knobs
        return model, pipe.trainer(F.cross_entropy, executor=executor, **knobs)

    def train(replicas, executor, load=None, **knobs):
        model, t = trainer_of(replicas, executor, **knobs)
        with t:
            if load is not None:
                t.load(load)
            for x, y in data:
                t.step(x, y)
            t.flush()
            said = [*t.losses, t.grad_norm, t.lr, t.updates, *t.evaluate(data[:2]).values()]
        return {**model.state_dict(), "said": torch.tensor(said, dtype=torch.float64)}

    def same(there, here):
        torch.testing.assert_close(there, here, rtol=1e-11, atol=1e-13)

    WAYS = {
        "lean": {},
        "fig1": dict(schedule="fig1"),
        "1f1b": dict(method="1f1b"),
        "gpipe": dict(method="gpipe"),
        "clipped": dict(max_grad_norm=0.1),
        "accumulated": dict(accumulate=3),
        "bad batches": dict(on_nonfinite="skip"),
        "Adam": dict(optimizer=ADAMW),
        "dropout": dict(make=partial(mlp, norm=False, dropout=0.3)),
    }
"""
COMPARED = (
    TRAIN
    + """
    for name, knobs in WAYS.items():
        same(train(LAYOUT, "auto", **knobs), train(LAYOUT, "inline", **knobs))
    sys.stdout.write("SAME\\n")
"""
)


def test_stages_of_several_ranks_train_as_stages_of_one_do(tmp_path: Path) -> None:
    """Unequal numbers, tied weights between stages and a skip; every rank knows all losses after a flush."""
    assert run(tmp_path, 3, COMPARED.replace("LAYOUT", "(1, 2)")).count("SAME") == 3


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [(2, 1, 3), (2, 2), (3,), (1, 2, 1)])
def test_any_numbers_of_ranks(tmp_path: Path, replicas: tuple[int, ...]) -> None:
    """Equal ones too, and one stage, which is data parallelism."""
    said = run(tmp_path, sum(replicas), COMPARED.replace("LAYOUT", str(replicas)))
    assert said.count("SAME") == sum(replicas)


@pytest.mark.slow
def test_payloads_that_stay_on_their_devices(tmp_path: Path) -> None:
    """By communicators that know no tags, from several ranks of a stage; gloo stands in NCCL's place."""
    ways = """
    from dtrp.runtime import mesh

    three = lambda self: (self._by_replica, self._by_replica, self._by_stage)
    mesh.Mesh.on_device = lambda self, device: mesh.OnDevice(*map(mesh._group, three(self)))
    """
    assert run(tmp_path, 4, ways + COMPARED.replace("LAYOUT", "(1, 2, 1)")).count("SAME") == 4


def test_saved_in_the_middle_of_a_group_and_loaded_in_another_layout(tmp_path: Path) -> None:
    """As a file and as a folder, of which each tensor is one rank's to write."""
    script = (
        TRAIN
        + """
    def begin(path):
        with trainer_of((1, 2), "torchrun", accumulate=5)[1] as t:
            for x, y in data[:7]:
                t.step(x, y)
            t.save(path)

    begin("folder/")
    begin("file.pt")
    for replicas in ((1, 2), (2, 1)):
        here = train(replicas, "inline", "file.pt", accumulate=5)
        for path in ("folder/", "file.pt"):
            same(train(replicas, "torchrun", path, accumulate=5), here)
    sys.stdout.write("SAME\\n")
    """
    )
    assert run(tmp_path, 3, script).count("SAME") == 3


@pytest.mark.slow
def test_each_rank_has_its_share_of_passes_and_all_answers(tmp_path: Path) -> None:
    """Predictions and statistics come from each stage's first rank, and arrive at all."""
    script = (
        TRAIN
        + """
    model, t = trainer_of((1, 2), "torchrun", mlp)
    with t:
        for x, y in data[:6]:
            t.step(x, y)
        t.flush()
        own = t._run.executor.stage.meter.stats().counts["forward"]
        counts = [s.counts["forward"] for s in t.stats]
        predicted = torch.cat(list(t.predict([x for x, _ in data])))
    assert counts == [24, 12] and own == (24 if rank == 0 else 12), (counts, own)
    with torch.no_grad():
        same(predicted, torch.cat([model.eval()(x) for x, _ in data]))
    sys.stdout.write("SAME\\n")
    """
    )
    assert run(tmp_path, 3, script).count("SAME") == 3


@pytest.mark.slow
def test_a_death_names_the_rank(tmp_path: Path) -> None:
    """Within seconds, and nobody hangs who waits for sums with it."""
    script = (
        TRAIN
        + """
    with trainer_of((1, 2), "torchrun")[1] as t:
        for i in range(10_000):
            t.step(*data[i % 7])
            if i == 20 and rank == 2:
                print("DEAD", flush=True)
                os.kill(os.getpid(), 9)
    """
    )
    ranks = Ranks(tmp_path, 3, script)
    begun = ranks.until(2, "DEAD")
    (first, told), (second, too), (killed, _) = ranks.end()
    assert time.monotonic() - begun < 20
    assert (first, second, killed) == (1, 1, -9)
    for said in (told, too):
        assert "WorkerError: stage 1 (2 of 2) (rank 2 on" in said
        assert "is gone" in said


def test_another_number_of_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"3 processes for stages of 1 \+ 1 \+ 2: start 4"):
        check(Seats((1, 1, 2)))

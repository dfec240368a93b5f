"""One stage per rank of a launcher. The oracle is the inline executor, in the same process, to the bit."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dtrp
from dtrp.runtime import mesh, world
from dtrp.runtime.routed import Seats

from .ranks import Ranks, ended, run
from .test_rebalance import two_plans
from .toys import SGD, compiled, cross_entropy, mlp

SAME = """
    def fresh(tied, norm):
        torch.manual_seed(0)
        return Tied() if tied else mlp(norm=norm)

    def train(model, executor, data, plan=None, **knobs):
        pipe = dtrp.compile(model, n_gpus=K, example_inputs=data[0][0], plan=plan)
        with trainer(pipe, executor, watchdog=30.0, **knobs) as t:
            for x, y in data:
                t.step(x.clone(), y.clone())
            found = t.evaluate(data[:3]), t.grad_norm
            for x, y in data[:3]:
                t.step(x, y)
        return pipe.plan, (t.losses, *found, t.updates, t.lr, t.skipped)

    def compare(tied=False, norm=True, data=None, **knobs):
        data = data or [*batches(12, size=6), *batches(1, size=4)]
        there, here = fresh(tied, norm), fresh(tied, norm)
        plan, said = train(there, "auto", data, **knobs)
        _, expected = train(here, "inline", data, plan, **knobs)
        assert repr(said) == repr(expected), (said, expected)
        assert same(there.state_dict(), here.state_dict())
        print("SAME")
"""


def test_ranks_train_to_the_bits_of_inline(tmp_path: Path) -> None:
    """Weights, losses, evaluation and norms, on every rank, with BatchNorm, dropout, a skip connection, tied
    weights, clipping, micro-batches and a smaller last batch. If this fails, ranks train another model."""
    script = (
        SAME
        + """
    K = 2
    compare()
    compare(tied=True, optimizer=ADAMW, max_grad_norm=0.1)
    compare(micro_batches=2, method="1f1b")
    metrics = __import__("torchmetrics.classification").classification  # which would ask all ranks
    said = []
    for executor in ("auto", "inline"):
        with trainer(compiled(mlp()), executor, watchdog=30.0) as t:
            t.step(*batches(1)[0])
            said.append(t.evaluate(batches(3), metric=metrics.MulticlassF1Score(3)))
    assert said[0] == said[1], said
    print("SAME")
    """
    )
    assert run(tmp_path, 2, script).count("SAME") == 8


@pytest.mark.slow
def test_ranks_train_to_the_bits_of_inline_in_all_orders(tmp_path: Path) -> None:
    """Three stages, every order and method, long skips, losses that are given up, float16's scale."""
    script = (
        SAME
        + """
    K = 3
    for method in ("dtrp", "dtr", "fdg", "adl", "bp", "gpipe", "1f1b"):
        compare(method=method)
        compare(tied=True, method=method, accumulate=2)
    compare(schedule="lean", micro_batches=3, tied=True, optimizer=ADAMW)
    compare(schedule="lean", max_grad_norm=0.1, max_grad_norm_lag=True)
    compare(batch_compensation=3, exact_start=3)
    compare(data=[(x / (i != 4), y) for i, (x, y) in enumerate(batches(10))], on_nonfinite="skip", norm=False)
    compare(data=batches(200), tied=True)
    """
    )
    assert run(tmp_path, 3, script).count("SAME") == 3 * 19


@pytest.mark.slow
def test_payloads_that_stay_on_their_devices(tmp_path: Path) -> None:
    """The way of values on accelerators, whose communicators know no tags: apart from their notes, in their
    order. gloo stands in NCCL's place. If this fails, devices get other values, or wait for ever."""
    script = (
        SAME
        + """
    from dtrp.runtime import mesh

    three = lambda self: (mesh._group(self._by_replica) for _ in range(3))
    mesh.Mesh.on_device = lambda self, device: mesh.OnDevice(*three(self))
    K = 3
    compare(schedule="lean", micro_batches=3, tied=True, optimizer=ADAMW)
    compare(max_grad_norm=0.1)
    """
    )
    assert run(tmp_path, 3, script).count("SAME") == 6


@pytest.mark.parametrize(
    ("other", "kind", "one_each"),
    [("GPU-2", "cuda", True), ("GPU-1", "cuda", False), ("GPU-2", "xpu", False), ("", "mps", False)],
)
def test_ranks_with_a_device_each_have_communicators_for_it(
    other: str, kind: str, one_each: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by what the devices are, since each rank may be shown its own one alone, as number 0. NCCL must
    not end the process before the ranks have said who is gone."""
    handling = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    monkeypatch.setenv(handling, "")
    monkeypatch.delenv(handling)
    monkeypatch.setattr(mesh.accelerators, "identity", lambda device: "GPU-1")
    monkeypatch.setattr(mesh, "_group", lambda ranks, backend: (ranks, backend))
    ranks = object.__new__(mesh.Mesh)
    ranks.seats, ranks.n_stages, ranks.n_processes = Seats((1, 1)), 2, 2
    ranks.address, ranks.size = "here", 2
    mine = "mps" if kind == "mps" else "cuda"  # of which torch names gloo
    found = [("here", "GPU-1", mine), ("here", other, kind)]
    monkeypatch.setattr(ranks, "gather", lambda what, place, all_replicas: found)
    groups = ranks.on_device(torch.device(mine, 0))
    pipeline, stages = ([[0, 1]], "nccl"), ([[0], [1]], "nccl")
    assert groups == ((pipeline, pipeline, stages) if one_each else None)
    assert os.environ.get(handling) == ("0" if one_each else None)


@pytest.mark.slow
def test_cuts_move_on_ranks(tmp_path: Path) -> None:
    """As inline: a move is a save and a load. Rank 0 decides; all make new links, in which nothing of the old
    stages' is on its way."""
    script = """
    from pathlib import Path
    from dtrp import planning
    from dtrp.runtime.rebalance import Move
    from tests.runtime.test_rebalance import AT, KNOBS, saved_and_loaded, two_plans

    plan, other = two_plans()

    def decide(made, request, stats):
        assert rank == 0
        if made.plan.stage_of != other.stage_of:
            return Move((2.0, 1.0), (1.5, 1.5), 200.0, 150.0, 3, (made.graph, other, request.training))

    planning.better_cut = decide
    model = mlp()
    pipe = compiled(model, plan=plan)
    with trainer(pipe, "auto", rebalance=AT, **KNOBS) as t:
        for x, y in batches(16):
            t.step(x, y)
        t.flush()
        losses, moves = list(t.losses), t.report.moves
    assert [move.batch for move in moves] == [AT]
    assert pipe.plan.stage_of == other.stage_of
    expected, theirs = saved_and_loaded(Path(f"run.{rank}"))
    assert same(model.state_dict(), expected)
    assert losses == theirs
    print("SAME")
    """
    assert run(tmp_path, 2, script).count("SAME") == 2


def test_rank_0s_clock_is_asked_rarely_and_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking holds all ranks up. An interval of ten minutes of batches that take 0.1 s, then 2 s: noticed at
    the second batch after its end at the latest, with few questions."""
    now, questions = [0.0], [0]
    monkeypatch.setattr(world.time, "monotonic", lambda: now[0])
    ranks = object.__new__(world.Together)
    ranks._asked = {}

    def first(what: str, function: Callable[[], object]) -> object:
        questions[0] += 1
        return function()

    monkeypatch.setattr(ranks, "first", first)
    for pace in (0.1, 2.0):
        moment = now[0] + 600.0
        while not ranks.due("autosave", moment):
            now[0] += pace
            assert now[0] < moment + 2 * pace
        assert now[0] >= moment
        assert questions[0] < 30
        questions[0] = 0


@pytest.mark.slow
def test_gpipe_has_room_for_all_its_parts(tmp_path: Path) -> None:
    """The last stage sends gradients of parts while the first still sends others: with room for three
    messages each way, larger than a note, both waited for ever."""
    script = """
    from torch import nn
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(4)))
    x, y = torch.randn(192, 256), torch.randint(0, 256, (192,))
    pipe = dtrp.compile(model, 2, example_inputs=x)
    with trainer(pipe, "torchrun", method="gpipe", micro_batches=12, watchdog=10.0) as t:
        t.step(x, y)
        t.flush()
        if rank == 0:  # what was read is free, as far as the last gradients say so
            assert len(t._run.executor.links._senders[1].held) <= 1
        print("TRAINED", len(t.losses))
    """
    assert run(tmp_path, 2, script).count("TRAINED 1") == 2


@pytest.mark.slow
def test_the_quickstart_runs_on_ranks(tmp_path: Path) -> None:
    """The example, on four ranks, gives the workers' weights, where nothing is chosen by the clock: cuts that
    move, and micro-batches, whose price is another with another executor."""
    root = Path(dtrp.__file__).parents[1]
    script = f"""
    import runpy
    sys.path.insert(0, {str(root / "examples")!r})
    made = []
    compile = dtrp.compile
    dtrp.compile = lambda model, *a, **k: made.append(compile(model, *a, **k)) or made[-1]
    made_trainer, fixed = dtrp.Pipeline.trainer, dict(rebalance=False, micro_batches=2)
    dtrp.Pipeline.trainer = lambda *a, **k: made_trainer(*a, **dict(k, **fixed))
    sys.argv = ["quickstart.py", "--epochs", "2"]
    runpy.run_path({str(root / "examples" / "quickstart.py")!r}, run_name="__main__")
    if rank == 0:
        plan = made[0].plan
        dtrp.compile = lambda model, *a, **k: made.append(compile(model, *a, plan=plan, **k)) or made[-1]
        for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
        runpy.run_path({str(root / "examples" / "quickstart.py")!r}, run_name="__main__")
        assert same(made[0].model.state_dict(), made[1].model.state_dict())
        print("SAME")
    """
    assert run(tmp_path, 4, script).count("SAME") == 1


def test_a_plan_that_comes_from_elsewhere_is_for_its_own_example() -> None:
    """Where costs are measured, ranks find different plans, and follow rank 0's; the batch at hand by then
    may be of another size than the example that all of them planned for."""
    plan, other = two_plans()
    told = compiled(mlp(), plan=other)._planning.planned()
    pipe = compiled(mlp(), plan=plan)
    larger = torch.randn(6, 8)
    pipe(larger)
    pipe._planning.adopt(told)
    pipe._planning.prepare((larger,), {})
    assert pipe.plan.stage_of == other.stage_of
    assert pickle.loads(pickle.dumps(pipe)).plan.stage_of == other.stage_of


def test_what_makes_no_whole_pipelines_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any process group is made."""
    pipe = dtrp.compile(mlp(), n_gpus=2)
    with pytest.raises(ValueError, match="no launcher started"):
        pipe.trainer(cross_entropy, SGD, executor="torchrun")
    launch = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in launch.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="3 processes cannot make pipelines of 2 stages"):
        pipe.trainer(cross_entropy, SGD)
    assert dtrp.compile(mlp()).n_stages == 3


def test_the_launcher_says_how_many_stages_share_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the planner would put the border between hosts where there is none."""
    here = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": "1"}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    for local, nodes in (("1", (0, 1, 2)), ("3", (0, 0, 0))):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        pipe = compiled(mlp(), 3, bandwidth={"node": "10GB", "net": "1GB"})
        assert (pipe.plan.node_of or (0, 0, 0)) == nodes  # empty: one host


FAULTS = """
    def loop(fault=lambda i: None, loss_fn=cross_entropy, ends=60, watchdog=20.0, **knobs):
        try:
            with trainer(compiled(mlp(6), n_stages=K), "auto", loss_fn, watchdog=watchdog, **knobs) as t:
                for i, (x, y) in enumerate(batches(ends)):
                    fault(i)
                    t.step(x, y)
                t.flush()
        except Exception as e:
            print(f"TOLD {time.monotonic():.2f} {type(e).__name__}: {e}".replace("\\n", " | "))

    def die(number):
        print(f"DIES {time.monotonic():.2f}")
        os.kill(os.getpid(), number)

    def bad(output, target):
        if rank == K - 1 and output.requires_grad:
            raise ValueError("a bad loss")
        return cross_entropy(output, target)
"""


def told(said: str, start: str = "TOLD") -> list[tuple[float, str]]:
    """When something was told, and what."""
    lines = [line.partition(start)[2].split(maxsplit=1) for line in said.splitlines() if start in line]
    return [(float(line[0]), "".join(line[1:])) for line in lines]


@pytest.mark.slow
def test_what_goes_wrong_on_one_rank_is_told_on_all(tmp_path: Path) -> None:
    """An exception of a stage, one of the script, batches that differ, calls or settings that differ, a
    process that dies: each in turn, in the same processes. Without word from others a rank would wait for
    ever."""
    script = (
        FAULTS
        + """
    K = 2
    loop(loss_fn=bad)
    loop(lambda i: 1 / 0 if rank == 1 and i == 20 else None)
    x, y = batches(1)[0]
    with trainer(compiled(mlp(6), n_stages=K), "auto") as t:
        try:
            t.step(x + rank, y)
            t.flush()
        except dtrp.WorkerError as e:
            print(f"TOLD 0 {e}")
    with trainer(compiled(mlp(6), n_stages=K), "auto") as t:
        try:
            t.step(x, y)
            t.flush()
            t.stats if rank else t.grad_norm
        except dtrp.WorkerError as e:
            print(f"TOLD 0 {e}".splitlines()[0])
    try:
        with trainer(compiled(mlp(6), n_stages=K), "auto", max_grad_norm=1.0 + rank) as t:
            t.step(x, y)
    except ValueError as e:
        print(f"TOLD 0 {e}")
    with trainer(compiled(mlp(6), n_stages=K), "auto", watchdog=4.0) as t:
        try:
            t.step(x, y)
            for _ in range(9):
                t.flush() if rank else t.step(x, y)
        except dtrp.WorkerError as e:
            print(f"TOLD 0 {e}".splitlines()[0])
    loop(lambda i: die(9) if rank == 1 and i == 20 else None)
    """
    )
    (code, first), (killed, second) = Ranks(tmp_path, 2, script).end()
    assert (code, killed) == (0, -9), first + second
    here, there = [text for _, text in told(first)], [text for _, text in told(second)]
    assert here[0].startswith("WorkerError: stage 1 failed: ValueError: a bad loss"), here
    assert "in bad" in here[0]  # the traceback
    assert here[0] == there[0]
    assert "the script on stage 1 (rank 1 on 127.0.0.1) left its trainer: ZeroDivisionError" in here[1]
    assert there[1] == "ZeroDivisionError: division by zero"
    assert "rank 0 and rank 1 were given different batches" in here[2]
    assert here[2] == there[2]
    assert "must make the same calls to its trainer on every rank" in here[3], here[3]
    assert here[4] == there[4]
    assert here[4].startswith("max_grad_norm is 1.0 on rank 0 and 2.0 on rank 1: give"), here[4]
    assert "waiting for stage 1" in here[5], here[5]
    assert "the same calls to its trainer, with as many batches" in here[5]
    (moment, last), (death, _) = told(first)[-1], told(second, "DIES")[-1]
    assert "stage 1 (rank 1 on 127.0.0.1) is gone" in last
    assert "by peer" in last
    assert moment - death < 20.0


@pytest.mark.slow
def test_a_look_at_a_model_of_which_a_rank_has_a_part_is_told_of(tmp_path: Path) -> None:
    """Once, and not where it has the whole: an average of weights would mix new and old without a word."""
    script = """
    model = mlp(6)
    with trainer(compiled(model, n_stages=2), "auto") as t:
        for x, y in batches(4):
            t.step(x, y)
        t.sync()
        list(model.parameters())
        print("WHOLE", flush=True)
        t.step(x, y)
        model.state_dict()
        print("ASKED", flush=True)
        hooks = torch.nn.modules.module._global_forward_pre_hooks
        assert not hooks, "torch.compile compiles no stage of this process then"
        t.flush()
        model.state_dict()
    """
    for code, said in Ranks(tmp_path, 2, script).end():
        assert code == 0, said
        whole, part = said.split("WHOLE")
        assert "on every rank" not in whole
        assert part.split("ASKED")[0].count("call trainer.sync() before, on every rank") == 1
        assert "on every rank" not in part.split("ASKED")[1]


@pytest.mark.slow
def test_who_waits_for_one_is_woken_also_when_another_has_left(tmp_path: Path) -> None:
    """One rank may notice that a second is stopped, and end, before a third does: that one waited on."""
    script = """
    import threading
    from dtrp.runtime.mesh import Mesh
    from dtrp.runtime.routed import Seats
    mesh = Mesh(Seats((1, 1, 1)))
    mesh.barrier()
    if rank == 0:
        os._exit(0)
    elif rank == 1:
        time.sleep(100)
    else:
        threading.Timer(3.0, mesh.poison).start()
        try:
            mesh.down.recv([torch.zeros(1)], 1, 0).wait()
        except RuntimeError:
            print("WOKEN")
    """
    ranks = Ranks(tmp_path, 3, script)
    try:
        assert "WOKEN" in ended(ranks.processes[2], 60.0)[1]
    finally:
        ranks.processes[1].kill()
    ranks.end()


@pytest.mark.slow
def test_the_last_word_of_who_has_the_store_is_heard(tmp_path: Path) -> None:
    """Without a launcher's own store it is gone with rank 0, at once; what is left would be that."""
    script = (
        FAULTS
        + """
    K = 2
    loop(lambda i: 1 / 0 if rank == 0 and i == 20 else None)
    os._exit(0)
    """
    )
    (_, first), (_, second) = Ranks(tmp_path, 2, script).end()
    assert "ZeroDivisionError" in told(first)[0][1]
    assert "(rank 0 on 127.0.0.1) left its trainer: ZeroDivisionError: " in told(second)[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_peer_that_is_gone_is_named_within_the_watchdog(tmp_path: Path, victim: int, how: str) -> None:
    """Rank 0 has the key-value store through which ranks hear of each other: its end is noticed too."""
    script = (
        FAULTS
        + f"""
    import signal
    K = 3
    loop(lambda i: die(signal.{how}) if rank == {victim} and i == 20 else None, watchdog=6.0, ends=10**4)
    """
    )
    ranks = Ranks(tmp_path, 3, script)
    others = [rank for rank in range(3) if rank != victim]
    said = {rank: ended(ranks.processes[rank], 100.0) for rank in others}
    ranks.processes[victim].kill()
    (death, _), *_ = told(ended(ranks.processes[victim], 10.0)[1], "DIES")
    for rank in others:
        code, text = said[rank]
        (moment, what), *_ = told(text)
        assert code == 0
        assert f"stage {victim} (rank {victim} on 127.0.0.1)" in what
        assert moment - death < 6.0 + 4.0, text

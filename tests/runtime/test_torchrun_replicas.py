"""Several pipelines of one model: trained as one pipeline is on the joined batches.

In float64, where sums in another order differ by far less than any mistake would: to 1e-12.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from dtrp.runtime.joint_norm import alone

from .ranks import run

JOINED = """
    STAGES = 2
    replica = rank // STAGES
    CLOSE = {torch.float64: dict(rtol=1e-12, atol=1e-13), torch.float32: dict(rtol=1e-6, atol=1e-6)}

    def train(executor, cut, plan=None, norm=None, dtype=torch.float64, **knobs):
        torch.manual_seed(0)
        model = Tied(norm).to(dtype)
        data = batches(8, size=8) + batches(1, size=5, seed=3)  # shares of 6 and 2, then of 3 and 2
        data = [(x.to(dtype), y) for x, y in data]
        pipe = dtrp.compile(model, n_gpus=STAGES, example_inputs=data[0][0], plan=plan)
        with trainer(pipe, executor, watchdog=60.0, **knobs) as t:
            for x, y in data:
                t.step(*cut(x, y))
            t.flush()
            found = [*t.losses, t.grad_norm, *t.evaluate([cut(*data[0])]).values(), t.updates, t.lr]
        return pipe.plan, model.state_dict(), torch.tensor(found, dtype=torch.float64)

    def shared(x, y):
        border = len(x) - 2
        part = slice(None, border) if replica == 0 else slice(border, None)
        return x[part], y[part]

    def compare(norm=None, dtype=torch.float64, there=None, **knobs):
        plan, there, said = train("auto", shared, norm=there or norm, dtype=dtype, **knobs)
        _, here, expected = train("inline", lambda x, y: (x, y), plan, norm=norm, dtype=dtype, **knobs)
        torch.testing.assert_close(said, expected, **CLOSE[dtype])
        for name in here:
            torch.testing.assert_close(there[name], here[name], **CLOSE[dtype])
        print("SAME")
"""


@pytest.mark.slow
def test_replicas_train_as_one_pipeline_does(tmp_path: Path) -> None:
    """Two pipelines of two stages, parts of unequal size, momentum, a clipped norm over tied weights."""
    assert run(tmp_path, 4, JOINED + "\n    compare(max_grad_norm=0.3)\n").count("SAME") == 4


def test_sync_batch_norm_is_itself_again_after_the_last_trainer() -> None:
    """Whatever the order in which two are left: else the script's own DistributedDataParallel would not
    synchronise any more."""
    theirs = nn.SyncBatchNorm.forward
    first, second = alone(), alone()
    with first:
        second.__enter__()
    assert nn.SyncBatchNorm.forward is not theirs
    second.__exit__(None, None, None)
    assert nn.SyncBatchNorm.forward is theirs


@pytest.mark.slow
def test_replicas_train_as_one_pipeline_does_with_everything(tmp_path: Path) -> None:
    """AdamW, accumulation, micro-batches and exact orders, statistics over all samples, a batch that one
    replica has to give up; sums that begin in the backward pass."""
    script = (
        JOINED
        + """
    import torch.distributed as dist
    summed, passes = dist.all_reduce, []
    backward = torch.autograd.backward

    def watched(*arguments, **options):
        passes.append(0)
        backward(*arguments, **options)
        passes.append(None)

    def counted(tensor, **options):
        if passes and passes[-1] is not None and options.get("async_op"):
            passes[-1] += 1
        return summed(tensor, **options)

    torch.autograd.backward, dist.all_reduce = watched, counted
    compare()
    torch.autograd.backward, dist.all_reduce = backward, summed
    begun = [n for n in passes if n is not None]
    # The first stage's tied weight waits for what the last one says of it.
    assert sum(begun) >= 9 if rank % STAGES else not any(begun), begun

    compare(dtype=torch.float32)
    from dtrp.runtime import mesh
    there, groups = mesh.Mesh.on_device, mesh._group
    of = lambda self: (self._by_replica, self._by_replica, self._by_stage)
    mesh.Mesh.on_device = lambda self, device: mesh.OnDevice(*map(groups, of(self)))
    compare()  # as on devices, with gloo in NCCL's place
    mesh.Mesh.on_device = there
    compare(optimizer=partial(torch.optim.AdamW, lr=0.01))
    compare(accumulate=4)
    compare(method="1f1b", micro_batches=2)
    for method in ("dtrp", "1f1b", "fdg"):
        compare(norm=nn.BatchNorm1d, there=nn.SyncBatchNorm, method=method)
    try:
        train("auto", shared, norm=nn.SyncBatchNorm, on_nonfinite="skip")
    except ValueError as e:
        assert "SyncBatchNorm in several replicas cannot give up batches" in str(e)
        print("SAME")

    def spoiled(x, y):
        x, y = shared(x, y)
        return (x / 0, y) if replica == 1 and bool((x == bad[0, 0]).any()) else (x, y)

    bad = batches(8, size=8)[4][0][7:].double()
    plan, there, said = train("auto", spoiled, on_nonfinite="skip")
    spoiled_alone = lambda x, y: (x / 0, y) if bool((x == bad[0, 0]).any()) else (x, y)
    _, here, expected = train("inline", spoiled_alone, plan, on_nonfinite="skip")
    for name in here:
        torch.testing.assert_close(there[name], here[name], **CLOSE[torch.float64])
    print("SAME")
    """
    )
    assert run(tmp_path, 4, script).count("SAME") == 4 * 11

"""Several pipelines of one model: trained as one pipeline is on the joined batches."""

from __future__ import annotations

from pathlib import Path

import pytest

from .ranks import run

JOINED = """
    from torch import nn
    from functools import partial

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)
            self.c.weight = self.a.weight

        def forward(self, x):
            return self.head(self.c(torch.tanh(self.b(torch.tanh(self.a(x))))))

    STAGES = 2
    replica = rank // STAGES

    def train(executor, cut, plan=None, **knobs):
        torch.manual_seed(0)
        model = Tied()
        data = batches(8, size=8) + batches(1, size=5, seed=3)  # shares of 6 and 2, then of 3 and 2
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

    def compare(**knobs):
        plan, there, said = train("auto", shared, **knobs)
        _, here, expected = train("inline", lambda x, y: (x, y), plan, **knobs)
        torch.testing.assert_close(said, expected, rtol=2e-5, atol=1e-6)
        for name in here:
            torch.testing.assert_close(there[name], here[name], rtol=1e-5, atol=1e-6)
        print("SAME")
"""


def test_replicas_train_as_one_pipeline_does(tmp_path: Path) -> None:
    """Two pipelines of two stages, parts of unequal size, momentum, a clipped norm over tied weights."""
    assert run(tmp_path, 4, JOINED + "\n    compare(max_grad_norm=0.3)\n").count("SAME") == 4


@pytest.mark.slow
def test_replicas_train_as_one_pipeline_does_with_everything(tmp_path: Path) -> None:
    """AdamW (its first steps are signs of gradients: eps makes them comparable), accumulation, micro-batches
    and exact orders, a batch that one replica has to give up; then what they save, in other stages."""
    script = (
        JOINED
        + """
    compare(optimizer=partial(torch.optim.AdamW, lr=0.01, eps=1e-3))
    compare(accumulate=3)
    compare(method="1f1b", micro_batches=2)

    def spoiled(x, y):
        x, y = shared(x, y)
        return (x / 0, y) if replica == 1 and bool((x == bad[0, 0]).any()) else (x, y)

    bad = batches(8, size=8)[4][0][7:]
    plan, there, said = train("auto", spoiled, on_nonfinite="skip")
    spoiled_alone = lambda x, y: (x / 0, y) if bool((x == bad[0, 0]).any()) else (x, y)
    _, here, expected = train("inline", spoiled_alone, plan, on_nonfinite="skip")
    for name in here:
        torch.testing.assert_close(there[name], here[name], rtol=1e-5, atol=1e-6)

    model, data = mlp(), batches(6, size=8)
    with trainer(compiled(model), "auto", watchdog=60.0) as t:
        sampler = t.sampler(range(10), shuffle=False)
        assert list(sampler) == list(range(replica, 10, 2))
        for x, y in data:
            t.step(x[replica::2], y[replica::2])
        t.save("run/")
        held = {n: b.clone() for n, b in model.named_buffers()}
    if rank == 0:
        plain = mlp(seed=1)
        dtrp.load_weights(plain, "run/")
        assert same(plain.state_dict(), model.state_dict())
        with trainer(compiled(plain, 3)) as t:
            t.load("run/")
            t.step(*data[0])
    torch.save(held, f"buffers.{rank}")
    import torch.distributed as dist
    dist.barrier()
    assert same(held, torch.load("buffers.0"))
    print("SAME")
    """
    )
    assert run(tmp_path, 4, script).count("SAME") == 16

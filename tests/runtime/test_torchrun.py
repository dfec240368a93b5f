"""One stage per rank of a launcher. The oracle is the inline executor, in the same process, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

import dtrp

from .ranks import run
from .toys import SGD, cross_entropy, mlp

SAME = """
    from torch import nn

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)
            self.c.weight = self.a.weight

        def forward(self, x):
            first = torch.tanh(self.a(x))
            return self.head(self.c(torch.tanh(self.b(first))) + first)

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
    """
    )
    assert run(tmp_path, 2, script).count("SAME") == 6


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
def test_the_quickstart_runs_on_ranks(tmp_path: Path) -> None:
    """The example as it is, on four ranks, gives the workers' weights."""
    root = Path(dtrp.__file__).parents[1]
    script = f"""
    import runpy
    sys.path.insert(0, {str(root / "examples")!r})
    made = []
    compile = dtrp.compile
    dtrp.compile = lambda model, *a, **k: made.append(compile(model, *a, **k)) or made[-1]
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

"""Runs of several ranks on disk: written by all at once, read by any number, gone on with after a restart."""

from __future__ import annotations

from pathlib import Path

import pytest

from .ranks import run

SAVED = """
    import copy
    from dtrp.runtime.checkpoint import digest, read_checkpoint

    DATA = batches(12)

    def trained(executor, n_stages, data, load=None, save=(), model=None, **knobs):
        model = mlp() if model is None else model
        with trainer(compiled(model, n_stages), executor, optimizer=ADAMW, accumulate=5, **knobs) as t:
            if load:
                t.load(load)
            for x, y in data:
                t.step(x, y)
            for path in save:
                t.save(path)
        return copy.deepcopy(model.state_dict())
"""


def test_what_ranks_save_loads_anywhere(tmp_path: Path) -> None:
    """A folder written by two ranks, each its own part, has what a file has; two ranks, three stages in one
    process and the plain model take it over, with gradients that wait and optimizer state."""
    script = (
        SAVED
        + """
    weights = trained("auto", 2, DATA[:8], save=["run.ckpt", "run/"])
    if rank == 0:
        assert sorted(os.listdir("run")) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
        file, folder = read_checkpoint("run.ckpt"), read_checkpoint("run/")
        assert {k: digest(v) for k, v in file.items()} == {k: digest(v) for k, v in folder.items()}
        plain = mlp(seed=1)
        dtrp.load_weights(plain, "run/")
        assert same(plain.state_dict(), weights)
    there = trained("auto", 2, DATA[8:], load="run/")
    assert same(there, trained("inline", 2, DATA[8:], load="run.ckpt"))
    assert same(weights, trained("inline", 3, [], load="run/"))
    print("SAME")
    """
    )
    assert run(tmp_path, 2, script).count("SAME") == 2


@pytest.mark.slow
def test_a_restarted_run_trains_what_it_would_have_trained(tmp_path: Path) -> None:
    """Ranks are killed twice, in the middle of an epoch and at its end, and torchrun starts them again."""
    script = """
    from torch.utils.data import DataLoader, TensorDataset

    class Fault:
        def on_step(self, t, loss):
            for moment, victim in ((14, 1), (27, 0)):
                mark = f"{moment}.{rank}"
                if t._history.fed == moment and rank == victim and dies and not os.path.exists(mark):
                    open(mark, "w").close()
                    os.kill(os.getpid(), 9)

    def fitted(path):
        model = mlp(seed=0)
        x, y = (torch.cat(parts) for parts in zip(*batches(10)))
        loader = DataLoader(TensorDataset(x, y), 4, shuffle=True)
        torch.manual_seed(3)
        with trainer(compiled(model), "auto", autosave=(path, 1e-9), watchdog=20.0) as t:
            t.fit(loader, 3, resume=path, callbacks=[Fault()])
        return model.state_dict()

    dies = True
    there = fitted("killed")
    dies = False
    assert same(there, fitted("whole"))
    print("SAME")
    """
    said = run(tmp_path, 2, script, "--max-restarts=2")
    assert said.count("SAME") == 2
    assert {p.name for p in tmp_path.glob("*.[01]")} == {"14.1", "27.0"}

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


@pytest.mark.slow
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
def test_what_replicas_save_loads_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    """Written by two replicas of two stages, in the middle of an accumulated group: on one replica of three,
    in workers, inline and in the plain model it goes on as inline does from the file. The gradients that wait
    are those of both replicas; in float64, since their sum may come about in another order. (No replica knows
    what the other has of the next gradient: nobody predicts with it here.)"""
    before = (
        "    torch.set_default_dtype(torch.float64)"
        + SAVED
        + """
    replica, model = rank // 2, mlp(norm=False, dropout=0.0)
    parts = [(x[replica::2], y[replica::2]) for x, y in DATA[:8]]
    from dtrp.runtime.predictors import Adam

    class Whole(Adam):
        takes_gradient = False

    joint = dict(predictor=Whole(), micro_batches=1)
    trained("auto", 2, parts, save=["run/", "run.ckpt"], model=copy.deepcopy(model), **joint)
    trained("inline", 2, DATA[:8], save=[f"alone.{rank}"], model=model, **joint)
    file, theirs = read_checkpoint("run.ckpt"), read_checkpoint(f"alone.{rank}")
    assert len(file["gradients"]) == 12
    for section in ("model", "gradients"):
        for name, value in theirs[section].items():
            torch.testing.assert_close(file[section][name], value, rtol=1e-12, atol=1e-13)
    assert file["waiting"] == theirs["waiting"]
    print("SAME")
    """
    )
    assert run(tmp_path, 4, before).count("SAME") == 4
    after = (
        "    torch.set_default_dtype(torch.float64)"
        + SAVED
        + """
    def fresh():
        return mlp(seed=1, norm=False, dropout=0.0)

    def goes_on(executor, n, path):
        return trained(executor, n, DATA[8:], load=path, model=fresh())

    expected = goes_on("inline", 3, "run.ckpt")
    for path in ("run/", "run.ckpt"):
        assert same(goes_on("auto", 3, path), expected)
        plain = fresh()
        dtrp.load_weights(plain, path)
        assert same(plain.state_dict(), read_checkpoint("run.ckpt")["model"])
    if rank == 0:
        assert same(goes_on("workers", 3, "run/"), expected)
        assert same(goes_on("inline", 3, "run/"), expected)
    print("SAME")
    """
    )
    assert run(tmp_path, 3, after).count("SAME") == 3


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


@pytest.mark.slow
def test_a_model_on_meta_is_made_real_stage_by_stage(tmp_path: Path) -> None:
    """From safetensors files, by a function and from a run that ranks saved: each rank's own parameters
    alone, and of the run nothing else is read; they train to the bits of a model that was real from the
    start, into which what they save together loads."""
    script = (
        SAVED
        + """
    import safetensors.torch
    from dtrp.runtime.folder import read_folder

    real = mlp(dropout=0.0)
    if rank == 0:
        os.mkdir("weights")
        state = real.state_dict()
        half = dict(list(state.items())[::2])
        safetensors.torch.save_file(half, "weights/1.safetensors")
        rest = {n: t for n, t in state.items() if n not in half}
        safetensors.torch.save_file(rest, "weights/2.safetensors")

    def fill(name, tensor):
        tensor.copy_(real.get_parameter(name) if "running" not in name and "num" not in name
                     else real.get_buffer(name))

    def on_meta():
        with torch.device("meta"):
            return mlp(dropout=0.0)

    def read(path, wanted=lambda name: True, read=read_folder):
        found = read(path, wanted)
        counted.append(sum(not t.is_meta for t in found["model"].values()))
        return found

    from dtrp.runtime import checkpoint
    checkpoint.read_folder, counted = read, []
    made = []
    for init in ("weights", fill, "nowhere"):
        model = on_meta()
        made.append(model)
        pipe = compiled(model, 2)
        with trainer(pipe, "auto", init=init, optimizer=ADAMW) as t:
            if init == "nowhere":  # a run that was saved in the middle
                t.load("half/")
            for i, (x, y) in enumerate(DATA):
                if init != "nowhere" or i >= 6:
                    t.step(x, y)
                if init != "nowhere" and i == 5:
                    t.save("half/")
            t.save(f"saved.{callable(init)}/")
        here = {n for n, p in model.named_parameters() if not p.is_meta}
        assert here and len(here) < len(list(model.parameters())), here
    whole = mlp(seed=3, dropout=0.0)
    plain = dtrp.compile(real, n_gpus=2, example_inputs=DATA[0][0], plan=pipe.plan)
    assert counted and max(counted) < len(real.state_dict()), counted  # of the run that was loaded
    with trainer(plain, "inline", optimizer=ADAMW) as t:
        for i, (x, y) in enumerate(DATA):
            t.step(x, y)
            if i == 5:
                t.flush()
    dtrp.load_weights(whole, "saved.True/")
    assert same(whole.state_dict(), real.state_dict())
    for model in made:
        for name, p in model.named_parameters():
            assert p.is_meta or torch.equal(p, real.get_parameter(name))
    print("SAME")
    """
    )
    assert run(tmp_path, 2, script).count("SAME") == 2

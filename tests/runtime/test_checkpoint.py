"""Saving and resuming: the resumed run is the run that saved and went on, bit for bit, in whatever stages."""

from __future__ import annotations

import copy
import errno
import math
import os
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import dtrp
from dtrp.runtime import checkpoint
from dtrp.runtime.checkpoint import read_checkpoint, write_checkpoint
from tests.reference.models import GPT_TIED

from .toys import ADAMW, SGD, batches, compiled, mlp, same, trainer

DATA = batches(24)
HALF = 12


def no_decay(name: str, p: nn.Parameter) -> dict[str, Any]:
    return {"weight_decay": 0.0} if p.dim() < 2 else {"weight_decay": 0.1}


def run(
    path: Path | None = None,
    *,
    resume: bool = False,
    n_stages: int = 3,
    executor: str = "inline",
    model: nn.Module | None = None,
    compile_with: dict[str, Any] | None = None,
    data: Any = None,
    **knobs: Any,
) -> tuple[dict[str, Any], list[float], Any]:
    """24 batches: from the beginning, saving after 12; or from the save on."""
    model = mlp() if model is None else model
    data = DATA if data is None else data
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=data[0][:-1], **(compile_with or {}))
    with trainer(pipe, executor, **knobs) as t:
        if resume:
            t.load(path)
            assert len(t.losses) == HALF
        for i, (*x, y) in enumerate(data[len(t.losses) :]):
            t.step(*x, y)
            if path is not None and not resume and i == HALF - 1:
                t.save(path)
        t.flush()
    return copy.deepcopy(model.state_dict()), t.losses, t


RUNS: dict[str, dict[str, Any]] = {
    "momentum": {},
    "adamw, geometric aim": {"optimizer": ADAMW, "horizon": "stage"},
    "difference": {"predictor": "difference"},
    "dtr": {"method": "dtr"},
    "fdg": {"method": "fdg", "grad_shrink": 0.9},
    "bp": {"method": "bp", "optimizer": ADAMW},
    "in the middle of accumulation": {"method": "adl", "accumulate": 5},
    "groups": {"optimizer": partial(torch.optim.AdamW, lr=0.01), "param_groups": no_decay},
    "cosine": {"lr_scheduler": partial(lr_scheduler.CosineAnnealingLR, T_max=24)},
    "one cycle and groups": {
        "lr_scheduler": partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=30),
        "param_groups": no_decay,
    },
    "milestones": {"lr_scheduler": partial(lr_scheduler.MultiStepLR, milestones=[5, 14])},
    "lambda": {"lr_scheduler": partial(lr_scheduler.LambdaLR, lr_lambda=lambda i: 0.9**i)},
    "clipping": {"max_grad_norm": 0.5},
    "shrinking": {"lr_shrink": 0.8},
    "joined": {"batch_compensation": 5},
    "autocast": {"autocast": torch.bfloat16},
}


@pytest.mark.parametrize("name", list(RUNS))
def test_resumed_is_as_if_never_stopped(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    expected, losses, _ = run(path, **RUNS[name])
    weights, resumed, _ = run(path, resume=True, **RUNS[name])
    assert resumed == losses
    assert same(weights, expected)


def by_two(optimizer: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
    """A warm-up and a decay."""
    return lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.ConstantLR(optimizer, 0.5, 7), lr_scheduler.ExponentialLR(optimizer, 0.9)],
        milestones=[7],
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"n_stages": 3}, {"n_stages": 1}),
        ({"n_stages": 1}, {"n_stages": 4}),
        ({"n_stages": 4}, {"n_stages": 2, "compile_with": {"recompute": True}}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*epoch parameter in `scheduler.step")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_other_stages(before: dict[str, Any], after: dict[str, Any], tmp_path: Path) -> None:
    """Exact back-propagation, so that the number of stages does not matter to what is right."""
    path = tmp_path / "run.ckpt"
    knobs: dict[str, Any] = {
        "method": "bp",
        "optimizer": ADAMW,
        "param_groups": no_decay,
        "lr_scheduler": by_two,
    }
    knobs["accumulate"] = 2

    def calm() -> nn.Module:
        return mlp(dropout=0.0).double()

    data = [(x.double(), y) for x, y in DATA]
    expected, losses, _ = run(path, model=calm(), data=data, **before, **knobs)
    weights, resumed, _ = run(path, resume=True, model=calm(), data=data, **after, **knobs)
    assert resumed == losses
    assert same(weights, expected)


def gpt_data() -> list[Any]:
    return [(*b.args, b.target) for b in GPT_TIED.batches(24)]


@pytest.mark.parametrize("knobs", [{}, {"accumulate": 5, "method": "adl"}, {"predictor": "difference"}])
def test_tied_weights(knobs: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    knobs = {**knobs, "loss_fn": GPT_TIED.loss_fn, "data": gpt_data(), "optimizer": ADAMW}
    knobs["optimizer"] = SGD if knobs.get("predictor") else ADAMW
    expected, losses, _ = run(path, model=GPT_TIED.make(), **knobs)
    weights, resumed, _ = run(path, resume=True, model=GPT_TIED.make(), **knobs)
    assert resumed == losses
    assert same(weights, expected)


def test_from_worker_processes_to_this_one(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    expected, losses, _ = run(path, n_stages=2, executor="workers", optimizer=ADAMW)
    weights, resumed, _ = run(path, resume=True, n_stages=2, executor="inline", optimizer=ADAMW)
    assert resumed == losses
    assert same(weights, expected)


@pytest.mark.slow
def test_from_this_process_to_workers(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    expected, losses, _ = run(path, n_stages=2, executor="inline", optimizer=ADAMW)
    weights, resumed, _ = run(path, resume=True, n_stages=2, executor="workers", optimizer=ADAMW)
    assert resumed == losses
    assert same(weights, expected)


@pytest.mark.slow
def test_one_stage_in_a_worker_draws_what_this_process_would(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    torch.manual_seed(5)
    # One stage would get all cores there, and this process has one thread: sums would be split otherwise.
    expected, losses, _ = run(path, n_stages=1, executor="workers", threads=1)
    weights, resumed, _ = run(path, resume=True, n_stages=1, executor="inline")
    assert resumed == losses
    assert same(weights, expected)


def test_what_the_plain_model_reads(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    model = mlp()
    pipe = compiled(model)
    with trainer(pipe) as t:
        for x, y in DATA[:5]:
            t.step(x, y)
        t.save(path)
        saved = torch.load(path, weights_only=True)["model"]
    plain = mlp(seed=9)
    plain.load_state_dict(saved, strict=True)
    assert same(plain.state_dict(), model.state_dict())


def test_counters_losses_and_generators_come_back(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    with trainer(compiled()) as t:
        t.fit(DATA[:7], 2)
        t.save(path)
        losses, drawn = list(t.losses), torch.rand(3)
    with trainer(compiled(), seed=8) as t:
        t.load(path)
        assert torch.equal(torch.rand(3), drawn)
        assert t.losses == losses
        assert t.epochs == 2


def test_back_to_an_earlier_moment_of_the_same_run(tmp_path: Path) -> None:
    """Also with batches in flight, and to before the first step."""
    model = mlp()
    start = copy.deepcopy(model.state_dict())
    with trainer(compiled(model, 3), optimizer=ADAMW) as t:
        t.save(tmp_path / "0")
        for x, y in DATA[:4]:
            t.step(x, y)
        t.save(tmp_path / "4")
        ends = []
        for _ in range(2):
            for x, y in DATA[4:10]:
                t.step(x, y)
            ends.append((t.evaluate(DATA[:2]), list(t.losses)))
            t.step(*DATA[0])
            t.load(tmp_path / "4")
        assert ends[0] == ends[1]
        t.load(tmp_path / "0")
        t.sync()
        assert same(model.state_dict(), start)
        assert t.losses == []


# --- Files that are not what they should be -------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "run.ckpt"
    with trainer(compiled()) as t:
        for x, y in DATA[:3]:
            t.step(x, y)
        t.save(path)
    return path


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def altered(path: Path) -> None:
    """One bit of one weight, the zip file's own checksum put right."""
    with zipfile.ZipFile(path) as z:
        parts = {n: bytearray(z.read(n)) for n in z.namelist()}
    largest = max((n for n in parts if "/data/" in n), key=lambda n: len(parts[n]))
    parts[largest][2] ^= 1
    with zipfile.ZipFile(path, "w") as z:
        for name, data in parts.items():
            z.writestr(name, bytes(data))


def foreign(path: Path) -> None:
    torch.save({"model": mlp().state_dict()}, path)


def of_another_version(path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "version": 99}, path)


class Nasty:
    def __reduce__(self) -> Any:
        return os.mkdir, (str(Path(os.environ["DTRP_TEST_FOLDER"]) / "executed"),)


def malicious(path: Path) -> None:
    torch.save({"format": checkpoint.FORMAT, "model": Nasty()}, path)


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (truncated, "cannot be read as a checkpoint; it is truncated"),
        (emptied, "cannot be read as a checkpoint; it is truncated"),
        (altered, "is damaged: its content does not fit its digest"),
        (foreign, "is no file of `trainer.save`"),
        (of_another_version, "has version 99 of the format, this dtrp reads 1 and 2"),
        (malicious, "cannot be read as a checkpoint"),
        (Path.unlink, "there is no file"),
    ],
)
def test_spoilt_files_change_nothing(
    saved: Path, spoil: Any, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DTRP_TEST_FOLDER", str(tmp_path))
    spoil(saved)
    check_refused(saved, text)
    assert not (tmp_path / "executed").exists()


def check_refused(path: Path, text: str, model: nn.Module | None = None, **knobs: Any) -> None:
    model = mlp() if model is None else model
    with trainer(compiled(model), **knobs) as t:
        t.step(*DATA[0])
        t.step(*DATA[1])
        weights, losses = copy.deepcopy(model.state_dict()), list(t.losses)
        drawn = torch.get_rng_state()
        with pytest.raises(dtrp.CheckpointError, match=text):
            t.load(path)
        assert same(model.state_dict(), weights)
        assert t.losses == losses
        assert torch.equal(torch.get_rng_state(), drawn)
        t.step(*DATA[2])


def test_another_model(saved: Path) -> None:
    check_refused(saved, r"belongs to another model: it lacks \['21\.bias'", mlp(6))


def test_another_shape(saved: Path) -> None:
    model = mlp()
    model[-1] = nn.Linear(8, 4)
    check_refused(saved, r"'20.bias' has shape \(3,\)|'20.weight' has shape \(3, 8\)", model)


def test_another_dtype(saved: Path) -> None:
    pipe = dtrp.compile(mlp().double(), n_gpus=2, example_inputs=DATA[0][0].double())
    text = r"torch\.float32 there, .* and torch\.float64 here"
    with trainer(pipe) as t, pytest.raises(dtrp.CheckpointError, match=text):
        t.load(saved)


def test_another_optimizer(saved: Path) -> None:
    check_refused(saved, "saved with the optimizer SGD, this trainer uses AdamW", optimizer=ADAMW)


def test_with_a_scheduler_that_was_not_there(saved: Path) -> None:
    scheduler = partial(lr_scheduler.CosineAnnealingLR, T_max=9)
    check_refused(
        saved, "saved without a learning-rate scheduler, this trainer is with one", lr_scheduler=scheduler
    )


def test_other_parameters_frozen(saved: Path) -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    check_refused(saved, r"trained parameters differ: it lacks \[\], and has \['0.weight'\]", model)


def test_a_file_that_lacks_something(saved: Path) -> None:
    content = read_checkpoint(saved)
    del content["counters"]["seed"]
    write_checkpoint(saved, content)
    check_refused(saved, "is not a checkpoint of a training run: 'seed'")


# --- Writing --------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_previous_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = saved.read_bytes()

    def full(data: Any, file: Any) -> None:
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with trainer(compiled()) as t:
        t.step(*DATA[0])
        with monkeypatch.context() as m:
            m.setattr(torch, "save", full)
            with pytest.raises(dtrp.CheckpointError, match=r"No space left on device\. A previous file"):
                t.save(saved)
        assert saved.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["run.ckpt"]
        t.save(saved)  # and the run goes on
    assert saved.read_bytes() != before


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with trainer(compiled()) as t:
            t.step(*DATA[0])
            t.save(small / "run.ckpt")
            before = (small / "run.ckpt").read_bytes()
            t.step(*DATA[1])
            with pytest.raises(dtrp.CheckpointError, match="could not be written"):
                t.save(small / "run.ckpt")
            assert (small / "run.ckpt").read_bytes() == before
            assert [p.name for p in small.iterdir()] == ["run.ckpt"]
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    with trainer(compiled()) as t, pytest.raises(dtrp.CheckpointError, match="is a folder"):
        t.save(tmp_path)


def test_what_cannot_be_read_back_safely_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(dtrp.CheckpointError, match=r"a\.b\[1\] holds a builtins.object"):
        write_checkpoint(tmp_path / "x", {"a": {"b": [1, object()]}})
    assert not list(tmp_path.iterdir())


def test_plain_data_comes_back_as_it_was(tmp_path: Path) -> None:
    content = {
        "a": {"x": [1, 2.5, None, True, "t"], "y": (1, (2,)), "z": math.inf, 3: torch.zeros(())},
        "t": torch.randn(3, 4).t(),
        "e": torch.empty(0),
        "b": torch.ones(3, dtype=torch.bfloat16),
    }
    write_checkpoint(tmp_path / "x", content)
    found = read_checkpoint(tmp_path / "x")
    assert found["a"]["x"] == content["a"]["x"]
    assert found["a"]["y"] == content["a"]["y"]
    assert all(torch.equal(found[k], content[k]) for k in "teb")

"""Folders of torch.distributed.checkpoint, files of earlier versions, and weights alone."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.optim import lr_scheduler

import dtrp
from dtrp.runtime import checkpoint, folder
from dtrp.runtime.checkpoint import digest, read_checkpoint

from .test_checkpoint import DATA, HALF, Nasty, check_refused, no_decay, run
from .toys import ADAMW, compiled, mlp, same, trainer

VERSION_1 = Path(__file__).parent / "data" / "version_1.ckpt"
"""Written by dtrp 0.1 after 12 batches of `DATA`, with the settings of `EARLIER` and three stages."""
EARLIER: dict[str, Any] = {
    "method": "bp",
    "optimizer": partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "lr_scheduler": partial(lr_scheduler.CosineAnnealingLR, T_max=24),
    "accumulate": 5,
}


def save(path: Any, n_batches: int = 3, model: nn.Module | None = None, **options: Any) -> dict[str, Tensor]:
    model = mlp() if model is None else model
    with trainer(compiled(model), optimizer=ADAMW) as t:
        for x, y in DATA[:n_batches]:
            t.step(x, y)
        t.save(path, **options)
        return copy.deepcopy(model.state_dict())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path / "run", format="dcp")
    return tmp_path / "run"


# --- Folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{}, {"accumulate": 5, "optimizer": ADAMW, "param_groups": no_decay}])
def test_resumed_from_a_folder(knobs: dict[str, Any], tmp_path: Path) -> None:
    path: Any = f"{tmp_path}/run/"
    expected, losses, _ = run(path, **knobs)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [".metadata", "__0_0.distcp"]
    weights, resumed, _ = run(path, resume=True, **knobs)
    assert resumed == losses
    assert same(weights, expected)


def test_a_folder_has_what_a_file_has(tmp_path: Path) -> None:
    with trainer(compiled(), optimizer=ADAMW) as t:
        t.step(*DATA[0])
        t.save(tmp_path / "file")
        t.save(tmp_path / "folder", format="dcp")
    found = [digest(read_checkpoint(tmp_path / name)) for name in ("file", "folder")]
    assert found[0] == found[1]


def test_format_says_more_than_the_paths_end(tmp_path: Path) -> None:
    save(f"{tmp_path}/a/", format="file")
    assert (tmp_path / "a").is_file()
    with trainer(compiled()) as t, pytest.raises(ValueError, match="format='zip': expected 'file', 'dcp'"):
        t.save(tmp_path / "b", format="zip")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_functions_read_a_folder(tmp_path: Path) -> None:
    weights = save(tmp_path / "run", format="dcp")
    state: dict[str, Any] = {"model": mlp(seed=9).state_dict()}
    dcp.load(state, checkpoint_id=tmp_path / "run")
    assert same(state["model"], weights)


def test_a_folder_is_replaced(saved: Path) -> None:
    before = read_checkpoint(saved)
    weights = save(saved, 5, format="dcp")
    assert same(read_checkpoint(saved)["model"], weights)
    assert not same(before["model"], weights)
    assert [p.name for p in saved.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("at", [1, 2])
def test_a_crash_while_a_folder_is_replaced(saved: Path, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and between the two renames. As a killed process, it cleans nothing up."""
    before = digest(read_checkpoint(saved))
    renames = 0

    def rename(a: Any, b: Any) -> None:
        nonlocal renames
        renames += 1
        if renames >= at:
            raise OSError(errno.EIO, "Killed")
        shutil.move(a, b)

    with trainer(compiled()) as t:
        t.step(*DATA[0])
        with monkeypatch.context() as m:
            m.setattr(folder.os, "rename", rename)
            m.setattr(shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises((dtrp.CheckpointError, OSError)):
                t.save(saved, format="dcp")
        assert digest(read_checkpoint(saved)) == before
        t.save(saved, format="dcp")  # and the run goes on
    assert digest(read_checkpoint(saved)) != before
    assert not list(saved.parent.glob("*.previous"))


def test_a_folder_that_cannot_be_put_in_place(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(read_checkpoint(saved))
    true_rename = os.rename

    def rename(a: Any, b: Any) -> None:
        if str(a).endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        true_rename(a, b)

    with trainer(compiled()) as t:
        monkeypatch.setattr(folder.os, "rename", rename)
        with pytest.raises(dtrp.CheckpointError, match=r"Input/output error\. A previous folder"):
            t.save(saved, format="dcp")
    assert digest(read_checkpoint(saved)) == before
    assert [p.name for p in saved.parent.iterdir()] == ["run"]


def test_what_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with trainer(compiled()) as t:
        with pytest.raises(
            dtrp.CheckpointError, match=r"holds other things than a checkpoint: file, notes\.txt"
        ):
            t.save(f"{tmp_path}/")
        with pytest.raises(dtrp.CheckpointError, match="is a file"):
            t.save(tmp_path / "file", format="dcp")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "notes.txt"]


# On Python 3.13 torch's writer complains once more while it is cleaned up.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_folder_on_a_disk_that_is_really_full(tmp_path: Path) -> None:
    import subprocess

    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", small]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with trainer(compiled()) as t:
            t.step(*DATA[0])
            t.save(small / "run", format="dcp")
            before = digest(read_checkpoint(small / "run"))
            t.step(*DATA[1])
            with pytest.raises(dtrp.CheckpointError, match=r"could not be written: .*No space left"):
                t.save(small / "run", format="dcp")
            assert digest(read_checkpoint(small / "run")) == before
            assert [p.name for p in small.iterdir()] == ["run"]
    finally:
        subprocess.run(["umount", small], check=True)


def truncated(path: Path) -> None:
    data = path / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1000])


def without_data(path: Path) -> None:
    (path / "__0_0.distcp").unlink()


def without_metadata(path: Path) -> None:
    (path / ".metadata").unlink()


def altered(path: Path) -> None:
    """One bit of one weight; what torch writes of a tensor has no checksum that it looks at."""
    data = bytearray((path / "__0_0.distcp").read_bytes())
    at = data.find(read_checkpoint(path)["model"]["0.weight"].numpy().tobytes())
    assert at > 0
    data[at] ^= 1
    (path / "__0_0.distcp").write_bytes(bytes(data))


def foreign(path: Path) -> None:
    shutil.rmtree(path)
    dcp.save({"model": mlp().state_dict()}, checkpoint_id=path)


def malicious(path: Path) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(Nasty()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (truncated, "cannot be read as a checkpoint; it is truncated"),
        (without_data, "cannot be read as a checkpoint; it is truncated"),
        (without_metadata, "there is no file|cannot be read as a checkpoint; it is truncated"),
        (altered, "is damaged: its content does not fit its digest"),
        (foreign, "it is no folder of `trainer.save`"),
        (malicious, "it names posix.mkdir"),
        (shutil.rmtree, "there is no file"),
    ],
)
def test_spoilt_folders_change_nothing(
    saved: Path, spoil: Any, text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DTRP_TEST_FOLDER", str(tmp_path))
    spoil(saved)
    check_refused(saved, text, optimizer=ADAMW)
    assert not (tmp_path / "executed").exists()


# --- Files of dtrp 0.1 ------------------------------------------------------------------------------------


def test_a_file_of_version_1_goes_on(tmp_path: Path) -> None:
    expected, losses, _ = run(tmp_path / "run", model=mlp(dropout=0.0), **EARLIER)
    for n_stages in (3, 1):
        model = mlp(dropout=0.0)
        weights, resumed, _ = run(VERSION_1, resume=True, model=model, n_stages=n_stages, **EARLIER)
        assert resumed == pytest.approx(losses, rel=1e-4)  # it may come from another machine
        assert all(torch.allclose(weights[k], expected[k], rtol=1e-4, atol=1e-5) for k in expected)


def test_schedulers_of_version_1_that_differ_by_stage(tmp_path: Path) -> None:
    content = torch.load(VERSION_1, weights_only=True)
    del content["digest"]
    content["sets"][1]["scheduler"]["base_lrs"] = [0.05, 0.05]
    content["digest"] = digest(content)
    torch.save(content, tmp_path / "run")
    check_refused(
        tmp_path / "run", r"was written by dtrp 0\.1 .*dtrp\.load_weights\(model, '.*run'\)", **EARLIER
    )
    model = mlp(seed=9)
    dtrp.load_weights(model, tmp_path / "run")
    assert same(dict(model.state_dict()), dict(content["model"]))


# --- Weights alone ----------------------------------------------------------------------------------------


def of_a_state_dict(path: Path) -> dict[str, Tensor]:
    weights = mlp(seed=4).state_dict()
    torch.save(weights, path)
    return weights


def of_version_1(path: Path) -> dict[str, Tensor]:
    shutil.copy(VERSION_1, path)
    return read_checkpoint(path)["model"]


@pytest.mark.parametrize("make", [save, partial(save, format="dcp"), of_a_state_dict, of_version_1])
def test_weights_alone(make: Any, tmp_path: Path) -> None:
    weights = make(tmp_path / "run")
    model = mlp(seed=9).eval()
    dtrp.load_weights(model, tmp_path / "run")
    assert same(model.state_dict(), weights)
    assert not model.training
    half = mlp(seed=9).half()
    dtrp.load_weights(half, tmp_path / "run")
    assert torch.equal(half[0].weight, weights["0.weight"].half())


class Hidden(nn.Module):
    """With a buffer that its state_dict leaves out."""

    def __init__(self, start: float = 0.0) -> None:
        super().__init__()
        self.body = mlp()
        self.register_buffer("offset", torch.full((3,), start), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.offset


def test_buffers_that_a_state_dict_leaves_out(tmp_path: Path) -> None:
    save(tmp_path / "run", model=Hidden(2.0))
    model = Hidden()
    dtrp.load_weights(model, tmp_path / "run")
    assert model.offset.tolist() == [2.0] * 3


def test_another_models_weights(saved: Path) -> None:
    for other, text in ((mlp(6), "it lacks"), (nn.Sequential(*mlp()[:-1], nn.Linear(8, 4)), "has shape")):
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(dtrp.CheckpointError, match=f"belongs to another model: .*{text}"):
            dtrp.load_weights(other, saved)
        assert same(other.state_dict(), before)


def test_constants_of_tests_are_as_the_fixture_was_made() -> None:
    content = read_checkpoint(VERSION_1)
    assert content["counters"]["batches"] == HALF
    assert torch.load(VERSION_1, weights_only=True)["version"] == 1 != checkpoint.VERSION
    assert VERSION_1.stat().st_size < 50_000

"""``fit(resume=path)``: a run that was broken off and started again trains what it would have trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from .toys import batches, compiled, mlp, same, trainer

X, Y = (torch.cat(parts) for parts in zip(*batches(10), strict=True))


class SaveAt:
    """Saves after these batches, and breaks the run off after the last of them that ``ends``."""

    def __init__(self, path: Path, moments: tuple[int, ...], ends: int | None) -> None:
        self.path, self.moments, self.ends, self.steps = path, moments, ends, 0

    def on_step(self, run: Any, loss: float | None) -> None:
        if run._history.fed in self.moments:
            run.save(self.path)
        if run._history.fed == self.ends:
            raise InterruptedError


def noisy(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A collator that draws, as those that mask tokens do."""
    x, y = (torch.stack(part) for part in zip(*rows, strict=True))
    return x + 0.1 * torch.randn_like(x), y


def fitted(
    path: Path, n_stages: int, whose: str, ends: int | None = None
) -> tuple[dict[str, Tensor], list[float], list[dict[str, Any]]]:
    """Three epochs of ten shuffled batches, saved after each, and after batches 14 and 17."""
    torch.manual_seed(5)
    model = mlp()
    data, own = TensorDataset(X, Y), torch.Generator().manual_seed(3)
    how = {
        "global": {"shuffle": True},
        "loader": {"shuffle": True, "generator": own},
        "sampler": {"sampler": RandomSampler(data, generator=own)},
    }[whose]
    loader = DataLoader(data, 4, collate_fn=noisy, **how)
    run = trainer(compiled(model, n_stages), seed=None)
    with run:
        rows = run.fit(loader, 3, [(X, Y)], resume=path, callbacks=[SaveAt(path, (14, 17), ends)])
    return model.state_dict(), run.losses, rows


@pytest.mark.parametrize(
    ("n_stages", "whose"),
    [
        (1, "global"),
        (2, "loader"),
        (1, "sampler"),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in ((1, "loader"), (2, "global"))),
    ],
)
def test_a_run_goes_on_where_it_was_saved(n_stages: int, whose: str, tmp_path: Path) -> None:
    """Within an epoch and at the end of one, with a generator of its own or the global one, with dropout: if
    this fails, batches are trained twice or left out, or other ones come."""
    expected = fitted(tmp_path / "whole", n_stages, whose)
    for ends in (12, 16):
        with pytest.raises(InterruptedError):
            fitted(tmp_path / "broken", n_stages, whose, ends)
    weights, losses, rows = fitted(tmp_path / "broken", n_stages, whose)
    assert losses == expected[1]
    assert same(weights, expected[0])
    assert rows == expected[2]


def test_a_run_that_was_over_is_over(tmp_path: Path) -> None:
    first = fitted(tmp_path / "run", 2, "loader")
    again = fitted(tmp_path / "run", 2, "loader")
    assert same(first[0], again[0])
    assert first[1:] == again[1:]


class Numbered(torch.utils.data.Sampler[int]):
    """Notes which epochs it was asked for."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Any:
        return iter(range(8))

    def __len__(self) -> int:
        return 8


class Groups(BatchSampler):
    """Batches by number, as those of libraries for several processes."""

    set_epoch = Numbered.set_epoch

    def __init__(self) -> None:
        super().__init__(range(8), 4, drop_last=False)
        self.epochs: list[int] = []


class Drawn(TensorDataset):
    """Has other samples in each epoch."""

    set_epoch = Numbered.set_epoch

    def __init__(self) -> None:
        super().__init__(X, Y)
        self.epochs: list[int] = []


@pytest.mark.parametrize("where", ["sampler", "batch_sampler", "in a batch_sampler", "dataset"])
def test_each_call_of_fit_goes_on_with_the_epochs(where: str) -> None:
    """Samplers shuffle by their number: with 0 each time, ``fit(loader, 1)`` in a loop has one order only. So
    does whatever else a loader takes batches from."""
    data, one, groups, drawn = TensorDataset(X, Y), Numbered(), Groups(), Drawn()
    asked, loader = {
        "sampler": (one, DataLoader(data, 4, sampler=one)),
        "batch_sampler": (groups, DataLoader(data, batch_sampler=groups)),
        "in a batch_sampler": (one, DataLoader(data, batch_sampler=BatchSampler(one, 4, drop_last=False))),
        "dataset": (drawn, DataLoader(drawn, 4)),
    }[where]
    with trainer(compiled()) as t:
        for epochs in (1, 1, 2):
            t.fit(loader, epochs)
    assert asked.epochs == [0, 1, 2, 3]

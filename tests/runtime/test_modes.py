"""Modes that change while a trainer runs: followed never, so told at once."""

from __future__ import annotations

import pytest

from .toys import batches, compiled, mlp, trainer


def test_a_part_that_is_frozen_in_the_middle_is_told() -> None:
    """If it went on, BatchNorm would move where the plain loop's stands still."""
    model = mlp()
    with trainer(compiled(model, 2)) as t:
        (x, y), *_ = batches(1)
        t.step(x, y)
        model[1].eval()
        with pytest.raises(RuntimeError, match=r"a BatchNorm1d was put into eval mode after training began"):
            t.step(x, y)


@pytest.mark.parametrize("back", [True, False])
def test_looking_at_the_model_in_eval_mode_changes_nothing(back: bool) -> None:
    losses = []
    for looks in (False, True):
        model = mlp()
        with trainer(compiled(model, 2)) as t:
            for x, y in batches(6):
                t.step(x, y)
                if looks:
                    model.eval()
                    model(x)
                    model.train(back)
            t.flush()
            losses.append(t.losses)
    assert losses[0] == losses[1]

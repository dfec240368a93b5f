"""The test models are deterministic and their gradients finite: else tests on them would mean little."""

from __future__ import annotations

import pytest
import torch

from tests.reference.models import CASES, GPT_TIED


@pytest.mark.parametrize("name", list(CASES))
def test_made_anew_they_are_alike(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = case.make(), case.make()
    assert torch.equal(torch.get_rng_state(), before)
    for (key, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    for a, b in zip(case.batches(3, last=2), case.batches(3, last=2), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.args, b.args, strict=True))
    batch = case.batches(1)[0]
    loss = case.loss_fn(first(*batch.args), batch.target)
    loss.backward()
    assert torch.isfinite(loss)
    for key, p in first.named_parameters():
        assert p.grad is not None, key
        assert torch.isfinite(p.grad).all(), key
        assert p.grad.abs().sum() > 0 or "bias" in key, key


def test_the_head_is_the_embedding() -> None:
    model = GPT_TIED.make()
    assert model.head.weight is model.tokens.weight

"""Parts that use parameters of others, by hooks or by reaching around: trained as in a plain loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp

OPTIMIZER = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


class Owner(nn.Module):
    """Two layers, and parameters that only a hook uses."""

    def __init__(self, hook: Callable[[Any], Any]) -> None:
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 3)
        self.gate, self.beside = nn.Parameter(torch.rand(6)), nn.Linear(6, 6)
        hook(self)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.first(x))
        return out


def _bound(owner: Any) -> None:
    owner.first[0].register_forward_hook(partial(_scaled, owner))


def _scaled(owner: Any, module: Any, given: Any, out: Tensor) -> Any:
    return out * owner.gate


HOOKS = {
    "of a layer": lambda o: o.first[0].register_forward_hook(lambda m, i, out: out * o.gate),
    "before a layer": lambda o: o.last.register_forward_pre_hook(lambda m, i: i[0] * o.gate),
    "of a container": lambda o: o.first.register_forward_hook(lambda m, i, out: out * o.gate),
    "calls a module": lambda o: o.first[1].register_forward_hook(lambda m, i, out: out + o.beside(out)),
    "partial": _bound,
}


class Reaching(nn.Module):
    """It decides by values, and is kept whole; its factor is its owner's."""

    def __init__(self, owner: Any) -> None:
        super().__init__()
        self.layer, self.owner = nn.Linear(6, 6), [owner]

    def forward(self, x: Tensor) -> Any:
        if float(x.detach().sum()) > 0:
            x = 2 * x
        return self.layer(x) * self.owner[0].gate


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.inner = nn.Parameter(torch.rand(6)), Reaching(self)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x) + 1


def trained_alike(make: Callable[[], nn.Module]) -> None:
    """Two stages train what the plain loop does."""
    batches = [(torch.randn(5, 6), torch.randint(0, 3, (5,))) for _ in range(4)]
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(make())
    plain, model = models
    optimizer = OPTIMIZER(plain.parameters())
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=batches[0][0])
    with pipe.trainer(F.cross_entropy, OPTIMIZER, method="bp", executor="inline") as t:
        for x, y in batches:
            t.step(x, y)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_what_a_hook_uses_of_other_modules_is_trained(hook: Callable[[Any], Any]) -> None:
    """A layer with hooks is one node otherwise: the parameter would be a copy there, and stand still."""
    trained_alike(lambda: Owner(hook))


def test_a_part_that_is_kept_whole_has_what_it_uses() -> None:
    """The part around it is kept whole with it."""
    trained_alike(lambda: nn.Sequential(nn.Linear(6, 6), Around(), nn.Linear(6, 3)))


def test_a_part_that_uses_the_root_s_parameter_is_refused() -> None:
    class Root(Around):
        def forward(self, x: Tensor) -> Any:
            return self.inner(x)[:, :3]

    with pytest.raises(dtrp.CaptureError, match="uses parameters that are not its own"):
        dtrp.compile(Root(), devices=["cpu"] * 2, example_inputs=torch.randn(5, 6))


def test_a_hook_that_uses_nothing_of_others_runs_in_every_pass() -> None:
    seen: list[int] = []
    model = Owner(lambda o: o.first[0].register_forward_hook(lambda m, i, out: seen.append(len(out))))
    pipe = dtrp.compile(model, devices=["cpu"] * 2, example_inputs=torch.randn(5, 6))
    seen.clear()
    with pipe.trainer(F.cross_entropy, OPTIMIZER, method="bp", executor="inline") as t:
        for _ in range(3):
            t.step(torch.randn(4, 6), torch.randint(0, 3, (4,)))
    assert seen == [4, 4, 4]

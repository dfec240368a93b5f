"""A weight predictor of one's own: what decoupling costs without prediction, with dtrp's, with yours.

Decoupled stages compute gradients on weights that are some updates old by the time they are applied. A
predictor guesses the weights that many updates ahead. It is any object with one method; a stage calls it for
each parameter with the optimizer's group and state.

The one here follows the velocity like `linear`, but for half the way at first and the whole way once the
velocity has settled: early in training it points where it will not stay.

    python examples/custom_predictor.py
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrp


class Cautious:
    """``W - c s lr v`` with c from 1/2 to 1 as the cosine of velocity and last step goes from -1 to 1.

    ``needs_previous`` asks for the weights before the last update (``state["previous"]``), which costs one
    more copy of them.
    """

    needs_previous = True

    def predict(self, weight: Tensor, group: Mapping[str, Any], state: Mapping[str, Any], s: float) -> Tensor:
        velocity, previous = state.get("momentum_buffer"), state.get("previous")
        if velocity is None or previous is None:
            return weight  # nothing to predict from before the first update
        taken = (previous - weight).flatten()
        agreement = F.cosine_similarity(taken, velocity.flatten(), dim=0)
        return weight - (0.75 + 0.25 * agreement) * s * group["lr"] * velocity


def digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's handwritten digits: 1,797 images of 8 x 8."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.tensor(found.data / 16, dtype=torch.float32), torch.tensor(found.target)


def train(predictor: Any, n_stages: int, epochs: int, seed: int = 0) -> float:
    """Mean loss of the last epoch."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i in range(7):
        layers += [nn.Linear(64, 64), nn.Tanh()] if i else [nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(64, 10))
    x, y = digits()
    pipe = dtrp.compile(model, n_gpus=n_stages, example_inputs=x[:64])
    settings = {"method": "dtr"} if predictor == "none" else {"predictor": predictor}
    optimizer = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    with pipe.trainer(F.cross_entropy, optimizer, executor="inline", seed=seed, **settings) as trainer:
        history = trainer.fit([(x[i : i + 64], y[i : i + 64]) for i in range(0, 1728, 64)], epochs)
    return history[-1]["train_loss"]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n-gpus", type=int, default=4, help="number of stages")
    parser.add_argument("--epochs", type=int, default=3)
    args = parser.parse_args(argv)
    for title, predictor in [
        ("no prediction (DTR)", "none"),
        ("linear", "linear"),
        ("geometric (auto)", "auto"),
        ("Cautious (yours)", Cautious()),
    ]:
        print(
            f"{title:<22} loss after {args.epochs} epochs: {train(predictor, args.n_gpus, args.epochs):.4f}"
        )


if __name__ == "__main__":
    main()

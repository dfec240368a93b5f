"""The runs of `golden.py`: a table of small trainings that between them touch every setting that moves a bit.

Models and batches are those of tests/reference/models.py, in float32. A run names only where it departs from
the defaults; everything random starts from fixed seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parents[1]))  # workers look for the models in the same places

from tests.reference.models import CASES, Batch

BATCHES = 60
EPOCH = 15  # batches, where a run has epochs or smaller last batches
BATCH_SIZE, LAST_SIZE = 4, 3


@dataclass(frozen=True)
class Run:
    """One training: 60 batches of four samples.

    Attributes
    ----------
    name : str
    case : str
        Of tests/reference/models.py.
    stages : int
    optimizer : callable
    options : Mapping
        For `Pipeline.trainer`.
    recompute : bool
        For `dtrp.compile`.
    lengths : tuple[int, ...]
        Nodes of each stage but the last; (): equally many in each.
    uneven : bool
        Every 15th batch is smaller.
    nan : tuple[int, ...]
        Batches whose inputs are not numbers.
    fit : bool
        Four epochs of `Trainer.fit`, each evaluated, instead of `Trainer.step`.
    flush, evaluate : tuple[int, ...]
        Done after so many batches.
    frozen : str
        Parameters whose name starts so don't require gradients ("": none).
    own_loss : bool
        The model gives its own loss.
    """

    name: str
    case: str
    stages: int
    optimizer: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    recompute: bool = True
    lengths: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    uneven: bool = False
    nan: tuple[int, ...] = ()
    fit: bool = False
    flush: tuple[int, ...] = ()
    evaluate: tuple[int, ...] = ()
    frozen: str = ""
    own_loss: bool = False

    def model(self) -> nn.Module:
        """The model before training."""
        case = CASES[self.case]
        torch.manual_seed(0)
        model = case.model().to(self.dtype).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not self.frozen or not name.startswith(self.frozen))
        return WithLoss(model, case.loss_fn) if self.own_loss else model

    @property
    def loss_fn(self) -> Callable[[Any, Any], Tensor] | None:
        return None if self.own_loss else CASES[self.case].loss_fn

    def batches(self) -> list[tuple[Any, ...]]:
        """What `Trainer.step` is given, batch after batch."""
        generator = torch.Generator().manual_seed(1)
        last = [self.uneven and (i + 1) % EPOCH == 0 for i in range(BATCHES)]
        made = [self._batch(generator, LAST_SIZE if small else BATCH_SIZE) for small in last]
        for i in self.nan:
            made[i] = pytree.tree_map(lambda x: x * torch.nan if x.is_floating_point() else x, made[i])
        return made

    def validation(self) -> list[tuple[Any, ...]]:
        """What `Trainer.evaluate` is given."""
        generator = torch.Generator().manual_seed(2)
        return [self._batch(generator, size) for size in (BATCH_SIZE, BATCH_SIZE, LAST_SIZE)]

    def example(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """The model's part of a batch."""
        return batch if self.own_loss else batch[:-1]

    def _batch(self, generator: torch.Generator, size: int) -> tuple[Any, ...]:
        batch: Batch = CASES[self.case].batch(generator, size)
        cast: tuple[Any, ...] = pytree.tree_map(
            lambda x: x.to(self.dtype) if x.is_floating_point() else x, (*batch.args, batch.target)
        )
        return cast


class WithLoss(nn.Module):
    """A model that takes the target, too, and gives its loss."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss_fn(self.model(x), target)


# Module-level functions, so that worker processes can import them.


def warm_up(update: int) -> float:
    """Linear over ten updates, then a step down at 40."""
    return min(1.0, (update + 1) / 10) * (0.1 if update >= 40 else 1.0)


def no_decay_for_vectors(name: str, parameter: nn.Parameter) -> dict[str, Any]:
    """Biases and norms: no weight decay; the head learns more slowly."""
    options: dict[str, Any] = {} if parameter.dim() > 1 else {"weight_decay": 0.0}
    return options | ({"lr": 2e-3} if name.startswith("head") else {})


_SGD = partial(SGD, lr=0.05)
_MOMENTUM = partial(SGD, lr=0.02, momentum=0.9, weight_decay=5e-4)
_NESTEROV = partial(SGD, lr=0.02, momentum=0.9, nesterov=True)
_ADAM = partial(Adam, lr=3e-3)
_ADAMW = partial(AdamW, lr=3e-3, weight_decay=0.05)
_RMSPROP = partial(RMSprop, lr=1e-3)

_BF16 = torch.bfloat16
_WARM_UP = partial(LambdaLR, lr_lambda=warm_up)
_ONE_CYCLE = partial(OneCycleLR, max_lr=0.05, total_steps=BATCHES + 2, cycle_momentum=False)
_EPOCHS = {"scheduler_step": "epoch"}

TABLE = (
    # One stage: the plain loop.
    Run("one stage", "mlp", 1, _MOMENTUM),
    Run("one stage, ambient seed", "mlp", 1, _ADAMW, {"seed": None}),
    Run("one stage, resnet, uneven", "resnet", 1, _NESTEROV, uneven=True),
    # Predictors and where they aim.
    Run("momentum", "mlp", 2, _MOMENTUM),
    Run("plain sgd", "mlp", 3, _SGD),
    Run("none", "mlp", 3, _MOMENTUM, {"predictor": "none"}),
    Run("linear, stage", "mlp", 4, _MOMENTUM, {"predictor": "linear", "horizon": "stage"}),
    Run("linear, common", "mlp", 4, _NESTEROV, {"predictor": "linear"}),
    Run("geometric, stage", "gpt", 4, _MOMENTUM, {"predictor": "geometric", "horizon": "stage"}),
    Run("geometric, scale 1.5", "mlp", 4, _MOMENTUM, {"predictor": "geometric", "horizon_scale": 1.5}),
    Run("scale 0", "mlp", 3, _MOMENTUM, {"horizon_scale": 0.0}),
    Run("difference", "mlp", 3, _MOMENTUM, {"predictor": "difference"}),
    Run("difference, stage", "resnet", 4, _RMSPROP, {"predictor": "difference", "horizon": "stage"}),
    Run("rmsprop", "flat_cnn", 3, _RMSPROP),
    Run("adam", "mlp", 4, _ADAM, {"predictor": "adam"}),
    Run("adam, stage, scale 1.5", "mlp", 3, _ADAM, {"horizon": "stage", "horizon_scale": 1.5}),
    Run("adamw", "flat_cnn", 4, _ADAMW),
    Run("double", "mlp", 4, _MOMENTUM, dtype=torch.float64),
    Run("ambient seed", "mlp", 3, _MOMENTUM, {"seed": None}),
    # Models: BatchNorm, skips, tied weights, several inputs and outputs, frozen parts.
    Run("batchnorm", "flat_cnn", 2, _MOMENTUM),
    Run("nesterov, resnet", "resnet", 3, _NESTEROV),
    Run("resnet, uneven", "resnet", 2, _ADAMW, uneven=True),
    Run("long skips", "unet", 4, _MOMENTUM),
    Run("handed skips", "handed", 4, _MOMENTUM, uneven=True),
    Run("tied", "gpt", 2, _ADAMW),
    Run("tied, four stages", "gpt", 4, _ADAMW),
    Run("two heads", "two_heads", 3, _MOMENTUM),
    Run("frozen", "flat_cnn", 3, _MOMENTUM, frozen="0."),
    Run("stages without weights", "mlp", 4, _MOMENTUM, lengths=(1, 1, 1)),
    Run("long first stage", "resnet", 4, _MOMENTUM, lengths=(20, 2, 1)),
    Run("own loss", "mlp", 3, _MOMENTUM, own_loss=True),
    # Graphs kept instead of recomputed.
    Run("kept graphs", "mlp", 3, _MOMENTUM, recompute=False),
    Run("kept graphs, resnet", "resnet", 4, _MOMENTUM, recompute=False),
    Run("kept graphs, tied, stage", "gpt", 3, _ADAMW, {"horizon": "stage"}, recompute=False),
    # Methods.
    Run("dtr", "handed", 4, _MOMENTUM, {"method": "dtr"}),
    Run("fdg", "gpt", 3, _MOMENTUM, {"method": "fdg", "grad_shrink": 0.8}),
    Run("fdg, skips", "unet", 3, _MOMENTUM, {"method": "fdg"}),
    Run("adl", "unet", 3, _MOMENTUM, {"method": "adl", "accumulate": 4}),
    Run("adl, uneven", "resnet", 4, _ADAMW, {"method": "adl", "accumulate": 3}, uneven=True),
    Run("bp", "mlp", 4, _MOMENTUM, {"method": "bp"}),
    Run("bp, two heads", "two_heads", 2, _ADAMW, {"method": "bp"}),
    Run("bp, clipped", "gpt", 3, _MOMENTUM, {"method": "bp", "max_grad_norm": 0.5}),
    # Knobs.
    Run("lr_shrink", "mlp", 4, _MOMENTUM, {"lr_shrink": 0.8}),
    Run("grad_shrink", "flat_cnn", 3, _MOMENTUM, {"grad_shrink": 0.9}),
    Run("accumulate", "mlp", 3, _MOMENTUM, {"accumulate": 3}, uneven=True),
    Run("clipped", "resnet", 4, _MOMENTUM, {"max_grad_norm": 0.5}),
    Run("clipped, tied", "gpt", 3, _ADAMW, {"max_grad_norm": 0.5, "accumulate": 2}),
    Run("autocast", "flat_cnn", 3, _MOMENTUM, {"autocast": _BF16}),
    Run("autocast, tied", "gpt", 2, _ADAMW, {"autocast": _BF16}),
    Run("joined batches", "mlp", 2, _MOMENTUM, {"batch_compensation": 2}, uneven=True),
    Run("joined, scheduled", "resnet", 3, _SGD, {"batch_compensation": 2, "lr_scheduler": _ONE_CYCLE}),
    Run("skipped", "mlp", 3, _MOMENTUM, {"on_nonfinite": "skip"}, nan=(20,)),
    Run("skipped, batchnorm, clipped", "flat_cnn", 2, _MOMENTUM,
        {"on_nonfinite": "skip", "max_grad_norm": 1.0}, nan=(20, 21, 45)),
    # Learning rates of each parameter and each update.
    Run("warm-up, geometric", "mlp", 4, _MOMENTUM, {"lr_scheduler": _WARM_UP}),
    Run("one cycle, linear", "mlp", 3, _MOMENTUM, {"lr_scheduler": _ONE_CYCLE, "predictor": "linear"}),
    Run("warm-up, adamw", "gpt", 3, _ADAMW, {"lr_scheduler": _WARM_UP}),
    Run("steps per epoch", "flat_cnn", 3, _MOMENTUM,
        {"lr_scheduler": partial(StepLR, step_size=2, gamma=0.3), **_EPOCHS}, fit=True),
    Run("plateau", "mlp", 2, _ADAMW,
        {"lr_scheduler": partial(ReduceLROnPlateau, factor=0.3, patience=0), **_EPOCHS}, fit=True),
    Run("param_groups", "resnet", 3, _ADAMW, {"param_groups": no_decay_for_vectors}),
    # Interruptions.
    Run("flushed", "mlp", 4, _MOMENTUM, flush=(7, 30, 31)),
    Run("evaluated", "resnet", 4, _MOMENTUM, evaluate=(20, 40), uneven=True),
)  # fmt: skip

"""A LightningModule's `training_step` as a module's forward, which gives the loss: what stages are made of.

What it asks of the trainer would be frozen in a graph, and what it leaves behind stays with the stages. So
what counts batches comes as tensors with each batch, and the rest is refused before the first one is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.nn.modules import module as every
from torchmetrics import Metric

from ..partitioner.capture.snapshot import untouched
from ..partitioner.capture.state import OWN, changes_of, frozen, state_of, within
from ..runtime.loss import own_loss

# fmt: off
_SAME = frozenset((
    "accumulate_grad_batches", "barebones", "datamodule", "default_root_dir", "device_ids",
    "estimated_stepping_batches", "fast_dev_run", "global_rank", "gradient_clip_val", "is_global_zero",
    "local_rank", "log_every_n_steps", "max_epochs", "max_steps", "min_epochs", "min_steps", "node_rank",
    "num_devices", "num_nodes", "num_training_batches", "overfit_batches", "precision", "predicting",
    "sanity_checking", "testing", "training", "validating", "world_size",
))
# fmt: on
"""What a trainer answers in the same way throughout a run."""


class TrainingStep(nn.Module):
    """A module whose forward is another one's `training_step`: the loss of a batch.

    While it is traced, ``log`` notes what it is called with; the loss is logged when it is known.
    """

    def __init__(self, module: LightningModule) -> None:
        super().__init__()
        self.module = module
        self._notes = _Notes(module.log)
        module.log = self._notes  # type: ignore[method-assign]

    def forward(self, batch: Any, *counts: Tensor) -> Any:
        notes, (*index, epoch, step) = self._notes, counts
        notes.begin()
        trainer = self.module.trainer
        try:
            self.module.trainer = _Asked(trainer, epoch, step)  # type: ignore[assignment]
            given = self.module.training_step(batch, *index)
            loss = own_loss(given)
        finally:
            self.module.trainer = trainer
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"training_step gave a {type(loss).__name__}: stages train on every batch; return the loss"
            )
        notes.end(loss)
        others = sorted(k for k in given if k != "loss") if isinstance(given, Mapping) else []
        if others and "loss" not in notes.warned:
            notes.warned.add("loss")
            rank_zero_warn(
                f"training_step returns {', '.join(map(repr, others))} beside the loss: the stages do not "
                f"give it back, so on_train_batch_end gets the loss alone; compute it in validation_step"
            )
        return loss

    def check(self, batch: Any, *counts: Tensor) -> None:
        """Run it as it is, leaving no trace.

        Raises
        ------
        ValueError
            It asks for what changes in a run, decides by what counts batches, or leaves something behind.
        """
        module = self.module
        try:
            with torch.no_grad():  # activations need not be kept
                changed = self._left_behind(batch, *counts)
        except RuntimeError:  # it takes gradients itself, or fails for a reason that is its own
            changed = self._left_behind(batch, *counts)
        for how in self._notes.of_loss.values():
            if "batch_size" in how and how["batch_size"] == _size(batch):
                del how["batch_size"]  # it was written for any batch
        paths = {id(m): path for path, m in module.named_modules()}
        logged = [paths[id(value)] for value in self._notes.modules if id(value) in paths]
        for path, text in changed.items():
            if not within(path, logged):
                raise ValueError(
                    f"training_step {text}: that stays with the stages, and no other hook would see it. Keep "
                    f"it in a buffer (register_buffer), or compute it in validation_step"
                )

    def _left_behind(self, batch: Any, *counts: Tensor) -> dict[str, str]:
        """Modules of whose state something is another after a step, and what."""
        module, inside = self.module, set[tuple[str, str]]()
        before, tensors = state_of(module), _tensors(module)
        with untouched(module, tensors=True), self.tracing(), _watching(module, inside):
            self(batch, *(count.as_subclass(_Count) for count in counts))
            changed = changes_of(module, before, (), inside)
            for key, value in _tensors(module).items():
                if key not in inside and value != tensors.get(key):
                    changed.setdefault(key[0], f"changes {'.'.join(key).removeprefix('.')!r}")
        return changed

    def tracing(self) -> _Notes:
        """A context in which ``log`` only notes."""
        return self._notes

    def size(self, batch: Any) -> int | None:
        """Of a batch, for means over an epoch; ``None``: nobody takes them, or `log` was told another."""
        means = any(how.get("on_epoch") and "batch_size" not in how for how in self._notes.of_loss.values())
        return extract_batch_size(batch) if means else None

    def log(self, loss: float, size: int | None) -> None:
        """Log a loss that has come, as `training_step` would have: it may be of an earlier batch."""
        for name, how in self._notes.of_loss.items():
            own = {"batch_size": size} if size is not None and how.get("on_epoch") else {}
            self._notes.true_log(name, loss, **{**own, **how})

    def put_back(self) -> None:
        """The module's own ``log``."""
        self.module.__dict__.pop("log", None)


class _Notes:
    """Stands in the place of a module's ``log``."""

    def __init__(self, true_log: Callable[..., None]) -> None:
        self.true_log = true_log
        self.of_loss: dict[str, dict[str, Any]] = {}
        self.modules: list[nn.Module] = []  # torchmetrics' that were logged as they are
        self.warned: set[str] = set()
        self._called: list[tuple[str, Any, dict[str, Any]]] = []
        self._tracing = False

    def __call__(self, *args: Any, **options: Any) -> None:
        if self._tracing:
            how = signature(self.true_log).bind(*args, **options).arguments
            self._called.append((how.pop("name"), how.pop("value"), how))
        else:
            self.true_log(*args, **options)

    def __enter__(self) -> None:
        self._tracing = True

    def __exit__(self, *exc: object) -> None:
        self._tracing = False

    def begin(self) -> None:
        self._called = []

    def end(self, loss: Any) -> None:
        """What was the loss, of what was logged."""
        for name, value, how in self._called:
            if value is loss or _same(value, loss):
                self.of_loss.setdefault(name, how)
            elif name not in self.warned:
                self.warned.add(name)
                rank_zero_warn(
                    f"training_step logs {name!r}, which is not the loss it returns: the stages do not give "
                    f"it back, so it is not logged; log it in validation_step"
                )
        self.modules = [value for _, value, _ in self._called if isinstance(value, nn.Module)]
        self._called = []


def _size(batch: Any) -> int | None:
    try:
        return extract_batch_size(batch)
    except MisconfigurationException:
        return None


def _same(value: Any, loss: Any) -> bool:
    """Whether it is the loss, detached."""
    if not isinstance(value, Tensor) or not isinstance(loss, Tensor) or value.shape != loss.shape:
        return False
    return bool(value.untyped_storage()._cdata == loss.untyped_storage()._cdata)


class _Asked:
    """Stands for the trainer in `training_step`."""

    def __init__(self, trainer: Trainer, epoch: Tensor, step: Tensor) -> None:
        self._trainer, self.current_epoch, self.global_step = trainer, epoch, step

    def __getattr__(self, name: str) -> Any:
        if name in _SAME:
            return getattr(self._trainer, name)
        raise ValueError(
            f"training_step asks for trainer.{name}, which the stages have not: ask in on_train_batch_start "
            f"or on_train_batch_end, or let the loader give what changes"
        )


class _Count(Tensor):
    """What counts batches, or was computed from it: no Python value, which a graph would freeze."""

    def _refuse(self, *_: Any) -> Any:
        raise ValueError(
            "training_step needs batch_idx, current_epoch or global_step as a Python value (if, min, math, "
            "int()); for the stages they are tensors that come with each batch: compute with them by torch "
            "(torch.where, clamp), or set an attribute of the module in on_train_epoch_start"
        )

    __bool__ = __int__ = __float__ = __index__ = item = tolist = numpy = _refuse  # type: ignore[assignment]


@contextmanager
def _watching(model: nn.Module, inside: set[tuple[str, str]]) -> Iterator[None]:
    """Inside, attributes are noted (owner, name) that modules below ``model`` change in their own forward:
    such modules are kept whole and really run. A metric is for those who ask it later, elsewhere."""
    paths = {id(m): path for path, m in model.named_modules() if path and not isinstance(m, Metric)}
    begun: list[dict[str, Any]] = []

    def enter(module: nn.Module, args: Any) -> None:
        begun.append(_attributes(module))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        before, now = begun.pop(), _attributes(module)
        if id(module) in paths:
            inside.update((paths[id(module)], k) for k, v in now.items() if v != before.get(k))

    hooks = every.register_module_forward_pre_hook(enter), every.register_module_forward_hook(leave)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {
        k: (id(v), v._version) if isinstance(v, Tensor) else frozen(v)
        for k, v in vars(module).items()
        if k not in OWN
    }


def _tensors(model: nn.Module) -> dict[tuple[str, str], Any]:
    """Attributes that are tensors, and no parameters or buffers."""
    return {
        (path, name): value
        for path, module in model.named_modules()
        for name, value in _attributes(module).items()
        if isinstance(vars(module)[name], Tensor)
    }

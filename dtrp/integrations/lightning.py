"""A Strategy for Lightning: the Trainer's loop as it is, the module's `training_step` cut into stages.

    trainer = L.Trainer(strategy=PipelineStrategy(pipeline={"n_gpus": 4}), accumulate_grad_batches=4)
    trainer.fit(module, data)

What is compiled is `training_step` with all that it calls, up to the loss. A step of the loop hands the batch
to the stages, and with it, as tensors, what counts batches: ``batch_idx``, ``current_epoch``,
``global_step``. Optimizer and scheduler step there (handover.py). Losses come a few batches later: `log` of
the loss in `training_step` logs those that have come. Validation, tests and predictions run in this process,
on the strategy's device, with the newest weights.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

try:
    from lightning.pytorch import Callback, LightningModule
    from lightning.pytorch import Trainer as LightningTrainer
    from lightning.pytorch import callbacks as known
    from lightning.pytorch.plugins.precision import MixedPrecision, Precision
    from lightning.pytorch.strategies import SingleDeviceStrategy
    from lightning.pytorch.utilities.model_helpers import is_overridden
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
except ImportError as e:
    raise ImportError("dtrp.integrations.lightning needs lightning: pip install 'dtrp[lightning]'") from e

from ..compiling import compile
from ..runtime.trainer import Trainer
from .handover import (
    SameOptimizer,
    SameScheduler,
    check_rates,
    export_state,
    import_state,
    keep_still,
    options,
    release,
)
from .training_step import TrainingStep

REST = "dtrp"
"""In a checkpoint, beside the library's own entries: counters of batches, and the like."""

_FROM = {
    "loss_fn": "training_step",
    "optimizer": "configure_optimizers",
    "lr_scheduler": "configure_optimizers",
    "scheduler_step": "configure_optimizers",
    "param_groups": "configure_optimizers",
    "accumulate": "accumulate_grad_batches",
    "max_grad_norm": "gradient_clip_val",
    "autocast": "precision",
    "batch_compensation": "the data loader",
    "micro_batches": "accumulate_grad_batches",  # training_step gives a loss of the whole batch
}

_HOOKS = (
    "backward",
    "configure_gradient_clipping",
    "lr_scheduler_step",
    "on_after_backward",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "optimizer_step",
    "optimizer_zero_grad",
)


_CHANGING = (
    known.BaseFinetuning,
    known.BatchSizeFinder,
    known.GradientAccumulationScheduler,
    known.LearningRateFinder,
    known.ModelPruning,
    known.StochasticWeightAveraging,
)
"""Callbacks that change in a run what stages are made of."""


class PipelineStrategy(SingleDeviceStrategy):
    """Trains a `LightningModule` through a pipeline.

    Parameters
    ----------
    pipeline : mapping or int
        Options of `dtrp.compile`, such as ``{"n_gpus": 4}``; a number is that of stages.
    training : mapping
        Options of `Pipeline.trainer` that Lightning has none for, such as ``{"method": "bp"}``.
    device : str or torch.device
        Where validation, tests and predictions run.
    **kwargs
        As of `SingleDeviceStrategy`.

    Raises
    ------
    ValueError
        At the start of `fit`: the module or the trainer asks for something that stages cannot do, by name.

    Notes
    -----
    ``batch_idx``, ``self.current_epoch`` and ``self.global_step`` are tensors (int64, no dimensions) in
    `training_step`: arithmetic follows them, a branch on them is refused, and so is what else the loop or the
    trainer changes in a run. Values other than the loss that it logs are not known here: they are named in a
    warning.
    """

    strategy_name = "dtrp"

    def __init__(
        self,
        pipeline: Mapping[str, Any] | int | None = None,
        training: Mapping[str, Any] | None = None,
        *,
        device: str | torch.device = "cpu",
        **kwargs: Any,
    ) -> None:
        super().__init__(device=device, **kwargs)
        self._pipeline, self._training = options(pipeline, training, _FROM, "Lightning")
        self._run: Trainer | None = None
        self._step: TrainingStep | None = None
        self._told, self._newest = 0, math.nan  # losses that have been logged, and the last of them
        self._sizes: deque[int | None] = deque()  # of batches whose loss has not come
        self._open: tuple[int, int] | None = None  # an epoch that has not been ended, and its latest batch
        self._checkpoint: Mapping[str, Any] | None = None  # loaded, to be handed to the stages
        self._rest: dict[str, Any] | None = None  # what else was to be saved, last time

    # ---- starting and ending -------------------------------------------------------------------------------

    def setup(self, trainer: LightningTrainer) -> None:
        """As of the library; refuses what stages cannot do."""
        super().setup(trainer)
        if trainer.state.fn == "fit":
            module = self._module
            _check(trainer, module, self)
            self._step, self._rest = TrainingStep(module), None
            keep_still(self.optimizers[0])
            module.on_validation_model_zero_grad = int  # type: ignore[assignment,method-assign]

    @property
    def _module(self) -> LightningModule:
        assert self.lightning_module is not None
        return self.lightning_module

    def _started(self, batch: Any, counts: tuple[Tensor, ...]) -> Trainer:
        """The run, begun at the first batch: what is to be resumed has been loaded by then."""
        if self._run is not None:
            return self._run
        assert self._step is not None
        self._step.check(batch, *counts)
        trainer, optimizer = self._module.trainer, self.optimizers[0]
        config = next(iter(self.lr_scheduler_configs), None)
        mixed = self.precision_plugin if isinstance(self.precision_plugin, MixedPrecision) else None
        formats = {"16-mixed": torch.float16, "bf16-mixed": torch.bfloat16}
        clip = trainer.gradient_clip_val
        run = compile(self._step, **self._pipeline).trainer(
            None,
            SameOptimizer(optimizer, self._step),
            lr_scheduler=None if config is None else SameScheduler(config.scheduler),
            scheduler_step="update" if config is None or config.interval == "step" else "epoch",
            accumulate=trainer.accumulate_grad_batches,
            max_grad_norm=float(clip) if clip else None,
            autocast=None if mixed is None else formats[mixed.precision],
            **self._training,
        )
        if self._checkpoint is not None:
            rest, self._checkpoint = self._checkpoint.get(REST), None
            scheduler = None if config is None else config.scheduler
            import_state(run, optimizer, scheduler, rest, trainer.global_step)
        self._run, self._told = run, len(run.losses)
        self._rates = [group["lr"] for group in optimizer.param_groups]
        return run

    def on_train_end(self) -> None:
        """Weights and the optimizer's state come back here, and the stages end."""
        if self._run is not None:
            self._run.flush()
            self._rest = export_state(self._run, self.optimizers[0])
            self._run.close()

    def on_exception(self, exception: BaseException) -> None:
        """The stages end."""
        if self._run is not None:
            self._run._leave(exception)

    def teardown(self) -> None:
        """As of the library."""
        if self._step is not None:
            self._step.put_back()
            self._module.__dict__.pop("on_validation_model_zero_grad", None)
        self._run = self._step = self._open = None
        super().teardown()

    # ---- steps ---------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Hands a batch to the stages; the newest loss (NaN while none has come)."""
        step, trainer = self._step, self._module.trainer
        assert step is not None
        batch, *index = args
        counts = tuple(map(torch.tensor, (*index, trainer.current_epoch, trainer.global_step)))
        run = self._started(batch, counts)
        config = next(iter(self.lr_scheduler_configs), None)
        check_rates(self.optimizers[0], self._rates if config is None else config.scheduler.get_last_lr())
        size = trainer.accumulate_grad_batches
        if size != run.config.accumulate:
            raise ValueError(
                f"accumulate_grad_batches was {run.config.accumulate} and is {size} now: the stages cannot "
                f"change it in the middle of a run"
            )
        epoch, place = trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx
        if self._open is not None and self._open[0] != epoch:
            self._cut_short(run)
        self._open = epoch, place
        self._sizes.append(step.size(batch))
        with step.tracing():
            run.step(batch, *counts)
        if trainer.is_last_batch:
            self._end_epoch(run)
        elif (place + 1) % size == 0 and trainer.global_step + 1 == trainer.max_steps:
            run.flush()  # the run ends here: an epoch's mean is of all its losses
        for loss in run.losses[self._told :]:
            self._newest = loss
            step.log(loss, self._sizes.popleft())
        self._told = len(run.losses)
        return torch.tensor(self._newest)

    def _cut_short(self, run: Trainer) -> None:
        """End an epoch for the stages that a hook has ended."""
        assert self._open is not None
        (epoch, place), size = self._open, run.config.accumulate
        if (place + 1) % size:
            raise ValueError(
                f"on_train_batch_start ended epoch {epoch} after {place + 1} batches, within an update over "
                f"accumulate_grad_batches={size}, whose gradients the stages would keep: let it end after "
                f"whole updates"
            )
        self._end_epoch(run)

    def _end_epoch(self, run: Trainer) -> None:
        # The library divides by accumulate_grad_batches also where the last group has fewer batches.
        run._run.drain(close_group="share")
        run.end_epoch()
        self._open = None

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The stages go backward."""
        return closure_loss

    def optimizer_step(
        self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any
    ) -> Any:
        """The stages step; here only the closure is called, which hands them the batch."""
        return optimizer.step(closure=closure)

    def on_validation_start(self) -> None:
        """With the newest weights."""
        if self._run is not None:
            self._run.flush()

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """With the newest weights."""
        if self._running:
            assert self._run is not None
            if self._open is not None and self._module.trainer.is_last_batch:
                self._cut_short(self._run)
            self._run.flush()
        return super().lightning_module_state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The stages' state, in the form of an optimizer over the whole module."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        if self._running:
            assert self._run is not None
            self._rest = export_state(self._run, optimizer)
        state = dict(super().optimizer_state(optimizer))
        if self._running:
            release(optimizer)
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """As of the library, with what else a run is."""
        if self._rest is not None and "optimizer_states" in checkpoint:
            checkpoint = {**checkpoint, REST: self._rest}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """As of the library; the stages get it at the first batch."""
        super().load_optimizer_state_dict(checkpoint)
        self._checkpoint = checkpoint

    @property
    def _running(self) -> bool:
        return self._run is not None and not self._run._run.closed


def _check(trainer: LightningTrainer, module: LightningModule, strategy: PipelineStrategy) -> None:
    """Refuse what stages cannot do, by name."""
    kind = type(module).__name__
    if not module.automatic_optimization:
        raise ValueError(
            f"{kind}.automatic_optimization=False: the stages step by themselves; let it be True"
        )
    if len(strategy.optimizers) != 1:
        raise ValueError(
            f"{kind}.configure_optimizers gives {len(strategy.optimizers)} optimizers: stages need exactly "
            f"one, which may have several groups of parameters"
        )
    if not strategy.optimizers[0].param_groups:  # the library's stand-in
        raise ValueError(f"{kind}.configure_optimizers gives no optimizer, so there is nothing to train with")
    hooks = [name for name in _HOOKS if is_overridden(name, module)]
    if hooks:
        raise ValueError(
            f"{kind} overrides {', '.join(hooks)}, which nothing would call: steps are the stages'"
        )
    if is_param_in_hook_signature(module.training_step, "dataloader_iter", explicit=True):
        raise ValueError(
            f"{kind}.training_step takes dataloader_iter: stages need the batch; take (batch, batch_idx)"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, _CHANGING):
            raise ValueError(
                f"{name} changes in the middle of a run how the module is trained, which stages do not "
                f"follow; train without it"
            )
        if isinstance(callback, known.WeightAveraging) and strategy._training.get("executor") != "inline":
            raise ValueError(
                f"{name} reads the weights after every batch, which other processes have then: "
                f"training={{'executor': 'inline'}} has them here"
            )
        if hooks := [hook for hook in _HOOKS if hasattr(Callback, hook) and is_overridden(hook, callback)]:
            raise ValueError(f"{name} overrides {', '.join(hooks)}, for gradients, which the stages have")
    for config in strategy.lr_scheduler_configs:
        if config.reduce_on_plateau or config.frequency != 1:
            raise ValueError(
                f"{type(config.scheduler).__name__} with monitor={config.monitor!r}, "
                f"frequency={config.frequency}: the stages' schedulers step once per update or epoch, on no "
                f"metric"
            )
    if len(strategy.lr_scheduler_configs) > 1:
        raise ValueError(
            "several schedulers: join them by torch.optim.lr_scheduler.SequentialLR or ChainedScheduler"
        )
    if trainer.gradient_clip_val and str(trainer.gradient_clip_algorithm or "norm") != "norm":
        raise ValueError(
            f"gradient_clip_algorithm={trainer.gradient_clip_algorithm!r}: stages clip by the norm"
        )
    precision = strategy.precision_plugin
    if type(precision) not in (Precision, MixedPrecision):
        raise ValueError(f"precision={precision.precision!r}: expected '32-true', 'bf16-mixed' or '16-mixed'")

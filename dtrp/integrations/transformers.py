"""Hugging Face's Trainer over a pipeline: `TrainingArguments` keep their meaning, stages do the training.

    trainer = PipelineTrainer(model, args, train_dataset=..., pipeline={"n_gpus": 4})
    trainer.train()

The library's own loop runs: data order, callbacks, logs, evaluation and checkpoints are the library's. A
training step hands the batch to the stages; optimizer and scheduler step there (handover.py). Losses come a
few batches later, so a log has the mean over those that have finished since the last one. Evaluating and
saving wait for the batches in flight, as `dtrp.Trainer.evaluate` does.

Gradients of accumulated batches add up to what the library's own would be: a loss that is divided by the
number of items of all batches of an update (``num_items_in_batch``) is multiplied by the number of batches,
over which the stages take the mean.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

try:
    import transformers
    from transformers.trainer import Trainer as _Trainer
except ImportError as e:
    raise ImportError(
        "dtrp.integrations.transformers needs transformers and accelerate: pip install 'dtrp[transformers]'"
    ) from e

from ..compiling import compile
from ..runtime import looks
from ..runtime.loss import own_loss
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

REST = "dtrp.pt"
"""In a checkpoint, beside the library's own files: counters of batches, and the like."""

_FROM = {
    "loss_fn": "the model, compute_loss_func or label_smoothing_factor",
    "optimizer": "optim or optimizers",
    "lr_scheduler": "lr_scheduler_type or optimizers",
    "scheduler_step": "lr_scheduler_type",
    "param_groups": "optim or optimizers",
    "accumulate": "gradient_accumulation_steps",
    "max_grad_norm": "max_grad_norm",
    "autocast": "bf16 or fp16",
    "seed": "seed",
    "batch_compensation": "per_device_train_batch_size",
}

_REFUSED = {
    "deepspeed": "the model is cut into stages instead",
    "fsdp": "the model is cut into stages instead",
    "parallelism_config": "the model is cut into stages instead",
    "torch_compile": "use training={'compile_stages': True}",
    "activation_checkpointing": "stages recompute by themselves, see pipeline={'recompute': ...}",
    "gradient_checkpointing": "stages recompute by themselves, see pipeline={'recompute': ...}",
    "auto_find_batch_size": "it would stop and start again in the middle of a run; choose a batch size",
    "use_liger_kernel": "its kernels are put into the model behind the back of what cuts it",
}

_NOT_CALLED = {
    "compute_loss": "give it as compute_loss_func=(outputs, labels, num_items_in_batch), or let the model "
    "return that loss",
    "compute_loss_context_manager": "let the model's forward enter it; bf16 or fp16 set the autocast",
    "autocast_smart_context_manager": "bf16 or fp16 set the autocast",
}
"""Methods of a subclass that stages would not call, and what does instead."""


class PipelineTrainer(_Trainer):
    """`transformers.Trainer`, training through a pipeline.

    Parameters
    ----------
    *args, **kwargs
        As of `transformers.Trainer`.
    pipeline : mapping or int
        Options of `dtrp.compile`, such as ``{"n_gpus": 4}``; a number is that of stages.
    training : mapping
        Options of `Pipeline.trainer` that `TrainingArguments` have none for, such as ``{"method": "bp"}``.

    Raises
    ------
    ValueError
        An argument of `TrainingArguments`, or a `compute_loss` of a subclass, cannot be honoured: says which,
        and what to do.
    TypeError
        ``training`` has an option that `TrainingArguments` determine; the optimizer cannot be made anew for
        a stage.

    Notes
    -----
    ``fp16`` is honoured on the CPU, too, where the library trains in float32. While the pipeline fills, logs
    have no loss. A loss that is not finite ends the run (``training={"on_nonfinite": "skip"}`` gives such
    batches up); ``logging_nan_inf_filter`` has nothing to filter. Callbacks that look at gradients find none.
    """

    def __init__(
        self,
        *args: Any,
        pipeline: Mapping[str, Any] | int | None = None,
        training: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        given = kwargs.get("args", args[1] if len(args) > 1 else None)
        if given is not None:
            _check(given)
            given._n_gpu = min(given.n_gpu, 1)  # the devices are the stages': no copies of the model
        self._pipeline, self._training = options(pipeline, training, _FROM, "TrainingArguments")
        self._run: Trainer | None = None
        for name, instead in _NOT_CALLED.items():
            if getattr(type(self), name) is not getattr(_Trainer, name):
                raise ValueError(
                    f"{type(self).__name__} overrides {name}, which stages would not call: {instead}"
                )
        super().__init__(*args, **kwargs)

    # ---- what the stages train -----------------------------------------------------------------------------

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume: str | None) -> Any:
        if self._created_lr_scheduler:
            self.lr_scheduler, self._created_lr_scheduler = None, False
        # An evaluation with bf16 may have put its autocast around forward.
        self.model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.model_wrapped = self.model
        self.create_optimizer()
        self.create_scheduler(num_training_steps=max_steps)
        self._run = self._trainer()
        assert self.optimizer is not None
        keep_still(self.optimizer)
        self._parts: deque[int] = deque()  # of each batch in flight: how many batches its update has
        self._told = 0  # losses that have been logged or added up
        self._open = 0  # batches of the update that has begun
        if resume is not None:
            self._resume(self._run, resume)
        elif self.optimizer.state:  # of an earlier call of train, or the user's own
            import_state(self._run, self.optimizer, self.lr_scheduler, None, 0)
        for name in ("model", "optimizer", "lr_scheduler"):
            setattr(self.callback_handler, name, getattr(self, name))
        self.callback_handler.train_dataloader = train_dataloader
        self._window = [0.0, 0.0]  # since the last log: sum of losses, updates
        return _Fed(self.model), train_dataloader

    def _trainer(self) -> Trainer:
        args: Any = self.args
        assert self.lr_scheduler is not None
        assert self.optimizer is not None
        assert self.model is not None
        if "metrics" in inspect.signature(self.lr_scheduler.step).parameters:
            raise ValueError(
                f"lr_scheduler_type={args.lr_scheduler_type!r} steps on a metric, which the stages' "
                f"schedulers have none of; use one that follows the number of steps"
            )
        pipe = compile(self.model, **self._pipeline)
        return pipe.trainer(
            Loss(self._own_loss_function()),
            SameOptimizer(self.optimizer, self.model),
            lr_scheduler=SameScheduler(self.lr_scheduler),
            accumulate=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm if args.max_grad_norm > 0 else None,
            autocast=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
            seed=args.seed if pipe.n_stages > 1 else None,  # one stage draws as the plain loop does
            **self._training,
        )

    def _own_loss_function(self) -> Any:
        if self.compute_loss_func is not None:
            return self.compute_loss_func
        if self.label_smoother is None:
            return None
        causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        return Smoothed(self.label_smoother, type(self.model).__name__ in causal)

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Hands a batch to the stages; the losses that have come since the last call."""
        assert self._run is not None
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        check_rates(self.optimizer, self.lr_scheduler.get_last_lr())
        named, parts = dict(self._prepare_inputs(inputs)), self.current_gradient_accumulation_steps  # type: ignore[arg-type]
        extra: dict[str, Any] = {}
        labels = named.get("labels")
        if (self.compute_loss_func or self.label_smoother) and labels is not None:
            del named["labels"]
            if num_items_in_batch is not None:
                extra["num_items"] = num_items_in_batch
        elif self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            named["num_items_in_batch"] = torch.as_tensor(num_items_in_batch)
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = bool(
                (self.model_accepts_loss_kwargs and num_items_in_batch is not None) or self.compute_loss_func
            )
        if scaled:
            extra |= {"scale": float(parts), "rows": len(labels) if isinstance(labels, Tensor) else 0}
        self._parts.append(parts)
        self._open += 1
        self._rate = self._run.lr
        self._run.step(**named, target=labels, **({"extra": extra} if extra else {}))
        return torch.tensor(self._new_losses(), device=self.args.device)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As of the library: the batches of the next update."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches and self._open:
            size = self.args.gradient_accumulation_steps
            raise ValueError(
                f"an epoch ended after {self._open} of the {size} batches of "
                f"an update (gradient_accumulation_steps), with an IterableDataset of unknown length or by a "
                f"callback: the library would add their gradients to the next update, which stages cannot; "
                f"let the dataset repeat or give whole updates, or stop epochs in on_step_end"
            )
        return batches, items

    def _new_losses(self) -> float:
        """The sum of the losses that have come, each as a share of its update's."""
        assert self._run is not None
        new = self._run.losses[self._told :]
        self._told += len(new)
        total = 0.0
        for loss in new:
            parts = self._parts.popleft()
            total += loss / parts
            self._window[1] += 1 / parts
        self._window[0] += total
        return total

    def _clip_grad_norm(self, model: nn.Module) -> None:
        """The stages clip."""

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """Called once per update, before it."""
        assert self._run is not None
        if self._open == 0:
            raise ValueError(
                f"{type(self).__name__}.training_step trains by itself: the stages got no batch; change the "
                f"inputs there and call super().training_step, or leave it"
            )
        self._open = 0
        if self.current_gradient_accumulation_steps < self.args.gradient_accumulation_steps:
            self._run._run.drain(close_group=True)  # the epoch's last update has fewer batches

    def floating_point_ops(self, inputs: Any) -> int:
        """Counted for each batch by how many parameters there are, whatever is in them."""
        with looks.unseen():
            return int(super().floating_point_ops(inputs))

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As of the library; a loss is the mean over the updates whose batches have finished."""
        if self._run is not None and "loss" in logs:
            total, updates = self._window
            self._window = [0.0, 0.0]
            if updates:
                logs["loss"] = total / updates
            else:  # the pipeline fills
                del logs["loss"]
            logs["grad_norm"] = self._run.grad_norm
            logs["learning_rate"] = self._rate if self.args.fp16 else logs["learning_rate"]
        super().log(logs, *args, **kwargs)

    def _finalize_training(self, *args: Any) -> Any:
        assert self._run is not None
        self._run.flush()
        self._tr_loss += self._new_losses()
        assert self.optimizer is not None
        export_state(self._run, self.optimizer)
        self._close()
        return super()._finalize_training(*args)  # type: ignore[no-untyped-call]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As of the library; the stages end with it."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._run is not None:
                run, self._run = self._run, None
                run.__exit__(*sys.exc_info())

    def _close(self) -> None:
        assert self._run is not None
        run, self._run = self._run, None
        run.close()

    # ---- evaluation ----------------------------------------------------------------------------------------

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if training or self._run is None or self._run.samples == 0:
            return model
        return _InStages(self._run)

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As of the library, with the newest weights."""
        if self._run is not None:
            self._run.flush()
        super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self._run is not None
        assert self.optimizer is not None
        rest = export_state(self._run, self.optimizer, self.lr_scheduler if self.args.fp16 else None)
        super()._save_optimizer_and_scheduler(output_dir)
        release(self.optimizer)
        torch.save(rest, os.path.join(output_dir, REST))

    def _resume(self, run: Trainer, checkpoint: str) -> None:
        self._load_optimizer_and_scheduler(checkpoint)
        assert self.optimizer is not None
        path = os.path.join(checkpoint, REST)
        rest = torch.load(path, weights_only=True) if os.path.isfile(path) else None
        import_state(run, self.optimizer, self.lr_scheduler, rest, self.state.global_step)
        self._told = len(run.losses)


class Loss:
    """The loss of one batch, as the stages take it.

    Parameters
    ----------
    function : callable or None
        ``(output, labels, num_items_in_batch=...)``; ``None``: the model gives its loss.
    """

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(
        self,
        output: Any,
        target: Any,
        *,
        num_items: Any = None,
        scale: float | None = None,
        rows: int = 0,
    ) -> Tensor:
        loss: Tensor
        if self.function is None:
            loss = output[0] if isinstance(output, tuple) else own_loss(output)
            if not isinstance(loss, Tensor):
                raise TypeError(
                    f"the model gave a {type(output).__name__} without a loss: let batches have labels (as "
                    f"DataCollatorForLanguageModeling makes them), or give the trainer a compute_loss_func"
                )
        else:
            loss = self.function(output, target, num_items_in_batch=num_items)
        if scale is None:
            return loss
        # A micro-batch counts by its rows; what is divided by the items of all rows does so already.
        part = target.shape[0] / rows if rows else 1.0
        return loss * (scale / part)


class Smoothed:
    """The library's label smoothing, as a loss."""

    def __init__(self, smoother: Any, shifts: bool) -> None:
        self.smoother, self.shifts = smoother, shifts

    def __call__(self, output: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = self.smoother(
            output, labels, shift_labels=self.shifts, num_items_in_batch=num_items_in_batch
        )
        return loss


class _Fed(nn.Module):
    """Stands for the model in the library's loop, whose gradients are the stages' business."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not for others."""
        raise ValueError(
            "training_step of a subclass calls the model, whose gradients are the stages': change the inputs "
            "there and call super().training_step; a loss of your own goes in as compute_loss_func"
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The stages drop their gradients."""


class _InStages(nn.Module):
    """Called like the model, in eval mode: the stages answer."""

    def __init__(self, run: Trainer) -> None:
        super().__init__()
        self._run = run

    def forward(self, **inputs: Any) -> Any:
        (output,) = self._run.predict([inputs])
        return output


def _check(args: Any) -> None:
    """Refuse what cannot be honoured, by name."""
    for name, why in _REFUSED.items():
        if getattr(args, name, None):
            raise ValueError(f"TrainingArguments({name}={getattr(args, name)!r}): {why}")
    if args.world_size > 1:
        raise ValueError(
            f"{args.world_size} processes run this script, but PipelineTrainer starts a process per stage "
            f"itself: run it as one process, without torchrun or accelerate launch"
        )

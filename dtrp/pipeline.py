"""`Pipeline`: what users hold in their hands.

The files beside this one join the two halves: the compiler (dtrp/partitioner) never runs anything, the
runtime (dtrp/runtime) never sees a graph.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import networkx as nx
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .as_model import AsModel
from .names import known_arguments
from .partitioner.compiler import Request, threads_per_stage
from .partitioner.example import call_arguments, keep_example
from .partitioner.plan import Plan
from .partitioner.report import PartitionReport
from .planning import Planning
from .programs import check_trainable
from .runtime import launched, looks
from .runtime.config import Launch, TrainConfig
from .runtime.predictors import Predictor
from .runtime.trainer import Trainer
from .stages import Stage, submodules_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.pipelining import PipelineStage


class Pipeline(AsModel):
    """A model cut into stages. Made by `compile`.

    Called like the model, it gives the same result, differentiable, in this process, stage after stage.
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        super().__init__(Planning(model, request))

    def __repr__(self) -> str:
        return f"<dtrp.Pipeline of {type(self.model).__name__} for {self.n_stages} stages: print its report>"

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property failed: let it say why
            return object.__getattribute__(self, name)
        raise AttributeError(
            f"a Pipeline has no {name!r}; the model is pipe.model, training is pipe.trainer(...), devices "
            f"are chosen by dtrp.compile(devices=...)"
        )

    # ---- what was decided ------------------------------------------------------------------------------

    @property
    def n_stages(self) -> int:
        return self._planning.n_stages

    @property
    def graph(self) -> nx.DiGraph:
        """The cost model: see `dtrp.partitioner.costs.cost_graph` for the attributes."""
        return self._planning.made.graph

    @property
    def plan(self) -> Plan:
        """Which node is in which stage; ``plan.save(path)`` to keep it."""
        return self._planning.plan

    @property
    def report(self) -> PartitionReport:
        """What was decided and why; print it."""
        return self._planning.made.report

    @property
    def stages(self) -> list[Stage]:
        """The stages, first to last."""
        made = self._planning.made.split
        return [
            Stage(
                index=k,
                device=self._planning.request.devices[k],
                inputs=tuple(n.name for n in made.train.modules[k].graph.find_nodes(op="placeholder")),
                outputs=wires.outputs,
                submodules=submodules_of(made.train.modules[k]),
                _modules=(made.eval.modules[k], made.train.modules[k]),
                _model=self.model,
            )
            for k, wires in enumerate(made.train.wiring.stages)
        ]

    # ---- training --------------------------------------------------------------------------------------

    @known_arguments
    def trainer(
        self,
        loss_fn: Callable[..., Tensor] | None,
        optimizer: Callable[[Any], Optimizer],
        *,
        lr_scheduler: Callable[[Optimizer], Any] | None = None,
        method: str = "dtrp",
        predictor: str | Predictor = "auto",
        horizon: Literal["common", "stage"] = "common",
        horizon_scale: float = 1.0,
        lr_shrink: float = 1.0,
        grad_shrink: float = 1.0,
        accumulate: int = 1,
        batch_compensation: int = 1,
        max_grad_norm: float | None = None,
        max_grad_norm_lag: bool = False,
        autocast: torch.dtype | None = None,
        executor: str = "auto",
        seed: int | None = None,
        progress: bool = False,
        timeline: str | os.PathLike[str] | None = None,
        param_groups: Callable[[str, nn.Parameter], dict[str, Any]] | None = None,
        scheduler_step: Literal["update", "epoch"] = "update",
        on_nonfinite: Literal["raise", "skip"] = "raise",
        compile_stages: bool = False,
        threads: int | None = None,
        watchdog: float = 60.0,
        compensation_warmup: int = 100,
        tensorboard: str | os.PathLike[str] | None = None,
        logger: Any = None,
        record: bool = False,
        schedule: Literal["auto", "fig1", "lean"] = "auto",
        micro_batches: int | Literal["auto"] = "auto",
        exact_start: int | float = 0,
        rebalance: Literal["auto", False] | int = "auto",
        autosave: tuple[str | os.PathLike[str], float] | None = None,
        init: Callable[[str, Tensor], Any] | str | os.PathLike[str] | None = None,
    ) -> Trainer:
        """Train the pipeline; use the result as a context manager.

        Parameters
        ----------
        loss_fn : callable or None
            ``(output, target) -> scalar``, or ``(output, target, **extra)`` where batches have ``extra``
            (`Trainer.step`). ``None``: the model gives its own loss (a scalar output, or its
            ``loss`` entry), and `Trainer.step` takes no target.
        optimizer : callable
            Parameters -> ``torch.optim.Optimizer``; called once per stage.
        lr_scheduler : callable, optional
            Optimizer -> scheduler, stepped once per update (see ``scheduler_step``).
        method : {"dtrp", "dtr", "fdg", "adl", "bp", "gpipe", "1f1b"}
            dtrp: re-computation and weight prediction (Peng et al. 2023). dtr: without prediction. fdg, adl:
            graphs kept instead of recomputed, gradients shrunk or accumulated (Zhuang et al. 2021, 2022).
            bp: exact back-propagation, one batch at a time. gpipe, 1f1b: exact, all micro-batches of one
            batch at a time (Huang et al. 2019; Narayanan et al. 2021).
        predictor : str or Predictor
            ``"none"``, ``"linear"``, ``"geometric"``, ``"difference"``, ``"adam"``, ``"auto"``, or an object
            with `dtrp.Predictor`'s method.
        horizon : {"common", "stage"}
            Which moment predicted weights aim at: one for all stages (ours), or each stage's own backward.
        horizon_scale : float
            Multiplies every horizon (our delay regulator); 0 is DTR.
        lr_shrink : float
            Stage k of K uses ``lr * lr_shrink ** (K - 1 - k)``.
        grad_shrink : float
            Every stage but the last multiplies the arriving gradient by this (FDG).
        accumulate : int
            Batches per update; gradients are averaged (ADL).
        batch_compensation : int
            How many consecutive batches travel as one; the learning rate is scaled with it.
        max_grad_norm : float, optional
            Clip by the gradients' norm over all stages in the same tick ("lean" and exact orders: of the same
            batch), tied weights counted once. Stages then wait for each other in every tick.
        max_grad_norm_lag : bool
            Clip by the norm of the last batch that all stages have finished, so that no stage waits: inexact.
        autocast : torch.dtype, optional
            Such as ``torch.bfloat16``; in every stage.
        executor : {"auto", "inline", "workers", "torchrun"}
            inline: this process, one stage after the other. workers: a process per stage, started here.
            torchrun: this process is one of those that a launcher started with this script, each for one
            stage; "auto" sees it by the environment (docs/cluster.md).
        seed : int, optional
            Makes a run reproducible. Default: drawn from torch's generator.
        progress : bool
            A progress bar in `Trainer.fit`.
        timeline : path, optional
            Write what each stage did when, in Chrome's trace format (opens in Perfetto).
        param_groups : callable, optional
            ``(name, parameter) -> options`` of the optimizer, such as ``{"weight_decay": 0.0}``.
        scheduler_step : {"update", "epoch"}
            When the scheduler steps; per epoch, `Trainer.fit` or `Trainer.end_epoch` does it.
        on_nonfinite : {"raise", "skip"}
            What to do about a NaN or infinite loss; a skipped batch changes nothing, and is counted.
        compile_stages : bool
            Run each stage through ``torch.compile``.
        threads : int, optional
            CPU threads per stage. Default: the cores shared out evenly, at least one.
        watchdog : float
            Seconds of silence after which a worker counts as stuck.
        compensation_warmup : int
            Updates over which the learning rate's scale for joined batches rises from 1.
        tensorboard : path, optional
            A folder for TensorBoard: losses, evaluations, the stages' measurements (needs the extra
            ``tensorboard``).
        logger : optional
            Who is told the same numbers: a ``SummaryWriter``, a run of Weights & Biases, a logger of
            Lightning, a function ``(numbers, step)``, or a list of such. It is not closed here.
        record : bool
            Keep what each stage did (`Trainer.events`).
        schedule : {"auto", "fig1", "lean"}
            The order of the decoupled methods: the paper's, or the one with about half as many batches in
            flight (ours, after PipeDream's asynchronous 1F1B). auto: lean where a hop to the next stage takes
            at most a tenth of a tick.
        micro_batches : int or "auto"
            In how many parts each batch travels; one update per batch, with the mean over its samples. auto
            (ours): as many as train to the same loss soonest (delay against longer ticks, orders.py), more
            where a tick gets at most 5 % longer; of 16 samples or more where there is BatchNorm; 1 where
            parts would train something else, as a try on a few samples of the first batch shows.
        exact_start : int or float
            Updates made with the exact order first: a number, or a share (below 1) of what `Trainer.fit` will
            do.
        rebalance : {"auto", False} or int
            Whether the cuts are moved during the run, where what stages really take says that this gains
            more than 3 % and pays back within the run. ``"auto"``: a look every 20 s, the first after a
            minute, at worker processes, unless `compile` was given a plan. An int: a look whenever so many
            batches are done. From a move on the bits are those of a run saved there and loaded under the new
            plan; as it depends on the clock, ``False`` pins the cuts, and with them the bits.
        autosave : (path, seconds), optional
            Save the run to this file (`Trainer.save`) when so many seconds have passed since the last time.

        init : callable or path, optional
            Under a launcher, for a model on the meta device: each rank makes its own stage's tensors real,
            with values that ``init(name, tensor)`` fills in, or that a folder has by name (of safetensors
            files, or of `Trainer.save`); not read where a saved folder is loaded before the first step. No
            rank holds the whole then.

        Returns
        -------
        Trainer

        Raises
        ------
        TypeError, ValueError
            Arguments of the wrong kind, or a combination that makes no sense (with the reason).
        """
        replicas = self._planning.request.replicas
        config = TrainConfig(
            loss_fn=loss_fn,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            method=method,
            predictor=predictor,
            horizon=horizon,
            horizon_scale=horizon_scale,
            lr_shrink=lr_shrink,
            grad_shrink=grad_shrink,
            accumulate=accumulate,
            max_grad_norm=max_grad_norm,
            autocast=autocast,
            seed=seed,
            on_nonfinite=on_nonfinite,
            param_groups=param_groups,
            scheduler_step=scheduler_step,
            compile_stages=compile_stages,
            threads=_threads(executor, sum(replicas) or self.n_stages) if threads is None else threads,
            max_grad_norm_lag=max_grad_norm_lag,
            order=schedule,
            micro_batches=micro_batches,
            exact_start=exact_start,
            replicas=replicas,
        )
        launch = Launch(
            executor=executor,
            watchdog=watchdog,
            batch_compensation=batch_compensation,
            compensation_warmup=compensation_warmup,
            rebalance=False if rebalance == "auto" and self._planning.request.plan is not None else rebalance,
            init=init,
            autosave=autosave,
            record=record,
            timeline=timeline,
            progress=progress,
            tensorboard=tensorboard,
            logger=logger,
        )
        ranks = launched.world_size() > 1 and executor in ("auto", "torchrun")
        check_trainable(self.model, loss_fn, makes_real=ranks and init is not None)
        return Trainer(self._planning, config, launch)

    # ---- deployment --------------------------------------------------------------------------------------

    def export_onnx(
        self,
        directory: str | os.PathLike[str],
        *,
        opset: int | None = None,
        dynamic_batch: bool = True,
        verify: bool = True,
        overwrite: bool = False,
        inputs: Any = None,
    ) -> list[Path]:
        """Export each stage to ONNX, with a manifest that says how they chain.

        The model's present weights are exported (between two steps of a trainer its newest ones), in eval
        mode; the model's own mode stays as it is. The folder is written aside and moved into place at the
        end: a failed export leaves nothing behind. `dtrp.onnx.load_chain` runs the result without torch.

        Parameters
        ----------
        directory : path
            A folder that does not exist yet, or is empty.
        opset : int, optional
            Version of ONNX's operators. Default: what torch's exporter recommends.
        dynamic_batch : bool
            Export for any batch size, and for any other size that the model's code leaves open (sequence
            length, resolution, number of nodes), each a named axis. A model that takes only the example's
            batch is exported for that one, with a warning; the manifest says why.
        verify : bool
            Run the chain in onnxruntime and compare it with the model, stage by stage, with the example's
            sizes, larger ones, and the smallest. What was found is in the manifest.
        overwrite : bool
            Replace an earlier export.
        inputs : Tensor, tuple or dict, optional
            What to verify with, as ``example_inputs`` of `dtrp.compile`. Default: the first samples of the
            example that was compiled for.

        Returns
        -------
        list of Path
            ``stage_0.onnx``, ``stage_1.onnx``, ..., ``manifest.json``.

        Raises
        ------
        ExportError
            A package is missing; the folder holds something; an operator has no counterpart in ONNX (names
            its node, module, line and stage); the chain does not give the model's result (names the stage).
        TypeError, ValueError
            ``opset`` or ``inputs`` make no sense.
        """
        from .partitioner.onnx import export_chain

        looks.show(self.model)
        call = None if inputs is None else call_arguments(inputs)
        made = self._planning.newest(call)
        example = self._planning.example if call is None else keep_example(self.bind(*call))
        return export_chain(
            made.captured,
            made.split.eval,
            Path(directory),
            submodules=[submodules_of(module) for module in made.split.eval.modules],
            example=example,
            opset=opset,
            dynamic_batch=dynamic_batch,
            verify=verify,
            overwrite=overwrite,
        )

    def to_pipelining(self, mesh: DeviceMesh) -> list[PipelineStage]:
        """This rank's stages for the schedules of torch.distributed.pipelining.

        Every rank of the mesh calls it. The stages share the model's parameters, which keep their names.

        Parameters
        ----------
        mesh : DeviceMesh
            With one dimension, or one that is called ``"stage"``: its ranks hold the stages, in turn where
            there are more stages than ranks.

        Returns
        -------
        list of PipelineStage
            One where there are as many ranks as stages: ``(stage,) = pipe.to_pipelining(mesh)``.

        Raises
        ------
        PlanMismatchError
            A value goes past the next stage, or is no tensor; a parameter is used by several stages; ranks
            have planned differently. The message names it, the stages, and what to do.
        ValueError
            The mesh does not fit the number of stages.
        """
        from .pipelining import pipeline_stages

        looks.show(self.model)
        self._planning.newest()
        programs = self._planning.programs()
        return pipeline_stages(self._planning.made, programs, mesh)


def _threads(executor: str, n_devices: int) -> int:
    """CPU threads of a stage: this host's cores, shared among the stages that it runs."""
    ours = launched.world_size() > 1 and executor in ("auto", "torchrun")
    return threads_per_stage(launched.local_size() if ours else n_devices)

"""`Pipeline`: what users hold in their hands.

The files beside this one join the two halves: the compiler (dtrp/partitioner) never runs anything, the
runtime (dtrp/runtime) never sees a graph.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import networkx as nx
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from .errors import DtrpError
from .exclusive import EXCLUSIVE
from .loss_check import check_loss
from .orders import choose_order
from .partitioner.capture import capture
from .partitioner.capture.fits import Fits
from .partitioner.capture.modes import Flags, flags_of, training_flags
from .partitioner.capture.state import Watch
from .partitioner.compiler import Compiled, Request, adapt, compile_model, reprice, threads_per_stage
from .partitioner.example import call_arguments, keep_example
from .partitioner.plan import Plan
from .partitioner.report import PartitionReport, shared
from .partitioner.split import split
from .partitioner.training import Training
from .programs import make_programs
from .rebalancing import better_cut, recut_model
from .runtime import launched
from .runtime.config import TrainConfig
from .runtime.predictors import Predictor
from .runtime.program import StageProgram
from .runtime.rebalance import Move
from .runtime.stats import StageStats
from .runtime.trainer import Trainer
from .stages import Stage, submodules_of
from .training_report import TrainingReport
from .trial import tried

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.pipelining import PipelineStage


class Pipeline:
    """A model cut into stages. Made by `compile`.

    Called like the model, it gives the same result, differentiable, in this process, stage after stage.
    """

    def __init__(self, model: nn.Module, request: Request) -> None:
        self.model = model
        self._request = request
        self._compiled: Compiled | None = None  # the latest that was used
        self._variants: dict[Any, Compiled] = {}  # by flags, and whether gradients are enabled
        self._watch: Watch | None = None
        self._call: tuple[Sequence[Any], Mapping[str, Any]] = ((), {})  # the latest
        self._fits: dict[int, Fits] = {}
        self._example: list[Tensor | None] = []  # of the call that was planned for, to verify exports with

    def __getattr__(self, name: str) -> Any:
        if hasattr(type(self), name):  # a property failed: let it say why
            return object.__getattribute__(self, name)
        raise AttributeError(
            f"a Pipeline has no {name!r}; the model is pipe.model, training is pipe.trainer(...), devices "
            f"are chosen by dtrp.compile(devices=...)"
        )

    # ---- the model's own interface ---------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The same as ``model(*args, **kwargs)``; plans first if that has not been done.

        Raises
        ------
        TypeError, ValueError
            The arguments have another structure, or a shape that the graph is not for (with what to do).
        """
        self.prepare(args, kwargs)
        tensors = self.bind(args, kwargs)
        return self._planned.split.graph(any(flags_of(self.model)))(*tensors)

    @property
    def training(self) -> bool:
        """Whether the model is in train mode."""
        return self.model.training

    def train(self, mode: bool = True) -> Pipeline:
        """As on the model."""
        self.model.train(mode)
        return self

    def eval(self) -> Pipeline:
        """As on the model."""
        return self.train(False)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The model's parameters."""
        return self.model.parameters(recurse)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """The model's parameters by their original names."""
        return self.model.named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's own state, original names."""
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
        """As on the model."""
        return self.model.load_state_dict(state_dict, strict=strict)

    # ---- what was decided ------------------------------------------------------------------------------

    @property
    def n_stages(self) -> int:
        return len(self._request.devices)

    @property
    def graph(self) -> nx.DiGraph:
        """The cost model: see `dtrp.partitioner.costs.cost_graph` for the attributes."""
        return self._planned.graph

    @property
    def plan(self) -> Plan:
        """Which node is in which stage; ``plan.save(path)`` to keep it."""
        return self._planned.plan

    @property
    def report(self) -> PartitionReport:
        """What was decided and why; print it."""
        return self._planned.report

    @property
    def stages(self) -> list[Stage]:
        """The stages, first to last."""
        made = self._planned.split
        return [
            Stage(
                index=k,
                device=self._request.devices[k],
                inputs=tuple(n.name for n in made.train.modules[k].graph.find_nodes(op="placeholder")),
                outputs=wires.outputs,
                submodules=submodules_of(made.train.modules[k]),
                _modules=(made.eval.modules[k], made.train.modules[k]),
                _model=self.model,
            )
            for k, wires in enumerate(made.train.wiring.stages)
        ]

    @property
    def _planned(self) -> Compiled:
        if self._compiled is None:
            raise DtrpError(
                "the pipeline has not been planned yet: pass example_inputs to dtrp.compile, or call the "
                "pipeline (or train a batch) first"
            )
        return self._compiled

    @property
    def _first(self) -> Compiled:
        """The variant that was planned, and whose nodes the costs are of; others are laid over it."""
        return next(iter(self._variants.values()))

    # ---- training --------------------------------------------------------------------------------------

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
            flight (ours, after PipeDream's asynchronous 1F1B). auto: lean where the plan's link latency is at
            most a tenth of a tick.
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
            batches are done. Under a launcher cuts stay where they are. From a move on the bits are those of
            a run saved there and loaded under the new plan; as it depends on the clock, ``False`` pins the
            cuts, and with them the bits.
        autosave : (path, seconds), optional
            Save the run to this file (`Trainer.save`) when so many seconds have passed since the last time.

        init : callable or path, optional
            Under a launcher, for a model on the meta device: each rank makes its own stage's tensors real,
            with values that ``init(name, tensor)`` fills in, or that a folder has by name (of safetensors
            files, or of `Trainer.save`). No rank holds the whole then.

        Returns
        -------
        Trainer

        Raises
        ------
        TypeError, ValueError
            Arguments of the wrong kind, or a combination that makes no sense (with the reason).
        """
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
            threads=_threads(executor, self.n_stages) if threads is None else threads,
            max_grad_norm_lag=max_grad_norm_lag,
            order=schedule,
            micro_batches=micro_batches,
            exact_start=exact_start,
        )
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        of_loss = isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters())
        if not trainable and not of_loss:
            raise ValueError("no parameter of the model requires gradient: there is nothing to train")
        for name, p in trainable.items():
            ranks = launched.world_size() > 1 and executor in ("auto", "torchrun")
            if p.is_meta and not (ranks and init is not None):
                raise ValueError(
                    f"the parameter {name!r} is on the meta device, without values, which is enough to plan "
                    f"with; to train, use model.to_empty(device='cpu') and initialise it first (or give "
                    f"init, under a launcher)"
                )
        for path, module in self.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                raise TypeError(
                    f"the module {path or 'itself'!r} is TorchScript, whose parameters cannot be handed to a "
                    "stage's optimizer: train the module that it was made from, and script it afterwards"
                )
        return Trainer(
            self,
            config,
            executor=executor,
            progress=progress,
            record=record,
            timeline=timeline,
            watchdog=watchdog,
            batch_compensation=batch_compensation,
            compensation_warmup=compensation_warmup,
            tensorboard=tensorboard,
            logger=logger,
            autosave=autosave,
            init=init,
            rebalance=False if rebalance == "auto" and self._request.plan is not None else rebalance,
        )

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

        The model's present weights are exported, in eval mode; the model's own mode stays as it is. Inside
        ``with pipe.trainer(...)`` the newest weights are in the workers: export after the block. The folder
        is written aside and moved into place at the end: a failed export leaves nothing behind.
        `dtrp.onnx.load_chain` runs the result without torch.

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

        made = self._planned
        example = self._example if inputs is None else keep_example(self.bind(*call_arguments(inputs)))
        # Cut anew: parameters may have been replaced since the model was captured.
        cut = split(made.captured, made.plan, made.hazards)
        return export_chain(
            made.captured,
            cut.eval,
            Path(directory),
            submodules=[submodules_of(module) for module in cut.eval.modules],
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

        programs = self.programs()
        return pipeline_stages(self._planned, programs, mesh)

    # ---- what the trainer asks for (runtime/compiled.py) ----------------------------------------

    def expect(self, config: TrainConfig, optimizer_bytes: float) -> Training:
        """How training will go: what is planned from now on is planned for that, and the report says it.

        What is still to be chosen counts as the paper's order and whole batches, which take most memory.
        """
        schedule = config.decided().schedule(self.n_stages)
        training = Training(
            optimizer_bytes=optimizer_bytes,
            predicts=config.predicts,
            horizon=config.horizon,
            order=schedule.order,
            micro_batches=schedule.parts,
            recompute=config.recompute(True),
            known=True,
        )
        self._request = replace(self._request, training=training)
        if self._compiled is not None:
            with EXCLUSIVE:
                report = reprice(self._first, self._request)
                self._compiled = replace(self._compiled, report=report)
                self._variants = {key: replace(c, report=report) for key, c in self._variants.items()}
        return training

    def report_on(
        self,
        config: TrainConfig,
        training: Training,
        stats: Sequence[StageStats],
        executor: str,
        moves: Sequence[Move] = (),
    ) -> TrainingReport:
        """What was predicted of a run beside what it measured."""
        made, request = self._planned, self._request
        report = (
            made.report
            if training == request.training
            else reprice(self._first, replace(request, training=training))
        )
        cores = shared(made.graph.graph["specs"] * self.n_stages)
        parts = training.micro_batches
        return TrainingReport.of(report, stats, config, parts, executor, cores, moves)

    def better_cut(self, training: Training, stats: Sequence[StageStats]) -> Move | None:
        """Other stages that would be faster, as far as these measurements tell."""
        if training is not self._request.training:  # another trainer was made since: its stages are these
            return None
        with EXCLUSIVE:
            return better_cut(next(iter(self._variants.values())), self._request, stats)

    def recut(self, move: Move, loss: nn.Module | None) -> tuple[list[StageProgram], Training]:
        """As `programs`, of the stages that a move makes; nothing has changed if that fails."""
        with EXCLUSIVE:
            before = self._compiled, self._variants, self._request
            key, base = next(iter(self._variants.items()))
            made, self._request = recut_model(base, self._request, move)
            self._compiled, self._variants = made, {key: made}
            try:
                return self.programs(loss), self._request.training
            except BaseException:
                self._compiled, self._variants, self._request = before
                raise

    def planned(self) -> str:
        """The plan as text, for `adopt`."""
        made = self._planned
        return json.dumps({"plan": made.plan.to_dict(), "opened": list(made.captured.opened)})

    def adopt(self, text: str) -> None:
        """Follow the plan that another process made for the same model."""
        if self._compiled is not None and self.planned() == text:
            return
        told = json.loads(text)
        plan, opened = Plan.of_dict(told["plan"]), tuple(told["opened"])
        self._request = replace(self._request, plan=plan, opened=opened)
        self._compiled, self._watch, self._variants, self._fits = None, None, {}, {}

    def prepare(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Plan for a call with these arguments, unless planned already; again if the model was changed.

        Raises
        ------
        CaptureError, PlanMismatchError
            The model was changed since, and could not be captured again or does not fit its plan any more.
        """
        with EXCLUSIVE:
            self._call = args, kwargs
            changed = self._watch.changed() if self._watch is not None else ""
            if changed:
                self._compiled, self._watch, self._variants, self._fits = None, None, {}, {}
            try:
                self._compiled = self._variant(flags_of(self.model), torch.is_grad_enabled())
            except DtrpError as error:
                if changed:
                    raise type(error)(
                        f"{changed} is not as it was when the pipeline was compiled, and the model could not "
                        f"be compiled again: {error}"
                    ) from error
                raise

    def _variant(self, flags: Flags, grad: bool) -> Compiled:
        """The stages for these modes: those that are there, or others laid over them."""
        base = next(iter(self._variants.values()), None)
        if base is None:
            args, kwargs = self._call
            for value in (*args, *kwargs.values()):
                if type(value).__module__ == "numpy" or isinstance(value, DataLoader):
                    raise TypeError(f"the model is to be called with a {type(value).__name__}: give tensors")
            base = compile_model(self.model, self._request, args, kwargs)
            self._request = self._request.in_order(base.plan.placement)
            on_host = all(device.type == "cpu" for device in self._request.devices)
            measured = self._request.costs == "measured" and not self._request.speed
            alone = launched.world_size() == 1  # ranks would all try at once, each with all stages
            if measured and on_host and alone and self.n_stages > 1:
                tensors = base.captured.signature.flatten(args, kwargs)
                base = tried(base, self._request, self.model, tensors)
            self._variants[base.captured.flags, True] = base
            whole = {kept.module for kept in base.captured.kept_whole}
            called = {
                str(node.target)
                for mode in (base.captured.train, base.captured.eval)
                for node in mode.module.graph.find_nodes(op="call_module")
            }
            self._watch = Watch(self.model, whole, base.captured.tensor_attributes, called)
            self._compiled = base
            self._example = keep_example(self.bind(*self._call))
        grad = grad or not base.captured.asks_grad
        if not any(flags):
            flags = base.captured.flags  # its eval graph
        if (flags, grad) not in self._variants:
            captured = capture(self.model, *self._call, opened=base.captured.opened, flags=flags, grad=grad)
            self._variants[flags, grad] = adapt(base, captured, self._request)
        return self._variants[flags, grad]

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of one call, in the order of the wiring's model inputs.

        Raises
        ------
        TypeError, ValueError
            They do not fit the example that was compiled for.
        """
        captured = self._planned.captured
        tensors = captured.signature.flatten(args, kwargs)
        with EXCLUSIVE:  # a call of another shape may be traced
            fits = self._fits.get(id(captured))
            if fits is None:
                fits = self._fits[id(captured)] = Fits(captured)
            fits.check(tensors, args, kwargs, self.model.training)
        return tensors

    def check_loss(self, config: TrainConfig, inputs: Sequence[Tensor], target: Any) -> None:
        """Refuse a loss that surely cannot be trained with, before any worker starts."""
        with EXCLUSIVE:
            check_loss(self._planned.captured, config, inputs, target)

    def choose_order(self, config: TrainConfig, inputs: Sequence[Tensor], target: Any) -> TrainConfig:
        """The settings with order and micro-batches decided, where the user leaves them open."""
        with EXCLUSIVE:
            return choose_order(self._planned, config, inputs, target)

    def programs(self, loss: nn.Module | None = None) -> list[StageProgram]:
        """What each stage runs, with the model's present parameters and their ``requires_grad``."""
        with EXCLUSIVE:
            compiled = self._compiled = self._variant(training_flags(self.model), True)
            evaluate = self._variant(compiled.captured.flags, False)  # which is done without gradients
            return make_programs(compiled, evaluate, self.model, self._request.devices, loss)


def _threads(executor: str, n_stages: int) -> int:
    """CPU threads of a stage: this host's cores, shared among the stages that it runs."""
    ours = launched.world_size() > 1 and executor in ("auto", "torchrun")
    return threads_per_stage(launched.local_size() if ours else n_stages)

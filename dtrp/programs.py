"""From the compiler's stages to what the runtime runs: graphs become plain modules."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from .partitioner.capture.modes import in_mode
from .partitioner.compiler import Compiled
from .partitioner.split import attributes, split
from .runtime.handback import LOSS
from .runtime.program import Code, StageModule, StageProgram, Tie
from .stage_code import stage_code
from .wiring import CALLER, StageWires, Wiring


def make_programs(
    compiled: Compiled,
    evaluation: Compiled,
    model: nn.Module,
    devices: Sequence[torch.device],
    loss: nn.Module | None = None,
) -> list[StageProgram]:
    """What each stage runs, with the model's present parameters and their ``requires_grad``; ``loss`` as a
    part of the last one.

    ``evaluation`` is another than ``compiled`` where the model's code asks whether gradients are enabled.
    """
    _cut_from_history(model)
    cut = split(compiled.captured, compiled.plan, compiled.hazards)
    evaluated = cut.eval
    if evaluation is not compiled:
        evaluated = split(evaluation.captured, evaluation.plan, evaluation.hazards).eval
    order, drawing = _positions(model), compiled.hazards.drawing
    with in_mode(model, compiled.captured.flags):  # a stage's train mode is as it was made
        modules = [
            _stage_module(
                train,
                evaluate,
                stage_code(train, device, again if isinstance(again, tuple) else (), drawing),
                stage_code(evaluate, device),
                order,
                loss if k == len(devices) - 1 else None,
            )
            for k, (train, evaluate, device, again) in enumerate(
                zip(cut.train.modules, evaluated.modules, devices, compiled.plan.recompute, strict=True)
            )
        ]
    train = _as_trained(cut.train.wiring, modules)
    ties = _ties(modules, train.trained)
    written = compiled.hazards.written_inputs
    return [
        StageProgram(
            stage=k,
            module=module,
            train=train,
            evaluate=evaluated.wiring,
            recompute=compiled.plan.recomputes[k],
            device=devices[k],
            ties=ties,
            writes_inputs=not written.isdisjoint(cut.train.wiring.caller_inputs(k)),
            draws=any(
                not drawing.isdisjoint(node.name for node in mode.modules[k].graph.nodes)
                for mode in (cut.train, cut.eval)
            ),
        )
        for k, module in enumerate(modules)
    ]


def _stage_module(
    train: fx.GraphModule,
    evaluate: fx.GraphModule,
    train_code: Code,
    evaluate_code: Code,
    order: Mapping[str, int],
    loss: nn.Module | None,
) -> StageModule:
    """A stage's graphs as a plain module that runs without fx.

    Its parameters come in the model's own order: optimizers and norms then do their sums in that order too.
    """
    held = {**attributes(train, train.graph), **attributes(evaluate, evaluate.graph)}
    names = sorted(held, key=lambda name: (order.get(name, len(order)), name.count("."), name))
    inside = {name: held[name] for name in names}
    if loss is not None:
        if any(name.split(".")[0] == LOSS for name in names):
            raise ValueError(
                f"the loss has parameters or buffers, which are trained under the name {LOSS!r}, but the "
                f"model has a module of that name; rename it in the model"
            )
        inside[LOSS] = loss
    return StageModule(inside, train_code, evaluate_code)


def _positions(model: nn.Module) -> dict[str, int]:
    """Where each module, parameter and buffer stands in the model, in the order of its `parameters()`."""
    names: list[str] = []
    for path, module in model.named_modules(remove_duplicate=False):
        names.append(path)
        own = (*module._parameters, *module._buffers)
        names += [f"{path}.{name}" if path else name for name in own]
    return {name: i for i, name in enumerate(dict.fromkeys(names))}


def _cut_from_history(model: nn.Module) -> None:
    """Cut tensors that forward left on attributes from the graph of that pass: stages are copied and sent.

    The hooks of ``torch.nn.utils.weight_norm`` keep a module's weight so, and make it anew in every pass.
    """
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                vars(module)[name] = value.detach()


def _as_trained(wiring: Wiring, modules: Sequence[nn.Module]) -> Wiring:
    """The wiring in which values carry gradient only where something upstream is trained: a frozen backbone
    runs forward once and takes no part in the backward pass."""
    stages: list[StageWires] = []
    for wires, module in zip(wiring.stages, modules, strict=True):
        carries = any(p.requires_grad for p in module.parameters()) or any(
            source.stage != CALLER and stages[source.stage].differentiable[source.index]
            for source in wires.inputs
        )
        stages.append(wires if carries else replace(wires, differentiable=(False,) * len(wires.outputs)))
    return replace(wiring, stages=tuple(stages))


def _ties(modules: Sequence[nn.Module], trained: Collection[int]) -> tuple[Tie, ...]:
    """Trainable parameters that several stages hold; first the lowest stage that has a gradient for it."""
    holders: dict[int, list[tuple[int, str]]] = {}
    for k, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                holders.setdefault(id(parameter), []).append((k, name))
    return tuple(
        Tie(tuple(sorted(places, key=lambda place: (place[0] not in trained, place[0]))))
        for places in holders.values()
        if len(places) > 1
    )


def check_trainable(model: nn.Module, loss_fn: Any, *, makes_real: bool) -> None:
    """Whether there is something to train; ``makes_real``: also where it is still on the meta device.

    Raises
    ------
    ValueError, TypeError
        Nothing requires gradient, a parameter has no values, or a module's cannot be handed to a stage.
    """
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    of_loss = isinstance(loss_fn, nn.Module) and any(p.requires_grad for p in loss_fn.parameters())
    if not trainable and not of_loss:
        raise ValueError("no parameter of the model requires gradient: there is nothing to train")
    for name, p in trainable.items():
        if p.is_meta and not makes_real:
            raise ValueError(
                f"the parameter {name!r} is on the meta device, without values, which is enough to plan "
                f"with; to train, use model.to_empty(device='cpu') and initialise it first (or give "
                f"init, under a launcher)"
            )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"the module {path or 'itself'!r} is TorchScript, whose parameters cannot be handed to a "
                "stage's optimizer: train the module that it was made from, and script it afterwards"
            )

"""From the compiler's stages to what the runtime runs: graphs become plain modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx, nn

from .partitioner.capture.modes import in_mode
from .partitioner.compiler import Compiled
from .partitioner.split import attributes, split
from .runtime.program import Code, StageModule, StageProgram, Tie


def make_programs(
    compiled: Compiled, evaluation: Compiled, model: nn.Module, devices: Sequence[torch.device]
) -> list[StageProgram]:
    """What each stage runs, with the model's present parameters and their ``requires_grad``.

    ``evaluation`` is another than ``compiled`` where the model's code asks whether gradients are enabled.
    """
    _cut_from_history(model)
    cut = split(compiled.captured, compiled.plan, compiled.hazards)
    evaluated = cut.eval
    if evaluation is not compiled:
        evaluated = split(evaluation.captured, evaluation.plan, evaluation.hazards).eval
    order = _positions(model)
    with in_mode(model, compiled.captured.flags):  # a stage's train mode is as it was made
        modules = [
            _stage_module(train, evaluate, device, order)
            for train, evaluate, device in zip(cut.train.modules, evaluated.modules, devices, strict=True)
        ]
    ties = _ties(modules)
    written = compiled.hazards.written_inputs
    return [
        StageProgram(
            stage=k,
            module=module,
            train=cut.train.wiring,
            evaluate=evaluated.wiring,
            recompute=compiled.plan.recompute[k],
            device=devices[k],
            ties=ties,
            writes_inputs=not written.isdisjoint(cut.train.wiring.caller_inputs(k)),
        )
        for k, module in enumerate(modules)
    ]


def _stage_module(
    train: fx.GraphModule, evaluate: fx.GraphModule, device: torch.device, order: Mapping[str, int]
) -> StageModule:
    """A stage's graphs as a plain module that runs without fx.

    Its parameters come in the model's own order: optimizers and norms then do their sums in that order too.
    """
    held = {**attributes(train, train.graph), **attributes(evaluate, evaluate.graph)}
    names = sorted(held, key=lambda name: (order.get(name, len(order)), name.count("."), name))
    return StageModule({name: held[name] for name in names}, _code(train, device), _code(evaluate, device))


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


def _code(module: fx.GraphModule, device: torch.device) -> Code:
    """A graph's generated code, with device constants set to ``device``."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node in graph.nodes:
        if any(isinstance(a, torch.device) for a in (*node.args, *node.kwargs.values())):
            node.args = tuple(device if isinstance(a, torch.device) else a for a in node.args)
            node.kwargs = {k: device if isinstance(a, torch.device) else a for k, a in node.kwargs.items()}
    code = graph.python_code("self")
    return Code(code.src, code.globals)


def _ties(modules: Sequence[nn.Module]) -> tuple[Tie, ...]:
    """Trainable parameters that several stages hold."""
    holders: dict[int, list[tuple[int, str]]] = {}
    for k, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                holders.setdefault(id(parameter), []).append((k, name))
    return tuple(Tie(tuple(places)) for places in holders.values() if len(places) > 1)
